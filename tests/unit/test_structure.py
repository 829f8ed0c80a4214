"""Imports point one way, and each concern has one owner."""

import ast
from pathlib import Path

import pytest
from support.runs import REPOSITORY

PACKAGE = REPOSITORY / "distgan"
# Each may import those before it, and the leaf modules; verbs may import everything, and nothing imports a verb except
# `api`, and `synthesize`, which trains.
FOLDERS = [
    "recipe",
    "data",
    "models",
    "objective",
    "storage",
    "run_page",
    "parallel",
    "evaluation",
    "run",
    "applications",
]
LEAVES = ["ema", "errors", "files", "output", "paths", "pictures", "progress", "schedules", "seeding", "shipped"]
VERBS = [
    "compare",
    "doctor",
    "evaluate",
    "export",
    "import",
    "inpaint",
    "interpolate",
    "invert",
    "judge",
    "report",
    "runs",
    "sample",
    "synthesize",
]
VERBS += ["recipes", "train", "where"]  # and data/__main__.py
NEITHER_ACCELERATE_NOR_WANDB = ["recipe", "data", "models", "objective", "storage", "run_page", "cli", *LEAVES]


def imports(file: Path) -> set[str]:
    """Every module that a file imports anywhere, functions included, except what runs it as a program."""
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


def parts(file: Path) -> set[str]:
    """The folders and modules of the package that a file imports from."""
    return {module.split(".")[1] for module in imports(file) if module.startswith("distgan.")}


def test_every_module_has_its_place():
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()} - {
        "__pycache__",
        "_files",
    }
    assert modules - {"__pycache__", "_files"} == {*FOLDERS, *LEAVES, *VERBS, "api", "cli", "__init__", "__main__"}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_imports_only_those_before_it(name):
    later = {*FOLDERS[FOLDERS.index(name) + 1 :], *VERBS, "cli"}
    for file in files(name):
        assert not parts(file) & later, file


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_imports_no_folder_but_the_first_ones(name):
    for file in files(name):
        assert not parts(file) & {*FOLDERS[3:], *VERBS, "cli"}, file


@pytest.mark.parametrize("name", NEITHER_ACCELERATE_NOR_WANDB)
def test_what_computes_and_stores_imports_neither_accelerate_nor_wandb(name):
    for file in files(name):
        assert not {module.split(".")[0] for module in imports(file)} & {"accelerate", "wandb"}, file


def test_one_place_configures_accelerate_one_draws_and_one_package_stores_tensors():
    sources = {file: file.read_text() for file in PACKAGE.rglob("*.py")}
    assert [file.stem for file, source in sources.items() if "Accelerator(" in source] == ["ranks"]
    assert [file.stem for file, source in sources.items() if "Philox" in source] == ["seeding"]
    touching = {file.parent.name for file, source in sources.items() if "from safetensors" in source}
    assert touching == {"storage"}
