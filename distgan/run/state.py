"""Defines what a checkpoint holds: the fields of `TrainingState`, no more and no less."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distgan.models import Generator
from distgan.run.adaptation import Adaptation
from distgan.run.best import BestSoFar
from distgan.run.guard import Guard
from distgan.run.meter import Meter
from distgan.storage import checkpoint
from distgan.storage.bundle import Files
from distgan.storage.checkpoint import HoldsTensors, Slots, has

NEW = {"new": True}
"""Marks a field of `TrainingState` whose file older checkpoints lack."""


class Scaler:
    """fp16's loss scaler as a part of a checkpoint; empty in other precisions."""

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        self._scaler = scaler

    def state(self) -> dict[str, Any] | None:
        """Returns the scale and when it last grew; None if there is no scaler."""
        return self._scaler.state_dict() if self._scaler is not None else None

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores a saved state, if there is a scaler."""
        if self._scaler is not None:
            self._scaler.load_state_dict(state)


@dataclass(kw_only=True)
class TrainingState:
    """Everything that a checkpoint holds. Each field is one part of it, under the field's name.

    To save one more thing, add a field and pass it to `TrainingState` in train.py. A field with `state_dict` and
    `load_state_dict` (a network, an optimiser's `Slots`, or your own class) becomes a file of tensors. A field with
    `state` and `load_state`, or a plain JSON value, becomes an entry of state.json. Older checkpoints must still load:
    give a new file of tensors `field(metadata=NEW)`; an entry needs no mark. A field that a checkpoint lacks, also at a
    rollback, keeps the value that it has.
    """

    generator: Generator
    discriminator: nn.Module
    average: Generator
    generator_optimizer: Slots
    discriminator_optimizer: Slots
    meter: Meter
    scaler: Scaler
    guard: Guard
    adaptation: Adaptation
    standing: BestSoFar
    images: str
    """Fingerprint of the training images."""
    data: dict[str, Any]
    """Number and classes of the training images, to say how others differ."""
    wandb_id: str | None = None
    """The run's id with every tracker; wandb was the first one."""
    attempt: int = 0
    """The number of rollbacks so far."""
    step: int = 0
    """The number of steps done."""

    def snapshot(self) -> Files:
        """Copies all tensors to host memory."""
        return checkpoint.snapshot(self._files())

    def described(self) -> dict[str, Any]:
        """Collective: returns the entries of state.json."""
        return {name: part.state() if hasattr(part, "state") else part for name, part in self._entries().items()}

    def load(self, folder: Path) -> None:
        """Restores every field from a verified checkpoint.

        Raises:
            UserError: the tensors do not fit these networks.
        """
        new = {field.name for field in fields(self) if field.metadata.get("new")}
        there = {name: part for name, part in self._files().items() if name not in new or has(folder, name)}
        saved = checkpoint.load(folder, there)
        for name, part in self._entries().items():
            if name in saved and hasattr(part, "load_state"):
                part.load_state(saved[name])
            elif name in saved:
                setattr(self, name, saved[name])

    def first_not_finite(self) -> str | None:
        """Names the first tensor that holds NaN or inf; None if all are finite. Waits for the device.

        A bad gradient shows in the weights or in Adam's moments.
        """
        tensors = {
            f"{name} in the {file.replace('_', ' ')}": tensor
            for file, part in self._files().items()
            for name, tensor in part.state_dict().items()
        }
        for device in {tensor.device for tensor in tensors.values()}:
            here = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
            finite = torch.stack([tensor.isfinite().all() for tensor in here.values()]).tolist()
            if not all(finite):
                return next(name for name, whole in zip(here, finite, strict=True) if not whole)
        return None

    def _files(self) -> dict[str, HoldsTensors]:
        return {name: part for name, part in self._parts().items() if hasattr(part, "state_dict")}

    def _entries(self) -> dict[str, Any]:
        return {name: part for name, part in self._parts().items() if not hasattr(part, "state_dict")}

    def _parts(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}
