"""The disk format: the only place that writes or reads tensors.

A checkpoint is a folder `step_00001000` of safetensors and JSON. It is written under another name, its manifest last,
and renamed when every byte is on disk, so that a folder of that name is whole; readers verify it all the same. No
pickle is ever written or read: loading somebody's checkpoint cannot run code.

    generator.safetensors, discriminator.safetensors, average.safetensors     parameters and buffers by name
    generator_optimizer.safetensors, discriminator_optimizer.safetensors      "parameter name/slot"
    state.json                                                                step and all that is not a tensor
    manifest.json                                                             format; each file's size and sha256

An exported generator is a folder too: model.safetensors, and config.json with what builds the network.
"""

import hashlib
import io
import json
import logging
import os
import pickle
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from distgan import paths
from distgan.config import ModelConfig
from distgan.errors import NotFiniteError
from distgan.models import Generator, Shape, build_generator

logger = logging.getLogger(__name__)

FORMAT = 1
_INCEPTION_SHA256 = "6726825d"  # its beginning, which stands in the file's name
_STEP = re.compile(r"step_(\d{8,})")


Files = Mapping[str, Mapping[str, Tensor]]  # tensors by file, without its suffix, and name


def snapshot(
    *, networks: Mapping[str, nn.Module], optimizers: Mapping[str, tuple[torch.optim.Optimizer, nn.Module]]
) -> Files:
    """Copies what a checkpoint holds to host memory, so that it can be written while training goes on.

    Each optimiser comes with the network whose parameters it moves.
    """
    files: dict[str, dict[str, Tensor]] = {name: network.state_dict() for name, network in networks.items()}
    for name, (optimizer, network) in optimizers.items():
        files[f"{name}_optimizer"] = _slots(optimizer, network)
    return {
        file: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        for file, tensors in files.items()
    }


def save(root: Path, step: int, files: Files, state: Mapping[str, Any]) -> Path:
    """Commits a checkpoint and returns its folder; one of that step that is there already is left as it is.

    To be called on one process only.

    Raises:
        NotFiniteError: a tensor has a number that is not finite; nothing was committed.
        OSError: the disk is full or gone; what was saved before is untouched.
    """
    final = root / f"step_{step:08d}"
    if final.exists():
        return final
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise NotFiniteError(f"at step {step} {name} in the {file.replace('_', ' ')} is no longer finite.")
    commit(final, files, {"step": step, **state})
    return final


def commit(final: Path, files: Files, state: Mapping[str, Any]) -> None:
    """Writes a folder of tensors, and what describes them, whole or not at all.

    Raises:
        OSError: the disk is full or gone, or there is a folder of that name.
    """
    partial = final.with_suffix(f".{secrets.token_hex(4)}.tmp")  # a cache has several writers
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        contents = {f"{file}.safetensors": _to_bytes(tensors) for file, tensors in files.items()}
        contents["state.json"] = _json(state)
        manifest = {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        }
        contents["manifest.json"] = _json({"format": FORMAT, "files": manifest})
        for name, content in contents.items():
            _write(partial / name, content)
        sync_folder(partial)
        partial.rename(final)
        sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class Background:
    """Runs one piece of work at a time beside the training, and tells at `finish` what it met."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        self._reported = False

    def start(self, work: Callable[[], None]) -> None:
        """Begins a piece of work; the one before must be finished."""
        assert self._running is None
        self._running, self._reported = self._pool.submit(work), False

    def failed(self) -> bool:
        """Tells, once, whether the work has ended with an error, which `finish` will raise."""
        running = self._running
        if running is None or self._reported or not running.done() or running.exception() is None:
            return False
        self._reported = True
        return True

    def finish(self) -> None:
        """Waits for the work, if there is any, and raises the error that it met."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


