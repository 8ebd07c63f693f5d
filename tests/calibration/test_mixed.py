"""Nodes that half precision does not hold are found, for the right reason, and kept in float32."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from handiffuser.calibration.emulate import emulate
from handiffuser.calibration.mixed import Pieces, _pair, find_sensitive, keep_float32
from handiffuser.contract import GRAPHS
from handiffuser.errors import BundleError
from onnx import ModelProto, TensorProto, helper, numpy_helper

FLOAT, HALF, BFLOAT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16


def chain(kind: int, *steps: tuple[str, float]) -> ModelProto:
    """A float32 graph x[N] -> y[N] that computes `OPERATOR number` step after step in another precision.

    Tensors are called t0, t1, ... and nodes OPERATOR0, OPERATOR1, ...
    """
    nodes = [helper.make_node("Cast", ["x"], ["t"], name="enter", to=kind)] if kind != FLOAT else []
    last = "t" if nodes else "x"
    weights = []
    for i, (operator, number) in enumerate(steps):
        weights.append(helper.make_tensor(f"w{i}", kind, [], [number]))
        nodes.append(helper.make_node(operator, [last, f"w{i}"], [f"t{i}"], name=f"{operator}{i}"))
        last = f"t{i}"
    nodes.append(helper.make_node("Cast", [last], ["y"], name="leave", to=FLOAT))
    values = [helper.make_tensor_value_info(name, FLOAT, ["N"]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "chain", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def run(model: ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def emulated(path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return run(emulate(onnx.load(path)), **feeds)


X = np.array([0.1, 1.0, -3.3, 7.7], np.float32)


def test_emulation_rounds_every_tensor():
    steps = (("Mul", 3.3), ("Add", 100.0), ("Sub", 99.0), ("Div", 7.0))
    half = np.float16
    expected = ((X.astype(half) * half(3.3) + half(100)) - half(99)) / half(7)
    assert np.array_equal(run(emulate(chain(HALF, *steps)), x=X)[0], expected.astype(np.float32))


def test_emulation_overflows():
    """What ONNX Runtime's own kernels hide: between nodes that it runs in float32 it does not round."""
    model = chain(HALF, ("Mul", 300.0), ("Mul", 300.0), ("Mul", 1e-4))
    assert np.array_equal(np.isinf(run(emulate(model), x=X)[0]), np.abs(X * 90000) > 65504)


def test_emulation_of_bfloat16():
    steps = (("Mul", 3.3), ("Mul", 1e30), ("Mul", 1e-30))
    got = run(emulate(chain(BFLOAT, *steps)), x=X)[0]
    error = np.abs(got / (3.3 * X) - 1).max()
    assert 1e-4 < error < 2e-2, "8 bits of precision, and the range of float32"


def test_emulation_leaves_float32_alone(tiny_bundle):
    for name in GRAPHS:
        model = onnx.load(tiny_bundle / f"{name}.onnx")
        assert emulate(model) is model


def test_overflow_is_blamed_on_those_that_overflow():
    steps = (("Mul", 2.0), ("Mul", 3e4), ("Mul", 0.5), ("Mul", 1e-4), ("Add", 20.0))
    found = find_sensitive(chain(FLOAT, *steps), chain(HALF, *steps), [{"x": X}])
    # Mul1 gives too much, Mul2 takes and gives too much, Mul3 takes too much; the infinity ends there.
    assert [(node.name, node.reason) for node in found] == [(f"Mul{i}", "overflow") for i in (1, 2, 3)]
    assert found[0].largest == pytest.approx(2 * 3e4 * 7.7, rel=1e-3) and found[0].op == "Mul"


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_kept_nodes_pass_float32_to_each_other(chunk, tmp_path):
    steps = (("Mul", 2.0), ("Mul", 3e4), ("Mul", 0.5), ("Mul", 1e-4), ("Add", 20.0))
    exact, half = chain(FLOAT, *steps), chain(HALF, *steps)
    names = {node.name for node in find_sensitive(exact, half, [{"x": X}, {"x": X[:2]}], chunk=chunk)}
    onnx.save(half, tmp_path / "half.onnx")
    assert not np.isfinite(emulated(tmp_path / "half.onnx", {"x": X})[0]).all()
    keep_float32(tmp_path / "half.onnx", tmp_path / "mixed.onnx", names)
    onnx.checker.check_model(tmp_path / "mixed.onnx", full_check=True)
    np.testing.assert_allclose(emulated(tmp_path / "mixed.onnx", {"x": X})[0], run(exact, x=X)[0], rtol=5e-3)
    assert find_sensitive(exact, tmp_path / "mixed.onnx", [{"x": X}], chunk=chunk) == []


