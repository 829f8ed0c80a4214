"""Takes a run back to its last good checkpoint: when, what is moved aside, and what rollbacks.jsonl records."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distgan import files
from distgan.errors import UserError
from distgan.recipe import GuardConfig
from distgan.run.folder import RunFolder
from distgan.run.guard import Trouble
from distgan.storage import bundle, checkpoint

_LOWERED = 0.5  # factor of the winning network's learning rate at a rollback


def happened(folder: RunFolder) -> list[dict[str, Any]]:
    """Returns the recorded rollbacks of a run, in order. The last one has the run's current base learning rates.

    Raises:
        UserError: the record is damaged.
    """
    file = folder.rollbacks
    try:
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is damaged: bring back a copy.") from error


@dataclass(frozen=True)
class WayBack:
    """How a run could go back."""

    checkpoint: Literal["older", "later", "none"]
    """Whether there is a whole checkpoint from before the trouble, or only one from after it began, or none."""
    rollbacks: int
    """The number of rollbacks so far."""


@dataclass(frozen=True)
class Verdict:
    """The decision about a trouble."""

    action: Literal["go on", "roll back", "save and stop", "fail"]
    """`fail` ends the run without saving this step, which has a loss, score, weight or moment that is NaN or inf."""
    advice: str
    """A sentence on what the user can do; empty if the run goes on."""


def way_back(folder: RunFolder, since: int, *, every: int) -> WayBack:
    """Finds how a run could go back to the step `since` or an earlier one."""
    good = _last_good(folder, since, every=every)
    times = len(happened(folder))
    if good is None:
        return WayBack("none", times)
    return WayBack("older" if checkpoint.step_of(good) <= since else "later", times)


def decide(guard: GuardConfig, way: WayBack, *, not_finite: bool, ended: bool) -> Verdict:
    """Decides what to do about a trouble. Pure: no file is touched.

    Args:
        guard: the recipe's guard group.
        way: how the run could go back.
        not_finite: whether the trouble is NaN or inf. Otherwise it is a collapse, whose state can be saved.
        ended: whether this is the run's last step.
    """
    # What the user asked for, if it can be done.
    allowed = way.rollbacks < guard.rollbacks
    if guard.on_trouble == "rollback" and allowed and way.checkpoint != "none":
        return Verdict("roll back", "")
    if guard.on_trouble == "warn" and not not_finite:
        return Verdict("go on", "")
    # The run ends here; what remains is the advice.
    action: Literal["fail", "save and stop"] = "fail" if not_finite else "save and stop"
    if ended and action == "save and stop":
        return Verdict(
            action,
            "This was the last step: start a new run with a lower optim.lr; --train.init_from=CHECKPOINT starts it "
            "from an earlier checkpoint.",
        )
    if way.checkpoint != "older":
        return Verdict(
            action,
            "There is no whole checkpoint from before the trouble: start a new run with a lower optim.lr, or with a "
            "smaller checkpoint.every, which saves more often.",
        )
    if allowed:
        return Verdict(action, "--guard.on_trouble=rollback goes on from the last good checkpoint.")
    times = f"{way.rollbacks} time{'s' * (way.rollbacks > 1)}"
    return Verdict(
        action,
        f"It was rolled back {times}, and guard.rollbacks is {guard.rollbacks}: --guard.on_trouble=rollback "
        f"--guard.rollbacks={way.rollbacks + 1} goes back once more, or start a new run with a lower optim.lr.",
    )


def go_back(folder: RunFolder, trouble: Trouble, *, at: int, rates: Mapping[str, float], every: int) -> None:
    """Moves aside what came after the last good checkpoint, and records the rollback. Rank zero only.

    If the process is killed between the two, the run resumes from that checkpoint, meets the same trouble again, and
    comes here again.

    Args:
        folder: the folder of a run that can go back.
        trouble: the reason.
        at: the step at which the trouble was noticed.
        rates: the base learning rate of each network.
        every: `checkpoint.every`.
    """
    good, attempt = _last_good(folder, trouble.since, every=every), len(happened(folder)) + 1
    assert good is not None
    step = checkpoint.step_of(good)
    checkpoint.abandon(folder.checkpoints, after=step)
    for picture in folder.samples.glob("step_????????.png"):
        if int(picture.stem.removeprefix("step_")) > step:
            picture.rename(picture.with_suffix(f".attempt{attempt - 1}.png"))
    lowered = {name: rate * (_LOWERED if name in trouble.winners else 1) for name, rate in rates.items()}
    written = {"attempt": attempt, "trouble": trouble.what, "at": at, "back_to": step, "lr": lowered}
    lines = "".join(json.dumps(one) + "\n" for one in [*happened(folder), written])
    files.replace(folder.rollbacks, lines.encode(), durable=True)  # as durable as the renamed folders


def needed(folder: RunFolder, starts: Iterable[int], *, every: int) -> set[int]:
    """Returns the steps of checkpoints that a rollback to any of `starts` needs: for each, the newest regular one at or
    before it, and the best one as of that checkpoint.
    """
    found = (newest_regular(folder, start, every=every) for start in starts)
    good = {step for step in found if step is not None}
    states = [bundle.read_state(checkpoint.folder_of(folder.checkpoints, step)) for step in good]
    bests = [state["standing"]["best"] for state in states if "standing" in state]
    return {*good, *(best["step"] for best in bests if best is not None)}


def newest_regular(folder: RunFolder, until: int, *, every: int) -> int | None:
    """Returns the step of the newest regular checkpoint (a multiple of `every`) at or before `until`; if there is none,
    of the newest of any kind; None if there is none at all.
    """
    steps = [step for step in checkpoint.steps(folder.checkpoints) if step <= until]
    return max([step for step in steps if step % every == 0] or steps, default=None)


def _last_good(folder: RunFolder, since: int, *, every: int) -> Path | None:
    """Returns the checkpoint to go back to, skipping damaged ones; None if none is whole.

    If the trouble is older than all checkpoints, that is the oldest one.
    """
    root = folder.checkpoints
    step = newest_regular(folder, since, every=every)
    until = checkpoint.steps(root)[0] if step is None and checkpoint.steps(root) else step
    try:
        return checkpoint.newest(root, set_aside=False, until=until) if until is not None else None
    except ValueError:  # all of them are damaged
        return None
