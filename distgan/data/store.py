"""Prepares training sets: decodes, crops and resizes all images once, and keeps them on disk as a store.

A store is a folder in the user's cache, named by a hash of the source's content and of the settings. One process of a
machine prepares it while the others wait for its lock. It is renamed into place when it is whole, so that nobody uses
half of one, and two jobs that prepare the same data at once do no harm. A process maps it into memory, or reads single
images of it.

    images.bin   uint8 (N, C, H, W)
    labels.bin   int64 (N,), -1 for an image without a label
    store.json   shape, class names, fingerprint, the numbers of skipped pictures and of pictures of one colour, and
                 the scale by which more than 8 bits became 8
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distgan import files, paths
from distgan.data import sources
from distgan.data.decode import DeepError, UndecodableError, extent, nearly_one_colour, picture
from distgan.data.depth import Extent, Scale, scale_of
from distgan.data.records import Record, Source
from distgan.errors import UserError
from distgan.progress import shown
from distgan.recipe import DataConfig

T = TypeVar("T")

_FORMAT = 1
_CHUNK = 256  # pictures in memory at once while they are decoded
_THREADS = 8  # at most; each may hold a large picture, a gigabyte of it at Pillow's limit


@dataclass(frozen=True, kw_only=True)
class Images:
    """A prepared training set."""

    pixels: Tensor
    """uint8 (N, C, H, W), memory-mapped."""
    labels: Tensor | None
    """int64 (N,); None if the source has no labels."""
    classes: tuple[str, ...] | None
    """Names of the classes; None if there are no labels."""
    fingerprint: str
    """A hash of the source's pictures and labels, so that a run never resumes on others."""
    skipped: int
    """The number of pictures that could not be decoded and were left out."""
    plain: int | None
    """The number of pictures of one colour; None in a store of an earlier version."""
    scale: Scale | None
    """The values of deep pictures that became 0 and 255; None if all pictures have at most 8 bits."""
    folder: Path
    """The store's folder."""
    left_out: str = ""
    """A line for the user about files that were not read; empty if there are none."""

    @property
    def channels(self) -> int:
        """Returns the number of channels: 1, 3 or 4."""
        return self.pixels.shape[1]


def load(data: DataConfig, *, batch_size: int = 1, like: DataConfig | None = None) -> Images:
    """Opens the store of a source, and prepares it first if there is none.

    Args:
        data: the source.
        batch_size: the least number of images.
        like: the training images that these are compared with; deep pictures take their scale.

    Raises:
        UserError: the source is missing, damaged or cannot be fetched, the cache folder cannot be written or is too
            small, or there are fewer images than one batch.
    """
    source = sources.find(data)
    images = _opened(source, data) or _prepare_alone(source, data)
    if like is not None and images.scale is not None and (wanted := load(like).scale) is not None:
        scale = wanted.or_else(images.scale)
        if scale != images.scale:
            images = _opened(source, data, scale) or _prepare_alone(source, data, scale)
    if len(images.pixels) < batch_size:
        raise UserError(
            f"train.batch_size is {batch_size}, but there are {len(images.pixels)} images: choose a smaller batch, or "
            "bring more images."
        )
    return dataclasses.replace(images, left_out=source.left_out)


def test_split(data: DataConfig) -> DataConfig:
    """Returns the data group of images of the same source that nobody trains on.

    Raises:
        UserError: the source has no other split.
    """
    other = sources.find(data).unseen
    if other is None and data.source == "folder":
        raise UserError(
            f"{data.path} has no test split: put the training images in a sub-folder train and others in test."
        )
    if other is None:
        raise UserError(
            f"{data.path or data.id or data.source} has no split for tests: choose another reference, such as train."
        )
    return dataclasses.replace(data, split=other)


def store_folder(source: Source, data: DataConfig, scale: Scale | None = None) -> Path:
    """Returns the folder of a source's store, which need not exist yet; `scale` replaces the source's own scale.

    The hash of the content is remembered with the files' names, sizes and times, so that unchanged files are read only
    once.
    """
    cache = cache_folder(data)
    memo = cache / "fingerprints" / source.stamp()
    try:
        fingerprint = memo.read_text()
    except OSError:
        fingerprint = source.fingerprint()
        with writing(cache):
            memo.parent.mkdir(parents=True, exist_ok=True)
            files.replace(memo, fingerprint.encode())
    made = [_FORMAT, fingerprint, data.image_size, data.channels or source.channels, data.skip_bad]
    if scale is not None:
        made.append(dataclasses.asdict(scale))
    if data.fit != "crop":
        made.append(data.fit)
    return cache / "stores" / hashlib.sha256(json.dumps(made).encode()).hexdigest()[:32]


