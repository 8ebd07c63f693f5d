"""The loop's side of a server: `work` loads engines and runs the loop, and talks to its front through a pipe.

It runs in a thread of the server's process, or in a process of its own, one a device; the messages are the same:

    in    ("run", request, follow, whole)   follow: steps after which to send a preview; whole: send the hands first
          ("hands", request)                its hands alone
          ("cancel", id)
          ("stop",)
    out   ("ready", facts) | ("refused", sentence)      once, at the start
          ("begun", id, hands)                          its hands are made, if they were asked for
          ("preview", id, step, steps, colours)         uint8 [h, w, 3], about what the picture will be
          ("picture", id, image, hands, warnings)
          ("hands", id, hands)
          ("failure", id, sentence)
          ("steps", {rows: how often}, {graph: seconds so far}, {graph: [seconds of each run]}, GPU memory)
                                                        from time to time, and when there is nothing more to do
          ("broken", sentence)                          the loop cannot go on

The pipe is looked at between two steps, by the thread that runs the loop: nothing is shared, and nothing is locked.
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
from typing import Any

import numpy as np

from ..errors import HanDiffuserError
from ..runtime.loading import MANY
from ..runtime.pipeline import HanDiffuser
from ..runtime.requests import Request
from ..runtime.results import Failure, Picture

WARM_UP = ("a right hand making a fist, blue background", "a dark left hand, red background",
           "two open hands, green background", "a pale hand with spread fingers, yellow background",
           "a tan hand, white background", "a hand in a dark room")  # fmt: skip
WARM_UP_STEPS = 4
TELL = 0.5  # seconds between two ("steps", ...)
HANDS = ("text_encoder", "hand_prior", "hand_features")  # graphs that make hands
STAGE_1 = (*HANDS, "text_hand_encoder", "unet_context")  # that make them and what the UNet is told of them


@dataclass(frozen=True)
class Options:
    """What `HanDiffuser.load` is told, and which GPU a process sees."""

    engines: str
    device: str = "auto"
    threads: int | None = None
    batch_size: int = 8
    backend: str = "auto"
    warm_up: bool = True
    gpu: str | None = None  # of CUDA_VISIBLE_DEVICES
    pictures: int = MANY  # that it will make


def work_alone(pipe: Connection, options: Options) -> None:
    """`work` in a process of its own. Ctrl-C in a terminal reaches the whole group: what to do of it is the front's."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if options.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = options.gpu
    work(pipe, options)


def work(pipe: Connection, options: Options) -> None:
    """Loads and runs until the pipe says stop, or is closed at the other end."""
    try:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                pipeline = HanDiffuser.load(
                    options.engines,
                    options.device,
                    options.threads,
                    options.batch_size,
                    options.backend,
                    pictures=options.pictures,
                )
            with pipeline:
                lane = Lane(pipe, pipeline)
                facts = lane.warm_up() if options.warm_up else {}
                said = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
                said += pipeline.loop.warnings()
                pipe.send(("ready", {"slots": pipeline.batch_size, "pid": os.getpid(), "warnings": said, **facts}))
                lane.run()
        except HanDiffuserError as error:
            pipe.send(("refused", str(error)))
        except MemoryError:
            pipe.send(("refused", "There is not enough memory."))
    except (EOFError, OSError):  # the front is gone
        return
    except Exception as error:
        with suppress(OSError):
            pipe.send(("broken", f"{type(error).__name__}: {error}"))
    finally:
        pipe.close()


