"""Reads what a run's folder tells about the run. Whatever is missing or damaged there is left out, never an error.

Reading again costs little: of metrics.jsonl only what was added is read, of other files only those that changed.
"""

from __future__ import annotations

import base64
import json
import math
import os
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from distgan.recipe.identity import flat
from distgan.storage.places import Places
from distgan.storage.report import Report

T = TypeVar("T")

_COUNTS = ("step", "images_seen")  # numbers of metrics.jsonl that are no curves


@dataclass
class Curve:
    """One number of metrics.jsonl along the run."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def thinned(self, most: int) -> tuple[list[int], list[float]]:
        """Returns at most `most` points: each the mean of equally many points in a row, at the step of the last one.

        Metrics are means since the line before, so these are the means that a larger `track.log_every` would log.
        """
        several = -(-len(self.steps) // most)
        if several <= 1:
            return self.steps.tolist(), self.values.tolist()
        first = np.arange(0, len(self.steps), several)
        last = np.minimum(first + several, len(self.steps)) - 1
        means = np.add.reduceat(np.asarray(self.values), first) / (last - first + 1)
        return np.asarray(self.steps)[last].tolist(), means.tolist()


class Metrics:
    """The lines of a metrics.jsonl."""

    def __init__(self, file: Path) -> None:
        """Begins with no line; `read` reads."""
        self._file, self._begin_anew = file, True
        self.clear()

    def clear(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.step, self.images_seen = 0, 0  # of the last line
        self.troubles: list[tuple[int, str]] = []
        self.evaluated: dict[str, Any] | None = None  # the last line with an evaluation
        self.lines, self.damaged = 0, 0
        self._offset, self._inode = 0, -1

    def read(self) -> None:
        """Reads what was added since the last time; all of it, if the file was cut back by a resume or rollback."""
        try:
            with self._file.open("rb") as stream:
                found = os.fstat(stream.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self.clear()
                    self._inode = found.st_ino
                stream.seek(self._offset)
                # A line without its end is still being written.
                whole = stream.read().rpartition(b"\n")
        except OSError:
            self.clear()
            return
        self._offset += len(whole[0]) + len(whole[1])
        for line in whole[0].splitlines():
            self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, TypeError, KeyError):
            record, step = {}, None
        if type(step) is not int:
            self.damaged += 1
            return
        self.lines, self.step = self.lines + 1, step
        self.images_seen = int(record.get("images_seen", 0))
        for name, value in record.items():
            if type(value) in (int, float) and name not in _COUNTS:
                curve = self.curves.setdefault(name, Curve())
                curve.steps.append(step)
                curve.values.append(value)
        if "guard/trouble" in record:
            self.troubles.append((step, str(record["guard/trouble"])))
        if isinstance(record.get("eval/protocol"), dict):
            self.evaluated = record


@dataclass
class Invocation:
    """One start of a run, and how it ended."""

    start: dict[str, Any]
    """The line of history.jsonl; empty if it is missing."""
    end: dict[str, Any] | None
    """The same of the end; None if none was recorded."""


@dataclass(frozen=True)
class Sample:
    """A sample grid."""

    step: int
    file: Path


class RunRecord:
    """A run, as its folder tells it."""

    def __init__(self, path: Path) -> None:
        """Begins with nothing; `read` reads."""
        self.path, self._places = path, Places(path)
        self.metrics = Metrics(self._places.metrics)
        self._abandoned = Metrics(self._places.abandoned_metrics)
        self._known: dict[Path, tuple[tuple[int, int], Any]] = {}

    def read(self) -> None:
        """Brings everything up to date."""
        places = self._places
        self.metrics.read()
        self._abandoned.read()
        self.recipe: dict[str, Any] = self._of(places.config, _flat_recipe, {})
        """Settings by dotted key."""
        self.best: Report | None = self._of(places.generator_best / "evaluation.json", _measurement, None)
        """The best evaluation; None before its checkpoint is written."""
        newest = self._of(places.generator / "evaluation.json", _measurement, None)
        self.last = self._last_evaluation([one for one in (newest, self.best) if one is not None])
        """The last evaluation."""
        self.invocations = _paired(self._of(places.history, _lines, []))
        self.rollbacks: list[dict[str, Any]] = self._of(places.rollbacks, _lines, [])
        self.classes: list[str] = self._of(places.generator / "config.json", _classes, [])
        """The classes that the generator draws, if it takes labels: the rows of sample grids."""
        self.running = _running(places)
        """Whether a process writes the run; None if that cannot be found out."""
        self.samples = _samples(places.samples)
        """All sample grids, in order."""

    @property
    def last_step(self) -> int | None:
        """Returns the step at which the run is complete; None if its recipe cannot be read."""
        try:
            return int(self.recipe["train.steps"]) + int(self.recipe.get("run.extend", 0))
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def complete(self) -> bool:
        """Tells whether the run has done its last step and has said how it ended."""
        ended = not self.invocations or self.invocations[-1].end is not None
        return ended and self.last_step is not None and self.metrics.step >= self.last_step

    @property
    def abandoned_troubles(self) -> list[tuple[int, str]]:
        """Returns the guard's findings that a rollback took back, with their steps."""
        return self._abandoned.troubles

    @property
    def images_per_s(self) -> float | None:
        """Returns the median throughput of the log intervals; None before the first one."""
        curve = self.metrics.curves.get("throughput/images_per_s")
        return float(np.median(np.asarray(curve.values))) if curve is not None else None

    def picture(self, sample: Sample) -> tuple[bytes, int]:
        """Returns a sample grid as a data URL, and its height in pixels; an empty one if it is no PNG any more."""
        found: tuple[bytes, int] = self._of(sample.file, _picture, (b"", 0))
        return found

    def forget_pictures(self, kept: Iterable[Sample]) -> None:
        """Drops the pictures that the page no longer shows."""
        shown = {sample.file for sample in kept}
        for file in [file for file in self._known if file.suffix == ".png" and file not in shown]:
            del self._known[file]

    def _last_evaluation(self, reports: list[Report]) -> Report | None:
        """Returns the last evaluation of metrics.jsonl, with the floor of a report of the same protocol."""
        record = self.metrics.evaluated
        if record is None:
            return reports[0] if reports else None
        numbers = {
            name.removeprefix("eval/"): value
            for name, value in record.items()
            if name.startswith("eval/") and type(value) in (int, float)
        }
        protocol = record["eval/protocol"]
        floors = [report.floor for report in reports if report.protocol == protocol]
        return Report(str(self.path), record["step"], numbers, next(iter(floors), None), protocol)

    def _of(self, file: Path, parse: Callable[[bytes], T], missing: T) -> T:
        """Returns what a file tells; `missing` if it does not exist or is damaged. Parses it only if it has changed."""
        try:
            found = file.stat()
            stamp = (found.st_mtime_ns, found.st_size)
            if file not in self._known or self._known[file][0] != stamp:
                self._known[file] = (stamp, parse(file.read_bytes()))
            value: T = self._known[file][1]
            return value
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
            return missing


