"""Compiles graphs ahead of time with PyTorch: torch.export, then AOTInductor, into `.pt2` files.

    for graph in graphs(checkpoint, body):
        compile_graph(graph, Path("engines") / f"{graph.name}.pt2", device="cuda")
        compile_graph(graph, Path("engines") / f"{graph.name}.pt2", "cuda", shape={"B": 1, "G": 2, "h": 64, "w": 96})

A file holds native code for the processor it was compiled on; `engines/inductor.py` runs it. It needs a C++ compiler,
and on a GPU Triton, which comes with PyTorch for CUDA.

Inductor lays the channels of convolutions last only where it knows all sizes (pytorch#102670), so that a graph with
convolutions is compiled for each shape. Such a file is code alone, and `save_weights` writes the weights once for all.
"""

from __future__ import annotations

import re
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch._inductor import aoti_compile_and_package
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.utils import fresh_cache
from torch.export.graph_signature import InputKind, InputSpec
from torch.export.passes import move_to_device_pass

from ..contract import BRANCHES, Manifest, TensorSpec
from ..cpu import usable_cores
from ..engines.inductor import forbid_tf32, origin, tensors
from ..engines.inductor_files import WEIGHTS, options_of, wanted_files
from ..engines.plans import Plan, PlanStore, Sizes, Wanted, parts
from ..errors import ExportError
from ..models.checkpoint import Checkpoint
from ..models.smplh import SMPLH
from .graphs import PRECISIONS, Graph, graphs

# Where the generated code asserts the layout of a convolution's output: its sizes, then its strides.
CONVOLUTION = re.compile(r"assert_size_stride\(\w+, \{([^}]*)\}, \{([^}]*)\}, \"torch\.ops\.aten\.convolution")


