"""Writes a trained generator as a folder to share: weights, what builds the network, the recipe, and a model card."""

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from distgan import __version__, paths, recipe
from distgan.applications import onnx_file
from distgan.data import numbered
from distgan.errors import UserError
from distgan.pictures import grid
from distgan.recipe import Config
from distgan.storage import exported, tensors
from distgan.storage.exported import Exported
from distgan.storage.places import Places
from distgan.storage.report import Report

_SAMPLES = 64  # images in the card's grid


def main(argv: Sequence[str] | None = None) -> None:
    """`distgan export RUN --to DIR [--with-discriminator] [--push-to-hub ID]`, or `distgan export RUN --onnx FILE`.

    Raises:
        UserError: there is no generator to export, a place is in use or cannot be written, a package is missing, or the
            hub refuses.
    """
    parser = argparse.ArgumentParser(
        prog="distgan export", description="Write a generator's folder, or one ONNX file, to share."
    )
    parser.add_argument("run", help="folder of a run; for --onnx also of an exported generator, or an id on the hub")
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder to write; it must be new or empty")
    parser.add_argument(
        "--with-discriminator", action="store_true", help="with --to: also write the discriminator, which repairs use"
    )
    parser.add_argument("--push-to-hub", metavar="ID", help="with --to: upload that folder to the hub as owner/name")
    parser.add_argument(
        "--onnx", type=Path, metavar="FILE.onnx", help="write one ONNX file, which runs without distgan"
    )
    parser.add_argument(
        "--floats", action="store_true", help="with --onnx: images are float32 in [-1, 1] instead of uint8"
    )
    parser.add_argument("--overwrite", action="store_true", help="with --onnx: replace a file that exists")
    arguments = paths.expand(parser.parse_args(argv), "run", "to", "onnx")
    if arguments.to is None and arguments.onnx is None:
        raise UserError("nothing is to be written: give --to DIR for a folder to share, or --onnx FILE.")
    needed = {"push_to_hub": "to", "with_discriminator": "to", "floats": "onnx", "overwrite": "onnx"}
    for option, other in needed.items():
        if getattr(arguments, option) and getattr(arguments, other) is None:
            raise UserError(f"--{option.replace('_', '-')} has no meaning without --{other}: add --{other}.")
    if arguments.onnx is not None:
        onnx_file.check_onnx(arguments.onnx, overwrite=arguments.overwrite)
    if arguments.to is not None:
        export(arguments.run, arguments.to, with_discriminator=arguments.with_discriminator)
        print(arguments.to)
    if arguments.onnx is not None:
        generator = exported.load_generator(arguments.run)
        of = " in [-1, 1]" if arguments.floats else " of 255"
        difference = onnx_file.write(generator, arguments.onnx, as_floats=arguments.floats)
        print(f"{arguments.onnx}: pixels differ from torch's by at most {difference:.1g}{of}")
    if arguments.push_to_hub:
        print(push(arguments.to, arguments.push_to_hub))


