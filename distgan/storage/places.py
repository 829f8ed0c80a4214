"""Names the files and folders of a run."""

import os
from pathlib import Path


class Places:
    """The files and folders in a run's folder. Creating the object touches nothing on the disk.

    A run has config.yaml, metrics.jsonl, samples/, checkpoints/, generator/ and .lock. It may have wandb/,
    generator-best/, extractor.safetensors, rollbacks.jsonl, metrics.abandoned.jsonl and, from a stop signal to the
    resume, `preempted`.
    """

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
