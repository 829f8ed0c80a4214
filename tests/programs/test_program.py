"""The real thing, small: `accelerate launch` with wandb, stopped by a signal, resumed, sampled from."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from PIL import Image
from support.commands import BIN, wandb_history
from support.programs import launch
from support.runs import REPOSITORY, metrics, steps, tensors, wait_for

import distgan

RECIPE = [
    *("--config", "configs/quickstart.yaml"),
    *("--model.width=4", "--model.latent_dim=8", "--train.batch_size=8", "--train.steps=60", "--track.log_every=7"),
    *("--track.sample_every=20", "--checkpoint.every=50"),
]
LAUNCH = [str(BIN / "accelerate"), "launch", "--config_file"]


def start(
    run: Path,
    log: Path,
    *overrides: str,
    launcher: Sequence[str] = ("launch/cpu2.yaml",),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return subprocess.Popen(
        [*LAUNCH, *launcher, "-m", "distgan.train", *RECIPE, f"--run.dir={run}", *overrides],
        cwd=REPOSITORY,
        env=inherited | {"NETRC": "/dev/null"} | environment,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A run of two processes, stopped by a signal at no particular moment and started again; its folder and output."""
    folder = tmp_path_factory.mktemp("program")
    run, first, second = folder / "run", folder / "first.log", folder / "second.log"
    # The end is far: the signal comes first. SIGUSR2 is what Slurm is asked to send ahead of a time limit.
    forwarded = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1,SIGUSR2"}
    process = start(run, first, "--train.steps=100000", environment=forwarded)
    wait_until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 3, process, first)
    process.send_signal(signal.SIGUSR2)
    process.wait(60)
    return run, first, second


def wait_until(condition: Callable[[], object], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def test_a_signal_saves_and_the_same_command_goes_on_as_if_nothing_had_happened(program, tmp_path):
    run, first, second = program
    (stopped,) = steps(run)[-1:]
    assert f"stop signal: saving step {stopped}\n" in first.read_text()
    assert json.loads((run / "preempted").read_text()) == {"step": stopped}
    assert "Traceback" not in first.read_text().split("stop signal")[0]
    until = [f"--run.stop_at={stopped + 30}", "--train.steps=100000"]
    process = start(run, second, *until)
    assert process.wait(120) == 0, second.read_text()
    whole = tmp_path / "whole"  # the same run, undisturbed
    assert launch([*RECIPE, f"--run.dir={whole}", *until, "--track.to=none"], world=2) == [0, 0]
    assert tensors(run, stopped + 30) == tensors(whole, stopped + 30)
    assert not (run / "preempted").exists()
    assert metrics(run) == metrics(whole)

    output = second.read_text()
    assert f"resuming at step {stopped} on 2 x cpu, 4 images each" in output
    logged = [line for line in output.splitlines() if line.startswith("step ")]
    assert len(logged) == len(set(logged)) == len([m for m in metrics(run) if m["step"] > stopped])  # by one rank
    assert "recording offline" in output
    for place in ("samples", "checkpoints", "generator", "wandb/offline-run"):
        assert str(run / place) in output
    for command in ("xdg-open", "ls", "distgan sample", "wandb leet", "wandb sync"):
        assert command in output

    wandb_runs = sorted((run / "wandb").glob("offline-run-*"))
    assert len(wandb_runs) == 2
    assert len({folder.name.rsplit("-", 1)[1] for folder in wandb_runs}) == 1  # one id
    history = [record["history"]["item"] for folder in wandb_runs for record in wandb_history(folder)]
    by_step = {record["_step"]: record for record in history if "images_seen" in record}
    for line in metrics(run):
        assert {name: by_step[line["step"]][name] for name in line} == line
        assert by_step[line["step"]]["throughput/images_per_s"] > 0
    assert {record["_step"] for record in history if any("samples" in key for key in record)} >= {20, 40}


def test_the_exported_generator_needs_neither_data_nor_recipe(program, tmp_path):
    run, *_ = program
    generator = distgan.load_generator(run)
    images = generator.sample(70, seed=3)
    assert images.dtype == torch.uint8
    assert images.shape == (70, 1, 32, 32)
    assert torch.equal(distgan.load_generator(run / "generator").sample(5, seed=3), images[:5])
    assert not torch.equal(generator.sample(5, seed=4), images[:5])
    out = tmp_path / "grid.png"
    sample = [str(BIN / "distgan"), "sample", str(run), "--num", "64", "--out", str(out)]
    assert subprocess.run(sample, capture_output=True, text=True, check=True).stdout == f"{out}\n"
    with Image.open(out) as grid:
        assert grid.size == (8 * 34 + 2, 8 * 34 + 2)


def test_killing_the_launcher_leaves_no_orphan_and_the_same_command_goes_on(tmp_path):
    run, whole, log = tmp_path / "run", tmp_path / "whole", tmp_path / "log"
    overrides = ["--train.steps=100000", "--checkpoint.every=10", "--track.to=none"]
    process = start(run, log, *overrides)
    wait_until(lambda: steps(run), process, log)
    process.kill()
    process.wait(10)
    wait_until_gone(run)  # the kernel kills them; they may be in the middle of dying
    until = [*overrides, f"--run.stop_at={steps(run)[-1] + 15}"]
    assert launch([*RECIPE, f"--run.dir={run}", *until], world=2) == [0, 0]
    assert launch([*RECIPE, f"--run.dir={whole}", *until], world=2) == [0, 0]
    assert tensors(run, steps(run)[-1]) == tensors(whole, steps(whole)[-1])
    assert metrics(run) == metrics(whole)


def test_a_signal_to_the_launcher_of_one_process_saves(tmp_path):
    """Accelerate's launcher of one process forwards no signal: it dies, and the worker saves and leaves."""
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(run, log, "--train.steps=100000", "--track.to=none", launcher=["launch/gpu1.yaml"])
    wait_until(lambda: (run / "metrics.jsonl").exists() and metrics(run), process, log)
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    wait_until_gone(run)
    (saved,) = steps(run)[-1:]
    assert f"stop signal: saving step {saved}\n" in log.read_text()


def test_a_launcher_with_restarts_brings_the_group_back_after_a_killed_rank(tmp_path):
    run, whole, log = tmp_path / "run", tmp_path / "whole", tmp_path / "log"
    overrides = ["--train.steps=100000", "--checkpoint.every=10", "--track.to=none"]
    process = start(run, log, *overrides, launcher=["launch/cpu2.yaml", "--max_restarts", "1"])
    wait_until(lambda: steps(run), process, log)
    victim = random.choice([pid for pid in workers(run) if pid != process.pid])
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: "resuming at step" in log.read_text(), process, log)
    resumed = int(log.read_text().split("resuming at step ")[1].split()[0])
    wait_until(lambda: metrics(run)[-1]["step"] > resumed, process, log)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    until = [*overrides, f"--run.stop_at={steps(run)[-1]}"]
    assert launch([*RECIPE, f"--run.dir={whole}", *until], world=2) == [0, 0]
    assert tensors(run, steps(run)[-1]) == tensors(whole, steps(whole)[-1])
    assert metrics(run) == metrics(whole)
    assert log.read_text().count("distgan: error: ") == 1  # by the one that was left, before the launcher ended it
    assert " was lost at step " in log.read_text()


