"""A measurement of a generator: the numbers, what real images score, and the protocol that they were measured by."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from distgan.errors import UserError

_FILE = "evaluation.json"


@dataclass(frozen=True)
class Report:
    """What was measured of a generator, and how."""

    generator: str
    """Its run's folder, or what else it was named by."""
    step: int
    metrics: dict[str, float]
    """By name: those asked for; `spread` of the features; of the classifier's `classes` how many are `drawn`."""
    floor: dict[str, float] | None
    """What real images of the other split score; None where the source has no such split."""
    protocol: dict[str, Any]
    """All that another number must share to be compared with these."""
    best_by: str | None = None
    """The metric that says which generator of a run is the best; None outside of a run."""

    def to_json(self) -> dict[str, Any]:
        """Returns it as it stands in files."""
        content = asdict(self)
        return content if self.best_by is not None else {name: content[name] for name in content if name != "best_by"}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Takes what `to_json` returned; what else stands there is left out."""
        return cls(**{field.name: content[field.name] for field in fields(cls) if field.name in content})

    def comparable_to(self, other: "Report") -> bool:
        """Tells whether both were measured by the same protocol."""
        return self.protocol == other.protocol


def read(folder: Path) -> Report | None:
    """Reads what was measured of the generator in a folder; None if nothing was.

    Raises:
        UserError: it is something else.
    """
    file = folder / _FILE
    try:
        return Report.from_json(json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:  # ValueError: no JSON, no UTF-8; TypeError: other contents
        raise UserError(
            f"{file} is not what `distgan evaluate --json` writes: remove it, or write it anew with that."
        ) from error


def differences(reports: Mapping[str, Report]) -> list[str]:
    """Says why the numbers of these generators cannot be compared: one line for each part of the protocol that differs.

    What stands in only some of the protocols is about numbers that only these have.
    """
    protocols = {name: report.protocol for name, report in reports.items()}
    shared = [part for part in next(iter(protocols.values()), {}) if all(part in one for one in protocols.values())]
    values = {part: {name: str(one[part]) for name, one in protocols.items()} for part in shared}
    return [
        f"{part} is {', '.join(f'{value} in {name}' for name, value in by_name.items())}"
        for part, by_name in values.items()
        if len(set(by_name.values())) > 1
    ]
