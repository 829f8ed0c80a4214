"""Whatever befalls a rank, its disk or its network: said once, in one sentence, with good checkpoints behind it."""

import functools
import json
import os
import random
import signal
import time

import pytest
from safetensors.torch import load_file
from support.programs import (
    another_recipe,
    another_torch,
    cpu_scaler,
    fail_at,
    fail_while_resuming,
    full_disk_between,
    launch,
    nan_at,
    other_images,
    plain_networks,
    saving_needs_steps,
    signal_at,
    sleep_at,
    slow_alone_then_slow_step,
)
from support.runs import TINY, metrics, steps, tensors, wait_for

from distgan.storage import bundle

LOST, NOT_SAVED = 4, 5


def whole(folder):
    """The run that nothing befell."""
    assert launch([*TINY, f"--run.dir={folder}"], world=2) == [0, 0]
    return folder


# Ranks ----------------------------------------------------------------------------------------------------------------


def stopped(rank):
    signal_at(5, rank, signal.SIGSTOP)


def hanging(rank):
    sleep_at(5, rank)


def killed(rank):
    signal_at(5, rank, signal.SIGKILL)


@pytest.mark.parametrize(
    ("fault", "rank", "words"),
    [
        (stopped, 1, "rank 1 does not answer any more since"),
        (stopped, 0, "rank 0, or its machine, does not answer"),
        (hanging, 1, "rank 1 hangs at step 5 (rank 1 is in train.py:"),
        (hanging, 0, "rank 0 hangs at step 5 (rank 0 is in train.py:"),
        (killed, 1, "rank 1 was lost at step"),
        (killed, 0, "rank 0, or its machine, was lost at step"),
    ],
    ids=["1 stopped", "0 stopped", "1 hangs", "0 hangs", "1 killed", "0 killed"],
)
def test_a_lost_rank_ends_the_job_and_is_named(tmp_path, fault, rank, words):
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [*TINY, f"--run.dir={run}", "--checkpoint.every=2", "--run.timeout=5"]
    codes = launch(argv, world=2, setups=[functools.partial(fault, rank)], log=log, timeout=9)
    assert codes[1 - rank] == LOST
    said = log.read_text()
    assert said.count("distgan: error: ") == 1
    assert words in said
    assert "the same command goes on" in said
    assert steps(run) in ([2], [2, 4])  # step 4 was being written
    assert launch([*TINY, f"--run.dir={run}"], world=2) == [0, 0]
    assert metrics(run) == metrics(whole(tmp_path / "whole"))


def test_of_three_ranks_one_names_the_one_that_was_killed(tmp_path):
    log = tmp_path / "log"
    argv = [*TINY, f"--run.dir={tmp_path / 'run'}", "--run.timeout=5"]
    codes = launch(argv, world=3, setups=[functools.partial(killed, 2)], log=log, timeout=20)
    assert codes == [LOST, LOST, -signal.SIGKILL]
    assert log.read_text().count("distgan: error: ") == 1
    assert "rank 2 was lost at step" in log.read_text()


def test_what_rank_zero_does_alone_takes_no_patience_from_the_steps_after(tmp_path):
    """Longer alone than ranks wait for each other, then a slow step, both within what is allowed."""
    argv = [*TINY, f"--run.dir={tmp_path}", "--run.timeout=4", "--track.sample_every=3"]
    assert launch(argv, world=2, setups=[functools.partial(slow_alone_then_slow_step, 5, 1.5)]) == [0, 0]


def test_a_job_that_is_suspended_for_longer_than_its_patience_goes_on(tmp_path):
    """As Slurm suspends one: every process stands still, and wakes to find that nothing has moved for long."""
    argv = [*TINY, f"--run.dir={tmp_path}", "--train.steps=100", "--run.timeout=2"]

    def suspend(ranks):
        wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and metrics(tmp_path))
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for rank in ranks:
                os.kill(rank.pid, number)
            time.sleep(5 if number == signal.SIGSTOP else 0)

    assert launch(argv, world=2, meanwhile=suspend) == [0, 0]


