"""Where a run is recorded besides metrics.jsonl: TensorBoard, trackio and MLflow; wandb has a file of its own.

Each is Accelerate's tracker, with what that loses added. They are not started through the Accelerator, which starts and
writes all of them in one go, so that one that fails would take the others with it.

A tracker keeps one run across resumes. What a crash made a run repeat is not recorded twice: TensorBoard hides the
first record, trackio and MLflow are not given the second one, and wandb drops it by itself, if it is online.
"""

import contextlib
import importlib.util
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import MLflowTracker, TensorBoardTracker, TrackioTracker
from PIL import Image

from distgan import recipe
from distgan.errors import UserError
from distgan.paths import quoted
from distgan.recipe import Config, TrackConfig


def check(track: TrackConfig) -> None:
    """Checks that the libraries of all trackers are installed.

    Raises:
        UserError: one is not; the message says how to install it.
    """
    for name in track.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"track.to has {name}, which is not installed: run pip install 'distgan[{name}]', or leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """What trackers are told of a run when they start."""

    id: str
    """The run's id; the same after a resume."""
    new: bool
    """Whether no tracker has seen the run before."""
    folder: Path
    config: Config
    step: int
    """The last step whose metrics stay."""
    lost: int
    """The number of steps that rollbacks took back. They are added to the steps of trackers that cannot go back."""
    tags: list[str] = field(init=False)
    """`track.tags`, the seed, and the number of the Slurm job or array."""

    def __post_init__(self) -> None:
        job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
        own = [f"seed-{self.config.run.seed}", *([f"slurm-{job}"] if job else [])]
        object.__setattr__(self, "tags", list(dict.fromkeys([*self.config.track.labels, *own])))

    @property
    def name(self) -> str:
        """Returns the name that the run is shown by."""
        return self.folder.name

    @property
    def group(self) -> str | None:
        """Returns the name that runs are grouped by: `track.group`, else WANDB_RUN_GROUP; None without either."""
        return self.config.track.group or os.environ.get("WANDB_RUN_GROUP") or None

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the recipe by dotted keys."""
        return recipe.flat(recipe.as_dict(self.config))


class Recorder:
    """One tracker, started. What a tracker has no place for is not recorded there."""

    name: str
    """Its name in `track.to`."""

    def __init__(self, run: Tracked) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float], described: Mapping[str, Any]) -> None:
        """Records numbers by name, and what describes how they were measured."""
        raise NotImplementedError

    def picture(self, step: int, picture: Image.Image, caption: str) -> None:
        """Records the sample grid."""
        raise NotImplementedError

    def alert(self, step: int, what: str) -> None:
        """Records a warning."""

    def keep(self, what: str, folder: Path, step: int) -> None:
        """Keeps a copy of a folder, such as `generator`."""

    def finish(self) -> None:
        """Sends or writes what is pending."""
        raise NotImplementedError


class TensorBoard(Recorder):
    """Event files in the run's folder, one more for each resume. Steps are the run's own, also after a rollback.

    Accelerate's `store_init_configuration` is not used: it refuses lists, and makes another run of each resume. Its
    `log` would make a run of each entry of a dictionary.
    """

    name = "tensorboard"

    def __init__(self, run: Tracked) -> None:
        super().__init__(run)
        # From the first step that is repeated on, what earlier files have is hidden.
        self._tracker = TensorBoardTracker(self.name, str(run.folder), purge_step=run.step + 1)
        self._tracker.start()
        self._tracker.log({"recipe": _indented(recipe.dump(run.config))}, step=run.step)
        print(f"tensorboard: look at it with tensorboard --logdir {quoted(run.folder / self.name)}", flush=True)

    def log(self, step: int, metrics: Mapping[str, float], described: Mapping[str, Any]) -> None:
        texts = {name: _indented(json.dumps(value, indent=2)) for name, value in described.items()}
        self._tracker.log({**metrics, **texts}, step=step)

    def picture(self, step: int, picture: Image.Image, caption: str) -> None:
        pixels = np.asarray(picture)
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        self._tracker.log_images({"samples": pixels[None]}, step=step, dataformats="NHWC")
        self._tracker.log({"samples/caption": caption}, step=step)

    def alert(self, step: int, what: str) -> None:
        self._tracker.log({"alert": what}, step=step)

    def finish(self) -> None:
        self._tracker.finish()


class Trackio(Recorder):
    """A run in trackio's own place: TRACKIO_DIR, TRACKIO_SERVER_URL or TRACKIO_SPACE_ID, or its cache.

    Accelerate's `store_init_configuration` is not used: it adds an entry `allow_val_change`. It has no images.
    """

    name = "trackio"

    def __init__(self, run: Tracked) -> None:
        super().__init__(run)
        track = run.config.track
        name = f"{run.name}-{run.id}"  # trackio knows a run by its name alone
        settings = {"config": run.settings | {"tags": run.tags}, "group": run.group}
        self._tracker = TrackioTracker(track.project, name=name, resume="allow", embed=False, **settings)
        with _silent():
            self._tracker.start()
        self._recorded = self._tracker.tracker._next_step - 1  # it has no public way to ask; -1 for a new run
        print(f"trackio: look at it with trackio show --project {quoted(track.project)}", flush=True)

    def log(self, step: int, metrics: Mapping[str, float], described: Mapping[str, Any]) -> None:
        own = {name: value for name, value in metrics.items() if name != "step"}  # a name that trackio keeps to itself
        self._record(step, {**own, **described})

    def picture(self, step: int, picture: Image.Image, caption: str) -> None:
        import trackio

        self._record(step, {"samples": trackio.Image(picture, caption=caption)})

    def alert(self, step: int, what: str) -> None:
        import trackio

        with _silent():
            trackio.alert(f"{self._run.name}: trouble", text=f"at step {step} {what}", level=trackio.AlertLevel.WARN)

    def finish(self) -> None:
        import trackio

        with _silent():
            trackio.finish()  # Accelerate's would let it be finished again, and say so, when Python ends

    def _record(self, step: int, values: dict[str, Any]) -> None:
        at = step + self._run.lost
        if at > self._recorded:
            with _silent():
                self._tracker.log(values, step=at)


class MLflow(Recorder):
    """A run in MLFLOW_TRACKING_URI, or in a SQLite file in the run's folder.

    Accelerate finds a run again only by MLflow's own id, and has no images with steps: both are added.
    """

    name = "mlflow"

    def __init__(self, run: Tracked) -> None:
        super().__init__(run)
        import mlflow

        track, folder, place = run.config.track, run.folder / self.name, None
        # Training waits while MLflow does, which tries for minutes to reach a server.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            folder.mkdir(exist_ok=True)
            place = (folder / "artifacts").resolve().as_uri()
            mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        client = mlflow.MlflowClient()
        found = None if run.new else _in_mlflow(client, track.project, run.id)
        tags = {"distgan.id": run.id, "tags": ",".join(run.tags), **({"group": run.group} if run.group else {})}
        self._tracker = MLflowTracker(track.project, logging_dir=place, run_id=found, run_name=run.name, tags=tags)
        self._tracker.start()
        if found is None:  # a parameter cannot be changed
            self._tracker.store_init_configuration(run.settings)
        id_there = self._tracker.tracker.info.run_id
        self._recorded = max((one.step for one in client.get_metric_history(id_there, "step")), default=-1)
        where = f" --backend-store-uri {quoted(mlflow.get_tracking_uri())}" if place else ""
        print(f"mlflow: look at it with mlflow ui{where}", flush=True)

    def log(self, step: int, metrics: Mapping[str, float], described: Mapping[str, Any]) -> None:
        import mlflow

        at = step + self._run.lost
        if at > self._recorded:
            mlflow.set_tags({name: json.dumps(value) for name, value in described.items()})
            self._tracker.log(dict(metrics), step=at)

    def picture(self, step: int, picture: Image.Image, caption: str) -> None:
        import mlflow

        at = step + self._run.lost
        if at > self._recorded:
            mlflow.log_image(picture, key="samples", step=at)

    def alert(self, step: int, what: str) -> None:
        import mlflow

        mlflow.set_tag("alert", f"at step {step} {what}")

    def keep(self, what: str, folder: Path, step: int) -> None:
        self._tracker.log_artifacts(str(folder), artifact_path=what)

    def finish(self) -> None:
        self._tracker.finish()


def _in_mlflow(client: Any, experiment: str, id_here: str) -> str | None:
    """Finds MLflow's id of a run by ours."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return None
    runs = client.search_runs([found.experiment_id], f"tags.`distgan.id` = '{id_here}'", max_results=1)
    return runs[0].info.run_id if runs else None


def _indented(text: str) -> str:
    """Returns a text as Markdown that shows it as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drops what trackio prints, in colours, also into files."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
