"""Ranks: the only place that configures Accelerate, and everything that processes must agree on.

Training data never passes through here, except DDP's gradients, which Accelerate's wrappers reduce. What rank zero
decides or does alone goes through `on_rank_zero`, over a process group of its own. Process groups wait without a time
limit, so that a slow rank makes no other one time out. The watchdog notices ranks that are lost.
"""

import ctypes
import json
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, GradScalerKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distgan.errors import StoppedError, UserError, is_reported, mark_reported
from distgan.models import place
from distgan.parallel import launch
from distgan.parallel.launch import MIXED_PRECISION, follow_launcher, launched_ranks, use_cpu
from distgan.parallel.meeting import meet
from distgan.parallel.stopping import WARNING_SIGNALS, Requests
from distgan.parallel.watchdog import Watchdog
from distgan.recipe import RunConfig

T = TypeVar("T")

TIMEOUT = RunConfig(dir=".").timeout
"""How long ranks of commands without a recipe wait for each other, in seconds."""

_PATIENCE = timedelta(days=1)  # how long process groups wait, in effect without limit; watchdog.py is the judge

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h

_in_this_process = threading.Lock()  # held by the run that is active in this process
_forked = threading.Event()
os.register_at_fork(after_in_child=_forked.set)
os.register_at_fork(after_in_child=_in_this_process._at_fork_reinit)  # type: ignore[attr-defined]  # it is the parent's


@contextmanager
def _left_as_it_was() -> Iterator[None]:
    """Restores at the end what Accelerate and `join` set for the whole process, so that another run can follow in it.

    Raises:
        UserError: another run is active in this process.
    """
    if not _in_this_process.acquire(blocking=False):
        raise UserError(
            "another run is active in this process, and the two would share Accelerate's state: wait until it ends, or "
            "start this one in another process."
        )
    shared = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before, threads = [dict(state) for state in shared], torch.get_num_threads()
    environment = {name: os.environ.get(name) for name in ("CUBLAS_WORKSPACE_CONFIG", "GLOO_SOCKET_IFNAME")}
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only, tf32 = torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn.allow_tf32
    try:
        for state in shared:
            state.clear()
        with warnings.catch_warnings():
            yield
    finally:
        for state, was in zip(shared, before, strict=True):
            state.clear()
            state.update(was)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.allow_tf32 = tf32
        _in_this_process.release()


class Wrapping(Protocol):
    """What a step needs of the ranks. Each member is described in `Ranks`, which has them all."""

    rank: int
    world: int

    @property
    def device(self) -> torch.device: ...

    def place(self, *networks: nn.Module, mixed: bool) -> None: ...

    def wrap(self, *parts: Any) -> tuple[Any, ...]: ...

    def backward(self, loss: Tensor) -> None: ...

    def synced(self, network: Any, *, last: bool) -> AbstractContextManager[None]: ...

    def all_reduce_sums(self, sums: Iterable[Tensor]) -> None: ...

    def gather(self, value: T) -> list[T]: ...


