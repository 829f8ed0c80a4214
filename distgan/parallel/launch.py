"""Reads from the environment what the launcher decided: rank, number of ranks, CPU or GPU. Refuses what cannot work.

accelerate launch, torchrun, srun and mpirun are known. All this happens before any process group exists, and without
touching a GPU.
"""

import ctypes
import os
import platform
import re
import signal
import socket
import sys
import threading
from pathlib import Path

import accelerate
import numpy as np
import psutil
import torch

from distgan import __version__
from distgan.errors import UserError

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""`train.precision` in Accelerate's words."""


def launched_ranks() -> tuple[int, int]:
    """Returns this process's rank and the number of ranks.

    Raises:
        UserError: the environment announces several ranks, but lacks a variable that they need to find each other; or
            as `adopt_mpirun`.
    """
    adopt_mpirun()  # before srun: on a Slurm cluster, mpirun starts its daemons with srun
    adopt_srun()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    missing = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if world > 1 and missing:
        raise UserError(
            f"WORLD_SIZE is {world}, but {_not_set(missing)} the processes cannot find each other: start them with "
            "`accelerate launch`, `torchrun`, `srun` or `mpirun`."
        )
    return int(os.environ.get("RANK", "0")), world


def _not_set(missing: set[str]) -> str:
    names = " and ".join(sorted(missing))
    return (
        f"{names} {'is' if len(missing) == 1 else 'are'} not set, and without {'it' if len(missing) == 1 else 'them'}"
    )


