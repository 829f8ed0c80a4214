"""`distgan train` that takes turns with other programs (turns.py): the same, but that it reports each step.

python benchmarks/trained.py --config RECIPE …        # or `accelerate launch … benchmarks/trained.py …`
"""

import sys
from pathlib import Path

from distgan import train
from distgan.run.housekeeping import Housekeeping

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


if __name__ == "__main__":
    ticking()
    train.main(sys.argv[1:])
