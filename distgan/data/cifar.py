"""Reads CIFAR-10 in the binary version that its author publishes (https://www.cs.toronto.edu/~kriz/cifar.html).

A file holds records of one label byte and 3 x 32 x 32 bytes of pixels, plane by plane. The archive is read without
unpacking it.
"""

import contextlib
import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

import numpy as np

from distgan import paths
from distgan.data.records import Record, Source, contents, refuse_columns
from distgan.errors import UserError
from distgan.recipe import DataConfig

_FILES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
_NAMES = "batches.meta.txt"
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RECORD = 1 + 3 * 32 * 32
_LARGEST = 2**30  # bytes that an archive may hold; CIFAR-10 has 184 MB
_ARCHIVES = (".tar.gz", ".tgz")
_FETCH = (
    'fetch "CIFAR-10 binary version (suitable for C programs)" from https://www.cs.toronto.edu/~kriz/cifar.html and '
    "give data.path its folder"
)


@dataclass(frozen=True)
class _Batches:
    """The files of the data set, in a folder or in an archive."""

    sizes: dict[str, int]
    """The size of each file in bytes, by its name."""
    read: Callable[[str], bytes]
    """Reads a file by its name."""
    called: Callable[[str], str]
    """Returns a file's name for a message."""
    files: tuple[Path, ...]
    """The files on the disk: the archive, or those in the folder."""


def original(data: DataConfig) -> Source | None:
    """Finds the binary version in `data.path`: the folder or archive itself, or the folder around it.

    Raises:
        UserError: it is damaged or incomplete, or there are no parquet files, but another version or data set.
    """
    assert data.path is not None
    place = _place(Path(data.path))
    if place is None:
        return None
    names = _FILES.get(data.split)
    if names is None:
        raise UserError(
            f"data.split is {data.split}, but the original CIFAR-10 has train and test: choose one of them."
        )
    refuse_columns(data, place)
    batches = _in_folder(place, names) if place.is_dir() else _in_archive(place)
    for name in names:
        size = batches.sizes.get(name)
        if size is None:
            raise UserError(f"{batches.called(name)} is missing: {_FETCH}.")
        if size == 0 or size % _RECORD:
            raise UserError(
                f"{batches.called(name)} has {size:,} bytes, which is no whole number of images ({_RECORD:,} bytes "
                f"each): it is damaged or cut short, so {_FETCH}."
            )
    classes: tuple[str, ...] = _CLASSES
    if _NAMES in batches.sizes:
        classes = tuple(batches.read(_NAMES).decode(errors="replace").split())
        if len(classes) != len(_CLASSES):
            raise UserError(f"{batches.called(_NAMES)} names {len(classes)} classes, but must name 10: {_FETCH}.")

    def records(every: int) -> Iterator[Record]:
        start = 0
        for name in names:
            rows = np.frombuffer(batches.read(name), dtype=np.uint8).reshape(-1, _RECORD)
            if rows[:, 0].max() >= len(classes):
                raise UserError(
                    f"{batches.called(name)} has the label {rows[:, 0].max()}, but CIFAR-10 has 10 classes: it is "
                    f"damaged or belongs to another data set, so {_FETCH}."
                )
            for i in range(-start % every, len(rows), every):
                yield Record(f"image {i} of {batches.called(name)}", rows[i, 1:].reshape(3, 32, 32), int(rows[i, 0]))
            start += len(rows)

    count = sum(batches.sizes[name] for name in names) // _RECORD
    # An archive holds both splits: the salt tells them apart.
    return Source(
        records=records,
        count=count,
        channels=3,
        classes=classes,
        files=batches.files,
        salt=f"binary {data.split}",
        unseen="test" if data.split == "train" else "train",
    )


