"""Gradient penalties on the discriminator: each maps gradients of logits with respect to their images to a number.

A penalty is one `Penalty`; its name in `PENALTIES` is what `penalty.name` takes. All are added to the discriminator's
loss before the one backward pass, so that gradients cross the wire once, as without them: no penalty is a collective.

Costs are the FLOPs that a penalty adds to an update of the discriminator: D is a forward pass of the discriminator over
the images of one kind, D₁ and Dₙ those of its first and last layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distgan.errors import UserError, unknown_name
from distgan.objective.augment import Draw
from distgan.recipe import PenaltyConfig

Place = Literal["real", "fake", "between"]


@dataclass(frozen=True)
class Penalty:
    """A penalty on the slope of the discriminator."""

    at: Place
    """The images at which it takes the gradient: real ones, fakes, or images between the two of each pair."""
    of: Callable[[Tensor], Tensor]
    """Gradients (N, C, H, W), one for each image -> what each image adds, (N,)."""
    weight: float
    """The default of `penalty.weight`."""


def _squared_norm(gradient: Tensor) -> Tensor:
    return gradient.square().sum((1, 2, 3))


def _distance_of_norm_from_1(gradient: Tensor) -> Tensor:
    # The root's slope is infinite at 0, where a critic of constant logits begins.
    return ((_squared_norm(gradient) + 1e-12).sqrt() - 1).square()


PENALTIES: dict[str, Penalty] = {
    # WGAN-GP's (Gulrajani et al. 2017, eq. 3 and algorithm 1): E[(|grad l(x)| - 1)^2]. Each x lies on the line from a
    # fake to the real image of its place in the batch, a uniform number says where. It costs 6 D - 3 Dₙ: a forward
    # pass, the gradient, and the rest to differentiate that.
    "wgan_gp": Penalty("between", _distance_of_norm_from_1, 10.0),
    # R1 (Mescheder et al. 2018, eq. 9): E[|grad l(x)|^2] / 2 at the real images. It costs 3 D + D₁ - Dₙ, because it
    # shares the forward pass, and most of the backward pass, with the loss; in mixed precision, or if networks are
    # compiled, it has its own, as WGAN-GP's.
    "r1": Penalty("real", lambda gradient: _squared_norm(gradient) / 2, 10.0),
    # R2 (Mescheder et al. 2018, eq. 10): the same at the fakes, for the same cost.
    "r2": Penalty("fake", lambda gradient: _squared_norm(gradient) / 2, 10.0),
}


@dataclass(frozen=True)
class Due:
    """The penalties that are due at an update, and with what weight."""

    weights: Mapping[str, float]
    """By the penalty's name."""
    reuse: bool
    """Whether a penalty may differentiate the loss's own logits: not in mixed precision, nor if networks are compiled,
    because torch cannot differentiate those twice."""

    def shares_pass_at(self, place: Place) -> bool:
        """Tells whether one of them differentiates the loss's own logits of these images."""
        return self.reuse and any(PENALTIES[name].at == place for name in self.weights)


class Penalties:
    """The penalties of a run."""

    weights: dict[str, float]
    """The weight of each penalty, by its name; `due` multiplies it by `penalty.every`."""

    def __init__(self, config: PenaltyConfig, *, reuse: bool, ramp: Callable[[int], float] | None = None) -> None:
        """Finds the penalties by name.

        Args:
            config: the recipe's penalty group.
            reuse: whether a penalty may differentiate the loss's own logits, as `Due` says.
            ramp: the weight by step, if `ramp.penalty_weight` is set.

        Raises:
            UserError: a penalty is unknown.
        """
        for name in config.names:
            if name not in PENALTIES:
                raise UserError(unknown_name("penalty.name", name, [*PENALTIES]))
        self.weights = {
            name: PENALTIES[name].weight if config.weight is None else config.weight for name in config.names
        }
        self._every, self._reuse, self._ramp = config.every, reuse, ramp
        self.now: dict[str, float] = {}

    def set(self, step: int) -> None:
        """Sets the weights for the updates that follow this step, if they are ramped."""
        if self._ramp is not None:
            weight = self._ramp(step)
            self.weights, self.now = dict.fromkeys(self.weights, weight), {"ramp/penalty_weight": weight}

    def due(self, update: int) -> Due:
        """Returns what is due at an update of the discriminator, counted over the whole run."""
        if update % self._every:
            return Due({}, self._reuse)
        # A penalty at every n-th update gets n times the weight, so that its weight is the same on average (Karras et
        # al. 2020, StyleGAN2, appendix B. There the penalty has its own updates, with Adam slowed down; here it is
        # added to the loss of an update).
        return Due({name: self._every * weight for name, weight in self.weights.items()}, self._reuse)


def penalised(
    due: Due,
    critic: Callable[[Tensor, str], Tensor],
    draw: Draw,
    *,
    real: tuple[Tensor, Tensor],
    fake: tuple[Tensor, Tensor],
) -> Tensor:
    """Returns the weighted sum of the penalties that are due, a scalar that can be differentiated.

    Args:
        due: the penalties that are due, with their weights.
        critic: (images, which) -> logits, in full precision; `which` tells draws of augmentation from others.
        draw: uniform numbers for the images.
        real: real images (N, C, H, W) before augmentation, and the loss's logits of them (N,).
        fake: the same of the fakes.
    """
    total = real[0].new_zeros(())
    for name, weight in due.weights.items():
        penalty = PENALTIES[name]
        if penalty.at == "between":
            share = draw("penalty", 1)[:, :, None, None].to(real[0].dtype)
            images = torch.lerp(fake[0].detach(), real[0].detach(), share).requires_grad_(True)
            logits = critic(images, "penalty")
        else:
            images, logits = real if penalty.at == "real" else fake
            if not images.requires_grad:
                images = images.detach().requires_grad_(True)
                logits = critic(images, penalty.at)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        total = total + weight * penalty.of(gradient).mean()
    return total
