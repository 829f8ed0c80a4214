"""What a verb found, as a file: `--json PATH`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from distgan import files
from distgan.errors import UserError


def check(file: Path | None) -> None:
    """Refuses a place that cannot be written before the work for it is done.

    Raises:
        UserError: its folder is not there.
    """
    if file is not None and not file.absolute().parent.is_dir():
        raise UserError(f"--json is {file}, but there is no folder {file.parent}.")


def write(file: Path, report: dict[str, Any]) -> None:
    """Writes it in one piece, and says where. What is not a regular file, such as a pipe, is written to as it stands.

    Raises:
        UserError: it cannot be written.
    """
    text = json.dumps(report, indent=1) + "\n"
    try:
        output = [number for number in (1, 2) if file.exists() and os.path.samestat(file.stat(), os.fstat(number))]
        if output:  # /dev/stdout, say, in its turn with what is printed
            sys.stdout.flush()
            with open(output[0], "w", closefd=False) as stream:
                stream.write(text)
        elif file.exists() and not file.is_file():
            file.write_text(text)
        else:
            files.replace(file, text.encode())
    except OSError as error:
        raise UserError(f"--json is {file}, which cannot be written: {error.strerror}.") from error
    print(f"written to  {file}")
