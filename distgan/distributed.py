"""Ranks: the only place that configures Accelerate, and all that processes must agree on.

Training data never passes through here, except DDP's gradients, which Accelerate's wrappers reduce. What rank zero
decides or does alone goes through `on_rank_zero`, over a group of its own. Groups wait with endless patience: nothing
that one rank is slow at makes the others time out; the watchdog notices who is lost.
"""

import ctypes
import json
import os
import platform
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import accelerate
import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, GradScalerKwargs
from torch import Tensor

from distgan import __version__
from distgan.config import TrainConfig
from distgan.errors import StoppedError, is_spoken_for, spoken_for
from distgan.meeting import adopt_mpirun, adopt_srun, meet, started_by
from distgan.watchdog import Watchdog

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""From a person, a terminal that closes, or a launcher: all that torch's passes on."""
WARNING_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""What a cluster sends ahead of a limit."""

_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_PATIENCE = timedelta(days=1)  # of those who wait, for a machine that prepares its images, say; see watchdog.py


def launched_ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks, as the launcher says, before any process group exists.

    Raises:
        ValueError: the environment announces several ranks and does not say which one this is.
    """
    adopt_mpirun()  # first: on a Slurm cluster it starts its daemons with srun
    adopt_srun()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    missing = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if world > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE is {world}, but {' and '.join(sorted(missing))} is not set, so that the processes cannot find "
            "each other: start the ranks with `accelerate launch`, `torchrun`, `srun` or `mpirun`."
        )
    return int(os.environ.get("RANK", "0")), world


def check(train: TrainConfig) -> None:
    """Checks batch, precision and launcher settings before any GPU or process group is touched.

    Raises:
        ValueError: one sentence that says what to change.
    """
    _, world = launched_ranks()
    if train.batch_size % world:
        fits = [size for size in range(world, 2 * train.batch_size + world, world) if size > train.batch_size - world]
        raise ValueError(
            f"train.batch_size is {train.batch_size}, which {world} processes cannot share equally: "
            f"{' or '.join(map(str, fits[:2]))} would do."
        )
    if use_cpu() and train.precision == "fp16":
        raise ValueError("train.precision is fp16, which needs a GPU: use fp32 here, or bf16.")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", _MIXED_PRECISION[train.precision]):
        raise ValueError(
            f"the launcher asks for {launched} and the recipe's train.precision is {train.precision}: "
            "make them agree, best by leaving precision to the recipe."
        )
    for variable, what in {
        "ACCELERATE_USE_FSDP": "FSDP",
        "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
        "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    }.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise ValueError(f"the launcher asks for {what}, but distgan trains with DDP: launch without it.")
    if int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) > 1:
        raise ValueError(
            "the launcher asks for gradient accumulation, but train.batch_size says it all: launch without."
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError("the launcher asks for a dynamo backend, but distgan does not compile: launch without it.")


def check_launcher() -> None:
    """Checks the launcher for verbs that do not train; any precision it asks for is accepted.

    Raises:
        ValueError: one sentence that says what to change.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision: Any = launched if launched in ("bf16", "fp16") else "fp32"
    check(TrainConfig(batch_size=launched_ranks()[1], precision=precision))


def check_gpus() -> None:
    """Checks that each of this machine's processes has a GPU that works, unless the CPU is wanted. Touches none.

    Raises:
        ValueError: they cannot, or there are too few.
    """
    local_world, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    of_a_job_without = "SLURM_JOB_ID" in os.environ and "SLURM_GPUS_ON_NODE" not in os.environ
    wanted = not (asked_for_cpu() or "CUDA_VISIBLE_DEVICES" in os.environ or of_a_job_without)
    if gpus == 0 and wanted and (there := nvidia_devices()):
        raise ValueError(
            f"this machine has {there} GPUs, which torch {torch.__version__} cannot use: update the driver or install "
            "the torch of its CUDA; to train on the CPU set ACCELERATE_USE_CPU=true."
        )
    if not use_cpu() and local_world > gpus:
        raise ValueError(
            f"{local_world} processes were started on a machine with {gpus} GPUs: choose a launch file that fits, such "
            "as launch/gpu1.yaml or, to train on the CPU, launch/cpu2.yaml; under srun give GPUs by --gpus-per-node, "
            "not to each task."
        )


def nvidia_devices() -> int:
    """Counts the GPUs that the kernel knows, whether torch can use them or not."""
    return len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])


def versions() -> dict[str, str]:
    """Returns the versions of what computes; ranks with different ones would drift apart, and are refused."""
    packages = {"distgan": __version__, "torch": torch.__version__, "accelerate": accelerate.__version__}
    return {**packages, "numpy": np.__version__, "Python": platform.python_version()}


def pieces(train: TrainConfig) -> int:
    """Returns the number of equal parts of a rank's share of a batch, for `train.max_batch_per_device`."""
    share = train.batch_size // launched_ranks()[1]
    most = train.max_batch_per_device or share
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= most)


