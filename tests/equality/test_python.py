"""Training from Python: several runs of one process, in a thread, from a notebook's launcher, after an error."""

import functools
import os
import re
import signal
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from support.programs import launch
from support.runs import REPOSITORY, TINY, metrics, steps, tensors

from distgan import recipe, train
from distgan.errors import TroubleError
from distgan.parallel.ranks import Ranks

COLLAPSED = ["--guard.after=0", "--guard.patience=1", "--guard.on_trouble=stop", "--track.log_every=1"]


def run(*overrides):
    train.train(recipe.parse([*TINY, *overrides])[0])


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def whole_process():
    """What a run sets for all of the process, or might."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": torch.backends.cudnn.allow_tf32,
        "threads": torch.get_num_threads(),
        "filters": list(warnings.filters),
        "handlers": [signal.getsignal(number) for number in signal.valid_signals()],
        "environment": dict(os.environ),
        "accelerate": [dict(state._shared_state) for state in (PartialState, AcceleratorState, GradientState)],
    }


def test_the_documented_program_runs(tmp_path):
    """All that docs/api.md shows, as one script: two precisions, an error, a thread, two processes."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "api.md").read_text(), re.S)
    (tmp_path / "program.py").write_text("\n".join(blocks))
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "2",
    }  # as many as a fork leaves behind
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    for name in ("in fp32", "in bf16", "a small batch", "in a thread", "on two processes"):
        assert steps(tmp_path / "runs" / name) == [6], done.stderr
    assert "too large a batch: train.batch_size is 4096, but there are 1797 images: " in done.stdout
    assert "runs/in bf16: starting at step 0 on 1 x cpu, 16 images each, bf16" in done.stdout
    assert "runs/on two processes: starting at step 0 on 2 x cpu, 8 images each, fp32" in done.stdout


def test_a_run_is_the_same_after_others_and_leaves_the_process_as_it_was(tmp_path, small_run, one_thread):
    """Also to somebody's own use of Accelerate."""
    Accelerator(cpu=True, mixed_precision="bf16")
    try:
        before = whole_process()
        run(f"--run.dir={tmp_path / 'first'}", "--train.precision=bf16", "--train.deterministic=true")
        assert whole_process() == before
        with pytest.raises(TroubleError):
            run(f"--run.dir={tmp_path / 'second'}", *COLLAPSED)
        assert whole_process() == before
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    run(f"--run.dir={tmp_path / 'third'}")
    assert metrics(tmp_path / "third") == metrics(small_run)
    assert tensors(tmp_path / "third", 11) == tensors(small_run, 11)


def test_after_an_error_the_same_call_goes_on(tmp_path, small_run, one_thread, monkeypatch):
    """In the folder that the failed run held, as long as its exception is kept."""
    with monkeypatch.context() as patched:
        after = train.after_step

        def failing(run, step):
            if step == 8:
                raise RuntimeError("a fault")
            return after(run, step)

        patched.setattr(train, "after_step", failing)
        with pytest.raises(RuntimeError, match="a fault") as kept:
            run(f"--run.dir={tmp_path / 'run'}")
    assert steps(tmp_path / "run") == [6]
    run(f"--run.dir={tmp_path / 'run'}")
    assert metrics(tmp_path / "run") == metrics(small_run)
    assert kept.value.__traceback__ is not None


def test_a_run_in_a_thread_is_alone_and_leaves_signals_to_the_main_thread(tmp_path, monkeypatch):
    reached, go_on, errors = threading.Event(), threading.Event(), []

    after = train.after_step

    def waiting(run, step):
        reached.set()
        assert go_on.wait(60)
        return after(run, step)

    monkeypatch.setattr(train, "after_step", waiting)

    def work():
        try:
            run(f"--run.dir={tmp_path / 'run'}")
        except BaseException as error:
            errors.append(error)

    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    assert reached.wait(60)
    assert signal.getsignal(signal.SIGTERM) is handler
    with pytest.raises(ValueError, match=r"^another run is active in this process, .*: wait until it ends"):
        run(f"--run.dir={tmp_path / 'other'}")
    assert not (tmp_path / "other").exists()
    if (child := os.fork()) == 0:  # in which that run does not go on
        try:
            with Ranks(timeout=60):
                os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    go_on.set()
    thread.join(60)
    assert errors == []
    assert steps(tmp_path / "run") == [6, 11]


def earlier_runs(folder):
    """Runs of the same ranks that end in errors, before the one that is looked at."""
    for name, overrides, kind in (
        ("trouble", COLLAPSED, TroubleError),
        ("wrong", ["--train.batch_size=3600"], ValueError),
    ):
        with pytest.raises(kind):
            run(f"--run.dir={folder}/{name}", *overrides)
    run(f"--run.dir={folder}/good", "--train.precision=bf16", "--train.steps=3")


def test_two_ranks_train_several_times_also_after_errors(tmp_path):
    plain, later, log = tmp_path / "plain", tmp_path / "later", tmp_path / "log"
    assert launch([*TINY, f"--run.dir={plain}"], world=2) == [0, 0]
    setups = [functools.partial(earlier_runs, str(tmp_path))]
    assert launch([*TINY, f"--run.dir={later}"], world=2, setups=setups, log=log) == [0, 0], log.read_text()
    assert tensors(later, 11) == tensors(plain, 11)
