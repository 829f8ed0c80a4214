"""Reads images of a prepared store from disk as they are needed, so that the store may be larger than the memory."""

import math
import os
import weakref
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distgan.seeding import BLOCK

_REMEMBERED = 4096  # blocks that the system was asked to read ahead


class Disk:
    """The pixels of a store, which are not mapped into memory. Threads may read at the same time."""

    def __init__(self, file: Path, shape: tuple[int, ...], *, pinned: bool) -> None:
        """Opens the file.

        Args:
            file: the store's images.bin.
            shape: of the pixels, (N, C, H, W).
            pinned: whether to read into pinned memory, from which a GPU copies without making the host wait.
        """
        self._count, self._shape, self._pinned = shape[0], shape[1:], pinned
        self._size = math.prod(self._shape)
        self._file = os.open(file, os.O_RDONLY)
        self._asked: OrderedDict[int, None] = OrderedDict()
        weakref.finalize(self, os.close, self._file)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)  # reading on beyond an image would be in vain

    def __len__(self) -> int:
        return self._count

    def read(self, indices: np.ndarray) -> Tensor:
        """Returns the images of these numbers: uint8 (N, C, H, W).

        Raises:
            OSError: the file cannot be read, or has become shorter.
        """
        images = torch.empty((len(indices), *self._shape), dtype=torch.uint8, pin_memory=self._pinned)
        rows = images.view(len(indices), -1).numpy()
        for row, index in sorted(enumerate(indices.tolist()), key=lambda one: one[1]):
            if os.preadv(self._file, [rows[row]], index * self._size) != self._size:
                raise OSError(f"image {index} cannot be read whole from the prepared store: was its file changed?")
        return images

    def read_ahead(self, indices: np.ndarray) -> None:
        """Asks the system to read the blocks that these images lie in, each block once."""
        for block in np.unique(indices // BLOCK).tolist():
            if block not in self._asked:
                self._asked[block] = None
                start, length = block * BLOCK * self._size, BLOCK * self._size
                os.posix_fadvise(self._file, start, length, os.POSIX_FADV_WILLNEED)
        while len(self._asked) > _REMEMBERED:
            self._asked.popitem(last=False)
