"""Refuses settings that cannot be combined: all such rules on one page, in the order in which a run checks them.

A rule takes plain values, so that this page imports no network, loss or data. Checks of a single setting or within one
group are in groups.py; parallel/launch.py checks what the launcher asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from distgan.errors import UserError

if TYPE_CHECKING:
    from distgan.recipe.groups import Config

StepsRun = Literal["off", "graph", "inductor"]
"""How steps run: `train.compile` without `auto`."""


def check_recipe(config: Config) -> None:
    """Checks combinations that can be judged from the recipe alone.

    Raises:
        UserError: the critic is bounded in two ways at once, `run.extend` meets a learning rate that has ended at 0,
            two settings change the same value, or a value that is not used is ramped.
    """
    if config.optim.clip_weights is not None and "wgan_gp" in config.penalty.names:
        raise _bounded_twice(config, "penalty.name has wgan_gp")
    if config.run.extend and config.optim.schedule != "constant":
        raise UserError(
            f"run.extend is {config.run.extend}, but with optim.schedule {config.optim.schedule} the learning rate is "
            f"0 from step {config.train.steps} on: start a new run with train.init_from instead."
        )
    _check_ramps(config)
    if config.ema.start and config.ema.half_life == 0 and config.ramp.half_life is None:
        raise UserError(
            f"ema.start is {config.ema.start}, but ema.half_life is 0, so nothing is averaged: set one of them."
        )
    if config.ema.start >= config.train.steps:
        raise UserError(
            f"ema.start is {config.ema.start}, but train.steps is {config.train.steps}, so nothing would be averaged: "
            "set ema.start to less."
        )


def check_new_run(config: Config) -> None:
    """Checks what a run that has begun may keep, because earlier versions allowed it.

    Raises:
        UserError: a penalty skips updates of the relativistic loss.
    """
    if config.loss.name == "relativistic" and config.penalty.every > 1:
        raise UserError(
            f"penalty.every is {config.penalty.every}, but loss.name is relativistic, which failed to converge on "
            "Stacked MNIST and on 25 Gaussians with penalties at every 8th update (Huang et al. 2024, appendix E): set "
            "penalty.every to 1."
        )


def _bounded_twice(config: Config, other: str) -> UserError:
    return UserError(
        f"optim.clip_weights is {config.optim.clip_weights}, but {other}, and these two ways to bound the critic undo "
        "each other: set one of them to null."
    )


def _check_ramps(config: Config) -> None:
    ramp = config.ramp
    if ramp.lr is not None and config.optim.schedule != "constant":
        raise UserError(
            f"ramp.lr is {ramp.lr}, but optim.schedule is {config.optim.schedule}, and both change the learning rate: "
            "set optim.schedule to constant, or ramp.lr to null."
        )
    if ramp.half_life is not None and config.ema.ramp is not None:
        raise UserError(
            f"ramp.half_life is {ramp.half_life}, but ema.ramp is {config.ema.ramp}, and both change the half-life: "
            "set ema.ramp to null."
        )
    if ramp.penalty_weight is not None and (not config.penalty.names or config.penalty.weight is None):
        raise UserError(
            f"ramp.penalty_weight is {ramp.penalty_weight}, but there is no weight to start from: set penalty.name and "
            "penalty.weight."
        )
    if ramp.probability is not None and config.augment.probability is None:
        raise UserError(
            f"ramp.probability is {ramp.probability}, but there is no probability to start from: set augment.policy to "
            "ada and augment.probability, such as 0."
        )
    if config.augment.probability == 0 and not ramp.probability:
        raise UserError(
            "augment.probability is 0, and ramp.probability does not raise it, so nothing would be augmented: set one "
            "of them, or augment.policy to null."
        )


def check_objective(config: Config, *, needs_lipschitz: bool, zero_decides: bool, d_norm: str) -> None:
    """Checks the loss, the penalty and the discriminator's normalisation together.

    Args:
        config: the recipe.
        needs_lipschitz: whether the loss needs a critic whose slope is bounded, as Wasserstein's does.
        zero_decides: whether a logit above 0 says that an image is real.
        d_norm: the discriminator's normalisation, `model.d_norm` or the architecture's default.

    Raises:
        UserError: nothing bounds the critic or two things do, weights are clipped with another loss, a penalty meets
            batch norm, or a probability would be adapted by logits whose sign says nothing.
    """
    loss, clip = config.loss.name, config.optim.clip_weights
    bounded = d_norm == "spectral" or config.penalty.name is not None
    if needs_lipschitz and clip is None and not bounded:
        raise UserError(
            f"loss.name is {loss}, whose critic grows without bound unless something limits its slope: set "
            "optim.clip_weights, or model.d_norm=spectral, or penalty.name=wgan_gp with model.d_norm=none (Arjovsky et "
            "al. 2017, section 3)."
        )
    if clip is not None and d_norm == "spectral":
        whose = "" if config.model.d_norm else f", which is {config.model.architecture}'s own"
        raise _bounded_twice(config, f"model.d_norm is spectral{whose}")
    if clip is not None and not needs_lipschitz:
        raise UserError(
            f"optim.clip_weights is {clip}, but loss.name is {loss}, and clipping is meant for wasserstein: set "
            "optim.clip_weights to null, because it would only weaken this discriminator."
        )
    if config.penalty.names and d_norm == "batch":
        whose = "" if config.model.d_norm else f", which is {config.model.architecture}'s own"
        raise UserError(
            f"penalty.name is {config.penalty.name}, but model.d_norm is batch{whose}: with batch norm in the "
            "discriminator the gradient at one image depends on the others of its batch (Gulrajani et al. 2017, "
            "section 4); set model.d_norm to none or spectral."
        )
    if config.augment.adaptive and not zero_decides:
        raise UserError(
            f"augment.policy is {config.augment.policy}, whose probability is adapted by the sign of logits, but with "
            f"loss.name {loss} the sign says nothing: set augment.probability, or loss.name to non_saturating or hinge."
        )


def check_precision(config: Config, *, fp16_works: bool) -> None:
    """Refuses fp16 with an architecture that does not train in it.

    Raises:
        UserError: `train.precision` is fp16, and it does not work.
    """
    if config.train.precision == "fp16" and not fp16_works:
        raise UserError(
            f"train.precision is fp16, but {config.model.architecture} does not train in it (Huang et al. 2024, "
            "appendix D): use bf16 or fp32."
        )


def check_standing(standing: int | None, *, with_batch_norm: bool, name: str = "eval.standing") -> None:
    """Refuses standing statistics for a generator that has no batch norm.

    Raises:
        UserError: `eval.standing` is set, and it has none.
    """
    if standing is not None and not with_batch_norm:
        raise UserError(f"{name} is {standing}, but the generator has no batch norm, so no statistics: leave it out.")


def check_parts(config: Config, *, parts: int, with_batch_norm: Sequence[str]) -> None:
    """Refuses to split a process's share of a batch if batch norm would see each part by itself.

    Args:
        config: the recipe.
        parts: how many parts `train.max_batch_per_device` makes of the share.
        with_batch_norm: names of the networks that have batch norm.

    Raises:
        UserError: there are several parts and a network with batch norm.
    """
    if parts > 1 and with_batch_norm:
        raise UserError(
            f"train.max_batch_per_device is {config.train.max_batch_per_device}, less than a process's share of a "
            f"batch, but batch norm (in {' and '.join(with_batch_norm)}) would then see each part by itself: set it to "
            "null, or use more processes or a smaller batch."
        )


def how_steps_run(config: Config, *, on_gpu: bool, world: int, parts: int) -> StepsRun:
    """Resolves `train.compile`, in which `auto` is `graph` wherever that is not refused, and otherwise `off`.

    Args:
        config: the recipe.
        on_gpu: whether the networks are on a GPU.
        world: the number of processes.
        parts: how many parts `train.max_batch_per_device` makes of a process's share of a batch.

    Raises:
        UserError: it is `graph`, and a step cannot be captured.
    """
    wanted = config.train.compile
    if wanted in ("off", "inductor"):
        return wanted
    why_not = _not_captured(config, on_gpu=on_gpu, world=world, parts=parts)
    if wanted == "graph" and why_not is not None:
        raise UserError(f"train.compile is graph, but {why_not}: set it to off.")
    return "graph" if why_not is None else "off"


def _not_captured(config: Config, *, on_gpu: bool, world: int, parts: int) -> str | None:
    """Says why a step cannot be captured as one CUDA graph; None if it can."""
    train, ramp = config.train, config.ramp
    if not on_gpu:
        return "CUDA graphs need a GPU, and this trains on the CPU"
    if world > 1:
        return f"there are {world} processes, with which it has not been tried"
    if train.precision == "fp16":
        return "train.precision is fp16, whose loss scaler has not been tried with it"
    if parts > 1:
        return f"train.max_batch_per_device is {train.max_batch_per_device}, so gradients accumulate"
    if train.d_steps % config.penalty.every:
        return f"penalty.every is {config.penalty.every}, so steps differ, and all would repeat the first one"
    for key, end in {"beta2": ramp.beta2, "penalty_weight": ramp.penalty_weight}.items():
        if end is not None:
            return f"ramp.{key} is {end}, and each step would repeat the value of the first one"
    return None


def check_labels(config: Config, *, labels: str, counts: Sequence[int], strays: str) -> None:
    """Refuses to train with labels if images have no labels or all have the same.

    Args:
        config: the recipe, with `model.conditional`.
        labels: which of the images have labels: `all`, `some` or `none`.
        counts: the number of images of each class.
        strays: why images of a folder have no labels, if that is known.

    Raises:
        UserError: some images have no label, or there are fewer than two classes.
    """
    data = config.data
    of = data.path or data.id or data.source
    if labels != "all":
        way = "name data.label_column" if labels == "none" else "leave those images out of the data set"
        if data.source == "folder":
            way = "let every picture lie in a sub-folder"
        raise UserError(
            f"model.conditional is true, but {'some' if labels == 'some' else 'the'} images of {of} have no labels"
            f"{strays and f', because {strays}'}: {way}, or set model.conditional to false."
        )
    if sum(count > 0 for count in counts) < 2:
        raise UserError(f"model.conditional is true, but all images of {of} are of one class: set it to false.")