def preview(
    source: Source, data: DataConfig, count: int, *, scale: Scale | None = None
) -> tuple[Tensor, Tensor, Scale | None]:
    """Returns images from all over a source as the networks would see them, without preparing a store.

    Args:
        source: the source.
        data: the recipe's data group.
        count: the most images to return.
        scale: the scale of deep pictures. If unset, the prepared store's, or the scale of these few pictures.

    Returns:
        Images, uint8 (at most count, C, H, W); labels, int64, -1 without a label; and the scale that was used.

    Raises:
        UserError: none of them can be decoded, or one cannot and `data.skip_bad` is off.
    """
    chosen, channels = list(spread(source, count)), data.channels or source.channels
    try:
        decoded = list(_decoded(chosen, data, channels, [], scale))
    except DeepError:
        prepared = _opened(source, data)
        scale = (scale or Scale()).or_else((prepared and prepared.scale) or measured(chosen))
        decoded = list(_decoded(chosen, data, channels, [], scale))
    if not decoded:
        raise UserError(f"none of the {len(chosen)} pictures looked at can be decoded: check the files.")
    labels = [record.label if record.label is not None else -1 for record, _ in decoded]
    return torch.stack([pixels for _, pixels in decoded]), torch.tensor(labels), scale


def refuse_other_shapes(data: DataConfig) -> None:
    """Checks that every picture of a source has the size and channels of `data` already, so that none is resized.

    Raises:
        UserError: a picture has another size or number of channels, or cannot be read.
    """
    assert data.channels is not None
    for record in sources.find(data).records(1):
        refuse_another_shape(
            record, size=data.size, channels=data.channels, hint="resize or convert the pictures first"
        )


def refuse_another_shape(record: Record, *, size: tuple[int, int], channels: int, hint: str) -> None:
    """Checks that a picture has this height, width and number of channels already; the message ends with `hint`.

    A picture with transparency has 4 channels, or 3 if `channels` is less. One without fits 4 channels: it is opaque.

    Raises:
        UserError: it has not, or cannot be read.
    """
    if isinstance(record.content, np.ndarray):  # (3, H, W), also of grey images; (4, H, W) of RGBA
        grey = len(record.content) == 3 and bool((record.content == record.content[:1]).all())
        found = (*record.content.shape[1:], min(channels, 3) if grey and channels < 4 else len(record.content))
    else:
        try:
            with Image.open(io.BytesIO(record.content)) as image:
                grey = image.mode in ("1", "L", "F") or image.mode.startswith("I")
                clear = channels == 4 and image.has_transparency_data
                found = (image.height, image.width, 4 if clear else 1 if grey else 3)
        except Exception as error:  # for damage or a decompression bomb, Pillow raises nearly every kind of error
            raise UserError(f"{record.name} is not a readable picture: repair or remove it.") from error
    if channels == 4:
        found = (*found[:2], 4)
    if found != (*size, channels):
        said = ["x".join(map(str, shape)) for shape in (found, (*size, channels))]
        order = "" if size[0] == size[1] else " (height x width x channels)"
        raise UserError(f"{record.name} is {said[0]}, but the generator draws {said[1]}{order}: {hint}.")


