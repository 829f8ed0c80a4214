"""A tape in place of a CUDA graph, to show on a CPU that a captured step needs none of its Python code."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distgan.recipe import rules
from distgan.run import capture
from distgan.run.capture import Logged

FORBIDDEN = ("_local_scalar_dense", "nonzero", "equal", "masked_select")  # the host would wait, and a capture fail


class Tape(TorchDispatchMode):
    """Records ATen's operations with their tensors, and repeats them at the same places in memory.

    Recording does the work, too, because there is no other way on a CPU. So the first replay has nothing to do.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operations: list = []
        self.replays = 0

    @contextlib.contextmanager
    def warming(self) -> Iterator[None]:
        yield

    def record(self, work: Callable[[], Logged]) -> Logged:
        with self:
            return work()

    def replay(self) -> None:
        self.replays += 1
        if self.replays > 1:
            with torch.no_grad():
                for func, args, kwargs, out in self._operations:
                    _fill(out, func(*args, **kwargs))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in FORBIDDEN, func
        out = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, out))
        return out


def _fill(out: object, again: object) -> None:
    """Puts results where they were when they were recorded. Views, and what is changed in place, are there already."""
    old, new = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (out, again))
    for there, here in zip(old, new, strict=True):
        if there.untyped_storage().data_ptr() != here.untyped_storage().data_ptr():
            there.copy_(here)


def tape_for_graph() -> None:
    """Lets `train.compile=graph` run on a CPU, on a tape."""
    capture.RECORDER = Tape
    not_captured = rules._not_captured
    rules._not_captured = lambda config, **options: not_captured(config, **{**options, "on_gpu": True})
