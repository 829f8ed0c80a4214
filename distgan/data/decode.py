"""A picture of any size and mode -> uint8 (channels, size, size): turned upright, centre-cropped, resized once."""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# Pillow warns of a decompression bomb and decodes it. Filters are the process's, so this cannot be done around a call:
# threads decode.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def picture(content: bytes | np.ndarray, *, size: int, channels: int) -> Tensor:
    """Decodes and fits one picture: uint8 (channels, size, size).

    The largest centred square is resized, bicubic with antialiasing. EXIF's rotation is applied, 16 bits become 8, what
    is transparent lies on white, and colours become grey by ITU-R 601's luma where one channel is asked for.

    Raises:
        ValueError: it cannot be decoded, or would fill the memory (a decompression bomb).
    """
    if isinstance(content, np.ndarray) and content.ndim == 3:  # (3, H, W) of bytes
        array = np.array(Image.fromarray(content.transpose(1, 2, 0)).convert("RGB" if channels == 3 else "L"))
        values = torch.from_numpy(array).view(*array.shape[:2], channels).permute(2, 0, 1)
    elif isinstance(content, np.ndarray):
        values = torch.from_numpy(np.array(content, dtype=np.float32)).expand(channels, -1, -1)
    else:
        array = np.array(_open(content, "RGB" if channels == 3 else "L"))
        values = torch.from_numpy(array).view(*array.shape[:2], channels).permute(2, 0, 1)
    height, width = values.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    values = values[:, top : top + side, left : left + side]
    if side != size:
        values = torch.nn.functional.interpolate(values[None].float(), (size, size), mode="bicubic", antialias=True)[0]
    return values.round().clamp(0, 255).to(torch.uint8) if values.is_floating_point() else values


def _open(content: bytes, mode: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content)) as checked:
            checked.verify()  # PNG's checksums, which decoding alone does not look at
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return _to_mode(ImageOps.exif_transpose(image), mode)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError("would decode to more pixels than Pillow allows (a decompression bomb)") from error
    except Exception as error:  # damaged files raise nearly everything in Pillow's decoders
        raise ValueError("cannot be decoded") from error


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits of grey
        values = np.array(image).astype(np.float64)
        image = Image.fromarray((values / 257 if values.max(initial=0) > 255 else values).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)
