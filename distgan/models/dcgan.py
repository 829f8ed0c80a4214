"""DCGAN (Radford, Metz and Chintala 2016), laid out and named as in PyTorch's textbook version of it.

At 64x64, width 64 and 3 channels the layers are exactly the textbook's, and its weights load; another resolution has
one stage fewer or more at the 4x4 end. Batch norm stands after each convolution but the generator's last and the
discriminator's first and last. No convolution has a bias, except those of a discriminator without batch norm, whose
shift they replace.

Labels, which the paper does not have, make the generator's batch norm class-conditional. The generator then learns them
slowly, since scales of about 1 move little at DCGAN's learning rate: after 700 steps of the quickstart 24% of samples
were of the class that was asked for, by the run's classifier. With a learnt vector beside the latent one it learned
them at once, but drew the same image for each class, still after 1,500 steps: on few images, labels that come in early
make a generator collapse within its classes (Shahbazi et al. 2022, "Collapse by conditioning").
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distgan.models.conditional import ConditionalBatchNorm2d, Projection, batch_norm
from distgan.models.layers import Discriminator, Generator, doublings, first_map


def sizes(state: Mapping[str, Tensor]) -> dict[str, int] | None:
    """Returns the sizes of the textbook's network that has these weights, a generator or a discriminator: `image_size`,
    `channels`, `width`, and a generator's `latent_dim`. None if the names or shapes are others'.
    """
    weights = [state[name] for name in sorted(state, key=_place) if state[name].ndim == 4]
    if len(weights) < 2 or any(weight.shape[2:] != (4, 4) for weight in weights):
        return None
    first, last, count = weights[0], weights[-1], len(weights) - 1
    if min(first.shape[0], last.shape[1], first.shape[1] // 2 ** (count - 1)) == 0 and last.shape[0] != 1:
        return None
    found = {"image_size": 4 * 2**count}
    if last.shape[0] == 1:  # one logit
        return {**found, "channels": first.shape[1], "width": first.shape[0]}
    return {
        **found,
        "channels": last.shape[1],
        "width": first.shape[1] // 2 ** (count - 1),
        "latent_dim": first.shape[0],
    }


def _place(name: str) -> int:
    """Returns the number of a layer in its name, `main.3.weight`; -1 without one."""
    parts = name.split(".")
    return int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else -1


class DCGANGenerator(Generator):
    """latents (N, latent_dim), labels (N,) -> images (N, channels, *size) in [-1, 1]."""

    def __init__(
        self, *, size: tuple[int, int], channels: int, width: int, latent_dim: int, class_counts: tuple[int, ...] = ()
    ) -> None:
        super().__init__(latent_dim=latent_dim, class_counts=class_counts)
        stages = doublings(size)
        wide = width * 2 ** (stages - 1)
        layers: list[nn.Module] = [_FromOnePixel(latent_dim, wide, first_map(size), bias=False)]
        for i in range(stages):
            before, after = wide // 2**i, wide // 2 ** (i + 1) if i + 1 < stages else channels
            layers += [batch_norm(before, classes=len(class_counts)), nn.ReLU(inplace=True)]
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]
        self.main = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        x = z.flatten(1)[:, :, None, None]
        for layer in self.main:
            x = layer(x, y) if isinstance(layer, ConditionalBatchNorm2d) else layer(x)
        return x


class DCGANDiscriminator(Discriminator):
    """images (N, channels, *size) in [-1, 1], labels (N,) -> logits (N,)."""

    def __init__(
        self, *, size: tuple[int, int], channels: int, width: int, norm: str = "batch", classes: int = 0
    ) -> None:
        super().__init__()
        stages = doublings(size)
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        for i in range(stages - 1):
            before, after = width * 2**i, width * 2 ** (i + 1)
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=norm != "batch")]
            layers += [nn.BatchNorm2d(after) if norm == "batch" else nn.Identity(), nn.LeakyReLU(0.2, inplace=True)]
        wide = width * 2 ** (stages - 1)
        layers += [_ToOnePixel(wide, 1, first_map(size), bias=False)]
        self.main = nn.Sequential(*layers)
        self.projection = Projection(wide, classes=classes) if classes else None

    def features(self, x: Tensor) -> list[Tensor]:
        maps = []
        for layer in self.main[:-1]:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                maps.append(x)
        return maps

    def blocks_from_image(self) -> list[Sequence[nn.Module]]:
        blocks: list[list[nn.Module]] = []
        for layer in self.main[:-1]:
            if isinstance(layer, nn.Conv2d):
                blocks.append([])
            blocks[-1].append(layer)
        return list(blocks)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        features = self.features(x)[-1]
        logits = self.main[-1](features).flatten()
        return logits if self.projection is None else logits + self.projection(features.sum((2, 3)), y)


class _FromOnePixel(nn.ConvTranspose2d):
    """The textbook's first layer, (N, C, 1, 1) -> (N, C', H, W), as the matrix product that it is: that is quicker."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not self.weight.is_contiguous(memory_format=torch.channels_last):
            return (x.flatten(1) @ self.weight.flatten(1)).view(-1, *self.weight.shape[1:])
        weight = self.weight.permute(0, 2, 3, 1)  # as it lies in memory; so the map is channels last, too
        return (x.flatten(1) @ weight.flatten(1)).view(-1, *weight.shape[1:]).permute(0, 3, 1, 2)


class _ToOnePixel(nn.Conv2d):
    """The textbook's last layer, (N, C, H, W) -> (N, C', 1, 1), as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        x, weight = (tensor.permute(0, 2, 3, 1).flatten(1) for tensor in (x, self.weight))
        return (x @ weight.t())[:, :, None, None]


@torch.no_grad()
def initialise(network: nn.Module, rng: torch.Generator) -> None:
    """Draws convolutions from N(0, 0.02) and batch norm's scales from N(1, 0.02); shifts are 0 (DCGAN, section 4).

    Biases, which the paper has not, are 0, and the projection's embedding is from N(0, 0.02), too.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.weight.normal_(0, 0.02, generator=rng)
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.BatchNorm2d) and layer.affine:
            layer.weight.normal_(1, 0.02, generator=rng)
            layer.bias.zero_()
        elif isinstance(layer, Projection):
            layer.embedding.weight.normal_(0, 0.02, generator=rng)
