"""Takes in a generator, and its discriminator, that PyTorch's textbook code for DCGAN has trained."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distgan import paths
from distgan.applications.imported import import_networks
from distgan.parallel import launch


def main(argv: Sequence[str] | None = None) -> None:
    """`distgan import --generator netG.pth [--discriminator netD.pth] --to DIR`.

    Raises:
        UserError: a file is no state dict of the textbook's networks, or the folder is in use or cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="distgan import",
        description="Take in networks trained elsewhere by PyTorch's textbook code for DCGAN.",
    )
    parser.add_argument(
        "--generator",
        type=Path,
        required=True,
        metavar="FILE",
        help="state dict of the generator, safetensors or as torch.save wrote it; only tensors are read",
    )
    parser.add_argument("--discriminator", type=Path, metavar="FILE", help="state dict of the discriminator")
    parser.add_argument("--to", type=Path, required=True, help="folder to write; it must be new or empty")
    arguments = paths.expand(parser.parse_args(argv), "generator", "discriminator", "to")
    if launch.launched_ranks()[0] != 0:  # there is no work to share
        return
    spec = import_networks(arguments.generator, arguments.discriminator, arguments.to)
    print(f"a generator of {spec}")
    print(arguments.to)


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["import", *sys.argv[1:]]))
