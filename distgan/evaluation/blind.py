"""Makes the page on which people judge pictures without knowing where these come from: one file, `blind.html` filled.

Neither the order of the pictures nor their names or sizes in the file tell where they come from: all pictures have the
same number of bytes, stand in an order drawn by the system's random numbers, and are masked together with the truth,
which the page needs to show the result. This keeps the truth from who reads the page's source, not from who runs its
code. Nothing can hide what the pixels themselves show.
"""

import base64
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from distgan.evaluation.votes import WORDS, Kind
from distgan.pictures import on_white

_random = secrets.SystemRandom()  # not from seeding.py: nobody may be able to draw this order again


@dataclass(frozen=True)
class Questions:
    """The questions of a page, in the page's own order. Each person is asked in yet another one."""

    kind: Kind
    pictures: Tensor
    """uint8 (N, places, C, H, W): one place, or two on a page with pairs."""
    truth: list[str]
    """One of the page's WORDS for each question."""
    captions: list[str]
    """What stands above each question; empty for nothing."""

    def shuffled(self) -> "Questions":
        order = _random.sample(range(len(self.truth)), len(self.truth))
        truth, captions = ([of[i] for i in order] for of in (self.truth, self.captions))
        return Questions(self.kind, self.pictures[torch.tensor(order)], truth, captions)


def among_real(generated: Tensor, real: Tensor) -> Questions:
    """Asks of single pictures, uint8 (N, C, H, W) of each kind, whether they are generated or real."""
    truth = ["generated"] * len(generated) + ["real"] * len(real)
    return Questions("single", torch.cat([generated, real])[:, None], truth, [""] * len(truth)).shuffled()


def some_of(images: Tensor, num: int) -> Tensor:
    """Returns `num` of these images, in an order that nobody can draw again."""
    return images[torch.tensor(_random.sample(range(len(images)), num))]


def pairs(one: Tensor, other: Tensor, captions: Sequence[str]) -> Questions:
    """Asks which picture of each pair is better. Pictures are uint8 (N, C, H, W).

    The first generator's stand in the first place in half of the pairs.
    """
    truth = ["first", "second"] * (len(one) // 2 + 1)
    truth = _random.sample(truth[: len(one)], len(one))
    both = [(a, b) if place == "first" else (b, a) for a, b, place in zip(one, other, truth, strict=True)]
    pictures = torch.stack([torch.stack(pair) for pair in both])
    return Questions("pairs", pictures, truth, list(captions)).shuffled()


def page(questions: Questions, *, page_id: str, names: Sequence[str]) -> str:
    """Returns the page as HTML. `names` are the generators', as its result calls them."""
    pictures = on_white(questions.pictures.flatten(0, 1))
    words = WORDS[questions.kind]
    hidden = bytes(words.index(truth) for truth in questions.truth) + pictures.contiguous().numpy().tobytes()
    mask = secrets.randbits(32)
    described = {
        "page": page_id,
        "kind": questions.kind,
        "words": words,
        "names": list(names),
        "count": len(questions.truth),
        "places": questions.pictures.shape[1],
        "shape": list(pictures.shape[1:]),
        "captions": questions.captions if any(questions.captions) else [],
        "mask": mask,
        "hidden": base64.b64encode(_masked(hidden, mask)).decode(),
    }
    template = resources.files("distgan.evaluation").joinpath("blind.html").read_text(encoding="utf-8")
    return template.replace("{{page}}", json.dumps(described).replace("<", "\\u003c"))  # no tag in a class's name


def _masked(content: bytes, mask: int) -> bytes:
    """Masks bytes with those of the generator mulberry32, as the page's own code takes the mask off again."""
    state = np.uint32(mask) + np.arange(1, len(content) // 4 + 2, dtype=np.uint32) * np.uint32(0x6D2B79F5)
    word = (state ^ (state >> 15)) * (state | 1)
    word ^= word + (word ^ (word >> 7)) * (word | 61)
    word ^= word >> 14
    return (np.frombuffer(content, np.uint8) ^ word.astype("<u4").view(np.uint8)[: len(content)]).tobytes()
