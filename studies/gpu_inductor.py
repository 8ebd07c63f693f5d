"""A step and a decoder of Stable Diffusion 1.5's size as Inductor compiles them: the same graph, warm runs only.

    python studies/gpu_variants.py run WORK unet bundle --batch 1        # the outputs that Inductor's are compared with
    python studies/gpu_inductor.py build WORK unet --batch 1             # minutes; what is compiled stays in WORK
    python studies/gpu_inductor.py run WORK unet --batch 1               # one line of JSON, as gpu_variants prints

`build` compiles as `hd-export --backend inductor` does, for one shape with channels last, and notes what that took.
The step is replayed from a CUDA graph, as `hd-run` does. `benchmarks/gpu.sh b` calls it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from gpu_plans import replayed, spec_of
from gpu_variants import NAMES, ROUNDS, RUNS, note, sizes_of
from handiffuser.contract import GraphSpec
from handiffuser.engines.cuda import Cuda


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def inputs_for(spec: GraphSpec) -> list[np.ndarray]:
    """The inputs of `gpu_variants.inputs_of`."""
    random = np.random.default_rng(1)
    return [random.standard_normal(one.shape).astype(one.dtype) for one in spec.inputs]


def compile_here(path: Path, file: Path, batch: int) -> None:
    """Compiles a graph into `file`, and writes its weights beside it."""
    import torch
    from handiffuser.export.graphs import Graph
    from handiffuser.export.inductor import compile_graph, save_weights
    from onnx_torch import OnnxModule

    sizes = sizes_of(path, batch)
    spec = spec_of(path, sizes)
    given = {one.name: torch.from_numpy(value) for one, value in zip(spec.inputs, inputs_for(spec), strict=True)}
    graph = Graph(path.stem, OnnxModule(path, sizes).eval(), given, tuple(one.name for one in spec.outputs))
    save_weights(compile_graph(graph, file, device(), {"B": batch}), file.with_suffix(".weights"))


def timed(file: Path, spec: GraphSpec, rounds: int, runs: int) -> tuple[float, list[np.ndarray]]:
    """(ms of a run, the outputs): of a replay on a GPU, of processor time without one."""
    from handiffuser.engines.inductor import InductorDeviceEngine, InductorEngine, new_pool
    from safetensors.torch import load_file

    where = device()
    # Convolutions' weights lie with channels last in the file: see `export.inductor.laid`.
    weights = {
        name: one.permute(0, 3, 1, 2) if one.dim() == 4 else one
        for name, one in load_file(file.with_suffix(".weights"), device=where).items()
    }
    engine = InductorEngine(file, spec, where, asynchronous=where == "cuda", weights=weights)
    if where == "cuda":
        return replayed(Cuda(), lambda _: InductorDeviceEngine(engine, new_pool()), spec, rounds, runs)
    feeds = {one.name: value for one, value in zip(spec.inputs, inputs_for(spec), strict=True)}
    found = engine(feeds)
    started = time.process_time()
    for _ in range(rounds):
        engine(feeds)
    return 1e3 * (time.process_time() - started) / rounds, [found[one.name] for one in spec.outputs]


@click.group()
def commands() -> None:
    """What Inductor compiles on this machine."""


def arguments(command: Any) -> Any:
    for one in (
        click.option("--model", type=click.Path(path_type=Path), help="A bundle, in place of random weights."),
        click.option("--batch", default=1),
        click.argument("graph", type=click.Choice(NAMES)),
        click.argument("work", type=click.Path(path_type=Path)),
    ):
        command = one(command)
    return command


@commands.command()
@arguments
def build(work: Path, graph: str, batch: int, model: Path | None) -> None:
    """Compiles a graph into WORK."""
    file, started = work / f"{graph}-{batch}-inductor.pt2", time.monotonic()
    compile_here((model or work) / f"{graph}.onnx", file, batch)
    seconds = round(time.monotonic() - started, 1)
    file.with_suffix(".built").write_text(json.dumps({"build_s": seconds}))
    click.echo(f"{file.stat().st_size / 1e6:.0f} MB of code, {seconds:.0f} s")


@commands.command()
@arguments
@click.option("--quick", is_flag=True)
def run(work: Path, graph: str, batch: int, model: Path | None, quick: bool) -> None:
    """Times what is compiled, and compares its outputs with those of `gpu_variants.py run WORK GRAPH bundle`."""
    started, file = time.monotonic(), work / f"{graph}-{batch}-inductor.pt2"
    path = (model or work) / f"{graph}.onnx"
    spec = spec_of(path, sizes_of(path, batch))
    milliseconds, outputs = timed(file, spec, 1 if quick else ROUNDS, 2 if quick else RUNS)
    line = {
        "graph": graph, "variant": "inductor", "batch": batch, "device": device(), "ms": round(milliseconds, 3),
        "ready_s": round(time.monotonic() - started, 1), **json.loads(file.with_suffix(".built").read_text()),
    }  # fmt: skip
    note(work, line, outputs)


if __name__ == "__main__":
    commands()
