"""OpenAI's images API with OpenAI's own client, and the fields that this server adds."""

from __future__ import annotations

import base64
import io
import json

import httpx
import numpy as np
import pytest
from commands import invoke
from handiffuser import HanDiffuser
from handiffuser.serving.service import Front, Limits
from PIL import Image
from served import serving


def decoded(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def events(response):
    """(event, data) of server-sent events."""
    kind = None
    for line in response.iter_lines():
        if line.startswith("event: "):
            kind = line[7:]
        elif line.startswith("data: "):
            yield kind, json.loads(line[6:])


@pytest.fixture(scope="module")
def client(served):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_the_official_client(client, served, toy_bundle):
    models = client.models.list().data
    assert [model.id for model in models] == ["toy"] and client.models.retrieve("toy").owned_by == "handiffuser"
    answer = client.images.generate(
        prompt="a fist", model="toy", n=2, size="32x32", extra_body={"seed": 5, "num_inference_steps": 3}
    )
    expected = HanDiffuser.load(toy_bundle, device="cpu", threads=1).generate(
        "a fist", images_per_prompt=2, seed=5, steps=3
    )
    for entry, picture in zip(answer.data, expected, strict=True):
        assert np.abs(decoded(entry.b64_json).astype(int) - picture.image).max() <= 1
    assert answer.size == "32x32" and answer.output_format == "png" and answer.background == "opaque"


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_formats_and_urls(client, served, format):
    answer = client.images.generate(prompt="a fist", response_format="url", output_format=format)
    picture = httpx.get(answer.data[0].url)
    assert picture.status_code == 200 and picture.headers["content-type"] == f"image/{format}"
    assert Image.open(io.BytesIO(picture.content)).format == format.upper()
    assert httpx.get(answer.data[0].url + "x").status_code == 404


def test_the_official_client_streams(client):
    stream = client.images.generate(
        prompt="a fist", stream=True, partial_images=3, extra_body={"seed": 1, "num_inference_steps": 8}
    )
    seen = list(stream)
    assert [event.type for event in seen] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in seen[:3]] == [0, 1, 2]
    skeleton, first, second, last = (decoded(event.b64_json) for event in seen)
    assert skeleton.shape == (256, 256, 3) and first.shape == last.shape == (32, 32, 3)
    whole = client.images.generate(prompt="a fist", extra_body={"seed": 1, "num_inference_steps": 8})
    assert (decoded(whole.data[0].b64_json) == last).all()
    off = [np.abs(picture.astype(int) - last).mean() for picture in (first, second)]
    assert off[1] < off[0] + 8 and (first != second).any()


