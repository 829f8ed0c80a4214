"""Trains a GAN, or resumes the run in its folder: wiring and THE loop. What happens around it: housekeeping.py."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from distgan import checkpoint, data, distributed, losses, models, output, seeding, tracking
from distgan import config as configuration
from distgan.augment import Augment
from distgan.config import Config, DataConfig
from distgan.distributed import Ranks
from distgan.ema import Average
from distgan.evaluation import Evaluation
from distgan.guard import WATCHED, Watch, Watched
from distgan.housekeeping import Housekeeping, refuse_other_images
from distgan.models import Generator, eval_mode, frozen
from distgan.penalties import Critic, Given, Penalties
from distgan.run_folder import RunFolder
from distgan.schedules import Rates
from distgan.seeding import RunSeed
from distgan.tracking import Meter

_METRICS = ("loss/discriminator", "loss/generator", "score/real", "score/fake_before", "score/fake_after")


def main(argv: Sequence[str] | None = None) -> None:
    """`distgan train --config RECIPE [--group.key=value ...] [--check]`."""
    config, check_only = configuration.parse(argv)
    if check_only:
        check(config)
    else:
        train(config)


@output.unfailing()
def train(config: Config) -> None:
    """Collective: trains to the end of the run, from where its folder stands; a stop signal saves and returns early.

    Raises:
        ValueError: a mistake of the user's, found before anything starts wherever it can be.
        NotFiniteError: the training diverged; the checkpoints before stay.
    """
    distributed.check(config.train)
    tracking.check(config.track)
    with Ranks(timeout=config.run.timeout) as ranks:
        with ranks.alone():
            distributed.check_gpus()
            prepared = _prepare(config)  # whatever can be wrong, before any GPU or process group is touched
            claim = prepared.folder.claim(config) if ranks.rank == 0 else None
        try:
            ranks.join(config.train, tracker=config.track.to, tf32=not config.penalty.names)
            _train(config, prepared, ranks)
        finally:
            if claim is not None:
                claim.release()


def _train(config: Config, prepared: "_Prepared", ranks: Ranks) -> None:
    # ------------------------------------------------------------------------------------------------------------------
    # Wiring.

    loss, penalties, augment, folder, images, shape, raw_G, raw_D, average, evaluation, unseen = prepared
    networks = {"generator": raw_G, "discriminator": raw_D, "average": average.generator}
    accelerator = ranks.accelerator
    compared = {"images": images.fingerprint, "reference": evaluation.fingerprint if evaluation is not None else None}
    ranks.refuse_differences({**configuration.common(config), **compared, **distributed.versions()})
    for network in networks.values():
        network.to(accelerator.device)
    if ranks.world > 1 and config.model.sync_batchnorm:
        models.synchronise(raw_G)
        models.synchronise(raw_D)
    adam_G, adam_D = _adam(raw_G, config), _adam(raw_D, config)
    G, D, opt_G, opt_D = accelerator.prepare(raw_G, raw_D, adam_G, adam_D)

    shares = ranks.shares(config.train)
    seed = RunSeed(config.run.seed)
    feed = {
        "seed": seed,
        "batch_size": config.train.batch_size,
        "d_steps": config.train.d_steps,
        "shares": shares,
        "device": accelerator.device,
    }
    batches = data.Batches(images, config.data, labels=config.model.conditional, **feed)
    latents = data.Latents(dim=config.model.latent_dim, **feed)
    draws = data.Draws(**feed)
    full_precision_D = ranks.in_full_precision(raw_D)
    adams = {"generator": adam_G, "discriminator": adam_D}
    rates = Rates(adams, lr=config.optim.lr, schedule=config.optim.schedule, steps=config.train.steps)
    meter = Meter((*_METRICS, *(["loss/penalty"] if config.penalty.names else [])), accelerator.device)

    if ranks.world > 1:
        distributed.settle_gradient_buckets(lambda: _throwaway_passes(G, D, batches, latents))
    house = Housekeeping(
        config,
        folder,
        ranks,
        seed=seed,
        evaluation=evaluation,
        watch=_watch(raw_G, raw_D, images, unseen, config) if ranks.rank == 0 else None,
        meter=meter,
        probability=loss.probability,
        rates=rates,
        average=average.generator,
        shape=shape,
        images=images,
        networks=networks,
        optimizers={"generator": (adam_G, raw_G), "discriminator": (adam_D, raw_D)},
    )
    step = house.resume()
    if house.done(step):  # before this invocation began
        house.end()
        return
    if evaluation is not None:
        evaluation.join(ranks)

    # ------------------------------------------------------------------------------------------------------------------
    # The loop.

    pieces = len(shares)  # more than one: gradients accumulate, and G runs anew in its own step, because several of its
    last = pieces - 1  # graphs at once break DDP's reduction
    with house:
        while not house.done(step):
            rates.set(step)
            for k in range(config.train.d_steps):
                penalty = penalties.at(step * config.train.d_steps + k)
                for i in range(pieces):
                    (real, y), z, draw = batches.at(step, k, i), latents.at(step, k, i), draws.at(step, k, i)
                    with torch.set_grad_enabled(k + 1 == config.train.d_steps and pieces == 1):  # those G learns from
                        fake = G(z, y)
                    real.requires_grad_(penalty.on_real)
                    detached = fake.detach().requires_grad_(penalty.on_fake)  # G is left alone
                    with ranks.synced(D, last=i == last):
                        real_logits = D(augment(real, draw, "real"), y)
                        fake_logits = D(augment(detached, draw, "fake"), y)
                        loss_D = loss.discriminator(real_logits, fake_logits)
                        critic = Critic(full_precision_D, augment, draw, y)
                        added = penalty(Given(critic, real, real_logits, detached, fake_logits))
                        accelerator.backward((loss_D + added) / pieces)  # one: a second breaks DDP's reduction
                    meter.add("loss/discriminator", loss_D, pieces)
                    if config.penalty.names:
                        meter.add("loss/penalty", added, pieces)
                    meter.add("score/real", loss.score(real_logits), pieces)
                    meter.add("score/fake_before", loss.score(fake_logits), pieces)
                opt_D.step()
                opt_D.zero_grad()
                models.constrain(raw_D, clip=config.optim.clip_weights)

            with frozen(raw_D):  # no gradients of D's weights, nothing of D on the wire
                for i in range(pieces):
                    with ranks.synced(G, last=i == last):
                        if pieces > 1:
                            z, draw = latents.at(step, k, i), draws.at(step, k, i)
                            if loss.paired or y is not None:
                                real, y = batches.at(step, k, i)
                            fake = G(z, y)
                        fake_logits = raw_D(augment(fake, draw, "generator"), y)
                        real_logits = raw_D(augment(real.detach(), draw, "real"), y) if loss.paired else None
                        loss_G = loss.generator(fake_logits, real_logits)
                        accelerator.backward(loss_G / pieces)
                    meter.add("loss/generator", loss_G, pieces)
                    meter.add("score/fake_after", loss.score(fake_logits), pieces)
                opt_G.step()
                opt_G.zero_grad()

            step += 1
            average.update(raw_G, images_seen=step * config.images_per_step, images=config.images_per_step)
            step = house.keep(step)


def check(config: Config) -> None:
    """Prints what would run, and stops: no GPU or process group is touched, nothing written but caches."""
    distributed.check(config.train)
    tracking.check(config.track)
    distributed.check_gpus()
    rank, world = distributed.launched_ranks()
    prepared = _prepare(config)
    if rank != 0:
        return
    folder, images, shape = prepared.folder, prepared.images, prepared.shape
    networks = prepared.generator, prepared.discriminator
    in_G, in_D = (sum(p.numel() for p in network.parameters()) for network in networks)
    buffers_G, buffers_D = (sum(b.numel() for b in network.buffers()) for network in networks)
    # Each network with Adam's two moments, and the average; everything in fp32.
    size = 4 * (3 * (in_G + in_D) + in_G + 2 * buffers_G + buffers_D)
    print(configuration.dump(config), end="")
    print(f"\nimages               {len(images.pixels):,} of {shape.image_size}x{shape.image_size}x{shape.channels}")
    if shape.class_names:
        print(f"classes              {data.numbered(shape.class_names)}")
    print(f"processes            {world}, {config.train.batch_size // world} images each per update")
    print(f"parameters           {in_G:,} in the generator, {in_D:,} in the discriminator")
    print(f"checkpoint           about {size / 1e6:.1f} MB")
    print(f"run folder           {folder.path} ({'resumes' if folder.config.exists() else 'new'})")


class _Prepared(NamedTuple):
    """What is ready before any GPU or process group is touched."""

    loss: losses.Loss
    penalties: Penalties
    augment: Augment
    folder: RunFolder
    images: data.Images
    shape: models.Shape
    generator: Generator
    discriminator: nn.Module
    average: Average
    evaluation: Evaluation | None
    unseen: Watched | None
    """Real images that nobody trains on, for rank zero's guard."""


