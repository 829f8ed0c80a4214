"""Which recipes cover all modes: each is trained for the same time on a blob at 25 positions, and its samples counted.

    python benchmarks/modes.py [--seconds 60] [--seeds 3] [--out docs/modes.md]

The picture's version of the grid of 25 Gaussians: a Gaussian blob in 32x32 pixels, at the points of a 5x5 grid, each
picture off its point by a normal deviate. What is trained is the real program, narrow, one process with one thread
each, two at a time; how many steps fill the time is measured first. A sample is good if it is a blob (it differs from
the one drawn at its own centre by less than BLOB_ERROR of that one's norm) at a point (its centre is within NEAR
pixels). A mode is found if it has at least a tenth of its share of all samples, in good ones.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of training for each run (default: 60)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe (default: 3)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "modes.md", help="Markdown file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=2) as two_at_a_time:
        work = Path(folder)
        write_pictures(work / "pictures")
        names = [name for name in RECIPES for _ in range(arguments.seeds)]
        seeds = [*range(arguments.seeds)] * len(RECIPES)
        measured = two_at_a_time.map(lambda name: train(work, name, seed=0, steps=40), RECIPES)
        steps = {
            name: max(1, round(arguments.seconds * speed / images))
            for name, (speed, images, _) in zip(RECIPES, measured, strict=True)
        }
        runs = two_at_a_time.map(lambda name, seed: train(work, name, seed=seed, steps=steps[name]), names, seeds)
        found = {name: [] for name in RECIPES}
        for name, seed, (speed, images, run) in zip(names, seeds, runs, strict=True):
            modes, good = count(samples(run))
            found[name].append((modes, good, steps[name] * images / speed))
            print(f"{name}, seed {seed}: {modes} modes, {good:.1%} good", flush=True)
        arguments.out.write_text(table(found, steps, arguments.seconds))
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


def train(work: Path, name: str, *, seed: int, steps: int) -> tuple[float, int, Path]:
    """Trains, and returns images per second, images per step and the run's folder."""
    run = work / f"{name}-{seed}-{steps}"
    command = [
        sys.executable,
        "-m",
        "distgan.train",
        "--config",
        str(ROOT / "configs" / f"{name}.yaml"),
        *RECIPES[name],
    ]
    command += [f"--run.dir={run}", f"--run.seed={seed}", f"--train.steps={steps}", "--optim.lr=1e-3"]
    command += ["--data.source=folder", f"--data.path={work / 'pictures'}", "--data.channels=1", "--data.flip=false"]
    command += [f"--data.cache={work / 'cache'}", "--track.to=none", "--ema.half_life=2000"]
    command += [f"--track.log_every={max(1, steps // 4)}", "--track.sample_every=1000000", "--checkpoint.every=1000000"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{name} ended with {done.returncode}: {done.stderr}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen = np.diff([0, *(line["images_seen"] for line in lines)])
    seconds = sum(images / line["throughput/images_per_s"] for images, line in zip(seen, lines, strict=True))
    return float(seen.sum() / seconds), lines[0]["images_seen"] // lines[0]["step"], run


def samples(run: Path) -> np.ndarray:
    """(SAMPLES, SIZE, SIZE) in [0, 1]."""
    from distgan import load_generator

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


def table(found: Mapping[str, Sequence[tuple[int, float, float]]], steps: Mapping[str, int], seconds: float) -> str:
    rows = [
        f"| `{name}` | {' '.join(RECIPES[name])} | {steps[name]:,} | "
        f"{min(one[2] for one in runs):.0f} to {max(one[2] for one in runs):.0f} | "
        f"{', '.join(str(one[0]) for one in runs)} | {', '.join(f'{one[1]:.0%}' for one in runs)} |"
        for name, runs in found.items()
    ]
    head = "| Recipe | with | steps | seconds of training | modes of 25, by seed | good samples, by seed |"
    return "\n".join(
        [
            f"Written by `make modes`: {seconds:.0f} s of training for each run, one thread, two runs at a time, on "
            f"{_processor()}; Adam at 1e-3, half-life of the average 2,000 images; {SAMPLES:,} samples of each.",
            "",
            head,
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
