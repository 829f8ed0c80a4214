"""Means of scalars between log points."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distgan.parallel.ranks import Wrapping


class Meter:
    """Sums scalars since the last log point. They stay on the device until the next one."""

    def __init__(self, names: tuple[str, ...], ranks: Wrapping) -> None:
        self._names, self._ranks = names, ranks
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=ranks.device)
        self._counts = [0.0] * len(names)

    def add(self, scalars: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Adds this rank's means without waiting for the device; `weight` is the part's weight in the rank's share."""
        for name, value in scalars.items():
            i = self._names.index(name)
            self._sums[i] += value * weight
            self._counts[i] += weight

    def means(self) -> dict[str, float]:
        """Collective: returns the means over steps and ranks, and starts again at zero. Waits for the device.

        Ranks are summed in their order, so that the result does not depend on which rank reduces.
        """
        rows = self._ranks.gather(self._sums.tolist())
        means = {
            name: sum(row[i] for row in rows) / (len(rows) * self._counts[i]) for i, name in enumerate(self._names)
        }
        self._sums.zero_()
        self._counts = [0.0] * len(self._names)
        return means

    def state(self) -> dict[str, Any]:
        """Collective: returns the sums, which a checkpoint between two log points must keep. Waits for the device."""
        return {"sums": self._ranks.gather(self._sums.tolist()), "counts": list(self._counts)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state. If the number of ranks has changed, each gets the mean of the saved ranks' sums."""
        rows, counts = state["sums"], state["counts"]
        if len(rows) == self._ranks.world:
            row = rows[self._ranks.rank]
        else:
            row = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        self._sums.copy_(torch.tensor(row, dtype=torch.float64))
        self._counts = list(counts)
