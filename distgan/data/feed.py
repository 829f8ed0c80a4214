"""Feeds the loop with this rank's share of each global batch: real images, labels, latents and random draws.

A step has a batch for each update of the discriminator, and with `train.g_batch=own` one more for the generator.
Everything here is a function of the run's seed and of the batch's number, counted over the whole run.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distgan import seeding
from distgan.data.disk import Disk
from distgan.data.store import Images
from distgan.recipe import DataConfig


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch, or a part of the share if gradients accumulate."""

    real: Tensor
    """Real images, (N, C, H, W) in [-1, 1], mirrored at random if `data.flip` is set, not augmented."""
    y: Tensor | None
    """Labels of the real images and of the fakes, (N,) int64; None if the networks take no labels."""
    z: Tensor
    """Latents, (N, latent_dim) from N(0, 1)."""
    draw: Callable[[str, int], Tensor]
    """Draws random numbers: (stream, n) -> (N, n) uniform in [0, 1), n for each image, independent for each stream."""
    update: int
    """The number of this discriminator update, from 0, over the whole run."""
    weight: float
    """The part's fraction of the share; the weights of all parts sum to 1."""
    shared: bool
    """Whether the generator learns from the fakes of this batch that the discriminator has judged."""
    last: bool
    """Whether this is the last part of the share."""


def parts(batch_size: int, *, world: int, most: int | None) -> int:
    """Returns how many equal parts of at most `most` images make up a rank's share of a batch."""
    share = batch_size // world
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= (most or share))


def shares(batch_size: int, *, rank: int, world: int, most: int | None = None) -> list[slice]:
    """Returns the slices of a global batch that make up this rank's share; `most` is `train.max_batch_per_device`."""
    size, count = batch_size // world, parts(batch_size, world=world, most=most)
    first, step = rank * size, size // count
    return [slice(start, start + step) for start in range(first, first + size, step)]


