"""Shows progress of work that takes minutes: a bar on a terminal, or a line every 30 s in a job's log."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, track

T = TypeVar("T")

_TELL_EVERY = 30.0  # seconds between lines in a log
_live: list[Progress] = []  # what fills this process's terminal, if anything does; there can be only one


@contextmanager
def within(view: Progress) -> Iterator[None]:
    """Lets `shown` add its bars to a live view that is on the terminal already, as long as this context is open."""
    _live.append(view)
    try:
        yield
    finally:
        _live.remove(view)


def shown(items: Iterable[T], what: str, count: int, *, each: int = 1, unit: str = "images") -> Iterator[T]:
    """Yields the items and shows progress; `count` is their number, `each` the units that one stands for."""
    if _live:
        yield from _beside(_live[-1], items, what, count)
        return
    if sys.stderr.isatty():  # not Console's opinion, which FORCE_COLOR changes for files, too
        yield from track(items, what, count, console=Console(stderr=True), transient=True)
        return
    started = told = time.monotonic()
    for i, item in enumerate(items):
        now = time.monotonic()
        if now - told > _TELL_EVERY:
            told = now
            left = timedelta(seconds=round((now - started) * (count - i) / i)) if i else "?"
            print(f"{what}: {i * each:,} of {count * each:,} {unit}, {left} left", file=sys.stderr, flush=True)
        yield item


def _beside(view: Progress, items: Iterable[T], what: str, count: int) -> Iterator[T]:
    bar = view.add_task(what, total=count)
    try:
        for item in items:
            yield item
            view.advance(bar)
    finally:
        view.remove_task(bar)
