"""Slots and in-flight batching, with a numpy engine that computes every row on its own."""

from __future__ import annotations

import numpy as np
import pytest
from handiffuser.errors import EngineError, RequestError
from handiffuser.runtime.noise import normal
from handiffuser.runtime.sampler import Job, StepSampler
from handiffuser.runtime.steptimes import StepTimes
from handiffuser.schedules import NoiseSchedule, rows
from reference import reference_step

SHAPE = (2, 3)
K = 4
SCHEDULE = NoiseSchedule(timestep_spacing="trailing", prediction_type="v_prediction")
SOLVERS = ("ddim", "ddpm", "euler", "dpm++2m", "dpm++2m-karras", "plms")


class FakeEngine:
    """m = tanh(scale x + text + time) row by row, then the update; remembers what it was given."""

    def __init__(self):
        self.batches = []
        self.constants = []

    def __call__(self, inputs):
        assert len({len(value) for value in inputs.values()}) == 1
        self.batches.append(len(inputs["row"]))
        self.constants.append((inputs["text"], inputs["text"].copy()))
        x, row = inputs["latents"], inputs["row"]
        outputs = {"latents": np.empty_like(x), "history": np.empty_like(inputs["history"])}
        for i in range(len(x)):
            one = slice(i, i + 1)
            m = np.tanh(row[i, 1] * x[one] + inputs["text"][one] + inputs["time"][one, :, None])
            outputs["latents"][one], outputs["history"][one] = reference_step(
                row[one], x[one], inputs["history"][one], m, inputs["noise"][one]
            )
        return outputs


class Fixed(StepTimes):
    """Advances `rows` jobs at a step, whatever is measured; by default all of them."""

    def __init__(self, buckets=None, rows=99):
        super().__init__(buckets)
        self.rows = rows

    def choose(self, active, unguided=()):
        return min(self.rows, active)


def make_job(key, solver="ddim", steps=4, seed=None):
    seed = key if seed is None else seed
    table = rows(SCHEDULE, solver, steps, 2.0, K)
    return Job(
        key=key,
        state=normal(seed, "latents", 0, SHAPE) * table.init_sigma,
        rows=table.rows,
        steps={"time": np.stack([np.cos(table.timesteps / 100), table.timesteps / 1000], 1).astype(np.float32)},
        constants={"text": normal(seed, "text", 0, SHAPE)},
        noise=(lambda step: normal(seed, "latents", 1 + step, SHAPE)) if table.stochastic else None,
    )


def sampler_of(slots, **options):
    return StepSampler(FakeEngine(), "latents", K, slots, Fixed(**options))


def alone(*args, **kwargs):
    (result,) = sampler_of(1).run([make_job(*args, **kwargs)])
    assert result.failed_step is None
    return result.state


def random_jobs(count, seed=0):
    generator = np.random.default_rng(seed)
    return [(key, SOLVERS[generator.integers(6)], int(generator.integers(1, 12))) for key in range(count)]


def test_equals_a_plain_loop():
    job = make_job(3, "ddpm", 6)
    x, history = job.state[None], np.zeros((1, K, *SHAPE), np.float32)
    for i, row in enumerate(job.rows):
        m = np.tanh(row[1] * x + job.constants["text"] + job.steps["time"][i][None, :, None])
        x, history = reference_step(row[None], x, history, m, job.noise(i)[None])
    np.testing.assert_array_equal(alone(3, "ddpm", 6), x[0])


@pytest.mark.parametrize("buckets", [None, (1, 3, 8)])
def test_company_changes_nothing(buckets):
    jobs = random_jobs(20)
    results = list(sampler_of(7, buckets=buckets).run(make_job(*job) for job in jobs))
    assert sorted(result.key for result in results) == list(range(20))
    for result in results:
        np.testing.assert_array_equal(result.state, alone(*jobs[result.key]))


