"""Stop signals, and whatever else comes up on one rank, turned into decisions that all ranks take at the same step."""

import signal
import threading
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""From a person, a terminal that closes, or a launcher: all that torch's passes on."""
WARNING_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""What a cluster sends ahead of a limit."""


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
