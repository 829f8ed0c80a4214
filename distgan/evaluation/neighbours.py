"""Finds the training images nearest to given images: what tells a copy from an invention."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distgan import data
from distgan.errors import UserError
from distgan.models import from_bytes
from distgan.progress import shown
from distgan.storage.exported import Exported

_PART = 10_000  # training images in memory as floats at once
_SAMPLES = 512  # samples that are compared with them at once


def training_images(found: Exported) -> Tensor:
    """Returns the images that a generator was trained on: uint8 (N, C, H, W).

    Raises:
        UserError: there is no recipe beside the generator, or its data set cannot be read here.
    """
    if found.recipe is None:
        raise UserError("no recipe beside it, so no training images")
    try:
        return data.load(found.recipe.data).pixels
    except UserError as error:
        raise UserError(f"its training images are not here ({error})") from error


@dataclass(frozen=True)
class Nearest:
    """The training image nearest to each sample, by the root mean square difference of pixels."""

    index: Tensor
    """Numbers of the training images, (N,)."""
    distance: Tensor
    """Distances of samples to them, (N,), for pixels in [-1, 1]."""
    apart: Tensor
    """Distances of those training images to the nearest other one, (N,)."""

    @property
    def ratio(self) -> Tensor:
        """Returns `distance` divided by `apart`, (N,): a ratio well below 1 means that the sample is a copy."""
        return self.distance / self.apart.clamp(min=1e-12)


def nearest(samples: Tensor, pixels: Tensor) -> Nearest:
    """Finds the training image nearest to each sample. Both are uint8 (N, C, H, W)."""
    distance, index = _two_nearest(samples, pixels)
    among, _ = _two_nearest(pixels[index[:, 0]], pixels)  # the first is the image itself
    return Nearest(index[:, 0], distance[:, 0], among[:, 1])


def distance_to_nearest(samples: Tensor, pixels: Tensor) -> Tensor:
    """Returns the distance of each sample to its nearest training image, (N,). Both are uint8 (N, C, H, W)."""
    return _two_nearest(samples, pixels)[0][:, 0]


def nearest_where(samples: Tensor, known: Tensor, pixels: Tensor) -> Tensor:
    """Finds the training image nearest to each sample by the pixels that are known, and returns their numbers, (N,).

    Args:
        samples: uint8 (N, C, H, W).
        known: bool (N, H, W).
        pixels: the training images, uint8 (M, C, H, W).
    """
    weights = known[:, None].expand_as(samples).flatten(1).float()
    wanted = from_bytes(samples).flatten(1)
    best, index = torch.full((len(samples),), torch.inf), torch.zeros(len(samples), dtype=torch.int64)
    for first in range(0, len(pixels), _PART):
        part = from_bytes(pixels[first : first + _PART]).flatten(1)
        # The sum of w (x - t)^2 over pixels, without the term of t alone.
        distance, at = (weights @ part.square().T - 2 * (weights * wanted) @ part.T).min(1)
        closer = distance < best
        best, index = torch.where(closer, distance, best), torch.where(closer, at + first, index)
    return index


def _two_nearest(samples: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns distances and numbers of the two nearest images, (N, 2) each."""
    best, index = torch.full((len(samples), 2), torch.inf), torch.zeros(len(samples), 2, dtype=torch.int64)
    # With all pairs at once, memory would grow with their number.
    blocks = [(at, first) for at in range(0, len(samples), _SAMPLES) for first in range(0, len(pixels), _PART)]
    for at, first in shown(blocks, "comparing with training images", len(blocks), unit="blocks"):
        mine = slice(at, at + _SAMPLES)
        x = samples[mine].flatten(1).float() / 127.5
        part = pixels[first : first + _PART].flatten(1).float() / 127.5
        distances = torch.cdist(x, part, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
        numbers = torch.arange(first, first + len(part)).expand(len(x), -1)
        distances, numbers = torch.cat([best[mine], distances], 1), torch.cat([index[mine], numbers], 1)
        best[mine], chosen = distances.topk(2, dim=1, largest=False)
        index[mine] = numbers.gather(1, chosen)
    return best, index
