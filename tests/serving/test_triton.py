"""The repository for Triton: its configuration, and its model with a fake of Triton's module."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import threading
import types

import numpy as np
import pytest
from adaptable import adaptable
from adaptable import write as write_adapter
from handiffuser import ExportError, HanDiffuser, HanDiffuserError
from handiffuser.engines.plans import cache_folder
from handiffuser.serving.triton import FIELDS, NAME, write


class Tensor:
    def __init__(self, name, value):
        self.name, self.value = name, value

    def as_numpy(self):
        return self.value


class InferenceRequest:
    def __init__(self, **inputs):
        self.inputs = {name: Tensor(name, np.array(value, object, ndmin=1)) for name, value in inputs.items()}
        self.responses, self.done, self.cancelled = [], threading.Event(), False

    def get_response_sender(self):
        return self

    def send(self, response, flags):
        assert flags == 1 and not self.done.is_set()
        self.responses.append(response)
        self.done.set()

    def is_cancelled(self):
        return self.cancelled


@pytest.fixture
def backend(monkeypatch):
    module = types.ModuleType("triton_python_backend_utils")
    module.Tensor = Tensor
    module.TritonError = str
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    module.InferenceResponse = lambda output_tensors=(), error=None: types.SimpleNamespace(
        values={tensor.name: tensor.value for tensor in output_tensors}, error=error
    )
    module.get_input_tensor_by_name = lambda request, name: request.inputs.get(name)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)


def started(folder, **parameters):
    """The model as Triton loads it from a repository, with the exact pictures on any machine."""
    spec = importlib.util.spec_from_file_location("triton_model", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    found = re.findall(r'key: "(\w+)" value \{ string_value: "(\w*)"', (folder / "config.pbtxt").read_text())
    found = {**dict(found), "backend": "onnxruntime", **parameters}
    config = {"parameters": {name: {"string_value": value} for name, value in found.items()}}
    model.initialize({"model_config": json.dumps(config), "model_repository": str(folder), "model_version": "1"})
    return model


def test_requests_share_batches_and_get_one_answer(toy_bundle, tmp_path, backend):
    folder = write(toy_bundle, tmp_path)
    text = (folder / "config.pbtxt").read_text()
    assert text.count("{") == text.count("}") and "decoupled: true" in text and "dims: [32, 32, 3]" in text
    assert re.findall(r'input \[|name: "(\w+)"', text)[0] == NAME and all(f'"{name}"' in text for name in FIELDS)
    model = started(folder)
    requests = [InferenceRequest(PROMPT=f"p {n}".encode(), SEED=np.int64(n), STEPS=np.int32(4 + n)) for n in range(10)]
    bad = InferenceRequest(PROMPT=b"a", SOLVER=b"magic")
    leaving = InferenceRequest(PROMPT=b"leaves", STEPS=np.int32(1000), SOLVER=b"ddpm")
    leaving.cancelled = True
    assert model.execute([*requests, bad, leaving]) is None
    assert all(request.done.wait(30) for request in (*requests, bad, leaving))
    model.finalize()
    assert "magic" in bad.responses[0].error and "cancelled" in leaving.responses[0].error
    pipeline = HanDiffuser.load(toy_bundle, device="cpu", threads=1)
    for n, request in enumerate(requests):
        (response,) = request.responses
        (picture,) = pipeline.generate(f"p {n}", seed=n, steps=4 + n)
        assert response.error is None and response.values["SEED"] == [n]
        assert np.abs(response.values["IMAGE"].astype(int) - picture.image).max() <= 1
    with pytest.raises(ExportError, match="without the model handiffuser"):
        write(toy_bundle, tmp_path)


def test_requests_name_adapters_of_the_folder(toy_bundle, tmp_path, backend):
    bundle, loras = adaptable(toy_bundle, tmp_path / "bundle"), tmp_path / "loras"
    loras.mkdir()
    style = write_adapter(loras / "style.safetensors", "conv_in")
    light = write_adapter(loras / "light.safetensors", "to_k", 2.0)
    (loras / "damaged.safetensors").write_bytes(b"?")
    folder = write(bundle, tmp_path / "repository")
    assert 'name: "LORA" data_type: TYPE_STRING dims: [ -1 ] optional' in (folder / "config.pbtxt").read_text()
    with pytest.raises(HanDiffuserError, match=r"lora_folder of config.pbtxt must be a folder"):
        started(folder, lora_folder=style)
    small = started(folder, lora_folder=str(loras), lora_memory="1e-6")
    refused = InferenceRequest(PROMPT=b"a fist", LORA=[b"style"])
    small.execute([refused])
    assert refused.done.wait(30) and "--lora-memory must be at least" in refused.responses[0].error
    small.finalize()
    model = started(folder, lora_folder=str(loras))
    said = {"SEED": np.int64(1), "STEPS": np.int32(3), "PROMPT": b"a fist"}
    named = ([], [b"style:0.5"], [b"style:0.5", b"light"], [style.encode()], [b"damaged"])
    requests = [InferenceRequest(**said, LORA=names) for names in named]
    model.execute(requests)
    assert all(request.done.wait(30) for request in requests)
    model.finalize()
    *painted, stranger, damaged = (request.responses[0] for request in requests)
    assert "lora must be one of damaged, light, style" in stranger.error
    assert "The adapter damaged" in damaged.error and str(loras) not in damaged.error
    sender = InferenceRequest()
    model._fail(
        sender, f"hd-engines build {folder}/1/engines --sizes 64x64, {cache_folder() / 'adapted' / '1'} is full"
    )
    assert sender.responses[0].error == "hd-engines build ENGINES --sizes 64x64, the server's cache/adapted/1 is full"
    pipeline = HanDiffuser.load(bundle, device="cpu", threads=1)
    for response, lora in zip(painted, (None, f"{style}:0.5", (f"{style}:0.5", light)), strict=True):
        (picture,) = pipeline.generate("a fist", seed=1, steps=3, lora=lora)
        assert response.error is None and np.abs(response.values["IMAGE"].astype(int) - picture.image).max() <= 1
    assert not np.array_equal(painted[0].values["IMAGE"], painted[1].values["IMAGE"])
    without = started(folder)
    refused = InferenceRequest(**said, LORA=[b"style"])
    without.execute([refused])
    without.finalize()
    assert "lora_folder of config.pbtxt" in refused.responses[0].error
