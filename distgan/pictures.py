"""Many images as one picture."""

from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from distgan.errors import UserError


def grid(images: Tensor, *, columns: int | None = None) -> Image.Image:
    """Lays out images, uint8 (N, C, H, W), in rows of `columns`; if unset, about the square root of N."""
    columns = columns or max(1, round(len(images) ** 0.5))
    picture = make_grid(images, nrow=columns, padding=2, pad_value=255)
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def check(out: Path) -> None:
    """Refuses a place for a picture before the work for it is done.

    Raises:
        UserError: the name does not end in .png, or the folder does not exist.
    """
    if out.suffix != ".png":
        raise UserError(f"--out is {out}, but must end in .png.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out is {out}, but there is no folder {out.parent}: make it first, or choose another place.")


def save(picture: Image.Image, out: Path) -> None:
    """Writes a PNG.

    Raises:
        UserError: it cannot be written.
    """
    try:
        picture.save(out)
    except OSError as error:
        raise UserError(f"--out is {out}, which cannot be written ({error.strerror}): choose another place.") from error
