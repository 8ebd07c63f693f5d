"""Puts other weights into a built plan: an adapter (LoRA) in seconds, in place of a build in minutes.

    adapted = Adapted(Path("engines"), chosen(["style.safetensors:0.8"]))
    loaded = opened(backend, store, plan, folder, cuda, kernels, adapted.lacking(plan))  # in memory, as hd-run does
    for plan, seconds in refit("tensorrt", folder, adapted): ...                         # to the disk: hd-engines refit

A plan must be built for it (`Options.refittable`). Then those weights stay apart that an adapter may change, by the
bundle's map (`core/weights.py`), and TensorRT folds none of them into others. So such a plan may be slower. A plan on
the disk never changes: a refit writes another one beside it, whose key has the adapters' contents and scales.

A stripped plan (`Options.stripped`) lacks its large weights, and gets them from the bundle when it is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..contract import Manifest
from ..errors import EngineError
from ..schema import listed
from ..tensors import narrowed
from ..weights import WeightMap
from .adapted import Chosen, changes, graphs_of, merged
from .cuda import Cuda
from .initializers import OnnxWeights
from .inspect import layers_of
from .plans import KERNELS, Plan, PlanStore, belongs, graph_digest
from .tensorrt import LoadedPlan, Options, TensorRT

MIN_STRIPPED = 1024  # numbers of a weight that is worth stripping; TensorRT folds smaller ones into kernels
MOST = 65504.0  # of float16


class Adapted:
    """A folder's graphs with adapters. Raises BundleError and CheckpointError as `adapted.changes` does."""

    def __init__(self, folder: Path, adapters: Sequence[Chosen]) -> None:
        self.folder, self.adapters = folder, tuple(adapters)
        self.map, self.found = changes(folder, adapters)
        self.graphs = frozenset(graphs_of(self.map, self.found))
        self.key = ",".join(f"{one.digest}:{one.scale!r}" for one in adapters)

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest.load(self.folder, verify=False)

    def key_of(self, graph: str) -> str:
        """`Plan.adapters` of a graph's plans with these adapters: "" where they leave the graph alone."""
        return self.key if graph in self.graphs else ""

    def weights(self, graph: str) -> dict[str, np.ndarray]:
        """The initializers that change, in float32. Raises CheckpointError where they become infinite."""
        stored = OnnxWeights(self.folder / self.manifest.graphs[graph].file)
        return dict(merged(graph, stored, self.map, self.found))

    def lacking(self, plan: Plan) -> dict[str, np.ndarray]:
        """The weights that a plan lacks: none where it has the adapters, or where they leave its graph alone."""
        return {} if plan.adapters == self.key_of(plan.graph) else self.weights(plan.graph)

    def takes(self, plan: Plan, manifest: Manifest) -> bool:
        """Whether a plan of this bundle has the adapters, or can get them."""
        key = self.key_of(plan.graph)
        return belongs(plan, manifest, key) or (plan.refittable and belongs(plan, manifest))


def check_refits(backend: TensorRT, options: Options, cuda: Cuda | None) -> None:
    """Raises EngineError where this machine cannot build what the options ask of refits."""
    if (options.refittable or options.stripped) and backend.rtx and cuda is None:
        raise EngineError(
            f"--refittable and --strip-weights must be built on a machine with a GPU: {backend.name} "
            f"{backend.version} asks CUDA for such plans. Build there, or leave the options out."
        )


def options_by_graph(folder: Path, options: Options) -> Callable[[str], Options]:
    """Graph -> its build options: refittable where adapters change it, stripped where it has large weights.

    Raises BundleError for refittable plans of a bundle without a map of its weights.
    """
    if not options.refittable and not options.stripped:
        return lambda graph: options
    adaptable, graphs = set[str](), Manifest.load(folder, verify=False).graphs
    if options.refittable:
        places = WeightMap.load(folder).places.values()
        adaptable = {place.graph for some in places for place in some}

    def of_graph(graph: str) -> Options:
        large = options.stripped and bool(_large(folder / graphs[graph].file))
        return replace(options, refittable=graph in adaptable or None, stripped=large or None)

    return of_graph


