"""Checks a run and prepares its parts before a GPU or process group is touched. Writes nothing except caches."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from distgan import data, models
from distgan.ema import Average
from distgan.errors import UserError
from distgan.evaluation import Evaluation
from distgan.models import Generator, ImageSpec
from distgan.objective import Objective
from distgan.parallel import launch
from distgan.recipe import Config, rules
from distgan.recipe.rules import StepsRun
from distgan.run.compilation import check_compiler
from distgan.run.folder import RunFolder
from distgan.run.housekeeping import refuse_other_images
from distgan.run.watch import Watched, unseen_images
from distgan.storage import bundle, checkpoint


@dataclass(frozen=True)
class Materials:
    """The parts of a run, checked and ready."""

    objective: Objective
    folder: RunFolder
    images: data.Images
    spec: ImageSpec
    generator: Generator
    discriminator: nn.Module
    average: Average
    evaluation: Evaluation | None
    unseen: Watched | None
    """Real images that nobody trains on, for rank zero's guard."""
    steps_run: StepsRun
    """`train.compile`, resolved."""


def prepare(config: Config) -> Materials:
    """Finds the user's mistakes, and returns the parts of the run.

    Raises:
        UserError: a mistake of the user's.
    """
    rank, world = launch.launched_ranks()

    # The recipe by itself.
    objective = Objective(config)
    rules.check_precision(config, fp16_works=models.fp16_works(config.model))
    d_norm = models.d_norm(config.model)
    loss = objective.loss
    rules.check_objective(config, needs_lipschitz=loss.needs_lipschitz, zero_decides=loss.zero_decides, d_norm=d_norm)
    models.check_size(config.model, config.data.size)

    parts = data.parts(config.train.batch_size, world=world, most=config.train.max_batch_per_device)
    steps_run = rules.how_steps_run(config, on_gpu=not launch.use_cpu(), world=world, parts=parts)
    if steps_run == "inductor":
        check_compiler()

    # The folder, and the images.
    folder = RunFolder(config.run.dir)
    _refuse_to_write_among_pictures(config, folder)
    folder.check(config)
    if not checkpoint.any_in(folder.checkpoints):
        rules.check_new_run(config)
    images = data.load(config.data, batch_size=config.train.batch_size)
    if rank == 0 and images.left_out:
        print(f"distgan: {images.left_out}", file=sys.stderr, flush=True)
    _refuse_to_resume_on_others(config, folder, images)

    # The networks, and the weights that they start from.
    spec = _spec(config, images)
    generator, discriminator = _networks(config, spec)
    networks = {"generator": generator, "discriminator": discriminator}
    with_batch_norm = [name for name, network in networks.items() if models.has_batch_norm(network)]
    rules.check_parts(config, parts=parts, with_batch_norm=with_batch_norm)
    rules.check_standing(config.eval.standing, with_batch_norm=models.has_batch_norm(generator))
    average = Average(generator, config)
    if config.train.init_from is not None and checkpoint.newest(folder.checkpoints, set_aside=False) is None:
        checkpoint.load(_newest_of(config.train.init_from), {**networks, "average": average.generator})
    if config.train.freeze_d:
        models.freeze(discriminator, config.train.freeze_d)

    # The evaluation, and the images that nobody trains on.
    evaluation = _evaluation(config, folder, spec, rank=rank)
    unseen = unseen_images(config.data, images.scale, classes=len(spec.class_counts)) if rank == 0 else None
    return Materials(objective, folder, images, spec, generator, discriminator, average, evaluation, unseen, steps_run)


def _networks(config: Config, spec: ImageSpec) -> tuple[Generator, models.Discriminator]:
    try:
        return models.build(config.model, spec, seed=config.run.seed)
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise UserError(
            f"the networks do not fit in this machine's memory with model.width {config.model.width} and "
            f"model.latent_dim {config.model.latent_dim}: choose less."
        ) from error


def _spec(config: Config, images: data.Images) -> ImageSpec:
    """Returns what the networks must know about the images.

    Raises:
        UserError: `model.conditional` is true, but images have no labels.
    """
    size, channels = config.data.image_size, images.channels
    if not config.model.conditional:
        return ImageSpec(image_size=size, channels=channels)
    labels, classes = images.labels, images.classes
    complete = labels is not None and classes is not None and bool((labels >= 0).all())
    have = "all" if complete else "none" if labels is None else "some"
    counts: tuple[int, ...] = ()
    if complete and labels is not None and classes is not None:
        counts = tuple(torch.bincount(labels, minlength=len(classes)).tolist())
    strays = data.find(config.data).strays if not complete and config.data.source == "folder" else ""
    rules.check_labels(config, labels=have, counts=counts, strays=strays)
    return ImageSpec(image_size=size, channels=channels, class_counts=counts, class_names=classes or ())


def _evaluation(config: Config, folder: RunFolder, spec: ImageSpec, *, rank: int) -> Evaluation | None:
    if config.eval.every is None:
        return None
    own = folder.extractor if checkpoint.any_in(folder.checkpoints) else None  # otherwise it may belong to other images
    try:
        return Evaluation(config.eval, config.data, spec, rank=rank, own_weights=own)
    except UserError as error:
        raise UserError(f"{error} Or switch evaluations off: eval.every=null.") from error


def _refuse_to_resume_on_others(config: Config, folder: RunFolder, images: data.Images) -> None:
    """Raises UserError if the newest whole checkpoint was trained on other images."""
    if checkpoint.last_images(folder.checkpoints) in (None, images.fingerprint):
        return
    begun = checkpoint.newest(folder.checkpoints, set_aside=False)  # read again: the newest one may be damaged
    if begun is not None:
        refuse_other_images(bundle.read_state(begun), images, config)


def _refuse_to_write_among_pictures(config: Config, folder: RunFolder) -> None:
    """Raises UserError if the run would train on, or be compared with, pictures that it writes itself."""
    read = [config.data.path] if config.data.source == "folder" else []
    read += [config.eval.reference] if config.eval.reference not in ("train", "test") else []
    places = {"run.dir": config.run.dir, **({"data.cache": config.data.cache} if config.data.cache else {})}
    for pictures in read:
        if pictures is not None:
            data.refuse_among_pictures(pictures, places)
            own = [(folder.path / name).resolve() for name in ("samples", "wandb", "mlflow")]
            if any(place in (Path(pictures).resolve(), *Path(pictures).resolve().parents) for place in own):
                raise UserError(
                    f"the pictures would be read from {pictures}, where the run in {folder.path} keeps its own "
                    "samples: choose another run.dir."
                )


def _newest_of(path: str) -> Path:
    """Returns the newest checkpoint of a run's folder, or the path itself if it is a checkpoint."""
    if Path(path).is_file():
        raise UserError(
            f"train.init_from is {path}, a file: give the folder of a run or of a checkpoint. Pickles are never loaded."
        )
    found = checkpoint.newest(Path(path) / "checkpoints", set_aside=False)
    if found is None and bundle.is_whole(Path(path)):
        found = Path(path)
    if found is None:
        raise UserError(
            f"train.init_from is {path}, but there is no whole checkpoint in it: give the folder of a run that has one."
        )
    return found
