"""The folder of a run: which process may write it, and which recipe it belongs to."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from distgan import files, recipe
from distgan.errors import NotSavedError, UserError
from distgan.paths import quoted
from distgan.recipe import Config
from distgan.storage import checkpoint
from distgan.storage.places import Places

_LOOKING = 1.0  # seconds after which a lock is taken for that of a run, and not of somebody who looks


class RunFolder(Places):
    """A run's folder with the methods that write it. Creating the object touches nothing on the disk."""

    def check(self, config: Config) -> None:
        """Refuses a recipe that would train differently from the one saved in the folder.

        Raises:
            UserError: the recipes differ (the message lists how, and what to do), or the path is not a folder.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"run.dir is {self.path}, which is a file: choose another.")
            saved = self.config.exists() and checkpoint.any_in(self.checkpoints)
        except OSError as error:
            raise UserError(
                f"run.dir is {self.path}, which cannot be read ({error.strerror}): choose another."
            ) from error
        if not saved:
            return  # there is no checkpoint yet, so nothing can be continued wrongly
        differences = recipe.mathematical_differences(recipe.load(self.config), config)
        if differences:
            longer = " To train it longer, give --run.extend=N." if config.optim.schedule == "constant" else ""
            raise UserError(
                f"{self.path} is a run with another recipe ({'; '.join(differences)}). To continue it, give its own "
                f"values.{longer} For a new run, give another --run.dir; to start that from these weights, add "
                f"--train.init_from={quoted(self.path)}."
            )

    def claim(self, config: Config) -> "Claim":
        """Locks the folder for this process, checks the recipe again and saves it.

        The kernel holds the lock, so that it ends with the process, however that ends. Rank zero only.

        Raises:
            UserError: another process has the lock, the recipe differs, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stream = self.lock.open("a+")
        except OSError as error:
            raise UserError(
                f"run.dir is {self.path}, which cannot be written ({error.strerror}): choose another."
            ) from error
        try:
            _lock(stream)
        except BlockingIOError as error:
            stream.seek(0)
            raise UserError(
                f"{self.path} is being written by another run ({stream.read().strip()}): wait for it or stop it."
            ) from error
        except OSError as error:  # Lustre mounted without -o flock, say
            raise UserError(
                f"{self.path} is on a file system without file locks ({error.strerror}), and without them two runs "
                "could write one folder: choose a run.dir elsewhere, or mount the file system with locks."
            ) from error
        self.check(config)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        # stop_at belongs to one invocation, not to the run.
        recorded = replace(config, run=replace(config.run, stop_at=None))
        files.replace(self.config, recipe.dump(recorded).encode())
        checkpoint.remove_leftovers(self.checkpoints)
        for folder in (self.path, self.generator, self.generator_best):
            files.remove_leftovers(folder)
        return Claim(self, stream)

    def keep_extractor(self, file: Path) -> None:
        """Keeps a copy of the classifier that the run is measured by: trained on another machine, it could differ."""
        content = file.read_bytes()
        if not self.extractor.exists() or self.extractor.read_bytes() != content:
            files.replace(self.extractor, content, durable=True)

    def mark_preempted(self, step: int) -> None:
        """Leaves a marker that a stop signal ended the run, for the script that submits it again."""
        self.preempted.write_text(json.dumps({"step": step}) + "\n")

    @contextlib.contextmanager
    def writing(self, failed: str | None = None) -> Iterator[None]:
        """Wraps writing into the folder, and turns its errors into one sentence.

        Args:
            failed: the beginning of that sentence, such as "step 4 could not be saved". If unset, it says that the
                folder cannot be written.

        Raises:
            NotSavedError: the disk is full or fails.
        """
        try:
            yield
        except OSError as error:
            said = f"{failed} in {self.path}" if failed is not None else f"{self.path} cannot be written"
            raise NotSavedError(f"{said} ({error.strerror}): make room, or repair the disk.") from error

    def describe(self, best: str | None) -> str:
        """Lists for the user what is in the folder, with the command to look at each; `best` describes the best."""
        lines = []
        pictures = [quoted(picture) for picture in sorted(self.samples.glob("step_????????.png"))]
        if pictures:
            lines += [f"  sample grid   {pictures[-1]}", f"                see it: xdg-open {pictures[-1]}"]
        lines += [
            f"  checkpoints   {quoted(self.checkpoints)}",
            f"                list them: ls {quoted(self.checkpoints)}",
            f"  generator     {quoted(self.generator)}",
            f"                draw from it: distgan sample {quoted(self.path)} --num 64 --out grid.png",
        ]
        if best:
            lines += [f"  best          {best}", f"                its generator: {quoted(self.generator_best)}"]
        lines += [
            f"  metrics       {quoted(self.metrics)}",
            f"                the last line: tail -n 1 {quoted(self.metrics)}",
        ]
        for run in map(quoted, sorted((self.path / "wandb").glob("offline-run-*"))[-1:]):
            lines += [
                f"  wandb         {run}",
                f"                browse it: wandb leet {run}; upload it: wandb sync {run}",
            ]
        return "\n".join(lines)

    def begin_anew(self) -> None:
        """Moves aside what is left of an earlier run in this folder whose checkpoints are gone."""
        for left in (self.rollbacks, self.generator_best):
            if left.exists():
                files.move_aside(left, "abandoned")


class Claim:
    """The lock on a run's folder. Keep it as long as anything is written there."""

    def __init__(self, folder: RunFolder, lock: IO[str]) -> None:
        self.folder = folder
        self._lock = lock

    def release(self) -> None:
        self._lock.close()


def _lock(stream: IO[str]) -> None:
    """Locks a file for this process. Who only looks (`Places.writer`) holds a lock for an instant, which is waited for.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file system has no locks.
    """
    until = time.monotonic() + _LOOKING
    while True:
        try:
            return fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
        time.sleep(_LOOKING / 20)


def cut_metrics(file: Path, step: int, *, abandoned: bool = False) -> None:
    """Cuts metrics.jsonl back to a step, so that it has each step once after a resume.

    After a rollback (`abandoned`), the lines that are cut go to metrics.abandoned.jsonl. After a resume they are
    dropped, because the same steps will write them again.
    """
    if not file.exists():
        return
    kept: list[str] = []
    cut: list[str] = []
    for line in file.read_text().splitlines():
        try:
            record: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:  # the end of a line that a kill cut short
            continue
        (kept if record["step"] <= step else cut).append(line + "\n")
    if abandoned:
        with file.with_suffix(".abandoned.jsonl").open("a") as stream:
            stream.writelines(cut)
    files.replace(file, "".join(kept).encode())
