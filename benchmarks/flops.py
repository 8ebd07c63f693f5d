"""Counts the floating-point operations of a graph from its ONNX file.

    from handiffuser.benchmarks.flops import count
    count(Path("bundle/unet.onnx"), {"B": 1})        # {"Conv": ..., "MatMul": ..., ...}

It counts the work of a matrix unit, 2 operations for a multiply-add: MatMul, Gemm, Conv, Attention. The measured matrix
ceiling limits this work. A node that the model defines as a function, such as an export's MultiHeadAttention, counts as
its definition. Shapes come from ONNX's shape inference, which needs the `onnx` package.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import EngineError

Shape = tuple[int, ...]
LARGE = 4096  # bytes; smaller tensors may be shapes, whose values inference needs


def count(path: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """Operations of one run by kind of node; sizes: free dimension -> size, such as {"B": 1}.

    Raises EngineError without the onnx package, or for a graph with a shape that cannot be inferred.
    """
    try:
        import onnx
        from onnx import inliner, shape_inference
    except ImportError as error:
        raise EngineError(
            'Counting operations needs handiffuser[export]: pip install "handiffuser[export]".'
        ) from error
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    for value in graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    # Shapes that the exporter noted speak of the free dimensions' names; inference is to find numbers.
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    for tensor in graph.initializer:
        if len(tensor.raw_data) > LARGE:
            tensor.ClearField("raw_data")
    model = inliner.inline_local_functions(model)
    for node in model.graph.node:
        if node.op_type == "GroupNormalization":  # onnx does not infer it; its output has its input's shape
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, Shape | None] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        known = value.type.tensor_type.HasField("shape") and all(dims)
        shapes[value.name] = tuple(dims) if known else None
    total: Counter[str] = Counter()
    for node in inferred.node:
        if node.op_type not in COUNTED:
            continue
        needed = [shapes.get(name) for name in (*node.input[:3], node.output[0])]
        given, result = needed[: len(node.input)], needed[-1]
        if result is None or None in given[:2]:
            raise EngineError(f"The shapes of {node.op_type} {node.name!r} in {path} cannot be inferred.")
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        total[node.op_type] += COUNTED[node.op_type](given, result, attributes)
    return dict(total)


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
    return 2 * N * length * key[1] * (width + result[-1])


COUNTED = {"MatMul": _matmul, "Gemm": _gemm, "Conv": _conv, "Attention": _attention}