class Lane:
    """A loop and its pipe."""

    def __init__(self, pipe: Connection, pipeline: HanDiffuser) -> None:
        self.pipe, self.pipeline = pipe, pipeline
        self.inbox: deque[Request] = deque()
        self.taken: dict[str, Followed] = {}  # what came in and has not come out
        self.begun: set[str] = set()
        self.stopped = False
        self.colours = Colours()
        self.rows: Counter[int] = Counter()  # jobs a step -> how often
        self.laps = Laps(pipeline.timings)
        self.told = 0.0

    def run(self) -> None:
        try:
            for result in self.pipeline.run(self.source(), self.on_event):
                followed = self.taken.pop(result.id, None)
                self.begun.discard(result.id)
                if isinstance(result, Failure):
                    self.pipe.send(("failure", result.id, result.sentence))
                    continue
                self.laps.pictures += 1
                if followed is not None:
                    if followed.before is not None:
                        self.colours.learn(followed.before, result.image)
                    self.pipe.send(("picture", result.id, result.image, small(result.hands), result.warnings))
        except HanDiffuserError as error:  # a graph that cannot be run at all: out of memory, say
            self.pipe.send(("broken", str(error)))

    def source(self) -> Iterator[Request | None]:
        """What the loop asks for work; waits when there is nothing in flight."""
        while not self.stopped:
            if not self.taken:
                self.tell()
            self.listen(wait=not self.taken)
            if self.inbox:
                yield self.inbox.popleft()
            elif not self.stopped:
                yield None

    def listen(self, wait: bool = False) -> None:
        """Takes what has come in."""
        while not self.stopped and self.pipe.poll(None if wait else 0):
            wait = False
            kind, *rest = self.pipe.recv()
            if kind == "run":
                request, follow, whole = rest
                self.taken[request.id] = Followed(request, frozenset(follow), whole)
                self.inbox.append(request)
            elif kind == "hands":
                self.hands(rest[0])
            elif kind == "cancel":
                self.cancel(rest[0])
            elif kind == "stop":
                self.stopped = True
                for id in [*self.taken]:
                    self.cancel(id)

    def hands(self, request: Request) -> None:
        (made,) = self.pipeline.hands([request])
        self.laps.take(*HANDS)
        if isinstance(made, Failure):
            self.pipe.send(("failure", made.id, made.sentence))
        else:
            self.pipe.send(("hands", request.id, small(made)))

    def cancel(self, id: str) -> None:
        for i, request in enumerate(self.inbox):
            if request.id == id:
                del self.inbox[i]
                self.taken.pop(id)
                self.pipe.send(("failure", id, "It was cancelled."))
                return
        if id in self.taken:
            self.pipeline.cancel(id)

    def on_event(self, kind: str, count: int) -> None:
        """Between two steps."""
        self.laps.after(kind)
        if kind == "steps":
            self.rows[count] += 1
            self.listen()
        for id, followed in self.taken.items():
            if not followed.follow and (id in self.begun or not followed.whole):
                continue  # a look costs little, and on a GPU a wait
            peek = self.pipeline.peek(id)
            if peek is None:
                continue
            if id not in self.begun:
                self.begun.add(id)
                finite = all(np.isfinite(value).all() for value in peek.hands.values())
                if finite:
                    self.pipe.send(("begun", id, small(peek.hands)))
            if peek.latents is not None and followed.follow and peek.step != followed.step:
                if peek.step in followed.follow:
                    latents = followed.clean(peek.step, peek.latents, self._levels(followed))
                    self.pipe.send(("preview", id, peek.step, peek.steps, self.colours(latents)))
                followed.step, followed.before = peek.step, peek.latents
        if time.monotonic() - self.told > TELL:
            self.tell()

    def tell(self) -> None:
        """What was done since the last time, for the metrics; nothing where nothing was."""
        laps = self.laps.all()
        if self.rows or laps:
            memory = gpu_memory() if self.pipeline.on_gpu else None
            self.pipe.send(("steps", dict(self.rows), dict(self.pipeline.timings), laps, memory))
            self.rows.clear()
        self.told = time.monotonic()

    def _levels(self, followed: Followed) -> np.ndarray:
        if followed.levels is None:
            followed.levels = self.pipeline.bundle.levels(followed.request)
        return followed.levels

    def warm_up(self) -> dict[str, Any]:
        """Makes engines ready, learns what colours latents mean, and measures how long a step takes."""
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
        return {"rate": steps * len(requests) / (time.perf_counter() - started), "slowest": slowest}


class Laps:
    """How long each graph took whenever it ran, read off the loop's own sums: of the graphs that make hands and context
    for a batch of requests, of the UNet for a step, of the decoder for a picture.

    On a GPU the sums hold the UNet's steps only, of which the loop has events; of the rest only the device knows.
    """

    def __init__(self, timings: dict[str, float]) -> None:
        self.timings, self.before = timings, dict(timings)
        self.found: defaultdict[str, list[float]] = defaultdict(list)  # graph -> seconds of each run
        self.pictures = 0  # that came out since the decoder was last looked at

    def after(self, kind: str) -> None:
        """kind: an event of the loop."""
        self.take(*(STAGE_1 if kind == "hands" else ("unet",)))
        self.take_pictures()

    def take(self, *graphs: str, times: int = 1) -> None:
        """graphs have run so often since the last look."""
        for name in graphs:
            spent = self.timings.get(name, 0.0) - self.before.get(name, 0.0)
            if spent > 0:
                self.before[name] = self.timings[name]
                self.found[name] += [spent / times] * times

    def take_pictures(self) -> None:
        """Those that leave together are decoded one after the other, before the first one is out."""
        if self.pictures:
            self.take("image_decoder", times=self.pictures)
            self.pictures = 0

    def all(self) -> dict[str, list[float]]:
        """What was found since the last time."""
        self.take_pictures()
        found = dict(self.found)
        self.found.clear()
        return found


