"""Walks between images of a generator: a strip of pictures, or an animation."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from distgan import files, paths, pictures
from distgan.applications.classes import labels_in
from distgan.applications.walks import walk
from distgan.errors import UserError
from distgan.models import CHUNK, Generator
from distgan.parallel import launch
from distgan.progress import shown
from distgan.storage import latents
from distgan.storage.exported import load_generator
from distgan.storage.latents import Latents


def main(argv: Sequence[str] | None = None) -> None:
    """`distgan interpolate RUN --seeds 0,1,2|--classes cat,dog|--latents FILE --out strip.png|walk.gif|.webp|.mp4`.

    Raises:
        UserError: there is no generator or no such class, there are fewer than two images to walk between, or the file
            exists or cannot be written.
    """
    arguments = _parse(argv)
    pictures.check_moving(arguments.out)
    files.check_place("--out", arguments.out, overwrite=arguments.overwrite)
    if arguments.steps < 1:
        raise UserError(f"--steps is {arguments.steps}, but must be at least 1.")
    if not 1 <= arguments.fps <= 100:
        raise UserError(f"--fps is {arguments.fps}, but must be from 1 to 100.")
    if arguments.seed is not None and arguments.classes is None:
        raise UserError("--seed has no meaning without --classes: give --seeds, the images between which to walk.")
    if launch.launched_ranks()[0] != 0:  # so little work is not shared
        return
    generator = load_generator(arguments.run)
    stations = _stations(arguments, generator)
    z, y = walk(stations, arguments.steps, classes=len(generator.class_counts))
    generator.to("cpu" if launch.use_cpu() else "cuda")
    parts = torch.split(torch.arange(len(z)), CHUNK)
    drawing = shown(parts, "drawing", len(parts), each=CHUNK)
    images = torch.cat([generator.decode(z[part], y[part] if y is not None else None) for part in drawing])
    if arguments.out.suffix.lower() == ".png":
        pictures.save(pictures.grid(images, columns=len(images)), arguments.out)
    else:
        pictures.save_moving(images, arguments.out, fps=arguments.fps)
    print(arguments.out)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="distgan interpolate", description="Walk from image to image, through the images that lie between."
    )
    parser.add_argument("run", help="folder of a run or of an exported generator, or a generator's id on the hub")
    between = parser.add_mutually_exclusive_group()
    between.add_argument(
        "--seeds", help="seeds separated by commas: walk between the first images of these seeds (default: 0,1,2,3)"
    )
    between.add_argument(
        "--classes", help="names or numbers of classes separated by commas: one image turns from class to class"
    )
    between.add_argument(
        "--latents", type=Path, metavar="FILE", help="walk between these latents, which `distgan invert` wrote"
    )
    parser.add_argument("--seed", type=int, help="with --classes: the seed of the image (default: 0)")
    parser.add_argument("--steps", type=int, default=8, help="steps from one image to the next (default: 8)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("walk.png"),
        help="FILE.png: a strip. FILE.gif, FILE.webp or FILE.mp4: an animation (default: walk.png)",
    )
    parser.add_argument("--fps", type=int, default=12, help="images per second of an animation (default: 12)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    return paths.expand(parser.parse_args(argv), "run", "latents", "out")


def _stations(arguments: argparse.Namespace, generator: Generator) -> Latents:
    """Returns the latents between which to walk, with labels if the generator has classes.

    Raises:
        UserError: they cannot be read, or are fewer than two.
    """
    if arguments.latents is not None:
        stations, key = latents.read(arguments.latents, generator), f"--latents {arguments.latents}"
    elif arguments.classes is not None:
        labels, key = labels_in("--classes", arguments.classes, generator), f"--classes {arguments.classes}"
        z, _ = generator.inputs(0, seed=arguments.seed or 0)
        stations = Latents(z[:1].expand(len(labels), -1), torch.tensor(labels))
    else:
        given = arguments.seeds if arguments.seeds is not None else "0,1,2,3"
        seeds, key = _seeds(given), f"--seeds {given}"
        first = [generator.inputs(0, seed=seed) for seed in seeds]
        y = torch.cat([y[:1] for _, y in first if y is not None]) if generator.class_counts else None
        stations = Latents(torch.cat([z[:1] for z, _ in first]), y)
    if len(stations) < 2:
        raise UserError(f"{key} gives one image, but a walk needs at least two to go between: give more.")
    return stations


def _seeds(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds is {text}, but must be numbers separated by commas, as in 0,1,2.") from None


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["interpolate", *sys.argv[1:]]))
