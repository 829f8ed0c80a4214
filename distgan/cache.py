"""What is computed once and kept beside the prepared images: extractors, and what they make of real images."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from distgan import checkpoint
from distgan.config import DataConfig
from distgan.data.store import cache_folder, writing


def folder(images: DataConfig, kind: str, described: list[Any]) -> Path:
    """Returns the entry's folder in the cache, named by a hash of everything that the entry depends on."""
    return cache_folder(images) / kind / hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def keep(folder: Path, files: checkpoint.Files, state: dict[str, Any]) -> None:
    """Puts it there; another process may be first.

    Raises:
        ValueError: the cache cannot be written.
    """
    with writing(folder.parent):
        try:
            if folder.exists() and not checkpoint.is_whole(folder):
                shutil.rmtree(folder)
            checkpoint.commit(folder, files, state)
        except OSError:
            if not checkpoint.is_whole(folder):
                raise
