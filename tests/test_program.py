"""The real thing, small: `accelerate launch` with wandb, stopped by a signal, resumed, sampled from."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, metrics, steps, tensors
from PIL import Image
from programs import launch

import distgan

BIN = Path(sys.executable).parent
RECIPE = [
    *("--config", "configs/quickstart.yaml"),
    *("--model.width=4", "--model.latent_dim=8", "--train.batch_size=8", "--train.steps=60", "--track.log_every=7"),
    *("--track.sample_every=20", "--checkpoint.every=50"),
]
LAUNCH = [str(BIN / "accelerate"), "launch", "--config_file"]


def start(run: Path, log: Path, *overrides: str, launch_file: str = "launch/cpu2.yaml") -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return subprocess.Popen(
        [*LAUNCH, launch_file, "-m", "distgan.train", *RECIPE, f"--run.dir={run}", *overrides],
        cwd=REPOSITORY,
        env=environment | {"NETRC": "/dev/null"},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )


def wandb_history(folder: Path) -> list[dict]:
    """What wandb recorded in an offline run, read back by its own tool."""
    inspect = [str(BIN / "wandb"), "leet", "inspect", "--json", str(folder)]
    output = subprocess.run(inspect, capture_output=True, text=True, check=True, timeout=60).stdout
    return [record for record in map(json.loads, output.splitlines()) if record.get("type") == "history"]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A run of two processes, stopped by a signal at no particular moment and started again; its folder and output."""
    folder = tmp_path_factory.mktemp("program")
    run, first, second = folder / "run", folder / "first.log", folder / "second.log"
    process = start(run, first, "--train.steps=100000")  # the end is far: the signal comes first
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None, first.read_text()
        assert time.monotonic() < deadline, first.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    return run, first, second


def test_a_signal_saves_and_the_same_command_goes_on_as_if_nothing_had_happened(program, tmp_path):
    run, first, second = program
    (stopped,) = steps(run)[-1:]
    assert f"stop signal: saving step {stopped}\n" in first.read_text()
    assert "Traceback" not in first.read_text().split("stop signal")[0]
    until = [f"--run.stop_at={stopped + 30}", "--train.steps=100000"]
    process = start(run, second, *until)
    assert process.wait(120) == 0, second.read_text()
    whole = tmp_path / "whole"  # the same run, undisturbed
    assert launch([*RECIPE, f"--run.dir={whole}", *until, "--track.to=none"], world=2) == [0, 0]
    assert tensors(run, stopped + 30) == tensors(whole, stopped + 30)
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
    deadline = time.monotonic() + 120
    while not steps(run):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    process.kill()
    process.wait(10)
    while workers(run):  # the kernel kills them; they may be in the middle of dying
        assert time.monotonic() < deadline
        time.sleep(0.02)
    until = [*overrides, f"--run.stop_at={steps(run)[-1] + 15}"]
    assert launch([*RECIPE, f"--run.dir={run}", *until], world=2) == [0, 0]
    assert launch([*RECIPE, f"--run.dir={whole}", *until], world=2) == [0, 0]
    assert tensors(run, steps(run)[-1]) == tensors(whole, steps(whole)[-1])
    assert metrics(run) == metrics(whole)


def test_a_signal_to_the_launcher_of_one_process_saves(tmp_path):
    """Accelerate's launcher of one process forwards no signal: it dies, and the worker saves and leaves."""
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(run, log, "--train.steps=100000", "--track.to=none", launch_file="launch/gpu1.yaml")
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not metrics(run):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    while workers(run):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (saved,) = steps(run)[-1:]
    assert f"stop signal: saving step {saved}\n" in log.read_text()


def workers(run: Path) -> list[int]:
    """Processes that were started for this run's folder and still live."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"--run.dir={run}".encode() in command.read_bytes().split(b"\0"):
                found.append(int(command.parent.name))
    return found
