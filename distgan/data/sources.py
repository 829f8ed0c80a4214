"""Where training images come from: each source is a list of files and a way to read them in order, nothing decoded."""

import gzip
import hashlib
import json
import logging
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distgan.config import DataConfig, nearest

_PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
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


@dataclass(frozen=True)
class Record:
    """One image as the source has it."""

    name: str
    """What a message calls it."""
    content: bytes | np.ndarray
    """An encoded picture, or values 0 ... 255 of shape (H, W)."""
    label: int | None


@dataclass(frozen=True, kw_only=True)
class Source:
    """A training set that nobody has decoded yet."""

    records: Callable[[int], Iterator[Record]]
    """Every n-th of its images, in an order that never changes. Raises ValueError where the files are damaged."""
    count: int
    """How many records there are."""
    channels: int
    """What `data.channels` is where the user leaves it open."""
    classes: tuple[str, ...] | None = None
    """Names of the labels."""
    files: tuple[Path, ...] = ()
    """The files that its content is a function of, in order."""
    salt: str = ""
    """What else it is a function of."""

    def stamp(self) -> str:
        """A quick hash of names, sizes and times of the files: while it stands, so does their content."""
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return hashlib.sha256(json.dumps([self.salt, self.classes, stats]).encode()).hexdigest()

    def fingerprint(self) -> str:
        """A hash of the content, wherever it lies: of the bytes of all files, in order. Reads them all."""
        if not self.files:
            return self.salt
        digest = hashlib.sha256(json.dumps([self.salt, self.classes]).encode())
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def numbered(classes: Iterable[str]) -> str:
    """The classes with their labels, for a user who is to name these."""
    return ", ".join(f"{label} {name}" for label, name in enumerate(classes))


def find(data: DataConfig) -> Source:
    """Finds the source that the configuration names; reads no picture yet.

    Raises:
        ValueError: one sentence on what is missing, empty, damaged, of another layout, or not to be had.
    """
    return _SOURCES[data.source](data)


def _digits(data: DataConfig) -> Source:
    """1,797 handwritten digits, 8x8 with values 0 ... 16 (UCI, Alpaydin and Kaynak 1998), from scikit-learn."""
    from sklearn.datasets import load_digits

    if data.path is not None:
        raise ValueError(f"data.path is {data.path}, but digits come with scikit-learn: leave it out (null).")
    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).astype(np.float32)

    def records(every: int) -> Iterator[Record]:
        for i in range(0, len(pixels), every):
            yield Record(f"digit {i}", pixels[i], int(bunch.target[i]))

    salt = hashlib.sha256(np.ascontiguousarray(bunch.images).data).hexdigest()
    return Source(records=records, count=len(pixels), channels=1, classes=tuple("0123456789"), salt=salt)


def _cifar10(data: DataConfig) -> Source:
    return _hub_or_copy(data, "uoft-cs/cifar10", channels=3)


