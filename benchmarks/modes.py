"""Which recipes cover all modes: each is trained for the same time on a blob at 25 positions, and its samples counted.

    python benchmarks/modes.py [--seconds 90] [--seeds 3] [--only NAME ...] [--curve NAME ...] [--out docs/modes.md]

The picture's version of the grid of 25 Gaussians: a Gaussian blob in 32x32 pixels, at the points of a 5x5 grid, each
picture off its point by a normal deviate. What is trained is the real program, narrow, one process with one thread
each, two at a time, until the time is over; a speed measured beforehand says where its schedule ends. A sample is good
if it is a blob (it differs from the one drawn at its own centre by less than BLOB_ERROR of that one's norm) at a point
(its centre is within NEAR pixels). A mode is found if it has at least a tenth of its share of all samples, in good
ones. Runs of `--curve` are trained ten times as long, and counted at ten points on the way, with the averaged weights
and with the raw ones.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from turns import processor

ROOT = Path(__file__).parent.parent
SIZE, SIDE, SIGMA, JITTER = 32, 5, 1.5, 0.25  # pixels; blobs have standard deviation SIGMA, their places JITTER
POINTS = np.stack(np.meshgrid(*2 * [4 + 5.75 * np.arange(SIDE)], indexing="ij"), -1).reshape(-1, 2)
PICTURES = 40  # of each position
SAMPLES, BLOB_ERROR, NEAR = 2500, 0.5, 1.0

NARROW = ["--model.width=8", "--train.batch_size=32"]
WIDER = ["--model.width=16", "--train.batch_size=32"]
NARROW_RESNET = ["--model.width=4", "--train.batch_size=16"]
UNLABELLED = ["--model.conditional=false"]
R1 = ["--model.d_norm=none", "--penalty.name=r1", "--penalty.weight=1"]
R1_R2 = ["--model.d_norm=none", "--penalty.name=r1,r2", "--penalty.weight=1"]


class Recipe(NamedTuple):
    """A recipe of configs/, and what is changed."""

    config: str
    overrides: list[str]


RECIPES = {
    "cifar10_dcgan": Recipe("cifar10_dcgan", NARROW),
    "cifar10_lsgan": Recipe("cifar10_lsgan", NARROW),
    "cifar10_wgan": Recipe("cifar10_wgan", NARROW),
    "cifar10_wgan_gp": Recipe("cifar10_wgan_gp", NARROW_RESNET),
    "cifar10_sngan": Recipe("cifar10_sngan", [*NARROW_RESNET, "--model.d_width=4"]),
    "cifar10_sngan_cond": Recipe("cifar10_sngan_cond", [*NARROW_RESNET, "--model.d_width=4"]),
    "cifar10_biggan": Recipe("cifar10_biggan", [*NARROW_RESNET, *UNLABELLED]),
    "cifar10_r3gan": Recipe(
        "cifar10_r3gan",
        [
            *("--model.width=16", "--train.batch_size=16", "--train.precision=fp32", *UNLABELLED),
            *("--penalty.weight=1", "--ramp.penalty_weight=0.1", "--augment.policy=null", "--augment.probability=null"),
            *("--ramp.probability=null", "--ramp.images=10000", "--ramp.half_life=2000"),
        ],
    ),
    "dcgan, wider": Recipe("cifar10_dcgan", WIDER),
    "dcgan, R1": Recipe("cifar10_dcgan", [*WIDER, *R1]),
    "dcgan, R1, R2": Recipe("cifar10_dcgan", [*WIDER, *R1_R2]),
    "dcgan, relativistic": Recipe("cifar10_dcgan", [*WIDER, "--loss.name=relativistic"]),
    "dcgan, relativistic, R1, R2": Recipe("cifar10_dcgan", [*WIDER, *R1_R2, "--loss.name=relativistic"]),
}
POINTS_OF_A_CURVE = 10


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
    parser.add_argument(
        "--only", nargs="*", choices=RECIPES, default=list(RECIPES), help="which recipes (default: all)"
    )
    parser.add_argument(
        "--curve",
        nargs="*",
        choices=RECIPES,
        default=["dcgan, wider", "dcgan, relativistic, R1, R2"],
        help="which recipes to train ten times as long (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "modes.md", help="Markdown file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=2) as two_at_a_time:
        work = Path(folder)
        write_pictures(work / "pictures")
        names = list(dict.fromkeys([*arguments.only, *arguments.curve]))
        speeds = dict(zip(names, two_at_a_time.map(lambda name: speed(work, name), names), strict=True))
        wanted = [(name, seed) for name in arguments.only for seed in range(arguments.seeds)]
        runs = two_at_a_time.map(lambda one: found_by(work, *one, arguments.seconds, speeds[one[0]]), wanted)
        found: dict[str, list[Found]] = {name: [] for name in arguments.only}
        for (name, seed), one in zip(wanted, runs, strict=True):
            found[name].append(one)
            print(f"{name}, seed {seed}: {one.modes} modes, {one.good:.1%} good", flush=True)
        long = 10 * arguments.seconds
        curves = dict(
            zip(
                arguments.curve,
                two_at_a_time.map(lambda name: curve(work, name, long, speeds[name]), arguments.curve),
                strict=True,
            )
        )
        arguments.out.write_text(table(found, arguments.seconds) + "".join(map(plotted, curves, curves.values())))
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


class Point(NamedTuple):
    """What a run's samples are at one point on the way: modes and the share of good samples, by the weights."""

    step: int
    minutes: float
    averaged: tuple[int, float]
    raw: tuple[int, float]


