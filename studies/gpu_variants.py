"""A step and a decoder of Stable Diffusion 1.5's size in ONNX Runtime: each graph with each option, warm runs only.

    python studies/gpu_variants.py weights WORK                          # random numbers for the graphs; seconds
    python studies/gpu_variants.py run WORK unet derived --batch 1       # one line of JSON
    python studies/gpu_variants.py table WORK

The graphs are those of tests/engines/sd15, which hd-export made, so nothing is exported here. `--model FOLDER` takes a
bundle instead. Without a GPU the same graphs run on the CPU, with the definitions of contributed operators. A variant's
outputs are compared with those of the bundle's own graph. `benchmarks/gpu.sh b` calls it.
"""

from __future__ import annotations

import gzip
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from handiffuser.contract import CONTEXT, SIDES, Manifest

GRAPHS = Path(__file__).parents[1] / "tests" / "engines" / "sd15"
NAMES = ("unet", "image_decoder")
POOL = 1 << 22  # random numbers that all weights are cut from
ROUNDS, RUNS = 7, 10  # the median of so many rounds counts, each of so many runs in a row
FAR = 2e-2  # relative to the largest value; two roundings of float16 through such a network


@dataclass(frozen=True)
class Variant:
    """Whether the graph is the derived one, options of the CUDA provider, and whether it replays a CUDA graph."""

    derived: bool
    options: dict[str, str] = field(default_factory=dict)
    replays: bool = False


VARIANTS = {
    "bundle": Variant(False),
    "derived": Variant(True),
    "derived-graph": Variant(True, replays=True),
    "derived-bias": Variant(True, {"fuse_conv_bias": "1"}),
    "derived-search": Variant(True, {"cudnn_conv_algo_search": "EXHAUSTIVE"}),
    "bundle-nhwc": Variant(False, {"prefer_nhwc": "1"}),
    "derived-all": Variant(True, {"fuse_conv_bias": "1", "cudnn_conv_algo_search": "EXHAUSTIVE"}, replays=True),
}


def filled(name: str, folder: Path) -> Path:
    """Writes the graph with random weights, which keep the size of what runs through; returns its path."""
    import onnx

    model = onnx.load_model_from_string(gzip.decompress((GRAPHS / f"{name}.onnx.gz").read_bytes()))
    pool, path, begin = np.random.default_rng(0).standard_normal(POOL).astype(np.float32), folder / f"{name}.onnx", 0
    with open(folder / f"{name}.onnx.data", "wb") as file:
        for tensor in model.graph.initializer:
            kind, shape = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
            outside = tensor.data_location == onnx.TensorProto.EXTERNAL
            if not (outside or (np.issubdtype(kind, np.floating) and len(tensor.raw_data) > 64)):
                continue
            size, begin = int(np.prod(shape)), (begin + 7919) % POOL
            numbers = np.resize(np.roll(pool, -begin), size).reshape(shape)
            if len(shape) in (2, 4):
                numbers = numbers / np.sqrt(np.prod(shape[1:]) if len(shape) == 4 else shape[0])
            else:  # scales of norms are about 1, biases about 0
                numbers = 0.1 * numbers + ("weight" in tensor.name or "scale" in tensor.name)
            content = numbers.astype(kind).tobytes()
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            place = {"location": f"{name}.onnx.data", "offset": str(file.tell()), "length": str(len(content))}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=value)
            file.write(content)
    onnx.save(model, path)
    return path


