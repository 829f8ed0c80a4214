"""Finds the training images: one function for each `data.source`."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from distgan.data import cifar, idx
from distgan.data.folders import folder
from distgan.data.huggingface import hub_or_copy
from distgan.data.records import Record, Source, refuse_columns
from distgan.errors import UserError
from distgan.recipe import DataConfig

_FASHION_MNIST = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def find(data: DataConfig) -> Source:
    """Returns the source that the data group names. Reads no picture yet.

    Raises:
        UserError: the source is missing, empty, damaged, of an unknown layout, or cannot be fetched.
    """
    return _SOURCES[data.source](data)


def _digits(data: DataConfig) -> Source:
    """Reads scikit-learn's 1,797 digits, 8x8 with values 0 ... 16 (UCI, Alpaydin and Kaynak 1998)."""
    from sklearn.datasets import load_digits

    if data.path is not None:
        raise UserError(f"data.path is {data.path}, but digits come with scikit-learn: leave it out (null).")
    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).astype(np.float32)

    def records(every: int) -> Iterator[Record]:
        for i in range(0, len(pixels), every):
            yield Record(f"digit {i}", pixels[i], int(bunch.target[i]))

    salt = hashlib.sha256(np.ascontiguousarray(bunch.images).data).hexdigest()
    return Source(records=records, count=len(pixels), channels=1, classes=tuple("0123456789"), salt=salt)


def _cifar10(data: DataConfig) -> Source:
    """Reads CIFAR-10 from the hub, or from the binary version that its author publishes."""
    original = cifar.original(data) if data.path is not None else None
    return original or hub_or_copy(data, "uoft-cs/cifar10", channels=3)


def _fashion_mnist(data: DataConfig) -> Source:
    """Reads Fashion-MNIST from the hub, or from IDX files as its authors, Debian and torchvision have them."""
    folder = idx.folder(Path(data.path), below="FashionMNIST/raw") if data.path is not None else None
    if folder is None:
        return hub_or_copy(data, "zalando-datasets/fashion_mnist", channels=1)
    name = {"train": "train", "test": "t10k"}.get(data.split)
    if name is None:
        raise UserError(f"data.split is {data.split}, but the IDX files have train and test: choose one of them.")
    refuse_columns(data, folder)
    images, labels = (idx.file(folder, f"{name}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    shape = idx.shape(images)
    idx.shape(labels)

    def records(every: int) -> Iterator[Record]:
        pictures, targets = idx.read(images, 3), idx.read(labels, 1)
        if len(pictures) != len(targets):
            raise UserError(
                f"{images} has {len(pictures)} images, but {labels} has {len(targets)} labels: copy or download both "
                "again."
            )
        if len(targets) and targets.max() >= len(_FASHION_MNIST):
            raise UserError(
                f"{labels} has labels up to {targets.max()}, but there are 10 classes: copy or download it again."
            )
        for i in range(0, len(pictures), every):
            yield Record(f"image {i} of {images.name}", pictures[i], int(targets[i]))

    return Source(
        records=records,
        count=shape[0],
        channels=1,
        classes=_FASHION_MNIST,
        files=(images, labels),
        unseen="test" if data.split == "train" else "train",
    )


def _hub(data: DataConfig) -> Source:
    name = data.id or data.path
    if name is None:
        raise UserError(
            "data.source is hub, but neither data.id nor data.path is set: give a data set's id, such as owner/name, "
            "or a local copy of its parquet files."
        )
    return hub_or_copy(data, name, channels=3)


_SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "fashion_mnist": _fashion_mnist,
    "hub": _hub,
    "folder": folder,
}
