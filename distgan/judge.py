"""Lets people judge pictures without knowing where they come from: writes a page for them, and adds up their votes."""

import argparse
import json
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distgan import __version__, files, paths
from distgan.cli import check_json, write_json
from distgan.errors import UserError
from distgan.evaluation import blind, data_of, find_real, votes
from distgan.evaluation.blind import Questions
from distgan.evaluation.votes import Judged, Key
from distgan.models import CHUNK, Generator
from distgan.parallel import launch
from distgan.storage import exported, report
from distgan.storage.exported import Exported
from distgan.storage.report import Report

_HYPE = (
    "HYPE with infinite time (Zhou et al. 2019): single pictures, half of them real, without a time limit; without its "
    "tutorial and qualification, and all people judge the same pictures"
)
_PREFERRED = "two-alternative forced choice: which of two pictures looks more real, without a time limit"


def main(argv: Sequence[str] | None = None) -> None:
    """`distgan judge RUN [RUN_B] [--out judge.html] ...` or `distgan judge --votes FILE ... [--key PATH] [--json ...]`.

    Raises:
        UserError: there is no generator, there are no real pictures, or they do not fit; a vote cannot be counted; or a
            file cannot be written.
    """
    arguments = _parse(argv)
    if arguments.votes:
        check_json(arguments.json)
        _add_up(arguments)
        return
    _refuse_what_only_votes_have(arguments)
    if launch.launched_ranks()[0] == 0:  # so little work is not shared
        _make(arguments)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="distgan judge",
        description="Write a page on which people judge pictures without knowing where they come from: one generator's "
        "among real ones, or pairs of two generators. Then add up the votes that the page saves.",
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="one or two: folder of a run or of an exported generator, or hub id"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("judge.html"),
        help="page to write, and beside it the truth, NAME.key.json, which you keep (default: judge.html)",
    )
    parser.add_argument(
        "--num", type=int, default=50, help="generated pictures, and as many real ones; or pairs (default: 50)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated pictures (default: 0)")
    parser.add_argument(
        "--reference",
        metavar="WHAT",
        help="the real pictures: train, test, or a folder or zip archive of pictures of the same size (default: test "
        "if there is such a split, else train)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a page and its key")
    parser.add_argument("--votes", nargs="+", metavar="FILE", help="instead: add up votes that the page has saved")
    parser.add_argument(
        "--key", type=Path, metavar="PATH", help="with --votes: the page's key (default: judge.key.json)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="with --votes: also write the result to a file")
    return paths.expand(parser.parse_args(argv), "runs", "out", "reference", "votes", "key", "json")


def _refuse_what_only_votes_have(arguments: argparse.Namespace) -> None:
    for name in ("key", "json"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} has no meaning without --votes: leave it out.")


# Making a page --------------------------------------------------------------------------------------------------------


def _make(arguments: argparse.Namespace) -> None:
    """Writes the page and its key."""
    out, runs, num = arguments.out, arguments.runs, arguments.num
    if len(runs) not in (1, 2):
        raise UserError(f"there are {len(runs)} generators, but a page is about one or two: give RUN, or RUN_A RUN_B.")
    if num < 1:
        raise UserError(f"--num is {num}, but must be at least 1.")
    if out.suffix.lower() != ".html":
        raise UserError(f"--out is {out}, but must end in .html.")
    key_file = out.with_suffix(".key.json")
    for file in (out, key_file):
        files.check_place("--out", file, overwrite=arguments.overwrite)
    found = [exported.find(run) for run in runs]
    questions, protocol = _among_real(found[0], arguments) if len(found) == 1 else _pairs(found, arguments)
    judged = [Judged(run, one.step, str(one.folder.resolve())) for run, one in zip(runs, found, strict=True)]
    always = {"seed": arguments.seed, "weights": "averaged", "version": f"distgan {__version__}"}
    key = Key(secrets.token_hex(8), questions.kind, questions.truth, judged, {**protocol, **always})
    content = blind.page(questions, page_id=key.page, names=runs)
    with files.written("--out", out):
        key.write(key_file)
        files.replace(out, content.encode())
    print(f"{out}\nkeep {key_file}: it says which picture is which, and `distgan judge --votes` needs it")


def _among_real(found: Exported, arguments: argparse.Namespace) -> tuple[Questions, dict[str, Any]]:
    """Returns questions about a generator's pictures among real ones, and the protocol."""
    num = arguments.num
    real, what, fingerprint = _real(found, arguments.reference)
    if len(real) < num:
        raise UserError(f"--num is {num}, but there are {len(real)} real pictures ({what}): choose fewer.")
    if real.shape[1:] != found.spec.shape:
        said = "x".join(map(str, (*real.shape[2:], real.shape[1])))
        raise UserError(f"the real pictures are {said}, but the generator draws {found.spec}: give others.")
    questions = blind.among_real(_drawn(found.generator, num, arguments.seed), blind.some_of(real, num))
    reference = {"reference": what, "reference_num": len(real), "reference_fingerprint": fingerprint}
    return questions, {"method": _HYPE, "pictures": f"{num} generated, {num} real", **reference}


def _real(found: Exported, reference: str | None) -> tuple[Tensor, str, str]:
    """Returns the real pictures, uint8 (N, C, H, W), where they are from, and their fingerprint."""
    if reference is not None:
        real = find_real(reference, data_of(found, reference), found.spec)
    else:
        images = data_of(found, "train")
        try:
            real = find_real("test", images, found.spec)
        except UserError:  # there is no such split
            real = find_real("train", images, found.spec)
    return real.images.pixels, real.what, real.images.fingerprint


def _pairs(found: Sequence[Exported], arguments: argparse.Namespace) -> tuple[Questions, dict[str, Any]]:
    """Returns questions about pairs of two generators' pictures, and the protocol.

    Both pictures of a pair are of one class if the generators have the same classes.
    """
    if arguments.reference is not None:
        raise UserError("--reference has no meaning with two generators: leave it or one of them out.")
    one, other = found
    if one.spec.shape != other.spec.shape:
        raise UserError(
            f"{arguments.runs[0]} draws {one.spec}, but {arguments.runs[1]} draws {other.spec}: a pair must not differ "
            "in that, because people would see which is which."
        )
    num, seed = arguments.num, arguments.seed
    names = one.generator.class_names if one.generator.class_counts else ()
    of_one_class = bool(names) and names == other.generator.class_names and bool(other.generator.class_counts)
    labels = _inputs(one.generator, num, seed)[1] if of_one_class else None
    drawn, others = (_drawn(generator.generator, num, seed, labels) for generator in found)
    captions = [names[label] for label in labels.tolist()] if labels is not None else [""] * num
    questions = blind.pairs(drawn, others, captions)
    classes = "pairs of one class, named above them" if of_one_class else "not matched"
    return questions, {"method": _PREFERRED, "pictures": f"{num} pairs", "classes": classes}


def _drawn(generator: Generator, num: int, seed: int, labels: Tensor | None = None) -> Tensor:
    """Draws the pictures of `distgan sample --seed`, with other labels if they are given: uint8 (num, C, H, W)."""
    generator.to("cpu" if launch.use_cpu() else "cuda")
    if labels is None:
        return generator.sample(num, seed=seed)
    return generator.decode(_inputs(generator, num, seed)[0], labels)


def _inputs(generator: Generator, num: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Returns the latents of these pictures, (num, latent_dim), and their labels, (num,), or None."""
    drawn = [generator.inputs(first, seed=seed) for first in range(0, num, CHUNK)]
    y = [labels for _, labels in drawn if labels is not None]
    return torch.cat([z for z, _ in drawn])[:num], torch.cat(y)[:num] if y else None


# Adding up votes ------------------------------------------------------------------------------------------------------


def _add_up(arguments: argparse.Namespace) -> None:
    """Prints the result of the votes, and writes it beside the generators' other numbers."""
    if arguments.runs:
        raise UserError("--votes needs no RUN: the key says which generators the page is about.")
    key = Key.read(arguments.key or Path("judge.key.json"))
    found = votes.reports(key, votes.read([*map(Path, arguments.votes)], key))
    for one, judged in zip(found, key.generators, strict=True):
        _show(one)
        _keep(one, Path(judged.folder))
    print(f"protocol    {json.dumps(found[0].protocol)}")
    if arguments.json is not None:
        write_json(arguments.json, {"judged": [one.to_json() for one in found]})


def _show(found: Report) -> None:
    print(f"{found.generator}, step {found.step}, judged by {found.protocol['people']}")
    for line in found.shares():
        print(f"  {line}")


def _keep(found: Report, folder: Path) -> None:
    """Writes a result beside the generator that was judged, if this is still there."""
    if exported.step_of(folder) != found.step:
        print(f"  not written to {folder}: the generator that was judged is not there any more")
        return
    with files.written("the generator's folder", folder):
        report.add_judged(folder, found)
    print(f"  written to {folder / report.JUDGED}")


if __name__ == "__main__":
    from distgan.cli import main as distgan

    sys.exit(distgan(["judge", *sys.argv[1:]]))
