"""Group norms of small groups are written out, compute what they did before, and are one kernel each in a plan."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from handiffuser.calibration.emulate import emulate
from handiffuser.engines.tensorrt import Options, TensorRT
from handiffuser.engines.tensorrt_build import build_plan
from handiffuser.export.norms import MAX_GROUP_SIZE, write_out_norms
from torch import nn


def exported(module: nn.Module, x: torch.Tensor) -> ir.Model:
    axes = ({0: torch.export.Dim("B", min=1, max=64)},)
    return torch.onnx.export(module.eval(), (x,), dynamic_shapes=axes, opset_version=23, dynamo=True).model


def norm(channels: int = 32, groups: int = 4, epsilon: float = 1e-3, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Between two activations, as in a residual block."""
    torch.manual_seed(0)
    inner = nn.GroupNorm(groups, channels, eps=epsilon)
    nn.init.normal_(inner.weight)
    nn.init.normal_(inner.bias)
    return nn.Sequential(nn.ReLU(), inner, nn.SiLU()).to(dtype)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    data = ir.to_proto(model)
    onnx.checker.check_model(data)
    session = onnxruntime.InferenceSession(emulate(data).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("batch", [1, 5])
def test_the_same_result(batch):
    x = 3 * torch.randn(batch, 32, 6, 10) + 20  # a mean that is large beside the spread
    model = exported(norm(), torch.randn(3, 32, 6, 10))
    assert write_out_norms(model) == 1 and "GroupNormalization" not in [node.op_type for node in model.graph]
    with torch.no_grad():
        expected = norm().eval()(x).numpy()
    np.testing.assert_allclose(run(model, x.numpy()), expected, rtol=0, atol=2e-5)


def test_in_half_it_is_rounded_once():
    """Statistics, scale and bias are in float32: what comes out is as near as half precision can be."""
    x = (3 * torch.randn(2, 32, 6, 10) + 20).half()
    model = exported(norm(dtype=torch.float16), x)
    assert write_out_norms(model) == 1
    with torch.no_grad():  # the same weights, as they were rounded
        exact = norm(dtype=torch.float16).float()[:2].eval()(x.float()).numpy()
    got = run(model, x.float().numpy())
    nodes = [node.op_type for node in model.graph]
    assert nodes.count("Cast") == 2, "there and back"
    silu = exact / (1 + np.exp(-exact))
    assert np.abs(got - silu).max() < 2**-10 * np.abs(exact).max()


@pytest.mark.slow
def test_what_stays():
    side = 2 * int((MAX_GROUP_SIZE / 8) ** 0.5)  # 8 channels a group
    large = exported(norm(), torch.randn(2, 32, side, side))
    assert write_out_norms(large) == 0 and "GroupNormalization" in [node.op_type for node in large.graph]
    assert write_out_norms(exported(nn.ReLU(), torch.randn(2, 3))) == 0


class Block(nn.Module):
    """What stands around a norm in the UNet: a convolution, the bias of the time, SiLU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.time, self.norm = nn.Linear(64, 64), nn.GroupNorm(8, 64)

    def forward(self, x):
        return self.last(nn.functional.silu(self.norm(self.first(x) + self.time(x.mean((2, 3)))[:, :, None, None])))


@pytest.mark.slow
def test_a_plan_has_fewer_kernels(tmp_path):
    """Neither counters that are set to zero nor an addition of its own."""
    pytest.importorskip("tensorrt_rtx")
    layers = {}
    for written in (False, True):
        model = exported(Block().half(), torch.randn(2, 64, 16, 16).half())
        assert not written or write_out_norms(model) == 1
        path = tmp_path / f"block_{written}.onnx"
        ir.save(model, path)
        _, proof = build_plan(TensorRT("tensorrt-rtx"), path, {"B": 2}, "fp16", Options())
        layers[written] = [layer["kernel"] for layer in proof["layers"]]
    assert any("Gnor" in kernel for kernel in layers[False])
    assert not any("Gnor" in kernel for kernel in layers[True])
    assert len(layers[True]) <= len(layers[False]) - 2, layers
