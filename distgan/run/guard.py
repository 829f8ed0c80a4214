"""Notices that a training diverges or collapses, from numbers that are the same on every rank.

It looks at log points alone, so that a step costs what it did. A sign must be seen several times in a row before it is
a trouble; which signs there are, and where their bounds come from, stands in `_SIGNS`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distgan.recipe import GuardConfig

_EVALUATIONS = 2  # in a row at which a sign that evaluations show must be seen

Network = Literal["generator", "discriminator"]
_BOTH: tuple[Network, ...] = ("generator", "discriminator")


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
