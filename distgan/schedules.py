"""Values that change in the course of a run. They are functions of the step, so that nothing about them is saved."""

import math
from collections.abc import Callable, Mapping
from typing import Protocol

from torch.optim import Optimizer

_CURVES: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 0.0,
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,  # Loshchilov and Hutter 2017 (SGDR), eq. 5, without restarts
}


def between(curve: str, start: float, end: float, at: float) -> float:
    """Returns the value on a curve from `start`, at 0, to `end`, at 1 and beyond; `constant` stays at the start."""
    return start + (end - start) * _CURVES[curve](min(max(at, 0.0), 1.0))


class Scheduled(Protocol):
    """Something with values that change in the course of a run."""

    def set(self, step: int) -> None:
        """Sets the values for the updates that follow this step."""

    @property
    def now(self) -> dict[str, float]:
        """Returns the values that were set last, by their names in metrics.jsonl; empty if they are not logged."""


class Schedules:
    """All that changes in the course of a run, set in one place before each step."""

    def __init__(self, *scheduled: Scheduled) -> None:
        self._scheduled = scheduled

    def set(self, step: int) -> None:
        """Sets the values of the updates that follow this step."""
        for one in self._scheduled:
            one.set(step)

    @property
    def now(self) -> dict[str, float]:
        """Returns the values that were set last, by their names in metrics.jsonl: after a step, those that it used."""
        return {name: value for one in self._scheduled for name, value in one.now.items()}


class Rates:
    """The learning rate of each optimiser over a run, from its base rate to the end of the schedule."""

    base: dict[str, float]
    """The rate that the schedule starts from, by the network's name; a rollback lowers it."""

    def __init__(self, optimizers: Mapping[str, Optimizer], *, lr: float, schedule: str, steps: int) -> None:
        """Begins at the base rate for both networks.

        Args:
            optimizers: by the network's name.
            lr: the base rate.
            schedule: `optim.schedule`.
            steps: the step at which the schedule has ended.
        """
        self.base = dict.fromkeys(optimizers, lr)
        self._optimizers, self._schedule, self._steps = optimizers, schedule, steps

    def set(self, step: int) -> None:
        """Sets the learning rates for the update that follows this step."""
        for name, optimizer in self._optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = between(self._schedule, self.base[name], 0, step / self._steps)

    @property
    def now(self) -> dict[str, float]:
        """Returns the rates that were set last, as `lr/NETWORK`."""
        return {f"lr/{name}": optimizer.param_groups[0]["lr"] for name, optimizer in self._optimizers.items()}
