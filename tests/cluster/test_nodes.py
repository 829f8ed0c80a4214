"""Two launchers as two nodes, each in a network of its own, joined by a cable that can be pulled."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.programs import launch
from support.runs import REPOSITORY, TINY, metrics, steps, tensors, wait_for

ADDRESSES = ("10.231.77.1", "10.231.77.2")
LAUNCH = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", "launch/two_nodes.yaml"]
ENDLESS = ["--train.steps=1000000", "--checkpoint.every=10", "--checkpoint.keep_last=1000"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Nodes:
    """Two network namespaces, in which the host's own name leads to the loopback, as on many machines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"distgan-{os.getpid()}-{n}" for n in range(2)]
        self.started: list[subprocess.Popen] = []

    def up(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "dg0", "netns", self.names[0], "type", "veth", "peer", "name", "dg0", "netns", self.names[1])
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "dg0")
            ip("-n", name, "link", "set", "dg0", "up")

    def down(self) -> None:
        for process in self.started:
            process.kill()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def start(
        self, node: int, *overrides: str, rank: int | None = None, log: str = "log", launcher: Sequence[str] = ()
    ) -> subprocess.Popen:
        """Starts one process on a node, by the shipped launch file."""
        node_rank = ["--machine_rank", str(node if rank is None else rank), "--main_process_ip", ADDRESSES[0]]
        command = [*LAUNCH, "--num_processes", "2", *node_rank, *launcher, "-m", "distgan.train", *TINY]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[node], *command, f"--run.dir={self.folder / 'run'}", *overrides],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=self.log(node, log).open("w"),
            stderr=subprocess.STDOUT,
        )
        self.started.append(process)
        return process

    def log(self, node: int, name: str = "log") -> Path:
        return self.folder / f"{name}-{node}"

    def said(self, node: int, name: str = "log") -> list[str]:
        """distgan's own sentences on a node."""
        return [line for line in self.log(node, name).read_text().splitlines() if line.startswith("distgan: error: ")]

    def wait_for_step(self, step: int) -> None:
        checkpoint = self.folder / "run" / "checkpoints" / f"step_{step:08d}"
        wait_for(checkpoint.exists, seconds=90, said=lambda: str([self.log(n).read_text()[-2000:] for n in range(2)]))


@pytest.fixture
def nodes(tmp_path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    try:
        made.up()
    except (OSError, subprocess.CalledProcessError) as error:
        made.down()
        pytest.skip(f"needs the right to make network namespaces ({error})")
    yield made
    made.down()


def worker(rank: int, run: Path) -> int:
    """The process of a run's rank that its launcher started."""
    for folder in Path("/proc").iterdir():
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment and f"--run.dir={run}".encode() in command:
            return int(folder.name)
    raise AssertionError(f"no rank {rank}")


def test_a_node_lost_and_started_again_changes_no_bit(nodes, tmp_path):
    """One node's worker is killed and restarted by the launchers; then its launcher is killed, and both started again,
    one of them late."""
    run = tmp_path / "run"
    both = [nodes.start(n, *ENDLESS, "--run.timeout=30", launcher=["--max_restarts", "1"]) for n in range(2)]
    nodes.wait_for_step(20)
    os.kill(worker(1, run), signal.SIGKILL)
    nodes.wait_for_step(steps(run)[-1] + 30)
    both[1].kill()
    assert both[0].wait(timeout=60) != 0
    assert [line.split(" at step")[0] for line in nodes.said(0)] == ["distgan: error: rank 1 was lost"] * 2
    assert nodes.log(0).read_text().count("resuming at step") == 1

    stop = f"--run.stop_at={steps(run)[-1] + 15}"
    first = nodes.start(0, *ENDLESS, stop, log="again")
    time.sleep(8)
    assert first.poll() is None
    late = nodes.start(1, *ENDLESS, stop, log="again")
    assert [first.wait(timeout=60), late.wait(timeout=60)] == [0, 0], nodes.log(0, "again").read_text()
    assert launch([*TINY, *ENDLESS, stop, f"--run.dir={tmp_path / 'whole'}"], world=2) == [0, 0]
    assert metrics(run) == metrics(tmp_path / "whole")
    assert tensors(run, steps(run)[-1]) == tensors(tmp_path / "whole", steps(run)[-1])


def test_a_network_that_breaks_ends_both_nodes_and_each_says_whom_it_lost(nodes):
    both = [nodes.start(n, *ENDLESS, "--run.timeout=8") for n in range(2)]
    nodes.wait_for_step(20)
    ip("-n", nodes.names[1], "link", "set", "dg0", "down")
    assert all(node.wait(timeout=30) != 0 for node in both)
    assert [line.split(" since")[0] for line in (*nodes.said(0), *nodes.said(1))] == [
        "distgan: error: rank 1 does not answer any more",
        "distgan: error: rank 0, or its machine, does not answer any more",
    ]


@pytest.mark.parametrize("bad", [0, 1])
def test_a_node_that_fails_while_preparing_is_not_waited_for(nodes, bad):
    """Its pictures are not there, say: the other node hears of it, though it waits in a library for that one."""
    overrides = [["--run.timeout=20"], ["--run.timeout=20", "--data.source=folder", "--data.path=/nowhere"]]
    both = [nodes.start(n, *overrides[n == bad]) for n in range(2)]
    assert all(node.wait(timeout=60) != 0 for node in both)
    assert ["/nowhere" in line for line in nodes.said(bad)] == [True]
    assert [f"rank {bad}, on another node, failed" in line for line in nodes.said(1 - bad)] == [True]


def test_a_start_that_cannot_be_says_why(nodes):
    """A port that is taken; two nodes of one rank; too few nodes, of which only the launcher can speak."""
    taken = "import socket, time; s = socket.create_server(('', 29500)); print(flush=True); time.sleep(100)"
    hog = subprocess.Popen(["ip", "netns", "exec", nodes.names[0], sys.executable, "-c", taken], stdout=subprocess.PIPE)
    nodes.started.append(hog)
    hog.stdout.readline()
    assert nodes.start(0).wait(timeout=60) != 0
    assert (
        "port `29500`, but another process is utilizing it. Please specify a different port" in nodes.log(0).read_text()
    )
    hog.kill()
    hog.wait()

    first = [nodes.start(n, *ENDLESS) for n in range(2)]
    nodes.wait_for_step(10)
    assert nodes.start(1, "--run.timeout=3", log="second").wait(timeout=60) != 0
    assert ["are both rank 1: start the launchers" in line for line in nodes.said(1, "second")] == [True]
    assert [node.poll() for node in first] == [None, None]
    for node in first:
        node.terminate()
    for node in first:
        node.wait(timeout=60)
    run = nodes.folder / "run"
    assert json.loads((run / "preempted").read_text())["step"] == steps(run)[-1]

    alone = nodes.start(0, launcher=["--rdzv_conf", "timeout=5"], log="alone")
    assert alone.wait(timeout=60) != 0
    assert "1/2 clients joined" in nodes.log(0, "alone").read_text()
