"""Finds the plans of a folder that run on this machine's GPU, and loads them with one of TensorRT's three modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from ..contract import PICTURES, Manifest, Size
from ..errors import EngineError
from .adapted import Chosen
from .base import DeviceEngine, DeviceEngines, Sized, enough
from .cuda import Cuda
from .plans import KERNELS, Plan, PlanStore, belongs
from .refit import Adapted, opened
from .tensorrt import LoadedPlan, Scratch, TensorRT, TensorRTEngine

ByGraph = dict[str, dict[int, Plan]]  # graph -> batch size -> plan
ByBranches = dict[int, ByGraph]


def device_engines(
    name: str,
    folder: Path,
    manifest: Manifest,
    cuda: Cuda,
    stream_of: Callable[[str], Any],
    slots: int,
    replay: bool = False,
    adapters: Sequence[Chosen] = (),
) -> DeviceEngines:
    """The plans of a folder as engines. A plan is read, verified and put on the GPU when the loop first uses it.

    name: "tensorrt", "tensorrt-lean" or "tensorrt-rtx". adapters: that all pictures have; plans that lack them get them
    as they are loaded. Raises EngineError without the backend, or without plans for this GPU.
    """
    backend, store = TensorRT(name), PlanStore(folder)
    own, adapted = manifest.image_size, Adapted(folder, adapters) if adapters else None
    plans = {own: plans_at(store, manifest, backend, cuda, own, adapted)}  # says what is missing
    ours = belongs if adapted is None else adapted.takes
    here = [plan for plan in store if plan.graph == "unet" and ours(plan, manifest) and backend.takes(plan, cuda)]
    for size in sorted({manifest.size_at(sides) for plan in here for sides in plan.sides() if sides} - {own}):
        with contextlib.suppress(EngineError):  # a build that was interrupted
            plans[size] = plans_at(store, manifest, backend, cuda, size, adapted)
    buckets, sentences = batch_sizes(plans[own][2]), []
    if adapted is not None and any(plan.adapters != adapted.key_of(plan.graph) for plan in _each(plans[own])):
        said = " ".join(f"--lora {one.typed}" for one in adapters)
        sentences.append(
            f"Plans get the adapters as they are loaded. To keep such plans: hd-engines refit {folder} {said}."
        )
    if not buckets:
        raise EngineError(f"{folder} has no batch size that all graphs have plans for: hd-engines build {folder}.")
    if slots > buckets[-1]:
        sentences.append(
            f"The engines take up to {buckets[-1]} pictures at once, so the batch size {slots} became that. For "
            f"more: hd-engines build {folder} --batch-sizes {','.join(map(str, (*buckets, slots)))}."
        )
    scratch: dict[Any, Scratch] = {}  # by stream: its engines never run at once
    loaded = WeakValueDictionary[str, LoadedPlan]()  # a plan goes with the last of its engines

    def at(size: Size) -> Sized:
        graphs = manifest.fixed(size).graphs

        def load(graph: str, bucket: int, branches: int) -> DeviceEngine:
            sizes = plans[size][branches][graph]
            plan = next(iter(sizes.values())) if graph == "unet_time" else sizes[bucket]
            if (ready := loaded.get(plan.key)) is None:
                new = adapted.lacking(plan) if adapted is not None else None
                ready = opened(backend, store, plan, folder, cuda, plan.path.with_suffix(KERNELS), new)
                loaded[plan.key] = ready
            stream = stream_of(graph)
            if stream not in scratch:
                scratch[stream] = Scratch(cuda)
            return TensorRTEngine(ready, graphs[graph], scratch[stream])

        single = {graph: list(sizes) for graph, sizes in plans[size][1].items()}
        of_own = {plan.key for plan in _of_pictures(plans[own])}
        weights = sum(plan.size for plan in _of_pictures(plans[size]) if plan.key not in of_own)
        return Sized(load, enough(batch_sizes(plans[size][2]), slots), single, weights)

    sizes = frozenset(size for size in plans if batch_sizes(plans[size][2]))
    return DeviceEngines(at, sizes, sentences, backend.keep_kernels, backend.close)


def plans_at(
    store: PlanStore, manifest: Manifest, backend: TensorRT, cuda: Cuda, size: Size, adapted: Adapted | None = None
) -> ByBranches:
    """Guidance branches -> the usable plans for a size of pictures."""
    return {branches: usable_plans(store, manifest, backend, cuda, branches, size, adapted) for branches in (2, 1)}


def batch_sizes(plans: ByGraph) -> list[int]:
    """The batch sizes that all graphs have plans for, rising."""
    return sorted(set.intersection(*(set(sizes) for graph, sizes in plans.items() if graph != "unet_time")))


def _of_pictures(plans: ByBranches) -> list[Plan]:
    """The plans that a size of pictures has for itself, each once."""
    return [plan for plan in _each(plans) if plan.graph in PICTURES]


def _each(plans: ByBranches) -> list[Plan]:
    """Each plan once."""
    found = (sizes for by_graph in plans.values() for sizes in by_graph.values())
    return list({plan.key: plan for sizes in found for plan in sizes.values()}.values())


def check_plans(name: str, folder: Path, manifest: Manifest, cuda: Cuda) -> None:
    """Raises EngineError unless the folder has plans of this backend that run on this GPU."""
    usable_plans(PlanStore(folder), manifest, TensorRT(name), cuda)


def usable_plans(
    store: PlanStore,
    manifest: Manifest,
    backend: TensorRT,
    cuda: Any,
    branches: int = 2,
    size: Size | None = None,
    adapted: Adapted | None = None,
) -> ByGraph:
    """Graph -> batch size -> plan, of the plans that belong to this bundle, backend and GPU; the newest of equals.

    A plan for this GPU and version alone goes before one that serves others, which may be slower.

    branches: of plans that run this many guidance branches. size: of the pictures; None: the bundle's own. adapted:
    only plans with these adapters, or refittable ones, of graphs that they change. Raises EngineError when a graph has
    no plan for two branches; plans for one branch are optional.
    """
    if refusal := backend.refusal(cuda):
        raise EngineError(refusal)
    sides, ours = manifest.sides(size), belongs if adapted is None else adapted.takes
    found: ByGraph = {name: {} for name in manifest.graphs}
    others: set[str] = set()  # what the plans are for that do not run here
    for plan in sorted(store, key=_worth):
        if plan.graph not in found or plan.branches != branches or store.problem(plan, verify=False):
            continue
        if not ours(plan, manifest):
            continue
        if not backend.takes(plan, cuda):
            if plan.parts["backend"] == backend.builder:
                others.add(plan.made_for)
            continue
        found[plan.graph].update(dict.fromkeys(plan.batches_at(sides), plan))
    missing = [name for name, sizes in found.items() if not sizes]
    if missing and branches == 2:
        there = f" It has plans for {'; '.join(sorted(others))}." if others else ""
        raise EngineError(
            f"{store.folder.parent} has no {backend.name} {backend.version} plans of {', '.join(missing)} for this GPU "
            f"({cuda.name}, compute capability {cuda.compute_capability}).{there} Build them: "
            f"{backend.how_to_build(store.folder.parent, '' if adapted is None else ' --refittable')}."
        )
    return found


def _worth(plan: Plan) -> tuple[bool, bool, bool, bool, float]:
    """The best plan is the largest. One with adapters is there only for a run with these."""
    portable, as_built = plan.parts["target"].startswith("compute capability"), not (plan.refittable or plan.stripped)
    made = plan.path.stat().st_mtime if plan.path.exists() else 0.0
    return bool(plan.adapters), not plan.version_compatible, not portable, as_built, made
