"""How ranks find each other: in the launcher's store, before any process group, whatever was in that store before."""

import contextlib
import ipaddress
import json
import os
import socket
import time
import uuid
from datetime import timedelta
from typing import Any, NamedTuple

import psutil
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from distgan.errors import LostRankError, UserError, mark_reported
from distgan.parallel.launch import node, speaks_for_node, started_by


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
        UserError: there are two of a rank, their numbers differ, or the meeting place is taken by another program.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, world = _launchers_store(timeout)
        called = _agree(store, rank, world, timeout)
    except LostRankError:
        raise
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(f"{place} is taken by another program: set MASTER_PORT to a free port.") from error
        _met.clear()  # its connection broke: the next run of this process connects anew
        unreached = LostRankError(f"the other ranks cannot be reached at {place}: {_together()}.")
        raise (unreached if speaks_for_node() else mark_reported(unreached)) from error
    if called["nodes"] > 1:
        own = called["ranks"][rank]["address_of_0"]
        address = called["address_of_0"] if _is_loopback(own) else own
        with contextlib.suppress(OSError):  # no way to it: gloo's own choice cannot be worse
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_towards(address))
    return Meeting(PrefixStore(called["name"], store), called["nodes"])


_met: dict[tuple[str, ...], tuple[Store, int, int]] = {}
"""The launcher's store, by what the launcher says, for as long as the process lives.

Rank zero may be its server. If that ended with each run, another rank that is quick to begin the next run in the same
process would meet at the old one while it ends.
"""
os.register_at_fork(after_in_child=_met.clear)


def _launchers_store(seconds: float) -> tuple[Store, int, int]:
    """Returns the launcher's store, this rank and the number of ranks."""
    said = tuple(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
    if said not in _met:
        _met[said] = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
    _met[said][0].set_timeout(timedelta(seconds=seconds))
    return _met[said]


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
            raise UserError(f"rank 0 was told of {len(called['ranks'])} ranks, rank {rank} of {world}: {_together()}.")
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
    return error if speaks_for_node() else mark_reported(error)


def _read(store: Store, key: str) -> bytes | None:
    return store.get(key) if store.check([key]) else None


def _two(rank: int, one: str, other: str) -> UserError:
    return UserError(f"{one} and {other} both are rank {rank}: {_together()}.")


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
