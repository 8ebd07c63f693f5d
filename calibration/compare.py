"""Compares plans with float32, graph by graph, with Polygraphy, and leaves what its debugging tools need.

    hd-engines compare FOLDER --graph unet

The inputs come from a real run of the bundle. The reference is ONNX Runtime on the same graph with everything in
float32 (the same weights, so only the arithmetic differs). The candidate is the plan of this machine's GPU; without a
GPU it is ONNX Runtime on a graph that rounds wherever a GPU stores half precision. A folder gets inputs, graphs and
outputs in Polygraphy's formats, with the commands that find the nodes of a graph that go wrong.
"""

from __future__ import annotations

import os
import shlex
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper

from ..contract import Manifest
from ..engines.cuda import Cuda
from ..engines.plans import KERNELS, Plan, PlanStore
from ..engines.refit import opened
from ..engines.tensorrt import NAMES, Scratch, TensorRT, TensorRTEngine
from ..engines.tensorrt_loading import usable_plans
from ..errors import EngineError, HanDiffuserError
from .emulate import emulate
from .graphs import HALF, label, save_model, widen
from .record import Feeds, record

os.environ.setdefault("POLYGRAPHY_AUTOINSTALL_DEPS", "0")  # nothing is fetched at run time

from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, CompareFunc, RunResults
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

CALLS = 4  # recorded calls that are compared
MAY = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1, "fp8": 2e-1, "int8": 2e-1}  # error by the reference's largest value


@dataclass
class Comparison:
    """One output of one graph: its largest error relative to the reference's largest value, and what is not finite."""

    graph: str
    output: str
    error: float
    may: float
    not_finite: int
    first: str = ""  # the first node whose output is not finite, if any

    @property
    def passes(self) -> bool:
        return not self.not_finite and self.error <= self.may


def widened(model: ModelProto) -> ModelProto:
    """The graph with everything in half precision turned into float32: inputs, outputs, weights and values between."""
    out = ModelProto()
    out.CopyFrom(model)
    for tensor in out.graph.initializer:
        if tensor.data_type in HALF:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), name))
    for value in (*out.graph.input, *out.graph.output, *out.graph.value_info):
        if value.type.tensor_type.elem_type in HALF:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in out.graph.node:
        widen(node)
    return out


class PlanRunner(BaseRunner):
    """A plan as a runner of Polygraphy: bound to arrays on the GPU, run once a call."""

    def __init__(self, plan: Plan, folder: Path, manifest: Manifest, backend: TensorRT, cuda: Cuda) -> None:
        super().__init__(name=backend.name, prefix="plan")
        self.plan, self.folder, self.backend, self.cuda = plan, folder, backend, cuda
        self.spec = manifest.fixed().graphs[plan.graph]

    def activate_impl(self) -> None:
        kernels = self.plan.path.with_suffix(KERNELS)
        loaded = opened(self.backend, PlanStore(self.folder), self.plan, self.folder, self.cuda, kernels)
        self.stream = self.cuda.stream()
        self.engine = TensorRTEngine(loaded, self.spec, Scratch(self.cuda))

    def get_input_metadata_impl(self) -> Any:
        from polygraphy.common import TensorMetadata

        found = TensorMetadata()
        for tensor in self.spec.inputs:
            found.add(tensor.name, np.dtype(tensor.dtype), [-1 if isinstance(n, str) else n for n in tensor.shape])
        return found

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        started = time.perf_counter()
        cuda, sizes = self.cuda, dict[str, int]()
        given, pinned = {}, []
        for tensor in self.spec.inputs:
            value = feed_dict[tensor.name].astype(tensor.dtype)
            sizes |= {name: n for name, n in zip(tensor.shape, value.shape, strict=True) if isinstance(name, str)}
            given[tensor.name] = cuda.zeros(value.shape, tensor.dtype)
            pinned.append(cuda.pinned(value.shape, tensor.dtype))
            pinned[-1][...] = value
            self.stream.copy(given[tensor.name], pinned[-1])
        made = {}
        for tensor in self.spec.outputs:
            shape = tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
            made[tensor.name] = cuda.zeros(shape, tensor.dtype)
        self.engine.bind(given, made)
        self.engine.enqueue(self.stream)
        out = {}
        for name, array in made.items():
            out[self.engine.outputs[name]] = cuda.pinned(array.shape, array.dtype)
            self.stream.copy(out[self.engine.outputs[name]], array)
        self.stream.record().synchronize()
        self.inference_time = time.perf_counter() - started
        return {name: np.array(value) for name, value in out.items()}

    def deactivate_impl(self) -> None:
        self.engine.plan.close()


