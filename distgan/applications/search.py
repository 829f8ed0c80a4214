"""Searches for the latents whose images are nearest to given pictures, by gradient descent through the generator.

Pictures are searched for in groups of a fixed size, which the ranks share among themselves: so the number of ranks
changes no result. Within a group a picture does not influence the others, except by rounding.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from collections.abc import Generator as Steps
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distgan.errors import UserError
from distgan.models import CHUNK, Discriminator, Generator, ImageSpec, eval_mode, frozen, place
from distgan.parallel.ranks import Ranks, together
from distgan.progress import shown
from distgan.storage import exported, tensors
from distgan.storage.exported import Exported
from distgan.storage.latents import Latents

_STREAM = "search"  # of the latents where searches begin
_CANDIDATES = 1024  # samples, the nearest of which are where a picture's search begins
_GROUP = 32  # pictures that are searched for together
_TRIAL = 0.2  # share of the steps after which only the best start of each picture goes on
_LR = 0.05  # Adam's, for latents from N(0, 1)

Loss = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""(images (N, C, H, W) in [-1, 1], labels (N,) or None, numbers (N,) of the pictures in their group) -> (N,)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how widely to search."""

    steps: int = 500
    """Updates of each latent."""
    restarts: int = 4
    """Starts of each picture, of which the best goes on after a fifth of the steps."""
    seed: int = 0
    """The seed of the samples where searches begin."""

    def __post_init__(self) -> None:
        for name, value in {"steps": self.steps, "restarts": self.restarts}.items():
            if value < 1:
                raise UserError(f"the number of {name} is {value}, but must be at least 1.")
        if self.restarts > _CANDIDATES:
            raise UserError(f"the number of restarts is {self.restarts}, but can be at most {_CANDIDATES}.")


@dataclass(frozen=True)
class Wanted:
    """Pictures to be found, and which of their pixels count."""

    pixels: Tensor
    """(N, C, H, W) in [-1, 1]."""
    weights: Tensor
    """(N, 1, H, W), not negative; those of a picture must not all be 0."""

    def part(self, rows: slice, device: torch.device) -> "Wanted":
        """Returns some of the pictures, on a device."""
        return Wanted(self.pixels[rows].to(device), self.weights[rows].to(device))

    def difference(self, images: Tensor, of: Tensor, power: int) -> Tensor:
        """Returns the weighted mean of |image - picture| ** power over pixels and channels, (N,).

        Args:
            images: (N, C, H, W) in [-1, 1].
            of: the number of each image's picture, (N,).
            power: 1 or 2.
        """
        weights = self.weights[of]
        terms = weights * (images.float() - self.pixels[of]).abs() ** power
        return terms.mean((1, 2, 3)) / weights.mean((1, 2, 3))


@dataclass(frozen=True)
class Found:
    """What a search found for each picture."""

    latents: Latents
    images: Tensor
    """What the generator draws from the latents, (N, C, H, W) in [-1, 1]."""


@dataclass(frozen=True)
class Candidates:
    """Samples of a generator, with which searches may begin; on its device."""

    z: Tensor
    y: Tensor | None
    images: Tensor
    """(N, C, H, W) in [-1, 1]."""


@dataclass(frozen=True)
class Search:
    """What a search needs, on the rank's device."""

    generator: Generator
    discriminator: Discriminator | None
    candidates: Candidates
    settings: Settings
    ranks: Ranks

    def run(self, wanted: Wanted, loss_of: Callable[[Wanted], Loss], *, what: str) -> Found:
        """Collective: returns on every rank the latents that minimise a loss for each picture.

        Args:
            wanted: the pictures, on the CPU.
            loss_of: makes the loss for a group of pictures, which are on the rank's device.
            what: the text beside the progress bar.
        """
        ranks, generator = self.ranks, self.generator
        groups = [slice(first, first + _GROUP) for first in range(0, len(wanted.pixels), _GROUP)]
        mine = groups[ranks.rank :: ranks.world]
        found: dict[int, tuple[Tensor, Tensor | None, Tensor]] = {}

        def work() -> Iterator[None]:
            for group in mine:
                some = wanted.part(group, ranks.accelerator.device)
                z, y = yield from _searched(generator, some, self.candidates, loss_of(some), self.settings)
                with torch.no_grad():
                    images = generator(z, y).float()
                found[group.start] = (z.cpu(), y.cpu() if y is not None else None, images.cpu())

        progress = work()
        for _ in shown(progress, what, len(mine) * self.settings.steps, unit="steps") if ranks.rank == 0 else progress:
            ranks.alive()
        every = {first: part for parts in ranks.gather(found) for first, part in parts.items()}
        ordered = [every[first] for first in sorted(every)]
        labels = [y for _, y, _ in ordered if y is not None]
        latents = Latents(torch.cat([z for z, _, _ in ordered]), torch.cat(labels) if labels else None)
        return Found(latents, torch.cat([images for _, _, images in ordered]))


