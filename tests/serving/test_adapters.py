"""Adapters over HTTP: by name from the server's folder, never by path; in AUTOMATIC1111's words, too."""

from __future__ import annotations

import base64
import io
import json
import sys

import numpy as np
import pytest
from adaptable import adaptable, write
from handiffuser.detection.hands import arrays_of
from handiffuser.errors import HanDiffuserError, RequestError
from handiffuser.pictures import encode_png
from handiffuser.repair.place import placed
from handiffuser.runtime.rest import joints_at_rest
from handiffuser.serving.adapters import Adapters
from handiffuser.serving.fields import as_json
from handiffuser.serving.service import Front
from handiffuser.shipped import bundle_path
from PIL import Image
from served import serving


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    write(folder / "warm.safetensors", "conv_in")
    write(folder / "cold.light.safetensors", "to_k", 2.0)
    write(folder / ".hidden.safetensors", "to_k")
    (folder / "damaged.safetensors").write_bytes(b"?")
    return folder


@pytest.fixture(scope="module")
def served(toy_bundle, folder, tmp_path_factory):
    bundle = adaptable(toy_bundle, tmp_path_factory.mktemp("adaptable") / "bundle")
    with serving(bundle, tmp_path_factory.mktemp("served"), front=Front(loras=folder)) as served:
        yield served


def test_requests_name_adapters(served):
    def made(**fields):
        answer = served.generate(seed=1, **fields)
        assert answer.status_code == 200, answer.text
        return pixels(answer.json()["data"][0]["b64_json"])

    plain, warm, half = made(), made(lora="warm"), made(lora=["warm:0.5"])
    assert len({one.tobytes() for one in (plain, warm, half, made(lora=["warm", "cold.light:-1"]))}) == 4
    np.testing.assert_array_equal(made(lora="warm.safetensors:0"), plain)
    body = {"prompt": "a fist <lora:warm:0.5> <lora:lost:1><hypernet:warm:1>", "seed": 1}
    answer = served.client.post("/sdapi/v1/txt2img", json=body).json()
    np.testing.assert_array_equal(pixels(answer["images"][0])[..., :3], half)
    assert answer["info"].count("which has no effect") == 2
    assert [one["name"] for one in served.client.get("/sdapi/v1/loras").json()] == ["cold.light", "damaged", "warm"]


def test_paths_and_strangers_are_refused(served, folder):
    asked = [
        "lost",
        "../warm",
        str(folder / "warm.safetensors"),
        "warm:much",
        "warm:99",
        "warm:0.5/../x",
        "damaged",
        "",
    ]
    for name in asked:
        answer = served.generate(lora=name)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == "lora", (name, error)
        assert str(folder) not in error["message"] or name.startswith(str(folder)), error
    assert "one of cold.light, damaged, warm, got 'lost'" in served.generate(lora="lost").json()["error"]["message"]
    with pytest.raises(HanDiffuserError, match="--lora-folder must be a folder"):
        Adapters(folder / "warm.safetensors")
    with pytest.raises(RequestError, match="--lora-folder"):
        Adapters(None).paths("warm")


def test_repairs_take_adapters(served, monkeypatch):
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    pytest.importorskip("cv2")
    pytest.importorskip("python_multipart")
    rest = joints_at_rest(bundle_path())
    hand = arrays_of([placed(np.array([40.0, 40, 120, 130]), "right", "fist", rest)], (150, 200), rest)
    files = {"image": encode_png(np.full((150, 200, 3), 90, np.uint8))}
    form = {
        "repair": "true",
        "hands": json.dumps(as_json(hand)),
        "seed": "1",
        "prompt": "a fist",
        "num_inference_steps": "2",
    }

    def repaired(**fields):
        return served.client.post("/v1/images/edits", files=files, data={**form, **fields})

    plain, warm = (repaired(**fields).json() for fields in ({}, {"lora": "warm"}))
    assert not np.array_equal(*(pixels(one["data"][0]["b64_json"]) for one in (plain, warm)))
    answer = repaired(lora="lost")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora"
