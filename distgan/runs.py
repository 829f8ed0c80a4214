"""Lists the runs in a folder: step, last number, state and disk used. Imports no torch, and changes nothing."""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distgan import paths
from distgan.cli import check_json, write_json
from distgan.errors import UserError
from distgan.storage import bundle
from distgan.storage.places import CHECKPOINT, Places

_WIDEST = 10_000  # characters in a line of a table that goes into a file, where no name is broken

State = Literal["running", "done", "preempted", "collapsed", "stopped"]


def main(argv: Sequence[str] | None = None) -> None:
    """`distgan runs [DIR] [--json PATH]`.

    Raises:
        UserError: there is no such folder, or the file of `--json` cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="distgan runs",
        description="List the runs in a folder and its sub-folders. Their states: running; done; preempted (a signal "
        "stopped it; the same command goes on); collapsed (the guard stopped it, or its numbers became NaN or inf); "
        "stopped (by run.stop_at, an error or a kill; the same command goes on).",
    )
    parser.add_argument("dir", metavar="DIR", nargs="?", default="runs", help="a folder of runs (default: runs)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write what was found to a file")
    arguments = parser.parse_args(argv)
    arguments.dir = paths.expanded("DIR", arguments.dir)
    paths.expand(arguments, "json")
    check_json(arguments.json)
    if not paths.is_folder(arguments.dir):
        raise UserError(f"DIR is {arguments.dir}, but there is no such folder: give the folder that holds your runs.")
    found = [look(folder) for folder in _runs(Path(arguments.dir))]
    _show(found, arguments.dir)
    if arguments.json is not None:
        write_json(arguments.json, {"runs": [asdict(run) for run in found]})


@dataclass(frozen=True, kw_only=True)
class Run:
    """What lies in a run's folder."""

    folder: str
    state: State
    writer: str | None
    """The process that writes the folder; None if the run is not running."""
    step: int
    """The last step that was logged or saved."""
    saved: int
    """The step of the newest checkpoint, or of the exported generator if there is no checkpoint; 0 without both."""
    last_step: int | None
    """The step at which the run is complete; None if its recipe cannot be read."""
    number: str | None
    """The name of the last number: the first metric of the last evaluation, or else the generator's loss."""
    value: float | None
    """The last number; None if it is NaN or inf, or if there is none."""
    number_step: int | None
    """The step of the last number."""
    disk: int
    """Bytes that the folder takes on the disk."""
    troubles: list[str]
    """The signs that the guard has reported and that the newest checkpoint still shows."""
    problems: list[str]
    """What is damaged or cannot be read, a sentence without its full stop for each."""


def look(folder: Path) -> Run:
    """Describes the run in a folder. What is damaged there is told in `problems`, and no error is raised."""
    places, problems = Places(folder), list[str]()
    writer, last_step, saved, guard, newest, evaluated = None, None, 0, dict[str, Any](), None, None
    with _telling(problems, "the lock"):
        writer = places.writer()
    with _telling(problems, "config.yaml"):
        last_step = _last_step(places.config)
    with _telling(problems, "checkpoints/"):
        saved, guard = _newest_whole(places.checkpoints, problems)
    exported = places.generator / "config.json"
    if not saved and paths.exists(exported):
        with _telling(problems, "generator/config.json"):
            saved = int(json.loads(exported.read_text())["step"])
    with _telling(problems, "metrics.jsonl"):
        newest, evaluated = _records(places.metrics)
    troubles = [name for name, (_, _, told) in guard.get("streaks", {}).items() if told]
    number = value = None
    of = evaluated or newest
    if of is not None:
        number = next((name for name in of if name.startswith("eval/")), "loss/generator")
        value = of.get(number)
    return Run(
        folder=str(folder),
        state=_state(
            running=writer is not None,
            stopped_by_guard=bool(troubles) and guard.get("on_trouble") != "warn",
            diverged=newest is not None and _diverged(newest),
            complete=last_step is not None and saved >= last_step,
            preempted=paths.exists(places.preempted),
        ),
        writer=writer,
        step=max(saved, newest["step"] if newest is not None else 0),
        saved=saved,
        last_step=last_step,
        number=number,
        value=value if value is not None and math.isfinite(value) else None,
        number_step=of["step"] if of is not None else None,
        disk=_disk(folder),
        troubles=troubles,
        problems=problems,
    )


def _state(*, running: bool, stopped_by_guard: bool, diverged: bool, complete: bool, preempted: bool) -> State:
    if running:
        return "running"
    if stopped_by_guard or diverged:
        return "collapsed"
    if complete:
        return "done"
    return "preempted" if preempted else "stopped"