def spread(source: Source, count: int) -> Iterator[Record]:
    """Yields at most `count` records from all over a source, because its beginning may have only one class."""
    return itertools.islice(source.records(-(-source.count // count)), count)


def cache_folder(data: DataConfig) -> Path:
    """Returns `data.cache`, or distgan's part of the user's cache folder if it is unset."""
    if data.cache is not None:
        return Path(data.cache)
    return Path(paths.expanded("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "distgan"


def _opened(source: Source, data: DataConfig, scale: Scale | None = None) -> Images | None:
    """Opens the store of a source; None if there is no whole one made by today's rules."""
    folder = store_folder(source, data, scale)
    images = _open(folder)
    if images is None or images.plain is not None:
        return images
    # This store is older than the rule of one scale per source. It is still right if no picture is deep.
    if any(_threaded(lambda record: extent(record.content), source.records(1))):
        return None
    low, high = images.pixels.flatten(2).aminmax(dim=2)
    images = dataclasses.replace(images, plain=int(nearly_one_colour(low, high).sum()))
    with contextlib.suppress(OSError):  # a read-only cache works as well, but repeats this at each start
        described = json.loads((folder / "store.json").read_text())
        files.replace(folder / "store.json", json.dumps({**described, "plain": images.plain}).encode())
    return images


def _open(folder: Path) -> Images | None:
    """Opens the store in a folder; None if there is no whole one."""
    try:
        described = json.loads((folder / "store.json").read_text())
        shape = described["shape"]
        pixels = _mapped(folder / "images.bin", shape)
        labels = torch.from_numpy(np.fromfile(folder / "labels.bin", dtype=np.int64))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):  # it is damaged in one way or another
        return None
    if (folder / "images.bin").stat().st_size != pixels.nbytes or len(labels) != len(pixels):
        return None
    return Images(
        pixels=pixels,
        labels=labels if described["classes"] is not None else None,
        classes=tuple(described["classes"]) if described["classes"] is not None else None,
        fingerprint=described["fingerprint"],
        skipped=described["skipped"],
        plain=described.get("plain"),
        scale=Scale(**described["scale"]) if described.get("scale") is not None else None,
        folder=folder,
    )


def _mapped(file: Path, shape: Sequence[int]) -> Tensor:
    """Maps a file of uint8 for reading. (A mapping that could be written, as torch's, must not be larger than the
    memory.)"""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r", shape=tuple(shape)))


def _prepare_alone(source: Source, data: DataConfig, scale: Scale | None = None) -> Images:
    """Prepares the store while other processes of this machine that want it wait."""
    folder = store_folder(source, data, scale)
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_suffix(".lock")) as alone:
            images = _opened(source, data, scale)  # another process may have been first
            if images is None:
                for leftover in folder.parent.glob(f"{folder.name}.*.tmp") if alone else ():  # a killed process's
                    shutil.rmtree(leftover, ignore_errors=True)
                _prepare(source, data, folder, scale)
                images = _open(folder)
    assert images is not None
    return images


def _prepare(source: Source, data: DataConfig, folder: Path, scale: Scale | None) -> None:
    channels = data.channels or source.channels
    needed = source.count * channels * math.prod(data.size)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise UserError(
            f"the images need {needed / 1e6:,.1f} MB in {folder.parent}, where {free / 1e6:,.1f} MB are free: "
            "make room, or choose another folder with --data.cache=DIR."
        )
    started = time.monotonic()
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        try:
            written = _write(source, data, partial, scale)
        except DeepError:  # now all values must be looked at first; sources of 8 bits need no second pass
            records = shown(source.records(1), f"measuring {data.source}", source.count)
            scale = (scale or Scale()).or_else(measured(records))
            written = _write(source, data, partial, scale)
        partial.chmod(0o777 & ~_umask())  # mkdtemp gives access to the owner only
        existing = _open(folder)
        if existing is None or existing.plain is None:
            shutil.rmtree(folder, ignore_errors=True)  # not whole, or made by older rules
            if folder.is_file():
                folder.unlink()
            with contextlib.suppress(OSError):  # without file locks, another process may just have been first
                partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if (seconds := time.monotonic() - started) > 5:
        print(f"prepared {written:,} images in {seconds:.0f} s: {folder}", file=sys.stderr, flush=True)


def _write(source: Source, data: DataConfig, partial: Path, scale: Scale | None) -> int:
    """Writes a store's files into a folder, tells the user what is unusual, and returns the number of images."""
    channels = data.channels or source.channels
    labels: list[int] = []
    skipped: list[str] = []
    plain: list[str] = []
    content = hashlib.sha256()
    with (partial / "images.bin").open("wb") as stream:
        records = shown(source.records(1), f"preparing {data.source}", source.count)
        decoded = _decoded(_hashed(records, content), data, channels, skipped, scale)
        while some := list(itertools.islice(decoded, _CHUNK)):
            chunk, pixels = [record for record, _ in some], torch.stack([pixels for _, pixels in some])
            stream.write(pixels.numpy().tobytes())
            labels.extend(-1 if record.label is None else record.label for record in chunk)
            low, high = pixels.flatten(2).aminmax(dim=2)
            plain.extend(chunk[i].name for i in nearly_one_colour(low, high).nonzero())
        stream.flush()
        os.fsync(stream.fileno())
    if not labels:
        raise UserError(f"no picture of {data.path or data.id or data.source} can be decoded: check the files.")
    if scale is not None:  # a run must not resume on the same files with another scale
        content.update(json.dumps(dataclasses.asdict(scale)).encode())
    if data.fit != "crop":  # features and classifiers in the cache are found by the fingerprint
        content.update(data.fit.encode())
    np.array(labels, dtype=np.int64).tofile(partial / "labels.bin")
    described = {
        "shape": [len(labels), channels, *data.size],
        "classes": source.classes,
        "fingerprint": content.hexdigest(),
        "skipped": len(skipped),
        "plain": len(plain),
        "scale": dataclasses.asdict(scale) if scale is not None else None,
    }
    (partial / "store.json").write_text(json.dumps(described))
    if scale is not None:
        print(f"pictures of more than 8 bits: {scale} become 0 to 255", flush=True)
    if skipped:
        said = f"{len(skipped):,} picture{'' if len(skipped) == 1 else 's'} that cannot be decoded"
        print(f"skipped {said}, the first: {skipped[0]}", file=sys.stderr, flush=True)
    if plain:
        verb = "is" if len(plain) == 1 else "are"
        said = f"{len(plain):,} of {len(labels):,} pictures {verb} of one colour throughout, the first: {plain[0]}"
        hint = "; if that is a surprise, their values may not go from 0 to 255" if len(plain) == len(labels) else ""
        print(f"{said}{hint}", flush=True)
    return len(labels)


def measured(records: Iterable[Record]) -> Scale:
    """Returns the scale of the deep pictures among these records. Decodes only those."""

    def measure(record: Record) -> tuple[str, Extent | None]:
        return record.name, extent(record.content)

    found = [(name, values) for name, values in _threaded(measure, records) if values is not None]
    return scale_of(found)


def _hashed(records: Iterable[Record], digest: "hashlib._Hash") -> Iterator[Record]:
    """Adds each record's content and label to a hash, which is the same for the hub and for a copy of it."""
    for record in records:
        content = record.content if isinstance(record.content, bytes) else record.content.tobytes()
        digest.update(f"{len(content)} {record.label}:".encode() + content)
        yield record


def _decoded(
    records: Iterable[Record], data: DataConfig, channels: int, skipped: list[str], scale: Scale | None
) -> Iterator[tuple[Record, Tensor]]:
    """Yields each record with its pixels. With `data.skip_bad`, names of undecodable ones are added to `skipped`."""

    def attempt(record: Record) -> tuple[Record, Tensor | UndecodableError]:
        try:
            return record, picture(record.content, size=data.size, channels=channels, scale=scale, fit=data.fit)
        except UndecodableError as error:
            return record, error

    for record, outcome in _threaded(attempt, records):
        if isinstance(outcome, Tensor):
            yield record, outcome
        elif data.skip_bad:
            skipped.append(record.name)
        else:
            raise UserError(
                f"{record.name} {outcome}: repair or remove it, or leave such pictures out with --data.skip_bad=true."
            ) from outcome


def _threaded(work: Callable[[Record], T], records: Iterable[Record]) -> Iterator[T]:
    """Yields the results in order. Threads do the work, because Pillow's decoders release Python's lock."""
    remaining = iter(records)
    with ThreadPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0)))) as pool:
        while chunk := list(itertools.islice(remaining, _CHUNK)):
            yield from pool.map(work, chunk)


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[bool]:
    """Waits for a file lock. Yields False if the file system has none: several processes then prepare, without harm."""
    with file.open("a") as stream:
        alone = False
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
            alone = True
        yield alone


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Wraps writing into the cache. Raises UserError if it fails."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be written ({error.strerror}): choose another with --data.cache=DIR."
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