def _fashion_mnist(data: DataConfig) -> Source:
    """From the hub, or from a folder of IDX .gz files as its authors publish them and Debian packages them."""
    if data.path is None or not any(Path(data.path).glob("*-idx3-ubyte.gz")):
        return _hub_or_copy(data, "zalando-datasets/fashion_mnist", channels=1)
    name = {"train": "train", "test": "t10k"}.get(data.split)
    if name is None:
        raise ValueError(f"data.split is {data.split}, but the IDX files have train and test.")
    images, labels = (Path(data.path) / f"{name}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    shape = _idx_shape(images)
    _idx_shape(labels)

    def records(every: int) -> Iterator[Record]:
        pictures, targets = _idx(images, 3), _idx(labels, 1)
        if len(pictures) != len(targets):
            raise ValueError(f"{images} has {len(pictures)} images, but {labels} has {len(targets)} labels.")
        if len(targets) and targets.max() >= len(_FASHION_MNIST):
            raise ValueError(f"{labels} has labels up to {targets.max()}, but there are 10 classes.")
        for i in range(0, len(pictures), every):
            yield Record(f"image {i} of {images.name}", pictures[i], int(targets[i]))

    return Source(records=records, count=shape[0], channels=1, classes=_FASHION_MNIST, files=(images, labels))


def _hub(data: DataConfig) -> Source:
    if data.id is None:
        raise ValueError("data.source is hub, but data.id is not set: give a data set's id, such as owner/name.")
    return _hub_or_copy(data, data.id, channels=3)


def _folder(data: DataConfig) -> Source:
    """Pictures in a folder; where they lie in sub-folders, these are their classes."""
    if data.path is None:
        raise ValueError("data.source is folder, but data.path is not set: give the folder with the pictures.")
    root = _existing(data.path)
    files = tuple(sorted(file for file in root.rglob("*") if file.suffix.lower() in _PICTURES and file.is_file()))
    if not files:
        raise ValueError(f"data.path is {root}, but there are no pictures in it ({', '.join(sorted(_PICTURES))}).")
    tops = [file.relative_to(root).parts[0] if file.parent != root else None for file in files]
    named = {top for top in tops if top is not None}
    classes = tuple(sorted(named)) if named and None not in tops else None

    def records(every: int) -> Iterator[Record]:
        for file, top in zip(files[::every], tops[::every], strict=True):
            label = classes.index(top) if classes is not None and top is not None else None
            try:
                content = file.read_bytes()
            except OSError as error:
                raise ValueError(f"{file} cannot be read ({error.strerror}).") from error
            yield Record(str(file), content, label)

    names = json.dumps([str(file.relative_to(root)) for file in files])
    return Source(records=records, count=len(files), channels=3, classes=classes, files=files, salt=names)


_SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "fashion_mnist": _fashion_mnist,
    "hub": _hub,
    "folder": _folder,
}


# Hugging Face data sets: parquet files, from a local copy or by way of the hub's cache -------------------------------


def _hub_or_copy(data: DataConfig, name: str, *, channels: int) -> Source:
    return _from_parquet(data, name, channels) if data.path is not None else _from_hub(data, name, channels)


def _from_parquet(data: DataConfig, name: str, channels: int) -> Source:
    """A copy of a data set's repository: its parquet files, `SPLIT-*.parquet` anywhere below the folder."""
    import datasets
    from pyarrow import parquet

    root = _existing(data.path)
    files = tuple(sorted(root.rglob(f"{data.split}-*.parquet")))
    if not files:
        raise ValueError(f"data.path is {root}, but no {data.split}-*.parquet is in it: it must be a copy of {name}.")
    opened = [_arrow(file, parquet.ParquetFile, file) for file in files]
    features = _arrow(files[0], datasets.Features.from_arrow_schema, opened[0].schema_arrow)
    image, label, classes = _columns(data, features, name)
    count = sum(file.metadata.num_rows for file in opened)

    def records(every: int) -> Iterator[Record]:
        columns = [image, *([label] if label else [])]
        for file, reader in zip(files, opened, strict=True):
            batches = reader.iter_batches(batch_size=256, columns=columns)
            row = 0
            while (batch := _arrow(file, next, batches, None)) is not None:
                chosen = range(-row % every, len(batch), every)
                for i, values in zip(chosen, _arrow(file, batch.take(list(chosen)).to_pylist), strict=True):
                    yield _record(f"row {row + i} of {file}", values, image, label, classes)
                row += len(batch)

    return _not_empty(
        Source(records=records, count=count, channels=channels, classes=classes, files=files, salt=image), data, name
    )


def _from_hub(data: DataConfig, name: str, channels: int) -> Source:
    import datasets

    datasets.disable_progress_bars()
    # It says every retry aloud; what matters is said below, in one sentence.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        split = datasets.load_dataset(name, split=data.split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(
            f"{name} is not a data set on the Hugging Face hub, or needs a login: check its id, or run `hf auth login`."
        ) from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{name} is not in the cache and the Hugging Face hub cannot be reached: on a machine with a network "
            f"run `hf download --repo-type dataset {name} --local-dir DIR`, then give --data.path=DIR here."
        ) from error
    except ValueError as error:  # datasets' own sentence for a split that is not there names those that are
        raise ValueError(f"{name} cannot be loaded: {' '.join(str(error).split())}") from error
    image, label, classes = _columns(data, split.features, name)
    raw = split.cast_column(image, datasets.Image(decode=False))

    def records(every: int) -> Iterator[Record]:
        rows = range(0, len(raw), every)
        for row, values in zip(rows, raw.select(rows), strict=True):
            yield _record(f"row {row} of {name}", values, image, label, classes)

    files = tuple(Path(file["filename"]) for file in split.cache_files)
    return _not_empty(
        Source(records=records, count=len(split), channels=channels, classes=classes, files=files, salt=image),
        data,
        name,
    )


