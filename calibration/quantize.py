"""Eight bits: fp8 (e4m3) and int8 as explicit QuantizeLinear and DequantizeLinear around what computes.

    groups = calibrate("bundle_fp16/unet.onnx", inputs["unet"], "fp8")        # scales, from recorded inputs
    save_model(quantize("bundle_fp16/unet.onnx", groups, "fp8"), "unet.onnx")

Only convolutions and products with weights are quantised. The rest stays in float16 for TensorRT, and in float32 for
OpenVINO, which rounds it to bfloat16 itself. Weights are stored in eight bits with a scale for each output channel;
activations get one scale a tensor, with which the largest just fits. Where some channels of the activations are far
larger than others, a factor for each input channel moves a part of that into the weights, which changes nothing in
exact arithmetic (SmoothQuant, arXiv 2211.10438, equation 4).

A better layer may make worse pictures. An activation's rounding differs from step to step and evens out; a weight's, or
a clipped activation's, is the same in all steps and adds up. On the demo int8 gives 49.6 dB plainly, 46.5 with half the
unevenness moved (although the UNet's error is a third less), 45.9 with activations clipped where a layer loses least.
So nothing is clipped, and only what fails without smoothing gets it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..contract import Manifest
from ..errors import BundleError
from .graphs import element_types, label, rewrite_bundle
from .mixed import Pieces

KINDS = {"fp8": TensorProto.FLOAT8E4M3FN, "int8": TensorProto.INT8}
MAX_VALUES = {"fp8": 448.0, "int8": 127.0}
OPSET = 19  # from which QuantizeLinear knows fp8 and float16
# Channels in and out must be multiples of this: matrix units take operands of 16 bytes. So the first and the last
# convolution, which see latents of 4 channels, are never quantised.
MULTIPLE = 16
MIN_SCALE = 2.0**-20  # the least scale: float16 has 16 steps up to it
ROWS = 64  # pixels or tokens that are kept of a call


@dataclass
class Group:
    """Layers that take the same tensor and share its scale."""

    tensor: str
    channels_first: bool  # convolutions have their channels on axis 1, products on the last
    nodes: list[str]  # labels
    scale: float = 1.0  # of the activations
    smooth: np.ndarray | None = None  # float32 [channels], factors of the activations; None: no smoothing
    error: float = 0.0  # of the sampled products, root mean square relative to their values


def calibrate(
    model: str | Path | ModelProto,
    inputs: Sequence[Mapping[str, np.ndarray]],
    kind: str,
    smooth: float = 0.0,
    threads: int | None = None,
) -> list[Group]:
    """The layers of a graph that can be quantised, with their scales.

    inputs: calls to the graph, as `record` keeps them. smooth: how much of the activations' unevenness is moved into
    the weights, 0 to 1.
    """
    model = model if isinstance(model, ModelProto) else onnx.load(model)
    weights, types = _weights(model), element_types(model)
    base = _base(model, types)
    groups: dict[tuple[str, bool], Group] = {}
    layers: dict[str, list[NodeProto]] = {}  # by the label of a group's first node
    for node in model.graph.node:
        matrix = _matrix(node, weights) if types[node.output[0]] == base else None
        if matrix is not None and not any(size % MULTIPLE for size in matrix.shape[:2]):
            key = (node.input[0], node.op_type == "Conv")
            group = groups.setdefault(key, Group(*key, []))
            group.nodes.append(label(node))
            layers.setdefault(group.nodes[0], []).append(node)
    largest, samples = _sample(Pieces(model), list(groups.values()), inputs, threads)
    for group in groups.values():
        name = group.nodes[0]
        # Read again: all at once they take as much memory as the graph.
        matrices = [matrix for node in layers[name] if (matrix := _matrix(node, weights)) is not None]
        _settle(group, samples[name], largest[name], matrices, kind, smooth)
    return list(groups.values())


def quantize(
    model: str | Path | ModelProto, groups: Sequence[Group], kind: str, keep: Collection[str] = ()
) -> ModelProto:
    """A copy of a graph with its layers quantised, but for the nodes labelled `keep`."""
    model = model if isinstance(model, ModelProto) else onnx.load(model)
    if any(entry.domain == "" and entry.version < OPSET for entry in model.opset_import):
        raise BundleError(f"ONNX knows {kind} from opset {OPSET} on. Export with --opset {OPSET} or later.")
    weights, element = _weights(model), KINDS[kind]
    real = helper.tensor_dtype_to_np_dtype(_base(model, element_types(model)))
    made = helper.make_graph([], model.graph.name, model.graph.input, model.graph.output)
    out = helper.make_model(made, opset_imports=model.opset_import, ir_version=model.ir_version)
    graph = out.graph  # it gets the weights last, and only those that are not quantised
    graph.value_info.extend(model.graph.value_info)
    group_of = {name: group for group in groups for name in group.nodes if name not in keep}
    nodes: list[NodeProto] = []
    fed: set[str] = set()  # activations that are quantised already

    def add(name: str, value: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def op(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def zero(name: str, shape: Sequence[int]) -> str:
        content = bytes(int(np.prod(shape)))
        graph.initializer.append(helper.make_tensor(name, element, shape, content, raw=True))
        return name

    for node in model.graph.node:
        group = group_of.get(label(node))
        if group is None:
            nodes.append(node)
            continue
        stem = f"{group.tensor}/{kind}" + ("/channels_first" if group.channels_first else "")
        if stem not in fed:
            fed.add(stem)
            value = group.tensor
            if group.smooth is not None:
                factor = group.smooth.reshape((-1, 1, 1) if group.channels_first else (-1,))
                value = op("Mul", [value, add(f"{stem}/smooth", factor.astype(real))], f"{stem}/smoothed")
            parts = [add(f"{stem}/scale", np.array(group.scale, real)), zero(f"{stem}/zero", ())]
            op("DequantizeLinear", [op("QuantizeLinear", [value, *parts], f"{stem}/q"), *parts], f"{stem}/dq")
        weight = numpy_helper.to_array(weights[node.input[1]]).astype(np.float32)
        into, out_of = _axes(node)
        if group.smooth is not None:
            # The graph's factor is rounded to float16, so the weights must match the rounded one.
            rounded = group.smooth.astype(np.float16).astype(np.float32)
            weight = weight / rounded.reshape([-1 if axis == into else 1 for axis in range(weight.ndim)])
        others = tuple(axis for axis in range(weight.ndim) if axis != out_of)
        scale = scale_for(np.abs(weight).max(others), kind)
        stored = to_eight_bits(weight / np.expand_dims(scale, others), kind)
        name = f"{label(node)}/{kind}"
        graph.initializer.append(helper.make_tensor(name, element, stored.shape, stored.tobytes(), raw=True))
        parts = [name, add(f"{name}/scale", scale.astype(real)), zero(f"{name}/zero", scale.shape)]
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[0] = f"{stem}/dq"
        copy.input[1] = op("DequantizeLinear", parts, f"{name}/dq", axis=out_of)
        nodes.append(copy)
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    nodes = [node for node in nodes if node.op_type != "Cast" or node.output[0] in used]
    used = {name for node in nodes for name in node.input}
    graph.node.extend(nodes)
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in used)
    return out


def scale_for(largest: np.ndarray, kind: str) -> np.ndarray:
    """The scales with which `largest` just fits, as float32 values that float16 holds, rounded up against clipping."""
    exact = np.maximum(np.asarray(largest, np.float32) / MAX_VALUES[kind], MIN_SCALE)
    scale = exact.astype(np.float16)
    scale = np.where(scale.astype(np.float32) < exact, np.nextafter(scale, np.float16(np.inf)), scale)
    return scale.astype(np.float32)


def to_eight_bits(value: np.ndarray, kind: str) -> np.ndarray:
    """Rounds to the nearest number that eight bits hold, ties to even; larger numbers become the largest."""
    clipped = np.clip(value, -MAX_VALUES[kind], MAX_VALUES[kind])
    return clipped.astype(ml_dtypes.float8_e4m3fn) if kind == "fp8" else np.rint(clipped).astype(np.int8)


def _weights(model: ModelProto) -> dict[str, TensorProto]:
    """Weights by the names that layers use. A weight that is stored in half stands behind a Cast."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
    return found


