"""Draws images from a trained generator: one picture of them all, a PNG of each, or an array."""

import argparse
import itertools
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distgan import files, paths, pictures
from distgan.applications.classes import in_file_names, labels_in
from distgan.errors import UserError
from distgan.models import CHUNK, Generator, place
from distgan.parallel.ranks import together
from distgan.progress import shown
from distgan.storage import latents, tensors
from distgan.storage.exported import load_generator
from distgan.storage.latents import Latents

_FORMS = "must end in .png (one picture of all images), .npz (an array) or / (a folder with a PNG of each)"


def main(argv: Sequence[str] | None = None) -> None:
    """Collective: `distgan sample RUN --num 64 --out grid.png|images.npz|DIR/ [--seed 0] [--classes cat,7] ...`.

    Raises:
        UserError: there is no generator or no such class, or the images cannot be written.
    """
    parser = argparse.ArgumentParser(prog="distgan sample", description="Draw images from a trained generator.")
    parser.add_argument("run", help="folder of a run or of an exported generator, or a generator's id on the hub")
    parser.add_argument("--num", type=int, help="number of images (default: 64; with --classes, 8 of each)")
    parser.add_argument(
        "--out",
        default="grid.png",
        help="FILE.png: one picture of all images. DIR/: a PNG of each. FILE.npz: arr_0, uint8 (N, H, W, 3), also for "
        "grey images, or (N, H, W, 4) for RGBA ones, and arr_1 with the labels, if any. DIR/ and FILE.npz hold any "
        "number (default: grid.png)",
    )
    parser.add_argument("--seed", type=int, help="image i is a function of seed and i (default: 0)")
    parser.add_argument(
        "--classes",
        help="names or numbers of classes, separated by commas, if the generator was trained with labels: --num images "
        "of each; FILE.png shows each class in its own row. A word that is a class's name is never read as a number",
    )
    parser.add_argument(
        "--truncation",
        type=float,
        metavar="T",
        help="draw latents from a normal distribution that is cut off at -T and T: less varied images of more equal "
        "quality (default: not cut off)",
    )
    parser.add_argument(
        "--latents", type=Path, metavar="FILE", help="draw the images of these latents, which `distgan invert` wrote"
    )
    arguments = paths.expand(parser.parse_args(argv), "run", "out", "latents")
    if arguments.latents is not None:
        for name in ("num", "classes", "seed", "truncation"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--latents says which images are drawn: leave --{name} or --latents out.")
    out = Path(arguments.out)
    write = _form(arguments.out)
    generator = load_generator(arguments.run)
    if arguments.truncation is not None:
        generator = generator.truncated(arguments.truncation)
    if arguments.latents is not None:
        drawn = _of_latents(generator, latents.read(arguments.latents, generator))
    else:
        drawn = _of_seed(generator, arguments.classes, arguments.num, arguments.seed or 0)
    with together({"generator": tensors.digest(generator), "images": drawn.total, "seed": arguments.seed}) as ranks:
        place(generator, ranks.device)
        shared = ranks.in_order(len(drawn.parts), lambda number: drawn.draw(drawn.parts[number]))
        if ranks.rank == 0:
            with files.written("--out", out):
                write(drawn, shown(shared, "drawing", len(drawn.parts), each=min(CHUNK, drawn.total)), out)
            print(arguments.out)
        else:
            for _ in shared:
                pass


_Images = tuple[Tensor, list[int]]
"""Images, uint8 (n, C, H, W), at most CHUNK, and their labels: an empty list if there are none."""


@dataclass(frozen=True)
class _Drawn:
    """The images to draw, in parts of at most CHUNK."""

    parts: Sequence[Any]
    draw: Callable[[Any], _Images]
    """Draws one of the parts."""
    total: int
    """The number of images."""
    columns: int | None
    """Images in a row of a picture of them all; None for about the square root of their number."""
    class_names: Sequence[str]


def _of_seed(generator: Generator, asked_classes: str | None, asked_num: int | None, seed: int) -> _Drawn:
    """Returns `num` images of each class that is asked for, or `num` in all if none is."""
    asked = labels_in("--classes", asked_classes, generator) if asked_classes is not None else (None,)
    num = asked_num if asked_num is not None else 64 if asked_classes is None else 8
    if num < 1:
        raise UserError(f"the number of samples is {num}, but must be at least 1.")

    def draw(part: tuple[int | None, int]) -> _Images:
        label, first = part
        count = min(CHUNK, num - first)
        labels = generator.labels(first, seed=seed, label=label)
        images = generator.draw(first, seed=seed, label=label)
        return images[:count], labels[:count].tolist() if labels is not None else []

    parts = [(label, first) for label in asked for first in range(0, num, CHUNK)]
    columns = num if asked_classes is not None else None
    return _Drawn(parts, draw, num * len(asked), columns, generator.class_names)


def _of_latents(generator: Generator, given: Latents) -> _Drawn:
    def draw(first: int) -> _Images:
        rows = slice(first, first + CHUNK)
        y = given.y[rows] if given.y is not None else None
        return generator.decode(given.z[rows], y), y.tolist() if y is not None else []

    return _Drawn(range(0, len(given), CHUNK), draw, len(given), None, generator.class_names)


_Write = Callable[[_Drawn, Iterator[_Images], Path], None]


def _form(given: str) -> _Write:
    """Returns the function that writes the form that `--out` asks for.

    Raises:
        UserError: it is none of the three forms, its folder does not exist, or it is a folder that is not empty.
    """
    out = Path(given)
    folder = given.endswith("/") or out.is_dir()
    form = _folder if folder else {".png": _grid, ".npz": _array}.get(out.suffix.lower())
    if form is None:
        raise UserError(f"--out is {given}, but {_FORMS}.")
    if folder:
        files.check_folder("--out", out)
    else:
        files.check_place("--out", out)
    return form


def _grid(drawn: _Drawn, chunks: Iterator[_Images], out: Path) -> None:
    images = torch.cat([images for images, _ in chunks])
    pictures.save(pictures.grid(images, columns=drawn.columns), out)


def _folder(drawn: _Drawn, chunks: Iterator[_Images], out: Path) -> None:
    """Writes 000000.png, 000001.png, ...; with labels 000000-CLASS.png. After an error, none is left."""
    digits = max(6, len(str(drawn.total - 1)))
    names = in_file_names(drawn.class_names)
    numbers = itertools.count()
    with files.whole_folder(out) as partial:
        for images, labels in chunks:
            for i, image in enumerate(images):
                of = f"-{names[labels[i]] if names else labels[i]}" if labels else ""
                pictures.one(image).save(partial / f"{next(numbers):0{digits}}{of}.png")


def _array(drawn: _Drawn, chunks: Iterator[_Images], out: Path) -> None:
    """Writes an .npz file, a chunk at a time: arr_0 is uint8 (N, H, W, 3), for RGBA images (N, H, W, 4);
    with labels, arr_1 is int64 (N,).

    The evaluator of guided-diffusion (Dhariwal and Nichol 2021) reads this layout; it needs three channels.
    """
    labels: list[int] = []
    with files.whole(out) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            for i, (images, some) in enumerate(chunks):
                array = images.permute(0, 2, 3, 1).expand(-1, -1, -1, max(3, images.shape[1])).contiguous().numpy()
                if i == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (drawn.total, *array.shape[1:])}
                    np.lib.format.write_array_header_1_0(stream, header)
                stream.write(array.data)
                labels += some
        if labels:
            with archive.open("arr_1.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.array(labels, dtype=np.int64), allow_pickle=False)


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["sample", *sys.argv[1:]]))
