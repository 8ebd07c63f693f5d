"""Tests of the test: the fake GPU has the installed packages' names, and finds every fault that is planted."""

from __future__ import annotations

import gc
import inspect
import re

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.runtime")

from cuda.bindings import driver as real_driver
from cuda.bindings import runtime as real
from fake_runtime import FakeDriver, FakeRuntime, functions
from handiffuser.engines.cuda import Cuda
from handiffuser.errors import EngineError
from handiffuser.runtime.device_graphs import Staging

CODES = real.cudaError_t


@pytest.fixture
def gpu(monkeypatch):
    return FakeRuntime(lazy=True).install(monkeypatch)


@pytest.mark.parametrize("name", sorted(functions()))
def test_functions_are_those_of_the_installed_package(name):
    theirs, ours = getattr(real, name), functions()[name]
    assert ours.parameters == list(inspect.signature(theirs).parameters)
    returned = theirs.__doc__.split("Returns\n-------\n", 1)[1].split("\n\n")[0]
    values = re.findall(r"^[\w.]+(?: : .*)?$", returned, re.M)
    assert len(values) - 1 == ours.results, returned


def test_the_driver_is_that_of_the_installed_package():
    ours, theirs = (inspect.signature(cls.cuLaunchKernel) for cls in (FakeDriver, real_driver))
    assert [p for p in ours.parameters if p != "self"] == list(theirs.parameters)


def test_nothing_but_the_package_s_own_names(gpu):
    assert gpu.cudaError_t is real.cudaError_t and gpu.cudaEventDisableTiming == real.cudaEventDisableTiming
    with pytest.raises(AttributeError):
        gpu.cudaMallocEverything  # noqa: B018
    with pytest.raises(NotImplementedError):
        gpu.cudaMallocManaged  # noqa: B018
    with pytest.raises(TypeError):
        gpu.cudaMalloc(1, 2)


def arrays(cuda, count=2):
    return [cuda.zeros((4, 8), "float32") for _ in range(count)]


def test_what_is_ordered_is_no_problem(gpu):
    """By the stream, by an event, by the host that waited for one, by reading alone, and side by side."""
    cuda = Cuda()
    one, other = cuda.stream(), cuda.stream()
    a, b = arrays(cuda)
    pinned = cuda.pinned((4, 8), "float32")
    pinned[...] = 3
    one.copy(a, pinned)
    other.wait(one.record())
    other.copy(b, a)
    one.copy(cuda.zeros((4, 8), "float32"), a)
    other.synchronize()
    one.copy(b, a)
    one.zero(a[0])
    one.synchronize()
    other.zero(a[1])
    one.zero(a[0])
    other.synchronize()
    one.synchronize()
    pinned[...] = 4
    assert (gpu.value(b) == 3).all() and not gpu.value(a)[:2].any()
    assert not gpu.problems


def test_a_missing_wait(gpu):
    cuda = Cuda()
    one, other = cuda.stream(), cuda.stream()
    a, b = arrays(cuda)
    one.zero(a[1:3])
    other.copy(b[0], a[0])
    assert not gpu.problems, "other rows"
    other.copy(b[2], a[2])
    assert gpu.problems[0].startswith("race: a copy to the device from the device and the earlier cudaMemsetAsync")


def test_a_wait_for_what_was_recorded_too_early(gpu):
    cuda = Cuda()
    one, other = cuda.stream(), cuda.stream()
    a, b = arrays(cuda)
    event = one.record()
    one.zero(a)
    other.wait(event)
    other.copy(b, a)
    assert "race" in gpu.problems[0]


def test_a_write_under_a_reader(gpu):
    cuda = Cuda()
    one, other = cuda.stream(), cuda.stream()
    a, b = arrays(cuda)
    one.copy(b, a)
    other.zero(a)
    assert "race: cudaMemsetAsync, which writes, and the earlier a copy" in gpu.problems[0]


def test_the_default_stream_is_not_waited_for(gpu):
    cuda = Cuda()
    (a,) = arrays(cuda, 1)
    gpu.cudaMemset(a.pointer, 0, a.nbytes)
    cuda.stream().zero(a)
    assert "race" in gpu.problems[0]


