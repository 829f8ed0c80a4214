"""Exact resume: stopping anywhere and running the same command again is as if nothing had happened."""

import pytest
from conftest import TINY, metrics, steps, tensors
from PIL import Image
from programs import launch, unsettled_buckets

from distgan import load_generator
from distgan.pictures import grid


def stopped_and_resumed(tmp_path, world, *overrides, setups=()):
    """A run stopped twice, between log points and samples, and the one that never was; their folders."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launch([*TINY, f"--run.dir={whole}", *overrides], world=world, setups=setups) == [0] * world
    for stop in (["--run.stop_at=5"], ["--run.stop_at=8"], []):
        argv = [*TINY, f"--run.dir={parts}", *overrides, *stop]
        assert launch(argv, world=world, setups=setups) == [0] * world
    return whole, parts


@pytest.mark.parametrize(
    ("world", "overrides"),
    [(1, []), (2, []), (3, []), (1, ["--train.precision=bf16"]), (2, ["--train.d_steps=2"])],
    ids=["1", "2", "3", "bf16", "d_steps"],
)
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(tmp_path, world, overrides):
    whole, parts = stopped_and_resumed(tmp_path, world, *overrides)
    assert len(tensors(whole, 11)) == 9  # three networks, two optimisers, the export, samples of three steps
    assert tensors(parts, 11) == tensors(whole, 11)
    assert metrics(parts) == metrics(whole)
    assert [record["step"] for record in metrics(whole)] == [3, 6, 9, 11]


def test_on_three_ranks_resuming_needs_the_gradient_buckets_settled(tmp_path):
    """The canary of `settle_gradient_buckets`: were DDP's first buckets its last ones, it could go."""
    whole, parts = stopped_and_resumed(tmp_path, 3, setups=[unsettled_buckets])
    assert tensors(parts, 11) != tensors(whole, 11)


def test_a_finished_run_is_left_alone_and_extended_on_request(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launch([*TINY, f"--run.dir={parts}", "--train.steps=7"]) == [0]
    before = tensors(parts, 7)
    with Image.open(parts / "samples" / "step_00000007.png") as last:  # what `distgan sample` draws with the run's seed
        assert last.tobytes() == grid(load_generator(parts).sample(64, seed=0)).tobytes()
    assert launch([*TINY, f"--run.dir={parts}", "--train.steps=7"]) == [0]
    assert tensors(parts, 7) == before
    extended = [*TINY, f"--run.dir={parts}", "--train.steps=7", "--run.extend=4"]
    assert launch(extended) == [0]
    assert launch(extended) == [0]  # the same command again extends no further
    assert steps(parts) == [6, 7, 11]
    assert launch([*TINY, f"--run.dir={whole}"]) == [0]
    last, longer = tensors(whole, 11), tensors(parts, 11)
    assert {name: longer[name] for name in last} == last  # and has one grid more, of the former end


def test_a_run_continues_on_another_number_of_processes(tmp_path):
    run = tmp_path / "run"
    assert launch([*TINY, f"--run.dir={run}", "--run.stop_at=5"], world=2) == [0, 0]
    assert launch([*TINY, f"--run.dir={run}"]) == [0]
    assert [record["step"] for record in metrics(run)] == [3, 6, 9, 11]
    assert steps(run) == [5, 6, 11]
