"""Layers in eight bits: what is quantised, with which scales, how far it is, and when a bundle is refused."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from handiffuser.calibration import graphs
from handiffuser.calibration.emulate import emulate
from handiffuser.calibration.quantize import calibrate, quantize, scale_for, to_eight_bits
from handiffuser.engines import eight_bits
from handiffuser.engines.tensorrt import Options, TensorRT
from handiffuser.engines.tensorrt_build import build_plan, left_out
from handiffuser.errors import BundleError, EngineError
from onnx import ModelProto, TensorProto, helper, numpy_helper, shape_inference

HALF = TensorProto.FLOAT16
NOISE = {"int8": 0.014, "fp8": 0.04}  # what rounding of even activations and weights comes to, relative


def block(channels: int = 32, opset: int = 23, seed: int = 0) -> ModelProto:
    """A convolution, two products of one tensor, a product of two activations, and a last convolution to 4 channels."""
    rng = np.random.default_rng(seed)
    shapes = {"first": (channels, channels, 3, 3), "last": (4, channels, 1, 1)}
    shapes |= {"a": (channels, 2 * channels), "b": (channels, channels)}
    weights = [
        numpy_helper.from_array((rng.normal(size=shape) / np.sqrt(channels)).astype(np.float16), f"{name}.weight")
        for name, shape in shapes.items()
    ]
    weights.append(numpy_helper.from_array(rng.normal(size=channels).astype(np.float16), "first.bias"))
    nodes = [
        helper.make_node("Conv", ["x", "first.weight", "first.bias"], ["conv"], "first", pads=[1] * 4),
        helper.make_node("Sigmoid", ["conv"], ["gate"], "gate"),
        helper.make_node("Mul", ["conv", "gate"], ["silu"], "silu"),
        helper.make_node("Transpose", ["silu"], ["tokens"], "tokens", perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["tokens", "a.weight"], ["wide"], "a"),
        helper.make_node("MatMul", ["tokens", "b.weight"], ["narrow"], "b"),
        helper.make_node("Transpose", ["narrow"], ["turned"], "turned", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["narrow", "turned"], ["scores"], "scores"),  # of two activations: no layer
        helper.make_node("Conv", ["silu", "last.weight"], ["y"], "last"),
    ]
    outputs = {"wide": [8, 8, 2 * channels], "narrow": [8, 8, channels], "scores": [8, 8, 8], "y": [4, 8, 8]}
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", HALF, ["B", channels, 8, 8])],
        [helper.make_tensor_value_info(name, HALF, ["B", *shape]) for name, shape in outputs.items()],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def run(model: ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    """The graph with half precision emulated."""
    session = onnxruntime.InferenceSession(emulate(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, 32, 8, 8)).astype(np.float32)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.square(a - b).sum() / np.square(a).sum()))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_layers_are_stored_in_eight_bits_and_stay_near(kind, x):
    model = block()
    groups = calibrate(model, [{"x": x}], kind)
    assert [(group.tensor, group.nodes) for group in groups] == [("x", ["first"]), ("tokens", ["a", "b"])]
    out = quantize(model, groups, kind)
    onnx.checker.check_model(out)
    stored = {tensor.name: tensor for tensor in out.graph.initializer}
    eight = {name: t for name, t in stored.items() if t.data_type in (TensorProto.INT8, TensorProto.FLOAT8E4M3FN)}
    assert {"first/" + kind, "a/" + kind, "b/" + kind} < eight.keys()
    assert not stored.keys() & {"first.weight", "a.weight", "b.weight"}  # no second copy in half
    assert stored["last.weight"].data_type == HALF  # 4 channels
    assert list(stored[f"first/{kind}/scale"].dims) == [32] and list(stored[f"a/{kind}/scale"].dims) == [64]
    # One pair for the tensor that two layers share; none around the product of two activations.
    operators = [node.op_type for node in out.graph.node]
    assert operators.count("QuantizeLinear") == 2 and operators.count("DequantizeLinear") == 2 + 3
    exact, got = run(model, x), run(out, x)
    for name in ("wide", "narrow", "y"):
        assert 1e-4 < relative(exact[name], got[name]) < 2.5 * NOISE[kind], name
    assert max(group.error for group in groups) < NOISE[kind]


def in_float32(model: ModelProto) -> ModelProto:
    """The same graph in float32, its weights stored in half behind Casts as in a bundle that is kept small."""
    out = ModelProto()
    out.CopyFrom(model)
    casts = []
    for tensor in out.graph.initializer:
        casts.append(helper.make_node("Cast", [f"{tensor.name}_half"], [tensor.name], to=TensorProto.FLOAT))
        tensor.name = f"{tensor.name}_half"
    nodes = [*casts, *out.graph.node]
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    for value in (*out.graph.input, *out.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    return out


@pytest.mark.parametrize("smooth", [0.0, 0.5])
def test_a_graph_in_float32_with_weights_behind_casts(x, smooth):
    model = in_float32(block())
    groups = calibrate(model, [{"x": x}], "int8", smooth)
    assert [(group.tensor, group.nodes) for group in groups] == [("x", ["first"]), ("tokens", ["a", "b"])]
    out = quantize(model, groups, "int8")
    onnx.checker.check_model(out, full_check=True)
    stored = {tensor.name: tensor for tensor in out.graph.initializer}
    assert {stored[name].data_type for name in stored if name.endswith(("/scale", "/smooth"))} == {TensorProto.FLOAT}
    assert {name for name in stored if name.endswith("_half")} == {"last.weight_half", "first.bias_half"}
    assert [node.op_type for node in out.graph.node].count("Cast") == 2
    exact, got, half = run(model, x), run(out, x), run(quantize(block(), groups, "int8"), x)
    for name in ("wide", "narrow", "y"):
        assert 1e-4 < relative(exact[name], got[name]) < 2.5 * NOISE["int8"], name
        assert relative(got[name], half[name]) < 2e-2  # some roundings to half change one of the 255 levels


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_graph_computes_what_its_scales_say(kind, x):
    """Parity with the same arithmetic in numpy: one product, activations and weights rounded by hand."""
    model = block()
    groups = calibrate(model, [{"x": x}], kind)
    out = quantize(model, groups, kind, keep=["first", "b"])
    tokens = run(model, x)["narrow"].shape  # [B, h, w, C]
    assert [node.op_type for node in out.graph.node].count("QuantizeLinear") == 1
    weight = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "a.weight")).astype(np.float32)
    probe = ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.append(helper.make_tensor_value_info("tokens", HALF, None))
    activations = run(probe, x)["tokens"].reshape(-1, tokens[-1])
    scale = groups[1].scale
    assert scale >= np.abs(activations).max() / {"int8": 127, "fp8": 448}[kind]  # the largest fits
    scales = scale_for(np.abs(weight).max(0), kind)
    product = (to_eight_bits(activations / scale, kind).astype(np.float32) * scale) @ (
        to_eight_bits(weight / scales, kind).astype(np.float32) * scales
    )
    got = run(out, x)["wide"].reshape(product.shape)
    assert relative(product, got) < 1e-3  # half's roundings are left


@pytest.mark.parametrize("change", ["calibrate", "quantize"])
def test_weights_never_go_through_protobuf_at_once(change, monkeypatch):
    """Which ends at 2 GB, and Stable Diffusion's are 3.4 in float32."""
    model, seen, infer = block(256), [], shape_inference.infer_shapes
    calls = [{"x": np.random.default_rng(2).normal(size=(2, 256, 8, 8)).astype(np.float32)}]
    groups = calibrate(model, calls, "int8")
    before = model.SerializeToString()
    monkeypatch.setattr(graphs.shape_inference, "infer_shapes", lambda one: seen.append(one.ByteSize()) or infer(one))
    if change == "calibrate":
        assert [group.nodes for group in calibrate(model, calls, "int8")] == [group.nodes for group in groups]
    else:
        assert quantize(model, groups, "int8").ByteSize() < 0.6 * model.ByteSize(), "no weight is there twice"
    assert seen and max(seen) < 10_000 and model.ByteSize() > 1_000_000
    assert model.SerializeToString() == before