def _base(model: ModelProto, types: Mapping[str, int]) -> int:
    """The element type that a graph's layers compute in: float16 where anything is computed in it, else float32."""
    half = any(types[name] == TensorProto.FLOAT16 for node in model.graph.node for name in node.output if name)
    return TensorProto.FLOAT16 if half else TensorProto.FLOAT


def _axes(node: NodeProto) -> tuple[int, int]:
    """The axes of a layer's weight: (channels in, channels out)."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return (1, 0) if node.op_type == "Conv" or transposed else (0, 1)


def _matrix(node: NodeProto, weights: Mapping[str, TensorProto]) -> np.ndarray | None:
    """A layer's weight as float32 [channels in, channels out, taps]; None for other nodes."""
    if node.op_type not in ("Conv", "MatMul", "Gemm") or node.input[1] not in weights:
        return None
    plain = {"transA": 0, "alpha": 1.0, "beta": 1.0, "group": 1}
    if any(helper.get_attribute_value(a) != plain.get(a.name, helper.get_attribute_value(a)) for a in node.attribute):
        return None
    weight = numpy_helper.to_array(weights[node.input[1]])
    if (
        weight.dtype not in (np.float16, np.float32)
        or weight.ndim < 2
        or (node.op_type == "MatMul" and weight.ndim > 2)
    ):
        return None
    into, out_of = _axes(node)
    return np.moveaxis(weight, (into, out_of), (0, 1)).reshape(weight.shape[into], weight.shape[out_of], -1)


