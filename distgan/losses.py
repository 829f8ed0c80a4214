"""Adversarial losses: logits in, scalar out, nothing else.

A loss is an object with the members of `Loss`; its name in `LOSSES` is what `loss.name` takes. Means are over the
images of a rank; ranks have equal shares, so that DDP's mean over ranks is the mean over the global batch.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from distgan.config import nearest


class Loss(Protocol):
    """What the loop asks of a loss. Logits are (N,)."""

    paired: bool
    """Whether the generator's loss needs the logits of real images too."""

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The discriminator's loss, a scalar."""

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None) -> Tensor:
        """The generator's loss, a scalar; `real_logits` are given exactly where the loss is paired."""

    def score(self, logits: Tensor) -> Tensor:
        """The mean verdict on these images, for the log, a scalar."""


class NonSaturating:
    """The non-saturating GAN loss (Goodfellow et al., 2014, section 3).

    L_D = -E[log D(x)] - E[log(1 - D(G(z)))] and L_G = -E[log D(G(z))], where D is the sigmoid of the logits l:
    -log sigmoid(l) = softplus(-l), which neither overflows nor loses digits.
    """

    paired = False

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return softplus(-_wide(real_logits)).mean() + softplus(_wide(fake_logits)).mean()

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return softplus(-_wide(fake_logits)).mean()

    def score(self, logits: Tensor) -> Tensor:
        """The mean of D(x), in [0, 1]."""
        return torch.sigmoid(_wide(logits)).mean()


LOSSES: dict[str, type[Loss]] = {"non_saturating": NonSaturating}


def build(name: str) -> Loss:
    """The loss of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in LOSSES:
        raise ValueError(f'loss.name is "{name}", which is unknown: {nearest(name, list(LOSSES))}')
    return LOSSES[name]()


def _wide(logits: Tensor) -> Tensor:
    """At least float32, whatever precision the network ran in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
