"""Finds the files that come with distgan: recipes, launch files and Slurm scripts.

They lie in `_files/`. In a clone that folder has links to `configs/`, `launch/` and `slurm/`; a wheel holds the files.
"""

import itertools
import re
from pathlib import Path

from distgan import paths
from distgan.errors import UserError, nearest

ROOT = Path(__file__).parent / "_files"
FOLDERS = ("configs", "launch", "slurm")


def recipes() -> dict[str, Path]:
    """Returns the recipes by name, in alphabetical order: `quickstart` is `configs/quickstart.yaml`."""
    # sweep.yaml is for `wandb sweep`, not a recipe.
    return {file.stem: file for file in sorted((ROOT / "configs").glob("*.yaml")) if file.stem != "sweep"}


def others() -> list[Path]:
    """Returns all other files: wandb's sweep, launch files and Slurm scripts."""
    known = set(recipes().values())
    return [file for folder in FOLDERS for file in sorted((ROOT / folder).iterdir()) if file not in known]


def find(recipe: str) -> str:
    """Returns the path of a recipe that is given as a path or as one of distgan's names.

    A file of that name comes first. `-` is standard input.

    Raises:
        UserError: it has the form of a name, without `/` and suffix, but there is no such recipe.
    """
    is_file = paths.exists(recipe) and not paths.is_folder(recipe)
    if is_file or recipe == "-" or "/" in recipe or Path(recipe).suffix:
        return recipe
    known = recipes()
    if recipe not in known:
        raise UserError(
            f"--config is {recipe}, which is neither a file nor one of distgan's recipes: {nearest(recipe, [*known])}"
        )
    return str(known[recipe])


def headline(file: Path) -> str:
    """Returns the first sentence of the comment at the top of a file."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#!")]
    # The comment's first paragraph; an indented line is a command.
    paragraph = itertools.takewhile(re.compile(r"# \S").match, lines)
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join(line[2:] for line in paragraph))[0]
