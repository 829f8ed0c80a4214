"""Shows what distgan sees of a data set, before anybody trains on it: `distgan data`."""

import argparse
import dataclasses
import io
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from PIL import Image

from distgan import paths
from distgan.data import sources, store
from distgan.data.decode import nearly_one_colour
from distgan.data.folders import refuse_among_pictures
from distgan.data.records import Source, numbered
from distgan.errors import UserError
from distgan.pictures import grid
from distgan.recipe import DataConfig

_SAMPLE = 64  # images in the grid, and pictures whose sizes are looked at


def main(argv: Sequence[str] | None = None) -> None:
    """Prints count, classes and sizes, and writes a grid: `distgan data PATH_OR_SOURCE [--prepare] [--out data.png]`.

    Raises:
        UserError: the data cannot be read; see `distgan.data.load`.
    """
    arguments = _parse(argv)
    data = _config(arguments)
    if data.source == "folder" and data.path is not None:
        places = {"--out": arguments.out, **({"--cache": data.cache} if data.cache else {})}
        refuse_among_pictures(data.path, places)
    source = sources.find(data)
    print(f"source       {data.source}{f' from {data.path}' if data.path else ''}{f' {data.id}' if data.id else ''}")
    print(f"images       {source.count:,}")
    if source.splits:
        print(f"split        {source.split}, of {', '.join(source.splits)}")
    named = f"{len(source.classes)}: {numbered(source.classes)}" if source.classes else "none"
    joined = ", but " if source.classes else ", because "
    print(f"classes      {named}{source.strays and joined + source.strays}")
    if source.left_out:
        print(source.left_out)
    channels = data.channels or source.channels
    height, width = data.size
    print(f"sizes        {_sizes(source)}")
    print(f"fed as       {height}x{width}x{channels}{'' if height == width else ' (height x width x channels)'}")
    folder = store.store_folder(source, data)
    if arguments.prepare:
        images = store.load(data)
        if images.skipped:
            print(f"skipped      {images.skipped:,}")
        plain, scale = images.plain or 0, images.scale
        looked_at = f"{len(images.pixels):,}"
        chosen = images.pixels[torch.linspace(0, len(images.pixels) - 1, min(_SAMPLE, len(images.pixels))).long()]
    else:
        chosen, _, scale = store.preview(source, data, _SAMPLE)
        plain = int(nearly_one_colour(*chosen.flatten(2).aminmax(dim=2)).sum())
        looked_at = f"the {len(chosen)} looked at"
    if scale is not None:
        print(f"values       {scale} become 0 to 255{'' if folder.is_dir() else f', by {looked_at}'}")
    if plain:
        print(f"one colour   {plain:,} of {looked_at} throughout")
    state = "prepared" if folder.is_dir() else "not prepared yet: --prepare does it"
    print(f"cache        {folder} ({state})")
    grid(chosen).save(arguments.out)
    print(f"grid         {arguments.out}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="distgan data", description="Show what distgan sees of a data set.")
    known = ", ".join(_source_names())
    parser.add_argument("what", help=f"a source ({known}), a folder or zip archive of pictures, or an id on the hub")
    parser.add_argument("--path", help="a local copy of the source")
    parser.add_argument("--config", help="configuration of a data set that has several")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image-column")
    parser.add_argument("--label-column")
    parser.add_argument(
        "--image-size", type=_size, default=32, metavar="N|H,W", help="pixels of a side, or height,width (default: 32)"
    )
    parser.add_argument(
        "--fit",
        choices=get_args(get_type_hints(DataConfig)["fit"]),
        default="crop",
        help="how pictures of another shape are made to fit (default: crop)",
    )
    parser.add_argument(
        "--channels", type=int, choices=(1, 3, 4), help="1 for grey, 3 for colour, 4 for colour with transparency"
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be decoded")
    parser.add_argument("--cache", help="folder of the prepared images")
    parser.add_argument("--prepare", action="store_true", help="fill the cache, for jobs on machines without a network")
    parser.add_argument("--out", type=Path, default=Path("data.png"), help="PNG of what the networks are fed")
    return paths.expand(parser.parse_args(argv), "what", "path", "cache", "out")


def _size(text: str) -> int | tuple[int, ...]:
    """Reads one side of a square, or height and width; `DataConfig` checks them."""
    try:
        sides = tuple(int(word) for word in text.strip("[]").split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text} is not a size: give one side, as 64, or height,width, as 64,128"
        ) from error
    return sides[0] if len(sides) == 1 else sides


def _config(arguments: argparse.Namespace) -> DataConfig:
    """Returns the data group of a recipe that would train on these images."""
    options = {f.name: vars(arguments)[f.name] for f in dataclasses.fields(DataConfig) if f.name in vars(arguments)}
    what = arguments.what
    if what in _source_names():
        return DataConfig(source=what, **options)
    if paths.exists(what):
        return DataConfig(source="folder", **options | {"path": what})
    if what.startswith((".", "/")) or what.count("/") != 1:
        raise UserError(
            f"{what} is neither a source ({', '.join(_source_names())}), nor a folder, nor an id on the hub such as "
            "owner/name: check its spelling."
        )
    return DataConfig(source="hub", id=what, **options)


def _source_names() -> tuple[str, ...]:
    return get_args(get_type_hints(DataConfig)["source"])


def _sizes(source: Source) -> str:
    """Lists sizes and modes of some pictures, the most frequent first, and how many were looked at."""
    seen: Counter[str] = Counter()
    for record in store.spread(source, _SAMPLE):
        if isinstance(record.content, bytes):
            try:
                with Image.open(io.BytesIO(record.content)) as image:
                    seen[f"{image.width}x{image.height} {image.mode}"] += 1
            except Exception:
                seen["undecodable"] += 1
        else:
            height, width = record.content.shape[-2:]
            seen[f"{width}x{height} {'RGB' if record.content.ndim == 3 else 'L'}"] += 1
    said = ", ".join(
        f"{count} {size}" if size == "undecodable" else f"{count} of {size}" for size, count in seen.most_common(5)
    )
    return f"{said} among the {seen.total()} looked at (width x height)"


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["data", *sys.argv[1:]]))
