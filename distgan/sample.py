"""Draws images from a trained generator."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from distgan import paths, pictures
from distgan.checkpoint import load_generator


def main(argv: Sequence[str] | None = None) -> None:
    """`distgan sample RUN --num 64 --out grid.png [--seed 0] [--classes 0,3,7]`: one picture of all the images.

    Raises:
        ValueError: there is no generator, or the picture cannot be written.
    """
    parser = argparse.ArgumentParser(prog="distgan sample", description="Draw images from a trained generator.")
    parser.add_argument("run", help="folder of a run, or of an exported generator")
    parser.add_argument("--num", type=int, help="number of images (default: 64; with --classes 8 of each)")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="PNG file to write (default: grid.png)")
    parser.add_argument("--seed", type=int, default=0, help="image i is a function of seed and i (default: 0)")
    parser.add_argument(
        "--classes", help="numbers of classes with commas between them, of a generator trained with labels: a row each"
    )
    arguments = paths.expand(parser.parse_args(argv), "run", "out")
    pictures.check(arguments.out)
    labels = _numbers(arguments.classes) if arguments.classes is not None else []
    generator = load_generator(arguments.run)
    for label in labels:
        generator.check_label(label)
    generator.to("cuda" if torch.cuda.is_available() else "cpu")
    if not labels:
        picture = pictures.grid(generator.sample(64 if arguments.num is None else arguments.num, seed=arguments.seed))
    else:
        columns = 8 if arguments.num is None else arguments.num
        picture = pictures.grid(generator.sample_rows(labels, columns, seed=arguments.seed), columns=columns)
    pictures.save(picture, arguments.out)
    print(arguments.out)


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"--classes is {text}, but must be numbers with commas, such as 0,3,7.")
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["sample", *sys.argv[1:]]))
