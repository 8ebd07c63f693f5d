"""A graph of any size becomes one for a single size: the same numbers, and shapes that are known."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from handiffuser.contract import Manifest
from handiffuser.engines.fixing import fix_sizes, size_at


def test_terms_of_the_sides():
    sides = {"h": 64, "w": 96}
    assert size_at(ir.SymbolicDim("h*w/4"), sides) == 1536 and size_at(ir.SymbolicDim("2*h"), sides) == 128
    assert size_at(7, sides) == 7
    assert all(size_at(ir.SymbolicDim(name), sides) == ir.SymbolicDim(name) for name in ("B", "B*G", None))


@pytest.mark.parametrize("graph", ["unet", "image_decoder"])
def test_the_same_numbers(tiny_bundle, graph):
    manifest = Manifest.load(tiny_bundle, verify=False)
    spec, generator = manifest.graphs[graph], np.random.default_rng(0)
    model = ir.load(tiny_bundle / spec.file)
    assert fix_sizes(model, manifest.sides()) >= 2
    left = {str(size) for node in model.graph for value in node.outputs for size in value.shape or ()}
    assert not any("h" in size or "w" in size for size in left)
    feeds = {
        tensor.name: generator.normal(size=[{"B": 2, "G": 2}.get(n, n) for n in tensor.shape]).astype(np.float32)
        for tensor in spec.at(manifest.sides()).inputs
    }
    contents = ((tiny_bundle / spec.file).read_bytes(), ir.to_proto(model).SerializeToString())
    wanted, got = (
        onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, feeds)
        for content in contents
    )
    for one, other in zip(wanted, got, strict=True):
        np.testing.assert_allclose(one.astype(float), other.astype(float), atol=2e-5)
    assert fix_sizes(ir.load(tiny_bundle / manifest.graphs["hand_prior"].file), manifest.sides()) == 0
