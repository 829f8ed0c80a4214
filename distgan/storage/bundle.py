"""Writes and verifies bundles: folders of tensors that are whole or do not exist.

    NAME.safetensors   tensors by name
    state.json         everything that is not a tensor
    manifest.json      the format, and each file's size and sha256; written last

A bundle is written under another name and renamed when every byte is on the disk. Readers verify it all the same. No
pickle is ever written or read: loading somebody's bundle cannot run code.
"""

import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from distgan import files as disk
from distgan.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
Files: TypeAlias = "Mapping[str, Mapping[str, Tensor]]"
"""Tensors by the file's name, without its ending, and by their own name."""


def commit(final: Path, files: Files, state: Mapping[str, Any]) -> None:
    """Writes a bundle, whole or not at all.

    Raises:
        OSError: the disk is full or gone, or a folder of that name exists.
    """
    from distgan.storage import tensors  # here, so that who only looks at a bundle need not import torch

    partial = final.with_suffix(f".{secrets.token_hex(4)}.tmp")  # random, because a cache has several writers
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        contents = {f"{file}.safetensors": tensors.to_bytes(named) for file, named in files.items()}
        contents["state.json"] = to_json(state)
        manifest = {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        }
        contents["manifest.json"] = to_json({"format": FORMAT, "files": manifest})
        for name, content in contents.items():
            disk.write(partial / name, content)
        disk.sync_folder(partial)
        partial.rename(final)
        disk.sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_state(folder: Path) -> dict[str, Any]:
    """Reads state.json of a verified bundle."""
    return json.loads((folder / "state.json").read_text())


def is_whole(folder: Path) -> bool:
    """Tells whether a folder is a bundle in which every file matches the manifest."""
    return problem(folder) is None


def problem(folder: Path, *, contents: bool = True) -> str | None:
    """Says what is wrong with a bundle, naming the file; None if nothing is.

    Args:
        folder: the bundle.
        contents: whether files are read, and not only their sizes compared.

    Raises:
        UserError: this version does not know the bundle's format.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        version = manifest["format"]
        files = {name: (int(file["size"]), str(file["sha256"])) for name, file in manifest["files"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # ValueError: not JSON, not UTF-8
        return "manifest.json cannot be read"
    if version != FORMAT:
        raise UserError(
            f"{folder} has format {version}, which this version of distgan does not know (it knows {FORMAT}): update "
            "distgan to the version that wrote it."
        )
    for name, (size, sha256) in files.items():
        try:
            found = (folder / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is not there"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
        if contents and hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
            return f"{name} has other contents than the manifest says"
    return None


def to_json(content: Any) -> bytes:
    """Returns JSON in the form that distgan writes to files."""
    return (json.dumps(content, indent=2) + "\n").encode()