@contextmanager
def searching(found: Exported, pictures: Tensor, settings: Settings, **more: str) -> Iterator[Search]:
    """Collective: joins the ranks for a search, with both networks on the device, in eval mode and frozen.

    Args:
        found: the generator.
        pictures: uint8 (N, C, H, W) on the CPU.
        settings: how long and how widely to search.
        more: what else must be the same on all ranks.

    Raises:
        UserError: the pictures are of another size than the generator's images, or ranks differ.
    """
    _check(pictures, found.spec)
    generator, discriminator = found.generator, found.discriminator()
    judge = tensors.digest(discriminator) if discriminator is not None else "none"
    described = {"generator": tensors.digest(generator), "discriminator": judge, "pictures": digest(pictures), **more}
    networks = [network for network in (generator, discriminator) if network is not None]
    with together({**described, **dataclasses.asdict(settings)}) as ranks, ExitStack() as stack:
        for network in networks:
            for context in (on_device(ranks, network), eval_mode(network), frozen(network)):
                stack.enter_context(context)
        yield Search(generator, discriminator, _candidates(generator, settings.seed), settings, ranks)


def opened(run: str | os.PathLike[str] | Exported) -> Exported:
    """Finds a trained generator, unless it was found already."""
    return run if isinstance(run, Exported) else exported.find(os.fspath(run))


def _check(pictures: Tensor, spec: ImageSpec) -> None:
    if (
        pictures.ndim != 4
        or tuple(pictures.shape[1:]) != spec.shape
        or pictures.dtype != torch.uint8
        or len(pictures) == 0
    ):
        raise UserError(
            f"the pictures are {pictures.dtype} {tuple(pictures.shape)}, but the generator draws uint8 "
            f"(N, {', '.join(map(str, spec.shape))}): resize and convert them first."
        )


@contextmanager
def on_device(ranks: Ranks, network: nn.Module) -> Iterator[None]:
    """Moves a network to the rank's device, and at the end back to the CPU."""
    try:
        place(network, ranks.device)
        yield
    finally:
        network.cpu()


def digest(pictures: Tensor) -> str:
    """Returns a hash of pictures, by which ranks see that they have the same."""
    return hashlib.sha256(pictures.contiguous().numpy().tobytes()).hexdigest()


def _candidates(generator: Generator, seed: int) -> Candidates:
    parts = []
    for first in range(0, _CANDIDATES, CHUNK):
        z, y = generator.inputs(first, seed=seed, stream=_STREAM)
        with torch.no_grad():
            parts.append((z, y, generator(z, y).float()))
    labels = [y for _, y, _ in parts if y is not None]
    return Candidates(
        torch.cat([z for z, _, _ in parts]),
        torch.cat(labels) if labels else None,
        torch.cat([images for _, _, images in parts]),
    )


def _searched(
    generator: Generator, wanted: Wanted, candidates: Candidates, loss: Loss, settings: Settings
) -> Steps[None, None, tuple[Tensor, Tensor | None]]:
    """Searches for a group of pictures. Yields after each step, and returns latents and labels."""
    count, restarts = len(wanted.pixels), settings.restarts
    trial = max(1, round(_TRIAL * settings.steps)) if restarts > 1 else 0

    # Begin with the candidates nearest to each picture, by the pixels that count.
    starts = _distances(wanted, candidates.images).topk(restarts, largest=False).indices.flatten()
    z, y = candidates.z[starts], candidates.y[starts] if candidates.y is not None else None
    of = torch.arange(count, device=z.device).repeat_interleave(restarts)
    if trial:
        z, losses = yield from _descend(generator, z, y, of, loss, [_LR] * trial)

        # Only the best start of each picture goes on.
        best = losses.view(count, restarts).argmin(1) + restarts * torch.arange(count, device=z.device)
        z, y, of = z[best], y[best] if y is not None else None, of[best]
    left = settings.steps - trial
    rates = [_LR * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * i / left)).item()) for i in range(left)]
    z, _ = yield from _descend(generator, z, y, of, loss, rates)
    return z, y


def _descend(
    generator: Generator, z: Tensor, y: Tensor | None, of: Tensor, loss: Loss, rates: list[float]
) -> Steps[None, None, tuple[Tensor, Tensor]]:
    """Makes one update with Adam for each rate. Yields after each, and returns the latents and their last losses."""
    z = z.detach().clone().requires_grad_()
    adam = torch.optim.Adam([z])
    losses = z.new_zeros(len(z))
    for rate in rates:
        adam.param_groups[0]["lr"] = rate
        losses = loss(generator(z, y), y, of)
        # Each loss depends on its own latent only, so the gradient of their sum has each one's own in its row.
        (z.grad,) = torch.autograd.grad(losses.sum(), z)
        adam.step()
        yield
    return z.detach(), losses.detach()


def _distances(wanted: Wanted, images: Tensor) -> Tensor:
    """Returns the weighted squared distance of each picture to each image, up to a term of the picture's own."""
    weights = wanted.weights.expand_as(wanted.pixels).flatten(1)
    x = images.flatten(1)
    return weights @ x.square().T - 2 * (weights * wanted.pixels.flatten(1)) @ x.T
