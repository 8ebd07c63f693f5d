"""Sends requests at random times, and measures how long each waits with in-flight and with static batching.

    requests = mixed_requests(pipeline, 40, seed=0)
    rate = 0.7 * capacity(pipeline, requests[:16])
    compare(pipeline, requests, arrival_times(len(requests), rate, seed=0), WallClock())

In-flight: a request takes a slot at the next step and leaves when it is done. Static: the waiting requests, up to the
batch size, run as a batch. The batch ends with its longest member, and then the next one begins. All ways get the same
requests at the same times on the same engines. Static batching runs in two forms:

    static            finished rows stop, which only a loop like ours can do
    static, padded    all rows run for the longest member's steps, as in a batch of fixed shape
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from ..runtime.pipeline import HanDiffuser
from ..runtime.requests import Request
from .measure import PROMPTS, finish, make_requests

LOAD_STEPS = (5, 50)  # of a request: any number from 5 to 50, all as likely
GUIDANCE = (1.0, 1.5, 2.0, 4.0)
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}


# Student's t for 95 % of 2, 3, 4 ... samples. The last holds for more.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


class Clock(Protocol):
    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class WallClock:
    """Real time."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class CpuClock:
    """The CPU seconds of this process, for one thread on a busy machine. Waiting takes no time."""

    def __init__(self) -> None:
        self.skipped = 0.0

    def now(self) -> float:
        return time.process_time() + self.skipped

    def sleep(self, seconds: float) -> None:
        self.skipped += seconds


def mixed_requests(
    pipeline: HanDiffuser, count: int, seed: int = 0, solver: str | None = None, steps: tuple[int, int] = LOAD_STEPS
) -> list[Request]:
    """`count` requests with steps and guidance drawn at random, the same for the same seed."""
    random = np.random.default_rng(seed)
    lengths = random.integers(steps[0], steps[1], size=count, endpoint=True)
    guidance = random.choice(GUIDANCE, size=count)
    requests: list[Request] = []
    for i in range(count):
        settings = {"steps": int(lengths[i]), "guidance": float(guidance[i]), "solver": solver}
        prompt = PROMPTS[i % len(PROMPTS)]
        requests += make_requests(pipeline, 1, i, prompt=prompt, **settings)
    return requests


def arrival_times(count: int, rate: float, seed: int = 0) -> list[float]:
    """Seconds of `count` arrivals of a Poisson process with `rate` arrivals a second, from 0 on."""
    gaps = np.random.default_rng([seed, 1]).exponential(1 / rate, size=count)
    return (np.cumsum(gaps) - gaps[0]).tolist()


def capacity(pipeline: HanDiffuser, requests: Sequence[Request], clock: Clock) -> float:
    """In-flight pictures a second with all requests at once, after one short run to warm up."""
    finish(list(pipeline.run([replace(requests[0], steps=2)])))
    start = clock.now()
    finish(list(pipeline.run(list(requests))))
    return len(requests) / (clock.now() - start)


def in_flight(
    pipeline: HanDiffuser, requests: Sequence[Request], arrivals: Sequence[float], clock: Clock
) -> dict[str, float]:
    """Id -> when its picture was there, in seconds after the first arrival."""
    done: dict[str, float] = {}
    start = clock.now()
    handed = 0

    def source() -> Iterator[Request | None]:
        nonlocal handed
        for request, at in zip(requests, arrivals, strict=True):
            while (wait := at - (clock.now() - start)) > 0:
                if handed > len(done):
                    yield None  # others are in flight and go on
                else:
                    clock.sleep(wait)
                    break  # a clock may stop a rounding error before the time
            handed += 1
            yield request

    for picture in pipeline.run(source()):
        done[finish([picture])[0].id] = clock.now() - start
    return done


def static(
    pipeline: HanDiffuser, requests: Sequence[Request], arrivals: Sequence[float], clock: Clock, padded: bool = False
) -> dict[str, float]:
    """The same for static batches. padded: each member runs for the longest one's steps."""
    done: dict[str, float] = {}
    start = clock.now()
    position = 0
    while position < len(requests):
        if (wait := arrivals[position] - (clock.now() - start)) > 0:
            clock.sleep(wait)
        now, batch = clock.now() - start, [requests[position]]
        position += 1
        while position < len(requests) and len(batch) < pipeline.batch_size and arrivals[position] <= now:
            batch.append(requests[position])
            position += 1
        if padded:
            longest = max(request.steps or 0 for request in batch)
            batch = [replace(request, steps=longest) for request in batch]
        pictures = finish(list(pipeline.run(batch)))
        done.update(dict.fromkeys([picture.id for picture in pictures], clock.now() - start))
    return done


WAYS: dict[str, Callable[..., dict[str, float]]] = {
    "in-flight": in_flight,
    "static": static,
    "static, padded": partial(static, padded=True),
}


def compare(
    pipeline: HanDiffuser,
    requests: Sequence[Request],
    arrivals: Sequence[float],
    clock: Clock,
    on_way: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """Yields a row for each way, as it is done: {"name", "latency", "pictures_per_second", "samples"}."""
    for name, way in WAYS.items():
        on_way(name)
        cpu = time.process_time()
        done = way(pipeline, requests, arrivals, clock)
        yield row(name, requests, arrivals, done) | {"cpu_seconds": time.process_time() - cpu}


def over_runs(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of several runs, each a list of rows of the same ways: a row for each way, with a mean and the half width of its
    95 % interval (Student's t; None for one run) for p50, p95, pictures a second, and in-flight's p95 to this way's."""
    out = []
    for rows in zip(*runs, strict=True):
        figures = {
            "p50": [row["latency"]["p50"] for row in rows],
            "p95": [row["latency"]["p95"] for row in rows],
            "pictures_per_second": [row["pictures_per_second"] for row in rows],
            "p95_ratio": [
                run[0]["latency"]["p95"] / row["latency"]["p95"] for run, row in zip(runs, rows, strict=True)
            ],
        }
        out.append(
            {"name": rows[0]["name"], "runs": len(rows)} | {key: interval(found) for key, found in figures.items()}
        )
    return out


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and half of the 95 % interval in which it lies."""
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return {"mean": mean, "half": None}
    t = T95[min(count - 2, len(T95) - 1)]
    return {"mean": mean, "half": float(t * np.std(values, ddof=1) / np.sqrt(count))}


def row(name: str, requests: Sequence[Request], arrivals: Sequence[float], done: dict[str, float]) -> dict[str, Any]:
    """Latencies from arrival to picture, in seconds, in the order of arrival; throughput until the last is done."""
    waits = [done[str(request.id)] - at for request, at in zip(requests, arrivals, strict=True)]
    figures = {key: float(np.quantile(waits, at, method="inverted_cdf")) for key, at in PERCENTILES.items()}
    return {
        "name": name,
        "latency": figures | {"mean": float(np.mean(waits))},
        "pictures_per_second": len(done) / max(done.values()),
        "samples": waits,
    }
