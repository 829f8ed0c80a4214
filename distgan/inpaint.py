"""Repairs pictures: fills what masks hide, and compares the repair with the truth and with simpler methods."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from distgan import data, files, paths, pictures
from distgan.applications import given, repair
from distgan.applications.masks import KINDS, masks
from distgan.applications.repair import inpaint
from distgan.cli import check_json, write_json
from distgan.errors import UserError
from distgan.evaluation.neighbours import training_images
from distgan.parallel import launch
from distgan.storage import exported
from distgan.storage.exported import Exported

_SHOWN = 8  # pictures in the picture of --grid


def main(argv: Sequence[str] | None = None) -> None:
    """Collective: `distgan inpaint RUN PICTURES --mask center|FILE --out DIR/ [--grid FILE.png] [--json PATH] ...`.

    Raises:
        UserError: there is no generator, pictures or masks do not fit, or a place exists or cannot be written.
    """
    arguments = _parse(argv)
    files.check_folder("--out", arguments.out, overwrite=arguments.overwrite)
    inputs = {"PICTURES": arguments.pictures, "--mask": arguments.mask}
    outputs = {"--out": arguments.out, "--grid": arguments.grid, "--json": arguments.json}
    data.refuse_mixing(outputs, {key: place for key, place in inputs.items() if Path(place).exists()})
    if arguments.grid is not None:
        pictures.check(arguments.grid, key="--grid", overwrite=arguments.overwrite)
    check_json(arguments.json)
    found = exported.find(arguments.run)
    names, truth = given.pictures(arguments.pictures, found, fit=arguments.fit, num=arguments.num)
    hidden = masks(arguments.mask, names, size=found.spec.size, seed=arguments.seed)
    repaired = inpaint(found, truth, hidden, steps=arguments.steps, restarts=arguments.restarts, seed=arguments.seed)
    if launch.launched_ranks()[0] != 0:
        return
    with files.written("--out", arguments.out), files.filled(arguments.out) as partial:
        for file, picture in zip(_file_names(names), repaired.pictures, strict=True):
            pictures.one(picture).save(partial / file)
    if not repaired.with_discriminator:
        print("without a discriminator (a run's folder has one): by the known pixels alone")
    measured = arguments.mask in KINDS or arguments.whole
    methods = {"repair": repaired.pictures}
    if measured or arguments.grid is not None:
        methods |= _simpler(found, truth, hidden)
    if arguments.grid is not None:
        shown = [torch.where(hidden[:, None], 255, truth), *methods.values(), truth]
        rows = torch.cat([row[:_SHOWN] for row in shown])
        pictures.save(pictures.grid(rows, columns=min(_SHOWN, len(truth))), arguments.grid, key="--grid")
        print(f"{arguments.grid}: rows are the holes, {', '.join(methods)}, and the pictures as they were given")
    scores = {}
    if measured:
        scores = _scores(methods, truth, hidden)
        _show(scores)
    print(arguments.out)
    if arguments.json is not None:
        found_numbers = {"pictures": names, "hidden": hidden.flatten(1).float().mean(1).tolist(), "scores": scores}
        write_json(arguments.json, found_numbers)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="distgan inpaint", description="Fill the hidden parts of pictures with what the generator draws there."
    )
    given.add_arguments(parser)
    parser.add_argument(
        "--mask",
        required=True,
        help=f"what is hidden: {', '.join(KINDS)}; or a picture that is white there, for all pictures, or a folder or "
        "zip archive with one for each, of the same name",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the completed pictures, a PNG of each")
    parser.add_argument(
        "--grid",
        type=Path,
        metavar="FILE.png",
        help=f"also write a picture of the first {_SHOWN}: holes, repairs, simpler methods, and the pictures as given",
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="the pictures are undamaged, also under the masks: compare the repairs with them (always done with a "
        "built-in mask)",
    )
    return paths.expand(parser.parse_args(argv), "run", "pictures", "mask", "out", "grid", "json")


def _file_names(names: Sequence[str]) -> list[str]:
    """Returns a file name for each picture: its own with the ending .png, with a number before it if two are equal."""
    stems = [Path(name).stem for name in names]
    if len({stem.lower() for stem in stems}) == len(stems):
        return [f"{stem}.png" for stem in stems]
    return [f"{i:06d}-{stem}.png" for i, stem in enumerate(stems)]


def _simpler(found: Exported, truth: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    """Returns what simpler methods make of the same holes, by the methods' names."""
    known = torch.where(hidden[:, None], 0, truth)
    methods = {"mean": repair.fill_with_mean(known, hidden)}
    if _scikit_image():
        methods["biharmonic"] = repair.fill_smoothly(known, hidden)
    try:
        methods["nearest training image"] = repair.fill_with_nearest(known, hidden, training_images(found))
    except UserError as error:
        print(f"not compared with the nearest training image: {error}")
    return methods


def _scores(methods: dict[str, Tensor], truth: Tensor, hidden: Tensor) -> dict[str, dict[str, list[float]]]:
    scores = {name: {"psnr": repair.psnr(filled, truth, hidden).tolist()} for name, filled in methods.items()}
    if _scikit_image():
        for name, filled in methods.items():
            scores[name]["ssim"] = repair.ssim(filled, truth, hidden).tolist()
    return scores


def _show(scores: dict[str, dict[str, list[float]]]) -> None:
    print("the hidden pixels against the truth, mean over pictures")
    for name, by_metric in scores.items():
        values = {metric: sum(values) / len(values) for metric, values in by_metric.items()}
        similarity = f"   SSIM {values['ssim']:.3f}" if "ssim" in values else ""
        print(f"  {name:24} PSNR {values['psnr']:5.2f} dB{similarity}")
    if not _scikit_image():
        print("for SSIM and the biharmonic fill, run: pip install 'distgan[repair]'")


def _scikit_image() -> bool:
    return importlib.util.find_spec("skimage") is not None


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["inpaint", *sys.argv[1:]]))