def _prepare(config: Config) -> _Prepared:
    """Finds whatever can be wrong; writes nothing but caches: the prepared images, an extractor's weights."""
    loss, augment = losses.build(config.loss.name), Augment(config.augment.names)
    d_norm = models.d_norm(config.model)
    held = d_norm == "spectral" or config.penalty.name is not None
    losses.check(loss, config.loss.name, clip=config.optim.clip_weights, held=held)
    penalties = Penalties(config.penalty, mixed_precision=config.train.precision != "fp32")
    if config.penalty.names and d_norm == "batch":
        whose = "" if config.model.d_norm else f", which is {config.model.architecture}'s own"
        raise ValueError(
            f"penalty.name is {config.penalty.name}, but model.d_norm is batch{whose}: with batch norm in the "
            "discriminator the gradient at one image depends on the others of its batch (Gulrajani et al. 2017, "
            "section 4); set model.d_norm to none or spectral."
        )
    folder = RunFolder(config.run.dir)
    _refuse_to_write_among_pictures(config, folder)
    folder.check(config)
    images = data.load(config.data, batch_size=config.train.batch_size)
    rank, _ = distributed.launched_ranks()
    if rank == 0 and images.left_out:
        print(f"distgan: {images.left_out}", file=sys.stderr, flush=True)
    if checkpoint.last_images(folder.checkpoints) not in (None, images.fingerprint):
        begun = checkpoint.newest(folder.checkpoints, set_aside=False)  # what was read may be damage
        if begun is not None:
            refuse_other_images(checkpoint.read_state(begun), images, config)
    counts = _class_counts(images, config.data) if config.model.conditional else ()
    names = images.classes if counts and images.classes is not None else ()
    size = config.data.image_size
    shape = models.Shape(image_size=size, channels=images.channels, class_counts=counts, class_names=names)
    generator, discriminator = models.build(config.model, shape, seed=config.run.seed)
    networks = {"generator": generator, "discriminator": discriminator}
    normed = " and ".join(name for name, network in networks.items() if models.has_batch_norm(network))
    if distributed.pieces(config.train) > 1 and normed:
        raise ValueError(
            f"train.max_batch_per_device is {config.train.max_batch_per_device}, less than a rank's share of a batch, "
            f"but batch norm's statistics would then be of each part alone (in {normed}): use more processes or a "
            "smaller batch."
        )
    average = Average(generator, half_life=config.ema.half_life, ramp=config.ema.ramp)
    if config.train.init_from is not None and checkpoint.newest(folder.checkpoints, set_aside=False) is None:
        everything = {**networks, "average": average.generator}
        checkpoint.load(_newest_of(config.train.init_from), networks=everything, optimizers={})
    evaluation = None
    if config.eval.every is not None:
        own = folder.extractor if checkpoint.any_in(folder.checkpoints) else None  # else it may be of other images
        try:
            evaluation = Evaluation(config.eval, config.data, shape, rank=rank, own_weights=own)
        except ValueError as error:
            raise ValueError(f"{error} A run need not measure itself (eval.every=null).") from error
    unseen = _unseen(config.data, images.scale, classes=len(counts)) if rank == 0 else None
    trained = (generator, discriminator, average)
    return _Prepared(loss, penalties, augment, folder, images, shape, *trained, evaluation, unseen)


