"""What feeds the loop: this rank's share of each global batch, of images, latents and draws, whole or in pieces."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from distgan import seeding
from distgan.config import DataConfig
from distgan.data.store import Images


class Batches:
    """Real images: this rank's share of the global batch of each discriminator update."""

    def __init__(
        self,
        images: Images,
        data: DataConfig,
        *,
        labels: bool,
        seed: seeding.RunSeed,
        batch_size: int,
        d_steps: int,
        shares: Sequence[slice],
        device: torch.device,
    ) -> None:
        """Puts the images where they are to live.

        Args:
            images: all training images.
            data: where they are kept, and whether they are flipped.
            labels: whether the networks take labels, which all images then have.
            seed: of the order, flips, latents and augmentation.
            batch_size: images per update, over all ranks.
            d_steps: updates of the discriminator per step.
            shares: this rank's pieces of a batch.
            device: of the networks.
        """
        self._pixels = images.pixels
        self._labels = images.labels if labels else None
        self._prefetch: ThreadPoolExecutor | None = None
        if _placement(images, data, device) == "device":
            # A store is memory-mapped: on the CPU, too, a copy takes the disk out of the loop.
            self._pixels = images.pixels.to(device, copy=True)
            self._labels = self._labels.to(device) if self._labels is not None else None
        elif device.type == "cuda" or data.placement == "host":
            self._prefetch = ThreadPoolExecutor(max_workers=1)
        self._ahead: tuple[tuple[str, int, int], Future[_Gathered]] | None = None
        self._seed, self._batch_size, self._d_steps, self._shares = seed, batch_size, d_steps, shares
        self._flip = data.flip
        self._device = device

    def at(self, step: int, k: int, piece: int = 0) -> tuple[Tensor, Tensor | None]:
        """Images (share, C, H, W) in [-1, 1] of the k-th discriminator update of a step, and their labels (share,).

        The fakes beside them take the same labels, and so have each class as often as the data.
        """
        update = step * self._d_steps + k
        gather = self._gather if self._prefetch is None else self._fetch
        pixels, labels = gather(update, piece)
        pixels = to_device(pixels, self._device)
        if self._flip:
            flips = seeding.flips(self._seed, update, batch=self._batch_size)[self._shares[piece]]
            mirrored = to_device(torch.from_numpy(flips), self._device).view(-1, 1, 1, 1)
            pixels = torch.where(mirrored, pixels.flip(-1), pixels)
        return pixels.to(torch.get_default_dtype()).div_(127.5).sub_(1), (
            to_device(labels, self._device) if labels is not None else None
        )

    def _gather(self, update: int, piece: int) -> "_Gathered":
        """This rank's images of an update, uint8, and labels, where the store is; pinned on their way to a GPU."""
        position = update * self._batch_size
        indices = seeding.order(self._seed, position, self._batch_size, total=len(self._pixels))[self._shares[piece]]
        chosen = to_device(torch.from_numpy(indices), self._pixels.device)
        pixels, labels = self._pixels[chosen], self._labels[chosen] if self._labels is not None else None
        return pixels.pin_memory() if pixels.device.type != self._device.type else pixels, labels

    def _fetch(self, update: int, piece: int) -> "_Gathered":
        """Returns the piece that was gathered while the one before was computed, and starts on the next."""
        assert self._prefetch is not None
        seed = str(self._seed)  # a rollback makes what was gathered ahead of it useless
        waiting = self._ahead[1] if self._ahead is not None and self._ahead[0] == (seed, update, piece) else None
        gathered = waiting.result() if waiting is not None else self._gather(update, piece)
        following = (update, piece + 1) if piece + 1 < len(self._shares) else (update + 1, 0)
        self._ahead = ((seed, *following), self._prefetch.submit(self._gather, *following))
        return gathered


_Gathered = tuple[Tensor, Tensor | None]


class Latents:
    """This rank's share of the global batch of latents of each discriminator update."""

    def __init__(
        self,
        *,
        seed: seeding.RunSeed,
        batch_size: int,
        d_steps: int,
        dim: int,
        shares: Sequence[slice],
        device: torch.device,
    ) -> None:
        self._seed, self._batch_size, self._d_steps, self._dim = seed, batch_size, d_steps, dim
        self._shares = shares
        self._device = device

    def at(self, step: int, k: int, piece: int = 0) -> Tensor:
        """Latents (share, latent_dim) from N(0, 1)."""
        update = step * self._d_steps + k
        share = self._shares[piece]
        z = seeding.latents(self._seed, "latents", update, batch=self._batch_size, dim=self._dim, share=share)
        return to_device(z, self._device)


class Draws:
    """This rank's share of whatever else is drawn at random for each image of a discriminator update."""

    def __init__(
        self, *, seed: seeding.RunSeed, batch_size: int, d_steps: int, shares: Sequence[slice], device: torch.device
    ) -> None:
        self._seed, self._batch_size, self._d_steps, self._shares = seed, batch_size, d_steps, shares
        self._device = device

    def at(self, step: int, k: int, piece: int = 0) -> Callable[[str, int], Tensor]:
        """Gives numbers from [0, 1) by stream and their count for each image: (share, count)."""
        update, share = step * self._d_steps + k, self._shares[piece]

        def draw(stream: str, count: int) -> Tensor:
            u = seeding.uniforms(self._seed, stream, update, batch=self._batch_size, count=count, share=share)
            return to_device(u, self._device)

        return draw


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor without making the host wait: a copy from pinned memory is queued behind the work before it."""
    if device.type == "cpu" or tensor.device == device:
        return tensor
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def _placement(images: Images, data: DataConfig, device: torch.device) -> str:
    """Decides between `device` and `host`. On the CPU `auto` is neither: the stored file is indexed as it is."""
    if data.placement != "auto" or device.type != "cuda":
        return data.placement
    free, _ = torch.cuda.mem_get_info(device)
    return "device" if images.pixels.nbytes < free / 2 else "host"  # the rest is for networks and activations
