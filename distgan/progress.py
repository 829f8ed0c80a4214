"""Shows progress of work that takes minutes: a bar on a terminal, or a line every 30 s in a job's log."""

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")

_TELL_EVERY = 30.0  # seconds between lines in a log


def shown(items: Iterable[T], what: str, count: int, *, each: int = 1, unit: str = "images") -> Iterator[T]:
    """Yields the items and shows progress; `count` is their number, `each` the units that one stands for."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(items, what, count, console=console, transient=True)
        return
    started = told = time.monotonic()
    for i, item in enumerate(items):
        now = time.monotonic()
        if now - told > _TELL_EVERY:
            told = now
            left = timedelta(seconds=round((now - started) * (count - i) / i)) if i else "?"
            console.print(f"{what}: {i * each:,} of {count * each:,} {unit}, {left} left", soft_wrap=True, markup=False)
        yield item
