"""Finds pictures in a folder or a zip archive, whose sub-folders are classes or splits."""

import contextlib
import heapq
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from distgan import paths
from distgan.data.archives import unzipped
from distgan.data.arrangement import arrange, counted, left_behind, of_another_source
from distgan.data.records import Record, Source, Tree, contents
from distgan.errors import UserError
from distgan.recipe import DataConfig


def folder(data: DataConfig) -> Source:
    """Returns the source of a folder or zip archive of pictures.

    Raises:
        UserError: `data.path` is missing, empty, damaged or unreadable.
    """
    if data.path is None:
        raise UserError("data.source is folder, but data.path is not set: give the folder with the pictures.")
    root = Path(data.path)
    if not paths.exists(root):
        raise UserError(f"data.path is {root}, but there is no such folder or zip archive: check the path.")
    is_archive = root.is_file()
    tree = archive(root) if is_archive else walked(root)
    with tree.open() as read:
        found = arrange(tree.names, split=data.split, where=str(root), read=read, archive=is_archive)

    def records(every: int) -> Iterator[Record]:
        with tree.open() as read:
            for name, label in zip(found.names[::every], found.labels[::every], strict=True):
                try:
                    content = read(name)
                except ValueError:
                    if not data.skip_bad:
                        raise
                    content = b""  # cannot be decoded, so that it is skipped and counted
                yield Record(str(root / name), content, label)

    left_out = [*found.left_out, *tree.left_out]
    return Source(
        records=records,
        count=len(found.names),
        channels=3,
        classes=found.classes,
        files=(root,) if is_archive else tuple(root / name for name in found.names),
        salt=json.dumps(found.salt),
        left_out=f"left out of {root}: {', '.join(left_out)}" if left_out else "",
        strays=found.strays,
        split=found.split,
        splits=found.splits,
        unseen=found.unseen,
    )


def refuse_among_pictures(pictures: str, places: Mapping[str, str | Path]) -> None:
    """Checks that nothing will be written into a folder of pictures, because it would be read as pictures.

    Args:
        pictures: the path of the pictures; checked only if it is a folder. Links in it are followed.
        places: paths that will be written, by the setting that chooses each.

    Raises:
        UserError: a path is inside the folder.
    """
    if not paths.is_folder(pictures):
        return
    inside = _walk(Path(pictures)).folders
    for what, place in places.items():
        if _lies_in(Path(place).resolve(), inside):
            raise UserError(
                f"{what} is {place}, which is inside {pictures}, the folder of pictures, so that distgan would train "
                f"on what it writes there: choose a place outside for {what}."
            )


def refuse_mixing(outputs: Mapping[str, str | Path | None], inputs: Mapping[str, str | Path]) -> None:
    """Checks that no result is written over another result, or over what it is made of.

    Args:
        outputs: places that will be written, by the options that name them; None for one that is not asked for.
        inputs: files and folders that are read. Links in folders are followed.

    Raises:
        UserError: two places are the same, or one is inside the other.
    """
    there = {key: Path(os.path.realpath(place)) for key, place in outputs.items() if place is not None}
    for what, given in inputs.items():
        root = Path(given)
        found = _walk(root) if root.is_dir() else None
        read = [Path(os.path.realpath(root / name)) for name in ("", *(found.names if found is not None else ()))]
        for key, place in there.items():
            among = found is not None and _lies_in(place, found.folders)
            if among or any(place in (file, *file.parents) for file in read):
                raise UserError(f"{key} is {place}, but {what} is read from there: choose a place outside of it.")
    for key, place in there.items():
        for other, another in there.items():
            if other != key and place in (another, *another.parents):
                raise UserError(f"{other} is {another}, but {key} is written there, too: choose different places.")


def _lies_in(place: Path, folders: set[tuple[int, int]]) -> bool:
    """Tells whether a place, which need not exist yet, is one of these folders or inside one."""
    return any(_identity(part) in folders for part in (place, *place.parents) if part.is_dir())


class _Walked(NamedTuple):
    """Everything in a folder and below it, with links followed."""

    names: list[str]
    """Names of files, relative to the folder."""
    folders: set[tuple[int, int]]
    """Device and inode of each folder."""
    broken: list[str]
    """Names of links to nothing."""
    again: list[str]
    """Names of links to a folder that is read already, such as a folder around the link."""
    special: list[str]
    """Names of pipes, sockets and devices."""


def _walk(root: Path) -> _Walked:
    """Walks a folder, each folder in it once: at its real place, or through the first link to it.

    Real folders come first; links wait in a heap, so that the first by name is followed.

    Raises:
        UserError: a folder cannot be read, and it is not a hidden one.
    """
    found = _Walked([], {_identity(root)}, [], [], [])
    read = {_identity(root)}  # hidden folders are not in it, because a link may lead to pictures in one
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", (_identity(root),))]  # with the folders around each
    links: list[tuple[str, tuple[tuple[int, int], ...]]] = []  # a heap by name
    while waiting or links:
        if waiting:
            prefix, above = waiting.pop()
        else:
            link, above = heapq.heappop(links)
            if above[-1] in read:
                found.again.append(link)
                continue
            found.folders.add(above[-1])
            read.add(above[-1])
            prefix = f"{link}/"
        try:
            entries = list(os.scandir(root / prefix))
        except OSError as error:
            if left_behind(prefix.rstrip("/")):
                continue
            raise UserError(
                f"the folder {root / prefix} cannot be read ({error.strerror}): make it readable, or move it elsewhere."
            ) from error
        for entry in entries:
            name = prefix + entry.name
            try:
                if entry.is_dir():
                    identity = _identity(entry)
                    if entry.is_symlink():
                        if left_behind(name):
                            found.names.append(name)  # counted with the hidden files
                        else:
                            heapq.heappush(links, (name, (*above, identity)))
                    elif identity in above:
                        found.again.append(name)
                    else:
                        found.folders.add(identity)
                        if not left_behind(name):
                            read.add(identity)
                        waiting.append((f"{name}/", (*above, identity)))
                elif entry.is_file():
                    found.names.append(name)
                elif entry.is_symlink() and not paths.exists(entry.path):
                    found.broken.append(name)
                else:
                    found.special.append(name)
            except OSError:  # a link to itself
                found.broken.append(name)
    return found


def _identity(folder: "Path | os.DirEntry[str]") -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def walked(root: Path) -> Tree:
    """Lists the files in a folder."""
    found = _walk(root)

    @contextlib.contextmanager
    def opened() -> Iterator[Callable[[str], bytes]]:
        yield lambda name: contents(root / name)

    left_out = []
    if found.broken:
        left_out.append(counted(found.broken, "broken link"))
    if found.again:
        left_out.append(counted(found.again, "link") + " to a folder that is read already")
    if found.special:
        left_out.append(f"{counted(found.special, 'special file')}, such as pipes or devices")
    return Tree(names=found.names, open=opened, left_out=left_out)


def archive(file: Path) -> Tree:
    """Lists the files in a zip archive. Raises UserError if the file is something else."""
    if file.suffix.lower() != ".zip" and not zipfile.is_zipfile(file):
        place = file if file.name.endswith((".tar.gz", ".tgz")) else file.parent  # other sources take folders
        advice = of_another_source([file.name], str(place)) or (
            ": unpack it and give the folder, or make a zip archive of the pictures"
        )
        raise UserError(f"data.path is {file}, which is neither a folder nor a zip archive{advice}.")
    return unzipped(file)
