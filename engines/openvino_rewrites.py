"""Rewrites graphs for OpenVINO: the same numbers, in an order that suits its kernels on CPUs.

Measured in bfloat16 on an AMD EPYC (avx512_bf16), the demo's decoder: 41.8 ms as it was exported, 37.4 with
`norms_by_channel`, 32.8 with `fold_upsampling`, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import cpu
from ..weights import phases

REWRITES = "norms by channel, folded upsampling, split products"  # part of the key of what was compiled


def rewrite(model: Any) -> None:
    """Does every rewrite that pays on this processor, in place. model: an `openvino.Model` whose shapes are known."""
    norms_by_channel(model)
    if not any(feature.startswith("amx") for feature in cpu.features()):
        fold_upsampling(model)
    if not cpu.has_bf16():
        split_products(model)


def norms_by_channel(model: Any) -> int:
    """Writes group norms over pictures as means of channels and of their groups, in place; returns how many.

    OpenVINO's own kernel sees a group as one long row, and convolutions keep the channels of a pixel together, so
    values are transposed before and behind each norm. Means over a picture work in either order.
    """
    written = 0
    for norm in model.get_ordered_ops():
        if norm.get_type_name() == "GroupNormalization" and len(norm.input(0).get_partial_shape()) == 4:
            x, scale, bias = norm.input_values()
            settings = norm.get_attributes()
            new = _norm(x, scale, bias, int(settings["num_groups"]), float(settings["epsilon"]))
            new.set_friendly_name(norm.get_friendly_name())
            norm.output(0).replace(new.output(0))
            written += 1
    return written


def _norm(x: Any, scale: Any, bias: Any, groups: int, epsilon: float) -> Any:
    from openvino import opset13 as ov

    channels = x.get_partial_shape()[1].get_length()
    width = channels // groups

    def numbers(*values: int) -> Any:
        return ov.constant(np.array(values, np.int64))

    def group_mean(value: Any) -> Any:
        """[B, C, H, W] -> [B, C, 1, 1], the mean of each channel's group."""
        means = ov.reshape(ov.reduce_mean(value, numbers(2, 3), keep_dims=True), numbers(0, groups, width), True)
        means = ov.reduce_mean(means, numbers(2), keep_dims=True)
        each = ov.broadcast(means, numbers(1, 1, width), broadcast_spec="BIDIRECTIONAL")
        return ov.reshape(each, numbers(0, channels, 1, 1), True)

    def per_channel(value: Any) -> Any:
        return ov.reshape(value, numbers(1, channels, 1, 1), False)

    centred = ov.subtract(x, group_mean(x))
    spread = ov.sqrt(ov.add(group_mean(ov.multiply(centred, centred)), np.float32(epsilon)))
    return ov.add(ov.multiply(centred, ov.divide(per_channel(scale), spread)), per_channel(bias))


def fold_upsampling(model: Any) -> int:
    """Writes a doubling of pictures with a 3 x 3 convolution behind it as four of 2 x 2, in place; returns how many.

    What hd-export does for layers of many channels, see `export.upsampling`. For few it pays where the processor
    multiplies no matrices (AMX), which do it faster than the four are put in their places.
    """
    from openvino import opset13 as ov

    folded = 0
    for conv in model.get_ordered_ops():
        if conv.get_type_name() != "Convolution" or not _is_same(conv):
            continue
        resize = conv.input_value(0).get_node()
        weight = _constant(conv.input_value(1).get_node())
        if weight is None or weight.shape[2:] != (3, 3) or not _doubles(resize):
            continue
        parts = []
        for number, taps in enumerate(phases(weight)):
            below, right = divmod(number, 2)
            begin, end = [1 - below, 1 - right], [below, right]
            parts.append(ov.convolution(resize.input_value(0), ov.constant(taps), [1, 1], begin, end, [1, 1]))
        new = ov.depth_to_space(ov.concat(parts, 1), "BLOCKS_FIRST", 2)
        new.set_friendly_name(conv.get_friendly_name())
        conv.output(0).replace(new.output(0))
        folded += 1
    return folded


def split_products(model: Any) -> int:
    """Writes a product whose columns are split behind it as a product for each part, in place; returns how many.

    Each feed-forward layer of a UNet halves what its first product gives. OpenVINO copies both halves, which takes 2 %
    of a step of the demo in float32 (AVX2). The numbers stay the same.
    """
    from openvino import opset13 as ov

    done = 0
    for split in model.get_ordered_ops():
        if split.get_type_name() not in ("Split", "VariadicSplit"):
            continue
        axis, value = _constant(split.input_value(1).get_node()), split.input_value(0)
        last, add, bias = len(value.get_shape()) - 1, value.get_node(), None
        if axis is None or int(axis) not in (-1, last) or len(value.get_target_inputs()) > 1:
            continue
        if add.get_type_name() == "Add":
            bias, value = _constant(add.input_value(1).get_node()), add.input_value(0)
            if bias is None or bias.shape[-1:] != (add.get_output_shape(0)[-1],):
                continue
        product = value.get_node()
        weight = _constant(product.input_value(1).get_node()) if product.get_type_name() == "MatMul" else None
        if weight is None or weight.ndim != 2 or len(value.get_target_inputs()) > 1:
            continue
        how, end = product.get_attributes(), 0
        for output in split.outputs():
            begin, end = end, end + output.get_shape()[-1]
            part = weight[begin:end] if how["transpose_b"] else weight[:, begin:end]
            new = ov.matmul(product.input_value(0), ov.constant(part), how["transpose_a"], how["transpose_b"])
            if bias is not None:
                new = ov.add(new, ov.constant(bias[..., begin:end]))
            output.replace(new.output(0))
        done += 1
    return done


def _is_same(conv: Any) -> bool:
    how = conv.get_attributes()
    ones = list(how["strides"]) == list(how["dilations"]) == list(how["pads_begin"]) == list(how["pads_end"]) == [1, 1]
    return ones and how["auto_pad"] == "explicit"


def _doubles(resize: Any) -> bool:
    """Whether a node repeats every pixel, two by two."""
    if resize.get_type_name() != "Interpolate":
        return False
    how, before, after = resize.get_attributes(), resize.get_input_shape(0), resize.get_output_shape(0)
    nearest = how["mode"] == "nearest" and how["coordinate_transformation_mode"] == "asymmetric"
    return nearest and how["nearest_mode"] == "floor" and list(after) == [*before[:2], 2 * before[2], 2 * before[3]]


def _constant(node: Any) -> np.ndarray | None:
    """The numbers of a constant, also of one that is kept in half precision, as float32."""
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        return None
    values: np.ndarray = node.get_data()
    return values.astype(np.float32)
