"""The parts of the page that are tables and texts: evaluations, what happened, recipes, commands."""

from collections.abc import Sequence
from typing import Any

from distgan.paths import quoted
from distgan.recipe.identity import is_beside
from distgan.run_page.markup import cut, escaped, note, number, setting, table
from distgan.run_page.records import Invocation, RunRecord
from distgan.storage import report as reports
from distgan.storage.report import Report

Runs = Sequence[tuple[str, RunRecord]]
"""Runs with their names."""

_LISTED = 200  # most lines of each kind of all runs together: starts, findings of the guard, rollbacks
_FEWEST = 3  # of them of each run
_SIGNALS = {
    "SIGINT": "Ctrl-C",
    "SIGTERM": "kill, scancel or a launcher",
    "SIGHUP": "a closed terminal",
    "SIGQUIT": "a keyboard or a launcher",
    "SIGUSR1": "a cluster ahead of a limit, or a user",
    "SIGUSR2": "a cluster ahead of a limit, or a user",
    "SIGXCPU": "a limit of CPU time",
}


def metrics(runs: Runs) -> str:
    """Returns the evaluations of each run, and why they cannot be compared."""
    measured = {name: record.last for name, record in runs if record.last is not None}
    if not measured:
        return "<p>No run was evaluated: set eval.every, or run <code>distgan evaluate</code>.</p>"
    parts = [note(f"Cannot be compared: {said}.") for said in reports.differences(measured)]
    for name, record in runs:
        if record.last is not None:
            parts.append(_measured(name, record.best, record.last, floor(record)))
    left = [name for name, record in runs if record.last is None]
    parts += [note(f"Not evaluated: {', '.join(left)}.")] if left else []
    return "\n".join(parts)


def events(runs: Runs) -> str:
    """Returns what happened to each run: starts and stops, the guard's findings, rollbacks."""
    most = _most(len(runs))
    parts = []
    for name, record in runs:
        heading = f"<h3>{escaped(name)}</h3>" if len(runs) > 1 else ""
        parts += [heading, *(one(record, most) for one in (_starts, _troubles, _rollbacks))]
    return "\n".join(parts)


def recipes(runs: Runs) -> str:
    """Returns what differs between the recipes, and all settings of the first."""
    readable = {name: record.recipe for name, record in runs if record.recipe}
    if not readable:
        return "<p>No config.yaml can be read.</p>"
    parts = []
    if len(readable) > 1:
        parts.append(_differences(readable))
    first, recipe = next(iter(readable.items()))
    rows = [[key, setting(value)] for key, value in recipe.items()]
    settings = table(f"The recipe of {first}", ["Setting", "Value"], rows)
    parts.append(f"<details><summary>All settings of {escaped(first)}</summary>{settings}</details>")
    return "\n".join(parts)


def commands(runs: Runs) -> str:
    """Returns commands to go on with each run."""
    parts = []
    for name, record in runs:
        heading = f"<h3>{escaped(name)}</h3>" if len(runs) > 1 else ""
        lines = "\n".join(f"# {what}\n{command}" for command, what in _commands_of(record))
        parts.append(f'{heading}<pre tabindex="0"><code>{escaped(lines)}</code></pre>')
    if len(runs) > 1:
        every = " ".join(quoted(record.path) for _, record in runs)
        lines = f"# side by side in one picture\ndistgan compare {every}\n# this page anew\ndistgan report {every}"
        parts.append(f'<h3>All of them</h3><pre tabindex="0"><code>{escaped(lines)}</code></pre>')
    parts.append(
        note(
            "On several processes, <code>accelerate launch … -m distgan.train</code> stands for <code>distgan "
            "train</code>; their number does not change the updates.",
            markup=True,
        )
    )
    return "\n".join(parts)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluations.


def floor(record: RunRecord) -> dict[str, float] | None:
    """Returns what real images score by the last protocol; None if that is unknown."""
    return record.last.floor if record.last is not None else None


def best(report: Report | None) -> str:
    """Returns the metric that decides, with its step; nothing without a report."""
    if report is None or not report.metrics:
        return ""
    metric = report.best_by if report.best_by in report.metrics else next(iter(report.metrics))
    return f"{metric} {report.metrics[metric]:.5g} at step {report.step:,}"


def _measured(name: str, best: Report | None, last: Report, floor: dict[str, float] | None) -> str:
    columns = [("Last", last)] if best is None or best.step == last.step else [("Best", best), ("Last", last)]
    header = ["Metric", *(f"{which}: step {report.step:,}" for which, report in columns)]
    header += ["Real images"] if floor else []
    metrics = dict.fromkeys(metric for _, report in columns for metric in report.metrics)
    rows = [
        [metric, *(number(report.metrics.get(metric)) for _, report in columns)]
        + ([number(floor.get(metric))] if floor else [])
        for metric in metrics
    ]
    numbers = table(f"Evaluations of {name}", header, rows, numbers=range(1, len(header)))
    said = (
        note("Real images is the floor: what images of the other split score.")
        if floor
        else note("There is no floor: the data have no other split, or the evaluation is not exported yet.")
    )
    protocol = table("The protocol", ["Part", "Value"], [[part, setting(v)] for part, v in last.protocol.items()])
    return f"{numbers}{said}<details><summary>Protocol of {escaped(name)}</summary>{protocol}</details>"


# ----------------------------------------------------------------------------------------------------------------------
# Events.


def state(record: RunRecord) -> str:
    """Says whether a run is done, stopped or running, as far as it is recorded."""
    last = record.invocations[-1] if record.invocations else None
    if last is not None and last.end is not None:
        return _ending(last)
    if record.running:
        return "running"
    if last is not None:
        return _ending(last) if record.running is False else "running, or killed: no end is recorded"
    if record.complete:
        return "done"
    return "not recorded by its version of distgan" if record.metrics.lines else "not started"


