"""Imports point one way, and each concern has one owner."""

import ast
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "distgan"
LEAVES = [
    "config",
    "data",
    "seeding",
    "models",
    "losses",
    "penalties",
    "augment",
    "schedules",
    "ema",
    "pictures",
    "metrics",
    "errors",
]
LEAVES += ["progress", "results", "guard", "paths", "output"]
VERBS = ["train", "where", "doctor", "sample", "export", "evaluate", "compare"]  # and data/__main__.py
PLUMBING = ["distributed", "checkpoint", "run_folder", "tracking", "meeting", "watchdog", "cache", "trained"]
PLUMBING += ["extractor_weights", "evaluation", "standing", "rollback", "housekeeping"]


def imports(file: Path) -> set[str]:
    """Every module that a file imports anywhere, functions included, but for what runs it as a program."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import):
                found |= {alias.name for alias in inner.names}
            elif isinstance(inner, ast.ImportFrom):
                found |= {inner.module or ""} | {f"{inner.module}.{alias.name}" for alias in inner.names}
    return found


def files(name: str) -> list[Path]:
    return [PACKAGE / f"{name}.py"] if (PACKAGE / f"{name}.py").exists() else sorted((PACKAGE / name).glob("*.py"))


def test_every_module_has_its_place():
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__pycache__"}
    assert modules == {*LEAVES, *PLUMBING, *VERBS, "cli", "__init__", "__main__"}


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_import_neither_plumbing_nor_accelerate_nor_wandb(name):
    banned = {"accelerate", "wandb", *(f"distgan.{module}" for module in [*PLUMBING, *VERBS, "cli"])}
    for file in files(name):
        assert not {module for module in imports(file) if module.split(".")[0] in banned or module in banned}, file


@pytest.mark.parametrize("name", PLUMBING)
def test_plumbing_imports_no_verb(name):
    assert not imports(PACKAGE / f"{name}.py") & {"distgan.train", "distgan.sample", "distgan.cli"}


def test_one_module_configures_accelerate_and_one_draws():
    sources = {file: file.read_text() for file in PACKAGE.rglob("*.py")}
    assert [file.stem for file, source in sources.items() if "Accelerator(" in source] == ["distributed"]
    assert [file.stem for file, source in sources.items() if "Philox" in source] == ["seeding"]
    assert [
        file.stem for file, source in sources.items() if "import safetensors" in source or "from safetensors" in source
    ] == ["checkpoint"]
