"""Image sources -> one uint8 store -> this rank's share of each global batch.

The training set is kept as one uint8 tensor, (N, C, H, W): a batch is an index away, with no worker processes. On
the way, images that are not `image_size` are resized once, bicubic with antialiasing.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distgan import seeding
from distgan.config import DataConfig


@dataclass(frozen=True)
class Images:
    """A training set: uint8 (N, C, H, W) on the CPU."""

    pixels: Tensor
    fingerprint: str
    """A hash of the images as the source has them, so that a run never resumes on others. Not of what they were
    resized to, whose rounding may differ between processors."""

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]


def load(data: DataConfig) -> Images:
    """Reads the source into memory.

    Raises:
        ValueError: the path is missing, empty or of another layout, or the hub cannot be reached.
    """
    pixels = {"digits": _digits, "cifar10": _cifar10}[data.source](data)
    digest = hashlib.sha256(f"{tuple(pixels.shape)} {pixels.dtype}".encode())
    digest.update(np.ascontiguousarray(pixels.numpy()).data)
    return Images(_resize(pixels, data.image_size), digest.hexdigest())


class Batches:
    """Real images: this rank's share of the global batch of each discriminator update."""

    def __init__(
        self,
        images: Images,
        data: DataConfig,
        *,
        seed: int,
        batch_size: int,
        d_steps: int,
        share: slice,
        device: torch.device,
    ) -> None:
        self._pixels = images.pixels.to(device) if _on_device(images, data, device) else images.pixels
        self._seed, self._batch_size, self._d_steps, self._share = seed, batch_size, d_steps, share
        self._flip = data.flip
        self._device = device

    def at(self, step: int, k: int) -> tuple[Tensor, Tensor | None]:
        """Images (share, C, H, W) in [-1, 1] and their labels, None, of the k-th discriminator update of a step."""
        update = step * self._d_steps + k
        position = update * self._batch_size
        indices = seeding.order(self._seed, position, self._batch_size, total=len(self._pixels))[self._share]
        pixels = self._pixels[to_device(torch.from_numpy(indices), self._pixels.device)]
        pixels = to_device(pixels, self._device)
        if self._flip:
            flips = seeding.flips(self._seed, update, batch=self._batch_size)[self._share]
            mirrored = to_device(torch.from_numpy(flips), self._device).view(-1, 1, 1, 1)
            pixels = torch.where(mirrored, pixels.flip(-1), pixels)
        return pixels.to(torch.get_default_dtype()).div_(127.5).sub_(1), None


class Latents:
    """This rank's share of the global batch of latents of each discriminator update."""

    def __init__(
        self, *, seed: int, batch_size: int, d_steps: int, dim: int, share: slice, device: torch.device
    ) -> None:
        self._seed, self._batch_size, self._d_steps, self._dim = seed, batch_size, d_steps, dim
        self._share = share
        self._device = device

    def at(self, step: int, k: int) -> tuple[Tensor, Tensor | None]:
        """Latents (share, latent_dim) from N(0, 1) and the labels to draw images of, None."""
        update = step * self._d_steps + k
        z = seeding.latents(self._seed, "latents", update, batch=self._batch_size, dim=self._dim, share=self._share)
        return to_device(z, self._device), None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor without making the host wait: a copy from pinned memory is queued behind the work before it."""
    if device.type == "cpu" or tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _on_device(images: Images, data: DataConfig, device: torch.device) -> bool:
    if data.placement != "auto" or device.type != "cuda":
        return data.placement != "host"
    free, _ = torch.cuda.mem_get_info(device)
    return images.pixels.nbytes < free / 2  # the rest is for the networks and what they remember for backward


def _digits(data: DataConfig) -> Tensor:
    """1,797 handwritten digits, 8x8 with values 0 ... 16 (UCI, Alpaydin and Kaynak 1998), from scikit-learn."""
    from sklearn.datasets import load_digits

    if data.path is not None:
        raise ValueError(f"data.path is {data.path}, but digits come with scikit-learn: leave it out.")
    images = load_digits().images
    return torch.from_numpy(images).float().mul(255 / 16).unsqueeze(1)


def _cifar10(data: DataConfig) -> Tensor:
    """The training split of uoft-cs/cifar10: from a local copy of its parquet files, or the hub (and its cache)."""
    import datasets

    datasets.disable_progress_bars()
    if data.path is None:
        try:
            split = datasets.load_dataset("uoft-cs/cifar10", split="train")
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(
                "cifar10 is not in the cache and the Hugging Face hub cannot be reached: on a machine with a network "
                "run `hf download --repo-type dataset uoft-cs/cifar10 --local-dir DIR`, then give --data.path=DIR here."
            ) from error
    else:
        files = _parquet_files(Path(data.path))
        try:
            split = datasets.Dataset.from_parquet([str(file) for file in files], keep_in_memory=True)
        except Exception as error:  # whatever pyarrow or datasets make of a damaged file
            raise ValueError(
                f"data.path is {data.path}, but {_first_bad(files)} is not a readable parquet file."
            ) from error
    if "img" not in split.column_names:
        raise ValueError(f"{data.source} has no column img; its columns are {', '.join(split.column_names)}.")
    if len(split) == 0:
        raise ValueError(f"data.path is {data.path}, but its training split is empty.")
    return _stack(split["img"])


def _parquet_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"data.path is {folder}, but there is no such folder.")
    files = sorted(folder.rglob("train-*.parquet"))
    if not files:
        raise ValueError(
            f"data.path is {folder}, but no train-*.parquet is in it: it must be a copy of the hub's uoft-cs/cifar10."
        )
    return files


def _first_bad(files: list[Path]) -> Path:
    from pyarrow import ArrowException, parquet

    for file in files:
        try:
            parquet.read_table(file)
        except (ArrowException, OSError):
            return file
    return files[0]


def _stack(images: Iterable) -> Tensor:
    """PIL images of one size -> uint8 (N, 3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)


def _resize(pixels: Tensor, size: int) -> Tensor:
    """(N, C, H, W) of values 0 ... 255 -> uint8 (N, C, size, size)."""
    if pixels.shape[2:] == (size, size):
        return pixels.to(torch.uint8).contiguous()
    resized = [
        torch.nn.functional.interpolate(part.float(), (size, size), mode="bicubic", antialias=True)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        for part in torch.split(pixels, 1024)
    ]
    return torch.cat(resized)