class Followed:
    """What the front wants to see of a request on its way."""

    def __init__(self, request: Request, follow: frozenset[int], whole: bool) -> None:
        self.request, self.follow, self.whole = request, follow, whole
        self.step = -1
        self.before: np.ndarray | None = None  # latents at `step`
        self.levels: np.ndarray | None = None

    def clean(self, step: int, latents: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """What the latents will be without their noise, as far as two steps tell: on a straight way (DDIM) both hold
        the same picture and the same noise, in known parts. levels: `Bundle.levels`."""
        if self.before is None or self.step != step - 1 or step >= len(levels):
            return latents * levels[min(step, len(levels) - 1), 2]
        (a0, s0, k0), (a1, s1, k1) = levels[step - 1], levels[step]
        mixed = s0 * a1 - s1 * a0
        if abs(mixed) < 1e-3:
            return latents * k1
        return (s0 * k1 * latents - s1 * k0 * self.before) / mixed


class Colours:
    """What colour a latent is: a quadratic map of it and of the mean around it, fitted to pictures and their latents as
    they are made. A thousandth of the decoder's work, and good enough to see where a picture is going."""

    def __init__(self) -> None:
        self.squares: np.ndarray | None = None  # XᵀX [F, F] of all that was learned from
        self.products = np.zeros(0)  # XᵀY [F, 3]
        self.count = 0

    def learn(self, latents: np.ndarray, image: np.ndarray) -> None:
        """latents: [C, h, w]. image: uint8 [H, W, 3], H and W multiples of h and w."""
        _, h, w = latents.shape
        if image.shape[0] % h or image.shape[1] % w or not np.isfinite(latents).all():
            return
        means = image.reshape(h, image.shape[0] // h, w, image.shape[1] // w, 3).mean((1, 3)).reshape(-1, 3)
        x = self._features(latents)
        if self.squares is None:
            self.squares, self.products = np.zeros((x.shape[1],) * 2), np.zeros((x.shape[1], 3))
        self.squares += x.T @ x
        self.products += x.T @ means
        self.count += len(x)

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """uint8 [h, w, 3]."""
        _, h, w = latents.shape
        if self.squares is None:  # nothing learned: shades of the first channel
            shade = latents[:1] / max(float(np.abs(latents[0]).max()), 1e-6) * 100 + 128
            return np.nan_to_num(shade.repeat(3, 0).transpose(1, 2, 0)).clip(0, 255).astype(np.uint8)
        ridge = 1e-4 * self.count * np.eye(len(self.squares))
        colours = self._features(latents) @ np.linalg.solve(self.squares + ridge, self.products)
        return np.nan_to_num(colours).clip(0, 255).reshape(h, w, 3).astype(np.uint8)

    @staticmethod
    def _features(latents: np.ndarray) -> np.ndarray:
        """[C, h, w] -> [h w, F]: one, each channel and its 3 x 3 mean, and the products of both kinds."""
        C, h, w = latents.shape
        wide = np.pad(latents.astype(np.float64), ((0, 0), (1, 1), (1, 1)), mode="edge")
        around = np.mean([wide[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], 0)
        i, j = np.triu_indices(C)
        columns = [np.ones((1, h, w)), latents, latents[i] * latents[j], around, around[i] * around[j]]
        return np.concatenate(columns).reshape(-1, h * w).T


def small(hands: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the vertices, which are most of it, and the raw parameters, which the arrays say again."""
    return {name: value for name, value in hands.items() if name not in ("vertices", "params")}


def gpu_memory() -> tuple[int, int] | None:
    """Bytes in use and in all."""
    try:
        from cuda.bindings import runtime

        error, free, total = runtime.cudaMemGetInfo()
        return (int(total) - int(free), int(total)) if int(error) == 0 else None
    except Exception:  # a figure for a dashboard is no reason to stop
        return None
