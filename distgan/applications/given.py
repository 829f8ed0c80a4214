"""The pictures that a user gives to an application: files, or images of the generator's own data set."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from distgan import data
from distgan.errors import UserError
from distgan.storage.exported import Exported

_OF_A_SPLIT = 64  # images of a split, unless the user says how many


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose pictures and the length of a search."""
    parser.add_argument("run", help="folder of a run or of an exported generator, or a generator's id on the hub")
    parser.add_argument(
        "pictures",
        help="a picture, a folder or zip archive of pictures, an .npz file of `distgan "
        "sample`, or train or test: images of that split of the generator's data set (./train means a folder)",
    )
    parser.add_argument(
        "--num", type=int, help=f"use the first NUM pictures (default: all; of train or test, {_OF_A_SPLIT})"
    )
    parser.add_argument(
        "--fit", action="store_true", help="resize and convert pictures of another size, as training did"
    )
    parser.add_argument("--steps", type=int, default=500, help="updates of each latent (default: 500)")
    parser.add_argument(
        "--restarts",
        type=int,
        default=4,
        help="starting points per picture; after a fifth of the steps only the best goes on (default: 4)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of starting points and random masks (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers to a file")


def pictures(what: str, found: Exported, *, fit: bool, num: int | None) -> tuple[list[str], Tensor]:
    """Returns names and pixels, uint8 (N, C, H, W), of the pictures that a command is about.

    Raises:
        UserError: there are no such pictures, they do not fit, or the number is not positive.
    """
    if num is not None and num < 1:
        raise UserError(f"--num is {num}, but must be at least 1.")
    if what in ("train", "test"):
        if found.recipe is None:
            raise UserError(
                f"PICTURES is {what}, but there is no recipe beside the generator, so its data set is not known: give "
                "pictures."
            )
        of_split = found.recipe.data if what == "train" else data.test_split(found.recipe.data)
        images = data.load(of_split, like=found.recipe.data)
        chosen = range(min(num or _OF_A_SPLIT, len(images.pixels)))
        return [f"{what}-{i:05d}" for i in chosen], images.pixels[torch.tensor(chosen)]
    like = found.recipe.data if found.recipe is not None else None
    how = (like.fit if like is not None else "crop") if fit else None
    return data.given(what, size=found.spec.size, channels=found.spec.channels, fit=how, num=num, like=like)
