"""Output that cannot be written ends no run and is taken for nothing else."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, steps, tensors
from PIL import Image
from programs import launch, processes

from distgan import config, output, train

BIN = Path(sys.executable).parent


def no_reader() -> None:
    """As `2>&1 | head`, once head is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)


def full() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)


def closed() -> None:
    """As `>&- 2>&- <&-`."""
    for number in (0, 1, 2):
        os.close(number)
    sys.stdin = sys.stdout = sys.stderr = None


def ascii_only() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii", errors="strict")


@pytest.mark.parametrize(("lost", "world"), [(no_reader, 1), (no_reader, 2), (full, 1), (closed, 1)])
def test_a_run_whose_output_is_lost_trains_as_ever(tmp_path, small_run, lost, world):
    run = tmp_path / "run"
    # A disk that fails would end it.
    argv = [*TINY, f"--run.dir={run}", "--checkpoint.on_error=stop"]
    assert launch(argv, world=world, setups=[lost]) == [0] * world
    assert steps(run) == [6, 11]
    if world == 1:
        assert tensors(run, 11) == tensors(small_run, 11)


def train_here(argv: list[str], lost) -> None:
    torch.set_num_threads(1)  # as in every rank of `launch`
    lost()
    train.train(config.parse(argv)[0])


def test_a_run_from_python_whose_output_is_lost_trains_as_ever(tmp_path, small_run):
    run = tmp_path / "run"
    process = processes.Process(target=train_here, args=([*TINY, f"--run.dir={run}"], full))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert tensors(run, 11) == tensors(small_run, 11)


def test_characters_that_a_terminal_does_not_have_are_written_otherwise(tmp_path, small_run):
    run, log = tmp_path / "é [b] →", tmp_path / "log"
    argv = [*TINY, f"--run.dir={run}"]
    assert launch([*argv, "--run.stop_at=5"], setups=[ascii_only], log=log) == [0]
    assert launch(argv, setups=[ascii_only], log=log) == [0]  # its own recipe is read again
    assert tensors(run, 11) == tensors(small_run, 11)
    said = log.read_text(encoding="ascii")
    assert "step 11/11  loss D " in said
    assert rf"{tmp_path}/\xe9 [b] \u2192/checkpoints" in said


def test_a_path_that_no_recipe_can_hold_is_refused():
    with pytest.raises(ValueError, match=r"^run\.dir is runs/\?, which is no text .*: set PYTHONUTF8=1, or rename"):
        config.parse([f"--run.dir={os.fsdecode(bytes([*b'runs/', 255]))}"])


def test_names_that_look_like_markup_are_names(tmp_path):
    pictures, log = tmp_path / "pictures", tmp_path / "log"
    pictures.mkdir()
    for i in range(12):
        Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(pictures / f"{i}.png")
    (pictures / "[bold][.png").write_bytes(b"no picture")
    (pictures / "[]a[").mkdir()
    argv = [str(pictures), "--skip-bad", "--prepare", f"--out={tmp_path / 'grid.png'}"]
    assert launch(argv, verb="data", log=log) == [0]
    assert "the first: " in log.read_text()
    assert "[bold][.png" in log.read_text()


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_a_reader_that_leaves_is_no_fault(words):
    """Through a real pipe, and to the interpreter's very end."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run([str(BIN / "distgan"), *words], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (process.returncode, process.stderr) == (0, b"")


def test_streams_that_are_no_files_are_left_alone_and_all_come_back():
    ours, standard = io.StringIO(), sys.stdout
    with contextlib.redirect_stdout(ours), output.unfailing():
        print("→")
        assert sys.stdout is ours
    assert ours.getvalue() == "→\n"
    assert sys.stdout is standard


def test_what_can_be_written_is(tmp_path):
    file = tmp_path / "file"
    with file.open("w", encoding="latin1") as stream, contextlib.redirect_stdout(stream):
        print("before")
        with output.unfailing():
            print("é → \udcff")
            with output.unfailing():
                print("within")
        print("after")
    assert file.read_bytes() == b"before\n\xe9 \\u2192 \\udcff\nwithin\nafter\n"
