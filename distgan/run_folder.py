"""The folder of a run: who may write it, what recipe it belongs to, where things lie in it.

config.yaml  metrics.jsonl  samples/  checkpoints/  generator/  wandb/  and, where they come about, generator-best/,
extractor.safetensors, rollbacks.jsonl and metrics.abandoned.jsonl; from a stop signal to the resume, preempted
"""

import fcntl
import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from distgan import checkpoint
from distgan import config as configuration
from distgan.config import Config
from distgan.paths import quoted


class RunFolder:
    """The places in a run's folder. Making one touches nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.generator = self.path / "generator"
        self.extractor = self.path / "extractor.safetensors"
        self.generator_best = self.path / "generator-best"
        self.rollbacks = self.path / "rollbacks.jsonl"
        self.lock = self.path / ".lock"
        self.preempted = self.path / "preempted"

    def check(self, config: Config) -> None:
        """Refuses a configuration that is not the run's own in what changes the mathematics.

        Raises:
            ValueError: it differs, with the differences and the ways on; or the folder is not a run's.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise ValueError(f"run.dir is {self.path}, which is a file.")
            saved = self.config.exists() and checkpoint.any_in(self.checkpoints)
        except OSError as error:
            raise ValueError(f"run.dir is {self.path}, which cannot be read: {error.strerror}.") from error
        if not saved:
            return  # nothing of it is saved yet, so nothing can be continued wrongly
        differences = configuration.mathematical_differences(configuration.load(self.config), config)
        if differences:
            longer = " for more steps of it --run.extend=N;" if config.optim.schedule == "constant" else ""
            raise ValueError(
                f"{self.path} is a run with another recipe ({'; '.join(differences)}): to continue it give its own "
                f"values;{longer} for a new run another --run.dir, and to start that from these weights "
                f"--train.init_from={quoted(self.path)}."
            )

    def claim(self, config: Config) -> "Claim":
        """Makes the folder this process's to write, checks the configuration again and records it.

        The claim ends with the process, however it ends, because the kernel holds it. Only for rank zero.

        Raises:
            ValueError: another process is writing it, the recipe is another, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stream = self.lock.open("a+")
        except OSError as error:
            raise ValueError(f"run.dir is {self.path}, which cannot be written: {error.strerror}.") from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise ValueError(
                f"{self.path} is being written by another run ({stream.read().strip()}): wait for it or stop it."
            ) from error
        except OSError as error:  # Lustre mounted without -o flock, say
            raise ValueError(
                f"{self.path} is on a file system without file locks ({error.strerror}), which keep two runs from "
                "writing one folder: choose a run.dir elsewhere, or have it mounted with them."
            ) from error
        self.check(config)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        # stop_at belongs to one invocation, not to the run.
        recorded = replace(config, run=replace(config.run, stop_at=None))
        replace_file(self.config, configuration.dump(recorded).encode())
        checkpoint.remove_leftovers(self.checkpoints)
        return Claim(self, stream)

    def keep_extractor(self, file: Path) -> None:
        """Keeps the classifier that the run measures itself by: trained elsewhere it could come out otherwise."""
        content = file.read_bytes()
        if not self.extractor.exists() or self.extractor.read_bytes() != content:
            replace_file(self.extractor, content, durable=True)

    def begin_anew(self) -> None:
        """Puts aside what is left of a run whose checkpoints were moved away."""
        for left in (self.rollbacks, self.generator_best):
            if left.exists():
                checkpoint.move_aside(left, "abandoned")


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
    replace_file(file, "".join(kept).encode())


def replace_file(file: Path, content: bytes, *, durable: bool = False) -> None:
    """Writes a file in one piece: readers find the old or the new one, whole; `durable`, also after a loss of power."""
    partial = file.with_name(file.name + ".tmp")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        if durable:
            os.fsync(stream.fileno())
    partial.replace(file)
    if durable:
        checkpoint.sync_folder(file.parent)