# Reading what a run wrote ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _telling(problems: list[str], what: str) -> Iterator[None]:
    """Adds a problem in place of an error that reading a file raises."""
    try:
        yield
    except FileNotFoundError:
        problems.append(f"{what} is not there")
    except OSError as error:
        problems.append(f"{what} cannot be read ({error.strerror})")
    except UserError as error:
        problems.append(str(error).rstrip("."))
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):  # ValueError: no JSON, no UTF-8
        problems.append(f"{what} is damaged")


def _last_step(config: Path) -> int:
    """Reads `Config.last_step` from a saved recipe: the parser of recipes would take half a second for each run."""
    said = yaml.safe_load(config.read_text(encoding="utf-8"))
    return int(said["train"]["steps"]) + int(said["run"]["extend"])


def _newest_whole(checkpoints: Path, problems: list[str]) -> tuple[int, dict[str, Any]]:
    """Returns the step of the newest whole checkpoint and the guard's state in it; 0 and nothing if there is none.

    Files are compared by size alone: reading them would take long.
    """
    there = checkpoints.iterdir() if paths.is_folder(checkpoints) else ()
    steps = {int(match[1]): folder for folder in there if (match := CHECKPOINT.fullmatch(folder.name))}
    for step, folder in sorted(steps.items(), reverse=True):
        problem = bundle.problem(folder, contents=False)
        if problem is None:
            return step, bundle.read_state(folder).get("guard", {})  # early versions had no guard
        if folder.exists():  # else the run has just removed it
            problems.append(f"the checkpoint {folder.name} is damaged ({problem})")
    return 0, {}


def _records(metrics: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Returns the last line of metrics.jsonl, and the last one with an evaluation; None if there is none.

    Raises:
        OSError: the file cannot be read. If it does not exist, the run was ended before its first step.
        ValueError: it has lines, but none can be read.
    """
    if not paths.exists(metrics):
        return None, None
    lines = metrics.read_bytes().splitlines()
    newest = next(filter(None, map(_record, reversed(lines))), None)
    if newest is None and lines[1:]:  # a single line may be one that a kill cut short
        raise ValueError
    evaluations = (line for line in reversed(lines) if b'"eval/' in line)
    return newest, next(filter(None, map(_record, evaluations)), None)


def _record(line: bytes) -> dict[str, Any] | None:
    """Reads a line of metrics.jsonl; None if it is damaged, such as the last one after a kill."""
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def _diverged(record: Mapping[str, Any]) -> bool:
    """Tells whether a number is NaN or inf: the losses, or the guard's own if the weights are."""
    return any(isinstance(value, float) and not math.isfinite(value) for value in record.values())


def _disk(folder: Path) -> int:
    """Returns the bytes that a folder takes on the disk. Files that vanish meanwhile count as nothing."""
    total = 0
    for inside, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(inside) / name).lstat().st_blocks * 512
    return total


def _runs(folder: Path) -> Iterator[Path]:
    """Yields the folders of runs in a folder, or the folder itself if it is one, in the order of their names.

    A folder that may not be read is taken for a run, so that its problem is told.
    """
    places = Places(folder)
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        inside = [places.lock]
    if {places.metrics, places.checkpoints, places.lock} & {*inside}:
        yield folder
        return
    for inner in inside:
        # A link to a run is one; other links may lead in circles.
        if paths.is_folder(inner) and not inner.name.startswith("."):
            if not inner.is_symlink():
                yield from _runs(inner)
            elif paths.exists(Places(inner).config):
                yield inner


# Showing it -----------------------------------------------------------------------------------------------------------


def _show(found: Sequence[Run], where: str) -> None:
    """Prints a table, and below it what is wrong with single runs."""
    if not found:
        print(f"there are no runs in {where}")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in ("state", "step", "last number"):
        table.add_column(name, no_wrap=True)
    table.add_column("disk", no_wrap=True, justify="right")
    for run in found:
        of = f" of {run.last_step:,}" if run.last_step is not None else ""
        step, disk = f"{run.step:,}{of}", f"{run.disk / 1e6:,.1f} MB"
        table.add_row(Text(paths.quoted(run.folder)), run.state, step, Text(_number(run)), disk)
    Console(width=None if getattr(sys.stdout, "isatty", bool)() else _WIDEST).print(table)
    for run in found:
        said = [f'the guard reports "{trouble}"' for trouble in run.troubles] + run.problems
        for line in said:
            print(f"{paths.quoted(run.folder)}: {line}")


def _number(run: Run) -> str:
    if run.number is None:
        return "-"
    name = run.number.removeprefix("eval/").replace("loss/generator", "loss of G")
    return f"{name} {run.value:.4g}" if run.value is not None else f"{name} is NaN or inf"


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["runs", *sys.argv[1:]]))
