"""Reads and writes files of tensors: safetensors.

Pickles are read in two places, and only tensors are taken from them: InceptionV3's published file, and state dicts that
a user gives to be imported.
"""

import hashlib
import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from distgan.errors import UserError

INCEPTION_SHA256 = "6726825d"
"""The beginning of the sha256 of torch-fidelity's InceptionV3, as in its file's name."""


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Returns the bytes of a safetensors file: the same for the same tensors. (Metadata would come in random order.)"""
    return tensors_to_bytes({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})


def digest(network: nn.Module) -> str:
    """Returns a hash of a network's tensors."""
    return hashlib.sha256(to_bytes(network.state_dict())).hexdigest()


def read(file: Path) -> dict[str, Tensor]:
    """Reads a file of tensors.

    Raises:
        UserError: it is not a readable safetensors file.
    """
    try:
        return tensors_from_bytes(file.read_bytes())
    except (SafetensorError, OSError) as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else "is not a readable safetensors file"
        raise UserError(f"{file} {what}: restore it from a copy.") from error


def load_into(network: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Loads tensors into the network that they belong to.

    Raises:
        UserError: names or shapes do not match; the message begins with `what`.
    """
    expected = network.state_dict()
    wrong = [name for name in expected if name not in tensors or tensors[name].shape != expected[name].shape]
    wrong += [name for name in tensors if name not in expected]
    if wrong:
        raise UserError(
            f"{what} belongs to another network ({wrong[0]} does not match): use it with the recipe that made it."
        )
    network.load_state_dict(tensors)


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Reads the state dict of a network that other code has trained: safetensors, or a pickle by torch's reader that
    takes only tensors and plain containers out of one.

    Names lose the prefixes that DataParallel, DDP and torch.compile add.

    Raises:
        UserError: the file cannot be read, is neither, or holds something else than tensors by name.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): check the path.") from error
    try:
        found = tensors_from_bytes(content)
    except SafetensorError:
        found = _unpickled(file, content)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        what = ", ".join(map(str, list(found)[:8])) if isinstance(found, dict) else f"a {type(found).__name__}"
        raise UserError(
            f"{file} holds {what}, which is no state dict: save one network's in it, with "
            "torch.save(network.state_dict(), FILE)."
        )
    for name, value in found.items():
        plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.is_complex() or not value.double().isfinite().all():
            raise UserError(f"{file} has {name}, which is NaN, infinite or no plain tensor: save the network again.")
    return {str(name).removeprefix("module.").removeprefix("_orig_mod."): value for name, value in found.items()}


def _unpickled(file: Path, content: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:  # for what is no such file, torch raises nearly every kind of error
        raise UserError(
            f"{file} is neither safetensors nor a state dict that torch reads with weights only: save it again with "
            "torch.save(network.state_dict(), FILE)."
        ) from error


def read_weights(file: Path) -> tuple[dict[str, Tensor], str]:
    """Reads the weights of a network that others have trained, and returns them with the sha256 of their file.

    If the file's name ends in a hash, as in `name-6726825d.pth`, the sha256 must begin with it. The file must be
    safetensors. The one exception is torch-fidelity's InceptionV3, a pickle from which only tensors are read.

    Raises:
        UserError: the file is missing, damaged or a pickle.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"the weights {file} cannot be read ({error.strerror}): check the path.") from error
    sha256 = hashlib.sha256(content).hexdigest()
    named = re.search(r"-([0-9a-f]{8,64})$", file.stem)
    if named is not None and not sha256.startswith(named[1]):
        raise UserError(f"the weights {file} do not match the hash in their name ({sha256[:8]}…): fetch them again.")
    if file.suffix != ".safetensors" and not sha256.startswith(INCEPTION_SHA256):
        raise UserError(
            f"the weights {file} are not safetensors: convert them. Pickles are never loaded, because they can run "
            f"code; the one exception is torch-fidelity's InceptionV3 ({INCEPTION_SHA256}…)."
        )
    try:
        if file.suffix == ".safetensors":
            return tensors_from_bytes(content), sha256
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), sha256  # noqa: TID251
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"the weights {file} are damaged: fetch them again.") from error
