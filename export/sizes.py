"""What the exporter leaves to be tidied in graphs whose pictures have any size.

    symbols = side_symbols(program, graph) # {"h_": ("h", 2), "s76": ("w", 2)}: the exporter's names, and multiples
    settle(program.model)                  # targets of Reshape and Expand by numbers, 0 and -1, as far as they go
    name_sides(program.model, graph, symbols)   # axes h, w, H and W, as the contract names them

The exporter computes the target of each Reshape from the shapes of inputs. Most need no computing: 0 copies a size and
-1 stands for the rest. The other passes know these targets, and engines fold them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .graphs import Graph


def side_symbols(program: Any, graph: Graph) -> dict[str, tuple[str, int]]:
    """The exporter's symbols for the sides of pictures -> the side, and how many times the symbol it is.

    The same symbol appears under two names: the one that the example's axis was given, and one that PyTorch made up.
    """
    found: dict[str, tuple[str, int]] = {}
    placeholders = {node.name: node for node in program.exported_program.graph.nodes if node.op == "placeholder"}
    for name in graph.inputs:
        for axis, side in graph.sides(name).items():
            found[f"{side}_"] = (side, graph.multiple_of(side))
            if name in placeholders:
                expression = placeholders[name].meta["val"].shape[axis].node.expr
                found |= {str(symbol): (side, graph.multiple_of(side)) for symbol in expression.free_symbols}
    return found


def at_example(graph: Graph, symbols: Mapping[str, tuple[str, int]]) -> dict[str, int]:
    """The values of symbols for a graph's example inputs."""
    sides = {side: graph.inputs[name].shape[axis] for name in graph.inputs for axis, side in graph.sides(name).items()}
    return {symbol: sides[side] // multiple for symbol, (side, multiple) in symbols.items()}


def number_of(size: object, known: Mapping[str, int]) -> int | None:
    """The value of a size, which is a number or a product of known symbols, such as "2*h_"; else None."""
    out = 1
    for factor in str(getattr(size, "value", size)).split("*"):
        number = int(factor) if factor.isdecimal() else known.get(factor)
        if number is None:
            return None
        out *= number
    return out


def settle(model: ir.Model) -> None:
    """Writes targets of Reshape and Expand as constants where they need no computing, in place."""
    graph = model.graph
    made: dict[tuple[Any, ...], ir.Value] = {}
    for node in list(graph):
        if node.op_type not in ("Reshape", "Expand") or node.inputs[1] is None:
            continue
        target, before, after = node.inputs[1], node.inputs[0].shape, node.outputs[0].shape  # type: ignore[union-attr]
        if target.const_value is not None or before is None or after is None:
            continue
        maker = target.producer()
        pieces = list(maker.inputs) if maker is not None and maker.op_type == "Concat" else []
        parts: list[int | ir.Value] = []
        same = [axis < len(before) and _known(size) and before[axis] == size for axis, size in enumerate(after)]
        for axis, size in enumerate(after):
            piece = pieces[axis] if len(pieces) == len(after) else None
            if node.op_type == "Expand" and same[axis]:
                parts.append(1)
            elif isinstance(size, int):
                parts.append(size)
            elif node.op_type == "Reshape" and same[axis]:
                parts.append(0)
            elif piece is None:
                parts.append(-1)
            else:
                parts.append(_number(piece) or piece)
        free = [axis for axis, part in enumerate(parts) if not isinstance(part, int)]
        if node.op_type == "Reshape" and free and -1 not in parts:
            parts[free[0]] = -1
        if parts.count(-1) > 1 or (node.op_type == "Expand" and -1 in parts):
            continue
        key = tuple(part if isinstance(part, int) else part.name for part in parts)
        if key not in made:
            made[key] = _vector(graph, node, parts, len(made))
        node.replace_input_with(1, made[key])
        node.attributes.pop("allowzero", None)  # 0 now copies a size; no size is 0
    RemoveUnusedNodesPass()(model)


def _known(size: Any) -> bool:
    """Whether a size has a number or a name. Two unknown sizes compare equal, and may differ."""
    return getattr(size, "value", size) is not None


def name_sides(model: ir.Model, graph: Graph, symbols: Mapping[str, tuple[str, int]]) -> None:
    """Gives the free axes of pictures the contract's names, in place, and those of other tensors terms of them.

    symbols: the exporter's symbol -> (side, multiple), when the side is that many times the symbol.
    """
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None and any(not isinstance(size, int) for size in value.shape):
            value.shape = ir.Shape([_in_sides(size, symbols) for size in value.shape])
    outputs = zip(graph.outputs, model.graph.outputs, strict=True)
    for name, value in (*((value.name, value) for value in model.graph.inputs), *outputs):
        if value.shape is not None:
            named: list[Any] = list(value.shape)
            for axis, side in graph.sides(str(name)).items():
                named[axis] = ir.SymbolicDim(side)
            value.shape = ir.Shape(named)


def _in_sides(size: Any, symbols: Mapping[str, tuple[str, int]]) -> Any:
    """A size such as "2*s9" as "h/2", where h is 4 * s9; anything else as it is. `engines.fixing` reads it."""
    text = getattr(size, "value", None)
    if not isinstance(text, str):
        return size
    number, sides = Fraction(1), []
    for factor in text.split("*"):
        if factor.isdecimal():
            number *= int(factor)
        elif factor in symbols:
            side, multiple = symbols[factor]
            number /= multiple
            sides.append(side)
        else:
            return size
    terms = [str(number.numerator)] * (number.numerator != 1) + sorted(sides)
    return ir.SymbolicDim("*".join(terms) + f"/{number.denominator}" * (number.denominator != 1))


def memory_of(model: ir.Model, known: Mapping[str, int]) -> int:
    """Bytes of intermediate tensors that are there at once when the nodes run in order, for a row with both branches.

    known: values of the picture's sides. What engines fuse, keep in place or pack counts in full.
    """
    last = {value: number for number, node in enumerate(model.graph) for value in node.inputs if value is not None}
    known = {**known, "B": 1, "G": 2}
    now = most = 0
    leaving: dict[int, int] = {}
    for number, node in enumerate(model.graph):
        for value in node.outputs:
            sizes = [number_of(size, known) for size in value.shape] if value.shape is not None else [None]
            bits = value.dtype.bitwidth if value.dtype is not None else 32
            size = math.prod(n for n in sizes if n is not None) * bits // 8 if None not in sizes else 0
            now += size
            leaving[last.get(value, number)] = leaving.get(last.get(value, number), 0) + size
        scores = _scores(node, known)
        most = max(most, now + scores)
        now -= leaving.pop(number, 0)
    return most


def _scores(node: ir.Node, known: Mapping[str, int]) -> int:
    """Bytes of the table of scores of an Attention, which ONNX Runtime keeps; MultiHeadAttention works in tiles."""
    if node.op_type != "Attention" or any(value is None or value.shape is None for value in node.inputs[:2]):
        return 0
    query, key = ([number_of(n, known) for n in value.shape] for value in node.inputs[:2])  # type: ignore[union-attr]
    if None in query or len(query) != 4 or key[2] is None:
        return 0
    return 4 * math.prod(query[:3]) * key[2]  # type: ignore[arg-type]


def _vector(graph: ir.Graph, node: ir.Node, parts: list[int | ir.Value], number: int) -> ir.Value:
    """A vector of numbers and of values [1], before `node`. Neighbouring numbers are one constant."""

    def constant(numbers: list[int]) -> ir.Value:
        name = "sizes_" + "_".join(str(n).replace("-", "m") for n in numbers)
        if name not in graph.initializers:
            tensor = ir.tensor(np.array(numbers, np.int64), name=name)
            value = ir.Value(
                name=name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            graph.register_initializer(value)
        return graph.initializers[name]

    runs: list[list[int] | ir.Value] = []
    for part in parts:
        if not isinstance(part, int):
            runs.append(part)
        elif len(runs) > 1 and isinstance(last := runs[-1], list):  # the first stays alone: `branches` looks at it
            last.append(part)
        else:
            runs.append([part])
    if all(isinstance(part, int) for part in parts):
        return constant([part for part in parts if isinstance(part, int)])
    joined = ir.node(
        "Concat", [constant(run) if isinstance(run, list) else run for run in runs], {"axis": 0}, name=f"sizes_{number}"
    )
    out = joined.outputs[0]
    out.name, out.shape, out.type = f"sizes_{number}_out", ir.Shape([len(parts)]), ir.TensorType(ir.DataType.INT64)
    graph.insert_before(node, joined)
    return out


def _number(value: ir.Value) -> int | None:
    return None if value.const_value is None else int(value.const_value.numpy().reshape(-1)[0])
