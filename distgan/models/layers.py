"""What every architecture shares: the generator's interface, and modes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distgan import seeding

CHUNK = 64  # images per forward pass of a drawing generator: fixed and always full, so that no rounding depends on n


class Generator(nn.Module):
    """Base of all generators: latents (N, latent_dim) -> images (N, channels, image_size, image_size) in [-1, 1].

    A subclass defines `forward(z, y=None)`.
    """

    def __init__(self, *, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def sample(self, n: int, *, seed: int = 0) -> Tensor:
        """Draws n images: uint8 (n, C, H, W) on the CPU.

        Image i is a function of (seed, i) alone: `sample(64)` is the beginning of `sample(1000)`. It runs in eval mode
        and changes no random state.

        Raises:
            ValueError: n is not positive.
        """
        if n < 1:
            raise ValueError(f"the number of samples is {n}, but must be at least 1.")
        return torch.cat([self.draw(first, seed=seed) for first in range(0, n, CHUNK)])[:n]

    def draw(self, first: int, *, seed: int, stream: str = "sample") -> Tensor:
        """Images first ... first + CHUNK - 1 of a stream of draws: uint8 (CHUNK, C, H, W) on the CPU."""
        images = self.images(first, seed=seed, stream=stream)
        return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

    @torch.no_grad()
    def images(self, first: int, *, seed: int, stream: str = "sample") -> Tensor:
        """The same as the network gives them: (CHUNK, C, H, W) in [-1, 1] where it lies."""
        parameter = next(self.parameters())
        z = seeding.latents_by_index(seed, stream, first, CHUNK, dim=self.latent_dim)
        with eval_mode(self):
            return self(z.to(parameter.device, parameter.dtype))


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode, and each part back into its own after."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Computes no gradients for a module's parameters; those for its inputs still flow through it."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