def _large(path: Path) -> set[str]:
    """The weights of a graph that are worth stripping."""
    shapes = OnnxWeights(path).shapes.items()
    return {name for name, shape in shapes if np.prod(shape, dtype=np.int64) >= MIN_STRIPPED}


def mark(backend: TensorRT, network: Any, config: Any, onnx: Path, options: Options) -> None:
    """Tells a builder which weights of a network a refit may set. Raises EngineError for an old TensorRT."""
    flags = backend.module.BuilderFlag
    for name in ("REFIT_INDIVIDUAL", *(("STRIP_PLAN",) if options.stripped else ())):
        if not hasattr(flags, name):
            raise EngineError(
                f"{backend.name} {backend.version} must know {name} for --refittable or --strip-weights, and does "
                "not. Install a later version, or leave the option out."
            )
        config.set_flag(getattr(flags, name))
    wanted = set[str]()
    if options.refittable:
        places = (place for some in WeightMap.load(onnx.parent).places.values() for place in some)
        wanted |= {place.initializer for place in places if place.graph == onnx.stem}
    if options.stripped:
        wanted |= _large(onnx)
    for name in sorted(wanted):
        network.mark_weights_refittable(name)  # it refuses what the parser computed beforehand; a refit names those
    backend.messages.clear()


def opened(
    backend: TensorRT,
    store: PlanStore,
    plan: Plan,
    folder: Path,
    cuda: Cuda,
    kernels: Path | None = None,
    new: Mapping[str, np.ndarray] | None = None,
) -> LoadedPlan:
    """Loads a verified plan onto the GPU, with the weights that it was stripped of, and with new ones.

    folder: the bundle. kernels: see `TensorRT.load`. new: see `put`. Raises EngineError as both of them do.
    """
    loaded = backend.load(store.read(plan), plan.graph, cuda, kernels, plan.version_compatible)
    if not new and not plan.stripped:
        return loaded
    try:
        put(loaded, new or {}, OnnxWeights(folder / Manifest.load(folder, verify=False).graphs[plan.graph].file))
    except BaseException:
        loaded.close()
        raise
    return loaded


def put(plan: LoadedPlan, new: Mapping[str, np.ndarray], stored: OnnxWeights) -> int:
    """Sets weights of a loaded plan, before its first context is made; returns how many it set.

    new: initializers of the graph by name, float32. stored: the graph's own, from which others come where the plan
    asks for them: stripped ones, and those that a kernel has joined with new ones.
    Raises EngineError for a plan that cannot be refitted or does not know a weight, and without memory.
    """
    backend, graph = plan.backend, plan.graph
    backend.messages.clear()
    if not plan.engine.refittable:
        raise EngineError(
            f"The plan of {graph} must be refittable to take other weights, and is not. Build it again: hd-engines "
            "build FOLDER --refittable."
        )
    try:
        refitter = backend.module.Refitter(plan.engine, backend.logger)
    except TypeError as error:  # "factory function returned nullptr"
        raise backend.failure(f"cannot refit {graph}") from error
    unknown = sorted(set(new) - set(refitter.get_all_weights()))
    if unknown:
        raise EngineError(
            f"The plan of {graph} does not know {listed(unknown)}, which the adapter changes: TensorRT computed what "
            "follows from it when it built the plan. Merge the adapter and build: hd-engines merge FOLDER OUT --lora "
            "FILE."
        )
    held = list[np.ndarray]()  # TensorRT copies nothing until it refits

    def give(name: str, numbers: np.ndarray) -> None:
        kind = refitter.get_weights_prototype(name).dtype
        held.append(_encoded(backend, graph, name, kind, numbers))
        weights = backend.module.Weights(kind, held[-1].ctypes.data, held[-1].size)
        if not refitter.set_named_weights(name, weights):
            raise backend.failure(f"does not take {name} into the plan of {graph}")

    for name, numbers in new.items():
        give(name, numbers)
    for name in refitter.get_missing_weights():
        if name not in stored.tensors:
            raise EngineError(
                f"The plan of {graph} asks for the weight {name or 'without a name'}, which the bundle's graph does "
                "not have. Build it again: hd-engines build FOLDER."
            )
        give(name, stored.read(name))
    if not refitter.refit_cuda_engine():
        raise backend.failure(f"cannot refit {graph}")
    return len(held)