def _columns(data: DataConfig, features: Any, name: str) -> tuple[str, str | None, tuple[str, ...] | None]:
    """Names of the image and label columns, as named or found, and of the classes."""
    import datasets

    for key, column in {"image_column": data.image_column, "label_column": data.label_column}.items():
        if column is not None and column not in features:
            raise ValueError(f'data.{key} is "{column}", which {name} does not have: {nearest(column, list(features))}')
    found = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if data.image_column is None and not found:
        raise ValueError(f"{name} has no image column; its columns are {', '.join(features)}.")
    labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    image = data.image_column or found[0]
    if not isinstance(features[image], datasets.Image):
        raise ValueError(
            f'data.image_column is "{image}", which holds no images: {", ".join(found) or "no column does"}.'
        )
    label = data.label_column or (labels[0] if labels else None)
    if label is not None and not isinstance(features[label], datasets.ClassLabel):
        raise ValueError(f'data.label_column is "{label}", which holds no class labels.')
    return image, label, tuple(features[label].names) if label is not None else None


def _record(name: str, values: Any, image: str, label: str | None, classes: tuple[str, ...] | None) -> Record:
    content, target = values.get(image), values.get(label) if label else None
    if isinstance(content, dict) and content.get("bytes") is None and content.get("path"):
        try:
            content = {"bytes": Path(content["path"]).read_bytes()}
        except OSError as error:
            raise ValueError(f"{name} is kept in {content['path']}, which cannot be read.") from error
    encoded = content.get("bytes") if isinstance(content, dict) else None
    if target is not None and not (isinstance(target, int) and classes and -1 <= target < len(classes)):
        raise ValueError(f"{name} has the label {target}, which is none of the {len(classes or ())} classes.")
    return Record(name, encoded or b"", target)


def _not_empty(source: Source, data: DataConfig, name: str) -> Source:
    if source.count == 0:
        where = f"data.path is {data.path}, but its" if data.path is not None else f"{name}'s"
        raise ValueError(f"{where} split {data.split} is empty.")
    return source


def _arrow(file: Path, read: Callable[..., Any], *arguments: Any) -> Any:
    """Makes a reading call of pyarrow, which meets damage with many kinds of exceptions."""
    try:
        return read(*arguments)
    except Exception as error:
        raise ValueError(f"{file} is not a readable parquet file.") from error


# IDX: the format of MNIST's files (Y. LeCun, "THE MNIST DATABASE", file formats) --------------------------------------


def _idx_shape(file: Path) -> tuple[int, ...]:
    try:
        with gzip.open(file) as stream:
            return _idx_header(file, stream)
    except FileNotFoundError as error:
        raise ValueError(f"{file} does not exist.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is damaged or cut short.") from error


def _idx_header(file: Path, stream: Any) -> tuple[int, ...]:
    magic = stream.read(4)
    if len(magic) != 4 or magic[:3] != b"\0\0\x08" or magic[3] not in (1, 3):
        raise ValueError(f"{file} is not an IDX file of bytes.")
    sizes = stream.read(4 * magic[3])
    if len(sizes) != 4 * magic[3]:
        raise ValueError(f"{file} is damaged or cut short.")
    return struct.unpack(f">{magic[3]}I", sizes)


def _idx(file: Path, dimensions: int) -> np.ndarray:
    """Reads it to the end, where gzip keeps its checksum."""
    try:
        with gzip.open(file) as stream:
            shape = _idx_header(file, stream)
            size = int(np.prod(shape, dtype=object))
            content = stream.read(size) if size < 2**34 else b""
            rest = stream.read(1)
    except FileNotFoundError as error:
        raise ValueError(f"{file} does not exist.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is damaged or cut short.") from error
    if len(shape) != dimensions or len(content) != size or rest:
        raise ValueError(f"{file} does not hold what its header says.")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _existing(path: str | None) -> Path:
    assert path is not None
    if not Path(path).is_dir():
        raise ValueError(f"data.path is {path}, but there is no such folder.")
    return Path(path)