def load(
    folder: Path,
    *,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, tuple[torch.optim.Optimizer, nn.Module]],
) -> dict[str, Any]:
    """Restores networks and optimisers in place from a verified checkpoint and returns its state.

    Raises:
        ValueError: its tensors are not those of these networks.
    """
    for name, network in networks.items():
        load_into(network, read_tensors(folder / f"{name}.safetensors"), f"the {name} of {folder}")
    for name, (optimizer, network) in optimizers.items():
        slots: dict[str, dict[str, Tensor]] = {}
        for key, tensor in read_tensors(folder / f"{name}_optimizer.safetensors").items():
            owner, slot = key.rsplit("/", 1)
            slots.setdefault(owner, {})[slot] = tensor
        for owner, parameter in network.named_parameters():
            saved = slots.get(owner, {})
            optimizer.state[parameter] = {slot: tensor.to(parameter.device) for slot, tensor in saved.items()}
    return read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """Reads what a verified checkpoint holds besides tensors."""
    return json.loads((folder / "state.json").read_text())


def newest(root: Path, *, set_aside: bool, until: int | None = None) -> Path | None:
    """Returns the newest whole checkpoint of this step or an earlier one; None if there is no checkpoint at all.

    A damaged one is passed over with a warning that names its file; with `set_aside`, for the one process that owns
    the run, it is also renamed to `*.damaged`, once a whole one is found.

    Raises:
        ValueError: all checkpoints are damaged, or one is of a format that this version does not know. A run must not
            start again at step 0 over its own history.
        OSError: the file system fails; that is no damage, and nothing is moved.
    """
    damaged: dict[Path, str] = {}
    for folder in sorted(_folders(root), key=step_of, reverse=True):
        if until is not None and step_of(folder) > until:
            continue
        problem = _problem(folder)
        if problem is not None:
            damaged[folder] = problem
            continue
        for bad, what in damaged.items():
            message = f"checkpoint {bad} is damaged ({what})"
            if set_aside:
                aside = move_aside(bad, "damaged")
                message += f" and was moved to {aside.name}"
            logger.warning("%s; %s is used.", message, folder.name)
        return folder
    if damaged:
        problems = "; ".join(f"{folder.name}: {what}" for folder, what in damaged.items())
        raise ValueError(
            f"every checkpoint in {root} is damaged ({problems}): bring back a copy, or move the "
            "folder away to begin anew."
        )
    return None


def last_images(root: Path) -> str | None:
    """Returns the fingerprint of the images that the newest checkpoint was trained on; checks nothing.

    None where there is no checkpoint, or its state cannot be read.
    """
    try:
        fingerprint: str = read_state(max(_folders(root), key=step_of))["images"]
    except (OSError, ValueError, KeyError, TypeError):  # ValueError: no folder, no JSON, no UTF-8
        return None
    return fingerprint


def any_in(root: Path) -> bool:
    """Tells whether any checkpoint lies there: whole, damaged or moved aside."""
    return root.is_dir() and any(folder.suffix != ".tmp" for folder in root.glob("step_*"))


def is_whole(folder: Path) -> bool:
    """Tells whether a folder is a checkpoint in which every file is what its manifest says."""
    return _problem(folder) is None


def remove_leftovers(root: Path) -> None:
    """Removes what a save left that was interrupted. Only for the process that owns the run."""
    for partial in root.glob("step_*.tmp"):
        shutil.rmtree(partial, ignore_errors=True)


def prune(root: Path, *, keep_last: int, keep_every: int | None, keep: Collection[int] = ()) -> None:
    """Removes checkpoints but the newest `keep_last`, those whose step is a multiple of `keep_every`, and these."""
    folders = sorted(_folders(root), key=step_of)
    for folder in folders[:-keep_last]:
        if step_of(folder) not in keep and (keep_every is None or step_of(folder) % keep_every):
            doomed = folder.with_suffix(".tmp")  # first out of the readers' sight, whole
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)  # what is left is removed at the next start


def steps(root: Path) -> list[int]:
    """Returns the steps of the checkpoints there, whole or not, in order."""
    return sorted(map(step_of, _folders(root)))


