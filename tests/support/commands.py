"""Commands as users type them, what they say, and what wandb recorded."""

import json
import subprocess
import sys
from pathlib import Path

from distgan import cli

BIN = Path(sys.executable).parent


def complaint(capfd, *argv):
    """The one sentence that a mistake gets."""
    assert cli.main(list(argv)) == 2
    out, err = capfd.readouterr()
    assert err.startswith("distgan: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    return err


def wandb_records(folder: Path) -> list[dict]:
    """What wandb recorded in an offline run, read back by its own tool."""
    inspect = [str(BIN / "wandb"), "leet", "inspect", "--json", str(folder)]
    output = subprocess.run(inspect, capture_output=True, text=True, check=True, timeout=60).stdout
    return [*map(json.loads, output.splitlines())]


def wandb_history(folder: Path) -> list[dict]:
    return [record for record in wandb_records(folder) if record.get("type") == "history"]
