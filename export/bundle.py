"""Writes a bundle: exports every graph, runs it in ONNX Runtime right away, and notes how far it is from PyTorch.

    export_bundle(Checkpoint.load("checkpoint"), Path("bundle"))

A graph over its tolerance is not written, and neither is the bundle. Everything goes into a workspace beside the target
and moves there when it is complete, so a failed export leaves an older bundle unchanged. ONNX Runtime runs in a process
of its own, and the export reports its crash.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import itertools
import mmap
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import DeduplicateInitializersPass
from torch import Tensor, nn

from ..contract import (
    BRANCHES,
    EXTERNAL,
    MANIFEST,
    NUM_HISTORY,
    SIDES,
    TOKENIZER,
    GraphSpec,
    Manifest,
    TensorSpec,
    file_digest,
)
from ..errors import CheckpointError, ExportError
from ..files import open_to_others
from ..models.checkpoint import Checkpoint
from ..models.smplh import SMPLH
from ..shipped import is_demo_body
from .attention import fuse_attention
from .branches import share_branches
from .check import forget_peak, peak_memory, run_apart
from .check import version as onnxruntime_version
from .graphs import PRECISIONS, Graph, graphs
from .kept import Shelf, keys
from .norms import write_out_norms
from .sizes import at_example, memory_of, name_sides, settle, side_symbols
from .upsampling import fold_upsampling
from .weights import record_weights
from .workspace import install, workspace

# Largest difference to float32 PyTorch on the same inputs, relative to the largest value of the output. An error in the
# graph is larger; `engines/verdict.py` judges the precision. bfloat16 has 8 bits where float16 has 11, so a rounding is
# 8 times as large. Its emulation also rounds after every node, as a GPU does, and ONNX Runtime's CPU does not for
# float16. Together that is 20 times (measured on the demo's encoder of random words: 7.3e-2 at the worst number, 5.9e-3
# root mean square; float16 with all its roundings 6.0e-3 and 6.9e-4).
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 1e-1}
OPSET = 23  # keeps GroupNormalization and Attention whole; ONNX Runtime >= 1.23 runs it
LARGE_BYTES = 1 << 30  # bytes of weights above which the check takes fewer rows, to save gigabytes
PAGE_OUT, WORTH = 21, 1 << 20  # MADV_PAGEOUT, and bytes of a tensor from which on it is called
MAX_COMPARED_ELEMENTS = 1 << 16  # elements up to which tensors are compared with each other, and equal ones stored once
MIN_HALF_ELEMENTS = 1024  # elements from which a tensor is worth storing in half


@dataclass
class Exported:
    """The outcome of one graph's export."""

    name: str
    error: float  # largest difference to PyTorch relative to the largest value, over all outputs
    tolerance: float
    megabytes: float
    seconds: float
    peak: float = 0.0  # bytes of memory at most, of this process and the one that checks; 0: unknown
    kept: bool = False  # finished by an export that was stopped
    emulated: bool = False  # bfloat16, rounded in a float32 graph: ONNX Runtime's CPU lacks it


def export_bundle(checkpoint: Checkpoint, out: Path, *arguments: Any, **options: Any) -> list[Exported]:
    """Exports a checkpoint into the folder `out`: `make_bundle` in a workspace, whose result then moves to `out`.

    Plans of an older bundle in `out` stay, and those that still fit are used again.
    Also raises ExportError for a folder that is not a bundle, or that another process exports into.
    """
    check_target(out)
    with workspace(out) as folder:
        results = make_bundle(checkpoint, folder / "bundle", *arguments, **options)
        record_weights(checkpoint, folder / "bundle")
        install(folder / "bundle", out)
    return results


