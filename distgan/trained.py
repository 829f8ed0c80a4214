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
    """Of its run; None where it lies neither in a run's folder nor beside its recipe, as one from the hub."""
    extractor: Path | None
    """Weights of the classifier that its run measured itself by, if it did."""
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
    exported, run = folder / "recipe.yaml", RunFolder(folder.absolute().parent)
    recipe = next((configuration.load(file) for file in (exported, run.config) if file.exists()), None)
    extractor = folder / run.extractor.name if exported.exists() else run.extractor
    step, shape, report = described["step"], Shape(**described["images"]), report_in(folder)
    if not raw:
        return Trained(generator, shape, step, recipe, extractor, report if report and report["step"] == step else None)
    newest = checkpoint.newest(RunFolder(path).checkpoints, set_aside=False)
    if newest is None:
        raise ValueError(f"the raw weights are asked for, but {path} is not the folder of a run with checkpoints.")
    checkpoint.load(newest, networks={"generator": generator}, optimizers={})
    return Trained(generator, shape, checkpoint.step_of(newest), recipe, extractor, None)


def report_in(folder: Path) -> dict[str, Any] | None:
    """Reads what was measured of the generator in a folder, as `Measured.report` has it.

    Raises:
        ValueError: it is something else.
    """
    file = folder / "evaluation.json"
    try:
        report = json.loads(file.read_text())
        assert report.keys() >= {"step", "metrics", "floor", "protocol"}
        return report
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{file} is not what `distgan evaluate --json` writes.") from error


def step_of(folder: Path) -> int | None:
    """Reads the step of the generator in a folder; None if there is none, or it is damaged."""
    try:
        return json.loads((folder / "config.json").read_text())["step"]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError):
        return None
