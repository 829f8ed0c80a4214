"""The averaged generator."""

import copy

import torch
from torch import nn

from distgan.models import Generator
from distgan.schedules import between


class Average:
    """An exponential moving average of a generator's weights, with a half-life in images and a ramp at the start.

    After each update w_avg <- beta * w_avg + (1 - beta) * w with beta = 0.5 ** (images / half_life), where the
    half-life rises in a line, as `ramp` times the images seen so far, until it is reached (StyleGAN2-ADA, Karras et al.
    2020; training_loop's ema_kimg and ema_rampup). Floating-point buffers, batch norm's statistics, are averaged as the
    weights are: they belong to them. It runs in full precision and is never trained.
    """

    def __init__(self, generator: Generator, *, half_life: float, ramp: float, images_per_step: int) -> None:
        """Begins with a copy of the generator.

        Args:
            generator: the network whose weights are averaged.
            half_life: `ema.half_life`, in images.
            ramp: `ema.ramp`.
            images_per_step: real images that a step sees.
        """
        self.generator = copy.deepcopy(generator).eval().requires_grad_(False)
        self._half_life, self._ramp, self._images = half_life, ramp, images_per_step
        self._weight = 1.0

    def set(self, step: int) -> None:
        """Gives the new weights their share for the update that follows this step."""
        if self._half_life > 0:
            seen = (step + 1) * self._images
            half_life = between("linear", 0, self._half_life, self._ramp * seen / self._half_life)
            self._weight = 1 - 0.5 ** (self._images / half_life)

    @property
    def now(self) -> dict[str, float]:
        """Returns an empty dict: the half-life is not logged."""
        return {}

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Takes in the weights of `source` after an update."""
        mine, theirs = self.generator.state_dict(), source.state_dict()
        floating = [name for name, tensor in mine.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floating], [theirs[name] for name in floating], self._weight)
        for name in mine.keys() - set(floating):  # batch norm's count of batches
            mine[name].copy_(theirs[name])
