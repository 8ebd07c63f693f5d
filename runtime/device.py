"""The two stages on a GPU: the loop of `host.py`, with everything between prompt and picture on the device.

The host only enqueues. State, solver rows, time rows, keys and values lie in buffers that are allocated once. A step is
one captured CUDA graph (the step engine, and copies of its outputs to the next step's inputs), launched again for every
step. The host waits only for finished pictures in pinned memory.

    main   rows of this step -> step graph -> log of finite rows ... | finished latents -> exit buffer
    side   text -> hands -> features -> context -> keys, values of the next requests
    out    exit buffer -> image decoder -> pinned memory

The UNet, the decoder and what surrounds them are there once for each size of pictures, see `device_sizes.py`. With
`overlap` these are three streams, ordered by events; without it they are one. The host knows at which row of its
schedule a request is, because no decision depends on results of the device. So each step copies the rows of its
requests from their tables on the device, two small copies a request. The captured graph needs no step index: one graph
serves requests at any step, of any solver.

The graphs find NaN and infinity (their output `finite`). Each step writes that into a log on the device, which comes to
the host with the picture. A NaN stays in its row, so that the log says at which step it came up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from ..contract import IMAGE_ENCODER
from ..engines.base import DeviceEngines
from ..errors import EngineError, RequestError
from ..hands import load_hands
from ..settings import MAX_REDRAWS, MAX_STEPS
from .bundle import Bundle
from .device_batches import DeviceBatch, Exit
from .device_graphs import STREAM, DeviceGraph, Staging, Streams
from .device_noise import DeviceNoise
from .device_pictures import DeviceBlend
from .device_sampler import DeviceJob, DeviceSampler, DeviceTables, Steps, first_bad
from .device_sizes import DeviceSizes, Easel
from .device_words import DeviceWords
from .noise import HANDS, LATENTS
from .requests import Request, take
from .results import Failure, OnEvent, Peek, Picture, Work, cancelled, failed, not_finite

JUDGED = ("joints_3d", "visibility")  # features that `clash` reads
HAND_LOG_STEPS = (2 + MAX_REDRAWS) * MAX_STEPS  # a batch of hands takes that many steps at most, with redraws


class DeviceLoop:
    """Runs prepared requests on the GPU. `graphs` are the bundle's, as `DeviceGraph`."""

    on_gpu = True

    def __init__(
        self,
        bundle: Bundle,
        cuda: Any,
        graphs: dict[str, DeviceGraph],
        streams: Streams,
        slots: int,
        engines: DeviceEngines | None = None,
    ) -> None:
        """graphs: for pictures of the bundle's own size. engines: give graphs for others."""
        self.bundle, self.cuda, self.graphs, self.slots = bundle, cuda, graphs, slots
        self.streams = streams
        self.main, self.side, self.out = streams
        self.overlap = self.side is not self.main
        self.staging = Staging(cuda)
        self.noise = DeviceNoise(cuda, self.staging)
        self.hands_sampler = DeviceSampler(cuda, graphs["hand_prior"], "x", slots, self.noise, log_steps=HAND_LOG_STEPS)
        self.steps = Steps()
        self.own = Easel(cuda, bundle.manifest.image_size, graphs, slots, self.noise, self.steps)
        self.sizes = DeviceSizes(cuda, bundle.manifest, self.own, engines, slots, self.noise, self.steps, streams)
        self.span = graphs["hand_features"].inputs.get("span")  # older bundles have one size
        samplers = {HANDS: (self.hands_sampler, self.side), LATENTS: (self.own.sampler, self.main)}
        self.tables = DeviceTables(bundle, cuda, self.staging, graphs["unet_time"], samplers)
        self.words = DeviceWords(self.staging, graphs, self.side, slots)
        text = graphs["text_encoder"].outputs["text"]
        self.both = cuda.zeros((slots, 2, *text.shape[1:]), text.dtype)  # for each prompt: the empty text, its own
        self.no_text: Any = None  # the empty prompt's [77, D], on the device
        self.after_run: Callable[[], None] = lambda: None
        self.at_close: Callable[[], None] = lambda: None
        self.closed = False
        self.timings = {"unet": 0.0, "total": 0.0}  # seconds of the steps, and of `run`
        self.consumed: list[Any] = []  # events: stage 2 has read the outputs of stage 1
        self.cancelled: set[Hashable] = set()
        self.held: list[Request] = []  # of a size that has no room beside those in work
        self.ready: deque[tuple[DeviceBatch, int]] = deque()
        self.running: dict[Hashable, tuple[DeviceBatch, int]] = {}
        self.leaving: deque[Exit] = deque()
        self.fed: deque[int] = deque()  # rows of the steps that `_feed` made

    def warnings(self) -> list[str]:
        """Warnings about how this runs."""
        others = (easel.graphs for easel in self.sizes.easels.values())
        refused = {name: None for graphs in (self.graphs, *others) for name, graph in graphs.items() if graph.refused}
        kernels = {"draws the noise": self.noise.refused, "blends pictures": self.own.pictures.refused}
        sentences = [f"The host {does}, which is slower: {why}" for does, why in kernels.items() if why]
        if refused:
            sentences.append(f"CUDA graphs could not be captured for {', '.join(refused)}. They run kernel by kernel.")
        return sentences

    def warm_up(self, rows: int, tell: OnEvent) -> None:
        """Loads, runs once and captures every engine for up to `rows` requests at once.

        Without it that happens at the first use of each engine, and all requests wait. tell: ("warm-up", 1) for each.
        """
        rows = min(rows, self.slots)
        samplers = {"unet": self.own.sampler, "hand_prior": self.hands_sampler}
        for name in [name for name in self.graphs if name != IMAGE_ENCODER]:  # few runs bring pictures
            stream = getattr(self, STREAM[name])
            for ready in self.graphs[name].warm_up(stream, rows, samplers[name].advance if name in samplers else None):
                tell("warm-up", ready)
            stream.synchronize()  # the next graph's engines may use the same scratch memory on another stream
        self.after_run()

    def close(self) -> None:
        """Frees what is on the device, engines first. The loop cannot run again."""
        self.closed = True
        with suppress(EngineError):  # free the memory also after a failure
            self.streams.synchronize()
        self.sizes.close()
        for graph in self.graphs.values():
            graph.close()
        self.after_run = lambda: None  # it refers to the engines
        self.at_close()
        self.cuda.close()

    def run(self, requests: Iterable[Request | None], tell: OnEvent) -> Iterator[Picture | Failure]:
        """Yields each picture as soon as it is on the host."""
        try:
            clock = time.perf_counter()
            for result in self._run(requests, tell):
                self.timings["total"] += time.perf_counter() - clock
                yield result
                clock = time.perf_counter()  # without the time that the caller takes
            self.timings["total"] += time.perf_counter() - clock
        finally:  # also when the caller stops early: the next run starts empty
            self.sizes.clear()
            self.hands_sampler.clear()
            if not self.closed:  # the caller may have closed the loop meanwhile
                self.streams.synchronize()
                self.staging.reclaim()
                self.sizes.reclaim()
                self.after_run()

    def _run(self, requests: Iterable[Request | None], tell: OnEvent) -> Iterator[Picture | Failure]:
        source, more = iter(requests), True
        self.ready, self.running, self.leaving, self.fed, self.held = deque(), {}, deque(), deque(), []
        ready, running, exits, results = self.ready, self.running, self.leaving, deque[Picture | Failure]()
        while more or self.held or ready or running or exits or results:
            while self.cancelled:
                results.extend(self._drop(self.cancelled.pop()))
            if (more or self.held) and not ready and (self.overlap or self.sizes.free()):
                some = self.held
                if not some:
                    some, more = take(source, self.slots)
                some, unpainted = self._place(some)
                results.extend(unpainted)
                if some:
                    batch, failures = self._stage_1(some)
                    ready.extend((batch, row) for row in range(len(batch.works)))
                    tell("hands", len(some))
                    while self.fed:
                        tell("steps", self.fed.popleft())
                    results.extend(failures)
            self._admit(ready, running)
            if self.sizes.active:
                tell("steps", self._step())
            if self.sizes.hungry():
                continue  # first the queue, then the results: the caller may take long for each
            while exits and (exits[0].event.done() or not self.sizes.active):
                exits[0].event.synchronize()
                results.extend(self._collect(exits.popleft(), running))
            while results:
                yield results.popleft()
                if self.sizes.hungry():
                    break
        self.steps.settle()
        self.timings["unet"] = self.steps.seconds

    def _place(self, requests: list[Request]) -> tuple[list[Request], list[Failure]]:
        """Those whose size is on the device now, and a Failure for each that never fits there. The others are held.

        The order stays: behind a request that is held, all are.
        """
        placed, failures, self.held = list[Request](), list[Failure](), []
        for i, request in enumerate(requests):
            try:
                easel = self.sizes.get(self.bundle.size(request))
            except RequestError as error:
                failures.append(failed(request, error))
                continue
            if easel is None:
                self.held = requests[i:]
                break
            self.sizes.taken[request.id] = easel
            placed.append(request)
        return placed, failures

    def cancel(self, id: str) -> None:
        """See `HanDiffuser.cancel`."""
        self.cancelled.add(id)

    def _drop(self, id: Hashable) -> list[Failure]:
        """Takes a request out between two steps. A request whose latents wait for the decoder is finished instead."""
        for request in self.held:
            if request.id == id:
                self.held.remove(request)
                return [cancelled(request)]
        for i, (batch, row) in enumerate(self.ready):
            if batch.works[row].request.id == id:
                del self.ready[i]
                if not self.ready:  # stage 2 has read the others, and does not read this one
                    self.consumed = [self.main.record()]
                return [self._left(batch, row)]
        if self.sizes.find(id) is None:
            return []
        self.sizes.drop_job(self.main, id)
        return [self._left(*self.running.pop(id))]

    def _left(self, batch: DeviceBatch, row: int) -> Failure:
        batch.arrived.synchronize()  # copies may be under way
        if batch.blends:
            self.main.record().synchronize()
        self._done(batch, row)
        return cancelled(batch.works[row].request)

    def _done(self, batch: DeviceBatch, row: int) -> None:
        """One work of a batch has its result; after the last the memory is free."""
        id = batch.works[row].request.id
        if (blend := batch.blends.get(id)) is not None:
            blend.pictures.give(blend)
        del self.sizes.taken[id]
        batch.left -= 1
        if not batch.left:
            for array in (*batch.host.values(), batch.log):
                self.staging.give(array)

    def peek(self, id: str) -> Peek | None:
        """See `HanDiffuser.peek`. The host waits for the steps under way."""
        where = {batch.works[row].request.id: (batch, row) for batch, row in self.ready} | self.running
        if id not in where:
            return None
        batch, row = where[id]
        batch.arrived.synchronize()
        values = {name: value[row].copy() for name, value in batch.host.items()}
        work = batch.works[row]
        shown = Work(work.request, work.started, work.readings, [], None, self.bundle.params(values.pop("x")), values)
        step, steps, latents = 0, len(self.bundle.table(LATENTS, work.request).rows), None
        if id in self.running:
            found = self.sizes.find(id)
            if found is None:  # it waits for the decoder
                return None
            sampler, i = found
            step = sampler.jobs[i].position
            pinned = self.staging.read(self.main, sampler.state[i])
            self.main.record().synchronize()
            latents = pinned.copy()
            self.staging.give(pinned)
        return Peek(step, steps, self.bundle.hands_of(shown), latents)

    def hands(self, requests: list[Request]) -> list[dict[str, np.ndarray] | Failure]:
        """See `HanDiffuser.hands`. Keys and values that wait for a slot are in other buffers."""
        works, jobs, failures = self._hands(requests)
        made: dict[str, Any] = {failure.id: failure for failure in failures}
        if works:
            host = self._read_hands(len(works))
            log = self.staging.read(self.side, self.hands_sampler.log)
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
        host = {"x": self.staging.read(self.side, features.inputs["x"][:count])}
        return host | {name: self.staging.read(self.side, array[:count]) for name, array in features.outputs.items()}

    def _bad_hands(
        self, work: Work, values: dict[str, np.ndarray], job: DeviceJob | None, log: np.ndarray
    ) -> Failure | None:
        """A Failure where hands are not finite."""
        bad = first_bad(log, job) if job is not None else None
        if bad is not None:
            return not_finite(work.request, f"hand_prior, step {bad}")
        if not all(np.isfinite(value).all() for value in values.values()):
            return not_finite(work.request, "hand_features")
        return None

    def _admit(self, ready: deque[tuple[DeviceBatch, int]], running: dict[Hashable, tuple[DeviceBatch, int]]) -> None:
        """Fills free slots."""
        admitted = False
        while ready:
            batch, row = ready[0]
            work = batch.works[row]
            easel = self.sizes.taken[work.request.id]
            if not self.sizes.free(easel):
                break
            ready.popleft()
            self.main.wait(batch.done)
            constants = {name: array[row] for name, array in self.graphs["unet_context"].outputs.items()}
            job = self._job(work.request, LATENTS, constants)
            if (blend := batch.blends.get(work.request.id)) is not None:
                job.blend, job.constants = blend, constants | blend.arrays
            self.sizes.submit(self.main, job, easel)
            running[work.request.id] = (batch, row)
            admitted = True
        if admitted and not ready:
            self.consumed = [self.main.record()]

    def _feed(self) -> None:
        """Enqueues steps of stage 2 between those of stage 1, which may take the host longer than what is queued."""
        while self.sizes.hungry():
            self.fed.append(self._step())

    def _step(self) -> int:
        """Enqueues one step of stage 2; finished requests go to the decoder."""
        count, leaving = self.sizes.step(self.main, self.out)
        self.leaving += leaving
        self.steps.wait()
        self.timings["unet"] = self.steps.seconds
        return count

    def _stage_1(self, requests: list[Request]) -> tuple[DeviceBatch, list[Failure]]:
        """Enqueues text -> hands -> features -> context -> keys and values for a batch of requests."""
        side = self.side
        self._feed()
        for event in self.consumed:
            side.wait(event)
        canvases, unread = self.bundle.canvases(requests)
        works, jobs, failures = self._hands([request for request in requests if request.id in canvases], self._feed)
        blends: dict[Hashable, DeviceBlend] = {}
        for easel in {id(easel): easel for easel in self.sizes.taken.values()}.values():
            of_size = [work for work in works if self.sizes.taken[work.request.id] is easel]
            blends |= easel.pictures.encode(side, of_size, canvases, self.bundle)
        if count := len(works):
            self.words.encode(side, works, self.bundle.empty)
        done = side.record()
        host = self._read_hands(count) if count else {}
        log = self.staging.read(side, self.hands_sampler.log)
        failures += unread
        for failure in failures:
            del self.sizes.taken[failure.request.id]
        return DeviceBatch(works, jobs, done, host, log, side.record(), blends, left=count), failures

    def _hands(
        self, requests: list[Request], between: Callable[[], None] = lambda: None
    ) -> tuple[list[Work], dict[Hashable, DeviceJob], list[Failure]]:
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
                except RequestError as error:  # the file has changed since the run began
                    failures.append(failed(request, error))
                    continue
            works.append(Work(request, started, *bundle.tokens(request)))
        rows: dict[Hashable, int] = {work.request.id: row for row, work in enumerate(works)}
        x = graphs["hand_features"].inputs["x"]
        for key, value in given.items():
            self.staging.upload(side, x[rows[key]], value)
        if self.span is not None and works:
            self.staging.upload(side, self.span[: len(works)], bundle.spans(work.request for work in works))
        jobs: dict[Hashable, DeviceJob] = {}
        textual = [work for work in works if work.request.id not in given]
        if textual:
            text = self._encode(np.stack([work.readings[1].ids[0] for work in textual]))
            for i in range(len(textual)):
                side.copy(self.both[i][0], self.no_text)
                side.copy(self.both[i][1], text[i])
        texts = {work.request.id: self.both[i] for i, work in enumerate(textual)}
        # First draw all hands; then again, from other noise, those that do not fit into a picture.
        drawing = works
        while drawing:
            for work in drawing:
                if work.request.id in texts:
                    constants = {"text": texts[work.request.id]}
                    jobs[work.request.id] = self._job(work.request, HANDS, constants, work.draws)
                    self.hands_sampler.submit(side, jobs[work.request.id])
                    work.draws += 1
            while self.hands_sampler.jobs:
                between()
                self.hands_sampler.step(side, lambda job, state: side.copy(x[rows[job.key]], state))
            graphs["hand_features"].launch(side, len(works))
            drawing = self._clashing(drawing, rows)
        return works, jobs, failures

    def _clashing(self, works: list[Work], rows: Mapping[Hashable, int]) -> list[Work]:
        """The works whose hands must be drawn again. The host waits only if a request allows redraws."""
        asked = [work for work in works if work.draws and work.draws <= (work.request.hand_redraws or 0)]
        if not asked:
            return []
        outputs, side = self.graphs["hand_features"].outputs, self.side
        sources = {"x": self.graphs["hand_features"].inputs["x"], **{name: outputs[name] for name in JUDGED}}
        count = 1 + max(rows[work.request.id] for work in asked)
        host = {name: self.staging.read(side, source[:count]) for name, source in sources.items()}
        side.record().synchronize()
        again = []
        for work in asked:
            hands = {name: value[rows[work.request.id]] for name, value in host.items()}
            # Hands that are not finite become a Failure.
            finite = all(np.isfinite(value).all() for value in hands.values())
            if finite and self.bundle.again(work, hands["x"], hands):
                again.append(work)
        for array in host.values():
            self.staging.give(array)
        return again

    def _joints(self, x: np.ndarray) -> np.ndarray:
        """[P] -> joints_3d [62, 3] metres, or [people, 62, 3]. The host waits, once for each file of hands."""
        features, side = self.graphs["hand_features"], self.side
        self.staging.upload(side, features.inputs["x"][:1], x[None])
        if self.span is not None:
            self.staging.upload(side, self.span[:1], np.ones(1, np.float32))
        features.launch(side, 1)
        pinned = self.staging.read(side, features.outputs["joints_3d"][:1])
        side.record().synchronize()
        joints: np.ndarray = pinned[0].copy()
        self.staging.give(pinned)
        return joints

    def _encode(self, ids: np.ndarray) -> Any:
        """ids [B, length] -> text [B, 77, D]. The first call also encodes the empty prompt."""
        encoder, side = self.graphs["text_encoder"], self.side
        if self.no_text is None:
            self.staging.upload(side, encoder.inputs["input_ids"][:1], self.bundle.empty[None])
            encoder.launch(side, 1)
            self.no_text = self.cuda.zeros(encoder.outputs["text"].shape[1:], encoder.outputs["text"].dtype)
            side.copy(self.no_text, encoder.outputs["text"][0])
        self.staging.upload(side, encoder.inputs["input_ids"][: len(ids)], ids)
        encoder.launch(side, len(ids))
        return encoder.outputs["text"][: len(ids)]

    def _job(self, request: Request, stream: str, constants: Mapping[str, Any], draw: int = 0) -> DeviceJob:
        """A job with the noise of its request, as on the host."""
        device_table = self.tables.get(stream, request)
        table = device_table.table
        return DeviceJob(request.id, request.noise(stream, table, draw), device_table, constants)

    def _collect(self, leaving: Exit, running: dict[Hashable, tuple[DeviceBatch, int]]) -> list[Picture | Failure]:
        """Pictures and failures, from the copies on the host."""
        results: list[Picture | Failure] = []
        for i, job in enumerate(leaving.jobs):
            batch, row = running.pop(job.key)
            batch.arrived.synchronize()
            work = batch.works[row]
            self.bundle.room.ran(self.bundle.size(work.request))
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
            self._done(batch, row)
        for array in (leaving.image, leaving.finite, leaving.log):
            self.staging.give(array)
        return results
