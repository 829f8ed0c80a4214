"""Many images as one picture."""

from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid


def grid(images: Tensor) -> Image.Image:
    """Lays out uint8 (N, C, H, W) in rows of about the square root of N."""
    columns = max(1, round(len(images) ** 0.5))
    picture = make_grid(images, nrow=columns, padding=2, pad_value=255)
    return Image.fromarray(picture.permute(1, 2, 0).numpy())
