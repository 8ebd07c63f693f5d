"""What OpenVINO compiles instead of a graph computes what the graph does."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("openvino")
from handiffuser import cpu
from handiffuser.engines import openvino, openvino_rewrites
from openvino import Model
from openvino import opset13 as ov

RANDOM = np.random.default_rng(0)


def results(model: Model, x: np.ndarray) -> np.ndarray:
    compiled = openvino.shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(x)[0].copy()


def kinds(model: Model) -> list[str]:
    return [node.get_type_name() for node in model.get_ops()]


def constant(*shape: int) -> ov.constant:
    return ov.constant(RANDOM.standard_normal(shape).astype(np.float32))


def norm(*shape: int, groups: int = 3) -> Model:
    x = ov.parameter(shape, np.float32)
    scale, bias = constant(shape[1]), constant(shape[1])
    return Model([ov.relu(ov.group_normalization(x, scale, bias, groups, 1e-3))], [x])


def upsampled(
    size: tuple[int, ...] = (2, 6, 5, 4), kernel: int = 3, half: bool = False, scale: int = 2, **how
) -> Model:
    x = ov.parameter(size, np.float32)
    way = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    way |= {key: how.pop(key) for key in tuple(how) if key in way}
    sizes = ov.constant(np.array([scale * size[2], scale * size[3]]))
    doubled = ov.interpolate(
        x, sizes, shape_calculation_mode="sizes", axes=ov.constant(np.array([2, 3])), pads_begin=[0], pads_end=[0],
        antialias=False, cube_coeff=-0.75, **way,
    )  # fmt: skip
    weight = constant(5, size[1], kernel, kernel)
    if half:
        weight = ov.convert(ov.constant(weight.get_data().astype(np.float16)), "f32")
    settings = {"strides": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1], "dilations": [1, 1]} | how
    return Model([ov.add(ov.convolution(doubled, weight, **settings), constant(1, 5, 1, 1))], [x])


@pytest.mark.parametrize("shape", [(1, 6, 4, 5), (3, 12, 1, 1)])
def test_a_norm_by_its_channels(shape):
    model, x = norm(*shape), RANDOM.standard_normal(shape).astype(np.float32) + 3
    exact = results(model, x)
    assert openvino_rewrites.norms_by_channel(model) == 1 and "GroupNormalization" not in kinds(model)
    np.testing.assert_allclose(results(model, x), exact, rtol=0, atol=2e-5)


def test_norms_of_anything_but_pictures_stay():
    model = norm(2, 6, 7)
    assert openvino_rewrites.norms_by_channel(model) == 0 and "GroupNormalization" in kinds(model)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("size", [(1, 6, 1, 1), (3, 6, 5, 4)])
def test_an_upsampling_in_four_parts(size, half):
    model, x = upsampled(size, half=half), RANDOM.standard_normal(size).astype(np.float32)
    exact = results(model, x)
    assert openvino_rewrites.fold_upsampling(model) == 1
    assert "Interpolate" not in kinds(model) and kinds(model).count("Convolution") == 4
    np.testing.assert_allclose(results(model, x), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [{"mode": "linear"}, {"coordinate_transformation_mode": "half_pixel"}, {"nearest_mode": "ceil"}, {"scale": 3},
     {"strides": [2, 2]}, {"kernel": 1}, {"pads_begin": [0, 0]}, {"dilations": [2, 2]}],
    ids=str,
)  # fmt: skip
def test_what_is_not_the_same_stays(how):
    model = upsampled(**how)
    before = kinds(model)
    assert openvino_rewrites.fold_upsampling(model) == 0 and kinds(model) == before


def test_matrix_units_keep_upsampling_as_it_is(monkeypatch):
    for features, parts in ((("amx_bf16", "avx512_bf16"), 1), (("avx512_bf16",), 4)):
        monkeypatch.setattr(cpu, "features", lambda features=features: features)
        model = upsampled()
        openvino_rewrites.rewrite(model)
        assert kinds(model).count("Convolution") == parts
