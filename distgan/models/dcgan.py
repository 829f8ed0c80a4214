"""DCGAN (Radford, Metz and Chintala 2016), laid out and named as in PyTorch's textbook version of it.

At 64x64, width 64 and 3 channels the layers are exactly the textbook's, and its weights load; another resolution has
one stage fewer or more at the 4x4 end. Batch norm stands after each convolution but the generator's last and the
discriminator's first and last; no convolution has a bias, but for the discriminator's where it does without batch norm,
whose shift it had.

Labels, which the paper has not, come into the generator as a learnt vector beside the latent one. Class-conditional
batch norm, whose scales of about 1 move little at DCGAN's learning rate, takes them up far more slowly: after 700 steps
of the quickstart 24% of samples were of the class that was asked for, by the run's classifier; with the vector, all.
"""

import math

import torch
from torch import Tensor, nn

from distgan.models.conditional import Projection
from distgan.models.layers import Generator


def stages(image_size: int) -> int:
    """How often 4x4 doubles to reach the image."""
    return int(math.log2(image_size // 4))


class DCGANGenerator(Generator):
    """latents (N, latent_dim), labels (N,) -> images (N, channels, image_size, image_size) in [-1, 1]."""

    def __init__(
        self, *, image_size: int, channels: int, width: int, latent_dim: int, classes: tuple[int, ...] = ()
    ) -> None:
        super().__init__(latent_dim=latent_dim, classes=classes)
        wide = width * 2 ** (stages(image_size) - 1)
        inputs = 2 * latent_dim if classes else latent_dim
        layers: list[nn.Module] = [nn.ConvTranspose2d(inputs, wide, 4, 1, 0, bias=False)]
        for i in range(stages(image_size)):
            before, after = wide // 2**i, wide // 2 ** (i + 1) if i + 1 < stages(image_size) else channels
            layers += [nn.BatchNorm2d(before), nn.ReLU(inplace=True)]
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]
        self.main = nn.Sequential(*layers, nn.Tanh())
        self.embedding = nn.Embedding(len(classes), latent_dim) if classes else None

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        if self.embedding is not None:
            z = torch.cat([z, self.embedding(y)], 1)
        return self.main(z.view(len(z), -1, 1, 1))


class DCGANDiscriminator(nn.Module):
    """images (N, channels, image_size, image_size) in [-1, 1], labels (N,) -> logits (N,)."""

    def __init__(self, *, image_size: int, channels: int, width: int, norm: str = "batch", classes: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        for i in range(stages(image_size) - 1):
            before, after = width * 2**i, width * 2 ** (i + 1)
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=norm != "batch")]
            layers += [nn.BatchNorm2d(after) if norm == "batch" else nn.Identity(), nn.LeakyReLU(0.2, inplace=True)]
        wide = width * 2 ** (stages(image_size) - 1)
        layers += [nn.Conv2d(wide, 1, 4, 1, 0, bias=False)]
        self.main = nn.Sequential(*layers)
        self.projection = Projection(wide, classes=classes) if classes else None

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        features = self.main[:-1](x)
        logits = self.main[-1](features).flatten()
        return logits if self.projection is None else logits + self.projection(features.sum((2, 3)), y)


@torch.no_grad()
def initialise(network: nn.Module, rng: torch.Generator) -> None:
    """Convolutions from N(0, 0.02), batch norm's scales from N(1, 0.02), its shifts 0 (DCGAN, section 4).

    Of what the paper has not, biases are 0, the projection's vectors from N(0, 0.02), and the generator's vectors of
    classes from N(0, 1), as a latent is.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.weight.normal_(0, 0.02, generator=rng)
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.BatchNorm2d):
            layer.weight.normal_(1, 0.02, generator=rng)
            layer.bias.zero_()
        elif isinstance(layer, Projection):
            layer.embedding.weight.normal_(0, 0.02, generator=rng)
        elif isinstance(layer, DCGANGenerator) and layer.embedding is not None:
            layer.embedding.weight.normal_(generator=rng)
