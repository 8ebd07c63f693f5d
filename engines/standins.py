"""ONNX Runtime's contributed operators in terms of ONNX's own, so that a graph for CUDA runs on a CPU, too.

    plain = expanded(onnx.load("derived.onnx", load_external_data=False))

Each definition is a function of the operator set, which the inliner puts in the place of its nodes. Their outputs keep
their names, so shape inference over the expanded graph gives the shapes of the compact one, too.
"""

from __future__ import annotations

import onnx
from onnx import inliner, parser

CONTRIBUTED = "com.microsoft"  # the domain of ONNX Runtime's own operators
OPSET = 23
CROSS = "MultiHeadCrossAttention"  # MultiHeadAttention with keys and values [B, heads, L, d]; has an attribute scale
HEADER = f'<domain: "{CONTRIBUTED}", opset_import: ["" : {OPSET}]>'
# Statistics, scale and bias of norms are in float32, as in the kernels.
DEFINITIONS = (
    """NhwcConv <kernel_shape, pads, strides, dilations>(X, W, B) => (Y) {
        x = Transpose <perm = [0, 3, 1, 2]>(X)
        w = Transpose <perm = [0, 3, 1, 2]>(W)
        y = Conv <kernel_shape: ints = @kernel_shape, pads: ints = @pads, strides: ints = @strides,
                  dilations: ints = @dilations>(x, w, B)
        Y = Transpose <perm = [0, 2, 3, 1]>(y)
    }""",
    """GroupNorm <groups, epsilon, activation, channels_last>(X, gamma, beta) => (Y) {
        x = Transpose <perm = [0, 3, 1, 2]>(X)
        real = Cast <to = 1>(x)
        normal = GroupNormalization <num_groups: int = @groups, epsilon: float = @epsilon>(real, gamma, beta)
        flag = Constant <value_int: int = @activation>()
        active = Cast <to = 9>(flag)
        weight = Sigmoid(normal)
        silu = Mul(normal, weight)
        y = Where(active, silu, normal)
        last = Transpose <perm = [0, 2, 3, 1]>(y)
        Y = CastLike(last, X)
    }""",
    """SkipGroupNorm <groups, epsilon, activation, channels_last>(X, gamma, beta, skip, bias) => (Y, S) {
        biased = Add(X, bias)
        S = Add(biased, skip)
        x = Transpose <perm = [0, 3, 1, 2]>(S)
        real = Cast <to = 1>(x)
        normal = GroupNormalization <num_groups: int = @groups, epsilon: float = @epsilon>(real, gamma, beta)
        flag = Constant <value_int: int = @activation>()
        active = Cast <to = 9>(flag)
        weight = Sigmoid(normal)
        silu = Mul(normal, weight)
        y = Where(active, silu, normal)
        last = Transpose <perm = [0, 2, 3, 1]>(y)
        Y = CastLike(last, X)
    }""",
    """SkipLayerNormalization <epsilon>(X, skip, gamma, beta, bias) => (Y, mean, spread, S) {
        biased = Add(X, bias)
        S = Add(biased, skip)
        Y = LayerNormalization <axis = -1, epsilon: float = @epsilon>(S, gamma, beta)
        mean = Identity(S)
        spread = Identity(S)
    }""",
    """BiasAdd (X, bias, skip) => (Y) {
        biased = Add(X, bias)
        Y = Add(biased, skip)
    }""",
    """BiasSplitGelu (X, bias) => (Y) {
        biased = Add(X, bias)
        left, right = Split <axis = -1, num_outputs = 2>(biased)
        active = Gelu <approximate = "none">(right)
        Y = Mul(left, active)
    }""",
    """MultiHeadAttention <num_heads>(query, key, value) => (output) {
        output = Attention <q_num_heads: int = @num_heads, kv_num_heads: int = @num_heads>(query, key, value)
    }""",
    CROSS + """ <num_heads, scale>(query, key, value) => (output) {
        shape = Constant <value_ints = [0, 0, -1]>()
        k = Transpose <perm = [0, 2, 1, 3]>(key)
        v = Transpose <perm = [0, 2, 1, 3]>(value)
        keys = Reshape(k, shape)
        values = Reshape(v, shape)
        output = Attention <q_num_heads: int = @num_heads, kv_num_heads: int = @num_heads, scale: float = @scale>
                 (query, keys, values)
    }""",
)  # fmt: skip


def expanded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model without contributed operators."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    for node in out.graph.node:
        if node.op_type == "MultiHeadAttention" and any(attribute.name == "scale" for attribute in node.attribute):
            node.op_type = CROSS
    del out.functions[:]
    out.functions.extend(parser.parse_function(HEADER + text) for text in DEFINITIONS)
    if CONTRIBUTED not in {opset.domain for opset in out.opset_import}:
        out.opset_import.append(onnx.helper.make_opsetid(CONTRIBUTED, 1))
    return inliner.inline_local_functions(out)
