"""The two stages on a GPU: the same loop as in `pipeline`, with everything between prompt and picture on the device.

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
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..contract import BRANCHES, GRAPHS, GraphSpec, Manifest, TensorSpec
from ..engines.base import DeviceEngine
from ..engines.cuda import Cuda
from ..engines.inductor import InductorDeviceEngine, InductorEngine, find_compiled
from ..engines.onnxruntime import OnnxRuntimeDeviceEngine, OnnxRuntimeEngine
from ..engines.plans import KERNELS, Plan, PlanStore, belongs
from ..engines.tensorrt import Backend, Scratch, TensorRTEngine
from ..errors import BundleError, EngineError, RequestError
from .hands import load_hands
from .noise import HANDS, LATENTS, of_request
from .requests import MAX_STEPS, Request, take
from .sampler import GUIDANCE
from .schedules import Table
from .steptimes import StepTimes

if TYPE_CHECKING:
    from .pipeline import Failure, HanDiffuser, OnEvent, Picture, Work

AHEAD = 3  # steps that the host enqueues beyond the one that runs: the device never waits, new requests hardly do
TABLES = 64  # schedules that are kept
LOG = 2 * MAX_STEPS  # steps whose finite flags are kept; more than a request may take


class DeviceGraph:
    """A graph of the bundle with its buffers, and one engine and one captured launch per bucket.

    buckets: batch sizes there are engines for. load: bucket -> engine, called when a bucket is first used.
    shared: buffers that are another graph's outputs, by input name. single: buckets that also have an engine of the
    conditional branch alone, whose inputs with one entry per branch lie in `alone`.
    """

    def __init__(
        self,
        cuda: Any,
        spec: GraphSpec,
        buckets: Sequence[int],
        load: Callable[[int, int], DeviceEngine],
        shared: Mapping[str, Any] | None = None,
        capture: bool = True,
        single: Collection[int] = (),
    ) -> None:
        self.spec, self.buckets, self.load, self.capture = spec, sorted(buckets), load, capture
        shared = shared or {}

        def buffer(tensor: TensorSpec, branches: int = 2) -> Any:
            rest = (branches if size == BRANCHES else size for size in tensor.shape[1:])
            return cuda.zeros((self.buckets[-1], *rest), tensor.dtype)

        self.inputs = {t.name: shared[t.name] if t.name in shared else buffer(t) for t in spec.inputs}
        self.outputs = {t.name: buffer(t) for t in spec.outputs}
        self.single = frozenset(single) if spec.branched else frozenset()
        self.alone = {t.name: buffer(t, 1) for t in spec.inputs if self.single and t.name in spec.branched}
        self._launches: dict[tuple[int, int], Callable[[Any], None]] = {}
        self.refused: list[int] = []  # buckets whose capture was refused

    def bucket(self, count: int) -> int:
        """The smallest bucket that holds `count` rows."""
        for bucket in self.buckets:
            if bucket >= count:
                return bucket
        raise EngineError(
            f"{count} rows are more than the largest engine of {self.spec.file} takes ({self.buckets[-1]}). "
            f"Build one: hd-engines build FOLDER --batch-sizes {count}."
        )

    def launch(
        self, stream: Any, count: int, after: Callable[[Any, int], None] | None = None, alone: bool = False
    ) -> None:
        """Enqueues one run over the first `count` rows, and what `after` enqueues for its bucket.

        alone: of the guidance branches run the conditional one only, where there is an engine for that. The first time
        it runs as it is, so that kernels are loaded; then it is captured, and from then on launched.
        """
        bucket = self.bucket(count)
        alone = alone and bucket in self.single
        key = (bucket, 1 if alone else 2)
        if key in self._launches:
            self._launches[key](stream)
            return
        engine = self.load(*key)
        inputs = {**self.inputs, **self.alone} if alone else self.inputs
        engine.bind(
            {name: array[:bucket] for name, array in inputs.items()},
            {name: array[:bucket] for name, array in self.outputs.items()},
        )

        def work(stream: Any) -> None:
            engine.enqueue(stream)
            if after is not None:
                after(stream, bucket)

        work(stream)
        graph = None
        if self.capture:
            if not engine.own_graph and engine.capturable(stream):
                graph = stream.capture(lambda: work(stream))
            if graph is None and not engine.own_graph:
                self.refused.append(bucket)
        self._launches[key] = work if graph is None else graph.launch


class Staging:
    """Pinned host memory for copies that are under way; a buffer is used again when its copy is done."""

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda
        self.free: dict[tuple[Any, ...], list[np.ndarray]] = {}
        self.busy: deque[tuple[Any, np.ndarray]] = deque()

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A pinned array of anything; `give` it back."""
        self.sweep()
        kept = self.free.get((shape, np.dtype(dtype).str))
        return kept.pop() if kept else self.cuda.pinned(shape, dtype)

    def give(self, array: np.ndarray) -> None:
        self.free.setdefault((array.shape, array.dtype.str), []).append(array)

    def upload(self, stream: Any, target: Any, value: np.ndarray) -> None:
        """Copies a host array into a device array of its size, without waiting."""
        pinned = self.take(tuple(value.shape), target.dtype)
        pinned[...] = value
        stream.copy(target, pinned)
        self.busy.append((stream.record(), pinned))

    def sweep(self) -> None:
        """Takes back the buffers whose copies are done."""
        for _ in range(len(self.busy)):
            event, array = self.busy.popleft()
            if event.done():
                self.give(array)
            else:
                self.busy.append((event, array))