def test_errors_have_openais_form(client):
    import openai

    with pytest.raises(openai.NotFoundError, match=r"model must be toy, got 'gpt-image-1'.*--alias") as missing:
        client.images.generate(prompt="a", model="gpt-image-1")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="model must be toy, got 'org/x'") as missing:
        client.models.retrieve("org/x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a", size="1024x1024")
    assert caught.value.param == "size" and "32x32" in caught.value.message and "--any-size" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a", extra_body={"sede": 3})
    assert caught.value.code == "unknown_field" and caught.value.param == "sede"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": " "}, "The prompt is empty"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": None}, "prompt must be given"),
        ({"prompt": "a" * 4001}, "prompt"),
        ({"n": 9}, "at most 8"),
        ({"n": "2"}, "n must be a valid integer, got '2'"),
        ({"n": True}, "n must be a valid integer, got True"),
        ({"num_inference_steps": 101}, "100 or fewer"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"guidance_interval": [0.5, 0.2]}, "rise"),
        ({"solver": "magic"}, "solver"),
        ({"seed": 2**63}, "seed"),
        ({"hands": "../../etc/passwd"}, "hands must be an id that this server keeps, got '../../etc/passwd'"),
        ({"hands": {"betas": [0]}}, "hands"),
        ({"hands": 5}, "hands must be an object, got 5"),
        ({"hands": "a" * 101}, "hands must have at most 100 characters, got 101"),
        ({"background": "transparent"}, "transparent"),
        ({"stream": True, "n": 2}, "n must be 1"),
        ({"stream": True, "response_format": "url"}, "b64_json"),
        ({"partial_images": 17}, "partial_images"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_refusals_name_the_field(served, fields, words):
    answer = served.generate(**{"prompt": "a", **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400 and words in error["message"] and error["type"] == "invalid_request_error"
    assert "Traceback" not in answer.text and "/tmp" not in answer.text


def test_warnings_name_fields_without_effect(served):
    answer = served.generate(
        quality="high", style="vivid", moderation="low", partial_images=2, output_compression=3, timeout=3000
    )
    assert answer.status_code == 200 and len(answer.json()["warnings"]) == 6
    assert "warnings" not in served.generate(quality="auto", user="me").json()
    unguided = served.generate(guidance_scale=1, negative_prompt="blur", guidance_interval=[0, 0.5]).json()["warnings"]
    assert len(unguided) == 2 and all("the guidance is 1" in sentence for sentence in unguided)
    hands = served.client.post("/v1/hands", json={"prompt": "a", "seed": 4}).json()
    given = {"hands": hands["data"][0]["hands"], "prompt": "b", "seed": 3}
    assert len(served.client.post("/v1/hands", json=given).json()["warnings"]) == 2 and "warnings" not in hands
    cut = served.generate("a very long prompt " * 20).json()["warnings"]
    assert len(cut) == 1 and "longer than 75 tokens" in cut[0]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {"content-type": "application/json"}, 400),
        (b"[" * 100_000, {"content-type": "application/json"}, 400),
        (b'{"prompt": "a\\ud800"}', {"content-type": "application/json"}, 400),
        (b'{"prompt": "a", "guidance_scale": NaN}', {"content-type": "application/json"}, 400),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", {"content-type": "application/json"}, 400),
        (b"\xff\xfe", {"content-type": "application/json"}, 400),
        (b'{"\\ud800": 1}', {"content-type": "application/json"}, 400),
        (b'{"prompt": "a"}', {"content-type": "application/jsonl"}, 415),
        (b'{"prompt": "' + b"a" * (1 << 20) + b'"}', {"content-type": "application/json"}, 413),
        (b'{"prompt": "a"}', {"content-type": "text/plain"}, 415),
        (b"prompt=a", {"content-type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_bodies(served, content, headers, status):
    answer = served.client.post("/v1/images/generations", content=content, headers=headers)
    assert answer.status_code == status and answer.json()["error"]["message"], answer.text[:300]


def test_an_endless_body_is_refused(served):
    answer = served.client.post(
        "/v1/images/generations",
        content=(b"a" * 65536 for _ in range(100)),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 413


def test_a_seed_repeats_its_picture_and_a_missing_seed_is_random(served):
    one, two = served.generate().json()["data"][0], served.generate().json()["data"][0]
    assert one["seed"] != two["seed"] and one["b64_json"] != two["b64_json"]
    again = served.generate(seed=one["seed"]).json()["data"][0]
    assert again["b64_json"] == one["b64_json"] and again["id"] != one["id"]


def test_hands_are_made_edited_and_painted(served):
    made = served.client.post("/v1/hands", json={"prompt": "a fist", "seed": 4}).json()["data"][0]
    picture = served.generate("a fist", seed=4, return_hands=True).json()["data"][0]
    for name in ("right_hand_pose", "camera", "joints_2d"):
        np.testing.assert_allclose(picture["hands"][name], made["hands"][name], atol=1e-5)
    plain = served.generate("a fist", seed=9).json()["data"][0]["b64_json"]
    by_id = served.generate("a fist", seed=9, hands=made["hands_id"]).json()["data"][0]["b64_json"]
    arrays = served.generate("a fist", seed=9, hands=made["hands"]).json()["data"][0]["b64_json"]
    none = served.generate("a fist", seed=9, hands="none").json()["data"][0]["b64_json"]
    assert by_id == arrays and len({plain, by_id, none}) == 3
    given = served.client.post("/v1/hands", json={"hands": made["hands"]}).json()["data"][0]
    np.testing.assert_allclose(given["hands"]["left_hand_pose"], made["hands"]["left_hand_pose"], atol=1e-5)
    edge = {**made["hands"], "body_pose": [4 * np.pi] * 63}  # the largest value of the schema
    assert served.client.post("/v1/hands", json={"hands": edge}).status_code == 200
    wrong = {**made["hands"], "camera": [0, 0, 0]}
    assert "camera" in served.generate(hands=wrong).json()["error"]["message"]


def test_health_metrics_and_headers(served):
    assert served.client.get("/healthz").status_code == served.client.get("/readyz").status_code == 200
    before = served.metric("pictures_total")
    answer = served.generate(n=3)
    assert (
        answer.headers["x-request-id"].startswith("req_")
        and "default-src 'none'" in answer.headers["content-security-policy"]
    )
    assert served.metric("pictures_total") == before + 3
    assert served.metric("num_queue_reqs") == served.metric("num_running_reqs") == 0
    assert served.metric("steps_per_second") > 0
    assert "access-control-allow-origin" not in served.client.get("/readyz", headers={"origin": "http://evil"}).headers
    assert served.client.get("/nowhere").json()["error"]["type"] == "invalid_request_error"
    assert served.client.put("/v1/models").status_code == 405


def test_first_tries_of_a_newcomer(served):
    for path in ("/", "/page.js", "/healthz", "/readyz"):
        head, get = served.client.head(path), served.client.get(path)
        assert head.status_code == get.status_code == 200 and not head.content
        assert head.headers["content-type"] == get.headers["content-type"]
    nowhere, put = served.client.get("/doc"), served.client.put("/v1/models")
    assert nowhere.status_code == 404 and "path /doc is unknown" in nowhere.json()["error"]["message"]
    assert (
        put.status_code == 405
        and put.headers["allow"] == "GET"
        and "does not take PUT" in put.json()["error"]["message"]
    )
    headers = {"content-type": "application/json"}
    for body, where in ((b'{"prompt":', "10"), (b"", "empty"), (b'{"prompt": "a",}', "15")):
        broken = served.client.post("/v1/images/generations", content=body, headers=headers)
        assert broken.status_code == 400 and broken.json()["error"]["code"] == "invalid_json", broken.text
        assert where in broken.json()["error"]["message"], broken.text


def test_metrics_say_how_long_each_stage_took(served):
    stages = (
        "text_encoder",
        "hand_prior",
        "hand_features",
        "text_hand_encoder",
        "unet_context",
        "unet",
        "image_decoder",
    )

    def found(what):
        """{stage: count or sum}"""
        head = f'handiffuser_stage_latency_seconds_{what}{{stage="'
        lines = [line for line in served.client.get("/metrics").text.splitlines() if line.startswith(head)]
        return {line.removeprefix(head).split('"')[0]: float(line.split()[-1]) for line in lines}

    served.generate(num_inference_steps=2)
    served.wait(
        lambda: found("count").get("image_decoder") == served.metric("pictures_total")
    )  # the worker reports before it waits
    before, spent, total = found("count"), found("sum"), served.metric("stage_seconds_total")
    served.generate(n=3, num_inference_steps=4)
    served.wait(lambda: found("count")["image_decoder"] == before["image_decoder"] + 3)
    more = {stage: count - before.get(stage, 0) for stage, count in found("count").items()}
    assert more["encoding"] == more["picture"] == more["queue"] == 3
    assert 4 <= more["unet"] <= 12  # a step advances one to three pictures
    assert 1 <= more["hand_prior"] == more["text_encoder"] == more["hand_features"] == more["unet_context"] <= 3
    # The runs add up to at most what the loop counts.
    assert set(stages) <= set(more)
    seconds = sum(found("sum")[stage] - spent[stage] for stage in stages)
    assert 0 < seconds <= served.metric("stage_seconds_total") - total + 1e-6


def test_metrics_have_the_usual_names(served):
    served.generate(num_inference_steps=2)
    served.client.post("/v1/hands", json={"prompt": "a", "seed": 1})
    served.client.get("/nowhere")
    served.wait(lambda: served.metric("generation_batch_size_count") > 0)
    text = served.client.get("/metrics").text
    for line in (
        "num_queue_reqs 0.0",
        "num_running_reqs 0.0",
        'requests_total{path="/v1/images/generations",status="200"}',
        'requests_total{path="other",status="404"}',
        'request_latency_seconds_bucket{le="0.01",path="/v1/images/generations"}',
        "queue_time_seconds_count",
        'generation_batch_size_bucket{le="1.0"}',
        'stage_latency_seconds_bucket{le="0.01",stage="queue"}',
        'stage_latency_seconds_count{stage="picture"}',
        'stage_latency_seconds_count{stage="hands"}',
        'stage_seconds_total{stage="unet",worker="0"}',
        "# TYPE handiffuser_gpu_memory_bytes gauge",
    ):
        assert line.startswith("# ") or f"\nhandiffuser_{line}" in text, line
        assert line in text, line


def test_the_log_has_a_line_of_json_for_each_request(served, monkeypatch):
    from handiffuser.serving import guard

    lines = []
    monkeypatch.setattr(guard, "print", lambda text, **_: lines.append(json.loads(text)), raising=False)
    answer = served.generate(n=2, user="somebody", num_inference_steps=2)
    served.client.post("/v1/hands", json={"prompt": "a", "user": "somebody else"})
    served.wait(lambda: len(lines) == 2)
    first, second = lines
    assert first["id"] == answer.headers["x-request-id"] and first["status"] == 200 and first["user"] == "somebody"
    assert first["ids"] == [entry["id"] for entry in answer.json()["data"]] and first["n"] == 2 and first["steps"] == 2
    assert first["seconds"] > 0 and first["path"] == "/v1/images/generations" and second["user"] == "somebody else"


def test_urls_repeat_the_host_of_the_request(served):
    """Any host header is harmless: only the client that sends it gets it back."""
    for host in ("pictures.example", "[::1", "a b", "x" * 3000, "a:99999999", "\xff".encode().decode("latin-1"), ""):
        body = {"prompt": "a", "num_inference_steps": 1, "response_format": "url"}
        answer = served.client.post("/v1/images/generations", json=body, headers={"host": host.encode("latin-1")})
        assert answer.status_code == 200, host
        url = answer.json()["data"][0]["url"]
        name = url.rpartition("/v1/files/")[2]
        assert served.client.get(f"/v1/files/{name}").status_code == 200 and len(name) > 32
    assert url.startswith("http://127.0.0.1")  # without a host header, the server's address
    for other in ("..%2f..%2fetc%2fpasswd", "%00", "a" * 4000, name[:-5]):
        assert served.client.get(f"/v1/files/{other}").status_code == 404


def test_kept_pictures_have_limits_of_time_and_size(served, monkeypatch):
    from handiffuser.serving import service

    def asked():
        answer = served.generate(num_inference_steps=1, response_format="url").json()
        return answer["data"][0]["url"]

    first = asked()
    size = len(httpx.get(first).content)
    assert size > 100
    monkeypatch.setattr(service, "KEPT_SECONDS", 0.0)
    assert httpx.get(first).status_code == 404  # even before the next picture is kept
    monkeypatch.setattr(service, "KEPT_SECONDS", 3600.0)
    monkeypatch.setattr(service, "KEPT_BYTES", 3 * size)
    urls = [asked() for _ in range(6)]
    there = [httpx.get(url).status_code == 200 for url in (first, *urls)]
    assert not there[0] and there == sorted(there) and 1 <= sum(there) <= 4  # the newest
    assert 0 < served.service.bytes <= 3 * size


def test_keys(toy_bundle, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text("# keys\nalice: secret-of-alice\nanother-secret\n")
    with serving(toy_bundle, tmp_path / "s", keys=keys, front=Front(cors=("http://page",))) as served:
        assert served.generate().status_code == 401
        wrong = served.client.get("/v1/models", headers={"authorization": "Bearer secret-of-alicf"})
        assert wrong.status_code == 401 and wrong.json()["error"]["code"] == "invalid_api_key"
        served.client.headers["authorization"] = "Bearer secret-of-alice"
        answer = served.generate(response_format="url")
        assert answer.status_code == 200
        assert httpx.get(answer.json()["data"][0]["url"]).status_code == 200  # the secret name is enough
        assert httpx.get(f"{served.url}/").status_code == httpx.get(f"{served.url}/healthz").status_code == 200
        keys.write_text("bob: other-secret\n")
        served.service.keys.load()
        assert served.generate().status_code == 401
        keys.write_text("short\n")
        with pytest.raises(Exception, match="at least 8 characters, got 5"):
            served.service.keys.load()
        assert served.service.keys.owner("other-secret") == "bob"
        asked = httpx.options(
            f"{served.url}/v1/models", headers={"origin": "http://page", "access-control-request-method": "GET"}
        )
        assert asked.headers["access-control-allow-origin"] == "http://page"


def test_default_steps_above_the_limit_are_refused(toy_bundle, tmp_path):
    with serving(toy_bundle, tmp_path, limits=Limits(steps=3)) as served:
        assert "3 or fewer" in served.generate().json()["error"]["message"]
        assert served.generate(num_inference_steps=3).status_code == 200


def test_a_full_disk_gives_503(toy_bundle, tmp_path, monkeypatch):
    import errno
    from pathlib import Path

    with serving(toy_bundle, tmp_path / "hands") as served:
        made = served.client.post("/v1/hands", json={"prompt": "a", "seed": 1}).json()["data"][0]["hands"]

        def full(path, content):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr(Path, "write_bytes", full)
        answer = served.generate("a", hands={**made, "betas": [0.5] * 10})
        assert answer.status_code == 503 and "No space left" in answer.json()["error"]["message"]
        monkeypatch.undo()
        assert served.generate("a", hands=made).status_code == 200
        assert not list((tmp_path / "hands").glob("*.tmp*"))


def test_old_hands_are_deleted_unless_a_request_needs_them(toy_bundle, tmp_path, monkeypatch, slow):
    from concurrent.futures import ThreadPoolExecutor

    from handiffuser.serving import service

    monkeypatch.setattr(service, "KEPT_HANDS", 2)
    slow(0.03)
    with serving(toy_bundle, tmp_path / "hands", batch=1) as served, ThreadPoolExecutor(1) as pool:
        made = served.client.post("/v1/hands", json={"prompt": "a", "seed": 1}).json()["data"][0]
        waiting = pool.submit(served.generate, "a", hands=made["hands_id"], num_inference_steps=60)
        served.wait(lambda: served.dispatcher.running)
        for seed in range(2, 7):
            served.client.post("/v1/hands", json={"prompt": "a", "seed": seed})
        assert made["hands_id"] in served.service.hands and len(served.service.hands) <= 4
        assert waiting.result().status_code == 200
        for seed in range(7, 10):
            served.client.post("/v1/hands", json={"prompt": "a", "seed": seed})
        gone = served.generate("a", hands=made["hands_id"])
        assert gone.status_code == 400 and "that this server keeps" in gone.json()["error"]["message"]


@pytest.mark.parametrize("option", ["--alias", "--name"])
def test_an_empty_name_of_the_model_is_refused(option):
    result = invoke("serving.cli", "demo", option, " ")
    assert result.returncode == 2 and f"{option} must have at least one character, got ' '." in result.stderr
