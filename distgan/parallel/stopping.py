"""Turns stop signals, and other events on one rank, into decisions that all ranks take at the same step."""

import signal
import threading
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals from a person, a closing terminal or a launcher: all that torch's launcher passes on."""
WARNING_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Signals that a cluster sends ahead of a time limit."""


class Agreed(NamedTuple):
    """A decision of all ranks at the same step."""

    stop: int
    """The number of the stop signal that a rank received, because of which to save and leave; 0 if there was none."""
    save: bool
    """Whether to save, because rank zero asked for it."""
    failed: bool
    """Whether rank zero's last save in the background has failed."""


class Requests:
    """Collects requests of single ranks and turns them into decisions of all ranks.

    The flags of a step are reduced over a separate CPU group while the next step runs, and are read after that. So no
    step waits for them.
    """

    def __init__(self) -> None:
        self.group: Any = None  # the CPU group, once several ranks have joined
        self._received = 0  # the number of a signal
        self._flags = np.zeros(len(Agreed._fields), dtype=np.int32)
        self._pending: Any = None
        self._previous: dict[int, Any] = {}

    def listen(self, *numbers: int) -> None:
        """Turns these signals into requests to stop from now on. A hangup that is ignored (`nohup`) stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets only the main thread handle signals
        for number in numbers:
            self._previous[number] = signal.getsignal(number)
            if number != signal.SIGHUP or self._previous[number] != signal.SIG_IGN:
                signal.signal(number, self._receive)

    def unlisten(self, *numbers: int) -> None:
        """Restores the earlier handlers of these signals."""
        for number in numbers:
            if (previous := self._previous.pop(number, None)) is not None:  # None: the handler was not set from Python
                signal.signal(number, previous)

    def finish(self) -> None:
        """Collective: waits for the reduction that is still under way."""
        if self._pending is not None:
            self._pending.wait()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def agreed(self, *, save: bool, failed: bool) -> Agreed:
        """Collective, once per step: returns on every rank the decision about the requests of the step before.

        With one rank it is about the requests of this step.
        """
        now = (self._received, save, failed)
        if self.group is None:
            return Agreed(*now)
        answer = Agreed(0, False, False)
        if self._pending is not None:
            self._pending.wait()
            stop, *others = self._flags.tolist()
            answer = Agreed(stop, *map(bool, others))
        self._flags[:] = now
        flags = torch.from_numpy(self._flags)
        self._pending = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return answer
