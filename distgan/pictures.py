"""Many images as one picture, or as an animation."""

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from distgan import files
from distgan.errors import UserError


def one(image: Tensor) -> Image.Image:
    """Returns an image, uint8 (C, H, W), as a picture of Pillow's: grey if C is 1, RGBA if it is 4."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())


def grid(images: Tensor, *, columns: int | None = None) -> Image.Image:
    """Lays out images, uint8 (N, C, H, W), in rows of `columns`; if unset, about the square root of N."""
    columns = columns or max(1, round(len(images) ** 0.5))
    picture = make_grid(images, nrow=columns, padding=2, pad_value=255)
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def on_white(images: Tensor) -> Tensor:
    """Lays RGBA images, uint8 (N, 4, H, W), on white: uint8 (N, 3, H, W). Returns other images as they are."""
    if images.shape[1] != 4:
        return images
    colours, alpha = images[:, :3].float(), images[:, 3:].float() / 255
    return (colours * alpha + 255 * (1 - alpha)).round().to(images.dtype)


def check(out: Path, *, key: str = "--out", overwrite: bool = True) -> None:
    """Refuses a place for a picture before the work for it is done.

    Raises:
        UserError: the name does not end in .png; or as `files.check_place`.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"{key} is {out}, but must end in .png.")
    files.check_place(key, out, overwrite=overwrite)


def save(picture: Image.Image, out: Path, *, key: str = "--out") -> None:
    """Writes a PNG.

    Raises:
        UserError: it cannot be written.
    """
    with files.written(key, out), files.whole(out) as partial:
        picture.save(partial, "PNG")


_MOVING = (".gif", ".webp", ".mp4")
_LEAST = 256  # pixels: smaller animations are enlarged, because players show them as they are


def check_moving(out: Path) -> None:
    """Refuses the name of a strip or animation that cannot be written.

    Raises:
        UserError: its ending is unknown, or the library for it is not installed.
    """
    ending = out.suffix.lower()
    if ending not in (".png", *_MOVING):
        raise UserError(f"--out is {out}, but must end in .png, {', '.join(_MOVING[:-1])} or {_MOVING[-1]}.")
    if ending == ".mp4" and importlib.util.find_spec("av") is None:
        raise UserError(
            f"--out is {out}, which needs the library PyAV: run pip install 'distgan[video]', or choose .gif."
        )


def save_moving(images: Tensor, out: Path, *, fps: int) -> None:
    """Writes an animation of images, uint8 (N, C, H, W): GIF and WebP by Pillow, which repeat, MP4 by PyAV.

    Images whose sides are below 256 pixels are enlarged by a whole number. RGBA images are laid on white.

    Raises:
        UserError: it cannot be written.
    """
    scale = -(-_LEAST // max(images.shape[2:]))
    enlarged = on_white(images).repeat_interleave(scale, 2).repeat_interleave(scale, 3).expand(-1, 3, -1, -1)
    frames = [image.permute(1, 2, 0).contiguous().numpy() for image in enlarged]
    with files.written("--out", out), files.whole(out) as partial:
        if out.suffix.lower() == ".mp4":
            _save_mp4(frames, partial, fps)
        else:
            first, *rest = map(Image.fromarray, frames)
            form = out.suffix[1:].upper()
            lossless = {"lossless": True} if form == "WEBP" else {}
            first.save(partial, form, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, **lossless)


def _save_mp4(frames: list[np.ndarray], out: Path, fps: int) -> None:
    """Writes H.264 in the pixel format that all players know."""
    import av

    with av.open(str(out), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
