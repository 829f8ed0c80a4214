"""`distgan runs` on real runs: what state they are in, what they take, and what is damaged; nothing is disturbed."""

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import save_file
from support.commands import complaint
from support.programs import launch, nan_at, processes, signal_at
from support.runs import TINY, metrics, steps, tensors, wait_for

from distgan import cli
from distgan.evaluation.extractors import Classifier

STOPPED = partial(signal_at, 4, 0, signal.SIGTERM)
LONG = ["--train.steps=100000", "--track.log_every=2"]


def listed(folder, capfd, tmp_path):
    """What `distgan runs` prints of a folder, by lines, and what it writes, by the runs' names."""
    file = tmp_path / "runs.json"
    assert cli.main(["runs", str(folder), f"--json={file}"]) == 0
    *lines, said = capfd.readouterr().out.splitlines()
    assert said == f"written to  {file}"
    return lines, {Path(run["folder"]).name: run for run in json.loads(file.read_text())["runs"]}


def contents(folder):
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}


def test_every_state_is_told(tmp_path, small_run, capfd):
    runs, seen = tmp_path / "runs", []
    runs.mkdir()
    shutil.copytree(small_run, runs / "done")

    def look_and_kill(ranks):
        run = runs / "sweep" / "killed"
        wait_for(lambda: steps(run) and len(metrics(run)) > 4)
        seen.append(listed(runs, capfd, tmp_path))
        ranks[0].kill()

    guarded = ["--guard.after=0", "--guard.patience=1", "--guard.on_trouble=stop", "--track.log_every=1"]
    for name, argv, setups, code, meanwhile in (
        ("preempted", [], [STOPPED], 0, None),
        ("asked to stop", ["--run.stop_at=5"], [], 0, None),
        ("guarded", guarded, [], 6, None),  # an untrained generator is collapsed
        ("diverged", ["--track.log_every=1"], [partial(nan_at, 8, 0)], 3, None),
        ("sweep/killed", LONG, [], -signal.SIGKILL, look_and_kill),
    ):
        watched = {"meanwhile": meanwhile} if meanwhile is not None else {}
        assert launch([*TINY, *argv, f"--run.dir={runs / name}"], setups=setups, **watched) == [code], name
    ((_, running),) = seen
    assert running["killed"]["state"] == "running"
    assert running["killed"]["writer"].startswith("process ")
    lines, found = listed(runs, capfd, tmp_path)
    assert {name: run["state"] for name, run in found.items()} == {
        "asked to stop": "stopped",
        "diverged": "collapsed",
        "done": "done",
        "guarded": "collapsed",
        "killed": "stopped",
        "preempted": "preempted",
    }
    assert [run["writer"] for run in found.values()] == [None] * 6
    assert {name: (run["step"], run["saved"], run["last_step"]) for name, run in found.items() if name != "killed"} == {
        "asked to stop": (5, 5, 11),
        "diverged": (8, 6, 11),
        "done": (11, 11, 11),
        "guarded": (1, 1, 11),
        "preempted": (4, 4, 11),
    }
    assert found["killed"]["step"] == metrics(runs / "sweep" / "killed")[-1]["step"] >= found["killed"]["saved"] >= 6
    assert found["done"]["number"] == "loss/generator"
    assert found["done"]["value"] == metrics(small_run)[-1]["loss/generator"]
    assert found["guarded"]["troubles"] == ["collapsed"]
    assert not any(run["problems"] for run in found.values())
    # In a file, no line is broken, and names can be pasted into a shell.
    assert [line.split("  ")[0] for line in lines] == [
        "run",
        f"'{runs}/asked to stop'",
        *(f"{runs}/{name}" for name in ("diverged", "done", "guarded", "preempted", "sweep/killed")),
        f'{runs}/guarded: the guard reports "collapsed"',
    ]
    assert "11 of 11" in lines[3]


