"""The loop on a GPU, and where each backend's engines for it come from: built plans, ONNX Runtime's CUDA provider, or
graphs that PyTorch compiled.

loop, sentences = load_device_loop(Bundle.load(folder), folder, "tensorrt-rtx", slots=8)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..contract import BRANCHES, GRAPHS, Manifest
from ..engines.base import DeviceEngine, check_gpu
from ..engines.cuda import Cuda
from ..engines.inductor import InductorDeviceEngine, InductorEngine, find_compiled
from ..engines.onnxruntime import OnnxRuntimeDeviceEngine, OnnxRuntimeEngine, in_half
from ..engines.plans import KERNELS, Plan, PlanStore, belongs
from ..engines.tensorrt import Backend, Scratch, TensorRTEngine
from ..errors import BundleError, EngineError
from .bundle import Bundle
from .device import DeviceLoop
from .device_graphs import STREAM, Load, Streams, connect
from .loading import powers_of_two

STEPS = ("hand_prior", "unet")  # the graphs that run again and again, with guidance or without


def load_device_loop(
    bundle: Bundle,
    folder: Path,
    backend: str,
    slots: int,
    overlap: bool = True,
    onnxruntime_graphs: bool = False,
) -> tuple[DeviceLoop, list[str]]:
    """The loop of a bundle on this machine's GPU, and what the user should know about it.

    backend: "tensorrt" or "tensorrt-rtx" (with plans in `folder`), "inductor" (with graphs compiled for the GPU there)
    or "onnxruntime" (its CUDA provider). onnxruntime_graphs: see `onnxruntime_loader`.
    Raises EngineError without a GPU, without the backend, or without plans for them.
    """
    cuda, manifest, sentences = Cuda(), bundle.manifest, []
    check_gpu(manifest, cuda)
    streams = Streams.make(cuda, overlap)
    module: Backend | None = None
    if backend in ("onnxruntime", "inductor"):
        buckets = powers_of_two(slots)
        if backend == "inductor":
            load = inductor_loader(manifest, folder)
        else:
            load = onnxruntime_loader(manifest, folder, streams, onnxruntime_graphs)
        single = dict.fromkeys(STEPS, buckets)
    else:
        module = Backend(backend)
        store = PlanStore(folder)
        plans = usable_plans(store, manifest, module, cuda)
        singles = usable_plans(store, manifest, module, cuda, branches=1)
        single = {name: list(sizes) for name, sizes in singles.items()}
        buckets = sorted(set.intersection(*(set(sizes) for name, sizes in plans.items() if name != "unet_time")))
        if not buckets:
            raise EngineError(f"{folder} has no batch size that all graphs have plans for: hd-engines build {folder}.")
        if slots > buckets[-1]:
            sentences.append(
                f"The engines take up to {buckets[-1]} pictures at once, so the batch size {slots} became that. For "
                f"more: hd-engines build {folder} --batch-sizes {','.join(map(str, (*buckets, slots)))}."
            )
            slots = buckets[-1]
        buckets = enough(buckets, slots)
        load = tensorrt_loader(manifest, store, {2: plans, 1: singles}, module, cuda)
    loop = DeviceLoop(bundle, cuda, connect(cuda, manifest, buckets, load, single=single), streams, slots)
    bundle.made_by |= {"device": cuda.name, "backend": backend}
    if module is not None:
        loop.after_run, loop.at_close = module.keep_kernels, module.close
    return loop, sentences


def first_usable(folder: Path, backends: Sequence[str]) -> str:
    """The first of these backends whose plans in the folder run on this GPU; "onnxruntime" where none do, with a
    warning that says why."""
    try:
        cuda, manifest, store = Cuda(), Manifest.load(folder, verify=False), PlanStore(folder)
    except EngineError as error:
        warnings.warn(f"The plans in {folder} are not used. {error}", RuntimeWarning, stacklevel=3)
        return "onnxruntime"
    for name in backends:
        try:
            usable_plans(store, manifest, Backend(name), cuda)
            return name
        except EngineError as error:
            warnings.warn(f"ONNX Runtime is used instead of {name}. {error}", RuntimeWarning, stacklevel=3)
    return "onnxruntime"


def enough(buckets: list[int], slots: int) -> list[int]:
    """Of rising batch sizes those up to the first that holds all slots, which is among them."""
    return [size for size in buckets if size < slots] + [size for size in buckets if size >= slots][:1]


def usable_plans(
    store: PlanStore, manifest: Manifest, backend: Backend, cuda: Any, branches: int = 2
) -> dict[str, dict[int, Plan]]:
    """Graph -> batch size -> plan, of the plans that belong to this bundle, backend and GPU; the newest of equals.

    branches: those that run this many guidance branches; of one branch alone there may be none.
    Raises EngineError when a graph has no plan.
    """
    if refusal := backend.refusal(cuda):
        raise EngineError(refusal)
    found: dict[str, dict[int, Plan]] = {name: {} for name in GRAPHS}
    for plan in sorted(store, key=lambda plan: plan.path.stat().st_mtime if plan.path.exists() else 0):
        if plan.graph not in found or plan.branches != branches or store.problem(plan, verify=False):
            continue
        made_by = (plan.parts["backend"], plan.parts["version"])
        if (
            not belongs(plan, manifest)
            or made_by != (backend.name, backend.version)
            or not backend.runs_on(plan.parts["target"], cuda)
        ):
            continue
        least, most = plan.batch
        sizes = plan.batches or [n for n in powers_of_two(most) if least <= n <= most]
        found[plan.graph].update(dict.fromkeys({*sizes, most}, plan))
    missing = [name for name, sizes in found.items() if not sizes]
    if missing and branches == 2:
        raise EngineError(
            f"{store.folder.parent} has no {backend.name} {backend.version} plans of {', '.join(missing)} for this GPU "
            f"({cuda.name}, compute capability {cuda.compute_capability}). Build them: hd-engines build "
            f"{store.folder.parent} --backend {backend.name}."
        )
    return found


def tensorrt_loader(
    manifest: Manifest,
    store: PlanStore,
    plans: dict[int, dict[str, dict[int, Plan]]],
    backend: Backend,
    cuda: Any,
) -> Load:
    """(graph, bucket, guidance branches) -> engine. A plan is read, verified and put on the GPU when it is first used.

    plans: by branches, see `usable_plans`.
    """
    scratch = {stream: Scratch(cuda) for stream in Streams._fields}
    loaded: dict[str, Any] = {}

    def load(name: str, bucket: int, branches: int) -> DeviceEngine:
        sizes = plans[branches][name]
        plan = next(iter(sizes.values())) if name == "unet_time" else sizes[bucket]
        if plan.key not in loaded:
            kernels = plan.path.with_suffix(KERNELS)
            loaded[plan.key] = backend.load(store.read(plan), name, cuda, kernels)
        return TensorRTEngine(loaded[plan.key], manifest.graphs[name], scratch[STREAM[name]])

    return load


def onnxruntime_loader(manifest: Manifest, folder: Path, streams: Streams, graphs: bool = False) -> Load:
    """(graph, bucket, branches) -> engine: one session a graph on its stream, one binding a bucket.

    graphs: have ONNX Runtime replay the sampling steps as CUDA graphs of its own, with a session, and its weights, a
    bucket. Not unless asked for: it spares the launching of each kernel, but makes the host wait for every step. A
    session that refuses runs without.
    """
    sessions: dict[str, OnnxRuntimeEngine] = {}

    def session(name: str, capture: dict[str, int] | None = None) -> OnnxRuntimeEngine:
        spec, stream = manifest.graphs[name], getattr(streams, STREAM[name])
        return OnnxRuntimeEngine(
            folder / spec.file, spec, "cuda", stream=int(stream.handle), capture=capture, half=in_half(manifest, name)
        )

    def load(name: str, bucket: int, branches: int) -> DeviceEngine:
        if graphs and name in STEPS:
            try:
                return OnnxRuntimeDeviceEngine(session(name, {"B": bucket, BRANCHES: branches}))
            except BundleError:
                pass  # a node that does not run on the GPU; anything else is said again
        if name not in sessions:
            sessions[name] = session(name)
        return OnnxRuntimeDeviceEngine(sessions[name])

    return load


def inductor_loader(manifest: Manifest, folder: Path) -> Load:
    """(graph, bucket, branches) -> engine: one compiled file a graph, one binding a bucket.

    A file is verified and loaded when it is first used, on the thread and for the stream that it stays with.
    """
    _, plans = find_compiled(folder, manifest, "cuda")
    store, loaded = PlanStore(folder), {}

    def load(name: str, bucket: int, branches: int) -> DeviceEngine:
        if name not in loaded:
            store.read(plans[name])
            loaded[name] = InductorEngine(plans[name].path, manifest.graphs[name], "cuda", asynchronous=True)
        return InductorDeviceEngine(loaded[name])

    return load
