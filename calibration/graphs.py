"""Reads and rewrites ONNX graphs and bundles, for the rest of the room.

It expects graphs without subgraphs and functions.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import (
    ModelProto,
    NodeProto,
    TensorProto,
    TensorShapeProto,
    ValueInfoProto,
    helper,
    numpy_helper,
    shape_inference,
)

from ..contract import EXTERNAL, WEIGHTS, Manifest, TensorSpec, file_digest
from ..errors import BundleError
from ..files import open_to_others

# Element types that are half as wide as float32 -> the largest number they hold.
HALF: dict[int, float] = {TensorProto.FLOAT16: 65504.0, TensorProto.BFLOAT16: 3.3895e38}
SHAPES = 1 << 10  # bytes up to which an initializer may be a shape, which type inference needs


def label(node: NodeProto) -> str:
    """A node's name, or its first output's where it is unnamed."""
    return node.name or node.output[0]


def element_types(model: ModelProto) -> dict[str, int]:
    """Tensor -> ONNX element type, for every tensor of the graph. Raises BundleError where one is unknown."""
    types = _known_types(model)
    outputs = [name for node in model.graph.node for name in node.output if name]
    if not all(map(types.get, outputs)):
        inferred = shape_inference.infer_shapes(without_weights(model))  # protobuf takes up to 2 GB
        types = _known_types(inferred) | types
    for name in outputs:
        if not types.get(name):
            raise BundleError(f"The graph {model.graph.name} lacks the type of {name}. Export it again.")
    return types


def without_weights(model: ModelProto) -> ModelProto:
    """A copy of a graph in which initializers of more than SHAPES bytes are inputs."""
    graph = model.graph
    small = [tensor for tensor in graph.initializer if tensor.ByteSize() <= SHAPES]
    large = [tensor for tensor in graph.initializer if tensor.ByteSize() > SHAPES]
    declared = [helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in large]
    copy = helper.make_graph(
        graph.node, graph.name, [*graph.input, *declared], graph.output, small, value_info=graph.value_info
    )
    return helper.make_model(copy, opset_imports=model.opset_import, ir_version=model.ir_version)


def _known_types(model: ModelProto) -> dict[str, int]:
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def numpy_name(element_type: int) -> str:
    """An ONNX element type as the contract names it: "float32", "bfloat16"."""
    # onnx before 1.19 returns float32 for it.
    bfloat16 = element_type == TensorProto.BFLOAT16
    return "bfloat16" if bfloat16 else helper.tensor_dtype_to_np_dtype(element_type).name


def value_info(name: str, element_type: int, shape: TensorShapeProto | None = None) -> ValueInfoProto:
    """A tensor's declaration; without a shape, of unknown rank."""
    value = helper.make_tensor_value_info(name, element_type, None)
    if shape is not None:
        value.type.tensor_type.shape.CopyFrom(shape)
    return value


def cast(source: str, target: str, element_type: int) -> NodeProto:
    """A Cast node. It is unnamed, because names must differ; its output identifies it."""
    return helper.make_node("Cast", [source], [target], to=element_type)


def widen(node: NodeProto) -> None:
    """Changes a node's own half-precision type (of Cast, Constant) to float32."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i in HALF:
            attribute.i = TensorProto.FLOAT
        elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in HALF:
            attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype("float32")))


def save_model(model: ModelProto, path: Path) -> None:
    """Writes a graph; more weights than EXTERNAL go into `<name>.onnx.data`."""
    large = sum(tensor.ByteSize() for tensor in model.graph.initializer) > EXTERNAL
    onnx.save(model, path, save_as_external_data=large, location=path.name + ".data")
    open_to_others(*path.parent.glob(f"{path.name}.data"))


def rewrite_bundle(folder: Path, out: Path, change: Callable[[str, ModelProto], ModelProto]) -> Manifest:
    """Writes a bundle's copy as the new folder `out`, every graph changed by `change(name, model)`.

    Inputs and outputs keep their names and get the types of the changed graph. It is written beside `out` and moved
    when it is complete. Raises BundleError when `out` exists.
    """
    manifest = Manifest.load(folder)
    if out.exists():
        raise BundleError(f"{out} must not exist. Choose another folder, or remove this one.")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        graph_files = tuple(spec.file for spec in manifest.graphs.values())
        for name in manifest.files:
            if not name.startswith(graph_files) and name != WEIGHTS:  # which says where the old graphs have theirs
                shutil.copyfile(folder / name, work / name)
        for name, spec in manifest.graphs.items():
            model = change(name, onnx.load(folder / spec.file))
            save_model(model, work / spec.file)
            given = {value.name: value for value in model.graph.input}
            spec.inputs = [_retyped(tensor, given[tensor.name]) for tensor in spec.inputs]
            # By order: in the file an output cannot have an input's name, and in the contract it may.
            spec.outputs = [_retyped(*pair) for pair in zip(spec.outputs, model.graph.output, strict=True)]
        manifest.files = {file.name: file_digest(file) for file in sorted(work.iterdir())}
        manifest.save(work)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    work.replace(out)
    return manifest


def _retyped(spec: TensorSpec, value: ValueInfoProto) -> TensorSpec:
    return replace(spec, dtype=numpy_name(value.type.tensor_type.elem_type))
