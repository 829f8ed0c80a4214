"""Keeps failing output from ending a run: a closed terminal, a pipe without a reader, a full disk."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def unfailing() -> Iterator[None]:
    """Makes standard output and error drop text that cannot be written, as long as this context is open.

    Text cannot be written if its reader is gone, the terminal is closed or the disk is full. A character that the
    encoding lacks is written as its number. Streams that are not files, such as a notebook's, stay as they are.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: what prints without Python would write into the next file that is opened
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = ours = tuple(_unfailing(stream) for stream in before)
    try:
        yield
    finally:
        for name, stream, was in zip(("stdout", "stderr"), ours, before, strict=True):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # of streams that are not ours
                stream.flush()
            if getattr(sys, name) is stream:  # else it is for whoever has replaced it, such as another thread
                setattr(sys, name, was)


class _Swallowing(io.FileIO):
    """A file that accepts all bytes and drops those that cannot be written."""

    def write(self, data: Any, /) -> int:
        try:
            written: int | None = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written  # None: a pipe that does not block is full


def _unfailing(stream: TextIO | None) -> TextIO:
    if stream is None or _closed(stream):  # None: Python's for a descriptor that was closed
        return io.TextIOWrapper(_Swallowing(os.devnull, "w"), encoding="utf-8", errors="backslashreplace")
    if not isinstance(stream, io.TextIOWrapper) or isinstance(
        getattr(stream.buffer, "raw", stream.buffer), _Swallowing
    ):
        return stream
    try:
        file = _Swallowing(stream.fileno(), "w", closefd=False)
    except OSError:  # none that the kernel knows, as what pytest captures in
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),  # as Python makes its own
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _closed(stream: TextIO) -> bool:
    try:
        return getattr(stream, "closed", False) is True
    except ValueError:  # detached
        return True
