"""How a run's evaluations went, and its best generator."""

from collections.abc import Mapping
from typing import Any

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
        self.last = report
        comparable = self.best is not None and self.best["protocol"] == report["protocol"]
        if not comparable or self._better(report):
            self.best = report

    @property
    def best_step(self) -> int | None:
        return self.best["step"] if self.best is not None else None

    @property
    def behind(self) -> float:
        """How many times as bad as the best the last is: 1 at the best, or where there is nothing to tell by."""
        if self.best is None or self.last is None:
            return 1.0
        best, last = (report["metrics"][self._metric] for report in (self.best, self.last))
        error = self.last["metrics"].get(f"{self._metric}_error", 0.0)
        if min(best, last) <= 0 or (error and last - best < _ERRORS * error):
            return 1.0
        return best / last if self._metric in _HIGHER_IS_BETTER else last / best

    def say(self) -> str | None:
        """For the user; None where nothing was evaluated."""
        if self.best is None or self.last is None:
            return None
        best, last = (report["metrics"][self._metric] for report in (self.best, self.last))
        said = f"{self._metric} {best:.5g} at step {self.best['step']}"
        if self.last["step"] == self.best["step"]:
            return f"{said}, the last evaluation"
        return f"{said}; the last, at step {self.last['step']}, is {last:.5g}, {self.behind:.2f} times as bad"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"metric": self._metric, "best": self.best, "last": self.last}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes it up again, where it is about the same metric."""
        if state["metric"] == self._metric:
            self.best, self.last = state["best"], state["last"]

    def _better(self, report: dict[str, Any]) -> bool:
        assert self.best is not None
        new, old = (one["metrics"][self._metric] for one in (report, self.best))
        return new > old if self._metric in _HIGHER_IS_BETTER else new < old


def export_best(folder: RunFolder, best: dict[str, Any] | None, model: ModelConfig, shape: Shape) -> bool:
    """Has `generator-best/` be the one of that report, also after a kill; whether it could. For rank zero alone."""
    there = trained.report_in(folder.generator_best)
    if best is None or (there is not None and all(there[part] == best[part] for part in ("step", "protocol"))):
        return True
    weights = folder.checkpoints / f"step_{best['step']:08d}" / "average.safetensors"
    if not weights.exists():
        return False
    if there is not None and there["protocol"] != best["protocol"]:  # nobody can tell which is better
        checkpoint.move_aside(folder.generator_best, "abandoned")
    tensors = checkpoint.read_tensors(weights)
    checkpoint.save_generator(folder.generator_best, tensors, model, shape, step=best["step"], measured=best)
    return True


def bring_back_best(
    folder: RunFolder, best: dict[str, Any] | None, model: ModelConfig, shape: Shape, *, at: int
) -> bool:
    """The same for a run that goes on at a step: a best generator that a rollback gave up is put aside first."""
    there = trained.report_in(folder.generator_best)
    if there is not None and there["step"] > at:
        checkpoint.move_aside(folder.generator_best, "abandoned")
    return export_best(folder, best, model, shape)
