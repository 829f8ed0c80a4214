"""The residual networks of WGAN-GP (Gulrajani et al. 2017, appendix F) and SNGAN (Miyato et al. 2018, appendix B.4).

At 32x32 all stages have `width` channels: SNGAN's paper has 256 in G and 128 in D, WGAN-GP's 128 in both. From 64x64 on
they double towards 4x4, up to 16 times (SNGAN's layout for 64 and 128). Other sizes have the layout of the square whose
first map doubles as often. Normalising with spectral norm makes the
discriminator SNGAN's, which sums its last features over the image; without any it is WGAN-GP's, which takes their mean.
Starting weights are SNGAN's.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, relu

from distgan.models.conditional import Projection, batch_norm
from distgan.models.layers import Discriminator, Generator, doublings, first_map


class ResNetGenerator(Generator):
    """latents (N, latent_dim), labels (N,) -> images (N, channels, *size) in [-1, 1]."""

    def __init__(
        self, *, size: tuple[int, int], channels: int, width: int, latent_dim: int, class_counts: tuple[int, ...] = ()
    ) -> None:
        super().__init__(latent_dim=latent_dim, class_counts=class_counts)
        stages, self._start = doublings(size), first_map(size)
        widths = [_channels(width, stages, halvings=stages - i) for i in range(stages + 1)]
        self.first = nn.Linear(latent_dim, widths[0] * math.prod(self._start))
        norm = partial(batch_norm, classes=len(class_counts))
        self.blocks = nn.ModuleList(Up(before, after, norm=norm) for before, after in pairwise(widths))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.last = nn.Conv2d(widths[-1], channels, 3, 1, 1)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.first(z).unflatten(1, (-1, *self._start))
        for block in self.blocks:
            x = block(x, y)
        return torch.tanh(self.last(relu(self.norm(x))))


class ResNetDiscriminator(Discriminator):
    """images (N, channels, *size) in [-1, 1], labels (N,) -> logits (N,)."""

    def __init__(
        self, *, size: tuple[int, int], channels: int, width: int, norm: str = "none", classes: int = 0
    ) -> None:
        super().__init__()
        stages = doublings(size)
        if stages <= 3:
            # At 32x32: 16x16 after the first, 8x8 after the second and from there on.
            blocks = [_Down(width, width, down=True), *(_Down(width, width, down=False) for _ in range(2))]
        else:
            # A block for each resolution down to 4x4, and SNGAN's last one, which at 64 alone halves once more.
            pairs = list(pairwise(_channels(width, stages, halvings=i) for i in range(stages + 1)))
            downs = [stages == 4 or i + 1 < len(pairs) for i in range(len(pairs))]
            blocks = [_Down(*pair, down=down) for pair, down in zip(pairs, downs, strict=True)]
        self.first = _First(channels, width)
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Linear(blocks[-1].channels, 1)
        self.projection = Projection(blocks[-1].channels, classes=classes) if classes else None
        self._sums = norm == "spectral"

    def features(self, x: Tensor) -> list[Tensor]:
        maps = [self.first(x)]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps

    def blocks_from_image(self) -> list[Sequence[nn.Module]]:
        return [[self.first], *([block] for block in self.blocks)]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        last = relu(self.features(x)[-1])
        features = last.sum((2, 3)) if self._sums else last.mean((2, 3))
        logits = self.last(features).flatten()
        return logits if self.projection is None else logits + self.projection(features, y)


class Up(nn.Module):
    """A generator's block: (N, before, H, W) -> (N, after, 2H, 2W). BigGAN has it, too.

    `norm` makes the batch norm of a number of channels. If that is a conditional one, it takes the condition as well.
    """

    def __init__(self, before: int, after: int, *, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(before), norm(after)
        self.conv1, self.conv2 = nn.Conv2d(before, after, 3, 1, 1), nn.Conv2d(after, after, 3, 1, 1)
        self.shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        h = self.conv1(_doubled(relu(_apply(self.norm1, x, condition))))
        h = self.conv2(relu(_apply(self.norm2, h, condition)))
        return h + _doubled(self.shortcut(x))  # a 1x1 convolution does as well before as after


class _First(nn.Module):
    """The discriminator's first block: images (N, channels, H, W) -> (N, width, H/2, W/2)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.shortcut = nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(relu(self.conv1(x)))
        return avg_pool2d(h, 2) + self.shortcut(avg_pool2d(x, 2))


class _Down(nn.Module):
    """(N, before, H, W) -> (N, after, H, W), or with `down` half of that each way."""

    def __init__(self, before: int, after: int, *, down: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(before, before, 3, 1, 1), nn.Conv2d(before, after, 3, 1, 1)
        self.shortcut = nn.Conv2d(before, after, 1) if down or before != after else None
        self.channels, self._down = after, down

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(relu(self.conv1(relu(x))))
        if self._down:
            h, x = avg_pool2d(h, 2), avg_pool2d(x, 2)
        return h + (x if self.shortcut is None else self.shortcut(x))


@torch.no_grad()
def initialise(network: nn.Module, rng: torch.Generator) -> None:
    """Draws Glorot's weights (Glorot and Bengio 2010), sqrt(2) times as wide in blocks except shortcuts; biases 0.

    As in SNGAN's published code.
    """
    inner = {conv for block in network.modules() if isinstance(block, Up | _First | _Down) for conv in _inner(block)}
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(2) if layer in inner else 1, generator=rng)
            assert layer.bias is not None
            layer.bias.zero_()
        elif isinstance(layer, Projection):
            nn.init.xavier_uniform_(layer.embedding.weight, generator=rng)


def _inner(block: "Up | _First | _Down") -> tuple[nn.Module, nn.Module]:
    return block.conv1, block.conv2


def _channels(width: int, stages: int, *, halvings: int) -> int:
    """Returns the channels of a map, by how often the image's size is halved to its own and in all `stages`."""
    return width if stages <= 3 else width * min(16, 2**halvings)


def _apply(norm: nn.Module, x: Tensor, condition: Tensor | None) -> Tensor:
    return norm(x) if isinstance(norm, nn.BatchNorm2d) else norm(x, condition)


def _doubled(x: Tensor) -> Tensor:
    return interpolate(x, scale_factor=2, mode="nearest")