_in_this_process = threading.Lock()  # held by the run of this process
_forked = threading.Event()
os.register_at_fork(after_in_child=_forked.set)
os.register_at_fork(after_in_child=_in_this_process._at_fork_reinit)  # type: ignore[attr-defined]  # it is the parent's


@contextmanager
def _left_as_it_was() -> Iterator[None]:
    """Puts back what Accelerate and `join` set for the whole process, so that another run in it starts as this one did.

    Raises:
        ValueError: a run goes on in another thread.
    """
    if not _in_this_process.acquire(blocking=False):
        raise ValueError(
            "another run goes on in this process, and the two would share Accelerate's state: wait until it is done, "
            "or start this one in a process of its own."
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


class Ranks:
    """The ranks of one start and what they agree on; as a context it finds them, watches over them, ends with them.

    Until `join` there is no process group, and no GPU is touched. The process is left as it was, for another run.
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
        self._gathered = 0  # times, before `join`
        self._explained = False
        self._together: BaseException | None = None  # an error that every rank raises
        self._process = ExitStack()

    def __enter__(self) -> Self:
        """Collective: waits for all ranks and begins the watch over them.

        Raises:
            LostRankError, ValueError: as `meet`.
        """
        with ExitStack() as undo:
            undo.enter_context(_left_as_it_was())
            if _forked.is_set():  # as notebook_launcher's: of torch's threads in the parent there are none here,
                torch.set_num_threads(1)  # and work that is shared out to them would never be done
            _follow_launcher()
            # These are kept for when the run can save; the others end it until then.
            self.requests.listen(*WARNING_SIGNALS)
            undo.callback(self.requests.unlisten, *WARNING_SIGNALS)
            if self.world > 1:
                self._store, nodes = meet(timeout=self._timeout)
                self.watchdog = Watchdog(self._store, self.rank, self.world, nodes=nodes, timeout=self._timeout)
                self.watchdog.start()
            self._process = undo.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Collective where there is no error: ends the watch and the process group."""
        with self._process:
            if error is not None:
                self.explain(error)
            together = error is None or error is self._together  # else another rank may be gone, or still at work
            if self.watchdog is not None and together:
                self.gather(None)  # nobody leaves while another still waits for it
            if self.watchdog is not None and (together or isinstance(error, ValueError)):
                self.watchdog.stop()
            if dist.is_initialized() and together:
                dist.destroy_process_group()

    def alone(self) -> AbstractContextManager[None]:
        """Wraps what a rank does by itself, however long it takes, such as preparing its machine's images."""
        return nullcontext() if self.watchdog is None else self.watchdog.alone()

    def join(self, train: TrainConfig, *, tracker: str, tf32: bool = True) -> None:
        """Collective: forms the process group, which Accelerate takes up, and configures the one Accelerator.

        DDP broadcasts no buffers: batch norm's statistics are each rank's own, and rank zero's are what is saved.

        Args:
            train: batch and precision.
            tracker: `track.to`.
            tf32: whether mixed precision may take it for what runs in fp32, which a penalty's passes must not.

        Raises:
            ValueError: the GPU cannot do the precision.
        """
        if self.world > 1:
            self._store.set_timeout(_PATIENCE)
            backend = "gloo" if use_cpu() else "nccl"
            dist.init_process_group(
                backend, store=self._store, rank=self.rank, world_size=self.world, timeout=_PATIENCE
            )
            self._group = self.requests.group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        if train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        # cuDNN's convolutions would use TF32, with 10 bits of mantissa, on Ampere and later.
        torch.backends.cudnn.allow_tf32 = tf32 and train.precision != "fp32"
        # Accelerate passes DDP's newer name for it, forward_sync_buffers, not on yet.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        # On every rank that srun itself started; torchrun and accelerate launch set it.
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset", category=UserWarning)
        self.accelerator = Accelerator(
            cpu=use_cpu(),
            log_with=None if tracker == "none" else tracker,
            mixed_precision=_MIXED_PRECISION[train.precision],
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                # Every update of either network updates the one scaler; with one D step that is twice torch's 2000.
                GradScalerKwargs(growth_interval=4000),
            ],
        )
        assert self.accelerator.num_processes == self.world  # else every rank would train alone, as rank 0 of 1
        on_gpu = self.accelerator.device.type == "cuda"
        if train.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(False):
            raise ValueError("train.precision is bf16, which this GPU cannot do: use fp32 or fp16.")

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """fp16's loss scaler, one for both networks; None in other precisions."""
        return self.accelerator.scaler

    def shares(self, train: TrainConfig) -> list[slice]:
        """This rank's part of a global batch, in equal pieces of at most `train.max_batch_per_device` images."""
        size, count = train.batch_size // self.world, pieces(train)
        first, step = self.rank * size, size // count
        return [slice(start, start + step) for start in range(first, first + size, step)]

    def synced(self, network: Any, *, last: bool) -> AbstractContextManager[None]:
        """Wraps forward and backward of one piece: only the last piece sends gradients over the wire, all at once."""
        return nullcontext() if last else self.accelerator.no_sync(network)

    def in_full_precision(self, network: Any) -> Callable[..., Tensor]:
        """Returns the network without the autocast that Accelerate wraps around its forward pass."""

        def run(*inputs: Any) -> Tensor:
            wrapped = vars(network).pop("forward", None)  # over the class's own
            try:
                return network(*inputs)
            finally:
                if wrapped is not None:
                    network.forward = wrapped

        return run

    def refuse_differences(self, described: dict[str, Any]) -> None:
        """Collective: refuses ranks that describe themselves otherwise than rank zero.

        Raises:
            ValueError: on all ranks, naming the rank and what differs.
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
                raise self.told_once(
                    ValueError(
                        f"rank {rank} differs from rank 0 ({'; '.join(differences)}): every process of a run needs the "
                        "same recipe, data and versions."
                    )
                )

    def told_once(self, error: Exception) -> BaseException:
        """Marks an error that every rank raises, so that only rank zero reports it."""
        self._together = error if self.rank == 0 else spoken_for(error)
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
        self.watchdog.progressed()
        if outcome[1] is not None:
            raise self.told_once(outcome[1])
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """Collective: every rank's value, in order, on every rank. Before `join` only values that JSON knows."""
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
        if self.rank == 0:  # the store may leave with it
            self._store.wait([f"read {name} {rank}" for rank in range(self.world)])
        return values

    def add_up(self, sums: Iterable[torch.Tensor]) -> None:
        """Collective: replaces each tensor, on the CPU, by its sum over ranks."""
        for tensor in sums if self._group is not None else ():
            dist.all_reduce(tensor, group=self._group)

    def on_top(self, rows: torch.Tensor) -> torch.Tensor:
        """Collective: the rows of all ranks, on the CPU, one rank's below the other's, on rank zero; none on others."""
        if self._group is None:
            return rows
        parts: list[Any] | None = [None] * self.world if self.rank == 0 else None
        dist.gather_object(rows, parts, dst=0, group=self._group)
        return torch.cat(parts) if parts is not None else rows[:0]

    def progressed(self) -> None:
        """This rank has come further within a step."""
        if self.watchdog is not None:
            self.watchdog.progressed()

    def say(self, text: str) -> None:
        """Prints for the user, once."""
        if self.rank == 0:
            print(text, flush=True)

    def moved(self, step: int) -> None:
        """This rank has finished a step."""
        if self.watchdog is not None:
            self.watchdog.moved(step)

    def explain(self, error: BaseException) -> None:
        """Tells the others that this rank leaves with an error. To be called while it still hears stop signals.

        Raises:
            LostRankError: the fault is another rank's, and what this one met is only its consequence.
        """
        if self.watchdog is None or is_spoken_for(error) or self._explained:
            return
        self._explained = True
        self.watchdog.explain(error)
        if not isinstance(error, StoppedError | ValueError):  # its traceback alone would not say where
            error.add_note(f"This was rank {self.rank} at step {self.watchdog.step + 1}.")


