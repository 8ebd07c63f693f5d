"""Writes a bundle: exports every graph, runs it in ONNX Runtime right away, and keeps how far it is from PyTorch.

    export_bundle(Checkpoint.load("checkpoint"), Path("bundle"))

A graph over its tolerance is not written, and then neither is the bundle: everything goes into a folder beside the
target and is moved when it is complete, so that a failed export leaves an older bundle as it was.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from ..calibration.emulate import emulate
from ..calibration.graphs import save_model as save_emulation
from ..contract import MANIFEST, TOKENIZER, GraphSpec, Manifest, file_digest
from ..engines.plans import FOLDER as PLANS
from ..errors import CheckpointError, ExportError
from ..models.checkpoint import Checkpoint
from ..models.smplh import SMPLH
from .attention import fuse_attention
from .graphs import NUM_HISTORY, PRECISIONS, Graph, graphs

# Largest difference to float32 PyTorch on the same inputs, relative to the largest value of the output: an error in the
# graph is larger, and the fidelity report judges the precision. bfloat16 has 8 bits where float16 has 11, so that every
# rounding is 8 times as large. It is also emulated, which rounds after every node, as a GPU does; float16 is run by
# ONNX Runtime's CPU, which does not. Together 20 times (measured on the demo's encoder of random words: 7.3e-2 at the
# worst number, 5.9e-3 root mean square; float16 with all its roundings 6.0e-3 and 6.9e-4).
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 1e-1}
OPSET = 23  # keeps GroupNormalization and Attention whole; ONNX Runtime >= 1.23 runs it
EXTERNAL = 1 << 30  # bytes of weights above which they go into a file beside the graph (protobuf ends at 2 GB)
COMPACT = 1024  # elements from which a tensor is worth storing in half


@dataclass
class Exported:
    """What one graph's export came to."""

    name: str
    error: float  # largest difference to PyTorch relative to the largest value, over all outputs
    tolerance: float
    megabytes: float
    seconds: float
    emulated: bool = False  # bfloat16, of which ONNX Runtime's CPU has no kernels: rounded in a float32 graph instead


