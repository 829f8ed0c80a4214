"""What a verb found, as a file: `--json PATH`."""

import json
from pathlib import Path
from typing import Any


def check(file: Path | None) -> None:
    """Refuses a place that cannot be written before the work for it is done.

    Raises:
        ValueError: its folder is not there.
    """
    if file is not None and not file.absolute().parent.is_dir():
        raise ValueError(f"--json is {file}, but there is no folder {file.parent}.")


def write(file: Path, report: dict[str, Any]) -> None:
    """Writes it in one piece, and says where.

    Raises:
        ValueError: it cannot be written.
    """
    partial = file.with_name(file.name + ".tmp")
    try:
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(file)
    except OSError as error:
        raise ValueError(f"--json is {file}, which cannot be written: {error.strerror}.") from error
    print(f"written to  {file}")
