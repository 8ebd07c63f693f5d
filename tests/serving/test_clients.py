"""Third-party clients and proxies: what they send, and what they can do with the answer."""

from __future__ import annotations

import ast
import base64
import gzip
import io
import json
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from handiffuser.errors import HanDiffuserError
from handiffuser.serving.fields import Edit, Generation, HandsRequest
from handiffuser.serving.proxy import checked_origin, checked_url
from handiffuser.serving.service import Front
from PIL import Image
from served import serving

PROMPT = {"prompt": "a fist", "num_inference_steps": 1}
FRONT = Front(("dall-e-2", "org/dall-e-3"), True, "url", "https://pics.example/sd", ("http://page.example",))


@pytest.fixture(scope="module")
def configured(toy_bundle, tmp_path_factory):
    """A server with all options for clients that cannot change their requests."""
    with serving(toy_bundle, tmp_path_factory.mktemp("configured"), front=FRONT) as one:
        yield one


def error_of(answer, status=400):
    assert answer.status_code == status, answer.text[:300]
    return answer.json()["error"]


# ---------------------------------------------------------------- null


def test_null_means_a_missing_field(served):
    for name, field in Generation.model_fields.items():
        if not field.is_required():
            answer = served.generate(num_inference_steps=1, **({name: None} if name != "num_inference_steps" else {}))
            assert answer.status_code == 200 and "warnings" not in answer.json(), (name, answer.text[:300])
    every = dict.fromkeys(Generation.model_fields.keys() - {"prompt"})
    assert served.generate(**every, frame_count=None).status_code == 200  # a field of OpenAI's newest models
    every = dict.fromkeys(HandsRequest.model_fields)
    made = served.client.post("/v1/hands", json=every).json()
    assert "warnings" not in made
    every = dict.fromkeys(Edit.model_fields.keys() - {"hands"})
    hands = {**made["data"][0]["hands"], "visibility": None}
    assert served.client.post("/v1/hands/edit", json={**every, "hands": hands}).status_code == 200


def test_the_schema_allows_null_where_the_server_does(served):
    parts = served.client.get("/openapi.json").json()["components"]["schemas"]
    for part in ("Generation", "HandsRequest", "Edit", "HandsField"):
        for name, field in parts[part]["properties"].items():
            nullable = {"type": "null"} in field.get("anyOf", ())
            assert nullable == (name not in parts[part].get("required", ())), (part, name)


# ---------------------------------------------------------------- errors name their field


@pytest.mark.parametrize("name", sorted(Generation.model_fields))
def test_every_field_is_named_when_it_is_wrong(served, name):
    error = error_of(served.client.post("/v1/images/generations", json={**PROMPT, name: {"not": ["this"]}}))
    assert error["param"] and error["param"].split(".")[0] == name and error["code"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 9}, "n"),
        ({"n": 2, "stream": True}, "n"),
        ({"stream": True, "response_format": "url"}, "response_format"),
        ({"background": "transparent"}, "background"),
        ({"size": "1x1"}, "size"),
        ({"num_inference_steps": 101}, "num_inference_steps"),
        ({"num_inference_steps": 60, "solver": "lcm"}, "num_inference_steps"),
        ({"num_inference_steps": 99, "solver": "ddim-early"}, "num_inference_steps"),
        ({"guidance_interval": [0.5, 0.2]}, "guidance_interval"),
        ({"hands": "hands_0"}, "hands"),
        ({"sede": 1}, "sede"),
    ],
)
def test_refusals_of_the_bundle_name_their_field(served, fields, param):
    error = error_of(served.client.post("/v1/images/generations", json={**PROMPT, **fields}))
    assert error["param"] == param and error["code"] in ("invalid_value", "unknown_field")


def test_wrong_hands_are_named(served):
    made = served.client.post("/v1/hands", json={"prompt": "a", "seed": 1}).json()["data"][0]["hands"]
    for path, body, param in (
        ("images/generations", {**PROMPT, "hands": {**made, "camera": [0, 0, 0]}}, "hands.camera"),
        ("images/generations", {**PROMPT, "hands": {**made, "betas": [0]}}, "hands.betas"),
        ("hands", {"hands": "hands_0"}, "hands"),
        ("hands/edit", {"hands": {**made, "camera": None}}, "hands.camera"),
        ("hands/edit", {"hands": {**made, "joints": None}}, "hands.joints"),
        ("hands/edit", {"hands": made, "gesture": {"hand": "left", "name": "none"}}, "gesture.name"),
        ("hands/edit", {"hands": made, "drags": [{"hand": "left", "joint": 21, "x": 0, "y": 0}]}, "drags.0.joint"),
    ):
        assert error_of(served.client.post(f"/v1/{path}", json=body))["param"] == param


