"""`distgan VERB`: finds the verb, and turns errors into sentences and exit codes.

Exit codes: 0 done, or stopped and saved; 1 an error of ours or of the machine, with its traceback; 2 a mistake of the
user's, one sentence; 3 the training diverged, one sentence; 130 interrupted before anything could be saved.
"""

import importlib
import os
import sys
import time
from collections.abc import Sequence

from distgan import __version__

VERBS = {
    "train": "train a GAN, or resume a run",
    "sample": "draw images from a trained generator",
    "data": "show what distgan sees of a data set, and prepare it",
    "export": "write a generator's folder with a model card, to share",
}


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
        print(f'distgan: error: "{verb}" is not a verb: {", ".join(VERBS)}.', file=sys.stderr)
        return 2
    try:
        # `python -m distgan.data` runs the package's __main__
        importlib.import_module("distgan.data.__main__" if verb == "data" else f"distgan.{verb}").main(rest)
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        if not _ours(error):
            raise
        _say(error)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "NotFiniteError":
            raise
        _say(error)
        return 3
    return 0


def _usage() -> str:
    verbs = "\n".join(f"  {verb:10}{what}" for verb, what in VERBS.items())
    return (
        f"usage: distgan VERB [options]\n\n{verbs}\n\n"
        "`distgan VERB --help` says more. On several processes: accelerate launch --config_file launch/cpu2.yaml -m "
        "distgan.VERB ..."
    )


def _ours(error: ValueError) -> bool:
    """Whether distgan itself raised it, for the user; one out of a library's depths is a fault and keeps its trace."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("distgan")


def _say(error: Exception) -> None:
    """Says it once per machine: the launcher ends all ranks when one leaves, so the others let the first speak."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"distgan: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)


if __name__ == "__main__":
    sys.exit(main())
