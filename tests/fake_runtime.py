"""`cuda.bindings.runtime` without a GPU, as strict as the real one, so that `engines/cuda.py` and all above it run.

    gpu = FakeRuntime(seed=1)
    gpu.install(monkeypatch)                   # from here on `Cuda()` finds this GPU
    ...
    assert not gpu.problems

The functions have the names, parameters and return tuples of the installed package (`test_fake_runtime.py` compares
them); codes, flags and handles are the package's own.

Device memory is one numpy array whose addresses are numbers that the host cannot read. What is freed is never given
out again, and between two allocations is a gap. Work is done late: an operation runs when the host waits for it, in an
order that is drawn at random (`seed`) among those which streams and events allow. So a missing `wait` gives a wrong
result for some seed; but it is found for every seed, by clocks. `problems` collects in words:

- races: two operations touch a byte, one of them writes, and no stream, event or wait of the host orders them;
- memory that is used after it was freed, or was never allocated, or is read before anything was written there, and
  ranges that leave their allocation;
- asynchronous copies from or to pageable memory;
- pinned memory that the host writes before the copy that reads it is done, or touches before the copy into it is done
  (which holds garbage until then), or frees;
- freeing or allocating during a capture, work on another stream meanwhile, use of what was destroyed.

During a capture that which CUDA refuses is refused, and the capture is spoilt. Graphs replay the addresses they were
captured with. Faults: `memory` bytes there are, `refuse` (call number or name of a call -> error), `break_at` (the
number of the operation that breaks the context: every later call fails), `refuse_allocation` (its number).
"""

# ruff: noqa: N802 (the names are CUDA's)
from __future__ import annotations

import bisect
import ctypes
import functools
import inspect
import itertools
from collections import Counter, deque
from types import SimpleNamespace

import numpy as np
import pytest
from cuda.bindings import driver as real_driver
from cuda.bindings import runtime as real
from handiffuser.engines import cuda as product
from handiffuser.engines.base import check_feeds
from handiffuser.runtime.noise import HANDS, LATENTS, drawn_again, normal, stream_key
from handiffuser.settings import MAX_REDRAWS

CODES = real.cudaError_t
OK = CODES.cudaSuccess
BASE = 0x7_0000_0000_0000  # where the device's addresses begin; nothing of the host is there
SIZE = 1 << 30  # bytes of the device's addresses; untouched pages cost nothing
ALIGNED = 256
GARBAGE = 0xFF  # what new memory holds: NaN, as float32
POLLS = 20_000  # queries in a row that bring nothing: the host would ask for ever
DEFAULT = 0  # the default stream
KERNELS = ("normal", "blend")  # that the fake knows
STREAMS = (LATENTS, *(drawn_again(HANDS, draw) for draw in range(1 + MAX_REDRAWS)))  # of noise


def call(results: int = 0, free: bool = False, captures: bool = True):
    """A function of the runtime. results: values beside the error. free: works in a broken context, too.

    captures: whether it may be called while a stream is in a capture.
    """

    def decorate(function):
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(self, *arguments):
            signature.bind(self, *arguments)
            failed = (None,) * results
            name = function.__name__
            self.calls[name] += 1
            if free:
                return function(self, *arguments)
            if self.broken is not None:
                return (self.broken, *failed)
            if not name.endswith(("Free", "FreeHost", "Destroy", "Unload")):  # these fail with the context only
                self.number += 1
            error = self.refuse.pop(self.number, None) or self.refuse.get(name)
            self.failed |= error is not None
            if error is None and self.capturing is not None and not captures:
                self.problem(f"{name} during a capture")
                self.capturing.invalid = True
                error = CODES.cudaErrorStreamCaptureUnsupported
            if error is not None:
                if name == "cudaStreamEndCapture":
                    self.capturing = None  # it ends whatever happens
                self.last = error
                return (error, *failed)
            try:
                return function(self, *arguments)
            except CallError as refused:
                self.last = refused.code
                return (refused.code, *failed)

        wrapper.results = results
        return wrapper

    return decorate


