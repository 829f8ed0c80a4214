"""Tells what this machine and its launcher look like to distgan, and what to change, the weightiest first."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from distgan import distributed
from distgan.config import DataConfig, TrainConfig
from distgan.data.store import cache_folder
from distgan.distributed import Ranks
from distgan.errors import spoken_for
from distgan.tracking import wandb_mode

_PATIENCE = 60.0  # seconds for the ranks to find each other
_FLOATS = 3_500_000  # all-reduced: about the gradients of the larger network of a 64-pixel DCGAN of width 64
_ROOM = 500e6  # bytes: some checkpoints of such a DCGAN

Weight = Literal["fails", "slow", "note"]
_WEIGHTS: tuple[Weight, ...] = ("fails", "slow", "note")


@dataclass(frozen=True, order=True)
class Finding:
    """Something to change on some ranks."""

    weight: Weight
    """`fails`: training would; `slow`: it would waste what is there; `note`: good to know."""
    text: str
    ranks: list[int] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> None:
    """`distgan doctor [--json PATH]`, alone, under a launcher or under srun.

    Raises:
        ValueError: training would fail here.
    """
    parser = argparse.ArgumentParser(
        prog="distgan doctor",
        description="Tell what this machine and launcher look like to distgan, and what to change.",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write what was found to a file")
    arguments = parser.parse_args(argv)
    report = examine()
    failing = [finding for finding in report["findings"] if finding["weight"] == "fails"]
    if distributed.launched_ranks()[0] == 0:
        show(report)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if failing:
        error = ValueError(f"training would fail here: {failing[0]['text']}")
        raise error if distributed.launched_ranks()[0] == 0 else spoken_for(error)


def examine() -> dict[str, Any]:
    """Collective: what every rank sees, an all-reduce tried and timed, and the findings; the same on all ranks."""
    rank, world = distributed.launched_ranks()
    train = TrainConfig(batch_size=world)
    try:
        distributed.check(train)
    except ValueError as error:  # it is the launcher's, so every rank has it
        facts = [facts_here(rank, device="cpu" if distributed.use_cpu() else "cuda")]
        return {"ranks": facts, "all_reduce": None, "findings": [asdict(Finding("fails", str(error), [rank]))]}
    with Ranks(timeout=_PATIENCE) as ranks:
        ranks.join(train, tracker="none")
        everyone = ranks.gather(facts_here(rank, device=ranks.accelerator.device.type))
        reduced = _all_reduce(ranks) if world > 1 else None
        findings = [asdict(finding) for finding in advise(everyone)]
        if reduced is not None and not reduced["right"]:
            findings.insert(0, asdict(Finding("fails", "an all-reduce gave a wrong sum.", list(range(world)))))
    return {"ranks": everyone, "all_reduce": reduced, "findings": findings}


def facts_here(rank: int, *, device: str) -> dict[str, Any]:
    """What this rank sees: JSON values only. Writes nothing but a file in the data cache, which it removes."""
    cache = cache_folder(DataConfig())
    there = next(folder for folder in [cache, *cache.parents] if folder.exists())
    facts: dict[str, Any] = {
        "rank": rank,
        "host": socket.gethostname(),
        "node": os.environ.get("GROUP_RANK", "0"),
        "versions": _versions(),
        "device": device,
        "gpus": torch.cuda.device_count(),
        "nvidia_devices": len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]),
        "local_ranks": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "backend": dist.get_backend() if dist.is_initialized() else None,
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "nccl_interface": os.environ.get("NCCL_SOCKET_IFNAME"),
        "infiniband": sorted(path.name for path in Path("/sys/class/infiniband").glob("*")),
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],  # -1: no limit
        "shared_memory_free": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else None,
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "wandb": wandb_mode(),
        "cache": str(cache),
        "cache_writable": os.access(there, os.W_OK),
        "cache_free": shutil.disk_usage(there).free,
        "data_sets": len(list(cache.glob("*/store.json"))),
        "folder": str(Path.cwd()),
        "folder_writable": os.access(Path.cwd(), os.W_OK),
        "folder_free": shutil.disk_usage(Path.cwd()).free,
        "precisions": ["fp32", "bf16"],
    }
    if device == "cuda":
        gpu = torch.cuda.current_device()
        free, total = torch.cuda.mem_get_info(gpu)
        facts |= {
            "device": torch.cuda.get_device_name(gpu),
            "memory_free": free,
            "memory": total,
            "precisions": ["fp32", *(["bf16"] if torch.cuda.is_bf16_supported(False) else []), "fp16"],
        }
    return facts


def advise(everyone: list[dict[str, Any]]) -> list[Finding]:
    """What to change, the weightiest first, given the facts of all ranks in their order."""
    found: dict[tuple[Weight, str], list[int]] = defaultdict(list)
    first = everyone[0]
    for facts in everyone:
        for weight, text in _advise_one(facts):
            found[weight, text].append(facts["rank"])
        for package, version in facts["versions"].items():
            if version != (expected := first["versions"].get(package)):
                text = f"{package} is {version}, but {expected} on rank 0: install the same on every node."
                found["fails", text].append(facts["rank"])
        if facts["device"] != first["device"]:
            text = f"it has {facts['device']}, rank 0 {first['device']}: the slowest sets everybody's pace."
            found["slow", text].append(facts["rank"])
        if facts["threads"] != first["threads"]:
            text = f"it uses {facts['threads']} CPU threads, rank 0 {first['threads']}: set OMP_NUM_THREADS alike."
            found["slow", text].append(facts["rank"])
    findings = [Finding(weight, text, ranks) for (weight, text), ranks in found.items()]
    return sorted(findings, key=lambda finding: _WEIGHTS.index(finding.weight))


def _advise_one(facts: dict[str, Any]) -> list[tuple[Weight, str]]:
    on_gpu = facts["device"] != "cpu"
    advice: list[tuple[bool, Weight, str]] = [
        (
            not facts["cache_writable"],
            "fails",
            f"the data cache {facts['cache']} cannot be written: set XDG_CACHE_HOME, or data.cache in the recipe.",
        ),
        (
            not facts["folder_writable"],
            "fails",
            f"{facts['folder']} cannot be written: start from another folder, or give a run.dir elsewhere.",
        ),
        (
            min(facts["cache_free"], facts["folder_free"]) < _ROOM,
            "fails",
            f"less than {_ROOM / 1e6:.0f} MB are free for the data cache ({facts['cache']}) or for runs "
            f"({facts['folder']}): make room.",
        ),
        (
            not on_gpu and facts["nvidia_devices"] > 0 and facts["gpus"] == 0,
            "slow",
            f"there are {facts['nvidia_devices']} GPUs, but this torch cannot use them (CUDA "
            f"{facts['versions']['CUDA']}): update the driver, install the torch of its CUDA, or unhide them.",
        ),
        (
            not on_gpu and facts["gpus"] > 0,
            "slow",
            f"there are {facts['gpus']} GPUs, but the launcher asks for the CPU: launch/gpu1.yaml or launch/gpu8.yaml.",
        ),
        (
            on_gpu and facts["gpus"] > facts["local_ranks"],
            "slow",
            f"{facts['local_ranks']} of {facts['gpus']} GPUs are used: more --num_processes use the others.",
        ),
        (
            on_gpu and bool(facts["infiniband"]) and 0 <= facts["locked_memory"] < 1 << 30,
            "slow",
            "locked memory is limited, which InfiniBand cannot do with: `ulimit -l unlimited`, on Slurm "
            "PropagateResourceLimitsExcept=MEMLOCK.",
        ),
        (
            on_gpu and facts["local_ranks"] > 1 and (facts["shared_memory_free"] or 0) < 1 << 28,
            "slow",
            "/dev/shm is small for NCCL between GPUs: in a container, --shm-size=1g.",
        ),
        (
            facts["threads"] * facts["local_ranks"] > facts["cpus"],
            "slow",
            f"{facts['local_ranks']} processes of {facts['threads']} CPU threads share {facts['cpus']} CPUs: set "
            f"OMP_NUM_THREADS={max(1, facts['cpus'] // facts['local_ranks'])}.",
        ),
        (
            on_gpu and "bf16" not in facts["precisions"],
            "note",
            "this GPU cannot do bf16: train.precision fp16 or fp32.",
        ),
        (
            on_gpu and "bf16" in facts["precisions"],
            "note",
            "this GPU does bf16: --train.precision=bf16 is what we advise.",
        ),
        (
            not on_gpu and facts["gpus"] == facts["nvidia_devices"] == 0,
            "note",
            "no GPU here: training runs on the CPU.",
        ),
        (
            facts["rank"] == 0 and facts["wandb"] == "offline",
            "note",
            "wandb records offline: `wandb login` or WANDB_API_KEY sends runs to the server.",
        ),
    ]
    return [(weight, text) for holds, weight, text in advice if holds]


def _all_reduce(ranks: Ranks) -> dict[str, Any]:
    """Collective: sums as many floats as a DCGAN has gradients over all ranks, over the backend that trains."""
    device = ranks.accelerator.device
    wait = torch.cuda.synchronize if device.type == "cuda" else nullcontext
    times, right = [], True
    for _ in range(8):
        numbers = torch.full((_FLOATS,), ranks.rank + 1.0, device=device)
        wait()
        ranks.gather(None)  # all begin at once
        began = time.perf_counter()
        dist.all_reduce(numbers)
        wait()
        times.append(time.perf_counter() - began)
        right = right and bool((numbers == ranks.world * (ranks.world + 1) / 2).all())
    seconds = max(ranks.gather(sorted(times)[len(times) // 2]))  # the first ones connect, too
    return {"bytes": 4 * _FLOATS, "seconds": seconds, "right": all(ranks.gather(right))}


def show(report: dict[str, Any]) -> None:
    """Prints a report."""
    first, reduced = report["ranks"][0], report["all_reduce"]
    print("distgan doctor: " + ", ".join(f"{name} {version}" for name, version in first["versions"].items()))
    table = Table(box=None, pad_edge=False)
    for column in ("rank", "host", "device", "memory free", "precision", "CPUs", "threads", "interface"):
        table.add_column(column, overflow="fold")
    for facts in report["ranks"]:
        memory = f"{facts['memory_free'] / 1e9:.1f} of {facts['memory'] / 1e9:.1f} GB" if "memory" in facts else "-"
        table.add_row(
            str(facts["rank"]), facts["host"], facts["device"], memory, " ".join(facts["precisions"]),
            str(facts["cpus"]), str(facts["threads"]), facts["interface"] or "the library's choice",
        )  # fmt: skip
    Console(width=120 if not sys.stdout.isatty() else None).print(table)
    lines = {
        "backend": f"{first['backend'] or 'none, with one process'}",
        "wandb": first["wandb"],
        "data cache": f"{first['cache']}, {first['data_sets']} prepared, {first['cache_free'] / 1e9:.1f} GB free",
        "this folder": f"{first['folder']}, {first['folder_free'] / 1e9:.1f} GB free",
    }
    if reduced is not None:
        speed = f"{reduced['bytes'] / 1e6:.1f} MB in {1e3 * reduced['seconds']:.2f} ms"
        lines["all-reduce"] = f"{speed}, {'right' if reduced['right'] else 'WRONG'} on all ranks"
    for name, said in lines.items():
        print(f"{name:12}{said}")
    if not report["findings"]:
        print("nothing to change")
        return
    print("what to change, the weightiest first:")
    heads = {"fails": "training fails", "slow": "wasteful", "note": "note"}
    for number, finding in enumerate(report["findings"], 1):
        print(
            f"{number:3}. {heads[finding['weight']]}, {_who(finding['ranks'], len(report['ranks']))}: {finding['text']}"
        )


def _who(ranks: list[int], world: int) -> str:
    if len(ranks) == world:
        return "every rank" if world > 1 else "here"
    return " and ".join(f"rank {rank}" for rank in ranks)


def _versions() -> dict[str, str]:
    packages = ("distgan", "torch", "torchvision", "accelerate", "wandb", "numpy")
    nccl: Any = torch.cuda.nccl
    return {
        **{name: importlib.metadata.version(name) for name in packages},
        "Python": platform.python_version(),
        "CUDA": str(torch.version.cuda or "-"),
        "NCCL": ".".join(map(str, nccl.version())) if torch.cuda.is_available() else "-",
    }


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["doctor", *sys.argv[1:]]))
