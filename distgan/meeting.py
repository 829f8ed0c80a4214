"""How ranks find each other: in the launcher's store, before any process group, whatever was in that store before."""

import contextlib
import ipaddress
import json
import os
import re
import socket
import time
import uuid
from datetime import timedelta
from typing import Any, NamedTuple

import psutil
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from distgan.errors import LostRankError, spoken_for


class Meeting(NamedTuple):
    """The ranks of one start."""

    store: Store
    """That only they share."""
    nodes: int
    """How many launchers started them."""


def meet(*, timeout: float) -> Meeting:
    """Collective: returns once all ranks of this start are there.

    A launcher that restarts its group keeps its store, and one node's launcher may have been started again while
    another's stayed, so that neither the store nor the number of restarts tells the living from those before. Rank zero
    therefore gives a name to the ranks that it sees, until all of them answer to the same.

    On several nodes it also chooses gloo's network interface: gloo would take the one that the host's own name leads
    to, which on many machines is the loopback.

    Args:
        timeout: seconds to wait for the others.

    Raises:
        LostRankError: not all came in time.
        ValueError: there are two of a rank, their numbers differ, or the meeting place is taken by another program.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        called = _agree(store, rank, world, timeout)
    except LostRankError:
        raise
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise ValueError(f"{place} is taken by another program: set MASTER_PORT to a free port.") from error
        unreached = LostRankError(f"the other ranks cannot be reached at {place}: {_together()}.")
        raise (unreached if speaks_for_node() else spoken_for(unreached)) from error
    if called["nodes"] > 1:
        own = called["ranks"][rank]["address_of_0"]
        address = called["address_of_0"] if _is_loopback(own) else own
        with contextlib.suppress(OSError):  # no way to it: gloo's own choice cannot be worse
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_towards(address))
    return Meeting(PrefixStore(called["name"], store), called["nodes"])


_MPI = (  # a rank, their number, and both of one machine, as told by Open MPI; MPICH and Intel MPI; Cray; MVAPICH
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)


def adopt_mpirun() -> None:
    """Makes ranks, as torchrun would, of the processes that mpirun started.

    Raises:
        ValueError: they are on several machines and are not told where to meet, are not told where they are, or are
            told that each is alone.
    """
    names = _of_mpirun()
    size = names[1] if names is not None else next((size for _, size, *_ in _MPI if _is_number(size)), None)
    if size is None or int(os.environ[size]) < 2:
        return
    if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1":
        return  # ranks already
    if names is None:
        if size == "PMI_SIZE" and "SLURM_PROCID" in os.environ:
            return  # srun's, which gives it, too
        raise ValueError(
            f"{size} is {os.environ[size]}, but this mpirun does not tell which processes share a machine: "
            "start the ranks with `accelerate launch`, `torchrun` or `srun`."
        )
    rank, world, local_rank, local_world = (os.environ[name] for name in names)
    if "WORLD_SIZE" in os.environ:
        raise ValueError(f"WORLD_SIZE is 1, but mpirun started {world} processes: unset WORLD_SIZE.")
    missing = {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if local_world != world and missing:
        raise ValueError(
            f"mpirun started {world} ranks on several machines, but {' and '.join(sorted(missing))} is not set, so "
            "that they cannot find each other: add `-x MASTER_ADDR=HOST -x MASTER_PORT=29500` to mpirun (MPICH and "
            "Intel MPI: `-genv MASTER_ADDR HOST -genv MASTER_PORT 29500`), where HOST is the machine of rank 0."
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
    """Returns what mpirun calls rank, ranks, and both of this machine; None if no mpirun started this process."""
    return next((names for names in _MPI if all(map(_is_number, names))), None)


def _is_number(name: str) -> bool:
    """Tells whether an environment variable holds a number."""
    return os.environ.get(name, "").isdecimal()


def _ancestor_without(name: str) -> int:
    """Returns the number of the process that set a variable for this one or its parents; 0 if it cannot be seen."""
    for process in psutil.Process().parents():
        try:
            if name not in process.environ():
                return process.pid
        except psutil.Error:  # somebody else's, as a daemon's
            return process.pid
    return 0


def started_by() -> str:
    """Says what made this process a rank, in the user's words."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "accelerate launch or torchrun"
    if "WORLD_SIZE" not in os.environ:
        return "hand"
    return "mpirun" if _of_mpirun() else "srun" if "SLURM_PROCID" in os.environ else "its environment"


def adopt_srun() -> None:
    """Makes ranks, as torchrun would, of the tasks that srun itself started without a launcher on each node."""
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