def abandon(root: Path, *, after: int) -> None:
    """Moves the checkpoints after a step out of the readers' sight, to `*.abandoned`."""
    for folder in _folders(root):
        if step_of(folder) > after:
            move_aside(folder, "abandoned")
    sync_folder(root)


def save_generator(
    folder: Path,
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    shape: Shape,
    *,
    step: int,
    measured: Mapping[str, Any] | None = None,
) -> None:
    """Writes an exported generator, and what was measured of it if anything was, as evaluation.json.

    Each file is replaced in one piece, so that a reader never finds half of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "library_name": "distgan",
        "format": FORMAT,
        "model": asdict(model),
        "images": asdict(shape),
        "step": step,
    }
    contents = {
        "model.safetensors": _to_bytes(weights),
        "config.json": _json(config),
    }
    (folder / "evaluation.json").unlink(missing_ok=True)  # first, so that no old numbers stand beside new weights
    if measured is not None:
        contents["evaluation.json"] = _json(measured)
    for name, content in contents.items():
        partial = folder / f"{name}.tmp"
        try:
            _write(partial, content)
            partial.replace(folder / name)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    sync_folder(folder)


def load_generator(path: str | os.PathLike[str]) -> Generator:
    """Loads an exported generator, in eval mode on the CPU: from its folder, its run's, or the Hugging Face hub by id.

    `generator.sample(n, seed=...)` draws images, uint8 (n, C, H, W). Neither data nor recipe is needed, and only
    safetensors and JSON are read, or fetched, whatever else a repository holds.

    Raises:
        ValueError: there is no generator, it is damaged, or what is offered is a pickle.
    """
    folder = exported_folder(path)
    for name in ("model.safetensors", "config.json"):
        if not (folder / name).exists():
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".pt", ".pth", ".bin", ".pkl", ".ckpt"})
            hint = f" ({pickles[0]} is a pickle and is never loaded, because it can run code)" if pickles else ""
            raise ValueError(f"{folder} holds no exported generator: {name} is not there{hint}.")
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["format"] != FORMAT:
            raise ValueError(f"{folder} is of format {config['format']}, and this version of distgan knows {FORMAT}.")
        generator = build_generator(ModelConfig(**config["model"]), Shape(**config["images"]))
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'config.json'} does not describe a generator of distgan.") from error
    load_into(generator, read_tensors(folder / "model.safetensors"), f"the generator in {folder}")
    return generator.eval().requires_grad_(False)


def exported_folder(path: str | os.PathLike[str]) -> Path:
    """Finds the folder of an exported generator: given itself, by its run, or fetched from the hub."""
    folder = Path(paths.expanded("the generator's folder", path))
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        folder = _from_hub(str(path))
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file, not the folder of an exported generator with model.safetensors and config.json; "
            "pickles (.pt, .pth, .bin, .pkl) are never loaded, because they can run code."
        )
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist.")
    if not (folder / "model.safetensors").exists() and (folder / "generator" / "model.safetensors").exists():
        folder = folder / "generator"
    return folder


def read_weights(file: Path) -> tuple[dict[str, Tensor], str]:
    """Reads the weights of a network that others have trained, and the sha256 of their file.

    A hash at the end of the file's name, as in `name-6726825d.pth`, must be the beginning of that. Safetensors only,
    except torch-fidelity's InceptionV3: that one file is a pickle, from which only tensors are read.

    Raises:
        ValueError: the file is missing, damaged or a pickle.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"the weights {file} cannot be read: {error.strerror}.") from error
    sha256 = hashlib.sha256(content).hexdigest()
    named = re.search(r"-([0-9a-f]{8,64})$", file.stem)
    if named is not None and not sha256.startswith(named[1]):
        raise ValueError(f"the weights {file} do not match the hash in their name ({sha256[:8]}…): fetch them again.")
    if file.suffix != ".safetensors" and not sha256.startswith(_INCEPTION_SHA256):
        raise ValueError(
            f"the weights {file} are not safetensors; pickles are not loaded, because they can run code, except "
            f"torch-fidelity's InceptionV3 ({_INCEPTION_SHA256}…)."
        )
    try:
        if file.suffix == ".safetensors":
            return tensors_from_bytes(content), sha256
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), sha256  # noqa: TID251
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"the weights {file} are damaged.") from error


