"""Finds which parquet files of a data set's local copy make up which configuration and split.

Layouts are the hub's: `data/train-00000-of-00002.parquet`, `CONFIG/train-….parquet`, `CONFIG/train/0000.parquet` (the
hub's own conversion), `train.parquet`, and any that README.md describes under `configs:`.
"""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from distgan.data.arrangement import meant
from distgan.data.records import existing_folder
from distgan.errors import UserError, nearest
from distgan.recipe import DataConfig

_SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}

Splits = dict[str, tuple[Path, ...]]
"""Files in order, by the name of their split."""


def splits(data: DataConfig, name: str) -> tuple[str, Splits]:
    """Returns the split that `data.split` means, and the files of all splits of its configuration.

    The configuration is `data.config`. If that is unset, it is README.md's default or the only one that has the split.

    Raises:
        UserError: the folder has no such files, or several configurations have some and none is chosen.
    """
    root = existing_folder(data.path)
    # pathlib sorts part by part. Images must keep this order, or old runs could not resume.
    found = [file for file in sorted(root.rglob("*.parquet")) if _visible(file.relative_to(root)) and file.is_file()]
    if not found:
        raise UserError(_nothing_in(root, data, name))
    configurations, default = _described(root, found)
    if not configurations:
        configurations = _by_names(root, found)
    chosen = {config: split for config, files in configurations.items() if (split := meant(data.split, files))}
    # A configuration with a split of exactly this name comes before those with another of its kind.
    having = [config for config in chosen if data.split in configurations[config]] or list(chosen)
    if data.config is not None:
        if data.config not in configurations:
            raise UserError(
                f'data.config is "{data.config}", which {root} does not have: '
                f"{nearest(data.config, list(configurations))}"
            )
        having = [config for config in chosen if config == data.config]
    elif default in having:
        having = [default]
    if not having:
        among = [configurations[data.config]] if data.config is not None else list(configurations.values())
        raise UserError(
            f"data.path is {root}, but no {data.split}-*.parquet is in it: data.split must be one of "
            f"{', '.join(sorted({split for files in among for split in files}))}."
        )
    if len(having) > 1:
        raise UserError(
            f"data.path is {root}, which has the configurations {', '.join(having)}: choose one with data.config."
        )
    return chosen[having[0]], configurations[having[0]]


def _visible(path: PurePath) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _nothing_in(root: Path, data: DataConfig, name: str) -> str:
    said = f"data.path is {root}, but no {data.split}-*.parquet is in it"
    if any(root.glob("*.py")):
        return f"{said}: it is a copy of a script, which is never run; {converted(name)}"
    return f"{said}: it must be a copy of {name}."


def converted(name: str) -> str:
    """Returns what to do about a data set that is a script."""
    return (
        "the hub keeps most such data sets as parquet files too: run `hf download --repo-type dataset "
        f"{name} --revision refs/convert/parquet --local-dir DIR`, then give --data.path=DIR."
    )


def _by_names(root: Path, found: Iterable[Path]) -> dict[str, Splits]:
    """Returns the configurations by the files' names: each folder is one."""
    placed = [(file, *_place(file.relative_to(root))) for file in found]
    named = any(split is not None for _, _, split in placed)
    configurations: dict[str, Splits] = {}
    for file, config, split in placed:
        if split is None and named:
            continue  # if other files name their split, a file without one is something else
        files = configurations.setdefault(config, {})
        files[split or "train"] = (*files.get(split or "train", ()), file)
    return configurations


def _place(path: PurePath) -> tuple[str, str | None]:
    """Returns the configuration and the split of a file by its path below the folder; None without a split."""
    above, folder = path.parent.parent.as_posix(), path.parent.name.removeprefix("partial-")  # of the first 5 GB
    first = path.stem.partition("-")[0]
    words = re.split("[^a-z]+", path.stem.lower())
    if first in _SPLITS:
        return path.parent.as_posix(), first
    if folder.lower() in _SPLITS:
        return above, folder.lower()
    if folder and path.stem.isdigit():
        return above, folder
    if re.search(r"-\d+-of-\d+", path.stem):
        return path.parent.as_posix(), first
    return path.parent.as_posix(), next((word for word in words if word in _SPLITS), None)


def _described(root: Path, found: Sequence[Path]) -> tuple[dict[str, Splits], str | None]:
    """Returns the configurations in README.md's header that have files here, and the name of the default one."""
    configurations: dict[str, Splits] = {}
    default = None
    try:
        for entry in _header(root).get("configs") or []:
            config = str(entry["config_name"])
            files = {split: files for split, files in _entry(root, found, entry).items() if files}
            if files:
                configurations[config] = files
                default = config if entry.get("default") or config == "default" else default
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{root / 'README.md'} has a `configs:` entry that is not in the hub's form: correct it or remove the file."
        ) from error
    return configurations, default


def _entry(root: Path, found: Sequence[Path], entry: dict[str, Any]) -> Splits:
    """Returns the files of one of README.md's configurations."""
    root = root / str(entry.get("data_dir") or ".").strip("/")
    patterns, inside = entry.get("data_files"), [file for file in found if file.is_relative_to(root)]
    if patterns is None:
        merged: Splits = {}
        for files in _by_names(root, inside).values():
            merged |= {split: (*merged.get(split, ()), *more) for split, more in files.items()}
        return merged
    if isinstance(patterns, list) and all(isinstance(part, dict) for part in patterns):
        return {str(part["split"]): _matching(root, inside, part["path"]) for part in patterns}
    return {"train": _matching(root, inside, patterns)}


def _header(root: Path) -> dict[str, Any]:
    """Returns README.md's header, the part between the two `---` at its top; {} if there is none."""
    try:
        text = (root / "README.md").read_text(encoding="utf-8")
        between = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        header = yaml.safe_load(between[1]) if between else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return header if isinstance(header, dict) else {}


def _matching(folder: Path, files: Iterable[Path], patterns: str | list[str]) -> tuple[Path, ...]:
    """Returns those of the files that match one of the patterns, so that no pattern leads out of the folder."""
    wanted = [patterns] if isinstance(patterns, str) else patterns
    wanted = [pattern.removeprefix("./").replace("**/", "*") for pattern in wanted]
    return tuple(file for file in files if any(fnmatch.fnmatch(str(file.relative_to(folder)), one) for one in wanted))
