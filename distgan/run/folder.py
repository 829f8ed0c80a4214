"""The folder of a run: who may write it, and what recipe it belongs to."""

import contextlib
import fcntl
import json
import os
import socket
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


class RunFolder(Places):
    """A run's folder, for those who write it. Making one touches nothing."""

    def check(self, config: Config) -> None:
        """Refuses a configuration that is not the run's own in what changes the mathematics.

        Raises:
            UserError: it differs, with the differences and the ways on; or the folder is not a run's.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"run.dir is {self.path}, which is a file.")
            saved = self.config.exists() and checkpoint.any_in(self.checkpoints)
        except OSError as error:
            raise UserError(f"run.dir is {self.path}, which cannot be read: {error.strerror}.") from error
        if not saved:
            return  # nothing of it is saved yet, so nothing can be continued wrongly
        differences = recipe.mathematical_differences(recipe.load(self.config), config)
        if differences:
            longer = " for more steps of it --run.extend=N;" if config.optim.schedule == "constant" else ""
            raise UserError(
                f"{self.path} is a run with another recipe ({'; '.join(differences)}): to continue it give its own "
                f"values;{longer} for a new run another --run.dir, and to start that from these weights "
                f"--train.init_from={quoted(self.path)}."
            )

    def claim(self, config: Config) -> "Claim":
        """Makes the folder this process's to write, checks the configuration again and records it.

        The claim ends with the process, however it ends, because the kernel holds it. Only for rank zero.

        Raises:
            UserError: another process is writing it, the recipe is another, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stream = self.lock.open("a+")
        except OSError as error:
            raise UserError(f"run.dir is {self.path}, which cannot be written: {error.strerror}.") from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise UserError(
                f"{self.path} is being written by another run ({stream.read().strip()}): wait for it or stop it."
            ) from error
        except OSError as error:  # Lustre mounted without -o flock, say
            raise UserError(
                f"{self.path} is on a file system without file locks ({error.strerror}), which keep two runs from "
                "writing one folder: choose a run.dir elsewhere, or have it mounted with them."
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
        """Keeps the classifier that the run measures itself by: trained elsewhere it could come out otherwise."""
        content = file.read_bytes()
        if not self.extractor.exists() or self.extractor.read_bytes() != content:
            files.replace(self.extractor, content, durable=True)

    def mark_preempted(self, step: int) -> None:
        """Leaves the marker of a run that a stop signal ended, for whoever submits it again."""
        self.preempted.write_text(json.dumps({"step": step}) + "\n")

    @contextlib.contextmanager
    def writing(self, failed: str | None = None) -> Iterator[None]:
        """Wraps what is written here.

        Args:
            failed: what to say if it fails, such as "step 4 could not be saved"; if unset, that the folder cannot be
                written.

        Raises:
            NotSavedError: the disk is full or fails.
        """
        try:
            yield
        except OSError as error:
            said = f"{failed} in {self.path}" if failed is not None else f"{self.path} cannot be written"
            raise NotSavedError(f"{said} ({error.strerror}).") from error

    def describe(self, best: str | None) -> str:
        """Returns each place, and the command to look at it, for the user; `best` is said of the best generator."""
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
        """Puts aside what is left of a run whose checkpoints were moved away."""
        for left in (self.rollbacks, self.generator_best):
            if left.exists():
                files.move_aside(left, "abandoned")


class Claim:
    """The right to write a run's folder; keep it as long as something is written."""

    def __init__(self, folder: RunFolder, lock: IO[str]) -> None:
        self.folder = folder
        self._lock = lock

    def release(self) -> None:
        self._lock.close()


def cut_metrics(file: Path, step: int, *, abandoned: bool = False) -> None:
    """Cuts metrics.jsonl back to a step, so that each step stands there once after a resume.

    What is `abandoned` by a rollback goes to metrics.abandoned.jsonl; after a resume the same comes again.
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
