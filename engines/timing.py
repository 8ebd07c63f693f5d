"""Times a step of the UNet in eight bits beside float16 on this machine's GPU: see `verdict.py`.

    found = compare("engines-fp8", "engines-fp16", "tensorrt")
    print(report(found, "fp8"))                 # or EngineError: not faster

Eight bits can be slower: quantising costs kernels of its own, and a GPU may lack the fused ones. The two are measured
with the graphs that a run replays, in turns, so that a clock that rises or falls favours neither.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..contract import GraphSpec, Manifest
from ..errors import EngineError
from .cuda import Cuda
from .plans import Plan, PlanStore, belongs
from .tensorrt import Scratch, TensorRT, TensorRTEngine
from .verdict import EQUAL, Verdict

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
    theirs = _plans(stores[1], backend, cuda, lambda plan: plan.parts["precision"] == OTHER)
    steps = []
    for sizes in sorted(ours.keys() & theirs.keys(), key=lambda sizes: (ours[sizes].batch, sizes)):
        pair = [(store, plans[sizes]) for store, plans in zip(stores, (ours, theirs), strict=True)]
        try:
            ours_took, theirs_took = _seconds(pair, manifest.graphs[GRAPH], backend, cuda)
            steps.append(Verdict(EQUAL, theirs_took, ours_took, sizes=sizes))
        finally:
            cuda.close()  # frees the graphs before their engines
            backend.close()
    return steps


def _plans(store: PlanStore, backend: TensorRT, cuda: Cuda, wanted: Callable[[Plan], bool]) -> dict[str, Plan]:
    """Sizes -> the UNet's plan, of those for one size that run here; the newest of equals."""
    found = [
        plan
        for plan in store
        if plan.graph == GRAPH
        and len(plan.batches) == 1
        and backend.takes(plan, cuda)
        and not store.problem(plan, verify=False)
        and wanted(plan)
    ]
    return {plan.parts["sizes"]: plan for plan in sorted(found, key=lambda plan: plan.path.stat().st_mtime)}


def _seconds(pair: list[tuple[PlanStore, Plan]], spec: GraphSpec, backend: TensorRT, cuda: Cuda) -> list[float]:
    """Seconds of one launch of each plan."""
    stream, scratch = cuda.stream(), Scratch(cuda)
    engines, graphs = [], []  # an engine must live as long as its graph
    for store, plan in pair:
        sizes = {axis: int(size) for axis, size in (part.split("=") for part in plan.parts["sizes"].split(","))}
        loaded = backend.load(store.read(plan), GRAPH, cuda, host_code=plan.version_compatible)
        engine = TensorRTEngine(loaded, spec, scratch)
        inputs, outputs = (
            {t.name: cuda.zeros(tuple(sizes[n] if isinstance(n, str) else n for n in t.shape), t.dtype) for t in some}
            for some in (spec.inputs, spec.outputs)
        )
        engine.bind(inputs, outputs)
        engine.enqueue(stream)  # what is loaded at the first run is not captured
        stream.synchronize()
        graph = stream.capture(partial(engine.enqueue, stream))
        if graph is None:
            raise EngineError(f"The plan {plan.path.name} could not be captured, so it was not timed.")
        graph.launch(stream)
        engines.append(engine)
        graphs.append(graph)
    taken: list[list[float]] = [[] for _ in graphs]
    for _ in range(ROUNDS):
        for graph, seconds in zip(graphs, taken, strict=True):
            start = stream.record(timed=True)
            for _ in range(LAUNCHES):
                graph.launch(stream)
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