def curve(work: Path, name: str, seconds: float, rate: float) -> list[Point]:
    """Trains one run for so long, and looks at the samples of its checkpoints."""
    from distgan.storage import checkpoint, exported

    started = time.time()
    every = max(1, round(seconds * rate / POINTS_OF_A_CURVE))
    steps = round(1.2 * seconds * rate)
    run = train(work, name, seed=0, steps=steps, seconds=seconds, overrides=[f"--checkpoint.every={every}"])
    found = []
    for step in checkpoint.steps(run / "checkpoints"):
        folder = checkpoint.folder_of(run / "checkpoints", step)
        counts = []
        for weights in ("average", "generator"):
            generator = exported.load_generator(run)
            checkpoint.load(folder, {weights: generator})
            counts.append(count(drawn(generator)))
        found.append(Point(step, ((folder / "manifest.json").stat().st_mtime - started) / 60, *counts))
    return found


def train(
    work: Path, name: str, *, seed: int, steps: int, seconds: float | None = None, overrides: Sequence[str] = ()
) -> Path:
    """Trains for `steps`, or until `seconds` are over, and returns the run's folder."""
    recipe, number = RECIPES[name], list(RECIPES).index(name)
    run = work / f"{number}-{seed}-{steps}"
    command = [sys.executable, "-m", "distgan.train", "--config", str(ROOT / "configs" / f"{recipe.config}.yaml")]
    command += [f"--run.dir={run}", f"--run.seed={seed}", f"--train.steps={steps}", "--optim.lr=1e-3"]
    command += ["--data.source=folder", f"--data.path={work / 'pictures'}", "--data.channels=1", "--data.flip=false"]
    command += [f"--data.cache={work / 'cache'}", "--track.to=none", "--checkpoint.every=1000000"]
    command += [f"--track.log_every={max(1, steps // 4)}", "--track.sample_every=1000000"]
    command += ["--checkpoint.keep_last=1000"]
    if not any(word.startswith("--ramp.half_life") for word in recipe.overrides):
        command += ["--ema.half_life=2000", "--ema.ramp=0.05", "--ema.start=0"]
    command += [*recipe.overrides, *overrides]
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
    from distgan import load_generator

    return drawn(load_generator(run))


def drawn(generator: Any) -> np.ndarray:
    """(SAMPLES, SIZE, SIZE) in [0, 1]."""
    import torch

    torch.set_num_threads(1)  # the other core trains
    return generator.sample(SAMPLES, seed=1)[:, 0].numpy() / 255


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
        recipe = RECIPES[name]
        label = f"`{name}`" if name == recipe.config else name
        config = "" if name == recipe.config else f"`{recipe.config}` "
        rows.append(f"| {label} | {config}{' '.join(recipe.overrides)} | {steps} | {modes} | {good} |")
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
            f"one thread, two runs at a time, on {processor()}, torch "
            f"{importlib.metadata.version('torch')}. The learning rate is 1e-3 (at its start, if the recipe has a "
            f"schedule), and the half-life of the averaged weights 2,000 images. {SAMPLES:,} samples from each run. "
            "`cifar10_sngan_cond` gets the position as a label: it is told which mode to draw, so it does not have to "
            "find the modes by itself. The others have no labels.",
            "",
            "| Recipe | with | steps, by seed | modes of 25, by seed | good samples, by seed |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def plotted(name: str, points: Sequence[Point]) -> str:
    def cells(modes: int, good: float) -> str:
        return f"{modes} | {good:.0%}"

    rows = [f"| {one.step:,} | {one.minutes:.1f} | {cells(*one.averaged)} | {cells(*one.raw)} |" for one in points]
    return "\n".join(
        [
            f"\n## Over time: {name}",
            "",
            "One run with seed 0, ten times as long as those of the table, its time counted from its start.",
            "",
            "| step | minutes | modes, averaged weights | good samples | modes, raw weights | good samples |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
