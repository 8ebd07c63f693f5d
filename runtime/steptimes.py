"""How many of the jobs in flight a step should advance: what measured step times say.

Advancing all of them is best where a larger batch costs less than its rows would alone, as on a GPU. On a processor a
row often costs the same in any batch: eight rows at once then make everyone wait for all eight, and finish no sooner
than one after the other. And an engine of a fixed batch size costs the same for five rows as for its eight: padding
up competes with running four of them and holding the fifth back.

A step without guidance runs one branch of the network instead of two, but only where all rows of the batch are without:
beside a guided row, one without costs twice what it needs. So what a step gets done is counted in branches that are of
use.

    times = StepTimes()
    rows = times.choose(active=5)     # the oldest of the jobs in flight
    times.add(rows, seconds)          # what a step of that many took

Every step does useful work, so trying a size out costs nothing but a little speed. Sizes are tried again after 50, 100,
200 ... steps: something else may have used the processor just then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Steps of a size before it is judged by the shortest: the first pays for memory and kernels.
TRIALS = 3
# How many times as fast per row a larger batch must be: a smaller one has its pictures sooner and takes less memory.
PAYS = 1.05
AGAIN = 50  # steps after which each size is tried once more, and again after twice as many


class StepTimes:
    """Measured seconds of one step graph, by batch size; kept over runs.

    buckets: sizes that engines were built for, or None where any will do. only: sizes that are worth trying, 1 among
    them; others are left alone, because an engine would have to be compiled for them.
    """

    def __init__(self, buckets: Sequence[int] | None = None, only: Sequence[int] | None = None) -> None:
        self.buckets = sorted(buckets) if buckets is not None else None
        self.only = sorted({1, *only}) if only is not None else None
        self.best: dict[tuple[int, bool], float] = {}
        self._trials: dict[tuple[int, bool], int] = {}
        self._steps, self._again = 0, AGAIN

    def batch(self, rows: int) -> int:
        """The batch size that is computed for so many rows."""
        return next(size for size in self.buckets if size >= rows) if self.buckets else rows

    def choose(self, active: int, unguided: Sequence[bool] = ()) -> int:
        """Rows to advance, 1 <= rows <= active. unguided: of each job, the oldest first, whether its step is without
        guidance, which takes half the time where that is so of all; by default none is.

        From small to large as long as that pays. Of engines with fixed sizes only the next smaller and the next larger
        one are compared: others would be loaded for nothing but the question.
        """
        if self.buckets:
            below = max((size for size in self.buckets if size <= active), default=active)
            sizes = sorted({below, active})
        elif self.only:
            sizes = [size for size in self.only if size <= active]
        else:
            sizes = [2**power for power in range(active.bit_length()) if 2**power < active] + [active]
        self._steps += 1
        if self._steps >= self._again:
            self._again *= 2
            self._trials = dict.fromkeys(self._trials, TRIALS - 1)
        chosen, most = 0, 0.0
        for rows in sizes:
            unguided_rows = sum(unguided[:rows])
            key = (self.batch(rows), unguided_rows == rows)
            if len(sizes) > 1 and self._trials.get(key, 0) < TRIALS:
                self._trials[key] = self._trials.get(key, 0) + 1
                return rows
            # Branches a second; any number where a size has not been measured yet: a GPU is some steps behind.
            seconds = self.best.get(key)
            rate = (2 * rows - unguided_rows) / seconds if seconds else math.inf
            if chosen and max(rate, most) < math.inf and rate <= PAYS * most:
                break
            chosen, most = rows, rate
        return chosen

    def add(self, rows: int, seconds: float, alone: bool = False) -> None:
        """A step of so many rows took so long."""
        key = (self.batch(rows), alone)
        self.best[key] = min(seconds, self.best.get(key, seconds))
