"""Exported generators that tests draw from, without a training."""

import torch
from torch import nn

from distgan.models import ARCHITECTURES, CHUNK, ImageSpec, build
from distgan.recipe import ModelConfig
from distgan.storage.exported import save_generator

NAMES = ("cat", "T-shirt/top", "big, red", "empty")


def exported(
    folder, *, architecture="dcgan", channels=3, names=(), width=8, latent_dim=16, discriminator=True, size=32
):
    """Untrained networks whose images differ much from each other, with orthogonal weights where they may have them."""
    config = ModelConfig(
        architecture=architecture,
        width=width,
        latent_dim=latent_dim,
        conditional=bool(names),
        init=ARCHITECTURES[architecture].inits[-1],
    )
    counts = tuple(0 if name == "empty" else 10 + i for i, name in enumerate(names))
    spec = ImageSpec(image_size=size, channels=channels, class_counts=counts, class_names=names)
    G, D = build(config, spec, seed=0)
    _settle(G, D)
    weights = D.state_dict() if discriminator else None
    save_generator(folder, G.state_dict(), config, spec, step=1, discriminator=weights)
    return folder


@torch.no_grad()
def _settle(G, D):
    """Gives batch norm the statistics of the networks' own images, as a training would."""
    norms = [layer for network in (G, D) for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over batches
    for network in (G, D):
        network.train()
    for first in range(0, 4 * CHUNK, CHUNK):
        z, y = G.inputs(first, seed=0, stream="settle")
        D(G(z, y), y)
    for network in (G, D):
        network.eval()
