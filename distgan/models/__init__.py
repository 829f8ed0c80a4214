"""The networks. An architecture is one entry of `ARCHITECTURES`, and needs no change of other code."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distgan import seeding
from distgan.errors import UserError, nearest
from distgan.models import biggan, dcgan, r3gan, resnet, spectral_norm
from distgan.models.batch_norm import has_batch_norm, synchronise
from distgan.models.conditional import ConditionalBatchNorm2d, Projection
from distgan.models.layers import (
    CHUNK,
    STANDING,
    Discriminator,
    Generator,
    doublings,
    eval_mode,
    from_bytes,
    frozen,
    place,
    to_bytes,
)
from distgan.recipe import ModelConfig

__all__ = [
    "ARCHITECTURES",
    "CHUNK",
    "STANDING",
    "Architecture",
    "Discriminator",
    "Generator",
    "ImageSpec",
    "build",
    "build_generator",
    "check_size",
    "constrain",
    "d_norm",
    "eval_mode",
    "fp16_works",
    "freeze",
    "from_bytes",
    "frozen",
    "has_batch_norm",
    "place",
    "synchronise",
    "to_bytes",
]


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What a network must know of the images."""

    image_size: int | tuple[int, int]
    """Pixels of a side, or height and width of images that are not square."""
    channels: int
    """1 (grey), 3 (RGB) or 4 (RGBA)."""
    class_counts: tuple[int, ...] = ()
    """The number of training images of each class; empty if the networks take no labels."""
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("class_counts", "class_names", *([] if isinstance(self.image_size, int) else ["image_size"])):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list, out of JSON

    @property
    def size(self) -> tuple[int, int]:
        """Returns height and width in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def shape(self) -> tuple[int, int, int]:
        """Returns the shape of an image: channels, height, width."""
        return (self.channels, *self.size)

    def __str__(self) -> str:
        return f"{self.size[0]}x{self.size[1]}x{self.channels}"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The functions that build a pair of networks from the recipe's model group and the images' spec."""

    generator: Callable[[ModelConfig, ImageSpec], Generator]
    """forward(z, y=None): latents (N, latent_dim), labels (N,) or None -> images (N, C, H, W), as `Generator` says."""
    discriminator: Callable[[ModelConfig, ImageSpec], Discriminator]
    """forward(x, y=None): images (N, C, H, W) in [-1, 1], labels (N,) or None -> logits (N,)."""
    initialise: Callable[[nn.Module, Any], None]
    """Draws the starting weights of either network from a torch.Generator. Spectral norm comes after."""
    d_norms: tuple[str, ...] = ("none", "spectral")
    """Allowed values of `model.d_norm`; the first is the default. A discriminator with batch norm must list `batch`."""
    g_spectral: bool = False
    """Whether the generator has spectral norm, of every convolution and linear layer. Its embedding has none: BigGAN's
    authors found that this cripples it (ajbrock/BigGAN-PyTorch, BigGAN.py)."""
    inits: tuple[str, ...] = ("paper", "orthogonal")
    """Allowed values of `model.init`."""
    fp16: bool = True
    """Whether it trains in fp16."""
    least_doublings: int = 2
    """How often the generator's first map must at least double to become the image; see `layers.doublings`. With one
    doubling, dcgan's discriminator would have no batch norm."""


ARCHITECTURES: dict[str, Architecture] = {
    "dcgan": Architecture(
        generator=lambda model, spec: dcgan.DCGANGenerator(**_of_generator(model, spec)),
        discriminator=lambda model, spec: dcgan.DCGANDiscriminator(**_of_discriminator(model, spec)),
        initialise=dcgan.initialise,
        d_norms=("batch", "spectral", "none"),
    ),
    "resnet": Architecture(
        generator=lambda model, spec: resnet.ResNetGenerator(**_of_generator(model, spec)),
        discriminator=lambda model, spec: resnet.ResNetDiscriminator(**_of_discriminator(model, spec)),
        initialise=resnet.initialise,
    ),
    "biggan": Architecture(
        generator=lambda model, spec: biggan.BigGANGenerator(**_of_generator(model, spec)),
        discriminator=lambda model, spec: biggan.BigGANDiscriminator(**_of_discriminator(model, spec)),
        initialise=biggan.initialise,
        d_norms=("spectral",),
        g_spectral=True,
        least_doublings=3,
    ),
    "r3gan": Architecture(
        generator=lambda model, spec: r3gan.R3GANGenerator(**_of_generator(model, spec)),
        discriminator=lambda model, spec: r3gan.R3GANDiscriminator(**_of_discriminator(model, spec)),
        initialise=r3gan.initialise,
        d_norms=("none",),
        inits=("paper",),
        fp16=False,  # it cripples training (Huang et al. 2024, appendix D)
    ),
}


