"""The augmentation pipeline of ADA (Karras et al. 2020, "Training GANs with limited data", section 2 and appendix B).

Geometry and colour of each image change by transforms that are drawn one by one, each with the same probability. All
geometry becomes one affine map, and all colour one matrix. Ranges and order are those of stylegan2-ada-pytorch
(training/augment.py). It can be differentiated twice with respect to the images, as gradient penalties need.

Two things differ from that code. Beyond its edges an image goes on as its mirror image without end. There, a margin as
wide as the largest shift in the batch is mirrored, which would make an image depend on the others of its rank. And
normal deviates come from uniform numbers, cut off at 4.75.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, pad

NUMBERS = 31
"""How many uniform numbers each image needs."""

# The low-pass filter sym6 (Daubechies 1992), orthonormal: upsampling and then downsampling by it changes nothing.
SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466),
    *(0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578),
    *(0.0017677118642428036, -0.007800708325034148),
)
_MARGIN = 6  # pixels, or half pixels of the upsampled image, that are mirrored for the filter


@dataclass(frozen=True)
class Pipeline:
    """A pipeline: how probable each kind of transform is, as a multiple of the pipeline's probability."""

    geometry: float = 1.0
    color: float = 1.0
    cutout: float = 0.0

    def __call__(self, images: Tensor, u: Tensor, probability: Tensor) -> Tensor:
        """Transforms images.

        Args:
            images: (N, C, H, W) in [-1, 1], with C of 1 (grey), 3 (RGB) or 4 (RGBA, whose fourth keeps its values).
            u: (N, NUMBERS), uniform in [0, 1).
            probability: of each transform, a scalar.

        Returns:
            (N, C, H, W), of which colours may leave [-1, 1].
        """
        numbers = _Numbers(u.to(images.dtype), probability.to(images.dtype))
        images = _sampled(images, _geometry(numbers, self.geometry, images))
        images = _recoloured(images, numbers, self.color)
        return _cut_out(images, numbers, self.cutout)


PIPELINES: Mapping[str, Pipeline] = {
    "ada": Pipeline(),  # "bgc": blit, geometric and colour transforms, the default of stylegan2-ada-pytorch
    "ada_r3gan": Pipeline(color=0.5, cutout=1.0),  # of R3GAN's training/augment.py and train.py (Huang et al. 2024)
}


class _Numbers:
    """Hands out the uniform numbers of each image, in order."""

    def __init__(self, u: Tensor, probability: Tensor) -> None:
        self._u, self._p, self._next = u, probability, 0

    def uniform(self) -> Tensor:
        """Returns numbers in [0, 1), (N,)."""
        self._next += 1
        return self._u[:, self._next - 1]

    def normal(self) -> Tensor:
        """Returns numbers from N(0, 1), (N,)."""
        return torch.special.ndtri(self.uniform().clamp(1e-6, 1 - 1e-6))

    def where(self, multiple: float, drawn: Tensor, neutral: float, *, rotation: bool = False) -> Tensor:
        """Returns what was drawn for the images that are transformed, and the neutral value for the others, (N,).

        A rotation is drawn twice, so that its probability is 1 - sqrt(1 - p) each time.
        """
        p = self._p * multiple
        if rotation:
            p = 1 - (1 - p.clamp(0, 1)).sqrt()
        return torch.where(self.uniform() < p, drawn, torch.full_like(drawn, neutral))


