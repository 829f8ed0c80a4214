"""Notices that training diverges or collapses, from numbers that are the same on every rank.

The guard looks only at log points, so that it makes no step slower. A sign becomes a trouble once it was seen several
times in a row. `_SIGNS` lists the signs and the sources of their bounds.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distgan.recipe import GuardConfig
from distgan.run.adaptation import MOST

_EVALUATIONS = 2  # evaluations in a row at which a sign must be seen, if only evaluations show it

Network = Literal["generator", "discriminator"]
_BOTH: tuple[Network, ...] = ("generator", "discriminator")


@dataclass(frozen=True)
class Trouble:
    """A problem of the training that must be acted on."""

    what: str
    """A sentence without its full stop."""
    since: int
    """The last step at which the problem was not seen. For NaN and inf, the step at which they were found, because no
    checkpoint holds them."""
    winners: tuple[Network, ...]
    """The networks whose learning rate a rollback lowers."""
    not_finite: bool = False
    """Whether a number is NaN or inf, so that training cannot go on and the step must not be saved."""


@dataclass(frozen=True)
class _Sign:
    needs: tuple[str, ...]
    """Names of the numbers that show the sign, from log points or from evaluations."""
    seen: Callable[..., bool]
    """Takes those numbers, and tells whether the sign is seen."""
    what: str
    """The message, with places for those numbers."""
    winners: tuple[Network, ...] | None
    """The networks that are too strong; None if the discriminator's scores must tell."""


# The bounds are our own unless a source is named. Healthy runs of our recipes stay well away from them.
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
    "overfitting": _Sign(
        # The bound is run/adaptation.py's MOST; with a fixed probability there is no sign of logits.
        ("augment/probability", "augment/sign_real"),
        lambda probability, sign: probability >= MOST and sign > 0,
        "the discriminator is so sure of real images (the mean sign of their logits is {1:.2f}) that augmentation has "
        "reached its highest probability, {0:.1f}",
        ("discriminator",),
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
            start: the step after which the guard judges.
        """
        self._config, self._probability = config, probability
        # For each sign: how often in a row it was seen, the last step without it, and whether it was reported.
        self._streaks: dict[str, tuple[int, int, bool]] = {}
        self._judged = {"log": start, "eval": start}  # the last log point and the last evaluation that were judged

    def judge(
        self, step: int, numbers: Mapping[str, float], *, images_seen: int, not_finite: str | None
    ) -> list[Trouble]:
        """Returns the troubles that began to count at this log point. A trouble is reported once per streak.

        Args:
            step: the step of this log point.
            numbers: values by their names in metrics.jsonl; a sign whose numbers are missing is not judged.
            images_seen: real images that the discriminator has seen.
            not_finite: a weight or moment that is NaN or inf, described for a message; None if all are finite.
        """
        # NaN and inf count at once, and nothing else matters then.
        losses = [name for name in numbers if name.startswith(("loss/", "score/")) and not math.isfinite(numbers[name])]
        if bad := [not_finite] if not_finite is not None else losses:
            return [self.not_finite(step, bad[0])]
        found = []
        for name, sign in _SIGNS.items():
            # A sign is skipped if its numbers are missing, or if it needs probabilities and this loss has none.
            kind = sign.needs[0].split("/")[0]
            values = [numbers[need] for need in sign.needs if need in numbers]
            scores = any(need.startswith("score/") for need in sign.needs)
            if len(values) < len(sign.needs) or (scores and not self._probability):
                continue
            # A sign that is not seen loses its streak; a new streak counts from the last point that was judged.
            count, since, told = self._streaks.pop(name, (0, self._judged["eval" if kind == "eval" else "log"], False))
            if images_seen <= self._config.after or not sign.seen(*values):
                continue
            # A streak that is long enough becomes a trouble, and is reported once.
            lasts = count + 1 >= (_EVALUATIONS if kind == "eval" else self._config.patience)
            self._streaks[name] = (count + 1, since, lasts)
            if lasts and not told:
                found.append(Trouble(sign.what.format(*values), since, sign.winners or self._winners(numbers)))
        self._judged["log"] = step
        if any(name.startswith("eval/") for name in numbers):
            self._judged["eval"] = step
        return found

    def _winners(self, numbers: Mapping[str, float]) -> tuple[Network, ...]:
        """Returns the network that is ahead by the discriminator's scores; both if neither clearly is."""
        ahead = numbers["score/real"] - numbers["score/fake_before"]
        if not self._probability or 0 <= ahead <= 0.5:
            return _BOTH
        return ("discriminator",) if ahead > 0 else ("generator",)

    def not_finite(self, step: int, what: str) -> Trouble:
        """Returns the trouble of a number that is NaN or inf. No checkpoint holds such a number."""
        return Trouble(f"{what} has become NaN or inf", step, _BOTH, not_finite=True)

    @property
    def starts(self) -> set[int]:
        """Returns the steps after which the next trouble may have begun; their checkpoints are kept for a rollback."""
        return {*self._judged.values(), *(since for _, since, _ in self._streaks.values())}

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the guard."""
        asked = {"on_trouble": self._config.on_trouble, "rollbacks": self._config.rollbacks}
        return {**asked, "streaks": dict(self._streaks), "judged": dict(self._judged)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state. If `guard.on_trouble` or `guard.rollbacks` changed, troubles are reported again."""
        same = state["on_trouble"] == self._config.on_trouble
        same = same and state.get("rollbacks", self._config.rollbacks) == self._config.rollbacks  # older ones lack it
        streaks = state["streaks"].items()
        self._streaks = {name: (count, since, told and same) for name, (count, since, told) in streaks}
        self._judged = dict(state["judged"])
