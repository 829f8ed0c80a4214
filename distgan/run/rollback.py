"""Going back to a run's last good checkpoint: when, what is put aside, and what is written down, in rollbacks.jsonl."""

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

_LOWERED = 0.5  # what becomes of the winning network's learning rate


def happened(folder: RunFolder) -> list[dict[str, Any]]:
    """Returns the rollbacks of a run, in order. Their number is the run's attempt; the last one has its learning rates.

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
    """What a run could go back to."""

    checkpoint: Literal["older", "later", "none"]
    """The whole checkpoint to go back to: one older than the trouble, or only one from after it began, or none."""
    rollbacks: int
    """How often the run was rolled back so far."""


@dataclass(frozen=True)
class Verdict:
    """What is done about a trouble."""

    action: Literal["go on", "roll back", "save and stop", "fail"]
    """`fail`: ends without saving this step, whose weights are NaN or inf."""
    advice: str
    """What the user can do, in a sentence, where the run ends."""


def way_back(folder: RunFolder, since: int, *, every: int) -> WayBack:
    """Looks for the way back to before a step."""
    good = _last_good(folder, since, every=every)
    times = len(happened(folder))
    if good is None:
        return WayBack("none", times)
    return WayBack("older" if checkpoint.step_of(good) <= since else "later", times)


def decide(guard: GuardConfig, way: WayBack, *, not_finite: bool, ended: bool) -> Verdict:
    """Decides what is done about a trouble.

    Args:
        guard: what the user wants.
        way: the way back.
        not_finite: whether it is NaN or inf; else a collapse, which can be saved.
        ended: whether this is the run's last step, after which the saved run is complete.
    """
    allowed = way.rollbacks < guard.rollbacks
    if guard.on_trouble == "rollback" and allowed and way.checkpoint != "none":
        return Verdict("roll back", "")
    if guard.on_trouble == "warn" and not not_finite:
        return Verdict("go on", "")
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
            "No whole checkpoint is older than the trouble: start a new run with a lower optim.lr, or with a smaller "
            "checkpoint.every, which saves more often.",
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
    """Puts aside what came after the last good checkpoint, and writes the rollback down. For rank zero alone.

    A kill between the two leaves a run that walks into the same hole again and comes here again.

    Args:
        folder: of a run that can go back.
        trouble: why.
        at: step at which it was noticed.
        rates: the learning rate of each network, from which its schedule starts.
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
    files.replace(folder.rollbacks, lines.encode(), durable=True)  # as the folders are that were renamed


def needed(folder: RunFolder, starts: Iterable[int], *, every: int) -> set[int]:
    """Returns the checkpoints that a rollback to before one of these steps needs: it, and the best as of it."""
    found = (newest_regular(folder, start, every=every) for start in starts)
    good = {step for step in found if step is not None}
    states = [bundle.read_state(checkpoint.folder_of(folder.checkpoints, step)) for step in good]
    bests = [state["standing"]["best"] for state in states if "standing" in state]
    return {*good, *(best["step"] for best in bests if best is not None)}


def newest_regular(folder: RunFolder, until: int, *, every: int) -> int | None:
    """Returns the newest checkpoint up to a step that is a multiple of `every`, or else the newest of any kind."""
    steps = [step for step in checkpoint.steps(folder.checkpoints) if step <= until]
    return max([step for step in steps if step % every == 0] or steps, default=None)


def _last_good(folder: RunFolder, since: int, *, every: int) -> Path | None:
    """Returns the checkpoint to go back to; the oldest, if the trouble is older than what is kept."""
    root = folder.checkpoints
    step = newest_regular(folder, since, every=every)
    until = checkpoint.steps(root)[0] if step is None and checkpoint.steps(root) else step
    try:
        return checkpoint.newest(root, set_aside=False, until=until) if until is not None else None
    except ValueError:  # damaged, all of them
        return None
