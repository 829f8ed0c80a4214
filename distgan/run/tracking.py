"""Records a run: metrics.jsonl, sample grids, trackers such as wandb, and the terminal. Only rank zero records.

metrics.jsonl is the durable record: one JSON object per line, each step once. Trackers get the same names.
"""

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from distgan.pictures import grid
from distgan.recipe import Config, TrackConfig
from distgan.run import trackers, wandb_tracker
from distgan.run.folder import cut_metrics
from distgan.run.terminal import Terminal
from distgan.run.trackers import Recorder, Tracked
from distgan.run.wandb_tracker import wandb_mode
from distgan.storage import checkpoint
from distgan.storage.places import Places

_RECORDERS: dict[str, type[Recorder]] = {
    one.name: one for one in (wandb_tracker.Wandb, trackers.TensorBoard, trackers.Trackio, trackers.MLflow)
}


def check(track: TrackConfig) -> None:
    """Checks that every tracker of the run is installed, and wandb's environment variables, if the run will use it.

    Raises:
        UserError: a tracker is not installed, or wandb would refuse a variable; the message names it.
    """
    trackers.check(track)
    if "wandb" in track.trackers and wandb_mode() != "disabled":
        wandb_tracker.check()


class Tracker:
    """Records a run. It exists on every rank, but `start`, `alert`, `log`, `samples`, `keep` and `sync` are for rank
    zero only; the other methods do nothing on other ranks.
    """

    def __init__(self, folder: Places, config: Config) -> None:
        self._folder, self._config = folder, config
        self._recorders: list[Recorder] = []
        self._metrics: IO[bytes] | None = None
        self._unwritten = b""
        self._lock = threading.Lock()  # the thread that writes checkpoints also writes pending lines
        self._terminal = Terminal(config.last_step)
        self._timed_from = (time.monotonic(), 0)  # the time and the step from which the throughput counts

    def start(self, step: int, tracking_id: str | None, *, lost: int = 0, abandoned: bool = False) -> str | None:
        """Begins recording after a step, and returns the id of the run with all trackers, which a resumed run keeps.

        Args:
            step: the last step whose metrics stay in metrics.jsonl.
            tracking_id: the id of a run that is resumed; None for a new one.
            lost: the number of steps that rollbacks took back. They are added to the steps of trackers that cannot go
                back.
            abandoned: whether a rollback gave up the metrics after that step, so that they are kept in another file.
        """
        names = self._config.track.trackers
        if "wandb" in names and wandb_mode() == "disabled":
            print(
                "wandb: switched off by WANDB_DISABLED or WANDB_MODE; metrics.jsonl and samples/ have everything",
                flush=True,
            )
            names = [name for name in names if name != "wandb"]
        new = tracking_id is None
        if names and tracking_id is None:
            # A new run takes WANDB_RUN_ID if it is set: a sweep's agent waits for the run under that id.
            tracking_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        if names and tracking_id is not None:
            self._start_trackers(
                names,
                Tracked(id=tracking_id, new=new, folder=self._folder.path, config=self._config, step=step, lost=lost),
            )
        cut_metrics(self._folder.metrics, step, abandoned=abandoned)
        self._metrics = self._folder.metrics.open("ab", buffering=0)
        self._folder.samples.mkdir(exist_ok=True)
        self._terminal.start(step)
        self._timed_from = (time.monotonic(), step)
        return tracking_id

    def alert(self, step: int, what: str) -> None:
        """Warns the user on standard error and in trackers."""
        print(f"distgan: warning: at step {step} {what}.", file=sys.stderr, flush=True)
        self._in_trackers(lambda one: one.alert(step, what))

    def not_training(self, seconds: float) -> None:
        """Leaves this many seconds of other work out of the throughput."""
        then, since = self._timed_from
        self._timed_from = (then + seconds, since)

    def log(self, step: int, metrics: dict[str, float], described: dict[str, Any] | None = None) -> None:
        """Writes one line of metrics, with images_seen, throughput and the entries of `described` (the protocol).

        Raises:
            OSError: the disk is full or fails. The line is kept and written with the next one.
        """
        now, (then, since) = time.monotonic(), self._timed_from
        images_per_s = (step - since) * self._config.images_per_step / (now - then)
        self._timed_from = (now, step)
        described = described or {}
        numbers = {
            "step": step,
            "images_seen": step * self._config.images_per_step,
            **metrics,
            "throughput/images_per_s": images_per_s,
        }
        try:
            self._write(json.dumps({**numbers, **described}).encode() + b"\n")
        finally:
            self._terminal.show(step, metrics, images_per_s)
            self._in_trackers(lambda one: one.log(step, numbers, described))

    def advance(self, step: int) -> None:
        """Moves the live bar."""
        self._terminal.advance(step)

    def samples(self, step: int, images: Tensor, *, columns: int, rows: Sequence[str] = ()) -> None:
        """Writes the sample grid.

        Args:
            step: the step it was drawn at.
            images: uint8 (N, C, H, W).
            columns: images in a row.
            rows: the names of the classes, if each row is one; trackers show them.

        Raises:
            OSError: the disk is full or fails.
        """
        picture = grid(images, columns=columns)
        file = self._folder.samples / f"step_{step:08d}.png"
        try:
            picture.save(file)
        except OSError:
            file.unlink(missing_ok=True)
            raise
        caption = f"step {step:,}, {step * self._config.images_per_step:,} images seen"
        if rows:
            caption += f"; rows from the top: {', '.join(rows)}"
        self._in_trackers(lambda one: one.picture(step, picture, caption))

    def keep(self, step: int) -> None:
        """Gives trackers copies of what `track.artifacts` names, at the end of a run."""
        folders = {
            "generator": [self._folder.generator, self._folder.generator_best],
            "checkpoint": [checkpoint.folder_of(self._folder.checkpoints, step)],
        }
        for kind in self._config.track.kept:
            for folder in filter(Path.exists, folders[kind]):
                name = kind if kind == "checkpoint" else folder.name
                self._in_trackers(partial(_keep, what=name, folder=folder, step=step))

    def sync(self) -> None:
        """Brings all metrics so far to the disk, before a checkpoint relies on them. Raises OSError."""
        if self._metrics is not None:
            self._write(b"")
            os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Finishes the live view, trackers (which send or write what they hold) and the metrics file."""
        self._terminal.stop()
        if self._metrics is not None:
            self._metrics.close()
            self._unwritten = b""
            self._in_trackers(lambda one: one.finish())
            self._recorders.clear()

    def _start_trackers(self, names: list[str], run: Tracked) -> None:
        for name in names:
            try:
                self._recorders.append(_RECORDERS[name](run))
            except Exception as error:  # of many kinds
                if name == "wandb":  # not even offline
                    raise
                _warn(name, f"this invocation is not recorded there: {error}")

    def _in_trackers(self, action: Callable[[Recorder], object]) -> None:
        """Does something in each tracker. Their errors never end a run, because metrics.jsonl has everything."""
        for recorder in self._recorders:
            try:
                action(recorder)
            except Exception as error:  # of many kinds
                _warn(recorder.name, str(error))

    def _write(self, line: bytes) -> None:
        """Writes pending lines and this one; what a full disk does not take stays pending."""
        assert self._metrics is not None
        with self._lock:
            self._unwritten += line
            while self._unwritten:
                self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]


def _warn(tracker: str, what: str) -> None:
    print(f"distgan: warning: {tracker}: {' '.join(what.split())[:200]}", file=sys.stderr, flush=True)


def _keep(recorder: Recorder, *, what: str, folder: Path, step: int) -> None:
    recorder.keep(what, folder, step)
