"""What several tests use: a run that is done, a port, a small disk."""

import os
import socket
import subprocess

import pytest
from support.programs import launch
from support.runs import TINY


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
