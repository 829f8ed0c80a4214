"""One process with two threads against two processes with one, on the quickstart; and what batch norm's messages cost.

python benchmarks/processes.py        # about 2 minutes; the machine must do nothing else
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from turns import Program, processor, ratio, speeds

ROOT = Path(__file__).parent.parent


def main() -> None:
    two = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "cpu2.yaml")]
    ways = {
        "one process, two threads": ([], "2", []),
        "two processes": (two, "1", []),
        "two processes, batch norm not synchronised": (two, "1", ["--model.sync_batchnorm=false"]),
        "two processes, bf16 on the wire": (two, "1", ["--train.compress=bf16"]),
    }
    with tempfile.TemporaryDirectory() as folder:
        programs = {}
        for number, (name, (launcher, threads, overrides)) in enumerate(ways.items()):
            command = [sys.executable, *launcher, str(ROOT / "benchmarks" / "trained.py")]
            command += ["--config", str(ROOT / "configs" / "quickstart.yaml"), f"--run.dir={folder}/{number}"]
            command += ["--track.to=none", "--eval.every=null", "--train.steps=1000000", "--checkpoint.every=1000000"]
            command += ["--track.sample_every=1000000", *overrides]
            programs[name] = Program(command, {"OMP_NUM_THREADS": threads}, 64)
        measured = speeds(programs, rounds=7, seconds=3)
    print(f"On {processor()}:\n\n| The quickstart on | images/s | times one process |\n|---|---|---|")
    for name, rates in measured.items():
        print(f"| {name} | {sorted(rates)[len(rates) // 2]:.0f} | {ratio(measured, name, next(iter(ways))):.2f} |")


if __name__ == "__main__":
    main()
