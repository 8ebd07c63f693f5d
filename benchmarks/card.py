"""Describes the machine: processor, GPU, versions, and its measured ceilings.

    from handiffuser.benchmarks.card import card
    card(threads=1, device="cpu")

A ceiling is the best measured rate of this machine in the same minute, of a large matrix product and a large copy.
A data sheet would describe another machine.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .. import cpu
from ..contract import GraphSpec, TensorSpec
from ..cpu import usable_cores
from ..engines import openvino
from ..engines.cuda import Cuda
from ..engines.onnxruntime import has_cuda_provider, session_options
from ..engines.onnxruntime_cuda import OnnxRuntimeCudaEngine, OnnxRuntimeDeviceEngine
from ..errors import EngineError, HanDiffuserError
from ..installed import version
from ..runtime.check import driver_version

PACKAGES = (
    "handiffuser", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-lean", "tensorrt-rtx",
    "cuda-bindings", "torch", "diffusers", "onnx",
)  # fmt: skip
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices
COPY = 1 << 28  # bytes; beyond any cache


def card(threads: int | None, device: str, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """The hardware card. threads: CPU threads, None for all cores. device: "cpu", "cuda" or "auto"."""
    found: dict[str, Any] = {
        "cpu": cpu.cpu_name(),
        "cpu_features": list(cpu.features()),
        "cores": usable_cores(),
        "threads": threads or usable_cores(),
        "memory_gb": round(_total_memory() / 1e9, 1),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions(),
    }
    found |= gpu_card(device)
    on = "cuda" if found["gpu"] else "cpu"
    found["ceilings"] = {"matmul": matmul_ceiling(threads, on, clock), "copy": copy_ceiling(on, clock)}
    return found


def versions() -> dict[str, str]:
    """Versions of the installed PACKAGES."""
    found = {name: version(name) for name in PACKAGES}
    return {name: number for name, number in found.items() if number}


def gpu_card(device: str) -> dict[str, Any]:
    """{"gpu": name or None, ...}; without one, "no_gpu" says why."""
    if device == "cpu":
        return {"gpu": None, "no_gpu": "--device cpu"}
    try:
        cuda = Cuda()
    except EngineError as error:
        return {"gpu": None, "no_gpu": str(error)}
    free, total = cuda.call("cudaMemGetInfo")
    driver = cuda.call("cudaDriverGetVersion")
    return {
        "gpu": cuda.name,
        "compute_capability": cuda.compute_capability,
        "gpu_memory_gb": round(total / 1e9, 1),
        "gpu_memory_free_gb": round(free / 1e9, 1),
        "driver_cuda": f"{driver // 1000}.{driver % 1000 // 10}",
        "driver": driver_version(),
    }


def matmul_ceiling(
    threads: int | None, device: str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """{"flops": operations a second, "how": ...}: the best of many square products in ONNX Runtime.

    float32 on a CPU, float16 on a GPU. Without the onnx package, which describes the product to ONNX Runtime, numpy's.
    """
    n = SIDE[device]
    try:
        from onnx import parser
    except ImportError:
        if device == "cuda":
            return {"flops": None, "how": "not measured: the onnx package is not installed"}
        a = np.ones((n, n), np.float32)
        seconds = best(lambda: a @ a, clock)
        return {"flops": 2 * n**3 / seconds, "how": f"numpy, float32 {n} x {n}, on as many threads as it takes"}
    kind, dtype = ("float16", "float16") if device == "cuda" else ("float", "float32")
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 18]> product ({kind}[{n},{n}] a, {kind}[{n},{n}] b) => '
        f"({kind}[{n},{n}] c) {{ c = MatMul (a, b) }}"
    ).SerializeToString()
    if device == "cuda":
        cuda = Cuda()
        try:
            seconds = _product_on_gpu(cuda, model, n, dtype, clock)
        except HanDiffuserError as error:
            return {"flops": None, "how": f"not measured: {error}"}
        finally:
            cuda.close()
    else:
        import onnxruntime as ort

        session = ort.InferenceSession(model, session_options(threads), providers=["CPUExecutionProvider"])
        feeds = dict.fromkeys("ab", np.ones((n, n), dtype))
        seconds = best(lambda: session.run(None, feeds), clock)
    return {"flops": 2 * n**3 / seconds, "how": f"ONNX Runtime, {dtype} {n} x {n}"}


def bf16_ceiling(threads: int | None, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """As `matmul_ceiling`, in bfloat16 in OpenVINO on the CPU: a product with a matrix of weights, as in networks."""
    n = SIDE["cpu"]
    from onnx import helper, numpy_helper

    weights = numpy_helper.from_array(np.random.default_rng(0).standard_normal((n, n)).astype(np.float32), "b")
    sides = [helper.make_tensor_value_info(name, 1, [n, n]) for name in "ac"]
    nodes = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    graph = helper.make_graph(nodes, "product", sides[:1], sides[1:], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    spec = GraphSpec("product.onnx", [TensorSpec("a", "float32", (n, n))], [TensorSpec("c", "float32", (n, n))])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / spec.file
        file.write_bytes(model.SerializeToString())
        engine = openvino.OpenVinoEngine(file, spec, "bf16", threads)
        feeds = {"a": np.ones((n, n), np.float32)}
        seconds = best(lambda: engine(feeds), clock)
    return {"flops": 2 * n**3 / seconds, "how": f"OpenVINO, bfloat16 {n} x {n}"}


class Others:
    """How many cores other processes use while this process and its children measure."""

    def __init__(self) -> None:
        self.start = self._now()

    def cores(self) -> float | None:
        """On average since the start; None where the system does not tell."""
        now = self._now()
        if now is None or self.start is None or now[0] - self.start[0] < 1:
            return None
        wall, busy, own = (later - earlier for later, earlier in zip(now, self.start, strict=True))
        return max(0.0, (busy - own) / wall)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Wall clock, busy seconds of all cores, CPU seconds of this process and of those it has waited for."""
        try:
            fields = [
                int(number) for number in Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:]
            ]
        except (OSError, ValueError):
            return None
        idle = fields[3] + fields[4]  # and waiting for disks
        times = os.times()
        return time.monotonic(), (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK"), sum(times[:4])


def _product_on_gpu(cuda: Cuda, model: bytes, n: int, dtype: str, clock: Callable[[], float]) -> float:
    """Seconds of c = a b, [n, n] each, with random numbers: with zeros or ones a GPU takes less power and is faster."""
    if not has_cuda_provider():
        raise EngineError("this ONNX Runtime has no CUDA provider")
    stream = cuda.stream()
    a, b, c = (TensorSpec(name, dtype, (n, n)) for name in "abc")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "product.onnx"
        file.write_bytes(model)
        engine = OnnxRuntimeCudaEngine(file, GraphSpec(file.name, [a, b], [c]), stream=int(stream.handle))
    arrays = {name: cuda.zeros((n, n), dtype) for name in "abc"}
    numbers = cuda.pinned((n, n), dtype)
    numbers[...] = np.random.default_rng(0).standard_normal((n, n), np.float32)
    for name in "ab":
        stream.copy(arrays[name], numbers)
    product = OnnxRuntimeDeviceEngine(engine)
    product.bind({name: arrays[name] for name in "ab"}, {"c": arrays["c"]})

    def run() -> None:
        product.enqueue(stream)
        stream.synchronize()

    return best(run, clock)


def copy_ceiling(device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """{"bytes": read and written a second, "how": ...}: the best of several copies of 256 MB."""
    if device == "cuda":
        cuda = Cuda()
        stream = cuda.stream()
        source, target = cuda.zeros((COPY,), "uint8"), cuda.zeros((COPY,), "uint8")

        def copy() -> None:
            for _ in range(10):
                stream.copy(target, source)
            stream.synchronize()

        seconds = best(copy)
        cuda.close()  # the next measurement counts its own memory
        return {"bytes": 2 * 10 * COPY / seconds, "how": "device to device, 256 MB"}
    here, there = np.ones(COPY // 8), np.empty(COPY // 8)
    return {"bytes": 2 * COPY / best(lambda: np.copyto(there, here), clock), "how": "numpy, one thread, 256 MB"}


def best(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter, seconds: float = 1.0) -> float:
    """The shortest of the runs in `seconds`, at least three, after one to warm up."""
    function()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


def _total_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