def test_a_node_that_loses_too_much_is_kept_with_what_feeds_it(tmp_path):
    steps = (("Mul", 1.5), ("Add", 3000.0), ("Sub", 3000.0), ("Mul", 2.0))
    exact, half = chain(FLOAT, *steps), chain(HALF, *steps)
    found = find_sensitive(exact, half, [{"x": X}])
    assert [(node.name, node.reason) for node in found] == [("Add1", "feeds Sub2"), ("Sub2", "error")]
    assert found[1].error > 0.05 > 1e-3 > found[0].error
    onnx.save(half, tmp_path / "half.onnx")
    keep_float32(tmp_path / "half.onnx", tmp_path / "mixed.onnx", {node.name for node in found})
    expected = run(exact, x=X)[0]
    before, after = (emulated(tmp_path / f"{name}.onnx", {"x": X})[0] for name in ("half", "mixed"))
    assert np.abs(after - expected).max() < 0.02 * np.abs(before - expected).max()


def test_bfloat16_is_blamed_for_more_than_its_rounding():
    """Its roundings are 8 times as large as float16's, and so is what a node may lose."""

    def found(number: float, **limit: float) -> list[str]:
        steps = (("Add", number), ("Sub", number))
        return [node.name for node in find_sensitive(chain(FLOAT, *steps), chain(BFLOAT, *steps), [{"x": X}], **limit)]

    assert found(60.0) == [] and found(60.0, limit=1e-2) == found(3000.0) == ["Add0", "Sub1"]


def test_what_was_float32_just_before_is_taken_from_there(tmp_path):
    """A graph's own cast to half comes before its first node: too large a number must not pass through it."""
    steps = (("Mul", 1e-4), ("Add", 1.0))
    exact, half = chain(FLOAT, *steps), chain(HALF, *steps)
    large = np.array([1e5, 2e5], np.float32)
    found = find_sensitive(exact, half, [{"x": large}])
    assert [node.name for node in found] == ["Mul0"]
    onnx.save(half, tmp_path / "half.onnx")
    keep_float32(tmp_path / "half.onnx", tmp_path / "mixed.onnx", ["Mul0"])
    np.testing.assert_allclose(emulated(tmp_path / "mixed.onnx", {"x": large})[0], [11, 21], rtol=2e-3)


@pytest.mark.parametrize("name", GRAPHS)
def test_nodes_are_paired_rightly_and_sound_graphs_have_nothing_to_keep(name, tiny_bundle, tiny_half, inputs):
    """By place, not by name: in another precision the exporter numbers them otherwise."""
    paths = [folder / f"{name}.onnx" for folder in (tiny_bundle, tiny_half)]
    pieces = [Pieces(path) for path in paths]
    compared = 0
    for pair in _pair(*pieces):
        weights = [
            [numpy_helper.to_array(p.weights[i]) for i in node.input if i in p.weights]
            for node, p in zip(pair, pieces, strict=True)
        ]
        for ours, theirs in zip(*weights, strict=False):
            assert np.allclose(ours, theirs, rtol=1e-3, atol=1e-4), pair[0].name
            compared += ours.size > 100
    assert compared or name == "hand_features"
    assert find_sensitive(*paths, inputs[name]) == []


def test_an_overflowing_layer_is_found_and_mended(overflowing, inputs, tmp_path):
    exact, half = (folder / "image_decoder.onnx" for folder in overflowing)
    calls = inputs["image_decoder"]
    assert not emulated(half, calls[0])[1].all(), "it overflows"
    found = find_sensitive(exact, half, calls)
    assert {node.reason for node in found} == {"overflow"} and len(found) < 5
    assert {node.op for node in found} >= {"Conv", "Reshape"}, "the convolution, and what takes its output on"
    keep_float32(half, tmp_path / "mixed.onnx", [node.name for node in found])
    image, finite = emulated(tmp_path / "mixed.onnx", calls[0])
    expected, _ = run(onnx.load(exact), **calls[0])
    assert finite.all() and np.abs(image.astype(float) - expected).max() <= 0.01 * 255
    weights = onnx.load(tmp_path / "mixed.onnx").graph.initializer
    assert all(w.data_type == HALF for w in weights if np.prod(w.dims) > 100), "weights stay small"


def test_inputs_and_outputs_keep_their_types(tiny_half, tmp_path):
    """Even with every node in float32, the graph takes and gives what the manifest says."""
    path = tiny_half / "unet.onnx"
    before = onnx.load(path)
    names = {node.name for node in before.graph.node if node.op_type != "Cast"}
    keep_float32(path, tmp_path / "unet.onnx", names)
    after = onnx.load(tmp_path / "unet.onnx")
    assert after.graph.input == before.graph.input and after.graph.output == before.graph.output
    types = Pieces(after).types
    assert all(types[name] != HALF for node in after.graph.node if node.name in names for name in node.output)


def test_what_does_not_fit_is_refused(tiny_half, tmp_path):
    with pytest.raises(BundleError, match="has no node nothing"):
        keep_float32(tiny_half / "unet.onnx", tmp_path / "unet.onnx", ["nothing"])
    with pytest.raises(BundleError, match="not two precisions of one"):
        find_sensitive(chain(FLOAT, ("Mul", 2.0)), chain(HALF, ("Add", 2.0)), [{"x": X}])
