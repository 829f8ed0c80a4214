"""A store several times larger than the memory: is the memory flat, and what does reading from disk cost?

    sudo python benchmarks/disk.py [--gigabytes 4] [--limit 1.0]      # a Linux with cgroups; about 3 minutes

Writes a store of random images, and trains DCGAN on it (width 32, batches of 64, one thread) by turns: with
`data.placement=host` and all the machine's memory, and with `disk`, with and without a window, in a cgroup that has
`--limit` gigabytes for the program and for the system's cache of its files. The file is evicted from that cache before.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from turns import Program, processor, ratio, speeds

SIDE, CHUNK = 32, 10_000
GROUP = Path("/sys/fs/cgroup/memory" if Path("/sys/fs/cgroup/memory").exists() else "/sys/fs/cgroup")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4, help="of images (default: 4)")
    parser.add_argument("--limit", type=float, default=1.0, help="gigabytes of memory (default: 1)")
    parser.add_argument("--trained", help=argparse.SUPPRESS)  # as a child: the store's folder
    options, overrides = parser.parse_known_args()
    if options.trained:
        return train(Path(options.trained), overrides)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # not in memory, as /tmp may be
        measure(Path(folder), round(options.gigabytes * 1e9), options.limit)
    return None


def measure(folder: Path, size: int, limit: float) -> None:
    count = size // (3 * SIDE**2) // CHUNK * CHUNK
    with (folder / "images.bin").open("wb") as stream:
        for _ in range(count // CHUNK):
            stream.write(os.urandom(CHUNK * 3 * SIDE**2))
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    (folder / "count.json").write_text(str(count))
    groups = {name: limited(name, limit) for name in ("disk", "window")}
    settings = {
        "host": ["--data.placement=host"],
        "disk": ["--data.placement=disk"],
        "window": ["--data.placement=disk", "--data.window=65536"],
    }
    programs = {}
    for name, overrides in settings.items():
        command = [sys.executable, __file__, f"--trained={folder}", f"--run.dir={folder / name}", *overrides]
        environment = {"OMP_NUM_THREADS": "1", "DISTGAN_BENCHMARK_GROUP": str(groups.get(name, ""))}
        programs[name] = Program(command, environment, 64)
    most: dict[str, list[float]] = {name: [] for name in groups}

    def look() -> None:
        for name, group in groups.items():
            most[name].append(used(group))

    measured = speeds(programs, rounds=7, warm=20, after_round=look)
    print(f"On {processor()}: {count:,} images, {size / 1e9:.1f} GB, memory limit {limit} GB")
    for name, rates in measured.items():
        memory = f", most memory by round, GB: {', '.join(f'{x:.2f}' for x in most[name])}" if name in most else ""
        print(f"{name:8}{sorted(rates)[len(rates) // 2]:6.0f} images/s, {ratio(measured, name, 'host'):.2f}{memory}")
    for group in groups.values():
        group.rmdir()


def limited(name: str, gigabytes: float) -> Path:
    """Makes a cgroup with so much memory."""
    group = GROUP / f"distgan-benchmark-{os.getpid()}-{name}"
    group.mkdir()
    first, second = group / "memory.limit_in_bytes", group / "memory.max"
    (first if first.exists() else second).write_text(str(round(gigabytes * 1e9)))
    return group


def used(group: Path) -> float:
    """Gigabytes that the programs of a cgroup and their files took at most."""
    first, second = group / "memory.max_usage_in_bytes", group / "memory.peak"
    return int((first if first.exists() else second).read_text()) / 1e9


def train(store: Path, overrides: list[str]) -> None:
    """A child: trains on the store, within its cgroup."""
    if group := os.environ["DISTGAN_BENCHMARK_GROUP"]:
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
    from trained import ticking

    from distgan import data
    from distgan import train as program
    from distgan.data.store import _mapped

    count, load = json.loads((store / "count.json").read_text()), data.load

    def loaded(config: object, **options: object) -> data.Images:
        images = load(dataclasses.replace(config, source="digits", channels=3))
        pixels = _mapped(store / "images.bin", (count, 3, SIDE, SIDE))
        return dataclasses.replace(images, pixels=pixels, labels=None, classes=None, folder=store)

    data.load = loaded
    ticking()
    common = ["--data.source=digits", "--data.channels=3", "--model.width=32", "--train.batch_size=64"]
    program.main([*common, "--train.steps=1000000", "--track.to=none", "--checkpoint.every=1000000", *overrides])


if __name__ == "__main__":
    main()
