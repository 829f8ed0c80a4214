"""Saves, loads, lists and removes the checkpoints of a run. Each is a bundle, such as `step_00001000/`.

generator.safetensors, discriminator.safetensors, average.safetensors     parameters and buffers by name
generator_optimizer.safetensors, discriminator_optimizer.safetensors      Adam's state by "parameter name/slot"
state.json                                                                the step and everything that is not a tensor

`TrainingState` in run/state.py decides which files and which entries of state.json there are.
"""

import logging
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distgan import files as disk
from distgan.errors import NotFiniteError, UserError
from distgan.storage import bundle, tensors
from distgan.storage.bundle import Files, read_state
from distgan.storage.places import CHECKPOINT

logger = logging.getLogger(__name__)


def folder_of(root: Path, step: int) -> Path:
    """Returns the folder of a step's checkpoint, which need not exist."""
    return root / f"step_{step:08d}"


class HoldsTensors(Protocol):
    """The source of one file of a checkpoint, which can take it back, such as a network or an optimiser's `Slots`."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, tensors: Mapping[str, Tensor], /) -> Any: ...


class Slots:
    """An optimiser's state by "parameter name/slot", so that it does not depend on order, wrappers or world size."""

    def __init__(self, optimizer: torch.optim.Optimizer, network: nn.Module) -> None:
        """Pairs an optimiser with the network whose parameters it updates."""
        self._optimizer, self._network = optimizer, network

    def state_dict(self) -> dict[str, Tensor]:
        """Returns all slots. Before the first update there are none."""
        return {
            f"{name}/{slot}": tensor
            for name, parameter in self._network.named_parameters()
            for slot, tensor in self._optimizer.state.get(parameter, {}).items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor], /) -> None:
        """Replaces all slots."""
        slots: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            owner, slot = key.rsplit("/", 1)
            slots.setdefault(owner, {})[slot] = tensor
        for owner, parameter in self._network.named_parameters():
            saved = slots.get(owner, {})
            self._optimizer.state[parameter] = {slot: _laid_out(tensor, parameter) for slot, tensor in saved.items()}


def _laid_out(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Returns a slot on its parameter's device and in its layout in memory, which fused Adam takes for granted."""
    if tensor.shape != parameter.shape:  # the count of updates
        return tensor.to(parameter.device)
    return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def snapshot(holders: Mapping[str, HoldsTensors]) -> Files:
    """Copies the tensors of a checkpoint to host memory, so that they can be written while training goes on."""
    return {
        file: {name: tensor.detach().to("cpu", copy=True) for name, tensor in holder.state_dict().items()}
        for file, holder in holders.items()
    }


def save(root: Path, step: int, files: Files, state: Mapping[str, Any]) -> Path:
    """Writes a checkpoint and returns its folder. If that step has a checkpoint already, it is left as it is.

    Call it on one process only.

    Raises:
        NotFiniteError: a tensor holds NaN or inf; nothing was written.
        OSError: the disk is full or gone; earlier checkpoints are untouched.
    """
    final = folder_of(root, step)
    if final.exists():
        return final
    for file, named in files.items():
        for name, tensor in named.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise NotFiniteError(f"at step {step} {name} in the {file.replace('_', ' ')} has become NaN or inf.")
    bundle.commit(final, files, {"step": step, **state})
    return final


def has(folder: Path, file: str) -> bool:
    """Tells whether a checkpoint has a file of tensors of this name, which older ones may lack."""
    return (folder / f"{file}.safetensors").exists()


def load(folder: Path, holders: Mapping[str, HoldsTensors]) -> dict[str, Any]:
    """Loads a verified checkpoint into the holders, in place, and returns its state.

    Raises:
        UserError: the tensors do not fit the networks.
    """
    for file, holder in holders.items():
        found = tensors.read(folder / f"{file}.safetensors")
        if isinstance(holder, nn.Module):
            tensors.load_into(holder, found, f"the {file} of {folder}")
        else:
            holder.load_state_dict(found)
    return read_state(folder)


def newest(root: Path, *, set_aside: bool, until: int | None = None) -> Path | None:
    """Returns the newest whole checkpoint, at most of step `until` if that is given; None if there is no checkpoint.

    A damaged checkpoint is skipped with a warning that names its file. With `set_aside` it is also renamed to
    `*.damaged`, once a whole one is found; only the process that owns the run may do that.

    Raises:
        UserError: all checkpoints are damaged, or this version does not know the format of one. A run must not start
            again from step 0 over its own history.
        OSError: the file system fails. That is not damage, and nothing is moved.
    """
    damaged: dict[Path, str] = {}
    for folder in sorted(_folders(root), key=step_of, reverse=True):
        if until is not None and step_of(folder) > until:
            continue
        problem = bundle.problem(folder)
        if problem is not None:
            damaged[folder] = problem
            continue
        for bad, what in damaged.items():
            message = f"checkpoint {bad} is damaged ({what})"
            if set_aside:
                aside = disk.move_aside(bad, "damaged")
                message += f" and was moved to {aside.name}"
            logger.warning("%s; %s is used.", message, folder.name)
        return folder
    if damaged:
        problems = "; ".join(f"{folder.name}: {what}" for folder, what in damaged.items())
        raise UserError(
            f"every checkpoint in {root} is damaged ({problems}): bring back a copy, or move the folder away to start "
            "again from step 0."
        )
    return None


def last_images(root: Path) -> str | None:
    """Returns the fingerprint of the newest checkpoint's training images, without verifying the checkpoint.

    None if there is no checkpoint, or its state cannot be read.
    """
    try:
        fingerprint: str = read_state(max(_folders(root), key=step_of))["images"]
    except (OSError, ValueError, KeyError, TypeError):  # ValueError: no folder, no JSON, no UTF-8
        return None
    return fingerprint


def any_in(root: Path) -> bool:
    """Tells whether a folder has any checkpoint: whole, damaged or moved aside."""
    return root.is_dir() and any(folder.suffix != ".tmp" for folder in root.glob("step_*"))


def remove_leftovers(root: Path) -> None:
    """Removes the partial folders of interrupted saves. Only for the process that owns the run."""
    for partial in root.glob("step_*.tmp"):
        shutil.rmtree(partial, ignore_errors=True)


def prune(root: Path, *, keep_last: int, keep_every: int | None, keep: Collection[int] = ()) -> None:
    """Removes checkpoints, except the newest `keep_last`, multiples of `keep_every`, and the steps in `keep`."""
    folders = sorted(_folders(root), key=step_of)
    for folder in folders[:-keep_last]:
        if step_of(folder) not in keep and (keep_every is None or step_of(folder) % keep_every):
            doomed = folder.with_suffix(".tmp")  # renamed first, so that no reader sees half of it
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)  # if this fails, the next start removes the rest


def steps(root: Path) -> list[int]:
    """Returns the steps of all checkpoints in a folder, whole or not, in order."""
    return sorted(map(step_of, _folders(root)))


def abandon(root: Path, *, after: int) -> None:
    """Renames the checkpoints after a step to `*.abandoned`, where no reader looks."""
    for folder in _folders(root):
        if step_of(folder) > after:
            disk.move_aside(folder, "abandoned")
    disk.sync_folder(root)


def _folders(root: Path) -> list[Path]:
    return [folder for folder in root.iterdir() if CHECKPOINT.fullmatch(folder.name)] if root.is_dir() else []


def step_of(folder: Path) -> int:
    """Reads the step of a checkpoint from its name."""
    return int(folder.name.removeprefix("step_"))
