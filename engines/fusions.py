"""Joins operators of a channels-last graph into those that ONNX Runtime's CUDA provider computes in one go.

    fuse(model)                         # in place, after `nhwc.channels_last`

Each launch and each pass over memory costs more than the arithmetic in it. So activations, biases, residuals and the
bias of the time move into the norms behind them, and cross-attention takes its keys and values as they are.

The limits of the kernels, read in ONNX Runtime's sources: BiasSplitGelu takes widths of SPLIT_WIDTHS and BiasAdd those
of ADD_WIDTHS, both of three axes. SkipGroupNorm takes what it adds as [B, H, W, C] or [B, 1, 1, C].
MultiHeadAttention takes queries [B, N, heads * d] beside keys and values [B, heads, L, d], which flash attention reads
by strides.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from .editing import CONTRIBUTED, Editor, fixed, is_constant, made_by, number, only_user, replace, sizes, users

ADD_WIDTHS = (320, 640, 1280)
SPLIT_WIDTHS = (2560, 5120, 10240)
WIDEST_HEAD = 256  # of flash attention, which takes multiples of 8


def fuse(model: ir.Model) -> Counter[str]:
    """Joins what it can, in place; returns how many operators of each kind came to be."""
    edit, made = Editor(model, "fused"), Counter[str]()
    steps = (
        ("Split", split_slices, "Slice"),
        ("SiLU", activate, "GroupNorm"),
        ("MultiHeadAttention", cross_attention, "Attention"),
        ("SkipGroupNorm", skip_group_norm, "GroupNorm"),
        ("SkipLayerNormalization", skip_layer_norm, "LayerNormalization"),
        ("BiasSplitGelu", bias_split_gelu, "Gelu"),
        ("BiasAdd", bias_add, "Add"),
    )
    for name, step, op in steps:
        for node in list(model.graph):
            if node.op_type == op and node.graph is not None:
                made[name] += step(edit, node)
        RemoveUnusedNodesPass()(model)
        model.graph.sort()
    model.opset_imports.setdefault(CONTRIBUTED, 1)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    return made


def activate(_: Editor, node: ir.Node) -> bool:
    """SiLU behind a group norm becomes its attribute."""
    out = node.outputs[0]
    behind = {user.op_type: user for user in users(out)}
    sigmoid, product = behind.get("Sigmoid"), behind.get("Mul")
    if set(behind) != {"Sigmoid", "Mul"} or sigmoid is None or product is None or len(users(out)) != 2:
        return False
    if only_user(sigmoid.outputs[0], "Mul") is not product or set(product.inputs) != {out, sigmoid.outputs[0]}:
        return False
    node.attributes["activation"] = ir.AttrInt64("activation", 1)
    replace(product.outputs[0], out)
    return True


def skip_group_norm(edit: Editor, node: ir.Node) -> bool:
    """An addition before a group norm, and the bias of the convolution before that, become part of the norm.

    The sum is an output of the norm where others need it, too.
    """
    x = node.inputs[0]
    add = made_by(x, "Add")
    known = sizes(x)
    if add is None or x is None or known is None or x.is_graph_output():
        return False
    whole = [value for value in add.inputs if sizes(value) == known]
    if len(whole) == 2:
        x_part, skip = whole if _free_bias(whole[0]) is not None else whole[::-1]
    elif len(whole) == 1:
        x_part, other = whole[0], next(value for value in add.inputs if value is not whole[0])
        if sizes(other) != [known[0], 1, 1, known[3]]:
            return False
        skip = other
    else:
        return False
    assert x_part is not None and x_part.dtype is not None and isinstance(known[3], int)
    (x_part, skip), bias = _without_biases(edit, [x_part, skip], known[3], x_part.dtype)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    inputs = [x_part, node.inputs[1], node.inputs[2], skip, bias]
    new = ir.node(
        "SkipGroupNorm", inputs, attributes, domain=CONTRIBUTED, num_outputs=2, name=f"{node.name}_skip"
    )  # fmt: skip
    _finish(edit, add, new, {0: node.outputs[0], 1: x})
    return True


def skip_layer_norm(edit: Editor, node: ir.Node) -> bool:
    """The residual and the bias before a layer norm become part of it; the sum is its fourth output."""
    x, known = node.inputs[0], sizes(node.inputs[0])
    add = made_by(x, "Add")
    if (
        add is None
        or x is None
        or known is None
        or len(known) != 3
        or node.attributes.get_int("axis", -1) not in (-1, 2)
    ):
        return False
    if any(sizes(value) != known for value in add.inputs) or x.is_graph_output() or len(node.inputs) != 3:
        return False
    biased, skip = add.inputs if _bias_of(add.inputs[0]) is not None else add.inputs[::-1]
    found = _bias_of(biased)
    if found is None:
        return False
    attributes = {"epsilon": node.attributes.get_float("epsilon", 1e-5)}
    inputs = [found[0], skip, *node.inputs[1:], found[1]]
    new = ir.node(
        "SkipLayerNormalization", inputs, attributes, domain=CONTRIBUTED, num_outputs=4, name=f"{node.name}_skip"
    )  # fmt: skip
    _finish(edit, add, new, {0: node.outputs[0], 3: x})
    return True


def bias_split_gelu(edit: Editor, node: ir.Node) -> bool:
    """A linear layer's bias, its two halves, and one times GELU of the other (GEGLU, Shazeer 2020)."""
    split = made_by(node.inputs[0], "Split")
    product = only_user(node.outputs[0], "Mul")
    if split is None or product is None or len(split.outputs) != 2 or node.inputs[0] is not split.outputs[1]:
        return False
    found, whole = _bias_of(split.inputs[0]), sizes(split.inputs[0])
    if found is None or whole is None or len(whole) != 3 or whole[2] not in SPLIT_WIDTHS:
        return False
    same = set(product.inputs) == {split.outputs[0], node.outputs[0]} and only_user(split.outputs[0], "Mul") is product
    exact = node.attributes.get_string("approximate", "none") == "none"
    halves = sizes(split.outputs[0]) == sizes(split.outputs[1])
    if not (same and exact and halves and split.attributes["axis"].as_int() in (-1, 2)):
        return False
    shape = list(product.outputs[0].shape or ())
    replace(product.outputs[0], edit.add(product, "BiasSplitGelu", list(found), shape, CONTRIBUTED))
    return True


