"""What torch's compiler did in a process of a run."""

import json
from collections.abc import Callable
from pathlib import Path

from distgan.run import compilation
from distgan.run.housekeeping import Housekeeping
from support.programs import around_each_step


def without_inductor() -> None:
    """Traces and splits forward and backward as for inductor, but runs torch's own kernels: seconds, not a minute."""
    compilation.BACKEND = "aot_eager"


def note_graphs(path: Path) -> None:
    """Writes after each step how many graphs there are, and the graph breaks. Each rank adds its number to the path."""
    from torch._dynamo.utils import counters

    graphs: list[int] = []

    def noted(run: Housekeeping, step: int, due: Callable[[], int]) -> int:
        graphs.append(counters["stats"]["unique_graphs"])
        found = {"graphs": graphs, "breaks": dict(counters["graph_break"])}
        Path(f"{path}.{run.ranks.rank}").write_text(json.dumps(found))
        return due()

    around_each_step(noted)
