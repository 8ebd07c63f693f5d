"""The CUDA calls themselves, over a driver that only counts: captures always end, and what was made is freed once."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
from handiffuser.engines import cuda as module
from handiffuser.engines.cuda import Cuda
from handiffuser.errors import EngineError

runtime = pytest.importorskip("cuda.bindings.runtime")
SUCCESS, CODES = runtime.cudaError_t.cudaSuccess, runtime.cudaError_t


class Driver:
    """Answers every call with success and a new handle. `calls` are its names; `answers` those that say otherwise."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.answers: dict[str, tuple] = {
            "cudaGetDeviceCount": (SUCCESS, 1),
            "cudaGetErrorString": (SUCCESS, b"something is wrong"),
        }
        self.freed: Counter = Counter()

    def __getattr__(self, name: str):
        real = getattr(runtime, name)
        if isinstance(real, (int, type)):
            return real  # codes and flags

        def call(*arguments):
            self.calls.append(name)
            if name in ("cudaFree", "cudaStreamDestroy", "cudaEventDestroy", "cudaGraphExecDestroy"):
                self.freed[name, int(arguments[0])] += 1
            if name == "cudaGetDeviceProperties":
                properties = runtime.cudaDeviceProp()
                properties.name, properties.major, properties.minor = b"Counting GPU".ljust(256, b"\0"), 8, 9
                return SUCCESS, properties
            return self.answers.get(name, (SUCCESS, 1000 + len(self.calls)))

        return call


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(module, "_bindings", lambda: driver)
    return driver


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, ZeroDivisionError, EngineError, None])
def test_a_capture_always_ends_and_nothing_is_collected_meanwhile(driver, trouble):
    stream, collecting = Cuda().stream(), []

    def work():
        collecting.append(gc.isenabled())
        if trouble is not None:
            raise trouble()

    if trouble in (EngineError, None):
        assert (stream.capture(work) is None) == (trouble is EngineError)
    else:
        with pytest.raises(trouble):
            stream.capture(work)
    assert driver.calls.count("cudaStreamEndCapture") == 1
    assert collecting == [False] and gc.isenabled()
    assert driver.calls.count("cudaGraphUpload") == (trouble is None)
    assert driver.calls.count("cudaGraphDestroy") == 1
    assert driver.calls.count("cudaGraphInstantiate") == (trouble is None)


def interrupt():
    raise KeyboardInterrupt


def test_a_refused_capture_leaves_no_error_behind(driver):
    stream = Cuda().stream()
    driver.answers["cudaStreamEndCapture"] = (CODES.cudaErrorStreamCaptureInvalidated, None)
    assert stream.capture(lambda: None) is None
    assert driver.calls[-1] == "cudaGetLastError"
    with pytest.raises(KeyboardInterrupt):
        stream.capture(interrupt)
    assert driver.calls[-1] == "cudaGetLastError" and "cudaGraphDestroy" not in driver.calls


def test_close_frees_everything_once(driver):
    cuda = Cuda()
    stream, array = cuda.stream(), cuda.zeros((4, 3), "float32")
    view, event, graph = array[1:3], stream.record(), stream.capture(lambda: None)
    pinned = cuda.pinned((2,), "float32")
    cuda.close()
    cuda.close()
    assert driver.calls.count("cudaDeviceSynchronize") == 1
    assert Counter(name for name, _ in driver.freed) == {
        "cudaFree": 1, "cudaStreamDestroy": 1, "cudaEventDestroy": 1, "cudaGraphExecDestroy": 1
    }  # fmt: skip
    assert array.pointer == 0 and "cudaFreeHost" not in driver.calls
    del cuda, stream, array, view, event, graph, pinned
    gc.collect()
    assert set(driver.freed.values()) == {1} and driver.calls.count("cudaFreeHost") == 1


def test_events_sleep_and_are_used_again(driver):
    """A loop that records for hours makes a few events, and a host that waits leaves the core to others."""
    cuda, flags = Cuda(), []
    create = driver.cudaEventCreateWithFlags
    driver.cudaEventCreateWithFlags = lambda flag: flags.append(flag) or create(flag)
    stream = cuda.stream()
    for timed in (True, False) * 3:
        kept = [stream.record(timed) for _ in range(4)]
        del kept
    assert driver.calls.count("cudaEventCreateWithFlags") == 8 and driver.calls.count("cudaEventRecord") == 24
    assert all(flag & runtime.cudaEventBlockingSync for flag in flags) and not driver.freed
    assert {bool(flag & runtime.cudaEventDisableTiming) for flag in flags} == {True, False}
    cuda.close()
    assert sum(count for (name, _), count in driver.freed.items() if name == "cudaEventDestroy") == 8
    assert set(driver.freed.values()) == {1}


def test_an_array_can_be_closed_alone(driver):
    cuda = Cuda()
    array = cuda.zeros((4,), "float32")
    array.close()
    array[1:2].close()
    cuda.close()
    assert list(driver.freed.values()) == [1]


@pytest.mark.parametrize(
    ("code", "driver_version", "words"),
    [
        (CODES.cudaErrorInsufficientDriver, 0, "the NVIDIA driver is missing"),
        (
            CODES.cudaErrorInsufficientDriver,
            12040,
            r"supports CUDA 12\.4.*13\.0 or newer \(driver 580.*cuda-bindings<13",
        ),
        (CODES.cudaErrorNoDevice, 13000, "CUDA_VISIBLE_DEVICES"),
        (SUCCESS, 13000, "CUDA_VISIBLE_DEVICES"),
        (CODES.cudaErrorUnknown, 13000, "something is wrong"),
    ],
)
def test_without_a_usable_gpu_the_sentence_says_what_is_missing(driver, code, driver_version, words):
    driver.answers |= {
        "cudaGetDeviceCount": (code, None if code != SUCCESS else 0),
        "cudaDriverGetVersion": (SUCCESS, driver_version),
        "cudaRuntimeGetVersion": (SUCCESS, 13050),
    }
    with pytest.raises(EngineError, match=words):
        Cuda()