def _encoded(backend: TensorRT, graph: str, name: str, kind: Any, numbers: np.ndarray) -> np.ndarray:
    """A weight in the type that a plan has it in. Raises EngineError where it does not fit into that."""
    types = backend.module.DataType
    if kind == types.FLOAT:
        return np.ascontiguousarray(numbers, np.float32)
    if kind == types.BF16:
        return np.ascontiguousarray(narrowed(numbers))
    if kind != types.HALF:
        raise EngineError(
            f"The weight {name} of {graph} must be in float32, float16 or bfloat16, got {kind}. Build the plan again "
            "without --refittable."
        )
    if np.abs(numbers).max(initial=0) > MOST:
        raise EngineError(
            f"The weight {name} of {graph} must be at most {MOST:.0f} in float16, and the adapter makes it larger. "
            "Take a smaller scale, or an earlier adapter."
        )
    return np.ascontiguousarray(numbers.astype(np.float16))


def refit(name: str, folder: Path, adapted: Adapted) -> Iterator[tuple[Plan, float]]:
    """Writes a plan with adapters beside each refittable plan that they change. Yields it, and the seconds it took: 0
    for one that was there.

    name: a backend that runs plans here. What is written stays when a later one fails. The base's plans stay, too.
    Raises EngineError without a GPU, or where a graph that the adapters change has no refittable plan for it.
    """
    backend, cuda, store, manifest = TensorRT(name), Cuda(), PlanStore(folder), adapted.manifest
    plans = [
        plan
        for plan in store
        if plan.graph in adapted.graphs and plan.refittable and belongs(plan, manifest) and backend.takes(plan, cuda)
    ]
    if missing := sorted(adapted.graphs - {plan.graph for plan in plans}):
        raise EngineError(
            f"{folder} must have refittable plans of {', '.join(missing)} for this GPU, and has none. Build them: "
            f"{backend.how_to_build(folder, ' --refittable')}."
        )
    said = [str(one) for one in adapted.adapters]
    try:
        for graph in sorted(adapted.graphs):
            new: dict[str, np.ndarray] = {}
            for plan in (plan for plan in plans if plan.graph == graph):
                started, wanted = time.monotonic(), _parts(plan, manifest, adapted)
                if (there := store.find(wanted, verify=True)) is not None:
                    yield there, 0.0
                    continue
                if not new:
                    manifest.check_files(folder, manifest.files_of(graph))
                    new = adapted.weights(graph)
                content = _refitted(backend, store, plan, folder, cuda, new)
                noted = {"from": plan.key, "adapters": said, "weights": sorted(new)}
                proof = {**plan.proof, "refitted": noted, "layers": layers_of(plan)}
                took = time.monotonic() - started  # a plan's own seconds are rounded, so 0 in a small model
                yield store.add(wanted, content, proof, took), took
    finally:
        backend.close()
        cuda.close()


def _parts(plan: Plan, manifest: Manifest, adapted: Adapted) -> dict[str, str]:
    """Everything that could make a plan with adapters stale."""
    digest = graph_digest(manifest, plan.graph, adapted.key)
    return {**plan.parts, "graph": digest, "adapters": adapted.key}  # type: ignore[dict-item]


def _refitted(
    backend: TensorRT, store: PlanStore, plan: Plan, folder: Path, cuda: Cuda, new: Mapping[str, np.ndarray]
) -> bytes:
    """A plan's content with new weights."""
    loaded = opened(backend, store, plan, folder, cuda, plan.path.with_suffix(KERNELS), new)
    try:
        content = loaded.engine.serialize()
        if content is None:
            raise backend.failure(f"cannot write the plan of {plan.graph}")
        return bytes(content)
    finally:
        loaded.close()


def unfit(folder: Path) -> list[Plan]:
    """Removes the plans that refits wrote into a folder: the base's are left. Returns them."""
    store = PlanStore(folder)
    found = [plan for plan in store if plan.adapters]
    for plan in found:
        store.remove(plan)
    return found
