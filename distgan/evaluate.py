"""Measures a trained generator: Fréchet distance, Inception score, KID, precision, recall, density and coverage."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distgan import paths
from distgan.cli import check_json, write_json
from distgan.errors import UserError
from distgan.evaluation import Evaluation, Measured
from distgan.parallel import launch
from distgan.parallel.ranks import Ranks
from distgan.recipe import EVAL_METRICS, Config, DataConfig, EvalConfig, RunConfig
from distgan.storage import exported
from distgan.storage.exported import Exported

_TIMEOUT = RunConfig(dir=".").timeout


def main(argv: Sequence[str] | None = None) -> None:
    """Collective: measures a generator: `distgan evaluate RUN_OR_GENERATOR [--metrics ...] [--json PATH] ...`.

    Raises:
        UserError: there is no generator, or the real images are missing or do not fit.
    """
    arguments = _parse(argv)
    launch.check_launcher()
    with Ranks(timeout=_TIMEOUT) as ranks:
        with ranks.alone():
            launch.check_gpus()
            check_json(arguments.json)
            found = exported.find(arguments.run, raw=arguments.weights == "raw")
            config = _config(arguments, found.recipe)
            images = _data(found, config)
            evaluation = Evaluation(config, images, found.spec, rank=ranks.rank, own_weights=found.extractor)
        ranks.join()
        same = {"generator": arguments.run, "step": found.step, **asdict(config), **launch.versions()}
        ranks.refuse_differences({**same, "images": evaluation.fingerprint})
        evaluation.join(ranks, progress=True)
        found.generator.to(ranks.accelerator.device)
        measured = evaluation.measure(found.generator, seed=arguments.seed, weights=arguments.weights)
        if ranks.rank == 0:
            _show(arguments.run, found.step, measured, evaluation)
            if arguments.json is not None:
                write_json(arguments.json, measured.report(arguments.run, found.step, evaluation.floor).to_json())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="distgan evaluate",
        description="Measure a generator. The defaults of extractor and reference come from its run's recipe.",
    )
    parser.add_argument("run", help="folder of a run or of an exported generator, or a generator's id on the hub")
    parser.add_argument(
        "--metrics",
        help="separated by commas. "
        + "; ".join(f"{name} has {','.join(known)}" for name, known in EVAL_METRICS.items())
        + " (default: all)",
    )
    parser.add_argument("--num", type=int, default=50_000, help="images to draw (default: 50000)")
    parser.add_argument(
        "--extractor",
        choices=sorted(EVAL_METRICS),
        help="network to compare features by (default: the recipe's, else inception)",
    )
    parser.add_argument(
        "--extractor-weights",
        metavar="FILE",
        help="weights of the extractor (default: the recipe's, or else the run's own, downloaded or trained)",
    )
    parser.add_argument(
        "--reference",
        metavar="WHAT",
        help="train, test, or a folder or zip archive of pictures of the same size (default: the recipe's)",
    )
    parser.add_argument(
        "--weights",
        choices=("averaged", "raw"),
        default="averaged",
        help="which of the generator's weights to measure (default: averaged)",
    )
    parser.add_argument("--seed", type=int, default=0, help="image i is a function of seed and i (default: 0)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers and their protocol to a file")
    return paths.expand(parser.parse_args(argv), "run", "extractor_weights", "reference", "json")


def _config(arguments: argparse.Namespace, recipe: Config | None) -> EvalConfig:
    """Takes settings from the command line, then the recipe, then the defaults."""
    said = recipe.eval if recipe is not None else EvalConfig()
    extractor = arguments.extractor or said.extractor
    known = EVAL_METRICS[extractor]
    names = [name.strip() for name in arguments.metrics.split(",")] if arguments.metrics is not None else list(known)
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f'--metrics has "{unknown[0]}", but the extractor {extractor} has {",".join(known)}: choose among these'
            f"{'' if arguments.extractor else ', or another --extractor'}."
        )
    if arguments.num < 1:
        raise UserError(f"--num is {arguments.num}, but must be at least 1.")
    weights = arguments.extractor_weights or (said.extractor_weights if extractor == said.extractor else None)
    return EvalConfig(
        extractor=extractor,
        extractor_weights=weights,
        metrics=",".join(names),
        num=arguments.num,
        reference=arguments.reference or said.reference,
    )


def _data(found: Exported, config: EvalConfig) -> DataConfig:
    """Returns the data set of the real images: the recipe's, or the reference's folder."""
    if found.recipe is not None:
        return found.recipe.data
    if config.reference in ("train", "test"):
        raise UserError(
            f"the reference is {config.reference}, but there is no recipe beside the generator, so its training images "
            "are not known: give --reference a folder of pictures."
        )
    size: Any = found.spec.image_size
    channels: Any = found.spec.channels
    return DataConfig(source="folder", path=config.reference, image_size=size, channels=channels)


def _show(run: str, step: int, measured: Measured, evaluation: Evaluation) -> None:
    """Prints the numbers, what real images score, and the protocol."""
    print(f"{run}, step {step}")
    for name, value in measured.numbers.items():
        floor = (evaluation.floor or {}).get(name)
        print(f"  {name:20} {value:10.5g}{'' if floor is None else f'   real images: {floor:.5g}'}")
    weights = evaluation.weights
    accuracy = f", {weights.accuracy:.1%} right on images that it never saw" if weights.accuracy is not None else ""
    print(f"extractor   {weights.file}{accuracy}")
    print(f"protocol    {json.dumps(measured.protocol)}")


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["evaluate", *sys.argv[1:]]))
