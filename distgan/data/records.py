"""Defines a source: a training set before it is decoded, as a list of files and a way to read its pictures in order."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distgan import paths
from distgan.errors import UserError
from distgan.progress import shown
from distgan.recipe import DataConfig

_NUMBERED = 20  # most classes that one line lists


@dataclass(frozen=True)
class Record:
    """One image of a source, before it is decoded."""

    name: str
    """The image's name in messages."""
    content: bytes | np.ndarray
    """An encoded picture, or values 0 ... 255 of shape (H, W), or bytes of shape (3, H, W) or, of RGBA, (4, H, W)."""
    label: int | None


@dataclass(frozen=True, kw_only=True)
class Source:
    """A training set before it is decoded."""

    records: Callable[[int], Iterator[Record]]
    """n -> every n-th image, in an order that never changes. Raises UserError if the files are damaged."""
    count: int
    """The number of images."""
    channels: int
    """The default of `data.channels`."""
    classes: tuple[str, ...] | None = None
    """Names of the classes; None if there are no labels."""
    files: tuple[Path, ...] = ()
    """The files that the images are read from, in order."""
    salt: str = ""
    """Everything else that the images depend on."""
    left_out: str = ""
    """A line for the user about files that are not read; empty if there are none."""
    strays: str = ""
    """A clause for the user: which images have no label, or why none has one; otherwise empty."""
    split: str | None = None
    """The split that is read, by its own name; None if the source has no splits, or does not list them."""
    splits: tuple[str, ...] = ()
    """All splits, those for training first."""
    unseen: str | None = None
    """The split to take images from that nobody trains on; None if there is no other split, or only a part is read."""

    def stamp(self) -> str:
        """Returns a quick hash of the files' names, sizes and times. As long as it is the same, so are the images."""
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return hashlib.sha256(json.dumps([self.salt, self.classes, stats]).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Returns a hash of all files' bytes, in order, that does not depend on where they are. Reads them all."""
        if not self.files:
            return self.salt
        digest = hashlib.sha256(json.dumps([self.salt, self.classes]).encode())
        for file in shown(self.files, "reading all files once", len(self.files), unit="files"):
            # A file that cannot be read is refused or skipped later, when its record is read.
            with contextlib.suppress(OSError), file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The files of a folder or archive."""

    names: list[str]
    """Names relative to the top, with slashes between their parts."""
    open: Callable[[], AbstractContextManager[Callable[[str], bytes]]]
    """Opens the folder or archive, and yields a function that reads a file by its name. For one thread at a time."""
    left_out: list[str]
    """A phrase for each kind of entry that cannot be read as a file, with the number of entries."""


def numbered(classes: Sequence[str]) -> str:
    """Lists the first classes with their labels for the user, in characters that can be printed."""
    said = ", ".join(f"{label} {printable(name)}" for label, name in enumerate(classes[:_NUMBERED]))
    more = len(classes) - _NUMBERED
    return f"{said} and {more:,} more" if more > 0 else said


def printable(name: str) -> str:
    """Returns a name with characters escaped that would break the line or control the terminal."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in name)


def existing_folder(path: str | None) -> Path:
    """Returns `data.path`. Raises UserError if it is not a folder."""
    assert path is not None
    if not paths.is_folder(path):
        raise UserError(f"data.path is {path}, but there is no such folder: check the path.")
    return Path(path)


def contents(file: Path) -> bytes:
    """Returns the bytes of a file. Raises UserError if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): make it readable, or copy it again.") from error


def refuse_columns(data: DataConfig, place: Path) -> None:
    """Raises UserError if a configuration or a column is named, but the files have neither."""
    for key in ("config", "image_column", "label_column"):
        if getattr(data, key) is not None:
            raise UserError(
                f"data.{key} is {getattr(data, key)}, which the files in {place} do not use: leave it out; if the "
                f"recipe sets it, add --data.{key}=null."
            )