def inception_weights() -> Path:
    """Returns where torch-fidelity's InceptionV3 lies in torch's cache; fetches it if it is not there.

    Raises:
        ValueError: it cannot be fetched, with what to put where.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    file = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), hash_prefix=_INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise ValueError(
                f"InceptionV3's weights cannot be fetched: on a machine with a network download {URL_INCEPTION_V3} and "
                f"put it at {file}, or give its path as the extractor's weights; the extractor classifier needs none."
            ) from error
    return file


def _from_hub(repository: str) -> Path:
    """Fetches an exported generator's two files, and no others."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=["model.safetensors", "config.json"]))
    except (errors.RepositoryNotFoundError, errors.GatedRepoError, errors.HFValidationError) as error:
        raise ValueError(
            f"{repository} is neither a folder here nor a model on the Hugging Face hub that you may read: check the "
            "name, or run `hf auth login`."
        ) from error
    except (OSError, errors.HfHubHTTPError) as error:
        raise ValueError(
            f"{repository} is no folder here, is not in the cache, and the Hugging Face hub cannot be reached."
        ) from error


def _slots(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """Returns the optimiser's state by parameter name, so that nothing depends on order, wrappers or world size."""
    return {
        f"{name}/{slot}": tensor
        for name, parameter in network.named_parameters()
        for slot, tensor in optimizer.state.get(parameter, {}).items()
    }


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Returns the same bytes for the same tensors: without metadata, whose order safetensors leaves to chance."""
    return tensors_to_bytes({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Reads a file of tensors.

    Raises:
        ValueError: it is none.
    """
    try:
        return tensors_from_bytes(file.read_bytes())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file.") from error


def load_into(network: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Loads tensors into the network whose they are.

    Raises:
        ValueError: they are not; the sentence begins with `what`.
    """
    expected = network.state_dict()
    wrong = [name for name in expected if name not in tensors or tensors[name].shape != expected[name].shape]
    wrong += [name for name in tensors if name not in expected]
    if wrong:
        raise ValueError(f"{what} is of another network: {wrong[0]} does not match.")
    network.load_state_dict(tensors)


def _problem(folder: Path) -> str | None:
    """Says what is wrong with a checkpoint, naming the file; None if nothing is.

    Raises:
        ValueError: it is of a format that this version does not know.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        version = manifest["format"]
        files = {name: (int(file["size"]), str(file["sha256"])) for name, file in manifest["files"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # ValueError: not JSON, not UTF-8
        return "manifest.json cannot be read"
    if version != FORMAT:
        raise ValueError(f"{folder} is of format {version}, and this version of distgan knows {FORMAT}.")
    for name, (size, sha256) in files.items():
        try:
            content = (folder / name).read_bytes()
        except FileNotFoundError:
            return f"{name} is not there"
        if len(content) != size:
            return f"{name} has {len(content)} bytes instead of {size}"
        if hashlib.sha256(content).hexdigest() != sha256:
            return f"{name} has other contents than the manifest says"
    return None


def _folders(root: Path) -> list[Path]:
    return [folder for folder in root.iterdir() if _STEP.fullmatch(folder.name)] if root.is_dir() else []


def step_of(folder: Path) -> int:
    """Reads the step of a checkpoint from its name."""
    return int(folder.name.removeprefix("step_"))


def move_aside(folder: Path, why: str) -> Path:
    """Renames a folder so that nobody takes it for a checkpoint, and nothing is lost."""
    aside, n = folder.with_suffix(f".{why}"), 1
    while aside.exists():
        n += 1
        aside = folder.with_suffix(f".{why}{n}")
    folder.rename(aside)
    return aside


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _write(file: Path, content: bytes) -> None:
    """Writes with the umask's permissions (safetensors' own writer makes files only the owner can read)."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Makes names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
