"""Both bundles of the tiny checkpoint spoilt so that the decoder overflows float16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from handiffuser.calibration.graphs import rewrite_bundle
from handiffuser.calibration.record import Inputs, record
from onnx import ModelProto, numpy_helper

OVERFLOWING = "vae.decoder.up_blocks.0.resnets.0.conv1.weight"


Change = Callable[[Callable[[str, np.ndarray], np.ndarray]], Callable[[str, ModelProto], ModelProto]]


@pytest.fixture(scope="session")
def change_weights() -> Change:
    """For `rewrite_bundle`: every weight becomes `change("graph.name", weight)`."""

    def change_weights(change: Callable[[str, np.ndarray], np.ndarray]) -> Callable[[str, ModelProto], ModelProto]:
        def rewrite(graph: str, model: ModelProto) -> ModelProto:
            for tensor in model.graph.initializer:
                value = numpy_helper.to_array(tensor)
                changed = change(f"{graph}.{tensor.name}", value).astype(value.dtype)
                tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
            return model

        return rewrite

    return change_weights


@pytest.fixture(scope="session")
def inputs(tiny_bundle: Path) -> Inputs:
    return record(tiny_bundle, ["a left hand", "two open hands"])[0]


@pytest.fixture(scope="session")
def overflowing(
    tiny_bundle: Path, tiny_half: Path, change_weights: Change, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Both bundles with one convolution of the decoder 40000 times as strong; the norm after it divides it out again.

    float32 holds that, float16 does not.
    """
    folder = tmp_path_factory.mktemp("overflowing")
    spoil = change_weights(lambda name, weight: weight * 4e4 if name.endswith(OVERFLOWING) else weight)
    rewrite_bundle(tiny_bundle, folder / "fp32", spoil)
    rewrite_bundle(tiny_half, folder / "fp16", spoil)
    return folder / "fp32", folder / "fp16"
