"""Fixes the sides of pictures in a graph that takes any size, as if it had been exported for one.

    fix_sizes(model, {"h": 64, "w": 96})     # an `onnx_ir.Model`, in place

What follows from the sides becomes constants: targets of Reshape, positions of pixels. Shapes of tensors become
numbers; `export.sizes` writes them as terms of the sides. Rewrites for a GPU need both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

MAX_ELEMENTS = 1 << 24  # of a constant


def fix_sizes(model: ir.Model, sides: Mapping[str, int]) -> int:
    """Returns how many nodes became constants; 0 for a graph without free sides."""
    graph = model.graph
    named = {getattr(size, "value", None) for value in graph.inputs if value.shape is not None for size in value.shape}
    if not named & sides.keys():
        return 0
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([size_at(size, sides) for size in value.shape])
    found: dict[ir.Value, np.ndarray] = {}  # what follows from shapes
    for node in list(graph):
        results = _shape(node) if node.op_type == "Shape" else _computed(node, found)
        if results is not None:
            found |= zip(node.outputs, results, strict=True)
    for value, array in found.items():
        uses = [use for use in value.uses() if use.node.outputs[0] not in found]
        if uses or value in graph.outputs:
            tensor = ir.tensor(array, name=f"{value.name}_fixed")
            constant = ir.Value(
                name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            graph.register_initializer(constant)
            for use in uses:
                use.node.replace_input_with(use.idx, constant)
    RemoveUnusedNodesPass()(model)
    return len(found)


def size_at(size: Any, sides: Mapping[str, int]) -> Any:
    """A size such as "h*w/4" as a number; one that has another symbol, such as "B*G", as it is."""
    text = getattr(size, "value", None)
    if not isinstance(text, str):
        return size
    term, _, divisor = text.partition("/")
    numbers = [int(factor) if factor.isdecimal() else sides.get(factor) for factor in term.split("*")]
    if None in numbers:
        return size
    return math.prod(number for number in numbers if number is not None) // int(divisor or 1)


def _shape(node: ir.Node) -> list[np.ndarray] | None:
    """The output of a Shape whose sizes are known."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    sizes = list(shape)[start:end]
    return [np.array(sizes, np.int64)] if all(isinstance(size, int) for size in sizes) else None


def _computed(node: ir.Node, found: Mapping[ir.Value, np.ndarray]) -> list[np.ndarray] | None:
    """The outputs of a node that takes what follows from shapes, and constants; None for others."""
    from onnx.reference import ReferenceEvaluator

    inputs = [value for value in node.inputs if value is not None]
    if node.domain or not any(value in found for value in inputs):
        return None
    feeds: dict[str, np.ndarray] = {}
    for value in inputs:
        if value not in found and value.const_value is None:
            return None
        feeds[str(value.name)] = found[value] if value in found else value.const_value.numpy()  # type: ignore[union-attr]
    results: Any = ReferenceEvaluator(ir.to_proto(node)).run(None, feeds)
    if any(result.size > MAX_ELEMENTS for result in results):
        return None
    return [np.asarray(result) for result in results]
