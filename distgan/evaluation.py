"""Measures generators against real images: the same numbers on any number of ranks, and how they came about.

Each rank draws and looks at its share of the images; what is summed is summed in float64 over all ranks, and only what
KID and PRDC need of single images goes to rank zero, which computes the scores. What real images look like to an
extractor is computed once and kept in the cache.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distgan import __version__, checkpoint, data, metrics, seeding
from distgan.config import DataConfig, EvalConfig
from distgan.data.store import cache_folder
from distgan.distributed import Ranks
from distgan.metrics import ClassSums, Extractor, Moments, classifier
from distgan.models import CHUNK, Generator, Shape
from distgan.progress import shown

_FORMAT = 1  # of what is kept of real images; goes up whenever anything changes it
_STREAM = "evaluation"
_SPLITS = 10  # of the Inception score
_NEIGHBOUR = 5  # of PRDC
_PRDC_MOST = 10_000  # images of each kind, as its authors take: it compares all pairs

_DISTANCE = {"inception": "fid", "classifier": "fd_classifier"}
_HIGHER_IS_BETTER = ("is", "is_classifier")


class Measured(NamedTuple):
    """What was measured, and how."""

    numbers: dict[str, float]
    """By name: those asked for; `spread` of the features; of the classifier's `classes` how many are `drawn`."""
    protocol: dict[str, Any]
    """All that another number must share to be compared with these."""

    def report(self, generator: str, step: int, floor: dict[str, float] | None) -> dict[str, Any]:
        """What is written to a file: the numbers, what real images score, and the protocol."""
        return {
            "generator": generator,
            "step": step,
            "metrics": self.numbers,
            "floor": floor,
            "protocol": self.protocol,
        }


