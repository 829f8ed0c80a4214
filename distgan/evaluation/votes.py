"""Adds up what people answered on a page of `distgan judge`: shares, their intervals, and reports.

A question is answered by one of two words, and its truth is one of them, too. On a page with one generator's pictures
among real ones the words are "generated" and "real". On a page with pairs they are "first" and "second", and the truth
is the place of the first generator's picture, so that an answer that agrees with it is a vote for that generator.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from scipy.special import ndtri

from distgan import files
from distgan.errors import UserError
from distgan.storage.report import Report

FORMAT = 1
Kind = Literal["single", "pairs"]
WORDS: dict[str, tuple[str, str]] = {"single": ("generated", "real"), "pairs": ("first", "second")}
"""The two answers to the questions of a page, by the page's kind."""

INTERVAL = (
    "95%, Wilson (1927); with several people, for as many independent answers as give the variance that is clustered "
    "by people and by pictures (Cameron, Gelbach and Miller 2011)"
)


@dataclass(frozen=True)
class Judged:
    """A generator on a page."""

    generator: str
    """The run's folder, or another path or id, as it was given."""
    step: int
    folder: str
    """The absolute path of the exported generator."""


@dataclass(frozen=True)
class Key:
    """What a page's key file holds: the truth about its questions, in the page's own order."""

    page: str
    """The page's id."""
    kind: Kind
    truth: list[str]
    generators: list[Judged]
    """The generator, or both of a page with pairs."""
    protocol: dict[str, Any]

    def write(self, file: Path) -> None:
        files.replace(file, (json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode())

    @classmethod
    def read(cls, file: Path) -> Self:
        """Reads a key file.

        Raises:
            UserError: there is none, or it is something else.
        """
        try:
            content = json.loads(file.read_text())
            if content.pop("format") != FORMAT:
                raise UserError(f"{file} is of another version of distgan: update distgan to the one that wrote it.")
            content["generators"] = [Judged(**one) for one in content["generators"]]
            return cls(**content)
        except OSError as error:
            raise UserError(
                f"--key is {file}, which cannot be read ({error.strerror}): give the .key.json that `distgan judge` "
                "wrote beside the page."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # ValueError: no JSON, no UTF-8
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"--key is {file}, which is no key of a page: give the .key.json that `distgan judge` wrote beside it."
            ) from error


def read(votes: Sequence[Path], key: Key) -> np.ndarray:
    """Reads what people answered, and tells where they agree with the truth: bool (people, questions).

    Raises:
        UserError: a file cannot be read, is no finished vote, is about another page, or has been counted already.
    """
    agree, known = [], dict[str, Path]()
    for file in votes:
        try:
            content = json.loads(file.read_text())
            page, vote, answers = str(content["page"]), str(content["vote"]), list(content["answers"])
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}): give files that the page has saved.") from error
        except (ValueError, KeyError, TypeError) as error:  # ValueError: no JSON, no UTF-8
            raise UserError(f"{file} is no vote that a page of `distgan judge` has saved: leave it out.") from error
        if page != key.page:
            raise UserError(f"{file} is a vote on the page {page}, but the key is that of {key.page}: leave it out.")
        if vote in known:
            raise UserError(f"{file} is the same vote as {known[vote]}: give each once.")
        words = WORDS[key.kind]
        if len(answers) != len(key.truth) or not all(answer in words for answer in answers):
            raise UserError(
                f"{file} is damaged: it should have {len(key.truth)} answers, each {words[0]} or {words[1]}. Leave it "
                "out, or have it saved again."
            )
        known[vote] = file
        agree.append([answer == truth for answer, truth in zip(answers, key.truth, strict=True)])
    return np.array(agree)


class Share(NamedTuple):
    """A share with its 95% interval."""

    share: float
    low: float
    high: float

    def metrics(self, name: str) -> dict[str, float]:
        return {name: self.share, f"{name}_low": self.low, f"{name}_high": self.high}


def share(answers: np.ndarray) -> Share:
    """Returns the share of true values among answers, bool (people, pictures), with the interval that INTERVAL names.

    Answers of one person resemble each other, and so do answers to one picture. The more they do, the fewer independent
    answers they are worth; one person's answers count in full, because there they cannot be compared.
    """
    people, pictures = answers.shape
    p, n = float(answers.mean()), answers.size
    if people > 1 and 0 < p < 1:
        by_person = answers.mean(1).var(ddof=1) / people
        by_picture = answers.mean(0).var(ddof=1) / pictures if pictures > 1 else 0.0
        single = p * (1 - p) / n
        n /= max(1.0, max(by_person + by_picture - single, by_person, by_picture) / single)
    return _wilson(p, n)


def _wilson(p: float, n: float) -> Share:
    """Returns the score interval of Wilson (1927) for a share p of n independent answers."""
    z = float(ndtri(0.975))
    centre, width = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = ((centre + sign * width) / (1 + z**2 / n) for sign in (-1, 1))
    return Share(p, max(low, 0.0), min(high, 1.0))  # rounding may pass 0 or 1


def reports(key: Key, agree: np.ndarray) -> list[Report]:
    """Returns the result of a page, a report for each of its generators; `agree` is what `read` returns."""
    protocol = {**key.protocol, "page": key.page, "people": len(agree), "interval": INTERVAL}
    if key.kind == "single":
        (one,) = key.generators
        real = np.array([truth == "real" for truth in key.truth])
        metrics = share(~agree[:, ~real]).metrics("taken_for_real") | share(~agree).metrics("hype")
        floor = share(agree[:, real]).metrics("taken_for_real")
        return [Report(one.generator, one.step, metrics, floor, protocol)]
    both = []
    for one, other, won in zip(key.generators, reversed(key.generators), (agree, ~agree), strict=True):
        against = f"{other.generator}, step {other.step}"
        metrics = share(won).metrics("preferred")
        both.append(Report(one.generator, one.step, metrics, None, {**protocol, "against": against}))
    return both
