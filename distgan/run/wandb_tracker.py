"""Records a run in wandb, online or offline."""

import netrc
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from accelerate.tracking import WandBTracker
from PIL import Image
from pydantic import ValidationError

from distgan import recipe
from distgan.errors import UserError
from distgan.recipe import EVAL_METRICS, HIGHER_IS_BETTER
from distgan.run.trackers import Recorder, Tracked

_PATIENCE = 60.0  # seconds that a run waits for wandb's server at its end
_PATIENCE_WITH_FILES = 600.0  # the same if it sends `track.artifacts`
_NO_PANELS = ("step", "images_seen", "eval/protocol.*", "lr/*", "ramp/*")  # what no one looks for first


def check() -> None:
    """Checks wandb's environment variables.

    Raises:
        UserError: wandb would refuse one of them; the message names it.
    """
    import wandb

    for name, value in os.environ.items():
        if name.startswith("WANDB_"):
            try:
                wandb.Settings().update_from_env_vars({name: value})
            except Exception as error:  # wandb's, and pydantic's of many lines
                said = "; ".join(one["msg"] for one in error.errors()) if isinstance(error, ValidationError) else error
                shown = "set to a value that" if "KEY" in name else f"{value!r}, which"
                raise UserError(f"{name} is {shown} wandb refuses ({said}): correct or unset it.") from error


def wandb_mode() -> str:
    """Returns wandb's mode: `disabled` by WANDB_DISABLED, else WANDB_MODE, else `online` with a key, else `offline`.

    wandb itself fails without a key, and no longer knows WANDB_DISABLED, which many scripts set.
    """
    import wandb

    if os.environ.get("WANDB_DISABLED", "").strip().lower() not in ("", "0", "f", "false", "n", "no", "none", "off"):
        return "disabled"
    if mode := os.environ.get("WANDB_MODE"):
        return {"dryrun": "offline", "run": "online"}.get(mode, mode)  # older names
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    own = os.environ.get("WANDB_BASE_URL")
    servers = [own] if own else [wandb.Settings().base_url, "https://api.wandb.ai"]  # today's, and that of older logins
    try:
        keys = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return "offline"
    return "online" if any(keys.authenticators(urlparse(server).hostname or "") for server in servers) else "offline"


class Wandb(Recorder):
    """A run of wandb's. Its steps, which cannot go back, count those that rollbacks took back, too.

    Accelerate's tracker cannot say which numbers are the axis and which are best when small, and its images have no
    captions.
    """

    name = "wandb"

    def __init__(self, run: Tracked) -> None:
        """Starts it online if that is wanted and the server answers, otherwise offline."""
        super().__init__(run)
        import wandb

        mode = wandb_mode()
        if mode == "offline":
            asked = "as WANDB_MODE asks" if os.environ.get("WANDB_MODE") else "no key found"
            self._say_offline(f"{asked}; `wandb login` or WANDB_API_KEY sends runs to the server")
        try:
            self._start(mode)
        except Exception as error:  # of many kinds, from wandb's service
            if mode not in ("online", "shared"):
                raise
            self._say_offline(f"the server cannot be reached: {' '.join(str(error).split())[:200]}")
            wandb.teardown()  # its service would still hold the id
            self._start(mode := "offline")
        self._mode = mode
        if mode == "online":
            print(f"wandb: {self._tracker.tracker.url}", flush=True)

    def log(self, step: int, metrics: Mapping[str, float], described: Mapping[str, Any]) -> None:
        self._tracker.log({**metrics, **described}, step=step + self._run.lost)

    def picture(self, step: int, picture: Image.Image, caption: str) -> None:
        import wandb

        # Images on which the axis is missing would be drawn beside it.
        seen = step * self._run.config.images_per_step
        values = {"samples": [wandb.Image(picture, caption=caption)], "images_seen": seen}
        self._tracker.log(values, step=step + self._run.lost)

    def alert(self, step: int, what: str) -> None:
        text = f"at step {step} {what}"
        self._tracker.tracker.alert(title=f"{self._run.name}: trouble", text=text, level="WARN")

    def keep(self, what: str, folder: Path, step: int) -> None:
        import wandb

        artifact = wandb.Artifact(f"{what}-{self._run.id}", type="model", metadata={"step": step})
        with ExitStack() as undo:
            if "WANDB_DATA_DIR" not in os.environ:  # offline, the copy stays until `wandb sync`
                os.environ["WANDB_DATA_DIR"] = str((self._run.folder / "wandb").resolve())
                undo.callback(os.environ.pop, "WANDB_DATA_DIR")
            artifact.add_dir(str(folder))
        self._tracker.tracker.log_artifact(artifact, aliases=[f"step-{step}"])

    def finish(self) -> None:
        if self._mode == "online":
            print(f"wandb: sending what is left, for at most {self._patience:.0f} s", flush=True)
        self._tracker.finish()

    def _say_offline(self, why: str) -> None:
        print(f"wandb: recording offline in {self._run.folder / 'wandb'} ({why})", flush=True)

    def _start(self, mode: str) -> None:
        import wandb

        run, track = self._run, self._run.config.track
        given = [tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag]
        # What could not be sent by then stays in the run's folder, for `wandb sync`.
        self._patience = _PATIENCE_WITH_FILES if track.kept else _PATIENCE
        self._tracker = WandBTracker(
            track.project,
            id=run.id,
            name=run.name,
            dir=str(run.folder),
            group=run.group,
            tags=list(dict.fromkeys([*given, *run.tags])),
            resume="allow",
            mode=mode,
            settings=wandb.Settings(console="off", silent=True, finish_timeout=self._patience),
        )
        self._tracker.start()
        self._tracker.store_init_configuration(recipe.as_dict(run.config))
        self._describe_metrics()

    def _describe_metrics(self) -> None:
        """Makes `images_seen` the axis, tells which numbers are best when small or large, and hides what few look for.

        wandb makes a section of panels for each first part of a name: `eval`, `guard`, `loss`, `score`, `throughput`.
        """
        define = self._tracker.tracker.define_metric
        define("*", step_metric="images_seen")
        for name in _NO_PANELS:
            axis = {} if name == "images_seen" else {"step_metric": "images_seen"}
            define(name, hidden=True, **axis)
        for name, best in directions(self._run.config.eval.extractor).items():
            define(f"eval/{name}", step_metric="images_seen", summary=f"{best},last")


def directions(extractor: str) -> dict[str, str]:
    """Tells which numbers of an evaluation have a direction: name -> `min` or `max`, whichever is best."""
    parts = {"prdc": ("precision", "recall", "density", "coverage")}
    higher = (*HIGHER_IS_BETTER, *parts["prdc"], "drawn")
    names = [one for name in EVAL_METRICS[extractor] for one in parts.get(name, (name,))]
    names += ["drawn"] if extractor == "classifier" else []
    return {name: "max" if name in higher else "min" for name in names}
