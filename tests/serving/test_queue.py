"""The queue: oldest first, a fair share for everyone, nothing lost."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest
from handiffuser.serving.queue import FairQueue


def test_one_owner_is_served_in_the_order_of_arrival():
    queue = FairQueue(10)
    for n in range(10):
        queue.put("a", 1 + n % 3, n)
    assert queue.room == 0 and len(queue) == 10
    assert [queue.pop() for _ in range(10)] == list(range(10)) and queue.pop() is None


def test_a_thousand_requests_of_one_hold_another_up_by_one():
    queue = FairQueue(2000)
    for n in range(1000):
        queue.put("many", 20, ("many", n))
    assert [queue.pop() for _ in range(3)] == [("many", 0), ("many", 1), ("many", 2)]
    queue.put("few", 20, ("few", 0))
    queue.put("few", 20, ("few", 1))
    order = [queue.pop()[0] for _ in range(4)]
    assert order.count("few") == 2 and "few" in order[:2]


def test_shares_count_steps_not_requests():
    queue = FairQueue(1000)
    for n in range(300):
        queue.put("long", 40, ("long", n))
        queue.put("short", 10, ("short", n))
    served = Counter(queue.pop()[0] for _ in range(100))
    assert served["short"] == pytest.approx(80, abs=2)


def test_who_was_away_saves_nothing_up():
    queue = FairQueue(100)
    for n in range(20):
        queue.put("a", 1, ("a", n))
    for _ in range(20):
        queue.pop()
    for n in range(5):
        queue.put("a", 1, ("a", n))
        queue.put("b", 1, ("b", n))
    assert Counter(queue.pop()[0] for _ in range(4)) == {"a": 2, "b": 2}


def test_put_back_comes_first_and_in_order():
    queue = FairQueue(10)
    for n in range(4):
        queue.put("a", 5, n)
    first, second = queue.pop(), queue.pop()
    for item in (second, first):  # the youngest first, as a worker's are put back
        queue.put_back(item, 5)
    assert [queue.pop() for _ in range(4)] == [0, 1, 2, 3]


def test_nothing_is_lost_or_doubled():
    chance = random.Random(0)
    queue, waiting, taken, out = FairQueue(10**6), set(), deque(), []
    for n in range(20_000):
        action = chance.random()
        if action < 0.45:
            queue.put(chance.choice("abcde"), chance.randint(1, 50), n)
            waiting.add(n)
        elif action < 0.8:
            item = queue.pop()
            assert (item is None) == (not waiting)
            if item is not None:
                waiting.remove(item)
                taken.append(item)
        elif action < 0.9 and waiting:
            item = chance.choice(sorted(waiting))
            assert queue.remove(item) and not queue.remove(item)
            waiting.remove(item)
        elif taken:
            item = taken.popleft()
            queue.put_back(item, 3)
            waiting.add(item)
        assert len(queue) == len(waiting)
    while (item := queue.pop()) is not None:
        out.append(item)
    assert sorted(out) == sorted(waiting) and queue.cost == 0
