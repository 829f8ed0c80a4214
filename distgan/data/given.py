"""Reads the pictures that somebody gives to a trained generator, which must have the size of its images."""

import contextlib
import itertools
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distgan.data.arrangement import endings, left_behind
from distgan.data.decode import DeepError, UndecodableError, is_picture, picture
from distgan.data.depth import Scale
from distgan.data.folders import archive, walked
from distgan.data.records import Record, contents
from distgan.data.store import load, measured, refuse_another_shape
from distgan.errors import UserError
from distgan.recipe import DataConfig


def given(
    path: str,
    *,
    size: tuple[int, int],
    channels: int,
    fit: str | None,
    num: int | None = None,
    like: DataConfig | None = None,
) -> tuple[list[str], Tensor]:
    """Reads a picture, the pictures of a folder or zip archive in the order of their names, or those of an .npz file.

    Args:
        path: the picture, folder or archive; or an array as `distgan sample` writes it, arr_0, uint8 (N, H, W, 3) or,
            of RGBA images, (N, H, W, 4).
        size: height and width of the generator's images, in pixels.
        channels: their channels: 1, 3 or 4.
        fit: how pictures of another size or number of channels are made to fit, as `data.fit`; None refuses them.
        num: the most pictures to read.
        like: the training images, whose scale pictures of more than 8 bits take, if the images are here.

    Returns:
        Names of the pictures, and their pixels, uint8 (N, channels, *size).

    Raises:
        UserError: there is no picture, one cannot be decoded, or one has another size or number of channels and `fit`
            is None.
    """
    records = list(itertools.islice(_records(path), num))
    if fit is None:
        for record in records:
            refuse_another_shape(record, size=size, channels=channels, hint="add --fit to crop and resize the pictures")
    how = {"size": size, "channels": channels, "fit": fit or "crop"}
    try:
        pixels = [_decoded(record, None, how) for record in records]
    except DeepError:  # one scale for all of them, as in training images
        scale = measured(records)
        if like is not None:
            with contextlib.suppress(UserError):
                trained_on = load(like).scale
                scale = trained_on.or_else(scale) if trained_on is not None else scale
        pixels = [_decoded(record, scale, how) for record in records]
    return [record.name for record in records], torch.stack(pixels)


def _records(path: str) -> Iterator[Record]:
    file = Path(path)
    if not file.exists():
        raise UserError(f"{path} does not exist: give a picture, or a folder or zip archive of pictures.")
    if file.suffix == ".npz":
        return (Record(f"{file.stem}-{i:06d}", image, None) for i, image in enumerate(_array(file)))
    if file.is_file() and is_picture(file):
        return iter([Record(str(file), contents(file), None)])
    return records_in("PICTURES", path)


def _array(file: Path) -> np.ndarray:
    """Reads the images of an .npz file: uint8 (N, 3 or 4, H, W)."""
    try:
        with np.load(file, allow_pickle=False) as found:
            images: np.ndarray = found["arr_0"]
    except Exception as error:  # for what is no such file, NumPy raises many kinds of errors
        raise UserError(f"{file} is no .npz file with an array arr_0: write one with `distgan sample`.") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (3, 4):
        raise UserError(
            f"arr_0 of {file} is {images.dtype} {images.shape}, but must be uint8 (N, H, W, 3), or (N, H, W, 4) for "
            "RGBA: convert it."
        )
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def records_in(key: str, path: str) -> Iterator[Record]:
    """Returns the pictures of a folder or zip archive, whatever its sub-folders are called; messages call it `key`.

    Raises:
        UserError: there are none, or it is damaged or unreadable.
    """
    root = Path(path)
    if root.is_file() and not zipfile.is_zipfile(root):
        raise UserError(
            f"{key} is {path}, which is neither a readable picture nor a folder or zip archive of pictures."
        )
    try:
        tree = archive(root) if root.is_file() else walked(root)
    except UserError as error:
        raise UserError(str(error).replace("data.path", key)) from error
    chosen = sorted(
        name for name in tree.names if PurePath(name).suffix.lower() in endings() and left_behind(name) is None
    )
    if not chosen:
        raise UserError(f"{key} is {path}, which holds no pictures: give another folder or archive.")

    def records() -> Iterator[Record]:
        with tree.open() as read:
            for name in chosen:
                yield Record(str(root / name), read(name), None)

    return records()


def _decoded(record: Record, scale: Scale | None, how: dict[str, Any]) -> Tensor:
    try:
        return picture(record.content, scale=scale, **how)
    except UndecodableError as error:
        raise UserError(f"{record.name} {error}: repair or remove it.") from error