@pytest.mark.parametrize("rows", [1, 3])
def test_the_oldest_are_advanced_and_the_others_keep_their_state(rows):
    jobs = random_jobs(12, seed=2)
    sampler = sampler_of(5, rows=rows)
    results = list(sampler.run(make_job(*job) for job in jobs))
    assert max(sampler._engine.batches) == rows
    for result in results:
        np.testing.assert_array_equal(result.state, alone(*jobs[result.key]))
    order = [result.key for result in results]
    if rows == 1:
        assert order == list(range(12))  # first come, first served
    assert all(abs(at - key) <= 5 for at, key in enumerate(order))


def test_the_order_of_age_survives_a_job_that_leaves():
    sampler = sampler_of(4, rows=2)
    for key, steps in enumerate((4, 1, 3, 3)):
        sampler.submit(make_job(key, steps=steps))
    assert [result.key for result in sampler.step()] == [1] and sampler.advanced == 2
    assert sampler.keys == [0, 2, 3]
    sampler.submit(make_job(4, steps=1))
    assert sampler.drop(0) and sampler.keys == [2, 3, 4]
    left = []
    while sampler.active:
        left += [result.key for result in sampler.step()]
    assert left == [2, 3, 4]


def test_measured_times_choose_how_many():
    """An engine whose rows cost the same in any batch is soon given one at a time."""
    sampler = StepSampler(FakeEngine(), "latents", K, 4)
    sampler.times.add = lambda rows, seconds, alone=False: StepTimes.add(sampler.times, rows, float(rows), alone)
    jobs = [(key, "ddim", 8) for key in range(6)]
    for result in sampler.run(make_job(*job) for job in jobs):
        np.testing.assert_array_equal(result.state, alone(*jobs[result.key]))
    assert set(sampler._engine.batches[-20:]) == {1}


def test_order_changes_nothing():
    jobs = random_jobs(16)
    forward = {r.key: r.state for r in sampler_of(5).run(make_job(*job) for job in jobs)}
    backward = {r.key: r.state for r in sampler_of(4).run(make_job(*job) for job in reversed(jobs))}
    for key, state in forward.items():
        np.testing.assert_array_equal(state, backward[key])


