"""Inductor beside ONNX Runtime and TensorRT in `benchmarks/gpu.sh b`, as far as a CPU shows it."""

from __future__ import annotations

import json

import gpu_inductor
import gpu_variants
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import helper, numpy_helper
from onnx_torch import OnnxModule

TEXT = """g (float[B,4,8,8] latents) => (float[B,16,16,4] image) {
    c = Conv <kernel_shape = [3, 3], pads = [0, 1, 1, 1]> (latents, w, b)
    n = GroupNormalization <num_groups = 4, epsilon = 1e-5> (c, g1, b)
    s = Sigmoid (n)
    m = Mul (n, s)
    t = Transpose <perm = [0, 2, 3, 1]> (m)
    f = Reshape (t, rows)
    l = LayerNormalization <axis = -1, epsilon = 1e-5> (f, g1, b)
    p = MatMul (l, k)
    a = Attention <q_num_heads = 2, kv_num_heads = 2> (p, l, f)
    e = Gelu (a)
    h, j = Split <axis = 2, num_outputs = 2> (e)
    o = Concat <axis = 2> (j, h)
    u = Transpose <perm = [0, 2, 1]> (o)
    v = Reshape (u, sides)
    d = DepthToSpace <blocksize = 2, mode = "DCR"> (v)
    q = Pad <mode = "constant"> (d, around)
    i = Slice (q, zeros, ends, axes)
    r = ReduceMean <keepdims = 1> (i, last)
    x = Sub (i, r)
    image = Transpose <perm = [0, 2, 3, 1]> (x) }"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a decoder of a few operators of each kind."""
    folder, random = tmp_path_factory.mktemp("model"), np.random.default_rng(0)
    made = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {TEXT}')
    weights = {"w": (16, 4, 3, 3), "b": (16,), "g1": (16,), "k": (16, 16)}
    numbers = {name: random.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}
    numbers |= {"rows": [0, -1, 16], "sides": [0, 16, 7, 8], "around": [0, 0, 1, 0, 0, 0, 2, 0], "last": [-1]}
    numbers |= {"zeros": [1], "ends": [2**63 - 1], "axes": [2]}
    for name, value in numbers.items():
        made.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    onnx.save(made, folder / "image_decoder.onnx")
    return folder


def test_the_module_computes_what_the_graph_says(model):
    found = onnxruntime.InferenceSession(str(model / "image_decoder.onnx"), providers=["CPUExecutionProvider"])
    latents = np.random.default_rng(2).standard_normal((2, 4, 8, 8)).astype(np.float32)
    (wanted,) = found.run(None, {"latents": latents})
    (ours,) = OnnxModule(model / "image_decoder.onnx", {"B": 2})(torch.from_numpy(latents))
    assert wanted.shape == tuple(ours.shape) == (2, 16, 16, 4)
    np.testing.assert_allclose(ours.numpy(), wanted, atol=2e-5)


def test_an_operator_that_it_does_not_know(tmp_path):
    nodes = [helper.make_node("Erf", ["x"], ["m"]), helper.make_node("Tan", ["m"], ["y"])]
    sides = [helper.make_tensor_value_info(name, 1, ["B", 2]) for name in "xy"]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", sides[:1], sides[1:])), tmp_path / "g.onnx")
    with pytest.raises(NotImplementedError, match=r"must have known operators, got Erf, Tan\. Add them here\."):
        OnnxModule(tmp_path / "g.onnx", {"B": 1})


@pytest.mark.slow
def test_inductor_is_timed_beside_the_graph(model, tmp_path):
    """Compiled for one shape, as hd-export does, with its weights in another file."""

    def invoke(commands, *words):
        done = CliRunner().invoke(commands, [*map(str, words), "--model", str(model)])
        assert done.exit_code == 0, (done.output, done.exception)

    invoke(gpu_variants.commands, "run", tmp_path, "image_decoder", "bundle", "--quick")
    invoke(gpu_inductor.commands, "build", tmp_path, "image_decoder")
    invoke(gpu_inductor.commands, "run", tmp_path, "image_decoder", "--quick")
    line = json.loads((tmp_path / "image_decoder-1-inductor.json").read_text())
    assert line["error"] < 1e-5 and line["ms"] > 0 and line["build_s"] > 0 and line["device"] == "cpu"
    table = CliRunner().invoke(gpu_variants.commands, ["table", str(tmp_path)]).output
    assert "inductor" in table and ", built in " in table and "A CPU decides nothing." in table