def session(path: Path, variant: Variant, sizes: dict[str, int]) -> tuple[Any, str]:
    """An ONNX Runtime session, and where it runs."""
    import onnx
    import onnxruntime
    from handiffuser.engines.derived import derive
    from handiffuser.engines.standins import expanded

    device = "cuda" if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "cpu"
    if device == "cuda":
        onnxruntime.preload_dlls()
    sides = {axis: size for axis, size in sizes.items() if axis in (*SIDES, CONTEXT)}
    model = derive(path, sides) if variant.derived else onnx.load(str(path), load_external_data=False)
    if device == "cpu":
        model = expanded(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.absolute().parent)
    )
    for axis, size in sizes.items():
        options.add_free_dimension_override_by_name(axis, size)
    choices = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "1", "enable_skip_layer_norm_strict_mode": "1"}
    choices |= variant.options | ({"enable_cuda_graph": "1"} if variant.replays else {})
    providers = [("CUDAExecutionProvider", choices)] if device == "cuda" else []
    content = model.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=[*providers, "CPUExecutionProvider"]), device


def sizes_of(path: Path, batch: int) -> dict[str, int]:
    """The sizes of a graph's free axes. A bundle's graphs take its own pictures, and prompts of one chunk."""
    import onnx

    sizes = {"B": batch, "G": 2}
    if (path.parent / "manifest.json").exists():
        sizes |= Manifest.load(path.parent, verify=False).sides()
    graph = onnx.load(str(path), load_external_data=False).graph
    axes = {dim.dim_param for one in (*graph.input, *graph.output) for dim in one.type.tensor_type.shape.dim}
    return {axis: size for axis, size in sizes.items() if axis in axes}


