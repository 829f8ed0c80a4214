"""Reads the files in a zip archive without unpacking it."""

import contextlib
import lzma
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from distgan.data.arrangement import counted, plain
from distgan.data.records import Tree
from distgan.errors import UserError

_EXPANSION = 100  # pictures are compressed already: a large file that expands by more than this is a trap
_LARGE_FILE = 2**28  # bytes
_LARGE_ARCHIVE = 2**30
_LARGEST_FILE = 2**30  # for any compressed size; Pillow decodes no picture of that size
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, UnicodeDecodeError)


def unzipped(file: Path) -> Tree:
    """Lists the files in a zip archive. Links are left out. If several files have one name, the last one is read.

    Raises:
        UserError: the archive is damaged or encrypted, its compression is unknown, it has names that lead out of it, or
            it would expand too far.
    """
    with _explained(f"the archive {file}"), zipfile.ZipFile(file) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    named = [(_checked(entry, file), entry) for entry in entries]
    members = dict(named)
    total = sum(entry.file_size for entry in entries)  # overlapping entries count each time
    if total > max(_LARGE_ARCHIVE, _EXPANSION * file.stat().st_size):
        raise UserError(
            f"the archive {file} would expand from {file.stat().st_size / 1e6:,.1f} MB to {total / 1e6:,.0f} MB, which "
            "no archive of pictures does: if you trust it, unpack it and give the folder."
        )
    links = [name for name, entry in members.items() if stat.S_ISLNK(entry.external_attr >> 16)]
    overwritten = [name for name, entry in named if members[name] is not entry]
    left_out = [counted(links, "link")] if links else []
    if overwritten:
        left_out.append(f"{counted(overwritten, 'file')} of which there is a later one of the same name")

    @contextlib.contextmanager
    def opened() -> Iterator[Callable[[str], bytes]]:
        with _explained(f"the archive {file}"):
            archive = zipfile.ZipFile(file)
        with archive:

            def read(name: str) -> bytes:
                with _explained(f"{name} in the archive {file}"):
                    return archive.read(members[name])

            yield read

    return Tree(names=list(members.keys() - set(links)), open=opened, left_out=left_out)


def _checked(entry: zipfile.ZipInfo, file: Path) -> str:
    """Returns an entry's name, with slashes between its parts. Raises UserError if the entry may not be read."""
    name = plain(entry.filename)
    if entry.filename.startswith(("/", "\\")) or ".." in name.split("/") or re.match("[A-Za-z]:/", name):
        raise UserError(
            f"the archive {file} holds {entry.filename!r}, a name that leads out of it: make the archive again without "
            "that file."
        )
    if entry.flag_bits & 1:
        raise UserError(f"the archive {file} is encrypted ({name}): unpack it and give the folder.")
    if entry.compress_type not in _METHODS:
        raise UserError(
            f"the archive {file} is compressed in a way that Python cannot read ({name}, method "
            f"{entry.compress_type}): unpack it and give the folder."
        )
    if entry.file_size > min(_LARGEST_FILE, max(_LARGE_FILE, _EXPANSION * entry.compress_size)):
        raise UserError(
            f"{name} in the archive {file} would expand to {entry.file_size / 1e6:,.0f} MB, which no picture does: "
            "make the archive again without that file."
        )
    return name


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns the errors of damaged archives into one sentence."""
    try:
        yield
    except (*_DAMAGE, RuntimeError) as error:  # RuntimeError: encrypted, or of unknown compression
        raise UserError(
            f"{what} is damaged, incomplete or unreadable ({_reason(error)}): copy or download it again."
        ) from error


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
