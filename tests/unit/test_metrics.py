"""The metrics' formulas against torch-fidelity, the prdc package and closed forms, on the same features."""

import math

import pytest
import torch
from prdc import compute_prdc
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from distgan.evaluation import scores as metrics


def features(seed, *, num=700, dim=24, shift=0.0):
    """Correlated, skewed, all positive: more like an extractor's than white noise is."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
    return (torch.randn(num, dim, generator=rng) @ mixing + shift).relu()


def moments(of, *, batch=64):
    found = metrics.Moments(of.shape[1])
    for part in of.split(batch):
        found.add(part)
    return found


def test_frechet_agrees_with_torch_fidelity():
    real, fake = features(1), features(2, num=500, shift=0.4)
    reference = fid_statistics_to_metric(
        *(fid_features_to_statistics(one.double()) for one in (real, fake)), verbose=False
    )["frechet_inception_distance"]
    assert metrics.frechet(moments(real), moments(fake)) == pytest.approx(reference, rel=1e-6)
    assert reference > 1


def test_frechet_of_two_gaussians_is_the_closed_form():
    """Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2. Moments are set exactly, not sampled."""
    s1, s2 = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 1.0, 0.0]).double()
    shift = torch.tensor([1.0, -2.0, 0.5]).double()

    def gaussian(mean, deviation):
        found = metrics.Moments(3)
        # Two points per axis, with the sample covariance diag(deviation^2).
        spread = torch.diag(deviation) * math.sqrt(5 / 2)
        found.add(torch.cat([spread, -spread]) + mean)
        return found

    distance = metrics.frechet(gaussian(torch.zeros(3), s1), gaussian(shift, s2))
    assert distance == pytest.approx(float(shift.square().sum() + (s1 - s2).square().sum()), rel=1e-12)


def test_frechet_of_a_set_to_itself_is_zero_also_where_there_are_fewer_samples_than_dimensions():
    few = features(1, num=10)
    assert metrics.frechet(moments(few), moments(few)) == pytest.approx(0, abs=1e-5)


def test_inception_score_agrees_with_torch_fidelity():
    logits = 3 * features(3, num=703, dim=10)  # splits of 70 and 71
    found = metrics.ClassSums(10, num=703)
    for index in torch.arange(703).split(64):
        found.add(logits[index], index)
    reference = isc_features_to_metric(logits, splits=10, shuffle=False)
    assert found.score() == pytest.approx(tuple(reference.values()), rel=1e-9)
    assert reference["inception_score_mean"] > 1.5


@pytest.mark.parametrize("num", [300, 1000])
def test_kid_agrees_with_torch_fidelity(num):
    real, fake = features(1, num=num), features(2, num=num, shift=0.4)
    reference = kid_features_to_metric(real.double(), fake.double(), kid_subsets=1, kid_subset_size=num)
    assert metrics.kernel_distance(real, fake)[0] == pytest.approx(
        reference["kernel_inception_distance_mean"], rel=1e-9
    )


def test_kid_over_blocks_is_unbiased_and_knows_its_error():
    """Equal distributions: zero within a few standard errors; a shift is many away."""
    real = features(1, num=20_000)
    mean, error = metrics.kernel_distance(real, features(2, num=20_000))
    assert abs(mean) < 4 * error
    mean, error = metrics.kernel_distance(real, features(2, num=20_000, shift=1.0))
    assert mean > 10 * error


@pytest.mark.parametrize("k", [3, 5])
def test_prdc_agrees_with_its_authors(k):
    real, fake = features(1, num=1300), 1.1 * features(2, num=1100, shift=1.5)
    reference = compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=k)
    assert metrics.prdc(real, fake, k=k) == pytest.approx(reference, rel=1e-9)
    assert all(0.05 < value < 0.999 for value in reference.values()), reference


def test_sums_of_several_processes_are_those_of_one():
    whole = features(4)
    parts = [moments(part) for part in whole.split([400, 300])]
    all_reduce_sums(*parts)
    assert torch.allclose(parts[0].covariance, moments(whole).covariance, rtol=1e-12)
    sums = [metrics.ClassSums(24, num=700) for _ in range(3)]
    sums[0].add(whole, torch.arange(700))
    for part, index in zip(sums[1:], torch.arange(700).split([400, 300]), strict=True):
        part.add(whole[index], index)
    all_reduce_sums(*sums[1:])
    assert sums[1].score() == pytest.approx(sums[0].score(), rel=1e-12)


def all_reduce_sums(one, other):
    for name, tensor in one.sums.items():
        tensor += other.sums[name]


def test_spread_compares_the_distances_of_pairs():
    real, fake = features(1), 0.3 * features(2)
    apart = [torch.pdist(of.double()).square().mean().sqrt() for of in (real, fake)]
    assert metrics.spread(moments(real), moments(fake)) == pytest.approx(float(apart[1] / apart[0]), rel=1e-9)
