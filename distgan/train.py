"""Trains a GAN, or resumes the run in its folder: wiring, THE loop, housekeeping."""

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from distgan import checkpoint, data, distributed, losses, models
from distgan import config as configuration
from distgan.config import Config
from distgan.distributed import Ranks
from distgan.ema import Average
from distgan.errors import NotSavedError, StoppedError
from distgan.models import Generator, eval_mode, frozen
from distgan.penalties import Penalty
from distgan.run_folder import Claim, RunFolder
from distgan.tracking import Meter, Tracker, offline_wandb_runs

_METRICS = ("loss/discriminator", "loss/generator", "score/real", "score/fake_before", "score/fake_after")
_GRID = 64  # images in the sample grid


def main(argv: Sequence[str] | None = None) -> None:
    """`distgan train --config RECIPE [--group.key=value ...] [--check]`."""
    config, check_only = configuration.parse(argv)
    if check_only:
        check(config)
    else:
        train(config)


def train(config: Config, *, penalty: Penalty | None = None) -> None:
    """Collective: trains to the end of the run, from where its folder stands; a stop signal saves and returns early.

    Args:
        config: the run.
        penalty: what is added to the discriminator's loss.

    Raises:
        ValueError: a mistake of the user's, found before anything starts wherever it can be.
        NotFiniteError: the training diverged; the checkpoints before stay.
    """
    distributed.check(config.train)
    with Ranks(timeout=config.run.timeout) as ranks:
        with ranks.alone():
            distributed.check_gpus()
            prepared = _prepare(config, penalty)  # whatever can be wrong, before any GPU or process group is touched
            claim = prepared.folder.claim(config) if ranks.rank == 0 else None
        ranks.join(config.train, tracker=config.track.to)
        _train(config, penalty, prepared, claim, ranks)


def _train(config: Config, penalty: Penalty | None, prepared: "_Prepared", claim: Claim | None, ranks: Ranks) -> None:
    # ------------------------------------------------------------------------------------------------------------------
    # Wiring.

    loss, folder, images, shape, raw_G, raw_D, average = prepared
    networks = {"generator": raw_G, "discriminator": raw_D, "average": average.generator}
    accelerator = ranks.accelerator
    ranks.refuse_differences({**configuration.common(config), "images": images.fingerprint, **distributed.versions()})
    for network in networks.values():
        network.to(accelerator.device)
    if ranks.world > 1 and config.model.sync_batchnorm:
        models.synchronise(raw_G)
        models.synchronise(raw_D)
    adam_G, adam_D = _adam(raw_G, config), _adam(raw_D, config)
    G, D, opt_G, opt_D = accelerator.prepare(raw_G, raw_D, adam_G, adam_D)

    shares = ranks.shares(config.train)
    feed = {
        "seed": config.run.seed,
        "batch_size": config.train.batch_size,
        "d_steps": config.train.d_steps,
        "shares": shares,
        "device": accelerator.device,
    }
    batches = data.Batches(images, config.data, **feed)
    latents = data.Latents(dim=config.model.latent_dim, **feed)
    meter = Meter(_METRICS, accelerator.device)

    if ranks.world > 1:
        distributed.settle_gradient_buckets(lambda: _throwaway_passes(G, D, batches, latents))
    house = Housekeeping(
        config,
        folder,
        claim,
        ranks,
        meter=meter,
        average=average.generator,
        shape=shape,
        fingerprint=images.fingerprint,
        networks=networks,
        optimizers={"generator": (adam_G, raw_G), "discriminator": (adam_D, raw_D)},
    )
    step = house.resume()
    if house.done(step):  # before this invocation began
        house.end()
        return

    # ------------------------------------------------------------------------------------------------------------------
    # The loop.

    pieces = len(shares)  # more than one: gradients accumulate, and G runs anew in its own step, because several of its
    last = pieces - 1  # graphs at once break DDP's reduction
    with house:
        while not house.done(step):
            for k in range(config.train.d_steps):
                for i in range(pieces):
                    real, y = batches.at(step, k, i)
                    z, fake_y = latents.at(step, k, i)
                    with torch.set_grad_enabled(k + 1 == config.train.d_steps and pieces == 1):  # those G learns from
                        fake = G(z, fake_y)
                    real.requires_grad_(penalty is not None and penalty.on_real)
                    fixed = fake.detach().requires_grad_(penalty is not None and penalty.on_fake)  # G is left alone
                    with ranks.synced(D, last=i == last):
                        real_logits, fake_logits = D(real, y), D(fixed, fake_y)
                        loss_D = loss.discriminator(real_logits, fake_logits)
                        if penalty is not None:  # in the one backward: a second one breaks DDP's reduction
                            loss_D = loss_D + penalty(raw_D, real, y, real_logits, fixed, fake_y, fake_logits)
                        accelerator.backward(loss_D / pieces)
                    meter.add("loss/discriminator", loss_D, pieces)
                    meter.add("score/real", loss.score(real_logits), pieces)
                    meter.add("score/fake_before", loss.score(fake_logits), pieces)
                opt_D.step()
                opt_D.zero_grad()

            with frozen(raw_D):  # no gradients of D's weights, nothing of D on the wire
                for i in range(pieces):
                    with ranks.synced(G, last=i == last):
                        if pieces > 1:
                            z, fake_y = latents.at(step, k, i)
                            fake = G(z, fake_y)
                            if loss.paired:
                                real, y = batches.at(step, k, i)
                        fake_logits = raw_D(fake, fake_y)
                        loss_G = loss.generator(fake_logits, raw_D(real.detach(), y) if loss.paired else None)
                        accelerator.backward(loss_G / pieces)
                    meter.add("loss/generator", loss_G, pieces)
                    meter.add("score/fake_after", loss.score(fake_logits), pieces)
                opt_G.step()
                opt_G.zero_grad()

            step += 1
            average.update(raw_G, images_seen=step * config.images_per_step, images=config.images_per_step)
            house.keep(step)


