"""Draws images from a trained generator: one picture of them all, a PNG of each, or an array."""

import argparse
import re
import sys
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distgan import files, paths, pictures
from distgan.errors import UserError, nearest
from distgan.models import CHUNK, Generator
from distgan.progress import shown
from distgan.storage.exported import load_generator

_FORMS = "must end in .png (one picture of all images), .npz (an array) or / (a folder with a PNG of each)"


def main(argv: Sequence[str] | None = None) -> None:
    """`distgan sample RUN --num 64 --out grid.png|images.npz|DIR/ [--seed 0] [--classes cat,7]`.

    Raises:
        UserError: there is no generator or no such class, or the images cannot be written.
    """
    parser = argparse.ArgumentParser(prog="distgan sample", description="Draw images from a trained generator.")
    parser.add_argument("run", help="folder of a run, or of an exported generator")
    parser.add_argument("--num", type=int, help="number of images (default: 64; with --classes, 8 of each)")
    parser.add_argument(
        "--out",
        default="grid.png",
        help="FILE.png: one picture of all images. DIR/: a PNG of each. FILE.npz: arr_0, uint8 (N, H, W, 3), of grey "
        "images too, and arr_1 with the labels, if any. DIR/ and FILE.npz take any number (default: grid.png)",
    )
    parser.add_argument("--seed", type=int, default=0, help="image i is a function of seed and i (default: 0)")
    parser.add_argument(
        "--classes",
        help="names or numbers of classes, separated by commas, if the generator was trained with labels: --num images "
        "of each, in a row of the picture each. A word that is a class's name is never read as a number",
    )
    arguments = paths.expand(parser.parse_args(argv), "run", "out")
    out = Path(arguments.out)
    write = _form(arguments.out)
    generator = load_generator(arguments.run)
    classes = _labels(arguments.classes, generator) if arguments.classes is not None else (None,)
    num = arguments.num if arguments.num is not None else 64 if arguments.classes is None else 8
    if num < 1:
        raise UserError(f"the number of samples is {num}, but must be at least 1.")
    generator.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        write(_Drawn(generator, num, classes, arguments.seed), out)
    except OSError as error:
        raise UserError(f"--out is {out}, which cannot be written ({error.strerror}): choose another place.") from error
    print(arguments.out)


