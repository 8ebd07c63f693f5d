"""Computes once what both branches of guidance have in common.

Up to the first cross-attention, both branches see the same numbers: the latents and the step's time. The exported graph
doubles the rows at its beginning. Here the doubling moves behind all operators that treat rows one by one and see only
these numbers, so this part runs for B rows instead of 2 B. The result is exact: the same operators on the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

# Operators that compute each row from that row alone, as long as their other inputs are constants.
ROW_BY_ROW = frozenset(
    (
        "Add Sub Mul Div Sqrt Neg Erf Sigmoid Tanh Gelu Cast Conv MatMul Gemm GroupNormalization LayerNormalization "
        + "Attention MultiHeadAttention Resize Pad DepthToSpace Clip Softmax"
    ).split()
)
MOVES = frozenset(("Slice", "Unsqueeze", "Squeeze", "Transpose", "Reshape", "Split"))
AXES = {"Concat": "axis", "Split": "axis"}  # operators that keep rows apart where this axis is not the first
LISTS = {"Slice": 3, "Unsqueeze": 1, "Squeeze": 1, "ReduceMean": 1}  # and where this input does not name the first axis


def share_branches(model: ir.Model) -> int:
    """Moves the doubling of rows, in place, as far down as possible; returns how many nodes then see single rows."""
    graph = model.graph
    pattern: ir.Node | None = None
    shared: dict[ir.Value, None] = {}  # values that are the same in both branches, in order
    moved: dict[ir.Node, None] = {}
    for node in graph:
        if _doubled(node) is not None:
            shared[node.outputs[0]], pattern = None, node
        elif any(value in shared for value in node.inputs) and _row_by_row(node, shared):
            moved[node] = None
            shared |= dict.fromkeys(node.outputs)
    # Nodes that only move numbers for users of both branches stay in place: doubling costs a copy.
    for node in reversed(list(moved)):
        users = [use.node for value in node.outputs for use in value.uses()]
        if node.op_type in MOVES and not any(user in moved for user in users):
            del moved[node]
            for value in node.outputs:
                del shared[value]
    if not moved or pattern is None:
        return 0
    single: dict[ir.Value, ir.Value] = {}  # value of doubled rows -> its value of single rows
    for value in shared:
        maker = value.producer()
        assert maker is not None
        if maker not in moved:
            single[value] = _doubled(maker)  # type: ignore[assignment]
        elif value is maker.outputs[0]:
            single.update(_once(graph, maker, single))
    for old, new in single.items():
        uses = [use for use in old.uses() if use.node not in moved]
        if old.producer() in moved and uses:
            _double(graph, pattern, old, new, uses)
    RemoveUnusedNodesPass()(model)
    return len(moved)


def _once(graph: ir.Graph, node: ir.Node, single: dict[ir.Value, ir.Value]) -> dict[ir.Value, ir.Value]:
    """Inserts a copy of a node for single rows before it; returns its outputs -> the copy's."""
    copy = ir.Node(
        node.domain,
        node.op_type,
        [single.get(value, value) if value is not None else None for value in node.inputs],
        node.attributes.values(),
        num_outputs=len(node.outputs),
        name=f"{node.name}_once",
    )
    graph.insert_before(node, copy)
    rows = next(single[value].shape for value in node.inputs if value in single)
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name, new.type = f"{old.name}_once", old.type
        if old.shape is not None and rows is not None:
            new.shape = ir.Shape([rows[0], *list(old.shape)[1:]])  # type: ignore[list-item]
    return dict(zip(node.outputs, copy.outputs, strict=True))


def _doubled(node: ir.Node) -> ir.Value | None:
    """x, where a node ends x [B, ...] -> [B, 1, ...] -> [B, G, ...] -> [G B, ...] and G is not a constant."""
    expand = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] is not None else None
    if expand is None or expand.op_type != "Expand":
        return None
    unsqueeze, sizes = expand.inputs[0].producer(), expand.inputs[1].producer()  # type: ignore[union-attr]
    if unsqueeze is None or sizes is None or (unsqueeze.op_type, sizes.op_type) != ("Unsqueeze", "Concat"):
        return None
    one, branches = sizes.inputs[:2]
    if _numbers(unsqueeze.inputs[1]) != [1] or _numbers(one) != [1] or _numbers(branches) is not None:
        return None
    shape = _numbers(node.inputs[1])
    if shape is None:  # free sizes are computed
        return unsqueeze.inputs[0] if _first(node.inputs[1]) == -1 else None
    return unsqueeze.inputs[0] if shape[0] == -1 and min(shape[1:], default=1) > 0 else None


