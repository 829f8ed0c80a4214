"""Exact resume: stopping anywhere and running the same command again is as if nothing had happened."""

import functools
import json
import random
import signal

import pytest
from PIL import Image
from support.programs import (
    float64,
    forget_moments,
    forget_the_meter,
    launch,
    signal_at,
    signal_while_preparing,
    unsettled_buckets,
)
from support.runs import TINY, VARIANTS, metrics, steps, tensors

from distgan import load_generator
from distgan.pictures import grid


def stopped_and_resumed(tmp_path, world, *overrides, setups=(), number=None):
    """A run stopped twice, at random steps, by `run.stop_at` or by a signal to one rank; and the one that never was."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    seed = random.SystemRandom().randrange(2**32)
    print(f"random stops from seed {seed}")  # shown where the test fails
    stops = sorted(random.Random(seed).sample(range(1, 9), 2))
    assert launch([*TINY, f"--run.dir={whole}", *overrides], world=world, setups=setups) == [0] * world
    for stop in (*stops, None):
        argv, faults = [*TINY, f"--run.dir={parts}", *overrides], list(setups)
        if stop is not None and number is None:
            argv.append(f"--run.stop_at={stop}")
        elif stop is not None:
            faults.append(functools.partial(signal_at, stop, random.Random(seed).randrange(world), number))
        before = steps(parts)
        assert launch(argv, world=world, setups=faults) == [0] * world
        if number is not None and stop is not None and (not before or stop > before[-1]):
            # Several ranks agree a step later, in which the flag travelled.
            assert steps(parts)[-1] == stop + (world > 1)
            assert json.loads((parts / "preempted").read_text()) == {"step": steps(parts)[-1]}
    assert not (parts / "preempted").exists()
    return whole, parts


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        *((1, []), (2, []), (3, [])),
        (1, ["--train.precision=bf16"]),
        (2, ["--train.precision=bf16", "--penalty.name=r1,r2", "--model.d_norm=spectral"]),
        (2, ["--train.d_steps=2"]),
    ],
    ids=["1", "2", "3", "bf16", "bf16-penalty", "d_steps"],
)
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(tmp_path, world, overrides):
    whole, parts = stopped_and_resumed(tmp_path, world, *overrides)
    assert len(tensors(whole, 11)) == 9  # three networks, two optimisers, the export, samples of three steps
    assert tensors(parts, 11) == tensors(whole, 11)
    assert metrics(parts) == metrics(whole)
    assert [record["step"] for record in metrics(whole)] == [3, 6, 9, 11]


@pytest.mark.parametrize(
    ("world", "variant"),
    [*((2, name) for name in VARIANTS), (3, "relativistic-r1-r2-spectral-dcgan-labels")],
)
def test_a_stopped_run_beyond_dcgan_ends_with_the_same_bits(tmp_path, world, variant):
    whole, parts = stopped_and_resumed(tmp_path, world, *VARIANTS[variant])
    assert tensors(parts, 11) == tensors(whole, 11)
    assert metrics(parts) == metrics(whole)


@pytest.mark.parametrize(
    ("number", "world"),
    [
        *((number, world) for number in (signal.SIGTERM, signal.SIGINT) for world in (1, 2, 3)),
        *((signal.SIGUSR1, 2), (signal.SIGUSR2, 2)),
    ],
)
def test_a_run_that_a_signal_to_any_rank_stopped_ends_with_the_same_bits(tmp_path, number, world):
    whole, parts = stopped_and_resumed(tmp_path, world, number=number)
    assert tensors(parts, 11) == tensors(whole, 11)
    assert metrics(parts) == metrics(whole)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2], ids=lambda number: number.name)
def test_a_signal_while_images_are_prepared_is_kept_until_the_run_can_save(tmp_path, number):
    early = functools.partial(signal_while_preparing, 1, number)
    assert launch([*TINY, f"--run.dir={tmp_path}"], world=2, setups=[early]) == [0, 0]
    assert steps(tmp_path) == [2]  # the flag travels for a step
    assert json.loads((tmp_path / "preempted").read_text()) == {"step": 2}


@pytest.mark.parametrize(
    ("fault", "seen"), [(forget_moments, tensors), (forget_the_meter, lambda run, _: metrics(run))]
)
def test_what_a_checkpoint_forgot_would_be_seen(tmp_path, fault, seen):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launch([*TINY, f"--run.dir={whole}"]) == [0]
    for stop in (["--run.stop_at=5"], []):
        assert launch([*TINY, f"--run.dir={parts}", *stop], setups=[fault]) in ([0], [1])
    assert steps(parts)[-1] != 11 or seen(parts, 11) != seen(whole, 11)


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


@pytest.mark.parametrize("world", [1, 3, 4])
def test_a_run_continues_on_another_number_of_processes(tmp_path, world):
    """Losses of a DCGAN, its batch norm synchronised, in float64, from a stop within a log interval on."""
    argv = [*TINY, "--model.width=8", "--model.latent_dim=16", "--checkpoint.every=100"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    setups = [float64]
    assert launch([*argv, f"--run.dir={whole}"], setups=setups) == [0]
    assert launch([*argv, f"--run.dir={parts}", "--run.stop_at=5"], world=2, setups=setups) == [0, 0]
    assert launch([*argv, f"--run.dir={parts}"], world=world, setups=setups) == [0] * world
    assert [record["step"] for record in metrics(parts)] == [3, 6, 9, 11]
    for ours, expected in zip(metrics(parts), metrics(whole), strict=True):
        assert ours == pytest.approx(expected, rel=1e-9, abs=0)
