"""A step and a decoder of Stable Diffusion 1.5's size in TensorRT: a plan of the same graph, warm runs only.

    python studies/gpu_variants.py run WORK unet bundle --batch 1        # the outputs that a plan's are compared with
    python studies/gpu_plans.py build WORK unet tensorrt --batch 1       # minutes; what is built stays in WORK
    python studies/gpu_plans.py run WORK unet tensorrt --batch 1         # one line of JSON, as gpu_variants prints

The step is replayed from a CUDA graph, as `hd-run` does. `benchmarks/gpu.sh b` calls it for each TensorRT that is
installed and runs on the GPU.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from gpu_variants import NAMES, ROUNDS, RUNS, note, sizes_of
from handiffuser.contract import GraphSpec, TensorSpec
from handiffuser.engines.backends import GPU_PLANNED
from handiffuser.engines.base import DeviceEngine
from handiffuser.engines.build import gpu
from handiffuser.engines.cuda import Cuda
from handiffuser.engines.tensorrt import Options, Scratch, TensorRT, TensorRTEngine
from handiffuser.engines.tensorrt_build import build_plan

# ONNX's numbers of element types.
DTYPES = {1: "float32", 2: "uint8", 7: "int64", 10: "float16"}


def runs_here(backend: str) -> bool:
    """Whether a backend builds and runs plans on this machine's GPU."""
    cuda = gpu()
    return cuda is not None and not TensorRT(backend).refusal(cuda)


def spec_of(path: Path, sizes: dict[str, int]) -> GraphSpec:
    """The tensors of a graph for these sizes, under the names in its file."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph

    def tensors(values: Any) -> list[TensorSpec]:
        return [
            TensorSpec(
                value.name,
                DTYPES[value.type.tensor_type.elem_type],
                tuple(sizes.get(dim.dim_param, dim.dim_value) for dim in value.type.tensor_type.shape.dim),
            )
            for value in values
        ]

    return GraphSpec(path.name, tensors(graph.input), tensors(graph.output))


def precision_of(path: Path) -> str:
    import onnx

    weights = onnx.load(str(path), load_external_data=False).graph.initializer
    return "fp16" if any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in weights) else "fp32"


def timed(plan: bytes, spec: GraphSpec, backend: TensorRT, rounds: int, runs: int) -> tuple[float, list[np.ndarray]]:
    """(ms of a replay of a plan, the outputs)."""

    def engine(cuda: Cuda) -> DeviceEngine:
        return TensorRTEngine(backend.load(plan, Path(spec.file).stem, cuda), spec, Scratch(cuda))

    try:
        return replayed(Cuda(), engine, spec, rounds, runs)
    finally:
        backend.close()


def replayed(
    cuda: Cuda, make: Callable[[Cuda], DeviceEngine], spec: GraphSpec, rounds: int, runs: int
) -> tuple[float, list[np.ndarray]]:
    """(ms of a replay of an engine, the outputs), on the inputs of `gpu_variants.inputs_of`. Frees what it used."""
    random = np.random.default_rng(1)
    try:
        stream, engine = cuda.stream(first=True), make(cuda)
        arrays = {t.name: cuda.zeros(t.shape, t.dtype) for t in (*spec.inputs, *spec.outputs)}
        for tensor in spec.inputs:
            pinned = cuda.pinned(tensor.shape, tensor.dtype)
            pinned[...] = random.standard_normal(tensor.shape).astype(tensor.dtype)
            stream.copy(arrays[tensor.name], pinned)
            stream.synchronize()
        engine.bind({t.name: arrays[t.name] for t in spec.inputs}, {t.name: arrays[t.name] for t in spec.outputs})
        engine.enqueue(stream)  # what is loaded at the first run is not captured
        stream.synchronize()
        graph = stream.capture(partial(engine.enqueue, stream))
        if graph is None:
            raise SystemExit(f"A run of {spec.file} could not be captured.")
        taken = []
        for _ in range(rounds):
            start = stream.record(timed=True)
            for _ in range(runs):
                graph.launch(stream)
            end = stream.record(timed=True)
            end.synchronize()
            taken.append(1e3 * end.seconds_since(start) / runs)
        outputs = []
        for tensor in spec.outputs:
            pinned = cuda.pinned(tensor.shape, tensor.dtype)
            stream.copy(pinned, arrays[tensor.name])
            stream.synchronize()
            outputs.append(pinned.copy())
        return statistics.median(taken), outputs
    finally:
        cuda.close()


@click.group()
def commands() -> None:
    """Plans of TensorRT on this machine."""


def arguments(command: Any) -> Any:
    for one in (
        click.option("--model", type=click.Path(path_type=Path), help="A bundle, in place of random weights."),
        click.option("--batch", default=1),
        click.argument("backend", type=click.Choice(GPU_PLANNED)),
        click.argument("graph", type=click.Choice(NAMES)),
        click.argument("work", type=click.Path(path_type=Path)),
    ):
        command = one(command)
    return command


@commands.command()
@arguments
def build(work: Path, graph: str, backend: str, batch: int, model: Path | None) -> None:
    """Builds a plan into WORK."""
    path = (model or work) / f"{graph}.onnx"
    started = time.monotonic()
    plan, proof = build_plan(
        TensorRT(backend), path, sizes_of(path, batch), precision_of(path), Options(), timing_cache=work / "timings"
    )
    seconds, file = round(time.monotonic() - started, 1), work / f"{graph}-{batch}-{backend}.plan"
    file.write_bytes(plan)
    file.with_suffix(".built").write_text(json.dumps({"build_s": seconds}))
    click.echo(f"{len(proof['layers'])} layers, {len(plan) / 1e6:.0f} MB, {seconds:.0f} s")


@commands.command()
@arguments
@click.option("--quick", is_flag=True)
def run(work: Path, graph: str, backend: str, batch: int, model: Path | None, quick: bool) -> None:
    """Times a plan, and compares its outputs with those of `gpu_variants.py run WORK GRAPH bundle`."""
    started, file = time.monotonic(), work / f"{graph}-{batch}-{backend}.plan"
    plan = file.read_bytes()
    path = (model or work) / f"{graph}.onnx"
    spec = spec_of(path, sizes_of(path, batch))
    loaded = TensorRT(backend)
    milliseconds, outputs = timed(plan, spec, loaded, 1 if quick else ROUNDS, 2 if quick else RUNS)
    line = {
        "graph": graph, "variant": backend, "batch": batch, "device": "cuda", "ms": round(milliseconds, 3),
        "ready_s": round(time.monotonic() - started, 1), **json.loads(file.with_suffix(".built").read_text()),
    }  # fmt: skip
    note(work, line, outputs)


if __name__ == "__main__":
    commands()
