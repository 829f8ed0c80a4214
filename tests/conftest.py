"""What several tests use: a run that is done, a port, a small disk. And which tests may run beside each other."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
from support.programs import launch
from support.runs import TINY

# Tests that wait for a limit of some seconds never run beside each other. Other tests may run beside them.
_IMPATIENT = ("faults/test_faults.py", "cluster/test_nodes.py", "programs/test_program.py", "faults/test_signals.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With `-n 2 --dist loadgroup` the tests of a file stay in one process, and so do those of all impatient files."""
    for item in items:
        file = item.path.relative_to(Path(__file__).parent).as_posix()
        item.add_marker(pytest.mark.xdist_group("impatient" if file in _IMPATIENT else file))


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A run of seconds that is done; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("small") / "run"
    assert launch([*TINY, f"--run.dir={folder}"]) == [0]
    return folder


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
