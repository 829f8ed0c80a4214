"""Lets ranks find each other in the launcher's store, before any process group exists.

The store may still hold what earlier starts wrote. Its keys here are

    here N     what rank N is: a random token, its process, its node
    waits N    a counter that rank N raises while it waits
    called     rank zero's list of all ranks, with a random name for this start
    answer N   the name that rank N has found itself called by
    agreed     the name, once all ranks have answered with it
"""

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
    """The result of `meet`."""

    store: Store
    """A part of the launcher's store that only the ranks of this start use."""
    nodes: int
    """The number of nodes that the ranks are on."""


def meet(*, timeout: float) -> Meeting:
    """Collective: waits until all ranks of this start are there.

    A launcher that restarts its workers keeps its store. One node's launcher may also have been started again while
    another's kept running. So neither the store nor the number of restarts tells living ranks from earlier ones.
    Therefore rank zero gives the ranks that it sees a random name, and a new one whenever they change, until all of
    them answer with it.

    On several nodes this also chooses gloo's network interface. By itself gloo takes the interface of the host's own
    name, which on many machines is the loopback.

    Args:
        timeout: seconds to wait for the others.

    Raises:
        LostRankError: not all ranks came in time, or the store cannot be reached.
        UserError: two processes have the same rank, ranks disagree about their number, or another program uses the
            port.
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
        _met.clear()  # the connection broke, so the next run of this process makes a new one
        unreached = LostRankError(f"the other ranks cannot be reached at {place}: {_together()}.")
        raise (unreached if speaks_for_node() else mark_reported(unreached)) from error
    if called["nodes"] > 1:
        own = called["ranks"][rank]["address_of_0"]
        address = called["address_of_0"] if _is_loopback(own) else own
        with contextlib.suppress(OSError):  # no route to the address: gloo's own choice cannot be worse
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_towards(address))
    return Meeting(PrefixStore(called["name"], store), called["nodes"])


_met: dict[tuple[str, ...], tuple[Store, int, int]] = {}
"""The launcher's store, rank and world by the launcher's variables. It is kept as long as the process lives.

Rank zero may be the store's server. If the server ended with each run, a quick rank that begins the next run in the
same process could connect to the old server just before it ends.
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
    """Waits until all ranks have answered one call, and returns the call."""
    deadline, heartbeat = time.monotonic() + timeout, 0
    me = f"process {os.getpid()} on {socket.gethostname()}"
    mine = {"token": uuid.uuid4().hex, "process": me, "node": node(), "address_of_0": _resolved()}
    store.set(f"here {rank}", json.dumps(mine))
    while True:
        # Each round says "I am still waiting"; rank zero also calls the ranks, once all have written.
        store.set(f"waits {rank}", str(heartbeat := heartbeat + 1))
        if rank == 0:
            _call(store, world)

        # Somebody else wrote under this rank's name: two processes have the same rank.
        here = json.loads(store.get(f"here {rank}"))
        if here != mine:
            raise _two(rank, me, here["process"])

        # A call may be an earlier start's. It counts only if this very process is in it.
        called = json.loads(store.get("called")) if store.check(["called"]) else None
        if called is not None and len(called["ranks"]) != world:
            raise UserError(f"rank 0 was told of {len(called['ranks'])} ranks, rank {rank} of {world}: {_together()}.")
        if called is not None and called["ranks"][rank] == mine:
            store.set(f"answer {rank}", called["name"])
            if store.check(["agreed"]) and store.get("agreed").decode() == called["name"]:
                return called

        # Not all are there yet.
        if time.monotonic() > deadline:
            raise _missing(store, rank, world, me, timeout)
        time.sleep(0.02 + world / 1000)


def _call(store: Store, world: int) -> None:
    """Calls the ranks that are there, on rank zero; calls again if they change, and agrees once all have answered."""
    # Wait until every rank has written something, even if some of it is an earlier start's.
    names = [f"here {rank}" for rank in range(world)]
    if not store.check(names):
        return
    there = [json.loads(store.get(name)) for name in names]

    # A new call, with a new name, whenever these processes are not the ones that were called last.
    called = json.loads(store.get("called")) if store.check(["called"]) else None
    if called is None or called["ranks"] != there:
        addresses = [one["address_of_0"] for one in there]  # node 0 may resolve its own name to the loopback
        away = [address for address in addresses if not _is_loopback(address)]
        nodes = len({one["node"] for one in there})
        called = {"name": uuid.uuid4().hex, "ranks": there, "nodes": nodes, "address_of_0": [*away, addresses[0]][0]}
        store.set("called", json.dumps(called))

    # All have answered with this name: only living processes can, because it is random.
    answers = [f"answer {rank}" for rank in range(world)]
    if store.check(answers) and all(store.get(answer).decode() == called["name"] for answer in answers):
        store.set("agreed", called["name"])


def _missing(store: Store, rank: int, world: int, me: str, timeout: float) -> BaseException:
    """Returns the error that names the ranks that did not come: those whose counters stand still."""
    called = json.loads(store.get("called")) if store.check(["called"]) else None
    group = PrefixStore(called["name"], store) if called is not None else store
    keys = [f"waits {other}" for other in range(world)]
    before, in_group = [_read(store, key) for key in keys], _read(group, f"rank {rank}")  # the watchdog's sign of life
    for count in range(30):  # 3 s, longer than a living rank is silent
        store.set(f"waits {rank}", f"late {count}")
        time.sleep(0.1)
    after = [_read(store, key) for key in keys]
    # A watchdog that shows life under this rank belongs to another process of the same rank, which is training.
    if called is not None and _read(group, f"rank {rank}") != in_group:
        return _two(rank, me, called["ranks"][rank]["process"])
    gone = [other for other in range(world) if other != rank and before[other] == after[other]]
    missing = " and ".join(f"rank {other}" for other in gone) or "a rank"
    error = LostRankError(f"{missing} did not join within {timeout:g} s: {_together()}.")
    return error if speaks_for_node() else mark_reported(error)


def _read(store: Store, key: str) -> bytes | None:
    return store.get(key) if store.check([key]) else None


def _two(rank: int, one: str, other: str) -> UserError:
    return UserError(f"{one} and {other} are both rank {rank}: {_together()}.")


def _together() -> str:
    """Returns what to do, in the words of mpirun, srun, or accelerate launch and torchrun."""
    if (by := started_by()) in ("mpirun", "srun"):
        return f"start all processes with one {by}"
    return (
        "start the launchers of all nodes together, each with its own --machine_rank, and all with the same "
        "--num_machines, --main_process_ip and --main_process_port (torchrun: --node-rank, --nnodes, --master-addr and "
        "--master-port)"
    )


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _resolved() -> str:
    """Returns rank zero's address, as this machine knows it."""
    found = socket.getaddrinfo(os.environ["MASTER_ADDR"], None, type=socket.SOCK_DGRAM)
    return str(found[0][4][0]).split("%")[0]
