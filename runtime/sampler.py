"""In-flight batching over one step graph: one engine call advances requests at different steps and solvers.

A job takes a free slot at any step boundary and leaves when its rows are done. The active jobs always lie at the front
of preallocated buffers, the oldest first: the engine gets views of them, and only the rows of this step are gathered.
Measured times decide how many jobs a step advances (`steptimes`); the others keep their slot and their state.

Try it:

    sampler = StepSampler(engine, state_name="latents", num_history=1, slots=8)
    sampler.submit(Job(key="a", state=noise * table.init_sigma, rows=table.rows, constants={"text": text}))
    while sampler.active:
        for result in sampler.step():
            print(result.key, result.state.shape)

or, to keep the slots full from any iterable of jobs, `for result in sampler.run(jobs): ...`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from handiffuser.contract import ROW_HEAD, row_columns
from handiffuser.errors import EngineError, RequestError

from .steptimes import StepTimes

Array = np.ndarray
GUIDANCE = ROW_HEAD.index("guidance")
Engine = Callable[[dict[str, Array]], Mapping[str, Array]]


@dataclass
class Job:
    """One request's way through a step graph. N is its number of steps, R = 6 + 2 K.

    key: its name, unique among the active jobs.
    state: float32 [...], the initial noise, already scaled by the table's init_sigma.
    rows: float32 [N, R], see `handiffuser.schedules.rows`.
    steps: inputs that change with the step, name -> [N, ...], such as "time".
    constants: inputs that do not, name -> array without a batch axis, such as "text" or "key_00".
    noise: step -> the noise it adds, of the state's shape, or None for zeros; None if no step adds any.
    blend: (step, state after it) -> the state that goes on, of the same shape; None where that is the same.
    """

    key: Hashable
    state: Array
    rows: Array
    steps: Mapping[str, Array] = field(default_factory=dict)
    constants: Mapping[str, Array] = field(default_factory=dict)
    noise: Callable[[int], Array | None] | None = None
    blend: Callable[[int, Array], Array] | None = None


class Result(NamedTuple):
    """How a job ended: with its final state [...], or at the step after which its state was not finite."""

    key: Hashable
    state: Array | None
    failed_step: int | None = None


class StepSampler:
    """`slots` jobs in flight over one engine.

    engine: takes name -> array with a leading batch axis B, returns name -> array. It gets the state and "noise"
        [B, ...], "history" [B, K, ...] unless K is 0, "row" [B, R], and the jobs' own inputs; it returns the state and
        "history". Inputs are views that the sampler overwrites after the call: copy what you keep. A constant is the
        same array object, with the same content, until the set of active jobs changes: an engine on a device may skip
        the upload of an array that `is` the last one.
    state_name: "x" or "latents". num_history: K.
    branched: constants that hold one entry per guidance branch, [2, ...] in a job. While every active row's guidance
        is 1 the engine gets the second alone, [B, 1, ...], and does half the work.
    times: the measured times of the engine's steps, kept over samplers; by default empty. Where it names `buckets`, the
        engine's fixed batch sizes, a batch is filled up to the next one with copies of its first row, whose results are
        thrown away.

    The shapes and dtypes of the first job are those of all. Rows of a batch never mix here: with an engine that treats
    rows independently, a job's result does not depend on the others. Use it from one thread.

    Raises EngineError if slots or buckets make no sense.
    """

    def __init__(
        self,
        engine: Engine,
        state_name: str,
        num_history: int,
        slots: int,
        times: StepTimes | None = None,
        branched: Collection[str] = (),
    ) -> None:
        if slots < 1:
            raise EngineError(f"slots must be at least 1, got {slots}.")
        self.times = times or StepTimes()
        buckets = self.times.buckets
        if buckets is not None and (not buckets or buckets[0] < 1 or buckets[-1] < slots):
            raise EngineError(
                f"slots must be at most the largest of the batch sizes {buckets}, got {slots}. "
                f"Use fewer slots, or build an engine for batch size {slots}."
            )
        self.slots = slots
        self.advanced = 0  # jobs that the last step advanced
        self._engine = engine
        self._state_name = state_name
        self._num_history = num_history
        self._branched = frozenset(branched)
        self._capacity = buckets[-1] if buckets else slots  # rows of every buffer
        # One entry an active job; entry i is row i of every buffer.
        self._jobs: list[Job] = []
        self._position = np.zeros(slots, dtype=np.int64)  # each job's current step
        self._length = np.zeros(slots, dtype=np.int64)
        # Buffers by input name, made when the first job shows the shapes.
        self._moving: dict[str, Array] = {}  # state, history and noise [capacity, ...]
        self._constants: dict[str, Array] = {}  # [capacity, ...]
        self._tables: dict[str, Array] = {}  # "row" and the other step inputs [slots, longest schedule, ...]
        # (batch, whether the conditional branch is alone) -> inputs of the engine; empty after the jobs have changed.
        self._constant_views: dict[tuple[int, bool], dict[str, Array]] = {}

    @property
    def active(self) -> int:
        """Jobs in flight."""
        return len(self._jobs)

    @property
    def free(self) -> int:
        """Jobs that can be submitted now."""
        return self.slots - len(self._jobs)

    @property
    def keys(self) -> list[Hashable]:
        """The keys of the jobs in flight, the oldest first."""
        return [job.key for job in self._jobs]

    def submit(self, job: Job) -> None:
        """Takes a job in; it runs from the next `step` on. The job's arrays are copied.

        Raises RequestError if no slot is free, the key is in flight, or an array is not finite or of another
        shape or dtype than the first job's; the jobs in flight are not affected.
        """
        if not self.free:
            raise RequestError(f"All {self.slots} slots are busy. Call step() until `free` is above 0.")
        if job.key in self.keys:
            raise RequestError(f"key must be unique, and a job in flight has {job.key!r}. Give each job its own key.")
        state = np.asarray(job.state, dtype=np.float32)
        constants = {name: np.asarray(value) for name, value in job.constants.items()}
        tables = {"row": np.asarray(job.rows, dtype=np.float32)}
        tables.update((name, np.asarray(value)) for name, value in job.steps.items())
        self._check_new(job, state, tables)
        if not self._moving:
            self._allocate(state, constants, tables)
        _check_like("constant input", constants, self._constants, skip=1)
        _check_like("step input", tables, self._tables, skip=2, own_skip=1)
        _check_like("input", {self._state_name: state}, {self._state_name: self._moving[self._state_name]}, skip=1)

        i, N = len(self._jobs), len(tables["row"])
        for buffer in self._moving.values():
            buffer[i] = 0
        self._moving[self._state_name][i] = state
        for name, value in constants.items():
            self._constants[name][i] = value
        for name, value in tables.items():
            if self._tables[name].shape[1] < N:
                padding = [(0, 0)] * self._tables[name].ndim
                padding[1] = (0, N - self._tables[name].shape[1])
                self._tables[name] = np.pad(self._tables[name], padding)
            self._tables[name][i, :N] = value
        self._position[i], self._length[i] = 0, N
        self._jobs.append(job)
        self._constant_views = {}

    def step(self) -> list[Result]:
        """Advances the oldest jobs by one step with one engine call. Returns those that are done or have failed, the
        oldest first.

        It advances all jobs, or fewer where measured times say that this gets more done. If the engine raises, the jobs
        have not moved and the step may be tried again.
        """
        if not self._jobs:
            return []
        started = time.perf_counter()
        unguided = self._unguided()
        n = self.times.choose(len(self._jobs), unguided)
        alone = bool(unguided) and all(unguided[:n])
        batch = self.times.batch(n)
        position = self._position[:n]
        noise = self._moving["noise"]
        for i, job in enumerate(self._jobs[:n]):
            if job.noise is not None:
                drawn = job.noise(int(position[i]))
                noise[i] = 0 if drawn is None else drawn
        # Rows n ... batch are copies of row 0, finite input for an engine of a fixed size. They hold no job: a step
        # advances fewer than all jobs only if these fill their batch.
        rows = np.arange(batch)
        rows[n:] = 0
        for buffer in self._moving.values():
            buffer[n:batch] = buffer[0]
        inputs = {name: buffer[:batch] for name, buffer in self._moving.items()}
        inputs.update((name, table[rows, position[rows]]) for name, table in self._tables.items())
        inputs.update(self._constants_for(batch, alone))

        outputs = self._engine(inputs)

        states = [name for name in self._moving if name != "noise"]
        for name in states:
            expected, got = inputs[name].shape, np.shape(outputs[name]) if name in outputs else None
            if got != expected:
                raise EngineError(
                    f"The step engine must return {name} of shape {list(expected)}; it returned "
                    f"{'none' if got is None else list(got)}. Export the bundle and build the engine again."
                )
        for name in states:
            self._moving[name][:n] = outputs[name][:n]
        state = self._moving[self._state_name]
        for i, job in enumerate(self._jobs[:n]):
            if job.blend is not None:
                state[i] = job.blend(int(position[i]), state[i])
        finite = np.isfinite(state[:n]).reshape(n, -1).all(axis=1)
        position += 1
        self.advanced = n
        self.times.add(n, time.perf_counter() - started, alone)  # with the host's own work
        results = []
        # From the last down, because the jobs behind a leaving one move up.
        for i in np.flatnonzero((position == self._length[:n]) | ~finite)[::-1]:
            key = self._jobs[i].key
            failed_step = None if finite[i] else int(position[i]) - 1
            results.append(Result(key, state[i].copy() if finite[i] else None, failed_step))
            self._remove(int(i))
        return results[::-1]

    def _unguided(self) -> list[bool]:
        """For each job whether its step is without guidance; empty where that makes no difference."""
        if not self._branched:
            return []
        n = len(self._jobs)
        unguided: list[bool] = (self._tables["row"][np.arange(n), self._position[:n], GUIDANCE] == 1).tolist()
        return unguided

    def _constants_for(self, batch: int, alone: bool) -> dict[str, Array]:
        """The constants [batch, ...]; alone: the conditional branch of those that have branches."""
        if not self._constant_views:
            for buffer in self._constants.values():
                buffer[len(self._jobs) : batch] = buffer[0]
        if (batch, alone) not in self._constant_views:
            views = {name: buffer[:batch] for name, buffer in self._constants.items()}
            if alone:  # engines take contiguous arrays
                views |= {name: np.ascontiguousarray(views[name][:, 1:]) for name in self._branched}
            self._constant_views[batch, alone] = views
        return self._constant_views[batch, alone]

    def drop(self, key: Hashable) -> bool:
        """Cancels a job between two steps; True if it was in flight. The others go on."""
        for i, job in enumerate(self._jobs):
            if job.key == key:
                self._remove(i)
                return True
        return False

    def peek(self, key: Hashable) -> tuple[int, int, Array] | None:
        """(steps done, steps, a copy of its state) of a job in flight; None for any other."""
        for i, job in enumerate(self._jobs):
            if job.key == key:
                return int(self._position[i]), int(self._length[i]), self._moving[self._state_name][i].copy()
        return None

    def run(self, jobs: Iterable[Job]) -> Iterator[Result]:
        """Runs jobs as slots come free, and yields each one's result when it is done: out of order.

        Jobs are taken from the iterable only when there is room, so it may be lazy or endless. A job that
        `submit` refuses raises here; the jobs in flight stay, and `run` may be called again for the rest.
        """
        waiting = iter(jobs)
        more = True
        while more or self.active:
            while more and self.free:
                job = next(waiting, None)
                if job is None:
                    more = False
                else:
                    self.submit(job)
            yield from self.step()

    def _remove(self, i: int) -> None:
        """Closes row i's gap: the rows behind it move up, so that they stay in the order of their age."""
        n = len(self._jobs)
        for buffers in (self._moving, self._constants, self._tables):
            for buffer in buffers.values():
                buffer[i : n - 1] = buffer[i + 1 : n]
        for steps in (self._position, self._length):
            steps[i : n - 1] = steps[i + 1 : n]
        self._jobs.pop(i)
        self._constant_views = {}

    def _allocate(self, state: Array, constants: dict[str, Array], tables: dict[str, Array]) -> None:
        shapes = {self._state_name: state.shape, "noise": state.shape}
        if self._num_history:
            shapes["history"] = (self._num_history, *state.shape)
        self._moving = {name: np.zeros((self._capacity, *shape), np.float32) for name, shape in shapes.items()}
        self._constants = {name: np.zeros((self._capacity, *c.shape), c.dtype) for name, c in constants.items()}
        self._tables = {name: np.zeros((self.slots, *t.shape), t.dtype) for name, t in tables.items()}

    def _check_new(self, job: Job, state: Array, tables: dict[str, Array]) -> None:
        """Checks that every job must pass, also the first."""
        width = len(row_columns(self._num_history))
        rows = tables["row"]
        if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] != width:
            raise RequestError(
                f"The rows of {job.key!r} have shape {list(rows.shape)}; with {self._num_history} history "
                f"tensors they must be [steps, {width}]. Make them with "
                f"schedules.rows(..., num_history={self._num_history})."
            )
        for name, table in tables.items():
            if table.ndim < 1 or len(table) != len(rows):
                raise RequestError(
                    f"The step input {name} of {job.key!r} has shape {list(table.shape)}; "
                    f"its first axis must be the {len(rows)} steps."
                )
        if not (np.isfinite(state).all() and np.isfinite(rows).all()):
            raise RequestError(f"The initial state or the rows of {job.key!r} hold NaN or infinity.")


