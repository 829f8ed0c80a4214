"""Decides by names which files are pictures, of which split and class, and which files are left out.

Everything here depends only on names and on the content of dataset.json, so that folders and archives are understood
alike.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image

from distgan.errors import UserError
from distgan.paths import quoted

# Formats that Pillow lists but that are no pictures, or that need another program, as EPS does.
_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Names of files that systems and programs leave behind, in lower case. Names that begin with a dot are hidden, too.
_BY_TOOLS = {"__macosx", "__pycache__", "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin"}
_BY_TOOLS |= {"system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini"}
_RUN = {"config.yaml", "metrics.jsonl"}  # a folder with both is a run's, and its pictures are sample grids
_LABELS = "dataset.json"  # StyleGAN's
_MOST_CLASSES = 100_000
# The usual names of splits, by kind; "train_set", "test-images" and "val2017" are such names, too.
_SPLIT = re.compile(
    r"(?:(?P<train>train|training)|(?P<validation>val|valid|validation|dev|development)"
    r"|(?P<test>test|testing|eval|evaluation|holdout))(?:[-_ ]?(?:set|split|data|images|imgs|\d{4}))?",
    re.IGNORECASE,
)
_KINDS = ("train", "validation", "test")
# Files of data sets that are no pictures, and the data.source that reads them.
_SOURCES = {
    r"(data_batch_\d|test_batch)(\.bin)?|cifar-10-(binary|python)\.(tar\.gz|tgz)": "cifar10",
    r".+-ubyte(\.gz)?": "fashion_mnist",
    r".+\.parquet": "hub",
}


@dataclass(frozen=True, kw_only=True)
class Arranged:
    """The pictures of one split among names, sorted, with their labels."""

    names: tuple[str, ...]
    labels: tuple[int | None, ...]
    """The label of each picture; None if it has no label."""
    classes: tuple[str, ...] | None
    """Names of the classes, the same in each split."""
    split: str | None
    """Folder name of the chosen split; None if there are no splits."""
    splits: tuple[str, ...]
    """All splits, those for training first."""
    unseen: str | None
    """The split to take images from that nobody trains on; None if there is no other."""
    strays: str
    """A clause that says which pictures have no label, or why none has one. Empty if all have labels, or if there are
    neither class folders nor labels in a file."""
    left_out: tuple[str, ...]
    """A phrase for each kind of file that is left out, with the number of files."""
    salt: tuple[Any, ...]
    """Everything that the content depends on, except the pictures and their classes."""


def arrange(
    names: Iterable[str], *, split: str, where: str, read: Callable[[str], bytes], archive: bool = False
) -> Arranged:
    """Arranges the files of a folder or archive into pictures with labels.

    Sub-folders are classes, unless they are splits. They are splits if all those with pictures have usual names of
    splits, or if at least one for training and one of another kind have; then the sub-folders of a split are classes.
    Labels of StyleGAN's dataset.json replace class folders.

    Args:
        names: names of the files, relative to the folder or archive, with slashes.
        split: the split to take, by its folder's name or by a usual name of the same kind.
        where: the name of the folder or archive in messages.
        read: returns the content of a file; for dataset.json.
        archive: whether to look inside a single outer folder even if it holds no splits.

    Raises:
        UserError: there are no pictures, there is no such split, dataset.json is damaged or has impossible labels, or
            the name of a class is not UTF-8.
    """
    kept, left_out = _without_leftovers(sorted(names, key=_parts))
    pictures = [name for name in kept if _ending(name) in endings()]
    there = set(kept)

    @cache
    def table(folder: str) -> dict[str, int] | None:
        return _read_labels(read(folder + _LABELS), where) if folder + _LABELS in there else None

    base = _inside(pictures, "", lambda folder, top: table(folder) is None and _kind(top) is None)
    if not archive and not _splits(pictures, base)[0]:
        base = ""  # a folder's only sub-folder is its only class
    splits, beside = _splits(pictures, base) if table(base) is None else ({}, [])
    chosen = _choose(split, splits, where) if pictures else None
    folders = {
        name: _inside(of, f"{base}{name}/", lambda _, top: _kind(top) is not None) for name, of in splits.items()
    }
    under, mine = (folders[chosen], splits[chosen]) if chosen is not None else (base, pictures)

    tables = {folder + _LABELS for folder in (under, *folders.values()) if table(folder) is not None}
    no_pictures = [name for name in kept if _ending(name) not in endings() and name not in tables]
    if no_pictures:
        left_out.append(f"{_count(no_pictures, 'file')} that Pillow does not read ({_by_ending(no_pictures)})")
    if beside:
        left_out.append(f"{counted(beside, 'picture')} beside the splits")
    if not mine:
        said = f" (left out: {', '.join(left_out)})" if left_out else ""
        advice = None if archive else of_another_source(kept, where)
        raise UserError(
            f"data.path is {where}, but there are no pictures in it{said}{advice or ': give a folder that has some'}."
        )

    labelled = {folder: table(folder) for folder in (under, *folders.values())}
    # If one split has a dataset.json, the others have no labels: numbers of class folders would not agree with it.
    if any(one is not None for one in labelled.values()):
        labelled = {folder: one or {} for folder, one in labelled.items()}
    classes = _classes(labelled.values(), [(folders[name], splits[name]) for name in splits] or [(under, mine)])
    labels = _labels(mine, under, labelled[under], classes)
    unseen = max(
        (name for name in splits if name != chosen),
        # A split in which all pictures have labels is best: networks with labels can use it.
        key=lambda name: (
            None not in _labels(splits[name], folders[name], labelled[folders[name]], classes),
            _KINDS.index(_kind(name) or "train"),
        ),
        default=None,
    )
    return Arranged(
        names=tuple(mine),
        labels=labels,
        classes=classes if any(label is not None for label in labels) else None,
        split=chosen,
        splits=tuple(splits),
        unseen=unseen,
        strays=_strays(mine, labels, under, table=labelled[under], lacking=next(iter(splits), "")),
        left_out=tuple(left_out),
        salt=(*mine, labels) if table(under) is not None else tuple(mine),
    )


@cache
def endings() -> frozenset[str]:
    """Returns the file endings that the installed Pillow reads, in lower case with the dot."""
    Image.init()
    kinds = {*Image.OPEN, "MPO"} - _NO_PICTURES  # MPO is opened as the JPEG that it begins with
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in kinds)


def left_behind(name: str) -> str | None:
    """Returns the part of a name that shows that a file is hidden or made by a tool; None if it is neither."""
    return next((part for part in _parts(name) if part.startswith(".") or part.lower() in _BY_TOOLS), None)


def meant(split: str, names: Iterable[str]) -> str | None:
    """Returns the split that is meant: by exact name, else in another letter case, else the only one of its kind."""
    there, kind = list(names), _kind(split)
    for found in (
        [name for name in there if name == split],
        [name for name in there if name.lower() == split.lower()],
        [name for name in there if kind is not None and _kind(name) == kind],
    ):
        if found:
            return found[0] if len(found) == 1 else None
    return None


def unseen_beside(split: str, names: Iterable[str]) -> str | None:
    """Returns another split, whose images a training on `split` does not see, preferably a test split; or None."""
    kinds = {name: kind for name in names if (kind := _kind(name)) not in (None, _kind(split))}
    return max(kinds, key=lambda name: _KINDS.index(kinds[name] or ""), default=None)


def of_another_source(names: Iterable[str], where: str) -> str | None:
    """Returns how to give files that another `data.source` reads, as the end of a sentence; None for other files."""
    source = next(
        (source for name in names for files, source in _SOURCES.items() if re.fullmatch(files, _last(name))), None
    )
    if source is None:
        return None
    given = "hub --data.id=OWNER/NAME" if source == "hub" else source
    shown = "OWNER/NAME" if source == "hub" else source
    return f": give it with --data.source={given}, or see it with `distgan data {shown} --path {quoted(where)}`"


def plain(name: str) -> str:
    """Returns a name with slashes instead of backslashes, which some programs on Windows write, and no empty parts."""
    return "/".join(part for part in _parts(name.replace("\\", "/")) if part not in ("", "."))


def counted(names: Sequence[str], what: str) -> str:
    """Returns the number of things and the first names: `2 broken links (a, b)`."""
    return f"{_count(names, what)} ({_first(names)})"


def _without_leftovers(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Removes names that are hidden, made by tools, or in a run's folder; returns the rest, and a phrase per kind."""
    runs = {folder for folder, count in Counter(_folder(n) for n in names if _last(n) in _RUN).items() if count == 2}
    kept: list[str] = []
    hidden: list[str] = []
    of_runs: list[str] = []
    for name in names:
        if (mark := left_behind(name)) is not None:
            hidden.append(mark)
        elif runs and any(folder in runs for folder in _folders(name)):
            of_runs.append(name)
        else:
            kept.append(name)
    said = []
    if hidden:
        marks = Counter(hidden).most_common(3)
        more = ", …" if len(set(hidden)) > len(marks) else ""
        said.append(f"{_count(hidden, 'file')} hidden or made by tools ({', '.join(mark for mark, _ in marks)}{more})")
    if of_runs:
        said.append(f"{_count(of_runs, 'file')} of a run ({', '.join(sorted(runs)[:3]) or 'the folder itself'})")
    return kept, said


