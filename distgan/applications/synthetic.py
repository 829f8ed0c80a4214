"""Synthetic data sets: labelled images that a generator draws, in a form that other libraries read."""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from distgan import __version__, files, pictures
from distgan.applications.classes import in_file_names
from distgan.applications.search import on_device, opened
from distgan.errors import UserError
from distgan.evaluation import weights as extractor_weights
from distgan.evaluation.extractors import Extractor
from distgan.models import CHUNK, Generator, to_bytes
from distgan.parallel.ranks import Ranks, together
from distgan.progress import shown
from distgan.recipe import EvalConfig
from distgan.storage import tensors
from distgan.storage.exported import Exported

FORMS = ("parquet", "folder")
_HEADER = "---\ntags: [synthetic, distgan-synthetic]\n"  # of the card of a folder that may be replaced
_ROWS = 1000  # of a row group: images in memory at once
_PATIENCE = 10_000  # samples after which a filter may give up
_HOPELESS = 0.001  # share of samples that pass, below which it does


@dataclass(frozen=True)
class Synthesized:
    """What a synthetic data set holds."""

    folder: Path
    counts: dict[str, int]
    """The number of images of each class, by name."""
    drawn: dict[str, int]
    """The number of samples that were drawn for it: more than `counts` if there was a filter."""


def synthesize(
    run: str | os.PathLike[str] | Exported,
    out: str | os.PathLike[str],
    *,
    per_class: int | None = None,
    counts: Mapping[str | int, int] | None = None,
    form: str = "parquet",
    min_confidence: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Synthesized:
    """Collective: writes a labelled data set of a generator's images. Several processes share the drawing.

    Image i of a class depends only on the seed, the class and i. Only a thousand images are in memory at once.
    `datasets.load_dataset(out)` reads the result, and so does distgan.

    Args:
        run: the folder of a run or of an exported generator, or a generator's id on the hub. It needs labels.
        out: the folder to write. It gets a card, README.md, and `data/train-00000-of-00001.parquet` or, in a folder,
            `train/0-CLASS/000000.png` and `train/metadata.jsonl`.
        per_class: images of each class. Give this or `counts`.
        counts: images of each class by its name or label; other classes get none.
        form: `parquet` or `folder`.
        min_confidence: keep only images that the run's classifier gives at least this probability to be of their class.
        seed: the seed of the images.
        overwrite: replace an earlier synthetic data set in `out`.

    Returns:
        The same on every rank.

    Raises:
        UserError: there is no generator or it has no labels, a class or number does not fit, hardly any image passes
            the filter, or the folder cannot be written.
    """
    found, folder = opened(run), Path(out)
    wanted = _wanted(found.generator, per_class, counts)
    if form not in FORMS:
        raise UserError(f'the form is "{form}", but must be one of {", ".join(FORMS)}.')
    if min_confidence is not None and not 0 < min_confidence < 1:
        raise UserError(f"the least confidence is {min_confidence}, but must be between 0 and 1.")
    files.check_folder("--out", folder, overwrite=overwrite)
    inside = {file.name for file in folder.iterdir() if file.name[0] != "."} if folder.is_dir() else set()
    if inside and (not _text(folder / "README.md").startswith(_HEADER) or inside - {"README.md", "data", "train"}):
        raise UserError(
            f"--out is {folder}, which holds something else than a synthetic data set: choose a new folder."
        )
    asked = {"counts": str(wanted), "seed": seed, "confidence": min_confidence}
    described = {"generator": tensors.digest(found.generator), **asked}
    with together(described) as ranks, on_device(ranks, found.generator):
        judge = _judge(found, ranks) if min_confidence is not None else None
        drawn: dict[int, int] = {}
        names = class_names(found.generator)
        writing = _OnRankZero(
            folder,
            ranks,
            names,
            form=form,
            confidence=judge is not None,
            total=sum(wanted.values()),
            overwrite=overwrite,
        )
        with writing as data_set:
            for label, count in wanted.items():
                for images, so_far in _of_class(found.generator, label, count, seed, judge, min_confidence, ranks):
                    data_set.add(images)
                    drawn[label] = so_far
            data_set.finish(_card(found, wanted, drawn, form=form, min_confidence=min_confidence, seed=seed))
    return Synthesized(
        folder, {names[label]: count for label, count in wanted.items()}, {names[i]: n for i, n in drawn.items()}
    )


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""


def class_names(generator: Generator) -> list[str]:
    """Returns the names of a generator's classes; their labels if they have no names."""
    return list(generator.class_names) or [str(label) for label in range(len(generator.class_counts))]


def _wanted(generator: Generator, per_class: int | None, counts: Mapping[str | int, int] | None) -> dict[int, int]:
    """Returns the number of images of each class, by label."""
    if not generator.class_counts:
        raise UserError(
            "the generator was trained without labels, so its images have none: train one with "
            "--model.conditional=true, or draw images without labels with `distgan sample`."
        )
    if (per_class is None) == (counts is None):
        raise UserError(
            "the number of images must be given in one way: either --per-class N, or --count CLASS=N for some classes."
        )
    if counts is None:
        assert per_class is not None
        counts = {label: per_class for label, seen in enumerate(generator.class_counts) if seen > 0}
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"the number of images of class {name} is {count}, but must be at least 1.")
    return dict(sorted((generator.label_of(name), count) for name, count in counts.items()))


