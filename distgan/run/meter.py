"""Means of scalars between log points."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distgan.parallel.ranks import Ranks


class Meter:
    """Sums of scalars since the last log point. They stay on the device until then."""

    def __init__(self, names: tuple[str, ...], device: torch.device, ranks: Ranks) -> None:
        self._names, self._ranks = names, ranks
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        self._counts = [0.0] * len(names)

    def add(self, scalars: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Adds this rank's means, or with a weight those of a part of its share, without waiting for them."""
        for name, value in scalars.items():
            i = self._names.index(name)
            self._sums[i] += value * weight
            self._counts[i] += weight

    def means(self) -> dict[str, float]:
        """Collective, and waits for the device: the means over steps and ranks; then starts again at zero.

        Summed in the order of the ranks, so that the result does not depend on who reduces.
        """
        rows = self._ranks.gather(self._sums.tolist())
        means = {
            name: sum(row[i] for row in rows) / (len(rows) * self._counts[i]) for i, name in enumerate(self._names)
        }
        self._sums.zero_()
        self._counts = [0.0] * len(self._names)
        return means

    def state(self) -> dict[str, Any]:
        """Collective, and waits for the device: what a checkpoint between two log points must keep."""
        return {"sums": self._ranks.gather(self._sums.tolist()), "counts": list(self._counts)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes up a saved state; on another number of ranks the sums continue as equal parts of their total."""
        rows, counts = state["sums"], state["counts"]
        if len(rows) == self._ranks.world:
            row = rows[self._ranks.rank]
        else:
            row = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        self._sums.copy_(torch.tensor(row, dtype=torch.float64))
        self._counts = list(counts)
