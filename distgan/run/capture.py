"""Captures all updates of a step as one CUDA graph, so that later steps need no Python and one launch.

A graph repeats kernels at the addresses that they were captured with. So everything that changes from step to step must
be a tensor that stays where it is: images, labels, latents and draws (`StillFeed`), learning rates (`schedules.Rates`)
and the probability of augmentation. `rules.why_not_captured` refuses what changes as a Python number.

This has not run on a GPU yet. In the tests, a tape of ATen's operations on the CPU takes the graph's place.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from distgan.data import Batch, Feed

Logged = list[tuple[Mapping[str, Tensor], float]]
"""What updates log: detached scalars by name, with the weight of their part in the batch."""

WARM = 3  # steps without a graph, in which libraries, optimisers and the feed make what they keep


class Recorder(Protocol):
    """Repeats work without its Python code."""

    def warming(self) -> AbstractContextManager[None]:
        """Wraps the work of the steps before `record`."""

    def record(self, work: Callable[[], Logged]) -> Logged:
        """Records the work without doing it, and returns the tensors that each `replay` fills."""

    def replay(self) -> None:
        """Does what was recorded."""


class CudaGraph:
    """Records on the GPU (torch's notes on CUDA graphs, "whole-network capture")."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @contextmanager
    def warming(self) -> Iterator[None]:
        self._beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._beside):
            yield
        torch.cuda.current_stream().wait_stream(self._beside)

    def record(self, work: Callable[[], Logged]) -> Logged:
        # Threads that read images ahead may pin memory meanwhile; the default mode would let that end the capture.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        self._graph.replay()


class StillFeed:
    """A feed whose batches are the same tensors at every step; `fill` puts each step's numbers into them."""

    def __init__(self, feed: Feed, *, d_steps: int) -> None:
        """Wraps a feed whose batches are not split into parts."""
        self._feed, self._d_steps = feed, d_steps
        self._still: list[Batch] = []
        self._fresh: list[Batch] = []
        self._draws: list[dict[tuple[str, int], Tensor]] = []

    def fill(self, step: int) -> None:
        """Copies a step's images, labels, latents and draws to where those of the first step were."""
        self._fresh = [next(self._feed.for_discriminator(step, k)) for k in range(self._d_steps)]
        of_generator = next(self._feed.for_generator(step))
        if of_generator is not self._fresh[-1]:
            self._fresh.append(of_generator)
        if not self._still:
            self._draws = [{} for _ in self._fresh]
            self._still = [self._stilled(i) for i in range(len(self._fresh))]
        for fresh, still, draws in zip(self._fresh, self._still, self._draws, strict=True):
            still.real.copy_(fresh.real)
            still.z.copy_(fresh.z)
            if still.y is not None and fresh.y is not None:
                still.y.copy_(fresh.y)
            for (stream, count), numbers in draws.items():
                numbers.copy_(fresh.draw(stream, count))

    def for_discriminator(self, step: int, k: int) -> Iterator[Batch]:
        """Yields the batch of the k-th update of the discriminator, as it was filled."""
        yield self._still[k]

    def for_generator(self, step: int) -> Iterator[Batch]:
        """Yields the batch of the update of the generator, as it was filled."""
        yield self._still[-1]

    def _stilled(self, i: int) -> Batch:
        def draw(stream: str, count: int) -> Tensor:
            if (stream, count) not in self._draws[i]:  # before the capture, in the first step that draws it
                self._draws[i][stream, count] = self._fresh[i].draw(stream, count).clone()
            return self._draws[i][stream, count]

        batch = self._fresh[i]
        y = batch.y.clone() if batch.y is not None else None
        return replace(batch, real=batch.real.clone(), y=y, z=batch.z.clone(), draw=draw)


RECORDER: Callable[[], Recorder] = CudaGraph


class Captured:
    """The updates of a step: `WARM` times as they are written, then captured and repeated."""

    def __init__(self, updates: Callable[[int], Logged], feed: StillFeed) -> None:
        """Takes the updates of a step, which use the feed and return what they log."""
        self._updates, self._feed = updates, feed
        self._next = -1

    def __call__(self, step: int) -> Logged:
        """Makes the updates of a step. The tensors that it returns hold until the next one."""
        if step != self._next:  # at the start, and after a rollback, which replaces Adam's moments
            self._recorder, self._logged, self._warm = RECORDER(), Logged(), 0
        self._next = step + 1
        self._feed.fill(step)
        if self._warm < WARM:
            self._warm += 1
            with self._recorder.warming():
                return self._updates(step)
        if not self._logged:
            self._logged = self._recorder.record(lambda: self._updates(step))
        self._recorder.replay()
        return self._logged
