"""BigGAN's networks (Brock et al. 2019, appendix B), at 32x32 in PyTorch-StudioGAN's layout for CIFAR-10 (947b35e).

The latent vector is split. Its first part feeds the first layer. Each block's batch norm depends on a part of its own,
and on a vector of the label that all blocks share. Both networks have spectral norm and self-attention. The layouts for
128 and 256 pixels are those of the paper's tables, the one for 64 is StudioGAN's. Images that are not square have the
layout of the square whose first map doubles as often.

In a block of the discriminator the shortcut takes what came into the block, as in the paper. In StudioGAN, an
activation in place changes that before the shortcut takes it.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

from distgan.errors import UserError
from distgan.models.conditional import Projection, embedded
from distgan.models.layers import Discriminator, Generator, doublings, first_map
from distgan.models.resnet import Up

_SHARED = 128  # numbers of the label's vector
_EPS = 1e-4  # of batch norm

# By the number of doublings: widths of the maps from 4x4 to the image, in units of `width`, and after which block
# attention comes.
_G: dict[int, tuple[list[int], int]] = {
    3: ([4, 4, 4, 4], 2),
    4: ([16, 8, 4, 2, 1], 3),
    5: ([16, 16, 8, 4, 2, 1], 4),
    6: ([16, 16, 8, 8, 4, 2, 1], 4),
}
# The same from the image to 4x4, with how many blocks halve the map; the others keep its size.
_D: dict[int, tuple[list[int], int, int]] = {
    3: ([2, 2, 2, 2], 1, 2),
    4: ([1, 2, 4, 8, 16], 1, 4),
    5: ([1, 2, 4, 8, 16, 16], 1, 5),
    6: ([1, 2, 4, 8, 8, 16, 16], 2, 6),
}


class BigGANGenerator(Generator):
    """latents (N, latent_dim), labels (N,) -> images (N, channels, *size) in [-1, 1]."""

    def __init__(
        self, *, size: tuple[int, int], channels: int, width: int, latent_dim: int, class_counts: tuple[int, ...] = ()
    ) -> None:
        super().__init__(latent_dim=latent_dim, class_counts=class_counts)
        multiples, attends_after = _G[doublings(size)]
        widths = [width * multiple for multiple in multiples]
        if latent_dim % len(widths):
            raise UserError(
                f"model.latent_dim is {latent_dim}, but biggan splits it into {len(widths)} equal parts for images of "
                f"this size: give a multiple of {len(widths)}."
            )
        self._part, self._start = latent_dim // len(widths), first_map(size)
        self.shared = nn.Embedding(len(class_counts), _SHARED) if class_counts else None
        conditions = self._part + (_SHARED if class_counts else 0)
        norm = partial(_BatchNorm, conditions=conditions)
        self.first = nn.Linear(self._part, widths[0] * self._start[0] * self._start[1])
        self.blocks = nn.ModuleList(Up(before, after, norm=norm) for before, after in pairwise(widths))
        self.attention, self._attends_after = _Attention(widths[attends_after]), attends_after
        self.norm = nn.BatchNorm2d(widths[-1], eps=_EPS)
        self.last = nn.Conv2d(widths[-1], channels, 3, 1, 1)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        first, *conditions = torch.split(z, self._part, 1)
        if self.shared is not None:
            assert y is not None
            label = embedded(self.shared, y)
            conditions = [torch.cat([label, part], 1) for part in conditions]
        x = self.first(first).unflatten(1, (-1, *self._start))
        for i, (block, condition) in enumerate(zip(self.blocks, conditions, strict=True), start=1):
            x = block(x, condition)
            if i == self._attends_after:
                x = self.attention(x)
        return torch.tanh(self.last(relu(self.norm(x))))


class BigGANDiscriminator(Discriminator):
    """images (N, channels, *size) in [-1, 1], labels (N,) -> logits (N,)."""

    def __init__(
        self, *, size: tuple[int, int], channels: int, width: int, norm: str = "spectral", classes: int = 0
    ) -> None:
        super().__init__()
        multiples, self._attends_after, halvings = _D[doublings(size)]
        widths = [channels, *(width * multiple for multiple in multiples)]
        self.blocks = nn.ModuleList(
            _Down(before, after, first=i == 0, down=i < halvings) for i, (before, after) in enumerate(pairwise(widths))
        )
        self.attention = _Attention(widths[self._attends_after])
        self.last = nn.Linear(widths[-1], 1)
        self.projection = Projection(widths[-1], classes=classes) if classes else None

    def features(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, block in enumerate(self.blocks, start=1):
            x = block(x)
            if i == self._attends_after:
                x = self.attention(x)
            maps.append(x)
        return maps

    def blocks_from_image(self) -> list[Sequence[nn.Module]]:
        return [
            [block, self.attention] if i == self._attends_after else [block]
            for i, block in enumerate(self.blocks, start=1)
        ]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        features = relu(self.features(x)[-1]).sum((2, 3))
        logits = self.last(features).flatten()
        return logits if self.projection is None else logits + self.projection(features, y)


class _BatchNorm(nn.Module):
    """Batch norm whose scale and shift are linear in a condition: (N, C, H, W) and (N, conditions) -> (N, C, H, W)."""

    def __init__(self, channels: int, conditions: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False, eps=_EPS)
        self.scale = nn.Linear(conditions, channels, bias=False)
        self.shift = nn.Linear(conditions, channels, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = (layer(condition)[:, :, None, None] for layer in (self.scale, self.shift))
        return (1 + scale) * self.norm(x) + shift


class _Down(nn.Module):
    """(N, before, H, W) -> (N, after, H, W), or with `down` half of that each way."""

    def __init__(self, before: int, after: int, *, first: bool, down: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(before, after, 3, 1, 1), nn.Conv2d(after, after, 3, 1, 1)
        self.shortcut = nn.Conv2d(before, after, 1) if down or before != after else None
        self._first, self._down = first, down

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(relu(self.conv1(x if self._first else relu(x))))
        if self._down:
            h, x = avg_pool2d(h, 2), avg_pool2d(x, 2)
        return h + (x if self.shortcut is None else self.shortcut(x))


class _Attention(nn.Module):
    """x + gamma * o(attention(x)), (N, C, H, W) -> the same (Zhang et al. 2019, SAGAN, section 3).

    Queries are all places, keys and values those of the map halved by maxima. It begins as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner, values = max(1, channels // 8), max(1, channels // 2)
        self.theta, self.phi = (nn.Conv2d(channels, inner, 1, bias=False) for _ in range(2))
        self.g, self.o = nn.Conv2d(channels, values, 1, bias=False), nn.Conv2d(values, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        queries = self.theta(x).flatten(2).transpose(1, 2)
        keys, values = (max_pool2d(layer(x), 2).flatten(2) for layer in (self.phi, self.g))
        weights = (queries @ keys).softmax(2)
        return x + self.gamma * self.o((values @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))


@torch.no_grad()
def initialise(network: nn.Module, rng: torch.Generator) -> None:
    """Draws orthogonal weights (Brock et al. 2019, appendix C); biases are 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding):
            nn.init.orthogonal_(layer.weight, generator=rng)
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            layer.bias.zero_()
