"""Pictures in a folder; where they lie in sub-folders, these are their classes."""

import json
from collections.abc import Iterator

from distgan.config import DataConfig
from distgan.data.records import Record, Source, existing_folder

_PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


def folder(data: DataConfig) -> Source:
    """Pictures in a folder; where they lie in sub-folders, these are their classes."""
    if data.path is None:
        raise ValueError("data.source is folder, but data.path is not set: give the folder with the pictures.")
    root = existing_folder(data.path)
    files = tuple(sorted(file for file in root.rglob("*") if file.suffix.lower() in _PICTURES and file.is_file()))
    if not files:
        raise ValueError(f"data.path is {root}, but there are no pictures in it ({', '.join(sorted(_PICTURES))}).")
    tops = [file.relative_to(root).parts[0] if file.parent != root else None for file in files]
    named = {top for top in tops if top is not None}
    classes = tuple(sorted(named)) if named and None not in tops else None

    def records(every: int) -> Iterator[Record]:
        for file, top in zip(files[::every], tops[::every], strict=True):
            label = classes.index(top) if classes is not None and top is not None else None
            try:
                content = file.read_bytes()
            except OSError as error:
                raise ValueError(f"{file} cannot be read ({error.strerror}).") from error
            yield Record(str(file), content, label)

    names = json.dumps([str(file.relative_to(root)) for file in files])
    return Source(records=records, count=len(files), channels=3, classes=classes, files=files, salt=names)