# Drawing --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Images of one class."""

    pixels: Tensor
    """uint8 (n, C, H, W)."""
    label: int
    confidence: Tensor | None = None
    """Probabilities by the classifier, (n,); None without a filter."""


def _judge(found: Exported, ranks: Ranks) -> Extractor:
    """Collective: returns the classifier of the generator's run, on the rank's device; trains it first if needed."""
    config, images = EvalConfig(extractor="classifier"), found.recipe.data if found.recipe is not None else None
    if images is None and not (found.extractor is not None and found.extractor.exists()):
        raise UserError(
            "a filter needs the classifier of the generator's run, but there is neither one beside the generator nor a "
            "recipe to train it by: give the folder of the run."
        )
    weights = ranks.on_rank_zero(lambda: extractor_weights.find(config, images, found.spec, own=found.extractor))
    return extractor_weights.build(config, weights, found.spec).to(ranks.accelerator.device)


def _of_class(
    generator: Generator,
    label: int,
    count: int,
    seed: int,
    judge: Extractor | None,
    least: float | None,
    ranks: Ranks,
) -> Iterator[tuple[Images, int]]:
    """Collective: yields images of a class on rank zero, in order, and the number of samples drawn so far.

    In each round every rank draws one chunk; chunks that are not needed at the end are dropped, so the number of ranks
    changes nothing.
    """
    kept = drawn = 0
    for first in range(ranks.rank * CHUNK, 10**12, ranks.world * CHUNK):
        images = generator.images(first, seed=seed, stream=f"synthetic.{label}", label=label)
        pixels, confidence = to_bytes(images), torch.ones(CHUNK)
        if judge is not None and least is not None:
            _, logits = judge(pixels.to(images.device))
            confidence = logits.softmax(1)[:, label].cpu()
        passed = confidence >= (least or 0)
        at = torch.nonzero(passed).flatten() + first  # which samples these are
        rows = ranks.gather_rows(pixels[passed]), ranks.gather_rows(confidence[passed])
        every = ranks.gather(at)
        numbers = torch.cat(every)[: count - kept]
        _refuse_hopeless(generator, label, least, ranks, kept=kept, drawn=drawn, found=[len(one) for one in every])
        enough = kept + len(numbers) == count
        drawn = int(numbers[-1]) + 1 if enough else drawn + ranks.world * CHUNK
        kept += len(numbers)
        ranks.alive()
        some = [part[: len(numbers)] for part in rows]
        yield Images(some[0], label, some[1] if judge is not None else None), drawn
        if enough:
            return


def _refuse_hopeless(
    generator: Generator, label: int, least: float | None, ranks: Ranks, *, kept: int, drawn: int, found: Sequence[int]
) -> None:
    """Collective: gives up if hardly any image passes the filter, at the same image on any number of ranks.

    Args:
        generator: the generator.
        label: the class.
        least: the filter's confidence.
        ranks: the ranks.
        kept: images that passed before this round.
        drawn: images that were drawn before this round.
        found: how many of each rank's chunk pass, in this round.
    """
    for passed in found:
        kept, drawn = kept + passed, drawn + CHUNK
        if drawn >= _PATIENCE and kept < _HOPELESS * drawn:
            error = UserError(
                f"only {kept} of {drawn:,} images of class {class_names(generator)[label]} reach the confidence "
                f"{least}: choose a lower one, or train the generator longer."
            )
            raise ranks.reported_by_rank_zero(error)


# Writing --------------------------------------------------------------------------------------------------------------

_Add = Callable[[Images], None]


class _OnRankZero:
    """A data set that rank zero writes, whole or not at all; the other ranks write nothing."""

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        classes: Sequence[str],
        *,
        form: str,
        confidence: bool,
        total: int,
        overwrite: bool,
    ) -> None:
        self._folder, self._writes, self._overwrite = folder, ranks.rank == 0, overwrite
        self._how: dict[str, Any] = {"classes": classes, "form": form, "confidence": confidence}
        self._progress, self._ranks = shown(range(total), "drawing", total), ranks

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            if self._writes:
                undo.enter_context(files.written("--out", self._folder))
                self._partial = undo.enter_context(files.whole_folder(self._folder, overwrite=self._overwrite))
                self._add = undo.enter_context(write(self._partial, **self._how))
            self._open = undo.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._ranks.alone():  # an old data set of many files is removed
            self._open.__exit__(*error)

    def add(self, images: Images) -> None:
        """Writes images, and shows progress."""
        if self._writes:
            self._add(images)
            for _ in images.pixels:
                next(self._progress, None)

    def finish(self, card: str) -> None:
        """Writes the card."""
        if self._writes:
            (self._partial / "README.md").write_text(card, encoding="utf-8")


