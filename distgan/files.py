"""Writes files so that readers find all of a file or none: under another name first, then renamed.

Refuses places that cannot be written, before the work for them is done.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from distgan.errors import UserError

_LONGEST = 230  # bytes of a file's name, so that a temporary one beside it fits


def check_place(key: str, file: Path, *, overwrite: bool = True) -> None:
    """Refuses a place for a file before the work for it is done; `key` is the option that names it.

    Raises:
        UserError: its folder does not exist or cannot be written, it is a folder itself, or it exists and `overwrite`
            is false.
    """
    _check_parent(key, file)
    if file.is_dir():
        raise UserError(f"{key} is {file}, which is a folder: give the name of a file.")
    if not overwrite and file.exists():
        raise UserError(f"{key} is {file}, which exists: choose another place, or add --overwrite.")


def check_folder(key: str, folder: Path, *, overwrite: bool = False) -> None:
    """Refuses a place for a folder of results before the work for it is done.

    Raises:
        UserError: its own folder does not exist, it cannot be written, it is a file, or it has files in it and
            `overwrite` is false.
    """
    _check_parent(key, folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{key} is {folder}, which is a file: choose another folder.")
    # Folders in it count, too: they may be classes of training images.
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    old = [file.name for file in inside if not file.name.startswith(".")]
    if old and not overwrite:
        raise UserError(
            f"{key} is {folder}, which is not empty (it has {old[0]}): choose a new or empty folder, or add "
            "--overwrite if the command has it."
        )


def _check_parent(key: str, place: Path) -> None:
    """Checks that something can be written at a place: in its folder, or in it if it is a folder or device."""
    if not place.absolute().parent.is_dir():
        raise UserError(
            f"{key} is {place}, but there is no folder {place.parent}: make it first, or choose another place."
        )
    target = Path(os.path.realpath(place))  # the file that a link leads to is written
    written_in = target if target.exists() and not target.is_file() else target.parent
    if not os.access(written_in, os.W_OK):
        raise UserError(f"{key} is {place}, but {written_in} cannot be written: choose another place.")
    if len(os.fsencode(target.name)) > _LONGEST:
        raise UserError(f"{key} is {place}, whose name is too long: choose one of at most {_LONGEST} bytes.")


@contextlib.contextmanager
def written(key: str, place: Path) -> Iterator[None]:
    """Wraps the writing of results. Raises UserError if the place cannot be written; `key` is the option for it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{key} is {place}, which cannot be written ({error.strerror or error}): choose another place."
        ) from error


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


@contextlib.contextmanager
def whole_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder to write to, whose contents become those of `folder` at the end.

    After an error nothing is left, and an old folder is as it was.

    Raises:
        OSError: somebody has written into the folder meanwhile, and `overwrite` is false.
    """
    with _beside(folder) as (place, partial):
        yield partial
        if not place.is_dir():
            partial.rename(place)
            return
        old = [file for file in place.iterdir() if not file.name.startswith(".")]
        if old and not overwrite:
            raise FileExistsError(errno.EEXIST, f"another program has written {old[0].name} there")
        for file in old:
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
        for file in partial.iterdir():
            file.rename(place / file.name)


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to write to, whose files are added to `folder` at the end.

    They replace files of their names. After an error nothing is added.
    """
    with _beside(folder) as (place, partial):
        yield partial
        place.mkdir(exist_ok=True)
        for file in partial.iterdir():
            if (place / file.name).is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{file.name} is a folder there")
        for file in sorted(partial.iterdir()):
            file.replace(place / file.name)


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yields a folder's real place, and a temporary one on the same file system: inside it, if it exists."""
    place = Path(os.path.realpath(folder))
    name = f".{place.name[:200]}.{os.getpid()}.tmp"
    partial = place / name if place.is_dir() else place.with_name(name)
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process with the same number
    partial.mkdir()
    try:
        yield place, partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
