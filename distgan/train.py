"""Trains a GAN, or resumes the run in its folder: run/algorithm.py has the step, run/housekeeping.py does the rest."""

import sys
from collections.abc import Sequence

from distgan import data, output, recipe
from distgan.parallel import launch
from distgan.parallel.ranks import Ranks
from distgan.recipe import Config
from distgan.run import tracking
from distgan.run.algorithm import Step
from distgan.run.best import BestSoFar
from distgan.run.guard import Guard
from distgan.run.housekeeping import Housekeeping
from distgan.run.preflight import Materials, prepare
from distgan.run.state import Scaler, TrainingState
from distgan.run.watch import watch_over
from distgan.seeding import RunSeed
from distgan.storage.checkpoint import Slots


def main(argv: Sequence[str] | None = None) -> None:
    """`distgan train --config RECIPE [--group.key=value ...] [--check]`."""
    config, check_only = recipe.parse(argv)
    if check_only:
        print_plan(config)
    else:
        train(config)


@output.unfailing()
def train(config: Config) -> None:
    """Collective: trains to the end of the run, resuming it if its folder has checkpoints.

    A stop signal saves and returns early.

    Raises:
        UserError: a mistake of the user's, found before anything starts if it can be.
        NotFiniteError, TroubleError, NotSavedError, LostRankError: as in errors.py; earlier checkpoints stay.
    """
    launch.check(batch_size=config.train.batch_size, precision=config.train.precision)
    tracking.check(config.track)
    with Ranks(timeout=config.run.timeout) as ranks:
        with ranks.alone():
            launch.check_gpus()
            materials = prepare(config)  # finds the user's mistakes before any GPU or process group is touched
            claim = materials.folder.claim(config) if ranks.rank == 0 else None
        try:
            ranks.join(
                precision=config.train.precision,
                deterministic=config.train.deterministic,
                compress=config.train.compress,
                tf32=not config.penalty.names and not config.augment.pipelines,
            )
            _train(config, materials, ranks)
        finally:
            if claim is not None:
                claim.release()


def _train(config: Config, materials: Materials, ranks: Ranks) -> None:
    _refuse_differences(config, materials, ranks)
    generator, discriminator, average = materials.generator, materials.discriminator, materials.average
    images, objective, evaluation = materials.images, materials.objective, materials.evaluation
    seed = RunSeed(config.run.seed)
    train_step = Step(
        config,
        ranks,
        images,
        seed,
        objective=objective,
        generator=generator,
        discriminator=discriminator,
        average=average,
        steps_run=materials.steps_run,
    )

    # What a checkpoint holds, and what happens around the steps.
    adams = train_step.adams
    probability = objective.loss.probability
    state = TrainingState(
        generator=generator,
        discriminator=discriminator,
        average=average.generator,
        generator_optimizer=Slots(adams["generator"], generator),
        discriminator_optimizer=Slots(adams["discriminator"], discriminator),
        meter=train_step.meter,
        scaler=Scaler(ranks.scaler),
        guard=Guard(config.guard, probability=probability),
        adaptation=train_step.adaptation,
        standing=BestSoFar(config.eval),
        images=images.fingerprint,
        data={"count": len(images.pixels), "classes": images.classes},
    )
    run = Housekeeping(
        config,
        materials.folder,
        ranks,
        state,
        images=images,
        spec=materials.spec,
        seed=seed,
        schedules=train_step.schedules,
        rates=train_step.rates,
        probability=probability,
        evaluation=evaluation,
        watch=watch_over(generator, discriminator, images, materials.unseen, config) if ranks.rank == 0 else None,
    )
    step = begin(run)
    if run.done(step):  # it was complete before this invocation began
        run.end()
        return
    if evaluation is not None:
        evaluation.join(ranks)

    with run:
        while not run.done(step):
            train_step(step)
            step = after_step(run, step + 1)


def begin(run: Housekeeping) -> int:
    """Collective: restores the run, and returns the step that it goes on from."""
    return run.resume()


def after_step(run: Housekeeping, step: int) -> int:
    """Collective: logs, samples, evaluates and saves if due; returns the step to go on from."""
    return run.after(step)


def print_plan(config: Config) -> None:
    """Prints what would run, and stops. Touches no GPU or process group, and writes nothing except caches."""
    launch.check(batch_size=config.train.batch_size, precision=config.train.precision)
    tracking.check(config.track)
    launch.check_gpus()
    rank, world = launch.launched_ranks()
    materials = prepare(config)
    if rank != 0:
        return
    folder, images, spec = materials.folder, materials.images, materials.spec
    networks = materials.generator, materials.discriminator
    in_G, in_D = (sum(p.numel() for p in network.parameters()) for network in networks)
    buffers_G, buffers_D = (sum(b.numel() for b in network.buffers()) for network in networks)
    # Each network with Adam's two moments, and the average; everything in fp32.
    size = 4 * (3 * (in_G + in_D) + in_G + 2 * buffers_G + buffers_D)
    print(recipe.dump(config), end="")
    print(f"\nimages               {len(images.pixels):,} of {spec}")
    if spec.class_names:
        print(f"classes              {data.numbered(spec.class_names)}")
    print(f"processes            {world}, {config.train.batch_size // world} images each per update")
    print(f"parameters           {in_G:,} in the generator, {in_D:,} in the discriminator")
    print(f"checkpoint           about {size / 1e6:.1f} MB")
    print(f"memory on a GPU      {_memory(config, materials, world=world)}")
    print(f"run folder           {folder.path} ({'resumes' if folder.config.exists() else 'new'})")


def _memory(config: Config, materials: Materials, *, world: int) -> str:
    """Says what a step will need on a GPU. Takes all numbers out of the networks."""
    from distgan.run.rehearsal import memory  # of all commands, only this one needs it

    try:
        need = memory(
            config,
            materials.images,
            world=world,
            generator=materials.generator,
            discriminator=materials.discriminator,
            average=materials.average,
        )
    except Exception as error:  # such as a network of the user's that looks at numbers
        return f"unknown: {type(error).__name__}"
    parts = {
        "weights": need.weights,
        "Adam's moments": need.moments,
        "gradients": need.gradients,
        "activations": need.activations,
    }
    listed = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in parts.items())
    beside = f"; images {need.images / 1e6:,.1f} MB" if need.images else ""
    fit = ", if they fit" if need.images and config.data.placement == "auto" else ""
    return f"{sum(parts.values()) / 1e6:,.1f} MB per process, estimated ({listed}){beside}{fit}"


def _refuse_differences(config: Config, materials: Materials, ranks: Ranks) -> None:
    """Collective: refuses ranks whose recipe, images or versions differ from rank zero's."""
    reference = materials.evaluation.fingerprint if materials.evaluation is not None else None
    compared = {"images": materials.images.fingerprint, "reference": reference}
    ranks.refuse_differences({**recipe.common(config), **compared, **launch.versions()})


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["train", *sys.argv[1:]]))