class Housekeeping:
    """What happens around the steps: resuming, logging, sampling, saving, stopping. Collective, all of it.

    As a context it records the run and listens for stop signals; leaving it without an error tells where things lie.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        claim: Claim | None,
        ranks: Ranks,
        *,
        meter: Meter,
        average: Generator,
        shape: models.Shape,
        fingerprint: str,
        networks: dict[str, nn.Module],
        optimizers: dict[str, tuple[torch.optim.Optimizer, nn.Module]],
    ) -> None:
        self._config, self._folder, self._claim, self._ranks = config, folder, claim, ranks
        self._meter, self._average, self._shape, self._fingerprint = meter, average, shape, fingerprint
        self._networks, self._optimizers = networks, optimizers
        self._until = min(config.last_step, config.run.stop_at or config.last_step)
        self._requests = ranks.requests
        self._stopped = False
        self._step = 0
        self._wandb_id: str | None = None
        # Of rank zero's alone: it writes in the background, and asks the others for a save out of turn.
        self._writing = checkpoint.Background()
        self._saved_at = time.monotonic()
        self._unsaved = self._asked = False

    def resume(self) -> int:
        """Restores the newest checkpoint that is whole, and returns its step; 0 where there is none.

        Raises:
            ValueError: it was trained on other images, or belongs to other networks.
        """
        found = self._ranks.on_rank_zero(lambda: checkpoint.newest(self._folder.checkpoints, set_aside=True))
        if found is not None:
            state = checkpoint.read_state(found)
            if state["images"] != self._fingerprint:
                raise ValueError(
                    f"{self._folder.path} was trained on other images than {self._config.data.source} is now."
                )
            checkpoint.load(found, networks=self._networks, optimizers=self._optimizers)
            self._meter.load_state(state["meter"], self._ranks)
            if self._ranks.scaler is not None:
                self._ranks.scaler.load_state_dict(state["scaler"])
            self._wandb_id = state["wandb_id"]
            self._step = state["step"]
        self._ranks.moved(self._step)
        return self._step

    def __enter__(self) -> Self:
        self._tracker = Tracker(self._ranks.accelerator, self._folder, self._config)
        self._wandb_id = self._ranks.on_rank_zero(self._start)
        per_rank = self._config.train.batch_size // self._ranks.world
        self._ranks.say(
            f"{self._folder.path}: {'resuming at' if self._step else 'starting at'} step {self._step} on "
            f"{self._ranks.world} x {self._ranks.accelerator.device.type}, {per_rank} images each, "
            f"{self._config.train.precision}"
        )
        self._requests.listen(signal.SIGINT, signal.SIGTERM)
        return self

    def _start(self) -> str | None:
        try:
            wandb_id = self._tracker.start(self._step, self._wandb_id)
            self._folder.preempted.unlink(missing_ok=True)
        except OSError as error:
            raise NotSavedError(f"{self._folder.path} cannot be written ({error.strerror}).") from error
        return wandb_id

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._requests.unlisten(signal.SIGINT, signal.SIGTERM)
            self._requests.finish()
            self._ranks.on_rank_zero(self._tracker.close)
            self.end()
            return
        try:
            self._ranks.explain(error)
        finally:
            self._finish_writing()
            # Only now: the launcher's SIGTERM must not cut the words short.
            self._requests.unlisten(signal.SIGINT, signal.SIGTERM)
            self._tracker.close()

    def end(self) -> None:
        """Tells where things lie, and leaves the folder."""
        self._ranks.say(_where_things_lie(self._folder, self._step, self._config))
        if self._claim is not None:
            self._claim.release()

    def done(self, step: int) -> bool:
        """Whether this invocation ends here."""
        return self._stopped or step >= self._until

    def keep(self, step: int) -> None:
        """After each step: what is due at it."""
        track, self._step = self._config.track, step
        self._ranks.moved(step)
        end, log = step == self._config.last_step, step % track.log_every == 0
        self._tracker.advance(step)
        if log or end:
            rates = {f"lr/{name}": adam.param_groups[0]["lr"] for name, (adam, _) in self._optimizers.items()}
            metrics = {**self._meter.means(self._ranks), **rates}
            self._record("the metrics", lambda: self._tracker.log(step, metrics))
        if step % track.sample_every == 0 or end:
            seed = self._config.run.seed
            self._record("the samples", lambda: self._tracker.samples(step, self._average.sample(_GRID, seed=seed)))
        agreed = self._requests.agreed(save=self._save_is_due(log), failed=self._writing.failed())
        self._stopped = agreed.stop
        if self._stopped:
            self._ranks.say(f"stop signal: saving step {step}")
        if agreed.failed:
            self._ranks.on_rank_zero(self._settle)
        if step % self._config.checkpoint.every == 0 or agreed.save or self.done(step):
            self._save(step)

    def _save_is_due(self, log: bool) -> bool:
        """On rank zero: whether minutes have passed, or a save that failed is to be tried again."""
        if self._ranks.rank != 0 or self._asked:  # the others hear of it a step later
            return False
        minutes = self._config.checkpoint.every_minutes
        late = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        self._asked = late or (log and self._unsaved)
        return self._asked

    def _save(self, step: int) -> None:
        scaler = self._ranks.scaler
        state = {
            "images": self._fingerprint,
            "meter": self._meter.state(self._ranks),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "wandb_id": self._wandb_id,
        }
        self._ranks.on_rank_zero(lambda: self._begin_to_save(step, state))
        if self.done(step):
            self._ranks.on_rank_zero(self._writing.finish)  # what cannot be saved now is lost, and that is an error
            if self._stopped and step < self._config.last_step:
                marker = json.dumps({"step": step}) + "\n"
                self._record("the preempted marker", lambda: self._folder.preempted.write_text(marker))

    def _begin_to_save(self, step: int, state: dict[str, Any]) -> None:
        """Copies what is to be saved, and has it written while training goes on; one checkpoint at a time."""
        self._settle()
        files = checkpoint.snapshot(networks=self._networks, optimizers=self._optimizers)
        config, shape, keep = self._config, self._shape, self._config.checkpoint

        def write() -> None:
            try:
                self._tracker.sync()
                checkpoint.save(self._folder.checkpoints, step, files, state)
                checkpoint.prune(self._folder.checkpoints, keep_last=keep.keep_last, keep_every=keep.keep_every)
                checkpoint.save_generator(self._folder.generator, files["average"], config.model, shape, step=step)
            except OSError as error:
                raise NotSavedError(
                    f"step {step} could not be saved in {self._folder.path} ({error.strerror})."
                ) from error

        self._writing.start(write)
        self._saved_at, self._unsaved, self._asked = time.monotonic(), False, False

    def _finish_writing(self) -> None:
        """Leaving with an error: the checkpoint that is being written is written, or it is said why not."""
        try:
            self._writing.finish()
        except StoppedError as error:
            print(f"distgan: warning: {error}", file=sys.stderr, flush=True)

    def _settle(self) -> None:
        """Waits for the checkpoint that is being written; if that failed, stops or has it tried again."""
        try:
            self._writing.finish()
        except NotSavedError as error:
            if self._config.checkpoint.on_error == "stop":
                raise
            self._unsaved = True
            self._warn(error)

    def _record(self, what: str, action: Callable[[], object]) -> None:
        """Collective: records something on rank zero; a full disk stops the run only if the user wants that."""

        def attempt() -> None:
            try:
                action()
            except OSError as error:
                said = f"{what} of step {self._step} could not be written in {self._folder.path} ({error.strerror})."
                if self._config.checkpoint.on_error == "stop":
                    raise NotSavedError(said) from error
                self._warn(said)

        self._ranks.on_rank_zero(attempt)

    def _warn(self, what: object) -> None:
        print(f"distgan: warning: {what} Training goes on; what was saved before is kept.", file=sys.stderr, flush=True)


def check(config: Config) -> None:
    """Prints what would run, and stops: no GPU or process group is touched, nothing written but the data's cache."""
    distributed.check(config.train)
    distributed.check_gpus()
    _, folder, images, shape, *networks, _ = _prepare(config)
    rank, world = distributed.launched_ranks()
    if rank != 0:
        return
    in_G, in_D = (sum(p.numel() for p in network.parameters()) for network in networks)
    buffers_G, buffers_D = (sum(b.numel() for b in network.buffers()) for network in networks)
    # Each network with Adam's two moments, and the average; everything in fp32.
    size = 4 * (3 * (in_G + in_D) + in_G + 2 * buffers_G + buffers_D)
    print(configuration.dump(config), end="")
    print(f"\nimages               {len(images.pixels):,} of {shape.image_size}x{shape.image_size}x{shape.channels}")
    print(f"processes            {world}, {config.train.batch_size // world} images each per update")
    print(f"parameters           {in_G:,} in the generator, {in_D:,} in the discriminator")
    print(f"checkpoint           about {size / 1e6:.1f} MB")
    print(f"run folder           {folder.path} ({'resumes' if folder.config.exists() else 'new'})")


