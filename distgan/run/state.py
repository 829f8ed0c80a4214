"""What a checkpoint holds, no more and no less."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distgan.models import Generator
from distgan.run.best import BestSoFar
from distgan.run.guard import Guard
from distgan.run.meter import Meter
from distgan.storage import checkpoint
from distgan.storage.bundle import Files
from distgan.storage.checkpoint import HoldsTensors, Slots


class Scaler:
    """fp16's loss scaler as a checkpoint keeps it; nothing in other precisions."""

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        self._scaler = scaler

    def state(self) -> dict[str, Any] | None:
        """Returns its scale and when it last grew; None if there is no scaler."""
        return self._scaler.state_dict() if self._scaler is not None else None

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes it up again."""
        if self._scaler is not None:
            self._scaler.load_state_dict(state)


@dataclass(kw_only=True)
class TrainingState:
    """Each field is one part of a checkpoint, under the field's name; a new saved quantity is one more field.

    A field with `state_dict` and `load_state_dict` is a file of tensors. One with `state` and `load_state` is an entry
    of state.json, and so is a plain value of JSON. An entry that a checkpoint lacks, because an older version of
    distgan wrote it, stays as it is.
    """

    generator: Generator
    discriminator: nn.Module
    average: Generator
    generator_optimizer: Slots
    discriminator_optimizer: Slots
    meter: Meter
    scaler: Scaler
    guard: Guard
    standing: BestSoFar
    images: str
    """Fingerprint of the training images."""
    data: dict[str, Any]
    """Their number and classes, to say what differs from other images."""
    wandb_id: str | None = None
    attempt: int = 0
    """How often the run was rolled back."""
    step: int = 0
    """Steps that are done."""

    def snapshot(self) -> Files:
        """Copies all tensors to host memory."""
        return checkpoint.snapshot(self._files())

    def described(self) -> dict[str, Any]:
        """Collective: returns all that is not a tensor."""
        return {name: part.state() if hasattr(part, "state") else part for name, part in self._entries().items()}

    def load(self, folder: Path) -> None:
        """Takes all of it from a verified checkpoint.

        Raises:
            UserError: its tensors are not those of these networks.
        """
        saved = checkpoint.load(folder, self._files())
        for name, part in self._entries().items():
            if name in saved and hasattr(part, "load_state"):
                part.load_state(saved[name])
            elif name in saved:
                setattr(self, name, saved[name])

    def first_not_finite(self) -> str | None:
        """Says what a checkpoint would hold that is NaN or inf, if anything; waits for the device.

        A bad gradient shows in the weights, or in Adam's moments.
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
