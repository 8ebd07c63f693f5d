"""What is loaded where, and what the user is told about it."""

from __future__ import annotations

import warnings

import pytest
from adaptable import adaptable, write
from handiffuser import HanDiffuser
from handiffuser.errors import EngineError
from handiffuser.runtime import loading


def test_a_gpu_that_is_left_out_is_said(toy_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "DRIVER", tmp_path)
    with pytest.warns(RuntimeWarning, match=r"GPU of this machine is not used.*handiffuser\[cuda\].*--device cpu"):
        HanDiffuser.load(toy_bundle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HanDiffuser.load(toy_bundle, device="cpu")
        monkeypatch.setattr(loading, "DRIVER", tmp_path / "none")
        HanDiffuser.load(toy_bundle)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_auto_falls_back_with_and_without_adapters(sized_bundle, tmp_path, monkeypatch, with_adapter):
    """Where the backend that was chosen cannot load, ONNX Runtime runs, and the user is told."""
    bundle = adaptable(sized_bundle, tmp_path / "bundle")
    lora = [write(tmp_path / "a.safetensors", "to_k")] if with_adapter else []
    load = loading.load_host_loop

    def failing(folder, backend, *rest):
        if backend == "openvino":
            raise EngineError("It does not work here.")
        return load(folder, backend, *rest)

    monkeypatch.setattr(loading, "load_host_loop", failing)
    choice = loading.Choice("openvino", "cpu", ["openvino makes these pictures in fp32."])
    monkeypatch.setattr(loading, "choose", lambda *_: choice)
    loop, said = loading.load_loop(bundle, threads=1, lora=lora)
    assert said == ["ONNX Runtime is used instead of openvino. It does not work here."]
    assert loop.engines and bool(loop.bundle.loaded) == with_adapter
    with pytest.raises(EngineError, match="does not work here"):
        loading.load_loop(bundle, "openvino", threads=1, lora=lora)