class Agreed(NamedTuple):
    """What all ranks do at the same step."""

    stop: bool
    """Save and leave: one of them received a stop signal."""
    save: bool
    """Save: rank zero asked for it."""
    failed: bool
    """What rank zero wrote in the background failed."""


class Requests:
    """What may come up on one rank at any moment, turned into decisions that all ranks take at the same step.

    The flags of each step are reduced over a CPU group of its own while the step after runs, and read then: the
    training stream is never waited for.
    """

    def __init__(self) -> None:
        self.group: Any = None  # of several ranks, once they have joined
        self._received = False
        self._flags = np.zeros(len(Agreed._fields), dtype=np.int32)
        self._pending: Any = None
        self._previous: dict[int, Any] = {}

    def listen(self, *numbers: int) -> None:
        """Makes these signals requests to stop from now on; under `nohup` a hangup stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread alone, and lets no other one take them
        for number in numbers:
            self._previous[number] = signal.getsignal(number)
            if number != signal.SIGHUP or self._previous[number] != signal.SIG_IGN:
                signal.signal(number, self._receive)

    def unlisten(self, *numbers: int) -> None:
        """Gives these signals back the meaning they had before."""
        for number in numbers:
            if (previous := self._previous.pop(number, None)) is not None:  # None: not Python's to give back
                signal.signal(number, previous)

    def finish(self) -> None:
        """Collective: waits for what is still on the wire."""
        if self._pending is not None:
            self._pending.wait()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def agreed(self, *, save: bool, failed: bool) -> Agreed:
        """Collective, once per step: the same answer on every rank, to what each asked for a step ago."""
        now = (self._received, save, failed)
        if self.group is None:
            return Agreed(*now)
        answer = Agreed(False, False, False)
        if self._pending is not None:
            self._pending.wait()
            answer = Agreed(*map(bool, self._flags))
        self._flags[:] = now
        flags = torch.from_numpy(self._flags)
        self._pending = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return answer


def settle_gradient_buckets(passes: Callable[[], None]) -> None:
    """Collective: runs throwaway forward and backward passes until DDP's gradient buckets are what they will stay.

    DDP reduces its first backward in buckets of another order than all later ones, which from three ranks on changes
    the rounding of sums: without this the first step after a resume would differ from the same step of a run that
    never stopped. DDP rebuilds the buckets at the first forward after a backward, so two rounds settle them.
    """
    for _ in range(2):
        passes()


def use_cpu() -> bool:
    """Decides whether to train on the CPU: if the launcher says so, or if there is no GPU."""
    return asked_for_cpu() or not torch.cuda.is_available()


def asked_for_cpu() -> bool:
    """Tells whether the launcher asks for the CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")


def _follow_launcher() -> None:
    """Makes the kernel end this worker when its launcher dies, so that no orphan goes on holding the run's folder.

    torchelastic's launcher forwards signals, and its death is a fault: the worker is killed. It hears a hangup even
    under `nohup`, and forwards that, too. Accelerate's launcher of one process forwards none: its death is how a signal
    arrives, and the worker saves and leaves; so it does when mpirun dies.
    """
    pr_set_pdeathsig = 1  # prctl(2)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and "TORCHELASTIC_RUN_ID" in os.environ and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    elif sys.platform == "linux" and ("ACCELERATE_MIXED_PRECISION" in os.environ or started_by() == "mpirun"):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