@dataclass(frozen=True)
class _Drawn:
    """The images to draw: `num` of each class, or `num` in all if no class was asked for."""

    generator: Generator
    num: int
    classes: Sequence[int | None]
    seed: int

    @property
    def total(self) -> int:
        return self.num * len(self.classes)

    def chunks(self) -> Iterator[tuple[Tensor, list[int]]]:
        """Draws at most CHUNK images at a time: uint8 (n, C, H, W), and their labels, an empty list without labels."""
        for label in self.classes:
            for first in range(0, self.num, CHUNK):
                count = min(CHUNK, self.num - first)
                labels = self.generator.labels(first, seed=self.seed, label=label)
                images = self.generator.draw(first, seed=self.seed, label=label)
                yield images[:count], labels[:count].tolist() if labels is not None else []

    def shown(self) -> Iterator[tuple[Tensor, list[int]]]:
        """Yields the images and shows progress."""
        count = len(self.classes) * -(-self.num // CHUNK)
        return shown(self.chunks(), "drawing", count, each=min(CHUNK, self.num))


def _form(given: str) -> Callable[[_Drawn, Path], None]:
    """Returns the function that writes the form that `--out` asks for.

    Raises:
        UserError: it is none of the three forms, its folder does not exist, or it is a folder that is not empty.
    """
    out = Path(given)
    folder = given.endswith("/") or out.is_dir()
    form = _folder if folder else {".png": _grid, ".npz": _array}.get(out.suffix.lower())
    if form is None:
        raise UserError(f"--out is {given}, but {_FORMS}.")
    if not out.absolute().parent.is_dir():
        raise UserError(
            f"--out is {given}, but there is no folder {out.parent}: make it first, or choose another place."
        )
    if folder and out.exists():
        if not out.is_dir():
            raise UserError(f"--out is {given}, but {out} is a file: choose another folder.")
        old = next((file.name for file in sorted(out.iterdir()) if not file.name.startswith(".")), None)
        if old is not None:  # folders, too: they may be classes of training images
            raise UserError(f"--out is {given}, which is not empty (it has {old}): choose a new or empty folder.")
    return form


def _grid(drawn: _Drawn, out: Path) -> None:
    images = torch.cat([images for images, _ in drawn.shown()])
    picture = pictures.grid(images, columns=drawn.num if drawn.classes != (None,) else None)
    with files.whole(out) as partial:
        picture.save(partial, "PNG")


def _folder(drawn: _Drawn, out: Path) -> None:
    """Writes 000000.png, 000001.png, ...; with labels 000000-CLASS.png. After an error, none is left."""
    made = not out.exists()
    out.mkdir(exist_ok=True)
    digits = max(6, len(str(drawn.total - 1)))
    names = _in_file_names(drawn.generator.class_names)
    written = 0
    try:
        for images, labels in drawn.shown():
            for i, image in enumerate(images):
                of = f"-{names[labels[i]] if names else labels[i]}" if labels else ""
                Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(out / f"{written:0{digits}}{of}.png")
                written += 1
    except BaseException:
        for file in out.glob("[0-9]*.png"):  # there was nothing in the folder
            file.unlink()
        if made:
            out.rmdir()
        raise


def _in_file_names(classes: Sequence[str]) -> list[str]:
    """Returns the names of classes, shortened for file names; labels in place of names that would be equal or empty."""
    names = [
        re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", name)).encode()[:100].decode(errors="ignore")
        for name in classes
    ]
    often = Counter(names)
    return [name if name.strip("_") and often[name] == 1 else str(label) for label, name in enumerate(names)]


def _array(drawn: _Drawn, out: Path) -> None:
    """Writes an .npz file, a chunk at a time: arr_0 is uint8 (N, H, W, 3); with labels, arr_1 is int64 (N,).

    The evaluator of guided-diffusion (Dhariwal and Nichol 2021) reads this layout; it needs three channels.
    """
    labels: list[int] = []
    with files.whole(out) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            for i, (images, some) in enumerate(drawn.shown()):
                array = images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy()
                if i == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (drawn.total, *array.shape[1:])}
                    np.lib.format.write_array_header_1_0(stream, header)
                stream.write(array.data)
                labels += some
        if labels:
            with archive.open("arr_1.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.array(labels, dtype=np.int64), allow_pickle=False)


def _labels(text: str, generator: Generator) -> tuple[int, ...]:
    """Returns the labels of `--classes`. Names may contain commas: the longest name that fits is taken.

    Raises:
        UserError: a word is neither the name nor the number of a class.
    """
    words = text.split(",")
    labels = []
    longest = 1 + max((name.count(",") for name in generator.class_names), default=0)
    while words:
        given = {end: ",".join(words[:end]) for end in range(min(longest, len(words)), 0, -1)}
        fitting = ((end, word) for end, full in given.items() for word in (full, full.strip()))
        found = next(((end, word) for end, word in fitting if generator.named(word) is not None), None)
        end, word = found or (1, given[1].strip())
        words = words[end:]
        number = word.isdecimal() and found is None
        if not number and generator.class_counts and found is None:
            raise UserError(
                f'--classes has "{word}", which is neither the name nor the number of a class: '
                f"{nearest(word, generator.class_names or list(map(str, range(len(generator.class_counts)))))} "
                "Separate names or numbers of classes with commas, as in 0,3,7."
            )
        labels.append(generator.label_of(int(word) if number else word))
    return tuple(labels)


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["sample", *sys.argv[1:]]))
