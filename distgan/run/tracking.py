"""Records a run: metrics.jsonl, sample grids, wandb, and a live bar or plain lines. Only rank zero records.

metrics.jsonl is the durable record: one JSON object per line, each step once. wandb gets the same names.
"""

import json
import netrc
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import IO, Any
from urllib.parse import urlparse

from accelerate import Accelerator
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from distgan.errors import UserError
from distgan.parallel.launch import under_mpirun
from distgan.pictures import grid
from distgan.recipe import Config, TrackConfig, as_dict
from distgan.run.folder import cut_metrics
from distgan.storage.places import Places

_WANDB_PATIENCE = 60.0  # seconds that a run waits for wandb's server at its end


def check(track: TrackConfig) -> None:
    """Checks wandb's environment variables, if the run will use wandb.

    Raises:
        UserError: wandb would refuse one of them; the message names it.
    """
    if track.to != "wandb" or wandb_mode() == "disabled":
        return
    import wandb

    for name, value in os.environ.items():
        if name.startswith("WANDB_"):
            try:
                wandb.Settings().update_from_env_vars({name: value})
            except Exception as error:  # wandb's, and pydantic's of many lines
                said = "; ".join(one["msg"] for one in error.errors()) if isinstance(error, ValidationError) else error
                shown = "set to a value that" if "KEY" in name else f"{value!r}, which"
                raise UserError(f"{name} is {shown} wandb refuses ({said}): correct or unset it.") from error


