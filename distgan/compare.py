"""Puts trained generators side by side in one picture: samples, metrics, and the training images nearest to samples."""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distgan import paths, pictures
from distgan.cli import check_json, write_json
from distgan.errors import UserError
from distgan.evaluation.neighbours import Nearest, nearest, training_images
from distgan.storage import exported, report
from distgan.storage.exported import Exported

_GRID = 64  # samples of each generator
_PAIRS = 8  # of them shown with their nearest training images
_WIDTH = 560  # of a column, in pixels
_MARGIN, _LINE = 12, 20
_INK, _WARNING = "black", "firebrick"


def main(argv: Sequence[str] | None = None) -> None:
    """`distgan compare RUN_A RUN_B ... [--out compare.png] [--json PATH]`.

    Raises:
        UserError: one of them is no generator, or the picture cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="distgan compare", description="Put generators side by side: samples, metrics, nearest training images."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run or of an exported generator, or hub id")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="PNG to write (default: compare.png)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers to a file")
    arguments = paths.expand(parser.parse_args(argv), "runs", "out", "json")
    pictures.check(arguments.out)
    check_json(arguments.json)
    columns = [_column(run, arguments.seed) for run in arguments.runs]
    reports = {column.name: column.found.evaluation for column in columns}
    differences = report.differences({name: one for name, one in reports.items() if one is not None})
    pictures.save(_picture(columns, differences), arguments.out)
    for column in columns:
        print("\n".join([column.name, *(f"  {line}" for line in column.lines)]))
    if differences:
        print(f"cannot be compared: {'; '.join(differences)}")
    print(arguments.out)
    if arguments.json is not None:
        described = {column.name: column.described for column in columns}
        write_json(arguments.json, {"generators": described, "not_comparable": differences})


@dataclass(frozen=True)
class _Column:
    name: str
    found: Exported
    samples: Tensor
    near: Nearest | None
    shown: Tensor | None
    """The nearest training images of the first samples."""
    why_not: str = ""
    """Why there are no training images."""

    @property
    def lines(self) -> list[str]:
        lines = [f"step {self.found.step:,}"]
        evaluation = self.found.evaluation
        if evaluation is None:
            lines.append("not evaluated: set eval.every in training")
        else:
            lines += [f"{name} {value:.5g}" for name, value in evaluation.metrics.items()]
        for judged in self.found.judged:
            lines += [f"{line}, judged by {judged.protocol['people']}" for line in judged.shares()]
        if self.near is None:
            lines += textwrap.wrap(self.why_not, _WIDTH // 8)
        else:
            ratio = float(self.near.ratio.median())
            lines.append(f"distance to the nearest training image: {ratio:.2f} times that between neighbours (median)")
        return lines

    @property
    def described(self) -> dict[str, Any]:
        evaluation = self.found.evaluation
        return {
            "step": self.found.step,
            "metrics": evaluation.metrics if evaluation is not None else None,
            "protocol": evaluation.protocol if evaluation is not None else None,
            "judged": [judged.to_json() for judged in self.found.judged],
            "nearest": None
            if self.near is None
            else {"index": self.near.index.tolist(), "ratio": self.near.ratio.tolist()},
        }


def _column(run: str, seed: int) -> _Column:
    found = exported.find(run)
    samples = found.generator.sample(_GRID, seed=seed)
    try:
        pixels = training_images(found)
    except UserError as error:
        return _Column(run, found, samples, None, None, str(error))
    near = nearest(samples, pixels)
    return _Column(run, found, samples, near, pixels[near.index[:_PAIRS]])


def _picture(columns: Sequence[_Column], differences: Sequence[str]) -> Image.Image:
    """Draws a column for each generator; below, why their numbers cannot be compared, if they cannot."""
    drawn = [_draw(column) for column in columns]
    height = max(column.height for column in drawn) + _LINE * len(differences) + _MARGIN
    picture = Image.new("RGB", ((_WIDTH + _MARGIN) * len(drawn) + _MARGIN, height), "white")
    for i, column in enumerate(drawn):
        picture.paste(column, (_MARGIN + i * (_WIDTH + _MARGIN), 0))
    below = [f"cannot be compared: {difference}" for difference in differences]
    _write(ImageDraw.Draw(picture), below, _MARGIN, height - _MARGIN - _LINE * len(below), _WARNING)
    return picture


def _draw(column: _Column) -> Image.Image:
    """Returns name, samples, lines of numbers, and pairs of a sample above its nearest training image."""
    samples = _scaled(pictures.grid(pictures.on_white(column.samples)))
    lines = column.lines
    pairs = None
    if column.shown is not None:
        both = pictures.on_white(torch.cat([column.samples[:_PAIRS], column.shown]))
        pairs = _scaled(pictures.grid(both, columns=_PAIRS))
    height = 2 * _MARGIN + _LINE + samples.height + _LINE * len(lines) + 2 * _MARGIN
    height += pairs.height + _LINE if pairs is not None else 0
    drawn = Image.new("RGB", (_WIDTH, height), "white")
    draw = ImageDraw.Draw(drawn)
    _write(draw, [column.name], 0, _MARGIN)
    y = 2 * _MARGIN + _LINE
    drawn.paste(samples, (0, y))
    y += samples.height + _MARGIN
    _write(draw, lines, 0, y)
    y += _LINE * len(lines) + _MARGIN
    if pairs is not None:
        _write(draw, ["samples above the training images nearest to them:"], 0, y)
        drawn.paste(pairs, (0, y + _LINE))
    return drawn


def _scaled(picture: Image.Image) -> Image.Image:
    """Resizes a picture to the width of a column, with square pixels."""
    return picture.resize((_WIDTH, round(picture.height * _WIDTH / picture.width)), Image.Resampling.NEAREST)


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, ink: str = _INK) -> None:
    font = ImageFont.load_default(size=14)
    for i, line in enumerate(lines):
        draw.text((x, y + i * _LINE), line, fill=ink, font=font)


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["compare", *sys.argv[1:]]))