def _refuse_to_write_among_pictures(config: Config, folder: RunFolder) -> None:
    """Raises ValueError where the run would be trained on, or compared with, what it writes itself."""
    read = [config.data.path] if config.data.source == "folder" else []
    read += [config.eval.reference] if config.eval.reference not in ("train", "test") else []
    places = {"run.dir": config.run.dir, **({"data.cache": config.data.cache} if config.data.cache else {})}
    for pictures in read:
        if pictures is not None:
            data.refuse_among_pictures(pictures, places)
            own = (folder.samples.resolve(), (folder.path / "wandb").resolve())
            if any(place in (Path(pictures).resolve(), *Path(pictures).resolve().parents) for place in own):
                raise ValueError(
                    f"the pictures are to be read from {pictures}, where the run in {folder.path} keeps its own "
                    "samples: choose another run.dir."
                )


def _class_counts(images: data.Images, source: DataConfig) -> tuple[int, ...]:
    """Counts the images of each class.

    Raises:
        ValueError: some images have no label, or there are no two classes.
    """
    if images.labels is None or images.classes is None or bool((images.labels < 0).any()):
        way = "let every picture lie in a sub-folder" if source.source == "folder" else "name data.label_column"
        strays = data.find(source).strays if source.source == "folder" else ""
        raise ValueError(
            f"model.conditional is true, but {'some' if images.labels is not None else 'the'} images of "
            f"{source.path or source.id or source.source} have no labels{strays and f', because {strays}'}: {way}, or "
            "set model.conditional to false."
        )
    counts = tuple(torch.bincount(images.labels, minlength=len(images.classes)).tolist())
    if sum(count > 0 for count in counts) < 2:
        raise ValueError(
            f"model.conditional is true, but all images of {source.path or source.id or source.source} are of one "
            "class: set it to false."
        )
    return counts


