"""Adapters over HTTP: by name from the server's folder, never by path; in AUTOMATIC1111's words, too."""

from __future__ import annotations

import base64
import io
import json
import sys
from types import SimpleNamespace

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
from handiffuser.serving.messages import Takes
from handiffuser.serving.service import Front
from handiffuser.serving.worker import takes
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
    info = json.loads(answer["info"])
    assert info["prompt"] == "a fist <lora:warm:0.5>" and info["infotexts"][0].startswith("a fist <lora:warm:0.5>\n")
    body["prompt"] = "a fist" + "<lora:warm:0.1>" * 17
    answer = served.client.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 400 and "prompt must name at most 16 adapters, got 17." in answer.text
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


def test_what_the_loop_alone_finds_is_refused_without_its_path(served, folder, monkeypatch):
    """Such as a file that changes while its request waits."""
    monkeypatch.setattr(served.service.bundle, "adapters", lambda request: ())
    answer = served.generate(lora="damaged")
    assert answer.status_code == 400 and str(folder) not in answer.text and "The adapter damaged" in answer.text


def test_a_failure_does_not_name_the_cache(served, monkeypatch, tmp_path):
    """A server error, such as a full disk, stays without folders of the server's machine."""
    full = tmp_path / "full"
    full.write_text("a file, in which no folder fits")
    monkeypatch.setenv("XDG_CACHE_HOME", str(full))
    answer = served.generate(lora="warm:0.123")
    assert answer.status_code == 500 and "the server's cache" in answer.text
    assert str(tmp_path) not in answer.text


def test_what_engines_do_not_take_is_refused_at_once(served, folder):
    """As of engines on a GPU, which say so when they are ready."""
    service, before = served.service, takes(SimpleNamespace(bundle=served.service.bundle, on_gpu=False))
    assert before.sizes is None and before.chunks is None and before.adapters
    command = f"hd-engines build {service.bundle.folder} --backend tensorrt --sizes"
    service.learn(Takes([(32, 32)], command, 1, False, True))
    try:
        assert "--lora-folder has no effect" in service.said[-1]
        model = served.client.get("/v1/models").json()["data"][0]
        assert model["sizes"] == ["32x32"] and service.bundle.room.free() is None
        answer = served.generate(lora="warm")
        assert answer.status_code == 400 and "lora must be left out" in answer.json()["error"]["message"]
        service.bundle.manifest.size_multiple = 8
        answer = served.generate(size="64x32")
        said = answer.json()["error"]["message"]
        assert answer.status_code == 400 and "hd-engines build toy --backend tensorrt --sizes 64x32" in said
    finally:
        service.bundle.manifest.size_multiple = 0
        service.learn(before)
