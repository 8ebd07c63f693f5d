"""The two stages on a GPU: the same loop as in `host.py`, with everything between prompt and picture on the device.

The host only enqueues. State, solver rows, time rows, keys and values lie in buffers that were allocated once; a step
is one captured CUDA graph (the step engine, and the copies that make its outputs the next step's inputs), launched
again for every step. Nothing waits for the device until a finished picture has been copied into pinned memory.

    main   rows of this step -> step graph -> log of finite rows ... | finished latents -> exit buffer
    side   text -> hands -> features -> context -> keys, values of the requests that come next
    out    exit buffer -> image decoder -> pinned memory

With `overlap` the three are streams of their own, ordered by events; without it they are one. Which row of its
schedule a request is at is known to the host, because no decision depends on what the device computes. So the rows
are copied on the device from each schedule's table, two small copies a request and step, and the captured graph needs
no step index: the same graph serves requests at any steps, of any solvers.

NaN and infinity are found in the graphs (their output `finite`): each step's answer goes into a log on the device that
comes to the host with the picture. A NaN stays in its row, so that the log says at which step it came up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..contract import MAX_REDRAWS
from ..errors import EngineError, RequestError
from ..hands import load_hands
from ..schedules import Table
from .bundle import Bundle, keep
from .device_graphs import STREAM, After, DeviceGraph, Staging, Streams
from .device_noise import DeviceNoise
from .noise import HANDS, LATENTS, RequestNoise
from .requests import MAX_STEPS, Request, take
from .results import Failure, OnEvent, Peek, Picture, Work, cancelled, not_finite
from .sampler import GUIDANCE
from .steptimes import StepTimes

JUDGED = ("joints_3d", "visibility")  # what says whether two hands fit into one picture
AHEAD = 3  # steps that the host enqueues beyond the one that runs: the device never waits, new requests hardly do
LOG = 2 * MAX_STEPS  # steps whose finite flags are kept; more than a request may take
HAND_LOG = (2 + MAX_REDRAWS) * MAX_STEPS  # the same of the hands of a batch, of which some are drawn again


@dataclass
class DeviceTable:
    """A schedule on the device: rows [N, R] and, for the UNet, time rows [N, T]."""

    table: Table
    steps: dict[str, Any]  # "row", perhaps "time"


@dataclass
class DeviceJob:
    """One request's way through a step graph; constants are device arrays without a batch axis."""

    key: Hashable
    noise: RequestNoise
    table: DeviceTable
    constants: Mapping[str, Any]
    position: int = 0
    log: list[tuple[int, int]] = field(default_factory=list)  # (step of the log, row) of each of its steps


class DeviceSampler:
    """The step sampler's twin: `slots` jobs in flight, compacted to the front of the step graph's buffers.

    Not all of it: a job's result is where `take` puts it, and whether it is finite is known when the log has come.
    times: what steps took, which decides how many jobs the next one advances; without it, all of them. lines: of
    how many steps it is kept whether rows were finite.
    """

    def __init__(
        self,
        cuda: Any,
        graph: DeviceGraph,
        state_name: str,
        slots: int,
        noise: DeviceNoise,
        times: StepTimes | None = None,
        lines: int = LOG,
    ) -> None:
        self.graph, self.state_name, self.slots, self.noise = graph, state_name, slots, noise
        self.jobs: list[DeviceJob] = []
        moving = [name for name in (state_name, "history") if name in graph.inputs]
        self.state, self.moving = graph.inputs[state_name], moving
        self.tables = [name for name in ("row", "time") if name in graph.inputs]
        self.constants = [n for n in graph.inputs if n not in (*moving, *self.tables, "noise")]
        self.log = cuda.zeros((lines, graph.buckets[-1]), "float32")
        self.advance = _advance([(graph.inputs[name], graph.outputs[name]) for name in moving])
        self.count = 0  # steps launched so far
        self.times = times
        self.seconds = 0.0  # of the steps that were waited for, on the device
        self.marks: deque[tuple[Any, Any, int, bool]] = deque()  # start, end, rows, alone: of the steps under way

    @property
    def free(self) -> int:
        return self.slots - len(self.jobs)

    def submit(self, stream: Any, job: DeviceJob) -> None:
        """Takes a job in; what it reads must be there when `stream` gets to it."""
        i = len(self.jobs)
        self.noise.start(stream, self.state[i], job.noise)
        for name in (*self.moving[1:], "noise"):
            stream.zero(self.graph.inputs[name][i])
        for name in self.constants:
            stream.copy(self.graph.inputs[name][i], job.constants[name])
        for name, array in self.graph.alone.items():
            stream.copy(array[i], job.constants[name][1:])
        self.jobs.append(job)

    def step(self, stream: Any, take: Callable[[DeviceJob, Any], None]) -> int:
        """Enqueues one step of the oldest jobs; take(job, final state row) for those that this was the last of.

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
        line = self.count % len(self.log)
        stream.copy(self.log[line][:count], self.graph.outputs["finite"][:count])
        self.count += 1
        if start is not None:
            self.marks.append((start, stream.record(timed=True), count, alone))
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

    def wait(self, ahead: int) -> None:
        """Until at most `ahead` steps are under way; the times of the others are noted."""
        while len(self.marks) > ahead:
            start, end, rows, alone = self.marks.popleft()
            end.synchronize()
            seconds = end.seconds_since(start)
            self.seconds += seconds
            if self.times is not None:
                self.times.add(rows, seconds, alone)

    def clear(self) -> None:
        """Forgets the jobs, and steps that nobody waited for."""
        self.jobs.clear()
        self.marks.clear()

    def _unguided(self) -> list[bool]:
        """Of each job whether its step is without guidance."""
        return [bool(job.table.table.rows[job.position, GUIDANCE] == 1) for job in self.jobs]

    def _remove(self, stream: Any, i: int) -> None:
        """Closes row i's gap: the rows behind it move up, so that they stay in the order of their age."""
        buffers = [self.graph.inputs[name] for name in (*self.moving, *self.constants, "noise")]
        for row in range(i, len(self.jobs) - 1):
            for array in (*buffers, *self.graph.alone.values()):
                stream.copy(array[row], array[row + 1])
        self.jobs.pop(i)