def inputs_of(found: Any, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """The same random inputs for every variant."""
    random, kinds = np.random.default_rng(1), {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    shapes = {one.name: [sizes.get(n, n) for n in one.shape] for one in found.get_inputs()}
    return {one.name: random.standard_normal(shapes[one.name]).astype(kinds[one.type]) for one in found.get_inputs()}


def timed(found: Any, device: str, given: dict[str, np.ndarray], rounds: int, runs: int) -> tuple[float, list]:
    """(ms of a run, the outputs). On a GPU inputs and outputs stay there."""
    import onnxruntime

    if device == "cpu":
        outputs = found.run(None, given)
        started = time.process_time()
        for _ in range(rounds):
            found.run(None, given)
        return 1e3 * (time.process_time() - started) / rounds, outputs
    binding = found.io_binding()
    held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value, "cuda", 0) for name, value in given.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for one in found.get_outputs():
        binding.bind_output(one.name, "cuda")
    found.run_with_iobinding(binding)
    first = binding.get_outputs()
    for one, value in zip(found.get_outputs(), first, strict=True):  # a captured graph needs them in one place
        binding.bind_ortvalue_output(one.name, value)
    quiet = onnxruntime.RunOptions()
    quiet.add_run_config_entry("disable_synchronize_execution_providers", "1")
    taken = []
    for _ in range(rounds):
        binding.synchronize_inputs()
        started = time.perf_counter()
        for _ in range(runs):
            found.run_with_iobinding(binding, quiet)
        binding.synchronize_outputs()
        taken.append(1e3 * (time.perf_counter() - started) / runs)
    return statistics.median(taken), [value.numpy() for value in first]


def error_of(ours: list, reference: list) -> float:
    """The largest difference of an output relative to its largest value; NaN where one is not finite.

    Of pictures, uint8: relative to 255, so that one level is 1 / 255 in a dark picture, too.
    """
    worst = 0.0
    for mine, theirs in zip(ours, reference, strict=True):
        most = 255.0 if theirs.dtype == np.uint8 else max(float(np.abs(theirs).max()), 1e-9)
        mine, theirs = mine.astype(np.float64), theirs.astype(np.float64)
        if not np.isfinite(mine).all():
            return float("nan")
        worst = max(worst, float(np.abs(mine - theirs).max() / most))
    return worst


@click.group()
def commands() -> None:
    """Variants of ONNX Runtime's step and decoder on this machine."""


@commands.command()
@click.argument("work", type=click.Path(path_type=Path))
def weights(work: Path) -> None:
    """Writes the graphs with random weights."""
    work.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        filled(name, work)


@commands.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.argument("graph", type=click.Choice(NAMES))
@click.argument("variant", type=click.Choice(list(VARIANTS)))
@click.option("--batch", default=1)
@click.option("--model", type=click.Path(path_type=Path), help="A bundle, in place of random weights.")
@click.option("--quick", is_flag=True)
def run(work: Path, graph: str, variant: str, batch: int, model: Path | None, quick: bool) -> None:
    """Times one variant, and compares its outputs with the variant `bundle`, which runs first."""
    work.mkdir(parents=True, exist_ok=True)
    path = (model or work) / f"{graph}.onnx"
    sizes, started = sizes_of(path, batch), time.monotonic()
    found, device = session(path, VARIANTS[variant], sizes)
    given = inputs_of(found, sizes)
    ready = time.monotonic() - started
    milliseconds, outputs = timed(found, device, given, 1 if quick else ROUNDS, 2 if quick else RUNS)
    if variant == "bundle":
        np.savez(work / f"{graph}-{batch}.npz", *outputs)
    line = {
        "graph": graph, "variant": variant, "batch": batch, "device": device, "ms": round(milliseconds, 3),
        "ready_s": round(ready, 1),
    }  # fmt: skip
    note(work, line, outputs)


def note(work: Path, line: dict[str, Any], outputs: list[np.ndarray]) -> None:
    """Writes a variant's figures into WORK, with its error beside the variant `bundle`, and checks the error."""
    name = f"{line['graph']}-{line['batch']}"
    with np.load(work / f"{name}.npz") as kept:
        line["error"] = error_of(outputs, list(kept.values()))
    (work / f"{name}-{line['variant']}.json").write_text(json.dumps(line))
    click.echo(json.dumps(line))
    check(line)


def check(line: dict[str, Any]) -> None:
    """Ends the process where the outputs of a variant are too far from the bundle's."""
    if not line["error"] <= (1 / 255 if line["graph"] == "image_decoder" else FAR):
        raise SystemExit(
            f"{line['variant']} of {line['graph']} must be near the bundle's graph, got an error of "
            f"{line['error']:.1e}."
        )


def decide(lines: list[dict[str, Any]]) -> list[str]:
    """What the figures mean for this project."""
    if any(one["device"] != "cuda" for one in lines):
        return ["A CPU decides nothing."]
    said = []
    for graph, batch in sorted({(one["graph"], one["batch"]) for one in lines}):
        taken = {one["variant"]: one["ms"] for one in lines if (one["graph"], one["batch"]) == (graph, batch)}
        if not {"bundle", "derived"} <= set(taken):
            continue
        best = min(taken, key=taken.__getitem__)
        gain = taken["bundle"] / taken["derived"]
        said.append(
            f"{graph}, {batch} pictures: the derived graph is {gain:.2f} times as fast as the bundle's; "
            f"the fastest variant is {best} with {taken[best]:.2f} ms."
        )
        if gain < 1:
            said.append(f"{graph}, {batch} pictures: take the derived graph out again: it is slower.")
        if taken[best] < 0.97 * taken["derived"] and best.startswith("derived"):
            said.append(f"{graph}, {batch} pictures: make the options of {best} the default.")
    return said


def built(line: dict[str, Any]) -> str:
    """What a build took, of a variant that has one."""
    return f", built in {line['build_s']:.0f} s" if "build_s" in line else ""


@commands.command()
@click.argument("work", type=click.Path(path_type=Path))
def table(work: Path) -> None:
    """Prints all results and what they mean."""
    lines = [json.loads(path.read_text()) for path in sorted(work.glob("*-*.json"))]
    for one in sorted(lines, key=lambda one: (one["graph"], one["batch"], one["ms"])):
        click.echo(
            f"{one['graph']:14} {one['batch']:2} {one['variant']:16} {one['ms']:9.3f} ms   error {one['error']:.1e}   "
            f"ready after {one['ready_s']:.0f} s{built(one)} ({one['device']})"
        )
    click.echo("\n".join(decide(lines)))


if __name__ == "__main__":
    commands()
