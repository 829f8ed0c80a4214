"""Describes this machine and its launcher, and says what to change, the most important first."""

import argparse
import importlib.metadata
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from distgan import paths
from distgan.cli import write_json
from distgan.data.store import cache_folder
from distgan.errors import UserError
from distgan.models import place
from distgan.parallel import launch
from distgan.parallel.launch import node, started_by
from distgan.parallel.ranks import Ranks
from distgan.recipe import DataConfig, TrackConfig
from distgan.run import tracking, wandb_tracker

_PATIENCE = 120.0  # seconds for the ranks to find each other, and for each to answer
_FLOATS = 3_500_000  # numbers in the all-reduce: about the gradients of a 64-pixel DCGAN of width 64
_ROOM = 500e6  # bytes of disk: some checkpoints of such a DCGAN, or CIFAR-10 prepared three times

Weight = Literal["training fails", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """Something that the user should know or change, and on which ranks."""

    weight: Weight
    text: str
    ranks: list[int]


def main(argv: Sequence[str] | None = None) -> None:
    """Collective: checks this machine and its launcher: `distgan doctor [--json PATH]`, alone or under a launcher.

    Raises:
        UserError: training would fail here.
    """
    parser = argparse.ArgumentParser(
        prog="distgan doctor",
        description="Describe this machine and its launcher, and say what to change.",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write what was found to a file")
    arguments = paths.expand(parser.parse_args(argv), "json")
    with Ranks(timeout=_PATIENCE) as ranks:
        with ranks.alone():
            here = facts_here(ranks.rank)
        everyone = ranks.gather(here)
        findings = advise(everyone)
        failing = [finding for finding in findings if finding.weight == "training fails"]
        if ranks.rank == 0:  # before the network is tried, which may hang
            show(everyone, findings)
        reduced = None
        if ranks.world > 1 and not failing:
            ranks.join()
            reduced = _all_reduce(ranks)
            ranks.say(f"all-reduce  {reduced['bytes'] / 1e6:.1f} MB in {1e3 * reduced['seconds']:.2f} ms")
            if not reduced["right"]:
                failing = [Finding("training fails", "an all-reduce gave a wrong sum.", list(range(ranks.world)))]
                findings = failing + findings
        if ranks.rank == 0 and arguments.json is not None:
            said = [asdict(finding) for finding in findings]
            write_json(arguments.json, {"ranks": everyone, "all_reduce": reduced, "findings": said})
    if failing:
        raise ranks.reported_by_rank_zero(UserError(f"training would fail here: {failing[0].text}"))


def facts_here(rank: int) -> dict[str, Any]:
    """Collects what this rank sees, as JSON values. Creates the data cache's folder, as training would."""
    refused = _refused(launch.check_launcher) or _refused(launch.check_gpus)
    use_cpu = launch.use_cpu()
    cache = cache_folder(DataConfig())
    facts: dict[str, Any] = {
        "rank": rank,
        "host": socket.gethostname(),
        "node": node(),
        "started_by": started_by(),
        "versions": launch.versions(),
        "others": {name: importlib.metadata.version(name) for name in ("torchvision", "wandb")},
        "refused": refused,
        "device": "cpu",
        "backend": "gloo" if use_cpu else "nccl",
        "precisions": ["fp32", "bf16"],
        "speed_of_bf16": _speed_of_bf16() if use_cpu else None,  # times fp32's
        "gpus": torch.cuda.device_count(),
        "nvidia_devices": launch.nvidia_devices(),
        "hidden": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "asked_for_cpu": launch.asked_for_cpu(),
        "local_ranks": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "nccl_interface": None if use_cpu else os.environ.get("NCCL_SOCKET_IFNAME"),
        "infiniband": sorted(path.name for path in Path("/sys/class/infiniband").glob("*")),
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],  # -1: no limit
        "shared_memory_free": _free("/dev/shm"),
        "cpus": sorted(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "wandb": wandb_tracker.wandb_mode(),
        "wandb_refused": _refused(lambda: tracking.check(TrackConfig())),
        "wandb_asked": os.environ.get("WANDB_MODE"),
        "cache": str(cache),
        "cache_fault": _fault(cache, make=True),
        "cache_free": _free(cache),
        "data_sets": len(list(cache.glob("stores/*/store.json"))) if os.access(cache, os.R_OK) else 0,
        "folder": str(Path.cwd()),
        "folder_fault": _fault(Path.cwd(), make=False),
        "folder_free": _free(Path.cwd()),
    }
    if not use_cpu and refused is None:
        gpu = int(os.environ.get("LOCAL_RANK", "0"))
        free, total = torch.cuda.mem_get_info(gpu)
        nccl: Any = torch.cuda.nccl
        with torch.cuda.device(gpu):
            bf16 = torch.cuda.is_bf16_supported(False)
        facts |= {
            "device": torch.cuda.get_device_name(gpu),
            "memory_free": free,
            "memory": total,
            "precisions": ["fp32", *(["bf16"] if bf16 else []), "fp16"],
        }
        facts["others"] |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, nccl.version()))}
    return facts


