"""A GPU that is not there: streams, events, copies and captured graphs over numpy, for tests of what enqueues work.

Nothing runs when it is enqueued. When the host asks for an event, queued work is run in an order drawn at random among
all that streams and events allow, so that a missing `wait`, a buffer that is used again too early or a host array that
is freed too soon gives a wrong result for some seed.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable

import numpy as np
from handiffuser.engines.base import check_feeds
from handiffuser.runtime.noise import HANDS, LATENTS, normal, stream_key


class FakeCuda:
    name, compute_capability = "Fake GPU", "8.9"

    def __init__(self, seed: int = 0, refuse_capture: bool = False) -> None:
        self.random = np.random.default_rng(seed)
        self.refuse_capture = refuse_capture
        self.streams: list[FakeStream] = []
        self.allocated = self.favourite = 0
        self.clock = 0.0  # seconds

    def zeros(self, shape, dtype):
        self.allocated += 1
        return FakeArray(np.zeros(shape, dtype))

    def pinned(self, shape, dtype):
        self.allocated += 1
        return np.zeros(shape, dtype)

    def close(self):
        """Nothing to free."""

    def kernel(self, code, name, types):
        assert name == "normal" and b".entry normal(" in code
        return FakeKernel(self)

    def stream(self):
        self.streams.append(FakeStream(self))
        return self.streams[-1]

    def run_one(self) -> bool:
        """Runs one piece of work that may run now; False if there is none."""
        able = [s for s in self.streams if s.queue and (s.queue[0][0] != "wait" or s.queue[0][1].happened)]
        if not able:
            return False
        # One stream runs ahead of all others for a while, then another one: mere coin tosses hardly reorder anything.
        if self.random.random() < 0.02:
            self.favourite = int(self.random.integers(len(self.streams)))
        first = self.streams[self.favourite % len(self.streams)]
        stream = first if first in able else able[self.random.integers(len(able))]
        kind, what = stream.queue.popleft()
        if kind == "call":
            self.clock += 1e-6
            what()
        elif kind == "record":
            what.happened, what.at = True, self.clock
        return True


class FakeArray:
    def __init__(self, value: np.ndarray) -> None:
        self.value = value
        self.pointer = value.ctypes.data

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)
    nbytes = property(lambda self: self.value.nbytes)

    def __len__(self):
        return len(self.value)

    def __getitem__(self, rows):
        assert isinstance(rows, int) or rows.step is None
        view = self.value[rows : rows + 1].reshape(self.value.shape[1:]) if isinstance(rows, int) else self.value[rows]
        assert view.base is not None or view is self.value
        return FakeArray(view)


class FakeKernel:
    """The noise kernel, by its twin on the host."""

    def __init__(self, cuda):
        self.cuda = cuda

    def launch(self, stream, blocks, threads, pointer, seed, key, draw, count, scale):
        assert blocks * threads * 4 >= count > (blocks - 1) * threads * 4
        (name,) = [name for name in (HANDS, LATENTS) if stream_key(name) == key]
        target = np.ctypeslib.as_array((ctypes.c_float * count).from_address(pointer))
        value = normal(seed, name, draw, (count,)) * np.float32(scale)
        stream.call(lambda: np.copyto(target, value))


class FakeStream:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.handle = cuda, id(self)
        self.queue: deque = deque()
        self.captured: list | None = None

    def call(self, function: Callable[[], None]) -> None:
        if self.captured is not None:
            self.captured.append(function)
        else:
            self.queue.append(("call", function))

    def copy(self, target, source):
        target, source = (x.value if isinstance(x, FakeArray) else x for x in (target, source))
        assert target.nbytes == source.nbytes and target.dtype == source.dtype, (target.shape, source.shape)
        self.call(lambda: np.copyto(target, source.reshape(target.shape)))

    def zero(self, target):
        self.call(lambda: target.value.fill(0))

    def record(self, timed=False):
        assert self.captured is None
        event = FakeEvent(self.cuda)
        self.queue.append(("record", event))
        return event

    def wait(self, event):
        assert self.captured is None
        self.queue.append(("wait", event))

    def synchronize(self):
        self.record().synchronize()

    def capture(self, function):
        self.captured = []
        function()
        work, self.captured = self.captured, None
        return None if self.cuda.refuse_capture else FakeGraph(work)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.happened = cuda, False

    def done(self):
        for _ in range(self.cuda.random.integers(4)):
            self.cuda.run_one()
        return self.happened

    def synchronize(self):
        while not self.happened:
            assert self.cuda.run_one(), "deadlock: the host waits for what nothing will bring about"

    def seconds_since(self, earlier):
        assert self.happened and earlier.happened
        return self.at - earlier.at


class FakeGraph:
    def __init__(self, work: list) -> None:
        self.work = work

    def launch(self, stream):
        for function in self.work:
            stream.call(function)


class FakeDeviceEngine:
    """An engine for a fixed number of rows, computed by ONNX Runtime on the CPU when its turn comes.

    seconds: what a run takes by the fake GPU's clock.
    """

    own_graph = False

    def __init__(self, engine, bucket: int | None, spoil=None, seconds: float = 0.0) -> None:
        self.engine, self.spec, self.bucket, self.spoil = engine, engine.spec, bucket, spoil
        self.enqueued, self.seconds = 0, seconds

    def bind(self, inputs, outputs):
        check_feeds(self.spec, inputs)
        assert self.bucket is None or all(len(array) == self.bucket for array in (*inputs.values(), *outputs.values()))
        self.inputs, self.outputs = inputs, outputs

    def enqueue(self, stream):
        self.enqueued += 1
        inputs, outputs = self.inputs, self.outputs  # a later bind is for later runs
        stream.call(lambda: self._run(stream.cuda, inputs, outputs))

    def _run(self, cuda, inputs, outputs):
        cuda.clock += self.seconds
        results = self.engine({name: array.value.copy() for name, array in inputs.items()})
        if self.spoil is not None:
            self.spoil({name: array.value for name, array in inputs.items()}, results)
        for name, value in results.items():
            np.copyto(outputs[name].value, value)

    def capturable(self, stream):
        return True
