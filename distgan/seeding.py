"""The only source of randomness: every draw is a function of (seed, stream, indices), never of a rank or of the past.

A draw for training is made for the whole global batch of a step, and each rank takes its slice; a draw for sampling is
made per image. So nothing about randomness has to be saved, and the number of processes changes no draw. The bits
come from NumPy's Philox on the CPU, whatever device trains: the same seed gives the same latents on every machine.
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch


@dataclass
class RunSeed:
    """The seed of a run's training, shared by all parts of the loop. A rollback changes `attempt` and so all draws."""

    seed: int
    attempt: int = 0
    """How often the run was rolled back."""

    def __str__(self) -> str:
        return f"{self.seed}/{self.attempt}" if self.attempt else str(self.seed)


Seed = int | str | RunSeed


def generator(seed: Seed, stream: str, *indices: int) -> np.random.Generator:
    """Returns a fresh generator for one purpose; streams and indices that differ in any way give independent draws."""
    return np.random.Generator(np.random.Philox(key=_key(seed, stream, *indices)))


def torch_generator(seed: int, stream: str, *indices: int) -> torch.Generator:
    """Returns a generator for torch's initialisers. It uses 32 bits of the key only: not for draws by index."""
    return torch.Generator().manual_seed(_key(seed, stream, *indices) & (2**63 - 1))


def latents(seed: Seed, stream: str, step: int, *, batch: int, dim: int, share: slice) -> torch.Tensor:
    """Draws a global batch of latents from N(0, 1) and returns this rank's share: (share, dim), default dtype, CPU."""
    z = generator(seed, stream, step).standard_normal((batch, dim), dtype=np.float32)
    return torch.from_numpy(z[share]).to(torch.get_default_dtype())


def latents_by_index(seed: int, stream: str, first: int, count: int, *, dim: int) -> torch.Tensor:
    """Draws the latents of images first ... first + count - 1: (count, dim), each a function of its own index alone."""
    rows = [generator(seed, stream, i).standard_normal(dim, dtype=np.float32) for i in range(first, first + count)]
    return torch.from_numpy(np.stack(rows)).to(torch.get_default_dtype())


def labels_by_index(seed: int, stream: str, first: int, count: int, *, counts: Sequence[int]) -> torch.Tensor:
    """Draws the labels of the same images: (count,) int64, each as often as its share of `counts`."""
    ends = np.cumsum(counts)
    drawn = [generator(seed, f"{stream}.label", i).integers(ends[-1]) for i in range(first, first + count)]
    return torch.from_numpy(np.searchsorted(ends, drawn, side="right"))


def uniforms(seed: Seed, stream: str, step: int, *, batch: int, count: int, share: slice) -> torch.Tensor:
    """Draws `count` uniform numbers in [0, 1) for each image of a global batch; returns this rank's: (share, count)."""
    u = generator(seed, stream, step).random((batch, count), dtype=np.float32)
    return torch.from_numpy(u[share]).to(torch.get_default_dtype())


_one_thread = threading.Lock()  # so that threads that read ahead do not all draw the same permutation at once

BLOCK = 256
"""Images that stay together, in one piece of the store, where `data.window` is set."""


def order(seed: Seed, position: int, count: int, *, total: int, window: int | None = None) -> np.ndarray:
    """Returns the images at position ... position + count - 1 of the endless shuffled sequence: (count,) int64.

    Each epoch is a permutation of its own of all `total` images; a batch may straddle two epochs. With a window, blocks
    of `BLOCK` images that follow each other in the store are permuted, and then images within each `window` of that
    sequence.
    """
    positions = np.arange(position, position + count)
    indices = np.empty(count, dtype=np.int64)
    with _one_thread:
        for epoch in np.unique(positions // total):
            here = positions // total == epoch
            places = positions[here] % total
            if window is None:
                indices[here] = _permutation(str(seed), int(epoch), total)[places]
            else:
                indices[here] = _in_windows(str(seed), int(epoch), places, total=total, window=window)
    return indices


def flips(seed: Seed, step: int, *, batch: int) -> np.ndarray:
    """Says which images of a global batch are mirrored: (batch,) bool, each with probability 1/2."""
    return generator(seed, "flip", step).random(batch) < 0.5


@lru_cache(maxsize=2)  # of the two epochs that batches near an epoch's end need
def _permutation(seed: str, epoch: int, total: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(total)


def _in_windows(seed: str, epoch: int, places: np.ndarray, *, total: int, window: int) -> np.ndarray:
    """Returns the images at these places of an epoch."""
    blocks, starts = _blocks(seed, epoch, total)
    moved = np.empty_like(places)  # the places before windows were permuted
    for number in np.unique(places // window).tolist():
        here = places // window == number
        size = min(window, total - number * window)
        moved[here] = number * window + _window(seed, epoch, number, size)[places[here] - number * window]
    at = np.searchsorted(starts, moved, side="right") - 1
    return blocks[at] * BLOCK + moved - starts[at]


@lru_cache(maxsize=2)
def _blocks(seed: str, epoch: int, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the blocks in their order, and at which place of the epoch each begins; one of them may be shorter."""
    blocks = generator(seed, "order.blocks", epoch).permutation(-(-total // BLOCK))
    sizes = np.minimum(BLOCK, total - blocks * BLOCK)
    return blocks, np.cumsum(sizes) - sizes


@lru_cache(maxsize=4)
def _window(seed: str, epoch: int, number: int, size: int) -> np.ndarray:
    return generator(seed, "order.window", epoch, number).permutation(size)


def _key(seed: Seed, stream: str, *indices: int) -> int:
    """Returns 128 bits, as Philox takes them."""
    name = ":".join([str(seed), stream, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
