"""Rehearses a step without arithmetic, on tensors without numbers, to say what memory it will need on a GPU."""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from distgan import models
from distgan.data import Images
from distgan.ema import Average
from distgan.models import ImageSpec
from distgan.objective import Objective
from distgan.recipe import Config
from distgan.run.algorithm import Step
from distgan.seeding import RunSeed

T = TypeVar("T")


@dataclass(frozen=True)
class Memory:
    """What one process of a run needs on a GPU, in bytes, without what CUDA and its libraries take for themselves."""

    weights: int
    """Of both networks and of the average, with their buffers."""
    moments: int
    """Adam's, of both networks."""
    gradients: int
    """Of the larger network, or, where DDP keeps both networks' in its buckets, of both."""
    images: int
    """The training images, if they are kept on the GPU."""
    graph: int
    """The most that activations, and all else that comes and goes within a step, need at once beside these."""

    @property
    def total(self) -> int:
        """Returns the most that is needed at once."""
        return self.weights + self.moments + self.gradients + self.images + self.graph


def memory(config: Config, images: Images, spec: ImageSpec, *, world: int) -> Memory:
    """Accounts for the memory of a step of rank zero of `world` ranks; computes nothing and allocates nothing."""
    share = replace(config.train, batch_size=config.train.batch_size // world)  # what one rank does by itself
    rehearsal = Rehearsal(replace(config, train=share), spec)
    with FakeTensorMode(), _Account() as account:
        blank = torch.zeros(images.pixels.shape, dtype=torch.uint8)
        labels = torch.zeros(images.labels.shape, dtype=torch.int64) if images.labels is not None else None
        blanks = replace(images, pixels=blank, labels=labels)
        step = rehearsal.begin(blanks, device=torch.device("cpu"))
        for _ in range(2):  # Adam's moments come with the first update; a lazy penalty is due at both
            step(0)
        networks = rehearsal.generator, rehearsal.discriminator
        kept = [*networks, rehearsal.average.generator]
        weights = sum(t.nbytes for network in kept for t in network.state_dict().values())
        gradients = [sum(p.nbytes for p in network.parameters() if p.requires_grad) for network in networks]
        kept_on_gpu = 0 if config.data.placement == "host" else blank.nbytes
        in_account = weights + 2 * sum(gradients) + max(gradients) + blank.nbytes
        return Memory(
            weights=weights,
            moments=2 * sum(gradients),
            gradients=sum(gradients) if world > 1 else max(gradients),
            images=kept_on_gpu,
            graph=account.most - in_account,
        )


class Rehearsal:
    """The networks of a run, for a step of one rank by itself where nothing is computed."""

    def __init__(self, config: Config, spec: ImageSpec) -> None:
        """Builds the networks and the average, with numbers."""
        self._config = config
        self.generator, self.discriminator = models.build(config.model, spec, seed=config.run.seed)
        if config.train.freeze_d:
            models.freeze(self.discriminator, config.train.freeze_d)
        self.average = Average(self.generator, config)

    def begin(self, images: Images, *, device: torch.device) -> Step:
        """Returns the step. Images may be without numbers, as everything else."""
        return Step(
            self._config,
            _OnlyRank(device, mixed=self._config.train.precision != "fp32"),
            images,
            RunSeed(self._config.run.seed),
            objective=Objective(self._config),
            generator=self.generator,
            discriminator=self.discriminator,
            average=self.average,
        )


class _OnlyRank:
    """A rank with nobody to talk to."""

    rank, world = 0, 1

    def __init__(self, device: torch.device, *, mixed: bool) -> None:
        self.device, self._mixed = device, mixed

    def place(self, *networks: nn.Module) -> None:
        """Takes all numbers out of the networks."""
        for network in networks:
            blank: Callable[[Tensor], Tensor] = partial(_blank, device=self.device)
            network._apply(blank)  # type: ignore[no-untyped-call]

    def wrap(self, *parts: Any) -> tuple[Any, ...]:
        return tuple(self._wrapped(part) if isinstance(part, nn.Module) else part for part in parts)

    def _wrapped(self, network: nn.Module) -> nn.Module:
        """Returns the network with bf16's autocast around its forward pass, as Accelerate's; fp16 needs as much."""
        return _Autocast(network) if self._mixed and self.device.type == "cpu" else network

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def synced(self, network: Any, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def in_full_precision(self, network: Any) -> Callable[..., Tensor]:
        return network.network if isinstance(network, _Autocast) else network

    def all_reduce_sums(self, sums: Iterable[Tensor]) -> None: ...

    def gather(self, value: T) -> list[T]:
        return [value]


def _blank(tensor: Tensor, *, device: torch.device) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


class _Autocast(nn.Module):
    """A network whose forward pass is in bf16 where autocast says so; its results are in fp32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.network(*inputs).float()


class _Account(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of all tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        """The most bytes at once so far."""
        self._now = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen[storage] = True
                self._now += storage.nbytes()
                self.most = max(self.most, self._now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, size: int) -> None:
        self._now -= size
