"""Arrivals, and who waits for whom, on a clock and a pipeline that are not real."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest
from handiffuser import HanDiffuser, Picture, Request
from handiffuser.benchmarks import load


class FakeClock:
    def __init__(self) -> None:
        self.time = 100.0
        self.slept = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.time += seconds
        self.slept += seconds


@dataclass
class FakePipeline:
    """A step of any number of rows takes a second, and nothing else takes time."""

    clock: FakeClock
    batch_size: int = 2

    def run(self, requests: Iterable[Request | None]):
        source, left, more = iter(requests), {}, True
        while more or left:
            while more and len(left) < self.batch_size:
                request = next(source, ...)
                if request is ...:
                    more = False
                elif request is None:
                    break
                else:
                    left[request] = request.steps
            if left:
                self.clock.time += 1
            for request in list(left):
                left[request] -= 1
                if not left[request]:
                    del left[request]
                    yield Picture(request.id, request, np.zeros(0), {}, 0.0)


def requests(*steps: int) -> list[Request]:
    return [Request("a fist", id=f"r{i}", seed=i, steps=n) for i, n in enumerate(steps)]


def test_arrivals_are_poisson():
    times = load.arrival_times(20000, rate=4.0, seed=1)
    gaps = np.diff(times)
    assert times[0] == 0 and (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.03) and gaps.std() == pytest.approx(1 / 4, rel=0.03)
    assert times == load.arrival_times(20000, rate=4.0, seed=1)
    assert times[:10] != load.arrival_times(10, rate=4.0, seed=2)


def test_in_flight_requests_do_not_wait_for_the_longest():
    clock = FakeClock()
    # Two slots. r0 takes long; r1 and r2 share the other slot, r3 comes when nothing is left.
    done = load.in_flight(FakePipeline(clock), requests(6, 2, 1, 3), [0, 0.5, 1.5, 50], clock)
    assert done == {"r0": 6, "r1": 3, "r2": 4, "r3": 53}
    assert clock.slept == pytest.approx(44)


def test_static_batches_wait_for_their_longest():
    clock = FakeClock()
    # r0 alone, because nothing else was there; then r1 and r2; r3 by itself.
    done = load.static(FakePipeline(clock), requests(6, 2, 5, 3), [0, 0.5, 1.5, 2], clock)
    assert done == {"r0": 6, "r1": 11, "r2": 11, "r3": 14}


def test_padded_batches_run_all_rows_to_the_end():
    clock, seen = FakeClock(), []

    class Watched(FakePipeline):
        def run(self, batch):
            batch = list(batch)
            seen.append([request.steps for request in batch])
            return super().run(batch)

    load.static(Watched(clock), requests(6, 2, 5), [0, 0.5, 1.5], clock, padded=True)
    assert seen == [[6], [5, 5]]


def test_the_same_work_comes_in_at_the_same_times():
    clock = FakeClock()
    some = requests(*[1 + i % 7 for i in range(30)])
    arrivals = load.arrival_times(30, rate=0.3, seed=0)
    rows = {row["name"]: row for row in load.compare(FakePipeline(clock), some, arrivals, clock)}
    assert list(rows) == ["in-flight", "static", "static, padded"]
    for row in rows.values():
        assert len(row["samples"]) == 30 and min(row["samples"]) >= 1 and row["latency"]["max"] == max(row["samples"])
        assert row["pictures_per_second"] > 0
    assert rows["in-flight"]["latency"]["p95"] < rows["static"]["latency"]["p95"]  # by logic, not by speed


def test_the_clock_of_cpu_seconds_skips_waiting():
    clock = load.CpuClock()
    start = clock.now()
    clock.sleep(1000)
    assert 1000 <= clock.now() - start < 1010


def test_the_loop_takes_requests_as_they_come(tmp_path):
    """The real loop: late requests give the pictures they would have given alone."""
    pipeline = HanDiffuser.load("demo", device="cpu", threads=1, batch_size=2)
    some = load.mixed_requests(pipeline, 4, seed=3, steps=(1, 3))
    assert len({request.id for request in some}) == 4 and {1, 2, 3} >= {request.steps for request in some}
    clock = load.CpuClock()
    done = load.in_flight(pipeline, some, [0, 0.01, 0.02, 1e4], clock)
    assert set(done) == {request.id for request in some} and done[some[-1].id] > 1e4
    assert load.capacity(pipeline, some[:2], clock) > 0


def test_several_runs_give_means_and_intervals():
    def run(p95: float) -> list[dict]:
        return [
            {"name": name, "latency": {"p50": 1.0, "p95": p95 * factor}, "pictures_per_second": 2.0}
            for name, factor in (("in-flight", 1), ("static", 2))
        ]

    first, second = load.over_runs([run(1.0), run(2.0), run(3.0)])
    assert (first["name"], second["name"], first["runs"]) == ("in-flight", "static", 3)
    assert first["p95"] == {"mean": 2.0, "half": pytest.approx(4.30 / 3**0.5)}
    assert first["p50"] == {"mean": 1.0, "half": 0.0}
    assert second["p95_ratio"] == {"mean": 0.5, "half": 0.0}
    assert load.interval([3.0]) == {"mean": 3.0, "half": None}
