"""Prints the folder of a recipe's run, for scripts: `rm -r "$(distgan where --config RECIPE)"`. Imports no torch."""

import sys
from collections.abc import Sequence

from distgan import recipe


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a recipe's `run.dir`, after checking its keys: `distgan where --config RECIPE [--group.key=value ...]`."""
    config, _ = recipe.parse(
        argv, prog="distgan where", description="Print run.dir of a recipe with its overrides, for scripts."
    )
    print(config.run.dir)


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["where", *sys.argv[1:]]))
