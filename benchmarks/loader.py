"""What feeding costs: images per second against torchvision's loaders, and its share of a training step.

    python benchmarks/loader.py        # needs Fashion-MNIST's IDX files (Debian: dataset-fashion-mnist); about 40 s

Each loader yields the same thing, shuffled batches of 64 float images (1, 32, 32) in [-1, 1], resized from 28x28 and
mirrored at random: distgan's from its prepared store, torchvision's ImageFolder from PNG files and its FashionMNIST
(which, as its CIFAR10 does, holds arrays in memory and makes a PIL image of each) through a DataLoader of two workers.
They take turns and the medians are compared, so that only ratios are to be quoted.
"""

import argparse
import gzip
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

from distgan import data, recipe, train
from distgan.recipe import DataConfig
from distgan.run.housekeeping import Housekeeping
from distgan.seeding import RunSeed

BATCH = 64
ROUNDS = 5
IMAGES = 10_000  # of the test split, per round


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what feeding the loop costs.")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="IDX .gz files")
    idx = parser.parse_args().data
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        measure_rates(idx, Path(scratch))
        measure_share(Path(scratch))


def measure_rates(idx: Path, scratch: Path) -> None:
    """Images per second of each loader, and the ratios."""
    prepared = DataConfig(source="fashion_mnist", path=str(idx), split="test", flip=True, cache=str(scratch / "cache"))
    images = data.load(prepared)
    loaders = {
        "distgan": distgan_batches(images, prepared),
        "torchvision FashionMNIST": torchvision_batches(datasets.FashionMNIST(unpack(idx, scratch), train=False)),
        "torchvision ImageFolder": torchvision_batches(datasets.ImageFolder(png_files(scratch))),
    }
    for batches in loaders.values():
        assert next(batches).shape == (BATCH, 1, 32, 32)  # starts workers, too
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(ROUNDS):
        for name, batches in loaders.items():
            started, count = time.perf_counter(), 0
            for batch in itertools.islice(batches, IMAGES // BATCH):
                count += len(batch)
            rates[name].append(count / (time.perf_counter() - started))
    ours = statistics.median(rates["distgan"])
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:26}{median:12,.0f} images/s   distgan is {ours / median:.1f} times as fast")


def measure_share(scratch: Path) -> None:
    """The share of the quickstart's step, on one process with one thread, that assembling batches and latents takes."""
    seconds = {"feeding": 0.0, "steps": 0.0}

    pieces, after_step = data.Feed._pieces, train.after_step

    def timed_pieces(feed: data.Feed, number: int, *, update: int) -> Iterator[data.Batch]:
        made = pieces(feed, number, update=update)
        while True:
            started = time.perf_counter()
            batch = next(made, None)
            seconds["feeding"] += (time.perf_counter() - started) * (update >= 10)
            if batch is None:
                return
            yield batch

    def timed_step(run: Housekeeping, step: int) -> int:
        step = after_step(run, step)
        if step == 10:  # warm
            seconds["began"] = time.perf_counter()
        seconds["steps"] = time.perf_counter() - seconds["began"]
        return step

    seconds["began"] = 0.0
    data.Feed._pieces, train.after_step = timed_pieces, timed_step  # type: ignore[method-assign]
    quickstart = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
    overrides = ["--train.steps=110", "--track.to=none", "--track.log_every=1000", "--track.sample_every=1000"]
    train.train(recipe.parse(["--config", str(quickstart), *overrides, f"--run.dir={scratch / 'run'}"])[0])
    print(f"\nbatches and latents take {seconds['feeding'] / seconds['steps']:.2%} of the quickstart's step")


def distgan_batches(images: data.Images, prepared: DataConfig) -> Iterator[torch.Tensor]:
    feed = data.Feed(
        images,
        prepared,
        labels=False,
        latent_dim=100,
        seed=RunSeed(0),
        batch_size=BATCH,
        d_steps=1,
        g_batch="shared",
        shares=[slice(0, BATCH)],
        device=torch.device("cpu"),
    )
    return (next(feed.for_discriminator(step, 0)).real for step in itertools.count())


def torchvision_batches(dataset: Dataset) -> Iterator[torch.Tensor]:
    dataset.transform = transforms.Compose(
        [
            transforms.Grayscale(),
            transforms.Resize(32),
            transforms.CenterCrop(32),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(0.5, 0.5),
        ]
    )
    loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
    return (batch for _ in itertools.count() for batch, _ in loader)


def unpack(idx: Path, scratch: Path) -> Path:
    """The layout that torchvision.datasets.FashionMNIST expects."""
    raw = scratch / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in idx.glob("t*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    return scratch


def png_files(scratch: Path) -> Path:
    """The same pictures as files, 28x28, in a folder per class."""
    root, pictures = scratch / "png", datasets.FashionMNIST(scratch, train=False)
    for i, (picture, label) in enumerate(pictures):
        assert isinstance(picture, Image.Image)
        (root / str(label)).mkdir(parents=True, exist_ok=True)
        picture.save(root / str(label) / f"{i:05d}.png")
    return root


if __name__ == "__main__":
    main()
