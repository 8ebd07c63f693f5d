"""Writes self-attention as one node for which ONNX Runtime has a memory-saving kernel.

For ONNX's own Attention, ONNX Runtime's CPU provider keeps the whole table of scores: 2 GB for 4096 pixels with two
guidance branches. The contributed MultiHeadAttention works in tiles that fit a cache, as flash attention (Dao et al.
2022) does, and takes tokens as they are, [B, N, H D], without a transpose. The model also holds its definition in
standard operators as a function, which TensorRT and others use in its place.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

DOMAIN, NAME = "com.microsoft", "MultiHeadAttention"


def fuse_attention(model: ir.Model) -> int:
    """Replaces self-attention without a mask, in place; returns how many nodes were replaced.

    It looks for Reshape and Transpose to heads of query, key and value; Attention; Transpose and Reshape back.
    """
    graph, fused = model.graph, 0
    for node in list(graph):
        plain = node.op_type == "Attention" and len(node.inputs) == 3 and "scale" not in node.attributes
        plain = plain and not node.attributes.get_int("is_causal", 0)
        tokens = [_tokens(value) for value in node.inputs] if plain else [None]
        transposed = _only_user(node.outputs[0], "Transpose") if plain else None
        merged = _only_user(transposed.outputs[0], "Reshape") if transposed is not None else None
        if merged is None or None in tokens or merged.outputs[0] in graph.outputs:
            continue
        heads = node.inputs[0].shape[1]  # type: ignore[index, union-attr]
        if len({value.shape[2] for value in node.inputs}) > 1 or not isinstance(heads, int):  # type: ignore[index, union-attr]
            continue
        whole = ir.node(NAME, tokens, {"num_heads": heads}, domain=DOMAIN, name=node.name)
        old, new = merged.outputs[0], whole.outputs[0]
        new.shape, new.type = old.shape, old.type
        graph.insert_before(merged, whole)
        old.replace_all_uses_with(new)
        fused += 1
    if fused:
        model.opset_imports[DOMAIN] = 1
        definition = _definition(model.opset_imports[""])
        model.functions[definition.identifier()] = definition
        RemoveUnusedNodesPass()(model)
    return fused


def _definition(opset: int) -> ir.Function:
    """The node in standard operators."""
    inputs = [ir.Value(name=name) for name in ("query", "key", "value")]
    heads = {name: ir.RefAttr(name, "num_heads", ir.AttributeType.INT) for name in ("q_num_heads", "kv_num_heads")}
    node = ir.Node("", "Attention", inputs, heads.values())
    node.outputs[0].name = "output"
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": opset})
    return ir.Function(DOMAIN, NAME, graph=graph, attributes=[ir.Attr("num_heads", ir.AttributeType.INT, None)])


def _tokens(value: ir.Value | None) -> ir.Value | None:
    """The tokens [B, N, H D] behind a value of heads [B, H, N, D], if it comes from such tokens."""
    transpose = value.producer() if value is not None else None
    if transpose is None or transpose.op_type != "Transpose" or not _swaps_heads(transpose):
        return None
    reshape = transpose.inputs[0].producer()  # type: ignore[union-attr]
    if reshape is None or reshape.op_type != "Reshape":
        return None
    source = reshape.inputs[0]
    return source if source is not None and source.shape is not None and len(source.shape) == 3 else None


def _only_user(value: ir.Value, kind: str) -> ir.Node | None:
    """The one node that takes a value, if it is of this kind; a Transpose must swap heads and tokens."""
    users = [use.node for use in value.uses()]
    if len(users) != 1 or users[0].op_type != kind or (kind == "Transpose" and not _swaps_heads(users[0])):
        return None
    return users[0]


def _swaps_heads(transpose: ir.Node) -> bool:
    return list(transpose.attributes["perm"].as_ints()) == [0, 2, 1, 3]
