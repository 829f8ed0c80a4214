"""Differentiable augmentation of what the discriminator sees: DiffAugment (Zhao et al. 2020), or ADA's pipeline.

All images that the discriminator sees are augmented, in both halves of a step, so that the generator does not learn to
draw augmented images. DiffAugment's ranges are those of the authors' code. Random numbers are drawn for each image of
the global batch, whatever the number of processes. ADA's pipeline is in ada.py.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from distgan.errors import UserError, unknown_name
from distgan.objective.ada import NUMBERS, PIPELINES

Draw = Callable[[str, int], Tensor]
"""(stream, n) -> (N, n) uniform in [0, 1): n numbers for each image of this rank's share."""


class Augment:
    """Some of the augmentations, in the order in which they are named."""

    probability: Tensor
    """Of each transform of a pipeline: a scalar on the images' device, from 0 to 1."""

    def __init__(self, names: Sequence[str]) -> None:
        """Finds the augmentations by their names in `AUGMENTATIONS` and `PIPELINES`.

        Raises:
            UserError: one is unknown.
        """
        for name in names:
            if name not in AUGMENTATIONS and name not in PIPELINES:
                raise UserError(unknown_name("augment.policy", name, [*AUGMENTATIONS, *PIPELINES]))
        self._names = names
        self.probability = torch.zeros((), dtype=torch.float64)

    def __call__(self, images: Tensor, draw: Draw, which: str) -> Tensor:
        """Augments images (N, C, H, W) in [-1, 1]; colours may leave that range. `which` keeps kinds apart."""
        for name in self._names:
            stream = f"augment.{which}.{name}"
            if name in PIPELINES:
                images = PIPELINES[name](images, draw(stream, NUMBERS), self.probability)
            else:
                count, change = AUGMENTATIONS[name]
                images = change(images, draw(stream, count))
        return images


def color(images: Tensor, u: Tensor) -> Tensor:
    """Brightness by -0.5 ... 0.5, saturation by 0 ... 2 and contrast by 0.5 ... 1.5; u is (N, 3) in [0, 1).

    Changes the colours of RGBA images, not their opacity.
    """
    if images.shape[1] == 4:
        return torch.cat([color(images[:, :3], u), images[:, 3:]], 1)
    brightness, saturation, contrast = u.to(images.dtype).t()[:, :, None, None, None]
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (2 * saturation)
    level = images.mean((1, 2, 3), keepdim=True)
    return level + (images - level) * (contrast + 0.5)


def translation(images: Tensor, u: Tensor) -> Tensor:
    """Shifts by up to an eighth of height and width, in whole pixels, with zeros beyond; u is (N, 2) in [0, 1)."""
    n, _, height, width = images.shape

    def source(u: Tensor, size: int) -> Tensor:
        """Returns where each row or column comes from, (N, size), in images with a margin of one pixel of zeros."""
        most = size // 8
        shift = (u * (2 * most + 1)).long()[:, None] - most
        return (torch.arange(size, device=u.device) - shift + 1).clamp(0, size + 1)

    rows, columns = source(u[:, 0], height), source(u[:, 1], width)
    image = torch.arange(n, device=u.device)[:, None, None]
    margined = pad(images, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    return margined[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutout(images: Tensor, u: Tensor) -> Tensor:
    """Sets a square of half the height and width to 0, its centre anywhere in the image; u is (N, 2) in [0, 1)."""
    _, _, height, width = images.shape

    def hidden(u: Tensor, size: int) -> Tensor:
        length = size // 2
        first = (u * (size + (1 - length % 2))).long()[:, None] - length // 2
        at = torch.arange(size, device=u.device)
        return (at >= first) & (at < first + length)

    hole = hidden(u[:, 0], height)[:, None, :, None] & hidden(u[:, 1], width)[:, None, None, :]
    return images * ~hole


AUGMENTATIONS: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "color": (3, color),
    "translation": (2, translation),
    "cutout": (2, cutout),
}
"""By name: how many uniform numbers each image needs, and what is done with them."""
