"""How ranks find each other: in the launcher's store, before any process group, whatever was in that store before."""

import ipaddress
import json
import os
import re
import socket
import time
import uuid
from datetime import timedelta
from typing import Any

import psutil
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from distgan.errors import LostRankError, spoken_for

_TOGETHER = "start the launchers of all nodes together, each with its own --machine_rank"


def meet(*, timeout: float) -> Store:
    """Collective: returns a store that only the ranks of this start share, once all of them are there.

    A launcher that restarts its group keeps its store, and one node's launcher may have been started again while
    another's stayed, so that neither the store nor the number of restarts tells the living from those before. Rank zero
    therefore gives a name to the ranks that it sees, until all of them answer to the same.

    On several nodes it also chooses gloo's network interface: gloo would take the one that the host's own name leads
    to, which on many machines is the loopback.

    Args:
        timeout: seconds to wait for the others.

    Raises:
        LostRankError: not all came in time.
        ValueError: there are two of a rank, or the meeting place is taken by another program.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        called = _agree(store, rank, world, timeout)
    except LostRankError:
        raise
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise ValueError(f"{place} is taken by another program: choose another --main_process_port.") from error
        raise LostRankError(
            f"the other ranks cannot be reached at {place}: {_TOGETHER} and the same --main_process_ip and "
            "--main_process_port, open to all nodes."
        ) from error
    if called["nodes"] > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_towards(called["address_of_0"]))
    return PrefixStore(called["name"], store)


def adopt_srun() -> None:
    """Where srun itself started several tasks, without a launcher on each node, makes them ranks, as torchrun would."""
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
    name, first, rest = re.match(r"([^,\[]+)(?:\[(\d+)[^]]*\]([^,]*))?", os.environ["SLURM_STEP_NODELIST"]).groups("")  # type: ignore[union-attr]
    try:
        socket.getaddrinfo(head := name + first + rest, None)
    except socket.gaierror:
        head = os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[node_number]),
        "GROUP_RANK": str(node_number),
        "MASTER_ADDR": head,
        "MASTER_PORT": str(10000 + (job + 997 * step) % 20000),
    }


def interface_towards(address: str) -> str:
    """The name of the network interface over which this machine sends to an address, or which has it."""
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(kind, socket.SOCK_DGRAM) as sender:
        sender.connect((address, 9))  # sends nothing; the kernel chooses the way
        ours = sender.getsockname()[0].split("%")[0]
    for name, addresses in psutil.net_if_addrs().items():
        if ours in (a.address.split("%")[0] for a in addresses):
            return name
    raise AssertionError(f"no interface has {ours}")


def node() -> str:
    """Which of the launchers started this process."""
    return os.environ.get("GROUP_RANK", socket.gethostname())


def _agree(store: Store, rank: int, world: int, timeout: float) -> dict[str, Any]:
    """Waits until all ranks that are there answer to one call, and returns it."""
    deadline = time.monotonic() + timeout
    me = f"process {os.getpid()} on {socket.gethostname()}"
    mine = {"token": uuid.uuid4().hex, "process": me, "node": node(), "address_of_0": _resolved()}
    store.set(f"here {rank}", json.dumps(mine))
    while True:
        if rank == 0:
            _call(store, world)
        here = json.loads(store.get(f"here {rank}"))
        if here != mine:
            raise _two(rank, me, here["process"])
        called = json.loads(store.get("called")) if store.check(["called"]) else None
        if called is not None and called["ranks"][rank] == mine:
            store.set(f"answer {rank}", called["name"])
            if store.check(["agreed"]) and store.get("agreed").decode() == called["name"]:
                return called
        if time.monotonic() > deadline:
            raise _missing(store, rank, world, me, timeout)
        time.sleep(0.02 + world / 1000)


def _call(store: Store, world: int) -> None:
    """On rank zero: names the ranks that are there, anew whenever they have changed; agreed once all answer to it."""
    names = [f"here {rank}" for rank in range(world)]
    if not store.check(names):
        return
    there = [json.loads(store.get(name)) for name in names]
    called = json.loads(store.get("called")) if store.check(["called"]) else None
    if called is None or called["ranks"] != there:
        addresses = [one["address_of_0"] for one in there]  # node 0 itself may know its own name as the loopback's
        away = [address for address in addresses if not ipaddress.ip_address(address).is_loopback]
        nodes = len({one["node"] for one in there})
        called = {"name": uuid.uuid4().hex, "ranks": there, "nodes": nodes, "address_of_0": [*away, addresses[0]][0]}
        store.set("called", json.dumps(called))
    answers = [f"answer {rank}" for rank in range(world)]
    if store.check(answers) and all(store.get(answer).decode() == called["name"] for answer in answers):
        store.set("agreed", called["name"])


def _missing(store: Store, rank: int, world: int, me: str, timeout: float) -> BaseException:
    """Told by the first that is there."""
    there = [other for other in range(world) if store.check([f"here {other}"])]
    missing = " and ".join(f"rank {other}" for other in range(world) if other not in there)
    if not missing and store.check(["agreed"]):  # without this one
        return _two(rank, me, json.loads(store.get("called"))["ranks"][rank]["process"])
    error = LostRankError(f"{missing or 'a rank'} did not come within {timeout:g} s (run.timeout): {_TOGETHER}.")
    return error if rank == there[0] else spoken_for(error)


def _two(rank: int, one: str, other: str) -> ValueError:
    return ValueError(f"{one} and {other} both are rank {rank}: {_TOGETHER}.")


def _resolved() -> str:
    """Rank zero's address, as this machine knows it."""
    found = socket.getaddrinfo(os.environ["MASTER_ADDR"], None, type=socket.SOCK_DGRAM)
    return str(found[0][4][0]).split("%")[0]
