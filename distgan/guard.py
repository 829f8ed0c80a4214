"""Notices that a training diverges or collapses, from numbers that are the same on every rank.

It looks at log points alone, so that a step costs what it did. A sign must be seen several times in a row before it is
a trouble; which signs there are, and where their bounds come from, stands in `_SIGNS`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distgan.config import GuardConfig
from distgan.models import CHUNK, Generator, eval_mode

WATCHED = 512  # real images of each kind that the guard looks at
_EVALUATIONS = 2  # in a row at which a sign that evaluations show must be seen

Network = Literal["generator", "discriminator"]


@dataclass(frozen=True)
class Trouble:
    """What went wrong with a training."""

    what: str
    """A sentence without its full stop."""
    since: int
    """The last step at which it was not there."""
    winners: tuple[Network, ...]
    """Whose learning rate is too high for the other."""
    not_finite: bool = False
    """Whether there is nothing left to go on with."""


@dataclass(frozen=True)
class _Sign:
    needs: tuple[str, ...]
    """The numbers that it is seen in, of log points or of evaluations."""
    seen: Callable[..., bool]
    """Whether it is seen in them."""
    what: str
    """What is said of it, with those numbers."""
    winners: tuple[Network, ...] | None
    """None: whichever wins by its scores."""


# Bounds are ours, set where healthy runs of our recipes stay away from them, unless a source stands beside.
_SIGNS = {
    "saturated": _Sign(
        ("loss/discriminator", "score/real", "score/fake_before"),
        lambda loss, real, fake: loss < 0.01 and real > 0.995 and fake < 0.005,
        "the discriminator tells all fakes (its loss is {:.2g}, D(x) {:.3f}, D(G(z)) {:.3f}), from which the generator "
        "learns nothing",
        ("discriminator",),
    ),
    "collapsed": _Sign(
        ("guard/spread",),
        lambda spread: spread < 0.3,
        "samples lie {:.2f} times as far apart as real images: the generator collapses",
        None,
    ),
    "memorising": _Sign(
        # Half way between training images and fakes, by the ratio of Karras et al. 2020 (ADA), eq. 1.
        ("guard/memory",),
        lambda memory: memory > 0.5,
        "real images that the discriminator was not trained on look to it more like fakes ({:.2f} of the way): it "
        "learns its images by heart",
        ("discriminator",),
    ),
    "collapsed in features": _Sign(
        ("eval/spread",),
        lambda spread: spread < 0.3,
        "features of samples lie {:.2f} times as far apart as those of real images: the generator collapses",
        None,
    ),
    "modes lost": _Sign(
        ("eval/drawn", "eval/classes"),
        lambda drawn, classes: drawn < 0.7 * classes,
        "the generator draws {:.0f} of {:.0f} classes",
        None,
    ),
    "falling": _Sign(
        ("eval/behind_best",),
        lambda behind: behind > 2,
        "the generator has become {:.1f} times as bad as at its best",
        None,
    ),
}


class Guard:
    """Judges a run at its log points."""

    def __init__(self, config: GuardConfig, *, probability: bool = True, start: int = 0) -> None:
        """Begins with no sign seen.

        Args:
            config: how patient the guard is.
            probability: whether the loss's scores are probabilities.
            start: the step from which on it judges.
        """
        self._config, self._probability = config, probability
        # By sign: how often in a row it was seen, the last step without it, and whether it was told.
        self._streaks: dict[str, tuple[int, int, bool]] = {}
        self._judged = {"log": start, "eval": start}  # the last steps at which there was something to judge

    def judge(
        self, step: int, numbers: Mapping[str, float], *, images_seen: int, not_finite: str | None
    ) -> list[Trouble]:
        """Returns the troubles that came up now. Each is told once, until its sign has been gone.

        Args:
            step: of this log point.
            numbers: by the names that metrics.jsonl has; a sign whose numbers are missing is not judged.
            images_seen: by the discriminator.
            not_finite: a weight or moment that is not.
        """
        losses = [name for name in numbers if name.startswith(("loss/", "score/")) and not math.isfinite(numbers[name])]
        if bad := [not_finite] if not_finite is not None else losses:
            return [self.not_finite(step, bad[0])]
        found = []
        for name, sign in _SIGNS.items():
            kind = sign.needs[0].split("/")[0]
            values = [numbers[need] for need in sign.needs if need in numbers]
            scores = any(need.startswith("score/") for need in sign.needs)
            if len(values) < len(sign.needs) or (scores and not self._probability):
                continue
            count, since, told = self._streaks.pop(name, (0, self._judged["eval" if kind == "eval" else "log"], False))
            if images_seen <= self._config.after or not sign.seen(*values):
                continue
            lasts = count + 1 >= (_EVALUATIONS if kind == "eval" else self._config.patience)
            self._streaks[name] = (count + 1, since, lasts)
            if lasts and not told:
                found.append(Trouble(sign.what.format(*values), since, sign.winners or self._winners(numbers)))
        self._judged["log"] = step
        if any(name.startswith("eval/") for name in numbers):
            self._judged["eval"] = step
        return found

    def _winners(self, numbers: Mapping[str, float]) -> tuple[Network, ...]:
        """Returns the network that is ahead by the discriminator's verdicts; both if neither clearly is."""
        ahead = numbers["score/real"] - numbers["score/fake_before"]
        if not self._probability or 0 <= ahead <= 0.5:
            return _BOTH
        return ("discriminator",) if ahead > 0 else ("generator",)

    def not_finite(self, step: int, what: str) -> Trouble:
        """Says what is wrong when a number is NaN or inf; no checkpoint holds such a number."""
        return Trouble(f"{what} is no longer finite", step, _BOTH, not_finite=True)

    @property
    def starts(self) -> set[int]:
        """Returns the steps after which a trouble that comes up next may have begun."""
        return {*self._judged.values(), *(since for _, since, _ in self._streaks.values())}

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of it."""
        asked = {"on_trouble": self._config.on_trouble, "rollbacks": self._config.rollbacks}
        return {**asked, "streaks": dict(self._streaks), "judged": dict(self._judged)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes it up again. What was told is told anew if something else is to be done about it now."""
        same = state["on_trouble"] == self._config.on_trouble
        same = same and state.get("rollbacks", self._config.rollbacks) == self._config.rollbacks  # older ones lack it
        streaks = state["streaks"].items()
        self._streaks = {name: (count, since, told and same) for name, (count, since, told) in streaks}
        self._judged = dict(state["judged"])


