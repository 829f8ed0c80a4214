"""Programs that take turns on this machine, so that their speeds can be compared although the machine's own changes.

Each program is a whole command, with processes of its own. While one runs, the others are suspended (SIGSTOP). It
reports by calling `tick` after each step, and a turn's speed is taken between two of its ticks. What is quoted is the
median, over rounds, of the ratio to the first program's speed in the same round.
"""

import contextlib
import os
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

_VARIABLE = "DISTGAN_BENCHMARK_TICKS"
_TICK = struct.Struct("<qd")  # how many steps, and when
_PATIENCE = 300  # seconds for a step, and for the preparation before the first


def tick(steps: int) -> None:
    """Reports the number of steps done. Outside a benchmark it does nothing."""
    if path := os.environ.get(_VARIABLE):
        descriptor = os.open(path, os.O_WRONLY)
        os.pwrite(descriptor, _TICK.pack(steps, time.monotonic()), 0)
        os.close(descriptor)


class Program(NamedTuple):
    """A command, and what is set in its environment."""

    command: Sequence[str]
    environment: Mapping[str, str] = {}
    images_per_step: int = 1


class _Running:
    def __init__(self, program: Program, folder: Path, name: str) -> None:
        self._ticks = folder / f"{name}.ticks"
        self._ticks.write_bytes(_TICK.pack(0, 0.0))
        self._said = folder / f"{name}.log"
        environment = {**os.environ, **program.environment, _VARIABLE: str(self._ticks)}
        with self._said.open("wb") as log:
            self._process = subprocess.Popen(
                program.command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self._per_step, self._name = program.images_per_step, name

    def suspend(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        """Signals the program and all processes that it started: launchers give them sessions of their own."""
        program = psutil.Process(self._process.pid)
        for process in [program, *program.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def wait_for_step(self, step: int) -> tuple[int, float]:
        """Waits until so many steps are done, and returns the last tick."""
        until = time.monotonic() + _PATIENCE
        while (seen := _TICK.unpack(self._ticks.read_bytes()))[0] < step:
            if time.monotonic() > until:
                sys.exit(f"{self._name} made no step {step} in {_PATIENCE} s:\n{self._said.read_text()}")
            if self._process.poll() is not None:
                sys.exit(f"{self._name} ended with {self._process.returncode}:\n{self._said.read_text()}")
            time.sleep(0.002)
        return seen

    def speed(self, seconds: float) -> float:
        """Images per second over a turn of so many seconds, which begins at the first step that is done in it."""
        self.go_on()
        before = _TICK.unpack(self._ticks.read_bytes())[0]
        first, began = self.wait_for_step(before + 2)  # the step in which it was suspended is not counted
        time.sleep(seconds)
        last, ended = self.wait_for_step(first + 1)
        self.suspend()
        return (last - first) * self._per_step / (ended - began)


def speeds(
    programs: Mapping[str, Program],
    *,
    rounds: int = 9,
    seconds: float = 4,
    warm: int = 5,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Runs all programs by turns; returns each one's images per second in each round.

    Args:
        programs: by name.
        rounds: how often each has a turn.
        seconds: how long a turn is.
        warm: how many steps each makes before the first turn.
        after_round: is called after each round.
    """
    measured: dict[str, list[float]] = {name: [] for name in programs}
    running: dict[str, _Running] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, program in programs.items():
                running[name] = _Running(program, Path(folder), str(len(running)))
                running[name].wait_for_step(warm)
                running[name].suspend()
            for _ in range(rounds):
                for name, one in running.items():
                    measured[name].append(one.speed(seconds))
                after_round()
        finally:
            for one in running.values():
                one.end()
    return measured


def until_first_tick(program: Program) -> float:
    """Starts a program by itself, and kills it at its first tick; returns the seconds that it took to get there."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        running = _Running(program, Path(folder), "program")
        try:
            return running.wait_for_step(1)[1] - started
        finally:
            running.end()


def ratio(measured: Mapping[str, Sequence[float]], name: str, to: str) -> float:
    """The median of the ratios of two programs' speeds, round by round."""
    return statistics.median(a / b for a, b in zip(measured[name], measured[to], strict=True))


def processor() -> str:
    """The processor's name, and which of the instructions it has that bf16 needs to be fast."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    said = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    has = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in said.get("flags", "").split()]
    return f"{said.get('model name', 'unknown processor')} (family {said.get('cpu family')}, {', '.join(has)})"