class Feed:
    """Gives this rank its share of the images, latents and draws of each update."""

    def __init__(
        self,
        images: Images,
        data: DataConfig,
        *,
        labels: bool,
        latent_dim: int,
        seed: seeding.RunSeed,
        batch_size: int,
        d_steps: int,
        g_batch: str,
        shares: Sequence[slice],
        device: torch.device,
    ) -> None:
        """Moves the images to where `data.placement` keeps them.

        Args:
            images: all training images.
            data: the recipe's data group, for placement and flips.
            labels: whether the networks take labels. All images then have one.
            latent_dim: the length of a latent.
            seed: the seed of order, flips, latents and augmentation.
            batch_size: images per update, over all ranks.
            d_steps: `train.d_steps`.
            g_batch: `train.g_batch`.
            shares: the slices of a global batch that make up this rank's share.
            device: the networks' device.
        """
        self._pixels = images.pixels
        self._labels = images.labels if labels else None
        self._prefetch: ThreadPoolExecutor | None = None
        self._disk: Disk | None = None
        self._depth = 1  # parts that are gathered ahead
        placement = _placement(images, data, device)
        if placement == "device":
            # The store is memory-mapped. Even on the CPU, a copy takes the disk out of the loop.
            self._pixels = images.pixels.to(device, copy=True)
            self._labels = self._labels.to(device) if self._labels is not None else None
        elif placement == "disk":
            self._disk = Disk(images.folder / "images.bin", tuple(images.pixels.shape), pinned=device.type == "cuda")
            self._depth = _AHEAD
        if placement in ("disk", "host"):
            self._prefetch = ThreadPoolExecutor(max_workers=self._depth)
        self._ahead: dict[tuple[str, int, int], Future[_Gathered]] = {}
        self._total = len(images.pixels)
        self._window = min(data.window, self._total) if data.window is not None else None
        self._asked_for = ("", 0)  # the seed, and the place up to which blocks were read ahead
        self._seed, self._batch_size, self._shares = seed, batch_size, shares
        self._d_steps, self._per_step = d_steps, d_steps + (g_batch == "own")
        self._latent_dim, self._flip, self._device = latent_dim, data.flip, device
        self._made: list[Batch] = []
        self._made_for: tuple[str, int] | None = None

    def for_discriminator(self, step: int, k: int) -> Iterator[Batch]:
        """Yields the parts of this rank's share of the batch of a step's k-th update of the discriminator, from 0."""
        return self._pieces(step * self._per_step + k, update=step * self._d_steps + k)

    def for_generator(self, step: int) -> Iterator[Batch]:
        """Yields the parts of this rank's share of the batch of a step's update of the generator.

        It is the discriminator's last batch, the same objects, or with `train.g_batch=own` the next one.
        """
        return self._pieces((step + 1) * self._per_step - 1, update=(step + 1) * self._d_steps - 1)

    def _pieces(self, number: int, *, update: int) -> Iterator[Batch]:
        wanted = (str(self._seed), number)  # a rollback changes the seed, and so the draws of the same batch
        if self._made_for != wanted:
            self._made_for, self._made = wanted, []
        for i in range(len(self._shares)):
            if i == len(self._made):
                self._made.append(self._make(number, i, update))
            yield self._made[i]

    def _make(self, number: int, i: int, update: int) -> Batch:
        real, y = self._real(number, i)
        z = seeding.latents(
            self._seed, "latents", number, batch=self._batch_size, dim=self._latent_dim, share=self._shares[i]
        )
        count = len(self._shares)
        of_generator_too = self._per_step == self._d_steps and (number + 1) % self._per_step == 0
        return Batch(
            real=real,
            y=y,
            z=to_device(z, self._device),
            draw=self._draws(number, i),
            update=update,
            weight=1 / count,
            shared=of_generator_too and count == 1,  # several graphs of G at once break DDP's reduction
            last=i == count - 1,
        )

    def _real(self, number: int, i: int) -> "_Gathered":
        """Returns images (N, C, H, W) in [-1, 1], and their labels (N,)."""
        gathered = self._gather(str(self._seed), number, i) if self._prefetch is None else self._fetch(number, i)
        pixels, labels = gathered
        pixels = to_device(pixels, self._device)
        if self._flip:
            flips = seeding.flips(self._seed, number, batch=self._batch_size)[self._shares[i]]
            mirrored = to_device(torch.from_numpy(flips), self._device).view(-1, 1, 1, 1)
            pixels = torch.where(mirrored, pixels.flip(-1), pixels)
        real = pixels.to(torch.get_default_dtype()).div_(127.5).sub_(1)
        return real, to_device(labels, self._device) if labels is not None else None

    def _draws(self, number: int, i: int) -> Callable[[str, int], Tensor]:
        share = self._shares[i]

        def draw(stream: str, count: int) -> Tensor:
            u = seeding.uniforms(self._seed, stream, number, batch=self._batch_size, count=count, share=share)
            return to_device(u, self._device)

        return draw

    def _gather(self, seed: str, number: int, i: int) -> "_Gathered":
        """Returns the images of a part, uint8, and its labels, where the images are kept; pixels pinned for a GPU."""
        position = number * self._batch_size
        indices = self._order(seed, position, self._batch_size)[self._shares[i]]
        if self._disk is not None:
            self._read_ahead(self._disk, seed, position)
            labels = self._labels[torch.from_numpy(indices)] if self._labels is not None else None
            return self._disk.read(indices), labels
        chosen = to_device(torch.from_numpy(indices), self._pixels.device)
        pixels, labels = self._pixels[chosen], self._labels[chosen] if self._labels is not None else None
        return pixels.pin_memory() if pixels.device.type != self._device.type else pixels, labels

    def _fetch(self, number: int, i: int) -> "_Gathered":
        """Returns the part that was gathered ahead in a thread, and has the next ones gathered."""
        assert self._prefetch is not None
        seed, part = str(self._seed), (number, i)  # after a rollback, what was gathered ahead is of no use
        waiting, wanted = self._ahead, dict[tuple[str, int, int], Future[_Gathered]]()
        for _ in range(self._depth + 1):
            key = (seed, *part)
            wanted[key] = waiting.pop(key) if key in waiting else self._prefetch.submit(self._gather, seed, *part)
            part = (part[0], part[1] + 1) if part[1] + 1 < len(self._shares) else (part[0] + 1, 0)
        for unwanted in waiting.values():
            unwanted.cancel()
        self._ahead = wanted
        return wanted.pop((seed, number, i)).result()

    def _order(self, seed: str, position: int, count: int) -> np.ndarray:
        """Returns the images at position ... position + count - 1 of the order of all batches, (count,)."""
        return seeding.order(seed, position, count, total=self._total, window=self._window)

    def _read_ahead(self, disk: Disk, seed: str, position: int) -> None:
        """Has blocks read up to a window beyond this place; at first, or elsewhere than expected, all of them."""
        if self._window is None:
            return
        end, (asked_seed, asked) = position + self._window + self._batch_size, self._asked_for
        first = asked if asked_seed == seed and position <= asked <= end else position
        self._asked_for = (seed, end)
        if first < end:
            disk.read_ahead(self._order(seed, first, end - first), remember=2 * self._window // seeding.BLOCK + 2)


_AHEAD = 8  # parts that are read ahead from disk, each by a thread of its own
_Gathered = tuple[Tensor, Tensor | None]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor to a device without making the host wait: a copy from pinned memory joins the device's queue."""
    if device.type == "cpu" or tensor.device == device:
        return tensor
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def _placement(images: Images, data: DataConfig, device: torch.device) -> str:
    """Resolves `auto`; on the CPU it stays `auto`, where the memory-mapped file is used as it is."""
    if data.placement != "auto" or device.type != "cuda":
        return data.placement
    free, _ = torch.cuda.mem_get_info(device)
    return "device" if images.pixels.nbytes < free / 2 else "host"  # the rest is for networks and activations
