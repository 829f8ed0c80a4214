"""Measures a trained generator: Fréchet distance, Inception score, KID, precision, recall, density and coverage."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distgan import paths
from distgan.cli import check_json, write_json
from distgan.errors import UserError, nearest
from distgan.evaluation import Evaluation, data_of
from distgan.evaluation.weights import Weights
from distgan.models import has_batch_norm, place
from distgan.parallel import launch
from distgan.parallel.ranks import TIMEOUT, Ranks
from distgan.recipe import EVAL_METRICS, Config, EvalConfig, rules
from distgan.storage import exported
from distgan.storage.report import Report


def main(argv: Sequence[str] | None = None) -> None:
    """Collective: measures a generator: `distgan evaluate RUN_OR_GENERATOR [--metrics ...] [--json PATH] ...`.

    Raises:
        UserError: there is no generator, or the real images are missing or do not fit.
    """
    arguments = _parse(argv)
    check_json(arguments.json)
    report, weights = _evaluate(
        arguments.run,
        extractor=arguments.extractor,
        extractor_weights=arguments.extractor_weights,
        metrics=arguments.metrics.split(",") if arguments.metrics is not None else None,
        num=arguments.num,
        reference=arguments.reference,
        truncation=arguments.truncation,
        standing=arguments.standing,
        weights=arguments.weights,
        seed=arguments.seed,
    )
    if launch.launched_ranks()[0] == 0:
        _show(report, weights)
        if arguments.json is not None:
            write_json(arguments.json, report.to_json())


def evaluate(
    run: str | os.PathLike[str],
    *,
    extractor: str | None = None,
    extractor_weights: str | None = None,
    metrics: Sequence[str] | None = None,
    num: int = 50_000,
    reference: str | None = None,
    truncation: float | None = None,
    standing: int | None = None,
    weights: str = "averaged",
    seed: int = 0,
) -> Report:
    """Collective: measures a generator. Several processes share the work.

    Args:
        run: the folder of a run or of an exported generator, or a generator's id on the hub.
        extractor: `inception` or `classifier`. If unset, the recipe's.
        extractor_weights: a file of the extractor's weights. If unset, they are found, downloaded or trained.
        metrics: names of metrics. If unset, all that the extractor has.
        num: images to draw.
        reference: `train`, `test`, or a folder or zip archive of pictures. If unset, the recipe's.
        truncation: `eval.truncation`; 0 for none. If unset, the recipe's.
        standing: `eval.standing`; 0 for none. If unset, the recipe's.
        weights: which of the generator's weights, `averaged` or `raw`.
        seed: the seed of the images.

    Returns:
        The numbers, what real images score, and the protocol; the same on every rank.

    Raises:
        UserError: there is no generator, or the real images are missing or do not fit.
    """
    return _evaluate(
        os.fspath(run),
        extractor=extractor,
        extractor_weights=extractor_weights,
        metrics=metrics,
        num=num,
        reference=reference,
        truncation=truncation,
        standing=standing,
        weights=weights,
        seed=seed,
    )[0]


def _evaluate(run: str, *, weights: str, seed: int, **settings: Any) -> tuple[Report, Weights]:
    """Collective: returns the measurement, and the weights of the extractor that was used.

    `settings` are those of `_config`.
    """
    if weights not in ("averaged", "raw"):
        raise UserError(f'the weights are "{weights}", but must be averaged or raw.')
    launch.check_launcher()
    with Ranks(timeout=TIMEOUT) as ranks:
        with ranks.alone():
            launch.check_gpus()
            found = exported.find(run, raw=weights == "raw")
            config = _config(found.recipe, **settings)
            images = data_of(found, config.reference)
            rules.check_standing(config.standing, with_batch_norm=has_batch_norm(found.generator), name="--standing")
            evaluation = Evaluation(config, images, found.spec, rank=ranks.rank, own_weights=found.extractor)
        ranks.join()
        same = {"generator": run, "step": found.step, **asdict(config), **launch.versions()}
        ranks.refuse_differences({**same, "images": evaluation.fingerprint})
        evaluation.join(ranks)
        place(found.generator, ranks.device)
        measured = evaluation.measure(found.generator, seed=seed, weights=weights)
    return measured.report(run, found.step, evaluation.floor), evaluation.weights


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
        "--truncation",
        type=float,
        metavar="T",
        help="draw latents from a normal distribution that is cut off at -T and T; 0: not cut off (default: the "
        "recipe's, else 0)",
    )
    parser.add_argument(
        "--standing",
        type=int,
        metavar="N",
        help="give the generator's batch norm statistics of N batches of 64 samples; 0: its running statistics, or 16 "
        "batches with --truncation (default: the recipe's, else 0)",
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


def _config(
    recipe: Config | None,
    *,
    extractor: str | None,
    extractor_weights: str | None,
    metrics: Sequence[str] | None,
    num: int,
    reference: str | None,
    truncation: float | None,
    standing: int | None,
) -> EvalConfig:
    """Takes settings from the caller, then the recipe, then the defaults."""
    said = recipe.eval if recipe is not None else EvalConfig()
    name: Any = extractor or said.extractor
    if name not in EVAL_METRICS:
        raise UserError(f'the extractor is "{name}", which is unknown: {nearest(name, list(EVAL_METRICS))}')
    known = EVAL_METRICS[name]
    names = [metric.strip() for metric in metrics] if metrics is not None else list(known)
    if unknown := [metric for metric in names if metric not in known]:
        raise UserError(
            f'--metrics has "{unknown[0]}", but the extractor {name} has {",".join(known)}: choose among these'
            f"{'' if extractor else ', or another --extractor'}."
        )
    if num < 1:
        raise UserError(f"--num is {num}, but must be at least 1.")
    if truncation is not None and not truncation >= 0:
        raise UserError(f"--truncation is {truncation}, but must be above 0, or 0 for none.")
    if standing is not None and standing < 0:
        raise UserError(f"--standing is {standing}, but must be at least 1, or 0 for none.")
    return EvalConfig(
        extractor=name,
        extractor_weights=extractor_weights or (said.extractor_weights if name == said.extractor else None),
        metrics=",".join(names),
        num=num,
        reference=reference or said.reference,
        truncation=(said.truncation if truncation is None else truncation) or None,
        standing=(said.standing if standing is None else standing) or None,
    )


def _show(report: Report, weights: Weights) -> None:
    """Prints the numbers, what real images score, and the protocol."""
    print(f"{report.generator}, step {report.step}")
    for name, value in report.metrics.items():
        floor = (report.floor or {}).get(name)
        print(f"  {name:20} {value:10.5g}{'' if floor is None else f'   real images: {floor:.5g}'}")
    accuracy = f", {weights.accuracy:.1%} right on images that it never saw" if weights.accuracy is not None else ""
    print(f"extractor   {weights.file}{accuracy}")
    print(f"protocol    {json.dumps(report.protocol)}")


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["evaluate", *sys.argv[1:]]))
