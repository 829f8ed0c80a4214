"""One step of training, the algorithm: the discriminator learns first, then the generator."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distgan import data, models
from distgan.data import Images
from distgan.ema import Average
from distgan.models import Generator, eval_mode, frozen
from distgan.objective import Objective
from distgan.parallel.ranks import Wrapping, settle_gradient_buckets, without_autocast
from distgan.recipe import Config
from distgan.recipe.rules import StepsRun
from distgan.run.adaptation import Adaptation
from distgan.run.capture import Captured, Logged, StillFeed
from distgan.run.compilation import compiled
from distgan.run.meter import Meter
from distgan.schedules import Beta2, Rates, Schedules
from distgan.seeding import RunSeed


class Step:
    """Both networks and both optimisers, wrapped for the ranks, and what one step does with them. Collective."""

    adams: dict[str, torch.optim.Adam]
    """The optimisers by their network's name, `generator` and `discriminator`, unwrapped."""
    rates: Rates
    """Their learning rates."""
    schedules: Schedules
    """All that changes in the course of a run, including the learning rates."""
    adaptation: Adaptation
    """The probability of augmentation."""
    meter: Meter
    """The values to log."""

    def __init__(
        self,
        config: Config,
        ranks: Wrapping,
        images: Images,
        seed: RunSeed,
        *,
        objective: Objective,
        generator: Generator,
        discriminator: nn.Module,
        average: Average,
        steps_run: StepsRun = "off",
    ) -> None:
        """Moves the images to where `data.placement` keeps them, and the networks to the device. Wraps the networks.

        Args:
            config: the run's recipe.
            ranks: the ranks, joined.
            images: all training images.
            seed: the seed of everything that is drawn.
            objective: losses, penalties and augmentation.
            generator: the generator that learns.
            discriminator: the discriminator that learns.
            average: takes in the generator's weights after each step.
            steps_run: `train.compile`, resolved.
        """
        self._d_steps, self._clip = config.train.d_steps, config.optim.clip_weights
        self._ranks, self._objective, self._average = ranks, objective, average
        self._raw_G, self._raw_D = generator, discriminator
        captured = steps_run == "graph"
        feed = _feed(config, ranks, images, seed)
        self._feed: data.Feed | StillFeed = feed
        self._make_updates: Callable[[int], Logged] = self._updates
        if captured:
            self._feed = still = StillFeed(feed, d_steps=self._d_steps)
            self._make_updates = Captured(self._updates, still)
        self.adaptation, self.meter = Adaptation(config, objective.augment, ranks), Meter(objective.logged, ranks)

        ranks.place(generator, discriminator, mixed=True)
        ranks.place(average.generator, mixed=False)
        if ranks.world > 1 and config.model.sync_batchnorm:
            models.synchronise(generator)
            models.synchronise(discriminator)
        adam_G, adam_D = (_adam(one, config, ranks.device, captured=captured) for one in (generator, discriminator))
        self.adams = {"generator": adam_G, "discriminator": adam_D}
        G, D = (compiled(generator), compiled(discriminator)) if steps_run == "inductor" else (generator, discriminator)
        self._G, self._D, self._opt_G, self._opt_D = ranks.wrap(G, D, adam_G, adam_D)
        self._D_without_ddp, self._plain_D = D, without_autocast(discriminator)
        self.rates = Rates.of(config, self.adams)
        self.schedules = Schedules(self.rates, Beta2(config, self.adams), average, objective.penalties, self.adaptation)
        if ranks.world > 1:
            settle_gradient_buckets(self._throwaway_passes)

    def __call__(self, step: int) -> None:
        """Makes `train.d_steps` updates of the discriminator and one of the generator."""
        self.schedules.set(step)
        for logged, weight in self._make_updates(step):
            self.meter.add(logged, weight)
            self.adaptation.add(logged, weight)
        self._average.update(self._raw_G)

    def _updates(self, step: int) -> Logged:
        """Makes a step's updates, and returns what they log. Where steps are captured, most do not run this code."""
        G, D, opt_G, opt_D, raw_D = self._G, self._D, self._opt_G, self._opt_D, self._raw_D
        feed, objective, ranks, logged = self._feed, self._objective, self._ranks, Logged()

        # The discriminator: d_steps updates, each on other images.
        for k in range(self._d_steps):
            for batch in feed.for_discriminator(step, k):
                with torch.set_grad_enabled(batch.shared):  # a graph of G only if G learns from these fakes
                    fake: Tensor = G(batch.z, batch.y)
                with ranks.synced(D, last=batch.last):
                    terms = objective.discriminator(D, batch, fake.detach(), plain_D=self._plain_D)
                    ranks.backward(terms.loss * batch.weight)  # only one: a second breaks DDP's reduction
                logged.append((terms.logged, batch.weight))
            opt_D.step()
            opt_D.zero_grad()
            models.constrain(raw_D, clip=self._clip)

        # The generator: one update, on D's last batch or its own. D's weights get no gradients, so none are sent.
        with frozen(raw_D):
            for batch in feed.for_generator(step):
                with ranks.synced(G, last=batch.last):
                    fake = fake if batch.shared else G(batch.z, batch.y)
                    terms = objective.generator(self._D_without_ddp, batch, fake)
                    ranks.backward(terms.loss * batch.weight)
                logged.append((terms.logged, batch.weight))
            opt_G.step()
            opt_G.zero_grad()
            models.constrain(self._raw_G)
        return logged

    def _throwaway_passes(self) -> None:
        """Runs one backward pass through each network without a trace: statistics stay, gradients are dropped."""
        batch = next(self._feed.for_discriminator(0, 0))
        with eval_mode(self._G), eval_mode(self._D):
            for logits_or_images in (self._D(batch.real, batch.y), self._G(batch.z, batch.y)):
                logits_or_images.mean().backward()
        for network in (self._G, self._D):
            network.zero_grad(set_to_none=True)


def _feed(config: Config, ranks: Wrapping, images: Images, seed: RunSeed) -> data.Feed:
    train = config.train
    return data.Feed(
        images,
        config.data,
        labels=config.model.conditional,
        latent_dim=config.model.latent_dim,
        seed=seed,
        batch_size=train.batch_size,
        d_steps=train.d_steps,
        g_batch=train.g_batch,
        shares=data.shares(train.batch_size, rank=ranks.rank, world=ranks.world, most=train.max_batch_per_device),
        device=ranks.device,
    )


def _adam(network: nn.Module, config: Config, device: torch.device, *, captured: bool) -> torch.optim.Adam:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    lr: float | Tensor = config.optim.lr
    if captured or device.type == "cuda":  # on every GPU, so that with and without a graph it is rounded alike, to fp32
        lr = torch.tensor(lr, dtype=torch.float32, device=device)
    return torch.optim.Adam(trained, lr=lr, betas=config.optim.betas, fused=True, capturable=captured)
