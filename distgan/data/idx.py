"""IDX, the format of MNIST's files (Y. LeCun, "THE MNIST DATABASE", file formats)."""

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np


def shape(file: Path) -> tuple[int, ...]:
    """Returns the shape that a .gz file's header gives.

    Raises:
        ValueError: the file is missing, damaged or of another format.
    """
    try:
        with gzip.open(file) as stream:
            return _header(file, stream)
    except FileNotFoundError as error:
        raise ValueError(f"{file} does not exist.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is damaged or cut short.") from error


def _header(file: Path, stream: Any) -> tuple[int, ...]:
    magic = stream.read(4)
    if len(magic) != 4 or magic[:3] != b"\0\0\x08" or magic[3] not in (1, 3):
        raise ValueError(f"{file} is not an IDX file of bytes.")
    sizes = stream.read(4 * magic[3])
    if len(sizes) != 4 * magic[3]:
        raise ValueError(f"{file} is damaged or cut short.")
    return struct.unpack(f">{magic[3]}I", sizes)


def read(file: Path, dimensions: int) -> np.ndarray:
    """Reads a .gz file to its end, where gzip keeps its checksum: uint8 of as many dimensions.

    Raises:
        ValueError: the file is missing, damaged or of another format.
    """
    try:
        with gzip.open(file) as stream:
            sizes = _header(file, stream)
            size = int(np.prod(sizes, dtype=object))
            content = stream.read(size) if size < 2**34 else b""
            rest = stream.read(1)
    except FileNotFoundError as error:
        raise ValueError(f"{file} does not exist.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is damaged or cut short.") from error
    if len(sizes) != dimensions or len(content) != size or rest:
        raise ValueError(f"{file} does not hold what its header says.")
    return np.frombuffer(content, dtype=np.uint8).reshape(sizes)