def test_a_fault_on_one_rank_is_told_by_it_alone(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [*TINY, f"--run.dir={run}", "--checkpoint.every=2"]
    assert launch(argv, world=3, setups=[functools.partial(fail_at, 5, 1)], log=log) == [LOST, 1, LOST]
    said = log.read_text()
    assert said.count("Traceback") == 1
    assert "OutOfMemoryError: CUDA out of memory" in said
    assert "This was rank 1 at step 5." in said
    assert "was lost" not in said
    assert steps(run) == [2, 4]  # what was being written is written
    assert all(bundle.is_whole(folder) for folder in (run / "checkpoints").iterdir())


def test_a_fault_before_training_is_told_by_its_rank_alone(tmp_path):
    log = tmp_path / "log"
    argv = [*TINY, f"--run.dir={tmp_path / 'run'}"]
    assert launch(argv, world=2, setups=[functools.partial(fail_while_resuming, 1)], log=log) == [LOST, 1]
    said = log.read_text()
    assert said.count("Traceback") == 1
    assert "PermissionError: [Errno 13] Permission denied: 'state.json'" in said
    assert "This was rank 1 at step 1." in said


def test_a_nan_on_one_rank_stops_all_before_it_is_saved(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    argv = [*TINY, f"--run.dir={run}", "--checkpoint.every=2"]
    assert launch(argv, world=2, setups=[functools.partial(nan_at, 5, 1)], log=log) == [3, 3]
    assert log.read_text().count("distgan: error: at step 6 main.0.weight in the generator has become NaN or inf.") == 1
    assert "Traceback" not in log.read_text()
    assert steps(run) == [2, 4]
    assert all(bundle.is_whole(folder) for folder in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (functools.partial(another_recipe, 1, "--optim.lr=0.001"), "optim.lr: 0.0002 on rank 0, 0.001 on rank 1"),
        (functools.partial(another_recipe, 2, "--track.log_every=5"), "track.log_every: 3 on rank 0, 5 on rank 2"),
        (functools.partial(another_torch, 1), "1.0.0 on rank 1"),
        (functools.partial(other_images, 2), "of others on rank 2"),
    ],
    ids=["recipe", "intervals", "versions", "data"],
)
def test_ranks_that_differ_are_refused_before_training(tmp_path, fault, words):
    run, log = tmp_path / "run", tmp_path / "log"
    assert launch([*TINY, f"--run.dir={run}"], world=3, setups=[fault], log=log) == [2, 2, 2]
    said = log.read_text()
    assert said.count("distgan: error: rank") == 1
    assert "differs from rank 0" in said
    assert words in said
    assert not (run / "checkpoints").exists()
    assert launch([*TINY, f"--run.dir={run}", "--train.steps=1"], world=3) == [0, 0, 0]  # whatever rank zero wrote


@pytest.mark.parametrize("victims", [[0], [1], [0, 1], [1]], ids=["0", "1", "all", "1 again"])
def test_killed_at_any_moment_the_same_command_ends_as_if_nothing_had_happened(tmp_path, victims):
    """One rank or all, kill -9, in the middle of training and of saving, which goes on nearly all the time."""
    run = tmp_path / "run"
    endless = [*TINY, f"--run.dir={run}", "--train.steps=1000000", "--checkpoint.every=1", "--checkpoint.keep_last=2"]
    wait = random.SystemRandom().random()
    print(f"killed {wait} s after the second checkpoint")  # shown where the test fails
    before = steps(run)

    def kill(ranks):
        wait_for(lambda: len(steps(run)) >= 2)
        time.sleep(wait)
        before.extend(steps(run))
        for victim in victims:
            ranks[victim].kill()

    codes = launch(endless, world=2, log=tmp_path / "log", meanwhile=kill)
    assert codes == [-signal.SIGKILL if rank in victims else LOST for rank in range(2)]
    assert steps(run)[-1] >= before[-1]
    until = [*endless, f"--run.stop_at={steps(run)[-1] + 5}"]
    assert launch(until, world=2) == [0, 0]
    assert launch([*until, f"--run.dir={tmp_path / 'whole'}"], world=2) == [0, 0]
    last = steps(run)[-1]
    assert tensors(run, last) == tensors(tmp_path / "whole", last)
    assert metrics(run) == metrics(tmp_path / "whole")
    logged = last - last % 3  # up to there a rollback may go back
    assert {folder.name for folder in (run / "checkpoints").iterdir()} == {
        *(f"step_{step:08d}" for step in (logged, last - 1, last)),
    }


# Disk -----------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_what_it_missed_is_written_when_there_is_room_again(tmp_path, small_disk):
    run, log = small_disk / "run", tmp_path / "log"
    argv = [*TINY, f"--run.dir={run}", "--checkpoint.every=2", "--checkpoint.keep_last=1"]
    setups = [functools.partial(full_disk_between, 3, 10, small_disk)]
    assert launch(argv, world=2, setups=setups, log=log) == [0, 0], log.read_text()
    said = log.read_text()
    assert "Traceback" not in said
    for words in ("step 4 could not be saved", "the samples of step 8 could not be written"):
        assert f"distgan: warning: {words}" in said
    undisturbed = whole(tmp_path / "whole")
    assert metrics(run) == metrics(undisturbed)
    ours, expected = tensors(run, 11), tensors(undisturbed, 11)
    assert {name: ours[name] for name in ours} == {name: expected[name] for name in ours}
    assert len(ours) >= 7
    assert steps(run) == [10, 11]  # 10 being what a rollback would go back to
    assert {folder.suffix for folder in (run / "checkpoints").iterdir()} == {""}


@pytest.mark.parametrize("overrides", [["--checkpoint.on_error=stop"], ["--train.steps=9"]], ids=["stop", "at the end"])
def test_a_full_disk_stops_a_run_that_wants_it_or_is_at_its_end(tmp_path, small_disk, overrides):
    run, log = small_disk / "run", tmp_path / "log"
    argv = [*TINY, f"--run.dir={run}", "--checkpoint.every=2", "--checkpoint.keep_last=1"]
    setups = [functools.partial(full_disk_between, 3, 10, small_disk)]
    assert launch([*argv, *overrides], world=2, setups=setups, log=log) == [NOT_SAVED, NOT_SAVED]
    said = log.read_text()
    assert said.count("distgan: error: ") == 1
    assert "(No space left on device)" in said
    assert "Traceback" not in said
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step_00000002"]
    assert bundle.is_whole(run / "checkpoints" / "step_00000002")
    (small_disk / "filler").unlink()
    assert launch([*argv, *overrides], world=2) == [0, 0]


def test_saving_does_not_hold_up_training(tmp_path):
    run = tmp_path / "run"
    argv = [*TINY, f"--run.dir={run}", "--checkpoint.every=4"]
    assert launch(argv, world=2, setups=[functools.partial(saving_needs_steps, 3)]) == [0, 0]
    assert steps(run) == [4, 8, 11]
    undisturbed = whole(tmp_path / "whole")
    assert tensors(run, 11) == tensors(undisturbed, 11)


@pytest.mark.parametrize("world", [1, 2])
def test_minutes_save_as_steps_do(tmp_path, world):
    argv = [*TINY, f"--run.dir={tmp_path}", "--checkpoint.keep_last=100", "--checkpoint.every_minutes=1e-9"]
    assert launch(argv, world=world) == [0] * world
    # Rank zero's wish is known to all a step later, and one wish saves once.
    assert steps(tmp_path) == (list(range(1, 12)) if world == 1 else [2, 4, 6, 8, 10, 11])


# Precision ------------------------------------------------------------------------------------------------------------


PLAIN = ["--model.architecture=plain", "--data.flip=false"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_scaler_changes_no_update_and_is_resumed(tmp_path, world):
    """Powers of two scale exactly, so that a run with a scaler is bit-equal to one without."""
    without, scaled, parts = tmp_path / "without", tmp_path / "with", tmp_path / "parts"
    argv, setups = [*TINY, *PLAIN, "--ema.half_life=0"], [plain_networks, cpu_scaler]
    assert launch([*argv, f"--run.dir={without}"], world=world, setups=setups[:1]) == [0] * world
    assert launch([*argv, f"--run.dir={scaled}"], world=world, setups=setups) == [0] * world
    for stop in (["--run.stop_at=5"], []):
        assert launch([*argv, f"--run.dir={parts}", *stop], world=world, setups=setups) == [0] * world
    assert tensors(scaled, 11) == tensors(without, 11)
    assert tensors(parts, 11) == tensors(scaled, 11)
    states = [scaler_of(run, 11) for run in (scaled, parts)]
    assert states[0] == states[1]
    assert states[0]["scale"] == 2.0 ** (8 + 22 // 4)  # it grew every four updates, two a step


def test_an_overflow_in_the_discriminator_leaves_the_generator_alone(tmp_path):
    argv = [*TINY, *PLAIN, f"--run.dir={tmp_path}", "--checkpoint.every=1", "--checkpoint.keep_last=100"]
    assert launch(argv, world=2, setups=[plain_networks, functools.partial(cpu_scaler, 6)]) == [0, 0]

    def moved(name, at):
        before, after = (
            load_file(tmp_path / "checkpoints" / f"step_{s:08d}" / f"{name}.safetensors") for s in (at - 1, at)
        )
        return any((before[key] != after[key]).any() for key in before)

    assert not moved("discriminator", 6)
    assert not moved("discriminator_optimizer", 6)
    assert moved("generator", 6)
    assert moved("discriminator", 5)
    assert moved("discriminator", 7)
    assert scaler_of(tmp_path, 6)["scale"] == scaler_of(tmp_path, 5)["scale"] / 2


def scaler_of(run, step):
    return json.loads((run / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())["scaler"]
