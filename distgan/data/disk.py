"""Reads images of a prepared store from disk as they are needed, so that the store may be larger than the memory."""

import math
import os
import threading
import weakref
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distgan.seeding import BLOCK

_PIECE = 128 * 1024  # bytes: of a longer request the system may read only the beginning ahead


class Disk:
    """The pixels of a store, which are not mapped into memory. Threads may read at the same time."""

    def __init__(self, file: Path, shape: tuple[int, ...], *, pinned: bool) -> None:
        """Opens the file.

        Args:
            file: the store's images.bin.
            shape: of the pixels, (N, C, H, W).
            pinned: whether to read into pinned memory, from which a GPU copies without making the host wait.
        """
        self._shape, self._pinned, self._path = shape[1:], pinned, file
        self._size = math.prod(self._shape)
        self._file = os.open(file, os.O_RDONLY)
        self._asked: OrderedDict[int, None] = OrderedDict()
        self._asking = threading.Lock()
        weakref.finalize(self, os.close, self._file)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)  # reading on beyond an image would be in vain

    def read(self, indices: np.ndarray) -> Tensor:
        """Returns the images at these indices: uint8 (N, C, H, W).

        Raises:
            OSError: the file cannot be read, or has become shorter.
        """
        images = torch.empty((len(indices), *self._shape), dtype=torch.uint8, pin_memory=self._pinned)
        rows = images.view(len(indices), -1).numpy()
        for row, index in sorted(enumerate(indices.tolist()), key=lambda one: one[1]):
            read = 0
            while read < self._size:  # network disks may return less than was asked for
                more = os.preadv(self._file, [rows[row, read:].data], index * self._size + read)
                if more == 0:
                    raise OSError(
                        f"the prepared images in {self._path.parent} have become shorter during the run: remove that "
                        "folder, so that they are prepared again."
                    )
                read += more
        return images

    def read_ahead(self, indices: np.ndarray, *, remember: int) -> None:
        """Asks the system to read the blocks in which these images lie, except the last `remember` that it was asked
        for."""
        with self._asking:
            for block in np.unique(indices // BLOCK).tolist():
                if block not in self._asked:
                    self._asked[block] = None
                    first = block * BLOCK * self._size
                    for start in range(first, first + BLOCK * self._size, _PIECE):
                        os.posix_fadvise(self._file, start, _PIECE, os.POSIX_FADV_WILLNEED)
            while len(self._asked) > remember:
                self._asked.popitem(last=False)
