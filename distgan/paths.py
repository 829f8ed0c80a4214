"""Paths as users write them, with `~` and `$NAME`, and as a shell takes them."""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from distgan.errors import UserError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)


def expanded(key: str, path: str | os.PathLike[str]) -> str:
    """Returns a path with `$NAME`, `${NAME}` and a leading `~` or `~user` replaced, where the shell did not do it.

    If a file or folder of that literal name exists, `$` in it is not replaced, except in the first part of a relative
    path.
    Expanding the result again changes nothing.

    Raises:
        UserError: the path is empty; a variable is unset or empty, or its value has a variable itself; there is no such
            user; or no file can have this name.
    """
    text = os.fspath(path)
    if not text:  # such as a shell variable that is not set
        raise UserError(f"{key} is empty: give a path (the current folder is ./).")
    try:
        if b"\0" in os.fsencode(text):
            raise UserError(f"{key} has a null character in it, which no file's name can have: remove that character.")
    except UnicodeEncodeError:
        raise UserError(
            f"{key} is {text}, which this locale's encoding cannot write: set PYTHONUTF8=1, or rename it."
        ) from None
    there = _replaced(key, text)
    try:
        stands = _replaced(key, there) == there
    except ValueError:
        stands = False
    if not stands:
        raise UserError(
            f"{key} is {text}, which stands for {there}, and that has a variable again: write the path out."
        )
    return there


def _replaced(key: str, text: str) -> str:
    """Replaces `~` and variables; a variable's `$` may be left in the result."""
    parts: list[str] = []
    for part in text.split("/"):
        as_written = "/".join([*parts, part])
        parts.append(
            part
            if parts and os.path.lexists(as_written)
            else _VARIABLE.sub(lambda found: _value(key, text, found), part)
        )
    path = "/".join(parts)
    there = os.path.expanduser(path)  # noqa: PTH111  Path's own drops a leading ./
    if there.startswith("~"):
        user = there.split("/")[0][1:]
        raise UserError(f"{key} is {text}, but this machine has no user {user}: write ./{text} for a folder here.")
    return there


def _value(key: str, text: str, found: re.Match[str]) -> str:
    name = found[1] or found[2]
    if name[0].isdigit():
        return found[0]
    if value := os.environ.get(name):
        return value
    state = "empty" if name in os.environ else "not set"
    raise UserError(f"{key} is {text}, but the environment variable {name} is {state}: set it, or write the path out.")


def exists(path: str | Path) -> bool:
    """Tells whether a file or folder exists; False if that cannot be found out, where pathlib raises an error."""
    return os.path.exists(path)  # noqa: PTH110


def is_folder(path: str | Path) -> bool:
    """Tells whether a folder exists; False if that cannot be found out."""
    return os.path.isdir(path)  # noqa: PTH112


def expand(arguments: argparse.Namespace, *names: str) -> argparse.Namespace:
    """Expands the paths among a verb's arguments, in place.

    Args:
        arguments: the verb's arguments.
        names: names of the arguments that are paths. Messages call "run" RUN and "out" --out.

    Raises:
        UserError: as `expanded`.
    """
    for name in names:
        value: Any = getattr(arguments, name)
        key = name.upper() if name in ("run", "runs", "what", "pictures") else f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            setattr(arguments, name, [expanded(key, one) for one in value])
        elif value is not None:
            setattr(arguments, name, type(value)(expanded(key, value)))
    return arguments


def quoted(path: str | Path) -> str:
    """Returns a path as one word for a shell: pasted into a command, it means this path and is taken for no option."""
    text = os.fspath(path)
    if text.startswith(("-", "~")) or "$" in text.split("/")[0]:
        text = f"./{text}"
    if all(map(_shown, text)):
        return shlex.quote(text)
    # $'…' of bash and zsh, which keeps a line break inside one line.
    escaped = "".join(_escaped(character) for character in text)
    return f"$'{escaped}'"


def _escaped(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if _shown(character):
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def _shown(character: str) -> bool:
    """Tells whether standard output shows a character as itself."""
    try:
        character.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return character.isprintable()