@pytest.mark.parametrize("view", [False, True])
def test_freed_memory(gpu, view):
    cuda = Cuda()
    stream, (a,) = cuda.stream(), arrays(cuda, 1)
    pointer = a.pointer
    a.close()
    gpu.cudaMemsetAsync(pointer + 32 * view, 0, 32, stream.handle)
    assert gpu.problems == ["cudaMemsetAsync touches memory that was freed"]
    with pytest.raises(EngineError, match="IllegalAddress"):
        stream.synchronize()


def test_a_stale_address_in_a_graph(gpu):
    cuda = Cuda()
    stream, (a, b) = cuda.stream(), arrays(cuda)
    graph = stream.capture(lambda: stream.copy(b, a))
    graph.launch(stream)
    stream.synchronize()
    assert not gpu.problems
    a.close()
    graph.launch(stream)
    assert gpu.problems == ["a copy to the device from the device touches memory that was freed"]


def test_a_range_that_leaves_its_allocation(gpu):
    cuda = Cuda()
    stream, (a, _) = cuda.stream(), arrays(cuda)
    gpu.cudaMemsetAsync(a.pointer + 64, 0, a.nbytes, stream.handle)
    assert gpu.problems == ["cudaMemsetAsync touches 64 bytes behind its allocation"]


def test_an_address_that_is_none(gpu):
    stream = Cuda().stream()
    gpu.cudaMemsetAsync(0x7_0000_1000_0000, 0, 4, stream.handle)
    assert "never allocated" in gpu.problems[0]


def test_memory_that_nobody_wrote(gpu):
    cuda = Cuda()
    stream, (a,) = cuda.stream(), arrays(cuda, 1)
    pointer = gpu.cudaMalloc(a.nbytes)[1]
    device_to_device = real.cudaMemcpyKind.cudaMemcpyDefault
    gpu.cudaMemsetAsync(pointer, 0, 32, stream.handle)
    gpu.cudaMemcpyAsync(a.pointer, pointer, 32, device_to_device, stream.handle)
    assert not gpu.problems
    gpu.cudaMemcpyAsync(a.pointer, pointer, 33, device_to_device, stream.handle)
    assert gpu.problems == ["a copy to the device from the device reads memory that was never written"]


@pytest.mark.parametrize("to_device", [True, False])
def test_a_copy_of_pageable_memory(gpu, to_device):
    cuda = Cuda()
    stream, (a,) = cuda.stream(), arrays(cuda, 1)
    pageable = np.zeros((4, 8), np.float32)
    with pytest.raises(EngineError):
        stream.copy(*((a, pageable) if to_device else (pageable, a)))
    assert gpu.problems == [f"an asynchronous copy {'from' if to_device else 'to'} pageable memory"]


def test_pinned_memory_that_is_written_too_early(gpu):
    cuda = Cuda()
    stream, (a,), pinned = cuda.stream(), arrays(cuda, 1), cuda.pinned((4, 8), "float32")
    stream.copy(a, pinned)
    pinned[...] = 1
    stream.synchronize()
    assert gpu.problems[0].startswith("the host wrote into pinned memory before a copy to the device")


def test_pinned_memory_that_is_read_too_early(gpu):
    cuda = Cuda()
    stream, (a,), pinned = cuda.stream(), arrays(cuda, 1), cuda.pinned((4, 8), "float32")
    pinned[...] = 0
    stream.copy(pinned, a)
    assert np.isnan(pinned).all(), "nothing to be relied on"
    stream.synchronize()
    assert not pinned.any() and not gpu.problems


def test_pinned_memory_that_is_freed_too_early(gpu):
    cuda = Cuda()
    stream, (a,) = cuda.stream(), arrays(cuda, 1)
    stream.copy(a, cuda.pinned((4, 8), "float32"))
    gc.collect()
    assert gpu.problems == ["pinned memory is freed before the copies that use it are done"]


