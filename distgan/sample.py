"""Draws images from a trained generator."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from distgan import pictures
from distgan.checkpoint import load_generator


def main(argv: Sequence[str] | None = None) -> None:
    """`distgan sample RUN --num 64 --out grid.png [--seed 0]`: one picture of all the images.

    Raises:
        ValueError: there is no generator, or the picture cannot be written.
    """
    parser = argparse.ArgumentParser(prog="distgan sample", description="Draw images from a trained generator.")
    parser.add_argument("run", help="folder of a run, or of an exported generator")
    parser.add_argument("--num", type=int, default=64, help="number of images (default: 64)")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="PNG file to write (default: grid.png)")
    parser.add_argument("--seed", type=int, default=0, help="image i is a function of seed and i (default: 0)")
    parser.add_argument("--classes", help="classes to draw, of a generator that was trained with labels")
    arguments = parser.parse_args(argv)
    pictures.check(arguments.out)
    generator = load_generator(arguments.run).to("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.classes is not None:
        raise ValueError(f"--classes is {arguments.classes}, but {arguments.run} was trained without labels.")
    pictures.save(pictures.grid(generator.sample(arguments.num, seed=arguments.seed)), arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["sample", *sys.argv[1:]]))
