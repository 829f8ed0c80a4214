"""Gradient penalties on the discriminator: critic and images in, scalar out.

A penalty is an object with the members of `Penalty`; its name in `PENALTIES` is what `penalty.name` takes. It is added
to the discriminator's loss before the one backward pass, so that gradients cross the wire once, as without it: no
penalty is a collective. Costs are FLOPs that an update of the discriminator has more: D is a forward pass of the
discriminator over the images of one kind, D₁ and Dₙ those of its first and last layer. They are of a last layer that
is linear; a convolution costs Dₙ more, because PyTorch differentiates it with respect to more than is needed.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from distgan.augment import Augment, Draw
from distgan.config import PenaltyConfig, unknown_name


class Critic(NamedTuple):
    """The discriminator as a penalty sees it: images (N, C, H, W) -> logits (N,), augmentation included.

    Slopes are with respect to images as they were before it (as in StyleGAN2-ADA's and R3GAN's code).
    """

    discriminator: Callable[[Tensor, Tensor | None], Tensor]
    """(images, labels) -> logits, without its wrapper and in full precision."""
    augment: Augment
    draw: Draw
    y: Tensor | None
    """The labels of real images and fakes alike."""

    def __call__(self, images: Tensor, which: str) -> Tensor:
        """The logits of images; `which` tells draws of augmentation from others, as for `Augment`."""
        return self.discriminator(self.augment(images, self.draw, which), self.y)


class Given(NamedTuple):
    """What a penalty is computed from. Images are (N, C, H, W), before augmentation; logits (N,)."""

    critic: Critic
    real: Tensor
    real_logits: Tensor
    """Of the loss; they depend on `real`, if the penalty's `on_real` asks for that and the network is not in mixed
    precision."""
    fake: Tensor
    fake_logits: Tensor
    """The same, for `fake` and `on_fake`."""


class Penalty(Protocol):
    """What the loop asks of a penalty."""

    weight: float
    """Its weight if `penalty.weight` is unset."""
    on_real: bool
    """Whether it differentiates `real_logits` with respect to `real`."""
    on_fake: bool
    """The same for the fakes."""

    def __call__(self, given: Given) -> Tensor:
        """A scalar."""


class GradientPenalty:
    """WGAN-GP's (Gulrajani et al. 2017, eq. 3 and algorithm 1): E[(|grad l(x)| - 1)^2] between real images and fakes.

    Each x lies on the line from a fake to the real image of its place in the batch, a uniform number says where. It
    costs 6 D - 3 Dₙ: a forward pass, the gradient, and the rest to differentiate that.
    """

    weight = 10.0
    on_real = on_fake = False

    def __call__(self, given: Given) -> Tensor:
        share = given.critic.draw("penalty", 1)[:, :, None, None].to(given.real.dtype)
        between = torch.lerp(given.fake.detach(), given.real.detach(), share).requires_grad_(True)
        # The root's slope is infinite at 0, where a critic of constant logits begins.
        slope = (_squared_slope(given.critic(between, "penalty"), between) + 1e-12).sqrt()
        return (slope - 1).square().mean()


class R1:
    """R1 (Mescheder et al. 2018, eq. 9): E[|grad l(x)|^2] / 2 at the real images.

    It costs 3 D + D₁ - Dₙ, because it shares the forward pass, and most of the backward pass, with the loss; in mixed
    precision it has its own, as WGAN-GP's.
    """

    weight = 10.0
    on_real, on_fake = True, False

    def __call__(self, given: Given) -> Tensor:
        return _squared_slope_at(given, given.real, given.real_logits, "real").mean() / 2


class R2:
    """R2 (Mescheder et al. 2018, eq. 10): the same at the fakes, for the same cost."""

    weight = 10.0
    on_real, on_fake = False, True

    def __call__(self, given: Given) -> Tensor:
        return _squared_slope_at(given, given.fake, given.fake_logits, "fake").mean() / 2


PENALTIES: dict[str, Callable[[], Penalty]] = {"wgan_gp": GradientPenalty, "r1": R1, "r2": R2}


class Penalties:
    """The penalties of a run: which are due at an update, and with what weight."""

    def __init__(self, config: PenaltyConfig, *, mixed_precision: bool) -> None:
        """Finds the penalties by name.

        Args:
            config: which penalties, how heavy, how often.
            mixed_precision: whether the loss's logits are computed in bf16 or fp16.

        Raises:
            ValueError: a penalty is unknown.
        """
        for name in config.names:
            if name not in PENALTIES:
                raise ValueError(unknown_name("penalty.name", name, [*PENALTIES]))
        penalties = [PENALTIES[name]() for name in config.names]
        # At every n-th update n times as heavy, so that it weighs the same on the whole (Karras et al. 2020,
        # StyleGAN2, appendix B; there it has updates of its own, for which Adam is slowed, here it shares those of the
        # loss).
        self._all = _Weighted(
            {
                penalty: config.every * (penalty.weight if config.weight is None else config.weight)
                for penalty in penalties
            },
            reuse=not mixed_precision,
        )
        self._none = _Weighted({}, reuse=False)
        self._every = config.every

    def at(self, update: int) -> "_Weighted":
        """Returns what is due at an update of the discriminator, counted over the whole run."""
        return self._none if update % self._every else self._all


class _Weighted:
    """A weighted sum of penalties."""

    def __init__(self, weights: Mapping[Penalty, float], *, reuse: bool) -> None:
        self._weights = weights
        self.on_real = reuse and any(penalty.on_real for penalty in weights)
        self.on_fake = reuse and any(penalty.on_fake for penalty in weights)

    def __call__(self, given: Given) -> Tensor:
        nothing = given.real.new_zeros(())
        return sum((weight * penalty(given) for penalty, weight in self._weights.items()), nothing)


def _squared_slope_at(given: Given, images: Tensor, logits: Tensor, which: str) -> Tensor:
    """Returns the squared slope, (N,), from the loss's own graph if that leads to the images."""
    if not images.requires_grad:
        images = images.detach().requires_grad_(True)
        logits = given.critic(images, which)
    return _squared_slope(logits, images)


def _squared_slope(logits: Tensor, images: Tensor) -> Tensor:
    """Returns the squared norm of each logit's gradient with respect to its image, (N,), differentiable itself."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3))
