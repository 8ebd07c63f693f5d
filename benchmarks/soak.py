"""Runs many requests through one process: every id must come exactly once, and memory must not grow.

soak(HanDiffuser.load("demo", batch_size=8), count=2000, steps=2)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..errors import EngineError
from ..runtime.pipeline import HanDiffuser
from ..runtime.requests import Request
from .measure import PROMPTS, finish, memory

SAMPLES = 200  # of the memory, over the whole run
ENOUGH = 100  # pictures before the slope is reported
SETTLE = 0.2  # share of the run whose memory does not count: allocators fill their pools first


def soak(
    pipeline: HanDiffuser,
    count: int,
    steps: int = 2,
    on_picture: Callable[[int], None] = lambda _: None,
    result: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs `count` requests of `steps` steps, of mixed guidance and solvers, and sums up.

    {"requests", "pictures", "unique", "lost", "rss_mb": [[pictures, MB], ...], "mb_per_1000": slope by least squares}.
    result: a dict that is filled on the way, so that an interruption keeps it. Raises EngineError for an unknown id.
    """
    result = {} if result is None else result
    result.update(requests=count, steps=steps, pictures=0, unique=0, rss_mb=[])
    seen: set[str] = set()
    every = max(1, count // SAMPLES)
    for picture in pipeline.run(_requests(pipeline, count, steps)):
        done = finish([picture])[0]
        number = int(done.id.removeprefix("soak-"))
        if done.id in seen or number >= count or done.request.seed != number:
            raise EngineError(
                f"Each requested id must come once, got {done.id} twice or without a request. Please report this."
            )
        seen.add(done.id)
        result["pictures"] += 1
        result["unique"] = len(seen)
        if result["pictures"] % every == 0:
            result["rss_mb"].append([result["pictures"], memory()["rss_mb"]])
            result["mb_per_1000"] = slope(result["rss_mb"]) if result["pictures"] >= ENOUGH else None
        on_picture(result["pictures"])
    result["lost"] = count - len(seen)
    return result


def slope(points: list[list[float]]) -> float | None:
    """Megabytes per 1000 requests, of [requests, megabytes], without the first fifth; None for less than 3 points."""
    kept = points[int(SETTLE * len(points)) :]
    if len(kept) < 3:
        return None
    x, y = np.array(kept, float).T
    return float(np.polyfit(x, y, 1)[0] * 1000)


def _requests(pipeline: HanDiffuser, count: int, steps: int) -> Iterator[Request]:
    """Prepares requests one at a time, so that their list does not grow."""
    solvers = ("ddim", "euler", "dpm++2m")
    for i in range(count):
        request = Request(
            PROMPTS[i % len(PROMPTS)],
            id=f"soak-{i}",
            seed=i,
            steps=steps + i % 2,
            solver=solvers[i % len(solvers)],
            guidance=1.0 + i % 4,
        )
        requests, refused = pipeline.prepare([request])
        for problem in refused:
            raise EngineError(problem.sentence)
        yield requests[0]
