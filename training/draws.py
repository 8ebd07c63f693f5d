"""Which samples a step sees and what chance adds to them: functions of numbers alone, for any number of processes.

    rows = rows_of(step=7, count=len(index), batch=48, seed=0)        # sample numbers [48] of the whole step
    draws = Draws(seed=0, step=7, batch=48, places=range(rank, 48, world))
    draws.normal(4, 32, 32)                                            # [len(places), 4, 32, 32]

So a run that was stopped goes on as if it had not been, also on more or fewer processes: a step's rows and their noise
depend on (seed, step, place in the batch), never on who computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The samples' order in an epoch: a permutation of 0..count - 1."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def rows_of(step: int, count: int, batch: int, seed: int) -> list[int]:
    """The samples of a step [batch]: the next ones of endless epochs, in each of which every sample comes once."""
    first = step * batch
    return [int(order(seed, at // count, count)[at % count]) for at in range(first, first + batch)]


def generator_for(*parts: int) -> torch.Generator:
    """A generator whose state depends on all parts alone."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


class Draws:
    """The random numbers of some rows of a step's batch. Everyone who has a part of it must ask in the same order.

    places: which rows of the whole batch these are.
    """

    def __init__(self, seed: int, step: int, batch: int, places: Sequence[int]) -> None:
        self.batch, self.places = batch, list(places)
        self._whole = generator_for(seed, step)
        self._rows = [generator_for(seed, step, place + 1) for place in self.places]

    def uniform(self) -> Tensor:
        """[n] in [0, 1)."""
        return torch.rand(self.batch, generator=self._whole)[self.places]

    def spread(self) -> Tensor:
        """[n] in [0, 1), of which the whole batch has one in every batch-th: less noise than `uniform`."""
        order = torch.randperm(self.batch, generator=self._whole)
        return ((order + torch.rand(self.batch, generator=self._whole)) / self.batch)[self.places]

    def integers(self, high: int) -> Tensor:
        """[n] of 0..high - 1."""
        return torch.randint(high, (self.batch,), generator=self._whole)[self.places]

    def one(self, high: int) -> int:
        """Of 0..high - 1, the same for the whole batch."""
        return int(torch.randint(high, (), generator=self._whole))

    def normal(self, *shape: int) -> Tensor:
        """[n, *shape], standard normal: every row has a generator of its own, so that nobody draws for others."""
        return torch.stack([torch.randn(shape, generator=row) for row in self._rows])
