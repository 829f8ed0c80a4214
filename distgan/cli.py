"""`distgan VERB`: finds the verb, and turns errors into sentences and exit codes.

Exit codes: 0 done, or stopped and saved; 1 an error in distgan or of the machine, with its traceback; 2 a mistake of
the user's; 3 to 6 as in errors.py; 130 interrupted before anything could be saved. 2 to 6 come with one sentence.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distgan import __version__, files, output
from distgan.errors import StoppedError, UserError, is_reported

VERBS = {
    "train": "train a GAN, or resume a run",
    "doctor": "tell how this machine and launcher look, and what to change",
    "where": "print the folder of a recipe's run",
    "runs": "list runs: step, last number, state, disk used",
    "recipes": "list the recipes, launch files and Slurm scripts that come with distgan",
    "sample": "draw images from a trained generator",
    "interpolate": "walk between images of a generator: a strip or an animation",
    "invert": "find the latents whose images are nearest to pictures",
    "inpaint": "repair pictures: fill what a mask hides",
    "synthesize": "write a labelled data set of a generator's images; measure if it helps",
    "evaluate": "measure a generator: FID, KID, precision, recall, ...",
    "judge": "write a page on which people judge pictures blind; add up their votes",
    "compare": "put generators side by side in one picture",
    "report": "write one HTML page about runs: curves, samples, metrics, events",
    "data": "show what distgan sees of a data set, and prepare it",
    "export": "write a generator's folder with a model card, or as ONNX, to share",
    "import": "take in networks trained by PyTorch's textbook code for DCGAN",
}


@output.unfailing()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code. Imports torch only with the verb."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        print(f"distgan {__version__}")
        return 0
    verb, *rest = words
    if verb not in VERBS:
        print(f'distgan: error: there is no verb "{verb}": use one of {", ".join(VERBS)}.', file=sys.stderr)
        return 2
    try:
        # `python -m distgan.data` runs the package's __main__
        importlib.import_module("distgan.data.__main__" if verb == "data" else f"distgan.{verb}").main(rest)
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        _say(error)
        return 2
    except StoppedError as error:
        _say(error)
        return error.exit_code
    except Exception as error:
        if not is_reported(error):
            raise
        return 1
    return 0


def check_json(file: Path | None) -> None:
    """Refuses a place for `--json` that cannot be written, before the work for it is done.

    Raises:
        UserError: as `files.check_place`.
    """
    if file is not None:
        files.check_place("--json", file)


def write_json(file: Path, found: dict[str, Any]) -> None:
    """Writes what a verb found to the file of `--json`, and says where. The file is replaced in one step.

    A pipe or device is written to directly.

    Raises:
        UserError: it cannot be written.
    """
    text = json.dumps(found, indent=1) + "\n"
    with files.written("--json", file):
        same = [number for number in (1, 2) if file.exists() and os.path.samestat(file.stat(), os.fstat(number))]
        if same:  # /dev/stdout, for instance: after what was printed before
            sys.stdout.flush()
            with open(same[0], "w", closefd=False) as stream:
                stream.write(text)
        elif file.exists() and not file.is_file():
            file.write_text(text)
        else:
            files.replace(file, text.encode())
    print(f"written to  {file}")


def _usage() -> str:
    verbs = "\n".join(f"  {verb:13}{what}" for verb, what in VERBS.items())
    return (
        f"usage: distgan VERB [options]\n\n{verbs}\n\n"
        "`distgan VERB --help` says more. On several processes: accelerate launch --config_file launch/cpu2.yaml -m "
        "distgan.VERB ..."
    )


def _say(error: Exception) -> None:
    """Prints an error. A machine's other ranks wait 10 s before they print a user's mistake: by then the launcher has
    ended them, because the first has left.
    """
    if is_reported(error):
        return
    if os.environ.get("LOCAL_RANK", "0") != "0" and not isinstance(error, StoppedError):
        time.sleep(10)
    print(f"distgan: error: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
