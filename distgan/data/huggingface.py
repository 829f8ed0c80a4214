"""Reads Hugging Face data sets: parquet files of a local copy, or through the hub's cache."""

import itertools
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distgan.data import copies
from distgan.data.arrangement import meant, unseen_beside
from distgan.data.decode import is_picture
from distgan.data.records import Record, Source, numbered
from distgan.errors import UserError, nearest
from distgan.recipe import DataConfig

_BATCH = 256  # rows in memory at once
_MOST_CLASSES = 100_000  # a column with more different strings, or a number as large as this, does not hold classes


@dataclass(frozen=True)
class _Columns:
    """The columns of pictures and labels."""

    image: str
    label: str | None
    kind: str = ""
    """How labels are written: `names` (the data set names its classes), `numbers` or `strings`."""
    classes: tuple[str, ...] | None = None
    """The data set's own names of the classes."""


def hub_or_copy(data: DataConfig, name: str, *, channels: int) -> Source:
    """Returns a data set of the hub, read from `data.path` if that is set."""
    source = _from_parquet(data, name, channels) if data.path is not None else _from_hub(data, name, channels)
    if source.count == 0:
        where = data.path if data.path is not None else name
        raise UserError(f"the split {data.split} of {where} is empty: choose another with data.split.")
    return source


# A local copy ---------------------------------------------------------------------------------------------------------


def _from_parquet(data: DataConfig, name: str, channels: int) -> Source:
    split, splits = copies.splits(data, name)
    files = splits[split]
    counts: list[int] = []
    columns: dict[Path, _Columns] = {}
    for file in files:
        with _opened(file) as opened:
            counts.append(opened.metadata.num_rows)
            if counts[-1] or (file == files[-1] and not columns):  # an empty file may lack the types of its columns
                columns[file] = _columns(data, _arrow(file, _features, opened), str(file), _first_rows(file, opened))
    first, found = next(iter(columns.items()))
    for file, other in columns.items():
        _refuse_another_kind(first, found, file, other)
    classes = found.classes
    if found.label is not None and classes is None:
        # Labels of all splits count: a split that lacks a class must not number the others differently.
        values = [_labels(file, found.label) for file in itertools.chain(*splits.values())]
        found, classes = _with_classes(data, found, itertools.chain(*values), name)
    of = _labelled(found, classes)

    def records(every: int) -> Iterator[Record]:
        start = 0
        for file, count in zip(files, counts, strict=True):
            with _opened(file) as opened:
                for row, values in _rows(file, opened, -start % every, every, found):
                    yield of(f"row {row} of {file}", values, file.parent)
            start += count

    return Source(
        records=records,
        count=sum(counts),
        channels=channels,
        classes=classes,
        files=files,
        salt=_salt(data, found),
        split=split,
        splits=tuple(splits),
        unseen=unseen_beside(split, splits),
    )


def _opened(file: Path) -> Any:
    from pyarrow import parquet

    # Memory-mapped: otherwise pyarrow holds a row group's whole column in memory, which may be the whole file.
    return _arrow(file, lambda: parquet.ParquetFile(file, memory_map=True))