class CallError(Exception):
    """A call is answered with an error."""

    def __init__(self, code) -> None:
        super().__init__(str(code))
        self.code = code


class Op:
    """Work on the device. reads, writes: [(address, bytes)]. owner: a weak reference to what it cannot run without."""

    owner = None

    def __init__(self, name: str, reads, writes, work, seconds: float = 1e-6) -> None:
        self.name, self.work, self.seconds = name, work, seconds
        self.reads = [(int(address), int(size)) for address, size in reads if size]
        self.writes = [(int(address), int(size)) for address, size in writes if size]


class Memory:
    """An allocation with the last accesses to each of its parts: bounds[i] .. bounds[i + 1] has touches[i]."""

    def __init__(self, start: int, size: int, pinned: bool = False, keep=None) -> None:
        self.start, self.size, self.end, self.pinned, self.freed, self.keep = (
            start,
            size,
            start + size,
            pinned,
            "",
            keep,
        )
        self.bounds = [start, self.end]
        # (last write (stream, time, name), stream -> last read (time, name)); the device does not see the host's writes
        self.touches: list[tuple] = [((DEFAULT, 0, "the host") if pinned else None, {})]
        self.pending = 0  # operations that were enqueued and did not run yet

    def cut(self, at: int) -> int:
        """The part that begins at `at`."""
        i = bisect.bisect_left(self.bounds, at)
        if self.bounds[i] != at:
            write, reads = self.touches[i - 1]
            self.bounds.insert(i, at)
            self.touches.insert(i, (write, dict(reads)))
        return i

    def touch(self, start: int, size: int, writes: bool, clock: dict[int, int], stream: int, name: str) -> str:
        """Notes an access; says what is wrong with it: which earlier one it races with, or that none wrote, or ""."""
        first, last = self.cut(start), self.cut(start + size)
        wrong, mine = "", clock[stream]
        for i in range(first, last):
            write, reads = self.touches[i]
            if write is not None and write[1] > clock.get(write[0], 0):
                wrong = f"race: {name} and the earlier {write[2]}, which writes"
            if writes:
                for other, (time, what) in reads.items():
                    if time > clock.get(other, 0):
                        wrong = f"race: {name}, which writes, and the earlier {what}"
            else:
                reads[stream] = (mine, name)
                if write is None:
                    wrong = f"{name} reads memory that was never written"
        if writes:
            self.bounds[first + 1 : last] = []
            self.touches[first:last] = [((stream, mine, name), {})]
        return wrong


class Stream:
    def __init__(self, handle: int) -> None:
        self.handle, self.queue, self.clock, self.destroyed = handle, deque(), {handle: 0}, False


class Mark:
    """One recording of an event."""

    def __init__(self, clock: dict[int, int]) -> None:
        self.clock, self.happened, self.at = clock, False, 0.0


class Event:
    def __init__(self, timed: bool) -> None:
        self.timed, self.mark, self.captured = timed, None, False


class Capture:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.ops, self.invalid = stream, [], False


class Executable:
    def __init__(self, ops: list[Op]) -> None:
        self.ops, self.uploaded = ops, False


