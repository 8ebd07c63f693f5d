"""What a run of a graph costs on a GPU, read off the graph: kernels, bytes through memory, operations, the least time.

    found = kernels(load(Path("bundle/unet.onnx")), {"B": 1, "G": 2}, RUNNERS["onnxruntime"])
    floor(found, GPUS["h200"], "fp16")           # seconds
    count(Path("bundle/unet.onnx"), {"B": 1})    # {"Conv": ..., "MatMul": ..., ...}

It is a model, not a measurement. Each kernel reads its inputs from memory and writes its outputs, and takes the longer
of that and its products at full rate. Caches make real kernels faster; partly filled processors, launches and waits
make them slower. So it compares graphs; it predicts no time. Needs the `onnx` package, and no GPU.

Operations are the work of a matrix unit, 2 for a multiply-add: MatMul, Gemm, Conv, Attention. A product computes in
eight bits where both of its operands come from a DequantizeLinear: the kernel then reads the eight-bit tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..contract import CONTEXT, EIGHT_BITS, FLOAT32_GRAPHS, SIDES
from ..errors import EngineError
from .rates import GPUS, Gpu

Shape = tuple[int, ...]
LARGE = 4096  # bytes; smaller tensors may be shapes, whose values inference needs
VIEWS = frozenset(["Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"])
# Operators that read no more of their inputs than they write.
PICKS = frozenset(["Slice", "Gather", "GatherElements", "GatherND", "Expand", "Pad", "Resize", "Tile"])
POINTWISE = frozenset(
    (
        "Abs Add And BiasAdd BiasSplitGelu Cast Ceil Clip Cos Div Equal Erf Exp Floor Gelu Greater IsNaN Less "
        + "LessOrEqual Log Max Min Mul Neg Not Or Pow QuantizeLinear Reciprocal Relu Round Sigmoid Sin Sqrt Sub Tanh "
        + "Where"
    ).split()
)
MATRIX = frozenset(["MatMul", "Gemm", "Conv", "NhwcConv", "Attention", "MultiHeadAttention"])


@dataclass(frozen=True)
class Runner:
    """How a backend turns nodes into kernels.

    joins: pointwise operators, copies and reductions that follow each other are one kernel. epilogues: pointwise ones
    behind a product are part of its kernel. first: it computes with channels last and turns around each Conv. norm:
    kernels of a GroupNormalization, 0 for the operator's definition in other nodes.
    """

    label: str
    joins: bool = False
    epilogues: bool = False
    turns: bool = False
    norm: int = 0


RUNNERS = {
    "onnxruntime": Runner("ONNX Runtime", turns=True),
    "tensorrt": Runner("TensorRT", joins=True, epilogues=True, norm=2),
    "inductor": Runner("Inductor", joins=True, norm=2),
}


@dataclass(frozen=True)
class Kernel:
    """One or several launches for a node, or for nodes that a backend joins. eight: whether its product has operands
    of eight bits."""

    op: str
    launches: int
    bytes: int
    operations: int
    eight: bool = False


@dataclass(frozen=True)
class Node:
    """A node that computes: its operator, the tensors that it reads and writes, and its operations. eight: both
    operands of a product are stored in eight bits."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operations: int
    biased: bool = False
    eight: bool = False


