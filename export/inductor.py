"""Compiles graphs ahead of time with PyTorch: torch.export, then AOTInductor, into one `.pt2` file a graph.

    for graph in graphs(checkpoint, body):
        compile_graph(graph, Path("engines") / f"{graph.name}.pt2", device="cuda")

The file holds native code for the processor it was compiled on; `engines/inductor.py` runs it. It needs a C++
compiler, and on a GPU Triton, which comes with PyTorch for CUDA.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor
from torch._inductor import aoti_compile_and_package
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.utils import fresh_cache
from torch.export.passes import move_to_device_pass

from ..contract import MAX_ROWS, Manifest
from ..cpu import usable_cores
from ..engines.inductor import forbid_tf32, origin, tensors
from ..engines.plans import Plan, PlanStore, parts
from ..engines.tensorrt import Options
from ..errors import ExportError
from ..models.checkpoint import Checkpoint
from ..models.smplh import SMPLH
from .graphs import PRECISIONS, Graph, graphs


def compile_graph(graph: Graph, path: Path, device: str = "cpu", batch: int | None = None) -> None:
    """Compiles one graph into `path`, a `.pt2` file; an older file stays until the new one is complete.

    device: "cpu" or "cuda". batch: compile for this size of the first axis alone; None: for any from 1 to 4096.
    A graph whose free axis is not a batch (unet_time: S) takes any size in both cases. The module is left where it is.

    Raises ExportError without a C++ compiler or the GPU, and when the graph cannot be compiled.
    """
    check_tools(device)
    graph = replace(graph, sized=())  # pictures have the checkpoint's own size
    forbid_tf32()  # the choice is compiled in
    if graph.free != "B":
        batch = None
    # 0 and 1 are special to the exporter: an example of one row makes it broadcast rows.
    rows = batch or max(2, len(next(iter(graph.inputs.values()))))
    inputs = {name: value[torch.arange(rows) % len(value)] for name, value in graph.inputs.items()}
    specs = [graph.spec(name, value) for name, value in inputs.items()]
    options = {
        "compile_threads": 1,  # with more it forks workers, which hang where threads run already
        # Otherwise the number of this process's threads is fixed. Loops are still cut for a number of threads.
        "cpp.dynamic_threads": True,
        "cpp.threads": usable_cores(),
        "aot_inductor.precompile_headers": False,  # saves 3 s a graph, leaves 0.4 GB in /tmp
        "max_autotune": device == "cuda",
        "aot_inductor.metadata": {
            "device": device,
            "batch": "" if batch is None else str(batch),
            **origin(device),
            "tensors": tensors(specs, graph.outputs),
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # The compiler's files take several times the weights' size, for which /tmp often lacks room.
    with TemporaryDirectory(prefix=f".{graph.name}-", dir=path.parent) as work:
        written = Path(work) / f"{graph.name}.pt2"
        try:
            with torch.no_grad(), patch.object(Upsample2D, "forward", upsample):
                program = torch.export.export(
                    graph.module, tuple(inputs.values()), dynamic_shapes=graph.dynamic_shapes(batch)
                )
            # Moving the program leaves the module in place (three graphs share the UNet), and also moves the kernels of
            # the attention processors, which are not part of the module.
            program = move_to_device_pass(program, "cuda:0" if device == "cuda" else device)  # as tensors there name it
            with torch.no_grad(), fresh_cache(dir=work):
                aoti_compile_and_package(program, package_path=str(written), inductor_configs=options)
        except Exception as error:  # of the exporter, the compiler or the C++ compiler: no common base class
            raise ExportError(
                f"{graph.name} could not be compiled for {device}: {sentence(error)} Please report this with your "
                "version of torch; the bundle's ONNX graphs still work."
            ) from error
        written.replace(path)


def compile_bundle(
    load: Callable[[], Checkpoint],
    bundle: Path,
    body: Path | None,
    device: str,
    on_graph: Callable[[Plan, str], Any] = lambda *_: None,
) -> int:
    """Compiles the graphs of a bundle that have no current plan; returns how many.

    load: gives the checkpoint that the bundle was exported from; called only if a graph must be compiled.
    on_graph: called with each plan and why it was compiled.
    """
    manifest, store = Manifest.load(bundle, verify=False), PlanStore(bundle)
    version, target = torch.__version__, f"{device} {origin(device)['processor']}"
    wanted = {
        name: parts(manifest, name, {"B": (1, 2, MAX_ROWS)}, "inductor", version, target, Options())
        for name in manifest.graphs
    }
    missing = {name: store.why(one) for name, one in wanted.items() if store.find(one) is None}
    if not missing:
        return 0
    check_tools(device)
    if manifest.precision not in PRECISIONS:
        raise ExportError(f"Graphs in {manifest.precision} are for TensorRT alone: export with --precision fp16.")
    checkpoint = load()
    path = body or checkpoint.body
    if path is None:
        raise ExportError("This checkpoint has no body model of its own. Give the SMPL-H .npz again: --body FILE.")
    smplh = SMPLH.load(path)
    with TemporaryDirectory(dir=bundle) as folder:
        for graph in graphs(checkpoint, smplh, PRECISIONS[manifest.precision]):
            if graph.name in missing:
                path, started = Path(folder) / f"{graph.name}.pt2", time.monotonic()
                compile_graph(graph, path, device)
                plan = store.add(wanted[graph.name], path.read_bytes(), {"tf32": False}, time.monotonic() - started)
                on_graph(plan, missing[graph.name])
    return len(missing)


def check_tools(device: str) -> None:
    """Raises ExportError without a GPU or a C++ compiler, as compiling for `device` needs them."""
    if device not in ("cpu", "cuda"):
        raise ExportError(f"device must be cpu or cuda, got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ExportError("PyTorch finds no usable GPU to compile for. Check `nvidia-smi`, or take --device cpu.")
    try:
        get_cpp_compiler()
    except Exception as error:
        raise ExportError(
            "Compiling needs a C++ compiler, and none was found. Install one (`apt install g++` on Debian and Ubuntu, "
            "`xcode-select --install` on a Mac), or name yours in the variable CXX."
        ) from error


def upsample(self: Upsample2D, hidden_states: Tensor, output_size: Any = None, *_: Any, **__: Any) -> Tensor:
    """`Upsample2D.forward` for any batch: [N, C, h, w] -> [N, C', 2 h, 2 w], or of `output_size`.

    diffusers first copies big batches, for old versions of PyTorch. Its test for a big batch would bind the free axis
    to the example's answer (the UNet: at most 31).
    """
    assert self.interpolate and self.norm is None and self.name == "conv"
    size = {"scale_factor": 2.0} if output_size is None else {"size": output_size}
    return self.conv(F.interpolate(hidden_states, mode="nearest", **size))


def sentence(error: Exception) -> str:
    """The line of an error's text that says what is wrong: the C++ compiler's own, else the first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = next((line for line in lines if " error: " in line), lines[0])
    return line[:300].rstrip(" .:") + "."
