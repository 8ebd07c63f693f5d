"""How many jobs a step advances, with scripted step times."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from handiffuser.runtime.steptimes import RETRY_STEPS, TRIALS, StepTimes


def run(times: StepTimes, cost: Callable[[int], float], active: int, steps: int = 30, alone: bool = False) -> list[int]:
    """The sizes chosen over some steps; cost: batch size -> seconds."""
    chosen = []
    for _ in range(steps):
        rows = times.choose(active, [alone] * active)
        times.add(rows, cost(times.batch(rows)) * (0.5 if alone else 1), alone)
        chosen.append(rows)
    return chosen


def test_one_by_one_where_a_row_costs_the_same_in_any_batch():
    times = StepTimes()
    chosen = run(times, lambda batch: 0.04 * batch, 8)
    assert chosen == [1] * TRIALS + [2] * TRIALS + [1] * (30 - 2 * TRIALS)  # 4 and 8 are not even tried
    assert run(times, lambda batch: 0.04 * batch, 5, steps=3) == [1] * 3  # known already


def test_all_at_once_where_larger_batches_pay():
    times = StepTimes()
    assert run(times, lambda batch: 1 + 0.1 * batch, 7)[-1] == 7
    assert set(run(times, lambda batch: 1 + 0.1 * batch, 7, steps=5)) == {7}
    # Up to a knee: four rows fill the machine.
    assert run(StepTimes(), lambda batch: max(4, batch), 8)[-1] == 4


@pytest.mark.parametrize(
    ("seconds", "rows"),
    [({1: 1.0, 4: 2.0, 8: 4.0}, 4), ({1: 1.0, 4: 2.0, 8: 2.3}, 5)],  # 4 rows in 2.0 s against 5 in 4.0, or in 2.3
)
def test_padding_up_competes_with_holding_back(seconds, rows):
    times = StepTimes([8, 1, 4])
    chosen = run(times, seconds.__getitem__, 5)
    assert chosen[-1] == rows and 1 not in chosen
    assert run(times, seconds.__getitem__, 8, steps=4) == [8] * 4  # a size that there is needs no question
    assert run(times, seconds.__getitem__, 4, steps=4) == [4] * 4


def test_engines_larger_than_asked():
    times = StepTimes([4])
    assert run(times, lambda batch: 1.0, 3) == [3] * 30
    assert times.batch(3) == 4


def test_one_spike_decides_nothing():
    """Other processes make steps longer, never shorter."""
    times, spikes = StepTimes(), iter([9.0, 0.04, 0.04, 9.0, 0.08, 0.08] + [0.04] * 50)
    assert run(times, lambda batch: next(spikes), 8)[-1] == 1


def test_steps_without_guidance_have_times_of_their_own():
    times = StepTimes()
    run(times, lambda batch: 0.04 * batch, 4)
    assert run(times, lambda batch: 1 + 0.01 * batch, 4, alone=True)[-1] == 4
    assert times.choose(4) == 1


def test_times_that_come_late_are_waited_for():
    """A GPU is some steps behind: what was tried is not tried again and again, and the larger size runs meanwhile."""
    times = StepTimes([4, 8])
    assert [times.choose(5) for _ in range(2 * TRIALS + 2)] == [4] * TRIALS + [5] * (TRIALS + 2)
    times.add(4, 1.0)
    times.add(5, 2.0)
    assert times.choose(5) == 4


def test_only_sizes_that_are_compiled_are_tried():
    times, tried = StepTimes(only=[1, 4]), []
    for _ in range(12):
        rows = times.choose(6)
        tried.append(rows)
        times.add(rows, {1: 1.0, 4: 3.0}[rows])  # four at once advance a third more in a second
    assert tried[:6] == [1, 1, 1, 4, 4, 4] and tried[-1] == 4
    assert times.choose(3) == 1 and StepTimes(only=[4]).choose(2) == 1


def test_the_fastest_size_is_the_smallest_that_pays():
    times = StepTimes(only=[1, 2, 4])
    assert times.fastest() == 1
    for rows, seconds in ((1, 1.0), (2, 1.96), (4, 3.0)):
        times.add(rows, seconds)
        times.add(rows, 0.1, alone=True)
    assert times.fastest() == 4
    times.add(1, 0.74)
    assert times.fastest() == 1, "a batch that gains a hundredth is not worth waiting for"


def test_a_mixed_batch_is_what_its_useful_branches_cost():
    """Two branches a row, for those that need one, too: not worth it where rows cost the same in any batch, even where
    guided rows alone would gain a little together. Worth it where a larger batch costs hardly more."""
    mixed = [False, True, False, False]

    def chosen(cost, unguided):
        times = StepTimes()
        for _ in range(40):
            rows = times.choose(len(unguided), unguided)
            alone = all(unguided[:rows])
            times.add(rows, cost(rows) * (0.5 if alone else 1), alone)
        return rows

    assert chosen(lambda rows: 0.9 * rows if rows > 1 else 1.0, mixed) == 1
    assert chosen(lambda rows: 0.9 * rows if rows > 1 else 1.0, [False] * 4) == 2
    assert chosen(lambda rows: 1 + 0.1 * rows, mixed) == 4


def test_what_a_busy_moment_has_taught_is_unlearned():
    """A size that was measured on a busy processor is tried again, sooner or later."""
    times = StepTimes()
    busy = iter([1.0] * TRIALS)  # the trials of one row
    chosen = run(times, lambda batch: next(busy, 0.04) if batch == 1 else 0.04 * batch, 2, steps=3 * RETRY_STEPS)
    assert set(chosen[TRIALS : RETRY_STEPS - 1]) == {2} and set(chosen[-RETRY_STEPS // 2 :]) == {1}
    long = run(times, lambda batch: 0.04 * batch, 2, steps=1000)
    assert long.count(2) < 6  # and seldom