def bias_add(edit: Editor, node: ir.Node) -> bool:
    """The sum of a layer's output, its bias and a residual."""
    known = sizes(node.outputs[0])
    if known is None or len(known) not in (3, 4) or known[-1] not in ADD_WIDTHS:
        return False
    if any(sizes(value) != known for value in node.inputs) or node.outputs[0].dtype is None:
        return False
    assert isinstance(known[-1], int)
    values = list(node.inputs)
    if len(known) == 3:
        biased, skip = values if _bias_of(values[0]) is not None else values[::-1]
        found = _bias_of(biased)
        if found is None:
            return False
        inputs = [found[0], found[1], skip]
    else:
        values = values if _free_bias(values[0]) is not None else values[::-1]
        if _free_bias(values[0]) is None:
            return False
        values, bias = _without_biases(edit, values, known[-1], node.outputs[0].dtype)
        row, shape = edit.ints(0, -1, known[-1]), list(node.outputs[0].shape or ())
        pixels: Any = math.prod(known[1:3]) if all(isinstance(n, int) for n in known[1:3]) else ir.SymbolicDim("HW")  # type: ignore[arg-type]
        rows = [edit.add(node, "Reshape", [value, row], [shape[0], pixels, shape[3]]) for value in values]
        inputs = [rows[0], bias, rows[1]]
    first = inputs[0]
    assert first is not None
    out = edit.add(node, "BiasAdd", inputs, list(first.shape or ()), CONTRIBUTED)
    if len(known) == 4:
        out = edit.add(node, "Reshape", [out, edit.ints(0, *known[1:])], list(node.outputs[0].shape or ()))  # type: ignore[arg-type]
    replace(node.outputs[0], out)
    return True


