"""Spectral norm of a network's weights (Miyato et al. 2018), with one power iteration per update.

torch's own iterates at every forward pass in training, of which an update has several; then accumulation, R1 or a
paired loss would change the weights' course, and it draws its vectors from global random state.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, register_parametrization

_START = 15  # power iterations on the starting weights, as torch's own does


class SpectralNorm(nn.Module):
    """W -> W / s with s = u^T W v, where u and v estimate the first singular vectors of W as a matrix.

    They are buffers, and the gradient treats them as constants (section 2.1 and appendix A). For any number of images,
    a pass of the network costs 2 (|W| + |v|) FLOPs for s, a backward pass that computes W's gradient as many again, and
    each update 4 |W|. Nothing is sent between ranks: they have the same weights, and so the same vectors.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, rng: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.register_buffer("u", _normalised(torch.empty(rows, dtype=weight.dtype).normal_(generator=rng)))
        self.register_buffer("v", torch.zeros(columns, dtype=weight.dtype))
        for _ in range(_START):
            self.iterate(weight)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            sigma = self.u[None] @ weight.flatten(1) @ self.v[:, None]
            return weight / sigma.squeeze()

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """Makes one power iteration (algorithm 1)."""
        matrix = weight.flatten(1)
        self.v.copy_(_normalised((self.u[None] @ matrix).flatten()))
        self.u.copy_(_normalised((matrix @ self.v[:, None]).flatten()))


def apply_spectral_norm(network: nn.Module, rng: torch.Generator, *, embeddings: bool) -> None:
    """Normalises every convolution and linear layer of a network whose starting weights are drawn.

    Args:
        network: the network.
        rng: draws the vectors.
        embeddings: whether embeddings are normalised, too.
    """
    for layer in list(network.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear) or (embeddings and isinstance(layer, nn.Embedding)):
            register_parametrization(layer, "weight", SpectralNorm(layer.weight.detach(), rng))


def iterate(network: nn.Module) -> None:
    """Updates the vectors after the weights were updated, except those of weights that are frozen in a training."""
    in_training = any(parameter.requires_grad for parameter in network.parameters())
    for part in network.modules():
        if isinstance(part, ParametrizationList) and isinstance(part[0], SpectralNorm):
            if in_training and not part.original.requires_grad:
                continue
            part[0].iterate(part.original)


def _normalised(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp(min=1e-12)
