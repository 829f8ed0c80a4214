"""Decodes a picture of any size and mode into uint8 (channels, height, width): upright, made to fit, resized once."""

import io
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from distgan.data.depth import Extent, Scale

# Pillow only warns of a decompression bomb, and decodes it. Warning filters belong to the whole process, in which
# threads decode, so this cannot be set around a single call.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

_NEARLY = 2  # largest difference, out of 255, between the values of a picture of one colour
_OPAQUE = 255  # alpha
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels
_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R 601's
_COMPRESSED = ("GIF", "WEBP", "AVIF", "QOI")  # formats without checksums whose files do not end in zeros


class UndecodableError(ValueError):
    """A picture is damaged, or would fill the memory. The message is the end of a sentence about it."""


class DeepError(Exception):
    """A picture has more than 8 bits, and the scale for its values is not known yet."""


def picture(
    content: bytes | np.ndarray, *, size: tuple[int, int], channels: int, scale: Scale | None, fit: str = "crop"
) -> Tensor:
    """Decodes and resizes one picture: uint8 (channels, *size).

    The picture is turned by its EXIF data, made to fit and resized, bicubic with antialiasing. More than 8 bits become
    8 by the source's scale. With 1 or 3 channels transparent areas become white, with one also colours grey, by ITU-R
    601's luma. With 4 channels colours are weighted by their opacity when they are resized, pixels that are wholly
    transparent become 0 in all channels, and pictures without transparency are opaque.

    Args:
        content: a picture file; or uint8 (3 or 4, H, W), or grey values (H, W) in 0 ... 255.
        size: height and width to make, in pixels.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        scale: the scale of the source's deep pictures; None if it is not known.
        fit: as `data.fit`.

    Raises:
        UndecodableError: the picture cannot be decoded, or would fill the memory (a decompression bomb).
        DeepError: the picture has more than 8 bits, and the scale has no range for its kind.
    """
    if isinstance(content, np.ndarray) and content.ndim == 3:  # bytes
        values = _channels_first(np.array(_to_mode(Image.fromarray(content.transpose(1, 2, 0)), _MODES[channels])))
    elif isinstance(content, np.ndarray):
        values = _with_channels(torch.from_numpy(np.array(content, dtype=np.float32))[None], channels)
    else:
        opened = _open(content, _MODES[channels], wanted=scale is not None)
        assert opened is not None
        values = _scaled(opened, channels, scale) if isinstance(opened, _Deep) else _channels_first(opened)
    values = _FITS[fit](values, size)
    values = values.round().clamp(0, 255).to(torch.uint8) if values.is_floating_point() else values
    return values if channels < 4 else torch.where(values[3:] > 0, values, 0)


def _crop(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes the largest centred part that has the shape of `size`."""
    height, width = values.shape[1:]
    part_height = min(height, max(1, round(width * size[0] / size[1])))
    part_width = min(width, max(1, round(height * size[1] / size[0])))
    top, left = (height - part_height) // 2, (width - part_width) // 2
    return _resized(values[:, top : top + part_height, left : left + part_width], size)


def _pad(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes the whole, and centres it between borders of zeros."""
    height, width = values.shape[1:]
    inner_height = min(size[0], max(1, round(height * size[1] / width)))
    inner_width = min(size[1], max(1, round(width * size[0] / height)))
    top, left = (size[0] - inner_height) // 2, (size[1] - inner_width) // 2
    right, bottom = size[1] - inner_width - left, size[0] - inner_height - top
    return torch.nn.functional.pad(_resized(values, (inner_height, inner_width)), (left, right, top, bottom))


def _resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes (C, H, W), the colours of RGBA weighted by their opacity: transparent pixels' would show at edges."""
    if values.shape[1:] == size:
        return values
    values = values.float()
    if len(values) == 4:
        values = torch.cat([values[:3] * values[3:] / _OPAQUE, values[3:]])
    values = torch.nn.functional.interpolate(values[None], size, mode="bicubic", antialias=True)[0]
    if len(values) == 4:
        alpha = values[3:].clamp(0, _OPAQUE)
        values = torch.cat([values[:3] * _OPAQUE / alpha.clamp(min=0.5), alpha])  # 0.5: less is rounded to 0
    return values


_FITS: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {"crop": _crop, "pad": _pad, "stretch": _resized}


def is_picture(content: Any) -> bool:
    """Tells whether bytes, or a file given by its path, are a picture that Pillow knows."""
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content):
            return True
    except Exception:  # for what is not a picture, Pillow raises nearly every kind of error
        return False


