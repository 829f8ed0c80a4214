"""The averaged generator."""

import copy

import torch
from torch import nn

from distgan.models import Generator, spectral_norm
from distgan.recipe import Config
from distgan.schedules import between, ramped


class Average:
    """An exponential moving average of a generator's weights, with a half-life in images and a ramp at the start.

    After each update w_avg <- beta * w_avg + (1 - beta) * w with beta = 0.5 ** (images / half_life), where the
    half-life rises in a line, as `ramp` times the images seen so far, until it is reached (StyleGAN2-ADA, Karras et al.
    2020; training_loop's ema_kimg and ema_rampup). Floating-point buffers, batch norm's statistics, are averaged as the
    weights are: they belong to them. So are spectral norm's vectors, which then make a power iteration on the averaged
    weights. It runs in full precision and is never trained.
    """

    def __init__(self, generator: Generator, config: Config) -> None:
        """Begins with a copy of the generator."""
        self.generator = copy.deepcopy(generator).eval().requires_grad_(False)
        self._half_life = ramped(config, config.ema.half_life, config.ramp.half_life)
        self._ramp, self._start = config.ema.ramp, config.ema.start
        self._images, self._logs = config.images_per_step, config.ramp.half_life is not None
        self._weight = 1.0
        self.now: dict[str, float] = {}

    def set(self, step: int) -> None:
        """Gives the new weights their share for the update that follows this step."""
        half_life = full = self._half_life(step)
        if self._logs:
            self.now = {"ramp/half_life": half_life}
        if self._ramp is not None and full > 0:
            half_life = between("linear", 0, full, self._ramp * (step + 1) * self._images / full)
        self._weight = 1 - 0.5 ** (self._images / half_life) if half_life > 0 and step >= self._start else 1.0

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Takes in the weights of `source` after an update."""
        mine, theirs = self.generator.state_dict(), source.state_dict()
        floating = [name for name, tensor in mine.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floating], [theirs[name] for name in floating], self._weight)
        for name in mine.keys() - set(floating):  # batch norm's count of batches
            mine[name].copy_(theirs[name])
        if self._weight < 1:  # otherwise it is a copy
            spectral_norm.iterate(self.generator)
