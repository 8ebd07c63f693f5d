"""The loop's side of a server: `work` loads engines and runs the loop, and talks to its front through a pipe.

It runs in a thread of the server's process, or in a process of its own, one a device. `messages` has what both sides
say. The thread that runs the loop looks at the pipe between two steps: it shares nothing, and needs no locks.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from ..errors import HanDiffuserError
from ..runtime.loading import SERVER_PICTURES
from ..runtime.pipeline import HanDiffuser
from ..runtime.requests import Request
from ..runtime.results import Failure, Picture
from . import messages
from .previews import Colours, InFlight

WARM_UP = ("a right hand making a fist, blue background", "a dark left hand, red background",
           "two open hands, green background", "a pale hand with spread fingers, yellow background",
           "a tan hand, white background", "a hand in a dark room")  # fmt: skip
WARM_UP_STEPS = 4
REPORT_SECONDS = 0.5  # between two `Measured`
HANDS = ("text_encoder", "hand_prior", "hand_features")  # graphs that make hands
STAGE_1 = (*HANDS, "text_hand_encoder", "unet_context")  # these, and those that tell the UNet about the hands


@dataclass(frozen=True)
class Options:
    """The arguments of `HanDiffuser.load`, and the GPU that a process sees."""

    engines: str
    device: str = "auto"
    threads: int | None = None
    batch_size: int = 8
    backend: str = "auto"
    warm_up: bool = True
    gpu: str | None = None  # an entry of CUDA_VISIBLE_DEVICES
    pictures: int = SERVER_PICTURES  # that the loop will make, as far as its owner knows
    lora: tuple[str, ...] = ()  # adapters of all pictures
    lora_memory: float | None = None

    def load(self) -> HanDiffuser:
        """Raises HanDiffuserError."""
        return HanDiffuser.load(
            self.engines, self.device, self.threads, self.batch_size, self.backend, pictures=self.pictures,
            lora=self.lora, lora_memory=self.lora_memory,
        )  # fmt: skip


def work_alone(pipe: Connection, options: Options) -> None:
    """`work` in a process of its own. Ctrl-C in a terminal reaches the whole group: the front decides what it means."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if options.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = options.gpu
    work(pipe, options)


