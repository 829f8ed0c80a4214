"""Where things lie in a run's folder."""

import os
from pathlib import Path


class Places:
    """The places in a run's folder. Making one touches nothing.

    config.yaml  metrics.jsonl  samples/  checkpoints/  generator/  wandb/  and, where they come about, generator-best/,
    extractor.safetensors, rollbacks.jsonl and metrics.abandoned.jsonl; from a stop signal to the resume, preempted
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
