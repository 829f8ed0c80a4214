"""A run's first steps in the tests' own process, without its files and its ranks."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distgan import models, recipe
from distgan.data import Images
from distgan.ema import Average
from distgan.models import ImageSpec
from distgan.run.algorithm import Step
from distgan.run.rehearsal import rehearsed
from distgan.storage.checkpoint import Slots


def materials(c, count=50_000):
    """Images that take no memory, and what networks must know of them."""
    spec = ImageSpec(
        image_size=c.data.image_size, channels=3, class_counts=(count // 10,) * 10 if c.model.conditional else ()
    )
    images = Images(
        pixels=torch.zeros(1, dtype=torch.uint8).expand(count, 3, *c.data.size),
        labels=torch.zeros(count, dtype=torch.int64),
        classes=tuple("abcdefghij"),
        fingerprint="",
        skipped=0,
        plain=0,
        scale=None,
        folder=None,
    )
    return images, spec


def networks(c, spec):
    generator, discriminator = models.build(c.model, spec, seed=0)
    return {"generator": generator, "discriminator": discriminator, "average": Average(generator, c)}


class After(NamedTuple):
    """What there is after some steps."""

    tensors: dict[str, Tensor]
    """Of the networks, the average and Adam: `generator.main.0.weight`, `adam of generator.main.0.weight/step`."""
    logged: dict[str, float]
    step: Step


def after_steps(overrides, how, *, end, each: Callable[[], object] = lambda: None) -> After:
    """Makes the first steps of a run on 100 images of noise, and calls `each` after each one.

    `rehearsal._OnlyRank.place`, which takes the numbers out of networks, must be replaced.
    """
    c = recipe.parse(["--run.dir=x", "--data.source=cifar10", f"--train.compile={how}", *overrides])[0]
    images, spec = materials(c, count=100)
    noise = torch.Generator().manual_seed(0)
    images = dataclasses.replace(
        images,
        pixels=torch.randint(256, images.pixels.shape, generator=noise, dtype=torch.uint8),
        labels=torch.arange(100) % 10,
    )
    parts = networks(c, spec)
    step = rehearsed(c, images, **parts, device=torch.device("cpu"), steps_run=how)
    for number in range(end):
        step(number)
        each()
    kept = {**parts, "average": parts["average"].generator}
    kept |= {f"adam of {name}": Slots(adam, parts[name]) for name, adam in step.adams.items()}
    found = {f"{part}.{name}": tensor for part, holder in kept.items() for name, tensor in holder.state_dict().items()}
    return After(found, {**step.meter.means(), **step.schedules.now}, step)
