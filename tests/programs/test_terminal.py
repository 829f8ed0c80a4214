"""On a real terminal of 80 columns: a live view, and Ctrl-C that saves. In a file: plain lines."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import save_file
from support.runs import TINY, steps

from distgan import progress
from distgan.evaluation.extractors import Classifier

DISTGAN = Path(sys.executable).parent / "distgan"
ESTIMATED = r"^evaluating ━.* \d+/24 +\d:\d\d:\d\d"  # the bar of an evaluation with the time left


def plain(shown: bytes) -> str:
    """What a terminal was sent, without the sequences that move its cursor, and without the ^C that it shows itself."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\^C", "", shown.decode(errors="ignore")).replace("\r", "\n")


def test_a_terminal_shows_bars_and_numbers_in_80_columns_and_ctrl_c_saves(tmp_path):
    run, weights = tmp_path / "run", tmp_path / "classifier.safetensors"
    save_file(Classifier(size=(32, 32), channels=1, classes=10).state_dict(), weights)
    argv = [DISTGAN, "train", *TINY, f"--run.dir={run}", "--train.steps=100000", "--track.log_every=5"]
    argv += ["--eval.every=10", "--eval.num=1500", "--eval.extractor=classifier", f"--eval.extractor_weights={weights}"]
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        argv, stdin=inside, stdout=inside, stderr=inside, env=os.environ | {"TERM": "xterm", "COLUMNS": "80"},
        start_new_session=True, preexec_fn=_own_the_terminal,
    )  # fmt: skip
    os.close(inside)
    shown, deadline, pressed = b"", time.monotonic() + 90, False
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # the program closed the terminal
                break
        if not pressed and b"at step " in shown and re.search(ESTIMATED, plain(shown), re.MULTILINE):
            os.write(terminal, b"\x03")
            pressed = True
    assert process.wait(30) == 0
    text = shown.decode()
    (saved,) = steps(run)[-1:]
    assert f"stop signal: saving step {saved}" in text
    assert "stopped and saved; the same command goes on" in text
    assert "loss D " in text
    assert "━" in text  # the bar
    assert "/100000" in text
    assert ":" in text.split("/100000")[1][:40]  # time left
    assert "Traceback" not in text
    rows = plain(shown).splitlines()
    view = [row for row in rows if row.startswith(("training ", "evaluating ", "loss D ", "at step ", "looking at "))]
    assert {row.split()[0] for row in view} == {"training", "evaluating", "loss", "at", "looking"}
    assert max(map(len, view)) <= 80
    assert any(re.match(r"loss D \S+ G \S+  score real \S+ fake \S+ -> \S+  \S+ images/s", row) for row in view)
    assert any(re.match(r"at step \d+:  fd_classifier \S+  precision \S+  recall ", row) for row in view)
    assert any(re.match(ESTIMATED, row) for row in view)


def test_long_work_tells_a_file_how_far_it_is_in_plain_lines(monkeypatch, capfd):
    monkeypatch.setattr(progress, "_TELL_EVERY", 0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich would take a file for a terminal
    assert list(progress.shown(range(3), "drawing", 3, each=1000)) == [0, 1, 2]
    out, err = capfd.readouterr()
    assert (out, err.splitlines()[1:]) == ("", [f"drawing: {i},000 of 3,000 images, 0:00:00 left" for i in (1, 2)])
    assert err.splitlines()[0] == "drawing: 0 of 3,000 images, ? left"


def _own_the_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
