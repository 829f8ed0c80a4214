"""The objective: each half of a step as a function of tensors that returns a loss and the values to log.

Nothing here knows of ranks or optimisers; of time it knows only `batch.update`. Means are over the images of a rank.
Ranks have equal shares, so that DDP's mean over ranks is the mean over the global batch.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from distgan.data import Batch
from distgan.objective import losses
from distgan.objective.augment import Augment
from distgan.objective.penalties import Penalties, penalised
from distgan.recipe import Config
from distgan.schedules import ramped

SIGN = "augment/sign_real"
"""The mean sign of the logits of real images: ADA's sign that D overfits (Karras et al. 2020, eq. 1, r_t)."""

Discriminator = Callable[[Tensor, Tensor | None], Tensor]
"""(images (N, C, H, W), labels (N,) or None) -> logits (N,)."""


class Terms(NamedTuple):
    """The results of one half of a step."""

    loss: Tensor
    """The scalar to minimise, for one backward pass: a second one would break DDP's reduction."""
    logged: dict[str, Tensor]
    """Detached scalars by their names in metrics.jsonl."""


class Objective:
    """The loss, the penalties and the augmentation of a run."""

    def __init__(self, config: Config) -> None:
        """Finds loss, penalties and augmentation by their names.

        Raises:
            UserError: one of them is unknown.
        """
        self.loss = losses.build(config.loss.name)
        self.augment = Augment(config.augment.names)
        weight, end = config.penalty.weight, config.ramp.penalty_weight
        self.penalties = Penalties(
            config.penalty,
            reuse=config.train.precision == "fp32" and config.train.compile != "inductor",
            ramp=ramped(config, weight, end) if weight is not None and end is not None else None,
        )
        self._adaptive = config.augment.adaptive

    @property
    def logged(self) -> tuple[str, ...]:
        """Returns the names of all values that the two halves log."""
        more = [*(["loss/penalty"] if self.penalties.weights else []), *([SIGN] if self._adaptive else [])]
        return ("loss/discriminator", "loss/generator", "score/real", "score/fake_before", "score/fake_after", *more)

    def discriminator(self, D: Discriminator, batch: Batch, fake: Tensor, *, plain_D: Discriminator) -> Terms:
        """Returns the discriminator's loss with the penalties that are due at this update.

        Args:
            D: the discriminator that learns.
            batch: real images, labels and draws.
            fake: the generator's images, (N, C, H, W), detached.
            plain_D: the same network without its wrapper, in full precision and not compiled, for penalties.
        """
        due = self.penalties.due(batch.update)
        # A penalty at real images or fakes can share the loss's forward pass. It then needs their gradients.
        real = batch.real.detach().requires_grad_(due.shares_pass_at("real"))
        fake = fake.requires_grad_(due.shares_pass_at("fake"))
        real_logits = D(self.augment(real, batch.draw, "real"), batch.y)
        fake_logits = D(self.augment(fake, batch.draw, "fake"), batch.y)
        loss = self.loss.discriminator(real_logits, fake_logits)

        def critic(images: Tensor, which: str) -> Tensor:
            """Augments and judges images: slopes are by the images before, as in StyleGAN2-ADA's and R3GAN's code."""
            return plain_D(self.augment(images, batch.draw, which), batch.y)

        penalty = penalised(due, critic, batch.draw, real=(real, real_logits), fake=(fake, fake_logits))
        logged = {
            "loss/discriminator": loss,
            "score/real": self.loss.score(real_logits),
            "score/fake_before": self.loss.score(fake_logits),
            **({"loss/penalty": penalty} if self.penalties.weights else {}),
            **({SIGN: real_logits.float().sign().mean()} if self._adaptive else {}),
        }
        return Terms(loss + penalty, _detached(logged))

    def generator(self, D: Discriminator, batch: Batch, fake: Tensor) -> Terms:
        """Returns the generator's loss. A paired loss also needs the logits of the real images.

        Args:
            D: the discriminator, whose weights need no gradients.
            batch: real images, labels and draws.
            fake: the generator's images, (N, C, H, W), through which gradients flow to it.
        """
        fake_logits = D(self.augment(fake, batch.draw, "generator"), batch.y)
        real_logits = D(self.augment(batch.real, batch.draw, "real"), batch.y) if self.loss.paired else None
        loss = self.loss.generator(fake_logits, real_logits)
        return Terms(loss, _detached({"loss/generator": loss, "score/fake_after": self.loss.score(fake_logits)}))


def _detached(scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: scalar.detach() for name, scalar in scalars.items()}
