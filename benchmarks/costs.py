"""What a run pays for beside its steps: saving, logging, the guard and the watchdog; prints Markdown for docs/.

    python benchmarks/costs.py        # about 8 minutes; the machine must do nothing else

The quickstart, by turns: on one process with all threads without any of these, with a checkpoint every 50 steps, and
with a log line every 10; then on two processes with its own log interval, with the guard and the watchdog and without.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from turns import Program, processor, ratio, speeds

ROOT = Path(__file__).parent.parent
NEVER = 1_000_000
TWO = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "cpu2.yaml")]


def main() -> None:
    alone = {
        "no checkpoint, no log line": [],
        "a checkpoint every 50 steps": ["--checkpoint.every=50"],
        "a log line every 10 steps": ["--track.log_every=10"],
    }
    own = ["--track.log_every=50"]
    together = {
        "two processes, no guard, no watchdog": ["--unwatched", *own],
        "two processes, with guard and watchdog": own,
    }
    print(f"On {processor()}:\n\n| The quickstart with | images/s | times the first |\n|---|---|---|")
    for launcher, ways in (([], alone), (TWO, together)):
        with tempfile.TemporaryDirectory() as folder:
            programs = {
                name: Program(command(launcher, f"{folder}/{number}", overrides), environment(launcher), 64)
                for number, (name, overrides) in enumerate(ways.items())
            }
            measured = speeds(programs, rounds=9, seconds=8)
        first = next(iter(ways))
        for name, rates in measured.items():
            print(f"| {name} | {sorted(rates)[len(rates) // 2]:.0f} | {ratio(measured, name, first):.3f} |", flush=True)


def environment(launcher: list[str]) -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1"} if launcher else {}


def command(launcher: list[str], run: str, overrides: list[str]) -> list[str]:
    unwatched = [word for word in overrides if word == "--unwatched"]
    settings = [word for word in overrides if word != "--unwatched"]
    start = [sys.executable, *launcher, str(ROOT / "benchmarks" / "trained.py"), *unwatched]
    start += ["--config", str(ROOT / "configs" / "quickstart.yaml"), f"--run.dir={run}", "--track.to=none"]
    start += ["--eval.every=null", f"--train.steps={NEVER}", f"--track.sample_every={NEVER}"]
    return [*start, f"--checkpoint.every={NEVER}", f"--track.log_every={NEVER}", *settings]


if __name__ == "__main__":
    main()