def _running(places: Places) -> bool | None:
    try:
        return places.writer() is not None
    except OSError:
        return None


def _flat_recipe(content: bytes) -> dict[str, Any]:
    return flat(yaml.safe_load(content))


def _measurement(content: bytes) -> Report:
    report = Report.from_json(json.loads(content))
    floor = report.floor or {}
    if not all(math.isfinite(value) for value in [*report.metrics.values(), *floor.values()]):
        raise ValueError("not numbers")
    dict(report.protocol)
    return report


def _lines(content: bytes) -> list[dict[str, Any]]:
    """Returns the objects of a JSON Lines file, without damaged lines."""
    found = []
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _paired(history: list[dict[str, Any]]) -> list[Invocation]:
    found: list[Invocation] = []
    for line in history:
        if line.get("event") == "start":
            found.append(Invocation(line, None))
        elif found and found[-1].end is None:
            found[-1].end = line
        else:
            found.append(Invocation({}, line))
    return found


def _classes(content: bytes) -> list[str]:
    images = json.loads(content)["images"]
    counts, names = images["class_counts"], images["class_names"]
    return [str(names[i]) if i < len(names) else str(i) for i, count in enumerate(counts) if count > 0]


def _samples(folder: Path) -> list[Sample]:
    found = [Sample(int(file.stem[5:]), file) for file in folder.glob("step_*.png") if file.stem[5:].isdecimal()]
    return sorted(found, key=lambda sample: sample.step)


def _picture(content: bytes) -> tuple[bytes, int]:
    if content[:8] != b"\x89PNG\r\n\x1a\n" or content[-12:] != _PNG_END:
        raise ValueError("no whole PNG")
    return b"data:image/png;base64," + base64.b64encode(content), int.from_bytes(content[20:24])


_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
