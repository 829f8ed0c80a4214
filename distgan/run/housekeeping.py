"""Runs what happens around the steps, in one order: evaluate, judge, log, sample, agree, act on trouble, save, stop."""

import contextlib
import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from distgan.data import Images
from distgan.errors import NotFiniteError, TroubleError, UserError
from distgan.evaluation import Evaluation, Measured
from distgan.models import ImageSpec
from distgan.parallel.ranks import Ranks
from distgan.parallel.stopping import STOP_SIGNALS
from distgan.recipe import Config
from distgan.run import history, rollback
from distgan.run.best import BestSoFar, restore_exports
from distgan.run.due import due
from distgan.run.folder import RunFolder
from distgan.run.guard import Guard, Trouble
from distgan.run.saving import Saver
from distgan.run.state import TrainingState
from distgan.run.tracking import Tracker
from distgan.run.watch import Watch
from distgan.run_page import Page
from distgan.schedules import Rates, Schedules
from distgan.seeding import RunSeed
from distgan.storage import bundle, checkpoint

T = TypeVar("T")

_COLUMNS = 8  # of the sample grid, and its rows
_ROWS = 32  # most rows of a grid with one row for each class
_DIFFERENCES = 5  # most differences between images that a message lists


class Housekeeping:
    """What happens around the steps of a run. All public methods are collective.

    As a context it records the run and listens for stop signals. When it ends without an error, it prints where
    the results are.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        ranks: Ranks,
        state: TrainingState,
        *,
        images: Images,
        spec: ImageSpec,
        seed: RunSeed,
        schedules: Schedules,
        rates: Rates,
        probability: bool,
        evaluation: Evaluation | None,
        watch: Watch | None,
    ) -> None:
        """Begins before the first step.

        Args:
            config: the run's recipe.
            folder: the run's folder.
            ranks: the ranks, joined.
            state: the contents of a checkpoint.
            images: the training images.
            spec: size, channels and classes of the images.
            seed: the seed that the loop draws from; a rollback changes it.
            schedules: everything that changes in the course of the run; its values are logged.
            rates: the learning rates, which are among these; a rollback lowers them.
            probability: whether the loss's scores are probabilities.
            evaluation: measures the generator; None if `eval.every` is unset.
            watch: measures what the guard looks at; only on rank zero.
        """
        self.config, self.ranks, self.state, self.seed, self.rates = config, ranks, state, seed, rates
        self._folder, self._images, self._spec = folder, images, spec
        self._schedules = schedules
        self._probability, self._evaluation, self._watch = probability, evaluation, watch
        self.until = min(config.last_step, config.run.stop_at or config.last_step)
        self._stopped = 0  # the number of the signal that stopped the run
        self._trouble: Trouble | None = None  # the trouble that ends the run
        self._advice = ""  # what the user can do about it
        self._lost = 0  # steps that rollbacks took back, all together
        self._gone_back = False  # whether the checkpoint that was restored last is older than the last rollback
        self._tracker = Tracker(folder, config)
        self._saver = Saver(config, folder, state, spec, self._tracker)
        self._page = Page([folder.path], folder.report)

    # ------------------------------------------------------------------------------------------------------------------
    # Beginning and ending.

    def resume(self) -> int:
        """Restores the newest whole checkpoint and returns its step; 0 if there is none.

        Raises:
            UserError: it was trained on other images, or belongs to other networks.
        """
        ranks, folder, state = self.ranks, self._folder, self.state

        # Rank zero chooses the checkpoint for all ranks.
        found = ranks.on_rank_zero(lambda: checkpoint.newest(folder.checkpoints, set_aside=True))
        if found is None:
            self._on_rank_zero_writing(folder.begin_anew)
        # Guard and evaluations start afresh; the checkpoint then gives back what it knows of them.
        state.standing, state.guard = BestSoFar(self.config.eval), self._new_guard()
        happened = ranks.on_rank_zero(lambda: rollback.happened(folder))
        if found is not None:
            saved, wandb_id = bundle.read_state(found), state.wandb_id
            refuse_other_images(saved, self._images, self.config)
            state.load(found)
            state.wandb_id = state.wandb_id or wandb_id
            self._gone_back = self._is_behind_a_rollback(saved, len(happened))
            if self._gone_back or "guard" not in saved:
                state.guard = self._new_guard()  # a new attempt is judged from its own start
            # A kill or a rollback may have left exported generators of later steps.
            there = (folder, found, state.standing, self.config.model, self._spec)
            if not self._on_rank_zero_writing(lambda: restore_exports(*there)):
                state.standing.best = None  # its weights were not kept
        # The recorded rollbacks decide draws and learning rates, after a resume, too.
        self.seed.attempt = state.attempt = len(happened)
        self._lost = sum(one["at"] - one["back_to"] for one in happened)
        if happened:
            self.rates.base |= happened[-1]["lr"]
        ranks.step_done(state.step)
        return state.step

    def __enter__(self) -> Self:
        config, ranks, step = self.config, self.ranks, self.state.step
        self.state.wandb_id = self._on_rank_zero_writing(self._start)
        ranks.say(
            f"{self._folder.path}: {'resuming at' if step else 'starting at'} step {step} on {ranks.world} x "
            f"{ranks.accelerator.device.type}, {config.train.batch_size // ranks.world} images each, "
            f"{config.train.precision}"
        )
        device = ranks.accelerator.device.type
        self._record(
            "the start",
            lambda: history.add_start(self._folder.history, step=step, processes=ranks.world, device=device),
        )
        self._report()
        ranks.requests.listen(*STOP_SIGNALS)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        requests = self.ranks.requests
        if error is None:
            requests.unlisten(*STOP_SIGNALS)
            requests.finish()
            self.ranks.on_rank_zero(self._finish_tracking)
            how, why = self._ending()
            self._record(
                "the end", lambda: history.add_end(self._folder.history, step=self.state.step, how=how, why=why)
            )
            self._report()
            self.end()
            if self._trouble is not None:
                said = f"at step {self.state.step} {self._trouble.what}. The run is saved. {self._advice}"
                raise self.ranks.reported_by_rank_zero(TroubleError(said))
            return
        try:
            self.ranks.report_failure(error)
        finally:
            self._saver.leave()
            self._record_error(error)
            # Only now, because the launcher's SIGTERM must not cut the report short.
            requests.unlisten(*STOP_SIGNALS)
            self._tracker.close()

    def end(self) -> None:
        """Prints how the run ended and where its results are."""
        step, last = self.state.step, self.config.last_step
        if self._trouble is not None:
            how = "stopped by the guard, and saved"
        elif step >= last:
            how = "done"
        else:
            how = "stopped and saved; the same command goes on"
        of = max(step, last)  # an extended run may be beyond the recipe's last step
        self.ranks.say(f"{how}: step {step} of {of}\n{self._folder.describe(self.state.standing.say())}")

    def done(self, step: int) -> bool:
        """Tells whether this invocation ends here."""
        return bool(self._stopped) or self._trouble is not None or step >= self.until

    # ------------------------------------------------------------------------------------------------------------------
    # After each step.

    def after(self, step: int) -> int:
        """Does what is due after a step. Returns the step to go on from, which is an earlier one after a rollback."""
        ranks, saver, state = self.ranks, self._saver, self.state
        state.step = step
        ranks.step_done(step)
        self._tracker.advance(step)
        now = due(step, self.config)

        # Log, evaluate and judge first: an evaluation may make this step's generator the best, which is then saved.
        troubles = self._log(evaluate=now.evaluate) if now.log else []
        if now.sample:
            names = self._spec.class_names
            rows = [names[i] if names else str(i) for i in self._drawn_classes]
            self._record("the samples", lambda: self._tracker.samples(step, self._grid(), columns=_COLUMNS, rows=rows))
        if now.log:
            self._report()

        # What one rank knows by itself (a signal, a failed save) becomes a decision of all ranks at the same step.
        wanted = ranks.rank == 0 and saver.wanted(at_log_point=now.log)
        agreed = ranks.requests.agreed(save=wanted, failed=saver.failed())
        self._stopped = agreed.stop
        if agreed.failed:
            ranks.on_rank_zero(saver.settle)
        saving = now.save or agreed.save or step == state.standing.best_step or self.done(step)

        # No checkpoint may hold NaN or inf. At log points the guard has looked already.
        if saving and not now.log and (bad := ranks.on_rank_zero(state.first_not_finite)) is not None:
            troubles = [state.guard.not_finite(step, bad)]
        if troubles and (back_from := self._act_on(troubles)) is not None:
            return self._roll_back(back_from)

        # _act_on may have ended the run, so done() is asked again: a step that ends the run is always saved.
        if self._stopped:
            ranks.say(f"stop signal: saving step {step}")
        if saving or self.done(step):
            self._save()
        return step

    def _log(self, *, evaluate: bool) -> list[Trouble]:
        """Records a line of metrics and returns the troubles that the guard finds in it."""
        state, step = self.state, self.state.step
        numbers = {**state.meter.means(), **self._schedules.now}
        seen, not_finite = self.ranks.on_rank_zero(lambda: (self._on_watch.look(), state.first_not_finite()))
        numbers |= seen
        described: dict[str, Any] = {}
        if evaluate and not_finite is None:
            measured = self._evaluate()
            numbers |= {f"eval/{name}": value for name, value in measured.numbers.items()}
            numbers["eval/behind_best"] = state.standing.behind
            described["eval/protocol"] = measured.protocol
        images_seen = step * self.config.images_per_step
        troubles = state.guard.judge(step, numbers, images_seen=images_seen, not_finite=not_finite)
        if troubles:
            described["guard/trouble"] = "; ".join(trouble.what for trouble in troubles)
        self._record("the metrics", lambda: self._tracker.log(step, numbers, described))
        return troubles

    def _evaluate(self) -> Measured:
        """Measures rank zero's averaged generator, which is what is saved."""
        assert self._evaluation is not None
        started, average = time.monotonic(), self.state.average
        generator = copy.deepcopy(average)
        if self.ranks.world > 1:  # without synchronised batch norm, each rank has its own statistics
            generator.load_state_dict(self.ranks.on_rank_zero(lambda: _on_cpu(average.state_dict())))
        measured = self._evaluation.measure(generator)
        report = measured.report(str(self._folder.path), self.state.step, self._evaluation.floor)
        self.state.standing.add(report)
        self._tracker.not_training(time.monotonic() - started)
        return measured

    def _grid(self) -> torch.Tensor:
        """Draws the sample grid from fixed latents; with labels, one row for each of the first `_ROWS` classes."""
        average, seed, truncation = self.state.average, self.config.run.seed, self.config.track.truncation
        average = average if truncation is None else average.truncated(truncation)
        if classes := self._drawn_classes:
            return average.sample_rows(classes, _COLUMNS, seed=seed)
        return average.sample(_COLUMNS**2, seed=seed)

    @property
    def _drawn_classes(self) -> list[int]:
        """Lists the classes of a grid's rows; none without labels."""
        return [i for i, images in enumerate(self.state.average.class_counts) if images > 0][:_ROWS]

    def _save(self) -> None:
        described, step = self.state.described(), self.state.step
        self.ranks.on_rank_zero(lambda: self._saver.begin(described))
        if self.done(step):
            self.ranks.on_rank_zero(self._saver.finish)  # at the end of a run, a failed save is an error
            if self._stopped and self._trouble is None and step < self.config.last_step:
                self._mark_preempted()

    # ------------------------------------------------------------------------------------------------------------------
    # When training goes wrong.

    def _act_on(self, troubles: list[Trouble]) -> Trouble | None:
        """Warns of the troubles and decides what to do.

        Returns:
            The trouble to roll back from, or None to go on, or to save and stop.

        Raises:
            NotFiniteError: a number is NaN or inf, and the run was not asked to roll back, or cannot.
        """
        step, said = self.state.step, "; ".join(trouble.what for trouble in troubles)
        self.ranks.on_rank_zero(lambda: self._tracker.alert(step, said))
        first = min(troubles, key=lambda trouble: trouble.since)
        way = self._on_rank_zero_writing(lambda: self._way_back(first))
        ended = step >= self.config.last_step
        verdict = rollback.decide(self.config.guard, way, not_finite=first.not_finite, ended=ended)
        if verdict.action == "roll back":
            return first
        if verdict.action == "fail":
            diverged = NotFiniteError(f"at step {step} {first.what}. {verdict.advice}")
            raise self.ranks.reported_by_rank_zero(diverged)
        if verdict.action == "save and stop":
            self._trouble, self._advice = first, verdict.advice
        return None

    def _way_back(self, trouble: Trouble) -> rollback.WayBack:
        """Waits on rank zero for the save that is under way, and finds how the run could go back."""
        self._saver.leave()
        return rollback.way_back(self._folder, trouble.since, every=self.config.checkpoint.every)

    def _roll_back(self, trouble: Trouble) -> int:
        """Goes back to the last good checkpoint, with different draws and a lower rate, and returns its step."""
        at, every, rates = self.state.step, self.config.checkpoint.every, self.rates.base
        self._on_rank_zero_writing(
            lambda: rollback.go_back(self._folder, trouble, at=at, rates=rates, every=every),
        )
        step = self.resume()
        self._saver.forget_request()
        self.state.wandb_id = self._on_rank_zero_writing(self._restart_tracking)
        self.ranks.say(f"rolled back from step {at} to step {step}, attempt {self.seed.attempt}")
        if self._stopped:
            self._mark_preempted()
        return step

    # ------------------------------------------------------------------------------------------------------------------
    # What rank zero does alone.

    def _on_rank_zero_writing(self, action: Callable[[], T]) -> T:
        """Collective: runs an action on rank zero that writes into the run's folder; if it fails, the run ends."""

        def guarded() -> T:
            with self._folder.writing():
                return action()

        return self.ranks.on_rank_zero(guarded)

    def _record(self, what: str, action: Callable[[], object]) -> None:
        """Collective: records something on rank zero; a full disk ends the run only with `checkpoint.on_error=stop`."""
        self.ranks.on_rank_zero(lambda: self._saver.record(what, action))

    def _ending(self) -> tuple[str, str | None]:
        """Returns how this invocation ends without an error, and why, as history.jsonl has it."""
        if self._trouble is not None:
            return "guard", self._trouble.what
        if self.state.step >= self.config.last_step:
            return "done", None
        return ("signal", history.signal_name(self._stopped)) if self._stopped else ("stop_at", None)

    def _report(self) -> None:
        """Collective: writes the page about the run, if the recipe asks for it."""
        if self.config.track.report:
            self._record("the report", self._page.write)

    def _record_error(self, error: BaseException) -> None:
        """Records on rank zero that the run failed. The other ranks may be gone, and the disk may be why it failed."""
        if self.ranks.rank != 0:
            return
        said = " ".join(f"{type(error).__name__}: {error}".split())
        with contextlib.suppress(OSError):
            history.add_end(self._folder.history, step=self.state.step, how="error", why=said)
            if self.config.track.report:
                self._page.write()

    def _mark_preempted(self) -> None:
        self._record("the preempted marker", lambda: self._folder.mark_preempted(self.state.step))

    def _start(self) -> str | None:
        if self._evaluation is not None and self.config.eval.extractor == "classifier":
            self._folder.keep_extractor(self._evaluation.weights.file)
        wandb_id = self._start_tracking()
        self._folder.preempted.unlink(missing_ok=True)
        return wandb_id

    def _start_tracking(self) -> str | None:
        state = self.state
        return self._tracker.start(state.step, state.wandb_id, lost=self._lost, abandoned=self._gone_back)

    def _finish_tracking(self) -> None:
        if self._trouble is not None or self.state.step >= self.config.last_step:
            self._tracker.keep(self.state.step)
        self._tracker.close()

    def _restart_tracking(self) -> str | None:
        self._tracker.close()
        return self._start_tracking()

    @property
    def _on_watch(self) -> Watch:
        """Returns the watch, which only rank zero has."""
        assert self._watch is not None
        return self._watch

    def _new_guard(self) -> Guard:
        """Returns a guard that judges from the current step on."""
        return Guard(self.config.guard, probability=self._probability, start=self.state.step)

    def _is_behind_a_rollback(self, saved: Mapping[str, Any], happened: int) -> bool:
        """Tells whether a checkpoint is older than the last rollback, so that the run was just rolled back to it."""
        attempt = saved.get("attempt", 0)
        if attempt > happened:
            raise UserError(
                f"{self._folder.rollbacks} lists {happened} rollbacks, but the newest checkpoint was made after "
                f"{attempt} rollbacks: restore that file from a copy."
            )
        return attempt < happened


def refuse_other_images(state: Mapping[str, Any], images: Images, config: Config) -> None:
    """Raises UserError, saying what differs, if a checkpoint with this state was trained on other images."""
    if state["images"] != images.fingerprint:
        raise UserError(
            f"{Path(config.run.dir)} was trained on other images than {config.data.source} has now: "
            f"{_difference(state.get('data'), images)}. To continue the run, bring back its images; for a new run, "
            "choose another run.dir."
        )


def _difference(saved: Mapping[str, Any] | None, images: Images) -> str:
    """Says how a checkpoint's images differ from today's, as far as their number and class names show it."""
    if saved is None:  # an early version recorded neither
        return "its version of distgan did not record which"
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
    return shown or "their number and the names of classes are the same, but pictures, their order or labels differ"


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
