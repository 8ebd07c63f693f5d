"""What all paths share: the bundle, the dispatcher, and the hands and pictures that the server keeps.

service = Service(bundle, dispatcher, "demo", Limits(), keys, metrics, folder, Front(any_size=True))
requests = service.prepare(Request("a fist", seed=1), count=2)
"""

from __future__ import annotations

import hashlib
import math
import secrets
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..contract import shown_size
from ..editing import Arrays
from ..engines.plans import cache_folder
from ..errors import HanDiffuserError, RequestError
from ..files import written
from ..hands import NO_HANDS, hands_file
from ..runtime.bundle import Bundle
from ..runtime.requests import Request, gaps
from ..settings import MAX_SEED, http_name
from .adapters import Adapters
from .dispatch import BusyError, Dispatcher
from .fields import HandsField, arrays_of
from .keys import Keys
from .messages import Takes
from .metrics import Metrics

KEPT_HANDS = 1000  # files of hands from clients or for clients
KEPT_BYTES, KEPT_SECONDS = 256 << 20, 3600.0  # pictures that clients may fetch by URL
MAX_UPLOADS = 16  # requests with pictures at once: each holds its pictures in memory
MIN_SIDE_PIXELS, MAX_SIDE_PIXELS = 16, 2048  # of a picture that is scaled
MAX_AREA = 4  # times the pixels of the bundle's own size that a client may ask for
SCALED_AREA = 2  # the same with `any_size`, which scales beyond: in large pictures models draw more hands


@dataclass(frozen=True)
class Front:
    """Settings for clients that cannot change their requests, and the URL where they reach the server."""

    aliases: tuple[str, ...] = ()  # further names of the model
    any_size: bool = False  # scale pictures to the size that a request asks for
    response_format: str = "b64_json"  # if a request names none
    public_url: str | None = None  # the URL of / for clients, without a slash at the end
    cors: tuple[str, ...] = ()  # origins whose pages may send requests
    negative_prompt: str = ""  # of guided requests that give none
    plain_prompts: bool = False  # of all requests
    loras: Path | None = None  # the folder of adapters that requests may name


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    n: int = 8  # pictures
    steps: int = 100  # of a picture
    timeout: float = 300.0  # seconds; also the default
    body: int = 1 << 20  # bytes
    upload: int = 32 << 20  # bytes of a body that brings pictures
    pixels: int = 51_000_000  # of a picture that a request brings: those of a telephone with 50 megapixels


class UnfinishedError(HanDiffuserError):
    """The server could not make a picture. `status` is for HTTP."""

    def __init__(self, sentence: str, status: int = 500) -> None:
        super().__init__(sentence)
        self.status = status


