"""Self-attention becomes one node with a definition of its own, and computes what it did before."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from handiffuser.export.attention import DOMAIN, NAME, fuse_attention
from torch import nn


class Block(nn.Module):
    """Attention as diffusers and transformers write it. masked: each token looks back only."""

    def __init__(self, masked: bool = False, scale: float | None = None, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.masked, self.options = masked, {"scale": scale, "is_causal": causal}
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x, context=None):
        context = x if context is None else context
        heads = lambda t: t.view(t.shape[0], -1, 3, 8).transpose(1, 2)  # noqa: E731
        query, key, value = heads(self.q(x)), heads(self.k(context)), heads(self.v(context))
        mask = torch.ones(x.shape[1], context.shape[1], dtype=torch.bool).tril() if self.masked else None
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **self.options)
        return out.transpose(1, 2).reshape(x.shape[0], -1, 24) * 2


def exported(module, *inputs):
    axes = tuple({0: torch.export.Dim("B", min=1, max=64)} for _ in inputs)
    return torch.onnx.export(module, inputs, dynamic_shapes=axes, opset_version=23, dynamo=True, verbose=False).model


def run(model: ir.Model, *inputs) -> np.ndarray:
    data = ir.to_proto(model).SerializeToString()
    onnx.checker.check_model(onnx.load_from_string(data))
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [info.name for info in session.get_inputs()]
    return session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})[0]


@pytest.mark.parametrize("own_kernel", [True, False])
def test_the_same_result_in_one_node(own_kernel):
    x = torch.randn(4, 50, 24)
    with torch.no_grad():
        expected = Block()(x).numpy()
    model = exported(Block().eval(), x)
    before = len(list(model.graph))
    assert fuse_attention(model) == 1
    kinds = [node.op_type for node in model.graph]
    assert kinds.count(NAME) == 1 and "Attention" not in kinds and len(kinds) <= before - 7
    if not own_kernel:  # a backend that does not know the node takes its definition
        (node,) = [node for node in model.graph if node.op_type == NAME]
        (function,) = model.functions.values()
        node.domain = function.domain = "elsewhere"
        model.functions.clear()
        model.functions[function.identifier()] = function
        model.opset_imports["elsewhere"] = 1
    for batch in (x, x[:1]):
        np.testing.assert_allclose(run(model, batch), expected[: len(batch)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (Block(masked=True), [torch.randn(2, 9, 24)]),
        (Block(causal=True), [torch.randn(2, 9, 24)]),
        (Block(scale=0.2), [torch.randn(2, 9, 24)]),
        (Block(), [torch.randn(2, 9, 24), torch.randn(2, 5, 24)]),  # across: other tokens than its own
    ],
)
def test_other_attention_stays(module, inputs):
    model = exported(module.eval(), *inputs)
    assert fuse_attention(model) == 0 and not model.functions and DOMAIN not in model.opset_imports
    with torch.no_grad():
        np.testing.assert_allclose(run(model, *inputs), module(*inputs).numpy(), rtol=1e-5, atol=1e-6)


def test_bundles_hold_it(tiny_bundle):
    for graph in ("unet", "image_decoder"):
        model = onnx.load(tiny_bundle / f"{graph}.onnx")
        assert NAME in {node.op_type for node in model.graph.node}, graph
        assert [function.name for function in model.functions] == [NAME]
