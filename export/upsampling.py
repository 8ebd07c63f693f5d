"""Turns upsampling and the convolution behind it into four small convolutions.

After nearest-neighbour upsampling by 2, most taps of a 3 x 3 convolution see the same pixel twice. So each of the four
pixels that come from one is a 2 x 2 convolution of the small picture, with summed taps: 4 multiplications instead of 9.
DepthToSpace puts the four in place. The result is exact but for the rounding of the sums. (The sub-pixel convolution of
Shi et al. 2016, arXiv 1609.05158, read backwards.)

On a CPU in float32 this halves the time of these layers. One transposed convolution of 4 x 4 taps computes the same and
was slower everywhere. Layers of fewer than NARROW channels stay as they are: in bfloat16 on matrix units their products
cost less than DepthToSpace, and sums of taps do not fit into weights that are stored in half. OpenVINO folds them, too,
where it compiles for a processor without matrix units, see `engines.openvino_rewrites`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..weights import phases

NARROW = 256


def fold_upsampling(model: ir.Model, narrow: int = NARROW) -> int:
    """Replaces nearest-neighbour upsampling by 2 with a 3 x 3 convolution behind it, in place; returns how many.

    narrow: layers of fewer input channels are left alone.
    """
    graph, folded = model.graph, 0
    for node in list(graph):
        if node.op_type != "Conv" or not _is_same(node):
            continue
        resize, weight = node.inputs[0].producer(), node.inputs[1].const_value  # type: ignore[union-attr]
        if resize is None or weight is None or not _doubles(resize) or weight.numpy().shape[1] < narrow:
            continue
        new = _four(graph, node, resize.inputs[0], weight.numpy())  # type: ignore[arg-type]
        graph.insert_before(node, new)
        old, result = node.outputs[0], new[-1].outputs[0]
        result.shape, result.type = old.shape, old.type
        old.replace_all_uses_with(result)
        folded += 1
    if folded:
        RemoveUnusedNodesPass()(model)
    return folded


def _is_same(node: ir.Node) -> bool:
    """Whether a convolution has 3 x 3 taps and gives a picture of the same size."""
    weight, ints = node.inputs[1], node.attributes.get_ints
    square = weight is not None and weight.const_value is not None and list(weight.const_value.shape)[2:] == [3, 3]
    plain = list(ints("strides", [1, 1]) or []) == [1, 1] and list(ints("dilations", [1, 1]) or []) == [1, 1]
    padded = list(ints("pads", [0] * 4) or []) == [1, 1, 1, 1] and node.attributes.get_int("group", 1) == 1
    return square and plain and padded and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"


def _doubles(node: ir.Node) -> bool:
    """Whether a node repeats every pixel, two by two."""
    if node.op_type != "Resize" or node.attributes.get_string("mode", "nearest") != "nearest":
        return False
    scales = node.inputs[2] if len(node.inputs) > 2 else None
    if scales is None or scales.const_value is None or scales.const_value.numpy().tolist() != [1, 1, 2, 2]:
        return False
    # Only these two settings repeat each pixel exactly twice.
    return (
        node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "asymmetric"
        and node.attributes.get_string("nearest_mode", "round_prefer_floor") == "floor"
    )


def _four(graph: ir.Graph, node: ir.Node, x: ir.Value, weight: np.ndarray) -> list[ir.Node]:
    """The nodes that compute what `node` does over x doubled, in order; the last gives its output."""
    name, parts = node.name, []
    sizes = list(x.shape) if x.shape is not None else [None] * 4
    for number, taps in enumerate(phases(weight)):
        tensor = ir.tensor(taps, name=f"{name}_taps_{number}")
        taps_value = ir.Value(
            name=tensor.name, shape=ir.Shape(taps.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(taps_value)
        below, right = divmod(number, 2)
        pads = ir.AttrInt64s("pads", [1 - below, 1 - right, below, right])
        part = ir.Node("", "Conv", [x, taps_value, *node.inputs[2:]], [pads], name=f"{name}_{number}")
        part.outputs[0].name, part.outputs[0].type = f"{name}_{number}_out", node.outputs[0].type
        part.outputs[0].shape = ir.Shape([sizes[0], len(weight), *sizes[2:]])
        parts.append(part)
    joined = ir.node("Concat", [part.outputs[0] for part in parts], {"axis": 1}, name=f"{name}_parts")
    joined.outputs[0].name, joined.outputs[0].type = f"{name}_parts_out", node.outputs[0].type
    joined.outputs[0].shape = ir.Shape([sizes[0], 4 * len(weight), *sizes[2:]])
    spread = ir.node("DepthToSpace", joined.outputs, {"blocksize": 2, "mode": "DCR"}, name=f"{name}_spread")
    spread.outputs[0].name = f"{name}_spread_out"
    return [*parts, joined, spread]
