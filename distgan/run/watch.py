"""Measures what the guard needs beyond the loop's numbers: how varied samples are, and whether D memorises images."""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distgan import data, seeding
from distgan.errors import UserError
from distgan.models import CHUNK, Generator, eval_mode
from distgan.recipe import Config, DataConfig

WATCHED = 512  # real images of each kind


@dataclass(frozen=True)
class Watched:
    """Real images for the guard."""

    pixels: Tensor
    """uint8 (N, C, H, W)."""
    labels: Tensor | None = None
    """(N,) int64; None if the networks take no labels."""


class Watch:
    """Measures at log points what no loss shows. Rank zero only."""

    def __init__(
        self, generator: Generator, discriminator: nn.Module, *, real: Watched, unseen: Watched | None, seed: int
    ) -> None:
        """Measures the spread of the real images once.

        Args:
            generator: the generator that is trained.
            discriminator: the discriminator that is trained.
            real: training images.
            unseen: images of the same kind that nobody trains on; None if there are none.
            seed: seed of the samples.
        """
        self._generator, self._discriminator, self._seed = generator, discriminator, seed
        self._real, self._unseen = real, unseen
        self._variance = _variance(map(_scaled, torch.split(real.pixels, CHUNK)))

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Returns `guard/spread` and `guard/memory`, as far as they can be measured.

        `guard/spread` needs real images that differ. `guard/memory` needs unseen images, and a mean logit of training
        images that is more than 1 above that of fakes.

        `guard/spread` is the root mean square distance between samples, divided by that between real images.
        `guard/memory` is (E[D(train)] - E[D(unseen)]) / (E[D(train)] - E[D(fake)]) over logits (Karras et al. 2020,
        "Training GANs with limited data", eq. 1). It is 0 if D treats unseen real images like training images, and 1 if
        it treats them like fakes.
        """
        samples = self._generator.images(0, seed=self._seed)
        numbers = {}
        if self._variance > 0:  # it is 0 if all real images are equal
            numbers["guard/spread"] = math.sqrt(_variance([samples.double()]) / self._variance)
        if self._unseen is not None:
            with eval_mode(self._discriminator):
                fake = float(self._discriminator(samples, self._generator.labels(0, seed=self._seed)).double().mean())
                train, unseen = (self._logit(images) for images in (self._real, self._unseen))
            if train - fake > 1:  # otherwise the ratio would be mostly noise
                numbers["guard/memory"] = (train - unseen) / (train - fake)
        return numbers

    def _logit(self, images: Watched) -> float:
        """Returns the mean of D's logits, computed in parts to save memory."""
        like, total = next(self._discriminator.parameters()), 0.0
        for part in torch.split(torch.arange(len(images.pixels)), CHUNK):
            y = images.labels[part].to(like.device) if images.labels is not None else None
            total += float(self._discriminator(_scaled(images.pixels[part]).to(like), y).double().sum())
        return total / len(images.pixels)


def _scaled(images: Tensor) -> Tensor:
    """Scales uint8 images to [-1, 1], as the networks see them."""
    return images.double() / 127.5 - 1


def _variance(parts: Iterable[Tensor]) -> float:
    """Returns half the mean square distance between images, given in parts of double (N, C, H, W)."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        count, total, squares = count + len(part), total + part.sum(0), squares + part.square().sum(0)
    return float((squares - total.square() / count).clamp(min=0).sum() / (count - 1))


def unseen_images(images: DataConfig, scale: data.Scale | None, *, classes: int) -> Watched | None:
    """Returns real images that nobody trains on, with labels if `classes` > 0; None if none can be used."""
    try:
        other = data.test_split(images)
    except ValueError:
        return None
    try:
        pixels, y, _ = data.preview(data.find(other), other, WATCHED, scale=scale)
        if classes and not bool(((y >= 0) & (y < classes)).all()):
            raise UserError("some of them have labels that the training set lacks.")
        return Watched(pixels, y if classes else None)
    except ValueError as error:
        print(
            f"distgan: guard/memory is off: it needs images that nobody trains on, and {error}",
            file=sys.stderr,
            flush=True,
        )
        return None


def watch_over(G: Generator, D: nn.Module, images: data.Images, unseen: Watched | None, config: Config) -> Watch:
    """Returns the watch of a run. Its real images are drawn from all of the data, not only from the first class."""
    some = torch.from_numpy(seeding.generator(0, "guard").permutation(len(images.pixels))[:WATCHED])
    labels = images.labels[some] if config.model.conditional and images.labels is not None else None
    return Watch(G, D, real=Watched(images.pixels[some], labels), unseen=unseen, seed=config.run.seed)