class Streams(NamedTuple):
    """Where work goes: the steps of stage 2, what makes their inputs, what makes pictures of their results."""

    main: Any
    side: Any
    out: Any

    @classmethod
    def make(cls, cuda: Any, overlap: bool) -> Streams:
        """Three streams, or one that bears all three names."""
        main = cuda.stream()
        return cls(main, cuda.stream(), cuda.stream()) if overlap else cls(main, main, main)


# The stream of each graph's engines; those of one stream never run at once, and share their scratch memory.
STREAM = dict.fromkeys(GRAPHS, "side") | {"unet": "main", "unet_time": "main", "image_decoder": "out"}
STEPS = ("hand_prior", "unet")  # the graphs that run again and again


@dataclass
class DeviceTable:
    """A schedule on the device: rows [N, R] and, for the UNet, time rows [N, T]."""

    table: Table
    steps: dict[str, Any]  # "row", perhaps "time"


@dataclass
class DeviceJob:
    """One request's way through a step graph; constants are device arrays without a batch axis."""

    key: Hashable
    state: np.ndarray
    table: DeviceTable
    constants: Mapping[str, Any]
    noise: Callable[[int], np.ndarray] | None = None
    position: int = 0
    log: list[tuple[int, int]] = field(default_factory=list)  # (step of the log, row) of each of its steps


