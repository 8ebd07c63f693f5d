"""The simulation against what is known on paper."""

from __future__ import annotations

import numpy as np
import pytest
from simulate import WAYS, arrivals, batch_job, capacity, saturated, serve, step_times


def test_one_gpu_is_an_m_d_1_queue():
    """Pollaczek and Khinchine: the mean wait of fixed service s at load r is r s / (2 (1 - r))."""
    steps, step = [10] * 60_000, step_times("1:0.1")
    times = arrivals(len(steps), 0.6, bursty=False, seed=3)
    waits = serve("one", times.tolist(), steps, 1, 8, step)
    assert waits.mean() == pytest.approx(1 + 0.6 / (2 * 0.4), rel=0.05)


def test_alone_a_request_takes_its_steps_however_it_is_served():
    step = step_times("1:0.02,8:0.05")
    for way in WAYS:
        waits = serve(way, [0.0, 100.0], [10, 30], 2, 8, step)
        np.testing.assert_allclose(waits, [0.2, 0.6])


def test_in_flight_is_never_behind_static_batches():
    step, random = step_times("1:0.018,8:0.06"), np.random.default_rng(0)
    lengths = random.integers(10, 40, 3000).tolist()
    for bursty in (False, True):
        times = arrivals(3000, 0.7 * capacity(2, 8, 25, step), bursty).tolist()
        ours, static = (serve(way, times, lengths, 2, 8, step) for way in WAYS[:2])
        assert np.quantile(ours, 0.95) < np.quantile(static, 0.95) and (ours > 0).all()


def test_what_each_way_can_do_at_most():
    """In-flight and one at a time as on paper; static batches take as long as their longest."""
    step, random = step_times("1:0.0168,8:0.0667"), np.random.default_rng(1)
    lengths = random.integers(10, 40, 4000, endpoint=True)
    at_most = {way: saturated(way, lengths.tolist(), 2, 8, step) for way in WAYS}
    assert at_most["in-flight"] == pytest.approx(capacity(2, 8, lengths.mean(), step), rel=0.03)
    assert at_most["one"] == pytest.approx(2 / (lengths.mean() * 0.0168), rel=0.03)
    longest = lengths.reshape(-1, 8).max(1).mean()
    assert at_most["static"] == pytest.approx(2 * 8 / (longest * 0.0667), rel=0.05)


@pytest.mark.parametrize("bursty", [False, True])
def test_arrivals_keep_their_rate(bursty):
    times = arrivals(40_000, 20, bursty)
    assert (np.diff(times) >= 0).all() and len(times) / times[-1] == pytest.approx(20, rel=0.03)
    if bursty:
        assert ((times % 60) < 10).mean() == pytest.approx(0.5, abs=0.02)


def test_step_times_between_and_beyond():
    step = step_times("1:0.02,4:0.05")
    assert step(1) == 0.02 and step(2) == pytest.approx(0.03) and step(8) == pytest.approx(0.09)
    job = batch_job(1000, 2, 4, 10, step, 1e6, 1000)
    assert job["pictures_per_second"] == pytest.approx(16) and job["megabytes_per_second"] == pytest.approx(16)