class _Prepared(NamedTuple):
    """What is ready before any GPU or process group is touched."""

    loss: losses.Loss
    folder: RunFolder
    images: data.Images
    shape: models.Shape
    generator: Generator
    discriminator: nn.Module
    average: Average


def _prepare(config: Config, penalty: Penalty | None = None) -> _Prepared:
    """Finds whatever can be wrong; writes nothing but the prepared images in the cache."""
    loss = losses.build(config.loss.name)
    folder = RunFolder(config.run.dir)
    folder.check(config)
    images = data.load(config.data, batch_size=config.train.batch_size)
    shape = models.Shape(image_size=config.data.image_size, channels=images.channels)
    generator, discriminator = models.build(config.model, shape, seed=config.run.seed)
    if penalty is not None and models.has_batch_norm(discriminator):
        raise ValueError(
            "a gradient penalty cannot be combined with batch norm in the discriminator, where the gradient at one "
            "image depends on the others of its batch (Gulrajani et al. 2017, section 4): use a discriminator without."
        )
    if distributed.pieces(config.train) > 1 and any(map(models.has_batch_norm, (generator, discriminator))):
        raise ValueError(
            f"train.max_batch_per_device is {config.train.max_batch_per_device}, less than a rank's share of a batch, "
            "but batch norm's statistics would then be of each part alone: use more processes, a smaller batch or "
            "networks without batch norm."
        )
    average = Average(generator, half_life=config.ema.half_life, ramp=config.ema.ramp)
    if config.train.init_from is not None and checkpoint.newest(folder.checkpoints, set_aside=False) is None:
        networks = {"generator": generator, "discriminator": discriminator, "average": average.generator}
        checkpoint.load(_newest_of(config.train.init_from), networks=networks, optimizers={})
    return _Prepared(loss, folder, images, shape, generator, discriminator, average)