class DeviceSampler:
    """The step sampler's twin: `slots` jobs in flight, compacted to the front of the step graph's buffers.

    Not all of it: a job's result is where `take` puts it, and whether it is finite is known when the log has come.
    times: what steps took, which decides how many jobs the next one advances; without it, all of them.
    """

    def __init__(
        self,
        cuda: Any,
        graph: DeviceGraph,
        state_name: str,
        slots: int,
        staging: Staging,
        times: StepTimes | None = None,
    ) -> None:
        self.graph, self.state_name, self.slots, self.staging = graph, state_name, slots, staging
        self.jobs: list[DeviceJob] = []
        moving = [name for name in (state_name, "history") if name in graph.inputs]
        self.state, self.moving = graph.inputs[state_name], moving
        self.tables = [name for name in ("row", "time") if name in graph.inputs]
        self.constants = [n for n in graph.inputs if n not in (*moving, *self.tables, "noise")]
        self.log = cuda.zeros((LOG, graph.buckets[-1]), "float32")
        self.count = 0  # steps launched so far
        self.times = times
        self.marks: deque[tuple[Any, Any, int, bool]] = deque()  # start, end, rows, alone: of the steps under way

    @property
    def free(self) -> int:
        return self.slots - len(self.jobs)

    def submit(self, stream: Any, job: DeviceJob) -> None:
        """Takes a job in; what it reads must be there when `stream` gets to it."""
        i = len(self.jobs)
        self.staging.upload(stream, self.state[i], job.state)
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
        count = len(self.jobs)
        if self.times is not None:
            count = self.times.choose(count, self._alone(count))
        start = stream.record(timed=True) if self.times is not None else None
        for i, job in enumerate(self.jobs[:count]):
            for name in self.tables:
                stream.copy(self.graph.inputs[name][i], job.table.steps[name][job.position])
            if job.noise is not None:
                self.staging.upload(stream, self.graph.inputs["noise"][i], job.noise(job.position))
        alone = self._alone(count)
        self.graph.launch(stream, count, self._advance, alone)
        line = self.count % LOG
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

    def wait(self, ahead: int) -> None:
        """Until at most `ahead` steps are under way; the times of the others are noted."""
        while len(self.marks) > ahead:
            start, end, rows, alone = self.marks.popleft()
            end.synchronize()
            if self.times is not None:
                self.times.add(rows, end.seconds_since(start), alone)

    def clear(self) -> None:
        """Forgets the jobs, and steps that nobody waited for."""
        self.jobs.clear()
        self.marks.clear()

    def _alone(self, count: int) -> bool:
        """Whether the first jobs take a step without guidance."""
        return all(job.table.table.rows[job.position, GUIDANCE] == 1 for job in self.jobs[:count])

    def _advance(self, stream: Any, bucket: int) -> None:
        """Makes what a step gave what the next one takes; captured with the step."""
        for name in self.moving:
            stream.copy(self.graph.inputs[name][:bucket], self.graph.outputs[name][:bucket])

    def _remove(self, stream: Any, i: int) -> None:
        """Closes row i's gap: the rows behind it move up, so that they stay in the order of their age."""
        buffers = [self.graph.inputs[name] for name in (*self.moving, *self.constants, "noise")]
        for row in range(i, len(self.jobs) - 1):
            for array in (*buffers, *self.graph.alone.values()):
                stream.copy(array[row], array[row + 1])
        self.jobs.pop(i)


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

    def __init__(
        self, pipeline: HanDiffuser, cuda: Any, graphs: dict[str, DeviceGraph], streams: Streams, slots: int
    ) -> None:
        self.pipeline, self.cuda, self.graphs, self.slots = pipeline, cuda, graphs, slots
        self.main, self.side, self.out = streams
        self.overlap = self.side is not self.main
        self.staging = Staging(cuda)
        self.hands = DeviceSampler(cuda, graphs["hand_prior"], "x", slots, self.staging)
        times = StepTimes(graphs["unet"].buckets)
        self.sampler = DeviceSampler(cuda, graphs["unet"], "latents", slots, self.staging, times)
        latents = graphs["unet"].inputs["latents"]
        # Latents that have left their slots and wait for the decoder: three, so that the UNet never waits for it.
        self.exits = [(cuda.zeros((slots, *latents.shape[1:]), "float32"), None) for _ in range(3)]
        self.tables: dict[tuple[Any, ...], DeviceTable] = {}
        text = graphs["text_encoder"].outputs["text"]
        self.both = cuda.zeros((slots, 2, *text.shape[1:]), text.dtype)  # of each prompt: without text, with it
        self.no_text: Any = None  # the empty prompt's sentence vector [D], on the device
        self.after_run: Callable[[], None] = lambda: None
        self.consumed: list[Any] = []  # events: stage 1's outputs have been read, and may be overwritten

    def warnings(self) -> list[str]:
        """What the user should know about how this runs."""
        refused = [name for name, graph in self.graphs.items() if graph.refused]
        if not refused:
            return []
        return [f"CUDA graphs could not be captured for {', '.join(refused)}; they are launched kernel by kernel."]

    def run(self, requests: Iterable[Request | None], tell: OnEvent) -> Iterator[Picture | Failure]:
        """Yields each picture as soon as it is out."""
        try:
            yield from self._run(requests, tell)
        finally:  # also when the caller stops early: nothing may be left for the next run
            for stream in {self.main, self.side, self.out}:
                stream.synchronize()
            self.sampler.clear()
            self.hands.clear()
            self.after_run()

    def _run(self, requests: Iterable[Request | None], tell: OnEvent) -> Iterator[Picture | Failure]:
        source, more = iter(requests), True
        ready: deque[tuple[_Batch, int]] = deque()
        running: dict[Hashable, tuple[_Batch, int]] = {}
        exits: deque[_Exit] = deque()
        while more or ready or running or exits:
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
            while exits and (exits[0].event.done() or not self.sampler.jobs):
                exits[0].event.synchronize()
                yield from self._collect(exits.popleft(), running)

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
        buffer, busy = self.exits[0]
        if busy is not None:
            self.main.wait(busy)  # the decoder has read what this buffer held

        def take(job: DeviceJob, state: Any) -> None:
            self.main.copy(buffer[len(finished)], state)
            finished.append((job, state))

        count = self.sampler.step(self.main, take)
        if finished:
            jobs = [job for job, _ in finished]
            exits.append(self._decode(jobs, buffer))
            self.exits = [*self.exits[1:], (buffer, exits[-1].event)]
        return count

    def _decode(self, jobs: list[DeviceJob], latents: Any) -> _Exit:
        count, decoder = len(jobs), self.graphs["image_decoder"]
        self.out.wait(self.main.record())
        self.out.copy(decoder.inputs["latents"][:count], latents[:count])
        decoder.launch(self.out, count)
        leaving = _Exit(
            jobs,
            self._read(self.out, decoder.outputs["image"][:count]),
            self._read(self.out, decoder.outputs["finite"][:count]),
            self._read(self.out, self.sampler.log),
        )
        leaving.event = self.out.record()
        return leaving

    def _stage_1(self, requests: list[Request]) -> tuple[_Batch, list[Failure]]:
        """Enqueues text -> hands -> features -> context -> keys and values for a batch of requests."""
        from .pipeline import Failure, Work

        pipeline, graphs, side = self.pipeline, self.graphs, self.side
        started = time.perf_counter()
        works: list[Work] = []
        failures = []
        given: dict[Hashable, np.ndarray] = {}
        for request in requests:
            if request.hands is not None:
                try:
                    given[request.id] = pipeline.normalised(load_hands(request.hands))
                except RequestError as error:  # it was good when the run began
                    failures.append(Failure(str(request.id), request, str(error)))
                    continue
            works.append(Work(request, started, *pipeline.tokens(request)))
        for event in self.consumed:
            side.wait(event)
        rows: dict[Hashable, int] = {work.request.id: row for row, work in enumerate(works)}
        x = graphs["hand_features"].inputs["x"]
        jobs: dict[Hashable, DeviceJob] = {}
        textual = [work for work in works if work.request.id not in given]
        if textual:
            text = self._encode(np.stack([work.ids[1] for work in textual]))
            for i, work in enumerate(textual):
                side.copy(self.both[i][0], self.no_text)
                side.copy(self.both[i][1], text[i])
                jobs[work.request.id] = self._job(work.request, HANDS, {"text": self.both[i]})
                self.hands.submit(side, jobs[work.request.id])
            while self.hands.jobs:
                self.hands.step(side, lambda job, state: side.copy(x[rows[job.key]], state))
        for key, value in given.items():
            self.staging.upload(side, x[rows[key]], value)

        count = len(works)
        features, encoder = graphs["hand_features"], graphs["text_hand_encoder"]
        if count:
            features.launch(side, count)
            ids = np.stack([work.ids for work in works])
            self.staging.upload(side, encoder.inputs["input_ids"][:count], ids)
            encoder.launch(side, count)
            graphs["unet_context"].launch(side, count)
        done = side.record()
        host = {"x": self._read(side, x[:count])} if count else {}
        host |= {name: self._read(side, array[:count]) for name, array in features.outputs.items() if count}
        log = self._read(side, self.hands.log)
        return _Batch(works, jobs, done, host, log, side.record(), left=count), failures

    def _encode(self, ids: np.ndarray) -> Any:
        """Sentence vectors [B, D] of prompts [B, length]; the first time also the empty prompt's."""
        encoder, side = self.graphs["text_encoder"], self.side
        if self.no_text is None:
            self.staging.upload(side, encoder.inputs["input_ids"][:1], self.pipeline.tokenizer.encode("")[0][None])
            encoder.launch(side, 1)
            self.no_text = self.cuda.zeros(encoder.outputs["text"].shape[1:], encoder.outputs["text"].dtype)
            side.copy(self.no_text, encoder.outputs["text"][0])
        self.staging.upload(side, encoder.inputs["input_ids"][: len(ids)], ids)
        encoder.launch(side, len(ids))
        return encoder.outputs["text"][: len(ids)]

    def _job(self, request: Request, stream: str, constants: Mapping[str, Any]) -> DeviceJob:
        """A job whose noise is the request's own, as on the host."""
        device_table = self._table(stream, request)
        table = device_table.table
        shape = (self.hands if stream == HANDS else self.sampler).state.shape[1:]
        state, noise = of_request(request.seed, stream, shape, table.init_sigma, table.stochastic)
        return DeviceJob(request.id, state, device_table, constants, noise)

    def _table(self, stream: str, request: Request) -> DeviceTable:
        """A schedule on the device, put there once."""
        table = self.pipeline.table(stream, request)
        key = (stream, id(table))  # the pipeline keeps its tables, so that an id stays its own
        if key in self.tables:
            return self.tables[key]
        sampler, on = (self.hands, self.side) if stream == HANDS else (self.sampler, self.main)
        rows = self.cuda.zeros(table.rows.shape, "float32")
        self.staging.upload(on, rows, table.rows)
        steps = {"row": rows}
        if "time" in sampler.tables:
            steps["time"] = self._time_rows(on, table.timesteps.astype(np.float32))
        if len(self.tables) >= TABLES:  # a server sees ever new guidances; jobs keep the tables they use
            self.tables.pop(next(iter(self.tables)))
        self.tables[key] = DeviceTable(table, steps)
        return self.tables[key]

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
        from .pipeline import not_finite

        results: list[Picture | Failure] = []
        for i, job in enumerate(leaving.jobs):
            batch, row = running.pop(job.key)
            batch.arrived.synchronize()  # long past
            work = batch.works[row]
            values = {name: value[row].copy() for name, value in batch.host.items()}
            hand_job = batch.jobs.get(job.key)
            bad_hands = first_bad(batch.log, hand_job) if hand_job is not None else None
            bad_step = first_bad(leaving.log, job)
            if bad_hands is not None:
                results.append(not_finite(work.request, f"hand_prior, step {bad_hands}"))
            elif not all(np.isfinite(value).all() for value in values.values()):
                results.append(not_finite(work.request, "hand_features"))
            elif bad_step is not None:
                results.append(not_finite(work.request, f"unet, step {bad_step}"))
            elif not leaving.finite[i] > 0.5:
                results.append(not_finite(work.request, "image_decoder"))
            else:
                work.params = self.pipeline.params(values.pop("x"))
                work.features = values
                results.append(self.pipeline.picture(work, leaving.image[i]))
            batch.left -= 1
            if not batch.left:
                for array in (*batch.host.values(), batch.log):
                    self.staging.give(array)
        for array in (leaving.image, leaving.finite, leaving.log):
            self.staging.give(array)
        return results


