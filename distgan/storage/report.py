"""Defines the report of a measurement: the numbers, what real images score, and how they were measured."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from distgan.errors import UserError

_FILE = "evaluation.json"


@dataclass(frozen=True)
class Report:
    """The measurement of a generator."""

    generator: str
    """The run's folder, or another path or id that names the generator."""
    step: int
    metrics: dict[str, float]
    """Numbers by name: the metrics, `spread` of the features, and with the classifier `classes` and how many are
    `drawn`."""
    floor: dict[str, float] | None
    """What real images of the other split score; None if the source has no such split."""
    protocol: dict[str, Any]
    """How the numbers were measured. Only numbers with equal protocols can be compared."""
    best_by: str | None = None
    """The metric that decides which generator of a run is the best; None outside of a run."""

    def to_json(self) -> dict[str, Any]:
        """Returns the report as it is written to files."""
        content = asdict(self)
        return content if self.best_by is not None else {name: content[name] for name in content if name != "best_by"}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Makes a report of what `to_json` returned. Unknown keys are ignored."""
        return cls(**{field.name: content[field.name] for field in fields(cls) if field.name in content})

    def comparable_to(self, other: "Report") -> bool:
        """Tells whether both were measured by the same protocol."""
        return self.protocol == other.protocol


def read(folder: Path) -> Report | None:
    """Reads the measurement of the generator in a folder; None if it was not measured.

    Raises:
        UserError: evaluation.json is something else.
    """
    file = folder / _FILE
    try:
        return Report.from_json(json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:  # ValueError: no JSON, no UTF-8; TypeError: other contents
        raise UserError(
            f"{file} is not what `distgan evaluate --json` writes: remove it, or write it again with that command."
        ) from error


_WITHOUT = {"truncation": "none", "standing": "none"}
"""What it means if a protocol lacks these parts."""


def differences(reports: Mapping[str, Report]) -> list[str]:
    """Says why numbers of these generators cannot be compared: one line for each part of the protocol that differs.

    A part that only some protocols have is skipped, because it is about numbers that only these have. But truncation
    and standing statistics change all numbers, and a protocol without them means that there were none.
    """
    protocols = {name: {**_WITHOUT, **report.protocol} for name, report in reports.items()}
    shared = [part for part in next(iter(protocols.values()), {}) if all(part in one for one in protocols.values())]
    values = {part: {name: str(one[part]) for name, one in protocols.items()} for part in shared}
    return [
        f"{part} is {', '.join(f'{value} in {name}' for name, value in by_name.items())}"
        for part, by_name in values.items()
        if len(set(by_name.values())) > 1
    ]