def _unseen(images: DataConfig, scale: data.Scale | None, *, classes: int) -> Watched | None:
    """Returns some real images that nobody trains on, if the source has them, with labels if there are classes."""
    try:
        other = data.test_split(images)
    except ValueError:
        return None
    try:
        pixels, y, _ = data.preview(data.find(other), other, WATCHED, scale=scale)
        if classes and not bool(((y >= 0) & (y < classes)).all()):
            raise ValueError("some have none of the labels that are trained on.")
        return Watched(pixels, y if classes else None)
    except ValueError as error:
        print(f"distgan: the guard does without images that nobody trains on: {error}", file=sys.stderr, flush=True)
        return None


def _watch(G: Generator, D: nn.Module, images: data.Images, unseen: Watched | None, config: Config) -> Watch:
    """Returns what the guard looks by: images from all over the data, not from its first class."""
    some = torch.from_numpy(seeding.generator(0, "guard").permutation(len(images.pixels))[:WATCHED])
    labels = images.labels[some] if config.model.conditional and images.labels is not None else None
    return Watch(G, D, real=Watched(images.pixels[some], labels), unseen=unseen, seed=config.run.seed)


def _newest_of(path: str) -> Path:
    """Finds the newest checkpoint of a run's folder, or the one that the path itself is."""
    if Path(path).is_file():
        raise ValueError(
            f"train.init_from is {path}, a file: give the folder of a run or of a checkpoint; pickles are never loaded."
        )
    found = checkpoint.newest(Path(path) / "checkpoints", set_aside=False)
    if found is None and checkpoint.is_whole(Path(path)):
        found = Path(path)
    if found is None:
        raise ValueError(f"train.init_from is {path}, but there is no whole checkpoint in it.")
    return found


def _adam(network: nn.Module, config: Config) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), lr=config.optim.lr, betas=config.optim.betas, fused=True)


def _throwaway_passes(G: nn.Module, D: nn.Module, batches: data.Batches, latents: data.Latents) -> None:
    """One backward through each network that leaves no trace: statistics stand still, gradients are dropped."""
    (real, y), z = batches.at(0, 0), latents.at(0, 0)
    with eval_mode(G), eval_mode(D):
        for logits_or_images in (D(real, y), G(z, y)):
            logits_or_images.mean().backward()
    for network in (G, D):
        network.zero_grad(set_to_none=True)


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["train", *sys.argv[1:]]))