class SizedSamplers:
    """A StepSampler for each size of pictures; together they hold `slots` jobs.

    A step advances pictures of one size: that of the oldest job. So each job is the oldest one day, and none starves.
    make: size -> a new sampler, which is dropped with its last job unless it is of the size `keep`.
    """

    def __init__(self, make: Callable[[Hashable], StepSampler], slots: int, keep: Hashable) -> None:
        self.slots, self.advanced = slots, 0
        self._make, self._keep = make, keep
        self._samplers: dict[Hashable, StepSampler] = {keep: make(keep)}
        self._sizes: dict[Hashable, Hashable] = {}  # keys of the jobs in flight, the oldest first -> their sizes

    @property
    def active(self) -> int:
        """Jobs in flight."""
        return len(self._sizes)

    def free(self, size: Hashable = None) -> int:
        """Jobs that can be submitted now; size: of this size."""
        free = self.slots - self.active
        return min(free, self._samplers[size].free) if size in self._samplers else free

    def submit(self, job: Job, size: Hashable) -> None:
        """See `StepSampler.submit`."""
        if size not in self._samplers:
            self._samplers[size] = self._make(size)
        self._samplers[size].submit(job)
        self._sizes[job.key] = size

    def step(self) -> list[Result]:
        """See `StepSampler.step`."""
        size = next(iter(self._sizes.values()))
        sampler = self._samplers[size]
        results = sampler.step()
        self.advanced = sampler.advanced
        for result in results:
            self._leave(result.key)
        return results

    def drop(self, key: Hashable) -> None:
        """Cancels a job between two steps."""
        self._samplers[self._sizes[key]].drop(key)
        self._leave(key)

    def peek(self, key: Hashable) -> tuple[int, int, Array] | None:
        """See `StepSampler.peek`."""
        return self._samplers[self._sizes[key]].peek(key) if key in self._sizes else None

    def _leave(self, key: Hashable) -> None:
        size = self._sizes.pop(key)
        if size != self._keep and size not in self._sizes.values():  # several jobs may leave at once
            del self._samplers[size]


def _check_like(what: str, given: dict[str, Array], buffers: dict[str, Array], skip: int, own_skip: int = 0) -> None:
    """Whether names, dtypes and trailing shapes of a job's arrays are those of the buffers."""
    if given.keys() != buffers.keys():
        raise RequestError(
            f"A job must give the {what}s {', '.join(buffers) or '(none)'}, as the first one did; "
            f"this one gives {', '.join(given) or '(none)'}."
        )
    for name, value in given.items():
        expected = buffers[name]
        if value.shape[own_skip:] != expected.shape[skip:] or value.dtype != expected.dtype:
            raise RequestError(
                f"The {what} {name} is {value.dtype}{list(value.shape[own_skip:])}; "
                f"the first job's was {expected.dtype}{list(expected.shape[skip:])}, "
                "and one sampler runs one shape."
            )