class Graph:
    """The nodes that run at each call, with the sizes of all tensors in bytes and numbers."""

    def __init__(self, model: Any, sizes: Mapping[str, int], name: str = "the graph") -> None:
        """sizes: free dimension -> size. Raises EngineError for a graph with a shape that cannot be inferred."""
        model = _of_one_size(model, sizes)
        self.shapes, self.widths = _infer(model, sizes)
        self.name = name
        ready = {tensor.name for tensor in model.graph.initializer} | {""}
        views: dict[str, str] = {}
        stored = set[str]()  # what a DequantizeLinear gives: kernels read its input and turn numbers in registers
        self.nodes: list[Node] = []
        for node in model.graph.node:
            given = [views.get(one, one) for one in node.input]
            if node.op_type == "DequantizeLinear" or (node.op_type in VIEWS and node.input[0] in stored):
                stored.add(node.output[0])
                views[node.output[0]] = given[0]
            elif all(one in ready for one in given):  # computed once, when the graph is loaded
                ready.update(node.output)
            elif node.op_type in VIEWS:
                views[node.output[0]] = given[0]
            elif not self._on_host(node):
                outputs = tuple(one for one in node.output if one in self.shapes)
                biased = node.op_type in ("Conv", "NhwcConv", "Gemm") and len(given) > 2 and bool(given[2])
                read = tuple(dict.fromkeys(one for one in given if (one and one not in ready) or self.size(one) > 64))
                eight = node.op_type in MATRIX and stored.issuperset(node.input[:2])
                self.nodes.append(Node(node.op_type, read, outputs, self._operations(node, given), biased, eight))
        self.views = views
        self.results = {views.get(value.name, value.name) for value in model.graph.output}

    def size(self, name: str) -> int:
        """Bytes of a tensor; 0 for one that is not there."""
        return math.prod(self.shapes[name] or (0,)) * self.widths.get(name, 4) if name in self.shapes else 0

    def _on_host(self, node: Any) -> bool:
        """Whether a node computes sizes: a few integers, which ONNX Runtime leaves to the processor."""
        known = [one for one in node.output if one]
        return all(self.widths.get(one) == 8 and math.prod(self.shapes.get(one) or (1,)) <= 16 for one in known)

    def _operations(self, node: Any, given: Sequence[str]) -> int:
        counter = COUNTED.get(node.op_type)
        if counter is None:
            return 0
        shapes = [self.shapes.get(one) for one in node.input]
        result = self.shapes.get(node.output[0])
        if result is None or None in shapes[:2]:
            raise EngineError(f"The shapes of {node.op_type} {node.name!r} in {self.name} cannot be inferred.")
        import onnx

        return counter(shapes, result, {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute})


def load(path: Path) -> Any:
    """The ONNX model of a file, without weights in other files. Raises EngineError without the onnx package."""
    try:
        import onnx
    except ImportError as error:
        raise EngineError(
            'Counting operations needs handiffuser[export]: pip install "handiffuser[export]".'
        ) from error
    return onnx.load(str(path), load_external_data=False)


