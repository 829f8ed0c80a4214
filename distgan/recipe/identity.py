"""Tells whether two recipes are the same run, and which settings all its ranks must share."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from distgan.recipe.groups import Config


def as_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Returns the configuration as nested dicts of plain values, one per group."""
    groups = dataclasses.asdict(config)
    groups["optim"]["betas"] = list(config.optim.betas)
    if not isinstance(config.data.image_size, int):
        groups["data"]["image_size"] = list(config.data.image_size)
    return groups


def mathematical_differences(saved: Config, new: Config) -> list[str]:
    """Lists the differences between two recipes that change the mathematics, one line per key."""
    old, new_values = flat(as_dict(saved)), flat(as_dict(new))
    return [
        f"{key}: {old[key]} in the run, {new_values[key]} now"
        for key in old
        if old[key] != new_values[key] and not is_beside(key)
    ]


def common(config: Config) -> dict[str, Any]:
    """Returns, by dotted key, the settings that all ranks must share: all except where a machine keeps its data."""
    values = flat(as_dict(config))
    return {key: value for key, value in values.items() if key not in ("data.path", "data.cache")}


def flat(groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the values of all groups by dotted key."""
    return {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}


def is_beside(key: str) -> bool:
    """Tells whether a setting or its group is marked `BESIDE`."""
    group, name = key.split(".")
    in_group: Any = get_type_hints(Config)[group]
    marks = (_fields(Config)[group].metadata, _fields(in_group)[name].metadata)
    return any(mark.get("beside") for mark in marks)


def _fields(config: Any) -> dict[str, dataclasses.Field[Any]]:
    return {one.name: one for one in dataclasses.fields(config)}
