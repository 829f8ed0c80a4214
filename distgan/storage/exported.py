"""Writes exported generators, and finds trained generators by run, folder or id on the hub.

An exported generator is a folder with model.safetensors, config.json (which says how to build the network) and, if it
was measured, evaluation.json. Drawing from it needs neither data nor recipe. It may have its
discriminator.safetensors, too.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from distgan import files as disk
from distgan import models, paths, recipe
from distgan.errors import UserError
from distgan.models import Discriminator, Generator, ImageSpec, build_generator
from distgan.recipe import Config, ModelConfig
from distgan.storage import bundle, checkpoint, report, tensors
from distgan.storage.places import Places
from distgan.storage.report import Report

DISCRIMINATOR = "discriminator.safetensors"
_SHARED = ["model.safetensors", "config.json", "recipe.yaml", "evaluation.json", "extractor.safetensors", DISCRIMINATOR]


@dataclass(frozen=True)
class Exported:
    """A trained generator with everything that is known about it."""

    generator: Generator
    """The generator, in eval mode on the CPU."""
    spec: ImageSpec
    step: int
    """The step at which it was saved."""
    recipe: Config | None
    """The recipe of its run; None if it is not in a run's folder and has no recipe.yaml in its own."""
    extractor: Path | None
    """Where the weights of its run's classifier would be; the file exists if the run was measured by one."""
    evaluation: Report | None
    """Its measurement, if it was measured at this step."""
    judged: list[Report]
    """What people said about it at this step, a report for each page."""
    run: Places | None
    """The run's folder, if the generator is in one."""
    folder: Path
    """The folder of the exported generator."""
    model: ModelConfig
    """What the networks were built by."""

    def discriminator(self) -> Discriminator | None:
        """Returns the discriminator of the run's newest checkpoint, or the one beside the generator; None without both.

        It is in eval mode, on the CPU.

        Raises:
            UserError: the checkpoints or the file are damaged, or belong to another network.
        """
        newest = checkpoint.newest(self.run.checkpoints, set_aside=False) if self.run is not None else None
        beside = self.folder / DISCRIMINATOR
        if newest is None and not beside.exists():
            return None
        _, discriminator = models.build(self.model, self.spec, seed=0)
        if newest is not None:
            checkpoint.load(newest, {"discriminator": discriminator})
        else:
            tensors.load_into(discriminator, tensors.read(beside), f"the discriminator in {self.folder}")
        return discriminator.eval().requires_grad_(False)


def find(path: str, *, raw: bool = False) -> Exported:
    """Loads a generator with its averaged weights, or with a run's raw ones, and what is beside it.

    Raises:
        UserError: there is no generator, or no checkpoint with raw weights.
    """
    folder, generator, step, spec, model = _load(path)
    exported, run = folder / "recipe.yaml", Places(folder.absolute().parent)
    of_a_run = folder.name in (run.generator.name, run.generator_best.name) and not exported.exists()
    places = run if of_a_run and run.config.exists() else None
    file = exported if exported.exists() else run.config
    of_run = _recipe(file) if exported.exists() or places is not None else None
    extractor = run.extractor if places is not None else folder / run.extractor.name
    measured = report.read(folder)
    if raw:
        newest = checkpoint.newest(Places(path).checkpoints, set_aside=False)
        if newest is None:
            raise UserError(
                f"--weights is raw, but {path} is not the folder of a run with checkpoints: give one, or leave "
                "--weights out."
            )
        checkpoint.load(newest, {"generator": generator})
        step, measured = checkpoint.step_of(newest), None
    at_hand = measured if measured is not None and measured.step == step else None
    judged = [] if raw else [one for one in report.judged(folder) if one.step == step]
    return Exported(generator, spec, step, of_run, extractor, at_hand, judged, places, folder, model)


def _recipe(file: Path) -> Config:
    try:
        return recipe.load(file)
    except UserError as error:
        raise UserError(f"{file} is not a recipe of distgan ({error}): restore it from a copy.") from error


def load_generator(path: str | os.PathLike[str]) -> Generator:
    """Loads an exported generator, in eval mode on the CPU: from its folder, its run's folder, or by its id on the hub.

    `generator.sample(n, seed=...)` draws images, uint8 (n, C, H, W). Neither data nor recipe is needed. Only
    safetensors, JSON and YAML files are read or fetched, whatever else a repository holds.

    Raises:
        UserError: there is no generator, it is damaged, or the file is a pickle.
    """
    return _load(path)[1]