class Tracker:
    """Records a run. It exists on every rank, but `start`, `alert`, `log`, `samples` and `sync` are for rank zero only;
    the other methods do nothing on other ranks.
    """

    def __init__(self, accelerator: Accelerator, folder: Places, config: Config) -> None:
        self._accelerator, self._folder, self._config = accelerator, folder, config
        self._to_wandb = config.track.to == "wandb" and wandb_mode() != "disabled"
        self._metrics: IO[bytes] | None = None
        self._unwritten = b""
        self._lock = threading.Lock()  # the thread that writes checkpoints also writes pending lines
        self._progress: Progress | None = None
        self._lost = 0
        self._timed_from = (time.monotonic(), 0)  # the time and the step from which the throughput counts

    def start(self, step: int, wandb_id: str | None, *, lost: int = 0, abandoned: bool = False) -> str | None:
        """Begins recording after a step, and returns the id of the wandb run, which a resumed run keeps.

        Args:
            step: the last step whose metrics stay in metrics.jsonl.
            wandb_id: the id of a run that is resumed; None for a new one.
            lost: the number of steps that rollbacks took back. They are added to wandb's step, which cannot go back.
            abandoned: whether a rollback gave up the metrics after that step, so that they are kept in another file.
        """
        self._lost = lost
        if self._config.track.to == "wandb" and not self._to_wandb:
            print(
                "wandb: switched off by WANDB_DISABLED or WANDB_MODE; metrics.jsonl and samples/ have everything",
                flush=True,
            )
        if self._to_wandb:
            # A new run takes WANDB_RUN_ID if it is set: a sweep's agent waits for the run under that id.
            wandb_id = wandb_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
            self._start_wandb(wandb_id)
        cut_metrics(self._folder.metrics, step, abandoned=abandoned)
        self._metrics = self._folder.metrics.open("ab", buffering=0)
        self._folder.samples.mkdir(exist_ok=True)
        if (
            getattr(sys.stdout, "isatty", bool)() and not under_mpirun()
        ):  # mpirun gives its processes a terminal even where the output goes to a log
            self._progress = _progress(self._config.last_step, step)
        self._timed_from = (time.monotonic(), step)
        return wandb_id

    def alert(self, step: int, what: str) -> None:
        """Warns the user on standard error and in wandb."""
        print(f"distgan: warning: at step {step} {what}.", file=sys.stderr, flush=True)
        if self._to_wandb:
            run = self._accelerator.get_tracker("wandb", unwrap=True)
            self._wandb(lambda: run.alert(title=f"{self._folder.path.name}: trouble", text=f"at step {step} {what}"))

    def not_training(self, seconds: float) -> None:
        """Leaves this many seconds of other work out of the throughput."""
        then, since = self._timed_from
        self._timed_from = (then + seconds, since)

    def log(self, step: int, metrics: dict[str, float], described: dict[str, Any] | None = None) -> None:
        """Writes one line of metrics, with images_seen, throughput and the entries of `described` (the protocol).

        Raises:
            OSError: the disk is full or fails. The line is kept and written with the next one.
        """
        now, (then, since) = time.monotonic(), self._timed_from
        images_per_s = (step - since) * self._config.images_per_step / (now - then)
        self._timed_from = (now, step)
        record = {
            "step": step,
            "images_seen": step * self._config.images_per_step,
            **metrics,
            "throughput/images_per_s": images_per_s,
            **(described or {}),
        }
        try:
            self._write(json.dumps(record).encode() + b"\n")
        finally:
            self._show(step, metrics, images_per_s)
            self._wandb(lambda: self._accelerator.log(record, step=step + self._lost))

    def advance(self, step: int) -> None:
        """Moves the live bar."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def samples(self, step: int, images: Tensor, *, columns: int) -> None:
        """Writes the sample grid; images are uint8 (N, C, H, W)."""
        picture = grid(images, columns=columns)
        file = self._folder.samples / f"step_{step:08d}.png"
        try:
            picture.save(file)
        except OSError:
            file.unlink(missing_ok=True)
            raise
        if self._to_wandb:
            wandb = self._accelerator.get_tracker("wandb")
            self._wandb(lambda: wandb.log_images({"samples": [picture]}, step=step + self._lost))

    def sync(self) -> None:
        """Brings all metrics so far to the disk, before a checkpoint relies on them. Raises OSError."""
        if self._metrics is not None:
            self._write(b"")
            os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Finishes the bar, wandb (which flushes what it holds) and the metrics file."""
        if self._progress is not None:
            self._progress.stop()
        if self._metrics is not None:
            self._metrics.close()
            self._unwritten = b""
            for tracker in self._accelerator.trackers:
                self._wandb(tracker.finish)
            self._accelerator.trackers.clear()

    def _wandb(self, action: Callable[[], object]) -> None:
        """Runs an action of wandb. Its errors never end a run, because metrics.jsonl has everything."""
        try:
            action()
        except Exception as error:  # of many kinds
            print(f"distgan: warning: wandb: {' '.join(str(error).split())[:200]}", file=sys.stderr, flush=True)

    def _write(self, line: bytes) -> None:
        """Writes pending lines and this one; what a full disk does not take stays pending."""
        assert self._metrics is not None
        with self._lock:
            self._unwritten += line
            while self._unwritten:
                self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]

    def _start_wandb(self, wandb_id: str) -> None:
        """Starts wandb online if that is wanted and the server answers, otherwise offline."""
        import wandb

        mode = wandb_mode()
        if mode == "offline":
            asked = "as WANDB_MODE asks" if os.environ.get("WANDB_MODE") else "no key found"
            self._say_offline(f"{asked}; `wandb login` or WANDB_API_KEY sends runs to the server")
        try:
            self._init_wandb(wandb_id, mode)
        except Exception as error:  # of many kinds, from wandb's service
            if mode not in ("online", "shared"):
                raise
            self._say_offline(f"the server cannot be reached: {' '.join(str(error).split())[:200]}")
            wandb.teardown()  # its service would still hold the id
            self._accelerator.trackers.clear()
            self._init_wandb(wandb_id, mode := "offline")
        if mode == "online":
            print(f"wandb: {self._accelerator.get_tracker('wandb', unwrap=True).url}", flush=True)

    def _say_offline(self, why: str) -> None:
        print(f"wandb: recording offline in {self._folder.path / 'wandb'} ({why})", flush=True)

    def _init_wandb(self, wandb_id: str, mode: str) -> None:
        import wandb

        init: dict[str, Any] = {
            "id": wandb_id,
            "name": self._folder.path.name,
            "dir": str(self._folder.path),
            "resume": "allow",
            "mode": mode,
            # What could not be sent by then stays in the run's folder, for `wandb sync`.
            "settings": wandb.Settings(console="off", silent=True, finish_timeout=_WANDB_PATIENCE),
        }
        self._accelerator.init_trackers(self._config.track.project, as_dict(self._config), {"wandb": init})

    def _show(self, step: int, metrics: dict[str, float], images_per_s: float) -> None:
        before, after = metrics["score/fake_before"], metrics["score/fake_after"]
        text = (
            f"loss D {metrics['loss/discriminator']:.3f} G {metrics['loss/generator']:.3f}  "
            f"score of real {metrics['score/real']:.2f}, fake {before:.2f} -> {after:.2f}  {images_per_s:,.0f} images/s"
        )
        if evaluated := [name for name in metrics if name.startswith("eval/")]:
            text += "  " + "  ".join(f"{name.removeprefix('eval/')} {metrics[name]:.4g}" for name in evaluated)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, text=text)
        else:
            left = timedelta(seconds=int((self._config.last_step - step) * self._config.images_per_step / images_per_s))
            print(f"step {step}/{self._config.last_step}  {text}  {left} left", flush=True)


def _progress(total: int, completed: int) -> Progress:
    progress = Progress(
        TextColumn("{task.fields[text]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console()
    )
    progress.add_task("", total=total, completed=completed, text="starting")
    progress.start()
    return progress


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