class Service:
    """The state that the paths share."""

    def __init__(
        self,
        bundle: Bundle,
        dispatcher: Dispatcher,
        name: str,
        limits: Limits,
        keys: Keys,
        metrics: Metrics,
        folder: Path,
        front: Front | None = None,
    ) -> None:
        """folder: a private one, for the hands that the server keeps."""
        self.bundle, self.dispatcher, self.name, self.limits = bundle, dispatcher, name, limits
        self.keys, self.metrics = keys, metrics
        self.folder, self.front = folder, front or Front()
        self.adapters = Adapters(self.front.loras)
        dispatcher.on_ready = self.learn
        self.names = list(dict.fromkeys((name, *self.front.aliases)))  # what `model` may be
        self.most = min(limits.n, dispatcher.queue.places)  # pictures of a request: the queue never has room for more
        self.started = int(time.time())
        self.hands: OrderedDict[str, Path] = OrderedDict()
        self.pictures: OrderedDict[str, tuple[float, str, bytes]] = OrderedDict()
        self.bytes = 0
        self.uploads = 0  # requests under way that bring pictures
        self.lock = threading.Lock()  # threads prepare requests and encode pictures

    @property
    def size(self) -> str:
        height, width = self.bundle.manifest.image_size
        return f"{width}x{height}"

    @property
    def sizes(self) -> list[str] | None:
        """The sizes that the engines were built for; None: any that the bundle paints."""
        found = self.bundle.engine_sizes
        return None if found is None else [shown_size(size) for size in sorted(found)]

    @property
    def most_pixels(self) -> int:
        """That a client's picture may have, where the bundle paints other sizes than its own."""
        return self.most_area * math.prod(self.bundle.manifest.image_size)

    @property
    def most_area(self) -> int:
        """The same, as a multiple of the bundle's own size."""
        return SCALED_AREA if self.front.any_size else MAX_AREA

    @property
    def engines(self) -> Path:
        """The bundle's folder."""
        return Path(self.dispatcher.workers[0].options.engines)

    def learn(self, takes: Takes) -> None:
        """What the engines take: what they do not take is refused at once, and not when its turn comes."""
        bundle = self.bundle
        if self.front.loras is not None and bundle.adapts and not takes.adapters:
            self.dispatcher.say(
                "--lora-folder has no effect: these engines take no adapters of requests. Serve a bundle with one set: "
                "hd-engines merge."
            )
        bundle.engine_sizes = None if takes.sizes is None else frozenset(takes.sizes)
        bundle.build_sizes = self.unnamed(takes.build_sizes)
        bundle.reader.engine_chunks, bundle.adapts = takes.chunks, takes.adapters
        self.dispatcher.fatal = self.dispatcher.fatal or self.misfit()
        if takes.on_gpu:  # the loop knows the memory of its GPU
            bundle.room.free = lambda: None

    def misfit(self) -> str | None:
        """Why --default-negative-prompt cannot be read by the bundle or its engines, in a sentence."""
        front = self.front
        negative, cut = front.negative_prompt, front.plain_prompts
        try:
            self.bundle.reader.check(Request("a picture", negative_prompt=negative, plain_prompts=cut, guidance=2.0))
        except RequestError as error:
            said = str(error).replace("set plain_prompts, which cuts it", "start hd-serve with --plain-prompts")
            return said.replace("negative_prompt", "--default-negative-prompt", 1)
        return None

    def unnamed(self, sentence: str) -> str:
        """A sentence without the names of files and folders of this machine."""
        folder, sentence = self.bundle.folder, self.adapters.hidden(sentence)
        if folder is not None and folder.is_absolute():
            sentence = sentence.replace(str(folder), self.name)
        for own, name in ((cache_folder(), "the server's cache"), (self.folder, "the server's folder")):
            for path in dict.fromkeys((str(own), str(own.resolve()))):
                sentence = sentence.replace(path, name)
        return sentence

    @contextmanager
    def bringing(self) -> Iterator[None]:
        """While a request with pictures is under way. Raises BusyError if there are too many."""
        if self.uploads >= MAX_UPLOADS:
            raise BusyError(f"{MAX_UPLOADS} requests with pictures are under way. Try again later.", 5.0)
        self.uploads += 1
        try:
            yield
        finally:
            self.uploads -= 1

    def keep_hands(self, hands: Arrays, prompt: str = "") -> str:
        """Writes hands into the private folder and returns their id, a digest. Raises RequestError, and UnfinishedError
        if the disk is full."""
        content = hands_file({name: np.asarray(value, np.float32) for name, value in hands.items()}, prompt)
        id = f"hands_{hashlib.sha256(content).hexdigest()[:32]}"
        with self.lock:  # two requests may bring the same hands
            if id not in self.hands:
                try:
                    with written(self.folder / f"{id}.npz") as temporary:
                        temporary.write_bytes(content)
                except OSError as error:
                    raise UnfinishedError(f"The server cannot keep hands: {error.strerror or error}.", 503) from None
            self.hands[id] = self.folder / f"{id}.npz"
        return id

    def forget_hands(self) -> None:
        """Deletes the oldest hands, except those of requests on their way."""
        if len(self.hands) <= KEPT_HANDS:
            return
        needed = {ticket.request.hands for ticket in [*self.dispatcher.queue, *self.dispatcher.under_way]}
        with self.lock:
            for id, path in list(self.hands.items())[: len(self.hands) - KEPT_HANDS]:
                if str(path) not in needed:
                    del self.hands[id]
                    path.unlink(missing_ok=True)

    def hands_path(self, hands: HandsField | list[HandsField] | str | None) -> str | None:
        """The path for `Request.hands`. The server opens only files that it wrote itself."""
        if isinstance(hands, (HandsField, list)):
            hands = self.keep_hands(arrays_of(hands))
        if hands is None or hands == NO_HANDS:
            return hands
        with self.lock:
            if hands not in self.hands:
                raise RequestError(
                    f"hands must be an id that this server keeps, got {hands[:60]!r}. Send the arrays instead.", "hands"
                )
            self.hands.move_to_end(hands)
            return str(self.hands[hands])

    def prepare(self, request: Request, count: int = 1) -> list[Request]:
        """Fills in the bundle's defaults, seeds and ids. Raises RequestError for what this bundle cannot run."""
        assert request.seed is not None
        filled = replace(request, **gaps(request, self.bundle.manifest.defaults))
        filled = replace(filled, plain_prompts=request.plain_prompts or self.front.plain_prompts)
        for name, steps in (("steps", filled.steps), ("hand_steps", request.hand_steps)):
            if (steps or 1) > self.limits.steps:
                raise RequestError(
                    f"{http_name(name)} must be at most {self.limits.steps} on this server, got {steps}. "
                    f"Ask for {self.limits.steps} or fewer.",
                    name,
                )
        try:
            with self.lock:  # the bundle caches its schedules
                self.bundle.check(filled)
        except RequestError as error:
            # The client sent arrays, not a file: its name on this machine is not for clients.
            file = f"the hands file {request.hands}"
            if isinstance(request.hands, bytes):
                file = "the dictionary of hands"
            sentence = str(error).replace(f"T{file[1:]} has", "The hands have").replace(f" in {file}", "")
            sentence = sentence.replace(f"T{file[1:]}", "The hands")
            if isinstance(request.hands, str):
                sentence = sentence.replace(request.hands, "the hands")
            raise RequestError(self.unnamed(sentence), error.param, error.code) from None
        return [
            replace(filled, seed=(request.seed + i) % (MAX_SEED + 1), id=f"img-{secrets.token_hex(12)}")
            for i in range(count)
        ]

    def keep_picture(self, content: bytes, format: str) -> str:
        """Keeps a picture for an hour and returns the name in its URL."""
        now = time.monotonic()
        name = f"{secrets.token_urlsafe(24)}.{format}"
        with self.lock:
            self.pictures[name] = (now, format, content)
            self.bytes += len(content)
            while self.pictures:
                first, (kept, _, old) = next(iter(self.pictures.items()))
                if self.bytes <= KEPT_BYTES and now - kept < KEPT_SECONDS:
                    break
                del self.pictures[first]
                self.bytes -= len(old)
        return name


def private_folder() -> tempfile.TemporaryDirectory[str]:
    """For the hands that the server keeps while it runs."""
    return tempfile.TemporaryDirectory(prefix="hd-serve-")
