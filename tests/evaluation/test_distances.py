"""FID and KID beside torchmetrics and a plain float64 formula; intervals hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from handiffuser.evaluation import distances
from handiffuser.evaluation.distances import (
    Kernel,
    frechet,
    frechet_draws,
    gap,
    interval,
    kernel,
    mean,
    resampled,
    wilson,
)


def features(count: int, width: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(9).normal(size=(width, width)) / np.sqrt(width)
    return (np.maximum(rng.normal(size=(count, width)) @ mix + shift, 0)).astype(np.float32)


def by_eigenvalues(a: np.ndarray, b: np.ndarray) -> float:
    """The formula as it stands in the paper."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).real.sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s1) + np.trace(s2) - 2 * roots)


@pytest.mark.parametrize(("n", "m", "width"), [(300, 200, 24), (40, 60, 96), (50, 50, 50)])
def test_both_agree_with_torchmetrics(n, m, width):
    fid = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance
    kid = pytest.importorskip("torchmetrics.image.kid")

    class Same(torch.nn.Module):
        num_features = width

        def forward(self, x):
            return x

    a, b = features(n, width, 0.2), features(m, width, seed=1)
    metric = fid(feature=Same()).set_dtype(torch.float64)
    metric.update(torch.from_numpy(a).double(), real=True)
    metric.update(torch.from_numpy(b).double(), real=False)
    assert frechet(a, b) == pytest.approx(float(metric.compute()), abs=1e-3)
    least = min(n, m)
    theirs = kid.poly_mmd(torch.from_numpy(a[:least]).double(), torch.from_numpy(b[:least]).double())
    assert kernel(a[:least], b[:least]) == pytest.approx(float(theirs), abs=1e-3 * abs(float(theirs)) + 1e-9)


@pytest.mark.parametrize(("n", "m", "width"), [(300, 200, 24), (30, 45, 64)])
def test_frechet_is_the_formula(n, m, width):
    a, b = features(n, width, 0.2), features(m, width, seed=1)
    assert frechet(a, b) == pytest.approx(by_eigenvalues(a, b), abs=1e-3)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_kernel_is_its_sum_and_unbiased():
    a, b = features(7, 5, 0.3).astype(float), features(9, 5, seed=1).astype(float)

    def k(x, y):
        return (x @ y / 5 + 1) ** 3

    within = [np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    across = np.mean([k(x, y) for x in a for y in b])
    assert kernel(a, b) == pytest.approx(sum(within) - 2 * across)
    values = [kernel(features(12, 6, seed=2 * i), features(12, 6, seed=2 * i + 1)) for i in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300), "of the same pictures it is 0 on the average"


def test_pairs_are_drawn_together():
    a = features(60, 12)
    b = a + 0.01 * features(60, 12, seed=3)
    together = frechet_draws(a, b, 40, pairs=True)
    apart = frechet_draws(a, b, 40)
    assert together.std() < 0.2 * apart.std()
    own = list(range(60))
    assert abs(Kernel(a, b, own).value()) < 0.5 * abs(Kernel(a, b).value())
    assert Kernel(a, b, own).draws(50).shape == (50,)
    some = Kernel(a[:20], b, own[:20])
    assert not some.pairs and abs(some.value()) < abs(Kernel(a[:20], b).value())


def test_intervals_cover_the_truth():
    """Of 200 samples of clustered hands, some 95 % of the intervals hold the mean that they were drawn around."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        owners = np.repeat(np.arange(50), 2)
        values = 0.7 + rng.normal(size=50)[owners] + 0.1 * rng.normal(size=100)
        found = mean(values, owners, resampled(rng, 50, 400))
        held += found["low"] <= 0.7 <= found["high"]
    assert 0.88 <= held / 200 <= 0.99


def test_an_interval_of_nothing():
    assert mean(np.array([]), np.array([], int), np.ones((3, 4))) is None
    assert interval(1.0, np.array([np.nan])) == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert distances.shares(np.array([1.0]), np.array([0]), np.array([[0.0, 2.0]])).tolist() != [1.0]


def test_shares_that_never_fail_are_not_certain():
    """8 of 8 beside 91 of 100: resampling alone would call that a difference."""
    eight, many = wilson(1.0, 8), wilson(0.91, 100)
    assert eight["low"] == pytest.approx(0.676, abs=1e-3) and eight["high"] == 1
    found = gap(eight, many)
    assert found["value"] == pytest.approx(0.09) and found["low"] < 0 < found["high"]
    ones = mean(np.ones(8), np.arange(8), resampled(np.random.default_rng(0), 8, 10))
    assert ones["low"] == eight["low"]


def test_gaps_cover_the_truth():
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        a, b = rng.binomial(12, 0.95) / 12, rng.binomial(100, 0.9) / 100
        found = gap(wilson(a, 12), wilson(b, 100))
        held += found["low"] <= 0.05 <= found["high"]
    assert held / 400 >= 0.92
