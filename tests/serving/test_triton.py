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
from handiffuser import ExportError, HanDiffuser
from handiffuser.serving.triton import FIELDS, NAME, write


class Tensor:
    def __init__(self, name, value):
        self.name, self.value = name, value

    def as_numpy(self):
        return self.value


class InferenceRequest:
    def __init__(self, **inputs):
        self.inputs = {name: Tensor(name, np.array([value], object)) for name, value in inputs.items()}
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


def test_requests_share_batches_and_get_one_answer(toy_bundle, tmp_path, backend):
    folder = write(toy_bundle, tmp_path)
    text = (folder / "config.pbtxt").read_text()
    assert text.count("{") == text.count("}") and "decoupled: true" in text and "dims: [32, 32, 3]" in text
    assert re.findall(r'input \[|name: "(\w+)"', text)[0] == NAME and all(f'"{name}"' in text for name in FIELDS)
    spec = importlib.util.spec_from_file_location("triton_model", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    found = re.findall(r'key: "(\w+)" value \{ string_value: "(\w+)"', text)
    found = {**dict(found), "backend": "onnxruntime"}  # the exact pictures, on any machine
    config = {"parameters": {name: {"string_value": value} for name, value in found.items()}}
    model.initialize({"model_config": json.dumps(config), "model_repository": str(folder), "model_version": "1"})
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
