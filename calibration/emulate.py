"""Emulates on any device how a GPU stores half precision.

ONNX Runtime's CPU has half-precision kernels for a few operators only. It runs the others in float32 without rounding
between them, so a graph that overflows on a GPU looks perfect there. It does not run bfloat16 at all. An emulated graph
is float32 throughout, and rounds every half tensor where its node stores it. Products are summed in float32, as tensor
cores do. Values within a fused kernel (the scores of attention) are not rounded.
"""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto, NodeProto, TensorProto

from ..contract import Manifest
from .graphs import HALF, cast, element_types, rewrite_bundle, widen

# Operators that only move numbers, which are rounded already.
MOVES = {
    "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Slice",
    "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


def emulate(model: ModelProto) -> ModelProto:
    """A float32 graph that rounds where `model` stores half precision. Its inputs and outputs are float32 instead."""
    half = {name: kind for name, kind in element_types(model).items() if kind in HALF}
    if half.keys() <= {tensor.name for tensor in model.graph.initializer}:
        return model  # only weights are stored in half
    nodes: list[NodeProto] = []

    def store(computed: str, name: str) -> None:
        nodes.extend([cast(computed, f"{name}/half", half[name]), cast(f"{name}/half", name, TensorProto.FLOAT)])

    out = ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    del graph.node[:], graph.value_info[:]
    for tensor in graph.initializer:
        if tensor.name in half:  # the file stays small, and loading folds the cast
            nodes.append(cast(f"{tensor.name}/half", tensor.name, TensorProto.FLOAT))
            tensor.name += "/half"
    rounded = {}
    for value in graph.input:
        if value.name in half:
            rounded[value.name] = f"{value.name}/rounded"
            half[rounded[value.name]] = half[value.name]
            store(value.name, rounded[value.name])
    for value in (*graph.input, *graph.output):
        if value.name in half:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in model.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [rounded.get(name, name) for name in node.input]
        widen(copy)
        nodes.append(copy)
        if node.op_type not in MOVES:
            copy.output[:] = [f"{name}/computed" if name in half else name for name in node.output]
            for name in node.output:
                if name in half:
                    store(f"{name}/computed", name)
    graph.node.extend(nodes)
    return out


def emulate_bundle(folder: Path, out: Path) -> Manifest:
    """Writes a bundle's emulation into the folder `out`: it runs wherever a float32 bundle does."""
    return rewrite_bundle(folder, out, lambda _, model: emulate(model))