def extent(content: bytes | np.ndarray) -> Extent | None:
    """Returns the smallest and the largest value of a picture of more than 8 bits.

    Returns None for a picture of at most 8 bits, of which only the header is read, and for one that cannot be decoded.
    """
    if isinstance(content, np.ndarray):
        return None
    try:
        opened = _open(content, None, wanted=True)
    except UndecodableError:
        return None
    if not isinstance(opened, _Deep):
        return None
    low, high = float(opened.colours.min()), float(opened.colours.max())
    return Extent(low=low, high=high, floats=opened.floats, cut=opened.cut)


def nearly_one_colour(low: Tensor, high: Tensor) -> Tensor:
    """Tells whether smallest and largest values, uint8 (..., C), differ by at most 2 in all channels: bool (...)."""
    return (high - low).amax(-1) <= _NEARLY


@dataclass(frozen=True)
class _Deep:
    """A decoded picture of more than 8 bits."""

    colours: np.ndarray
    """(H, W, 1 or 3), of the file's own type."""
    opaque: np.ndarray | None
    """(H, W, 1) in [0, 1]; None without an alpha channel."""
    floats: bool
    cut: bool
    """Whether Pillow reads only the upper 8 of 16 bits."""


def _open(content: bytes, mode: str | None, *, wanted: bool) -> np.ndarray | _Deep | None:
    """Decodes a picture. Returns a `_Deep` for more than 8 bits; otherwise an array in `mode`, (H, W) or (H, W, C), or
    None if `mode` is None.
    """
    try:
        with Image.open(io.BytesIO(content)) as checked:
            deep = _is_deep(checked)
            if mode is None and not deep:
                return None
            if deep and not wanted:
                raise DeepError
            checked.verify()  # PNG's checksums, which decoding alone does not look at
        with Image.open(io.BytesIO(content)) as image:
            lower = _lower_bytes(image, content) if deep else None
            pixels = image.load()
            _refuse_cut(image, pixels, content)
            upright = ImageOps.exif_transpose(image)
            return _deep(upright, lower, mode) if deep else np.array(_to_mode(upright, mode or "RGB"))
    except (DeepError, UndecodableError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UndecodableError("would decode to more pixels than Pillow allows (a decompression bomb)") from error
    except Exception as error:  # damaged files raise nearly everything in Pillow's decoders
        raise UndecodableError("cannot be decoded") from error


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Tells from its header, before it is loaded, whether a picture has more than 8 bits."""
    tile = image.tile[0] if image.tile else None
    arguments = _arguments(tile) if tile is not None else ()
    # Of BMP, BGR;16 is 5, 6 and 5 bits.
    words = [word for word in arguments if isinstance(word, str) and not word.startswith("BGR")]
    sixteen = any(re.search(r";16(?!\d)", word) for word in words)
    netpbm = tile is not None and tile[0] == "ppm" and isinstance(arguments[-1], int) and arguments[-1] > 255
    return image.mode.startswith("I") or image.mode == "F" or sixteen or netpbm


def _arguments(tile: ImageFile._Tile) -> tuple[Any, ...]:
    """Returns the arguments of Pillow's decoder for a part of a file. The first says how the bytes are arranged."""
    return (tile.args,) if isinstance(tile.args, str) else tile.args or ("",)


def _refuse_cut(image: Image.Image, pixels: Any, content: bytes) -> None:
    """Raises UndecodableError if the end of a file is missing. Pillow decodes it anyway, with a grey or black end.

    A JPEG has a marker at its end. An interrupted download may end in zeros; so may a whole file of an uncompressed
    format.
    """
    if image.format in ("JPEG", "MPO"):
        end = content.find(b"\xff\xd9", _scan(content))
        whole = end >= 0 and not _ends_early(image, pixels, content, end)
    else:
        # The WebP of a flat picture ends in one zero for every 10,000 pixels.
        zeros = len(content) - len(content.rstrip(b"\0"))
        whole = image.format not in _COMPRESSED or zeros < 16 + image.width * image.height // 8000
    if not whole:
        raise UndecodableError("is cut short")


def _ends_early(image: Image.Image, pixels: Any, content: bytes, end: int) -> bool:
    """Tells whether a JPEG's last blocks are missing. The decoder repeats the last colour then, without an error.

    If the lower right corner has one colour, the picture is decoded again with other data put before its end: a whole
    picture does not read these. In a progressive JPEG whole scans may be missing; that cannot be noticed.
    """
    width, height = image.size
    corner = ((x, y) for y in range(max(0, height - 4), height) for x in range(max(0, width - 4), width))
    last = pixels[width - 1, height - 1]
    if image.format != "JPEG" or image.info.get("progressive") or any(pixels[at] != last for at in corner):
        return False
    with Image.open(io.BytesIO(content[:end] + bytes(range(1, 200)) + content[end:])) as again:
        return again.tobytes() != image.tobytes()


def _scan(content: bytes) -> int:
    """Returns where the first scan of a JPEG begins, after the segments, which may hold a small JPEG themselves."""
    at = 2
    while True:
        at = content.index(b"\xff", at)
        if content[at + 1] == 0xDA:
            return at
        at += 1 if content[at + 1] in (0x00, 0xFF) else 2 + int.from_bytes(content[at + 2 : at + 4])


def _lower_bytes(image: ImageFile.ImageFile, content: bytes) -> np.ndarray | None:
    """Returns the lower bytes of 16-bit colours, uint8 (H, W, 3 or 4); None for other pictures.

    Pillow keeps only the upper bytes. If it decodes the file in the other byte order, those are the lower ones.
    """
    tiles = image.tile
    words = {_arguments(tile)[0] for tile in tiles}
    kind, _, order = words.pop().partition(";16") if len(words) == 1 else ("", "", "")
    chosen = [*range(len(image.getbands()))]
    if (kind, order, image.mode) == ("LA", "B", "RGBA"):  # PNG's grey with alpha: two bytes of each, read as RGBA
        other, chosen = "RGBA", [1, 1, 1, 3]
    elif kind in ("RGB", "RGBA") and kind == image.mode and order:
        first = {"N": sys.byteorder == "big", "B": True, "L": False}[order]
        other = f"{kind};16{'L' if first else 'B'}"
    else:
        return None
    with Image.open(io.BytesIO(content)) as again:
        again.tile = [tile._replace(args=(other, *_arguments(tile)[1:])) for tile in tiles]
        again.load()
        return np.array(ImageOps.exif_transpose(again))[..., chosen]


def _deep(image: Image.Image, lower: np.ndarray | None, mode: str | None) -> _Deep:
    if lower is not None:
        values, cut = np.array(image).astype(np.uint16) * 256 + lower, False
    else:
        cut = image.mode not in ("F", "I") and not image.mode.startswith("I;")
        if cut:
            values = np.array(_to_mode(image, "RGBA" if mode == "RGBA" else "RGB")).astype(np.int32) * 257
        else:
            values = np.array(image)[:, :, None]
    floats = values.dtype.kind == "f"
    if floats and not np.isfinite(values).all():
        raise UndecodableError("has values that are NaN or infinite")
    opaque = values[..., 3:] / np.float32(65535) if values.shape[2] == 4 else None
    return _Deep(values[..., :3], opaque, floats, cut)


def _scaled(deep: _Deep, channels: int, scale: Scale | None) -> Tensor:
    """Returns float32 (channels, H, W) in 0 ... 255; without an alpha channel, white in transparent areas."""
    span = None if scale is None else scale.floats if deep.floats else scale.integers
    if span is None:
        raise DeepError
    low, high = span
    values = ((deep.colours.astype(np.float64) - low) * (255 / (high - low))).clip(0, 255)
    if deep.opaque is not None and channels < 4:
        values = values * deep.opaque + 255 * (1 - deep.opaque)
    tensor = torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)
    if channels == 1 and len(tensor) == 3:
        return (tensor * _LUMA).sum(0, keepdim=True)
    tensor = _with_channels(tensor, channels)
    if deep.opaque is not None and channels == 4:
        tensor[3] = torch.from_numpy(deep.opaque[..., 0] * _OPAQUE)
    return tensor


def _with_channels(values: Tensor, channels: int) -> Tensor:
    """Repeats grey values, and adds opacity if 4 channels are wanted: (1 or 3, H, W) -> (channels, H, W)."""
    if channels < 4:
        return values.expand(channels, -1, -1)
    return torch.cat([values.expand(3, -1, -1), torch.full_like(values[:1], _OPAQUE)])


def _channels_first(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).view(*array.shape[:2], -1).permute(2, 0, 1)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.has_transparency_data and mode != "RGBA":
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)