def compare(
    folder: Path, out: Path, graph: str | None = None, backend: str = "auto", calls: int = CALLS
) -> Iterator[Comparison]:
    """Yields a comparison for each output of one graph, or of all.

    folder: a bundle, with plans where a GPU is to be compared. out: where Polygraphy's files go, a folder a graph.
    Raises EngineError for an unknown graph or where there is nothing to compare, and what `record` raises.
    """
    G_LOGGER.module_severity = G_LOGGER.ERROR
    manifest = Manifest.load(folder)
    if graph is not None and graph not in manifest.graphs:
        raise EngineError(f"graph must be one of {', '.join(manifest.graphs)}, got {graph!r}.")
    plans = plans_here(folder, manifest, backend)
    if plans is None and manifest.precision == "fp32":
        raise EngineError(
            f"{folder} computes in float32, which needs a GPU to compare it with. Run this where the plans run, or "
            "on a bundle in fp16."
        )
    inputs = record(folder, calls=calls, rows=1)[0]
    for name in [graph] if graph is not None else manifest.graphs:
        yield from compare_graph(folder, manifest, name, inputs[name], out / name, plans)


def plans_here(folder: Path, manifest: Manifest, name: str) -> tuple[TensorRT, Cuda, dict[str, dict[int, Plan]]] | None:
    """The backend, GPU and plans of a folder that run on this machine; None without a GPU.

    Raises EngineError where a GPU is there without a plan for it.
    """
    try:
        cuda = Cuda()
    except EngineError:
        if name != "auto":
            raise
        return None
    store, problem = PlanStore(folder), EngineError(f"{folder} has no plans. Build some: hd-engines build {folder}.")
    for one in NAMES if name == "auto" else [name]:
        try:
            module = TensorRT(one)
            return module, cuda, usable_plans(store, manifest, module, cuda)
        except EngineError as error:
            problem = error
    raise problem


def compare_graph(
    folder: Path,
    manifest: Manifest,
    name: str,
    calls: list[Feeds],
    out: Path,
    plans: tuple[TensorRT, Cuda, dict[str, dict[int, Plan]]] | None,
) -> Iterator[Comparison]:
    """One graph: leaves reference.onnx, candidate.onnx, inputs.json, outputs.json and commands.sh in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    model = onnx.load(folder / manifest.graphs[name].file)
    reference, candidate, inputs = out / "reference.onnx", out / "candidate.onnx", out / "inputs.json"
    save_model(widened(model), reference)
    save_model(emulate(model), candidate)
    wide = [{key: v.astype(np.float32) if v.dtype == np.float16 else v for key, v in feeds.items()} for feeds in calls]
    save_json(wide, str(inputs), description="inputs of a real run")
    runners: list[BaseRunner] = [OnnxrtRunner(SessionFromOnnx(str(reference)), name="float32")]
    if plans is None:
        runners.append(OnnxrtRunner(SessionFromOnnx(str(candidate)), name="rounded"))
    else:
        backend, cuda, found = plans
        sizes = found[name]
        plan = sizes[min(sizes)]
        if name != "unet_time":
            wide = [_rows(feeds, min(sizes), manifest.graphs[name].branched) for feeds in wide]
        runners.append(PlanRunner(plan, folder, manifest, backend, cuda))
    try:
        results = Comparator.run(runners, data_loader=wide)
    except Exception as error:  # Polygraphy's and ONNX Runtime's share no base class
        if isinstance(error, HanDiffuserError):
            raise
        raise EngineError(f"{name} cannot be compared: {' '.join(str(error).split())[:300]}") from error
    results.save(str(out / "outputs.json"))
    commands(out, name, plans is not None)
    may = MAY[manifest.precision]
    yield from _judge(name, results, may, candidate, wide)


def _rows(feeds: Feeds, count: int, branched: frozenset[str]) -> Feeds:
    """Repeats a row as often as a plan takes, with both guidance branches where a call has one."""

    def fill(name: str, value: np.ndarray) -> np.ndarray:
        value = np.repeat(value[:1], count, 0)
        return np.repeat(value, 2, 1) if name in branched and value.shape[1] == 1 else value

    return {name: fill(name, value) for name, value in feeds.items()}


def _judge(name: str, results: RunResults, may: float, candidate: Path, calls: list[Feeds]) -> Iterator[Comparison]:
    """Polygraphy's largest difference of each output, relative to the largest value of the reference."""
    (_, exact), (_, got) = results
    measured = CompareFunc.simple(atol=np.inf, rtol=0, check_error_stat="max")
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # zeros and infinities are expected
        warnings.simplefilter("ignore")
        (compared,) = Comparator.compare_accuracy(results, compare_func=measured)
    ((_, iterations),) = compared.items()
    for output in exact[0]:
        largest = max(float(np.abs(one[output].astype(np.float64)).max(initial=0)) for one in exact)
        # Pixels cannot be NaN: the row's `finite` tells of a loss before them.
        pairs = [
            (np.asarray(a[output], np.float64), np.asarray(b[output], np.float64))
            for a, b in zip(exact, got, strict=True)
        ]
        bad = sum(int((b < a).sum() if output == "finite" else (~np.isfinite(b)).sum()) for a, b in pairs)
        worst = float(max(float(found[output].max_absdiff) for found in iterations))
        first = first_not_finite(candidate, calls) if bad else ""
        yield Comparison(name, output, worst / largest if largest else worst, may, bad, first)


