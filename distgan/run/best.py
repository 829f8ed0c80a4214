"""Keeps the best and the last evaluation of a run, and exports the best generator."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from distgan import files
from distgan.errors import UserError
from distgan.models import ImageSpec
from distgan.recipe import HIGHER_IS_BETTER, EvalConfig, ModelConfig
from distgan.storage import checkpoint, exported, tensors
from distgan.storage import report as reports
from distgan.storage.places import Places
from distgan.storage.report import Report

_ERRORS = 4  # standard errors by which a kernel distance, which may truly be 0, must grow to count as worse


class BestSoFar:
    """A run's best and last evaluation, by the metric that says which is best."""

    def __init__(self, config: EvalConfig) -> None:
        self._metric = config.measured[0]
        self.best: Report | None = None
        self.last: Report | None = None

    def add(self, report: Report) -> None:
        """Adds an evaluation. It becomes the best if it is better, or if it has another protocol than the best one."""
        self.last = replace(report, best_by=self._metric)
        if self.best is None or not self.best.comparable_to(report) or self._better(report, self.best):
            self.best = self.last

    @property
    def best_step(self) -> int | None:
        """Returns the step of the best evaluation; None before the first evaluation."""
        return self.best.step if self.best is not None else None

    def at(self, step: int) -> Report | None:
        """Returns the last evaluation if it is of this step."""
        return self.last if self.last is not None and self.last.step == step else None

    @property
    def behind(self) -> float:
        """Returns how many times as bad as the best the last evaluation is; 1 if they do not clearly differ."""
        if self.best is None or self.last is None:
            return 1.0
        best, last = (report.metrics[self._metric] for report in (self.best, self.last))
        error = self.last.metrics.get(f"{self._metric}_error", 0.0)
        if min(best, last) <= 0 or (error and last - best < _ERRORS * error):
            return 1.0
        return best / last if self._metric in HIGHER_IS_BETTER else last / best

    def say(self) -> str | None:
        """Describes best and last evaluation for the user; None if nothing was evaluated."""
        if self.best is None or self.last is None:
            return None
        best, last = (report.metrics[self._metric] for report in (self.best, self.last))
        said = f"{self._metric} {best:.5g} at step {self.best.step}"
        if self.last.step == self.best.step:
            return f"{said}, the last evaluation"
        return f"{said}; the last, at step {self.last.step}, is {last:.5g}, {self.behind:.2f} times as bad"

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the evaluations."""
        best, last = (report.to_json() if report is not None else None for report in (self.best, self.last))
        return {"metric": self._metric, "best": best, "last": last}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state if it is about the same metric."""
        if state["metric"] == self._metric:
            self.best, self.last = (
                Report.from_json(state[which]) if state[which] is not None else None for which in ("best", "last")
            )

    def _better(self, new: Report, old: Report) -> bool:
        a, b = new.metrics[self._metric], old.metrics[self._metric]
        return a > b if self._metric in HIGHER_IS_BETTER else a < b


def export_best(
    folder: Places,
    best: Report | None,
    model: ModelConfig,
    spec: ImageSpec,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> bool:
    """Writes `generator-best/` to match the best report. Returns False if that step's weights no longer exist.

    Rank zero only.

    Args:
        folder: the run's folder.
        best: the best report; None if nothing was evaluated.
        model: the recipe's model group.
        spec: the images that the generator draws.
        weights: the averaged weights of that step; if unset, they are read from its checkpoint.
    """
    there = _report(folder.generator_best)
    if best is None or there == best:
        return True
    file = checkpoint.folder_of(folder.checkpoints, best.step) / "average.safetensors"
    if weights is None and not file.exists():
        return False
    if there is not None and not (there.comparable_to(best) and there.best_by == best.best_by):
        files.move_aside(folder.generator_best, "abandoned")  # nobody can tell which is better
    average = weights if weights is not None else tensors.read(file)
    exported.save_generator(folder.generator_best, average, model, spec, step=best.step, measured=best)
    return True


def restore_exports(folder: Places, found: Path, so_far: BestSoFar, model: ModelConfig, spec: ImageSpec) -> bool:
    """Restores both exported generators after a kill or a rollback. Returns False if the best one is lost.

    A best generator of a later step than the restored checkpoint is moved aside. Rank zero only.
    """
    step = checkpoint.step_of(found)
    if exported.step_of(folder.generator) != step:
        weights = tensors.read(found / "average.safetensors")
        exported.save_generator(folder.generator, weights, model, spec, step=step, measured=so_far.at(step))
    if (best_step := exported.step_of(folder.generator_best)) is not None and best_step > step:
        files.move_aside(folder.generator_best, "abandoned")
    return export_best(folder, so_far.best, model, spec)


def _report(folder: Path) -> Report | None:
    try:
        return reports.read(folder)
    except UserError:  # damaged, so the best generator is exported again
        return None
