"""How many jobs a step should advance, decided from measured step times.

On a GPU a large batch costs less than its rows one by one, so that advancing all jobs is best. On a processor a row
often costs the same in any batch: eight rows at once then make every request wait for all eight. An engine of a fixed
batch size costs the same for five rows as for its eight: the choice is between padding and holding the fifth row back.

A step without guidance runs one branch of the network instead of two, but only where no row of the batch has guidance.
Beside a guided row, an unguided one costs twice what it needs. So a step counts the branches that are of use.

    times = StepTimes()
    rows = times.choose(active=5)     # of the jobs in flight, the oldest
    times.add(rows, seconds)          # what a step of that many rows took

Every step does useful work, so trying a size out costs only a little speed. Sizes are tried again after 50, 100, 200
... steps: other programs may have used the processor during the first tries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Steps of a size before the shortest of them is its time: the first one loads memory and kernels.
TRIALS = 3
# A larger batch must be so many times as fast per row: a smaller one finishes its pictures sooner, in less memory.
PAYS = 1.05
RETRY_STEPS = 50  # each size is tried once more after so many steps, then after twice as many


class StepTimes:
    """Measured seconds of one step graph, by batch size; kept over runs.

    buckets: the batch sizes of engines, or None where engines take any size. only: sizes worth trying, 1 among them;
    any other would need an engine compiled for it.
    """

    def __init__(self, buckets: Sequence[int] | None = None, only: Sequence[int] | None = None) -> None:
        self.buckets = sorted(buckets) if buckets is not None else None
        self.only = sorted({1, *only}) if only is not None else None
        self.best: dict[tuple[int, bool], float] = {}
        self._trials: dict[tuple[int, bool], int] = {}
        self._steps, self._again = 0, RETRY_STEPS

    def batch(self, rows: int) -> int:
        """The batch size that an engine computes for so many rows."""
        return next(size for size in self.buckets if size >= rows) if self.buckets else rows

    def choose(self, active: int, unguided: Sequence[bool] = ()) -> int:
        """Rows to advance, 1 <= rows <= active. unguided: for each job, the oldest first, whether its step is without
        guidance; a batch of such steps takes half the time. By default all steps are guided.

        It goes from small to large as long as that pays. Of engines with fixed sizes it compares the next smaller and
        the next larger one alone: the comparison is not worth loading others.
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
            # Branches a second; infinite where a size has no measurement yet: a GPU is some steps behind.
            seconds = self.best.get(key)
            rate = (2 * rows - unguided_rows) / seconds if seconds else math.inf
            if chosen and max(rate, most) < math.inf and rate <= PAYS * most:
                break
            chosen, most = rows, rate
        return chosen

    def fastest(self) -> int:
        """The batch size that pays, by what was measured: of guided steps where there were any, 1 without any."""
        alone = all(alone for _, alone in self.best)
        chosen, least = 1, math.inf
        for batch, seconds in sorted((batch, seconds) for (batch, kind), seconds in self.best.items() if kind == alone):
            if seconds / batch * PAYS < least:
                chosen, least = batch, seconds / batch
        return chosen

    def expected(self, rows: int, alone: bool, unknown: float) -> float:
        """Seconds that a step of `rows` rows takes by its shortest measurement; `unknown` without one."""
        return self.best.get((self.batch(rows), alone), unknown)

    def add(self, rows: int, seconds: float, alone: bool = False) -> None:
        """Notes the seconds of a step of `rows` rows. alone: it ran the conditional branch alone."""
        key = (self.batch(rows), alone)
        self.best[key] = min(seconds, self.best.get(key, seconds))
