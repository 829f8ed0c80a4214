"""Shows a training to the one who started it: a live view on a terminal, otherwise one line for each log point."""

import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from distgan import progress
from distgan.parallel.launch import under_mpirun

_WIDTH = 120  # characters of a line at most; metrics.jsonl has all numbers
_LEFT_OUT = ("_std", "_error", "/classes")  # numbers that say little by themselves
_SPEED_OVER = 600.0  # seconds whose speed the time left is estimated from, so that it has evaluations in it


class Terminal:
    """Shows one invocation of a run. Rank zero only; its methods do nothing before `start`."""

    def __init__(self, last_step: int) -> None:
        self._last_step = last_step
        self._live = ExitStack()
        self._view: Progress | None = None
        self._numbers, self._evaluated = _line("starting"), _line("")
        self._began: tuple[float, int] | None = None  # the time and the step

    def start(self, step: int) -> None:
        """Begins after a step: with the live view if standard output is a terminal that can show one."""
        self._began = time.monotonic(), step
        # mpirun gives its processes a terminal even if the output goes to a log.
        if not getattr(sys.stdout, "isatty", bool)() or os.environ.get("TERM") == "dumb" or under_mpirun():
            return
        self._view = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            speed_estimate_period=_SPEED_OVER,
            expand=True,
        )
        self._view.add_task("training", total=self._last_step, completed=step)
        shown = Group(self._view, self._numbers, self._evaluated)
        self._live.enter_context(Live(shown, console=Console(), refresh_per_second=4))
        self._live.enter_context(progress.within(self._view))

    def advance(self, step: int) -> None:
        """Moves the bar."""
        if self._view is not None:
            self._view.update(self._view.task_ids[0], completed=step)

    def show(self, step: int, metrics: Mapping[str, float], images_per_s: float) -> None:
        """Shows the numbers of a log point."""
        if self._began is None:
            return
        self.advance(step)
        evaluated = [
            f"{name.removeprefix('eval/')} {value:.4g}"
            for name, value in metrics.items()
            if name.startswith("eval/") and not name.endswith(_LEFT_OUT)
        ]
        before, after = metrics["score/fake_before"], metrics["score/fake_after"]
        numbers = [
            f"loss D {metrics['loss/discriminator']:.3f} G {metrics['loss/generator']:.3f}",
            f"score real {metrics['score/real']:.2f} fake {before:.2f} -> {after:.2f}",
            f"{images_per_s:,.0f} images/s",
        ]
        if self._view is not None:
            self._numbers.plain = "  ".join(numbers)
            if evaluated:
                self._evaluated.plain = "  ".join([f"at step {step}:", *evaluated])
            return
        (then, first), now = self._began, time.monotonic()
        left = timedelta(seconds=round((now - then) * (self._last_step - step) / (step - first)))
        # What matters most comes first, because a long line loses its end.
        parts = [f"step {step}/{self._last_step}", *evaluated[:1], *numbers, f"{left} left", *evaluated[1:]]
        print(_fitting(parts), flush=True)

    def stop(self) -> None:
        """Leaves the live view as it is."""
        self._live.close()
        self._view = None


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def _fitting(parts: list[str]) -> str:
    """Joins as many parts as a line can hold."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > _WIDTH:
            break
        line += f"  {part}"
    return line
