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

from distgan.data import Images
from distgan.ema import Average
from distgan.models import Generator
from distgan.objective import Objective
from distgan.recipe import Config
from distgan.recipe.rules import StepsRun
from distgan.run.algorithm import Step
from distgan.seeding import RunSeed

T = TypeVar("T")


@dataclass(frozen=True)
class Memory:
    """What a training step of one process needs on a GPU, in bytes, without what CUDA and its libraries take.

    It has not been compared with a GPU yet. In mixed precision on several GPUs, copies in fp32 of the maps that batch
    norm normalises come on top.
    """

    weights: int
    """Of both networks and of the average, with their buffers."""
    moments: int
    """Adam's, of both networks."""
    gradients: int
    """Of the larger network; of both if there are several processes, because DDP keeps both."""
    activations: int
    """The most that activations, and all else that comes and goes within a step, need at once beside these."""
    images: int
    """The training images, if `data.placement` keeps them on the GPU, or if it may: `auto` does where they fit."""


def memory(
    config: Config, images: Images, *, world: int, generator: Generator, discriminator: nn.Module, average: Average
) -> Memory:
    """Accounts for the memory of a step of one of `world` ranks. Computes nothing, and takes all numbers out of the
    networks."""
    share = replace(config.train, batch_size=config.train.batch_size // world)  # what one rank does by itself
    alone = replace(config, train=share, data=replace(config.data, placement="auto"))
    with FakeTensorMode(), _Account() as account:
        blanks = replace(
            images,
            pixels=torch.zeros(1, dtype=torch.uint8).expand(images.pixels.shape),
            labels=torch.zeros(1, dtype=torch.int64).expand(len(images.pixels)) if images.labels is not None else None,
        )
        step = rehearsed(
            alone,
            blanks,
            generator=generator,
            discriminator=discriminator,
            average=average,
            device=torch.device("cpu"),
        )
        for _ in range(2):  # Adam's moments come with the first update; a lazy penalty is due at both
            step(0)
        kept = [generator, discriminator, average.generator]
        weights = sum(t.nbytes for network in kept for t in network.state_dict().values())
        gradients = [sum(p.nbytes for p in network.parameters() if p.requires_grad) for network in kept[:2]]
        return Memory(
            weights=weights,
            moments=2 * sum(gradients),
            gradients=sum(gradients) if world > 1 else max(gradients),
            activations=account.most - weights - 2 * sum(gradients) - max(gradients),
            images=images.pixels.nbytes if config.data.placement in ("device", "auto") else 0,
        )


def rehearsed(
    config: Config,
    images: Images,
    *,
    generator: Generator,
    discriminator: nn.Module,
    average: Average,
    device: torch.device,
    steps_run: StepsRun = "off",
) -> Step:
    """Returns a run's step for one rank by itself, on a device without arithmetic; images may be without numbers."""
    return Step(
        config,
        _OnlyRank(device, mixed=config.train.precision != "fp32"),
        images,
        RunSeed(config.run.seed),
        objective=Objective(config),
        generator=generator,
        discriminator=discriminator,
        average=average,
        steps_run=steps_run,
    )


class _OnlyRank:
    """A rank with nobody to talk to."""

    rank, world = 0, 1

    def __init__(self, device: torch.device, *, mixed: bool) -> None:
        self.device, self._mixed = device, mixed

    def place(self, *networks: nn.Module, mixed: bool) -> None:
        """Takes all numbers out of the networks."""
        for network in networks:
            blank: Callable[[Tensor], Tensor] = partial(_blank, device=self.device)
            network._apply(blank)  # type: ignore[no-untyped-call]

    def wrap(self, *parts: Any) -> tuple[Any, ...]:
        """Wraps bf16's autocast around the networks' forward passes, as Accelerate does; fp16 needs as much."""
        for part in parts:
            if isinstance(part, nn.Module) and self._mixed:
                part.forward = partial(_in_bf16, part.forward)
        return parts

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def synced(self, network: Any, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def all_reduce_sums(self, sums: Iterable[Tensor]) -> None: ...

    def gather(self, value: T) -> list[T]:
        return [value]


def _in_bf16(forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return forward(*inputs).float()


def _blank(tensor: Tensor, *, device: torch.device) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


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