@pytest.mark.parametrize("path", ["core/schedules.py", "runtime/noise.py", "serving"])
def test_every_refusal_has_a_field(path):
    """Every RequestError that a request over HTTP may cause names its field."""
    package = Path(__file__).parents[2]
    for file in sorted((package / path).glob("*.py")) or [package / path]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "RequestError":
                assert len(node.args) >= 2 or node.keywords, f"{file.name}:{node.lineno}"


GZIP = gzip.compress(b"{}", mtime=0)  # with a time of its own, two workers would name its test in two ways


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (GZIP, {"content-encoding": "gzip"}, 415, "must not be compressed, got Content-Encoding: gzip"),
        (GZIP, {}, 400, "in UTF-8, got an invalid byte at 1"),
        ('{"prompt": "caf\xe9"}'.encode("latin-1"), {}, 400, "in UTF-8, got an invalid byte at 15"),
        (b"{}", {"content-encoding": "identity"}, 400, "prompt must be given"),
        (b"[" * 100_000, {}, 400, "with less nesting"),
        (b'{"seed": ' + b"9" * 5000 + b"}", {}, 400, "at most 4300 digits"),
        (b"[]", {}, 400, "must be an object such as"),
    ],
)
def test_unreadable_bodies_get_a_reason(served, content, headers, status, words):
    headers = {"content-type": "application/json", **headers}
    error = error_of(served.client.post("/v1/images/generations", content=content, headers=headers), status)
    assert words in error["message"] and error["code"]


def test_a_form_to_an_unknown_path(served):
    for path, status in (("/v1/images/variations", 404), ("/v1/models", 405), ("/v1/images/generations", 415)):
        assert served.client.post(path, files={"image": b"a"}, data={"prompt": "a"}).status_code == status


# ---------------------------------------------------------------- clients that cannot change


def test_aliases_and_url_by_default(configured):
    models = configured.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["toy", "dall-e-2", "org/dall-e-3"]
    for model in models:
        assert configured.client.get(f"/v1/models/{model['id']}").json() == model
        (entry,) = configured.generate(model=model["id"], num_inference_steps=1).json()["data"]
        assert entry["url"].startswith("https://pics.example/sd/v1/files/") and "b64_json" not in entry
    assert configured.client.post("/v1/hands", json={"model": "dall-e-2"}).status_code == 200
    assert error_of(configured.generate(model="dall-e-3"), 404)["code"] == "model_not_found"
    # A request's own format comes first. A stream cannot use url.
    assert "b64_json" in configured.generate(response_format="b64_json", num_inference_steps=1).json()["data"][0]
    last = configured.generate(stream=True, num_inference_steps=1).text.rstrip().splitlines()[-1]
    assert json.loads(last.removeprefix("data: "))["b64_json"]


@pytest.mark.parametrize(("size", "bars"), [("64x64", False), ("96x48", True), ("48x96", True)])
def test_any_size_scales_and_warns(configured, size, bars):
    width, height = (int(side) for side in size.split("x"))
    fields = {"size": size, "response_format": "b64_json", "seed": 3, "num_inference_steps": 2, "return_hands": True}
    answer = configured.generate(**fields).json()
    picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert picture.size == (width, height) and answer["size"] == size
    sentence = answer["warnings"][0]
    assert f"The engine paints 32x32. The picture was scaled to {size}." in sentence and ("bars" in sentence) == bars
    assert len(answer["warnings"]) == 1 + bars  # also about the joints' places
    own = configured.generate(**{**fields, "size": "32x32"}).json()
    assert "warnings" not in own
    # The whole picture is in the middle, not stretched.
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    inner = picture.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.BOX)
    plain = Image.open(io.BytesIO(base64.b64decode(own["data"][0]["b64_json"])))
    difference = [abs(a - b) for a, b in zip(inner.tobytes(), plain.tobytes(), strict=True)]
    assert sum(difference) / len(difference) < 20


def test_a_bundle_of_any_size_paints_it(sized_bundle, tmp_path):
    """In the size of the request, previews too. What it cannot paint is refused, or scaled where that is asked."""
    with serving(sized_bundle, tmp_path / "plain") as one:
        text = one.generate(stream=True, partial_images=3, size="64x40", num_inference_steps=6).text
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        sizes = [Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))).size for event in events]
        assert sizes == [(410, 256), *[(64, 40)] * 3]  # the skeleton is larger where a picture is small
        assert events[-1]["size"] == "64x40" and "scaled" not in str(events[-1].get("warnings"))
        painted = one.client.post("/sdapi/v1/txt2img", json={"prompt": "a fist", "steps": 1, "width": 24, "height": 40})
        assert json.loads(painted.json()["info"])["height"] == 40
        for size, said in (("60x40", "The nearest is 64x40"), ("big", "WIDTHxHEIGHT"), ("128x64", "at most 4 times")):
            assert said in error_of(one.generate(size=size))["message"]
        parts = one.client.get("/openapi.json").json()["components"]["schemas"]
        assert "enum" not in parts["Generation"]["properties"]["size"]["anyOf"][0]
    with serving(sized_bundle, tmp_path / "scaled", front=FRONT) as one:
        answer = one.generate(size="60x40", num_inference_steps=1).json()
        assert answer["size"] == "60x40" and "was scaled to 60x40" in answer["warnings"][0]
        answer = one.generate(size="64x40", num_inference_steps=1).json()  # 2.5 times the pixels: more hands than asked
        assert answer["size"] == "64x40" and "was scaled to 64x40" in answer["warnings"][0]
        assert "was scaled" not in str(one.generate(size="40x32", num_inference_steps=1).json().get("warnings"))