def cross_attention(edit: Editor, node: ir.Node) -> bool:
    """Attention to keys and values that come as [B, heads, L, d]: queries stay as the linear layer makes them.

    Codes of the pixels' positions, which are constants behind each head's query, become a bias of the queries, and the
    linear layer gives zeros in their place. Values are padded to the keys' width, and the padding meets zero weights in
    the next linear layer. So neither is a pass over memory.
    """
    query, key, value = node.inputs[:3]
    shape, given, taken = sizes(key), _query(edit, query), _taken(node.outputs[0])
    if len(node.inputs) != 3 or shape is None or sizes(value) != shape or given is None or taken is None:
        return False
    heads, width = shape[1], shape[3]
    if not (isinstance(heads, int) and isinstance(width, int)) or width % 8 or width > WIDEST_HEAD:
        return False
    if node.attributes.get_int("is_causal", 0) or "scale" not in node.attributes:
        return False
    linear, factor, codes, expand = given
    tokens, weight = linear.inputs
    assert tokens is not None and weight is not None and weight.shape is not None and tokens.shape is not None
    depth = fixed(weight)[1] // heads
    rows, wide = list(tokens.shape), heads * width
    made = edit.add(node, "MatMul", [tokens, _widened(edit, node, weight, heads, width, factor)], [*rows[:2], wide])
    if codes is not None:
        made = edit.add(node, "Add", [made, _behind(edit, node, codes, heads, depth)], [*rows[:2], wide])
    if expand is not None:
        made = _for_branches(edit, node, made, expand)
    attributes = {"num_heads": heads, "scale": node.attributes["scale"].as_float()}
    made_shape = list(made.shape or ())
    mixed = edit.add(node, "MultiHeadAttention", [made, key, value], made_shape, CONTRIBUTED, attributes)
    out, used = taken
    tall = _heightened(edit, out, out.inputs[1], heads, used, width)
    replace(out.outputs[0], edit.add(out, "MatMul", [mixed, tall], list(out.outputs[0].shape or ())))
    return True


