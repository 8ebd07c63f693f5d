"""The few CUDA calls that running engines takes, without torch: arrays, streams, events, copies, captured graphs.

    cuda = Cuda()
    stream = cuda.stream()
    on_device, pinned = cuda.zeros((8, 4, 64, 64), "float32"), cuda.pinned((8, 4, 64, 64), "float32")
    stream.copy(on_device, pinned)              # returns at once
    graph = stream.capture(lambda: stream.copy(on_device, other))
    graph.launch(stream)
    stream.record().synchronize()

Everything but `synchronize` is asynchronous. Streams do not wait for the default stream, so only the order within a
stream and `Stream.wait` decide what comes first. `cuda-bindings` makes the calls of the CUDA runtime.

Each object is freed when it is no longer used, or earlier by its `close`, or with all others by `Cuda.close`.
"""

from __future__ import annotations

import ctypes
import gc
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..commands import imported
from ..errors import EngineError

# The oldest Linux drivers for a CUDA version (CUDA release notes, table of minor version compatibility).
DRIVERS = {12: "driver 525 or newer", 13: "driver 580 or newer"}


class Cuda:
    """One GPU. Raises EngineError without a usable GPU, or without the package to reach it."""

    def __init__(self, device: int = 0) -> None:
        self.api = _bindings()
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()  # objects that `close` frees
        self.events: dict[bool, list[Any]] = {True: [], False: []}  # timed, or not: handles to be used again
        weakref.finalize(self, _destroy_events, self.api, self.events)
        error, count = self.api.cudaGetDeviceCount()
        if error != self.api.cudaError_t.cudaSuccess or not count:
            raise EngineError(
                f"No NVIDIA GPU can be used here: {self._why_none(error)} "
                "`--backend onnxruntime --device cpu` runs without one."
            )
        self.call("cudaSetDevice", device)
        self.device = device
        properties = self.call("cudaGetDeviceProperties", device)
        self.name = bytes(properties.name).split(b"\0")[0].decode()
        self.compute_capability = f"{properties.major}.{properties.minor}"

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls the CUDA runtime; returns its value, if any. Raises EngineError when it fails."""
        error, *values = getattr(self.api, name)(*arguments)
        if error != self.api.cudaError_t.cudaSuccess:
            if error == self.api.cudaError_t.cudaErrorMemoryAllocation:
                raise EngineError(
                    "The GPU lacks free memory. Take a smaller --batch-size, or end other programs on it."
                )
            raise EngineError(f"CUDA failed in {name}: {self._text(error)}.")
        return values[0] if len(values) == 1 else tuple(values)

    def close(self) -> None:
        """Waits for the device, then frees all arrays, streams, events and graphs that were made here.

        Do not use them afterwards. Pinned arrays are freed with their last view. A second call does nothing.
        """
        if not self._made:
            return
        self.api.cudaDeviceSynchronize()  # frees memory even after an earlier failure
        for one in list(self._made):
            one.close()
        self._made.clear()
        _destroy_events(self.api, self.events)

    def keep(self, one: Any, free: Callable[[Any], Any], handle: Any) -> Callable[[], Any]:
        """Arranges for one call of `free(handle)`: by the function returned, by `close`, or when `one` is unused."""
        self._made.add(one)
        return weakref.finalize(one, free, handle)

    def _text(self, error: Any) -> str:
        text = self.api.cudaGetErrorString(error)[1]
        return text.decode() if isinstance(text, bytes) else str(text)

    def _why_none(self, error: Any) -> str:
        """Why no GPU is usable, in one sentence with its remedy."""
        codes = self.api.cudaError_t
        driver, needed = self.api.cudaDriverGetVersion()[1] or 0, self.api.cudaRuntimeGetVersion()[1] or 0
        if error == codes.cudaErrorInsufficientDriver and not driver:
            return "the NVIDIA driver is missing. Check that `nvidia-smi` lists a GPU."
        if error == codes.cudaErrorInsufficientDriver:
            return (
                f"its driver supports CUDA {_version(driver)}, and cuda-bindings needs {needed // 1000}.0 or newer "
                f"({DRIVERS.get(needed // 1000, 'a newer driver')}). Update the driver, or "
                f'`pip install "cuda-bindings<{needed // 1000}"`.'
            )
        if error in (codes.cudaSuccess, codes.cudaErrorNoDevice):
            return "the driver sees none. Check `nvidia-smi`, and that CUDA_VISIBLE_DEVICES does not hide it."
        return f"{self._text(error)}. Check that `nvidia-smi` lists one."

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """A new array of zeros on the device: rows that no request uses must hold harmless numbers."""
        array = DeviceArray(0, shape, dtype)
        pointer = self.call("cudaMalloc", max(array.nbytes, 1))
        array.pointer = int(pointer)
        array.free = self.keep(array, self.api.cudaFree, pointer)
        self.call("cudaMemset", pointer, 0, array.nbytes)
        self.call("cudaStreamSynchronize", 0)  # our streams do not wait for the default stream, which sets the zeros
        return array

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array in page-locked host memory, which asynchronous copies need."""
        count = math.prod(shape)
        size = max(count * itemsize(dtype), 1)
        pointer = self.call("cudaMallocHost", size)
        memory: Any = (ctypes.c_uint8 * size).from_address(int(pointer))
        weakref.finalize(memory, self.api.cudaFreeHost, pointer)  # arrays keep `memory` alive as their base
        return np.frombuffer(memory, dtype, count).reshape(shape)

    def stream(self, first: bool = False) -> Stream:
        """A new stream. first: its kernels go before those of other streams that wait for the same processors."""
        return Stream(self, first)

    def kernel(self, code: bytes, name: str, types: Sequence[Any]) -> Kernel:
        """A kernel of our own from PTX, which the driver compiles for this GPU. types: of its arguments, in ctypes."""
        return Kernel(self, code, name, types)

    def free_memory(self) -> int:
        """Free bytes on the device."""
        return int(self.call("cudaMemGetInfo")[0])

    def memory(self) -> int:
        """Bytes of the device, free or not."""
        return int(self.call("cudaMemGetInfo")[1])


