"""Both branches of guidance are computed once as long as they are equal, and the step gives what it gave before."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from handiffuser.export.branches import share_branches
from handiffuser.export.graphs import branched
from torch import nn


class Step(nn.Module):
    """A small network whose second half looks at the condition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)
        self.out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x, time, condition):
        sample, row = branched(x, condition.shape[1]), branched(time, condition.shape[1])
        skip = self.first(sample) + row[:, :8, None, None]
        h = self.second(torch.nn.functional.silu(self.norm(skip)))
        tokens = h.flatten(2).transpose(1, 2) + 0.5
        weights = (tokens @ condition.flatten(0, 1).transpose(1, 2)).softmax(-1)
        looked = (weights @ condition.flatten(0, 1)).transpose(1, 2).reshape(h.shape)
        late = looked * row[:, 8:, None, None]
        return self.out(torch.cat([late, skip], 1)).unflatten(0, (x.shape[0], -1))


def exported(module: nn.Module) -> ir.Model:
    B, G = torch.export.Dim("B", min=1, max=64), torch.export.Dim("G", min=1, max=2)
    inputs = (torch.randn(3, 4, 6, 6), torch.randn(3, 16), torch.randn(3, 2, 5, 8))
    axes = ({0: B}, {0: B}, {0: B, 1: G})
    return torch.onnx.export(
        module.eval(),
        inputs,
        input_names=["x", "time", "condition"],
        dynamic_shapes=axes,
        opset_version=23,
        dynamo=True,
    ).model


@pytest.mark.slow
def test_the_same_result_from_half_of_the_work():
    module = Step().eval()
    model = exported(module)
    assert share_branches(model) > 5
    data = ir.to_proto(model)
    onnx.checker.check_model(data, full_check=True)
    once = {node.op_type for node in data.graph.node if node.name.endswith("_once")}
    assert {"Conv", "GroupNormalization", "Add"} <= once and "Softmax" not in once
    session = onnxruntime.InferenceSession(data.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, branches in ((1, 2), (3, 2), (2, 1)):
        inputs = (torch.randn(batch, 4, 6, 6), torch.randn(batch, 16), torch.randn(batch, branches, 5, 8))
        got = session.run(None, dict(zip(("x", "time", "condition"), [v.numpy() for v in inputs], strict=True)))[0]
        with torch.no_grad():
            np.testing.assert_allclose(got, module(*inputs).numpy(), rtol=0, atol=2e-6)


class Mixing(nn.Module):
    """What looks across rows may not see single ones."""

    def forward(self, x, time, condition):
        sample = branched(x, condition.shape[1])
        return sample - sample.mean(0, keepdim=True) + condition.sum() + time.sum()


def test_what_mixes_rows_sees_both():
    model = exported(Mixing())
    assert share_branches(model) == 0


@pytest.mark.parametrize("name", ["unet", "hand_prior"])
def test_exported_steps_share(tiny_bundle, name):
    """Stage 1's network takes the prompt's text at once: there is little to share."""
    nodes = [node.name for node in onnx.load(tiny_bundle / f"{name}.onnx").graph.node]
    shared = [node for node in nodes if node.endswith("_once")]
    assert (len(shared) > 20 and any("conv2d" in node for node in shared)) if name == "unet" else len(shared) < 20