@dataclass(frozen=True)
class Watched:
    """Real images that the guard looks at."""

    pixels: Tensor
    """uint8 (N, C, H, W)."""
    labels: Tensor | None = None
    """(N,), where the networks take labels."""


class Watch:
    """What the guard wants to know at a log point and no loss tells, computed on rank zero."""

    def __init__(
        self, generator: Generator, discriminator: nn.Module, *, real: Watched, unseen: Watched | None, seed: int
    ) -> None:
        """Measures the real images once.

        Args:
            generator, discriminator: both networks, as they are trained.
            real, unseen: training images, and images of the same kind that nobody trains on.
            seed: of the samples.
        """
        self._generator, self._discriminator, self._seed = generator, discriminator, seed
        self._real, self._unseen = real, unseen
        self._variance = _variance(map(_scaled, torch.split(real.pixels, CHUNK)))

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Measures the spread of samples in pixels and, given unseen images, how far D takes these for fakes.

        `guard/spread`: root mean square distance of pairs of samples over that of pairs of real images. `guard/memory`:
        (E[D(train)] - E[D(unseen)]) / (E[D(train)] - E[D(fake)]) over logits (Karras et al. 2020, "Training GANs with
        limited data", eq. 1): 0 where D treats unseen real images as it does its own, 1 where as fakes.
        """
        samples = self._generator.images(0, seed=self._seed)
        numbers = {}
        if self._variance > 0:  # it is not of images that are all the same
            numbers["guard/spread"] = math.sqrt(_variance([samples.double()]) / self._variance)
        if self._unseen is not None:
            with eval_mode(self._discriminator):
                fake = float(self._discriminator(samples, self._generator.labels(0, seed=self._seed)).double().mean())
                train, unseen = (self._logit(images) for images in (self._real, self._unseen))
            if train - fake > 1:  # else there is nothing to measure by
                numbers["guard/memory"] = (train - unseen) / (train - fake)
        return numbers

    def _logit(self, images: Watched) -> float:
        """Returns the mean of D's logits, over parts no larger than those it is trained on."""
        like, total = next(self._discriminator.parameters()), 0.0
        for part in torch.split(torch.arange(len(images.pixels)), CHUNK):
            y = images.labels[part].to(like.device) if images.labels is not None else None
            total += float(self._discriminator(_scaled(images.pixels[part]).to(like), y).double().sum())
        return total / len(images.pixels)


def _scaled(images: Tensor) -> Tensor:
    """Scales uint8 images to [-1, 1], as the networks see them."""
    return images.double() / 127.5 - 1


_BOTH: tuple[Network, ...] = ("generator", "discriminator")


def _variance(parts: Iterable[Tensor]) -> float:
    """Returns half the mean square distance between images, which come in parts, double (N, C, H, W)."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        count, total, squares = count + len(part), total + part.sum(0), squares + part.square().sum(0)
    return float((squares - total.square() / count).clamp(min=0).sum() / (count - 1))