def test_200_jobs_none_lost_none_twice():
    jobs = random_jobs(200, seed=1)
    sampler = sampler_of(9)
    results = list(sampler.run(make_job(*job) for job in jobs))
    assert sorted(result.key for result in results) == list(range(200))
    assert all(result.state is not None and np.isfinite(result.state).all() for result in results)
    assert sampler.active == 0 and sampler.free == 9
    # No slot idled while jobs were waiting: every call but the last ones was full.
    batches = sampler._engine.batches
    needed = sum(len(make_job(*job).rows) for job in jobs)
    assert sum(batches) == needed and set(batches[: (needed - 9 * 12) // 9]) == {9}


def test_jobs_leave_at_their_own_time():
    sampler = sampler_of(4)
    for key, (solver, steps) in enumerate([("ddim", 3), ("plms", 3), ("dpm++2m", 1), ("euler", 5)]):
        sampler.submit(make_job(key, solver, steps))
    left = [{result.key for result in sampler.step()} for _ in range(5)]
    assert left == [{2}, set(), {0}, {1}, {3}]
    assert sampler._engine.batches == [4, 3, 3, 2, 1]
    assert sampler.step() == [] and len(sampler._engine.batches) == 5


def test_slots_are_refilled_between_steps():
    sampler = sampler_of(2)
    sampler.submit(make_job(0, steps=1))
    sampler.submit(make_job(1, steps=5))
    assert sampler.free == 0
    with pytest.raises(RequestError, match="busy"):
        sampler.submit(make_job(2))
    assert [result.key for result in sampler.step()] == [0] and sampler.free == 1
    sampler.submit(make_job(2, "plms", 9))  # a longer schedule than any before it
    assert sorted(sampler.keys) == [1, 2] and sampler.active == 2
    results = {}
    while sampler.active:
        results.update((result.key, result.state) for result in sampler.step())
    np.testing.assert_array_equal(results[1], alone(1, steps=5))
    np.testing.assert_array_equal(results[2], alone(2, "plms", 9))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("buckets", [None, (2, 4)])
def test_nan_stays_in_its_row(buckets):
    jobs = [make_job(key, SOLVERS[key], 6) for key in range(4)]
    jobs[0].steps["time"][2] = np.nan
    jobs[2].steps["time"][0] = np.inf
    jobs[2].constants["text"][0, 0] = -np.inf
    results = {result.key: result for result in sampler_of(4, buckets=buckets).run(jobs)}
    assert results[0].state is None and results[0].failed_step == 2
    assert results[2].state is None and results[2].failed_step == 0
    for key in (1, 3):
        assert results[key].failed_step is None
        np.testing.assert_array_equal(results[key].state, alone(key, SOLVERS[key], 6))


def test_a_slot_forgets_its_last_job():
    """History and noise of a job that failed or was dropped do not reach the next one in its row."""
    sampler = sampler_of(1)
    bad = make_job(0, "plms", 6)
    bad.steps["time"][3] = np.nan
    list(sampler.run([bad]))
    sampler.submit(make_job(1, "ddpm", 6))
    sampler.step()
    assert sampler.drop(1)
    (result,) = sampler.run([make_job(2, "dpm++2m", 5)])
    np.testing.assert_array_equal(result.state, alone(2, "dpm++2m", 5))


def test_drop():
    sampler = sampler_of(3)
    for key in range(3):
        sampler.submit(make_job(key, SOLVERS[key], 4))
    sampler.step()
    assert sampler.drop(0) and not sampler.drop(0) and not sampler.drop("other")
    assert sampler.free == 1
    results = {result.key: result.state for result in sampler.run([])}
    assert results.keys() == {1, 2}
    for key, state in results.items():
        np.testing.assert_array_equal(state, alone(key, SOLVERS[key], 4))


def test_buckets_pad_the_batch():
    sampler = sampler_of(5, buckets=(6, 2, 4))
    for key in range(5):
        sampler.submit(make_job(key, steps=5 - key))
    while sampler.active:
        sampler.step()
    assert sampler._engine.batches == [6, 4, 4, 2, 2]


def test_constants_are_handed_over_once():
    sampler = sampler_of(3)
    sampler.submit(make_job(0, steps=6))
    sampler.submit(make_job(1, steps=3))
    for _ in range(6):
        sampler.step()
    views = [id(view) for view, _ in sampler._engine.constants]
    assert len(set(views[:3])) == 1 and len(set(views[3:])) == 1 and views[2] != views[3]
    np.testing.assert_array_equal(sampler._engine.constants[5][1][0], make_job(0).constants["text"])


def test_a_failing_engine_moves_nothing():
    engine = FakeEngine()
    down = [True]

    def flaky(inputs):
        if down[0]:
            raise EngineError("out of memory")
        return engine(inputs)

    sampler = StepSampler(flaky, "latents", K, 1)
    sampler.submit(make_job(1, "ddpm", 3))
    with pytest.raises(EngineError):
        sampler.step()
    down[0] = False
    (result,) = sampler.run([])
    np.testing.assert_array_equal(result.state, alone(1, "ddpm", 3))


def test_without_history():
    def engine(inputs):
        assert set(inputs) == {"x", "noise", "row"}
        return {"x": inputs["row"][:, 3, None] * inputs["x"]}

    table = rows(SCHEDULE, "ddim", 3, 1.0, 0)
    (result,) = StepSampler(engine, "x", 0, 2).run([Job("a", np.ones(5, np.float32), table.rows)])
    np.testing.assert_allclose(result.state, np.prod(table.rows[:, 3]), rtol=1e-6)


def test_results_are_copies():
    sampler = sampler_of(1)
    (first,) = sampler.run([make_job(0)])
    kept = first.state.copy()
    list(sampler.run([make_job(1)]))
    np.testing.assert_array_equal(first.state, kept)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": np.zeros((4, 6), np.float32)}, r"must be \[steps, 14\]"),
        ({"rows": np.zeros((0, 14), np.float32)}, r"must be \[steps, 14\]"),
        ({"rows": np.full((4, 14), np.nan, np.float32)}, "NaN"),
        ({"state": np.full(SHAPE, np.inf)}, "NaN"),
        ({"state": np.zeros((3, 2))}, r"latents is float32\[3, 2\].*float32\[2, 3\]"),
        ({"steps": {}}, "time"),
        ({"steps": {"time": np.zeros((3, 2), np.float32)}}, "4 steps"),
        ({"constants": {"text": np.zeros(SHAPE)}}, "float64"),
        ({"constants": {"prompt": np.zeros(SHAPE)}}, "text.*prompt"),
        ({"key": 0}, "key must be unique"),
    ],
)
def test_bad_jobs_are_refused_and_harm_nobody(change, words):
    sampler = sampler_of(2)
    sampler.submit(make_job(0, steps=4))
    job = make_job(1, steps=4)
    for name, value in change.items():
        setattr(job, name, value)
    with pytest.raises(RequestError, match=words):
        sampler.submit(job)
    (result,) = sampler.run([])
    np.testing.assert_array_equal(result.state, alone(0, steps=4))