class Kernel:
    """A function on the device: launched on a stream, it returns at once."""

    def __init__(self, cuda: Cuda, code: bytes, name: str, types: Sequence[Any]) -> None:
        self.cuda, self.types = cuda, tuple(types)
        self.driver = _driver()
        library = cuda.call("cudaLibraryLoadData", code + b"\0", [], [], 0, [], [], 0)
        self.close = cuda.keep(self, cuda.api.cudaLibraryUnload, library)
        kernel = cuda.call("cudaLibraryGetKernel", library, name.encode())
        self.handle = self.driver.CUkernel(int(kernel))  # the same kernel for the driver

    def launch(self, stream: Stream, blocks: int, threads: int, *arguments: Any) -> None:
        """Runs it in blocks x threads; arguments: numbers, and pointers of device arrays."""
        grid, queue = (blocks, 1, 1, threads, 1, 1, 0), self.driver.CUstream(int(stream.handle))
        (error,) = self.driver.cuLaunchKernel(self.handle, *grid, queue, (arguments, self.types), 0)
        if error != self.driver.CUresult.CUDA_SUCCESS:
            raise EngineError(f"CUDA failed to launch a kernel: {error.name}.")


class DeviceArray:
    """Memory on the device with a `shape` and a `dtype`. Indexing with an int or a slice gives a view of rows.

    dtype: a name as in the contract, because numpy has no bfloat16.
    """

    def __init__(self, pointer: int, shape: tuple[int, ...], dtype: Any, owner: DeviceArray | None = None) -> None:
        self.pointer, self.shape, self.dtype = pointer, tuple(shape), dtype_name(dtype)
        self.owner = owner  # keeps the memory alive
        self.free: Callable[[], Any] | None = None  # of an array that owns its memory

    def close(self) -> None:
        """Frees the memory, of a view's owner too; do not use it afterwards. A second call does nothing."""
        array = self.owner or self
        if array.free is not None:
            array.free()
        self.pointer = array.pointer = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """How PyTorch, CuPy and Numba see the same memory; they get bfloat16 as int16, as the protocol lacks it."""
        typestr = "<i2" if self.dtype == "bfloat16" else np.dtype(self.dtype).str
        return {"shape": self.shape, "typestr": typestr, "data": (self.pointer, False), "version": 3}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice) -> DeviceArray:
        start, stop, step = (rows, rows + 1, 1) if isinstance(rows, int) else rows.indices(len(self))
        if step != 1 or not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {rows} of {len(self)}")
        shape = self.shape[1:] if isinstance(rows, int) else (stop - start, *self.shape[1:])
        offset = start * math.prod(self.shape[1:]) * itemsize(self.dtype)
        return DeviceArray(self.pointer + offset, shape, self.dtype, self.owner or self)