def make_bundle(
    checkpoint: Checkpoint,
    folder: Path,
    precision: str = "fp32",
    body: Path | None = None,
    opset: int = OPSET,
    source: dict[str, str] | None = None,
    on_graph: Callable[[Exported], Any] = lambda _: None,
    on_step: Callable[[str, str], Any] = lambda *_: None,
) -> list[Exported]:
    """Makes a bundle of a checkpoint in a folder of a workspace. It keeps the finished graphs that it finds there.

    precision: of the networks, one of PRECISIONS; hand features and all state stay float32. body: an SMPL-H `.npz`;
    without it the checkpoint's own is used. source: what it is made from (see `source.py`), kept in the manifest.
    on_graph: called after each graph; on_step: called with a graph's name and what begins, "tracing" or "comparing".
    Raises CheckpointError without a body, ExportError for a graph over its tolerance, or one that ONNX Runtime does
    not run.
    """
    if precision not in PRECISIONS:
        raise ExportError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    path = body or checkpoint.body
    if path is None:
        raise CheckpointError(
            "This checkpoint has no body model of its own. Give the SMPL-H .npz that it was trained with: --body FILE."
        )
    smplh = SMPLH.load(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = sum(tensor.nbytes for tensor in checkpoint.unet.state_dict().values())
    batch = 3 if weights < LARGE_BYTES else 2
    shelf = Shelf(folder, keys(checkpoint, smplh, precision=precision, opset=opset, batch=batch))
    shelf.clear()
    results: list[Exported] = []
    specs: dict[str, GraphSpec] = {}
    pairs = zip(graphs(checkpoint, smplh, PRECISIONS[precision], batch), graphs(checkpoint, smplh, batch=batch),
                strict=True)  # fmt: skip
    for graph, reference in pairs:
        found = shelf.find(graph.name)
        if found is None:
            spec, result = export_and_check(checkpoint, graph, reference, folder, precision, opset, on_step)
            shelf.note(graph.name, spec, asdict(result))
        else:
            spec, result = found[0], Exported(**{**found[1], "kept": True})
        graph.module = reference.module = nn.Identity()
        results.append(result)
        specs[graph.name] = spec
        on_graph(result)
    checkpoint.tokenizer.no_truncation()
    checkpoint.tokenizer.no_padding()
    checkpoint.tokenizer.save(str(folder / TOKENIZER))
    made_by = {
        "checkpoint": checkpoint.name,
        "body": "the demo's own, licence-free" if is_demo_body(path) else "the user's: not for redistribution",
        "opset": opset,
        **({} if source is None else {"source": source}),
        **{name: version(name) for name in ("handiffuser", "torch", "diffusers")},
        "onnxruntime": onnxruntime_version(),
    }
    manifest_of(checkpoint, folder, specs, precision, made_by).save(folder)
    return results


def export_and_check(
    checkpoint: Checkpoint,
    graph: Graph,
    reference: Graph,
    folder: Path,
    precision: str,
    opset: int,
    on_step: Callable[[str, str], Any],
) -> tuple[GraphSpec, Exported]:
    """Exports one graph into `folder` and compares it with PyTorch. Raises ExportError where it is too far off."""
    began, peaks = time.monotonic(), [0.0]
    forget_peak()
    on_step(graph.name, "tracing")
    spec = export_graph(graph, folder, opset)
    on_step(graph.name, "comparing")
    kind = "fp32" if graph.name == "hand_features" else precision
    graph.module = nn.Identity()  # frees its weights
    error, worst = parity(
        graph,
        reference.module,
        folder / spec.file,
        kind,
        peaks.append,
        lambda: give_back(checkpoint.modules().values()),
    )
    spec.parity = {"error": float(f"{error:.3g}"), "tolerance": TOLERANCE[kind], "tensor": worst}
    if kind == "bf16":
        spec.parity["emulated"] = True
    if not error <= TOLERANCE[kind]:
        raise ExportError(
            f"{graph.name} is {error:.2g} from PyTorch in {worst!r} (tolerance {TOLERANCE[kind]:g}), so "
            "nothing was written. "
            + (
                "Export with --precision fp32."
                if kind != "fp32"
                else "Please report this with your versions of torch, onnx and onnxruntime."
            )
        )
    size = sum(file.stat().st_size for file in folder.glob(f"{graph.name}.onnx*"))
    seconds, emulated = time.monotonic() - began, "emulated" in spec.parity
    return spec, Exported(graph.name, error, TOLERANCE[kind], size / 1e6, seconds, max(peaks), emulated=emulated)


def manifest_of(
    checkpoint: Checkpoint, folder: Path, specs: dict[str, GraphSpec], precision: str, made_by: dict[str, Any]
) -> Manifest:
    """The manifest of the graphs and the tokenizer in `folder`."""
    return Manifest(
        graphs=specs,
        files={file.name: file_digest(file) for file in sorted(folder.iterdir()) if file.is_file()},
        precision=precision,
        image_size=checkpoint.image_size,
        latent_size=(checkpoint.vae.config.latent_channels, *checkpoint.latent_size),
        num_history=dict(NUM_HISTORY),
        schedules={
            "hand_prior": plain(checkpoint.hand_scheduler),
            "unet": plain(checkpoint.scheduler),
        },
        defaults=dict(checkpoint.defaults),
        tokenizer=dict(checkpoint.special_tokens),
        params_mean=checkpoint.hand_prior.mean.tolist(),
        params_std=checkpoint.hand_prior.std.tolist(),
        words=checkpoint.words,
        made_by=made_by,
        size_multiple=checkpoint.size_multiple,
        num_people=checkpoint.num_people,
    )


def check_target(out: Path) -> None:
    """Raises ExportError for a folder that holds anything but a bundle."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).exists())):
        raise ExportError(f"{out} must be a bundle or an empty folder. Choose another folder, or empty this one.")


def plain(schedule: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration without diffusers' private entries."""
    return {key: value for key, value in schedule.items() if not key.startswith("_")}


def export_graph(graph: Graph, folder: Path, opset: int) -> GraphSpec:
    """Exports one module with its free axes into `<name>.onnx` and returns its contract."""
    names = list(graph.inputs)
    # An output cannot have an input's name in ONNX, so outputs are known by their order.
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
    symbols = side_symbols(program, graph)
    known = at_example(graph, symbols)
    # The outputs' types are read off the graph: running it in half precision takes PyTorch's CPU minutes.
    spec = GraphSpec(
        f"{graph.name}.onnx",
        [graph.spec(name, value) for name, value in graph.inputs.items()],
        [output_spec(graph, *pair) for pair in zip(graph.outputs, program.model.graph.outputs, strict=True)],
    )
    if graph.sized or graph.worded:
        settle(program.model)
    if spec.dominant:  # the hand prior takes the text at once, and shares little between branches
        share_branches(program.model)
    write_out_norms(program.model, known)  # with free sizes they look at their input's shape, which is not shared
    fold_upsampling(program.model)
    if graph.name != "unet_context":  # an adapter may change one of two layers whose kernels begin as equals
        # Position codes of the levels' grids are the same in each of their layers.
        DeduplicateInitializersPass(size_limit=MAX_COMPARED_ELEMENTS)(program.model)
    compact(program.model)
    fuse_attention(program.model)
    if graph.sized:
        spec.memory = memory_of(program.model, known)
    name_sides(program.model, graph, symbols)
    save_model(program.model, folder / spec.file)
    return spec


def output_spec(graph: Graph, name: str, value: ir.Value) -> TensorSpec:
    assert value.shape is not None and value.dtype is not None
    sizes: list[int | str] = [graph.free, *(size if isinstance(size, int) else "?" for size in value.shape[1:])]
    if name in graph.branched:
        sizes[1] = BRANCHES
    for axis, side in graph.sides(name).items():
        sizes[axis] = side
    assert "?" not in sizes, f"{graph.name}: {name} has a free axis besides its own: {value.shape}"
    return TensorSpec(name, value.dtype.numpy().name, tuple(sizes))


def run_module(module: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    result = module(*inputs)
    return result if isinstance(result, tuple) else (result,)


def compact(model: ir.Model) -> None:
    """Stores float32 weights that are exactly representable in half precision as such, behind a Cast.

    So a checkpoint in half precision gives a float32 bundle of half the size with exactly the same numbers. ONNX
    Runtime and TensorRT fold the casts when they load the graph.
    """
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < MIN_HALF_ELEMENTS:
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
    """Writes the graph; more weights than EXTERNAL go into `<name>.onnx.data`."""
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    for node in model.graph:  # traces of source files would name folders of this machine
        node.metadata_props.clear()
        node.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    ir.save(model, path, external_data=path.name + ".data" if weights > EXTERNAL else None)
    open_to_others(*path.parent.glob(f"{path.name}.data"))


def give_back(modules: Iterable[nn.Module] = ()) -> None:
    """Returns memory to the system for another process: what the C library keeps of freed memory, and pages of weights
    that lie in files, which are read again when they are used."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # Linux's, with glibc
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        for tensor in (tensor for module in modules for tensor in module.state_dict().values()):
            start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            size = tensor.data_ptr() + tensor.nbytes - start
            if size >= WORTH:  # harmless for other memory: it stays where there is no swap
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), PAGE_OUT)


def parity(
    graph: Graph,
    reference: nn.Module,
    path: Path,
    precision: str = "fp32",
    on_peak: Callable[[float], Any] = lambda _: None,
    between: Callable[[], Any] = lambda: None,
) -> tuple[float, str]:
    """Largest difference between the file in ONNX Runtime and float32 PyTorch, relative to each output's largest value.

    It tries two sizes of every free axis, to find one that the export fixed. on_peak: gets bytes of memory, of this
    process while PyTorch runs, then of both. between: called before ONNX Runtime begins. Returns the error and the
    worst tensor. Raises ExportError where either gives NaN or infinity, or where ONNX Runtime crashes.
    """
    calls, exact = [], []
    for smallest in (False, True):
        inputs = graph.inputs
        if smallest:
            inputs = {n: smaller(graph, n, v) for n, v in inputs.items()}
        floats = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
        with torch.no_grad():
            exact.append([value.numpy() for value in run_module(reference, list(floats.values()))])
        # numpy has no bfloat16, and its emulation takes float32.
        given = {n: floats[n] if v.dtype == torch.bfloat16 else v for n, v in inputs.items()}
        calls.append({name: value.numpy() for name, value in given.items()})
    on_peak(peak_memory())
    between()
    forget_peak()
    # An overflow in an image shows only in this flag: 8 bits cannot hold NaN.
    for name, theirs in zip(graph.outputs * 2, itertools.chain(*exact), strict=True):
        if not np.isfinite(theirs).all() or (name == "finite" and not theirs.all()):
            raise ExportError(
                f"{graph.name} gives NaN or infinity in float32 PyTorch already ({name!r}), so nothing was written. "
                "The checkpoint's weights are broken: take one from before the training diverged."
            )
    worst, where = 0.0, graph.outputs[0]

    def both(theirs: float) -> None:
        on_peak(peak_memory() + theirs)

    for got, wanted in zip(run_apart(path, calls, precision, both), exact, strict=True):
        for name, ours, theirs in zip(graph.outputs, got, wanted, strict=True):
            if ours.shape != theirs.shape:
                raise ExportError(
                    f"{graph.name}'s {name!r} has shape {list(ours.shape)}, and {list(theirs.shape)} in PyTorch, so "
                    "nothing was written. Please report this with your versions of torch, onnx and onnxruntime."
                )
            if not np.isfinite(ours).all() or (name == "finite" and not ours.all()):
                raise ExportError(
                    f"{graph.name} gives NaN or infinity in {name!r} where PyTorch does not, so nothing was written. "
                    + (
                        "Its numbers are too large for half precision: export with --precision bf16 or fp32."
                        if precision == "fp16"
                        else "Please report this with your versions of torch, onnx and onnxruntime."
                    )
                )
            error = deviation(ours, theirs)
            if error > worst:
                worst, where = error, name
    return worst, where


def smaller(graph: Graph, name: str, value: Tensor) -> Tensor:
    """An example input with another size of each free axis: one row, one branch, and a part of the picture."""
    value = (value[:, -1:] if name in graph.branched else value)[:1]
    for axis, side in graph.sides(name).items():
        multiple = graph.multiple_of(side)
        whole = value.shape[axis] // multiple
        part = whole // 2 if side in SIDES[::2] else whole * 3 // 4  # another shape, too
        value = value.narrow(axis, 0, max(part, 1) * multiple)
    return value.contiguous()


def deviation(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference of two finite arrays relative to the largest value, or of pixels relative to their range."""
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    if ours.dtype == np.uint8:
        # Rounding to 8 bits may go either way: a difference of one level counts by its mean alone.
        return float(difference.mean() if difference.max() <= 1 else difference.max()) / 255
    return float(difference.max() / max(np.abs(theirs).max(), 1e-12))


def at_image_size(checkpoint: Checkpoint, height: int, width: int) -> Checkpoint:
    """The same checkpoint for pictures of another size (raises CheckpointError where it does not fit)."""
    changed = copy.copy(checkpoint)
    changed.image_size = (height, width)
    changed.check()
    return changed
