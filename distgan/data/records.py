"""A training set that nobody has decoded yet: a list of files, and a way to read its pictures in order."""

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
from distgan.recipe import DataConfig

_NUMBERED = 20  # classes at most, that a line names


@dataclass(frozen=True)
class Record:
    """One image as the source has it."""

    name: str
    """What a message calls it."""
    content: bytes | np.ndarray
    """An encoded picture, or values 0 ... 255 of shape (H, W), or bytes of shape (3, H, W)."""
    label: int | None


@dataclass(frozen=True, kw_only=True)
class Source:
    """A training set that nobody has decoded yet."""

    records: Callable[[int], Iterator[Record]]
    """Every n-th of its images, in an order that never changes. Raises UserError where the files are damaged."""
    count: int
    """How many records there are."""
    channels: int
    """What `data.channels` is where the user leaves it open."""
    classes: tuple[str, ...] | None = None
    """Names of the labels."""
    files: tuple[Path, ...] = ()
    """The files that its content is a function of, in order."""
    salt: str = ""
    """What else it is a function of."""
    left_out: str = ""
    """What lies there and is not read, as a user is told; empty where that is nothing."""
    strays: str = ""
    """Which images have no label though others do, as a user is told; empty where there are none."""
    split: str | None = None
    """Of its splits the one that is read, by its own name; None where there are none."""
    splits: tuple[str, ...] = ()
    """All of them, those for training first."""
    unseen: str | None = None
    """The one of the others to take where images are needed that nobody trains on; None where there is none."""

    def stamp(self) -> str:
        """Returns a quick hash of the files' names, sizes and times: while it stands, their content does."""
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return hashlib.sha256(json.dumps([self.salt, self.classes, stats]).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Returns a hash of the content, wherever it lies: of all files' bytes, in order. Reads them all."""
        if not self.files:
            return self.salt
        digest = hashlib.sha256(json.dumps([self.salt, self.classes]).encode())
        for file in self.files:
            # Whether a file that cannot be read is refused or skipped is told where its record is read.
            with contextlib.suppress(OSError), file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Files in folders, wherever these are."""

    names: list[str]
    """Relative to the top, with slashes between their parts."""
    open: Callable[[], AbstractContextManager[Callable[[str], bytes]]]
    """Opens what they lie in; gives a function that reads a file by its name. Not for several threads at once."""
    left_out: list[str]
    """What cannot be read as a file and is left out: a phrase for each kind, with how many."""


def numbered(classes: Sequence[str]) -> str:
    """Lists the classes with their labels for the user: the first of many, in letters that can be printed."""
    said = ", ".join(f"{label} {printable(name)}" for label, name in enumerate(classes[:_NUMBERED]))
    more = len(classes) - _NUMBERED
    return f"{said} and {more:,} more" if more > 0 else said


def printable(name: str) -> str:
    """Returns a name with whatever does not print escaped: it would end the line, or command the terminal."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in name)


def existing_folder(path: str | None) -> Path:
    """Returns `data.path`, which must be a folder. Raises UserError where it is none."""
    assert path is not None
    if not paths.is_folder(path):
        raise UserError(f"data.path is {path}, but there is no such folder: check the path.")
    return Path(path)


def contents(file: Path) -> bytes:
    """Returns what a file holds. Raises UserError where it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): make it readable, or copy it again.") from error


def refuse_columns(data: DataConfig, place: Path) -> None:
    """Raises UserError where a configuration or a column is named, though the files found have neither."""
    for key in ("config", "image_column", "label_column"):
        if getattr(data, key) is not None:
            raise UserError(
                f"data.{key} is {getattr(data, key)}, which the files in {place} do not use: leave it out, or set it "
                "to null where the recipe gives it."
            )
