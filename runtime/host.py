"""The two stages as one loop on the host: numpy arrays in and out of engines, one graph after the other.

Stage 1 makes the hands of a batch of prompts and turns them into the context of stage 2; these requests then wait for a
slot. A request takes a free slot of stage 2 at any step and leaves it when it is done. So requests with different
steps, solvers or guidance share every batch. Requests of another size or with other adapters have a batch of their own
in stage 2, and share stage 1 and the decoder. `device.py` is the same loop on a GPU.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import length_hint
from typing import Any, NamedTuple

import numpy as np

from ..contract import IMAGE_ENCODER, Size
from ..engines import Engine
from ..engines.adapted import Chosen
from ..errors import HanDiffuserError, RequestError
from ..hands import load_hands
from ..schedules import Table
from .adapting import Adapting, NotYetError, key_of
from .adapting import Key as Adapters
from .bundle import Bundle, keep
from .canvas import Blend, digest
from .noise import HANDS, LATENTS
from .requests import Request, take
from .results import Failure, OnEvent, Peek, Picture, Work, cancelled, failed, not_finite
from .sampler import Job, Result, SizedSamplers, StepSampler
from .steptimes import StepTimes
from .words import Key, Wanted, chunks_of, is_plain

MERGE_SECONDS = 0.05  # between two looks at new requests, while there is nothing to do but to merge


class Kind(NamedTuple):
    """What the requests of one batch share."""

    size: Size
    chunks: int  # of its prompt
    adapters: Adapters


class HostLoop:
    """Runs prepared requests on engines that take and give numpy arrays.

    slots: the largest number of requests that run at once. `timings` holds the seconds of each graph so far, and of
    `run` ("total").
    """

    on_gpu = False

    def __init__(
        self, bundle: Bundle, engines: Mapping[str, Engine], slots: int = 8, adapting: Adapting | None = None
    ) -> None:
        """adapting: gives engines for requests with adapters; None: these are refused."""
        self.bundle, self.slots, self.adapting = bundle, slots, adapting
        bundle.adapts = adapting is not None
        self.timings: dict[str, float] = dict.fromkeys([*engines, "total"], 0.0)
        self.engines = {name: _Timed(name, engine, self.timings) for name, engine in engines.items()}
        bundle.made_by["device"] = engines["unet"].device
        self._times: dict[Any, np.ndarray] = {}  # adapters and timesteps -> rows of unet_time
        self._latents: dict[Any, np.ndarray] = {}  # shape and hash of a picture's pixels -> its latents [C, h, w]
        self._hand_times = StepTimes(only=engines["hand_prior"].batches)
        self._step_times: dict[Any, StepTimes] = {}  # of the UNet; the first of them says what may pay elsewhere
        self._no_text: np.ndarray | None = None  # text_encoder of "", [77, D]
        self._cancelled: set[Hashable] = set()
        self._ready: deque[Work] = deque()  # has its hands, waits for a slot
        self._waiting: deque[Work] = deque()  # the same, while a thread merges its adapters
        self._running: dict[Hashable, Work] = {}
        self._samplers: SizedSamplers | None = None  # of the current run

    def warm_up(self, rows: int, tell: OnEvent) -> None:
        """Does nothing: on a processor the first run of a graph costs no more than the next."""

    def warnings(self) -> list[str]:
        """Warnings about how this runs: none."""
        return []

    def close(self) -> None:
        """Lets go of the engines."""
        self.engines = {}
        if self.adapting is not None:
            self.adapting.close()

    def run(self, requests: Iterable[Request | None], tell: OnEvent) -> Iterator[Picture | Failure]:
        """Yields each picture as soon as it is done."""
        slots = min(self.slots, length_hint(requests, self.slots))
        if not slots:
            return
        source, more = iter(requests), True
        hand_sampler = self._hand_sampler(slots)
        own = Kind(self.bundle.manifest.image_size, 1, ())
        samplers = SizedSamplers(lambda kind: self._sampler(kind, slots), slots, own)
        self._ready, self._waiting, self._running, self._samplers = deque(), deque(), {}, samplers
        ready, running = self._ready, self._running
        clock = time.perf_counter()
        while more or ready or running or self._waiting:
            results: list[Picture | Failure] = []
            while self._cancelled:
                results += self._drop(self._cancelled.pop())
            self._return(ready)
            while more and len(ready) < samplers.free() and len(self._waiting) < slots:
                batch, more = take(source, slots)
                if not batch:
                    break
                works, failures = self._stage_1(batch, hand_sampler)
                ready.extend(works)
                results += failures
                tell("hands", len(batch))
            while ready and samplers.free(kind := self._kind(ready[0])):
                if not ready[0].told and not self._tell(ready, results):
                    break  # until others free memory
                if not ready or self._kind(ready[0]) != kind:
                    continue  # its adapters could not be loaded, or not yet
                work = ready.popleft()
                running[work.request.id] = work
                samplers.submit(self._job(work), kind)
            if samplers.active:
                done = samplers.step()
                tell("steps", samplers.advanced)
                results += self._finish(done, running)
            elif self._waiting and not ready and not results and self.adapting is not None:
                self.adapting.wait(MERGE_SECONDS)
            for result in results:
                self.timings["total"] += time.perf_counter() - clock
                yield result
                clock = time.perf_counter()  # without the time that the caller takes
        self.timings["total"] += time.perf_counter() - clock

    def _hand_sampler(self, slots: int) -> StepSampler:
        engine, history = self.engines["hand_prior"], self.bundle.manifest.num_history["hand_prior"]
        return StepSampler(engine, "x", history, slots, self._hand_times, engine.branched)

    def _sampler(self, kind: Any, slots: int) -> StepSampler:
        """A sampler for pictures of one kind, with as many slots as fit into memory."""
        unet, history = self._engine("unet", kind.adapters), self.bundle.manifest.num_history["unet"]
        times = self._step_times_of(kind, unet.batches)
        rows = self.bundle.room.rows(kind.size, kind.chunks, slots)
        return StepSampler(unet, "latents", history, rows, times, unet.branched)

    def _step_times_of(self, kind: Kind, batches: Sequence[int] | None) -> StepTimes:
        """The UNet's times for pictures of one kind. batches: those of its engine.

        Where each batch size must be compiled, only the first kind tries all of them. The others take the best of it.
        """
        key = (kind.size, kind.chunks, None if batches is None else tuple(batches))
        first = next(iter(self._step_times.values()), None)
        times = self._step_times.setdefault(key, StepTimes(only=batches))
        if batches is not None and first is not None and times is not first:
            times.only = sorted({1} | ({first.fastest()} & set(batches)))
        return times

    def _kind(self, work: Work) -> Kind:
        return Kind(self.bundle.size(work.request), chunks_of(work), key_of(work.adapters))

    def _engine(self, graph: str, adapters: Adapters) -> _Timed:
        """A graph's engine with adapters that are loaded: its own, or the base's where they leave the graph alone."""
        found = self.adapting.loaded(adapters).get(graph) if self.adapting is not None and adapters else None
        return self.engines[graph] if found is None else _Timed(graph, found, self.timings)

    def cancel(self, id: str) -> None:
        """See `HanDiffuser.cancel`. Adding to a set is atomic, so that any thread may call it."""
        self._cancelled.add(id)

    def _return(self, ready: deque[Work]) -> None:
        """Puts works whose adapters are merged back, before those that came later."""
        if self._waiting and self.adapting is not None:
            still = deque(work for work in self._waiting if self.adapting.merging(key_of(work.adapters)))
            ready.extendleft(work for work in reversed(self._waiting) if work not in still)
            self._waiting = still

    def _drop(self, id: Hashable) -> list[Picture | Failure]:
        """Takes a request out between two steps; the rows of the others move up."""
        for queue in (self._ready, self._waiting):
            for i, work in enumerate(queue):
                if work.request.id == id:
                    del queue[i]
                    return [cancelled(work.request)]
        if id not in self._running or self._samplers is None:
            return []
        self._samplers.drop(id)
        return [cancelled(self._running.pop(id).request)]

    def peek(self, id: str) -> Peek | None:
        """See `HanDiffuser.peek`."""
        for work in (*self._ready, *self._waiting):
            if work.request.id == id:
                return Peek(0, len(self.bundle.table(LATENTS, work.request).rows), self.bundle.hands_of(work), None)
        found = self._samplers.peek(id) if self._samplers is not None else None
        if found is None:
            return None
        step, steps, latents = found
        return Peek(step, steps, self.bundle.hands_of(self._running[id]), latents)

    def hands(self, requests: list[Request]) -> list[dict[str, np.ndarray] | Failure]:
        """See `HanDiffuser.hands`."""
        if not requests:
            return []
        works, failures = self._hands(requests, self._hand_sampler(len(requests)))
        made: dict[str, Any] = {str(work.request.id): self.bundle.hands_of(work) for work in works}
        made |= {failure.id: failure for failure in failures}
        return [made[str(request.id)] for request in requests]

    def _stage_1(self, requests: list[Request], sampler: StepSampler) -> tuple[list[Work], list[Picture | Failure]]:
        """Text -> hands -> features for a batch of B requests, and the latents of pictures that they bring."""
        adapters: dict[Hashable, tuple[Chosen, ...]] = {}
        failures: list[Picture | Failure] = []
        for request in requests:
            try:
                adapters[request.id] = self.bundle.adapters(request)
            except RequestError as error:  # the file has changed since the run began
                failures.append(failed(request, error))
        works, bad = self._hands([request for request in requests if request.id in adapters], sampler)
        for work in works:
            work.adapters = adapters[work.request.id]
        works, unread = self._read(works)
        return works, failures + bad + unread

    def _tell(self, ready: deque[Work], results: list[Picture | Failure]) -> bool:
        """Context -> keys and values of the first work and of all others with its adapters. Loads these.

        Returns False while memory is short. Takes works whose adapters cannot be loaded out, as Failures. Those whose
        adapters are not merged yet wait apart.
        """
        key = key_of(ready[0].adapters)
        works = [work for work in ready if not work.told and key_of(work.adapters) == key]
        if key and self.adapting is not None:
            in_use = {key_of(work.adapters) for work in self._running.values()}
            try:
                found = self.adapting.engines(ready[0].adapters, in_use)
            except NotYetError:
                for work in works:
                    ready.remove(work)
                self._waiting.extend(works)
                return True
            except HanDiffuserError as error:
                for work in works:
                    ready.remove(work)
                    results.append(failed(work.request, error))
                return True
            finally:
                for work in ready:  # those whose engines had to go are told again, by engines that are loaded again
                    work.told = work.told and (not work.adapters or key_of(work.adapters) in self.adapting)
            if found is None:
                return False
        features = {name: np.stack([work.features[name] for work in works]) for name in works[0].features}
        ids = np.stack([work.ids for work in works])  # [B, 2, length]
        # With guidance 1 the unconditional branch is unused: its place may hold the conditional one.
        encoder, unet_context = (self._engine(name, key) for name in ("text_hand_encoder", "unet_context"))
        alone = all(work.request.guidance == 1 for work in works) and encoder.branched
        context = _context(encoder, ids[:, 1:] if alone else ids, features)
        for group, contexts in self._worded(works, context, features, encoder):
            keys = unet_context({"context": contexts})
            for row, work in enumerate(group):
                wide = {name: np.broadcast_to(value[row], (2, *value.shape[2:])) for name, value in keys.items()}
                work.inputs |= wide
                work.told = True
        return True

    def _worded(
        self, works: list[Work], context: np.ndarray, features: Mapping[str, np.ndarray], encoder: _Timed
    ) -> list[tuple[list[Work], np.ndarray]]:
        """Works whose contexts have one length, and these contexts. context: the encoder's, [B, G, L, W]."""
        wanted, length = Wanted(works, self.bundle.empty), len(self.bundle.empty)
        if not wanted.works:
            return [(works, context)]
        branched = encoder.branched
        rows, states = list(wanted.rows.items()), dict[Key, np.ndarray]()
        for start in range(0, len(rows), self.slots):
            some = rows[start : start + self.slots]
            any_hands = {name: value[np.arange(len(some)) % len(works)] for name, value in features.items()}
            pairs = np.stack([row for _, row in some])[:, :, None]  # [R, (ids, mask), 1, 77]
            pairs = pairs if branched else pairs.repeat(2, 2)
            read = _context(encoder, pairs[:, 0], any_hands, pairs[:, 1])  # words never read hands
            words = read[:, -1, :length].astype(np.float32)
            states |= {key: words[row] for row, (key, _) in enumerate(some)}
        groups: dict[int, list[tuple[Work, np.ndarray]]] = {}
        for work, own in zip(works, context, strict=True):
            own = own if is_plain(work) else wanted.context(work, own, states)
            groups.setdefault(own.shape[1], []).append((work, own))
        return [([work for work, _ in group], np.stack([own for _, own in group])) for group in groups.values()]

    def _read(self, works: list[Work]) -> tuple[list[Work], list[Picture | Failure]]:
        """Encodes the pictures of those that bring one. Returns the works without trouble, and a Failure for each of
        the others."""
        canvases, unread = self.bundle.canvases(work.request for work in works)
        good, failures = [], list[Picture | Failure](unread)
        for work in works:
            if work.request.id not in canvases:
                continue
            if (canvas := canvases[work.request.id]) is not None:
                work.canvas, work.known = canvas, self._encoded(canvas.pixels)
                work.warnings += canvas.warnings
                if self.bundle.inpaints:
                    work.inputs = {"mask": canvas.binary, "masked_latents": self._encoded(canvas.hidden)}
                if not all(np.isfinite(value).all() for value in (work.known, *work.inputs.values())):
                    failures.append(not_finite(work.request, IMAGE_ENCODER))
                    continue
            good.append(work)
        return good, failures

    def _encoded(self, pixels: np.ndarray) -> np.ndarray:
        """[H, W, 3] -> latents [C, h, w]. Pictures are encoded one by one, and one that many requests share once."""
        key = (pixels.shape, digest(pixels.tobytes()))
        if key not in self._latents:
            keep(self._latents, key, self.engines[IMAGE_ENCODER]({"image": pixels[None]})["latents"][0])
        return self._latents[key]

    def _hands(self, requests: list[Request], sampler: StepSampler) -> tuple[list[Work], list[Picture | Failure]]:
        """Text -> hands -> features. Returns the requests whose hands are finite, and a Failure for each of the
        others."""
        started = time.perf_counter()
        works = [Work(request, started, *self.bundle.tokens(request)) for request in requests]
        failures: list[Picture | Failure] = []

        texts: dict[Hashable, np.ndarray] = {}
        textual = [work for work in works if work.request.hands is None]
        if textual:
            ids = np.stack([work.readings[1].ids[0] for work in textual])  # [B, length]
            encoded = self.engines["text_encoder"]({"input_ids": ids})["text"]
            texts = {work.request.id: text for work, text in zip(textual, encoded, strict=True)}
        for work in works:
            if work.request.hands is not None:
                try:
                    work.x = self.bundle.given(load_hands(work.request.hands), self._joints)
                except RequestError as error:  # the file has changed since the run began
                    failures.append(failed(work.request, error))
        # First draw all hands; then again, from other noise, those that do not fit into a picture.
        drawing = works
        while drawing:
            failures += self._draw([work for work in drawing if work.request.id in texts], texts, sampler)
            drawing = [work for work in drawing if work.x is not None]
            failures += self._pose(drawing)
            drawing = [
                work for work in drawing if work.x is not None and self.bundle.again(work, work.x, work.features)
            ]
        return [work for work in works if work.x is not None], failures

    def _draw(
        self, works: list[Work], texts: Mapping[Hashable, np.ndarray], sampler: StepSampler
    ) -> list[Picture | Failure]:
        """Samples x of each work; None where it is not finite. texts: [77, D] by id."""
        failures: list[Picture | Failure] = []
        by_id: dict[Hashable, Work] = {work.request.id: work for work in works}
        for work in works:
            sampler.submit(self._hand_job(work, texts[work.request.id]))
            work.draws += 1
        while sampler.active:
            for key, state, failed_step in sampler.step():
                if state is None:
                    failures.append(not_finite(by_id[key].request, f"hand_prior, step {failed_step}"))
                by_id[key].x = state
        return failures

    def _pose(self, works: list[Work]) -> list[Picture | Failure]:
        """Sets params and features from x. Where they are not finite, x becomes None."""
        if not works:
            return []
        x = np.stack([work.x for work in works if work.x is not None])
        spans = self.bundle.spans(work.request for work in works)
        features = self.engines["hand_features"]({"x": x, "span": spans})
        failures: list[Picture | Failure] = []
        for row, work in enumerate(works):
            work.features = {name: value[row] for name, value in features.items()}
            if all(np.isfinite(value).all() for value in work.features.values()):
                work.params = self.bundle.params(work.x)  # type: ignore[arg-type]
            else:
                work.x = None
                failures.append(not_finite(work.request, "hand_features"))
        return failures

    def _joints(self, x: np.ndarray) -> np.ndarray:
        """[P] -> joints_3d [62, 3] metres; of several people [people, 62, 3]."""
        return self.engines["hand_features"]({"x": x[None], "span": np.ones(1, np.float32)})["joints_3d"][0]

    def _hand_job(self, work: Work, text: np.ndarray) -> Job:
        """The job of the next draw of stage 1. text: the text encoder's output for the prompt, [77, D]."""
        if self._no_text is None:
            self._no_text = self.engines["text_encoder"]({"input_ids": self.bundle.empty[None]})["text"][0]
        both = np.stack([self._no_text, text])  # [2, 77, D]
        table = self.bundle.table(HANDS, work.request)
        shape = (len(self.bundle.manifest.params_mean),)
        return _job(work.request, HANDS, table, shape, {"text": both}, draw=work.draws)

    def _job(self, work: Work) -> Job:
        """The job of stage 2."""
        request = work.request
        table = self.bundle.table(LATENTS, request)
        steps = {}
        if "time" in self.engines["unet"].names:
            timesteps = table.timesteps.astype(np.float32)
            adapters = key_of(work.adapters)
            key = (adapters, timesteps.tobytes())
            if key not in self._times:
                keep(self._times, key, self._engine("unet_time", adapters)({"timesteps": timesteps})["time"])
            steps["time"] = self._times[key]
        shape = self.bundle.manifest.latents_at(self.bundle.size(request))
        job = _job(request, LATENTS, table, shape, work.inputs, steps)
        if work.canvas is not None:
            noise = replace(request.noise(LATENTS, table), init_sigma=1.0).start(shape)
            mask = work.canvas.mask if work.canvas.keeps and not self.bundle.inpaints else None
            job.blend = blend = Blend(work.known, noise, mask, self.bundle.shares(request))
            job.state = blend.start()
        return job

    def _finish(self, results: list[Result], running: dict[Hashable, Work]) -> list[Picture | Failure]:
        """Decodes the requests that have left their slots, one by one: that fits a processor's caches."""
        works = [running.pop(result.key) for result in results]
        finished: list[Picture | Failure] = [
            not_finite(work.request, f"unet, step {result.failed_step}")
            for work, result in zip(works, results, strict=True)
            if result.state is None
        ]
        for work, result in zip(works, results, strict=True):
            if result.state is None:
                continue
            decoded = self.engines["image_decoder"]({"latents": result.state[None]})
            self.bundle.room.ran(self.bundle.size(work.request), chunks_of(work))
            fine = decoded["finite"][0] > 0.5  # uint8 hides NaN and infinity
            finished.append(
                self.bundle.picture(work, decoded["image"][0]) if fine else not_finite(work.request, "image_decoder")
            )
        return finished


