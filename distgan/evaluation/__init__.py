"""Measures generators against real images. The numbers are the same on any number of ranks.

Each rank draws its share of the images and passes them through the extractor. Sums are taken in float64 over all ranks.
Only the features that KID and PRDC need go to rank zero, which computes the scores. The features of real images are
computed once and kept in the cache.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distgan import __version__, data, paths, seeding
from distgan.errors import UserError
from distgan.evaluation import scores
from distgan.evaluation import weights as extractor_weights
from distgan.evaluation.extractors import Classifier, Extractor, Inception
from distgan.evaluation.scores import ClassSums, Moments
from distgan.evaluation.weights import Weights
from distgan.models import CHUNK, STANDING, Generator, ImageSpec, has_batch_norm
from distgan.parallel.ranks import Ranks
from distgan.progress import shown
from distgan.recipe import EVAL_METRICS, DataConfig, EvalConfig
from distgan.storage import bundle, cache, tensors
from distgan.storage.exported import Exported
from distgan.storage.report import Report

_FORMAT = 1  # of what is kept of real images; goes up whenever anything changes it
_STREAM = "evaluation"
_SPLITS = 10  # of the Inception score
_NEIGHBOUR = 5  # of PRDC
_PRDC_MOST = 10_000  # most images of each kind, as in its authors' code, because it compares all pairs
_BLOCK = 1000  # images of each kind in a block of KID
# Parts of messages about training images, and what they become for a reference, which has no settings of its own.
_SAID_OF_A_REFERENCE = {
    "data.path": "the reference",
    ", or leave such pictures out with --data.skip_bad=true": "",
    "data.split is train, but the splits in": "the splits in the reference",
    "choose one with --data.split=NAME": "give the folder of one of them",
}


class Measured(NamedTuple):
    """The numbers of a generator, and how they were measured."""

    numbers: dict[str, float]
    """Numbers by name: the metrics, `spread` of the features, and with the classifier `classes` and how many are
    `drawn`."""
    protocol: dict[str, Any]
    """How the numbers were measured. Only numbers with equal protocols can be compared."""

    def report(self, generator: str, step: int, floor: dict[str, float] | None) -> Report:
        """Returns a report for a file: the numbers, the protocol, and `floor`, what real images score."""
        return Report(generator, step, self.numbers, floor, self.protocol)


class Evaluation:
    """Measures generators by one extractor against one set of real images. Each rank makes its own and calls `join`."""

    extractor: Extractor
    """The extractor on the rank's device; set by `join`."""
    floor: dict[str, float] | None
    """What real images of the other split score, which no generator is expected to beat; None if the source has no such
    split. Set by `join`."""

    def __init__(
        self, config: EvalConfig, images: DataConfig, spec: ImageSpec, *, rank: int, own_weights: Path | None = None
    ) -> None:
        """Checks everything that can be wrong. On rank zero, also finds or trains the extractor's weights.

        Args:
            config: extractor, metrics, reference and number of samples.
            images: the data set that the generator was trained on.
            spec: the generator's images.
            rank: the rank of this process.
            own_weights: where the generator's run keeps its classifier, if it has one.

        Raises:
            UserError: real images, labels or weights are missing or do not fit, or there are too few images.
        """
        self._config, self._data, self._spec = config, images, spec
        self._real = find_real(config.reference, images, spec)
        self._check_counts()
        if rank == 0 and config.reference not in ("train", "test") and self._real.images.left_out:
            print(f"distgan: {self._real.images.left_out}", file=sys.stderr, flush=True)
        self._weights = extractor_weights.find(config, images, spec, own=own_weights) if rank == 0 else None

    @property
    def fingerprint(self) -> str:
        """Returns the fingerprint of the real images."""
        return self._real.images.fingerprint

    @property
    def weights(self) -> Weights:
        """Returns the extractor's weights: on rank zero at once, on the others after `join`."""
        assert self._weights is not None
        return self._weights

    def join(self, ranks: Ranks) -> None:
        """Collective: gives every rank the extractor, and finds the features of the real images and the floor."""
        self._ranks = ranks
        self._weights = ranks.on_rank_zero(lambda: self._weights)
        self.extractor = extractor_weights.build(self._config, self.weights, self._spec).to(ranks.accelerator.device)
        self._reference = self._statistics(self._real)
        self.floor = self._find_floor()

    def measure(self, generator: Generator, *, seed: int = 0, weights: str = "averaged") -> Measured:
        """Collective: scores a generator by `eval.num` images. All ranks must have the same weights.

        Image i depends only on (seed, i). It runs in full precision, changes no random state, and keeps no image.

        Args:
            generator: the generator, on the ranks' device.
            seed: the seed of the images.
            weights: which weights the generator has, `averaged` or `raw`; for the protocol.
        """
        with self._ranks.alone(), _without_tf32():  # alone: every rank does the same, for a while
            generator = self._as_measured(generator)
        numbers = self._scores(lambda first, _: generator.draw(first, seed=seed, stream=_STREAM), self._config.num)
        protocol = self._protocol(seed=seed, weights=weights)
        if generator.class_counts:
            protocol["labels"] = "as often as the training images have them"
        if generator.truncation is not None:
            protocol["truncation"] = generator.truncation
        if self._standing and has_batch_norm(generator):
            protocol["standing"] = f"{self._standing} batches of {CHUNK} samples"
        return Measured(numbers, protocol)

    @property
    def _standing(self) -> int:
        """Returns how many batches batch norm's statistics are taken from; 0 if they are the running ones."""
        return self._config.standing or (STANDING if self._config.truncation is not None else 0)

    def _as_measured(self, generator: Generator) -> Generator:
        """Returns the generator as `eval.truncation` and `eval.standing` ask for it."""
        if self._config.truncation is not None:
            return generator.truncated(self._config.truncation, batches=self._standing)
        return generator.standing(self._standing) if self._standing else generator

    def _scores(self, draw: Callable[[int, int], Tensor], num: int) -> dict[str, float]:
        """Collective: passes `num` images through the extractor and returns their scores."""
        keep = num if self._asks_for("kernel_distance") else _PRDC_MOST if self._asks_for("prdc") else 0
        drawn_features = self._extract(draw, num, keep=keep, what="evaluating")

        def score() -> dict[str, float]:
            assert self._reference is not None
            return self._numbers(self._reference, drawn_features)

        return self._ranks.on_rank_zero(score)

    def _numbers(self, real: "_Features", fake: "_Features") -> dict[str, float]:
        """Computes every metric that was asked for. Rank zero only."""
        numbers: dict[str, float] = {}
        for name in self._config.measured:
            formula = FORMULAS[EVAL_METRICS[self._config.extractor][name]]
            numbers |= formula(name, real, fake, self._ranks.accelerator.device)
        numbers["spread"] = scores.spread(real.moments, fake.moments)
        if self._config.extractor == "classifier":
            numbers["classes"] = float(self.extractor.classes)
            numbers["drawn"] = float((fake.classes.shares > 0.1 * real.classes.shares).sum())
        return numbers

    def _extract(self, draw: Callable[[int, int], Tensor], num: int, *, keep: int, what: str) -> "_Features":
        """Collective: passes images through the extractor, and returns their sums and features.

        Args:
            draw: (first, count) -> at least `count` images, beginning with image number `first`.
            num: the number of images.
            keep: how many images' features to keep, on rank zero.
            what: the text beside the progress bar.
        """
        ranks, device = self._ranks, self._ranks.accelerator.device
        found = _Features.nothing(self.extractor, num)
        rows = [found.rows]
        chunks = range(-(-num // CHUNK))
        mine = chunks[len(chunks) * ranks.rank // ranks.world : len(chunks) * (ranks.rank + 1) // ranks.world]
        with torch.inference_mode(), _without_tf32():
            for chunk in shown(mine, what, len(mine), each=CHUNK * ranks.world) if ranks.rank == 0 else mine:
                first = chunk * CHUNK
                images = draw(first, min(CHUNK, num - first))[: num - first]
                features, logits = (output.cpu() for output in self.extractor(images.to(device)))
                found.moments.add(features)
                found.classes.add(logits, torch.arange(first, first + len(images)))
                rows.append(features[: max(keep - first, 0)].clone())
                ranks.alive()
        ranks.all_reduce_sums([*found.moments.sums.values(), *found.classes.sums.values()])
        found.rows = ranks.gather_rows(torch.cat(rows))
        return found

    def _statistics(self, real: "Real") -> "_Features | None":
        """Collective: returns the features of real images on rank zero, from the cache if they are there."""
        num = len(real.images.pixels)
        keep = min(num, max(_PRDC_MOST, self._config.num if self._asks_for("kernel_distance") else 0))
        described = [_FORMAT, self.weights.sha256, real.images.fingerprint, list(real.images.pixels.shape), keep]
        folder = cache.path(self._data, "references", described)
        if not self._ranks.on_rank_zero(lambda: bundle.is_whole(folder)):
            found = self._extract(real.draw, num, keep=keep, what=f"looking at {real.what}")
            state = {"real": real.what, "extractor": self._config.extractor}
            self._ranks.on_rank_zero(lambda: cache.put(folder, found.files(), state))
        # Read even when just written: the entry may be another process's, which adds in another order.
        return _Features.read(folder, self.extractor, num) if self._ranks.rank == 0 else None

    def _find_floor(self) -> dict[str, float] | None:
        """Collective: returns the floor, from rank zero's cache if it is there."""
        with self._ranks.alone():  # this machine may have to prepare the images first
            other = self._find_other()
        fingerprints = self._ranks.gather(other.images.fingerprint if other is not None else None)
        if other is None or len(set(fingerprints)) > 1:  # a machine lacks the split: then there is no floor
            return None
        num, kept = len(other.images.pixels), self._config.num if self._asks_for("kernel_distance") else 0
        prints, shape = [self.fingerprint, fingerprints[0]], list(other.images.pixels.shape)
        described = [_FORMAT, self.weights.sha256, *prints, self._config.measured, shape, kept]
        folder = cache.path(self._data, "floors", described)
        if not self._ranks.on_rank_zero(lambda: bundle.is_whole(folder)):
            numbers = self._scores(other.draw, num)
            self._ranks.on_rank_zero(lambda: cache.put(folder, {}, numbers))
        return self._ranks.on_rank_zero(lambda: bundle.read_state(folder))

    def _find_other(self) -> "Real | None":
        """Returns the split that is not the reference, if this machine has it."""
        other = {"train": "test", "test": "train"}.get(self._config.reference)
        try:
            return find_real(other, self._data, self._spec) if other is not None else None
        except ValueError:
            return None

    def _asks_for(self, formula: str) -> bool:
        """Tells whether one of the metrics to compute uses this formula."""
        return any(EVAL_METRICS[self._config.extractor][name] == formula for name in self._config.measured)

    def _protocol(self, *, seed: int, weights: str) -> dict[str, Any]:
        num, images = self._config.num, self._real.images
        real = len(images.pixels)
        protocol = {
            "extractor": self._config.extractor,
            "extractor_weights": self.weights.sha256,
            "num": num,
            "reference": self._real.what,
            "reference_num": real,
            "reference_fingerprint": images.fingerprint,
            "resize": self.extractor.resize,
            "seed": seed,
            "weights": weights,
            "version": f"distgan {__version__}, torch {torch.__version__}",
        }
        if self._asks_for("prdc"):
            drawn, compared = (min(count, _PRDC_MOST) for count in (num, real))
            protocol["prdc"] = f"k {_NEIGHBOUR}, {drawn} generated and {compared} real images"
        if self._asks_for("kernel_distance"):
            block = min(_BLOCK, num, real)
            protocol["kid"] = f"cubic kernel, disjoint blocks of {block}, {min(num, real) // block} in number"
        return protocol

    def _check_counts(self) -> None:
        extractor = Inception if self._config.extractor == "inception" else Classifier
        num, real = self._config.num, len(self._real.images.pixels)
        names = {formula: name for name, formula in EVAL_METRICS[self._config.extractor].items()}
        distance, kernel = names["frechet"], names["kernel_distance"]
        if distance in self._config.measured:
            for what, count in {f"real images ({self._real.what})": real, "samples": num}.items():
                if count <= extractor.dim:
                    raise UserError(
                        f"the number of {what} is {count}, but {distance} compares {extractor.dim} features and needs "
                        f"at least {extractor.dim + 1} images: bring more, or use the metrics {kernel},prdc, which "
                        "need fewer."
                    )
        fewest = max(_SPLITS, _NEIGHBOUR + 1)
        if min(num, real) < fewest:
            raise UserError(
                f"there are {num} samples and {real} real images, but at least {fewest} of each are needed: ask for "
                "more samples, or give more real images."
            )


def _without_tf32() -> AbstractContextManager[None]:
    """Keeps cuDNN from rounding to TF32, which training in bf16 switches on: it would change features and samples."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


@dataclass
class _Features:
    """The extractor's outputs: sums over all images, and the features of the first ones, float32 (N, dim)."""

    moments: Moments
    classes: ClassSums
    rows: Tensor

    @classmethod
    def nothing(cls, extractor: Extractor, num: int) -> "_Features":
        sums = ClassSums(extractor.classes, num=num, splits=_SPLITS)
        return cls(Moments(extractor.dim), sums, torch.empty(0, extractor.dim))

    @classmethod
    def read(cls, folder: Path, extractor: Extractor, num: int) -> "_Features":
        found = cls.nothing(extractor, num)
        for name, sums in {"moments": found.moments.sums, "classes": found.classes.sums}.items():
            read = tensors.read(folder / f"{name}.safetensors")
            for key, tensor in sums.items():
                tensor.copy_(read[key])
        found.rows = tensors.read(folder / "features.safetensors")["rows"]
        return found

    def files(self) -> bundle.Files:
        return {"moments": self.moments.sums, "classes": self.classes.sums, "features": {"rows": self.rows}}


def _frechet(name: str, real: _Features, fake: _Features, device: torch.device) -> dict[str, float]:
    return {name: scores.frechet(real.moments, fake.moments)}


def _inception_score(name: str, real: _Features, fake: _Features, device: torch.device) -> dict[str, float]:
    score, deviation = fake.classes.score()
    return {name: score, f"{name}_std": deviation}


def _kernel_distance(name: str, real: _Features, fake: _Features, device: torch.device) -> dict[str, float]:
    rows = (of.rows[: len(fake.rows)].to(device) for of in (real, fake))
    distance, error = scores.kernel_distance(*rows, block=_BLOCK)
    return {name: distance, **({f"{name}_error": error} if error is not None else {})}


def _prdc(name: str, real: _Features, fake: _Features, device: torch.device) -> dict[str, float]:
    rows = (of.rows[:_PRDC_MOST].to(device) for of in (real, fake))
    return scores.prdc(*rows, k=_NEIGHBOUR)


FORMULAS: dict[str, Callable[[str, _Features, _Features, torch.device], dict[str, float]]] = {
    "frechet": _frechet,
    "inception_score": _inception_score,
    "kernel_distance": _kernel_distance,
    "prdc": _prdc,
}
"""Formulas by name: (metric's name, features of real images, those of samples, device) -> numbers by their names.

To add a metric, add its formula here, and its name to `EVAL_METRICS` (and `HIGHER_IS_BETTER`) in recipe/groups.py. If
it needs features of single images (`rows`), let `_scores`, `_statistics` and `_find_floor` know.
"""


@dataclass(frozen=True)
class Real:
    """Real images in a fixed random order, so that the first ones represent all."""

    what: str
    """The split or folder that they are from, for the protocol."""
    images: data.Images

    @cached_property
    def _order(self) -> Tensor:
        total = len(self.images.pixels)
        return torch.from_numpy(seeding.generator(0, "evaluation.real").permutation(total))

    def draw(self, first: int, count: int) -> Tensor:
        """Returns `count` images from number `first` on: uint8 (count, C, H, W)."""
        return self.images.pixels[self._order[first : first + count]]


def data_of(found: Exported, reference: str) -> DataConfig:
    """Returns the data set of a generator's real images: the recipe's, or the folder that the reference names.

    Raises:
        UserError: the reference is train or test, but there is no recipe that says of which data set.
    """
    if found.recipe is not None:
        return found.recipe.data
    if reference in ("train", "test"):
        raise UserError(
            f"the reference is {reference}, but there is no recipe beside the generator, so its training images "
            "are not known: give --reference a folder of pictures."
        )
    channels: Any = found.spec.channels
    return DataConfig(source="folder", path=reference, image_size=found.spec.image_size, channels=channels)


def find_real(reference: str, images: DataConfig, spec: ImageSpec) -> Real:
    """Finds the real images that `eval.reference` names.

    Raises:
        UserError: there are none, or they have another size.
    """
    if reference == "train":
        return Real(f"split {images.split} of {images.source}", data.load(images))
    if reference == "test":
        other = data.test_split(images)
        return Real(f"split {other.split} of {images.source}", data.load(other, like=images))
    if not paths.exists(reference):
        raise UserError(
            f"the reference is {reference}, but must be train, test or a folder or zip archive of pictures."
        )
    channels: Any = spec.channels
    folder = DataConfig(
        source="folder", path=reference, image_size=spec.image_size, channels=channels, cache=images.cache
    )
    try:
        data.refuse_other_shapes(folder)
        split = data.find(folder).split
        found = data.load(folder)
    except ValueError as error:
        said = str(error)
        for of_training, of_a_reference in _SAID_OF_A_REFERENCE.items():
            said = said.replace(of_training, of_a_reference)
        raise UserError(said) from error
    what = f"{f'split {split} of ' if split else ''}a folder of pictures"
    return Real(what, found if found.scale is None else data.load(folder, like=images))
