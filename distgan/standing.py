"""How a run's evaluations went, and its best generator."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from distgan import checkpoint, trained
from distgan.config import EvalConfig, ModelConfig
from distgan.models import Shape
from distgan.run_folder import RunFolder

_HIGHER_IS_BETTER = ("is", "is_classifier")
_ERRORS = 4  # standard errors by which a kernel's distance, whose truth may be zero, must have grown to have grown


class Standing:
    """A run's best and last evaluation, as `Measured.report` has them, by the metric that says which is best."""

    def __init__(self, config: EvalConfig) -> None:
        self._metric = config.measured[0]
        self.best: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None

    def add(self, report: dict[str, Any]) -> None:
        """Takes in an evaluation. One of another protocol cannot be compared with the best, and begins a new one."""
        report = {**report, "best_by": self._metric}
        self.last = report
        comparable = self.best is not None and self.best["protocol"] == report["protocol"]
        if not comparable or self._better(report):
            self.best = report

    @property
    def best_step(self) -> int | None:
        return self.best["step"] if self.best is not None else None

    @property
    def behind(self) -> float:
        """Returns how many times as bad as the best the last is: 1 if they are equal or there is nothing to compare."""
        if self.best is None or self.last is None:
            return 1.0
        best, last = (report["metrics"][self._metric] for report in (self.best, self.last))
        error = self.last["metrics"].get(f"{self._metric}_error", 0.0)
        if min(best, last) <= 0 or (error and last - best < _ERRORS * error):
            return 1.0
        return best / last if self._metric in _HIGHER_IS_BETTER else last / best

    def say(self) -> str | None:
        """Says it for the user; None if nothing was evaluated."""
        if self.best is None or self.last is None:
            return None
        best, last = (report["metrics"][self._metric] for report in (self.best, self.last))
        said = f"{self._metric} {best:.5g} at step {self.best['step']}"
        if self.last["step"] == self.best["step"]:
            return f"{said}, the last evaluation"
        return f"{said}; the last, at step {self.last['step']}, is {last:.5g}, {self.behind:.2f} times as bad"

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of it."""
        return {"metric": self._metric, "best": self.best, "last": self.last}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes it up again, where it is about the same metric."""
        if state["metric"] == self._metric:
            self.best, self.last = state["best"], state["last"]

    def _better(self, report: dict[str, Any]) -> bool:
        assert self.best is not None
        new, old = (one["metrics"][self._metric] for one in (report, self.best))
        return new > old if self._metric in _HIGHER_IS_BETTER else new < old


def export_best(
    folder: RunFolder,
    best: dict[str, Any] | None,
    model: ModelConfig,
    shape: Shape,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> bool:
    """Writes `generator-best/` to match the best report. Returns False if that step's weights no longer exist.

    For rank zero alone.

    Args:
        folder: of the run.
        best: the report, None where nothing was evaluated.
        model, shape: what builds the generator.
        weights: the averaged ones of that step; out of its checkpoint where they are not at hand.
    """
    there = _report(folder.generator_best)
    if best is None or (there is not None and all(there.get(part) == best[part] for part in best)):
        return True
    file = folder.checkpoints / f"step_{best['step']:08d}" / "average.safetensors"
    if weights is None and not file.exists():
        return False
    if there is not None and any(there.get(part) != best[part] for part in ("protocol", "best_by")):
        checkpoint.move_aside(folder.generator_best, "abandoned")  # nobody can tell which is better
    tensors = weights if weights is not None else checkpoint.read_tensors(file)
    checkpoint.save_generator(folder.generator_best, tensors, model, shape, step=best["step"], measured=best)
    return True


def bring_back_exports(folder: RunFolder, found: Path, standing: Standing, model: ModelConfig, shape: Shape) -> bool:
    """Restores both exported generators after a kill or a rollback. Returns False if the best one is lost.

    A best generator that a rollback gave up is put aside. For rank zero alone.
    """
    step, last = checkpoint.step_of(found), standing.last
    if trained.step_of(folder.generator) != step:
        measured = last if last is not None and last["step"] == step else None
        weights = checkpoint.read_tensors(found / "average.safetensors")
        checkpoint.save_generator(folder.generator, weights, model, shape, step=step, measured=measured)
    if (best_step := trained.step_of(folder.generator_best)) is not None and best_step > step:
        checkpoint.move_aside(folder.generator_best, "abandoned")
    return export_best(folder, standing.best, model, shape)


def _report(folder: Path) -> dict[str, Any] | None:
    try:
        return trained.report_in(folder)
    except ValueError:  # it is written anew
        return None
