"""The queue: each owner's oldest item first, and a fair share for every owner.

    queue = FairQueue(places=64)
    queue.put("alice", steps, ticket)
    queue.pop()

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): an item of `cost` steps starts, in virtual time, when its
owner's last item ends, but not before the item that is being served. The item with the earliest start is next. The
items of a single owner leave in the order of arrival. With two owners, a thousand items of one delay the first item of
the other by one item. Owners share the places as well: when the queue is full, the owner with the most places loses its
newest item to an owner with fewer.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class FairQueue(Generic[T]):
    """Holds `places` items. The caller checks `room` before it puts one in, and may call `make_room`."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.cost = 0  # steps of all items
        self._now = 0.0  # virtual time: the start of the item that was served last
        self._ends: dict[str, float] = {}  # owner -> the virtual end of its last item
        self._heap: list[tuple[float, int, T]] = []
        self._waiting: dict[T, tuple[float, int, int, str]] = {}  # item -> start, number, cost, owner
        self._count = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[T]:
        return iter(self._waiting)

    @property
    def room(self) -> int:
        return self.places - len(self._waiting)

    def put(self, owner: str, cost: int, item: T) -> None:
        start = max(self._now, self._ends.get(owner, 0.0))
        self._ends[owner] = start + cost
        self._count += 1
        self._add(item, start, self._count, cost, owner)
        if len(self._ends) > 2 * self.places + 64:  # owners that have had their share count as new ones
            self._ends = {name: end for name, end in self._ends.items() if end > self._now}

    def make_room(self, owner: str, wanted: int) -> list[T]:
        """Takes out the newest items of the owners with the most places, so that `owner` can put in `wanted` items.

        Returns the items that it took out; none if no owner has more places than `owner` would have afterwards.
        """
        needed = wanted - self.room
        has = Counter(owner for *_, owner in self._waiting.values())
        mine, leave = has[owner] + wanted, Counter[str]()
        for _ in range(needed):
            most = max(has, key=lambda name: has[name], default=owner)
            if has[most] <= mine:
                return []
            has[most] -= 1
            leave[most] += 1
        gone = []
        for name, count in leave.items():
            theirs = [
                (start, number, item) for item, (start, number, _, whose) in self._waiting.items() if whose == name
            ]
            gone += [item for *_, item in sorted(theirs, key=lambda entry: entry[:2])[-count:]]
        for item in gone:
            self.remove(item)
        return gone

    def put_back(self, owner: str, cost: int, item: T) -> None:
        """Puts an item that was popped in front of all others: its worker ended, through no fault of the item."""
        first = min((start for start, *_ in self._waiting.values()), default=self._now)
        self._count += 1
        self._add(item, min(first, self._now) - 1, self._count, cost, owner)

    def pop(self) -> T | None:
        """The next item; None if the queue is empty."""
        while self._heap:
            start, number, item = heapq.heappop(self._heap)
            if self._number(item) == number:
                self._now = max(self._now, start)
                self._take_out(item)
                return item
        return None

    def remove(self, item: T) -> bool:
        """Takes an item out, which then does not count as its owner's share. Returns whether it was in the queue."""
        if item not in self._waiting:
            return False
        cost, owner = self._take_out(item)
        if owner in self._ends:
            self._ends[owner] -= cost
        return True

    def _take_out(self, item: T) -> tuple[int, str]:
        _, _, cost, owner = self._waiting.pop(item)
        self.cost -= cost
        if len(self._heap) > 2 * len(self._waiting) + 64:  # removed items are still in the heap
            self._heap = [entry for entry in self._heap if self._number(entry[2]) == entry[1]]
            heapq.heapify(self._heap)
        return cost, owner

    def _number(self, item: T) -> int:
        return self._waiting[item][1] if item in self._waiting else -1

    def _add(self, item: T, start: float, number: int, cost: int, owner: str) -> None:
        self._waiting[item] = (start, number, cost, owner)
        self.cost += cost
        heapq.heappush(self._heap, (start, number, item))