def test_bad_engines_are_named():
    for engine in (lambda inputs: {}, lambda inputs: {"latents": inputs["latents"][:, :1]}):
        sampler = StepSampler(engine, "latents", K, 1)
        sampler.submit(make_job(0))
        with pytest.raises(EngineError, match=r"latents of shape \[1, 2, 3\]"):
            sampler.step()
    for slots, buckets in ((0, None), (4, (1, 2)), (1, ()), (1, (0, 2))):
        with pytest.raises(EngineError):
            sampler_of(slots, buckets=buckets)


class BranchedEngine(FakeEngine):
    """m = u + guidance (c - u) with u, c = the first and the last entry of "text" [B, G, ...]."""

    def __call__(self, inputs):
        text, row = inputs["text"], inputs["row"]
        self.branches = [*getattr(self, "branches", []), text.shape[1]]
        assert text.flags.c_contiguous
        guided = text[:, 0] + row[:, 2, None, None] * (text[:, -1] - text[:, 0])
        return super().__call__({**inputs, "text": guided.astype(np.float32)})


def branched_job(key, guidance, interval=(0.0, 1.0), steps=4):
    job = make_job(key, steps=steps)
    job.rows = rows(SCHEDULE, "ddim", steps, guidance, K, interval).rows
    job.constants = {"text": np.stack([normal(key, "no text", 0, SHAPE), job.constants["text"]])}
    return job


def run_branched(jobs, slots, branched=("text",)):
    engine = BranchedEngine()
    sampler = StepSampler(engine, "latents", K, slots, Fixed(), branched)
    return {result.key: result.state for result in sampler.run(jobs)}, engine.branches


def test_without_guidance_one_branch_runs():
    both, branches = run_branched([branched_job(1, 1.0)], 1, branched=())
    assert branches == [2] * 4
    alone, branches = run_branched([branched_job(1, 1.0)], 1)
    assert branches == [1] * 4
    np.testing.assert_allclose(alone[1], both[1], rtol=1e-6)


def test_the_branch_comes_back_with_guided_company_and_in_the_interval():
    guided, branches = run_branched([branched_job(1, 3.0, (0.25, 0.75))], 1)
    assert branches == [1, 2, 2, 1]
    whole, _ = run_branched([branched_job(1, 3.0)], 1)
    assert np.abs(guided[1] - whole[1]).max() > 1e-3
    company = [branched_job(1, 3.0, (0.25, 0.75)), branched_job(2, 1.0), branched_job(3, 2.0, steps=2)]
    together, branches = run_branched(company, 3)
    assert branches == [2, 2, 2, 1]
    np.testing.assert_allclose(together[1], guided[1], rtol=1e-5, atol=1e-6)