def connect(
    cuda: Any,
    manifest: Manifest,
    buckets: Sequence[int],
    load: Callable[[str, int, int], DeviceEngine],
    capture: bool = True,
    single: Mapping[str, Collection[int]] | None = None,
) -> dict[str, DeviceGraph]:
    """The bundle's graphs with their buffers; what one gives to the next is one buffer, not copied.

    load: (graph, bucket, guidance branches) -> engine. single: graph -> buckets of which there is one for one branch.
    """
    graphs: dict[str, DeviceGraph] = {}
    feeds = {"text_hand_encoder": "hand_features", "unet_context": "text_hand_encoder"}
    for name in GRAPHS:
        spec = manifest.graphs[name]
        shared = graphs[feeds[name]].outputs if name in feeds else {}
        free = {size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)}
        # Schedules are of any length, each is prepared once: nothing to pad, nothing to capture.
        one_axis = free == {"S"}
        graphs[name] = DeviceGraph(
            cuda,
            spec,
            range(1, MAX_STEPS + 1) if one_axis else buckets,
            lambda bucket, branches, name=name: load(name, bucket, branches),  # type: ignore[misc]
            shared,
            capture and not one_axis,
            (single or {}).get(name, ()),
        )
    return graphs


def load_loop(
    pipeline: HanDiffuser,
    folder: Path,
    backend: str,
    slots: int,
    overlap: bool = True,
    onnxruntime_graphs: bool = False,
) -> tuple[DeviceLoop, list[str]]:
    """The loop of a bundle on this machine's GPU, and what the user should know about it.

    backend: "tensorrt" or "tensorrt-rtx" (with plans in `folder`), "inductor" (with graphs compiled for the GPU there)
    or "onnxruntime" (its CUDA provider). onnxruntime_graphs: see `onnxruntime_loader`.
    Raises EngineError without a GPU, without the backend, or without plans for them.
    """
    cuda, manifest, warnings = Cuda(), pipeline.manifest, []
    check_bfloat16(manifest, cuda)
    streams = Streams.make(cuda, overlap)
    engines: list[TensorRTEngine] = []
    if backend in ("onnxruntime", "inductor"):
        buckets = powers_of_two(slots)
        if backend == "inductor":
            load = inductor_loader(manifest, folder)
        else:
            load = onnxruntime_loader(manifest, folder, streams, onnxruntime_graphs)
        single = dict.fromkeys(STEPS, buckets)
    else:
        module = Backend(backend)
        store = PlanStore(folder)
        plans = usable_plans(store, manifest, module, cuda)
        singles = usable_plans(store, manifest, module, cuda, branches=1)
        single = {name: list(sizes) for name, sizes in singles.items()}
        buckets = sorted(set.intersection(*(set(sizes) for name, sizes in plans.items() if name != "unet_time")))
        if not buckets:
            raise EngineError(f"{folder} has no batch size that all graphs have plans for: hd-engines build {folder}.")
        if slots > buckets[-1]:
            warnings.append(
                f"The engines take up to {buckets[-1]} pictures at once, so the batch size {slots} became that. For "
                f"more: hd-engines build {folder} --batch-sizes {','.join(map(str, (*buckets, slots)))}."
            )
            slots = buckets[-1]
        buckets = [bucket for bucket in buckets if bucket <= powers_of_two(slots)[-1]] or buckets[:1]
        load = tensorrt_loader(manifest, store, {2: plans, 1: singles}, module, cuda, engines)
    loop = DeviceLoop(pipeline, cuda, connect(cuda, manifest, buckets, load, single=single), streams, slots)

    def keep_kernels() -> None:
        for engine in engines:
            engine.keep_kernels()

    loop.after_run = keep_kernels
    return loop, warnings


