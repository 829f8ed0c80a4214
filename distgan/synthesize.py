"""Writes labelled data sets of a generator's images, and measures whether they help a classifier."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distgan import data, files, paths
from distgan.applications import benefit
from distgan.applications.benefit import SYNTHETIC, Plan
from distgan.applications.classes import labels_in
from distgan.applications.synthetic import FORMS, synthesize
from distgan.cli import check_json, write_json
from distgan.errors import UserError
from distgan.models import Generator
from distgan.parallel import launch
from distgan.storage import exported
from distgan.train import train


def main(argv: Sequence[str] | None = None) -> None:
    """Collective: `distgan synthesize RUN --out DIR --per-class N|--count CLASS=N ...` or `... --benefit 20,100,1000`.

    Raises:
        UserError: there is no generator, it has no labels, a number does not fit, or the folder cannot be written.
    """
    arguments = _parse(argv)
    check_json(arguments.json)
    data.refuse_mixing({"--out": arguments.out, "--json": arguments.json}, {})
    if arguments.benefit is None and arguments.repeats is not None:
        raise UserError("--repeats has no meaning without --benefit: leave it out.")
    found = exported.find(arguments.run)
    if arguments.benefit is not None:
        _measure(arguments, found)
        return
    made = synthesize(
        found,
        arguments.out,
        per_class=arguments.per_class,
        counts=_counts(arguments.count, found.generator) if arguments.count else None,
        form=arguments.form,
        min_confidence=arguments.min_confidence,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    if launch.launched_ranks()[0] != 0:
        return
    for name, count in made.counts.items():
        of = f" of {made.drawn[name]:,} samples" if made.drawn[name] != count else ""
        print(f"{count:8,} {name}{of}")
    print(made.folder)
    if arguments.json is not None:
        write_json(arguments.json, {"counts": made.counts, "drawn": made.drawn})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="distgan synthesize",
        description="Write a labelled data set of a generator's images; or measure whether such images help.",
    )
    parser.add_argument("run", help="folder of a run or of an exported generator, or a generator's id on the hub")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write: new or empty without --overwrite or --benefit"
    )
    parser.add_argument("--per-class", type=int, metavar="N", help="images per class (default with --benefit: 1000)")
    parser.add_argument(
        "--count",
        action="append",
        metavar="CLASS=N",
        help="images of one class, by its name or number; give it once for each class that is wanted",
    )
    parser.add_argument(
        "--form",
        choices=FORMS,
        default=FORMS[0],
        help="parquet: one file. folder: a PNG of each image in class folders, and metadata.jsonl (default: parquet)",
    )
    parser.add_argument(
        "--min-confidence",
        type=float,
        metavar="P",
        help="keep an image only if the run's classifier gives its class at least this probability",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the images (default: 0)")
    parser.add_argument(
        "--benefit",
        metavar="N,N,...",
        help="instead: for each N, train generators on N real images of each class by the run's recipe, and measure "
        "on real test images the accuracy of classifiers trained on real and on synthetic images",
    )
    parser.add_argument("--repeats", type=int, help="with --benefit: repetitions of each N (default: 5)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier synthetic data set")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers to a file")
    return paths.expand(parser.parse_args(argv), "run", "out", "json")


def _counts(given: Sequence[str], generator: Generator) -> dict[str | int, int]:
    """Returns the number of images of each class, by label."""
    counts: dict[str | int, int] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        if not name or not number.isdecimal() or len(number) > 9 or int(number) < 1:
            raise UserError(f"--count is {text}, but must be a class and a number of images, as in cat=100.")
        labels = labels_in("--count", name, generator)
        if len(labels) > 1:
            raise UserError(f"--count is {text}, but must be one class and a number: give it once for each class.")
        if labels[0] in counts:
            raise UserError(f"--count has the class {name} twice: give each once.")
        counts[labels[0]] = int(number)
    return counts


def _measure(arguments: argparse.Namespace, found: exported.Exported) -> None:
    """Collective: measures whether synthetic images help, and prints a table."""
    if found.recipe is None:
        raise UserError(f"{arguments.run} has no recipe, but --benefit needs one to train: give the folder of a run.")
    ignored = {"count": None, "min_confidence": None, "seed": 0, "form": FORMS[0], "overwrite": False}
    for name, default in ignored.items():
        if getattr(arguments, name) != default:
            raise UserError(f"--{name.replace('_', '-')} has no meaning with --benefit: leave one of them out.")
    words = arguments.benefit.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UserError(
            f"--benefit is {arguments.benefit}, but must be numbers separated by commas, as in 20,100,1000."
        )
    repeats = arguments.repeats if arguments.repeats is not None else Plan(counts=[]).seeds
    if repeats < 1:
        raise UserError(f"--repeats is {repeats}, but must be at least 1.")
    if arguments.per_class is not None and arguments.per_class < 1:
        raise UserError(f"--per-class is {arguments.per_class}, but must be at least 1.")
    counts, synthetic = [int(word) for word in words], arguments.per_class or SYNTHETIC
    plan = Plan(counts=counts, seeds=repeats, synthetic=synthetic)
    files.check_folder("--out", arguments.out, overwrite=True)  # what is done there is not done again
    accuracies = benefit.benefit(found.recipe, plan, arguments.out, train)
    if launch.launched_ranks()[0] == 0:
        if sum(len(next(iter(by_arm.values()))) for by_arm in accuracies.values()) < len(counts) * repeats:
            print("stopped before all was measured: the same command goes on")
        _show(accuracies)
        if arguments.json is not None:
            write_json(arguments.json, {"accuracies": accuracies, "synthetic_per_class": synthetic})


def _show(accuracies: dict[str, Any]) -> None:
    print("accuracy on real test images in %, mean and 95% interval")
    width = max(map(len, benefit.ARMS))
    print(f"{'real images of each class':{width}}  {'  '.join(f'{count:>12}' for count in accuracies)}")
    for arm in benefit.ARMS:
        cells = []
        for by_arm in accuracies.values():
            mean, half = benefit.interval(by_arm[arm])
            cells.append(f"{100 * mean:5.1f} ± {100 * half:4.1f}")
        print(f"{arm:{width}}  {'  '.join(f'{cell:>12}' for cell in cells)}")


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["synthesize", *sys.argv[1:]]))