def count(path: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """Operations of one run by kind of node; sizes: free dimension -> size, such as {"B": 1}.

    A node that the model defines as a function, such as an export's MultiHeadAttention, counts as its definition.
    Raises EngineError without the onnx package, or for a graph with a shape that cannot be inferred.
    """
    model = load(path)
    from onnx import inliner

    total: Counter[str] = Counter()
    for node in Graph(inliner.inline_local_functions(model), sizes, str(path)).nodes:
        if node.op in COUNTED:
            total[node.op] += node.operations
    return dict(total)


def kernels(graph: Graph, runner: Runner) -> list[Kernel]:
    """The kernels of one run, in order."""
    if not runner.joins:
        return [_alone(graph, node, runner) for node in graph.nodes]
    return list(_joined(graph, runner))


def floor(found: Sequence[Kernel], gpu: Gpu, precision: str) -> float:
    """Seconds that the kernels take at least, one after the other.

    precision: of a bundle. In fp8 and int8, products that are not quantised are of 16-bit numbers. Raises EngineError
    for eight bits that the GPU does not know.
    """
    rest, eight = gpu.rate("fp16" if precision in EIGHT_BITS else precision), gpu.rate(precision)
    if not eight:
        fitting = [name for name, one in GPUS.items() if one.rate(precision)]
        raise EngineError(
            f"--gpu must be one of {', '.join(fitting)} for {precision}, got {gpu.name}. Name one of these."
        )
    return sum(max(one.bytes / gpu.bandwidth, one.operations / (eight if one.eight else rest)) for one in found)


def _alone(graph: Graph, node: Node, runner: Runner) -> Kernel:
    """What ONNX Runtime launches for a node."""
    out = sum(graph.size(name) for name in node.outputs)
    read = sum(graph.size(name) for name in node.inputs)
    moved, launches = read + out, 1
    if node.op in PICKS:
        moved = 2 * out
    elif node.op == "GroupNormalization":  # has no kernel, so its definition runs: most passes are in float32
        half = graph.widths.get(node.outputs[0]) == 2
        launches, moved = (13, out * 26) if half else (11, out * 12)
    elif node.op == "GroupNorm":  # counters to zero, sums, normal values: it reads twice
        launches, moved = 3, 2 * read + out
    elif node.op == "SkipGroupNorm":  # the sum is written and read again, also where no other node needs it
        launches, moved = 3, read + 3 * graph.size(node.outputs[0])
    if node.op in ("Conv", "NhwcConv", "Gemm"):
        picture = graph.size(node.inputs[0])
        if node.op == "Conv" and runner.turns:
            launches, moved = launches + 2, moved + 2 * (picture + out)
        if node.biased:
            launches, moved = launches + 1, moved + 2 * out
    return Kernel(node.op, launches, moved, node.operations, node.eight)


def _joined(graph: Graph, runner: Runner) -> Iterator[Kernel]:
    """Groups of nodes that a compiler makes one kernel of. A node joins the last group that it depends on."""
    groups: list[list[Node]] = []
    made: dict[str, int] = {}
    for node in graph.nodes:
        last = max((made[name] for name in node.inputs if name in made), default=-1)
        open_ = last >= 0 and node.op not in MATRIX and node.op != "GroupNormalization"
        if open_:
            head = groups[last][0].op
            pointwise = node.op in POINTWISE
            open_ = (
                pointwise if head == "GroupNormalization" else head not in MATRIX or (runner.epilogues and pointwise)
            )
        if open_:
            groups[last].append(node)
        else:
            groups.append([node])
            last = len(groups) - 1
        made.update(dict.fromkeys(node.outputs, last))
    users: dict[str, set[int]] = {}
    for number, group in enumerate(groups):
        for node in group:
            for name in node.inputs:
                users.setdefault(name, set()).add(number)
    for number, group in enumerate(groups):
        own = {name for node in group for name in node.outputs}
        picked = {name for node in group if node.op in PICKS for name in node.inputs}
        out = sum(graph.size(name) for name in own if name in graph.results or users.get(name, set()) - {number})
        read = sum(graph.size(name) for name in {n for node in group for n in node.inputs} - own - picked)
        read += sum(graph.size(node.outputs[0]) for node in group if node.op in PICKS and node.inputs[0] not in own)
        norm = group[0].op == "GroupNormalization"
        if norm:
            read += graph.size(group[0].inputs[0])
        operations = sum(node.operations for node in group)
        yield Kernel(group[0].op, runner.norm if norm else 1, read + out, operations, group[0].eight)


def _of_one_size(model: Any, sizes: Mapping[str, int]) -> Any:
    """The model with the sides of its pictures fixed, so that what follows from them costs nothing."""
    named = {dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim}
    sides = {axis: sizes[axis] for axis in (*SIDES, CONTEXT) if axis in sizes and axis in named}
    if not sides:
        return model
    import onnx_ir as ir

    from .fixing import fix_sizes

    fixed = ir.from_proto(model)
    fix_sizes(fixed, sides)
    return ir.to_proto(fixed)


def _infer(model: Any, sizes: Mapping[str, int]) -> tuple[dict[str, Shape | None], dict[str, int]]:
    """(shape of each tensor or None, bytes of each tensor's numbers)."""
    import onnx
    from onnx import shape_inference

    from .standins import expanded

    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for tensor in whole.graph.initializer:
        if len(tensor.raw_data) > LARGE:
            tensor.ClearField("raw_data")
    for value in whole.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    # Shapes that the exporter noted speak of the free dimensions' names; inference is to find numbers.
    del whole.graph.value_info[:]
    for value in whole.graph.output:
        value.type.tensor_type.ClearField("shape")
    whole = expanded(whole)
    for node in whole.graph.node:
        if node.op_type == "GroupNormalization":  # onnx does not infer it; its output has its input's shape
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    inferred = shape_inference.infer_shapes(whole, data_prop=True).graph
    shapes: dict[str, Shape | None] = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    kinds = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        known = value.type.tensor_type.HasField("shape") and all(dims)
        shapes[value.name] = tuple(dims) if known else None
        kinds[value.name] = value.type.tensor_type.elem_type
    widths = {name: onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize for name, kind in kinds.items() if kind}
    return shapes, widths


def _matmul(given: list[Any], result: Shape, _: dict[str, Any]) -> int:
    return 2 * math.prod(result) * given[0][-1]


def _gemm(given: list[Any], result: Shape, attributes: dict[str, Any]) -> int:
    return 2 * math.prod(result) * given[0][0 if attributes.get("transA") else 1]


def _conv(given: list[Any], result: Shape, _: dict[str, Any]) -> int:
    return 2 * math.prod(result) * math.prod(given[1][1:])  # weights are [out, in / groups, kernel ...]


def _attention(given: list[Any], result: Shape, attributes: dict[str, Any]) -> int:
    """Queries times keys, then weights times values; inputs are [N, heads, L, d] or [N, L, heads * d]."""
    query, key = given[:2]
    if len(query) == 4:
        N, heads, length, width = query
        return 2 * N * heads * length * key[2] * (width + result[-1])
    N, length, width = query  # `heads` heads of width / heads
    return 2 * N * length * key[-2] * (width + result[-1])


COUNTED = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "NhwcConv": _conv,
    "Attention": _attention,
    "MultiHeadAttention": _attention,
}