class Stream:
    """A queue of work on the device."""

    def __init__(self, cuda: Cuda, first: bool = False) -> None:
        self.cuda = cuda
        if first:
            _, greatest = cuda.call("cudaDeviceGetStreamPriorityRange")
            self.handle = cuda.call("cudaStreamCreateWithPriority", cuda.api.cudaStreamNonBlocking, greatest)
        else:
            self.handle = cuda.call("cudaStreamCreateWithFlags", cuda.api.cudaStreamNonBlocking)
        self.close = cuda.keep(self, cuda.api.cudaStreamDestroy, self.handle)

    def copy(self, target: DeviceArray | np.ndarray, source: DeviceArray | np.ndarray) -> None:
        """Copies between device arrays and pinned arrays of equal size. Host arrays must live until it is done."""
        if target.nbytes != source.nbytes or dtype_name(target.dtype) != dtype_name(source.dtype):
            raise EngineError(
                f"Both sides of a copy must be of equal size, got {source.dtype}{list(source.shape)} and "
                f"{target.dtype}{list(target.shape)}."
            )
        kind = self.cuda.api.cudaMemcpyKind.cudaMemcpyDefault
        self.cuda.call("cudaMemcpyAsync", _address(target), _address(source), source.nbytes, kind, self.handle)

    def zero(self, target: DeviceArray) -> None:
        self.cuda.call("cudaMemsetAsync", target.pointer, 0, target.nbytes, self.handle)

    def record(self, timed: bool = False) -> Event:
        """An event that happens when all work so far is done. timed: it also notes the time."""
        return Event(self, timed)

    def wait(self, event: Event) -> None:
        """Work from here on starts after the event; the host does not wait."""
        self.cuda.call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        """Waits, asleep, until all work so far is done."""
        self.record().synchronize()

    def capture(self, function: Callable[[], None]) -> Graph | None:
        """Records what `function` enqueues on this stream, without running it. None where CUDA refuses to record it.

        The stream leaves the capture whatever `function` raises. EngineError counts as the refusal; other exceptions
        (Ctrl-C) pass on. The stream uploads the graph to the device.
        """
        cuda = self.cuda
        mode = cuda.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        # A garbage collection could free device memory, which breaks a capture.
        collects, captured = gc.isenabled(), None
        gc.disable()
        try:
            cuda.call("cudaStreamBeginCapture", self.handle, mode)
            try:
                function()
            finally:
                error, captured = cuda.api.cudaStreamEndCapture(self.handle)
                if error != cuda.api.cudaError_t.cudaSuccess:
                    captured = None
                    cuda.api.cudaGetLastError()  # clears the error, which the next call would return
            if captured is None:
                return None
            graph = Graph(cuda, captured)
            graph.upload(self)
            return graph
        except EngineError:
            cuda.api.cudaGetLastError()
            return None
        finally:
            if captured is not None:
                cuda.api.cudaGraphDestroy(captured)
            if collects:
                gc.enable()