def _inside(names: Sequence[str], folder: str, goes_on: Callable[[str, str], bool]) -> str:
    """Returns the innermost folder around all names: enters a single sub-folder as long as `goes_on(folder, it)`."""
    while len(tops := {_top(name, folder) for name in names}) == 1:
        (top,) = tops
        if top is None or not goes_on(folder, top):
            break
        folder += f"{top}/"
    return folder


def _splits(pictures: Sequence[str], base: str) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the pictures of each split, training first, and the pictures beside the splits; both empty without."""
    by_top: dict[str | None, list[str]] = {}
    for name in pictures:
        by_top.setdefault(_top(name, base), []).append(name)
    kinds = {top: _kind(top) for top in by_top if top is not None}
    present = {kind for kind in kinds.values() if kind is not None}
    if not present or (None in kinds.values() and not ("train" in present and len(present) > 1)):
        return {}, []
    splits = sorted((top for top, kind in kinds.items() if kind), key=lambda top: (_KINDS.index(kinds[top] or ""), top))
    return {top: by_top[top] for top in splits}, [n for top, of in by_top.items() if top not in splits for n in of]


def _choose(split: str, found: Mapping[str, Any], where: str) -> str | None:
    """Returns the split that is meant, as `meant` finds it; None if there are no splits and `train` is asked for.

    Raises:
        UserError: there is no such split, or there are several.
    """
    if not found:
        if split == "train":
            return None
        raise UserError(
            f"data.split is {split}, but {where} is not divided into splits (folders such as train and test): to train "
            "on all pictures, leave data.split out or set it to its default, train."
        )
    if (name := meant(split, found)) is not None:
        return name
    raise UserError(
        f"data.split is {split}, but the splits in {where} are {', '.join(found)}: choose one with --data.split=NAME."
    )


def _classes(
    tables: Iterable[Mapping[str, int] | None], splits: Iterable[tuple[str, Sequence[str]]]
) -> tuple[str, ...]:
    """Returns the names of the classes: from dataset.json, or else the sub-folders of the first split whose pictures
    are all in sub-folders. Empty if there are neither.

    So a label means the same in every split.

    Raises:
        UserError: the name of a class folder is not UTF-8, so that no recipe or model card can hold it.
    """
    given = [table for table in tables if table is not None]
    if given:
        return tuple(map(str, range(max((label for table in given for label in table.values()), default=-1) + 1)))
    for folder, names in splits:
        tops = {_top(name, folder) for name in names}
        if None not in tops:
            classes = tuple(sorted(top for top in tops if top is not None))
            for name in classes:
                if name.encode(errors="replace").decode() != name:
                    raise UserError(f"the folder of the class {name!r} has a name that is not UTF-8: rename it.")
            return classes
    return ()


def _labels(
    names: Sequence[str], under: str, table: Mapping[str, int] | None, classes: Sequence[str]
) -> tuple[int | None, ...]:
    if table is not None:
        return tuple(table.get(plain(name.removeprefix(under))) for name in names)
    # Accents may be encoded in different ways: macOS writes them otherwise than Linux.
    numbers = {_composed(name): label for label, name in enumerate(classes)}
    numbers |= {name: label for label, name in enumerate(classes)}
    tops = [_top(name, under) or "" for name in names]
    return tuple(numbers.get(top, numbers.get(_composed(top))) for top in tops)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _strays(
    names: Sequence[str],
    labels: Sequence[int | None],
    under: str,
    *,
    table: Mapping[str, int] | None,
    lacking: str,
) -> str:
    """Says which pictures have no label, or why none has one. Empty if all have labels, or if nothing gives labels."""
    unlabelled = [name for name, label in zip(names, labels, strict=True) if label is None]
    beside = [name for name in unlabelled if _top(name, under) is None]
    if table is not None:
        if not table or not unlabelled:
            return ""
        if len(unlabelled) == len(names):
            return f"no name in {_LABELS}, such as {next(iter(table))!r}, is that of a picture beside it"
        return f"{counted(unlabelled, 'picture')} {_verb(unlabelled, 'has', 'have')} no label in {_LABELS}"
    if beside:
        lie = f"{counted(beside, 'picture')} {_verb(beside, 'lies', 'lie')} beside the class folders"
        return lie if len(beside) < len(names) else ""
    are = f"{counted(unlabelled, 'picture')} {_verb(unlabelled, 'is', 'are')} of a class that {lacking} lacks"
    return are if unlabelled else ""


def _read_labels(content: bytes, where: str) -> dict[str, int] | None:
    """Reads the labels in StyleGAN's dataset.json, by name: {} if it has no classes, None if it is another file.

    Raises:
        UserError: it is damaged, a label is not a whole number from 0 to 99,999, or a picture has two labels.
    """
    try:
        said = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{_LABELS} in {where} is damaged: repair it, or remove it if folders are the classes."
        ) from error
    if not isinstance(said, dict) or "labels" not in said:
        return None
    pairs = said["labels"] or []
    if not isinstance(pairs, list) or not any(_is_pair(pair) for pair in pairs):
        return None if pairs else {}
    if wrong := [pair for pair in pairs if not _is_pair(pair)]:
        raise UserError(
            f"{_LABELS} in {where} has {wrong[0]!r} among its labels: each must be a pair [file name, label]."
        )
    if any(isinstance(label, list) for _, label in pairs):  # vectors, such as a camera's position: no classes
        return {}
    labels: dict[str, int] = {}
    for given, label in pairs:
        if label is None:
            continue
        number = re.fullmatch(r"([0-9]{1,9})(\.0*)?", str(label))  # 1, 1.0 and "1" are the same
        if number is None or int(number[1]) >= _MOST_CLASSES:
            raise UserError(
                f"{_LABELS} in {where} has the label {label!r}, but labels must be whole numbers from 0 to "
                f"{_MOST_CLASSES - 1:,}: correct it."
            )
        name = plain(given)
        if labels.setdefault(name, int(number[1])) != int(number[1]):
            raise UserError(
                f"{_LABELS} in {where} gives {name!r} two labels, {labels[name]} and {number[1]}: remove one of them."
            )
    return labels


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)


def _kind(name: str) -> str | None:
    """Returns `train`, `validation` or `test` for a usual name of a split."""
    match = _SPLIT.fullmatch(name)
    return match.lastgroup if match is not None else None


def _top(name: str, under: str) -> str | None:
    """Returns the sub-folder of `under` that a file is in; None if it is in `under` itself."""
    top, slash, _ = name.removeprefix(under).partition("/")
    return top if slash else None


def _parts(name: str) -> list[str]:
    return name.split("/")


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _folders(name: str) -> Iterator[str]:
    """Yields every folder that a file is in, from the innermost to the outermost, which is ""."""
    while name:
        name = _folder(name)
        yield name


def _ending(name: str) -> str:
    stem, _, ending = _last(name).rpartition(".")
    return f".{ending.lower()}" if stem and ending else ""


def _by_ending(names: Sequence[str]) -> str:
    counts = Counter(_ending(name) or "without an ending" for name in names)
    said = [f"{count:,} {ending}" for ending, count in counts.most_common(6)]
    rest = counts.total() - sum(count for _, count in counts.most_common(6))
    return ", ".join([*said, *([f"{rest:,} others"] if rest else [])])


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _verb(names: Sequence[str], of_one: str, of_several: str) -> str:
    return of_one if len(names) == 1 else of_several


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names):,} {what}{'' if len(names) == 1 else 's'}"
