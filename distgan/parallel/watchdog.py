"""Notices that a rank died or hangs, says which and at what step, and ends the job instead of waiting for ever.

Process groups wait with endless patience, since no fixed time tells a machine that prepares or saves from one that is
gone. This is the one judge: from a thread, each rank keeps telling the launcher's store that it lives, at which step it
is, in what line, and whether it does something alone that the others must wait for. A rank that has come no further
for most of `timeout` reads what the others tell.
"""

import json
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.distributed_c10d import Store

from distgan.errors import LostRankError, StoppedError, is_reported, mark_reported
from distgan.parallel.launch import node, speaks_for_node

_LOST_CONNECTION = re.compile(r"[Gg]loo|NCCL|Connection (closed|reset|refused)|Broken pipe|Dist\w+Error|TCPStore")


@dataclass(frozen=True)
class _Sign:
    """What a rank tells of itself."""

    beat: int
    """Counts up as long as the process lives and is not stopped."""
    step: int
    """Steps that it has finished."""
    progress: int
    """Counts up with each step, and with what it gets done within one."""
    place: str
    """The line of distgan that it is in."""
    alone: bool
    """Whether it does something that the others wait for, however long."""


class Watchdog:
    """Watches over the ranks of a process group while it is open."""

    def __init__(self, store: Store, rank: int, world: int, *, nodes: int, timeout: float) -> None:
        """Begins with no rank watched yet.

        Args:
            store: reached by all ranks.
            rank, world: this rank, and how many there are.
            nodes: how many launchers there are.
            timeout: seconds after which a lost rank ends the job.
        """
        self._rank, self._world, self._nodes, self._timeout = rank, world, nodes, timeout
        self._interval = min(2.0, timeout / 30)
        self._store = store.clone()  # a connection of its own: it is a thread's
        self._store.set_timeout(timedelta(seconds=max(timeout / 10, 2)))
        self.step = 0  # that this rank has finished
        self._moved, self._alone, self._leaving = time.monotonic(), False, False
        self._progress = 0
        self._main = threading.get_ident()  # the thread that trains
        self._failure: BaseException | None = None  # of another rank
        self._beat, self._heard = 0, time.monotonic()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._alarm)]

    def start(self) -> None:
        """Begins to watch."""
        self._moved = self._heard = time.monotonic()
        for thread in self._threads:
            thread.start()

    def step_done(self, step: int) -> None:
        """This rank has finished a step."""
        self.step = step
        self.alive()

    def alive(self) -> None:
        """This rank has come further: a step, or a part of what is done at one, is over."""
        self._moved = time.monotonic()
        self._progress += 1

    @contextmanager
    def alone(self) -> Iterator[None]:
        """This rank does something alone, for which the others wait as long as it lives."""
        self._alone = True
        try:
            yield
        finally:
            self._alone, self._moved = False, time.monotonic()

    def stop(self) -> None:
        """Ends the watch."""
        self._ended.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def report_failure(self, error: BaseException) -> None:
        """Tells the others why this rank leaves with an error; where the cause lies elsewhere, raises what that is.

        Raises:
            LostRankError: another rank died or failed, which is what broke a connection of this one.
        """
        self._leaving = True
        lost_connection = _LOST_CONNECTION.search(f"{type(error).__name__} {error}")
        if isinstance(error, StoppedError) or not isinstance(error, RuntimeError) or not lost_connection:
            self._first("failed")
            self._keep_store()
            return
        try:
            self._look_for_a_failure()
            silent = [] if self._failure is not None or self._is_told() else self._silent(3 * self._interval)
            self._look_for_a_failure()
            told, of_another_node = self._is_told(), self._is_elsewhere("told")
        except RuntimeError:
            lost = LostRankError(f"rank 0, or its machine, was lost at step {self.step + 1}. {_GO_ON}")
            raise (self._failure or lost) from error
        if self._failure is not None or told:
            self._keep_store()
            lost = LostRankError(f"another rank was lost at step {self.step + 1}. {_GO_ON}")
            raise (self._failure or (lost if of_another_node else mark_reported(lost))) from error
        said = f"{_these(silent) if silent else 'the connection to another rank'} was lost at step {self.step + 1}."
        lost = LostRankError(f"{said} {_GO_ON}")
        if not self._first("told"):
            raise mark_reported(lost) from error
        self._linger()
        raise lost from error

    def _watch(self) -> None:
        doomed = 0.0
        while not self._ended.wait(self._interval):
            # Where a rank failed, this one may wait for it in a library that does not notice.
            if self._failure is None or self._alone or self._leaving:
                doomed = 0.0
            elif (doomed := doomed + self._interval) > self._moment():
                self._follow(self._failure)
            try:
                self._tell()
                self._look_for_a_failure()
                if self._waits_long():
                    self._judge()
            except RuntimeError:
                continue  # the store is gone; the alarm notices if that lasts
            self._heard = time.monotonic()

    def _alarm(self) -> None:
        """Runs beside the watch, which may wait for ever on a store whose machine hangs."""
        deaf, heard = 0.0, self._heard
        while not self._ended.wait(self._interval):
            # Counted, not read off the clock: all ranks may have been suspended together, as Slurm does.
            deaf = deaf + self._interval if self._waits_long() and self._heard == heard else 0.0
            heard = self._heard
            if deaf > 0.3 * self._timeout:
                self._leave(f"rank 0, or its machine, does not answer any more since step {self.step + 1}.")

    def _waits_long(self) -> bool:
        return not self._alone and time.monotonic() - self._moved > 0.5 * self._timeout

    def _tell(self) -> None:
        self._beat += 1
        sign = _Sign(self._beat, self.step, self._progress, _place(self._main), self._alone)
        self._store.set(f"rank {self._rank}", json.dumps(asdict(sign)))

    def _judge(self) -> None:
        """Ends the job where a rank is lost. This one has come no further for a long time."""
        # Long enough for a process that lives: one whose main thread keeps Python's lock for seconds tells nothing.
        before = self._signs()
        silent = self._silent(0.25 * self._timeout)
        signs = self._signs()
        if not silent and any(sign.progress != before[rank].progress for rank, sign in signs.items() if rank in before):
            return  # one that is slower than the others gets on
        if silent:
            self._end(f"{_these(silent)} does not answer any more since step {self.step + 1}.")
        elif self._waits_long() and not any(sign.alone for sign in signs.values()):
            last = min(sign.step for sign in signs.values())
            behind = {rank: sign for rank, sign in signs.items() if sign.step == last}
            # Of those that are as far, the ones that wait for another are not it.
            stuck = {rank: sign for rank, sign in behind.items() if not sign.place.endswith(_WAITS)} or behind
            places = "; ".join(f"rank {rank} is in {sign.place}" for rank, sign in stuck.items())
            self._end(f"{_these(list(stuck))} hangs at step {last + 1} ({places}).")

    def _silent(self, seconds: float) -> list[int]:
        """Ranks from which nothing is heard for so long. Raises where the store is gone."""
        before = after = self._signs()
        for _ in range(math.ceil(seconds / self._interval)):  # counted, as in _alarm
            time.sleep(self._interval)
            if threading.current_thread() in self._threads:
                self._tell()  # this rank is watched, too
            after = self._signs()
            self._heard = time.monotonic()
        return [r for r in range(self._world) if r != self._rank and after.get(r) == before.get(r)]

    def _signs(self) -> dict[int, _Sign]:
        names = {rank: f"rank {rank}" for rank in range(self._world)}
        there = {rank: name for rank, name in names.items() if self._store.check([name])}
        return {rank: _Sign(**json.loads(self._store.get(name))) for rank, name in there.items()}

    def _linger(self) -> None:
        """The others judge likewise, and are to find that it is told, maybe in a store that leaves with this rank."""
        time.sleep(self._moment())

    def _moment(self) -> float:
        """Seconds in which all ranks that live have noticed something."""
        return min(10.0, 0.2 * self._timeout)

    def _keep_store(self) -> None:
        """On node 0, whose launcher takes the store along, gives the others the time to look into it."""
        if self._nodes > 1 and node() == "0":
            time.sleep(3 * self._interval)

    def _look_for_a_failure(self) -> None:
        """Remembers what is to be said of a rank that failed: the store may not outlive it for long."""
        if self._failure is None and self._store.check(["failed"]):
            rank = self._store.get("failed").decode().split(" ", 1)[0]
            lost = LostRankError(f"rank {rank}, on another node, failed, and says there why. {_GO_ON}")
            self._failure = lost if self._is_elsewhere("failed") else mark_reported(lost)

    def _is_elsewhere(self, key: str) -> bool:
        """Tells whether a rank of another node set a key, and this one reports it in its own node's log."""
        if not speaks_for_node() or not self._store.check([key]):
            return False
        return self._store.get(key).decode().split(" ", 1)[1] != node()

    def _is_told(self) -> bool:
        """Tells whether a rank has reported what it found. Raises if the store is gone."""
        return self._store.check(["told"])

    def _first(self, key: str) -> bool:
        """Tells whether this rank is the first to set a key."""
        mine = f"{self._rank} {node()}"
        try:
            return self._store.compare_set(key, "", mine).decode() == mine
        except RuntimeError:
            return True

    def _follow(self, failure: BaseException) -> None:
        """Ends after a rank that failed."""
        if not is_reported(failure):
            print(f"distgan: error: {failure}", file=sys.stderr, flush=True)
        self._keep_store()
        os._exit(LostRankError.exit_code)

    def _end(self, what: str) -> None:
        if self._first("told") or self._is_elsewhere("told"):
            self._leave(what)
        self._keep_store()
        os._exit(LostRankError.exit_code)

    def _leave(self, what: str) -> None:
        """Says it and leaves at once: the main thread waits in a library for what does not come."""
        print(f"distgan: error: {what} {_GO_ON}", file=sys.stderr, flush=True)
        self._linger()
        os._exit(LostRankError.exit_code)


_PACKAGE = Path(__file__).parent.parent
_GO_ON = "The checkpoints before are good: the same command goes on from the newest."
_WAITS = " (waits for other ranks)"


def _these(ranks: list[int]) -> str:
    return " and ".join(f"rank {rank}" for rank in ranks)


def _place(thread: int | None) -> str:
    """Returns the innermost line of distgan that a thread is in, and whether it waits for other ranks there."""
    frame: FrameType | None = sys._current_frames().get(thread) if thread is not None else None
    stack = traceback.extract_stack(frame) if frame is not None else []
    ours = [line for line in stack if Path(line.filename).is_relative_to(_PACKAGE)]
    if not ours:
        return "a library"
    innermost: Any = ours[-1]
    waits = any("torch/distributed" in line.filename or line.name == "_engine_run_backward" for line in stack)
    return f"{Path(innermost.filename).name}:{innermost.lineno}, {innermost.line}{_WAITS if waits else ''}"
