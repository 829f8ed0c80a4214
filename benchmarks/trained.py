"""`distgan train` that takes turns with other programs (turns.py): the same, but that it reports each step.

python benchmarks/trained.py [--unwatched] --config RECIPE …        # or `accelerate launch … benchmarks/trained.py …`

With `--unwatched` there is no guard and no watchdog, which no setting of distgan's can switch off.
"""

import sys
from pathlib import Path

from distgan import train
from distgan.parallel.watchdog import Watchdog
from distgan.run.guard import Guard
from distgan.run.housekeeping import Housekeeping
from distgan.run.state import TrainingState
from distgan.run.watch import Watch

sys.path.insert(0, str(Path(__file__).parent))
from turns import tick


def ticking() -> None:
    """Has each step of a training in this process reported."""
    due = train.after_step

    def after_step(run: Housekeeping, step: int) -> int:
        step = due(run, step)
        if run.ranks.rank == 0:
            tick(step)
        return step

    train.after_step = after_step


def unwatched() -> None:
    """Takes away what judges a run: the guard, with the samples and weights that it looks at, and the watchdog."""
    Guard.judge = lambda self, *arguments, **named: []
    Watch.look = lambda self: {}
    TrainingState.first_not_finite = lambda self: None
    Watchdog.start = lambda self: None


if __name__ == "__main__":
    words = sys.argv[1:]
    if "--unwatched" in words:
        words.remove("--unwatched")
        unwatched()
    ticking()
    train.main(words)