def _query(edit: Editor, query: ir.Value | None) -> tuple[ir.Node, float, ir.Value | None, ir.Node | None] | None:
    """The linear layer behind a query, the factor of its output, the codes [heads, N, c] or [N, c] that follow each
    head's query, and the node that repeats the query for both branches of guidance."""
    joined, codes = made_by(query, "Concat"), None
    if joined is not None:
        repeated = made_by(joined.inputs[1], "Expand")
        codes = repeated.inputs[0] if repeated is not None and len(joined.inputs) == 2 else None
        if codes not in edit.settled or len(sizes(codes) or ()) not in (2, 3):
            return None
        query = joined.inputs[0]
    expand = None
    rows = made_by(query, "Reshape")
    if rows is not None and (expand := made_by(rows.inputs[0], "Expand")) is not None:
        single = made_by(expand.inputs[0], "Unsqueeze")
        query = single.inputs[0] if single is not None else None
    scaled, factor = made_by(query, "Mul"), 1.0
    if scaled is not None:
        constant = number(scaled.inputs[1])
        if constant is None or constant.size != 1:
            return None
        query, factor = scaled.inputs[0], float(constant.reshape(()))
    turned = made_by(query, "Transpose")
    split = made_by(turned.inputs[0], "Reshape") if turned is not None else None
    linear = made_by(split.inputs[0], "MatMul") if split is not None else None
    if linear is None or turned is None or list(turned.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return None
    return (linear, factor, codes, expand) if is_constant(linear.inputs[1]) else None


def _taken(mixed: ir.Value) -> tuple[ir.Node, int] | None:
    """The linear layer behind an attention's output, and how much of each head's width it takes."""
    width = (sizes(mixed) or [0])[-1]
    part = only_user(mixed, "Slice")
    if part is not None:
        start, stop, axes = (number(value) for value in part.inputs[1:4])
        if start is None or stop is None or axes is None or start.tolist() != [0] or axes.tolist() not in ([3], [-1]):
            return None
        width, mixed = int(stop[0]), part.outputs[0]
    turned = only_user(mixed, "Transpose")
    if turned is None or list(turned.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return None
    merged = only_user(turned.outputs[0], "Reshape")
    linear = only_user(merged.outputs[0], "MatMul") if merged is not None else None
    if linear is None or not isinstance(width, int) or not is_constant(linear.inputs[1]):
        return None
    return linear, width


# ONNX Runtime computes the following once, when it loads the graph, if each step has a kernel on the CPU. In half
# precision, many lack one, so the arithmetic is in float32. Weights then need not be stored again.


def _widened(edit: Editor, before: ir.Node, weight: ir.Value, heads: int, width: int, factor: float) -> ir.Value:
    """Columns [C, heads * d] times a factor, filled up to [C, heads * width] with zeros behind each head's."""
    rows, columns = fixed(weight)
    depth = columns // heads
    value = _real(edit, before, weight)
    if factor != 1:
        value = edit.add(before, "Mul", [value, edit.constant(np.array(factor, np.float32))], [rows, columns])
    value = edit.add(before, "Reshape", [value, edit.ints(rows, heads, depth)], [rows, heads, depth])
    pads = edit.ints(0, 0, 0, 0, 0, width - depth)
    value = edit.add(before, "Pad", [value, pads], [rows, heads, width])
    value = edit.add(before, "Reshape", [value, edit.ints(rows, heads * width)], [rows, heads * width])
    return _like(edit, before, value, weight)


def _heightened(edit: Editor, before: ir.Node, weight: ir.Value | None, heads: int, used: int, width: int) -> ir.Value:
    """Rows [heads * used, C], filled up to [heads * width, C] with zeros behind each head's."""
    assert weight is not None and weight.shape is not None
    columns = fixed(weight)[1]
    value = _real(edit, before, weight)
    value = edit.add(before, "Reshape", [value, edit.ints(heads, used, columns)], [heads, used, columns])
    value = edit.add(before, "Pad", [value, edit.ints(0, 0, 0, 0, width - used, 0)], [heads, width, columns])
    value = edit.add(before, "Reshape", [value, edit.ints(heads * width, columns)], [heads * width, columns])
    return _like(edit, before, value, weight)


def _behind(edit: Editor, before: ir.Node, codes: ir.Value, heads: int, depth: int) -> ir.Value:
    """Codes [heads, N, c], or [N, c] of all heads -> [N, heads * (depth + c)], with zeros in the place of queries."""
    *own, count, width = fixed(codes)
    cast = made_by(codes, "Cast")
    value = _real(edit, before, codes if cast is None else cast.inputs[0])  # type: ignore[arg-type]
    if not own:
        value = edit.add(before, "Expand", [value, edit.ints(heads, count, width)], [heads, count, width])
    perm = {"perm": [1, 0, 2]}
    value = edit.add(before, "Transpose", [value], [count, heads, width], attributes=perm)
    value = edit.add(before, "Pad", [value, edit.ints(0, 0, depth, 0, 0, 0)], [count, heads, depth + width])
    whole = heads * (depth + width)
    value = edit.add(before, "Reshape", [value, edit.ints(count, whole)], [count, whole])
    return _like(edit, before, value, codes)


def _real(edit: Editor, before: ir.Node, value: ir.Value) -> ir.Value:
    """A constant in float32."""
    if value.dtype == ir.DataType.FLOAT:
        return value
    to = ir.DataType.FLOAT
    return edit.add(before, "Cast", [value], list(value.shape or ()), attributes={"to": to}, kind=to)


def _like(edit: Editor, before: ir.Node, value: ir.Value, other: ir.Value) -> ir.Value:
    """A float32 constant in the type of another value."""
    if other.dtype == ir.DataType.FLOAT or other.dtype is None:
        return value
    return edit.add(before, "Cast", [value], list(value.shape or ()), attributes={"to": other.dtype}, kind=other.dtype)


def _for_branches(edit: Editor, before: ir.Node, rows: ir.Value, expand: ir.Node) -> ir.Value:
    """[B, N, C] -> [branches * B, N, C], as `expand` does for values with one axis more."""
    shape = list(rows.shape or ())
    wanted = made_by(expand.inputs[1], "Concat")
    assert wanted is not None and isinstance(shape[1], int) and isinstance(shape[2], int)
    to = edit.add(before, "Concat", wanted.inputs[:4], [4], attributes={"axis": 0})
    single = edit.add(before, "Unsqueeze", [rows, edit.ints(1)], [shape[0], 1, *shape[1:]])
    both = edit.add(before, "Expand", [single, to], [shape[0], ir.SymbolicDim("G"), *shape[1:]])
    flat = edit.ints(-1, shape[1], shape[2])
    return edit.add(before, "Reshape", [both, flat], [ir.SymbolicDim("G*B"), *shape[1:]])


def split_slices(edit: Editor, node: ir.Node) -> bool:
    """Slices that cut a value's last axis into pieces become one Split. node: the first of them."""
    source = node.inputs[0]
    cut = {user: _piece(user) for user in users(source) if user.op_type == "Slice"} if source is not None else {}
    pieces = sorted((*piece, user.name or "", user) for user, piece in cut.items() if piece is not None)
    if len(pieces) < 2 or any(one[1] != other[0] for one, other in itertools.pairwise(pieces)):
        return False
    whole = (sizes(source) or [0])[-1]
    bounds = [0, *(piece[0] for piece in pieces), pieces[-1][1], whole]
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]  # type: ignore[operator]
    used = [n for n, length in enumerate(lengths) if length]  # there may be more on both sides
    axis = {"axis": len(sizes(source) or ()) - 1}
    inputs = [source, edit.ints(*(lengths[n] for n in used))]
    new = ir.node("Split", inputs, axis, num_outputs=len(used), name=f"{node.name}_all")
    edit.graph.insert_before(node, new)
    for n, out in zip(used, new.outputs, strict=True):
        out.name, out.type = f"{new.name}_{n}", source.type  # type: ignore[union-attr]
        if 1 <= n <= len(pieces):
            user = pieces[n - 1][3]
            old = user.outputs[0]
            out.shape = old.shape
            replace(old, out)
            edit.graph.remove(user, safe=True)
    return True


def _piece(node: ir.Node) -> tuple[int, int] | None:
    """(start, stop) of a Slice of the last axis alone."""
    shape = sizes(node.inputs[0])
    numbers = [number(value) for value in node.inputs[1:]]
    if shape is None or len(numbers) < 3 or any(value is None or value.size != 1 for value in numbers):
        return None
    start, stop, axis, *step = (int(value.reshape(())) for value in numbers)  # type: ignore[union-attr]
    whole = shape[-1]
    if axis not in (-1, len(shape) - 1) or step not in ([], [1]) or not isinstance(whole, int) or start < 0 or stop < 0:
        return None
    return start, min(stop, whole)


def _free_bias(value: ir.Value | None) -> ir.Value | None:
    """The bias of the convolution that makes a value for one user alone."""
    conv = made_by(value, "NhwcConv", CONTRIBUTED)
    if value is None or conv is None or len(list(value.uses())) != 1 or value.is_graph_output():
        return None
    return conv.inputs[2] if len(conv.inputs) > 2 else None


def _without_biases(
    edit: Editor, values: list[ir.Value | None], width: int, kind: ir.DataType
) -> tuple[list[ir.Value | None], ir.Value]:
    """The values as their convolutions give them without a bias, and the sum of the biases."""
    total = np.zeros(width, np.float32)
    for value in values:
        bias = _free_bias(value)
        if bias is not None and is_constant(bias):
            total += number(bias).astype(np.float32)  # type: ignore[union-attr]
            value.producer().replace_input_with(2, None)  # type: ignore[union-attr]
    return values, edit.constant(total.astype(kind.numpy()))


def _bias_of(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """(product, bias) of the linear layer that makes a value for its users."""
    add = made_by(value, "Add")
    for product, bias in (add.inputs, add.inputs[::-1]) if add is not None else ():
        if made_by(product, "MatMul") is not None and is_constant(bias) and len(sizes(bias) or ()) == 1:
            return product, bias  # type: ignore[return-value]
    return None


def _finish(edit: Editor, place: ir.Node, new: ir.Node, outputs: dict[int, ir.Value]) -> None:
    """Puts a node in the place of another; its outputs of these numbers take over from older values."""
    edit.graph.insert_before(place, new)
    for number_, old in outputs.items():
        out = new.outputs[number_]
        out.name, out.shape, out.type = f"{new.name}_{number_}", old.shape, old.type
        old.replace_all_uses_with(out, replace_graph_outputs=True)
    for number_, out in enumerate(new.outputs):
        if number_ not in outputs:
            out.name = ""
