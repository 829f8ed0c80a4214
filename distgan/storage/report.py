"""Defines the report of a measurement: the numbers, what real images score, and how they were measured."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from distgan import files
from distgan.errors import UserError

_FILE = "evaluation.json"
JUDGED = "judged.json"
"""The file beside a generator with what people said about it: {"judged": [a report for each page, ...]}."""


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

    def shares(self) -> list[str]:
        """Describes the shares in what people judged: a line for each, with its interval, and that of real pictures."""
        against = f" to {self.protocol['against']}" if "against" in self.protocol else ""
        lines = []
        for name in [name for name in self.metrics if f"{name}_low" in self.metrics]:
            real = f"; of real pictures {_share(self.floor, name)}" if self.floor and name in self.floor else ""
            lines.append(f"{name.replace('_', ' ')}{against} {_share(self.metrics, name)}{real}")
        return lines


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


def judged(folder: Path) -> list[Report]:
    """Reads what people said about the generator in a folder: a report for each page that they judged it on.

    Raises:
        UserError: judged.json is something else.
    """
    file = folder / JUDGED
    try:
        return [Report.from_json(one) for one in json.loads(file.read_text())["judged"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not what `distgan judge --votes` writes: remove it.") from error


def add_judged(folder: Path, report: Report) -> None:
    """Adds what people said about the generator in a folder; it replaces what they said on the same page.

    Raises:
        UserError: as `judged`.
        OSError: the file cannot be written.
    """
    others = [one for one in judged(folder) if one.protocol["page"] != report.protocol["page"]]
    content = {"judged": [one.to_json() for one in [*others, report]]}
    files.replace(folder / JUDGED, (json.dumps(content, indent=2) + "\n").encode())


def _share(numbers: Mapping[str, float], name: str) -> str:
    return f"{numbers[name]:.2f} ({numbers[f'{name}_low']:.2f} to {numbers[f'{name}_high']:.2f})"


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
