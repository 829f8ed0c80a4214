"""Lists the recipes, launch files and Slurm scripts that come with distgan, and copies them. Imports no torch."""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from distgan import files, paths, shipped
from distgan.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """`distgan recipes [--copy DIR]`.

    Raises:
        UserError: a file of the same name exists in DIR, or DIR cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="distgan recipes", description="List the recipes, launch files and Slurm scripts that come with distgan."
    )
    parser.add_argument(
        "--copy",
        type=Path,
        metavar="DIR",
        help="copy them to configs/, launch/ and slurm/ in this folder (. is the current one), to edit them, or for "
        "commands that name them so",
    )
    arguments = paths.expand(parser.parse_args(argv), "copy")
    if arguments.copy is not None:
        _copy(arguments.copy)
        return
    print("Recipes, for distgan train --config NAME:")
    for name, file in shipped.recipes().items():
        _describe(name, file)
    print("\nOther files:")
    for file in shipped.others():
        _describe(str(file.relative_to(shipped.ROOT)), file)
    print(f"\nThey lie in {shipped.ROOT}. `distgan recipes --copy DIR` copies them.")


def _describe(name: str, file: Path) -> None:
    width = shutil.get_terminal_size().columns
    print(textwrap.fill(f"  {name:24}{shipped.headline(file)}", width, subsequent_indent=" " * 26))


def _copy(folder: Path) -> None:
    """Copies the files into a folder, which is made if it does not exist. Scripts stay executable."""
    if there := [name for name in shipped.FOLDERS if (folder / name).exists()]:
        raise UserError(f"--copy is {folder}, which has {there[0]}/ in it: choose another folder.")
    with files.written("--copy", folder):
        for name in shipped.FOLDERS:
            shutil.copytree(shipped.ROOT / name, folder / name)
            print(folder / name)


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["recipes", *sys.argv[1:]]))