def _advance(pairs: list[tuple[Any, Any]]) -> After:
    """Makes what a step gave what the next one takes; captured with the step. pairs: (input, output) of each state.

    It knows the buffers alone: a sampler that its own graph knew would be freed by the garbage collector only, and with
    it the device's memory, at a moment that nobody chose.
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


@dataclass
class _Batch:
    """Requests whose stage 1 was enqueued together; `row` i of every buffer belongs to works[i]."""

    works: list[Work]
    jobs: dict[Hashable, DeviceJob]  # of the hand prior
    done: Any  # event: keys and values are there
    host: dict[str, np.ndarray]  # pinned copies of x and of the features, good after `arrived`
    log: np.ndarray
    arrived: Any
    left: int = 0  # works whose picture is not out yet


@dataclass
class _Exit:
    """Pictures on their way out."""

    jobs: list[DeviceJob]
    image: np.ndarray
    finite: np.ndarray
    log: np.ndarray
    event: Any = None


class DeviceLoop:
    """Runs prepared requests on the GPU. `graphs` are the bundle's eight, as `DeviceGraph`."""

    on_gpu = True

    def __init__(self, bundle: Bundle, cuda: Any, graphs: dict[str, DeviceGraph], streams: Streams, slots: int) -> None:
        self.bundle, self.cuda, self.graphs, self.slots = bundle, cuda, graphs, slots
        self.main, self.side, self.out = streams
        self.overlap = self.side is not self.main
        self.staging = Staging(cuda)
        self.noise = DeviceNoise(cuda, self.staging)
        self.hands_sampler = DeviceSampler(cuda, graphs["hand_prior"], "x", slots, self.noise, lines=HAND_LOG)
        times = StepTimes(graphs["unet"].buckets)
        self.sampler = DeviceSampler(cuda, graphs["unet"], "latents", slots, self.noise, times)
        latents = graphs["unet"].inputs["latents"]
        # Latents that have left their slots and wait for the decoder, and the log of their steps, which goes on being
        # written: three of each, so that the UNet never waits for who reads them.
        shape, lines = (slots, *latents.shape[1:]), self.sampler.log.shape
        self.exits: list[tuple[Any, Any, Any]] = [
            (cuda.zeros(shape, "float32"), cuda.zeros(lines, "float32"), None) for _ in range(3)
        ]
        self.tables: dict[tuple[Any, ...], DeviceTable] = {}
        text = graphs["text_encoder"].outputs["text"]
        self.both = cuda.zeros((slots, 2, *text.shape[1:]), text.dtype)  # of each prompt: without text, with it
        self.no_text: Any = None  # the text of the empty prompt [77, D], on the device
        self.after_run: Callable[[], None] = lambda: None
        self.at_close: Callable[[], None] = lambda: None
        self.closed = False
        self.timings = {"unet": 0.0, "total": 0.0}  # seconds of steps that have events, and in `run`
        self.consumed: list[Any] = []  # events: stage 1's outputs have been read, and may be overwritten
        self.cancelled: set[Hashable] = set()
        self.ready: deque[tuple[_Batch, int]] = deque()
        self.running: dict[Hashable, tuple[_Batch, int]] = {}

    def warnings(self) -> list[str]:
        """What the user should know about how this runs."""
        refused = [name for name, graph in self.graphs.items() if graph.refused]
        sentences = [f"Noise is drawn on the host, which is slower: {self.noise.refused}"] if self.noise.refused else []
        if refused:
            sentences.append(
                f"CUDA graphs could not be captured for {', '.join(refused)}; they are launched kernel by kernel."
            )
        return sentences

    def warm_up(self, rows: int, tell: OnEvent) -> None:
        """Loads, runs once and captures every engine that up to `rows` requests at once will need.

        Without it each is made ready in the middle of the loop when it is first used, and all in flight waits.
        tell: ("warm-up", 1) for every engine.
        """
        rows = min(rows, self.slots)
        samplers = {"unet": self.sampler, "hand_prior": self.hands_sampler}
        for name, graph in self.graphs.items():
            stream = getattr(self, STREAM[name])
            for ready in graph.warm_up(stream, rows, samplers[name].advance if name in samplers else None):
                tell("warm-up", ready)
            stream.synchronize()  # so that the next graph's engines may use the same scratch memory on another stream
        self.after_run()

    def close(self) -> None:
        """Frees what is on the device, engines first. The loop cannot run again."""
        self.closed = True
        with suppress(EngineError):  # what failed before is no reason to keep memory
            for stream in {self.main, self.side, self.out}:
                stream.synchronize()
        for graph in self.graphs.values():
            graph.close()
        self.after_run = lambda: None  # it knows the engines
        self.at_close()
        self.cuda.close()

    def run(self, requests: Iterable[Request | None], tell: OnEvent) -> Iterator[Picture | Failure]:
        """Yields each picture as soon as it is out."""
        try:
            clock = time.perf_counter()
            for result in self._run(requests, tell):
                self.timings["total"] += time.perf_counter() - clock
                yield result
                clock = time.perf_counter()  # what the caller does with a picture is not ours to count
            self.timings["total"] += time.perf_counter() - clock
        finally:  # also when the caller stops early: nothing may be left for the next run
            self.sampler.clear()
            self.hands_sampler.clear()
            if not self.closed:  # nor for a stream to wait for, if the caller closed the loop meanwhile
                for stream in {self.main, self.side, self.out}:
                    stream.synchronize()
                self.staging.reclaim()
                self.after_run()

    def _run(self, requests: Iterable[Request | None], tell: OnEvent) -> Iterator[Picture | Failure]:
        source, more = iter(requests), True
        self.ready, self.running = deque(), {}
        ready, running = self.ready, self.running
        exits: deque[_Exit] = deque()
        while more or ready or running or exits:
            while self.cancelled:
                yield from self._drop(self.cancelled.pop())
            if more and not ready and (self.overlap or self.sampler.free):
                some, more = take(source, self.slots)
                if some:
                    batch, failures = self._stage_1(some)
                    ready.extend((batch, row) for row in range(len(batch.works)))
                    tell("hands", len(some))
                    yield from failures
            self._admit(ready, running)
            if self.sampler.jobs:
                finished: list[tuple[DeviceJob, Any]] = []
                tell("steps", self._step(finished, exits))
                self.sampler.wait(AHEAD)
                self.timings["unet"] = self.sampler.seconds
            while exits and (exits[0].event.done() or not self.sampler.jobs):
                exits[0].event.synchronize()
                yield from self._collect(exits.popleft(), running)

    def cancel(self, id: str) -> None:
        """See `HanDiffuser.cancel`."""
        self.cancelled.add(id)

    def _drop(self, id: Hashable) -> list[Failure]:
        """Takes a request out between two steps; one whose latents are on their way out comes out."""
        for i, (batch, row) in enumerate(self.ready):
            if batch.works[row].request.id == id:
                del self.ready[i]
                if not self.ready:  # those before it have been read, and nobody will read its own
                    self.consumed = [self.main.record()]
                return [self._left(batch, row)]
        if all(job.key != id for job in self.sampler.jobs):
            return []
        self.sampler.drop(self.main, id)
        return [self._left(*self.running.pop(id))]

    def _left(self, batch: _Batch, row: int) -> Failure:
        batch.arrived.synchronize()  # its copies may be under way
        self._done(batch)
        return cancelled(batch.works[row].request)

    def _done(self, batch: _Batch) -> None:
        """One of a batch is out; with the last its memory is free."""
        batch.left -= 1
        if not batch.left:
            for array in (*batch.host.values(), batch.log):
                self.staging.give(array)

    def peek(self, id: str) -> Peek | None:
        """See `HanDiffuser.peek`. The host waits for the steps that are under way."""
        where = {batch.works[row].request.id: (batch, row) for batch, row in self.ready} | self.running
        if id not in where:
            return None
        batch, row = where[id]
        batch.arrived.synchronize()
        values = {name: value[row].copy() for name, value in batch.host.items()}
        work = batch.works[row]
        shown = Work(work.request, work.started, work.ids, [], None, self.bundle.params(values.pop("x")), values)
        steps = len(self.bundle.table(LATENTS, work.request).rows)
        step, latents = 0, None
        if id in self.running:
            i = next((i for i, job in enumerate(self.sampler.jobs) if job.key == id), None)
            if i is None:  # on its way out
                return None
            step = self.sampler.jobs[i].position
            pinned = self._read(self.main, self.sampler.state[i])
            self.main.record().synchronize()
            latents = pinned.copy()
            self.staging.give(pinned)
        return Peek(step, steps, self.bundle.hands_of(shown), latents)

    def hands(self, requests: list[Request]) -> list[dict[str, np.ndarray] | Failure]:
        """See `HanDiffuser.hands`. Keys and values that wait for a slot are in other buffers, and stay."""
        works, jobs, failures = self._hands(requests)
        made: dict[str, Any] = {failure.id: failure for failure in failures}
        if works:
            host = self._read_hands(len(works))
            log = self._read(self.side, self.hands_sampler.log)
            self.side.record().synchronize()
            for row, work in enumerate(works):
                values = {name: value[row].copy() for name, value in host.items()}
                bad = self._bad_hands(work, values, jobs.get(work.request.id), log)
                if bad is None:
                    work.params, work.features = self.bundle.params(values.pop("x")), values
                made[str(work.request.id)] = bad or self.bundle.hands_of(work)
            for array in (*host.values(), log):
                self.staging.give(array)
        return [made[str(request.id)] for request in requests]

    def _read_hands(self, count: int) -> dict[str, np.ndarray]:
        """Enqueues copies of x and of the features to pinned memory."""
        features = self.graphs["hand_features"]
        host = {"x": self._read(self.side, features.inputs["x"][:count])}
        return host | {name: self._read(self.side, array[:count]) for name, array in features.outputs.items()}

    def _bad_hands(
        self, work: Work, values: dict[str, np.ndarray], job: DeviceJob | None, log: np.ndarray
    ) -> Failure | None:
        """A sentence where hands are not finite."""
        bad = first_bad(log, job) if job is not None else None
        if bad is not None:
            return not_finite(work.request, f"hand_prior, step {bad}")
        if not all(np.isfinite(value).all() for value in values.values()):
            return not_finite(work.request, "hand_features")
        return None

    def _admit(self, ready: deque[tuple[_Batch, int]], running: dict[Hashable, tuple[_Batch, int]]) -> None:
        """Fills free slots."""
        admitted = False
        while ready and self.sampler.free:
            batch, row = ready.popleft()
            work = batch.works[row]
            self.main.wait(batch.done)
            constants = {name: self.graphs["unet_context"].outputs[name][row] for name in self.sampler.constants}
            self.sampler.submit(self.main, self._job(work.request, LATENTS, constants))
            running[work.request.id] = (batch, row)
            admitted = True
        if admitted and not ready:
            self.consumed = [self.main.record()]

    def _step(self, finished: list[tuple[DeviceJob, Any]], exits: deque[_Exit]) -> int:
        """One step of stage 2; those that are done go to the decoder."""
        buffer, log, busy = self.exits[0]
        if busy is not None:
            self.main.wait(busy)  # the decoder has read what this buffer held

        def take(job: DeviceJob, state: Any) -> None:
            self.main.copy(buffer[len(finished)], state)
            finished.append((job, state))

        count = self.sampler.step(self.main, take)
        if finished:
            jobs = [job for job, _ in finished]
            self.main.copy(log, self.sampler.log)
            exits.append(self._decode(jobs, buffer, log))
            self.exits = [*self.exits[1:], (buffer, log, exits[-1].event)]
        return count

    def _decode(self, jobs: list[DeviceJob], latents: Any, log: Any) -> _Exit:
        count, decoder = len(jobs), self.graphs["image_decoder"]
        self.out.wait(self.main.record())
        self.out.copy(decoder.inputs["latents"][:count], latents[:count])
        decoder.launch(self.out, count)
        leaving = _Exit(
            jobs,
            self._read(self.out, decoder.outputs["image"][:count]),
            self._read(self.out, decoder.outputs["finite"][:count]),
            self._read(self.out, log),
        )
        leaving.event = self.out.record()
        return leaving

    def _stage_1(self, requests: list[Request]) -> tuple[_Batch, list[Failure]]:
        """Enqueues text -> hands -> features -> context -> keys and values for a batch of requests."""
        graphs, side = self.graphs, self.side
        for event in self.consumed:
            side.wait(event)
        works, jobs, failures = self._hands(requests)
        count = len(works)
        if count:
            encoder = graphs["text_hand_encoder"]
            ids = np.stack([work.ids for work in works])
            self.staging.upload(side, encoder.inputs["input_ids"][:count], ids)
            encoder.launch(side, count)
            graphs["unet_context"].launch(side, count)
        done = side.record()
        host = self._read_hands(count) if count else {}
        log = self._read(side, self.hands_sampler.log)
        return _Batch(works, jobs, done, host, log, side.record(), left=count), failures

    def _hands(self, requests: list[Request]) -> tuple[list[Work], dict[Hashable, DeviceJob], list[Failure]]:
        """Enqueues text -> hands -> features."""
        bundle, graphs, side = self.bundle, self.graphs, self.side
        started = time.perf_counter()
        works: list[Work] = []
        failures = []
        given: dict[Hashable, np.ndarray] = {}
        for request in requests:
            if request.hands is not None:
                try:
                    given[request.id] = bundle.given(load_hands(request.hands), self._joints)
                except RequestError as error:  # it was good when the run began
                    failures.append(Failure(str(request.id), request, str(error)))
                    continue
            works.append(Work(request, started, *bundle.tokens(request)))
        rows: dict[Hashable, int] = {work.request.id: row for row, work in enumerate(works)}
        x = graphs["hand_features"].inputs["x"]
        for key, value in given.items():
            self.staging.upload(side, x[rows[key]], value)
        jobs: dict[Hashable, DeviceJob] = {}
        textual = [work for work in works if work.request.id not in given]
        if textual:
            text = self._encode(np.stack([work.ids[1] for work in textual]))
            for i in range(len(textual)):
                side.copy(self.both[i][0], self.no_text)
                side.copy(self.both[i][1], text[i])
        texts = {work.request.id: self.both[i] for i, work in enumerate(textual)}
        # First all of them; then those whose hands do not fit into a picture, from other noise.
        drawing = works
        while drawing:
            for work in drawing:
                if work.request.id in texts:
                    constants = {"text": texts[work.request.id]}
                    jobs[work.request.id] = self._job(work.request, HANDS, constants, work.draws)
                    self.hands_sampler.submit(side, jobs[work.request.id])
                    work.draws += 1
            while self.hands_sampler.jobs:
                self.hands_sampler.step(side, lambda job, state: side.copy(x[rows[job.key]], state))
            graphs["hand_features"].launch(side, len(works))
            drawing = self._clashing(drawing, rows)
        return works, jobs, failures

    def _clashing(self, works: list[Work], rows: Mapping[Hashable, int]) -> list[Work]:
        """Those whose hands, in these rows, are to be drawn again. Where a request may want that the host waits."""
        asked = [work for work in works if work.draws and work.draws <= (work.request.hand_redraws or 0)]
        if not asked:
            return []
        outputs, side = self.graphs["hand_features"].outputs, self.side
        sources = {"x": self.graphs["hand_features"].inputs["x"], **{name: outputs[name] for name in JUDGED}}
        count = 1 + max(rows[work.request.id] for work in asked)
        host = {name: self._read(side, source[:count]) for name, source in sources.items()}
        side.record().synchronize()
        again = []
        for work in asked:
            hands = {name: value[rows[work.request.id]] for name, value in host.items()}
            finite = all(np.isfinite(value).all() for value in hands.values())  # what is not ends as a failure
            if finite and self.bundle.again(work, hands["x"], hands):
                again.append(work)
        for array in host.values():
            self.staging.give(array)
        return again

    def _joints(self, x: np.ndarray) -> np.ndarray:
        """[P] -> [62, 3] metres. The host waits for it: once for each file of hands."""
        features, side = self.graphs["hand_features"], self.side
        self.staging.upload(side, features.inputs["x"][:1], x[None])
        features.launch(side, 1)
        pinned = self._read(side, features.outputs["joints_3d"][:1])
        side.record().synchronize()
        joints: np.ndarray = pinned[0].copy()
        self.staging.give(pinned)
        return joints

    def _encode(self, ids: np.ndarray) -> Any:
        """The text [B, 77, D] of prompts [B, length]; the first time also the empty prompt's."""
        encoder, side = self.graphs["text_encoder"], self.side
        if self.no_text is None:
            self.staging.upload(side, encoder.inputs["input_ids"][:1], self.bundle.tokenizer.encode("")[0][None])
            encoder.launch(side, 1)
            self.no_text = self.cuda.zeros(encoder.outputs["text"].shape[1:], encoder.outputs["text"].dtype)
            side.copy(self.no_text, encoder.outputs["text"][0])
        self.staging.upload(side, encoder.inputs["input_ids"][: len(ids)], ids)
        encoder.launch(side, len(ids))
        return encoder.outputs["text"][: len(ids)]

    def _job(self, request: Request, stream: str, constants: Mapping[str, Any], draw: int = 0) -> DeviceJob:
        """A job whose noise is the request's own, as on the host."""
        device_table = self._table(stream, request)
        table = device_table.table
        return DeviceJob(request.id, request.noise(stream, table, draw), device_table, constants)

    def _table(self, stream: str, request: Request) -> DeviceTable:
        """A schedule on the device, put there once."""
        table = self.bundle.table(stream, request)
        key = (stream, id(table))  # see DeviceTable: who keeps one keeps its table, so that an id stays its own
        if key in self.tables:
            return self.tables[key]
        sampler, on = (self.hands_sampler, self.side) if stream == HANDS else (self.sampler, self.main)
        rows = self.cuda.zeros(table.rows.shape, "float32")
        self.staging.upload(on, rows, table.rows)
        steps = {"row": rows}
        if "time" in sampler.tables:
            steps["time"] = self._time_rows(on, table.timesteps.astype(np.float32))
        made = DeviceTable(table, steps)
        keep(self.tables, key, made)  # jobs keep the tables they use
        return made

    def _time_rows(self, stream: Any, timesteps: np.ndarray) -> Any:
        """Runs `unet_time` once for a schedule: [N] -> [N, T] on the device."""
        graph = self.graphs["unet_time"]
        count = len(timesteps)
        self.staging.upload(stream, graph.inputs["timesteps"][:count], timesteps)
        graph.launch(stream, count)
        kept = self.cuda.zeros((count, *graph.outputs["time"].shape[1:]), graph.outputs["time"].dtype)
        stream.copy(kept, graph.outputs["time"][:count])
        return kept

    def _read(self, stream: Any, source: Any) -> np.ndarray:
        """Enqueues a copy to pinned memory, which is good after the stream's next event."""
        pinned = self.staging.take(tuple(source.shape), source.dtype)
        stream.copy(pinned, source)
        return pinned

    def _collect(self, leaving: _Exit, running: dict[Hashable, tuple[_Batch, int]]) -> list[Picture | Failure]:
        """Pictures from what has arrived on the host."""
        results: list[Picture | Failure] = []
        for i, job in enumerate(leaving.jobs):
            batch, row = running.pop(job.key)
            batch.arrived.synchronize()  # long past
            work = batch.works[row]
            values = {name: value[row].copy() for name, value in batch.host.items()}
            hand_job = batch.jobs.get(job.key)
            bad_hands = self._bad_hands(work, values, hand_job, batch.log)
            bad_step = first_bad(leaving.log, job)
            if bad_hands is not None:
                results.append(bad_hands)
            elif bad_step is not None:
                results.append(not_finite(work.request, f"unet, step {bad_step}"))
            elif not leaving.finite[i] > 0.5:
                results.append(not_finite(work.request, "image_decoder"))
            else:
                work.params = self.bundle.params(values.pop("x"))
                work.features = values
                results.append(self.bundle.picture(work, leaving.image[i]))
            self._done(batch)
        for array in (leaving.image, leaving.finite, leaving.log):
            self.staging.give(array)
        return results