def test_calibration_repeats_itself(x):
    calls = [{"x": x}, {"x": 2 * x}]
    one, other = calibrate(block(), calls, "int8", 0.5), calibrate(block(), calls, "int8", 0.5)
    for a, b in zip(one, other, strict=True):
        assert (a.tensor, a.nodes, a.scale, a.error) == (b.tensor, b.nodes, b.scale, b.error)
        np.testing.assert_array_equal(a.smooth, b.smooth)
    first = quantize(block(), one, "int8").SerializeToString()
    assert first == quantize(block(), other, "int8").SerializeToString()
    # The largest of all calls counts.
    assert one[0].scale > 1.9 * calibrate(block(), calls[:1], "int8", 0.5)[0].scale


def test_smoothing_mends_channels_of_very_different_size(x):
    uneven = x * np.where(np.arange(32) == 5, 100, 1)[:, None, None].astype(np.float32)
    plain, smooth = (calibrate(block(), [{"x": uneven}], "int8", strength) for strength in (0.0, 0.5))
    assert smooth[0].error < plain[0].error / 3
    model = block()
    exact = run(model, uneven)["y"]
    far, near = (relative(exact, run(quantize(model, g, "int8"), uneven)["y"]) for g in (plain, smooth))
    assert near < far / 2
    # In exact arithmetic it changes nothing: what the activations are multiplied by, the weights are divided by.
    assert plain[0].smooth is None and smooth[0].smooth[5] < smooth[0].smooth[4] / 5