def advise(everyone: list[dict[str, Any]]) -> list[Finding]:
    """Returns what to know and to change, the most important first, from the facts of all ranks in their order."""
    found: dict[tuple[Weight, str], list[int]] = defaultdict(list)
    first = everyone[0]
    for facts in everyone:
        rank = facts["rank"]
        for weight, text in _advise_one(facts):
            found[weight, text].append(rank)
        for package, version in facts["versions"].items():
            if version != (expected := first["versions"][package]):
                text = f"{package} is {version}, but {expected} on rank 0: install the same on every node."
                found["training fails", text].append(rank)
        if facts["backend"] != first["backend"]:
            text = (
                f"it would train on {facts['device']}, rank 0 on {first['device']}: use GPUs on all nodes or on none."
            )
            found["training fails", text].append(rank)
        elif facts["device"] != first["device"]:
            text = f"it has {facts['device']}, rank 0 {first['device']}: the slowest one sets the pace for all."
            found["warning", text].append(rank)
        if facts["threads"] != first["threads"]:
            text = f"it uses {facts['threads']} CPU threads, rank 0 {first['threads']}: set the same OMP_NUM_THREADS."
            found["warning", text].append(rank)
    for its_node in dict.fromkeys(facts["node"] for facts in everyone):
        here = [facts for facts in everyone if facts["node"] == its_node]
        threads, cpus = sum(facts["threads"] for facts in here), len({cpu for facts in here for cpu in facts["cpus"]})
        if threads > cpus:
            text = (
                f"{len(here)} processes use {threads} threads on {cpus} CPUs: set OMP_NUM_THREADS="
                f"{cpus // len(here) or 1}."
            )
            found["warning", text] += [facts["rank"] for facts in here]
    weights = get_args(Weight)
    ordered = sorted(found.items(), key=lambda item: weights.index(item[0][0]))
    return [Finding(weight, text, ranks) for (weight, text), ranks in ordered]


def _advise_one(facts: dict[str, Any]) -> list[tuple[Weight, str]]:
    on_gpu, speed = facts["backend"] == "nccl", facts["speed_of_bf16"] or 1.0
    advice: list[tuple[object, Weight, str]] = [
        (facts["refused"], "training fails", str(facts["refused"])),
        (facts["wandb_refused"], "training fails", f"{facts['wandb_refused']} Or train with --track.to=none."),
        (
            facts["cache_fault"],
            "training fails",
            f"the data cache {facts['cache']} cannot be written ({facts['cache_fault']}): set XDG_CACHE_HOME, or "
            "data.cache in the recipe.",
        ),
        (
            facts["rank"] == 0 and facts["folder_fault"],
            "warning",
            f"{facts['folder']} cannot be written ({facts['folder_fault']}): choose a run.dir elsewhere.",
        ),
        (
            not facts["cache_fault"] and facts["cache_free"] < _ROOM,
            "warning",
            f"only {facts['cache_free'] / 1e6:.0f} MB are free for the data cache {facts['cache']}: make room.",
        ),
        (
            facts["rank"] == 0 and not facts["folder_fault"] and facts["folder_free"] < _ROOM,
            "warning",
            f"only {facts['folder_free'] / 1e6:.0f} MB are free in {facts['folder']}: make room, or choose a run.dir "
            "elsewhere.",
        ),
        (
            facts["gpus"] > 0 and facts["asked_for_cpu"],
            "warning",
            f"there are {facts['gpus']} GPUs, but the launcher asks for the CPU: use launch/gpu1.yaml or gpu8.yaml.",
        ),
        (
            on_gpu and facts["gpus"] > facts["local_ranks"],
            "warning",
            f"{facts['local_ranks']} of {facts['gpus']} GPUs are used: raise --num_processes to use the others.",
        ),
        (
            on_gpu and facts["infiniband"] and 0 <= facts["locked_memory"] < 1 << 30,
            "warning",
            "locked memory is limited to less than 1 GiB, but InfiniBand needs more: run `ulimit -l unlimited`, on "
            "Slurm set PropagateResourceLimitsExcept=MEMLOCK.",
        ),
        (
            on_gpu and facts["local_ranks"] > 1 and facts["shared_memory_free"] < 1 << 28,
            "warning",
            "/dev/shm has less than 256 MiB free, which may be too little for NCCL: in a container, set --shm-size=1g.",
        ),
        (
            facts["nvidia_devices"] > 0 and facts["gpus"] == 0 and not facts["refused"],
            "note",
            "there are GPUs, but they are hidden by "
            + (f'CUDA_VISIBLE_DEVICES="{facts["hidden"]}".' if facts["hidden"] is not None else "the job."),
        ),
        (not on_gpu and facts["nvidia_devices"] == 0, "note", "no GPU here: training runs on the CPU."),
        (
            facts["rank"] == 0 and speed > 1.1,
            "note",
            f"bf16 is {speed:.1f} times as fast as fp32 on this CPU: try --train.precision=bf16.",
        ),
        (
            facts["rank"] == 0 and speed < 0.9,
            "note",
            f"fp32 is {1 / speed:.1f} times as fast as bf16 on this CPU: keep train.precision at fp32.",
        ),
        (
            on_gpu and "bf16" in facts["precisions"],
            "note",
            "this GPU can do bf16: we advise --train.precision=bf16.",
        ),
        (
            on_gpu and "bf16" not in facts["precisions"],
            "note",
            "this GPU cannot do bf16: use train.precision fp16 or fp32.",
        ),
        (
            facts["rank"] == 0 and facts["wandb"] == "offline" and facts["wandb_asked"] is None,
            "note",
            "wandb records offline: run `wandb login` or set WANDB_API_KEY to send runs to the server.",
        ),
    ]
    return [(weight, text) for holds, weight, text in advice if holds]