def costs(folder: Path, manifest: Any, gpu: Gpu, graph: str | None = None, batch: int = 1) -> Iterator[dict[str, Any]]:
    """What one run of each graph costs with each runner, and with the derived graph where ONNX Runtime has one.

    batch: rows. Yields {"graph", "sizes", "runner", "kernels", "bytes", "operations", "eight_bits", "floor"}, ready for
    JSON; eight_bits is the part of operations in fp8 or int8, which TensorRT alone runs; floor is in seconds. Raises
    EngineError for a graph that the bundle lacks, and for eight bits that are for a CPU or that the GPU does not know.
    """
    from .derived import derive, has_derived
    from .plans import size_text, usual

    eight = manifest.precision in EIGHT_BITS
    if eight and manifest.base == "fp32":
        raise EngineError(
            f"--cost must be of a bundle for GPUs, got one in {manifest.precision} for OpenVINO. Name another, such as "
            "one in fp16."
        )
    if graph is not None and graph not in manifest.graphs:
        raise EngineError(f"graph must be one of {', '.join(manifest.graphs)}, got {graph!r}.")
    for name, spec in manifest.graphs.items():
        if graph not in (None, name):
            continue
        sizes = usual(spec, manifest, batch)
        sizes = {axis: sizes.get(axis, batch) for axis in spec.free}
        path = folder / spec.file
        plain = Graph(load(path), sizes, str(path))
        forms = [(one.label, plain, one) for label, one in RUNNERS.items() if not eight or label == "tensorrt"]
        model = derive(path, manifest.sides()) if not eight and has_derived(manifest, name) else None
        if model is not None:
            forms.insert(1, ("ONNX Runtime, derived", Graph(model, sizes, str(path)), RUNNERS["onnxruntime"]))
        precision = "fp32" if name in FLOAT32_GRAPHS else manifest.precision
        for label, form, runner in forms:
            found = kernels(form, runner)
            yield {
                "graph": name,
                "sizes": size_text(sizes),
                "runner": label,
                "kernels": sum(kernel.launches for kernel in found),
                "bytes": sum(kernel.bytes for kernel in found),
                "operations": sum(kernel.operations for kernel in found),
                "eight_bits": sum(kernel.operations for kernel in found if kernel.eight),
                "floor": floor(found, gpu, precision),
            }


def text(found: Sequence[Mapping[str, Any]], gpu: Gpu) -> str:
    """The table of `costs`."""
    lines = [f"Read off the graphs, for {gpu.name}: the least that a run takes, with each kernel at full rate."]
    eight = any(one["eight_bits"] for one in found)
    column = f" {'8 bits':>8}" if eight else ""
    lines.append(f"{'graph':18} {'sizes':16} {'run by':22} {'kernels':>8} {'GB':>8} {'GFLOP':>9}{column} {'floor':>10}")
    for one in found:
        share = f" {one['eight_bits'] / max(one['operations'], 1):8.0%}" if eight else ""
        lines.append(
            f"{one['graph']:18} {one['sizes']:16} {one['runner']:22} {one['kernels']:8} {one['bytes'] / 1e9:8.3f} "
            f"{one['operations'] / 1e9:9.1f}{share} {one['floor'] * 1e3:7.3f} ms"
        )
    if eight:
        lines.append(
            "8 bits: the share of operations in fp8 or int8, as the graph has it. A GPU may choose other kernels."
        )
    return "\n".join(lines)
