"""Output that cannot be written ends no run and is taken for nothing else."""

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.programs import launch, processes
from support.runs import REPOSITORY, TINY, steps, tensors

from distgan import cli, output, recipe, train

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
    try:
        os.write(1, b"x")
    except OSError as error:
        assert error.errno == errno.ENOSPC
    else:
        raise AssertionError("this machine's /dev/full takes what is written")


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
    train.train(recipe.parse(argv)[0])


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
    assert rf"$'{tmp_path}/\xc3\xa9 [b] \xe2\x86\x92/checkpoints'" in said  # can be pasted


PARSED = "from distgan import recipe; print(recipe.parse()[0].run.dir)"


@pytest.mark.parametrize(
    ("folder", "said"), [("a/folder", "a/folder\n"), ("ü", "which this locale's encoding cannot write: set PYTH")]
)
def test_a_recipe_is_utf_8_whatever_the_locale(tmp_path, folder, said):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"run: {{dir: {folder}}}  # für mich", encoding="utf-8")
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-c", PARSED, "--config", str(file)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | ascii_locale)
    assert said in done.stdout.decode()


def test_a_path_that_no_recipe_can_hold_is_refused():
    with pytest.raises(ValueError, match=r"^run\.dir is runs/\?, which cannot be written in UTF-8: rename it, or set"):
        recipe.parse([f"--run.dir={os.fsdecode(bytes([*b'runs/', 255]))}"])


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


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["data", "digits"]])
def test_a_reader_that_leaves_is_no_fault(tmp_path, words):
    """Through a real pipe, and to the interpreter's very end."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [str(BIN / "distgan"), *words]
    process = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, check=False, cwd=tmp_path)
    os.close(writer)
    assert (process.returncode, process.stderr) == (0, b"")


class Tee:
    """As scripts write their own to keep a log: not all that a stream has."""

    def __init__(self) -> None:
        self.said = ""

    def write(self, text: str) -> int:
        self.said += text
        return len(text)

    def flush(self) -> None:
        pass


def test_a_script_may_print_through_a_class_of_its_own(tmp_path, small_run):
    run, tee = tmp_path / "run", Tee()
    with contextlib.redirect_stdout(tee), contextlib.redirect_stderr(tee):
        train.train(recipe.parse([*TINY, f"--run.dir={run}"])[0])
        assert sys.stdout is sys.stderr is tee
    assert "step 11/11  loss D " in tee.said
    assert tensors(run, 11).keys() == tensors(small_run, 11).keys()


def test_a_detached_stream_is_one_that_is_lost(tmp_path):
    stream = (tmp_path / "file").open("w")
    with contextlib.closing(stream.detach()), contextlib.redirect_stdout(stream):
        with output.unfailing():
            print("lost")
        assert sys.stdout is stream


def test_of_two_threads_neither_leaves_its_stream_behind(tmp_path):
    with (tmp_path / "file").open("w") as stream, contextlib.redirect_stdout(stream):
        first, second = output.unfailing(), output.unfailing()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)
        assert sys.stdout is stream


def test_json_goes_into_what_is_no_regular_file_and_through_links(tmp_path, capfd):
    fifo, link, file = tmp_path / "fifo", tmp_path / "link", tmp_path / "file"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    cli.write_json(fifo, {"a": 1})
    assert json.loads(os.read(reader, 1000)) == {"a": 1}
    assert fifo.is_fifo()
    os.close(reader)
    link.symlink_to(file)
    for value in (1, 2):
        cli.write_json(link, {"a": value})
        assert (link.is_symlink(), json.loads(file.read_text())) == (True, {"a": value})
    capfd.readouterr()
    standard = tmp_path / "stdout"  # as /dev/stdout is, of a shell's `> file`
    standard.symlink_to("/proc/self/fd/1")
    print("before")
    cli.write_json(standard, {"a": 3})
    assert capfd.readouterr().out == f'before\n{{\n "a": 3\n}}\nwritten to  {standard}\n'
    assert standard.is_symlink()


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
