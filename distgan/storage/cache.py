"""Keeps results that are computed once beside the prepared images: extractors, and their features of real images."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from distgan.data.store import cache_folder, writing
from distgan.recipe import DataConfig
from distgan.storage import bundle


def path(images: DataConfig, kind: str, described: list[Any]) -> Path:
    """Returns the entry's folder in the cache, named by a hash of everything that the entry depends on."""
    return cache_folder(images) / kind / hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def put(folder: Path, files: bundle.Files, state: dict[str, Any]) -> None:
    """Writes an entry. If another process was quicker, its entry stays.

    Raises:
        UserError: the cache cannot be written.
    """
    with writing(folder.parent):
        try:
            if folder.exists() and not bundle.is_whole(folder):
                shutil.rmtree(folder)
            bundle.commit(folder, files, state)
        except OSError:
            if not bundle.is_whole(folder):
                raise
