"""What the benchmark of mode coverage counts, on pictures whose modes are known."""

import sys

import numpy as np
from support.runs import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import modes


def test_blobs_at_their_points_are_all_modes_and_whatever_else_is_none():
    rng = np.random.default_rng(0)
    points = np.repeat(modes.POINTS, 20, axis=0)
    real = modes.blob(points + modes.JITTER * rng.standard_normal(points.shape))
    found, good = modes.count(real)
    assert found == 25
    assert good > 0.99
    two = np.maximum(real, np.roll(real, 200, axis=0))  # of two positions
    between = modes.blob(points + 5.75 / 2)
    for pictures in (np.zeros_like(real), rng.random(real.shape), two, between):
        found, good = modes.count(pictures)
        assert found == 0
        assert good < 0.1
    assert modes.count(np.concatenate([real[:40], between[:460]]))[0] == 2


def test_a_mode_of_which_there_is_hardly_a_sample_is_not_found():
    few = modes.blob(
        np.concatenate([np.repeat(modes.POINTS[:24], 104, axis=0), np.repeat(modes.POINTS[24:], 4, axis=0)])
    )
    assert modes.count(few)[0] == 24