def _geometry(numbers: _Numbers, multiple: float, images: Tensor) -> Tensor:
    """Returns the maps from places in the results to places in the images, (N, 2, 3), in pixels from the centre."""
    height, width = images.shape[2:]
    uniform, normal, where = numbers.uniform, numbers.normal, numbers.where
    found = _affine(1 - 2 * where(multiple, (2 * uniform()).floor(), 0))  # mirrored left to right
    found = found @ _rotation(where(multiple, (4 * uniform()).floor(), 0) * (math.pi / 2))
    right, down = (((2 * uniform() - 1) * 0.125 * size).round() for size in (width, height))
    found = found @ _shift(*_both(numbers, multiple, right, down))
    scale = where(multiple, torch.exp2(0.2 * normal()), 1)
    found = found @ _affine(1 / scale, 1 / scale)
    found = found @ _rotation(where(multiple, (2 * uniform() - 1) * math.pi, 0, rotation=True))
    stretch = where(multiple, torch.exp2(0.2 * normal()), 1)
    found = found @ _affine(1 / stretch, stretch)
    found = found @ _rotation(where(multiple, (2 * uniform() - 1) * math.pi, 0, rotation=True))
    right, down = (0.125 * normal() * size for size in (width, height))
    return (found @ _shift(*_both(numbers, multiple, right, down)))[:, :2]


def _both(numbers: _Numbers, multiple: float, right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two shifts, or none of them, (N,) each."""
    taken = numbers.where(multiple, torch.ones_like(right), 0)
    return right * taken, down * taken


def _affine(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Returns matrices that scale, (N, 3, 3)."""
    return torch.diag_embed(torch.stack([x, torch.ones_like(x) if y is None else y, torch.ones_like(x)], 1))


def _rotation(angle: Tensor) -> Tensor:
    sin, cos, zero, one = angle.sin(), angle.cos(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], 1).view(-1, 3, 3)


def _shift(right: Tensor, down: Tensor) -> Tensor:
    zero, one = torch.zeros_like(right), torch.ones_like(right)
    return torch.stack([one, zero, -right, zero, one, -down, zero, zero, one], 1).view(-1, 3, 3)


def _sampled(images: Tensor, maps: Tensor) -> Tensor:
    """Takes each pixel from where `maps` says, at twice the resolution, so that fine detail does not alias.

    With the tap at place 5 of 12 in the middle, half pixel m of the upsampled image lies at (m + 0.5) / 2 pixels.
    """
    n, channels, height, width = images.shape
    taps = torch.stack([images.new_full((), tap) for tap in SYM6])  # on the device: sending makes the host wait
    doubled = images.flatten(0, 1)[:, None]
    for axis, size in ((2, height), (3, width)):
        # Mirrored by indices: torch's reflection padding has no deterministic gradient on CUDA.
        places = torch.arange(-_MARGIN, size + _MARGIN, device=images.device).remainder(2 * size - 2)
        doubled = doubled.index_select(axis, size - 1 - (size - 1 - places).abs())
        kernel = (math.sqrt(2) * taps).view([-1 if i == axis else 1 for i in range(4)])
        doubled = conv_transpose2d(doubled, kernel, stride=tuple(2 if i == axis else 1 for i in (2, 3)))
        doubled = doubled.narrow(axis, 2 * _MARGIN - 1, 2 * size + 2 * _MARGIN)  # m from -6 to 2 size + 5

    # Where the half pixels from -5 to 2 size + 4 come from, as x and y of half pixels in `doubled`, (N, H', W').
    down, right = (
        (torch.arange(-5, 2 * size + 5, device=images.device, dtype=images.dtype) + 0.5 - size) / 2
        for size in (height, width)
    )
    x, y = (
        row[:, None, None, 0] * right + row[:, None, None, 1] * down[:, None] + row[:, None, None, 2]
        for row in maps.unbind(1)
    )
    values = _bilinear(doubled.view(n, channels, *doubled.shape[2:]), _place(x, width), _place(y, height))

    values = values.flatten(0, 1)[:, None]
    for axis in (2, 3):
        kernel = (taps / math.sqrt(2)).view([-1 if i == axis else 1 for i in range(4)])
        values = conv2d(values, kernel, stride=tuple(2 if i == axis else 1 for i in (2, 3)))
    return values.view_as(images)


def _place(centred: Tensor, size: int) -> Tensor:
    """Turns pixels from the centre into places in the upsampled axis, mirrored where they lie beyond its margin."""
    m = 2 * centred + size - 0.5
    period = 2 * size - 2  # of half pixels from the centre of the first pixel, m = 0.5, to that of the last
    mirrored = 0.5 + period - ((m - 0.5).remainder(2 * period) - period).abs()
    return torch.where((m >= -_MARGIN) & (m <= 2 * size + _MARGIN - 1), m, mirrored) + _MARGIN


