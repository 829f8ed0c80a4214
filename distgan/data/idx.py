"""Reads IDX, the format of MNIST's files (Y. LeCun, "THE MNIST DATABASE", file formats)."""

import contextlib
import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import numpy as np

from distgan.errors import UserError


def folder(path: Path, *, below: str) -> Path | None:
    """Returns the folder of the IDX files: `path` itself, or torchvision's folder below it; None without such files."""
    places = [path, path / Path(below).name, path / below]
    return next((place for place in places if any(place.glob("*[-.]idx3-ubyte*"))), None)


def file(folder: Path, name: str) -> Path:
    """Returns the file of this name in a folder: the compressed one, which has a checksum, if there is one."""
    names = [f"{name}.gz", name, name.replace("-idx", ".idx")]  # some copies have a dot there
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def shape(file: Path) -> tuple[int, ...]:
    """Returns the shape in a file's header.

    Raises:
        UserError: the file is missing, damaged or of another format.
    """
    with _opened(file) as stream:
        return _header(file, stream)


def read(file: Path, dimensions: int) -> np.ndarray:
    """Reads a file to its end, where gzip has its checksum: uint8 with this number of dimensions.

    Raises:
        UserError: the file is missing, damaged or of another format.
    """
    with _opened(file) as stream:
        sizes = _header(file, stream)
        size = int(np.prod(sizes, dtype=object))
        content = stream.read(size) if size < 2**34 else b""
        rest = stream.read(1)
    if len(sizes) != dimensions or len(content) != size or rest:
        raise UserError(f"{file} does not hold what its header says: copy or download it again.")
    return np.frombuffer(content, dtype=np.uint8).reshape(sizes)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            yield cast(IO[bytes], stream)
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist: put it there, or correct data.path.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} is damaged or cut short: copy or download it again.") from error


def _header(file: Path, stream: IO[bytes]) -> tuple[int, ...]:
    magic = stream.read(4)
    if len(magic) != 4 or magic[:3] != b"\0\0\x08" or magic[3] not in (1, 3):
        raise UserError(f"{file} is not an IDX file of bytes: copy or download it again.")
    sizes = stream.read(4 * magic[3])
    if len(sizes) != 4 * magic[3]:
        raise UserError(f"{file} is damaged or cut short: copy or download it again.")
    return struct.unpack(f">{magic[3]}I", sizes)