def compile_graph(
    graph: Graph, path: Path, device: str = "cpu", shape: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Compiles one graph into `path`, a `.pt2` file; an older file stays until the new one is complete.

    device: "cpu" or "cuda". shape: the sizes of all free axes, such as {"B": 1, "G": 2, "h": 64, "w": 64}: the file
    then takes these alone, with channels last, and lacks the weights. They are returned by name, where they lie in
    PyTorch. None: any batch from 1 to 4096, pictures of the checkpoint's own size, and the weights in the file.

    The module stays where it is. With a shape its convolutions' weights get channels last in memory.
    Raises ExportError without a C++ compiler or the GPU, and when the graph cannot be compiled.
    """
    check_tools(device)
    forbid_tf32()  # the choice is compiled in
    if shape is None:
        graph = replace(graph, sized=(), worded={})  # own size, prompts of one chunk
        # 0 and 1 are special to the exporter: an example of one row makes it broadcast rows.
        rows = torch.arange(max(2, len(next(iter(graph.inputs.values())))))
        inputs = {name: value[rows % len(value)] for name, value in graph.inputs.items()}
        dynamic = graph.dynamic_shapes()
    else:
        inputs, dynamic = {name: example(graph, name, shape) for name in graph.inputs}, None
        graph.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    specs = [fixed(graph.spec(name, value), shape or {}) for name, value in inputs.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    # The compiler's files take several times the weights' size, for which /tmp often lacks room.
    with TemporaryDirectory(prefix=f".{graph.name}-", dir=path.parent) as work:
        written = Path(work) / f"{graph.name}.pt2"
        try:
            with torch.no_grad():
                program = torch.export.export(graph.module, tuple(inputs.values()), dynamic_shapes=dynamic)
            weights = weights_of(program) if shape is not None else {}  # before it is moved
            # Moving the program leaves the module in place (three graphs share the UNet), and also moves the kernels of
            # the attention processors, which are not part of the module.
            program = move_to_device_pass(program, "cuda:0" if device == "cuda" else device)  # as tensors there name it
            with torch.no_grad(), fresh_cache(dir=work):
                options = compiler_options(device, specs, graph.outputs, shape is not None)
                aoti_compile_and_package(program, package_path=str(written), inductor_configs=options)
        except Exception as error:  # of the exporter, the compiler or the C++ compiler: no common base class
            raise ExportError(
                f"{graph.name} could not be compiled for {device}: {sentence(error)} Please report this with your "
                "version of torch; the bundle's ONNX graphs still work."
            ) from error
        written.replace(path)
    return weights


def compiler_options(device: str, specs: list[TensorSpec], outputs: tuple[str, ...], shaped: bool) -> dict[str, Any]:
    """What Inductor is told. shaped: all sizes are known, and the weights are in a file of their own."""
    return {
        # Other processes compile Triton's kernels. They are started afresh: forks hang where threads run already.
        "compile_threads": usable_cores() if device == "cuda" else 1,
        "worker_start_method": "subprocess",
        # Otherwise the number of this process's threads is fixed. Loops are still cut for a number of threads.
        "cpp.dynamic_threads": True,
        "cpp.threads": usable_cores(),
        "aot_inductor.precompile_headers": False,  # saves 3 s a graph, leaves 0.4 GB in /tmp
        "aot_inductor.package_constants_in_so": not shaped,
        "force_layout_optimization": shaped,
        "max_autotune": device == "cuda",
        "max_autotune_conv_backends": "ATEN",  # cuDNN's: Triton's took longer to tune than builds may take
        "aot_inductor.metadata": {"device": device, **origin(device), "tensors": tensors(specs, outputs)},
    }


def example(graph: Graph, name: str, shape: Mapping[str, int]) -> Tensor:
    """An example input of this shape: the graph's own, cut or repeated along its free axes."""
    value, axes = graph.inputs[name], {0: graph.free, **graph.sides(name)}
    if name in graph.branched:
        axes[1] = BRANCHES
    for axis, size in axes.items():
        value = value.index_select(axis, torch.arange(shape.get(size, value.shape[axis])) % value.shape[axis])
    return value.contiguous()


def fixed(spec: TensorSpec, shape: Mapping[str, int]) -> TensorSpec:
    return replace(spec, shape=tuple(shape.get(size, size) for size in spec.shape))  # type: ignore[arg-type]


def weights_of(program: Any) -> dict[str, Tensor]:
    """Parameters, buffers and constants that an exported program reads. Its constants become buffers, because Inductor
    renames constants and keeps the names of buffers."""
    signature, weights = program.graph_signature, dict[str, Tensor]()
    read = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    for i, spec in enumerate(signature.input_specs):
        if spec.kind == InputKind.CONSTANT_TENSOR:
            program.state_dict[spec.target] = program.constants[spec.target]
            signature.input_specs[i] = InputSpec(InputKind.BUFFER, spec.arg, spec.target, persistent=True)
        if spec.kind != InputKind.USER_INPUT and spec.arg.name in read:
            weights[spec.target] = program.state_dict[spec.target]
    return weights


def layouts(path: Path) -> tuple[int, int]:
    """How many convolutions of a compiled file give channels last, and how many there are, by its generated code."""
    with zipfile.ZipFile(path) as package:
        code = "".join(package.read(name).decode() for name in package.namelist() if name.endswith("wrapper.cpp"))
    found = [[int(n.rstrip("L")) for n in strides.split(", ")] for _, strides in CONVOLUTION.findall(code)]
    return sum(strides[1] == 1 for strides in found), len(found)


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors; those of four axes with the second one last, as convolutions read them."""
    save_file({name: laid(tensor) for name, tensor in weights.items()}, path)


def laid(tensor: Tensor) -> Tensor:
    """A tensor as a file of weights has it."""
    return (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).detach().cpu().contiguous()


def check_weights(path: Path, weights: Mapping[str, Tensor], module: torch.nn.Module) -> None:
    """Raises ExportError unless a file of weights has these. Constants alone might differ between shapes."""
    own = dict(module.state_dict())
    with safe_open(path, "pt") as file:
        there = set(file.keys())
        for name in weights.keys() - own.keys():
            if name not in there or not torch.equal(file.get_tensor(name), laid(weights[name])):
                raise ExportError(f"{name} must be the same tensor for all shapes, got another. Please report this.")


def compile_bundle(
    load: Callable[[], Checkpoint],
    bundle: Path,
    body: Path | None,
    device: str,
    wanted: Wanted,
    on_graph: Callable[[Plan, str], Any] = lambda *_: None,
) -> int:
    """Compiles the graphs of a bundle that have no current plan; returns how many files it wrote.

    load: gives the checkpoint that the bundle was exported from; called only if a graph must be compiled.
    on_graph: called with each plan and why it was compiled.
    """
    manifest, store = Manifest.load(bundle, verify=False), PlanStore(bundle)
    version, target = torch.__version__, f"{device} {origin(device)['processor']}"

    def needed(name: str, shape: Sizes) -> dict[str, str]:
        return parts(manifest, name, shape, "inductor", version, target, options_of(name))

    files = [(name, shape, needed(name, shape)) for name, shape in wanted_files(manifest, wanted, device)]
    missing = [(name, shape, one, store.why(one)) for name, shape, one in files if store.find(one) is None]
    if not missing:
        return 0
    check_tools(device)
    if manifest.precision not in PRECISIONS:
        raise ExportError(f"Graphs in {manifest.precision} are for TensorRT alone: export with --precision fp16.")
    checkpoint = load()
    path = body or checkpoint.body
    if path is None:
        raise ExportError("This checkpoint has no body model of its own. Give the SMPL-H .npz again: --body FILE.")
    count = 0
    with TemporaryDirectory(dir=bundle) as folder:

        def keep(path: Path, wanted: dict[str, str], why: str, started: float, proof: dict[str, Any]) -> None:
            nonlocal count
            count += 1
            on_graph(store.add(wanted, path.read_bytes(), proof, time.monotonic() - started), why)
            path.unlink()

        for graph in graphs(checkpoint, SMPLH.load(path), PRECISIONS[manifest.precision]):
            for _, shape, wanted_parts, why in [one for one in missing if one[0] == graph.name]:
                file, started = Path(folder) / f"{graph.name}.pt2", time.monotonic()
                shaped = all(isinstance(size, int) for size in shape.values())
                weights = compile_graph(graph, file, device, shape if shaped else None)  # type: ignore[arg-type]
                last, convolutions = layouts(file)
                proof = {"tf32": False, "convolutions": convolutions, "channels_last": last}
                keep(file, wanted_parts, why, started, proof)
                of_weights = needed(graph.name, {WEIGHTS: len(weights)})
                if shaped and (there := store.find(of_weights, verify=True)) is not None:
                    check_weights(there.path, weights, graph.module)
                elif shaped:
                    why, started = store.why(of_weights), time.monotonic()
                    save_weights(weights, file)
                    keep(file, of_weights, why, started, {})
    return count


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


def sentence(error: Exception) -> str:
    """The line of an error's text that says what is wrong: the C++ compiler's own, else the first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = next((line for line in lines if " error: " in line), lines[0])
    return line[:300].rstrip(" .:") + "."