def _bilinear(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Samples images (N, C, H, W) at places (N, H', W') inside them: (N, C, H', W').

    torch's grid_sample has no deterministic gradient on CUDA; gathering has. Both can be differentiated twice.
    """
    height, width = images.shape[2:]
    left, top = (at.floor().clamp(0, size - 2) for at, size in ((x, width), (y, height)))
    across, along = (x - left).flatten(1)[:, None], (y - top).flatten(1)[:, None]
    first = (top * width + left).long().flatten(1)[:, None].expand(-1, images.shape[1], -1)
    pixels = images.flatten(2)
    upper, lower = (
        torch.lerp(pixels.gather(2, first + row), pixels.gather(2, first + row + 1), across) for row in (0, width)
    )
    return torch.lerp(upper, lower, along).view(*images.shape[:2], *x.shape[1:])


def _recoloured(images: Tensor, numbers: _Numbers, multiple: float) -> Tensor:
    """Applies one matrix to the colours of each image. Grey images use the mean of its rows."""
    channels = images.shape[1]
    uniform, normal, where = numbers.uniform, numbers.normal, numbers.where
    eye, grey = torch.eye(4, dtype=images.dtype, device=images.device), images.new_full((3, 3), 1 / 3)
    along_grey = pad(grey, (0, 1, 0, 1))  # the projection to the grey axis, (4, 4)
    across = pad(eye[:3, :3] - grey, (0, 1, 0, 1))
    brightness = where(multiple, 0.2 * normal(), 0)
    matrix = eye + pad(brightness[:, None, None].expand(-1, 3, 1), (3, 0, 0, 1))
    contrast = where(multiple, torch.exp2(0.5 * normal()), 1)
    matrix = _diagonal(contrast) @ matrix
    flipped = where(multiple, (2 * uniform()).floor(), 0)[:, None, None]
    matrix = (eye - 2 * along_grey * flipped) @ matrix
    angle = where(multiple, (2 * uniform() - 1) * math.pi, 0)[:, None, None]
    saturation = where(multiple, torch.exp2(normal()), 1)[:, None, None]
    if channels > 1:
        # Rodrigues' formula for a rotation about the grey axis.
        cycle = eye[:3, :3].roll(1, 0) / math.sqrt(3)
        turn = pad(cycle - cycle.T, (0, 1, 0, 1))  # the cross product with the axis
        rest = eye - along_grey - across  # of the homogeneous coordinate
        matrix = (along_grey + rest + angle.cos() * across + angle.sin() * turn) @ matrix
        matrix = (along_grey + rest + saturation * across) @ matrix
    if channels == 1:
        row = matrix[:, :3].mean(1)
        return images * row[:, :3].sum(1)[:, None, None, None] + row[:, 3][:, None, None, None]
    colours = images[:, :3].flatten(2)
    changed = (matrix[:, :3, :3] @ colours + matrix[:, :3, 3:]).view_as(images[:, :3])
    return changed if channels == 3 else torch.cat([changed, images[:, 3:]], 1)


def _diagonal(scale: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([scale, scale, scale, torch.ones_like(scale)], 1))


def _cut_out(images: Tensor, numbers: _Numbers, multiple: float) -> Tensor:
    """Sets a rectangle of half the height and width to 0, its centre anywhere in the image."""
    height, width = images.shape[2:]
    taken = numbers.where(multiple, images.new_ones(len(images)), 0) > 0
    hidden = [
        ((torch.arange(size, device=images.device) + 0.5) / size - numbers.uniform()[:, None]).abs() < 0.25
        for size in (width, height)
    ]
    hole = hidden[1][:, :, None] & hidden[0][:, None, :] & taken[:, None, None]
    return images * ~hole[:, None]
