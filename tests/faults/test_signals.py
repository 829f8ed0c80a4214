"""Hangups and other signals: the run saves and goes on later, except under nohup, where it simply goes on."""

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path

import pytest
from support.programs import launch, signal_at
from support.runs import REPOSITORY, TINY, metrics, steps, tensors, wait_for

BIN = Path(sys.executable).parent


def ignore_hangups() -> None:
    """As nohup leaves its child."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def of_torchs_launcher() -> None:
    os.environ["TORCHELASTIC_RUN_ID"] = "none"


@pytest.mark.parametrize(
    ("number", "world", "before"),
    [
        (signal.SIGHUP, 2, []),
        (signal.SIGHUP, 2, [ignore_hangups, of_torchs_launcher]),  # it hears a hangup itself, and passes it on
        (signal.SIGQUIT, 2, []),
        (signal.SIGXCPU, 1, []),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, small_run, number, world, before):
    run, setups = tmp_path / "run", [*before, partial(signal_at, 3, 0, number)]
    argv = [*TINY, f"--run.dir={run}"]
    assert launch(argv, world=world, setups=setups) == [0] * world
    (saved,) = steps(run)
    assert saved in (3, 4)
    assert json.loads((run / "preempted").read_text()) == {"step": saved}
    assert launch(argv, world=world) == [0] * world
    assert not (run / "preempted").exists()
    if world == 1:
        assert tensors(run, 11) == tensors(small_run, 11)
        assert metrics(run) == metrics(small_run)


def test_a_hangup_under_nohup_ends_nothing(tmp_path, small_run):
    run = tmp_path / "run"
    assert launch([*TINY, f"--run.dir={run}"], setups=[ignore_hangups, partial(signal_at, 3, 0, signal.SIGHUP)]) == [0]
    assert steps(run) == [6, 11]
    assert tensors(run, 11) == tensors(small_run, 11)


def test_a_hangup_of_the_launcher_under_nohup_saves(tmp_path):
    """torch's launcher listens to hangups whatever nohup has asked, and ends its workers."""
    run, log = tmp_path / "run", tmp_path / "log"
    launcher = [str(BIN / "accelerate"), "launch", "--config_file", "launch/cpu2.yaml", "-m", "distgan.train"]
    process = subprocess.Popen(
        ["nohup", *launcher, *TINY, f"--run.dir={run}", "--train.steps=100000", "--checkpoint.every=100000"],
        cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log.open("w"), stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for(lambda: (run / "metrics.jsonl").exists() and metrics(run), said=log.read_text)
    process.send_signal(signal.SIGHUP)
    process.wait(60)
    (saved,) = steps(run)
    assert json.loads((run / "preempted").read_text()) == {"step": saved}
    assert f"stop signal: saving step {saved}\n" in log.read_text()


def test_a_terminal_that_closes_saves(tmp_path):
    """Its kernel sends a hangup, and whatever is written from then on is refused."""
    run = tmp_path / "run"
    argv = [str(BIN / "distgan"), "train", *TINY, f"--run.dir={run}", "--train.steps=100000"]
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [*argv, "--checkpoint.every=100000"], stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(inside)
    os.set_blocking(terminal, False)

    def trains() -> bool:
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 65536)  # it would fill
        return (run / "metrics.jsonl").exists() and bool(metrics(run))

    wait_for(trains)
    os.close(terminal)
    assert process.wait(60) == 0
    (saved,) = steps(run)
    assert json.loads((run / "preempted").read_text()) == {"step": saved}
