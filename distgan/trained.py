"""A trained generator as a user names it: by its run's folder, an exported folder, or its id on the hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distgan import checkpoint
from distgan import config as configuration
from distgan.config import Config
from distgan.models import Generator, Shape
from distgan.run_folder import RunFolder


@dataclass(frozen=True)
class Trained:
    """A generator and where it came from."""

    generator: Generator
    """In eval mode, on the CPU."""
    shape: Shape
    step: int
    """At which it was saved."""
    recipe: Config | None
    """Of its run; None where it lies neither in a run's folder nor was exported with its recipe."""
    evaluation: dict[str, Any] | None
    """What was measured of it, as `Measured.report` has it, if anything was."""


def find(path: str, *, raw: bool = False) -> Trained:
    """Loads a generator, with its averaged weights or a run's raw ones.

    Raises:
        ValueError: there is none, or no checkpoint with raw weights.
    """
    generator = checkpoint.load_generator(path)
    folder = checkpoint.exported_folder(path)
    described = json.loads((folder / "config.json").read_text())
    candidates = [folder / "recipe.yaml", folder.absolute().parent / "config.yaml"]
    recipe = next((configuration.load(file) for file in candidates if file.exists()), None)
    step, shape = described["step"], Shape(**described["images"])
    if not raw:
        return Trained(generator, shape, step, recipe, _evaluation(folder, step))
    newest = checkpoint.newest(RunFolder(path).checkpoints, set_aside=False)
    if newest is None:
        raise ValueError(f"the raw weights are asked for, but {path} is not the folder of a run with checkpoints.")
    checkpoint.load(newest, networks={"generator": generator}, optimizers={})
    return Trained(generator, shape, checkpoint.step_of(newest), recipe, None)


def _evaluation(folder: Path, step: int) -> dict[str, Any] | None:
    """What lies beside the weights, if it is about them."""
    file = folder / "evaluation.json"
    report = json.loads(file.read_text()) if file.exists() else None
    return report if report is not None and report["step"] == step else None
