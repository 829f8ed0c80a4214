"""Walks between latents and classes, against scipy and against a mixture written out."""

import numpy as np
import pytest
import torch
from scipy.spatial import geometric_slerp

from distgan.applications.walks import spherical, walk
from distgan.models.conditional import ConditionalBatchNorm2d
from distgan.storage.latents import Latents


def test_a_walk_follows_the_great_circle():
    rng = np.random.default_rng(0)
    a, b = (vector / np.linalg.norm(vector) for vector in rng.standard_normal((2, 100)))
    t = np.linspace(0, 1, 7)
    ours = spherical(*map(torch.from_numpy, (a, b, t)))
    np.testing.assert_allclose(ours.numpy(), geometric_slerp(a, b, t), atol=1e-12)


def test_stations_are_met_exactly_and_lengths_change_evenly():
    z = torch.randn(3, 50, dtype=torch.float64) * torch.tensor([[1.0], [2.0], [3.0]])
    way, y = walk(Latents(z), 4, classes=0)
    assert way.shape == (9, 50)
    assert y is None
    torch.testing.assert_close(way[[0, 4, 8]], z, atol=1e-12, rtol=0)
    straight = walk(Latents(torch.stack([z[0], 2 * z[0]])), 4, classes=0)[0]  # no angle to turn by
    torch.testing.assert_close(straight, torch.outer(torch.tensor([1, 1.25, 1.5, 1.75, 2]).double(), z[0]))


def test_between_classes_lie_shares_of_both():
    z = torch.randn(1, 8).expand(3, -1)
    way, y = walk(Latents(z, torch.tensor([2, 0, 1])), 2, classes=4)
    assert torch.equal(way, z[:1].expand(5, -1))
    assert y.tolist() == [[0, 0, 1, 0], [0.5, 0, 0.5, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize("label", [0, 3])
def test_a_whole_share_is_the_class_and_halves_are_the_mean_of_two(label):
    norm = ConditionalBatchNorm2d(5, classes=4).eval()
    torch.nn.init.normal_(norm.scale.weight)
    torch.nn.init.normal_(norm.shift.weight)
    x = torch.randn(2, 5, 3, 3)
    y = torch.tensor([label, 1])
    whole = torch.nn.functional.one_hot(y, 4).float()
    torch.testing.assert_close(norm(x, whole), norm(x, y))
    halves = (whole + torch.eye(4)[2]) / 2
    torch.testing.assert_close(norm(x, halves), (norm(x, y) + norm(x, torch.tensor([2, 2]))) / 2)
