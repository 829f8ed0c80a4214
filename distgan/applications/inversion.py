"""Inversion: finds the latents whose images are nearest to given pictures."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distgan.applications.search import Loss, Settings, Wanted, opened, searching
from distgan.models import Discriminator, from_bytes, to_bytes
from distgan.storage.exported import Exported
from distgan.storage.latents import Latents

_FEATURES = 0.05  # weight of the discriminator's features, beside pixels


@dataclass(frozen=True)
class Inverted:
    """The images of a generator that are nearest to given pictures."""

    latents: Latents
    images: Tensor
    """What the generator draws from the latents, uint8 (N, C, H, W)."""
    distance: Tensor
    """Root mean square differences of image and picture, (N,), for pixels in [-1, 1]."""


def invert(
    run: str | os.PathLike[str] | Exported, pictures: Tensor, *, steps: int = 500, restarts: int = 4, seed: int = 0
) -> Inverted:
    """Collective: finds the latents whose images are nearest to pictures. Several processes share the pictures.

    The loss of an image is its mean squared difference from the picture, and that of the discriminator's features,
    each feature map relative to the picture's own (as in the feature loss of Larsen et al. 2016, section 3.1). Without
    a discriminator it is the first term alone. The search begins at the samples that are nearest, with their labels if
    the generator has classes.

    Args:
        run: the folder of a run or of an exported generator, or a generator's id on the hub.
        pictures: uint8 (N, C, H, W), of the generator's size.
        steps: updates of each latent.
        restarts: starts of each picture, of which the best goes on after a fifth of the steps.
        seed: the seed of the samples where searches begin.

    Returns:
        The same on every rank.

    Raises:
        UserError: there is no generator, or the pictures or numbers do not fit.
    """
    found, pictures = opened(run), pictures.cpu()
    settings = Settings(steps=steps, restarts=restarts, seed=seed)
    with searching(found, pictures, settings) as search:
        wanted = Wanted(from_bytes(pictures), torch.ones(len(pictures), 1, *pictures.shape[2:]))
        result = search.run(wanted, _loss(search.discriminator), what="inverting")
    images = to_bytes(result.images)
    distance = (from_bytes(images) - from_bytes(pictures)).square().mean((1, 2, 3)).sqrt()
    return Inverted(result.latents, images, distance)


def _loss(discriminator: Discriminator | None) -> Callable[[Wanted], Loss]:
    def of_group(wanted: Wanted) -> Loss:
        theirs: list[Tensor] = []
        if discriminator is not None:
            with torch.no_grad():
                theirs = discriminator.features(wanted.pixels)

        def loss(images: Tensor, y: Tensor | None, of: Tensor) -> Tensor:
            total = wanted.difference(images, of, power=2)
            ours = discriminator.features(images) if discriminator is not None else []
            for mine, his in zip(ours, theirs, strict=True):
                relative = (mine - his[of]).square().flatten(1).mean(1) / his[of].square().flatten(1).mean(1)
                total = total + _FEATURES / len(theirs) * relative
            return total

        return loss

    return of_group