def export_bundle(
    checkpoint: Checkpoint,
    out: Path,
    precision: str = "fp32",
    body: Path | None = None,
    opset: int = OPSET,
    source: dict[str, str] | None = None,
    on_graph: Callable[[Exported], Any] = lambda _: None,
) -> list[Exported]:
    """Exports a checkpoint into the folder `out`.

    precision: of the networks, one of PRECISIONS; hand features and all state stay float32. body: an SMPL-H `.npz`;
    without it the checkpoint's own is used. source: what it is made from (see `source.py`), kept in the manifest.
    on_graph: called after each graph. Plans that were built from an older bundle in `out` stay: those that still fit
    are used again.
    Raises CheckpointError without a body, ExportError for a graph over its tolerance or a folder that is no bundle.
    """
    if precision not in PRECISIONS:
        raise ExportError(f"Precision {precision!r} is unknown; there are {', '.join(PRECISIONS)}.")
    path = body or checkpoint.body
    if path is None:
        raise CheckpointError(
            "This checkpoint has no body model of its own. Give the SMPL-H .npz that it was trained with: --body FILE."
        )
    smplh = SMPLH.load(path)
    check_target(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        results: list[Exported] = []
        specs: dict[str, GraphSpec] = {}
        pairs = zip(graphs(checkpoint, smplh, PRECISIONS[precision]), graphs(checkpoint, smplh), strict=True)
        for graph, reference in pairs:
            began = time.monotonic()
            spec = export_graph(graph, work, opset)
            tolerance = TOLERANCE["fp32" if graph.name == "hand_features" else precision]
            error, worst = parity(graph, reference.module, work / spec.file)
            spec.parity = {"error": float(f"{error:.3g}"), "tolerance": tolerance, "tensor": worst}
            if precision == "bf16" and graph.name != "hand_features":
                spec.parity["emulated"] = True
            if not error <= tolerance:
                raise ExportError(
                    f"{graph.name} is {error:.2g} from PyTorch in {worst!r} (tolerance {tolerance:g}), so nothing was "
                    + (
                        "written. Export with --precision fp32."
                        if precision != "fp32"
                        else "written. Please report this with your versions of torch, onnx and onnxruntime."
                    )
                )
            size = sum(file.stat().st_size for file in work.glob(f"{graph.name}.onnx*"))
            seconds, emulated = time.monotonic() - began, "emulated" in spec.parity
            results.append(Exported(graph.name, error, tolerance, size / 1e6, seconds, emulated))
            specs[graph.name] = spec
            on_graph(results[-1])
        checkpoint.tokenizer.no_truncation()
        checkpoint.tokenizer.no_padding()
        checkpoint.tokenizer.save(str(work / TOKENIZER))
        manifest = Manifest(
            graphs=specs,
            files={file.name: file_digest(file) for file in sorted(work.iterdir())},
            precision=precision,
            image_size=checkpoint.image_size,
            latent_size=(checkpoint.unet.config.in_channels, *checkpoint.latent_size),
            num_history=dict(NUM_HISTORY),
            schedules={
                "hand_prior": plain(checkpoint.hand_scheduler),
                "unet": plain(checkpoint.scheduler),
            },
            defaults=dict(checkpoint.defaults),
            tokenizer=dict(checkpoint.special_tokens),
            params_mean=checkpoint.hand_prior.mean.tolist(),
            params_std=checkpoint.hand_prior.std.tolist(),
            made_by={
                "checkpoint": checkpoint.name,
                "body": "the demo's own, licence-free" if body is None else "the user's: not for redistribution",
                "opset": opset,
                **({} if source is None else {"source": source}),
                **{name: version(name) for name in ("handiffuser", "torch", "diffusers", "onnxruntime")},
            },
        )
        manifest.save(work)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    install(work, out)
    return results


def check_target(out: Path) -> None:
    """Raises ExportError for a folder that holds something else than a bundle."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).exists())):
        raise ExportError(f"{out} exists and is no bundle. Choose another folder, or empty that one.")


def install(work: Path, out: Path) -> None:
    """Puts a finished bundle into the place of an older one, whose plans it takes over."""
    if (out / PLANS).exists():
        (out / PLANS).replace(work / PLANS)
    if out.exists():
        shutil.rmtree(out)
    work.replace(out)


def plain(schedule: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration without diffusers' private entries."""
    return {key: value for key, value in schedule.items() if not key.startswith("_")}


def export_graph(graph: Graph, folder: Path, opset: int) -> GraphSpec:
    """Exports one module with its free axes into `<name>.onnx` and returns its contract."""
    names = list(graph.inputs)
    # The graph's own outputs may not bear an input's name; the contract's order is what counts.
    outputs = [f"next_{name}" if name in names else name for name in graph.outputs]
    program = torch.onnx.export(
        graph.module,
        tuple(graph.inputs.values()),
        input_names=names,
        output_names=outputs,
        dynamic_shapes=graph.dynamic_shapes(),
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    compact(program.model)
    fuse_attention(program.model)
    save_model(program.model, folder / f"{graph.name}.onnx")
    with torch.no_grad():
        values = run_module(graph.module, list(graph.inputs.values()))
    return GraphSpec(
        f"{graph.name}.onnx",
        [graph.spec(name, value) for name, value in graph.inputs.items()],
        [graph.spec(name, value) for name, value in zip(graph.outputs, values, strict=True)],
    )


def run_module(module: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    result = module(*inputs)
    return result if isinstance(result, tuple) else (result,)


def compact(model: ir.Model) -> None:
    """Stores float32 weights that are exactly representable in half precision as such, behind a Cast.

    A checkpoint that ships in half precision so gives a float32 bundle of half the size, bit for bit the same; ONNX
    Runtime and TensorRT fold the casts when they load the graph.
    """
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < COMPACT:
            continue
        array = tensor.numpy()
        with np.errstate(over="ignore"):
            small = array.astype(np.float16)
        if not np.array_equal(small.astype(np.float32), array):
            continue
        stored = ir.Value(
            name=f"{name}_half",
            shape=value.shape,
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=ir.tensor(small, name=f"{name}_half"),
        )
        cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT})
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, value.type
        value.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[name]
        cast.outputs[0].name = name
        graph.initializers[f"{name}_half"] = stored
        graph.insert_before(graph[0], cast)


def save_model(model: ir.Model, path: Path) -> None:
    """Writes the graph; its weights go into `<name>.onnx.data` where protobuf could not hold them."""
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    for node in model.graph:  # traces of our source files would only name folders of the machine that exported
        node.metadata_props.clear()
        node.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    ir.save(model, path, external_data=path.name + ".data" if weights > EXTERNAL else None)


def parity(graph: Graph, reference: nn.Module, path: Path) -> tuple[float, str]:
    """Largest difference between the file in ONNX Runtime and float32 PyTorch, relative to each output's largest value.

    Two sizes of every free axis are tried, so that one that was baked in is found. Returns the error and the worst
    tensor.
    ONNX Runtime's CPU cannot run bfloat16: such a graph's emulation is run, see `emulate`.
    """
    session = open_session(path)
    worst, where = 0.0, graph.outputs[0]
    wanted = [info.name for info in session.get_inputs()]
    for smallest in (False, True):
        inputs = graph.inputs
        if smallest:
            inputs = {n: (v[:, -1:] if n in graph.branched else v)[:1].contiguous() for n, v in inputs.items()}
        with torch.no_grad():
            exact = run_module(reference, [v.float() if v.is_floating_point() else v for v in inputs.values()])
        # numpy has no bfloat16, and an emulation takes float32.
        given = {n: v.float() if v.dtype == torch.bfloat16 else v for n, v in inputs.items()}
        got = session.run(None, {name: given[name].numpy() for name in wanted})
        for name, ours, theirs in zip(graph.outputs, got, exact, strict=True):
            difference = np.abs(ours.astype(np.float64) - theirs.double().numpy())
            if ours.dtype == np.uint8:
                # Rounding to 8 bits may fall to either side: one level is no error, what counts is the mean.
                error = float(difference.mean() / 255) if difference.max() <= 1 else float(difference.max() / 255)
            else:
                error = float(difference.max() / max(theirs.abs().max().item(), 1e-12))
            if not error <= worst:
                worst, where = error, name
    return worst, where


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """The graph on the CPU; the emulation of one that computes in bfloat16."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Packed copies of the weights pay off over many runs; this one runs twice, beside PyTorch's copies.
    options.add_session_config_entry("session.disable_prepacking", "1")
    model = onnx.load(path, load_external_data=False)
    with TemporaryDirectory(dir=path.parent) as folder:
        if any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in model.graph.initializer):
            emulation = Path(folder) / path.name
            save_emulation(emulate(onnx.load(path)), emulation)
            path = emulation
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def at_image_size(checkpoint: Checkpoint, height: int, width: int) -> Checkpoint:
    """The same checkpoint for pictures of another size (raises CheckpointError where it does not fit)."""
    changed = copy.copy(checkpoint)
    changed.image_size = (height, width)
    changed.check()
    return changed
