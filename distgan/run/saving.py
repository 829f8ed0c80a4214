"""Saves a run in the background while training goes on: checkpoints and exported generators."""

import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from distgan.errors import NotSavedError, StoppedError, UserError
from distgan.models import ImageSpec
from distgan.recipe import Config
from distgan.run import rollback
from distgan.run.best import export_best
from distgan.run.folder import RunFolder
from distgan.run.state import TrainingState
from distgan.run.tracking import Tracker
from distgan.storage import checkpoint
from distgan.storage.exported import save_generator


class Background:
    """Runs one task at a time in a thread; `finish` raises the task's error."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        self._reported = False

    def start(self, work: Callable[[], None]) -> None:
        """Starts a task; the one before must be finished."""
        assert self._running is None
        self._running, self._reported = self._pool.submit(work), False

    def failed(self) -> bool:
        """Tells whether the task has failed; True only once, and `finish` will raise the error."""
        running = self._running
        if running is None or self._reported or not running.done() or running.exception() is None:
            return False
        self._reported = True
        return True

    def finish(self) -> None:
        """Waits for the task, if there is one, and raises its error."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


class Saver:
    """Saves a run on rank zero: one checkpoint at a time, in the background while training goes on."""

    def __init__(
        self, config: Config, folder: RunFolder, state: TrainingState, spec: ImageSpec, tracker: Tracker
    ) -> None:
        self._config, self._folder, self._state, self._spec = config, folder, state, spec
        self._tracker = tracker
        self._writing = Background()
        self._saved_at = time.monotonic()
        self._unsaved = False  # whether the last save failed, so that it must be tried again
        self._asked = False  # whether an extra save was requested; the other ranks learn of it one step later
        self._best_weights: tuple[int, Mapping[str, Tensor]] = (0, {})

    def wanted(self, *, at_log_point: bool) -> bool:
        """Tells whether to request an extra save: `checkpoint.every_minutes` have passed, or the last save failed."""
        if self._asked:
            return False
        minutes = self._config.checkpoint.every_minutes
        late = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        self._asked = late or (at_log_point and self._unsaved)
        return self._asked

    def forget_request(self) -> None:
        """Forgets the requested extra save, after a rollback."""
        self._asked = False

    def failed(self) -> bool:
        """Tells whether a save has failed in the background; True only once."""
        return self._writing.failed()

    def begin(self, described: dict[str, Any]) -> None:
        """Copies the state to host memory and starts writing it; waits first for the save before this one."""
        self.settle()

        # Copied now, because training goes on while the thread writes.
        files, step, so_far = self._state.snapshot(), self._state.step, self._state.standing
        best, measured = so_far.best, so_far.at(step)
        # The best weights stay in memory until they are on the disk, which may be full for a while.
        if best is not None and best.step == step:
            self._best_weights = (step, files["average"])
        at_hand, weights = self._best_weights
        best_weights = weights if best is not None and best.step == at_hand else None
        starts = {*self._state.guard.starts, step}
        keep, model = self._config.checkpoint, self._config.model

        # Metrics first: a resume from this checkpoint needs all lines up to its step. Old checkpoints are removed only
        # when the new one is written.
        def write() -> None:
            with self._folder.writing(f"step {step} could not be saved"):
                self._tracker.sync()
                checkpoint.save(self._folder.checkpoints, step, files, described)
                needed = rollback.needed(self._folder, starts, every=keep.every) | ({best.step} if best else set())
                checkpoint.prune(
                    self._folder.checkpoints, keep_last=keep.keep_last, keep_every=keep.keep_every, keep=needed
                )
                save_generator(
                    self._folder.generator, files["average"], model, self._spec, step=step, measured=measured
                )
                export_best(self._folder, best, model, self._spec, weights=best_weights)

        self._writing.start(write)
        self._saved_at, self._unsaved, self._asked = time.monotonic(), False, False

    def finish(self) -> None:
        """Waits until the checkpoint is written. At the end of a run, a failed save is an error.

        Raises:
            NotSavedError: the disk is full or fails.
        """
        self._writing.finish()

    def leave(self) -> None:
        """Waits until the checkpoint is written, before the run leaves or goes back; a failure is only a warning."""
        try:
            self._writing.finish()
        except (StoppedError, UserError) as error:
            print(f"distgan: warning: {error}", file=sys.stderr, flush=True)

    def settle(self) -> None:
        """Waits for the checkpoint that is being written. If it failed, marks it to be tried again.

        Raises:
            NotSavedError: it failed, and `checkpoint.on_error` is stop.
        """
        try:
            self._writing.finish()
        except NotSavedError as error:
            self._unsaved = True
            self._accept(error)

    def record(self, what: str, action: Callable[[], object]) -> None:
        """Writes something other than a checkpoint; a full disk ends the run only if `checkpoint.on_error` is stop.

        Raises:
            NotSavedError: it failed, and `checkpoint.on_error` is stop.
        """
        try:
            with self._folder.writing(f"{what} of step {self._state.step} could not be written"):
                action()
        except NotSavedError as error:
            self._accept(error)

    def _accept(self, error: NotSavedError) -> None:
        if self._config.checkpoint.on_error == "stop":
            raise error
        print(
            f"distgan: warning: {error} Training goes on; what was saved before is kept.", file=sys.stderr, flush=True
        )
