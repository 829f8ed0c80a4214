"""Reads and writes files of latents: the inputs by which a generator draws certain images again."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distgan import files
from distgan.errors import UserError
from distgan.models import Generator
from distgan.storage import tensors

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Latents:
    """Inputs of a generator."""

    z: Tensor
    """Latents, float32 (N, latent_dim)."""
    y: Tensor | None = None
    """Labels, int64 (N,); None for a generator without classes."""

    def __len__(self) -> int:
        return len(self.z)


def save(file: Path, latents: Latents) -> None:
    """Writes a safetensors file with `latents` and, if there are classes, `labels`."""
    labels = {"labels": latents.y} if latents.y is not None else {}
    files.replace(file, tensors.to_bytes({"latents": latents.z, **labels}))


def read(file: Path, generator: Generator) -> Latents:
    """Reads a file of latents for this generator.

    Raises:
        UserError: it is not such a file, or its latents or labels do not fit the generator.
    """
    found = tensors.read(file)
    z, y = found.get("latents"), found.get("labels")
    if z is None:
        raise UserError(
            f"{file} holds {', '.join(found) or 'nothing'}, but no latents: give what `distgan invert` wrote."
        )
    if z.dtype not in _FLOATS or z.ndim != 2 or z.shape[1] != generator.latent_dim or len(z) == 0:
        raise UserError(
            f"{file} has latents {str(z.dtype).removeprefix('torch.')} {tuple(z.shape)}, but the generator takes "
            f"float32 (N, {generator.latent_dim}): use it with the generator that it was made for."
        )
    z = z.to(torch.get_default_dtype())
    if not z.isfinite().all():
        raise UserError(f"{file} has latents that are NaN or infinite: make it again.")
    classes = len(generator.class_counts)
    if (y is None) != (classes == 0):
        has, takes = ("no labels", "needs them") if y is None else ("labels", "takes none")
        raise UserError(f"{file} has {has}, but the generator {takes}: use it with the generator that it was made for.")
    fits = y is None or (y.dtype in _INTEGERS and y.shape == z.shape[:1] and ((y >= 0) & (y < classes)).all())
    if not fits:
        raise UserError(
            f"{file} has labels that are not {len(z)} numbers from 0 to {classes - 1}, one for each latent: use it "
            "with the generator that it was made for."
        )
    return Latents(z, y.long() if y is not None else None)