def test_a_stream_scales_all_its_pictures(configured):
    text = configured.generate(stream=True, partial_images=3, size="64x48", num_inference_steps=6).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    sizes = [Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))).size for event in events]
    assert sizes == [(64, 48)] * 4 and events[-1]["size"] == "64x48" and "scaled to" in events[-1]["warnings"][0]


@pytest.mark.parametrize("size", ["15x32", "4096x4096", "big", "32x", "32x32x32", "-32x32", ""])
def test_invalid_sizes(configured, size):
    error = error_of(configured.generate(size=size))
    assert error["param"] == "size" and "from 16 to 2048 pixels" in error["message"]


# ---------------------------------------------------------------- other origins


def preflight(served, origin="http://page.example", **headers):
    asked = {"origin": origin, "access-control-request-method": "POST", **headers}
    return served.client.options("/v1/images/generations", headers=asked)


def test_cors_allows_the_headers_of_openais_client(configured, served):
    names = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-retry-count,x-stainless-timeout"
    answer = preflight(configured, **{"access-control-request-headers": names})
    assert answer.status_code == 200 and answer.headers["access-control-allow-headers"] == names
    assert answer.headers["access-control-allow-origin"] == "http://page.example"
    assert preflight(configured, "http://evil.example").status_code == 400
    assert "access-control-allow-origin" not in preflight(served).headers
    headers = {"origin": "http://page.example"}
    for answer in (
        configured.client.get("/nowhere", headers=headers),
        configured.client.get("/v1/models", headers=headers),
    ):
        assert answer.headers["access-control-allow-origin"] == "http://page.example"


def test_other_pages_may_show_pictures_only(served):
    url = served.generate(response_format="url", num_inference_steps=1).json()["data"][0]["url"]
    assert httpx.get(url).headers["cross-origin-resource-policy"] == "cross-origin"
    for path in ("/", "/page.js", "/v1/models", "/metrics"):
        assert served.client.get(path).headers["cross-origin-resource-policy"] == "same-origin"


def test_origins_take_the_form_that_browsers_send():
    for given, kept in (
        ("http://page/", "http://page"),
        ("HTTPS://Example.org:8443", "https://example.org:8443"),
        ("https://example.org:443", "https://example.org"),
        ("http://[::1]:80", "http://[::1]"),
        ("*", "*"),
        ("tauri://localhost", "tauri://localhost"),
    ):
        assert checked_origin(given) == kept
    for given in ("example.org", "http://", "http://a/b", "https://*.example.org", "http://a b", "http://[::1"):
        with pytest.raises(HanDiffuserError, match="--cors must be an origin"):
            checked_origin(given)


# ---------------------------------------------------------------- behind a proxy


def url_of(served, **headers):
    body = {**PROMPT, "response_format": "url"}
    answer = served.client.post("/v1/images/generations", json=body, headers=headers)
    return answer.json()["data"][0]["url"].partition("/v1/files/")[0]


def test_urls_begin_where_a_trusted_proxy_says(served, configured, monkeypatch):
    assert url_of(served) == served.url
    said = {"x-forwarded-proto": "https", "x-forwarded-host": "pics.example:8443", "x-forwarded-prefix": "/sd/"}
    assert url_of(served, **said) == "https://pics.example:8443/sd"
    assert url_of(served, **{"x-forwarded-host": "a.example, b.example"}).endswith("//a.example")
    for wrong in ({"x-forwarded-host": "a/b"}, {"x-forwarded-host": "u@h"}, {"x-forwarded-prefix": "//evil.example"}):
        assert url_of(served, **wrong) == served.url
    assert url_of(configured, **said) == "https://pics.example/sd"  # --public-url comes first


