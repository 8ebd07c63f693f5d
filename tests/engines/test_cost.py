"""What a run costs by its graph: counts that a rewrite may not exceed, and the model against sums by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("onnx_ir")
import onnx
import onnx_ir as ir
from commands import invoke
from handiffuser.engines import derived
from handiffuser.engines.cost import RUNNERS, Graph, floor, kernels
from handiffuser.engines.rates import GPUS, Gpu

SD15 = Path(__file__).with_name("sd15")  # exported by hd-export in fp16, without the numbers of large weights
ORT = RUNNERS["onnxruntime"]


def load(name):
    return onnx.load_model_from_string(gzip.decompress((SD15 / f"{name}.onnx.gz").read_bytes()))


def totals(model, sizes, runner=ORT):
    found = kernels(Graph(model, sizes), runner)
    return sum(one.launches for one in found), sum(one.bytes for one in found), sum(one.operations for one in found)


def test_a_guided_step_of_stable_diffusion_1_5():
    """512 x 512, one picture, float16."""
    plain, sizes = load("unet"), {"B": 1, "G": 2}
    new = derived.rewrite(ir.from_proto(plain))
    before, after = totals(plain, sizes), totals(new, sizes)
    assert before[2] == pytest.approx(1.49e12, rel=0.01), "as PyTorch counts, less what both branches share"
    assert before[0] > 1800 and before[1] > 14e9
    assert after[0] <= 800 and after[1] <= 7.5e9
    assert before[2] <= after[2] < 1.02 * before[2], "zeros that pad queries and values"
    joined = totals(plain, sizes, RUNNERS["tensorrt"])
    assert 500 < joined[0] < 600, "TensorRT-RTX compiles it to some 560"


def test_stable_diffusion_s_decoder():
    plain = load("image_decoder")
    new = derived.rewrite(ir.from_proto(plain))
    before, after = totals(plain, {"B": 1}), totals(new, {"B": 1})
    assert after[1] <= before[1] / 3 and after[0] <= before[0] / 3 and after[2] == before[2]
    assert totals(new, {"B": 4})[1] == pytest.approx(4 * after[1], rel=0.1)


TEXT = """g (float16[1,8,4,4] x) => (float16[1,8,4,4] y) {
    c = Conv <kernel_shape = [1, 1]> (x, w, b)
    n = GroupNormalization <num_groups = 2> (c, b, b)
    s = Sigmoid (n)
    y = Mul (n, s) }"""


def toy():
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {TEXT}')
    for name, shape, size in (("w", (8, 8, 1, 1), 64), ("b", (8,), 8)):
        numbers = onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT16, shape, bytes(2 * size), raw=True)
        model.graph.initializer.append(numbers)
    return model


def test_by_hand():
    picture, weights = 8 * 16 * 2, 8 * 8 * 2
    conv, norm, sigmoid, product = kernels(Graph(toy(), {}), ORT)
    # The picture is read, turned and turned back, written, and read and written again for the bias (16 bytes, twice).
    assert (conv.launches, conv.operations) == (4, 2 * 8 * 8 * 16)
    assert conv.bytes == 2 * picture + weights + 4 * picture + 2 * picture
    assert norm.launches == 13 and sigmoid.bytes == 2 * picture and product.bytes == 3 * picture
    conv, norm = kernels(Graph(toy(), {}), RUNNERS["tensorrt"])
    assert (conv.launches, norm.launches) == (1, 2)
    assert conv.bytes == 2 * picture + weights and norm.bytes == 3 * picture, "what follows the norm is part of it"
    gpu = Gpu("slow", half=1e3, single=1e3, bandwidth=1e3)
    assert floor([conv, norm], gpu, half=True) == pytest.approx((2048 + 768) / 1e3)


def test_rates_are_in_order():
    assert set(GPUS) == {"h200", "h100", "a100", "4090", "5090", "l4"}
    for gpu in GPUS.values():
        assert gpu.half > gpu.single > 1e12 and 1e11 < gpu.bandwidth < 1e13


def test_the_command_needs_no_gpu_and_no_plans():
    result = invoke("engines.cli", "inspect", "demo", "--cost", "--gpu", "l4", "--graph", "image_decoder")
    assert result.returncode == 0 and "NVIDIA L4" in result.stdout, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("image_decoder")]
    assert len(rows) == 4 and "ONNX Runtime, derived" in rows[1]
    arguments = ("inspect", "demo", "--cost", "--json", "--graph", "image_decoder", "--batch-size", "2")
    found = [json.loads(line) for line in invoke("engines.cli", *arguments).stdout.splitlines()]
    assert found[0]["bytes"] > 3 * found[1]["bytes"] and {one["sizes"] for one in found} == {"B=2,h=32,w=32"}
    refused = invoke("engines.cli", "inspect", "demo", "--cost", "--graph", "vae")
    assert refused.returncode == 1 and "graph must be one of" in refused.stderr