def _architecture(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise UserError(f'model.architecture is "{name}", which is unknown: {nearest(name, list(ARCHITECTURES))}')
    return ARCHITECTURES[name]


def d_norm(model: ModelConfig) -> str:
    """Returns the discriminator's normalisation: `model.d_norm`, or the architecture's default if that is unset.

    Raises:
        UserError: the architecture is unknown, or has no such norm.
    """
    norms = _architecture(model.architecture).d_norms
    if model.d_norm not in (None, *norms):
        raise UserError(
            f"model.d_norm is {model.d_norm}, but {model.architecture} has {' or '.join(norms)}: choose that."
        )
    return model.d_norm or norms[0]


def fp16_works(model: ModelConfig) -> bool:
    """Tells whether the architecture trains in fp16.

    Raises:
        UserError: the architecture is unknown.
    """
    return _architecture(model.architecture).fp16


def check_size(model: ModelConfig, size: tuple[int, int]) -> None:
    """Checks that the architecture has networks for images of this height and width.

    Raises:
        UserError: it has not, or is unknown.
    """
    least = _architecture(model.architecture).least_doublings
    if doublings(size) < least:
        multiple = 2**least
        fits = [max(-(-side // multiple) * multiple, 4 * multiple) for side in size]
        raise UserError(
            f"data.image_size is {list(size)}, but {model.architecture} needs sides that are multiples of {multiple} "
            f"and at least {4 * multiple}: choose for instance [{fits[0]},{fits[1]}], or another model.architecture."
        )


def build(model: ModelConfig, spec: ImageSpec, *, seed: int) -> tuple[Generator, Discriminator]:
    """Returns generator and discriminator with their starting weights, which depend on the seed alone.

    Raises:
        UserError: the architecture is unknown, lacks this norm or size, or takes no labels although there are some.
    """
    norm = d_norm(model)
    check_size(model, spec.size)
    architecture = _architecture(model.architecture)
    if model.init not in architecture.inits:
        raise UserError(
            f"model.init is {model.init}, but {model.architecture} has {' or '.join(architecture.inits)}: choose that."
        )
    generator, discriminator = architecture.generator(model, spec), architecture.discriminator(model, spec)
    if generator.class_counts != spec.class_counts:
        raise UserError(
            f"model.conditional is true, but {model.architecture} takes no labels: set it to false, or choose another "
            "model.architecture."
        )
    assert has_batch_norm(discriminator) == (norm == "batch"), f"{model.architecture}'s d_norms must say batch norm"
    for name, network in {"generator": generator, "discriminator": discriminator}.items():
        rng = seeding.torch_generator(seed, f"init.{name}")
        architecture.initialise(network, rng)
        if model.init == "orthogonal":
            _make_orthogonal(network, rng)
    if norm == "spectral":
        rng = seeding.torch_generator(seed, "init.spectral_norm")
        spectral_norm.apply_spectral_norm(discriminator, rng, embeddings=True)
    if architecture.g_spectral:
        _normalise(generator, seed)
    for network in (generator, discriminator):
        place(network, torch.device("cpu"))
    return generator, discriminator


@torch.no_grad()
def constrain(network: nn.Module, *, clip: float | None = None) -> None:
    """Applies a network's constraints after each update: WGAN's clipping of D's weights, and spectral norm's power
    iteration."""
    if clip is not None:
        for parameter in network.parameters():
            if parameter.requires_grad:  # otherwise it is frozen
                parameter.clamp_(-clip, clip)
    spectral_norm.iterate(network)


def freeze(discriminator: Discriminator, count: int) -> None:
    """Freezes the blocks of a discriminator that are nearest to the image (Mo et al. 2020, FreezeD).

    Raises:
        UserError: it has fewer blocks.
    """
    blocks = discriminator.blocks_from_image()
    if count > len(blocks):
        raise UserError(
            f"train.freeze_d is {count}, but the discriminator has {len(blocks)} blocks: choose at most that many."
        )
    for block in blocks[:count]:
        for layer in block:
            layer.requires_grad_(False)


def build_generator(model: ModelConfig, spec: ImageSpec) -> Generator:
    """Returns a generator whose weights must still be loaded or drawn.

    Raises:
        UserError: the architecture is unknown, or does not have this size.
    """
    check_size(model, spec.size)
    architecture = _architecture(model.architecture)
    generator = architecture.generator(model, spec)
    generator.class_names = spec.class_names
    if architecture.g_spectral:
        _normalise(generator, seed=0)
    place(generator, torch.device("cpu"))
    return generator


def _normalise(generator: Generator, seed: int) -> None:
    rng = seeding.torch_generator(seed, "init.spectral_norm_of_generator")
    spectral_norm.apply_spectral_norm(generator, rng, embeddings=False)


def _of_generator(model: ModelConfig, spec: ImageSpec) -> dict[str, Any]:
    return {
        **_of_images(spec),
        "class_counts": spec.class_counts,
        "width": model.width,
        "latent_dim": model.latent_dim,
    }


def _of_discriminator(model: ModelConfig, spec: ImageSpec) -> dict[str, Any]:
    width = model.d_width or model.width
    return {**_of_images(spec), "classes": len(spec.class_counts), "width": width, "norm": d_norm(model)}


def _of_images(spec: ImageSpec) -> dict[str, Any]:
    return {"size": spec.size, "channels": spec.channels}


@torch.no_grad()
def _make_orthogonal(network: nn.Module, rng: torch.Generator) -> None:
    """Makes weights orthogonal (Saxe et al. 2014), as BigGAN and StudioGAN do; also the vectors of the classes."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.orthogonal_(layer.weight, generator=rng)
        elif isinstance(layer, Projection):
            nn.init.orthogonal_(layer.embedding.weight, generator=rng)
        elif isinstance(layer, ConditionalBatchNorm2d):
            nn.init.orthogonal_(layer.scale.weight, generator=rng).add_(1)
            nn.init.orthogonal_(layer.shift.weight, generator=rng)