def _rows(file: Path, opened: Any, first: int, every: int, columns: _Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows first, first + every, ... of a file, with their numbers; skips row groups without such a row."""
    names = [columns.image, *([columns.label] if columns.label else [])]
    sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
    starts = [0, *itertools.accumulate(sizes)]
    wanted = [(first - start) % every < size for start, size in zip(starts, sizes, strict=False)]
    for needed, run in itertools.groupby(range(len(sizes)), wanted.__getitem__):
        groups = list(run)
        if not needed:
            continue
        row = starts[groups[0]]
        for batch in _batches(file, opened, batch_size=_BATCH, row_groups=groups, columns=names):
            for i in range((first - row) % every, len(batch), every):
                (values,) = _arrow(file, batch.slice(i, 1).to_pylist)
                yield row + i, values
            row += len(batch)


def _features(opened: Any) -> Any:
    """Returns the types of the columns: from the metadata of `datasets` if the file has them, otherwise arrow's."""
    import datasets
    import pyarrow

    schema = opened.schema_arrow
    for i, field in enumerate(schema):
        if pyarrow.types.is_dictionary(field.type):  # as pandas writes categories; their rows read as plain values
            schema = schema.set(i, field.with_type(field.type.value_type))
    return datasets.Features.from_arrow_schema(schema)


def _first_rows(file: Path, opened: Any) -> Callable[[str], list[Any]]:
    """Returns a function that returns the first values of a column that are not empty."""

    def read(column: str) -> list[Any]:
        batches = _batches(file, opened, batch_size=16, columns=[column])
        return _some(value for batch in batches for value in batch.column(0).to_pylist())

    return read


def _labels(file: Path, column: str) -> Iterator[Any]:
    """Yields the labels of a file; none if it lacks the column, as a test split may."""
    with _opened(file) as opened:
        if column in opened.schema_arrow.names:
            for batch in _batches(file, opened, columns=[column]):
                yield from batch.column(0).unique().to_pylist()


def _batches(file: Path, opened: Any, **chosen: Any) -> Iterator[Any]:
    batches = _arrow(file, lambda: opened.iter_batches(**chosen))
    while (batch := _arrow(file, next, batches, None)) is not None:
        yield batch


def _refuse_another_kind(first: Path, columns: _Columns, file: Path, other: _Columns) -> None:
    if columns == other:
        return
    if (columns.image, columns.label, columns.kind) == (other.image, other.label, other.kind):
        ours, theirs = (f"the classes {numbered(one.classes or ())}" for one in (columns, other))
    else:
        ours, theirs = (
            f"pictures in {one.image} and {f'{one.kind} in {one.label} as' if one.label else 'no'} labels"
            for one in (columns, other)
        )
    raise UserError(
        f"{first} has {ours}, but {file} has {theirs}, so they are different data sets or configurations: give "
        "data.path a folder with the files of one, or choose it with data.config."
    )


# The hub --------------------------------------------------------------------------------------------------------------


def _from_hub(data: DataConfig, name: str, channels: int) -> Source:
    import datasets

    splits = _loaded(data, name, None)
    chosen = meant(data.split, splits)
    split = splits[chosen] if chosen is not None else _loaded(data, name, data.split)  # a part, as train[:10%]
    found = _columns(
        data, split.features, name, lambda column: _some(row[column] for row in split.select_columns([column]))
    )
    classes = found.classes
    if found.label is not None and classes is None:
        values = [other.unique(found.label) for other in splits.values() if found.label in other.features]
        found, classes = _with_classes(data, found, itertools.chain(*values), name)
    # Other columns are dropped, because pictures in them would be decoded for nothing.
    raw = split.select_columns([found.image, *([found.label] if found.label else [])])
    if isinstance(split.features[found.image], datasets.Image):
        raw = raw.cast_column(found.image, datasets.Image(decode=False))
    of = _labelled(found, classes)

    def records(every: int) -> Iterator[Record]:
        rows = range(0, len(raw), every)
        for row, values in zip(rows, raw.select(rows), strict=True):
            yield of(f"row {row} of {name}", values, Path())

    files = tuple(Path(file["filename"]) for file in split.cache_files)
    return Source(
        records=records,
        count=len(split),
        channels=channels,
        classes=classes,
        files=files,
        salt=_salt(data, found),
        split=chosen,
        splits=tuple(splits) if chosen is not None else (),
        unseen=unseen_beside(chosen, splits) if chosen is not None else None,
    )


def _loaded(data: DataConfig, name: str, split: str | None) -> Any:
    """Loads a data set, or one split of it, through the hub's cache."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # It logs every retry; the message below is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return datasets.load_dataset(name, data.config, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"{name} is not a data set on the Hugging Face hub, or needs a login: check its id, or run `hf auth login`."
        ) from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{name} is not in the cache and the Hugging Face hub cannot be reached: on a machine with a network "
            f"run `hf download --repo-type dataset {name} --local-dir DIR`, then give --data.path=DIR here."
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(f"{name} is a script, and scripts are never run: {copies.converted(name)}") from error
    except ValueError as error:
        raise UserError(_refusal(data, name, str(error))) from error


def _refusal(data: DataConfig, name: str, said: str) -> str:
    """Turns the error of `datasets` about a missing configuration or split into a sentence that names what exists."""
    said = " ".join(said.split())
    listed = re.search(r"available configs: \[(.*?)\]|Available(?: configs in the cache)?: \[(.*?)\]", said)
    cached = re.search(r"configurations in the cache: (.*?) Please", said)
    known = ", ".join(re.findall(r"'([^']*)'", listed[0])) if listed else cached[1] if cached else None
    if known is None:
        return f"{name} cannot be loaded: {said}"
    if data.config is not None:
        return f'data.config is "{data.config}", which {name} does not have: known are {known}.'
    return f"{name} has the configurations {known}: choose one with data.config."


# Both -----------------------------------------------------------------------------------------------------------------


def _columns(data: DataConfig, features: Any, name: str, first_rows: Callable[[str], list[Any]]) -> _Columns:
    """Finds the columns of pictures and labels: those that the user names, or by types, contents and usual names."""
    import datasets

    for key, column in {"image_column": data.image_column, "label_column": data.label_column}.items():
        if column is not None and column not in features:
            raise UserError(f'data.{key} is "{column}", which {name} does not have: {nearest(column, list(features))}')
    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    encoded = [column for column, feature in features.items() if _is_bytes(feature)]
    described = bool(pictures)
    if not described:
        pictures = [column for column in encoded if any(is_picture(_encoded(value)) for value in first_rows(column))]
    if data.image_column is None and not pictures:
        raise UserError(
            f"{name} has no image column (its columns are {', '.join(features)}): choose a data set of pictures."
        )
    image = data.image_column or pictures[0]
    if image not in pictures + encoded:
        choice = " or ".join(pictures) or "another data set, because no column does"
        raise UserError(f'data.image_column is "{image}", which holds no images: choose {choice}.')
    named = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    # Without metadata, a column of labels is known by its name. With metadata, a plain column of numbers or strings is
    # taken only if the user names it: earlier versions took none, and their runs must resume.
    likely = [column for column in ("label", "labels", "class") if not described and _kind(features.get(column))]
    label = data.label_column or next(iter([*named, *likely]), None)
    if label is None:
        return _Columns(image, None)
    kind = _kind(features[label])
    if not kind:
        raise UserError(
            f'data.label_column is "{label}", which holds no class labels: name another, or set it to null.'
        )
    return _Columns(image, label, kind, tuple(features[label].names) if kind == "names" else None)


def _is_bytes(feature: Any) -> bool:
    """Tells whether a column holds bytes, plain or in a struct beside a path, as `datasets` keeps pictures."""
    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(content, "dtype", None) in ("binary", "large_binary", "binary_view")


def _encoded(value: Any) -> Any:
    return value.get("bytes") if isinstance(value, dict) else value


def _some(values: Iterable[Any]) -> list[Any]:
    """Returns the first 16 values that are not empty."""
    return list(itertools.islice((value for value in values if _encoded(value) is not None), 16))


def _kind(feature: Any) -> str:
    """Returns how a column's labels are written, as `_Columns.kind`; empty if they are no labels."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return "names"
    dtype = str(getattr(feature, "dtype", ""))
    if re.fullmatch(r"u?int\d+|float\d+|bool", dtype):
        return "numbers"
    return "strings" if dtype in ("string", "large_string", "string_view") else ""


def _with_classes(
    data: DataConfig, columns: _Columns, values: Iterable[Any], name: str
) -> tuple[_Columns, tuple[str, ...] | None]:
    """Returns the columns and the names of the classes of plain labels. Numbers with fractions are no labels.

    Whole numbers may be floats, with NaN for a missing label: pandas writes them so.
    """
    there = {value for value in values if value is not None and value == value}
    if any(isinstance(value, float) and not value.is_integer() for value in there):
        if data.label_column is not None:
            raise UserError(
                f'data.label_column is "{columns.label}", which holds no class labels: name another, or set it to null.'
            )
        return _Columns(columns.image, None), None
    return columns, _classes(there, columns, name)


def _classes(there: set[Any], columns: _Columns, name: str) -> tuple[str, ...]:
    """Returns the classes of plain labels: the sorted strings, or the numbers from 0 to the largest."""
    if columns.kind == "strings" and len(there) <= _MOST_CLASSES:
        return tuple(sorted(there))
    if columns.kind == "numbers" and max(there, default=-1) < _MOST_CLASSES:
        return tuple(str(number) for number in range(int(max(there, default=-1)) + 1))
    raise UserError(
        f'the label column "{columns.label}" of {name} has {columns.kind} for more than {_MOST_CLASSES:,} classes, so '
        "it holds something else: name another with data.label_column."
    )


def _salt(data: DataConfig, columns: _Columns) -> str:
    """Returns the settings that decide what is read from the files."""
    return columns.image if data.label_column is None else json.dumps([columns.image, columns.label])


def _labelled(columns: _Columns, classes: tuple[str, ...] | None) -> Callable[[str, dict[str, Any], Path], Record]:
    """Returns a function (name, values, folder) that makes a record of a row; `folder` is where its file is."""
    strings = {label: number for number, label in enumerate(classes or ())}
    numbers: dict[Any, int] = strings if columns.kind == "strings" else {n: n for n in range(-1, len(strings))}

    def of(name: str, values: dict[str, Any], folder: Path) -> Record:
        content, target = values[columns.image], values[columns.label] if columns.label else None
        if isinstance(content, dict):
            content = content.get("bytes") or _kept_elsewhere(name, content.get("path"), folder)
        if target != target:  # NaN
            target = None
        if target is not None and target not in numbers:
            raise UserError(
                f"{name} has the label {target}, which is none of the {len(classes or ())} classes: correct it, or "
                "write -1 for a picture without a label."
            )
        return Record(name, content or b"", numbers[target] if target is not None else None)

    return of


def _kept_elsewhere(name: str, path: str | None, folder: Path) -> bytes:
    try:
        return (folder / path).read_bytes() if path else b""
    except OSError as error:
        raise UserError(
            f"{name} is kept in {folder / (path or '')}, which cannot be read ({error.strerror}): copy that file, too."
        ) from error


def _arrow(file: Path, read: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of pyarrow, which raises many kinds of errors for a damaged file. Raises UserError instead."""
    try:
        return read(*arguments)
    except Exception as error:
        raise UserError(f"{file} is not a readable parquet file: copy or download it again.") from error
