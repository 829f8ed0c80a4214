"""Gradient penalties: critic and images in, scalar out. None is built in yet; the loop has their place."""

from typing import Protocol

from torch import Tensor, nn


class Penalty(Protocol):
    """What the loop asks of a penalty. Images are (N, C, H, W) in [-1, 1], logits (N,)."""

    on_real: bool
    """Whether it differentiates with respect to the real images, so that `real_logits` must depend on them."""

    on_fake: bool
    """The same for the fakes and `fake_logits`."""

    def __call__(
        self,
        discriminator: nn.Module,
        real: Tensor,
        y: Tensor | None,
        real_logits: Tensor,
        fake: Tensor,
        fake_y: Tensor | None,
        fake_logits: Tensor,
    ) -> Tensor:
        """What is added to the discriminator's loss, a scalar; `discriminator` is the network without its wrapper."""
