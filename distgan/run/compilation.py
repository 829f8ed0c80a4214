"""Compiles the networks for training with torch.compile."""

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distgan.errors import UserError

BACKEND = "inductor"


def compiled(network: nn.Module) -> Any:
    """Returns the network compiled, with the same parameters. A graph break in it is an error.

    `network` itself stays as it is, for what must not run compiled: penalties, because torch cannot differentiate a
    compiled network twice, and samples and evaluations, which would each be compiled for themselves.
    """
    return torch.compile(network, backend=BACKEND, fullgraph=True, dynamic=False)


def check_compiler() -> None:
    """Checks that there is what inductor needs to make machine code.

    Raises:
        UserError: there is no C++ compiler, or Python's headers are missing.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # imports for seconds
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "train.compile is inductor, which needs a C++ compiler: install g++ (on Debian: apt install g++), or set "
            "train.compile to off."
        ) from None
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise UserError(
            "train.compile is inductor, which needs Python's headers: install them (on Debian: apt install "
            "python3-dev), or set train.compile to off."
        )
