"""The interfaces of all networks, and contexts that change a network for a while."""

import copy
import math
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from distgan import seeding
from distgan.errors import UserError, nearest

CHUNK = 64  # images per forward pass of a generator that samples: always this number, so that n changes no rounding
STANDING = 16
"""How many batches of samples standing statistics are taken from, if nothing else is asked for."""


class Generator(nn.Module):
    """Base of all generators: latents (N, latent_dim), labels (N,) -> images (N, C, H, W) in [-1, 1].

    R3GAN's images may leave that range; they are clamped when they become bytes.

    A subclass defines `forward(z, y=None)`; labels are None if there are no classes. Instead of a label, an image may
    have shares of all classes, (N, classes): then it lies between them.
    """

    class_names: tuple[str, ...] = ()
    """Names of the classes, in the order of their labels; empty if they are not known."""
    truncation: float | None = None
    """Where the normal distribution of the latents that are drawn is cut off, on both sides; see `truncated`."""

    def __init__(self, *, latent_dim: int, class_counts: tuple[int, ...] = ()) -> None:
        """Stores the sizes of the inputs.

        Args:
            latent_dim: the length of a latent.
            class_counts: the number of training images of each class; empty for a generator without labels.
        """
        super().__init__()
        self.latent_dim, self.class_counts = latent_dim, class_counts

    def sample(self, n: int, *, seed: int = 0, label: int | str | None = None) -> Tensor:
        """Draws n images: uint8 (n, C, H, W) on the CPU.

        Image i is a function of (seed, i) and its label alone: `sample(64)` is the beginning of `sample(1000)`. It runs
        in eval mode and changes no random state.

        Args:
            n: the number of images.
            seed: the seed of the latents.
            label: the class of all images, by name or number. If unset, a generator with labels draws each class as
                often as the training images have it.

        Raises:
            UserError: n is not positive, or there is no such class.
        """
        if n < 1:
            raise UserError(f"the number of samples is {n}, but must be at least 1.")
        label = self.label_of(label) if label is not None else None
        return torch.cat([self.draw(first, seed=seed, label=label) for first in range(0, n, CHUNK)])[:n]

    def truncated(self, truncation: float, *, batches: int = STANDING) -> Self:
        """Returns a copy that draws from truncated latents: less varied images of more equal quality.

        A latent is mapped, number by number, from N(0, 1) to that distribution cut off at -truncation and truncation
        (Brock et al. 2019, section 3.1), so that image i stays similar. Batch norm gets standing statistics, because
        activations are others than in training.

        Raises:
            UserError: `truncation` is not above 0, or `batches` less than 1.
        """
        if not (math.isfinite(truncation) and truncation > 0):
            raise UserError(f"the truncation is {truncation}, but must be above 0.")
        truncated = copy.deepcopy(self)
        truncated.truncation = truncation
        truncated._stand(batches)
        return truncated

    def standing(self, batches: int = STANDING) -> Self:
        """Returns a copy whose batch norm has standing statistics (Brock et al. 2019, appendix F).

        They are the means of the statistics of `batches` batches of CHUNK samples, which are always the same samples.

        Raises:
            UserError: `batches` is less than 1.
        """
        stood = copy.deepcopy(self)
        stood._stand(batches)
        return stood

    @torch.no_grad()
    def _stand(self, batches: int) -> None:
        if batches < 1:
            raise UserError(f"the number of batches is {batches}, but must be at least 1.")
        norms = [layer for layer in self.modules() if isinstance(layer, nn.BatchNorm2d)]
        with eval_mode(self):
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # equal weights
                norm.train()
            for i in range(batches if norms else 0):
                self(*self.inputs(i * CHUNK, seed=0, stream="standing"))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum

    def label_of(self, wanted: int | str) -> int:
        """Returns the label of a class, given by its name or its label.

        Raises:
            UserError: there is no such class, or no training image belongs to it.
        """
        if isinstance(wanted, str) and self.class_counts:
            found = self.named(wanted)
            if found is None:
                hint = nearest(wanted, self.class_names) if self.class_names else "its classes have numbers only."
                raise UserError(f'class "{wanted}" is asked for, which the generator does not have: {hint}')
            label = found
        else:
            label = int(wanted) if self.class_counts else -1
        if not self.class_counts:
            raise UserError(
                f"class {wanted} is asked for, but the generator was trained without labels: ask for no class."
            )
        if not 0 <= label < len(self.class_counts):
            last = len(self.class_counts) - 1
            raise UserError(
                f"class {wanted} is asked for, but the generator has the classes 0 to {last}: choose one of them."
            )
        if self.class_counts[label] == 0:
            raise UserError(f"class {wanted} is asked for, but none of the training images was of it: choose another.")
        return label

    def named(self, name: str) -> int | None:
        """Returns the label of the class with this name, however accents are encoded; None if there is none."""
        if name in self.class_names:
            return self.class_names.index(name)
        composed = [unicodedata.normalize("NFC", one) for one in self.class_names]
        name = unicodedata.normalize("NFC", name)
        return composed.index(name) if name in composed else None

    def sample_rows(self, labels: Sequence[int | str], columns: int, *, seed: int = 0) -> Tensor:
        """Draws `columns` images of each class, from the same latents: uint8 (N, C, H, W), class after class."""
        return torch.cat([self.sample(columns, seed=seed, label=label) for label in labels])

    def draw(self, first: int, *, seed: int, stream: str = "sample", label: int | None = None) -> Tensor:
        """Draws images first ... first + CHUNK - 1 of a stream of draws: uint8 (CHUNK, C, H, W) on the CPU."""
        return to_bytes(self.images(first, seed=seed, stream=stream, label=label))

    @torch.no_grad()
    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Draws the images of given latents, (N, latent_dim), and labels or shares of classes: uint8 (N, C, H, W) on
        the CPU."""
        parameter = next(self.parameters())
        images = []
        with eval_mode(self):
            for part in torch.split(torch.arange(len(z)), CHUNK):
                padded = torch.cat([part, part[-1:].expand(CHUNK - len(part))])
                labels = y[padded].to(parameter.device) if y is not None else None
                drawn = self(z[padded].to(parameter.device, parameter.dtype), labels)
                images.append(to_bytes(drawn)[: len(part)])
        return torch.cat(images)

    @torch.no_grad()
    def images(self, first: int, *, seed: int, stream: str = "sample", label: int | None = None) -> Tensor:
        """Returns what `draw` makes uint8 images of: (CHUNK, C, H, W) in [-1, 1], on the network's device."""
        with eval_mode(self):
            return self(*self.inputs(first, seed=seed, stream=stream, label=label))

    def inputs(
        self, first: int, *, seed: int, stream: str = "sample", label: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns what `images` makes images of: latents (CHUNK, latent_dim), and labels (CHUNK,) or None."""
        parameter = next(self.parameters())
        z = seeding.latents_by_index(seed, stream, first, CHUNK, dim=self.latent_dim)
        if self.truncation is not None:
            z = _cut_off(z, self.truncation)
        return z.to(parameter.device, parameter.dtype), self.labels(first, seed=seed, stream=stream, label=label)

    def labels(self, first: int, *, seed: int, stream: str = "sample", label: int | None = None) -> Tensor | None:
        """Returns the labels of the images that `draw` returns, (CHUNK,), on the network's device; None without
        classes."""
        if not self.class_counts:
            return None
        if label is None:
            y = seeding.labels_by_index(seed, stream, first, CHUNK, counts=self.class_counts)
        else:
            y = torch.full((CHUNK,), label)
        return y.to(next(self.parameters()).device)


def _cut_off(z: Tensor, at: float) -> Tensor:
    """Maps numbers from N(0, 1) to that distribution cut off at -at and at, in their order."""
    below = torch.special.ndtr(torch.tensor(-at, dtype=torch.float64))
    share = below + torch.special.ndtr(z.double()) * (1 - 2 * below)
    return torch.special.ndtri(share).clamp(-at, at).to(z.dtype)


def to_bytes(images: Tensor) -> Tensor:
    """Returns images in [-1, 1] as uint8 on the CPU."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def from_bytes(images: Tensor) -> Tensor:
    """Returns uint8 images as float32 in [-1, 1], on their device."""
    return images.float() / 127.5 - 1


def doublings(size: tuple[int, int]) -> int:
    """Counts how often a generator's first map doubles to become the image, height and width in pixels.

    That is as often as possible while the first map's sides are whole numbers and at least 4. Squares of 32, 64, 128
    and 256 pixels begin from 4x4.
    """
    count = 0
    while all(side % 2 ** (count + 1) == 0 and side // 2 ** (count + 1) >= 4 for side in size):
        count += 1
    return count


def first_map(size: tuple[int, int]) -> tuple[int, int]:
    """Returns height and width of the map from which a generator begins, and at which a discriminator ends."""
    height, width = (side // 2 ** doublings(size) for side in size)
    return height, width


def place(network: nn.Module, device: torch.device, *, mixed: bool = False) -> None:
    """Moves a network to a device, and lays its weights out as the device computes fastest.

    That is channels last, except on a GPU in fp32, which has no tensor cores for it (`mixed` is false there). On a CPU,
    DCGAN's step is then 1.1 times as fast, and that of SNGAN's residual networks 1.4 times.
    """
    contiguous = device.type == "cuda" and not mixed
    network.to(device).to(memory_format=torch.contiguous_format if contiguous else torch.channels_last)


class Discriminator(nn.Module):
    """Base of all discriminators: images (N, C, H, W) in [-1, 1], labels (N,) -> logits (N,).

    A subclass defines `features(x)`, `forward(x, y=None)`, which uses them, and `blocks_from_image()`; labels are None
    without classes.
    """

    def features(self, x: Tensor) -> list[Tensor]:
        """Returns the feature maps of all stages, in their order, each (N, C', H', W')."""
        raise NotImplementedError

    def blocks_from_image(self) -> list[Sequence[nn.Module]]:
        """Returns the layers of each block, from the image on, without the last layer and the projection."""
        raise NotImplementedError


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode, and at the end each part back into its own mode."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Computes no gradients for a module's parameters; those for its inputs still flow through it."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
