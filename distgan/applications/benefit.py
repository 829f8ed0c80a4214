"""Measures whether synthetic images help a classifier, and when.

The classification accuracy score (Ravuri and Vinyals 2019) is the accuracy on real test images of a classifier that saw
only synthetic ones. Beside it stand classifiers that saw n real images of each class, with and without classical
augmentation, and real and synthetic ones together. The generator itself is trained on the same n real images of each
class, since somebody with scarce data has no others. Every classifier makes the same number of updates, on the CPU.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.special import stdtrit  # scipy.stats has it, too, but takes a second to import
from torch import Tensor

from distgan import data, files, recipe, seeding
from distgan.applications.search import digest
from distgan.applications.synthetic import Images, synthesize, write
from distgan.errors import UserError
from distgan.evaluation import classifier
from distgan.evaluation.extractors import Classifier
from distgan.parallel.ranks import Ranks, together
from distgan.progress import shown
from distgan.recipe import Config, DataConfig, RunConfig
from distgan.storage import exported
from distgan.storage.places import Places

T = TypeVar("T")

ARMS = {
    "real": "real images",
    "real, augmented": "real images with classical augmentation",
    "real + synthetic, augmented": "real and synthetic images, half of each batch, with classical augmentation",
    "synthetic, augmented": "synthetic images alone, with classical augmentation",
}
"""What the classifiers see."""

SYNTHETIC = 1000
"""Synthetic images of each class, if unset."""

_BATCH = 128
_STEPS = 2000  # updates of each classifier; with 600, augmentation only slowed it down
_SHIFT = 4  # most pixels by which augmentation shifts an image


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure."""

    counts: Sequence[int]
    """Numbers of real images of each class."""
    seeds: int = 5
    """Repetitions of each, with other real images, another generator and other starting weights."""
    synthetic: int = SYNTHETIC
    """Synthetic images of each class."""


def benefit(config: Config, plan: Plan, out: Path, train: Callable[[Config], None]) -> dict[str, Any]:
    """Collective: trains generators and classifiers, and returns the accuracies.

    What is done is kept in `out`, so that the same call goes on where it was stopped.

    Args:
        config: the recipe of the generators; its data set needs labels and a split for tests.
        plan: what to measure.
        out: the folder to work in.
        train: trains a generator by a recipe.

    Returns:
        For each number of real images, and for each arm, the accuracies of all seeds.

    Raises:
        UserError: the data set has no labels, no split for tests, or too few images of a class.
    """
    images = data.load(config.data)
    test = data.load(data.test_split(config.data), like=config.data)
    if images.labels is None or images.classes is None or test.labels is None:
        raise UserError(f"{config.data.source} has no labels, but --benefit needs them: give a run on labelled images.")
    if len(set(plan.counts)) < len(plan.counts):
        raise UserError(f"--benefit is {','.join(map(str, plan.counts))}, which has a number twice: give each once.")
    least = int(torch.bincount(images.labels[images.labels >= 0], minlength=len(images.classes)).min())
    if max(plan.counts) > least:
        raise UserError(
            f"--benefit has {max(plan.counts)}, but a class has only {least} images: choose at most {least}."
        )
    fewest = min(plan.counts) * len(images.classes)
    if fewest < config.train.batch_size:
        raise UserError(
            f"train.batch_size is {config.train.batch_size}, but {min(plan.counts)} images of each of "
            f"{len(images.classes)} classes are only {fewest}: choose more images, or a recipe with a smaller batch."
        )
    _refuse_another_plan(config, plan, out)
    found: dict[str, Any] = {}
    for count in plan.counts:
        for seed in range(plan.seeds):
            accuracies = _one(config, plan, out / f"n{count}-seed{seed}", images, test, count, seed, train)
            if accuracies is None:  # a signal stopped the training
                return found
            for arm, value in accuracies.items():
                found.setdefault(str(count), {}).setdefault(arm, []).append(value)
    return found


def _on_rank_zero(action: Callable[[], T]) -> T:
    """Collective: returns on every rank what an action returns on rank zero, which alone looks at the folder."""
    with together({}) as ranks:
        return ranks.on_rank_zero(action)


def _read(file: Path) -> dict[str, float] | None:
    return json.loads(file.read_text()) if file.exists() else None


def _refuse_another_plan(config: Config, plan: Plan, out: Path) -> None:
    """Writes down what is measured in a folder, so that results of two different measurements never mix.

    More numbers of images and more repetitions of the same measurement are welcome.

    Raises:
        UserError: the folder has results of another recipe, or of another number of synthetic images.
    """
    of_run = {**recipe.as_dict(config), "run": None, "track": None, "checkpoint": None, "eval": None}
    described = json.loads(json.dumps({"recipe": of_run, "synthetic": plan.synthetic}))
    file = out / "plan.json"
    if not file.exists():
        out.mkdir(exist_ok=True)
        files.replace(file, json.dumps(described, indent=1).encode())
    elif _with_new_settings(json.loads(file.read_text()), described) != described:
        raise UserError(
            f"--out is {out}, which has results of another recipe or of another number of synthetic images: choose "
            "another folder."
        )


