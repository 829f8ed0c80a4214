"""Finds the latents whose images are nearest to given pictures, so that they can be drawn again and walked between."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from distgan import data, files, paths, pictures
from distgan.applications import given
from distgan.applications.inversion import Inverted, invert
from distgan.cli import check_json, write_json
from distgan.errors import UserError
from distgan.evaluation.neighbours import distance_to_nearest, training_images
from distgan.parallel import launch
from distgan.storage import exported, latents


def main(argv: Sequence[str] | None = None) -> None:
    """Collective: `distgan invert RUN PICTURES --out latents.safetensors [--grid FILE.png] [--json PATH] ...`.

    Raises:
        UserError: there is no generator, the pictures do not fit, or a file exists or cannot be written.
    """
    arguments = _parse(argv)
    if arguments.out.suffix != ".safetensors":
        raise UserError(f"--out is {arguments.out}, but must end in .safetensors.")
    files.check_place("--out", arguments.out, overwrite=arguments.overwrite)
    if arguments.grid is not None:
        pictures.check(arguments.grid, key="--grid", overwrite=arguments.overwrite)
    check_json(arguments.json)
    outputs = {"--out": arguments.out, "--grid": arguments.grid, "--json": arguments.json}
    read = {"PICTURES": arguments.pictures} if Path(arguments.pictures).exists() else {}
    data.refuse_mixing(outputs, read)
    found = exported.find(arguments.run)
    names, wanted = given.pictures(arguments.pictures, found, fit=arguments.fit, num=arguments.num)
    inverted = invert(found, wanted, steps=arguments.steps, restarts=arguments.restarts, seed=arguments.seed)
    if launch.launched_ranks()[0] != 0:
        return
    with files.written("--out", arguments.out):
        latents.save(arguments.out, inverted.latents)
    nearest_distance, why_not = _to_training_images(found, wanted)
    if arguments.grid is not None:
        rows = torch.stack([wanted, inverted.images]).flatten(0, 1)
        pictures.save(pictures.grid(rows, columns=len(wanted)), arguments.grid, key="--grid")
    _show(names, inverted, nearest_distance, why_not)
    print(arguments.out)
    if arguments.json is not None:
        write_json(arguments.json, _described(names, inverted, nearest_distance))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="distgan invert", description="Find the latents whose images are nearest to pictures."
    )
    given.add_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("latents.safetensors"), help="file to write the latents to")
    parser.add_argument(
        "--grid", type=Path, metavar="FILE.png", help="also write one picture: yours above, the images found below"
    )
    return paths.expand(parser.parse_args(argv), "run", "pictures", "out", "grid", "json")


def _to_training_images(found: exported.Exported, wanted: torch.Tensor) -> tuple[torch.Tensor | None, str]:
    """Returns the distance of each picture to its nearest training image, or None and why."""
    try:
        return distance_to_nearest(wanted, training_images(found)), ""
    except UserError as error:
        return None, str(error)


def _show(names: Sequence[str], inverted: Inverted, to_training: torch.Tensor | None, why_not: str) -> None:
    width = max(map(len, names))
    print(f"RMS difference of pixels in [-1, 1] from the picture\n{'':{width}}  found  nearest training image")
    for i, name in enumerate(names):
        other = f"{to_training[i]:.3f}" if to_training is not None else "-"
        print(f"{name:{width}}  {inverted.distance[i]:.3f}  {other}")
    mean = f"{to_training.mean():.3f}" if to_training is not None else f"- ({why_not})"
    print(f"{'mean':{width}}  {inverted.distance.mean():.3f}  {mean}")


def _described(names: Sequence[str], inverted: Inverted, to_training: torch.Tensor | None) -> dict[str, object]:
    return {
        "pictures": list(names),
        "distance": inverted.distance.tolist(),
        "distance_of_nearest_training_image": to_training.tolist() if to_training is not None else None,
    }


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["invert", *sys.argv[1:]]))
