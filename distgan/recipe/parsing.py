"""Reads a recipe from YAML and the command line, and turns mistakes into one sentence each.

The command line (`--group.key=value`) takes precedence over the recipe (`--config recipe.yaml`), and that over the
defaults in groups.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from distgan import paths, shipped
from distgan.errors import UserError
from distgan.recipe.groups import Config, RunConfig
from distgan.recipe.identity import as_dict, flat

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(
    argv: Sequence[str] | None = None,
    *,
    prog: str = "distgan train",
    description: str = "Train a GAN, or resume the run in run.dir.",
) -> tuple[Config, bool]:
    """Reads a recipe and its overrides; returns the configuration and whether `--check` was given.

    Raises:
        UserError: one sentence naming the dotted key, the value and what is allowed.
    """
    added = "--KEY+=NAME adds a name to penalty.name, augment.policy, eval.metrics or track.to."
    parser = _Parser(prog=prog, description=f"{description} {added}", allow_abbrev=False)
    # jsonargparse lets the later of two settings win; the recipe goes first, so that the command line always does.
    recipe = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    recipe.add_argument("--config")
    found, overrides = recipe.parse_known_args(argv)
    named = shipped.find(paths.expanded("--config", found.config)) if found.config is not None else None
    argv = [*([f"--config={named}"] if named is not None else []), *overrides]
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="A recipe: a YAML file with the keys below, or a name that `distgan recipes` lists.",
    )
    parser.add_argument("--check", action="store_true", help="Print what would run, and stop.")
    parser.add_class_arguments(Config)
    for group in dataclasses.fields(Config):
        parser._option_string_actions[f"--{group.name}"].help = "A YAML file with the keys of this group alone."
    try:
        namespace = parser.instantiate(parser.parse_args(argv))
    except UnicodeDecodeError as error:
        raise UserError(f"the recipe {found.config or ''} is not a text file in UTF-8: give a YAML file.") from error
    config = Config(**{f.name: namespace[f.name] for f in dataclasses.fields(Config)})
    for key, value in flat(as_dict(config)).items():
        if (given := str(value).encode(errors="replace").decode()) != str(value):  # the run could not be read again
            raise UserError(f"{key} is {given}, which cannot be written in UTF-8: rename it, or set PYTHONUTF8=1.")
    return config, namespace["check"]


def load(path: Path) -> Config:
    """Reads a configuration that `dump` wrote.

    Raises:
        UserError: the file does not exist, or this version cannot read it.
    """
    return parse(["--config", str(path)])[0]


def dump(config: Config) -> str:
    """Returns the resolved configuration as YAML."""
    return yaml.safe_dump(as_dict(config), sort_keys=False)


def _known_keys() -> list[str]:
    return list(flat(as_dict(Config(run=RunConfig(dir=".")))))


class _Parser(ArgumentParser):  # type: ignore[misc]
    """jsonargparse's parser, with errors turned into a UserError of one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_sentence(message)) from ex

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Reads a recipe as UTF-8, whatever the locale."""
        if str(path) == "-":
            return super().parse_path(path, *args, **kwargs)
        return self.parse_string(Path(path).read_text(encoding="utf-8"), Path(path).name, *args, **kwargs)


def _sentence(message: str) -> str:
    """Turns jsonargparse's message into one sentence (tested by tests/programs/test_cli.py)."""
    if match := re.match(r"unrecognized arguments: (.+)", message):
        word = match[1].split()[0]
        if not word.startswith("--"):
            return f'"{word}" is not an option: write --group.key=value.'
        return _unknown_key(word.lstrip("-").split("=")[0])
    if match := re.search(r"Group '(.+?)' does not accept option '(.+?)'|Option '(.+?)' is not accepted", message):
        return _unknown_key(match[3] or f"{match[1]}.{match[2]}")
    if match := re.match(r"Parser key \"(\w+)\":\s+Unable to load config '(.+?)'", message):
        group, word = match.groups()
        first = next(key for key in _known_keys() if key.startswith(f"{group}."))
        return f'{group} is a group of keys: did you mean "{first}={word}"? (--{group} takes a YAML file of its keys.)'
    if match := re.match(r"the following arguments are required: (\S+)", message):
        return f"{match[1]} is not set: give it in the recipe or as --{match[1]}=…"
    if match := re.match(r'Parser key "config": (?:File does not exist|Path is not a file): (.+)', message):
        name = Path(match[1]).stem
        instead = f"check the path, or give distgan's own as --config {name}." if name in shipped.recipes() else ""
        return f"the recipe {match[1]} does not exist or is not a file: {instead or 'check the path.'}"
    if match := re.match(r"(Unexpected config|Problems parsing config)", message):
        return "the recipe is not YAML with groups of keys, such as `train: {steps: 1000}`."
    if match := re.match(
        r'Parser key "([\w.]+)":\s+Does not validate.*?Subtypes: \[(.+)\]\s+Errors:.*Given value: (.*)', message, re.S
    ):
        return f"{match[1]} is {match[3].strip()}, but must be {_allowed(match[2])}."
    if match := re.match(r'Parser key "([\w.]+)":\s+Expected (?:a )?(.+?)\. Got value: (.*)', message, re.S):
        return f"{match[1]} is {match[3].strip()}, but must be {_allowed(match[2])}."
    return " ".join(message.split())


def _unknown_key(key: str) -> str:
    known = _known_keys()
    group, _, name = key.rpartition(".")
    own = [other for other in known if other.startswith(f"{group}.")]
    close = [other for other in known if other.endswith(f".{name}")]  # the group is missing, or is another one
    close = [other for other in close if not other.startswith("ramp.")] or close  # named after keys of other groups
    if own and len(close) > 1:
        close = []
    if not close and own:
        names = [other.split(".")[1] for other in own]
        close = [f"{group}.{other}" for other in difflib.get_close_matches(name, names, n=1, cutoff=0.6)]
    elif not close:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    groups = ", ".join(dict.fromkeys(other.split(".")[0] for other in known))
    if close:
        return f'unknown key "{key}": did you mean "{close[0]}"?'
    if own:
        return f'unknown key "{key}": known are {", ".join(own)}.'
    return f'unknown key "{key}": the groups are {groups}; `distgan train --help` lists their keys.'


def _allowed(types: str) -> str:
    """Describes types in plain words: `<class 'int'>, <class 'NoneType'>` is `a whole number or null`."""
    said = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "NoneType": "null"}
    said |= {"tuple": "numbers in brackets, such as [0.5,0.999]"}
    words = [f"one of {match}".replace("'", "") for match in re.findall(r"Literal\[(.+?)\]", types)]
    words += [said[name] for name in re.findall(r"<class '(.+?)'>", types)]
    words += ["two whole numbers in brackets, such as [64,128]"] * ("tuple[int, int]" in types)
    return " or ".join(words) or f"a {types}"
