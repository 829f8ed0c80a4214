"""R3GAN's networks (Huang et al. 2024, "The GAN is dead; long live the GAN!", section 3, appendix D and table 9).

They are those of R3GAN/Networks.py and training/networks.py in the authors' code (19a7ddf). There is no normalisation
and no tanh. Up to 32x32 all stages have `width` channels (768 for CIFAR-10 and FFHQ); beyond, they halve whenever the
resolution doubles. Grouped convolutions have groups of 16 channels. Networks of twice that width, as for ImageNet, have
groups of 32, and stages of `width` channels up to 64x64. With labels, the generator gets a learnt vector beside the
latent one, and the discriminator's logit is a projection and nothing else.

In mixed precision the stage of 4x4 runs in full precision, as in that code.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, leaky_relu

from distgan.errors import UserError
from distgan.models.conditional import embedded
from distgan.models.layers import Discriminator, Generator, doublings, first_map

_BLOCKS = 2  # in each stage
_PAPERS_WIDTH = 768


class R3GANGenerator(Generator):
    """latents (N, latent_dim), labels (N,) -> images (N, channels, *size), about [-1, 1] but without a bound."""

    def __init__(
        self, *, size: tuple[int, int], channels: int, width: int, latent_dim: int, class_counts: tuple[int, ...] = ()
    ) -> None:
        super().__init__(latent_dim=latent_dim, class_counts=class_counts)
        widths = _widths("model.width", width, doublings(size))
        self.embedding = nn.Embedding(len(class_counts), latent_dim) if class_counts else None
        self.first = nn.Linear(latent_dim * (2 if class_counts else 1), widths[0], bias=False)
        self.basis = nn.Parameter(torch.empty(widths[0], *first_map(size)))
        befores = [widths[0], *widths[:-1]]
        self.stages = nn.ModuleList(
            _Stage(before, after, group=_group(width), up=i > 0)
            for i, (before, after) in enumerate(zip(befores, widths, strict=True))
        )
        self.last = nn.Conv2d(widths[-1], channels, 1, bias=False)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            if self.embedding is not None:
                assert y is not None
                z = torch.cat([z, embedded(self.embedding, y)], 1)
            x = self.stages[0](self.basis * self.first(z)[:, :, None, None])
        for stage in self.stages[1:]:
            x = stage(x)
        return self.last(x)


class R3GANDiscriminator(Discriminator):
    """images (N, channels, *size) in [-1, 1], labels (N,) -> logits (N,)."""

    def __init__(
        self, *, size: tuple[int, int], channels: int, width: int, norm: str = "none", classes: int = 0
    ) -> None:
        super().__init__()
        widths = _widths("model.d_width", width, doublings(size))[::-1]
        self.first = nn.Conv2d(channels, widths[0], 1, bias=False)
        afters = [*widths[1:], widths[-1]]
        self.stages = nn.ModuleList(
            _Stage(before, after, group=_group(width), down=i + 1 < len(widths))
            for i, (before, after) in enumerate(zip(widths, afters, strict=True))
        )
        # A depthwise convolution over the whole map.
        self.basis = nn.Conv2d(widths[-1], widths[-1], first_map(size), groups=widths[-1], bias=False)
        self.last = nn.Linear(widths[-1], widths[-1] if classes else 1, bias=False)
        self.embedding = nn.Embedding(classes, widths[-1]) if classes else None

    def features(self, x: Tensor) -> list[Tensor]:
        maps = [self.first(x)]
        for stage in self.stages[:-1]:
            maps.append(stage(maps[-1]))
        with torch.autocast(x.device.type, enabled=False):
            maps.append(self.stages[-1](maps[-1].to(self.basis.weight.dtype)))
        return maps

    def blocks_from_image(self) -> list[Sequence[nn.Module]]:
        return [[self.first, self.stages[0]], *([stage] for stage in self.stages[1:])]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        last = self.features(x)[-1]
        with torch.autocast(x.device.type, enabled=False):
            features = self.last(self.basis(last).flatten(1))
            if self.embedding is None:
                return features.flatten()
            assert y is not None
            return (features * embedded(self.embedding, y)).sum(1)


class _Stage(nn.Module):
    """Residual blocks of one resolution. A change of channels is a 1x1 convolution on the smaller of the two maps.

    (N, before, H, W) -> (N, after, H', W'): with `up`, twice as large before the blocks, with `down`, half as large
    after them.
    """

    kernel: Tensor

    def __init__(self, before: int, after: int, *, group: int, up: bool = False, down: bool = False) -> None:
        super().__init__()
        self.change = nn.Conv2d(before, after, 1, bias=False) if before != after else None
        self.blocks = nn.Sequential(*(_Block(before if down else after, group=group) for _ in range(_BLOCKS)))
        self._up, self._down = up, down
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", taps.outer(taps) / 64, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self._up:
            x = x if self.change is None else self.change(x)
            kernel = (4 * self.kernel).to(x.dtype).expand(x.shape[1], 1, 4, 4)
            x = conv_transpose2d(x, kernel, stride=2, padding=1, groups=x.shape[1])
        x = self.blocks(x)
        if self._down:
            kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)
            x = conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])
            x = x if self.change is None else self.change(x)
        return x


class _Block(nn.Module):
    """x + conv3(act(conv2(act(conv1(x))))), (N, C, H, W) -> the same, with 2C channels inside.

    conv2 is 3x3 in groups of channels, the others are 1x1. An activation is a bias for each channel and a LeakyReLU.
    """

    def __init__(self, channels: int, *, group: int) -> None:
        super().__init__()
        inner = 2 * channels
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.conv2 = nn.Conv2d(inner, inner, 3, 1, 1, groups=inner // group, bias=False)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bias1, self.bias2 = nn.Parameter(torch.zeros(inner)), nn.Parameter(torch.zeros(inner))

    def forward(self, x: Tensor) -> Tensor:
        h = _activated(self.conv1(x), self.bias1)
        return x + self.conv3(_activated(self.conv2(h), self.bias2))


def _activated(x: Tensor, bias: Tensor) -> Tensor:
    return leaky_relu(x + bias.to(x.dtype)[:, None, None], 0.2)


def _widths(key: str, width: int, stages: int) -> list[int]:
    """Returns the channels of the maps from 4x4 to the image."""
    constant = 3 + int(math.log2(_group(width) // 16))  # doublings
    unit = _group(width) // 2 * 2 ** max(0, stages - constant)
    if width % unit:
        raise UserError(
            f"{key} is {width}, but r3gan needs a multiple of {unit} for images of this size, because its convolutions "
            f"have groups of {_group(width)} channels: choose one."
        )
    return [width // 2 ** max(0, i - constant) for i in range(stages + 1)]


def _group(width: int) -> int:
    """Returns the channels of a group of the grouped convolutions."""
    return 16 * max(1, width // _PAPERS_WIDTH)


@torch.no_grad()
def initialise(network: nn.Module, rng: torch.Generator) -> None:
    """Draws weights from N(0, gain^2 / fan_in).

    The gain is 1, and in a block sqrt(2 / (1 + 0.2^2)) times L^(-1/4), where L is the number of blocks of the network;
    the last convolution of a block begins at 0, so that blocks begin as identities (section 3.3).
    """
    blocks = [layer for layer in network.modules() if isinstance(layer, _Block)]
    gains: dict[nn.Module, float] = {
        conv: math.sqrt(2 / (1 + 0.2**2)) * len(blocks) ** -0.25
        for block in blocks
        for conv in (block.conv1, block.conv2)
    }
    gains |= {block.conv3: 0.0 for block in blocks}
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            layer.weight.normal_(0, gains.get(layer, 1.0) / math.sqrt(fan_in), generator=rng)
        elif isinstance(layer, nn.Embedding):
            # As a linear layer of the one-hot label; the discriminator's also divided by the root of its length.
            gain = 1.0 if isinstance(network, R3GANGenerator) else 1 / math.sqrt(layer.embedding_dim)
            layer.weight.normal_(0, gain / math.sqrt(layer.num_embeddings), generator=rng)
    if isinstance(network, R3GANGenerator):
        network.basis.normal_(0, 1, generator=rng)
