"""Finds the plans of a folder that run on this machine's GPU, and loads them with one of TensorRT's three modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..contract import Manifest
from ..errors import EngineError
from .base import DeviceEngine, DeviceEngines, powers_of_two
from .cuda import Cuda
from .plans import KERNELS, Plan, PlanStore, belongs
from .tensorrt import LoadedPlan, Scratch, TensorRT, TensorRTEngine


def device_engines(
    name: str,
    folder: Path,
    manifest: Manifest,
    cuda: Cuda,
    stream_of: Callable[[str], Any],
    slots: int,
    replay: bool = False,
) -> DeviceEngines:
    """The plans of a folder as engines. A plan is read, verified and put on the GPU when the loop first uses it.

    name: "tensorrt", "tensorrt-lean" or "tensorrt-rtx". Raises EngineError without the backend, or without plans for
    this GPU.
    """
    backend, store = TensorRT(name), PlanStore(folder)
    plans = {branches: usable_plans(store, manifest, backend, cuda, branches) for branches in (2, 1)}
    sized = (set(sizes) for graph, sizes in plans[2].items() if graph != "unet_time")
    buckets, sentences = sorted(set.intersection(*sized)), []
    if not buckets:
        raise EngineError(f"{folder} has no batch size that all graphs have plans for: hd-engines build {folder}.")
    if slots > buckets[-1]:
        sentences.append(
            f"The engines take up to {buckets[-1]} pictures at once, so the batch size {slots} became that. For "
            f"more: hd-engines build {folder} --batch-sizes {','.join(map(str, (*buckets, slots)))}."
        )
    scratch: dict[Any, Scratch] = {}  # by stream: its engines never run at once
    loaded: dict[str, LoadedPlan] = {}

    def load(graph: str, bucket: int, branches: int) -> DeviceEngine:
        sizes = plans[branches][graph]
        plan = next(iter(sizes.values())) if graph == "unet_time" else sizes[bucket]
        if plan.key not in loaded:
            kernels = plan.path.with_suffix(KERNELS)
            loaded[plan.key] = backend.load(store.read(plan), graph, cuda, kernels, plan.version_compatible)
        stream = stream_of(graph)
        if stream not in scratch:
            scratch[stream] = Scratch(cuda)
        return TensorRTEngine(loaded[plan.key], manifest.graphs[graph], scratch[stream])

    single = {graph: list(sizes) for graph, sizes in plans[1].items()}
    return DeviceEngines(load, enough(buckets, slots), single, sentences, backend.keep_kernels, backend.close)


def check_plans(name: str, folder: Path, manifest: Manifest, cuda: Cuda) -> None:
    """Raises EngineError unless the folder has plans of this backend that run on this GPU."""
    usable_plans(PlanStore(folder), manifest, TensorRT(name), cuda)


def enough(buckets: list[int], slots: int) -> list[int]:
    """Of rising batch sizes those up to the first that holds all slots."""
    return [size for size in buckets if size < slots] + [size for size in buckets if size >= slots][:1]


def usable_plans(
    store: PlanStore, manifest: Manifest, backend: TensorRT, cuda: Any, branches: int = 2
) -> dict[str, dict[int, Plan]]:
    """Graph -> batch size -> plan, of the plans that belong to this bundle, backend and GPU; the newest of equals.

    A plan for this GPU and version alone goes before one that serves others, which may be slower.

    branches: of plans that run this many guidance branches. Raises EngineError when a graph has no plan for two
    branches; plans for one branch are optional.
    """
    if refusal := backend.refusal(cuda):
        raise EngineError(refusal)
    found: dict[str, dict[int, Plan]] = {name: {} for name in manifest.graphs}
    others: set[str] = set()  # what the plans are for that do not run here
    for plan in sorted(store, key=_worth):
        if plan.graph not in found or plan.branches != branches or store.problem(plan, verify=False):
            continue
        if not belongs(plan, manifest):
            continue
        if not backend.takes(plan, cuda):
            if plan.parts["backend"] == backend.builder:
                others.add(plan.made_for)
            continue
        least, most = plan.batch
        sizes = plan.batches or [n for n in powers_of_two(most) if least <= n <= most]
        found[plan.graph].update(dict.fromkeys({*sizes, most}, plan))
    missing = [name for name, sizes in found.items() if not sizes]
    if missing and branches == 2:
        there = f" It has plans for {'; '.join(sorted(others))}." if others else ""
        raise EngineError(
            f"{store.folder.parent} has no {backend.name} {backend.version} plans of {', '.join(missing)} for this GPU "
            f"({cuda.name}, compute capability {cuda.compute_capability}).{there} Build them: "
            f"{backend.how_to_build(store.folder.parent)}."
        )
    return found


def _worth(plan: Plan) -> tuple[bool, bool, float]:
    """The best plan is the largest."""
    portable = plan.parts["target"].startswith("compute capability")
    return not plan.version_compatible, not portable, plan.path.stat().st_mtime if plan.path.exists() else 0.0
