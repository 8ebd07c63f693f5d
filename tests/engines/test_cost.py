"""What a run costs by its graph: counts that a rewrite may not exceed, and the model against sums by hand."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("onnx_ir")
import numpy as np
import onnx
import onnx_ir as ir
from commands import invoke
from handiffuser.contract import Manifest
from handiffuser.engines import derived
from handiffuser.engines.cost import RUNNERS, Graph, floor, kernels
from handiffuser.engines.rates import GPUS, Gpu
from handiffuser.errors import EngineError

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
    gpu = Gpu("slow", half=1e3, single=1e3, bandwidth=1e3, int8=4e3, fp8=0)
    assert floor([conv, norm], gpu, "fp16") == pytest.approx((2048 + 768) / 1e3)


EIGHT = """g (float16[1,16,4,4] x) => (float16[1,16,4,4] y) {
    q = QuantizeLinear (x, s, z)
    d = DequantizeLinear (q, s, z)
    e = DequantizeLinear <axis = 0> (w, t, u)
    c = Conv <kernel_shape = [1, 1]> (d, e, b)
    y = Conv <kernel_shape = [1, 1]> (c, h) }"""


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_eight_bits_by_hand(precision):
    """A convolution between eight-bit tensors, and one in half behind it."""
    kind = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}[precision]
    half, model = (
        onnx.TensorProto.FLOAT16,
        onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {EIGHT}'),
    )
    for name, of, shape in (
        ("s", half, ()), ("z", kind, ()), ("w", kind, (16, 16, 1, 1)), ("t", half, (16,)), ("u", kind, (16,)),
        ("b", half, (16,)), ("h", half, (16, 16, 1, 1)),
    ):  # fmt: skip
        size = (2 if of == half else 1) * int(np.prod(shape))
        model.graph.initializer.append(onnx.helper.make_tensor(name, of, shape, bytes(size), raw=True))
    quantised, conv, other = kernels(Graph(model, {}), RUNNERS["tensorrt"])
    numbers, weights = 16 * 16, 16 * 16
    assert (quantised.op, quantised.bytes, quantised.operations) == ("QuantizeLinear", 3 * numbers, 0)
    assert conv.eight and conv.bytes == numbers + weights + 2 * numbers and conv.operations == 2 * 16 * numbers
    assert not other.eight and other.bytes == 2 * (numbers + weights + numbers)
    gpu = Gpu("slow", half=1e3, single=1e2, bandwidth=1e9, **{"int8": 0.0, "fp8": 0.0, precision: 4e3})
    assert floor([conv, other], gpu, precision) == pytest.approx(8192 / 4e3 + 8192 / 1e3)
    unknown = Gpu("old", half=1e3, single=1e2, bandwidth=1e9, int8=0, fp8=0)
    with pytest.raises(EngineError, match=rf"--gpu must be one of h200, h100.* for {precision}, got old"):
        floor([conv], unknown, precision)


def quantised(model, kind):
    """A graph of float16 whose convolutions and products with weights take operands of eight bits."""
    out, stored = onnx.ModelProto(), {tensor.name: tensor for tensor in model.graph.initializer}
    out.CopyFrom(model)
    del out.graph.node[:], out.graph.value_info[:]
    out.graph.initializer.append(
        onnx.helper.make_tensor("eight/scale", onnx.TensorProto.FLOAT16, (), bytes(2), raw=True)
    )
    out.graph.initializer.append(onnx.helper.make_tensor("eight/zero", kind, (), bytes(1), raw=True))
    parts, done = ["eight/scale", "eight/zero"], set()
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        weight = stored.get(node.input[1]) if node.op_type in ("Conv", "MatMul") else None
        if weight is not None and not any(size % 16 for size in list(weight.dims)[:2]):
            for name in node.input[:2]:
                if name not in done and name not in stored:
                    out.graph.node.append(onnx.helper.make_node("QuantizeLinear", [name, *parts], [f"{name}/q"]))
                    out.graph.node.append(
                        onnx.helper.make_node("DequantizeLinear", [f"{name}/q", *parts], [f"{name}/dq"])
                    )
                elif name not in done:
                    one = next(tensor for tensor in out.graph.initializer if tensor.name == name)
                    one.data_type = kind
                    out.graph.node.append(onnx.helper.make_node("DequantizeLinear", [name, *parts], [f"{name}/dq"]))
                done.add(name)
            copy.input[0], copy.input[1] = (f"{name}/dq" for name in node.input[:2])
        out.graph.node.append(copy)
    return out


def test_a_step_of_stable_diffusion_1_5_in_eight_bits():
    plain, sizes, trt = load("unet"), {"B": 1, "G": 2}, RUNNERS["tensorrt"]
    half = kernels(Graph(plain, sizes), trt)
    eight = kernels(Graph(quantised(plain, onnx.TensorProto.FLOAT8E4M3FN), sizes), trt)
    work = sum(one.operations for one in eight)
    assert work == sum(one.operations for one in half)
    assert 0.7 < sum(one.operations for one in eight if one.eight) / work < 0.95, "attention stays in half"
    for name in ("h200", "4090", "l4"):
        assert floor(half, GPUS[name], "fp16") / 2 < floor(eight, GPUS[name], "fp8") < floor(half, GPUS[name], "fp16")


def test_rates_are_in_order():
    assert set(GPUS) == {"h200", "h100", "a100", "4090", "5090", "l4"}
    for gpu in GPUS.values():
        assert gpu.half > gpu.single > 1e12 and 1e11 < gpu.bandwidth < 1e13
        assert 2 <= gpu.int8 / gpu.half <= 4.01 and gpu.int8 >= gpu.fp8
        assert (gpu.fp8 == 0) == (gpu is GPUS["a100"]), "Ampere has no fp8"


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


@pytest.mark.parametrize("option", [("--gpu", "l4"), ("--batch-size", 2)])
def test_options_of_costs_come_with_cost(option):
    result = invoke("engines.cli", "inspect", "demo", *option)
    assert result.returncode == 2 and "must come with --cost" in result.stderr


def test_the_command_says_how_much_is_in_eight_bits(tiny_half, tmp_path):
    folder = shutil.copytree(tiny_half, tmp_path / "fp8")
    model = quantised(onnx.load(folder / "unet.onnx", load_external_data=False), onnx.TensorProto.FLOAT8E4M3FN)
    onnx.save(model, folder / "unet.onnx")
    manifest = Manifest.load(folder, verify=False)
    manifest.precision = "fp8"
    manifest.save(folder)
    result = invoke("engines.cli", "inspect", folder, "--cost", "--gpu", "h200")
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if "TensorRT" in line]
    assert len(rows) == len(manifest.graphs) and "ONNX Runtime" not in result.stdout, (
        "which runs no such graph on a GPU"
    )
    shares = {row.split()[0]: int(row.split("%")[0].split()[-1]) for row in rows}
    assert shares["unet"] > 30 and not any(share for name, share in shares.items() if name != "unet")
    refused = invoke("engines.cli", "inspect", folder, "--cost", "--gpu", "a100", "--graph", "unet")
    assert refused.returncode == 1 and "--gpu must be one of h200, h100, 5090, 4090, l4 for fp8" in refused.stderr
    manifest.made_by["base"] = "fp32"
    manifest.save(folder)
    refused = invoke("engines.cli", "inspect", folder, "--cost")
    assert refused.returncode == 1 and "for OpenVINO" in refused.stderr
