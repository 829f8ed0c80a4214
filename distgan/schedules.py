"""Values that change in the course of a run. They are functions of the step, so that nothing about them is saved.

The one exception is an adapted probability of augmentation (objective/ada.py), which depends on what D said.
"""

import math
from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

from distgan.recipe import Config

Course = Callable[[int], float]
"""The value of a setting at a step."""

_CURVES: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 0.0,
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,  # Loshchilov and Hutter 2017 (SGDR), eq. 5, without restarts
}


def between(curve: str, start: float, end: float, at: float) -> float:
    """Returns the value on a curve from `start`, at 0, to `end`, at 1 and beyond; `constant` stays at the start."""
    return start + (end - start) * _CURVES[curve](min(max(at, 0.0), 1.0))


def ramped(config: Config, start: float, end: float | None) -> Course:
    """Returns the course of a setting from `start` to `end`, its entry in `config.ramp`; if that is unset, it stays.

    Half a cosine over the first `ramp.images` images (Huang et al. 2024, R3GAN, appendix D; `cosine_decay_with_warmup`
    in its code).
    """
    images = config.ramp.images
    if end is None or images is None:
        return lambda step: start
    return lambda step: between("cosine", start, end, step * config.images_per_step / images)


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

    def __init__(
        self, optimizers: Mapping[str, Optimizer], *, lr: float, schedule: str, steps: float, end: float = 0.0
    ) -> None:
        """Begins at the base rate for both networks.

        Args:
            optimizers: by the network's name.
            lr: the base rate.
            schedule: the curve, as `optim.schedule` names it.
            steps: the step at which the schedule has ended.
            end: the rate at the end of the schedule. A rollback lowers it as it lowers the base.
        """
        self.base = dict.fromkeys(optimizers, lr)
        self._optimizers, self._schedule, self._steps, self._end = optimizers, schedule, steps, end / lr
        self._now = self.base

    @classmethod
    def of(cls, config: Config, optimizers: Mapping[str, Optimizer]) -> "Rates":
        """Returns the rates of a recipe: those of `optim.schedule`, or of `ramp.lr`."""
        lr, ramp = config.optim.lr, config.ramp
        if ramp.lr is None or ramp.images is None:
            return cls(optimizers, lr=lr, schedule=config.optim.schedule, steps=config.train.steps)
        steps = ramp.images / config.images_per_step
        return cls(optimizers, lr=lr, schedule="cosine", steps=steps, end=ramp.lr)

    def set(self, step: int) -> None:
        """Sets the learning rates for the update that follows this step."""
        at = step / self._steps
        self._now = {name: between(self._schedule, base, self._end * base, at) for name, base in self.base.items()}
        for name, optimizer in self._optimizers.items():
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(self._now[name])
                else:
                    group["lr"] = self._now[name]

    @property
    def now(self) -> dict[str, float]:
        """Returns the rates that were set last, as `lr/NETWORK`."""
        return {f"lr/{name}": rate for name, rate in self._now.items()}


class Beta2:
    """The decay rate of Adam's second moment, if it is ramped."""

    def __init__(self, config: Config, optimizers: Mapping[str, Optimizer]) -> None:
        self._course = ramped(config, config.optim.betas[1], config.ramp.beta2)
        self._logs, self._optimizers = config.ramp.beta2 is not None, optimizers

    def set(self, step: int) -> None:
        """Sets it for the updates that follow this step."""
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["betas"] = (group["betas"][0], self._course(step))

    @property
    def now(self) -> dict[str, float]:
        """Returns the value that was set last, as `ramp/beta2`, if it is ramped."""
        first = next(iter(self._optimizers.values()))
        return {"ramp/beta2": first.param_groups[0]["betas"][1]} if self._logs else {}