def _place(path: Path) -> Path | None:
    """Returns the folder or archive of the binary version; None if there is none.

    Raises:
        UserError: there is another version of CIFAR-10, or CIFAR-100, instead, or `path` is another kind of file.
    """
    if not paths.exists(path):
        return None
    if path.is_file():
        if not path.name.endswith(_ARCHIVES):
            raise UserError(f"data.path is {path}, but must be a folder, or the original CIFAR-10's .tar.gz.")
        return path
    for folder in (path, path / "cifar-10-batches-bin"):
        if any(paths.exists(folder / name) for names in _FILES.values() for name in names):
            return folder  # with some of them missing, perhaps
    for archive in sorted(path.glob("cifar-10-binary*")):
        if archive.name.endswith(_ARCHIVES):
            return archive
    if path.is_dir() and not any(path.rglob("*.parquet")):
        for found in (*sorted(path.glob("cifar-*")), path):
            _refuse_others(found, {found.name, *(file.name for file in found.glob("*"))})
    return None


def _refuse_others(where: Path, names: set[str]) -> None:
    """Raises UserError if the names are those of another version of CIFAR-10, or of CIFAR-100."""
    if names & {"data_batch_1", "test_batch", "batches.meta", "cifar-10-batches-py", "cifar-10-python.tar.gz"}:
        raise UserError(
            f"{where} is the Python version of CIFAR-10, which is a pickle, and loading one can run any code: {_FETCH}."
        )
    if names & {"fine_label_names.txt", "coarse_label_names.txt"} or any(
        name.startswith("cifar-100") for name in names
    ):
        raise UserError(f"{where} is CIFAR-100, but data.source is cifar10: {_FETCH}.")


def _in_folder(folder: Path, names: tuple[str, ...]) -> _Batches:
    there = {file.name: file for file in folder.iterdir() if file.is_file() and file.name in (*names, _NAMES)}
    sizes = {name: file.stat().st_size for name, file in there.items()}
    files = tuple(there[name] for name in (*names, _NAMES) if name in there)
    return _Batches(sizes, lambda name: contents(folder / name), lambda name: str(folder / name), files)


def _in_archive(path: Path) -> _Batches:
    """Returns the archive's files by the last part of their names, whatever folder they are in."""

    found = _listed(path)
    wanted = {_NAMES, *_FILES["train"], *_FILES["test"]}
    members = {name: one for one in found if one.isreg() and (name := PurePosixPath(one.name).name) in wanted}
    if not members.keys() - {_NAMES}:
        _refuse_others(path, {part for one in found for part in PurePosixPath(one.name).parts})
        raise UserError(f"{path} holds no {_FILES['train'][0]}: {_FETCH}.")

    def read(name: str) -> bytes:
        with _explained(path), gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            return cast(IO[bytes], archive.extractfile(members[name])).read()

    sizes = {name: member.size for name, member in members.items()}
    return _Batches(sizes, read, lambda name: f"{name} in {path}", (path,))


class _Limited:
    """A stream that refuses to give more than 1 GiB, which is far more than CIFAR-10 has."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self._path, self._stream, self._size = path, stream, 0

    def read(self, size: int) -> bytes:
        piece = self._stream.read(size)
        self._size += len(piece)
        if self._size > _LARGEST:
            raise UserError(
                f"{self._path} would unpack to more than {_LARGEST / 1e9:.1f} GB, which CIFAR-10 does not: {_FETCH}."
            )
        return piece


def _listed(path: Path) -> list[tarfile.TarInfo]:
    """Lists the members of an archive. Reads it to its end, where gzip has its checksum."""
    with _explained(path):
        with path.open("rb") as stream:
            if stream.read(262).endswith(b"ustar"):
                raise UserError(
                    f"{path} is a tar archive without compression, though its name says otherwise: unpack it and give "
                    "data.path the folder."
                )
        with gzip.open(path) as unpacked:
            limited = _Limited(path, cast(IO[bytes], unpacked))
            with tarfile.open(fileobj=cast(IO[bytes], limited), mode="r|") as archive:
                members = archive.getmembers()
            while limited.read(2**20):
                pass
    return members


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns the errors of damaged archives into one sentence."""
    try:
        yield
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{path} is damaged or cut short: {_FETCH}.") from error
