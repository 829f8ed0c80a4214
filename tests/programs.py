"""What the tests' processes run: the real program, with networks, losses and faults that only tests need.

`launch` starts one process per rank, real ones over gloo, forked from a server that has imported torch once.
"""

import functools
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import sklearn.datasets  # noqa: F401  for the server: the digits' import takes as long as all of a tiny run
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from distgan import cli, data, losses, models, train
from distgan.models import Architecture, Generator

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["programs"])
# The server finds this module by PYTHONPATH alone; without it every rank would import torch anew.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


def launch(
    argv: Sequence[str],
    *,
    world: int = 1,
    setups: Sequence[Callable[[], None]] = (),
    log: Path | None = None,
    timeout: float = 120,
) -> list[int]:
    """Runs `distgan train ARGV` on `world` ranks and returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        _processes.Process(target=_rank, args=(rank, world, port, list(argv), list(setups), log), daemon=True)
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout)
        if rank.is_alive():
            rank.kill()
            rank.join()
    return [rank.exitcode if rank.exitcode is not None else -1 for rank in ranks]


def _rank(
    rank: int, world: int, port: int, argv: list[str], setups: list[Callable[[], None]], log: Path | None
) -> None:
    if log is not None:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["OMP_NUM_THREADS"] = "1"
    for setup in setups:
        setup()
    sys.exit(cli.main(["train", *argv]))


# Networks and objectives from outside the package ---------------------------------------------------------------------


class PlainGenerator(Generator):
    """latents -> (N, channels, 32, 32), without batch norm."""

    def __init__(self, *, channels: int, width: int, latent_dim: int) -> None:
        super().__init__(latent_dim=latent_dim)
        self.main = nn.Sequential(
            nn.Linear(latent_dim, width * 64),
            nn.Unflatten(1, (width, 8, 8)),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(width, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(width, channels, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return self.main(z)


class PlainDiscriminator(nn.Module):
    """(N, channels, 32, 32) -> logits (N,), without batch norm."""

    def __init__(self, *, channels: int, width: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(width * 64, 1),
        )

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.main(x).flatten()


@torch.no_grad()
def he_scaled(network: nn.Module, rng: torch.Generator) -> None:
    """Weights that keep activations at their size, so that a difference anywhere reaches the losses."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, a=0.2, generator=rng)
            layer.bias.zero_()


def plain_networks() -> None:
    models.ARCHITECTURES["plain"] = Architecture(
        generator=lambda model, shape: PlainGenerator(
            channels=shape.channels, width=model.width, latent_dim=model.latent_dim
        ),
        discriminator=lambda model, shape: PlainDiscriminator(channels=shape.channels, width=model.width),
        initialise=he_scaled,
    )


def float64() -> None:
    torch.set_default_dtype(torch.float64)


class Paired(losses.NonSaturating):
    """The relativistic paired loss (Jolicoeur-Martineau 2018): a loss whose generator needs D(real)."""

    paired = True

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return softplus(fake_logits - real_logits).mean()

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        assert real_logits is not None
        return softplus(real_logits - fake_logits).mean()


class R1:
    """R1 (Mescheder et al. 2018, eq. 9), reusing D(real)'s graph."""

    on_real = True

    def __call__(
        self, discriminator: nn.Module, real: Tensor, real_logits: Tensor, fake: Tensor, y: Tensor | None
    ) -> Tensor:
        (gradient,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
        return 0.5 * gradient.square().sum((1, 2, 3)).mean()


def paired_loss() -> None:
    losses.LOSSES["paired"] = Paired


def r1() -> None:
    train.train = functools.partial(train.train, penalty=R1())


# Faults ---------------------------------------------------------------------------------------------------------------


def same_images_on_all_ranks() -> None:
    data.Batches = _with_first_share(data.Batches)


def same_latents_on_all_ranks() -> None:
    data.Latents = _with_first_share(data.Latents)


def _with_first_share(feed: type) -> Callable:
    def make(*args: object, share: slice, **kwargs: object) -> object:
        return feed(*args, share=slice(0, share.stop - share.start), **kwargs)

    return make


def unsettled_buckets() -> None:
    train.distributed.settle_gradient_buckets = lambda passes: None