def test_staging_keeps_a_buffer_until_its_copy_is_done(gpu):
    cuda = Cuda()
    stream, staging = cuda.stream(), Staging(cuda)
    target = cuda.zeros((10, 4), "float32")
    for i in range(10):
        staging.upload(stream, target[i], np.full(4, i, np.float32))
    stream.synchronize()
    np.testing.assert_array_equal(gpu.value(target), np.arange(10)[:, None].repeat(4, 1))
    assert not gpu.problems


# What no capture bears: what is reported, and what does it.
SPOILERS = {
    "cudaMalloc": lambda cuda, **_: cuda.zeros((4,), "float32"),
    "cudaFree": lambda array, **_: array.close(),
    "cudaMallocHost": lambda cuda, **_: cuda.pinned((4,), "float32"),
    "cudaStreamSynchronize": lambda stream, **_: stream.cuda.call("cudaStreamSynchronize", stream.handle),
    "cudaEventQuery": lambda event, **_: event.done(),
    "cudaEventSynchronize": lambda event, **_: event.synchronize(),
    "a wait": lambda stream, event, **_: stream.wait(event),
    "on another stream": lambda other, array, **_: other.zero(array),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_what_a_capture_does_not_bear(gpu, name):
    cuda = Cuda()
    stream, other = cuda.stream(), cuda.stream()
    event, target = other.record(), cuda.zeros((4,), "float32")
    given = {"cuda": cuda, "stream": stream, "other": other, "event": event, "array": cuda.zeros((4,), "float32")}

    def work():
        stream.zero(target)
        SPOILERS[name](**given)

    assert stream.capture(work) is None
    assert name in gpu.problems[0] and gpu.capturing is None
    graph = stream.capture(lambda: stream.zero(target))
    graph.launch(stream)
    stream.synchronize()
    assert not gpu.value(target).any()


def test_a_graph_runs_what_was_captured_where_it_was_captured(gpu):
    cuda = Cuda()
    stream, (a, b) = cuda.stream(), arrays(cuda)
    pinned = cuda.pinned((4, 8), "float32")
    pinned[...] = 5
    stream.copy(a, pinned)
    graph = stream.capture(lambda: stream.copy(b, a))
    assert not gpu.value(b).any(), "a capture runs nothing"
    graph.launch(stream)
    assert (gpu.value(b) == 5).all() and not gpu.problems


def test_a_graph_races_as_its_operations_do(gpu):
    cuda = Cuda()
    stream, other, (a, b) = cuda.stream(), cuda.stream(), arrays(cuda)
    graph = stream.capture(lambda: stream.copy(b, a))
    graph.launch(stream)
    other.zero(b)
    assert "race" in gpu.problems[0]


def test_use_after_close(gpu):
    cuda = Cuda()
    stream, (a,) = cuda.stream(), arrays(cuda, 1)
    event = stream.record()
    stream.close()
    event.close()
    for use in (lambda: stream.zero(a), event.done):
        with pytest.raises(EngineError):
            use()
    assert len(gpu.problems) == 2


def test_freeing_twice(gpu):
    (a,) = arrays(Cuda(), 1)
    gpu.cudaFree(a.pointer)
    gpu.cudaFree(a.pointer)
    assert "not allocated (any more)" in gpu.problems[0]


def test_a_broken_context_stays_broken(gpu):
    cuda = Cuda()
    stream, (a,) = cuda.stream(), arrays(cuda, 1)
    gpu.break_at = gpu.operations + 1
    stream.zero(a)
    for attempt in (stream.synchronize, stream.record, lambda: cuda.zeros((1,), "uint8"), Cuda):
        with pytest.raises(EngineError, match="IllegalAddress"):
            attempt()


def test_memory_has_an_end(gpu):
    cuda = Cuda()
    gpu.memory = gpu.used + 1000
    kept = cuda.zeros((900,), "uint8")
    with pytest.raises(EngineError, match="lacks free memory"):
        cuda.zeros((101,), "uint8")
    kept.close()
    cuda.zeros((1000,), "uint8")


def test_a_host_that_asks_for_ever_is_found(gpu):
    cuda = Cuda()
    one = cuda.stream()
    event = one.record()
    gpu.streams[int(one.handle)].queue.clear()  # nothing will bring it about
    with pytest.raises(AssertionError, match="for ever"):
        while not event.done():
            pass
