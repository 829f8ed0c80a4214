"""On a real terminal: a live bar, and Ctrl-C that saves."""

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

from support.runs import TINY, steps

DISTGAN = Path(sys.executable).parent / "distgan"


def test_a_terminal_shows_a_bar_and_ctrl_c_saves(tmp_path):
    run = tmp_path / "run"
    argv = [DISTGAN, "train", *TINY, f"--run.dir={run}", "--train.steps=100000", "--track.log_every=5"]
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        argv, stdin=inside, stdout=inside, stderr=inside, env=os.environ | {"TERM": "xterm", "COLUMNS": "160"},
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
        if not pressed and shown.count(b"images/s") > 5:
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


def _own_the_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