def step_of(folder: Path) -> int | None:
    """Reads the step of the generator in a folder; None if there is no generator, or it is damaged."""
    try:
        return json.loads((folder / "config.json").read_text())["step"]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError):
        return None


def save_generator(
    folder: Path,
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    spec: ImageSpec,
    *,
    step: int,
    measured: Report | None = None,
    discriminator: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes an exported generator, with its measurement as evaluation.json if it was measured, and its discriminator.

    Each file is replaced in one step, so that a reader never finds half of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "library_name": "distgan",
        "format": bundle.FORMAT,
        "model": asdict(model),
        "images": asdict(spec),
        "step": step,
    }
    contents = {"model.safetensors": tensors.to_bytes(weights), "config.json": bundle.to_json(config)}
    if discriminator is not None:
        contents[DISCRIMINATOR] = tensors.to_bytes(discriminator)
    for numbers in ("evaluation.json", report.JUDGED):  # first, so that no old ones stand beside new weights
        (folder / numbers).unlink(missing_ok=True)
    if measured is not None:
        contents["evaluation.json"] = bundle.to_json(measured.to_json())
    for name, content in contents.items():
        with disk.whole(folder / name) as partial:
            disk.write(partial, content)
    disk.sync_folder(folder)


def _load(path: str | os.PathLike[str]) -> tuple[Path, Generator, int, ImageSpec, ModelConfig]:
    """Returns the folder of an exported generator, the generator, its step, its images' spec, and its settings."""
    folder = _folder(path)
    for name in ("model.safetensors", "config.json"):
        if not (folder / name).exists():
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".pt", ".pth", ".bin", ".pkl", ".ckpt"})
            hint = f" ({pickles[0]} is a pickle and is never loaded, because it can run code)" if pickles else ""
            if (folder / "config.yaml").exists():
                raise UserError(f"{folder} is a run that has saved no generator yet: wait for its first checkpoint.")
            raise UserError(
                f"{folder} holds no exported generator, because it has no {name}{hint}: give the folder of a run or of "
                "an export."
            )
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        if config["format"] != bundle.FORMAT:
            raise UserError(
                f"{folder} has format {config['format']}, which this version of distgan does not know (it knows "
                f"{bundle.FORMAT}): update distgan to the version that wrote it."
            )
        spec, step = ImageSpec(**config["images"]), config["step"]
        model = ModelConfig(**config["model"])
        generator = build_generator(model, spec)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # ValueError: no JSON, no UTF-8, or a strange size
        raise UserError(
            f"{folder / 'config.json'} does not describe a generator of distgan: give the folder of a run or of an "
            "export."
        ) from error
    tensors.load_into(generator, tensors.read(folder / "model.safetensors"), f"the generator in {folder}")
    return folder, generator.eval().requires_grad_(False), step, spec, model


def _folder(path: str | os.PathLike[str]) -> Path:
    """Finds the folder of an exported generator: the path itself, the one in a run, or a copy fetched from the hub."""
    folder = Path(paths.expanded("the generator's folder", path))
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        folder = _from_hub(str(path))
    if folder.is_file():
        raise UserError(
            f"{folder} is a file: give the folder of an exported generator, with model.safetensors and config.json. "
            "Pickles (.pt, .pth, .bin, .pkl) are never loaded, because they can run code."
        )
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: give the folder of a run or of an export, or an id on the hub.")
    if not (folder / "model.safetensors").exists() and (folder / "generator" / "model.safetensors").exists():
        folder = folder / "generator"
    return folder


def _from_hub(repository: str) -> Path:
    """Fetches the files of an exported generator, and no others."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=_SHARED))
    except (errors.RepositoryNotFoundError, errors.GatedRepoError, errors.HFValidationError) as error:
        raise UserError(
            f"{repository} is neither a folder here nor a model on the Hugging Face hub that you may read: check the "
            "name, or run `hf auth login`."
        ) from error
    except (OSError, errors.HfHubHTTPError) as error:
        raise UserError(
            f"{repository} is no folder here, is not in the cache, and the Hugging Face hub cannot be reached: check "
            "the path, or fetch it on a machine with a network and copy the folder here."
        ) from error
