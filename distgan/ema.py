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

    def __init__(self, generator: Generator, *, half_life: float, ramp: float) -> None:
        self.generator = copy.deepcopy(generator).eval().requires_grad_(False)
        self._half_life = half_life
        self._ramp = ramp

    @torch.no_grad()
    def update(self, source: nn.Module, *, images_seen: int, images: int) -> None:
        """Takes in the weights of `source` after an update that brought the count of images to `images_seen`."""
        weight = 1.0
        if self._half_life > 0:
            half_life = between("linear", 0, self._half_life, self._ramp * images_seen / self._half_life)
            weight = 1 - 0.5 ** (images / half_life)
        mine, theirs = self.generator.state_dict(), source.state_dict()
        floating = [name for name, tensor in mine.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floating], [theirs[name] for name in floating], weight)
        for name in mine.keys() - set(floating):  # batch norm's count of batches
            mine[name].copy_(theirs[name])
