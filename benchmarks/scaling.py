"""Where each recipe stops scaling: predicted efficiency for 1 to 1,024 processes, by a network's numbers.

    python benchmarks/scaling.py --step 0.1 [--latency 20e-6 --bandwidth 12.5e9] [RECIPE …]
    python benchmarks/scaling.py --check        # against 2 and 4 processes here, with a delay in each collective

`--step` is the measured time of a step with the whole batch on one device. The global batch is fixed: a process's
share shrinks with the number of processes, and so does its computing; what it sends does not. A step takes FIXED +
(STEP - FIXED) / processes + communication; FIXED is the part that no smaller share makes faster. Communication is
that of rings, none of it hidden behind computing: each update's gradients cross the wire once, in DDP's buckets, and
synchronised batch norm gathers its statistics once per layer and pass. tests/equality/test_counts.py counts both.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parent.parent
PROCESSES = [2**i for i in range(11)]
BUCKET, FIRST_BUCKET = 25 * 2**20, 2**20  # bytes, DDP's defaults
RECIPES = ["cifar10_dcgan", "cifar10_dcgan_8gpu", "cifar10_sngan", "cifar10_biggan", "cifar10_r3gan"]
DELAYED = "DISTGAN_BENCHMARK_NETWORK"


class Network(NamedTuple):
    """What a message costs."""

    latency: float
    """Seconds for each message, whatever its size."""
    bandwidth: float
    """Bytes per second of each process."""

    def all_reduce(self, size: int, world: int) -> float:
        """Seconds of a ring all-reduce: 2 (P - 1) messages of size / P."""
        return 2 * (world - 1) * (self.latency + size / world / self.bandwidth)

    def all_gather(self, size: int, world: int) -> float:
        """Seconds of a ring all-gather: P - 1 messages of each process's part."""
        return (world - 1) * (self.latency + size / self.bandwidth)


class Sent(NamedTuple):
    """What a step sends."""

    reduced: list[int]
    """Bytes of each all-reduce."""
    gathered: list[int]
    """Bytes that each process puts into each all-gather."""

    def seconds(self, network: Network, world: int) -> float:
        reduced = sum(network.all_reduce(size, world) for size in self.reduced)
        return reduced + sum(network.all_gather(size, world) for size in self.gathered)


