"""Whether a plan in eight bits is worth having: a step of the UNet, timed beside float16's on the GPU that is there.

    steps = compare("engines-fp8", "engines-fp16", "tensorrt")
    print(report(steps, "fp8"))                 # or EngineError: not faster

Eight bits are not faster for being fewer: quantising costs kernels of its own, and a GPU may lack the fused ones. So it
is measured, with the graphs that a run replays, turn by turn, lest a clock that rises or falls favours one of the two.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..contract import GraphSpec, Manifest
from ..errors import EngineError
from .cuda import Cuda
from .plans import Plan, PlanStore, belongs
from .tensorrt import Backend, Scratch, TensorRTEngine

GRAPH = "unet"  # most of a picture's time
OTHER = "fp16"  # what eight bits must beat
ROUNDS, LAUNCHES = 7, 10  # the median of so many rounds counts, each of so many launches in a row


@dataclass
class Step:
    """The step of one batch size in seconds: the folder's own, and the other's."""

    sizes: str  # as in a plan's parts, "B=4,G=2"
    seconds: float
    others: float


def compare(folder: str | Path, other: str | Path, backend_name: str) -> list[Step]:
    """A step for each batch size that both folders have a plan of its own for, this backend's and for this GPU.

    folder: engines in eight bits. other: engines of the same model in float16; or the same folder, whose plans from
    before it was exported again are still there. Empty when the two have no size in common.
    Raises EngineError without a GPU, when a plan does not run here, or when the two are not of one model.
    """
    manifest, backend, cuda = Manifest.load(Path(folder), verify=False), Backend(backend_name), Cuda()
    stores = PlanStore(folder), PlanStore(other)
    ours = _plans(stores[0], backend, cuda, lambda plan: belongs(plan, manifest))
    theirs = _plans(stores[1], backend, cuda, lambda plan: plan.parts["precision"] == OTHER)
    steps = []
    for sizes in sorted(ours.keys() & theirs.keys(), key=lambda sizes: (ours[sizes].batch, sizes)):
        pair = [(store, plans[sizes]) for store, plans in zip(stores, (ours, theirs), strict=True)]
        try:
            steps.append(Step(sizes, *_seconds(pair, manifest.graphs[GRAPH], backend, cuda)))
        finally:
            cuda.close()  # graphs go before what they run
            backend.close()
    return steps


def _plans(store: PlanStore, backend: Backend, cuda: Cuda, wanted: Callable[[Plan], bool]) -> dict[str, Plan]:
    """Sizes -> the UNet's plan, of those for one size that run here; the newest of equals."""
    found = [
        plan
        for plan in store
        if plan.graph == GRAPH
        and len(plan.batches) == 1
        and (plan.parts["backend"], plan.parts["version"]) == (backend.name, backend.version)
        and backend.runs_on(plan.parts["target"], cuda)
        and not store.problem(plan, verify=False)
        and wanted(plan)
    ]
    return {plan.parts["sizes"]: plan for plan in sorted(found, key=lambda plan: plan.path.stat().st_mtime)}


def _seconds(pair: list[tuple[PlanStore, Plan]], spec: GraphSpec, backend: Backend, cuda: Cuda) -> list[float]:
    """Of one launch of each plan."""
    stream, scratch = cuda.stream(), Scratch(cuda)
    engines, graphs = [], []  # an engine must live as long as its graph
    for store, plan in pair:
        sizes = {axis: int(size) for axis, size in (part.split("=") for part in plan.parts["sizes"].split(","))}
        engine = TensorRTEngine(backend.load(store.read(plan), GRAPH, cuda), spec, scratch)
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


def report(steps: list[Step], precision: str) -> str:
    """The figures in one sentence. Raises EngineError where eight bits are not faster: then they are no gain."""
    text = ", ".join(
        f"{step.seconds * 1e3:.2f} ms a step in {precision} against {step.others * 1e3:.2f} in {OTHER} at {step.sizes}"
        for step in steps
    )
    slow = [step.sizes for step in steps if step.seconds >= step.others]
    if slow:
        raise EngineError(
            f"{precision} is not faster than {OTHER} on this GPU at {' and '.join(slow)}: {text}. Leave those "
            f"--batch-sizes out, or export with --precision {OTHER}."
        )
    return f"On this GPU it takes {text}."