def _newest_of(path: str) -> Path:
    """The newest checkpoint of a run's folder, or the one that the path itself is."""
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
    (real, y), (z, fake_y) = batches.at(0, 0), latents.at(0, 0)
    with eval_mode(G), eval_mode(D):
        for logits_or_images in (D(real, y), G(z, fake_y)):
            logits_or_images.mean().backward()
    for network in (G, D):
        network.zero_grad(set_to_none=True)


def _where_things_lie(folder: RunFolder, step: int, config: Config) -> str:
    """The end of a run, for the user: each place, and the command to look at it."""
    done = "done" if step >= config.last_step else "stopped and saved; the same command goes on"
    lines = [f"{done}: step {step} of {max(step, config.last_step)}"]  # beyond it, once a run was extended
    pictures = sorted(folder.samples.glob("step_*.png"))
    if pictures:
        lines += [f"  sample grid   {pictures[-1]}", f"                see it: xdg-open {pictures[-1]}"]
    lines += [
        f"  checkpoints   {folder.checkpoints}",
        f"                list them: ls {folder.checkpoints}",
        f"  generator     {folder.generator}",
        f"                draw from it: distgan sample {folder.path} --num 64 --out grid.png",
        f"  metrics       {folder.metrics}",
        f"                the last line: tail -n 1 {folder.metrics}",
    ]
    for run in offline_wandb_runs(folder.path)[-1:]:
        lines += [f"  wandb         {run}", f"                browse it: wandb leet {run}; upload it: wandb sync {run}"]
    return "\n".join(lines)


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["train", *sys.argv[1:]]))
