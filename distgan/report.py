"""Writes one HTML page about runs, to look at without an account or a network: run_page/ makes it. Imports no torch."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distgan import files, paths
from distgan.errors import UserError
from distgan.run_page import Page
from distgan.storage.places import Places

_SECONDS = 30.0  # of --watch


def main(argv: Sequence[str] | None = None) -> None:
    """`distgan report RUN [RUN ...] [--out PATH] [--watch [SECONDS]]`.

    Raises:
        UserError: one of them is no run's folder, or the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="distgan report",
        description="Write one HTML page about runs: curves, samples, metrics, what happened, recipes. It loads "
        "nothing, so it can be copied and sent.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="HTML file to write (default: RUN/report.html; of several, report.html)",
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=_SECONDS,
        metavar="SECONDS",
        help=f"write it again every SECONDS (default: {_SECONDS:g}) until all runs are done, or until Ctrl-C",
    )
    arguments = paths.expand(parser.parse_args(argv), "runs", "out")
    runs = [_run(path) for path in arguments.runs]
    out = arguments.out or (runs[0].report if len(runs) == 1 else Path("report.html"))
    files.check_place("--out", out)
    if arguments.watch is not None and not arguments.watch > 0:
        raise UserError(f"--watch is {arguments.watch:g}, but must be more than 0 seconds.")
    page = Page([run.path for run in runs], out)
    with files.written("--out", out):
        page.write()
    print(out)
    if arguments.watch is not None:
        _watch(page, arguments.watch)


def _run(path: str) -> Places:
    run = Places(path)
    if not run.path.is_dir():
        raise UserError(f"{path} is not a folder: give the folder that run.dir named.")
    if not (run.config.exists() or run.metrics.exists()):
        raise UserError(f"{path} is not a run, because it has no config.yaml: give the folder that run.dir named.")
    return run


def _watch(page: Page, seconds: float) -> None:
    """Writes the page again and again until all runs are complete or the user presses Ctrl-C."""
    try:
        while not page.complete:
            time.sleep(seconds)
            try:
                page.write()
            except OSError as error:  # a full disk, which may have room again
                said = f"the page could not be written ({error.strerror or error}), and is tried again"
                print(f"distgan: warning: {said}.", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["report", *sys.argv[1:]]))
