"""In-flight batching over one step graph on a GPU: the twin of `sampler.StepSampler`, which only enqueues.

sampler = DeviceSampler(cuda, graph, "latents", slots=8, noise=noise)
sampler.submit(stream, job)
while sampler.jobs:
    sampler.step(stream, take=lambda job, state: stream.copy(results[job.key], state))
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from ..schedules import Table
from ..settings import MAX_STEPS
from .bundle import Bundle, keep
from .device_graphs import After, DeviceGraph, Staging
from .device_noise import DeviceNoise
from .device_pictures import DeviceBlend
from .noise import RequestNoise
from .requests import Request
from .sampler import GUIDANCE
from .steptimes import StepTimes

# Seconds of steps that the host enqueues beyond the current one. A caller may take so long for a picture, such as for a
# PNG of 45 ms, and the device does not wait; a new request hardly does.
AHEAD = 0.06
UNKNOWN = AHEAD / 3  # of a step that was not measured yet
PATIENCE = 4  # steps that the host enqueues before it takes it that the queue does not get longer
LOG_STEPS = 2 * MAX_STEPS  # steps that the log holds: more than a request may take


class Steps:
    """The steps under way on one stream, of all samplers there."""

    def __init__(self) -> None:
        self.seconds = 0.0  # on the device, of the steps whose end the host has seen
        # Start, end, rows, alone of each, and the measured times of its sampler.
        self.marks: deque[tuple[Any, Any, int, bool, StepTimes]] = deque()
        self.count = 0  # steps that were launched
        self.seen, self.grew = 0.0, 0  # what was queued when last asked; the step after which it was more, or enough

    def add(self, start: Any, end: Any, rows: int, alone: bool, times: StepTimes) -> None:
        """Notes a step that was launched."""
        self.marks.append((start, end, rows, alone, times))
        self.count += 1

    def hungry(self) -> bool:
        """Whether the device may soon be idle although there are steps to make.

        Not where the queue stays short whatever the host enqueues: launching then takes longer than computing.
        """
        while self.marks and self.marks[0][1].done():
            self._note()
        queued = self._queued(1)
        if queued > self.seen or queued >= AHEAD:
            self.grew = self.count
        self.seen = queued
        return queued < AHEAD and self.count - self.grew < PATIENCE

    def wait(self) -> None:
        """Waits for the oldest steps while AHEAD would be left behind the next one."""
        while self._queued(2) >= AHEAD:
            self._note()

    def settle(self) -> None:
        """Waits for all steps, and notes their times."""
        while self.marks:
            self._note()

    def clear(self) -> None:
        """Forgets the steps under way."""
        self.marks.clear()
        self.seen, self.grew = 0.0, self.count

    def _queued(self, first: int) -> float:
        """Seconds that the steps under way take by their measured times, from the given one on."""
        marks = islice(self.marks, first, None)
        return sum(times.expected(rows, alone, UNKNOWN) for *_, rows, alone, times in marks)

    def _note(self) -> None:
        """Waits for the oldest step under way, and notes its time."""
        start, end, rows, alone, times = self.marks.popleft()
        end.synchronize()
        seconds = end.seconds_since(start)
        self.seconds += seconds
        times.add(rows, seconds, alone)


@dataclass
class DeviceTable:
    """A schedule on the device: rows [N, R] and, for the UNet, time rows [N, T]."""

    table: Table
    steps: dict[str, Any]  # "row", perhaps "time"


class DeviceTables:
    """Schedules on the device, each uploaded once. samplers: of each of a request's streams, with the device's."""

    def __init__(
        self,
        bundle: Bundle,
        cuda: Any,
        staging: Staging,
        unet_time: DeviceGraph,
        samplers: Mapping[str, tuple[DeviceSampler, Any]],
    ) -> None:
        self.bundle, self.cuda, self.staging, self.graph, self.samplers = bundle, cuda, staging, unet_time, samplers
        self.tables: dict[tuple[Any, ...], DeviceTable] = {}

    def get(self, stream: str, request: Request) -> DeviceTable:
        """The schedule of one stage of a request."""
        table = self.bundle.table(stream, request)
        key = (stream, id(table))  # a DeviceTable keeps its table, so that the id stays valid
        if key in self.tables:
            return self.tables[key]
        sampler, on = self.samplers[stream]
        rows = self.cuda.zeros(table.rows.shape, "float32")
        self.staging.upload(on, rows, table.rows)
        steps = {"row": rows}
        if "time" in sampler.tables:
            steps["time"] = self._time_rows(on, table.timesteps.astype(np.float32))
        made = DeviceTable(table, steps)
        keep(self.tables, key, made)  # jobs refer to the tables that they use
        return made

    def _time_rows(self, stream: Any, timesteps: np.ndarray) -> Any:
        """Runs `unet_time` once for a schedule: [N] -> [N, T] on the device."""
        graph, count = self.graph, len(timesteps)
        self.staging.upload(stream, graph.inputs["timesteps"][:count], timesteps)
        graph.launch(stream, count)
        kept = self.cuda.zeros((count, *graph.outputs["time"].shape[1:]), graph.outputs["time"].dtype)
        stream.copy(kept, graph.outputs["time"][:count])
        return kept


@dataclass
class DeviceJob:
    """One request's way through a step graph; constants are device arrays without a batch axis.

    blend: of a request with a picture, where it begins and what it keeps after each step.
    """

    key: Hashable
    noise: RequestNoise
    table: DeviceTable
    constants: Mapping[str, Any]
    blend: DeviceBlend | None = None
    position: int = 0
    log: list[tuple[int, int]] = field(default_factory=list)  # (step of the log, row) of each of its steps


class DeviceSampler:
    """The twin of `StepSampler`: `slots` jobs in flight at the front of the step graph's buffers.

    It differs in two points: `take` receives the result of a job, and the log says later whether it is finite.
    times: measured step times, which decide how many jobs a step advances; without them it advances all.
    log_steps: how many steps the log holds, a ring of flags that say which rows were finite. steps: notes the steps
    that are under way.
    """

    def __init__(
        self,
        cuda: Any,
        graph: DeviceGraph,
        state_name: str,
        slots: int,
        noise: DeviceNoise,
        times: StepTimes | None = None,
        log_steps: int = LOG_STEPS,
        steps: Steps | None = None,
    ) -> None:
        self.graph, self.state_name, self.slots, self.noise = graph, state_name, slots, noise
        self.jobs: list[DeviceJob] = []
        moving = [name for name in (state_name, "history") if name in graph.inputs]
        self.state, self.moving = graph.inputs[state_name], moving
        self.tables = [name for name in ("row", "time") if name in graph.inputs]
        self.constants = [n for n in graph.inputs if n not in (*moving, *self.tables, "noise")]
        self.log = cuda.zeros((log_steps, graph.buckets[-1]), "float32")
        self.advance = _advance([(graph.inputs[name], graph.outputs[name]) for name in moving])
        self.count = 0  # steps that were launched
        self.times, self.steps = times, steps or Steps()

    @property
    def free(self) -> int:
        return self.slots - len(self.jobs)

    def submit(self, stream: Any, job: DeviceJob) -> None:
        """Takes a job in. Its constants must be ready when `stream` gets there."""
        i = len(self.jobs)
        if job.blend is not None:
            job.blend.start(stream, self.state[i], job.noise)
        else:
            self.noise.start(stream, self.state[i], job.noise)
        for name in (*self.moving[1:], "noise"):
            stream.zero(self.graph.inputs[name][i])
        for name in self.constants:
            stream.copy(self.graph.inputs[name][i], job.constants[name])
        for name, array in self.graph.alone.items():
            stream.copy(array[i], job.constants[name][1:])
        self.jobs.append(job)

    def step(self, stream: Any, take: Callable[[DeviceJob, Any], None]) -> int:
        """Enqueues one step of the oldest jobs, and calls take(job, final state row) for those that are done.

        Returns the number of jobs that made a step.
        """
        count, unguided = len(self.jobs), self._unguided()
        if self.times is not None:
            count = self.times.choose(count, unguided)
        start = stream.record(timed=True) if self.times is not None else None
        for i, job in enumerate(self.jobs[:count]):
            for name in self.tables:
                stream.copy(self.graph.inputs[name][i], job.table.steps[name][job.position])
            if job.noise.stochastic:
                self.noise.step(stream, self.graph.inputs["noise"][i], job.noise, job.position)
        alone = all(unguided[:count])
        self.graph.launch(stream, count, self.advance, alone)
        for i, job in enumerate(self.jobs[:count]):
            if job.blend is not None:
                job.blend.step(stream, self.state[i], job.position)
        line = self.count % len(self.log)
        stream.copy(self.log[line][:count], self.graph.outputs["finite"][:count])
        self.count += 1
        if start is not None and self.times is not None:
            self.steps.add(start, stream.record(timed=True), count, alone, self.times)
        for i in reversed(range(count)):
            job = self.jobs[i]
            job.position += 1
            job.log.append((line, i))
            if job.position == len(job.table.table.rows):
                take(job, self.state[i])
                self._remove(stream, i)
        return count

    def drop(self, stream: Any, key: Hashable) -> None:
        """Takes a job out between two steps."""
        for i, job in enumerate(self.jobs):
            if job.key == key:
                self._remove(stream, i)
                return

    def clear(self) -> None:
        """Forgets the jobs."""
        self.jobs.clear()

    def _unguided(self) -> list[bool]:
        """For each job whether its step is without guidance."""
        return [bool(job.table.table.rows[job.position, GUIDANCE] == 1) for job in self.jobs]

    def _remove(self, stream: Any, i: int) -> None:
        """Closes row i's gap: the rows behind it move up, so that they stay in the order of their age."""
        buffers = [self.graph.inputs[name] for name in (*self.moving, *self.constants, "noise")]
        for row in range(i, len(self.jobs) - 1):
            for array in (*buffers, *self.graph.alone.values()):
                stream.copy(array[row], array[row + 1])
        self.jobs.pop(i)


def _advance(pairs: list[tuple[Any, Any]]) -> After:
    """Copies the outputs of a step to the inputs of the next one; captured with the step. pairs: (input, output).

    It refers to the buffers alone. If a graph referred to its sampler, only the garbage collector would free both, and
    the device's memory with them.
    """

    def advance(stream: Any, bucket: int) -> None:
        for taken, given in pairs:
            stream.copy(taken[:bucket], given[:bucket])

    return advance


def first_bad(log: np.ndarray, job: DeviceJob) -> int | None:
    """The step at which a job stopped being finite, or None. log: [LOG, slots] as it came from the device."""
    for step, (line, row) in enumerate(job.log):
        if not log[line, row] > 0.5:
            return step
    return None
