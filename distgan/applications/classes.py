"""Classes as users name them, and as names of files."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from distgan.errors import UserError, nearest
from distgan.models import Generator


def labels_in(key: str, text: str, generator: Generator) -> tuple[int, ...]:
    """Returns the labels of classes in a text with commas. Names may contain commas: the longest that fits is taken.

    Args:
        key: the option that has the text.
        text: names or numbers of classes, separated by commas.
        generator: the generator that has the classes.

    Raises:
        UserError: a word is neither the name nor the number of a class.
    """
    words = text.split(",")
    labels = []
    longest = 1 + max((name.count(",") for name in generator.class_names), default=0)
    while words:
        given = {end: ",".join(words[:end]) for end in range(min(longest, len(words)), 0, -1)}
        fitting = ((end, word) for end, full in given.items() for word in (full, full.strip()))
        found = next(((end, word) for end, word in fitting if generator.named(word) is not None), None)
        end, word = found or (1, given[1].strip())
        words = words[end:]
        number = word.isdecimal() and len(word) < 10 and found is None
        if not number and generator.class_counts and found is None:
            raise UserError(
                f'{key} has "{word}", which is neither the name nor the number of a class: '
                f"{nearest(word, generator.class_names or list(map(str, range(len(generator.class_counts)))))} "
                "Separate names or numbers of classes with commas, as in 0,3,7."
            )
        labels.append(generator.label_of(int(word) if number else word))
    return tuple(labels)


def in_file_names(classes: Sequence[str]) -> list[str]:
    """Returns the names of classes, shortened for file names; labels in place of names that would be equal or empty."""
    names = [
        re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", name)).encode()[:100].decode(errors="ignore")
        for name in classes
    ]
    often = Counter(names)
    return [name if name.strip("_") and often[name] == 1 else str(label) for label, name in enumerate(names)]