def test_numbers_are_rounded_and_saturate():
    values = np.array([0.49, 0.5, 1.5, 2.5, -3.4, 126.6, 200.0, -1e9], np.float32)
    assert to_eight_bits(values, "int8").tolist() == [0, 0, 2, 2, -3, 127, 127, -127]
    values = np.array([447.0, 449.0, 1e9, -1e9, 0.001953125], np.float32)
    got = to_eight_bits(values, "fp8")
    assert got.dtype == ml_dtypes.float8_e4m3fn and got.astype(float).tolist() == [448, 448, 448, -448, 2.0**-9]


@pytest.mark.parametrize("largest", [0.0, 1e-9, 3e-5, 0.0123, 1.0, 777.7, 6e4])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_scales_are_held_by_half_and_clip_nothing(kind, largest):
    scale = scale_for(np.array([largest]), kind)
    assert scale[0] == np.float32(np.float16(scale[0])) > 0
    assert largest <= scale[0] * {"int8": 127, "fp8": 448}[kind] * (1 + 1e-6)


def test_an_old_opset_is_refused(x):
    model = block(opset=18)
    with pytest.raises(BundleError, match="from opset 19 on"):
        quantize(model, calibrate(model, [{"x": x}], "fp8"), "fp8")


def build(folder: Path, kind: str, x: np.ndarray, options: Options, backend: str = "tensorrt-rtx") -> dict:
    """The proof of the quantised block's plan; kind "fp16": of the block as it was."""
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    model = block(128)
    if kind != "fp16":
        x = np.concatenate([x] * 4, 1)
        model = quantize(model, calibrate(model, [{"x": x}], kind), kind)
    onnx.save(model, folder / "unet.onnx")
    return build_plan(TensorRT(backend), folder / "unet.onnx", {"B": 2}, kind, options)[1]


@pytest.mark.parametrize(("kind", "target"), [("fp8", "8.9"), ("fp8", "12.0"), ("int8", "8.0"), ("int8", "8.9")])
def test_the_plan_is_proven_to_compute_in_eight_bits(tmp_path, x, kind, target):
    """Of what the compiler made of it, not of what was asked: kernels whose operands are in eight bits."""
    proof = build(tmp_path, kind, x, Options(compute_capabilities=(target,)))
    assert proof["types"] == {kind.upper(): 3, "HALF": 2}
    assert proof["eight_bits"] == {"asked": 3, "compiled": 3}
    half = build(tmp_path, "fp16", x, Options(compute_capabilities=(target,)))
    assert "eight_bits" not in half
    assert proof["memory"]["weights"] < 0.6 * half["memory"]["weights"]