def test_a_wandb_server_that_does_not_answer_holds_up_nothing(tmp_path):
    """It takes connections and says nothing; the ranks' patience with each other is shorter than wandb's with it."""
    run, log = tmp_path / "run", tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
            "WANDB_API_KEY": "0" * 40,
            "WANDB_INIT_TIMEOUT": "12",
        }
        process = start(run, log, "--run.timeout=8", "--train.steps=100000", environment=environment)
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 3, process, log)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert "the server cannot be reached" in log.read_text()
    assert f"stop signal: saving step {steps(run)[-1]}\n" in log.read_text()
    (recorded,) = (run / "wandb").glob("offline-run-*")
    history = [record["history"]["item"] for record in wandb_history(recorded)]
    assert [record["_step"] for record in history if "step" in record] == [m["step"] for m in metrics(run)]


@pytest.mark.slow
def test_soak(tmp_path):
    """Thirty rounds of kill -9, of one worker, of all or of the launcher, at random moments of training and saving."""
    run, whole, log = tmp_path / "run", tmp_path / "whole", tmp_path / "log"
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown where the test fails
    rng = random.Random(seed)
    overrides = ["--train.steps=1000000", "--checkpoint.every=3", "--checkpoint.keep_last=2", "--track.to=none"]
    overrides += ["--run.timeout=20"]
    for _ in range(30):
        before = steps(run)[-1:]
        process = start(run, log, *overrides)
        wait_until(lambda before=before: steps(run)[-1:] > before, process, log)
        time.sleep(rng.random())
        before = steps(run)[-1:]
        pids = [pid for pid in workers(run) if pid != process.pid]
        assert len(pids) == 2
        for victim in rng.choice([pids[:1], pids[1:], pids, [process.pid]]):
            os.kill(victim, signal.SIGKILL)
        process.wait(60)
        wait_until_gone(run)
        assert steps(run)[-1:] >= before
        assert not list((run / "checkpoints").glob("*.damaged*"))
    until = [*overrides, f"--run.stop_at={steps(run)[-1] + 20}"]
    for folder in (run, whole):
        assert launch([*RECIPE, f"--run.dir={folder}", *until], world=2, timeout=600) == [0, 0]
    assert tensors(run, steps(run)[-1]) == tensors(whole, steps(whole)[-1])
    assert metrics(run) == metrics(whole)
    print(f"30 rounds, {steps(run)[-1]} steps")


def wait_until_gone(run: Path) -> None:
    wait_for(lambda: not workers(run), every=0.02)


def workers(run: Path) -> list[int]:
    """Processes that were started for this run's folder and still live, the launcher included."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"--run.dir={run}".encode() in command.read_bytes().split(b"\0"):
                found.append(int(command.parent.name))
    return found
