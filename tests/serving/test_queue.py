"""The queue: oldest first, a fair share for every owner, nothing lost."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest
from handiffuser.serving.queue import FairQueue


def test_one_owner_keeps_the_order_of_arrival():
    queue = FairQueue(10)
    for n in range(10):
        queue.put("a", 1 + n % 3, n)
    assert queue.room == 0 and len(queue) == 10
    assert [queue.pop() for _ in range(10)] == list(range(10)) and queue.pop() is None


def test_a_thousand_items_delay_another_owner_by_one():
    queue = FairQueue(2000)
    for n in range(1000):
        queue.put("many", 20, ("many", n))
    assert [queue.pop() for _ in range(3)] == [("many", 0), ("many", 1), ("many", 2)]
    queue.put("few", 20, ("few", 0))
    queue.put("few", 20, ("few", 1))
    order = [queue.pop()[0] for _ in range(4)]
    assert order.count("few") == 2 and "few" in order[:2]


def test_shares_count_steps_not_items():
    queue = FairQueue(1000)
    for n in range(300):
        queue.put("long", 40, ("long", n))
        queue.put("short", 10, ("short", n))
    served = Counter(queue.pop()[0] for _ in range(100))
    assert served["short"] == pytest.approx(80, abs=2)


def test_an_absent_owner_does_not_save_up_a_share():
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
    for item in (second, first):  # the newest first, as the dispatcher does
        queue.put_back("a", 5, item)
    assert [queue.pop() for _ in range(4)] == [0, 1, 2, 3]


def test_the_owner_with_most_places_loses_its_newest():
    queue = FairQueue(10)
    for n in range(10):
        queue.put("many", 1, ("many", n))
    assert queue.make_room("many", 1) == [] and len(queue) == 10
    assert queue.make_room("few", 2) == [("many", 8), ("many", 9)] and queue.room == 2
    for n in range(2):
        queue.put("few", 1, ("few", n))
    assert queue.make_room("few", 5) == [] and queue.room == 0  # "few" would have more than "many"
    assert queue.make_room("few", 3) == [("many", n) for n in (5, 6, 7)]
    for n in range(2, 5):
        queue.put("few", 1, ("few", n))
    assert queue.make_room("few", 1) == queue.make_room("many", 1) == []  # five each
    assert len(queue.make_room("third", 2)) == 2 and queue.make_room("third", 11) == []
    assert FairQueue(3).make_room("a", 4) == []


def test_an_item_that_was_put_back_is_not_the_newest():
    queue = FairQueue(3)
    for n in range(3):
        queue.put("a", 5, n)
    first = queue.pop()
    queue.put_back("a", 5, first)
    assert queue.make_room("b", 1) == [2]


def test_removed_items_do_not_count_as_a_share():
    """An owner that removes a hundred items gets the same share as another owner."""
    queue = FairQueue(500)
    for n in range(100):
        queue.put("a", 10, ("a", n))
    for n in range(100):
        assert queue.remove(("a", n))
    for n in range(100, 150):
        queue.put("a", 10, ("a", n))
        queue.put("b", 10, ("b", n))
    assert Counter(queue.pop()[0] for _ in range(20)) == {"a": 10, "b": 10}


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
            queue.put_back("a", 3, item)
            waiting.add(item)
        assert len(queue) == len(waiting)
    while (item := queue.pop()) is not None:
        out.append(item)
    assert sorted(out) == sorted(waiting) and queue.cost == 0
