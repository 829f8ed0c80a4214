"""Masks: which pixels of a picture are hidden."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from distgan import seeding
from distgan.data.decode import is_picture
from distgan.data.given import records_in
from distgan.errors import UserError, nearest


def masks(kind: str, names: list[str], *, size: tuple[int, int], seed: int) -> Tensor:
    """Returns a mask for each picture: bool (N, *size), True where it is hidden.

    Args:
        kind: one of `KINDS`; or a picture, or a folder or zip archive of pictures, that are white where pixels are
            hidden: one for all, or one for each with the name of its picture, whatever the endings.
        names: names of the pictures.
        size: height and width of the pictures, in pixels.
        seed: seed of what is drawn; the mask of picture i depends only on the seed and i.

    Raises:
        UserError: there is no such mask, it does not fit, or it hides everything or nothing.
    """
    if kind in KINDS:
        return torch.stack([torch.from_numpy(KINDS[kind](size, seed, i)) for i in range(len(names))])
    if not Path(kind).exists():
        hint = nearest(kind, list(KINDS))
        raise UserError(f'--mask is "{kind}", which is neither a kind of mask nor a file: {hint}')
    if Path(kind).is_file() and is_picture(Path(kind)):
        return _read(Path(kind).read_bytes(), kind, size).expand(len(names), -1, -1)
    records = list(records_in("--mask", kind))
    found = {Path(record.name).stem: record for record in records}
    if len(found) < len(records):
        stems = [Path(record.name).stem for record in records]
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise UserError(f"--mask is {kind}, which has several masks named {twice}: give each a name of its own.")
    missing = [name for name in names if Path(name).stem not in found]
    if missing:
        raise UserError(
            f"--mask is {kind}, which has no mask for {missing[0]}: each picture needs one with its name, or give one "
            "mask for all."
        )
    chosen = [found[Path(name).stem] for name in names]
    return torch.stack([_read(record.content, record.name, size) for record in chosen])


def _read(content: bytes | np.ndarray, name: str, size: tuple[int, int]) -> Tensor:
    assert isinstance(content, bytes)
    try:
        with Image.open(io.BytesIO(content)) as image:
            deep = image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr") or "transparency" in image.info
            hidden = np.array(ImageOps.exif_transpose(image).convert("L")) >= 128
    except Exception as error:  # for damage, Pillow raises nearly every kind of error
        raise UserError(f"the mask {name} is not a readable picture: repair or remove it.") from error
    if deep:
        raise UserError(
            f"the mask {name} has transparency or more than 8 bits, so it is not clear what it hides: save it as 8-bit "
            "grey, white where the pictures are to be repaired."
        )
    if hidden.shape != size:
        said = ["x".join(map(str, shape)) for shape in (hidden.shape, size)]
        raise UserError(f"the mask {name} is {said[0]} (height x width), but the pictures are {said[1]}: resize it.")
    if hidden.all() or not hidden.any():
        what = "everything" if hidden.all() else "nothing"
        raise UserError(f"the mask {name} hides {what}: make white what is to be repaired, and black the rest.")
    return torch.from_numpy(hidden)


def _center(size: tuple[int, int], seed: int, i: int) -> np.ndarray:
    """Hides the central rectangle of half the height and width, a quarter of the area."""
    hidden = np.zeros(size, dtype=bool)
    hidden[tuple(slice(side // 4, side // 4 + side // 2) for side in size)] = True
    return hidden


def _left(size: tuple[int, int], seed: int, i: int) -> np.ndarray:
    """Hides the left half."""
    hidden = np.zeros(size, dtype=bool)
    hidden[:, : size[1] // 2] = True
    return hidden


def _random(size: tuple[int, int], seed: int, i: int) -> np.ndarray:
    """Hides each pixel with probability 1/2."""
    return seeding.generator(seed, "mask", i).random(size) < 0.5


def _grid(size: tuple[int, int], seed: int, i: int) -> np.ndarray:
    """Hides all pixels but every second of every second row."""
    hidden = np.ones(size, dtype=bool)
    hidden[::2, ::2] = False
    return hidden


def _scratch(size: tuple[int, int], seed: int, i: int) -> np.ndarray:
    """Hides three lines from edge to edge, as wide as a sixteenth of the shorter side."""
    rng = seeding.generator(seed, "mask", i)
    height, width = size
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        (a, b), across = rng.random(2), rng.random() < 0.5
        ends = [(0, a * height), (width, b * height)] if across else [(a * width, 0), (b * width, height)]
        draw.line(ends, fill=255, width=max(1, min(size) // 16))
    return np.array(image) > 0


KINDS: dict[str, Callable[[tuple[int, int], int, int], np.ndarray]] = {
    "center": _center,
    "random": _random,
    "left": _left,
    "grid": _grid,
    "scratch": _scratch,
}
"""Masks that are made: ((height, width), seed, number of the picture) -> bool (height, width)."""