def check_bfloat16(manifest: Manifest, cuda: Any) -> None:
    """Raises EngineError for a bundle in bfloat16 on a GPU that is older than Ampere (compute capability 8.0)."""
    if manifest.precision == "bf16" and int(cuda.compute_capability.split(".")[0]) < 8:
        raise EngineError(
            f"The bundle computes in bfloat16, which this GPU does not ({cuda.name}, compute capability "
            f"{cuda.compute_capability}). Export it again: hd-export CHECKPOINT OUT --precision fp16."
        )


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4 ... up to the first that holds `most`."""
    out = [1]
    while out[-1] < most:
        out.append(2 * out[-1])
    return out


def usable_plans(
    store: PlanStore, manifest: Manifest, backend: Backend, cuda: Any, branches: int = 2
) -> dict[str, dict[int, Plan]]:
    """Graph -> batch size -> plan, of the plans that belong to this bundle, backend and GPU; the newest of equals.

    branches: those that run this many guidance branches; of one branch alone there may be none.
    Raises EngineError when a graph has no plan.
    """
    found: dict[str, dict[int, Plan]] = {name: {} for name in GRAPHS}
    for plan in sorted(store, key=lambda plan: plan.path.stat().st_mtime if plan.path.exists() else 0):
        if plan.graph not in found or plan.branches != branches or store.problem(plan, verify=False):
            continue
        made_by = (plan.parts["backend"], plan.parts["version"])
        if (
            not belongs(plan, manifest)
            or made_by != (backend.name, backend.version)
            or not backend.runs_on(plan.parts["target"], cuda)
        ):
            continue
        least, most = plan.batch
        sizes = [n for n in powers_of_two(most) if least <= n <= most] if least != most else [most]
        found[plan.graph].update(dict.fromkeys({*sizes, most}, plan))
    missing = [name for name, sizes in found.items() if not sizes]
    if missing and branches == 2:
        raise EngineError(
            f"{store.folder.parent} has no {backend.name} {backend.version} plans of {', '.join(missing)} for this GPU "
            f"({cuda.name}, compute capability {cuda.compute_capability}). Build them: hd-engines build "
            f"{store.folder.parent} --backend {backend.name}."
        )
    return found


def tensorrt_loader(
    manifest: Manifest,
    store: PlanStore,
    plans: dict[int, dict[str, dict[int, Plan]]],
    backend: Backend,
    cuda: Any,
    engines: list[TensorRTEngine],
) -> Callable[[str, int, int], DeviceEngine]:
    """(graph, bucket, guidance branches) -> engine. A plan is read, verified and put on the GPU when it is first used.

    plans: by branches, see `usable_plans`. engines: gets every engine that is made.
    """
    scratch = {stream: Scratch(cuda) for stream in Streams._fields}
    loaded: dict[str, Any] = {}

    def load(name: str, bucket: int, branches: int) -> DeviceEngine:
        sizes = plans[branches][name]
        plan = next(iter(sizes.values())) if name == "unet_time" else sizes[bucket]
        if plan.key not in loaded:
            loaded[plan.key] = backend.load(store.read(plan), name, cuda)
        kernels = plan.path.with_suffix(KERNELS)
        engines.append(TensorRTEngine(backend, loaded[plan.key], manifest.graphs[name], scratch[STREAM[name]], kernels))
        return engines[-1]

    return load


def onnxruntime_loader(
    manifest: Manifest, folder: Path, streams: Streams, graphs: bool = False
) -> Callable[[str, int, int], DeviceEngine]:
    """(graph, bucket, branches) -> engine: one session a graph on its stream, one binding a bucket.

    graphs: have ONNX Runtime replay the sampling steps as CUDA graphs of its own, with a session, and its weights, a
    bucket. Not unless asked for: it spares the launching of each kernel, but makes the host wait for every step. A
    session that refuses runs without.
    """
    sessions: dict[str, OnnxRuntimeEngine] = {}

    def session(name: str, capture: dict[str, int] | None = None) -> OnnxRuntimeEngine:
        spec, stream = manifest.graphs[name], getattr(streams, STREAM[name])
        return OnnxRuntimeEngine(folder / spec.file, spec, "cuda", stream=int(stream.handle), capture=capture)

    def load(name: str, bucket: int, branches: int) -> DeviceEngine:
        if graphs and name in STEPS:
            try:
                return OnnxRuntimeDeviceEngine(session(name, {"B": bucket, BRANCHES: branches}))
            except BundleError:
                pass  # a node that does not run on the GPU; anything else is said again
        if name not in sessions:
            sessions[name] = session(name)
        return OnnxRuntimeDeviceEngine(sessions[name])

    return load


def inductor_loader(manifest: Manifest, folder: Path) -> Callable[[str, int, int], DeviceEngine]:
    """(graph, bucket, branches) -> engine: one compiled file a graph, one binding a bucket.

    A file is verified and loaded when it is first used, on the thread and for the stream that it stays with.
    """
    _, plans = find_compiled(folder, manifest, "cuda")
    store, loaded = PlanStore(folder), {}

    def load(name: str, bucket: int, branches: int) -> DeviceEngine:
        if name not in loaded:
            store.read(plans[name])
            loaded[name] = InductorEngine(plans[name].path, manifest.graphs[name], "cuda", asynchronous=True)
        return InductorDeviceEngine(loaded[name])

    return load
