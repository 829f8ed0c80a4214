"""The networks. An architecture is one entry of `ARCHITECTURES`; adding one touches nothing else."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from distgan import seeding
from distgan.config import ModelConfig, nearest
from distgan.models import dcgan
from distgan.models.batch_norm import has_batch_norm, synchronise
from distgan.models.layers import CHUNK, Generator, eval_mode, frozen

__all__ = [
    "ARCHITECTURES",
    "CHUNK",
    "Architecture",
    "Generator",
    "Shape",
    "build",
    "build_generator",
    "eval_mode",
    "frozen",
    "has_batch_norm",
    "synchronise",
]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a network must know of the images: height and width in pixels, and 1 or 3 channels."""

    image_size: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How a pair of networks is built from the configuration and the images' shape."""

    generator: Callable[[ModelConfig, Shape], Generator]
    """forward(z, y=None): latents (N, latent_dim) -> images (N, C, H, W) in [-1, 1]."""
    discriminator: Callable[[ModelConfig, Shape], nn.Module]
    """forward(x, y=None): images (N, C, H, W) in [-1, 1] -> logits (N,)."""
    initialise: Callable[[nn.Module, Any], None]
    """Draws the starting weights of either network from a torch.Generator."""


ARCHITECTURES: dict[str, Architecture] = {
    "dcgan": Architecture(
        generator=lambda model, shape: dcgan.DCGANGenerator(
            **asdict(shape), width=model.width, latent_dim=model.latent_dim
        ),
        discriminator=lambda model, shape: dcgan.DCGANDiscriminator(**asdict(shape), width=model.width),
        initialise=dcgan.initialise,
    ),
}


def build(model: ModelConfig, shape: Shape, *, seed: int) -> tuple[Generator, nn.Module]:
    """Generator and discriminator with their starting weights, functions of the seed alone.

    Raises:
        ValueError: the architecture is unknown.
    """
    generator = build_generator(model, shape)
    discriminator = ARCHITECTURES[model.architecture].discriminator(model, shape)
    for name, network in {"generator": generator, "discriminator": discriminator}.items():
        rng = seeding.torch_generator(seed, f"init.{name}")
        ARCHITECTURES[model.architecture].initialise(network, rng)
    return generator, discriminator


def build_generator(model: ModelConfig, shape: Shape) -> Generator:
    """A generator whose weights are yet to be loaded or drawn.

    Raises:
        ValueError: the architecture is unknown.
    """
    name = model.architecture
    if name not in ARCHITECTURES:
        raise ValueError(f'model.architecture is "{name}", which is unknown: {nearest(name, list(ARCHITECTURES))}')
    return ARCHITECTURES[name].generator(model, shape)