class FakeRuntime:
    """One GPU; the module that `engines.cuda` takes for `cuda.bindings.runtime`.

    memory: bytes there are. lazy: nothing runs before the host waits for it, and queries are answered "not yet"
    as long as possible, which finds most uses of pinned memory that come too early.
    """

    def __init__(self, seed: int = 0, name: str = "Fake GPU", capability=(8, 9), memory: int = SIZE, lazy=False):
        self.random, self.lazy = np.random.default_rng(seed), lazy
        self.name, self.capability, self.memory, self.used = name, capability, memory, 0
        self.arena = np.zeros(SIZE, np.uint8)
        self.next = BASE + ALIGNED
        self.device: list[Memory] = []
        self.host: dict[int, Memory] = {}
        self.handles = itertools.count(0x1000, 16)
        self.streams = {DEFAULT: Stream(DEFAULT)}
        self.first: list[int] = []  # priorities of streams that have one
        self.events, self.graphs, self.executables, self.libraries, self.kernels = {}, {}, {}, {}, {}
        self.host_clock: dict[int, int] = {}
        self.capturing: Capture | None = None
        self.problems: list[str] = []
        self.calls: Counter = Counter()
        self.number = 0  # of calls so far
        self.operations = 0  # enqueued so far
        self.allocations = 0
        self.refuse: dict = {}
        self.refuse_allocation: int | None = None
        self.break_at: int | None = None
        self.broken = None
        self.failed = False  # whether a fault has come up
        self.last = OK
        self.clock = 0.0
        self.favourite, self.polls, self.running = 0, 0, False
        self.postponed: list[int] = []

    def install(self, monkeypatch) -> FakeRuntime:
        monkeypatch.setattr(product, "_bindings", lambda: self)
        monkeypatch.setattr(product, "_driver", lambda: FakeDriver(self))
        return self

    def __getattr__(self, name: str):
        value = getattr(real, name)
        if isinstance(value, (int, type)):
            return value  # codes, flags and types are the package's own
        raise NotImplementedError(f"The fake has no {name} yet; write it.")

    # -- what the tests ask -------------------------------------------------------------------------------------------

    def problem(self, sentence: str) -> None:
        if sentence not in self.problems:
            self.problems.append(sentence)

    def value(self, array) -> np.ndarray:
        """What a DeviceArray holds now, after all work."""
        self.drain()
        return self.view(array.pointer, array.nbytes).view(array.dtype).reshape(array.shape).copy()

    def put(self, pointer: int) -> None:
        """Says that something was put into all of an allocation, and waited for: a library's weights."""
        self.find(pointer).touches = [((DEFAULT, 0, "the library that loaded them"), {})]

    def live(self) -> int:
        """Device allocations that are not freed."""
        return sum(not memory.freed for memory in self.device)

    # -- memory -------------------------------------------------------------------------------------------------------

    def find(self, address: int) -> Memory | None:
        """The allocation that holds this address, freed or not."""
        if BASE <= address < BASE + SIZE:
            i = bisect.bisect_right(self.device, address, key=lambda memory: memory.start) - 1
            return self.device[i] if i >= 0 and address < self.device[i].end else None
        for memory in self.host.values():
            if memory.start <= address < memory.end:
                return memory
        return None

    def view(self, address: int, size: int) -> np.ndarray:
        """Bytes of the device or of the host."""
        if BASE <= address < BASE + SIZE:
            return self.arena[address - BASE : address - BASE + size]
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def _check(self, op: Op) -> list[Memory]:
        """The allocations of an operation. Breaks the context for ranges outside of every allocation."""
        found = []
        for address, size in (*op.reads, *op.writes):
            memory = self.find(address)
            trouble = ""
            if memory is None:
                trouble = f"{op.name} touches {address:#x}, which was never allocated"
            elif memory.freed:
                trouble = f"{op.name} touches memory that was freed"
            elif address + size > memory.end:
                trouble = f"{op.name} touches {address + size - memory.end} bytes behind its allocation"
            if trouble:
                self.problem(trouble)
                self.broken = CODES.cudaErrorIllegalAddress
                return []
            found.append(memory)
        return found

    # -- work ---------------------------------------------------------------------------------------------------------

    def stream(self, handle) -> Stream:
        stream = self.streams.get(int(handle))
        if stream is None or stream.destroyed:
            self.problem(f"stream {int(handle):#x} was destroyed, or never made")
            raise CallError(CODES.cudaErrorInvalidResourceHandle)
        return stream

    def enqueue(self, handle, op: Op) -> None:
        """Puts an operation on a stream, or into its capture."""
        stream = self.stream(handle)
        if self.capturing is not None:
            if stream is not self.capturing.stream:
                self.problem(f"{op.name} on another stream during a capture")
                self.capturing.invalid = True
                raise CallError(CODES.cudaErrorStreamCaptureIsolation)
            self.capturing.ops.append(op)
            return
        self._put(stream, op)

    def _put(self, stream: Stream, op: Op) -> None:
        memories = self._check(op)
        if op.owner is not None and op.owner() is None:
            self.problem(f"{op.name} runs, which was let go of")
        if self.broken is not None:
            return
        tick = stream.clock[stream.handle] + 1
        stream.clock = join(stream.clock, self.host_clock)
        stream.clock[stream.handle] = tick
        for ranges, writes in ((op.reads, False), (op.writes, True)):
            for address, size in ranges:
                memory = self.find(address)
                if wrong := memory.touch(address, size, writes, stream.clock, stream.handle, op.name):
                    self.problem(wrong)
        before = self._watch(op)
        for memory in memories:
            memory.pending += 1
        self.operations += 1
        stream.queue.append(("op", op, memories, before, self.operations))

    def _watch(self, op: Op) -> list[tuple[int, int, bytes]]:
        """What pinned memory must still hold when `op` runs: what a copy reads, and garbage where it will write."""
        watched = []
        for address, size in op.writes:
            memory = self.find(address)
            if memory.pinned and not memory.pending:
                self.view(address, size)[:] = GARBAGE
                watched.append((address, size, bytes([GARBAGE]) * size))
        watched += [
            (address, size, self.view(address, size).tobytes())
            for address, size in op.reads
            if (memory := self.find(address)).pinned and not memory.pending
        ]
        return watched

    def run_one(self) -> bool:
        """Runs one piece of work that may run now; False if there is none."""
        able = [s for s in self.streams.values() if s.queue and (s.queue[0][0] != "wait" or s.queue[0][1].happened)]
        if not able or self.running:
            return False
        # One stream runs ahead of all others for a while, then another one: mere coin tosses hardly reorder anything.
        if self.random.random() < 0.02:
            self.favourite = int(self.random.integers(8))
        stream = able[self.favourite % len(able)]
        kind, what, *rest = stream.queue.popleft()
        if kind == "op":
            self._run(what, *rest)
        elif kind == "record":
            what.happened, what.at = True, self.clock
        return True

    def _run(self, op: Op, memories, watched, number: int) -> None:
        for memory in memories:
            memory.pending -= 1
        if number == self.break_at:
            self.broken = CODES.cudaErrorIllegalAddress
        if self.broken is not None:
            return
        for address, size, content in watched:
            if self.view(address, size).tobytes() != content:
                self.problem(f"the host wrote into pinned memory before {op.name} was done with it")
        self.running = True  # a collection may free memory in the middle of it
        try:
            op.work()
            self.clock += op.seconds
        finally:
            self.running = False
        for pointer in self.postponed:
            self._release(pointer)
        self.postponed.clear()

    def drain(self, done=lambda: False) -> None:
        """Runs work until `done`, or until there is none."""
        self.polls = 0
        while not done() and self.broken is None and self.run_one():
            pass
        if self.broken is None and not done() and any(s.queue for s in self.streams.values()) and not self.running:
            raise AssertionError("deadlock: the host waits for what nothing will bring about")

    def wait(self, mark: Mark) -> None:
        """The host waits for a point in a stream's work."""
        self.drain(lambda: mark.happened)
        if self.broken is not None:
            raise CallError(self.broken)
        self.host_clock = join(self.host_clock, mark.clock)

    def _mark(self, stream: Stream) -> Mark:
        mark = Mark(dict(stream.clock))
        stream.queue.append(("record", mark))
        return mark

    # -- the runtime's functions --------------------------------------------------------------------------------------

    @call(1)
    def cudaGetDeviceCount(self):
        return OK, 1

    @call()
    def cudaSetDevice(self, device):
        return (OK if device == 0 else CODES.cudaErrorInvalidDevice,)

    @call(1)
    def cudaGetDeviceProperties(self, device):
        properties = real.cudaDeviceProp()
        properties.name = self.name.encode().ljust(256, b"\0")
        properties.major, properties.minor = self.capability
        return OK, properties

    @call(1, free=True)
    def cudaGetErrorString(self, error):
        return OK, error.name.encode()

    @call(free=True)
    def cudaGetLastError(self):
        last, self.last = self.broken or self.last, OK
        return (last,)

    @call(1, free=True)
    def cudaDriverGetVersion(self):
        return OK, 13000

    @call(1, free=True)
    def cudaRuntimeGetVersion(self):
        return OK, 13000

    @call(2)
    def cudaMemGetInfo(self):
        return OK, self.memory - self.used, self.memory

    @call(1, captures=False)
    def cudaMalloc(self, size):
        self.allocations += 1
        if self.used + size > self.memory or self.allocations == self.refuse_allocation:
            raise CallError(CODES.cudaErrorMemoryAllocation)
        memory = Memory(self.next, size)
        self.next += -(-size // ALIGNED) * ALIGNED + ALIGNED
        assert self.next < BASE + SIZE, "the arena is too small for this test"
        self.device.append(memory)
        self.used += size
        self.view(memory.start, size)[:] = GARBAGE
        return OK, memory.start

    @call(captures=False)
    def cudaFree(self, devPtr):
        if self.running:
            self.postponed.append(int(devPtr))
        else:
            self._release(int(devPtr))
        return (OK,)

    def _release(self, pointer: int) -> None:
        memory = self.find(pointer)
        if memory is None or memory.start != pointer or memory.freed:
            self.problem(f"cudaFree of {pointer:#x}, which is not allocated (any more)")
            raise CallError(CODES.cudaErrorInvalidValue)
        self.drain()  # as CUDA does: it waits for the device
        memory.freed = True
        self.used -= memory.size

    @call(1, captures=False)
    def cudaMallocHost(self, size):
        self.allocations += 1
        if self.allocations == self.refuse_allocation:
            raise CallError(CODES.cudaErrorMemoryAllocation)
        content = (ctypes.c_uint8 * size)()
        memory = Memory(ctypes.addressof(content), size, pinned=True, keep=content)
        self.host[memory.start] = memory
        self.view(memory.start, size)[:] = GARBAGE
        return OK, memory.start

    @call(captures=False)
    def cudaFreeHost(self, ptr):
        memory = self.host.get(int(ptr))
        if memory is None or memory.freed:
            self.problem("cudaFreeHost of what is not allocated (any more)")
            raise CallError(CODES.cudaErrorInvalidValue)
        if memory.pending and not self.failed:  # after an error the program may not have waited; freeing does wait
            self.problem("pinned memory is freed before the copies that use it are done")
        memory.freed = True
        return (OK,)

    @call(captures=False)
    def cudaMemset(self, devPtr, value, count):
        view = self.view(int(devPtr), count)
        self.enqueue(DEFAULT, Op("cudaMemset", [], [(devPtr, count)], lambda: view.fill(value)))
        return (OK,)

    @call()
    def cudaMemsetAsync(self, devPtr, value, count, stream):
        view = self.view(int(devPtr), count)
        self.enqueue(stream, Op("cudaMemsetAsync", [], [(devPtr, count)], lambda: view.fill(value)))
        return (OK,)

    @call()
    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        assert isinstance(kind, real.cudaMemcpyKind)
        if not count:
            return (OK,)
        dst, src = int(dst), int(src)
        name = "a copy"
        for address, way in ((dst, "to"), (src, "from")):
            on_device = BASE <= address < BASE + SIZE
            if not on_device and self.find(address) is None:
                self.problem(f"an asynchronous copy {way} pageable memory")
                raise CallError(CODES.cudaErrorInvalidValue)
            name = f"{name} {way} {'the device' if on_device else 'pinned memory'}"
        target, source = self.view(dst, count), self.view(src, count)
        self.enqueue(stream, Op(name, [(src, count)], [(dst, count)], lambda: np.copyto(target, source)))
        return (OK,)

    @call(1)
    def cudaStreamCreateWithFlags(self, flags):
        assert flags == real.cudaStreamNonBlocking, "the fake knows streams only that do not wait for the default one"
        stream = Stream(next(self.handles))
        self.streams[stream.handle] = stream
        return OK, real.cudaStream_t(stream.handle)

    @call(2)
    def cudaDeviceGetStreamPriorityRange(self):
        return OK, 0, -5

    @call(1)
    def cudaStreamCreateWithPriority(self, flags, priority):
        assert -5 <= priority <= 0, "CUDA clamps others"
        self.first.append(priority)
        stream = Stream(next(self.handles))
        self.streams[stream.handle] = stream
        return OK, real.cudaStream_t(stream.handle)

    @call()
    def cudaStreamDestroy(self, stream):
        self.stream(stream).destroyed = True
        return (OK,)

    @call(captures=False)
    def cudaStreamSynchronize(self, stream):
        self.wait(self._mark(self.stream(stream)))
        return (OK,)

    @call(captures=False)
    def cudaDeviceSynchronize(self):
        for stream in list(self.streams.values()):
            self.wait(self._mark(stream))
        return (OK,)

    @call()
    def cudaStreamWaitEvent(self, stream, event, flags):
        found, event = self.stream(stream), self._event(event)
        if self.capturing is not None:
            self.problem("a wait for what is outside of the capture")
            self.capturing.invalid = True
            raise CallError(CODES.cudaErrorStreamCaptureIsolation)
        if event.mark is not None:
            found.clock = join(found.clock, event.mark.clock)
            found.queue.append(("wait", event.mark))
        return (OK,)

    @call(1)
    def cudaEventCreateWithFlags(self, flags):
        handle = next(self.handles)
        self.events[handle] = Event(timed=not flags & real.cudaEventDisableTiming)
        return OK, real.cudaEvent_t(handle)

    def _event(self, handle) -> Event:
        if int(handle) not in self.events:
            self.problem("an event is used that was destroyed, or never made")
            raise CallError(CODES.cudaErrorInvalidResourceHandle)
        return self.events[int(handle)]

    @call()
    def cudaEventDestroy(self, event):
        self._event(event)
        del self.events[int(event)]
        return (OK,)

    @call()
    def cudaEventRecord(self, event, stream):
        event, stream = self._event(event), self.stream(stream)
        if self.capturing is not None:  # CUDA allows it, for forks; the fake knows none
            self.problem("an event is recorded during a capture")
            self.capturing.invalid = True
            raise CallError(CODES.cudaErrorStreamCaptureUnsupported)
        event.mark = self._mark(stream)
        return (OK,)

    @call(captures=False)
    def cudaEventQuery(self, event):
        event = self._event(event)
        self.polls += 1
        assert self.polls < POLLS, "the host asks for ever"
        for _ in range(0 if self.lazy and self.polls < 50 else self.random.integers(4)):
            self.run_one()
        if self.broken is not None:
            raise CallError(self.broken)
        if event.mark is not None and not event.mark.happened:
            return (CODES.cudaErrorNotReady,)
        if event.mark is not None:
            self.polls = 0
            self.host_clock = join(self.host_clock, event.mark.clock)
        return (OK,)

    @call(captures=False)
    def cudaEventSynchronize(self, event):
        event = self._event(event)
        if event.mark is not None:
            self.wait(event.mark)
        return (OK,)

    @call(1)
    def cudaEventElapsedTime(self, start, end):
        start, end = self._event(start), self._event(end)
        if None in (start.mark, end.mark) or not (start.timed and end.timed):
            raise CallError(CODES.cudaErrorInvalidResourceHandle)
        if not (start.mark.happened and end.mark.happened):
            raise CallError(CODES.cudaErrorNotReady)
        return OK, (end.mark.at - start.mark.at) * 1000

    @call(captures=False)
    def cudaStreamBeginCapture(self, stream, mode):
        assert isinstance(mode, real.cudaStreamCaptureMode)
        if int(stream) == DEFAULT:
            raise CallError(CODES.cudaErrorStreamCaptureUnsupported)
        self.capturing = Capture(self.stream(stream))
        return (OK,)

    @call(1)
    def cudaStreamEndCapture(self, stream):
        if self.capturing is None or self.capturing.stream is not self.stream(stream):
            raise CallError(CODES.cudaErrorIllegalState)
        capture, self.capturing = self.capturing, None
        if capture.invalid:
            raise CallError(CODES.cudaErrorStreamCaptureInvalidated)
        handle = next(self.handles)
        self.graphs[handle] = capture.ops
        return OK, real.cudaGraph_t(handle)

    @call(1)
    def cudaGraphInstantiate(self, graph, flags):
        handle = next(self.handles)
        self.executables[handle] = Executable(self.graphs[int(graph)])
        return OK, real.cudaGraphExec_t(handle)

    @call()
    def cudaGraphDestroy(self, graph):
        if self.graphs.pop(int(graph), None) is None:
            self.problem("a graph is destroyed twice")
        return (OK,)

    def _executable(self, handle) -> Executable:
        if int(handle) not in self.executables:
            self.problem("a graph is used that was destroyed")
            raise CallError(CODES.cudaErrorInvalidResourceHandle)
        return self.executables[int(handle)]

    @call()
    def cudaGraphExecDestroy(self, graphExec):
        self._executable(graphExec)
        del self.executables[int(graphExec)]
        return (OK,)

    @call(captures=False)
    def cudaGraphUpload(self, graphExec, stream):
        self.stream(stream)
        self._executable(graphExec).uploaded = True
        return (OK,)

    @call(captures=False)
    def cudaGraphLaunch(self, graphExec, stream):
        executable, stream = self._executable(graphExec), self.stream(stream)
        for op in executable.ops:
            self._put(stream, op)
        return (OK,)

    @call(1, captures=False)
    def cudaLibraryLoadData(
        self, code, jitOptions, jitOptionsValues, numJitOptions, libraryOptions, libraryOptionValues, numLibraryOptions
    ):
        assert code.endswith(b"\0") and any(f".entry {name}(".encode() in code for name in KERNELS)
        handle = next(self.handles)
        self.libraries[handle] = code
        return OK, real.cudaLibrary_t(handle)

    @call(1)
    def cudaLibraryGetKernel(self, library, name):
        if int(library) not in self.libraries or b".entry " + name + b"(" not in self.libraries[int(library)]:
            raise CallError(CODES.cudaErrorSymbolNotFound)
        handle = next(self.handles)
        self.kernels[handle] = name.decode()
        return OK, real.cudaKernel_t(handle)

    @call()
    def cudaLibraryUnload(self, library):
        if self.libraries.pop(int(library), None) is None:
            self.problem("a library of kernels is unloaded twice")
        return (OK,)


class FakeDriver:
    """The three names of `cuda.bindings.driver` that launching a kernel takes. It knows KERNELS."""

    CUkernel, CUstream, CUresult = real_driver.CUkernel, real_driver.CUstream, real_driver.CUresult

    def __init__(self, runtime: FakeRuntime) -> None:
        self.runtime = runtime

    def cuLaunchKernel(
        self, f, gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes, hStream, kernelParams,
        extra,
    ):  # fmt: skip
        assert isinstance(f, self.CUkernel) and isinstance(hStream, self.CUstream)
        values, types = kernelParams
        for value, kind in zip(values, types, strict=True):
            kind(value)  # as the bindings do: TypeError for what does not fit
        name = self.runtime.kernels[int(f)]
        op, numbers, count = getattr(self, name)(*values)
        threads = gridDimX * blockDimX * numbers
        assert threads >= count > threads - blockDimX * numbers and gridDimY == gridDimZ == blockDimY == blockDimZ == 1
        if self.runtime.broken is not None:
            return (self.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)
        try:
            self.runtime.enqueue(int(hStream), op)
        except CallError:
            return (self.CUresult.CUDA_ERROR_INVALID_HANDLE,)
        return (self.CUresult.CUDA_SUCCESS,)

    def floats(self, pointer: int, count: int) -> np.ndarray:
        return self.runtime.view(pointer, 4 * count).view(np.float32)

    def normal(self, pointer, seed, key, draw, count, scale) -> tuple[Op, int, int]:
        """The operation, how many numbers a thread makes, and of how many in all."""
        (name,) = [name for name in STREAMS if stream_key(name) == key]
        target = self.floats(pointer, count)

        def work() -> None:
            target[:] = normal(seed, name, draw, (count,)) * np.float32(scale)

        return Op("the noise kernel", [], [(pointer, 4 * count)], work), 4, count

    def blend(self, x, known, noise, mask, picture, rest, cells, count) -> tuple[Op, int, int]:
        """As `normal`."""
        assert count % cells == 0
        target, others = self.floats(x, count), [self.floats(pointer, count) for pointer in (known, noise)]
        share = self.floats(mask, cells) if mask else None
        reads = [(known, 4 * count), (noise, 4 * count)] + ([(mask, 4 * cells), (x, 4 * count)] if mask else [])

        def work() -> None:
            kept = np.float32(picture) * others[0] + np.float32(rest) * others[1]
            m = None if share is None else np.tile(share, count // cells)
            target[:] = kept if m is None else m * target + (1 - m) * kept

        return Op("the blend kernel", reads, [(x, 4 * count)], work), 1, count


class FakeDeviceEngine:
    """An engine without TensorRT for a fixed number of rows, computed by ONNX Runtime on the CPU when its turn comes.

    engine: called with arrays by name. bucket: None for any number of rows. spoil: function(inputs, results).
    seconds: what a run takes by the fake GPU's clock.
    """

    own_graph = False

    def __init__(self, gpu: FakeRuntime, engine, bucket: int | None, spoil=None, seconds: float = 1e-6) -> None:
        self.gpu, self.engine, self.spec, self.bucket = gpu, engine, engine.spec, bucket
        self.spoil, self.seconds, self.enqueued = spoil, seconds, 0

    def bind(self, inputs, outputs):
        check_feeds(self.spec, inputs)
        assert self.bucket is None or all(len(array) == self.bucket for array in (*inputs.values(), *outputs.values()))
        self.inputs, self.outputs = dict(inputs), dict(outputs)

    def enqueue(self, stream):
        self.enqueued += 1
        views = [  # a later bind is for later runs
            {
                name: self.gpu.view(array.pointer, array.nbytes).view(array.dtype).reshape(array.shape)
                for name, array in arrays.items()
            }
            for arrays in (self.inputs, self.outputs)
        ]
        ranges = [[(a.pointer, a.nbytes) for a in arrays.values()] for arrays in (self.inputs, self.outputs)]

        def work() -> None:
            feeds = {name: value.copy() for name, value in views[0].items()}
            results = self.engine(feeds)
            if self.spoil is not None:
                self.spoil(feeds, results)
            for name, value in results.items():
                views[1][name][...] = value

        self.gpu.enqueue(stream.handle, Op(f"the engine of {self.spec.file}", *ranges, work, self.seconds))

    def capturable(self, stream):
        return True


def fake_cuda(capability: str = "8.9", memory: int = SIZE) -> product.Cuda:
    """The real `Cuda` over a fake GPU of its own, which is its `api`. It knows no kernels: those want `install`."""
    with pytest.MonkeyPatch.context() as patch:
        FakeRuntime(capability=tuple(map(int, capability.split("."))), memory=memory).install(patch)
        return product.Cuda()


def join(one: dict[int, int], other: dict[int, int]) -> dict[int, int]:
    """The later of two clocks, stream by stream."""
    joined = dict(one)
    for stream, time in other.items():
        if time > joined.get(stream, 0):
            joined[stream] = time
    return joined


def functions(fake=FakeRuntime) -> dict[str, SimpleNamespace]:
    """Name -> (parameters, values returned beside the error) of what the fake has."""
    out = {}
    for name, function in vars(fake).items():
        if name.startswith("cuda"):
            names = [p for p in inspect.signature(function.__wrapped__).parameters if p != "self"]
            out[name] = SimpleNamespace(parameters=names, results=function.results)
    return out