def _row_by_row(node: ir.Node, shared: Container[ir.Value]) -> bool:
    """Whether a node computes each row from that row of shared values, and from constants."""
    if node.op_type == "Reshape" and node.inputs[0] in shared and _first(node.inputs[1]) == 0:
        return not node.attributes.get_int("allowzero", 0)  # it copies the number of rows
    if not all(value is None or value in shared or _constant(value) for value in node.inputs):
        return False
    if node.op_type in ROW_BY_ROW:
        return True
    if node.op_type in AXES:
        return node.attributes.get_int(AXES[node.op_type], 0) > 0
    if node.op_type in LISTS:
        given = node.inputs[LISTS[node.op_type]] if len(node.inputs) > LISTS[node.op_type] else None
        axes = _numbers(given)
        return axes is not None and min(axes) > 0
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm")
        return order is not None and order[0] == 0
    if node.op_type == "Reshape":
        shape, whole = _numbers(node.inputs[1]), node.attributes.get_int("allowzero", 0)
        before = node.inputs[0].shape if node.inputs[0] is not None else None
        if shape is None or before is None or not _same_rows(before, node.outputs[0].shape):
            return False
        return shape[0] == -1 or (shape[0] == 0 and not whole)
    return False


def _same_rows(before: ir.Shape, after: ir.Shape | None) -> bool:
    """Whether a Reshape keeps rows apart."""
    if after is None:
        return False
    sizes = [list(shape)[1:] for shape in (before, after)]
    if not all(isinstance(size, int) for each in sizes for size in each):
        return False
    return math.prod(sizes[0]) == math.prod(sizes[1])  # type: ignore[arg-type]


def _constant(value: ir.Value) -> bool:
    """Whether a value is a weight, or a cast of one."""
    node = value.producer()
    if node is None:
        return value.const_value is not None
    return node.op_type in ("Cast", "Constant") and all(_constant(each) for each in node.inputs if each is not None)


def _numbers(value: ir.Value | None) -> list[int] | None:
    if value is None or value.const_value is None:
        return None
    return [int(number) for number in value.const_value.numpy().reshape(-1)]


def _first(value: ir.Value | None) -> int | None:
    """The first number of a computed target of Reshape, if that is known."""
    maker = value.producer() if value is not None else None
    if maker is None or maker.op_type != "Concat":
        return None
    numbers = _numbers(maker.inputs[0])
    return None if numbers is None else numbers[0]


def _double(graph: ir.Graph, pattern: ir.Node, old: ir.Value, new: ir.Value, uses: list[Any]) -> None:
    """Doubles the rows of `new` right behind it, for these uses of `old`."""
    expand = pattern.inputs[0].producer()  # type: ignore[union-attr]
    unsqueeze, sizes = expand.inputs[0].producer(), expand.inputs[1].producer()  # type: ignore[union-attr]
    one, branches = sizes.inputs[:2]  # type: ignore[union-attr]
    assert branches is not None
    rest: list[Any] = list(old.shape)[1:]  # type: ignore[arg-type]
    stem = old.name

    def constant(name: str, numbers: list[int]) -> ir.Value:
        tensor = ir.tensor(np.array(numbers, np.int64), name=f"{stem}_{name}")
        value = ir.Value(
            name=tensor.name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(value)
        return value

    nodes = [
        ir.node("Unsqueeze", [new, unsqueeze.inputs[1]], name=f"{stem}_row"),  # type: ignore[union-attr]
        ir.node("Concat", [one, branches, *[one] * len(rest)], {"axis": 0}, name=f"{stem}_sizes"),
    ]
    nodes.append(ir.node("Expand", [nodes[0].outputs[0], nodes[1].outputs[0]], name=f"{stem}_branches"))
    if all(isinstance(size, int) for size in rest):
        target = constant("shape", [-1, *rest])
    else:
        nodes.append(ir.node("Shape", [new], {"start": 1}, name=f"{stem}_rest"))
        nodes.append(
            ir.node("Concat", [constant("all", [-1]), nodes[-1].outputs[0]], {"axis": 0}, name=f"{stem}_shape")
        )
        target = nodes[-1].outputs[0]
    nodes.append(ir.node("Reshape", [nodes[2].outputs[0], target], {"allowzero": 1}, name=f"{stem}_rows"))
    for node in nodes:
        node.outputs[0].name = f"{node.name}_out"
    doubled = nodes[-1].outputs[0]
    doubled.shape, doubled.type = old.shape, old.type
    graph.insert_after(_later(graph, branches, new), nodes)
    for use in uses:
        use.node.replace_input_with(use.idx, doubled)


def _later(graph: ir.Graph, *values: ir.Value) -> ir.Node:
    """The node that stands last among those that make these values."""
    makers = {value.producer() for value in values}
    return [node for node in graph if node in makers][-1]
