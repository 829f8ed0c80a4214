"""What happens around the steps of a run: resuming, logging, sampling, evaluating, guarding, saving, stopping."""

import copy
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import nn

from distgan import checkpoint, models, rollback
from distgan.config import Config
from distgan.data import Images
from distgan.distributed import STOP_SIGNALS, Ranks
from distgan.errors import NotFiniteError, NotSavedError, StoppedError, TroubleError
from distgan.evaluation import Evaluation, Measured
from distgan.guard import Guard, Trouble, Watch
from distgan.models import Generator
from distgan.paths import quoted
from distgan.run_folder import RunFolder
from distgan.schedules import Rates
from distgan.seeding import RunSeed
from distgan.standing import Standing, bring_back_exports, export_best
from distgan.tracking import Meter, Tracker, offline_wandb_runs

T = TypeVar("T")

_COLUMNS = 8  # of the sample grid, and its rows
_ROWS = 32  # at most, where there is one for each class
_DIFFERENCES = 5  # at most, that a refusal to resume names


class Housekeeping:
    """What happens around the steps. Collective, all of it.

    As a context it records the run and listens for stop signals; leaving it without an error tells where things lie.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        ranks: Ranks,
        *,
        seed: RunSeed,
        evaluation: Evaluation | None,
        watch: Watch | None,
        meter: Meter,
        probability: bool,
        rates: Rates,
        average: Generator,
        shape: models.Shape,
        images: Images,
        networks: dict[str, nn.Module],
        optimizers: dict[str, tuple[torch.optim.Optimizer, nn.Module]],
    ) -> None:
        """Args: among others the seed that the loop draws from, on rank zero what the guard watches by, and whether
        the loss's scores are probabilities.
        """
        self._config, self._folder, self._ranks = config, folder, ranks
        self._seed, self._evaluation, self._watch = seed, evaluation, watch
        self._probability, self._rates = probability, rates
        self._meter, self._average, self._shape, self._images = meter, average, shape, images
        self._networks, self._optimizers = networks, optimizers
        self._until = min(config.last_step, config.run.stop_at or config.last_step)
        self._requests = ranks.requests
        self._stopped = False
        self._step = 0
        self._wandb_id: str | None = None
        self._guard, self._standing = self._new_guard(), Standing(config.eval)
        self._trouble: Trouble | None = None  # that ends the run
        self._advice = ""  # what to do about it
        self._lost = 0  # steps that rollbacks took back
        self._gone_back = False  # whether the newest checkpoint is the one that the last rollback went back to
        # Of rank zero's alone: it writes in the background, and asks the others for a save out of turn.
        self._writing = checkpoint.Background()
        self._saved_at = time.monotonic()
        self._unsaved = self._asked = False
        self._best_weights: tuple[int, Mapping[str, torch.Tensor]] = (0, {})

    def resume(self) -> int:
        """Restores the newest checkpoint that is whole, and returns its step; 0 where there is none.

        Raises:
            ValueError: it was trained on other images, or belongs to other networks.
        """
        found = self._ranks.on_rank_zero(lambda: checkpoint.newest(self._folder.checkpoints, set_aside=True))
        if found is None:
            self._ranks.on_rank_zero(lambda: self._writing_down(self._folder.begin_anew))
        happened = self._ranks.on_rank_zero(lambda: rollback.happened(self._folder))
        self._standing, self._guard = Standing(self._config.eval), self._new_guard()
        if found is not None:
            state = checkpoint.read_state(found)
            refuse_other_images(state, self._images, self._config)
            checkpoint.load(found, networks=self._networks, optimizers=self._optimizers)
            self._meter.load_state(state["meter"], self._ranks)
            if self._ranks.scaler is not None:
                self._ranks.scaler.load_state_dict(state["scaler"])
            self._wandb_id = state["wandb_id"] or self._wandb_id
            self._step = state["step"]
            self._take_up_judgements(found, state, rolled_back=len(happened))
        self._take_up_rollbacks(happened)
        self._ranks.moved(self._step)
        return self._step

    def _take_up_judgements(self, found: Path, state: dict[str, Any], *, rolled_back: int) -> None:
        """Restores the guard's and the evaluations' state from a checkpoint. After a rollback the guard starts anew."""
        attempt = state.get("attempt", 0)
        if attempt > rolled_back:
            raise ValueError(
                f"{self._folder.rollbacks} tells of {rolled_back} rollbacks, but its newest checkpoint comes after "
                f"{attempt}: bring back a copy of the file."
            )
        self._gone_back = attempt < rolled_back
        self._guard = self._new_guard()
        if "guard" in state and not self._gone_back:  # it is not in checkpoints from before there was one
            self._guard.load_state(state["guard"])
        if "standing" in state:
            self._standing.load_state(state["standing"])
        there = (self._folder, found, self._standing, self._config.model, self._shape)
        if not self._ranks.on_rank_zero(lambda: self._writing_down(lambda: bring_back_exports(*there))):
            self._standing.best = None  # it was not kept, when another took its place

    def _new_guard(self) -> Guard:
        """Returns a guard that judges from here on."""
        return Guard(self._config.guard, probability=self._probability, start=self._step)

    def _take_up_rollbacks(self, happened: list[dict[str, Any]]) -> None:
        """Draws and learning rates follow from the rollbacks that were written down, also after a resume."""
        self._seed.attempt = len(happened)
        self._lost = sum(one["at"] - one["back_to"] for one in happened)
        if happened:
            self._rates.base |= happened[-1]["lr"]

    def __enter__(self) -> Self:
        self._tracker = Tracker(self._ranks.accelerator, self._folder, self._config)
        self._wandb_id = self._ranks.on_rank_zero(lambda: self._writing_down(self._start))
        per_rank = self._config.train.batch_size // self._ranks.world
        self._ranks.say(
            f"{self._folder.path}: {'resuming at' if self._step else 'starting at'} step {self._step} on "
            f"{self._ranks.world} x {self._ranks.accelerator.device.type}, {per_rank} images each, "
            f"{self._config.train.precision}"
        )
        self._requests.listen(*STOP_SIGNALS)
        return self

    def _start(self) -> str | None:
        if self._evaluation is not None and self._config.eval.extractor == "classifier":
            self._folder.keep_extractor(self._evaluation.weights.file)
        wandb_id = self._start_tracking()
        self._folder.preempted.unlink(missing_ok=True)
        return wandb_id

    def _start_tracking(self) -> str | None:
        return self._tracker.start(self._step, self._wandb_id, lost=self._lost, abandoned=self._gone_back)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._requests.unlisten(*STOP_SIGNALS)
            self._requests.finish()
            self._ranks.on_rank_zero(self._tracker.close)
            self.end()
            if self._trouble is not None:
                said = f"at step {self._step} {self._trouble.what}. The run is saved. {self._advice}"
                raise self._ranks.told_once(TroubleError(said))
            return
        try:
            self._ranks.explain(error)
        finally:
            self._finish_writing()
            # Only now: the launcher's SIGTERM must not cut the words short.
            self._requests.unlisten(*STOP_SIGNALS)
            self._tracker.close()

    def end(self) -> None:
        """Tells how the run ended and where things lie."""
        if self._trouble is not None:
            how = "stopped by the guard, and saved"
        elif self._step >= self._config.last_step:
            how = "done"
        else:
            how = "stopped and saved; the same command goes on"
        steps = max(self._step, self._config.last_step)  # beyond it, once a run was extended
        self._ranks.say(f"{how}: step {self._step} of {steps}\n{_where_things_lie(self._folder, self._standing.say())}")

    def done(self, step: int) -> bool:
        """Tells whether this invocation ends here."""
        return self._stopped or self._trouble is not None or step >= self._until

    def keep(self, step: int) -> int:
        """Does what is due after a step. Returns the step to go on from, an earlier one after a rollback."""
        track, self._step = self._config.track, step
        self._ranks.moved(step)
        end = step == self._config.last_step
        self._tracker.advance(step)
        evaluate = self._config.eval.every is not None and (step % self._config.eval.every == 0 or end)
        log = step % track.log_every == 0 or end or evaluate
        troubles = self._log(step, evaluate=evaluate) if log else []
        if step % track.sample_every == 0 or end:
            self._record("the samples", lambda: self._tracker.samples(step, self._grid(), columns=_COLUMNS))
        agreed = self._requests.agreed(save=self._save_is_due(log), failed=self._writing.failed())
        self._stopped = agreed.stop
        if agreed.failed:
            self._ranks.on_rank_zero(self._settle)
        saving = step % self._config.checkpoint.every == 0 or step == self._standing.best_step or agreed.save
        saving = saving or self.done(step)
        if saving and not log and (bad := self._ranks.on_rank_zero(self._not_finite)) is not None:
            troubles = [self._guard.not_finite(step, bad)]
        if troubles and (back_from := self._act_on(troubles)) is not None:
            return self._roll_back(back_from)
        if self._stopped:
            self._ranks.say(f"stop signal: saving step {step}")
        if saving or self.done(step):
            self._save(step)
        return step

    def _grid(self) -> torch.Tensor:
        """Samples of fixed latents; of a generator that takes labels, a row of each class, or of the first _ROWS."""
        seed, classes = self._config.run.seed, [i for i, images in enumerate(self._average.class_counts) if images > 0]
        if classes:
            return self._average.sample_rows(classes[:_ROWS], _COLUMNS, seed=seed)
        return self._average.sample(_COLUMNS**2, seed=seed)

    def _log(self, step: int, *, evaluate: bool) -> list[Trouble]:
        """Records a line of metrics, and has the guard judge it."""
        rates = {f"lr/{name}": rate for name, rate in self._rates.now.items()}
        numbers = {**self._meter.means(self._ranks), **rates}
        seen, not_finite = self._ranks.on_rank_zero(lambda: (self._on_watch.look(), self._not_finite()))
        numbers |= seen
        protocol = {}
        if evaluate and not_finite is None:
            measured = self._evaluate(step)
            numbers |= {f"eval/{name}": value for name, value in measured.numbers.items()}
            numbers["eval/behind_best"] = self._standing.behind
            protocol = {"eval/protocol": measured.protocol}
        images_seen = step * self._config.images_per_step
        troubles = self._guard.judge(step, numbers, images_seen=images_seen, not_finite=not_finite)
        self._record("the metrics", lambda: self._tracker.log(step, numbers, protocol))
        return troubles

    def _evaluate(self, step: int) -> Measured:
        """Measures rank zero's averaged generator, which is what is saved."""
        assert self._evaluation is not None
        started = time.monotonic()
        generator = copy.deepcopy(self._average)
        if self._ranks.world > 1:  # without synchronised batch norm each rank has statistics of its own
            generator.load_state_dict(self._ranks.on_rank_zero(lambda: _on_cpu(self._average.state_dict())))
        measured = self._evaluation.measure(generator)
        self._standing.add(measured.report(str(self._folder.path), step, self._evaluation.floor))
        self._tracker.not_training(time.monotonic() - started)
        return measured

    def _not_finite(self) -> str | None:
        """Says what a checkpoint would hold that is NaN or inf, if anything; waits for the device.

        A bad gradient shows in the weights, or in Adam's moments.
        """
        tensors = {
            f"{name} in the {network}": tensor
            for network, module in self._networks.items()
            for name, tensor in module.state_dict().items()
        }
        for network, (adam, module) in self._optimizers.items():
            for name, parameter in module.named_parameters():
                slots = adam.state.get(parameter, {})
                tensors |= {f"{name}/{slot} in the {network} optimizer": tensor for slot, tensor in slots.items()}
        for device in {tensor.device for tensor in tensors.values()}:
            here = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
            finite = torch.stack([tensor.isfinite().all() for tensor in here.values()]).tolist()
            if not all(finite):
                return next(name for name, whole in zip(here, finite, strict=True) if not whole)
        return None

    @property
    def _on_watch(self) -> Watch:
        """On rank zero."""
        assert self._watch is not None
        return self._watch

    def _act_on(self, troubles: list[Trouble]) -> Trouble | None:
        """Says what is wrong, and returns what to roll back from, if that is to be done.

        Raises:
            NotFiniteError: nothing is left to go on with or to save.
        """
        said = "; ".join(trouble.what for trouble in troubles)
        self._ranks.on_rank_zero(lambda: self._tracker.alert(self._step, said))
        first = min(troubles, key=lambda trouble: trouble.since)
        way = self._ranks.on_rank_zero(lambda: self._writing_down(lambda: self._way_back(first)))
        ended = self._step >= self._config.last_step
        verdict = rollback.decide(self._config.guard, way, not_finite=first.not_finite, ended=ended)
        if verdict.action == "roll back":
            return first
        if verdict.action == "fail":
            raise self._ranks.told_once(NotFiniteError(f"at step {self._step} {first.what}. {verdict.advice}"))
        if verdict.action == "save and stop":
            self._trouble, self._advice = first, verdict.advice
        return None

    def _way_back(self, trouble: Trouble) -> rollback.WayBack:
        """On rank zero."""
        self._finish_writing()
        return rollback.way_back(self._folder, trouble.since, every=self._config.checkpoint.every)

    def _roll_back(self, trouble: Trouble) -> int:
        """Goes back to the last good checkpoint, with other draws and a lower rate, and returns its step."""
        at = self._step
        rates, every = self._rates.base, self._config.checkpoint.every
        go_back = lambda: rollback.go_back(self._folder, trouble, at=at, rates=rates, every=every)  # noqa: E731
        self._ranks.on_rank_zero(lambda: self._writing_down(go_back))
        step = self.resume()
        self._asked = False
        self._wandb_id = self._ranks.on_rank_zero(lambda: self._writing_down(self._restart_tracking))
        self._ranks.say(f"rolled back from step {at} to step {step}, attempt {self._seed.attempt}")
        if self._stopped:
            self._mark_preempted(step)
        return step

    def _restart_tracking(self) -> str | None:
        self._tracker.close()
        return self._start_tracking()

    def _writing_down(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except OSError as error:
            raise NotSavedError(f"{self._folder.path} cannot be written ({error.strerror}).") from error

    def _save_is_due(self, log: bool) -> bool:
        """Tells, on rank zero, whether minutes have passed, or a save that failed is to be tried again."""
        if self._ranks.rank != 0 or self._asked:  # the others hear of it a step later
            return False
        minutes = self._config.checkpoint.every_minutes
        late = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        self._asked = late or (log and self._unsaved)
        return self._asked

    def _save(self, step: int) -> None:
        scaler = self._ranks.scaler
        state = {
            "images": self._images.fingerprint,
            "data": {"count": len(self._images.pixels), "classes": self._images.classes},
            "meter": self._meter.state(self._ranks),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "wandb_id": self._wandb_id,
            "attempt": self._seed.attempt,
            "guard": self._guard.state(),
            "standing": self._standing.state(),
        }
        self._ranks.on_rank_zero(lambda: self._begin_to_save(step, state))
        if self.done(step):
            self._ranks.on_rank_zero(self._writing.finish)  # what cannot be saved now is lost, and that is an error
            if self._stopped and self._trouble is None and step < self._config.last_step:
                self._mark_preempted(step)

    def _mark_preempted(self, step: int) -> None:
        marker = json.dumps({"step": step}) + "\n"
        self._record("the preempted marker", lambda: self._folder.preempted.write_text(marker))

    def _begin_to_save(self, step: int, state: dict[str, Any]) -> None:
        """Copies what is to be saved, and has it written while training goes on; one checkpoint at a time."""
        self._settle()
        files = checkpoint.snapshot(networks=self._networks, optimizers=self._optimizers)
        keep, model, shape = self._config.checkpoint, self._config.model, self._shape
        best, last = self._standing.best, self._standing.last
        measured = last if last is not None and last["step"] == step else None
        if best is not None and best["step"] == step:  # kept until it is on the disk, which may be full for a while
            self._best_weights = (step, files["average"])
        at_hand, weights = self._best_weights
        best_weights = weights if best is not None and best["step"] == at_hand else None
        starts = {*self._guard.starts, step}

        def write() -> None:
            try:
                self._tracker.sync()
                checkpoint.save(self._folder.checkpoints, step, files, state)
                needed = rollback.needed(self._folder, starts, every=keep.every) | ({best["step"]} if best else set())
                checkpoint.prune(
                    self._folder.checkpoints, keep_last=keep.keep_last, keep_every=keep.keep_every, keep=needed
                )
                checkpoint.save_generator(
                    self._folder.generator, files["average"], model, shape, step=step, measured=measured
                )
                export_best(self._folder, best, model, shape, weights=best_weights)
            except OSError as error:
                raise NotSavedError(
                    f"step {step} could not be saved in {self._folder.path} ({error.strerror})."
                ) from error

        self._writing.start(write)
        self._saved_at, self._unsaved, self._asked = time.monotonic(), False, False

    def _finish_writing(self) -> None:
        """Waits, before leaving or going back, until the checkpoint is written, or says why it could not be."""
        try:
            self._writing.finish()
        except (StoppedError, ValueError) as error:
            print(f"distgan: warning: {error}", file=sys.stderr, flush=True)

    def _settle(self) -> None:
        """Waits for the checkpoint that is being written; if that failed, stops or has it tried again."""
        try:
            self._writing.finish()
        except NotSavedError as error:
            if self._config.checkpoint.on_error == "stop":
                raise
            self._unsaved = True
            self._warn(error)

    def _record(self, what: str, action: Callable[[], object]) -> None:
        """Collective: records something on rank zero; a full disk stops the run only if the user wants that."""

        def attempt() -> None:
            try:
                action()
            except OSError as error:
                said = f"{what} of step {self._step} could not be written in {self._folder.path} ({error.strerror})."
                if self._config.checkpoint.on_error == "stop":
                    raise NotSavedError(said) from error
                self._warn(said)

        self._ranks.on_rank_zero(attempt)

    def _warn(self, what: object) -> None:
        print(f"distgan: warning: {what} Training goes on; what was saved before is kept.", file=sys.stderr, flush=True)


def refuse_other_images(state: Mapping[str, Any], images: Images, config: Config) -> None:
    """Raises ValueError, with what differs, where the checkpoint of this state was trained on other images."""
    if state["images"] != images.fingerprint:
        raise ValueError(
            f"{Path(config.run.dir)} was trained on other images than {config.data.source} is now: "
            f"{_difference(state.get('data'), images)}; to go on bring back what it was trained on, for a new run "
            "choose another run.dir."
        )


def _difference(saved: Mapping[str, Any] | None, images: Images) -> str:
    """Says how the images that a checkpoint tells of differ from others, as far as numbers and names show it."""
    if saved is None:  # by a version that kept neither
        return "which, its version of distgan did not note"
    said = []
    count, old, new = saved["count"], saved["classes"] or [], list(images.classes or [])
    if count != len(images.pixels):
        said.append(f"there were {count:,} images, now there are {len(images.pixels):,}")
    if len(old) == len(new):
        said += [f"class {i} is now '{name}', was '{old[i]}'" for i, name in enumerate(new) if name != old[i]]
    else:
        changes = {"gone": [name for name in old if name not in new], "new": [name for name in new if name not in old]}
        named = "; ".join(f"{what}: {', '.join(names)}" for what, names in changes.items() if names)
        said.append(f"there were {len(old)} classes, now there are {len(new)} ({named})")
    shown = "; ".join(said[:_DIFFERENCES]) + ("; …" if len(said) > _DIFFERENCES else "")
    return shown or "as many, of the same classes, but other pictures, or in another order or class"


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _where_things_lie(folder: RunFolder, best: str | None) -> str:
    """Returns each place in a run's folder, and the command to look at it, for the user."""
    lines = []
    pictures = [quoted(picture) for picture in sorted(folder.samples.glob("step_????????.png"))]
    if pictures:
        lines += [f"  sample grid   {pictures[-1]}", f"                see it: xdg-open {pictures[-1]}"]
    best_generator = f"                its generator: {quoted(folder.generator_best)}"
    lines += [
        f"  checkpoints   {quoted(folder.checkpoints)}",
        f"                list them: ls {quoted(folder.checkpoints)}",
        f"  generator     {quoted(folder.generator)}",
        f"                draw from it: distgan sample {quoted(folder.path)} --num 64 --out grid.png",
        *([f"  best          {best}", best_generator] if best else []),
        f"  metrics       {quoted(folder.metrics)}",
        f"                the last line: tail -n 1 {quoted(folder.metrics)}",
    ]
    for run in map(quoted, offline_wandb_runs(folder.path)[-1:]):
        lines += [f"  wandb         {run}", f"                browse it: wandb leet {run}; upload it: wandb sync {run}"]
    return "\n".join(lines)
