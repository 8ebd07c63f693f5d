"""Times a step of the UNet on this machine's GPU, in two ways: see `verdict.py`.

    found = compare("engines-fp8", "engines-fp16", "tensorrt")
    print(report(found, "fp8"))                 # or EngineError: not faster
    verdict = beside_onnxruntime("engines")     # Inductor, which hd-run then takes where it is faster

Eight bits can be slower: quantising costs kernels of its own, and a GPU may lack the fused ones. The two are measured
as a run launches them, in turns, so that a clock that rises or falls favours neither.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..contract import BRANCHES, GraphSpec, Manifest
from ..errors import EngineError
from . import inductor, onnxruntime_cuda
from .backends import DEFAULT
from .base import DeviceEngine
from .cuda import Cuda, Stream
from .inductor_files import find_compiled
from .plans import Plan, PlanStore, belongs
from .refit import opened
from .tensorrt import Scratch, TensorRT, TensorRTEngine
from .verdict import EQUAL, Verdict, write_beside

GRAPH = "unet"  # most of a picture's time
OTHER = "fp16"  # what eight bits must beat
ROUNDS, LAUNCHES = 7, 10  # the median of so many rounds counts, each of so many launches in a row


class NotFasterError(EngineError):
    """Eight bits take as long as half precision, or longer."""


def compare(folder: str | Path, other: str | Path, backend_name: str) -> list[Verdict]:
    """A verdict for each batch size that both folders have a static plan for, by this backend for this GPU.

    folder: engines in eight bits. other: engines of the same model in float16, or the same folder, which keeps its
    plans from an earlier export. Empty when the two have no size in common.
    Raises EngineError without a GPU, when a plan does not run here, or when the two are of different models.
    """
    manifest, backend, cuda = Manifest.load(Path(folder), verify=False), TensorRT(backend_name), Cuda()
    stores = PlanStore(folder), PlanStore(other)
    ours = _plans(stores[0], backend, cuda, lambda plan: belongs(plan, manifest))
    theirs = _plans(
        stores[1], backend, cuda, lambda plan: plan.parts["precision"] == OTHER and not (plan.stripped or plan.adapters)
    )
    steps = []
    for sizes in sorted(ours.keys() & theirs.keys(), key=lambda sizes: (ours[sizes].batch, sizes)):
        pair = [(store, plans[sizes]) for store, plans in zip(stores, (ours, theirs), strict=True)]
        try:
            stream, scratch, engines = cuda.stream(), Scratch(cuda), list[DeviceEngine]()
            for store, plan in pair:
                loaded = opened(backend, store, plan, Path(folder), cuda)
                engines.append(TensorRTEngine(loaded, manifest.graphs[GRAPH], scratch))
            axes = {axis: int(size) for axis, size in (part.split("=") for part in sizes.split(","))}
            ours_took, theirs_took = _seconds(engines, manifest.graphs[GRAPH].at(axes), cuda, stream)
            steps.append(Verdict(EQUAL, theirs_took, ours_took, sizes=sizes))
        finally:
            cuda.close()  # frees the graphs before their engines
            backend.close()
    return steps


def _plans(store: PlanStore, backend: TensorRT, cuda: Cuda, wanted: Callable[[Plan], bool]) -> dict[str, Plan]:
    """Sizes -> the UNet's plan, of those for one size that run here: one as it was built before a slower one
    for refits, the newest of equals."""
    found = [
        plan
        for plan in store
        if plan.graph == GRAPH
        and len(plan.batches) == 1
        and backend.takes(plan, cuda)
        and not store.problem(plan, verify=False)
        and wanted(plan)
    ]
    return {plan.parts["sizes"]: plan for plan in sorted(found, key=_worth)}


def _worth(plan: Plan) -> tuple[bool, float]:
    return not (plan.refittable or plan.stripped), plan.path.stat().st_mtime


def beside_onnxruntime(folder: str | Path) -> Verdict:
    """A guided step of the bundle's own size as Inductor compiled it for the smallest batch, beside ONNX Runtime's.

    The verdict is kept beside the compiled step. Raises EngineError where one of them does not run here.
    """
    folder = Path(folder)
    manifest, cuda = Manifest.load(folder, verify=False), Cuda()
    stream, size = cuda.stream(), manifest.image_size
    found = find_compiled(folder, manifest, inductor.here(), "cuda")
    batch = found.batches(manifest, size)[0]
    pair = (("inductor", inductor), (DEFAULT, onnxruntime_cuda))
    given = [one.device_engines(name, folder, manifest, cuda, lambda _: stream, batch) for name, one in pair]
    try:
        engines = [one.at(size).load(GRAPH, batch, 2) for one in given]
        spec = manifest.fixed(size).graphs[GRAPH].at({"B": batch, BRANCHES: 2})
        ours, theirs = _seconds(engines, spec, cuda, stream)
    finally:
        cuda.close()
    verdict = Verdict(EQUAL, theirs, ours, sizes=f"B={batch},{BRANCHES}=2")
    write_beside(found.plan(GRAPH, manifest, size, batch).path, verdict)
    return verdict


def _seconds(engines: list[DeviceEngine], spec: GraphSpec, cuda: Cuda, stream: Stream) -> list[float]:
    """Seconds of one launch of each engine. spec: without free axes."""
    launches: list[Callable[[Stream], None]] = []
    for engine in engines:
        inputs, outputs = (
            {tensor.name: cuda.zeros(tensor.shape, tensor.dtype) for tensor in some}  # type: ignore[arg-type]
            for some in (spec.inputs, spec.outputs)
        )
        engine.bind(inputs, outputs)
        engine.enqueue(stream)  # what is loaded at the first run is not captured
        stream.synchronize()
        graph = stream.capture(partial(engine.enqueue, stream)) if engine.capturable(stream) else None
        launches.append(engine.enqueue if graph is None else graph.launch)
        launches[-1](stream)
    taken: list[list[float]] = [[] for _ in launches]
    for _ in range(ROUNDS):
        for launch, seconds in zip(launches, taken, strict=True):
            start = stream.record(timed=True)
            for _ in range(LAUNCHES):
                launch(stream)
            end = stream.record(timed=True)
            end.synchronize()
            seconds.append(end.seconds_since(start) / LAUNCHES)
    return [statistics.median(seconds) for seconds in taken]


def report(found: list[Verdict], precision: str) -> str:
    """The figures in one sentence. Raises NotFasterError where eight bits are not faster."""
    text = ", ".join(
        f"{one.fast * 1e3:.2f} ms a step in {precision} against {one.exact * 1e3:.2f} in {OTHER} at {one.sizes}"
        for one in found
    )
    slow = [one.sizes for one in found if not one.passes]
    if slow:
        raise NotFasterError(
            f"{precision} is not faster than {OTHER} on this GPU at {' and '.join(slow)}: {text}. Leave those "
            f"--batch-sizes out, or export with --precision {OTHER}."
        )
    return f"On this GPU it takes {text}."