def test_headers_of_untrusted_peers_are_ignored(toy_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.0.0.1")
    with serving(toy_bundle, tmp_path) as served:
        said = {"x-forwarded-proto": "https", "x-forwarded-host": "evil", "x-forwarded-prefix": "/evil"}
        assert url_of(served, **said) == served.url
        assert served.client.get("/evil/healthz", headers=said).status_code == 404


def test_the_path_of_a_proxy_is_removed(configured, served):
    assert configured.client.get("/sd/healthz").status_code == configured.client.get("/healthz").status_code == 200
    assert configured.client.get("/sd/v1/models/").json() == configured.client.get("/v1/models").json()
    assert configured.client.get("/sdv1/models").status_code == 404
    page = configured.client.get("/sd")
    assert page.is_redirect and httpx.URL(f"{configured.url}/sd").join(page.headers["location"]).path == "/sd/"
    prefix = {"x-forwarded-prefix": "/a/b"}
    assert served.client.get("/a/b/healthz", headers=prefix).status_code == 200
    assert served.client.get("/healthz", headers=prefix).status_code == 200
    assert served.client.get("/a/b/healthz").status_code == 404


def test_the_path_of_a_proxy_does_not_avoid_the_key(toy_bundle, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text("alice: secret-of-alice\n")
    with serving(toy_bundle, tmp_path / "s", keys=keys, front=Front(public_url="http://h/sd")) as served:
        for path in ("/v1/models", "/sd/v1/models", "/v1/models/", "/sd/v1/models/x", "/x/v1/models"):
            for prefix in ("", "/x", "/v1", "/sd"):
                answer = served.client.get(path, headers={"x-forwarded-prefix": prefix})
                assert answer.status_code in (401, 404) and "data" not in answer.json(), (path, prefix)


def test_the_page_and_the_schema_are_relative(served):
    page = Path(__file__).parents[2] / "serving" / "page"
    texts = {path.name: path.read_text(encoding="utf-8") for path in page.iterdir()}
    for name, text in texts.items():
        assert not re.search(r"""(?:href|src)="/|[(`"']/v1|location\.origin""", text), name
        path = {"index.html": "/", "docs.html": "/docs"}.get(name, f"/{name}")
        assert served.client.get(path).text == text
    assert served.client.get("/openapi.json").json()["servers"] == [{"url": "./"}]


def test_public_urls():
    for given, kept in (
        ("https://example.org/", "https://example.org"),
        ("http://h:8080/a/b/", "http://h:8080/a/b"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ):
        assert checked_url(given) == kept
    for given in (
        "example.org/sd",
        "ftp://h",
        "http://h/?a=1",
        "http://h/#a",
        "http://u:p@h",
        "http://h/a//b",
        "http://[",
    ):
        with pytest.raises(HanDiffuserError, match="--public-url must be"):
            checked_url(given)


# ---------------------------------------------------------------- a browser

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
# Headers that OpenAI's JavaScript client adds.
STAINLESS = ("lang", "package-version", "os", "arch", "runtime", "runtime-version", "retry-count", "timeout")
SCRIPT = """
const [url, key, names] = [%r, %r, %r];
const said = (words) => { document.title += words + ";"; };
const headers = { "Content-Type": "application/json", Authorization: `Bearer ${key}` };
for (const name of names) headers[`x-stainless-${name}`] = "1";
try {
  const body = JSON.stringify({ prompt: "a fist", n: null, num_inference_steps: 1, response_format: "url" });
  const answer = await fetch(`${url}/v1/images/generations`, { method: "POST", headers, body });
  said(answer.status + (answer.headers.get("x-request-id") ? " id" : ""));
  const picture = new Image();
  picture.src = (await answer.json()).data[0].url;
  await picture.decode();
  said("picture " + picture.naturalWidth);
} catch (error) { said(error.message); }
said("end");
"""


@pytest.mark.slow
def test_a_page_of_another_origin_in_a_browser(toy_bundle, tmp_path):
    if CHROMIUM is None:
        pytest.skip("Chromium is missing: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    keys = tmp_path / "keys.txt"
    keys.write_text("alice: secret-of-alice\n")
    pages = tmp_path / "pages"
    pages.mkdir()
    elsewhere = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(pages)))
    threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
    port = elsewhere.server_port
    front = Front(cors=(f"http://localhost:{port}",))
    with serving(toy_bundle, tmp_path / "s", keys=keys, front=front) as served, playwright.sync_playwright() as driver:
        script = SCRIPT % (served.url, "secret-of-alice", list(STAINLESS))
        (pages / "index.html").write_text(f"<!doctype html><title></title><script type=module>{script}</script>")
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--no-proxy-server"])
        # The same page under another host name has another origin.
        for host, words in (("localhost", "200 id;picture 32;end;"), ("127.0.0.1", "Failed to fetch;end;")):
            page = browser.new_page()
            page.goto(f"http://{host}:{port}/")
            served.wait(lambda page=page: page.wait_for_timeout(20) or "end" in page.title())
            assert page.title() == words
        browser.close()
    elsewhere.shutdown()
