"""Hugging Face data sets: parquet files, from a local copy or by way of the hub's cache."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distgan.config import DataConfig, nearest
from distgan.data.records import Record, Source, existing_folder


def hub_or_copy(data: DataConfig, name: str, *, channels: int) -> Source:
    """Returns a data set of the hub, from `data.path` where that is set."""
    return _from_parquet(data, name, channels) if data.path is not None else _from_hub(data, name, channels)


def _from_parquet(data: DataConfig, name: str, channels: int) -> Source:
    """A copy of a data set's repository: its parquet files, `SPLIT-*.parquet` anywhere below the folder."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    root = existing_folder(data.path)
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
                rows = pyarrow.array(chosen, pyarrow.int64())  # typed: there may be none, which pyarrow takes for nulls
                for i, values in zip(chosen, _arrow(file, batch.take(rows).to_pylist), strict=True):
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
