"""What it ran on: processor, GPU, versions, and the ceilings that were measured here.

    from handiffuser.benchmarks.card import card
    card(threads=1, device="cpu")

A ceiling is the best that this machine was seen to do in the same minute: one large matrix product, one large copy.
A data sheet's figure would be another machine's on a better day.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.cuda import Cuda
from ..engines.onnxruntime import session_options, usable_cores
from ..errors import EngineError

PACKAGES = (
    "handiffuser", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "torch", "diffusers", "onnx",
)  # fmt: skip
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices
COPY = 1 << 28  # bytes; beyond any cache


def card(threads: int | None, device: str, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """The hardware card. threads: CPU threads, None for all cores. device: "cpu", "cuda" or "auto"."""
    found: dict[str, Any] = {
        "cpu": cpu_name(),
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
    """Of the packages that have a say; those that are not installed are left out."""
    out = {}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


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
        a = np.ones((n, n), np.float32)
        seconds = best(lambda: a @ a, clock)
        return {"flops": 2 * n**3 / seconds, "how": f"numpy, float32 {n} x {n}, on as many threads as it takes"}
    import onnxruntime as ort

    kind, dtype = ("float16", np.float16) if device == "cuda" else ("float", np.float32)
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 18]> product ({kind}[{n},{n}] a, {kind}[{n},{n}] b) => '
        f"({kind}[{n},{n}] c) {{ c = MatMul (a, b) }}"
    )
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    if provider not in ort.get_available_providers():
        return {"flops": None, "how": "not measured: this ONNX Runtime has no CUDA provider"}
    session = ort.InferenceSession(model.SerializeToString(), session_options(threads), providers=[provider])
    binding, value = session.io_binding(), np.ones((n, n), dtype)
    for name in "ab":
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, device, 0))
    binding.bind_output("c", device)
    seconds = best(lambda: session.run_with_iobinding(binding), clock)
    return {"flops": 2 * n**3 / seconds, "how": f"ONNX Runtime, {np.dtype(dtype).name} {n} x {n}"}


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

        return {"bytes": 2 * 10 * COPY / best(copy), "how": "device to device, 256 MB"}
    here, there = np.ones(COPY // 8), np.empty(COPY // 8)
    return {"bytes": 2 * COPY / best(lambda: np.copyto(there, here), clock), "how": "numpy, one thread, 256 MB"}


def best(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter, seconds: float = 1.0) -> float:
    """The shortest of the runs that fit into `seconds`, at least three, after one to warm up."""
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
