"""Trains a GAN, or resumes the run in its folder. The loop is in `_train`; run/housekeeping.py does the rest."""

import sys
from collections.abc import Sequence

import torch
from torch import nn

from distgan import data, models, output, recipe
from distgan.models import eval_mode, frozen
from distgan.parallel import launch
from distgan.parallel.ranks import Ranks, settle_gradient_buckets
from distgan.recipe import Config
from distgan.run import tracking
from distgan.run.adaptation import Adaptation
from distgan.run.best import BestSoFar
from distgan.run.guard import Guard
from distgan.run.housekeeping import Housekeeping
from distgan.run.meter import Meter
from distgan.run.preflight import Materials, prepare
from distgan.run.state import Scaler, TrainingState
from distgan.run.watch import watch_over
from distgan.schedules import Beta2, Rates, Schedules
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
                tracker=config.track.to,
                tf32=not config.penalty.names and not config.augment.pipelines,
            )
            _train(config, materials, ranks)
        finally:
            if claim is not None:
                claim.release()


def _train(config: Config, materials: Materials, ranks: Ranks) -> None:
    # ------------------------------------------------------------------------------------------------------------------
    # Wiring.

    objective, average, evaluation = materials.objective, materials.average, materials.evaluation
    raw_G, raw_D = materials.generator, materials.discriminator
    accelerator, d_steps = ranks.accelerator, config.train.d_steps
    _refuse_differences(config, materials, ranks)

    # The networks on the device, and as DDP and Accelerate wrap them.
    for network in (raw_G, raw_D, average.generator):
        network.to(accelerator.device)
    if ranks.world > 1 and config.model.sync_batchnorm:
        models.synchronise(raw_G)
        models.synchronise(raw_D)
    adam_G, adam_D = _adam(raw_G, config), _adam(raw_D, config)
    G, D, opt_G, opt_D = accelerator.prepare(raw_G, raw_D, adam_G, adam_D)
    plain_D = ranks.in_full_precision(raw_D)

    # What feeds the loop, and what changes in the course of the run.
    seed = RunSeed(config.run.seed)
    feed = data.Feed(
        materials.images,
        config.data,
        labels=config.model.conditional,
        latent_dim=config.model.latent_dim,
        seed=seed,
        batch_size=config.train.batch_size,
        d_steps=d_steps,
        g_batch=config.train.g_batch,
        shares=data.shares(
            config.train.batch_size, rank=ranks.rank, world=ranks.world, most=config.train.max_batch_per_device
        ),
        device=accelerator.device,
    )
    adams = {"generator": adam_G, "discriminator": adam_D}
    rates = Rates.of(config, adams)
    adaptation = Adaptation(config, objective.augment, accelerator.device, ranks)
    schedules = Schedules(rates, Beta2(config, adams), average, objective.penalties, adaptation)
    if ranks.world > 1:
        settle_gradient_buckets(lambda: _throwaway_passes(G, D, feed))

    # What a checkpoint holds, and what happens around the steps.
    meter = Meter(objective.logged, accelerator.device, ranks)
    probability = objective.loss.probability
    images = materials.images
    state = TrainingState(
        generator=raw_G,
        discriminator=raw_D,
        average=average.generator,
        generator_optimizer=Slots(adam_G, raw_G),
        discriminator_optimizer=Slots(adam_D, raw_D),
        meter=meter,
        scaler=Scaler(ranks.scaler),
        guard=Guard(config.guard, probability=probability),
        adaptation=adaptation,
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
        schedules=schedules,
        rates=rates,
        probability=probability,
        evaluation=evaluation,
        watch=watch_over(raw_G, raw_D, images, materials.unseen, config) if ranks.rank == 0 else None,
    )
    step = begin(run)
    if run.done(step):  # it was complete before this invocation began
        run.end()
        return
    if evaluation is not None:
        evaluation.join(ranks)

    # ------------------------------------------------------------------------------------------------------------------
    # The loop.

    with run:
        while not run.done(step):
            schedules.set(step)
            # The discriminator: d_steps updates, each on other images.
            for k in range(d_steps):
                for batch in feed.for_discriminator(step, k):
                    with torch.set_grad_enabled(batch.shared):  # a graph of G only if G learns from these fakes
                        fake = G(batch.z, batch.y)
                    with ranks.synced(D, last=batch.last):
                        terms = objective.discriminator(D, batch, fake.detach(), plain_D=plain_D)
                        accelerator.backward(terms.loss * batch.weight)  # only one: a second breaks DDP's reduction
                    meter.add(terms.logged, batch.weight)
                    adaptation.add(terms.logged, batch.weight)
                opt_D.step()
                opt_D.zero_grad()
                models.constrain(raw_D, clip=config.optim.clip_weights)

            # The generator: one update, on D's last batch or its own. D's weights get no gradients, so none are sent.
            with frozen(raw_D):
                for batch in feed.for_generator(step):
                    with ranks.synced(G, last=batch.last):
                        fake = fake if batch.shared else G(batch.z, batch.y)
                        terms = objective.generator(raw_D, batch, fake)
                        accelerator.backward(terms.loss * batch.weight)
                    meter.add(terms.logged, batch.weight)
                opt_G.step()
                opt_G.zero_grad()
                models.constrain(raw_G)

            average.update(raw_G)
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
    print(f"run folder           {folder.path} ({'resumes' if folder.config.exists() else 'new'})")


def _refuse_differences(config: Config, materials: Materials, ranks: Ranks) -> None:
    """Collective: refuses ranks whose recipe, images or versions differ from rank zero's."""
    reference = materials.evaluation.fingerprint if materials.evaluation is not None else None
    compared = {"images": materials.images.fingerprint, "reference": reference}
    ranks.refuse_differences({**recipe.common(config), **compared, **launch.versions()})


def _adam(network: nn.Module, config: Config) -> torch.optim.Adam:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=config.optim.lr, betas=config.optim.betas, fused=True)


def _throwaway_passes(G: nn.Module, D: nn.Module, feed: data.Feed) -> None:
    """Runs one backward pass through each network without a trace: statistics stay, gradients are dropped."""
    batch = next(feed.for_discriminator(0, 0))
    with eval_mode(G), eval_mode(D):
        for logits_or_images in (D(batch.real, batch.y), G(batch.z, batch.y)):
            logits_or_images.mean().backward()
    for network in (G, D):
        network.zero_grad(set_to_none=True)


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["train", *sys.argv[1:]]))
