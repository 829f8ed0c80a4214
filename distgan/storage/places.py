"""Names the files and folders of a run, and tells whether a process writes it."""

import fcntl
import os
import re
from pathlib import Path

CHECKPOINT = re.compile(r"step_(\d{8,})")
"""The name of a checkpoint's folder, with its step."""


class Places:
    """The files and folders in a run's folder. Creating the object touches nothing on the disk.

    A run has config.yaml, metrics.jsonl, history.jsonl, samples/, checkpoints/, generator/ and .lock. It may have
    wandb/, generator-best/, extractor.safetensors, rollbacks.jsonl, metrics.abandoned.jsonl, report.html and, from a
    stop signal to the resume, `preempted`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.abandoned_metrics = self.path / "metrics.abandoned.jsonl"
        self.history = self.path / "history.jsonl"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.generator = self.path / "generator"
        self.extractor = self.path / "extractor.safetensors"
        self.generator_best = self.path / "generator-best"
        self.rollbacks = self.path / "rollbacks.jsonl"
        self.lock = self.path / ".lock"
        self.preempted = self.path / "preempted"
        self.report = self.path / "report.html"

    def writer(self) -> str | None:
        """Returns which process writes the run, such as "process 7 on host"; None if none does.

        The lock that tells is taken for an instant, shared with others who look; `RunFolder.claim` waits for that.

        Raises:
            OSError: it cannot be found out: the folder may not be read, or its file system has no locks.
        """
        try:
            stream = self.lock.open()
        except FileNotFoundError:
            return None
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return stream.read().strip() or "a process"
        return None
