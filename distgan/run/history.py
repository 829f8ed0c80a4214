"""Records each start of a run and how it ended, in history.jsonl: one JSON object per line, never cut back.

A resume cuts metrics back to a step, because the same steps come again. A start or an end does not come again.
"""

import json
import os
import signal
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distgan import __version__, files


def add_start(file: Path, *, step: int, processes: int, device: str) -> None:
    """Records that training begins after a step. Raises OSError."""
    job = os.environ.get("SLURM_JOB_ID")
    where = {"host": socket.gethostname(), "processes": processes, "device": device, **({"job": job} if job else {})}
    _add(file, "start", {"step": step, **where, "version": __version__})


def add_end(file: Path, *, step: int, how: str, why: str | None = None) -> None:
    """Records that training has ended. Raises OSError.

    Args:
        file: the run's history.jsonl.
        step: the last step that was done.
        how: `done`, `stop_at`, `signal`, `guard` or `error`.
        why: the signal's name, the guard's sentence, or the error.
    """
    _add(file, "end", {"step": step, "how": how, **({"why": why} if why else {})})


def signal_name(number: int) -> str:
    """Returns a signal's name, such as SIGTERM."""
    return signal.Signals(number).name


def _add(file: Path, event: str, described: dict[str, Any]) -> None:
    line = {"event": event, "time": datetime.now(UTC).isoformat(timespec="seconds"), **described}
    before = file.read_bytes() if file.exists() else b""
    files.replace(file, before + json.dumps(line).encode() + b"\n")
