"""A step's samples and random numbers: functions of numbers alone, the same for any number of processes.

    rows = rows_of(step=7, count=len(index), batch=48, seed=0)        # sample numbers [48] of the whole step
    draws = Draws(seed=0, step=7, batch=48, places=range(rank, 48, world))
    draws.normal(4, 32, 32)                                            # [len(places), 4, 32, 32]

So a run that was stopped goes on unchanged, also on more or fewer processes: a step's rows and their noise depend on
(seed, step, place in the batch), never on the process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The samples' order in an epoch: a permutation of 0..count - 1."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def rows_of(step: int, count: int, batch: int, seed: int) -> list[int]:
    """The samples of a step [batch]: the next ones of endless epochs; every sample comes once an epoch."""
    first = step * batch
    return [int(order(seed, at // count, count)[at % count]) for at in range(first, first + batch)]


def generator_for(*parts: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator whose state depends on the parts alone."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return torch.Generator(device).manual_seed(seed)


class Draws:
    """The random numbers of some rows of a step's batch. All processes of a batch must draw in the same order.

    places: the rows of the whole batch. device: draws the numbers; a GPU draws others than a CPU.
    """

    def __init__(
        self, seed: int, step: int, batch: int, places: Sequence[int], device: str | torch.device = "cpu"
    ) -> None:
        self.batch, self.places, self.device = batch, list(places), torch.device(device)
        self._host = generator_for(seed, step)
        on_host = self.device.type == "cpu"
        self._whole = self._host if on_host else generator_for(seed, step, device=self.device)
        self._rows = [generator_for(seed, step, place + 1) for place in self.places] if on_host else []

    def _of_all(self, draw: Callable[..., Tensor], *size: Any) -> Tensor:
        """These rows of a draw for the whole batch."""
        whole = draw(*size, generator=self._whole, device=self.device)
        return whole if self.places == list(range(self.batch)) else whole[self.places]

    def uniform(self) -> Tensor:
        """[n] in [0, 1)."""
        return self._of_all(torch.rand, self.batch)

    def spread(self) -> Tensor:
        """[n] in [0, 1), one in every batch-th part over the whole batch: less noise than `uniform`."""
        return (self._of_all(torch.randperm, self.batch) + self._of_all(torch.rand, self.batch)) / self.batch

    def integers(self, high: int) -> Tensor:
        """[n] of 0..high - 1."""
        return self._of_all(torch.randint, high, (self.batch,))

    def one(self, high: int) -> int:
        """A number of 0..high - 1, the same for the whole batch."""
        return int(torch.randint(high, (), generator=self._host))

    def normal(self, *shape: int) -> Tensor:
        """[n, *shape], standard normal. On a CPU every row has its own generator, so that a process draws only its
        rows; a GPU would start a kernel for each row."""
        if not self._rows:
            return self._of_all(torch.randn, self.batch, *shape)
        return torch.stack([torch.randn(shape, generator=row) for row in self._rows])


def spread_over(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of some rows, from all over them: mirror images come last."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(int)]
