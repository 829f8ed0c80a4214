"""Adversarial losses: logits in, scalar out, nothing else.

A loss is an object with the members of `Loss`; its name in `LOSSES` is what `loss.name` takes. Means are over the
images of a rank; ranks have equal shares, so that DDP's mean over ranks is the mean over the global batch. A loss needs
no FLOPs worth counting, and sends nothing. A paired one costs one more forward pass of the discriminator in the
generator's step, whose gradient is not computed; batch norm that is synchronised then has one more gather per layer.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from distgan.errors import UserError, nearest


class Loss(Protocol):
    """What the loop asks of a loss. Logits are (N,)."""

    paired: bool
    """Whether the generator's loss needs the logits of real images too."""

    probability: bool
    """Whether `score` is a probability, D(x). If not, the guard cannot see that D recognises every fake, and a rollback
    after a collapse halves both learning rates, because no score shows which network is winning."""

    needs_lipschitz: bool
    """Whether the discriminator's loss has no lower bound, so that something must bound the slope of its logits."""

    zero_decides: bool
    """Whether a logit above 0 says that an image is real. If not, `augment.probability` cannot be adapted."""

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Returns the discriminator's loss, a scalar."""

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None) -> Tensor:
        """Returns the generator's loss, a scalar; `real_logits` are given exactly if the loss is paired."""

    def score(self, logits: Tensor) -> Tensor:
        """Returns the mean verdict on these images, for the log, a scalar."""


class NonSaturating:
    """The non-saturating GAN loss (Goodfellow et al., 2014, section 3).

    L_D = -E[log D(x)] - E[log(1 - D(G(z)))] and L_G = -E[log D(G(z))], where D is the sigmoid of the logits l:
    -log sigmoid(l) = softplus(-l), which neither overflows nor loses digits.
    """

    paired = False
    probability = True
    needs_lipschitz = False
    zero_decides = True

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return softplus(-_wide(real_logits)).mean() + softplus(_wide(fake_logits)).mean()

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return softplus(-_wide(fake_logits)).mean()

    def score(self, logits: Tensor) -> Tensor:
        """Returns the mean of D(x), in [0, 1]."""
        return torch.sigmoid(_wide(logits)).mean()


class _ByLogits:
    """Base of losses whose score is the mean logit. By default they are unpaired, need no bound on the slope, and their
    logits have no meaning of their own.
    """

    paired = False
    probability = False
    needs_lipschitz = False
    zero_decides = False

    def score(self, logits: Tensor) -> Tensor:
        """Returns the mean logit."""
        return _wide(logits).mean()


class LeastSquares(_ByLogits):
    """LSGAN (Mao et al. 2017, eq. 9): fakes to 0, real images to 1, and G wants its own at 1.

    L_D = E[(l(x) - 1)^2] / 2 + E[l(G(z))^2] / 2 and L_G = E[(l(G(z)) - 1)^2] / 2.
    """

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return 0.5 * (_wide(real_logits) - 1).square().mean() + 0.5 * _wide(fake_logits).square().mean()

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return 0.5 * (_wide(fake_logits) - 1).square().mean()


class Wasserstein(_ByLogits):
    """WGAN (Arjovsky et al. 2017, eq. 2 and algorithm 1): L_D = E[l(G(z))] - E[l(x)] and L_G = -E[l(G(z))].

    `score/real` less `score/fake_before` is the critic's estimate of the distance, up to its Lipschitz constant.
    """

    needs_lipschitz = True

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return _wide(fake_logits).mean() - _wide(real_logits).mean()

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return -_wide(fake_logits).mean()


class Hinge(_ByLogits):
    """The hinge loss (Lim and Ye 2017, eq. 7 and 8; Miyato et al. 2018, eq. 16 and 17).

    L_D = E[max(0, 1 - l(x))] + E[max(0, 1 + l(G(z)))] and L_G = -E[l(G(z))].
    """

    zero_decides = True

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return relu(1 - _wide(real_logits)).mean() + relu(1 + _wide(fake_logits)).mean()

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return -_wide(fake_logits).mean()


class Relativistic(_ByLogits):
    """The relativistic paired loss (Jolicoeur-Martineau 2018, section 4.1; Huang et al. 2024, R3GAN, eq. 2).

    L_D = -E[log sigmoid(l(x) - l(G(z)))] and L_G = -E[log sigmoid(l(G(z)) - l(x))], over pairs of a real image and a
    fake of the same place in the batch, and so of the same class.
    """

    paired = True

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return softplus(_wide(fake_logits) - _wide(real_logits)).mean()

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None) -> Tensor:
        assert real_logits is not None
        return softplus(_wide(real_logits) - _wide(fake_logits)).mean()


LOSSES: dict[str, type[Loss]] = {
    "non_saturating": NonSaturating,
    "least_squares": LeastSquares,
    "wasserstein": Wasserstein,
    "hinge": Hinge,
    "relativistic": Relativistic,
}


def build(name: str) -> Loss:
    """Returns the loss of that name.

    Raises:
        UserError: there is none.
    """
    if name not in LOSSES:
        raise UserError(f'loss.name is "{name}", which is unknown: {nearest(name, list(LOSSES))}')
    return LOSSES[name]()


def _wide(logits: Tensor) -> Tensor:
    """Converts to at least float32, whatever precision the network ran in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