def check(*, batch_size: int, precision: str) -> None:
    """Checks batch, precision and launcher settings before any GPU or process group is touched.

    Args:
        batch_size: `train.batch_size`, over all ranks.
        precision: `train.precision`.

    Raises:
        UserError: one sentence that says what to change.
    """
    _, world = launched_ranks()
    if batch_size % world:
        fits = [size for size in range(world, 2 * batch_size + world, world) if size > batch_size - world]
        raise UserError(
            f"train.batch_size is {batch_size}, which {world} processes cannot share equally: use "
            f"{' or '.join(map(str, fits[:2]))}."
        )
    if use_cpu() and precision == "fp16":
        raise UserError("train.precision is fp16, which needs a GPU: use fp32 here, or bf16.")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", MIXED_PRECISION[precision]):
        raise UserError(
            f"the launcher asks for {launched} and the recipe's train.precision is {precision}: "
            "remove mixed precision from the launcher's settings, so that the recipe decides."
        )
    for variable, what in {
        "ACCELERATE_USE_FSDP": "FSDP",
        "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
        "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    }.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(
                f"the launcher asks for {what}, but distgan trains with DDP: remove {what} from its settings."
            )
    if int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) > 1:
        raise UserError(
            "the launcher asks for gradient accumulation, but train.batch_size is the whole batch already: launch "
            "without it; if memory is short, use more processes or a smaller train.batch_size."
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError("the launcher asks for a dynamo backend, but train.compile decides that: launch without it.")


def check_launcher() -> None:
    """Checks the launcher for verbs that do not train. bf16 and, on a GPU, fp16 are accepted.

    Raises:
        UserError: one sentence that says what to change.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    check(batch_size=launched_ranks()[1], precision=launched if launched in ("bf16", "fp16") else "fp32")


def check_gpus() -> None:
    """Checks that each of this machine's processes has a GPU that works, unless it trains on the CPU. Touches none.

    Raises:
        UserError: torch cannot use the GPUs, or there are too few.
    """
    local_world, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    of_a_job_without = "SLURM_JOB_ID" in os.environ and "SLURM_GPUS_ON_NODE" not in os.environ
    wanted = not (asked_for_cpu() or "CUDA_VISIBLE_DEVICES" in os.environ or of_a_job_without)
    if gpus == 0 and wanted and (there := nvidia_devices()):
        raise UserError(
            f"this machine has {there} GPUs, which torch {torch.__version__} cannot use: update the driver, or install "
            "a build of torch for the driver's CUDA version; to train on the CPU set ACCELERATE_USE_CPU=true."
        )
    if not use_cpu() and local_world > gpus:
        raise UserError(
            f"{local_world} processes were started on a machine with {gpus} GPUs: choose a launch file that fits, such "
            "as launch/gpu1.yaml, or launch/cpu2.yaml to train on the CPU. Under srun, request GPUs with "
            "--gpus-per-node, not for each task."
        )


def nvidia_devices() -> int:
    """Counts the GPUs that the kernel knows, even if torch cannot use them."""
    return len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that compute. Ranks must share them, or they would drift apart."""
    packages = {"distgan": __version__, "torch": torch.__version__, "accelerate": accelerate.__version__}
    return {**packages, "numpy": np.__version__, "Python": platform.python_version()}


def use_cpu() -> bool:
    """Decides whether to train on the CPU: if the launcher says so, or if there is no GPU."""
    return asked_for_cpu() or not torch.cuda.is_available()


def asked_for_cpu() -> bool:
    """Tells whether the launcher asks for the CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")


def started_by() -> str:
    """Completes "started by …": the name of a launcher, `hand` or `its environment`."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "accelerate launch or torchrun"
    if "WORLD_SIZE" not in os.environ:
        return "hand"
    return "mpirun" if _of_mpirun() else "srun" if "SLURM_PROCID" in os.environ else "its environment"


def node() -> str:
    """Identifies the node: the number of the launcher that started this process, or the host's name."""
    return os.environ.get("GROUP_RANK", socket.gethostname())


def speaks_for_node() -> bool:
    """Tells whether this rank writes the messages that each node's log has once."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


# The variables for rank, world, local rank and local world of Open MPI; MPICH and Intel MPI; Cray; MVAPICH.
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)


def adopt_mpirun() -> None:
    """Sets the variables that torchrun would set, if mpirun started this process.

    Raises:
        UserError: the processes are on several machines and MASTER_ADDR or MASTER_PORT is missing; mpirun does not say
            which processes share a machine; or WORLD_SIZE contradicts mpirun.
    """
    names = _of_mpirun()
    size = names[1] if names is not None else next((size for _, size, *_ in _MPI if _is_number(size)), None)
    if size is None or int(os.environ[size]) < 2:
        return
    if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1":
        return  # another launcher below mpirun has made ranks already
    if names is None:
        if size == "PMI_SIZE" and "SLURM_PROCID" in os.environ:
            return  # these variables are srun's
        raise UserError(
            f"mpirun started {os.environ[size]} processes ({size}), but does not say which of them share a machine: "
            "start them with `accelerate launch`, `torchrun` or `srun`."
        )
    rank, world, local_rank, local_world = (os.environ[name] for name in names)
    if "WORLD_SIZE" in os.environ:
        raise UserError(f"WORLD_SIZE is 1, but mpirun started {world} processes: unset WORLD_SIZE.")
    missing = {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if local_world != world and missing:
        raise UserError(
            f"mpirun started {world} processes on several machines, but {_not_set(missing)} they cannot find each "
            "other: add `-x MASTER_ADDR=HOST -x MASTER_PORT=29500` to mpirun (MPICH and Intel MPI: `-genv MASTER_ADDR "
            "HOST -genv MASTER_PORT 29500`), where HOST is rank 0's machine."
        )
    os.environ |= {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_world}
    if local_world == world:
        os.environ["GROUP_RANK"] = "0"
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(10000 + _ancestor_without(names[0]) % 20000))


def under_mpirun() -> bool:
    """Tells whether mpirun started this process or a launcher above it, alone or with others."""
    return _of_mpirun() is not None


def _of_mpirun() -> tuple[str, str, str, str] | None:
    """Returns mpirun's variables for rank, world, local rank and local world; None without an mpirun."""
    return next((names for names in _MPI if all(map(_is_number, names))), None)


def _is_number(name: str) -> bool:
    """Tells whether an environment variable holds a number."""
    return os.environ.get(name, "").isdecimal()


def _ancestor_without(name: str) -> int:
    """Returns the number of the nearest parent process that has not set a variable, or cannot be read; 0 if none."""
    for process in psutil.Process().parents():
        try:
            if name not in process.environ():
                return process.pid
        except psutil.Error:  # it belongs to another user, such as a daemon
            return process.pid
    return 0


def adopt_srun() -> None:
    """Sets the variables that torchrun would set, if srun started this process without another launcher."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1 or "WORLD_SIZE" in os.environ:
        return
    node_number = int(os.environ["SLURM_NODEID"])
    per_node = [  # "2(x3),1": three nodes of two tasks, one of one
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ["SLURM_STEP_TASKS_PER_NODE"])
        for _ in range(int(times or 1))
    ]
    # srun's own host is the first node only in a batch script; a list of nodes looks like "gpu[03-05,9],login1".
    nodes = re.split(r",(?![^[]*\])", os.environ["SLURM_STEP_NODELIST"])
    try:
        socket.getaddrinfo(head := re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes[0]), None)
    except socket.gaierror:
        head = os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[node_number]),
        "GROUP_RANK": str(node_number),
    }
    os.environ.setdefault("MASTER_ADDR", head)
    os.environ.setdefault("MASTER_PORT", str(10000 + (job + 997 * step) % 20000))


def follow_launcher() -> None:
    """Makes the kernel end this worker when its launcher dies, so that no orphan keeps the run's folder locked.

    torchelastic's launcher forwards signals. It forwards a hangup even under `nohup`, so the worker stops ignoring it.
    The launcher's death is a fault, and the worker is killed. Accelerate's launcher for one process forwards no signal:
    a signal kills it, and its death must tell the worker to save and leave. If mpirun dies, the worker also saves and
    leaves.
    """
    pr_set_pdeathsig = 1  # prctl(2)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and "TORCHELASTIC_RUN_ID" in os.environ and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    elif sys.platform == "linux" and ("ACCELERATE_MIXED_PRECISION" in os.environ or started_by() == "mpirun"):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
