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

from distgan import config as configuration
from distgan import data, train
from distgan.config import DataConfig
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

    def timed(feed: type) -> type:
        class Timed(feed):
            def at(self, step, k, *piece):
                started = time.perf_counter()
                fed = super().at(step, k, *piece)
                seconds["feeding"] += (time.perf_counter() - started) * (step >= 10)
                return fed

        return Timed

    class TimedHousekeeping(train.Housekeeping):
        def keep(self, step):
            super().keep(step)
            if step == 10:  # warm
                self.started = time.perf_counter()
            seconds["steps"] = time.perf_counter() - getattr(self, "started", time.perf_counter())

    train.data.Batches, train.data.Latents = timed(data.Batches), timed(data.Latents)
    train.Housekeeping = TimedHousekeeping
    quickstart = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
    overrides = ["--train.steps=110", "--track.to=none", "--track.log_every=1000", "--track.sample_every=1000"]
    train.train(configuration.parse(["--config", str(quickstart), *overrides, f"--run.dir={scratch / 'run'}"])[0])
    print(f"\nbatches and latents take {seconds['feeding'] / seconds['steps']:.2%} of the quickstart's step")


def distgan_batches(images: data.Images, prepared: DataConfig) -> Iterator[torch.Tensor]:
    feed = data.Batches(
        images,
        prepared,
        labels=False,
        seed=RunSeed(0),
        batch_size=BATCH,
        d_steps=1,
        shares=[slice(0, BATCH)],
        device=torch.device("cpu"),
    )
    return (feed.at(step, 0)[0] for step in itertools.count())


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