def _speed_of_bf16() -> float:
    """Tries both precisions for about a second, and returns how many times as fast as fp32 bf16 is on this CPU."""
    network = nn.Sequential(nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(64, 128, 4, 2, 1))
    place(network, torch.device("cpu"))
    images = torch.linspace(-1, 1, 32 * 3 * 32 * 32).view(32, 3, 32, 32)
    times: dict[bool, list[float]] = {False: [], True: []}
    end = time.perf_counter() + 1.0
    while time.perf_counter() < end or len(times[True]) < 3:
        for bf16, seconds in times.items():
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = network(images).float().square().mean()
            loss.backward()
            seconds.append(time.perf_counter() - began)
    fp32, half = (sorted(seconds[1:])[len(seconds[1:]) // 2] for seconds in times.values())  # the first one prepares
    return fp32 / half


def _all_reduce(ranks: Ranks) -> dict[str, Any]:
    """Collective: times and checks an all-reduce of the numbers of a DCGAN's gradients, as training would do it."""
    device = ranks.accelerator.device
    wait = torch.cuda.synchronize if device.type == "cuda" else nullcontext
    times, right = [], True
    for step in range(8):
        ranks.step_done(step)
        numbers = torch.full((_FLOATS,), ranks.rank + 1.0, device=device)
        wait()
        ranks.gather(None)  # all begin at once
        began = time.perf_counter()
        dist.all_reduce(numbers)
        wait()
        times.append(time.perf_counter() - began)
        right = right and bool((numbers == ranks.world * (ranks.world + 1) / 2).all())
    seconds = max(ranks.gather(sorted(times)[len(times) // 2]))  # the median: the first ones connect, too
    return {"bytes": 4 * _FLOATS, "seconds": seconds, "right": all(ranks.gather(right))}


def show(everyone: list[dict[str, Any]], findings: list[Finding]) -> None:
    """Prints the facts and the findings."""
    first = everyone[0]
    versions = first["versions"] | first["others"]
    print("distgan doctor: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    table = Table(box=None, pad_edge=False)
    for column in ("rank", "host", "device", "memory free", "precision", "CPUs", "threads", "gloo over", "NCCL over"):
        table.add_column(column, overflow="fold")
    for facts in everyone:
        memory = f"{facts['memory_free'] / 1e9:.1f} of {facts['memory'] / 1e9:.1f} GB" if "memory" in facts else "-"
        nccl = "-" if facts["backend"] == "gloo" else facts["nccl_interface"] or "its choice"
        table.add_row(
            str(facts["rank"]), facts["host"], facts["device"], memory, " ".join(facts["precisions"]),
            str(len(facts["cpus"])), str(facts["threads"]), facts["interface"] or "its choice", nccl,
        )  # fmt: skip
    Console(width=None if getattr(sys.stdout, "isatty", bool)() else 120).print(table)
    lines = {
        "started by": first["started_by"],
        "backend": first["backend"] if len(everyone) > 1 else "none, with one process",
        "wandb": first["wandb"],
        "data cache": f"{first['cache']}, {first['data_sets']} prepared, {first['cache_free'] / 1e9:.1f} GB free",
        "this folder": f"{first['folder']}, {first['folder_free'] / 1e9:.1f} GB free",
    }
    for name, said in lines.items():
        print(f"{name:12}{said}")
    changes = [finding for finding in findings if finding.weight != "note"]
    print("what to change, the most important first:" if changes else "nothing needs to be changed")
    for number, finding in enumerate(changes, 1):
        print(f"{number:3}. {finding.weight}, {_who(finding.ranks, len(everyone))}: {finding.text}")
    for finding in findings[len(changes) :]:
        print(f"note, {_who(finding.ranks, len(everyone))}: {finding.text}")
    sys.stdout.flush()


def _who(ranks: list[int], world: int) -> str:
    if len(ranks) == world:
        return "every rank" if world > 1 else "here"
    return " and ".join(f"rank {rank}" for rank in ranks)


def _refused(check: Callable[[], None]) -> str | None:
    try:
        check()
    except ValueError as error:
        return str(error)
    return None


def _fault(folder: Path, *, make: bool) -> str | None:
    """Says why a folder cannot be written, after trying with a temporary file; None if it can."""
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror


def _free(folder: str | Path) -> int:
    """Returns the free bytes; 0 if there is no such folder."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["doctor", *sys.argv[1:]]))