def write(
    folder: Path, classes: Sequence[str], *, form: str, confidence: bool = False
) -> contextlib.AbstractContextManager[_Add]:
    """Writes labelled images into an empty folder: yields a function that adds some, in this order.

    Args:
        folder: the folder.
        classes: names of the classes.
        form: one of `FORMS`.
        confidence: whether the images have confidences.
    """
    return _WRITERS[form](folder, classes, confidence)


@contextlib.contextmanager
def _parquet(folder: Path, classes: Sequence[str], with_confidence: bool) -> Iterator[_Add]:
    import datasets
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    columns: dict[str, Any] = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))}
    if with_confidence:
        columns["confidence"] = datasets.Value("float32")
    schema = datasets.Features(columns).arrow_schema
    (folder / "data").mkdir()
    waiting: list[dict[str, Any]] = []
    with ParquetWriter(folder / "data" / "train-00000-of-00001.parquet", schema) as writer:

        def write_rows() -> None:
            writer.write_table(pyarrow.Table.from_pylist(waiting, schema=schema))
            waiting.clear()

        def add(images: Images) -> None:
            for i, image in enumerate(images.pixels):
                row = {"image": {"bytes": _png(image), "path": None}, "label": images.label}
                more = {"confidence": float(images.confidence[i])} if images.confidence is not None else {}
                waiting.append({**row, **more})
                if len(waiting) == _ROWS:
                    write_rows()

        yield add
        if waiting:
            write_rows()


@contextlib.contextmanager
def _folder(folder: Path, classes: Sequence[str], with_confidence: bool) -> Iterator[_Add]:
    # A label before the name keeps the order of classes, and makes any name a harmless one: test, None, .net
    digits = len(str(len(classes) - 1))
    safe = [f"{label:0{digits}}-{name}" for label, name in enumerate(in_file_names(classes))]
    numbers = dict.fromkeys(range(len(classes)), 0)
    (folder / "train").mkdir()
    with (folder / "train" / "metadata.jsonl").open("w", encoding="utf-8") as stream:

        def add(images: Images) -> None:
            of_class = folder / "train" / safe[images.label]
            of_class.mkdir(exist_ok=True)
            for i, image in enumerate(images.pixels):
                file = of_class / f"{numbers[images.label]:06d}.png"
                numbers[images.label] += 1
                file.write_bytes(_png(image))
                row: dict[str, Any] = {"file_name": f"{of_class.name}/{file.name}", "label": classes[images.label]}
                if images.confidence is not None:
                    row["confidence"] = float(images.confidence[i])
                stream.write(json.dumps(row) + "\n")

        yield add


_WRITERS: dict[str, Callable[[Path, Sequence[str], bool], contextlib.AbstractContextManager[_Add]]] = {
    "parquet": _parquet,
    "folder": _folder,
}


def _png(image: Tensor) -> bytes:
    content = io.BytesIO()
    pictures.one(image).save(content, "PNG")
    return content.getvalue()


def _card(
    found: Exported,
    counts: Mapping[int, int],
    drawn: Mapping[int, int],
    *,
    form: str,
    min_confidence: float | None,
    seed: int,
) -> str:
    """Returns the card: Markdown with the hub's metadata at its top."""
    names, spec, recipe = class_names(found.generator), found.spec, found.recipe
    source = "an unknown data set" if recipe is None else recipe.data.id or recipe.data.path or recipe.data.source
    rows = [f"| {names[label]} | {count:,} | {drawn[label]:,} |" for label, count in counts.items()]
    kept = (
        f"An image was kept if the classifier of the generator's run gives it a probability of at least "
        f"{min_confidence} to be of its class. Such a filter makes the images more typical and less varied."
        if min_confidence is not None
        else "No image was left out."
    )
    table = "\n".join(rows)
    files_of_train = {"parquet": "data/*.parquet", "folder": "train/**"}[form]
    return f"""{_HEADER}task_categories: [image-classification]
configs:
- config_name: default
  data_files:
  - split: train
    path: "{files_of_train}"
---
# Synthetic images

**Every image of this data set is synthetic.** A generative adversarial network drew it, and no camera saw it. The label
is the class that the generator was asked for, which need not be what the image shows.

- Generator: {found.step:,} updates, trained with distgan {__version__} on {source}.
- Images: {sum(counts.values()):,} of {spec}, class after class.
- Form: {form}. Seed: {seed}.
- {kept}

| class | images | samples drawn for them |
|---|---|---|
{table}

## Limits

The images repeat what the generator learned from its training images, with their faults and biases, and can contain
near copies of them. They add no information about the world that those images did not have. Measure on real images
whether they help. What may be done with them depends on the licence of the training images.
"""