def work(pipe: Connection, options: Options) -> None:
    """Loads and runs until the front says stop or closes its end of the pipe."""
    try:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                pipeline = options.load()
            with pipeline:
                lane = Lane(pipe, pipeline)
                rate, slowest = lane.warm_up() if options.warm_up else (0.0, None)
                said = [messages.sentence(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
                said += pipeline.loop.warnings()
                ready = messages.Ready(pipeline.batch_size, os.getpid(), said, rate, slowest, takes(pipeline))
                messages.send(pipe, ready)
                lane.run()
        except HanDiffuserError as error:
            messages.send(pipe, messages.Refused(messages.sentence(error)))
        except MemoryError:
            messages.send(pipe, messages.Refused("There is not enough memory."))
    except (EOFError, OSError):  # the front is gone
        return
    except Exception as error:
        with suppress(OSError):
            messages.send(pipe, messages.Broken(messages.sentence(f"{type(error).__name__}: {error}")))
    finally:
        pipe.close()


def takes(pipeline: HanDiffuser) -> messages.Takes:
    bundle = pipeline.bundle
    sizes = None if bundle.engine_sizes is None else sorted(bundle.engine_sizes)
    return messages.Takes(sizes, bundle.build_sizes, bundle.reader.engine_chunks, bundle.adapts, pipeline.on_gpu)


class Lane:
    """A loop and its pipe."""

    def __init__(self, pipe: Connection, pipeline: HanDiffuser) -> None:
        self.pipe, self.pipeline = pipe, pipeline
        self.inbox: deque[Request] = deque()  # requests that the loop has not taken yet
        self.in_flight: dict[str, InFlight] = {}  # requests without an answer, those of the inbox too
        self.stopped = False
        self.colours = Colours()
        self.batches: Counter[int] = Counter()  # pictures that a step advanced -> number of such steps
        self.laps = Laps(pipeline.timings)
        self.reported = 0.0

    def tell(self, message: messages.ToFront) -> None:
        messages.send(self.pipe, message)

    def run(self) -> None:
        try:
            for result in self.pipeline.run(self.source(), self.on_event):
                one = self.in_flight.pop(result.id, None)
                if isinstance(result, Failure):
                    status = 400 if result.refused else 500
                    self.tell(messages.Failed(result.id, messages.sentence(result.sentence), status))
                    continue
                self.laps.pictures += 1
                if one is not None:
                    if one.latents is not None:
                        self.colours.learn(one.latents, result.image)
                    self.tell(messages.PictureMade(result.id, result.image, small(result.hands), result.warnings))
        except HanDiffuserError as error:  # a graph that cannot run at all, for lack of memory for example
            self.tell(messages.Broken(messages.sentence(error)))

    def source(self) -> Iterator[Request | None]:
        """Where the loop asks for work. Waits while the loop has nothing to do."""
        while not self.stopped:
            if not self.in_flight:
                self.report()
            self.listen(wait=not self.in_flight)
            if self.inbox:
                yield self.inbox.popleft()
            elif not self.stopped:
                yield None

    def listen(self, wait: bool = False) -> None:
        """Takes all messages that have arrived."""
        while not self.stopped and self.pipe.poll(None if wait else 0):
            wait = False
            match message := messages.for_worker(self.pipe):
                case messages.Run(request):
                    self.in_flight[str(request.id)] = InFlight(message)
                    self.inbox.append(request)
                case messages.MakeHands(request, mesh):
                    self.make_hands(request, mesh)
                case messages.Cancel(id):
                    self.cancel(id)
                case messages.Stop():
                    self.stopped = True
                    for id in [*self.in_flight]:
                        self.cancel(id)

    def make_hands(self, request: Request, mesh: bool = False) -> None:
        (made,) = self.pipeline.hands([request])
        self.laps.take(*HANDS)
        if isinstance(made, Failure):
            self.tell(messages.Failed(made.id, messages.sentence(made.sentence)))
        else:
            shown = small(made) | ({"vertices": made["vertices"]} if mesh else {})
            self.tell(messages.HandsMade(str(request.id), shown))

    def cancel(self, id: str) -> None:
        for i, request in enumerate(self.inbox):
            if request.id == id:
                del self.inbox[i]
                self.in_flight.pop(id)
                self.tell(messages.Failed(id, "It was cancelled."))
                return
        if id in self.in_flight:
            self.pipeline.cancel(id)

    def on_event(self, kind: str, count: int) -> None:
        """Between two steps."""
        self.laps.after(kind)
        if kind == "steps":
            self.batches[count] += 1
            self.listen()
        for id, one in self.in_flight.items():
            if one.wants_peek and (peek := self.pipeline.peek(id)) is not None:
                if not one.begun:
                    one.begun = True
                    if all(np.isfinite(value).all() for value in peek.hands.values()):
                        self.tell(messages.HandsMade(id, small(peek.hands)))
                if peek.latents is not None and one.preview_steps and peek.step != one.step:
                    if peek.step in one.preview_steps:
                        latents = one.clean(peek.step, peek.latents, self.pipeline.bundle)
                        self.tell(messages.Preview(id, peek.step, peek.steps, self.colours(latents)))
                    one.step, one.latents = peek.step, peek.latents
        if time.monotonic() - self.reported > REPORT_SECONDS:
            self.report()

    def report(self) -> None:
        """Tells the front what the loop did since the last time, if it did anything."""
        runs = self.laps.all()
        if self.batches or runs:
            memory = gpu_memory() if self.pipeline.on_gpu else None
            self.tell(messages.Measured(dict(self.batches), dict(self.pipeline.timings), runs, memory))
            self.batches.clear()
        self.reported = time.monotonic()

    def warm_up(self) -> tuple[float, float]:
        """Makes engines ready, and learns which colours latents have. Returns steps a second, and the seconds of the
        slowest step."""
        pipeline = self.pipeline
        pipeline.warm_up(pipeline.batch_size)
        steps = min(WARM_UP_STEPS, pipeline.manifest.defaults["steps"])
        asked = [Request(text, steps=steps) for text in WARM_UP[: max(1, pipeline.batch_size)]]
        requests, _ = pipeline.prepare(asked)
        last: dict[str, np.ndarray] = {}
        slowest, before = 0.0, time.perf_counter()

        def lap() -> None:
            nonlocal slowest, before
            slowest, before = max(slowest, time.perf_counter() - before), time.perf_counter()

        def on_event(kind: str, count: int) -> None:
            lap()
            for request in requests:
                peek = pipeline.peek(str(request.id))
                if peek is not None and peek.latents is not None:
                    last[str(request.id)] = peek.latents

        started = time.perf_counter()
        for result in pipeline.run(requests, on_event):
            lap()
            if isinstance(result, Picture) and result.id in last:
                self.colours.learn(last[result.id], result.image)
        self.laps = Laps(pipeline.timings)
        return steps * len(requests) / (time.perf_counter() - started), slowest


class Laps:
    """How long each graph took each time it ran, from the loop's own sums: the graphs that make hands and context for a
    batch of requests, the UNet for a step, the decoder for a picture.

    On a GPU the sums hold the UNet's steps alone: the loop has CUDA events for these, and for nothing else.
    """

    def __init__(self, timings: dict[str, float]) -> None:
        self.timings, self.before = timings, dict(timings)
        self.found: defaultdict[str, list[float]] = defaultdict(list)  # graph -> seconds of each run
        self.pictures = 0  # that came out since the last look at the decoder

    def after(self, kind: str) -> None:
        """kind: an event of the loop."""
        self.take(*(STAGE_1 if kind == "hands" else ("unet",)))
        self.take_pictures()

    def take(self, *graphs: str, times: int = 1) -> None:
        """Each of `graphs` ran so many times since the last look."""
        for name in graphs:
            spent = self.timings.get(name, 0.0) - self.before.get(name, 0.0)
            if spent > 0:
                self.before[name] = self.timings[name]
                self.found[name] += [spent / times] * times

    def take_pictures(self) -> None:
        """The loop decodes all pictures that leave together before the first one is out."""
        if self.pictures:
            self.take("image_decoder", times=self.pictures)
            self.pictures = 0

    def all(self) -> dict[str, list[float]]:
        """What was found since the last call."""
        self.take_pictures()
        found = dict(self.found)
        self.found.clear()
        return found


def small(hands: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the vertices, which are most of it, and without the raw parameters, which the arrays repeat."""
    return {name: value for name, value in hands.items() if name not in ("vertices", "params")}


def gpu_memory() -> tuple[int, int] | None:
    """Bytes in use and in all."""
    try:
        from cuda.bindings import runtime

        error, free, total = runtime.cudaMemGetInfo()
        return (int(total) - int(free), int(total)) if int(error) == 0 else None
    except Exception:  # a loop goes on without a figure for a dashboard
        return None