def interface_towards(address: str) -> str:
    """Returns the name of the network interface that sends to an address, or that has it."""
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(kind, socket.SOCK_DGRAM) as sender:
        sender.connect((address, 9))  # sends nothing; the kernel chooses the way
        ours = sender.getsockname()[0].split("%")[0]
    for name, addresses in psutil.net_if_addrs().items():
        if ours in (a.address.split("%")[0] for a in addresses):
            return name
    raise AssertionError(f"no interface has {ours}")


def node() -> str:
    """Returns the number of the launcher, among all, that started this process."""
    return os.environ.get("GROUP_RANK", socket.gethostname())


def speaks_for_node() -> bool:
    """Tells whether this rank writes what each node's log is to hold once."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _agree(store: Store, rank: int, world: int, timeout: float) -> dict[str, Any]:
    """Waits until all ranks that are there answer to one call, and returns it."""
    deadline, heartbeat = time.monotonic() + timeout, 0
    me = f"process {os.getpid()} on {socket.gethostname()}"
    mine = {"token": uuid.uuid4().hex, "process": me, "node": node(), "address_of_0": _resolved()}
    store.set(f"here {rank}", json.dumps(mine))
    while True:
        store.set(f"waits {rank}", str(heartbeat := heartbeat + 1))
        if rank == 0:
            _call(store, world)
        here = json.loads(store.get(f"here {rank}"))
        if here != mine:
            raise _two(rank, me, here["process"])
        called = json.loads(store.get("called")) if store.check(["called"]) else None
        if called is not None and len(called["ranks"]) != world:
            raise ValueError(f"rank 0 was told of {len(called['ranks'])} ranks, rank {rank} of {world}: {_together()}.")
        if called is not None and called["ranks"][rank] == mine:
            store.set(f"answer {rank}", called["name"])
            if store.check(["agreed"]) and store.get("agreed").decode() == called["name"]:
                return called
        if time.monotonic() > deadline:
            raise _missing(store, rank, world, me, timeout)
        time.sleep(0.02 + world / 1000)


def _call(store: Store, world: int) -> None:
    """Names, on rank zero, the ranks that are there, again whenever they have changed; done once all answer to it."""
    names = [f"here {rank}" for rank in range(world)]
    if not store.check(names):
        return
    there = [json.loads(store.get(name)) for name in names]
    called = json.loads(store.get("called")) if store.check(["called"]) else None
    if called is None or called["ranks"] != there:
        addresses = [one["address_of_0"] for one in there]  # node 0 itself may know its own name as the loopback's
        away = [address for address in addresses if not _is_loopback(address)]
        nodes = len({one["node"] for one in there})
        called = {"name": uuid.uuid4().hex, "ranks": there, "nodes": nodes, "address_of_0": [*away, addresses[0]][0]}
        store.set("called", json.dumps(called))
    answers = [f"answer {rank}" for rank in range(world)]
    if store.check(answers) and all(store.get(answer).decode() == called["name"] for answer in answers):
        store.set("agreed", called["name"])


def _missing(store: Store, rank: int, world: int, me: str, timeout: float) -> BaseException:
    """Says who did not come. What a rank of an earlier start left in the store no longer changes."""
    called = json.loads(store.get("called")) if store.check(["called"]) else None
    group = PrefixStore(called["name"], store) if called is not None else store
    keys = [f"waits {other}" for other in range(world)]
    before, in_group = [_read(store, key) for key in keys], _read(group, f"rank {rank}")  # what a watchdog tells
    for count in range(30):  # 3 s, longer than one is silent
        store.set(f"waits {rank}", f"late {count}")
        time.sleep(0.1)
    after = [_read(store, key) for key in keys]
    if called is not None and _read(group, f"rank {rank}") != in_group:
        return _two(rank, me, called["ranks"][rank]["process"])
    gone = [other for other in range(world) if other != rank and before[other] == after[other]]
    missing = " and ".join(f"rank {other}" for other in gone) or "a rank"
    error = LostRankError(f"{missing} did not come within {timeout:g} s: {_together()}.")
    return error if speaks_for_node() else spoken_for(error)


def _read(store: Store, key: str) -> bytes | None:
    return store.get(key) if store.check([key]) else None


def _two(rank: int, one: str, other: str) -> ValueError:
    return ValueError(f"{one} and {other} both are rank {rank}: {_together()}.")


def _together() -> str:
    """Says what to do, in the launcher's own words."""
    if (by := started_by()) in ("mpirun", "srun"):
        return f"start all ranks by one {by}"
    return (
        "start the launchers of all nodes together, each with its own --machine_rank, and all with the same "
        "--num_machines, --main_process_ip and --main_process_port"
    )


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _resolved() -> str:
    """Returns rank zero's address, as this machine knows it."""
    found = socket.getaddrinfo(os.environ["MASTER_ADDR"], None, type=socket.SOCK_DGRAM)
    return str(found[0][4][0]).split("%")[0]