def test_layers_without_such_a_kernel_are_built_in_half(tmp_path, x):
    """TensorRT-RTX has no int8 convolutions for Turing: it would dequantise them, and say nothing."""
    proof = build(tmp_path, "int8", x, Options(compute_capabilities=("7.5",)))
    assert proof["eight_bits"] == {"asked": 3, "compiled": 2} and proof["in_half"] == ["first"]
    assert proof["types"] == {"INT8": 2, "HALF": 3}
    assert not any("Quantize" in layer["name"] and "first" in layer["nodes"] for layer in proof["layers"])
    with pytest.raises(EngineError, match=r"compute capability 8\.6 do not compute in fp8.*--precision int8"):
        build(tmp_path, "fp8", x, Options(compute_capabilities=("8.6", "8.9")))


def test_products_alone(tmp_path, x):
    proof = build(tmp_path, "fp8", x, Options(compute_capabilities=("8.9",), eight_bits="products"))
    assert proof["eight_bits"] == {"asked": 3, "compiled": 2} and proof["in_half"] == ["first"]


def test_tensorrt_is_asked_which_kernels_it_chose(tmp_path, x, monkeypatch):
    """Its inspector's JSON; on a GPU whose fp8 convolutions it does not choose, as on an H100 once."""
    pytest.importorskip("cuda.bindings.runtime")
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    from fake_runtime import FakeRuntime
    from fake_tensorrt import FakeTensorRT

    gpu = FakeRuntime().install(monkeypatch)
    proofs = []
    for no_kernel in ((), ("CONVOLUTION",), ("CONVOLUTION", "MATRIX_MULTIPLY")):
        FakeTensorRT(gpu, rtx=False, no_kernel=no_kernel).install(monkeypatch)
        if len(no_kernel) < 2:
            proofs.append(build(tmp_path, "fp8", x, Options(), "tensorrt"))
            continue
        with pytest.raises(EngineError, match="None of the 3 layers of unet that are quantised to fp8 was compiled"):
            build(tmp_path, "fp8", x, Options(), "tensorrt")
    assert [proof["eight_bits"]["compiled"] for proof in proofs] == [3, 2] and "in_half" not in proofs[0]
    assert proofs[1]["in_half"] == ["first"]
    (first,) = [layer for layer in proofs[0]["layers"] if layer["name"] == "first"]
    assert first["kernel"] == "sm90_fp8_convolution" and first["weights"][0]["type"] == "FP8"


@pytest.mark.parametrize(("kind", "smooth"), [("int8", 0.0), ("fp8", 0.5)])
def test_restored_layers_have_the_rounded_weights(tmp_path, kind, smooth, x):
    """In half precision, and from files beside the graph, too; the others stay as they are."""
    model = block()
    small = quantize(model, calibrate(model, [{"x": x}], kind, smooth), kind)
    outside = {"save_as_external_data": True, "location": "unet.onnx.data", "size_threshold": 0}
    onnx.save(ModelProto.FromString(small.SerializeToString()), tmp_path / "unet.onnx", **outside)
    assert eight_bits.convolutions(tmp_path / "unet.onnx") == {"first"}
    content = eight_bits.restored(tmp_path / "unet.onnx", {"first", "b"})
    (tmp_path / "restored.onnx").write_bytes(content)
    found = onnx.load(tmp_path / "restored.onnx")
    onnx.checker.check_model(found)
    exact, quantized, ours = (run(one, x) for one in (model, small, found))
    kinds = [node.op_type for node in found.graph.node]
    assert kinds.count("QuantizeLinear") == 1 and kinds.count("DequantizeLinear") == 2

    def far(one, name):
        return np.abs(one[name].astype(np.float32) - exact[name]).max() / np.abs(exact[name]).max()

    assert 0 < far(ours, "narrow") < far(quantized, "narrow"), "activations are no longer rounded"


def test_only_kernels_with_both_operands_in_eight_bits_count():
    wide = "Thirty-two wide channel vectorized row major FP8 format"
    layers = [{"nodes": ["first", "a"], "inputs": [{"type": wide}], "weights": [{"type": "FP8"}]}]
    layers.append({"nodes": ["b"], "inputs": [{"type": "Half"}, {"type": "FP8"}], "weights": []})
    assert left_out("unet", "fp8", ["first", "a"], layers) == set()
    assert left_out("unet", "fp8", ["first", "a", "b"], layers) == {"b"}
    with pytest.raises(EngineError, match="None of the 1 layers"):
        left_out("unet", "fp8", ["b"], layers)