class Ranks:
    """The ranks of one start. As a context, it finds them, watches over them, and leaves the process as it was, except
    that on a CPU glibc goes on keeping freed memory.

    Until `join` there is no process group, and no GPU is touched.
    """

    accelerator: Accelerator
    """The one Accelerator, once joined."""

    def __init__(self, *, timeout: float) -> None:
        """Reads rank and world from the launcher. `timeout` is `run.timeout`, in seconds."""
        self.rank, self.world = launched_ranks()
        self.watchdog: Watchdog | None = None
        self._timeout = timeout
        self.requests = Requests()
        self._group: Any = None
        self._store: Any = None  # this start's part of the launcher's store; None with one rank
        self._gathered = 0  # calls of `gather` before `join`
        self._explained = self._compress = False
        self._together: BaseException | None = None  # an error that all ranks raise together
        self._process = ExitStack()

    def __enter__(self) -> Self:
        """Collective: waits for all ranks and begins the watch over them.

        Raises:
            LostRankError, UserError: as `meet`.
        """
        with ExitStack() as undo:
            undo.enter_context(_left_as_it_was())
            if _forked.is_set():  # by notebook_launcher: the parent's torch threads do not exist in this process,
                torch.set_num_threads(1)  # and work given to them would never be done
            follow_launcher()
            # These signals are kept until the run can save; until then, other signals end the process.
            self.requests.listen(*WARNING_SIGNALS)
            undo.callback(self.requests.unlisten, *WARNING_SIGNALS)
            if self.world > 1:
                self._store, nodes = meet(timeout=self._timeout)
                self.watchdog = Watchdog(self._store, self.rank, self.world, nodes=nodes, timeout=self._timeout)
                self.watchdog.start()
            self._process = undo.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Ends the watch and the process group. Collective without an error, or with one that all ranks raise."""
        with self._process:
            if error is not None:
                self.report_failure(error)
            together = error is None or error is self._together  # otherwise another rank may be gone, or still working
            if self.watchdog is not None and together:
                self.gather(None)  # no rank leaves while another still waits for it
            if self.watchdog is not None and (together or isinstance(error, UserError)):
                self.watchdog.stop()
            if dist.is_initialized() and together:
                dist.destroy_process_group()

    def alone(self) -> AbstractContextManager[None]:
        """Wraps work that a rank does by itself for any length of time, such as preparing its machine's images."""
        return nullcontext() if self.watchdog is None else self.watchdog.alone()

    def join(
        self,
        *,
        precision: str = "fp32",
        deterministic: bool = False,
        tf32: bool = True,
        compress: str = "none",
    ) -> None:
        """Collective: forms the process group and configures the one Accelerator, which uses it.

        DDP broadcasts no buffers: batch norm's statistics are each rank's own, and rank zero's are what is saved.

        Args:
            precision: `train.precision`.
            deterministic: `train.deterministic`, for CUDA.
            compress: `train.compress`.
            tf32: whether TF32 may be used in mixed precision for what runs in fp32; not if there is a penalty or a
                pipeline of augmentation.

        Raises:
            UserError: the GPU cannot do the precision.
        """
        if self.world > 1:
            self._store.set_timeout(_PATIENCE)
            backend = "gloo" if use_cpu() else "nccl"
            dist.init_process_group(
                backend, store=self._store, rank=self.rank, world_size=self.world, timeout=_PATIENCE
            )
            self._group = self.requests.group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        if use_cpu():
            _keep_freed_memory()
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        # cuDNN's convolutions would use TF32, with 10 bits of mantissa, on Ampere and later.
        torch.backends.cudnn.allow_tf32 = tf32 and precision != "fp32"
        # Accelerate does not pass on the new name of this setting yet (forward_sync_buffers).
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        # This would come from each rank that srun started directly; torchrun and accelerate launch set the variable.
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset", category=UserWarning)
        self.accelerator = Accelerator(
            cpu=use_cpu(),
            mixed_precision=MIXED_PRECISION[precision],
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                # Both networks update the scaler, with one D step twice per step: the interval is twice torch's 2000.
                GradScalerKwargs(growth_interval=4000),
            ],
        )
        self._compress = compress == "bf16"
        assert self.accelerator.num_processes == self.world  # otherwise each rank would train alone
        on_gpu = self.accelerator.device.type == "cuda"
        if precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(False):
            raise UserError("train.precision is bf16, which this GPU cannot do: use fp32 or fp16.")

    @property
    def device(self) -> torch.device:
        """Returns this rank's device."""
        return self.accelerator.device

    def place(self, *networks: nn.Module, mixed: bool) -> None:
        """Moves networks to the device, in the layout in which it computes their precision fastest."""
        for network in networks:
            place(network, self.device, mixed=mixed and self.accelerator.mixed_precision != "no")

    def wrap(self, *parts: Any) -> tuple[Any, ...]:
        """Collective: returns networks and optimisers as Accelerate and DDP wrap them."""
        wrapped = self.accelerator.prepare(*parts)
        for part in wrapped:
            if self._compress and isinstance(part, DistributedDataParallel):
                part.register_comm_hook(None, _mean_in_bf16)
        return wrapped

    def backward(self, loss: Tensor) -> None:
        """Computes gradients, scaled by the loss scaler in fp16."""
        self.accelerator.backward(loss)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Returns fp16's loss scaler, which both networks share; None in other precisions."""
        return self.accelerator.scaler

    def synced(self, network: Any, *, last: bool) -> AbstractContextManager[None]:
        """Wraps forward and backward of one piece: only the last piece sends gradients over the wire, all at once."""
        return nullcontext() if last else self.accelerator.no_sync(network)

    def refuse_differences(self, described: dict[str, Any]) -> None:
        """Collective: compares the descriptions of all ranks with rank zero's.

        Raises:
            UserError: a rank differs; raised on all ranks, naming the rank and the differences.
        """
        all_ranks = self.gather(described)
        expected = all_ranks[0]
        for rank, theirs in enumerate(all_ranks):
            differences = [
                f"{key}: {expected.get(key)} on rank 0, {theirs.get(key)} on rank {rank}"
                for key in expected | theirs
                if expected.get(key) != theirs.get(key)
            ]
            if differences:
                raise self.reported_by_rank_zero(
                    UserError(
                        f"rank {rank} differs from rank 0 ({'; '.join(differences)}): every process of a run needs the "
                        "same recipe, data and versions."
                    )
                )

    def reported_by_rank_zero(self, error: Exception) -> BaseException:
        """Marks an error that all ranks raise together, so that only rank zero reports it."""
        self._together = error if self.rank == 0 else mark_reported(error)
        return self._together

    def on_rank_zero(self, action: Callable[[], T]) -> T:
        """Collective: runs an action on rank zero; every rank returns its result, or raises its error."""
        if self.watchdog is None:
            return action()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            with self.watchdog.alone():
                try:
                    outcome[0] = action()
                except Exception as error:
                    outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        self.watchdog.alive()
        if outcome[1] is not None:
            raise self.reported_by_rank_zero(outcome[1])
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """Collective: returns the values of all ranks, in order, on every rank. Before `join`, JSON values only."""
        if self.world == 1:
            return [value]
        if self._group is None:
            return self._gather_in_store(value)
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _gather_in_store(self, value: T) -> list[T]:
        self._gathered += 1
        name = f"gathered {self._gathered} by rank"
        self._store.set(f"{name} {self.rank}", json.dumps(value))
        values = [json.loads(self._store.get(f"{name} {rank}")) for rank in range(self.world)]
        self._store.set(f"read {name} {self.rank}", "")
        if self.rank == 0:  # rank zero may be the store's server, so it waits until all have read
            self._store.wait([f"read {name} {rank}" for rank in range(self.world)])
        return values

    def all_reduce_sums(self, sums: Iterable[torch.Tensor]) -> None:
        """Collective: replaces each tensor by its sum over ranks. Does not wait for the device if they are there."""
        for tensor in sums if self._group is not None else ():
            dist.all_reduce(tensor, group=self._group if tensor.device.type == "cpu" else None)

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Collective: returns on rank zero the rows of all ranks in order, on the CPU; no rows on the others."""
        if self._group is None:
            return rows
        parts: list[Any] | None = [None] * self.world if self.rank == 0 else None
        dist.gather_object(rows, parts, dst=0, group=self._group)
        return torch.cat(parts) if parts is not None else rows[:0]

    def in_order(self, count: int, work: Callable[[int], T]) -> Iterator[T]:
        """Collective: shares pieces of work among the ranks; yields their results in order on rank zero only.

        All ranks must go through the whole iterator. At most one result of each rank is in memory at once.

        Args:
            count: the number of pieces.
            work: the number of a piece -> its result.
        """
        for first in range(0, count, self.world):
            mine = first + self.rank
            result = work(mine) if mine < count else None
            self.alive()
            parts: list[Any] = [result] if self.world == 1 else [None] * self.world
            if self.world > 1:
                dist.gather_object(result, parts if self.rank == 0 else None, dst=0, group=self._group)
            if self.rank == 0:
                yield from parts[: count - first]

    def alive(self) -> None:
        """Tells the watchdog that this rank has come further within a step."""
        if self.watchdog is not None:
            self.watchdog.alive()

    def say(self, text: str) -> None:
        """Prints for the user, once."""
        if self.rank == 0:
            print(text, flush=True)

    def step_done(self, step: int) -> None:
        """Tells the watchdog that this rank has finished a step."""
        if self.watchdog is not None:
            self.watchdog.step_done(step)

    def report_failure(self, error: BaseException) -> None:
        """Tells the others that this rank leaves with an error. Call it while stop signals are still handled.

        Raises:
            LostRankError: another rank is at fault, and this rank's error is only the consequence.
        """
        if self.watchdog is None or is_reported(error) or self._explained:
            return
        self._explained = True
        self.watchdog.report_failure(error)
        if not isinstance(error, StoppedError | UserError):  # a traceback does not say which rank and step it was
            error.add_note(f"This was rank {self.rank} at step {self.watchdog.step + 1}.")


def without_autocast(network: Any) -> Callable[..., Tensor]:
    """Returns the network without the autocast that Accelerate wraps around its forward pass."""

    def run(*inputs: Any) -> Tensor:
        wrapped = vars(network).pop("forward", None)  # Accelerate's, which hides the class's own
        try:
            return network(*inputs)
        finally:
            if wrapped is not None:
                network.forward = wrapped

    return run


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next allocation. Otherwise each activation is a new mapping, whose pages
    the system must clear first: a seventh of a DCGAN's step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in other C libraries
    if mallopt is not None and (mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 1 << 25)):
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)  # some versions refuse more than 32 MiB above


def _mean_in_bf16(
    _: None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Replaces a bucket of gradients by its mean over ranks, sent in bf16. torch's own hook refuses gloo on the CPU."""
    gradients = bucket.buffer()
    sent = gradients.div(dist.get_world_size()).to(torch.bfloat16)
    sending = dist.all_reduce(sent, async_op=True).get_future()
    return sending.then(lambda future: gradients.copy_(future.value()[0]))


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into an exception, as Ctrl-C is one, so that temporary files are removed."""

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def together(described: dict[str, Any]) -> Iterator[Ranks]:
    """Collective: joins the ranks of a command that does not train, in full precision.

    Args:
        described: what must be the same on all ranks, JSON values only.

    Raises:
        UserError: the launcher's settings or the GPUs do not fit, or a rank differs.
    """
    launch.check_launcher()
    with _ended_by_signals(), Ranks(timeout=TIMEOUT) as ranks:
        with ranks.alone():
            launch.check_gpus()
        ranks.join()
        ranks.refuse_differences({**described, **launch.versions()})
        yield ranks


def settle_gradient_buckets(passes: Callable[[], None]) -> None:
    """Collective: runs throwaway forward and backward passes until DDP's gradient buckets are final.

    DDP's first backward pass uses other buckets than all later ones, which changes the rounding of sums from three
    ranks on. Without this, the first step after a resume would differ from the same step of a run that never stopped.
    DDP rebuilds the buckets at the first forward pass after a backward pass, so two rounds are enough.
    """
    for _ in range(2):
        passes()