class _Timed:
    """An engine that notes its seconds and gets only the inputs that its graph has.

    A configuration without a hand cue has a graph without that input.
    """

    def __init__(self, name: str, engine: Engine, timings: dict[str, float]) -> None:
        self.engine, self.name, self.timings = engine, name, timings
        self.names = frozenset(spec.name for spec in engine.spec.inputs)
        self.branched, self.batches = engine.spec.branched, engine.batches

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        feeds = {name: value for name, value in feeds.items() if name in self.names}
        started = time.perf_counter()
        try:
            return self.engine(feeds)
        finally:
            self.timings[self.name] += time.perf_counter() - started


def _context(encoder: _Timed, ids: np.ndarray, features: Mapping[str, np.ndarray], mask: Any = None) -> np.ndarray:
    """Token ids [B, G, 77] and rows of hand features -> [B, G, L, W]. mask: like ids; None: all tokens count."""
    mask = np.ones_like(ids) if mask is None else mask
    return encoder({**features, "input_ids": ids, "attention_mask": mask})["context"]


def _job(
    request: Request,
    stream: str,
    table: Table,
    shape: tuple[int, ...],
    constants: Mapping[str, np.ndarray],
    steps: Mapping[str, np.ndarray] | None = None,
    draw: int = 0,
) -> Job:
    """A job with the noise of its request."""
    noise = request.noise(stream, table, draw)
    drawn = (lambda i: noise.step(i, shape)) if noise.stochastic else None
    return Job(request.id, noise.start(shape), table.rows, steps or {}, constants, drawn)
