"""Which recipes cover all modes: each is trained for the same time on a blob at 25 positions, and its samples counted.

    python benchmarks/modes.py [--seconds 90] [--seeds 3] [--out docs/modes.md]

The picture's version of the grid of 25 Gaussians: a Gaussian blob in 32x32 pixels, at the points of a 5x5 grid, each
picture off its point by a normal deviate. What is trained is the real program, narrow, one process with one thread
each, two at a time, until the time is over; a speed measured beforehand says where its schedule ends. A sample is good
if it is a blob (it differs from the one drawn at its own centre by less than BLOB_ERROR of that one's norm) at a point
(its centre is within NEAR pixels). A mode is found if it has at least a tenth of its share of all samples, in good
ones.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
SIZE, SIDE, SIGMA, JITTER = 32, 5, 1.5, 0.25  # pixels; blobs have standard deviation SIGMA, their places JITTER
POINTS = np.stack(np.meshgrid(*2 * [4 + 5.75 * np.arange(SIDE)], indexing="ij"), -1).reshape(-1, 2)
PICTURES = 40  # of each position
SAMPLES, BLOB_ERROR, NEAR = 2500, 0.5, 1.0

NARROW = ["--model.width=8", "--train.batch_size=32"]
NARROW_RESNET = ["--model.width=4", "--train.batch_size=16"]
RECIPES = {
    "cifar10_dcgan": NARROW,
    "cifar10_lsgan": NARROW,
    "cifar10_wgan": NARROW,
    "cifar10_wgan_gp": NARROW_RESNET,
    "cifar10_sngan": [*NARROW_RESNET, "--model.d_width=4"],
    "cifar10_sngan_cond": [*NARROW_RESNET, "--model.d_width=4"],
}


class Found(NamedTuple):
    """One run and what its samples are."""

    steps: int
    timed: bool
    """Whether it was stopped by the clock; else it was so fast that its schedule ended before."""
    modes: int
    good: float
    """The share of good samples."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=90, help="of training for each run (default: 90)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe (default: 3)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "modes.md", help="Markdown file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=2) as two_at_a_time:
        work = Path(folder)
        write_pictures(work / "pictures")
        speeds = dict(zip(RECIPES, two_at_a_time.map(lambda name: speed(work, name), RECIPES), strict=True))
        wanted = [(name, seed) for name in RECIPES for seed in range(arguments.seeds)]
        runs = two_at_a_time.map(lambda one: found_by(work, *one, arguments.seconds, speeds[one[0]]), wanted)
        found: dict[str, list[Found]] = {name: [] for name in RECIPES}
        for (name, seed), one in zip(wanted, runs, strict=True):
            found[name].append(one)
            print(f"{name}, seed {seed}: {one.modes} modes, {one.good:.1%} good", flush=True)
        arguments.out.write_text(table(found, arguments.seconds))
    print(arguments.out)


def blob(centres: np.ndarray) -> np.ndarray:
    """(N, 2) in pixels -> (N, SIZE, SIZE) in [0, 1]."""
    at = np.arange(SIZE)
    rows, columns = (np.exp(-((at - centres[:, i, None]) ** 2) / (2 * SIGMA**2)) for i in range(2))
    return rows[:, :, None] * columns[:, None, :]


def write_pictures(folder: Path) -> None:
    """A sub-folder for each position, so that positions are classes."""
    rng = np.random.default_rng(0)
    for number, point in enumerate(POINTS):
        (folder / f"{number:02d}").mkdir(parents=True)
        for i, one in enumerate(blob(point + JITTER * rng.standard_normal((PICTURES, 2)))):
            Image.fromarray((255 * one).round().astype(np.uint8)).save(folder / f"{number:02d}" / f"{i:03d}.png")


def speed(work: Path, name: str) -> float:
    """Steps per second, of a run of a quarter of a minute whose length a shorter one tells."""
    rate = 2.0
    for seconds in (5, 15):
        run = train(work, name, seed=1000, steps=max(4, round(seconds * rate)))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        seen = np.diff([0, *(line["images_seen"] for line in lines)])
        took = sum(images / line["throughput/images_per_s"] for images, line in zip(seen, lines, strict=True))
        rate = lines[-1]["step"] / took
    return rate


def found_by(work: Path, name: str, seed: int, seconds: float, rate: float) -> Found:
    """Trains for so long, and looks at the samples; a schedule ends a fifth later, where speed is as before."""
    steps = round(1.2 * seconds * rate)
    run = train(work, name, seed=seed, steps=steps, seconds=seconds)
    stopped = run / "preempted"
    if stopped.exists():
        steps = json.loads(stopped.read_text())["step"]
    return Found(steps, stopped.exists(), *count(samples(run)))