def first_not_finite(path: Path, calls: list[Feeds]) -> str:
    """The first node of a graph, in its order, whose output is not finite in some call; "" where all are finite."""
    import onnxruntime

    model = onnx.load(path)
    kept = {value.name for value in model.graph.output}
    # Where values are rounded to half precision (see `emulate`), the node before gave too much.
    givers = {
        name.removesuffix("/computed"): label(node)
        for node in model.graph.node
        for name in node.output
        if name.endswith("/computed")
    }
    order = [
        (givers.get(name.removesuffix("/half"), label(node)), name)
        for node in model.graph.node
        for name in node.output
        if name
    ]
    for _, name in order:
        if name not in kept:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    if model.ByteSize() > 1 << 30:
        return "unknown: the graph is too large to search"
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    for feeds in calls:
        values = dict(zip(names, session.run(None, feeds), strict=True))
        for node, name in order:
            value = values.get(name)
            if value is not None and value.dtype.kind == "f" and not np.isfinite(value).all():
                return node
    return ""


def commands(out: Path, name: str, on_gpu: bool) -> None:
    """Writes what to type next: the comparison again, and Polygraphy's search for the nodes that go wrong."""
    run = "polygraphy run {} --onnxrt --load-inputs inputs.json"
    runner = "trt" if on_gpu else "onnxrt"
    check = f"polygraphy run polygraphy_debug.onnx --{runner} --validate --load-inputs layer-inputs.json"
    lines = [
        "#!/usr/bin/env bash",
        f"# {name}: what hd-engines compare did, with Polygraphy's own commands, and how to go on from there.",
        "# For TensorRT-RTX: export POLYGRAPHY_USE_TENSORRT_RTX=1",
        'set -e; cd "$(dirname "$0")"',
        "",
        "# The reference's outputs, and the candidate's beside them.",
        run.format("reference.onnx") + " --save-outputs reference.json",
        run.format("candidate.onnx") + " --load-outputs reference.json --atol 1e9 --validate",
        "",
        "# Where does it first go wrong (NaN, infinity)? Two lines keep what lies between the nodes; the third",
        "# cuts the graph down to the fewest nodes that fail `--check`.",
        "# polygraphy run candidate.onnx --onnxrt --onnx-outputs mark all --load-inputs inputs.json "
        "--save-outputs layers.json",
        "# polygraphy data merge inputs.json layers.json -o layer-inputs.json",
        "# polygraphy debug reduce candidate.onnx --mode bisect -o reduced.onnx --load-inputs inputs.json --check "
        + check,
    ]
    (out / "commands.sh").write_text("\n".join(lines) + "\n", encoding="utf-8")


def text(found: Comparison) -> str:
    """A line for a reader."""
    verdict = "ok" if found.passes else "TOO FAR" if not found.not_finite else f"{found.not_finite} NOT FINITE"
    where = f"   first at {found.first}" if found.first else ""
    return f"{found.graph:18} {found.output:14} {found.error:9.1e} (may {found.may:g})   {verdict}{where}"


def hint(out: Path) -> str:
    return f"Inputs, graphs and Polygraphy's commands are in {shlex.quote(str(out))}: see its commands.sh."
