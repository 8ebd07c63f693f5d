"""What the front (`dispatch`) and a loop (`worker`) tell each other through a pipe: tagged structs, as msgpack.

    send(pipe, Cancel("img-1"))
    message = for_worker(pipe)

A request on its way to a picture has one name in each place:

    Request     what one picture should be (`runtime.requests`); the same object from end to end
    Ticket      the front's: a request that waits in the queue or that a worker has, and where its answers arrive
    InFlight    the worker's: a request that its loop has, and what previews of it need

Inside the loop, `runtime` has names of its own for a request between two graphs and for its place in a batch.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import msgspec
import numpy as np
from msgspec import Struct

from ..runtime.requests import Request

Arrays: TypeAlias = dict[str, np.ndarray]


# ---------------------------------------------------------------- from the front to a worker


class Run(Struct, tag=True):
    """Make a picture. The worker sends a preview after each of `preview_steps`, and before them the hands, if asked."""

    request: Request
    preview_steps: frozenset[int] = frozenset()
    hands_first: bool = False


class MakeHands(Struct, tag=True):
    """Make a request's hands, and no picture. mesh: with the vertices of the body."""

    request: Request
    mesh: bool = False


class Cancel(Struct, tag=True):
    """Drop a request at the next step. The worker answers with `Failed`."""

    id: str


class Stop(Struct, tag=True):
    """Drop all requests and end."""


# ---------------------------------------------------------------- from a worker to the front


class Takes(Struct, frozen=True):
    """What engines take of what their bundle may do. The front refuses the rest before a request waits for it.

    sizes: (height, width) of pictures; None: any. build_sizes: the command that builds for others. chunks: of a prompt;
    None: as many as the graphs. adapters: whether requests may bring some.
    """

    sizes: list[tuple[int, int]] | None = None
    build_sizes: str = ""
    chunks: int | None = None
    adapters: bool = True
    on_gpu: bool = False


class Ready(Struct, tag=True):
    """The engines are loaded. A worker that has warmed up says how fast it is."""

    slots: int  # pictures at once
    pid: int
    warnings: list[str] = []
    rate: float = 0.0  # steps a second
    slowest: float | None = None  # seconds of the slowest step
    takes: Takes = Takes()


class Refused(Struct, tag=True):
    """The engines cannot be loaded."""

    sentence: str


class Broken(Struct, tag=True):
    """The loop has ended with an error."""

    sentence: str


class HandsMade(Struct, tag=True):
    """The hands of a request: its whole answer (`MakeHands`), or the first part of it (`Run`)."""

    id: str
    hands: Arrays


class Preview(Struct, tag=True):
    """What a picture will look like. colours: uint8 [h, w, 3], in the size of the latents."""

    id: str
    step: int
    steps: int
    colours: np.ndarray


class PictureMade(Struct, tag=True):
    """image: uint8 [H, W, 3]."""

    id: str
    image: np.ndarray
    hands: Arrays
    warnings: list[str] = []


class Failed(Struct, tag=True):
    """A request has no picture. status: what HTTP calls it."""

    id: str
    sentence: str
    status: int = 500


class Measured(Struct, tag=True):
    """What the loop did since its last such message; it sends one now and then, and before it waits for work."""

    batches: dict[int, int]  # pictures that a step advanced -> number of such steps
    totals: dict[str, float]  # graph -> seconds since the start
    runs: dict[str, list[float]]  # graph -> seconds of each run
    gpu_memory: tuple[int, int] | None = None  # bytes: in use, in all


ToWorker: TypeAlias = Run | MakeHands | Cancel | Stop
Answer: TypeAlias = HandsMade | Preview | PictureMade | Failed  # what arrives at a ticket
ToFront: TypeAlias = Ready | Refused | Broken | Answer | Measured


def send(pipe: Connection, message: ToWorker | ToFront) -> None:
    """Raises OSError where the other end is closed."""
    pipe.send_bytes(_ENCODER.encode(message))


def for_worker(pipe: Connection) -> ToWorker:
    """The next message from the front. Raises EOFError or OSError where the other end is closed."""
    return _FOR_WORKER.decode(pipe.recv_bytes())


def for_front(pipe: Connection) -> ToFront:
    """The next message from a worker. Raises EOFError or OSError where the other end is closed, and
    msgspec.ValidationError for a message of another kind."""
    return _FOR_FRONT.decode(pipe.recv_bytes())


def sentence(error: object) -> str:
    """What an error says, as text that can be sent: names of files may hold bytes that are not Unicode."""
    return str(error).encode("utf-8", "backslashreplace").decode("utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _array(kind: type, value: Any) -> np.ndarray:
    dtype, shape, content = value
    return np.frombuffer(content, dtype).reshape(shape)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)
# Built on import, in one thread: msgspec 0.22 crashes where two threads meet a dataclass for the first time.
_FOR_WORKER: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_FOR_FRONT: msgspec.msgpack.Decoder[ToFront] = msgspec.msgpack.Decoder(ToFront, dec_hook=_array)