def sent(config: Any, channels: int, classes: int) -> Sent:
    """Counts what a step of a recipe sends."""
    from torch import nn

    from distgan import models
    from distgan.models import ImageSpec
    from distgan.objective import Objective

    spec = ImageSpec(image_size=config.data.image_size, channels=channels, class_counts=(1,) * classes)
    G, D = models.build(config.model, spec, seed=0)
    paired, d_steps, own = Objective(config).loss.paired, config.train.d_steps, config.train.g_batch == "own"
    reduced: list[int] = []
    for network, updates in ((D, d_steps), (G, 1)):
        size = sum(p.numel() * p.element_size() for p in network.parameters())
        if config.train.compress == "bf16":
            size //= 2
        later = math.ceil(max(0, size - FIRST_BUCKET) / BUCKET)
        reduced += updates * [min(size, FIRST_BUCKET), *(later * [(size - FIRST_BUCKET) // max(later, 1)])]
    gathered: list[int] = []
    passes = {G: d_steps + own + 1, D: d_steps * 4 + 2 + paired}  # forward and backward
    for network, count in passes.items() if config.model.sync_batchnorm else ():
        layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
        gathered += count * [2 * 4 * layer.num_features for layer in layers]
    return Sent(reduced, gathered)


def predicted(step: float, fixed: float, of: Sent, network: Network, world: int) -> float:
    """Seconds of a step."""
    return fixed + (step - fixed) / world + of.seconds(network, world)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--step", type=float, default=0.1, help="seconds of a step with the whole batch on one device")
    parser.add_argument("--fixed", type=float, default=0.005, help="seconds of it that a smaller share does not save")
    parser.add_argument("--latency", type=float, default=20e-6, help="seconds of a message (default: 20e-6)")
    parser.add_argument("--bandwidth", type=float, default=12.5e9, help="bytes per second (default: 12.5e9, 100 Gb/s)")
    parser.add_argument("--check", action="store_true", help="compare with processes here")
    options = parser.parse_args()
    if options.check:
        return check()
    from distgan import recipe

    network = Network(options.latency, options.bandwidth)
    print(f"| Recipe | batch | {' | '.join(map(str, PROCESSES))} |\n|---|---|{'---|' * len(PROCESSES)}")
    for name in options.recipes:
        config = recipe.parse(["--config", str(ROOT / "configs" / f"{name}.yaml")])[0]
        of = sent(config, 3, 10 if config.model.conditional else 0)
        cells = []
        for world in PROCESSES:
            if world > config.train.batch_size:
                cells.append("-")
                continue
            cells.append(f"{options.step / world / predicted(options.step, options.fixed, of, network, world):.0%}")
        print(f"| `{name}` | {config.train.batch_size} | {' | '.join(cells)} |")
    return None


def check() -> None:
    """Prints steps' times on 2 and 4 processes with a slow network, and what they should be."""
    from turns import Program, speeds

    from distgan import recipe

    slow = Network(4e-3, 50e6)
    overrides = ["--data.source=digits", "--data.channels=3", "--model.width=16", "--train.batch_size=32"]
    overrides += [
        "--track.to=none",
        "--train.steps=1000000",
        "--checkpoint.every=1000000",
        "--track.sample_every=1000000",
    ]
    config = ["--config", str(ROOT / "configs" / "cifar10_dcgan.yaml"), *overrides]
    of = sent(recipe.parse(config)[0], 3, 0)
    with tempfile.TemporaryDirectory() as folder:
        for world in (2, 4):
            programs = {}
            for name, network in (("fast", None), ("slow", slow)):
                command = [sys.executable, "-m", "accelerate.commands.launch"]
                command += ["--config_file", str(ROOT / "launch" / "cpu2.yaml"), "--num_processes", str(world)]
                command += [__file__, *config, f"--run.dir={folder}/{name}{world}"]
                said = f"{network.latency},{network.bandwidth}" if network else "0,inf"
                programs[name] = Program(command, {DELAYED: said, "OMP_NUM_THREADS": "1"})
            steps = speeds(programs, rounds=5, seconds=6, warm=8)
            fast, measured = (sorted(1 / speed for speed in steps[name])[2] for name in ("fast", "slow"))
            expected = fast + of.seconds(slow, world)
            print(
                f"{world} processes: {fast * 1e3:.0f} ms here; with {slow.latency * 1e3:.0f} ms and "
                f"{slow.bandwidth / 1e6:.0f} MB/s {measured * 1e3:.0f} ms, predicted {expected * 1e3:.0f} ms "
                f"({expected / measured - 1:+.0%})"
            )


def train_delayed() -> None:
    """A child of `check`: trains with a delay in each collective of the step."""
    import torch.distributed as dist
    from trained import ticking

    from distgan import train
    from distgan.parallel.ranks import Ranks

    latency, bandwidth = map(float, os.environ[DELAYED].split(","))
    network, gather, wrap = Network(latency, bandwidth), dist.all_gather_single, Ranks.wrap

    def slow_gather(out: Any, part: Any, *args: Any, **options: Any) -> Any:
        time.sleep(network.all_gather(part.nbytes, dist.get_world_size()))
        return gather(out, part, *args, **options)

    def slow_reduce(_, bucket):  # DDP would refuse other annotations than its own
        buffer, world = bucket.buffer(), dist.get_world_size()
        time.sleep(network.all_reduce(buffer.nbytes, world))
        future = dist.all_reduce(buffer.div_(world), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    def wrapped(ranks: Ranks, *parts: Any) -> Any:
        made = wrap(ranks, *parts)
        for part in made:
            if hasattr(part, "register_comm_hook"):
                part.register_comm_hook(None, slow_reduce)
        return made

    dist.all_gather_single, Ranks.wrap = slow_gather, wrapped  # type: ignore[method-assign]

    ticking()
    train.main(sys.argv[1:])


if __name__ == "__main__":
    if DELAYED in os.environ:
        train_delayed()
    else:
        main()