def _ending(one: Invocation) -> str:
    """Says how an invocation ended and who stopped it."""
    if one.end is None:
        return "no end is recorded: killed, or lost with its machine or another process"
    how, why = one.end.get("how"), cut(str(one.end.get("why", "")))
    return {
        "done": "done",
        "stop_at": "stopped by run.stop_at, and saved",
        "signal": f"stopped by the signal {why} ({_SIGNALS.get(why, 'whoever sent it')}), and saved",
        "guard": f"stopped by the guard, and saved: {why}",
        "error": f"failed: {why}",
    }.get(str(how), str(how))


def _starts(record: RunRecord, most: int) -> str:
    if not record.invocations:
        return note("Starts and stops: history.jsonl is missing; early versions did not write it.")
    rows = []
    for i, one in enumerate(record.invocations):
        start, end = one.start, one.end or {}
        last = i == len(record.invocations) - 1
        where = [
            f"{start.get('processes', '?')} x {start.get('device', '?')} on {start.get('host', '?')}",
            *([f"job {start['job']}"] if "job" in start else []),
        ]
        rows.append(
            [
                _time(start),
                state(record) if last else _ending(one),
                f"{start['step']:,}" if _is_step(start) else "?",
                f"{end['step']:,}" if _is_step(end) else "?",
                _time(end),
                ", ".join(where),
            ]
        )
    header = ["Started (UTC)", "How it ended", "From step", "To step", "Ended (UTC)", "On"]
    return table("Starts and stops", header, rows[-most:], numbers=(2, 3)) + _cut_off(len(rows), most)


def _cut_off(count: int, most: int) -> str:
    return note(f"Only the last {most} of {count:,} are listed.") if count > most else ""


def _troubles(record: RunRecord, most: int) -> str:
    found = [
        *((step, what, "") for step, what in record.metrics.troubles),
        *((step, what, "taken back by a rollback") for step, what in record.abandoned_troubles),
    ]
    if not found:
        return "<p>No finding of the guard is recorded.</p>"
    rows = [[f"{step:,}", cut(what), then] for step, what, then in sorted(found)[-most:]]
    return table("What the guard found", ["Step", "What", "Then"], rows, numbers=(0,)) + _cut_off(len(found), most)


def _rollbacks(record: RunRecord, most: int) -> str:
    if not record.rollbacks:
        return ""
    rows = [
        [
            *(f"{one[key]:,}" if type(one.get(key)) is int else "?" for key in ("at", "back_to")),
            cut(str(one.get("trouble", ""))),
            setting(one.get("lr")),
        ]
        for one in record.rollbacks[-most:]
    ]
    return table("Rollbacks", ["From step", "to step", "Because", "Learning rates since"], rows, numbers=(0, 1))


def _is_step(line: dict[str, Any]) -> bool:
    return type(line.get("step")) is int


def _time(line: dict[str, Any]) -> str:
    return cut(str(line.get("time", "?"))).replace("T", " ").replace("+00:00", "")


# ----------------------------------------------------------------------------------------------------------------------
# Recipes and commands.


def _differences(recipes: dict[str, dict[str, Any]]) -> str:
    keys = dict.fromkeys(key for recipe in recipes.values() for key in recipe)
    differing = [key for key in keys if len({setting(recipe.get(key)) for recipe in recipes.values()}) > 1]
    rows = [
        [key, *(setting(recipe[key]) if key in recipe else "—" for recipe in recipes.values()), _changes(key)]
        for key in differing
    ]
    if not rows:
        return "<p>The recipes are the same.</p>"
    return table("Differences between the recipes", ["Setting", *recipes, "Changes the training"], rows)


def _changes(key: str) -> str:
    try:
        return "no" if is_beside(key) else "yes"
    except (KeyError, ValueError):  # of another version
        return "?"


def _commands_of(record: RunRecord) -> list[tuple[str, str]]:
    run, last = quoted(record.path), record.last_step
    train = f"distgan train --config {quoted(record.path / 'config.yaml')}"
    if record.recipe.get("run.dir") != str(record.path):  # it was moved, or is named from another folder
        train += f" --run.dir={run}"
    found = []
    if last is not None and record.metrics.step < last:
        found.append((train, "go on"))
    elif record.recipe.get("optim.schedule") == "constant" and last is not None:
        found.append((f"{train} --run.extend={last}", "train longer"))
    return [
        *found,
        (f"distgan sample {run} --num 64 --out grid.png", "draw images"),
        (f"distgan interpolate {run} --out walk.gif", "walk between images"),
        (f"distgan evaluate {run} --json evaluation.json", "measure it"),
        (f"distgan export {run} --to generator", "a folder to share"),
        (f"distgan report {run}", "this page anew"),
    ]


def marks(record: RunRecord, runs: int) -> list[tuple[int, str]]:
    """Returns what the charts mark on their axes: steps, and what happened there, of one of `runs` runs."""
    most = _most(runs)
    restarts = [(int(one.start["step"]), "restart") for one in record.invocations[1:] if _is_step(one.start)]
    back = [(int(one["back_to"]), "rollback") for one in record.rollbacks if type(one.get("back_to")) is int]
    troubles = [(step, "the guard found something") for step, _ in record.metrics.troubles[-most:]]
    return [*restarts[-most:], *back[-most:], *troubles]


def _most(runs: int) -> int:
    """Returns how many lines of a kind are listed for each of the runs."""
    return max(_FEWEST, _LISTED // runs)
