"""The wheel, built from the sdist and installed outside the clone: it holds all that the quickstart needs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from support.runs import REPOSITORY, metrics

SHIPPED = [
    f"{folder}/{file.name}" for folder in ("configs", "launch", "slurm") for file in (REPOSITORY / folder).iterdir()
]
# Nothing of this checkout may be found by accident.
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


def run(*command, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, env=OUTSIDE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built in a copy: building writes beside the sources."""
    folder = tmp_path_factory.mktemp("sdist")
    left_out = shutil.ignore_patterns(
        ".*_cache", ".git", ".venv", "__pycache__", "*.egg-info", "_build", "build", "runs"
    )
    shutil.copytree(REPOSITORY, folder / "clone", symlinks=True, ignore=left_out)
    build = f"import setuptools.build_meta as backend; backend.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=folder / "clone")
    return next(folder.glob("distgan-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--wheel-dir", sdist.parent, sdist, cwd=sdist.parent)
    return next(sdist.parent.glob("distgan-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin/` of a fresh environment with the wheel in it. It borrows torch and the others from this one."""
    environment = tmp_path_factory.mktemp("installed")
    venv.create(environment)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, wheel, cwd=environment)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=environment).strip()
    # The .pth files of the other environment, an editable distgan's among them, are not read.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(site) / "borrowed.pth").write_text("\n".join(sorted(borrowed)))
    where = run(python, "-c", "import distgan; print(distgan.__file__)", cwd=environment).strip()
    assert where == f"{site}/distgan/__init__.py"
    return environment / "bin"


def test_the_sdist_has_what_a_clone_has(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    of_the_clone = ["LICENSE", "README.md", "CONTRIBUTING.md", "Makefile", ".ci/run", "docs/training.md"]
    assert {*of_the_clone, *SHIPPED, "tests/conftest.py", "tests/support/programs.py"} <= names


def test_the_wheel_has_the_package_and_its_files_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        for name in SHIPPED:
            assert archive.read(f"distgan/_files/{name}") == (REPOSITORY / name).read_bytes()
    package = [
        file for file in (REPOSITORY / "distgan").rglob("*") if file.is_file() and "__pycache__" not in file.parts
    ]
    ours = {str(file.relative_to(REPOSITORY)) for file in package}
    assert names == {name for name in ours if "/_files/" not in name} | {f"distgan/_files/{name}" for name in SHIPPED}


def test_the_quickstart_runs_from_the_wheel(installed, tmp_path):
    """By the recipe's name; and the files that other commands name are there once they are copied."""
    listed = run(installed / "distgan", "recipes", cwd=tmp_path)
    assert "  quickstart              DCGAN on scikit-learn's" in listed
    assert all(name in listed for name in SHIPPED if not name.startswith("configs/"))
    tiny = ["--train.steps=2", "--track.log_every=1", "--eval.every=null", "--model.width=4", "--track.to=none"]
    run(installed / "distgan", "train", "--config", "quickstart", *tiny, cwd=tmp_path)
    assert [line["step"] for line in metrics(tmp_path / "runs" / "quickstart")] == [1, 2]
    run(installed / "distgan", "sample", "runs/quickstart", "--num", "8", "--out", "grid.png", cwd=tmp_path)
    assert (tmp_path / "grid.png").stat().st_size > 0
    run(installed / "distgan", "recipes", "--copy", ".", cwd=tmp_path)
    for name in SHIPPED:
        assert (tmp_path / name).read_bytes() == (REPOSITORY / name).read_bytes()
    assert os.access(tmp_path / "slurm" / "local_cluster", os.X_OK)