def test_disk_is_what_du_says_and_the_last_number_is_the_evaluation(tmp_path, capfd):
    run = tmp_path / "runs" / "measured"
    weights = tmp_path / "extractor.safetensors"  # untrained, which is quick
    save_file(Classifier(size=(32, 32), channels=1, classes=10).state_dict(), weights)
    argv = [*TINY, "--eval.every=3", "--eval.extractor=classifier", "--eval.num=200", "--train.steps=5"]
    argv += [f"--eval.extractor_weights={weights}", "--track.log_every=1", "--run.stop_at=4", f"--run.dir={run}"]
    assert launch(argv) == [0]
    _, found = listed(run, capfd, tmp_path)  # the run's own folder, too
    evaluated = metrics(run)[2]
    assert found["measured"]["number"] == "eval/fd_classifier"
    assert found["measured"]["value"] == evaluated["eval/fd_classifier"]
    assert (found["measured"]["number_step"], found["measured"]["step"]) == (3, 4)
    files = [str(file) for file in run.rglob("*") if file.is_file()]
    du = subprocess.run(["du", "--block-size=1", "--total", *files], capture_output=True, text=True, check=True)
    assert found["measured"]["disk"] == int(du.stdout.splitlines()[-1].split()[0]) > 0


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda run: (run / "config.yaml").write_text("run: ["), "config.yaml is damaged"),
        (lambda run: (run / "config.yaml").write_text("- 1"), "config.yaml is damaged"),
        (lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"), "config.yaml is damaged"),
        (lambda run: (run / "config.yaml").unlink(), "config.yaml is not there"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\0" * 50 + b"\n\xff\n"), "metrics.jsonl is damaged"),
        (
            lambda run: os.truncate(run / "checkpoints" / "step_00000011" / "average.safetensors", 7),
            "the checkpoint step_00000011 is damaged (average.safetensors has 7 bytes instead of ",
        ),
        (
            lambda run: (run / "checkpoints" / "step_00000011" / "manifest.json").unlink(),
            "the checkpoint step_00000011 is damaged (manifest.json cannot be read)",
        ),
        (
            lambda run: (run / "checkpoints" / "step_00000011" / "state.json").write_bytes(b"[" * 3),
            "the checkpoint step_00000011 is damaged (state.json has 3 bytes instead of ",
        ),
        (
            lambda run: [
                shutil.rmtree(run / "checkpoints"),
                (run / "generator" / "config.json").write_text("{}"),
            ],
            "generator/config.json is damaged",
        ),
    ],
)
def test_a_damaged_run_is_listed_with_what_is_wrong(tmp_path, small_run, capfd, damage, expected):
    runs = tmp_path / "runs"
    shutil.copytree(small_run, runs / "damaged")
    shutil.copytree(small_run, runs / "whole")
    damage(runs / "damaged")
    before = contents(runs)
    lines, found = listed(runs, capfd, tmp_path)
    assert found["whole"]["state"] == "done"
    assert found["whole"]["problems"] == []
    (problem,) = found["damaged"]["problems"]
    assert problem.startswith(expected)
    assert lines[3:] == [f"{runs}/damaged: {problem}"]
    if "checkpoint step" in expected:
        assert (found["damaged"]["saved"], found["damaged"]["state"]) == (6, "stopped")
    assert contents(runs) == before


def test_a_line_cut_short_by_a_kill_is_no_damage(tmp_path, small_run, capfd):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 12, "loss/gen')
    _, found = listed(tmp_path, capfd, tmp_path)
    assert (found["run"]["step"], found["run"]["problems"]) == (11, [])


def _look(lock, go, held):
    with lock.open() as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        held.set()
        go.wait(60)


def test_looking_keeps_no_run_from_starting(tmp_path, small_run):
    """A run that begins while somebody holds the lock that looking takes, begins once it is given back."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    go, held = processes.Event(), processes.Event()
    looker = processes.Process(target=_look, args=(run / ".lock", go, held), daemon=True)
    looker.start()
    assert held.wait(60)

    def let_go(ranks):
        def at_the_lock():
            with contextlib.suppress(OSError):
                opened = Path(f"/proc/{ranks[0].pid}/fd").iterdir()
                return any(file.readlink() == run / ".lock" for file in opened)

        wait_for(at_the_lock)
        go.set()

    assert launch([*TINY, f"--run.dir={run}"], meanwhile=let_go) == [0]
    assert tensors(run, 11) == tensors(small_run, 11)


def test_a_terminal_of_80_columns_shows_long_names_whole(tmp_path, small_run):
    name = "a-name-that-says-everything-about-its-run-" * 2 + "[bold]"
    shutil.copytree(small_run, tmp_path / "runs" / name)
    terminal, inside = pty.openpty()
    argv = [sys.executable, "-m", "distgan", "runs"]
    process = subprocess.Popen(argv, stdout=inside, cwd=tmp_path, env=os.environ | {"TERM": "xterm", "COLUMNS": "80"})
    os.close(inside)
    shown = b""
    with contextlib.suppress(OSError):  # the program closed the terminal
        while some := os.read(terminal, 65536):
            shown += some
    assert process.wait(30) == 0
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in shown.decode().splitlines()]
    assert max(map(len, lines)) <= 80
    assert "".join(line.split()[0] for line in lines[1:]) == f"'runs/{name}'"
    assert "11 of 11" in lines[1]
    assert lines[1].rstrip().endswith("MB")


def test_torch_is_not_imported(small_run):
    argv = [sys.executable, "-X", "importtime", "-m", "distgan", "runs", str(small_run)]
    found = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "done" in found.stdout
    modules = {line.rsplit("|", 1)[1].strip() for line in found.stderr.splitlines() if "|" in line}
    assert {"distgan.storage.places", "rich.table"} <= modules
    assert not {"torch", "accelerate", "jsonargparse"} & modules


def test_what_is_no_folder_of_runs(tmp_path, capfd):
    assert "no such folder" in complaint(capfd, "runs", str(tmp_path / "none"))
    assert "DIR is empty" in complaint(capfd, "runs", "")
    assert "no folder" in complaint(capfd, "runs", str(tmp_path), "--json=/no/such/place.json")
    (tmp_path / "pictures").mkdir()
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert capfd.readouterr().out == f"there are no runs in {tmp_path}\n"