def train(work: Path, name: str, *, seed: int, steps: int, seconds: float | None = None) -> Path:
    """Trains for `steps`, or until `seconds` are over, and returns the run's folder."""
    run = work / f"{name}-{seed}-{steps}"
    command = [sys.executable, "-m", "distgan.train", "--config", str(ROOT / "configs" / f"{name}.yaml")]
    command += [*RECIPES[name], f"--run.dir={run}", f"--run.seed={seed}", f"--train.steps={steps}", "--optim.lr=1e-3"]
    command += ["--data.source=folder", f"--data.path={work / 'pictures'}", "--data.channels=1", "--data.flip=false"]
    command += [f"--data.cache={work / 'cache'}", "--track.to=none", "--ema.half_life=2000"]
    command += [f"--track.log_every={max(1, steps // 4)}", "--track.sample_every=1000000", "--checkpoint.every=1000000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    clock = threading.Timer(seconds, process.terminate) if seconds is not None else None  # it saves, and ends with 0
    said = []
    for line in process.stdout:
        said.append(line)
        if clock is not None and "starting at step 0" in line:
            clock.start()
        if clock is not None and line.startswith("done:"):
            clock.cancel()
    if process.wait() != 0:
        sys.exit(f"{name} ended with {process.returncode}: {''.join(said)}")
    return run


def samples(run: Path) -> np.ndarray:
    """(SAMPLES, SIZE, SIZE) in [0, 1]."""
    import torch

    from distgan import load_generator

    torch.set_num_threads(1)  # the other core trains
    return load_generator(run).sample(SAMPLES, seed=1)[:, 0].numpy() / 255


def count(images: np.ndarray) -> tuple[int, float]:
    """How many modes are found, and the share of good samples."""
    at, bright = np.arange(SIZE), np.maximum(images - 0.25, 0)  # without what little there is all over
    mass = np.maximum(bright.sum((1, 2)), 1e-9)
    centres = np.stack([(bright.sum(axis) * at).sum(1) / mass for axis in (2, 1)], -1)
    ideal = blob(centres)
    error = np.linalg.norm(images - ideal, axis=(1, 2)) / np.linalg.norm(ideal, axis=(1, 2))
    distance = np.linalg.norm(centres[:, None] - POINTS, axis=2)
    good = (error < BLOB_ERROR) & (distance.min(1) < NEAR)
    per_mode = np.bincount(distance.argmin(1)[good], minlength=len(POINTS))
    return int((per_mode >= 0.1 * len(images) / len(POINTS)).sum()), float(good.mean())


def table(found: Mapping[str, Sequence[Found]], seconds: float) -> str:
    rows = []
    for name, runs in found.items():
        steps = ", ".join(f"{one.steps:,}{'' if one.timed else ' (all, in less time)'}" for one in runs)
        modes, good = ", ".join(str(one.modes) for one in runs), ", ".join(f"{one.good:.0%}" for one in runs)
        rows.append(f"| `{name}` | {' '.join(RECIPES[name])} | {steps} | {modes} | {good} |")
    return "\n".join(
        [
            "# Mode coverage",
            "",
            f"The data set has {len(POINTS) * PICTURES:,} pictures of {SIZE}x{SIZE} pixels, {PICTURES} for each of "
            f"{len(POINTS)} points. Each picture shows one blob at its point. A sample is good if it is a blob close "
            f"to a point. If samples were spread equally, each mode (each point) would get 1/{len(POINTS)} of them. A "
            "mode counts as found if the good samples at its point number at least a tenth of that equal share "
            "(`benchmarks/modes.py`). The networks have few channels, so that one core trains them in minutes: the "
            "table shows how training begins, not how it ends.",
            "",
            f"Written by `make modes` on {datetime.date.today()}: {seconds:.0f} s of training for each run, "
            f"one thread, two runs at a time, on {_processor()}, torch "
            f"{importlib.metadata.version('torch')}. The learning rate is 1e-3 (at its start, if the recipe has a "
            f"schedule), and the half-life of the averaged weights 2,000 images. {SAMPLES:,} samples from each run. "
            "`cifar10_sngan_cond` gets the position as a label: it is told which mode to draw, so it does not have to "
            "find the modes by itself.",
            "",
            "| Recipe | with | steps, by seed | modes of 25, by seed | good samples, by seed |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
