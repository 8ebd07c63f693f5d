"""Which layers of a quantised graph really became kernels of eight bits, and the graph without the others.

    chosen = compiled(layers, "fp8")                    # nodes of the ONNX graph, read off a plan's layers
    content = restored("engines/unet.onnx", {"conv_3"})      # the graph with this layer in half precision again

A quantised graph only allows eight bits. Where a GPU or a version lacks a kernel, TensorRT dequantises first and says
nothing (int8 convolutions on Turing; fp8 convolutions on an H100: NVIDIA/TensorRT#4560). Such a layer costs more than
in half precision. So a build leaves it in half and builds once more.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..commands import imported
from ..errors import EngineError

if TYPE_CHECKING:
    from .inspect import Layer

CHOICES = ("all", "products")  # which quantised layers stay so; of the second no convolution


def computes_in(layer: Layer, precision: str) -> bool:
    """Whether a kernel multiplies eight-bit numbers: both operands have the type.

    TensorRT-RTX says "FP8", TensorRT also "Thirty-two wide channel vectorized row major Int8 format".
    """
    operands = [tensor["type"] for tensor in (*layer["inputs"][:2], *layer["weights"][:1])]
    return sum(re.search(rf"\b{precision}\b", kind, re.IGNORECASE) is not None for kind in operands) >= 2


def compiled(layers: Iterable[Layer], precision: str) -> set[str]:
    """Nodes of the ONNX graph that became kernels of eight bits."""
    return {node for layer in layers if computes_in(layer, precision) for node in layer["nodes"]}


def convolutions(path: str | Path) -> set[str]:
    """Names of a graph's quantised convolutions. Raises EngineError without the onnx package."""
    model = _onnx().load(str(path), load_external_data=False)
    rounded = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return {node.name for node in model.graph.node if node.op_type == "Conv" and node.input[0] in rounded}


def restored(path: str | Path, names: Collection[str]) -> bytes:
    """A quantised graph in which the nodes of these names take half precision again, as serialised ONNX.

    Their weights stay rounded to eight bits: so the result is nearer to the unquantised graph than the quantised one.
    Weights in files beside `path` stay there. Raises EngineError without the onnx package.
    """
    onnx = _onnx()
    model, folder = onnx.load(str(path), load_external_data=False), str(Path(path).absolute().parent)
    makers = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}

    def value(name: str) -> Any:
        return onnx.numpy_helper.to_array(stored[name], folder)

    for node in (node for node in model.graph.node if node.name in names):
        real, weight = (makers[name] for name in node.input[:2])
        node.input[0] = makers[real.input[0]].input[0]  # what was quantised, then dequantised
        scale, (axis,) = value(weight.input[1]), [one.i for one in weight.attribute if one.name == "axis"]
        numbers = value(weight.input[0]).astype(np.float32)
        shape = [-1 if i == axis else 1 for i in range(numbers.ndim)]
        name = f"{weight.output[0]}/restored"
        numbers = (numbers * scale.astype(np.float32).reshape(shape)).astype(scale.dtype)
        model.graph.initializer.append(onnx.numpy_helper.from_array(numbers, name))
        node.input[1] = name
    _drop_unused(model)
    return bytes(model.SerializeToString())


def _onnx() -> Any:
    try:
        return imported("onnx")
    except ImportError as error:
        raise EngineError(
            "Some quantised layers are to be built in half precision, which takes the onnx package, and it cannot be "
            f"imported ({error}). Install it: pip install onnx."
        ) from error


def _drop_unused(model: Any) -> None:
    """Removes nodes and weights that nothing reads."""
    needed, kept = {value.name for value in model.graph.output}, []
    for node in reversed(model.graph.node):  # in order of computation: what reads a node stands behind it
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    for field, values in ((model.graph.node, kept[::-1]), (model.graph.initializer, tensors)):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)