def _sample(
    pieces: Pieces, groups: Sequence[Group], inputs: Sequence[Mapping[str, np.ndarray]], threads: int | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The largest magnitude of each group's channels, and some activations [N, C], by its first node's label."""
    largest: dict[str, np.ndarray] = {}
    samples: dict[str, list[np.ndarray]] = {}
    users = [(group.nodes[0], (group.tensor,)) for group in groups]
    for piece, values in pieces.walk(inputs, users, threads=threads):
        for group in groups:
            name = group.nodes[0]
            if pieces.piece_of[name] == piece:
                value = values[group.tensor]
                value = np.moveaxis(value, 1 if group.channels_first else -1, -1)
                value = value.reshape(-1, value.shape[-1])
                most = np.abs(value).max(0)
                largest[name] = np.maximum(largest.get(name, most), most)
                rows = np.linspace(0, len(value) - 1, min(ROWS, len(value))).astype(int)
                samples.setdefault(name, []).append(value[rows])
    return largest, {name: np.concatenate(values) for name, values in samples.items()}


def _settle(
    group: Group, sample: np.ndarray, largest: np.ndarray, matrices: Sequence[np.ndarray], kind: str, smooth: float
) -> None:
    """Sets a group's scale, smoothing and error on the sample, for each tap of a kernel on its own."""
    joined = np.concatenate([matrix.transpose(0, 2, 1) for matrix in matrices], -1)
    weight = joined.astype(np.float32)  # [in, taps, out]
    factor = np.ones_like(largest)
    if smooth:
        heaviest = np.maximum(np.abs(weight).max((1, 2)), 1e-8)
        factor = heaviest ** (1 - smooth) / np.maximum(largest, 1e-8) ** smooth
        # Scaling cancels a factor common to all channels, so the mean is 1, which fits float16.
        factor = np.exp(np.log(factor) - np.log(factor).mean()).clip(2.0**-8, 2.0**8)
        factor = group.smooth = factor.astype(np.float16).astype(np.float32)
    scale = scale_for(np.max(largest * factor), kind)
    group.scale = float(scale)
    activations = to_eight_bits(sample * factor / scale, kind).astype(np.float32) * scale
    weight_scale = scale_for(np.abs(weight / factor[:, None, None]).max((0, 1)), kind)
    rounded = to_eight_bits(weight / factor[:, None, None] / weight_scale, kind).astype(np.float32) * weight_scale
    exact = sample @ weight.reshape(len(weight), -1)
    lost = activations @ rounded.reshape(len(weight), -1) - exact
    group.error = float(np.sqrt(np.square(lost).sum() / max(np.square(exact).sum(), 1e-30)))


def quantize_bundle(
    base: str | Path,
    out: str | Path,
    groups: Mapping[str, Sequence[Group]],
    kind: str,
    keep: Mapping[str, Collection[str]] | None = None,
) -> Manifest:
    """Writes the bundle `base` into the folder `out`, its graphs quantised as `groups` says, by graph.

    keep: labels of the nodes that stay unquantised, by graph. The manifest notes how many layers were quantised.
    """
    keep = keep or {}
    noted = {}

    def change(name: str, model: ModelProto) -> ModelProto:
        if not groups.get(name):
            return model
        kept = sorted(keep.get(name, ()))
        layers = sum(len(group.nodes) for group in groups[name])
        if len(kept) == layers:
            return model
        noted[name] = {"quantized": layers - len(kept), "layers": layers, "kept": kept}
        return quantize(model, groups[name], kind, kept)

    manifest = rewrite_bundle(Path(base), Path(out), change)
    manifest.made_by |= {"quantized": noted, "base": manifest.precision}
    manifest.precision = kind
    manifest.save(Path(out))
    return manifest
