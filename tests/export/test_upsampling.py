"""Upsampling with a convolution behind it becomes four small convolutions, and computes what it did before."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from handiffuser.calibration.emulate import emulate
from handiffuser.engines.tensorrt import Options, TensorRT
from handiffuser.engines.tensorrt_build import build_plan
from handiffuser.export.upsampling import NARROW, fold_upsampling
from torch import nn


def block(channels: int = 6, out: int = 5, **settings) -> nn.Module:
    torch.manual_seed(0)
    convolution = nn.Conv2d(channels, out, 3, **{"padding": 1, **settings})
    return nn.Sequential(nn.ReLU(), nn.Upsample(scale_factor=2.0, mode="nearest"), convolution, nn.SiLU()).eval()


def exported(module: nn.Module, x: torch.Tensor) -> ir.Model:
    axes = ({0: torch.export.Dim("B", min=1, max=64)},)
    return torch.onnx.export(module, (x,), dynamic_shapes=axes, opset_version=23, dynamo=True).model


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    data = ir.to_proto(model)
    onnx.checker.check_model(data, full_check=True)
    session = onnxruntime.InferenceSession(emulate(data).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("size", [(1, 6, 1, 1), (3, 6, 5, 4)])
def test_the_same_result(size):
    module, x = block(), torch.randn(size)
    model = exported(module, torch.randn(2, *size[1:]))
    assert fold_upsampling(model, narrow=6) == 1
    assert "Resize" not in kinds(model) and kinds(model).count("Conv") == 4
    with torch.no_grad():
        np.testing.assert_allclose(run(model, x.numpy()), module(x).numpy(), rtol=0, atol=2e-6)


def test_in_half_the_sums_are_rounded_once():
    module, x = block().half(), torch.randn(2, 6, 5, 4).half()
    model = exported(module, x)
    assert fold_upsampling(model, narrow=6) == 1
    with torch.no_grad():
        exact = copy.deepcopy(module).float()(x.float()).numpy()
    assert np.abs(run(model, x.float().numpy()) - exact).max() < 2**-9 * np.abs(exact).max()


class Other(nn.Module):
    """An upsampling of another kind before the same convolution."""

    def __init__(self, **how) -> None:
        super().__init__()
        self.how, self.inner = how, nn.Conv2d(6, 5, 3, padding=1)

    def forward(self, x):
        return self.inner(nn.functional.interpolate(x, **self.how))


@pytest.mark.parametrize(
    "module",
    [block(stride=2), block(padding=2), block(dilation=2, padding=2), block(channels=6, out=6, groups=2),
     Other(scale_factor=2.0, mode="bilinear"), Other(scale_factor=3.0, mode="nearest"),
     Other(scale_factor=2.0, mode="nearest-exact")],
)  # fmt: skip
def test_what_is_not_the_same_stays(module):
    x = torch.randn(2, 6, 5, 4)
    model = exported(module, x)
    before = kinds(model)
    folded = fold_upsampling(model, narrow=6)
    with torch.no_grad():
        np.testing.assert_allclose(run(model, x.numpy()), module(x).numpy(), rtol=0, atol=2e-6)
    assert folded or kinds(model) == before


@pytest.mark.slow
def test_narrow_layers_stay():
    assert fold_upsampling(exported(block(), torch.randn(2, 6, 5, 4))) == 0
    assert fold_upsampling(exported(block(NARROW), torch.randn(1, NARROW, 2, 2))) == 1


@pytest.mark.slow
def test_tensorrt_builds_it(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    model = exported(block(16, 16).half(), torch.randn(2, 16, 8, 8).half())
    assert fold_upsampling(model, narrow=16) == 1
    path = tmp_path / "block.onnx"
    ir.save(model, path)
    axis = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param
    content, _ = build_plan(TensorRT("tensorrt-rtx"), path, {axis: 2}, "fp16", Options())
    assert content
