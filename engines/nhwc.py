"""Writes a graph in the layout in which tensor cores work: the channels of a pixel side by side (NHWC).

    read_norms(model)                   # group norms that were written out become one node again
    channels_last(model)                # in place

ONNX's convolutions and group norms take channels first (NCHW), so ONNX Runtime's CUDA provider transposes around each
convolution. For ONNX's GroupNormalization it has no kernel at all, and runs the operator's definition in some twenty
kernels (microsoft/onnxruntime#24538). Its contributed NhwcConv and GroupNorm take NHWC. What lies between moves along,
and a transposition is left only where a picture enters or leaves.

The limits of these kernels, read in ONNX Runtime's sources: NhwcConv takes its weights as [out, height, width, in].
GroupNorm takes scale and bias in float32 and an even number of channels a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .editing import CONTRIBUTED, Editor, is_constant, made_by, number, only_user, replace, sizes

# Rank -> how a value is transposed to channels last, and back. Rank 5 is [B, branches, C, H, W].
TO_LAST = {3: [0, 2, 1], 4: [0, 2, 3, 1], 5: [0, 1, 3, 4, 2]}
TO_FIRST = {3: [0, 2, 1], 4: [0, 3, 1, 2], 5: [0, 1, 4, 2, 3]}
UNARY = ("Abs", "Cast", "Clip", "Erf", "Gelu", "Identity", "Neg", "Relu", "Round", "Sigmoid", "Sqrt", "Tanh")
BINARY = ("Add", "Div", "Mul", "Sub")
TYPES: tuple[Any, ...] = (ir.DataType.FLOAT, ir.DataType.FLOAT16)  # of the contributed kernels


def channels_last(model: ir.Model) -> int:
    """Moves convolutions, group norms and what lies between to NHWC, in place; returns how many convolutions moved."""
    return _Layout(model).run()


class _Layout:
    """last: a value with channels first -> the same value with channels last."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.edit = model, Editor(model, "nhwc")
        self.last: dict[ir.Value, ir.Value] = {}
        self.first: dict[ir.Value, ir.Value] = {}  # the way back, where somebody needs it
        self.weights: dict[ir.Value, ir.Value] = {}
        self.convolutions = 0

    def run(self) -> int:
        graph = self.model.graph
        for node in list(graph):
            move = MOVES.get(node.op_type) if not node.domain else None
            if move is not None and move(self, node):
                continue
            for index, value in enumerate(node.inputs):
                if value is not None and value in self.last:
                    node.replace_input_with(index, self.back(value, node))
        end = ir.node("Identity", [])  # a place behind all others
        graph.append(end)
        for value in list(graph.outputs):
            if value in self.last:
                replace(value, self.back(value, end))
        graph.remove(end)
        if self.convolutions:
            self.model.opset_imports[CONTRIBUTED] = 1
        RemoveUnusedNodesPass()(self.model)
        return self.convolutions

    def to_last(self, value: ir.Value, node: ir.Node) -> ir.Value:
        """The value with channels last, for use in the place of `node`."""
        if value not in self.last:
            perm, shape = TO_LAST[len(value.shape or ())], list(value.shape or ())
            self.last[value] = self.edit.add(
                node, "Transpose", [value], [shape[n] for n in perm], attributes={"perm": perm}
            )
            self.first[value] = value
        return self.last[value]

    def back(self, value: ir.Value, node: ir.Node) -> ir.Value:
        """The value with channels first, for use in the place of `node`."""
        if value not in self.first:
            moved = self.last[value]
            shape = list(moved.shape or ())
            perm = TO_FIRST[len(shape)]
            self.first[value] = self.edit.add(
                node, "Transpose", [moved], [shape[n] for n in perm], attributes={"perm": perm}
            )
        return self.first[value]

    def put(self, node: ir.Node, op: str, inputs: list, shape: list, domain: str = "", **attributes) -> bool:
        """Adds the moved form of a node; its only output then has channels last."""
        old = node.outputs[0]
        self.last[old] = self.edit.add(node, op, inputs, shape, domain, attributes, old.dtype)
        return True

    def convolution(self, node: ir.Node) -> bool:
        x, weight = node.inputs[:2]
        ints, out = node.attributes.get_ints, node.outputs[0]
        plain = node.attributes.get_int("group", 1) == 1
        plain = plain and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
        if not plain or not is_constant(weight) or out.dtype not in TYPES or len(sizes(out) or ()) != 4:
            return False
        assert x is not None and weight is not None and weight.shape is not None and out.shape is not None
        if weight not in self.weights:  # ONNX Runtime computes it once, when it loads the graph
            shape = [weight.shape[n] for n in TO_LAST[4]]
            self.weights[weight] = self.edit.add(node, "Transpose", [weight], shape, attributes={"perm": TO_LAST[4]})
        height, width = weight.shape[2:]
        self.convolutions += 1
        return self.put(
            node, "NhwcConv", [self.to_last(x, node), self.weights[weight], *node.inputs[2:]],
            [out.shape[n] for n in TO_LAST[4]], CONTRIBUTED,
            kernel_shape=[height, width], pads=list(ints("pads", [0] * 4) or []),
            strides=list(ints("strides", [1, 1]) or []), dilations=list(ints("dilations", [1, 1]) or []),
        )  # fmt: skip

    def norm(self, node: ir.Node) -> bool:
        x, scale, bias = node.inputs
        known, groups = sizes(x), node.attributes["num_groups"].as_int()
        if known is None or len(known) not in (3, 4) or not isinstance(known[1], int) or x.dtype not in TYPES:  # type: ignore[union-attr]
            return False
        if known[1] % groups or (known[1] // groups) % 2 or not (is_constant(scale) and is_constant(bias)):
            return False
        moved = self.to_last(x, node)  # type: ignore[arg-type]
        shape = list(moved.shape)  # type: ignore[arg-type]
        if len(shape) == 3:
            moved = self.edit.add(
                node, "Reshape", [moved, self.edit.ints(0, 0, 1, shape[2])], [*shape[:2], 1, shape[2]]
            )
        inputs = [moved, *(self.edit.constant(number(v).astype(np.float32)) for v in (scale, bias))]  # type: ignore[union-attr]
        settings = {"groups": groups, "epsilon": node.attributes.get_float("epsilon", 1e-5), "activation": 0}
        out = self.edit.add(node, "GroupNorm", inputs, list(moved.shape), CONTRIBUTED, {**settings, "channels_last": 1})  # type: ignore[arg-type]
        if len(shape) == 3:
            out = self.edit.add(node, "Reshape", [out, self.edit.ints(0, shape[1], shape[2])], shape)
        self.last[node.outputs[0]] = out
        return True

    def unary(self, node: ir.Node) -> bool:
        x = node.inputs[0]
        if x not in self.last or any(value is not None and sizes(value) != [] for value in node.inputs[1:]):
            return False
        moved = self.last[x]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        return self.put(node, node.op_type, [moved, *node.inputs[1:]], list(moved.shape or ()), **attributes)

    def binary(self, node: ir.Node) -> bool:
        moved = [value for value in node.inputs if value in self.last]
        if not moved or len(sizes(node.outputs[0]) or ()) not in (3, 4):
            return False
        rank = len(sizes(node.outputs[0]))  # type: ignore[arg-type]
        both = [self.beside(value, node, rank) for value in node.inputs]  # type: ignore[arg-type]
        if None in both:
            return False
        shape = list(node.outputs[0].shape)  # type: ignore[arg-type]
        return self.put(node, node.op_type, both, [shape[n] for n in TO_LAST[rank]])

    def beside(self, value: ir.Value, node: ir.Node, rank: int) -> ir.Value | None:
        """An operand with channels last, for an operator whose result has this rank; None where it has another form."""
        shape = sizes(value)
        if shape is None or value in self.last:
            return self.last.get(value) if shape is None or len(shape) == rank else None
        if is_constant(value):
            if math.prod(shape) == 1:  # type: ignore[arg-type]
                return value if len(shape) <= 1 else self.edit.constant(number(value).reshape(1))  # type: ignore[union-attr]
            numbers = number(value)
            assert numbers is not None
            numbers = numbers.reshape((1,) * (rank - len(shape)) + numbers.shape)
            return self.edit.constant(numbers.transpose(TO_LAST[rank]))
        if len(shape) != rank:
            return value if not shape else None
        unsqueezed = made_by(value, "Unsqueeze")  # [B, C] -> [B, C, 1, 1], the bias of the time
        if unsqueezed is not None and rank == 4 and shape[2:] == [1, 1] and len(sizes(unsqueezed.inputs[0]) or ()) == 2:
            flat = unsqueezed.inputs[0]
            return self.edit.add(node, "Unsqueeze", [flat, self.edit.ints(1, 2)], [shape[0], 1, 1, shape[1]])  # type: ignore[list-item]
        return self.to_last(value, node)

    def concat(self, node: ir.Node) -> bool:
        out = node.outputs[0]
        if node.attributes["axis"].as_int() not in (1, -3) or len(sizes(out) or ()) != 4:
            return False
        if not any(value in self.last for value in node.inputs):
            return False
        parts = [self.to_last(value, node) for value in node.inputs if value is not None]
        return self.put(node, "Concat", parts, [out.shape[n] for n in TO_LAST[4]], axis=3)  # type: ignore[index]

    def resize(self, node: ir.Node) -> bool:
        x, scales, out = node.inputs[0], number(node.inputs[2]) if len(node.inputs) == 3 else None, node.outputs[0]
        if (
            x not in self.last
            or scales is None
            or scales.shape != (4,)
            or out.shape is None
            or "axes" in node.attributes
        ):
            return False
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        inputs = [self.last[x], None, self.edit.constant(scales[TO_LAST[4]])]
        return self.put(node, "Resize", inputs, [out.shape[n] for n in TO_LAST[4]], **attributes)

    def pad(self, node: ir.Node) -> bool:
        x, pads, out = node.inputs[0], number(node.inputs[1]), node.outputs[0]
        if x not in self.last or pads is None or pads.shape != (8,) or len(node.inputs) > 3 or out.shape is None:
            return False
        order = TO_LAST[4] + [n + 4 for n in TO_LAST[4]]
        inputs = [self.last[x], self.edit.constant(pads[order]), *node.inputs[2:]]
        mode = node.attributes.get_string("mode", "constant")
        return self.put(node, "Pad", inputs, [out.shape[n] for n in TO_LAST[4]], mode=mode)

    def depth_to_space(self, node: ir.Node) -> bool:
        """A transposition of six axes; a pixel's channels are [row, column, channel] of a block."""
        x, out, n = node.inputs[0], node.outputs[0], node.attributes["blocksize"].as_int()
        if x not in self.last or node.attributes.get_string("mode", "DCR") != "DCR" or out.shape is None:
            return False
        batch, channels, height, width = list(out.shape)
        if not (isinstance(channels, int) and isinstance(height, int) and isinstance(width, int)):
            return False
        low = [height // n, width // n]
        split = self.edit.add(
            node, "Reshape", [self.last[x], self.edit.ints(0, *low, n, n, channels)], [batch, *low, n, n, channels]
        )
        perm = [0, 1, 3, 2, 4, 5]
        turned = self.edit.add(
            node, "Transpose", [split], [batch, low[0], n, low[1], n, channels], attributes={"perm": perm}
        )
        shape = self.edit.ints(-1, height, width, channels)
        return self.put(node, "Reshape", [turned, shape], [batch, height, width, channels])

    def transpose(self, node: ir.Node) -> bool:
        x, out, perm = node.inputs[0], node.outputs[0], list(node.attributes["perm"].as_ints())
        if x in self.last and perm == TO_LAST.get(len(perm)):
            replace(out, self.last[x])
            return True
        if x not in self.last and perm == TO_FIRST.get(len(perm)):
            self.last[out], self.first[out] = x, out  # type: ignore[assignment]
            return True
        return False

    def reshape(self, node: ir.Node) -> bool:
        """Pixels in one row or in a grid, or branches in rows: the channels stay channels."""
        x, after = node.inputs[0], sizes(node.outputs[0])
        if x not in self.last or after is None:
            return False
        moved, rank = self.last[x], len(after)
        before = sizes(moved) or []
        wanted = [after[n] for n in TO_LAST.get(rank, ())]
        pixels = wanted[1:] if rank == 4 else [*wanted[1:2], *wanted[2:]]
        known = all(isinstance(size, int) for size in [*before[-2:], *pixels])
        if not known or (len(before), rank) not in ((4, 3), (3, 4), (5, 4)) or before[-1] != wanted[-1]:
            return False
        inner = before[2:] if len(before) == 5 else before[1:]
        if not all(isinstance(size, int) for size in inner) or math.prod(inner) != math.prod(pixels):  # type: ignore[arg-type]
            return False
        target = self.edit.ints(-1 if len(before) == 5 else 0, *pixels)  # type: ignore[arg-type]
        old = node.outputs[0].shape
        return self.put(node, "Reshape", [moved, target], [old[n] for n in TO_LAST[rank]])  # type: ignore[index]

    def unsqueeze(self, node: ir.Node) -> bool:
        x, axes = node.inputs[0], number(node.inputs[1])
        if x not in self.last or axes is None or axes.tolist() != [1] or len(sizes(self.last[x]) or ()) != 4:
            return False
        shape = list(self.last[x].shape or ())
        return self.put(node, "Unsqueeze", [self.last[x], node.inputs[1]], [shape[0], 1, *shape[1:]])

    def expand(self, node: ir.Node) -> bool:
        """Only of the branches' axis, which the layout does not move."""
        x, wanted = node.inputs[0], made_by(node.inputs[1], "Concat")
        if x not in self.last or wanted is None or len(wanted.inputs) != 5:
            return False
        others = [number(value) for n, value in enumerate(wanted.inputs) if n != 1]
        if any(value is None or value.tolist() != [1] for value in others):
            return False
        shape = list(self.last[x].shape or ())
        return self.put(node, "Expand", [self.last[x], node.inputs[1]], [shape[0], ir.SymbolicDim("G"), *shape[2:]])


MOVES: dict[str, Callable[[_Layout, ir.Node], bool]] = {
    "Conv": _Layout.convolution,
    "GroupNormalization": _Layout.norm,
    "Concat": _Layout.concat,
    "Resize": _Layout.resize,
    "Pad": _Layout.pad,
    "DepthToSpace": _Layout.depth_to_space,
    "Transpose": _Layout.transpose,
    "Reshape": _Layout.reshape,
    "Unsqueeze": _Layout.unsqueeze,
    "Expand": _Layout.expand,
    **dict.fromkeys(UNARY, _Layout.unary),
    **dict.fromkeys(BINARY, _Layout.binary),
}


def read_norms(model: ir.Model) -> int:
    """Turns group norms that `export.norms` wrote out into GroupNormalization again, in place; returns how many."""
    graph, edit, found = model.graph, Editor(model, "norm"), 0
    for node in list(graph):
        norm = _written_out(node)
        if norm is None:
            continue
        source, scale, bias, attributes = norm
        last = only_user(node.outputs[0], "Cast") if source.dtype != node.outputs[0].dtype else None
        last = node if last is None else last
        out = last.outputs[0]
        if out.dtype != source.dtype or out.shape is None:
            continue
        kind = source.dtype.numpy()  # type: ignore[union-attr]
        weights = [edit.constant(number(value).reshape(-1).astype(kind)) for value in (scale, bias)]  # type: ignore[union-attr]
        replace(out, edit.add(last, "GroupNormalization", [source, *weights], list(out.shape), attributes=attributes))
        found += 1
    if found:
        RemoveUnusedNodesPass()(model)
    return found


def _written_out(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value, dict] | None:
    """(input, scale, bias, attributes) of the group norm whose last node in float32 this is, see `export.norms`."""
    scaled = made_by(node.inputs[0], "Mul") if node.op_type == "Add" else None
    normal = made_by(scaled.inputs[0], "Reshape") if scaled is not None else None
    divided = made_by(normal.inputs[0], "Div") if normal is not None else None
    if scaled is None or divided is None or not is_constant(scaled.inputs[1]) or not is_constant(node.inputs[1]):
        return None
    centred, spread = made_by(divided.inputs[0], "Sub"), made_by(divided.inputs[1], "Sqrt")
    safe = made_by(spread.inputs[0], "Add") if spread is not None else None
    variance = made_by(safe.inputs[0], "ReduceMean") if safe is not None else None
    squares = made_by(variance.inputs[0], "Mul") if variance is not None else None
    if centred is None or squares is None or any(value is not divided.inputs[0] for value in squares.inputs):
        return None
    grouped, mean = centred.inputs[0], made_by(centred.inputs[1], "ReduceMean")
    if mean is None or mean.inputs[0] is not grouped:
        return None
    cast = made_by(grouped, "Cast")
    first = made_by(cast.inputs[0] if cast is not None else grouped, "Reshape")
    shape = number(first.inputs[1]) if first is not None else None
    epsilon = number(safe.inputs[1])  # type: ignore[union-attr]
    if shape is None or shape.shape != (3,) or shape[0] != 0 or shape[2] != -1 or epsilon is None:
        return None
    source, channels = first.inputs[0], sizes(first.inputs[0])  # type: ignore[union-attr]
    if channels is None or math.prod(number(scaled.inputs[1]).shape) != channels[1]:  # type: ignore[union-attr]
        return None
    attributes = {"num_groups": int(shape[1]), "epsilon": float(epsilon)}
    return source, scaled.inputs[1], node.inputs[1], attributes  # type: ignore[return-value]