class Event:
    """A point in a stream's work.

    When nothing refers to it, its handle serves another event: a step records several. Streams that wait for this one
    keep waiting for its point.
    """

    def __init__(self, stream: Stream, timed: bool = False) -> None:
        self.cuda, unused = stream.cuda, stream.cuda.events[timed]
        if unused:
            self.handle = unused.pop()
        else:
            # Who waits sleeps, which leaves the core to the encoding of pictures. A sleeper wakes some 50 us later than
            # one that spins, which is little beside a step.
            api = self.cuda.api
            flags = api.cudaEventBlockingSync | (0 if timed else api.cudaEventDisableTiming)
            self.handle = self.cuda.call("cudaEventCreateWithFlags", flags)
        self._give_back = self.cuda.keep(self, unused.append, self.handle)
        self.cuda.call("cudaEventRecord", self.handle, stream.handle)

    def close(self) -> None:
        """Gives the handle back; do not use the event afterwards. A second call does nothing."""
        self._give_back()
        self.handle = 0

    def done(self) -> bool:
        """Whether it happened, without waiting."""
        (error,) = self.cuda.api.cudaEventQuery(self.handle)
        if error == self.cuda.api.cudaError_t.cudaErrorNotReady:
            return False
        if error != self.cuda.api.cudaError_t.cudaSuccess:
            raise EngineError(f"CUDA failed while it ran: {self.cuda._text(error)}.")
        return True

    def synchronize(self) -> None:
        self.cuda.call("cudaEventSynchronize", self.handle)

    def seconds_since(self, earlier: Event) -> float:
        """Seconds between two timed events that happened."""
        return float(self.cuda.call("cudaEventElapsedTime", earlier.handle, self.handle)) / 1000


class Graph:
    """Captured work: one call launches it all."""

    def __init__(self, cuda: Cuda, graph: Any) -> None:
        """graph: the result of a capture; the caller destroys it."""
        self.cuda = cuda
        self.handle = cuda.call("cudaGraphInstantiate", graph, 0)
        self.close = cuda.keep(self, cuda.api.cudaGraphExecDestroy, self.handle)

    def upload(self, stream: Stream) -> None:
        """Puts the graph on the device before its first launch."""
        self.cuda.call("cudaGraphUpload", self.handle, stream.handle)

    def launch(self, stream: Stream) -> None:
        self.cuda.call("cudaGraphLaunch", self.handle, stream.handle)


def _destroy_events(api: Any, events: dict[bool, list[Any]]) -> None:
    for handles in events.values():
        while handles:
            api.cudaEventDestroy(handles.pop())


def dtype_name(dtype: Any) -> str:
    """The contract's name of a dtype: numpy's own, or "bfloat16"."""
    return "bfloat16" if str(dtype) == "bfloat16" else np.dtype(dtype).name


def itemsize(dtype: Any) -> int:
    """Bytes of one element."""
    return 2 if dtype_name(dtype) == "bfloat16" else np.dtype(dtype).itemsize


def _version(number: int) -> str:
    """12040 -> "12.4", as CUDA counts."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _address(array: DeviceArray | np.ndarray) -> int:
    if isinstance(array, DeviceArray):
        return array.pointer
    if not array.flags.c_contiguous:
        raise EngineError("Host arrays must be contiguous to be copied to or from the device.")
    return array.ctypes.data


def _bindings() -> Any:
    return _import("runtime")


def _driver() -> Any:
    return _import("driver")


def _import(name: str) -> Any:
    try:
        return imported(f"cuda.bindings.{name}")
    except ImportError as error:
        raise EngineError(
            f'The CUDA bindings cannot be imported ({error}). Install them: `pip install "cuda-bindings>=12.8"`.'
        ) from error