def _with_new_settings(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Gives a plan of an earlier version the settings that it did not have, with their defaults."""
    defaults = json.loads(json.dumps(recipe.as_dict(Config(run=RunConfig(dir=".")))))
    filled = {
        group: {**defaults[group], **before["recipe"].get(group, {})} if isinstance(values, dict) else values
        for group, values in now["recipe"].items()
    }
    return {**before, "recipe": filled}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and half the width of its 95% interval, by Student's t distribution."""
    array = np.array(values)
    if len(array) < 2:
        return float(array.mean()), float("nan")
    return float(array.mean()), float(stdtrit(len(array) - 1, 0.975) * array.std(ddof=1) / len(array) ** 0.5)


def _one(
    config: Config,
    plan: Plan,
    place: Path,
    images: data.Images,
    test: data.Images,
    count: int,
    seed: int,
    train: Callable[[Config], None],
) -> dict[str, float] | None:
    """Collective: returns the accuracies of all arms for `count` real images of each class, and keeps them in a file.

    What is done already is read. None if the training was stopped; then the same call goes on with it.
    """
    assert images.labels is not None and images.classes is not None and test.labels is not None
    chosen = _subset(images.labels, len(images.classes), count, seed)
    pixels, labels = images.pixels[chosen], images.labels[chosen]

    # What is done already. Otherwise, a generator of these images only.
    classes = images.classes

    def begin() -> dict[str, float] | None:
        done = _read(place / "accuracies.json")
        if done is None:
            _write_real(place / "real", pixels, labels, classes)
        return done

    done = _on_rank_zero(begin)
    if done is not None:
        return done
    channels: Any = images.channels
    only = DataConfig(
        source="hub",
        path=str(place / "real"),
        image_size=config.data.image_size,
        channels=channels,
        flip=config.data.flip,
        cache=str(place / "cache"),
    )
    alone = dataclasses.replace(
        config,
        run=RunConfig(dir=str(place / "run"), seed=seed, timeout=config.run.timeout),
        data=only,
        model=dataclasses.replace(config.model, conditional=True),
        # Other weights would have seen other images.
        train=dataclasses.replace(config.train, init_from=None, freeze_d=0),
        track=dataclasses.replace(config.track, to="none"),
        guard=dataclasses.replace(config.guard, on_trouble="warn"),
        eval=dataclasses.replace(config.eval, every=None),
    )
    train(alone)
    generator, synthetic = Places(place / "run").generator, place / "synthetic"
    reached, drawn_before = _on_rank_zero(lambda: (exported.step_of(generator), synthetic.exists()))
    if reached != alone.train.steps:
        return None
    if not drawn_before:
        synthesize(place / "run", synthetic, per_class=plan.synthetic, seed=seed)
    drawn = data.load(dataclasses.replace(only, path=str(synthetic), flip=False))
    assert drawn.labels is not None

    # The classifiers, which the ranks share among themselves.
    sets = {"real": (pixels, labels), "synthetic": (drawn.pixels, drawn.labels)}
    with together({"real": digest(pixels), "synthetic": digest(drawn.pixels)}) as ranks:
        mine = list(ARMS)[ranks.rank :: ranks.world]
        what = f"{count} images of each class, seed {seed}"
        accuracies = {
            arm: _accuracy(arm, sets, test, len(images.classes), seed, mirror=config.data.flip, ranks=ranks)
            for arm in (shown(mine, what, len(mine), unit="classifiers") if ranks.rank == 0 else mine)
        }
        every = {arm: value for part in ranks.gather(accuracies) for arm, value in part.items()}
        ordered = {arm: every[arm] for arm in ARMS}
        content = json.dumps(ordered, indent=1).encode()
        ranks.on_rank_zero(lambda: files.replace(place / "accuracies.json", content))
    return ordered


def _subset(labels: Tensor, classes: int, count: int, seed: int) -> Tensor:
    """Returns the numbers of `count` images of each class, in order."""
    rng = seeding.generator(seed, "benefit.subset", count)
    of = (torch.nonzero(labels == label).flatten().numpy() for label in range(classes))
    return torch.from_numpy(np.sort(np.concatenate([rng.choice(one, count, replace=False) for one in of])))


def _write_real(folder: Path, pixels: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with files.whole_folder(folder) as partial, write(partial, classes, form="parquet") as add:
            for label in range(len(classes)):
                add(Images(pixels[labels == label], label))


def _accuracy(
    arm: str,
    sets: dict[str, tuple[Tensor, Tensor]],
    test: data.Images,
    classes: int,
    seed: int,
    *,
    mirror: bool,
    ranks: Ranks,
) -> float:
    """Trains a classifier on an arm's images, and returns its accuracy on the test images."""
    assert test.labels is not None
    used = [sets[name] for name in sets if name in arm]
    share = _BATCH // len(used)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        ranks.alive()
        parts = []
        for number, (pixels, labels) in enumerate(used):
            order = seeding.order(f"{seed}.benefit.{number}", step * share, share, total=len(pixels))
            parts.append((pixels[order], labels[order]))
        pixels, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        return _augmented(pixels, seed, step, mirror=mirror) if "augmented" in arm else pixels, labels

    _, channels, height, width = test.pixels.shape
    network = Classifier(size=(height, width), channels=channels, classes=classes)
    classifier.fit(network, batch, steps=_STEPS, seed=seed)
    labelled = test.labels >= 0
    return classifier.accuracy(network, test.pixels[labelled], test.labels[labelled])


def _augmented(pixels: Tensor, seed: int, step: int, *, mirror: bool) -> Tensor:
    """Shifts each image by up to 4 pixels each way, repeating the edge, and mirrors half of them if that is allowed."""
    rng = seeding.generator(seed, "benefit.augment", step)
    shifts = torch.from_numpy(rng.integers(2 * _SHIFT + 1, size=(2, len(pixels))))
    padded = torch.nn.functional.pad(pixels.float(), [_SHIFT] * 4, mode="replicate").to(torch.uint8)
    rows, columns = (shift[:, None] + torch.arange(n) for shift, n in zip(shifts, pixels.shape[2:], strict=True))
    images = torch.arange(len(pixels))
    moved = padded[images[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if not mirror:
        return moved
    flipped = torch.from_numpy(rng.random(len(pixels)) < 0.5)
    return torch.where(flipped[:, None, None, None], moved.flip(3), moved)
