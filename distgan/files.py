"""Writes files so that readers find all of a file or none: under another name first, then renamed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which becomes `file` at the end; after an error nothing is left of it.

    A symbolic link stays one: the file that it leads to is replaced.
    """
    place = Path(os.path.realpath(file))
    partial = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        yield partial
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def replace(file: Path, content: bytes, *, durable: bool = False) -> None:
    """Replaces a file in one step: readers find the old or the new one; with `durable`, even after a power loss."""
    with whole(file) as partial:
        write(partial, content, durable=durable)
    if durable:
        sync_folder(file.parent)


def write(file: Path, content: bytes, *, durable: bool = True) -> None:
    """Writes a file with the umask's permissions; `durable` waits until it is on the disk."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        if durable:
            os.fsync(stream.fileno())


def remove_leftovers(folder: Path) -> None:
    """Removes what `whole` left in a folder when it was killed. Only for the process that owns the folder."""
    for partial in folder.glob("*.tmp"):
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_aside(path: Path, why: str) -> Path:
    """Renames a file or folder to end in `.why`, or `.why2` and so on, and returns its new place: nothing is lost."""
    aside, n = path.with_suffix(f".{why}"), 1
    while aside.exists():
        n += 1
        aside = path.with_suffix(f".{why}{n}")
    path.rename(aside)
    return aside