class Standing:
    """How a run's evaluations went, by the metric that says which checkpoint is best."""

    def __init__(self, config: EvalConfig) -> None:
        self._metric = config.measured[0]
        self._protocol: dict[str, Any] | None = None
        self._best: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def add(self, step: int, measured: Measured) -> bool:
        """Takes in an evaluation; whether it is the best so far of those that can be compared with it."""
        if self._protocol != measured.protocol:
            self._protocol, self._best = measured.protocol, None
        self._last = (step, measured.numbers[self._metric])
        if self._best is not None and not self._better(self._last[1], self._best[1]):
            return False
        self._best = self._last
        return True

    @property
    def best_step(self) -> int | None:
        return self._best[0] if self._best is not None else None

    @property
    def behind(self) -> float:
        """How many times as bad as the best the last is: 1 at the best. 1, too, where the best is 0 or below."""
        if self._best is None or self._last is None or min(self._best[1], self._last[1]) <= 0:
            return 1.0
        ratio = self._last[1] / self._best[1]
        return 1 / ratio if self._metric in _HIGHER_IS_BETTER else ratio

    def say(self) -> str | None:
        """For the user; None where nothing was evaluated."""
        if self._best is None or self._last is None:
            return None
        best = f"{self._metric} {self._best[1]:.5g} at step {self._best[0]}"
        if self._last == self._best:
            return f"{best}, the last evaluation"
        return f"{best}; the last, at step {self._last[0]}, is {self._last[1]:.5g}, {self.behind:.2f} times as bad"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"metric": self._metric, "protocol": self._protocol, "best": self._best, "last": self._last}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes it up again, where it is about the same metric."""
        if state["metric"] == self._metric and state["best"] is not None:
            self._protocol = state["protocol"]
            (best_step, best), (last_step, last) = state["best"], state["last"]
            self._best, self._last = (best_step, best), (last_step, last)

    def _better(self, one: float, other: float) -> bool:
        return one > other if self._metric in _HIGHER_IS_BETTER else one < other


@dataclass(frozen=True)
class _Real:
    """Real images, in a random order that is always the same, so that any number of first ones stands for all."""

    what: str
    images: data.Images

    @cached_property
    def _order(self) -> Tensor:
        total = len(self.images.pixels)
        return torch.from_numpy(seeding.generator(0, "evaluation.real").permutation(total))

    def draw(self, first: int, count: int) -> Tensor:
        return self.images.pixels[self._order[first : first + count]]


class _Weights(NamedTuple):
    tensors: Mapping[str, Tensor]
    sha256: str
    """Of the file that they lie in."""
    accuracy: float | None
    """Of the classifier that was trained here, on images that it never saw."""
    file: Path


class Evaluation:
    """One extractor, one set of real images and what is asked for. Made by each rank alone; `join` comes after."""

    extractor: Extractor
    """On the ranks' device, once joined."""

    def __init__(self, config: EvalConfig, images: DataConfig, shape: Shape, *, rank: int) -> None:
        """Finds whatever can be wrong; on rank zero has the extractor's weights ready, training them if need be.

        Raises:
            ValueError: real images, labels or weights are missing or do not fit, or there are too few images.
        """
        self.config = config
        self._data, self._shape = images, shape
        self._real = _find(config.reference, images, shape)
        self._check_counts()
        self._weights = self._find_weights() if rank == 0 else None

    def join(self, ranks: Ranks, *, progress: bool = False) -> None:
        """Collective: gives every rank the extractor, and rank zero what it makes of the real images."""
        self._ranks, self._progress = ranks, progress
        self._weights = ranks.on_rank_zero(lambda: self._weights)
        self.extractor = self._build(self.weights.tensors).to(ranks.accelerator.device)
        self._reference = self._statistics(self._real)

    @property
    def fingerprint(self) -> str:
        """Of the real images."""
        return self._real.images.fingerprint

    @property
    def weights(self) -> _Weights:
        """The extractor's."""
        assert self._weights is not None
        return self._weights

    def measure(self, generator: Generator, *, seed: int = 0, weights: str = "averaged") -> Measured:
        """Collective: scores a generator that is the same on every rank, on `eval.num` images.

        Image i is a function of (seed, i) alone. It runs in full precision, changes no random state, and keeps no
        image.

        Args:
            generator: on the ranks' device.
            seed: of the draws.
            weights: `averaged` or `raw`, which the generator has; for the protocol.
        """
        scores = self._scores(lambda first, _: generator.draw(first, seed=seed, stream=_STREAM), self.config.num)
        return Measured(scores, self._protocol(seed=seed, weights=weights))

    def floor(self) -> dict[str, float] | None:
        """Collective: what real images of the other split score, which no generator is expected to beat; kept in the
        cache. None where the source has no such split.
        """
        found = self._ranks.on_rank_zero(self._find_other)
        if found is None:
            return None
        with self._ranks.alone():  # a machine other than rank zero's may have to prepare it
            other = _find(found, self._data, self._shape)
        described = [self._reference.name, other.images.fingerprint, self.config.measured]
        kept = cache_folder(self._data) / "floors" / f"{_hash(described)}.json"
        scores: dict[str, float] | None = self._ranks.on_rank_zero(lambda: _read_json(kept))
        if scores is None:
            scores = self._scores(other.draw, len(other.images.pixels))
            text = json.dumps(scores)
            self._ranks.on_rank_zero(lambda: _write_text(kept, text))
        return scores

    def _scores(self, draw: Callable[[int, int], Tensor], num: int) -> dict[str, float]:
        """Collective."""
        asked = self.config.measured
        keep = num if any(name.startswith(("kid", "kd")) for name in asked) else _PRDC_MOST if "prdc" in asked else 0
        moments, classes, rows = self._look_at(draw, num, keep=keep, what="evaluating")

        def score() -> dict[str, float]:
            assert rows is not None
            real = checkpoint.read_tensors(self._reference / "features.safetensors")["rows"] if keep else None
            return self._numbers(moments, classes, real, rows)

        return self._ranks.on_rank_zero(score)

    def _numbers(self, moments: Moments, classes: ClassSums, real: Tensor | None, rows: Tensor) -> dict[str, float]:
        """On rank zero: every number that is asked for."""
        summed = checkpoint.read_tensors(self._reference / "moments.safetensors")
        reference = Moments(self.extractor.dim)
        for name, tensor in reference.sums.items():
            tensor.copy_(summed[name])
        numbers: dict[str, float] = {}
        for name in self.config.measured:
            if name == _DISTANCE[self.config.extractor]:
                numbers[name] = metrics.frechet(reference, moments)
            elif name.startswith("is"):
                numbers[name], numbers[f"{name}_std"] = classes.score()
            elif name == "prdc":
                assert real is not None
                numbers |= metrics.prdc(real[:_PRDC_MOST], rows[:_PRDC_MOST], k=_NEIGHBOUR)
            else:
                assert real is not None
                numbers[name], error = metrics.kid(real, rows)
                if not math.isnan(error):  # of a single block
                    numbers[f"{name}_error"] = error
        numbers["spread"] = metrics.spread(reference, moments)
        if self.config.extractor == "classifier":
            numbers["classes"] = float(self.extractor.classes)
            numbers["drawn"] = float((classes.shares > 0.1 * summed["shares"]).sum())
        return numbers

    def _look_at(
        self, draw: Callable[[int, int], Tensor], num: int, *, keep: int, what: str
    ) -> tuple[Moments, ClassSums, Tensor | None]:
        """Collective: one pass of the extractor over images that `draw(first, count)` gives, at least count of them.

        Returns:
            The sums over all images, on every rank; the features of the first `keep` images, float32 (keep, dim), on
            rank zero.
        """
        ranks, device = self._ranks, self._ranks.accelerator.device
        moments = Moments(self.extractor.dim)
        classes = ClassSums(self.extractor.classes, num=num, splits=_SPLITS)
        rows = [torch.empty(0, self.extractor.dim)]
        chunks = range(-(-num // CHUNK))
        mine = chunks[len(chunks) * ranks.rank // ranks.world : len(chunks) * (ranks.rank + 1) // ranks.world]
        # cuDNN's TF32, which training in bf16 allows, would change the features.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            show = self._progress and ranks.rank == 0
            for chunk in shown(mine, what, len(mine), each=CHUNK * ranks.world) if show else mine:
                first = chunk * CHUNK
                images = draw(first, min(CHUNK, num - first))[: num - first]
                features, logits = (output.cpu() for output in self.extractor(images.to(device)))
                moments.add(features)
                classes.add(logits, torch.arange(first, first + len(images)))
                rows.append(features[: max(keep - first, 0)].clone())
                ranks.progressed()
        ranks.add_up([*moments.sums.values(), *classes.sums.values()])
        return moments, classes, ranks.on_top(torch.cat(rows)) if keep else torch.empty(0, self.extractor.dim)

    def _statistics(self, real: _Real) -> Path:
        """Collective: the folder in rank zero's cache with what the extractor makes of real images."""
        described = [_FORMAT, self.weights.sha256, real.images.fingerprint, list(real.images.pixels.shape)]
        folder = cache_folder(self._data) / "references" / _hash(described)
        if self._ranks.on_rank_zero(lambda: checkpoint.is_whole(folder)):
            return folder
        num = len(real.images.pixels)
        moments, classes, rows = self._look_at(real.draw, num, keep=num, what=f"looking at {real.what}")

        def keep() -> None:
            assert rows is not None
            files = {"moments": {**moments.sums, "shares": classes.shares}, "features": {"rows": rows}}
            _commit(folder, files, {"real": real.what, "extractor": self.config.extractor})

        self._ranks.on_rank_zero(keep)
        return folder

    def _protocol(self, *, seed: int, weights: str) -> dict[str, Any]:
        images = self._real.images
        protocol = {
            "extractor": self.config.extractor,
            "extractor_weights": self.weights.sha256,
            "num": self.config.num,
            "reference": self._real.what,
            "reference_num": len(images.pixels),
            "reference_fingerprint": images.fingerprint,
            "resize": self.extractor.resize,
            "seed": seed,
            "weights": weights,
            "version": f"distgan {__version__}, torch {torch.__version__}",
        }
        if "prdc" in self.config.measured:
            compared = [min(count, _PRDC_MOST) for count in (self.config.num, len(images.pixels))]
            protocol["prdc"] = f"k {_NEIGHBOUR}, {compared[0]} generated and {compared[1]} real images"
        if any(name.startswith(("kid", "kd")) for name in self.config.measured):
            protocol["kid"] = "polynomial kernel, disjoint blocks of 1000"
        return protocol

    def _check_counts(self) -> None:
        dim, num, real = self._extractor_class().dim, self.config.num, len(self._real.images.pixels)
        distance = _DISTANCE[self.config.extractor]
        if distance in self.config.measured:
            for what, count in {"samples": num, f"real images ({self._real.what})": real}.items():
                if count <= dim:
                    raise ValueError(
                        f"the number of {what} is {count}, but {distance} needs more images than the {dim} features "
                        f"that it compares: at least {dim + 1}; prdc and the kernel's distance need fewer."
                    )
        fewest = max(_SPLITS, _NEIGHBOUR + 1)
        if min(num, real) < fewest:
            raise ValueError(
                f"the number of samples is {num} and that of real images {real}, but {fewest} is the least of each."
            )

    def _extractor_class(self) -> type[metrics.Inception] | type[metrics.Classifier]:
        return metrics.Inception if self.config.extractor == "inception" else metrics.Classifier

    def _find_weights(self) -> _Weights:
        """On rank zero: reads the extractor's weights, or makes or fetches them."""
        accuracy = None
        if self.config.extractor_weights is not None:
            file = Path(self.config.extractor_weights)
        elif self.config.extractor == "inception":
            file = checkpoint.inception_weights()
        else:
            file, accuracy = _trained_classifier(self._data)
        tensors, sha256 = checkpoint.read_weights(file)
        self._build(tensors)  # refused now rather than on every rank
        return _Weights(tensors, sha256, accuracy, file)

    def _build(self, tensors: Mapping[str, Tensor]) -> Extractor:
        if self.config.extractor == "inception":
            return metrics.Inception(tensors)
        classes = len(tensors["last.bias"]) if "last.bias" in tensors else 1
        network = metrics.Classifier(image_size=self._shape.image_size, channels=self._shape.channels, classes=classes)
        checkpoint.load_into(network, tensors, f"the extractor in {self.config.extractor_weights}")
        return network.requires_grad_(False)

    def _find_other(self) -> str | None:
        """On rank zero: the split that is not the reference, if the source has it."""
        other = {"train": "test", "test": "train"}.get(self.config.reference)
        try:
            if other is not None:
                _find(other, self._data, self._shape)
        except ValueError:
            return None
        return other


def _find(reference: str, images: DataConfig, shape: Shape) -> _Real:
    """The real images that `eval.reference` names."""
    if reference == "train":
        return _Real(f"split {images.split} of {images.source}", data.load(images))
    if reference == "test":
        return _Real(f"split test of {images.source}", data.test_split(images))
    if not Path(reference).is_dir():
        raise ValueError(f"the reference is {reference}, but must be train, test or a folder of pictures.")
    folder = DataConfig(
        source="folder",
        path=reference,
        image_size=shape.image_size,  # type: ignore[arg-type]
        channels=shape.channels,  # type: ignore[arg-type]
        cache=images.cache,
    )
    data.refuse_other_shapes(folder)
    return _Real("a folder of pictures", data.load(folder))


def _trained_classifier(images: DataConfig) -> tuple[Path, float]:
    """The classifier of these images, out of the cache or trained now, and its accuracy."""
    found = data.load(images)
    if found.labels is None or found.classes is None:
        raise ValueError(
            f"{images.source} has no labels to train the classifier on: choose the extractor inception, or give the "
            "weights of a classifier."
        )
    described = [classifier.PROCEDURE, found.fingerprint, list(found.pixels.shape), len(found.classes)]
    folder = cache_folder(images) / "extractors" / _hash(described)
    if not checkpoint.is_whole(folder):
        print("training the classifier, once for these images", flush=True)
        started = time.monotonic()
        network, accuracy = classifier.train(found.pixels, found.labels, classes=len(found.classes))
        _commit(folder, {"extractor": network.state_dict()}, {"accuracy": accuracy, "data": images.source})
        print(
            f"the classifier tells {accuracy:.1%} of images right that it never saw "
            f"({time.monotonic() - started:.0f} s): {folder}",
            flush=True,
        )
    return folder / "extractor.safetensors", checkpoint.read_state(folder)["accuracy"]


def _commit(folder: Path, files: checkpoint.Files, state: dict[str, Any]) -> None:
    """Into the cache; another process may be first."""
    try:
        if folder.exists() and not checkpoint.is_whole(folder):
            checkpoint.discard(folder)
        checkpoint.commit(folder, files, state)
    except OSError as error:
        if not checkpoint.is_whole(folder):
            raise ValueError(
                f"the cache folder {folder.parent} cannot be written ({error.strerror}): choose another with "
                "--data.cache=DIR."
            ) from error


def _hash(described: list[Any]) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return None


def _write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