def export(run: str, to: Path, *, with_discriminator: bool = False) -> None:
    """Writes the averaged generator of a run into a new folder.

    Raises:
        UserError: the run has no generator yet or, if that is wanted, no discriminator; or the folder is not empty.
    """
    folder = Places(run)
    if not folder.config.exists():
        raise UserError(f"{run} has no config.yaml, so it is not the folder of a run: give a run's folder.")
    found = exported.find(run)
    discriminator = found.discriminator() if with_discriminator else None
    if with_discriminator and discriminator is None:
        raise UserError(f"{run} has no checkpoint, and so no discriminator: leave --with-discriminator out.")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to is {to}, which is not an empty folder: choose a new one.")
    try:
        to.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "config.json"):
            shutil.copyfile(folder.generator / name, to / name)
        if discriminator is not None:
            (to / exported.DISCRIMINATOR).write_bytes(tensors.to_bytes(discriminator.state_dict()))
        shutil.copyfile(folder.config, to / "recipe.yaml")
        config = recipe.load(folder.config)
        grid(found.generator.sample(_SAMPLES, seed=config.run.seed)).save(to / "samples.png")
        if found.evaluation is not None:
            shutil.copyfile(folder.generator / "evaluation.json", to / "evaluation.json")
        if folder.extractor.exists():
            shutil.copyfile(folder.extractor, to / folder.extractor.name)
        (to / "README.md").write_text(card(config, found), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{to} cannot be written ({error.strerror}): choose another folder.") from error


def card(config: Config, found: Exported) -> str:
    """Returns the model card: Markdown with the hub's metadata at its top."""
    generator, step = found.generator, found.step
    data, (channels, height, width) = config.data, found.spec.shape
    kind = {1: "grey", 3: "RGB", 4: "RGBA"}[channels]
    where = f" ({data.id or data.path})" if data.id or data.path else ""
    parameters = sum(p.numel() for p in generator.parameters())
    mirrored = ", mirrored at random" if data.flip else ""
    images = step * config.images_per_step
    penalty = f", penalty {config.penalty.name}" if config.penalty.name else ""
    probability = (
        "of adapted probability" if config.augment.adaptive else f"of probability {config.augment.probability}"
    )
    how = f"{config.augment.policy}{f', {probability}' if config.augment.pipelines else ''}"
    augmented = f", both kinds of images augmented ({how})" if config.augment.policy else ""
    late = f", from step {config.ema.start:,} on" if config.ema.start else ""
    classes, labels, named = len(generator.class_counts), "", ""
    task = "" if classes else "pipeline_tag: unconditional-image-generation\n"  # the hub knows none for images by class
    if classes:
        named = f"- Classes: {numbered(found.spec.class_names)}.\n"
        label = max(i for i, images in enumerate(generator.class_counts) if images > 0)
        labels = (
            f"images = generator.sample(64, seed=1, label={label})  # of one of its {classes} classes, 0 to "
            f"{classes - 1}\n"
        )
    return f"""---
library_name: distgan
{task}tags: [gan, {config.model.architecture}]
---
# {config.model.architecture} on {data.source}

![{_SAMPLES} samples, seed {config.run.seed}, not selected](samples.png)

A generator of {height}x{width} {kind} images, {parameters:,} parameters, trained with distgan {__version__}.

```python
import distgan

generator = distgan.load_generator("PATH_OR_ID")
images = generator.sample(64, seed=1)  # uint8 (64, {channels}, {height}, {width})
{labels}```

## Training

- Data: {data.source}{where}, split {data.split}{mirrored}.
{named}- Length: {step:,} generator updates of batch {config.train.batch_size}; {images:,} real images seen.
- Loss {config.loss.name}{penalty}{augmented}; {config.train.precision}.
- Adam: learning rate {config.optim.lr}, {config.optim.schedule}, betas {list(config.optim.betas)}.
- Weights: an exponential moving average, half-life {config.ema.half_life:,.0f} images{late}.{_ramps(config)}
- Everything else: `recipe.yaml`.

## Metrics

{_metrics(found.evaluation)}

## Limits

It draws what resembles its training images and inherits whatever they over- or under-represent; it may reproduce some
of them. It knows no other subject and no other size. What may be done with the samples depends on the data's licence.
"""


def _ramps(config: Config) -> str:
    """Returns a line about the settings that changed in the course of the run; empty if none did."""
    ends = {key: end for key, end in dataclasses.asdict(config.ramp).items() if key != "images" and end is not None}
    if not ends:
        return ""
    names = {
        "lr": "learning rate",
        "beta2": "the second beta",
        "penalty_weight": "weight of the penalty",
        "half_life": "half-life of the average",
        "probability": "probability of augmentation",
    }
    said = ", ".join(f"{names[key]} to {end:,.10g}" for key, end in ends.items())
    return f"\n- Over the first {config.ramp.images:,} images, settings changed along half a cosine: {said}."


def _metrics(evaluation: Report | None) -> str:
    """Returns the numbers as a table, and how they were measured."""
    if evaluation is None:
        return "None measured."
    floor = evaluation.floor or {}
    rows = [f"| {name} | {value:.5g} | {_or_dash(floor.get(name))} |" for name, value in evaluation.metrics.items()]
    protocol = [f"- {name}: {value}" for name, value in evaluation.protocol.items()]
    table = ["| | this generator | real images of the other split |", "|---|---|---|", *rows]
    return "\n".join([*table, "", "Measured by `distgan`:", "", *protocol])


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}"


def push(folder: Path, repository: str) -> str:
    """Uploads an exported folder and returns its address.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi, errors

    try:
        api = HfApi()
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Exported by distgan {__version__}")
    except (OSError, errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise UserError(
            f"{folder} was written, but pushing it to {repository} failed: check the id and the network, and run "
            "`hf auth login`."
        ) from error
    return str(address)


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["export", *sys.argv[1:]]))
