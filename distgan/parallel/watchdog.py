"""Notices that a rank died or hangs, names it and its step, and ends the job instead of waiting for ever.

Process groups wait without a time limit, because no fixed time tells a rank that prepares data or saves from one that
is gone. Only the watchdog judges that. In each rank a thread writes a sign of life to the launcher's store: a counter,
the step, the line that the rank is in, and whether it does work alone for which the others must wait. A rank that has
made no progress for half of `timeout` reads the signs of the others:

    no new sign                        the rank, or its network, is lost
    signs, but no rank gets further    a rank that is furthest behind hangs, unless a rank works alone

The first rank to find something sets the key `told` and reports it, once for each node. A rank that leaves with an
error of its own sets `failed`; all others then leave, too, and the other nodes' logs name it.
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
    """A rank's sign of life."""

    beat: int
    """A counter that rises as long as the process lives and is not suspended."""
    step: int
    """The number of steps that the rank has finished."""
    progress: int
    """A counter that rises with each step, and with each part of the work within one."""
    place: str
    """The line of distgan that the rank is in."""
    alone: bool
    """Whether the rank does work for which the others wait without a limit."""


class Watchdog:
    """Watches over the ranks of one start."""

    def __init__(self, store: Store, rank: int, world: int, *, nodes: int, timeout: float) -> None:
        """Prepares the watch; `start` begins it.

        Args:
            store: the store that all ranks share.
            rank: this rank.
            world: the number of ranks.
            nodes: the number of nodes.
            timeout: seconds after which a lost rank ends the job.
        """
        self._rank, self._world, self._nodes, self._timeout = rank, world, nodes, timeout
        self._interval = min(2.0, timeout / 30)
        self._store = store.clone()  # its own connection, because another thread uses it
        self._store.set_timeout(timedelta(seconds=max(timeout / 10, 2)))
        self.step = 0  # the number of steps that this rank has finished
        self._moved, self._alone, self._leaving = time.monotonic(), False, False
        self._progress = 0
        self._main = threading.get_ident()  # the thread that trains
        self._failure: BaseException | None = None  # the error to leave with, if another rank failed
        self._beat, self._heard = 0, time.monotonic()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._alarm)]

    def start(self) -> None:
        """Begins to watch."""
        self._moved = self._heard = time.monotonic()
        for thread in self._threads:
            thread.start()

    def step_done(self, step: int) -> None:
        """Notes that this rank has finished a step."""
        self.step = step
        self.alive()

    def alive(self) -> None:
        """Notes that this rank has come further: a step, or a part of its work, is done."""
        self._moved = time.monotonic()
        self._progress += 1

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wraps work that this rank does alone, for which the others wait as long as it lives."""
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
        """Tells the others that this rank leaves with an error, unless the cause is another rank.

        Raises:
            LostRankError: another rank died or failed, and that broke a connection of this rank.
        """
        self._leaving = True

        # An error of this rank's own: the others need to know that it failed.
        lost_connection = _LOST_CONNECTION.search(f"{type(error).__name__} {error}")
        if isinstance(error, StoppedError) or not isinstance(error, RuntimeError) or not lost_connection:
            self._first("failed")
            self._keep_store()
            return

        # A broken connection: another rank has failed, or has said who is lost, or is silent now.
        try:
            self._look_for_a_failure()
            silent = [] if self._failure is not None or self._is_told() else self._silent(3 * self._interval)
            self._look_for_a_failure()
            told, of_another_node = self._is_told(), self._is_elsewhere("told")
        except RuntimeError:
            lost = LostRankError(f"rank 0, or its machine, was lost at step {self.step + 1}. {_GO_ON}")
            raise (self._failure or lost) from error

        # Somebody has said it already: this rank repeats it only for its own node's log.
        if self._failure is not None or told:
            self._keep_store()
            lost = LostRankError(f"another rank was lost at step {self.step + 1}. {_GO_ON}")
            raise (self._failure or (lost if of_another_node else mark_reported(lost))) from error

        # Nobody has: this rank reports it, unless another one is quicker.
        gone = _these(silent, "was", "were") if silent else "the connection to another rank was"
        said = f"{gone} lost at step {self.step + 1}."
        lost = LostRankError(f"{said} {_GO_ON}")
        if not self._first("told"):
            raise mark_reported(lost) from error
        self._linger()
        raise lost from error

    def _watch(self) -> None:
        """Writes this rank's signs of life, and judges the others if this rank has waited for long. A thread's work."""
        doomed = 0.0
        while not self._ended.wait(self._interval):
            # Another rank failed. This one's main thread may wait for it in a library that does not notice.
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
                continue  # the store cannot be reached; `_alarm` notices if that lasts
            self._heard = time.monotonic()

    def _alarm(self) -> None:
        """Leaves if the store is silent for long: `_watch` may wait for ever if its machine hangs. A thread's work."""
        deaf, heard = 0.0, self._heard
        while not self._ended.wait(self._interval):
            # Intervals are counted instead of reading the clock, because Slurm may suspend all ranks together.
            deaf = deaf + self._interval if self._waits_long() and self._heard == heard else 0.0
            heard = self._heard
            if deaf > 0.3 * self._timeout:
                self._leave(f"rank 0, or its machine, does not answer any more since step {self.step + 1}.")

    def _waits_long(self) -> bool:
        """Tells whether this rank has made no progress for half of the timeout, and does not work alone."""
        return not self._alone and time.monotonic() - self._moved > 0.5 * self._timeout

    def _tell(self) -> None:
        """Writes this rank's sign of life."""
        self._beat += 1
        sign = _Sign(self._beat, self.step, self._progress, _place(self._main), self._alone)
        self._store.set(f"rank {self._rank}", json.dumps(asdict(sign)))

    def _judge(self) -> None:
        """Ends the job if a rank is lost or hangs. This rank has made no progress for a long time."""
        # Wait long enough: a living process whose main thread keeps Python's lock writes no sign for seconds.
        before = self._signs()
        silent = self._silent(0.25 * self._timeout)
        signs = self._signs()

        # Somebody is slow, but gets on.
        if not silent and any(sign.progress != before[rank].progress for rank, sign in signs.items() if rank in before):
            return

        # Somebody is silent, or the slowest rank stands still while nobody works alone.
        if silent:
            self._end(f"{_these(silent, 'does', 'do')} not answer any more since step {self.step + 1}.")
        elif self._waits_long() and not any(sign.alone for sign in signs.values()):
            last = min(sign.step for sign in signs.values())
            behind = {rank: sign for rank, sign in signs.items() if sign.step == last}
            # Among the slowest ranks, those that wait for another rank are not the cause.
            stuck = {rank: sign for rank, sign in behind.items() if not sign.place.endswith(_WAITS)} or behind
            places = "; ".join(f"rank {rank} is in {sign.place}" for rank, sign in stuck.items())
            self._end(f"{_these(list(stuck), 'hangs', 'hang')} at step {last + 1} ({places}).")

    def _silent(self, seconds: float) -> list[int]:
        """Returns the ranks that write no new sign within these seconds. Raises RuntimeError if the store is gone."""
        before = after = self._signs()
        for _ in range(math.ceil(seconds / self._interval)):  # counted, as in _alarm
            time.sleep(self._interval)
            if threading.current_thread() in self._threads:
                self._tell()  # the others watch this rank meanwhile
            after = self._signs()
            self._heard = time.monotonic()
        # A rank that never wrote a sign is silent, too.
        return [r for r in range(self._world) if r != self._rank and after.get(r) == before.get(r)]

    def _signs(self) -> dict[int, _Sign]:
        names = {rank: f"rank {rank}" for rank in range(self._world)}
        there = {rank: name for rank, name in names.items() if self._store.check([name])}
        return {rank: _Sign(**json.loads(self._store.get(name))) for rank, name in there.items()}

    def _linger(self) -> None:
        """Waits a moment before this rank leaves: its store may go with it, and the others must still read `told`."""
        time.sleep(self._moment())

    def _moment(self) -> float:
        """Returns the seconds after which all living ranks have noticed a change in the store."""
        return min(10.0, 0.2 * self._timeout)

    def _keep_store(self) -> None:
        """Waits on node 0, whose launcher holds the store, to give the other nodes time to read it."""
        if self._nodes > 1 and node() == "0":
            time.sleep(3 * self._interval)

    def _look_for_a_failure(self) -> None:
        """Remembers that a rank failed, because the store may not outlive it for long."""
        if self._failure is None and self._store.check(["failed"]):
            rank = self._store.get("failed").decode().split(" ", 1)[0]
            lost = LostRankError(f"rank {rank}, on another node, failed; its error is in that node's log. {_GO_ON}")
            self._failure = lost if self._is_elsewhere("failed") else mark_reported(lost)

    def _is_elsewhere(self, key: str) -> bool:
        """Tells whether a rank of another node set a key, so that this rank must report it in its own node's log."""
        if not speaks_for_node() or not self._store.check([key]):
            return False
        return self._store.get(key).decode().split(" ", 1)[1] != node()

    def _is_told(self) -> bool:
        """Tells whether a rank has reported what it found. Raises RuntimeError if the store is gone."""
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
        """Ends this process, after reporting `what` if it is the first to find it, or the first on its node to know."""
        if self._first("told") or self._is_elsewhere("told"):
            self._leave(what)
        self._keep_store()
        os._exit(LostRankError.exit_code)

    def _leave(self, what: str) -> None:
        """Prints `what`, gives the others time to read `told`, and ends the process: its main thread may hang."""
        print(f"distgan: error: {what} {_GO_ON}", file=sys.stderr, flush=True)
        self._linger()
        os._exit(LostRankError.exit_code)


_PACKAGE = Path(__file__).parent.parent
_GO_ON = "Earlier checkpoints are good: the same command goes on from the newest one."
_WAITS = " (waits for other ranks)"


def _these(ranks: list[int], of_one: str, of_several: str) -> str:
    return f"{' and '.join(f'rank {rank}' for rank in ranks)} {of_one if len(ranks) == 1 else of_several}"


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
