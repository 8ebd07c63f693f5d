"""The page in a browser: type, paint, drag a finger, paint again, and see the finger move."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from commands import invoke
from handiffuser import shipped
from handiffuser.demo.gestures import GESTURES
from handiffuser.demo.prompts import ADJECTIVES, NOUNS
from handiffuser.fingers import gestures
from handiffuser.runtime.bundle import Bundle
from handiffuser.runtime.requests import Request
from PIL import Image
from served import command, serving

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
PAGE = Path(__file__).parents[2] / "serving" / "page"
SHOTS = os.environ.get("HD_SCREENSHOTS")  # a folder for screenshots


def test_the_page_loads_nothing_from_other_hosts():
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path.name
        assert "innerHTML" not in text and "eval(" not in text
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(
        r"<script(?![^>]*src=)|\son\w+=|\sstyle=|<style", html
    )  # the content security policy would refuse these


def texts(pattern):
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(PAGE.glob(pattern)))


def test_the_html_has_every_element_that_the_scripts_use():
    html = texts("index.html")
    assert set(re.findall(r'\$\("(\w+)"\)', texts("*.js"))) <= set(re.findall(r'id="(\w+)"', html))
    assert set(re.findall(r'(?:for|aria-describedby)="(\w+)"', html)) <= set(re.findall(r'id="(\w+)"', html))


def test_every_path_is_relative():
    """A proxy may put the page below a path."""
    assert not re.search(r'(?:href|src)="/|ask\("/|"/v1', texts("*"))


def test_gestures_have_the_names_of_the_prompts():
    block = re.search(r"GESTURES = \{(.*?)\};", texts("stage.js"), re.DOTALL).group(1)
    names = dict(re.findall(r'(\w+): "([^"]+)"', block))
    assert set(names) == set(gestures())
    for gesture, name in names.items():
        phrases = [*GESTURES[gesture].phrases, *NOUNS.get(gesture, ()), " ".join(ADJECTIVES.get(gesture, ()))]
        words = {word.lower() for phrase in phrases for word in phrase.replace(",", "").split()}
        assert set(name.lower().split()) <= words, name


def test_the_demo_knows_every_word_of_the_examples():
    bundle = Bundle.load(shipped.bundle_path())
    prompts = re.findall(r'data-prompt="([^"]+)"', texts("index.html"))
    assert len(prompts) > 3
    for prompt in [*prompts, re.search(r'placeholder="(a [^"]+)"', texts("index.html")).group(1)]:
        assert bundle.tokens(Request(prompt))[1] == []


@pytest.fixture(scope="module")
def server():
    with command("demo", "--threads", 1) as process:
        assert process.url, process.said
        yield process.url


@contextmanager
def browse(url, **context):
    """A page of the server in Chromium. `problems` has the errors of its console."""
    if CHROMIUM is None:
        pytest.skip("Chromium is missing: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 860}, "reduced_motion": "reduce", **context})
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
        page.goto(url)
        yield page
        assert not page.problems
        browser.close()


@pytest.fixture
def page(server):
    with browse(server) as page:
        loaded(page)
        yield page


def loaded(page):
    until(page, lambda: page.locator("#solver option").count() > 3)


def until(page, condition, seconds=60):
    """Polls: the policy of the page forbids the driver's own wait, which evaluates strings."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, (page.inner_text("#state"), page.inner_text("#message"), page.problems)
        page.wait_for_timeout(20)


def shot(page, name):
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def picture(page):
    """The finished picture on the stage."""
    until(page, lambda: re.search(r"\d s$", page.inner_text("#state")))
    return on_stage(page)


def on_stage(page):
    source = page.get_attribute("#picture", "src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB")).astype(int)


def at(page, side, joint):
    """A joint's place on the stage, in pixels of the screen."""
    box = page.locator(f".joint[data-side={side}][data-joint='{joint}']").bounding_box()
    stage = page.locator("#canvas").bounding_box()
    return box["x"] + box["width"] / 2 - stage["x"], box["y"] + box["height"] / 2 - stage["y"]


@pytest.mark.slow
def test_a_finger_is_dragged_and_the_picture_follows(page):
    shot(page, "empty")
    page.fill("#prompt", "a right hand with spread fingers, blue background")
    page.fill("#seed", "5")
    page.click("#more summary")
    page.fill("#steps", "100")  # long enough to see previews, also where Chromium waits for its turn
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".joint:not([hidden])", timeout=60_000)
    page.wait_for_selector("#picture.waiting:not([hidden])", timeout=60_000)
    shot(page, "preview")
    first = picture(page)
    shot(page, "first")
    side = "right"
    before = {joint: at(page, side, joint) for joint in range(21)}
    (x, y), (wx, wy) = before[8], before[5]  # the index finger's tip, towards its root
    stage = page.locator("#canvas").bounding_box()
    page.mouse.move(stage["x"] + x, stage["y"] + y)
    page.mouse.down()
    for i in range(1, 9):
        page.mouse.move(stage["x"] + x + (wx - x) * 0.7 * i / 8, stage["y"] + y + (wy - y) * 0.7 * i / 8)
    page.mouse.up()
    until(page, lambda: page.inner_text("#state").startswith("Edited"))
    after = {joint: at(page, side, joint) for joint in range(21)}
    length = np.hypot(x - wx, y - wy)
    assert np.hypot(after[8][0] - (x + 0.7 * (wx - x)), after[8][1] - (y + 0.7 * (wy - y))) < 0.2 * length
    assert all(np.allclose(before[j], after[j], atol=1) for j in range(21) if j not in (6, 7, 8))
    shot(page, "dragged")
    page.click("#again")
    page.wait_for_selector("#stop:not([hidden])")
    second = picture(page)
    shot(page, "again")
    # The finger has left its place; the rest of the picture stays.
    changed = np.abs(first - second).mean(-1) > 40
    tx, ty = round(x / stage["width"] * 128), round(y / stage["height"] * 128)
    near = changed[max(0, ty - 5) : ty + 14, max(0, tx - 8) : tx + 8]
    assert near.mean() > 0.25, near.mean()
    assert changed.mean() < 0.2
    assert page.locator("#history li").count() == 2
    # The copied line asks for the same picture.
    page.click("#curl")
    line = page.input_value("#line")
    asked = json.loads(line[line.index("--data-raw '") + 12 : -1])
    assert asked["seed"] == 5 and asked["hands"]["right_hand_pose"]
    page.click("#history li:nth-child(2) button")
    assert np.allclose(at(page, side, 8), before[8], atol=1)


@pytest.mark.slow
def test_gesture_mirror_undo_and_keys(page):
    page.fill("#prompt", "two open hands")
    page.fill("#seed", "3")
    page.click("#hands")
    page.wait_for_selector(".joint:not([hidden])")
    tip = lambda side="right": at(page, side, 12)  # noqa: E731
    start = tip()
    page.select_option("#gesture", "fist")
    until(page, lambda: page.inner_text("#state").startswith("Edited"))
    page.wait_for_timeout(200)
    assert np.hypot(*np.subtract(tip(), start)) > 30
    shot(page, "gesture")
    page.keyboard.press("Escape")
    page.click("#undo")
    assert np.allclose(tip(), start, atol=1)
    page.click("#mirror")
    page.wait_for_timeout(400)
    assert np.hypot(*np.subtract(tip(), start)) > 30
    page.click("#undo")
    # The keyboard alone moves a joint too.
    page.focus(".joint[data-side=right][data-joint='12']")
    page.keyboard.press("Shift+ArrowDown")
    page.wait_for_timeout(400)
    assert tip()[1] > start[1] + 5
    assert page.get_attribute(".joint[data-side=right][data-joint='12']", "aria-label") == "right middle finger, tip"


@pytest.mark.slow
def test_dark_mode_a_narrow_screen_and_an_error(page):
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 844})
    page.fill("#prompt", "a left hand giving a thumbs up, green background")
    page.fill("#seed", "2")
    page.click("#paint")
    picture(page)
    shot(page, "dark-narrow")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.set_viewport_size({"width": 1280, "height": 860})
    shot(page, "dark-wide")
    assert "16161" in page.evaluate("getComputedStyle(document.body).backgroundColor").replace(
        "rgb(22, 22, 25)", "16161"
    )
    page.evaluate("document.getElementById('steps').removeAttribute('max')")
    page.click("#more summary")
    page.fill("#steps", "5000")
    page.click("#paint")
    assert "steps" in message(page) and "num_inference_steps" not in message(page)
    assert page.get_attribute("#picture", "class") == "" and page.is_visible("#save")  # the former picture is back
    page.problems.clear()  # the browser itself logs the 400


def message(page):
    page.wait_for_selector("#message:not([hidden])")
    return page.inner_text("#message")


@pytest.mark.slow
def test_the_copied_line_paints_the_same_picture_in_bash(tmp_path):
    key = """it's-"a"-key-$HOME-`id`-\\!"""
    (tmp_path / "keys.txt").write_text(f"ann: {key}\n")
    prompt = """a "peace" sign, it's a $HOME `id` \\ blue background!"""
    with command("demo", "--threads", 1, "--api-keys", tmp_path / "keys.txt") as process, browse(process.url) as page:
        until(page, lambda: page.is_visible("#notes"))
        assert "asks for an API key" in page.inner_text("#notes") and page.is_hidden("#message")
        page.fill("#key", "wrong-wrong")
        page.press("#key", "Enter")
        assert "does not accept this API key" in message(page)
        page.problems.clear()  # the browser itself logs the 401
        page.fill("#key", key)
        page.press("#key", "Enter")
        loaded(page)
        assert page.is_hidden("#message")
        page.fill("#prompt", prompt)
        page.click("#paint")
        painted = picture(page)
        assert page.input_value("#seed") == ""
        page.click("#curl")
        line = page.input_value("#line")
        answer = json.loads(subprocess.run(["bash", "-c", line], capture_output=True, check=True, timeout=60).stdout)
        assert str(answer["data"][0]["seed"]) == page.inner_text("#seen")
        image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).convert("RGB")
        assert np.abs(np.asarray(image).astype(int) - painted).max() <= 1
        # A reload keeps the fields. The key is in this tab's storage only.
        page.reload()
        loaded(page)
        assert page.input_value("#prompt") == prompt and page.input_value("#key") == key
        assert page.evaluate("localStorage.length") == 0 and "key" not in page.url
        other = page.context.browser.new_page()
        other.goto(process.url)
        assert other.input_value("#key") == "" and other.input_value("#prompt") == ""


@pytest.mark.slow
def test_seeds_stay_random_until_one_is_reused(page):
    page.click("[data-prompt]")
    first, seed = picture(page), page.inner_text("#seen")
    assert page.input_value("#prompt") == page.get_attribute("[data-prompt]", "data-prompt")
    page.click("#paint")
    picture(page)
    assert page.input_value("#seed") == "" and page.inner_text("#seen") != seed
    page.click("#history li:nth-child(2) button")
    assert page.inner_text("#seen") == seed and page.input_value("#seed") == ""
    page.click("#reuse")
    assert page.input_value("#seed") == seed
    page.click("#paint")
    assert np.abs(picture(page) - first).max() <= 1
    page.click("#dice")
    assert page.input_value("#seed") == ""


@pytest.mark.slow
def test_several_pictures_and_warnings(page):
    page.fill("#prompt", "a zebra making a fist, blue background")
    page.fill("#seed", "7")
    page.fill("#count", "3")
    page.click("#more summary")
    page.fill("#negative", "a red background")
    assert page.is_visible("#unguided")
    page.click("#paint")
    until(page, lambda: page.inner_text("#state").startswith("3 of 3 pictures, "))
    shot(page, "notes")
    seeds = [text.splitlines()[-1] for text in page.locator("#history li").all_inner_texts()]
    assert sorted(seeds) == ["seed 7", "seed 8", "seed 9"] and page.inner_text("#seen") == "7"
    said = page.inner_text("#notes")
    assert "'zebra'" in said and said.count("zebra") == 1 and "negative prompt has no effect" in said
    assert "_" not in said and page.is_hidden("#message")
    page.fill("#guidance", "2")
    assert page.is_hidden("#unguided")
    page.fill("#count", "99")
    page.click("#paint")  # the browser says beside the field what is wrong
    assert page.locator("#history li").count() == 3 and page.is_hidden("#stop")
    page.fill("#count", "1")
    page.click("#more summary")
    page.evaluate("document.getElementById('steps').value = 5000")
    page.click("#paint")
    until(page, lambda: page.is_visible("#steps"))


@pytest.mark.slow
def test_a_telephone_scrolls_to_the_picture(server):
    with browse(server, viewport={"width": 390, "height": 700}, has_touch=True, is_mobile=True) as page:
        loaded(page)
        page.fill("#prompt", "a right hand pointing up, white background")
        page.locator("#paint").scroll_into_view_if_needed()
        assert page.locator("#canvas").bounding_box()["y"] < 0
        page.tap("#paint")
        picture(page)

        def seen():
            stage, said = page.locator("#canvas").bounding_box(), page.locator("#result").bounding_box()
            return stage["y"] >= 0 and said["y"] + said["height"] <= 700

        until(page, seen)
        assert page.evaluate("document.activeElement === document.body")  # no keyboard over the picture
        shot(page, "telephone")


@pytest.mark.slow
def test_a_full_queue_a_proxy_and_a_dead_server(toy_bundle, tmp_path, slow):
    slow(0.2)
    with serving(toy_bundle, tmp_path / "served", places=1, batch=1) as served, browse(served.url) as page:
        loaded(page)
        page.fill("#prompt", "a fist")
        page.click("#paint")
        before = picture(page)
        page.wait_for_selector(".joint:not([hidden])")
        others = [
            threading.Thread(target=lambda: httpx.post(
                f"{served.url}/v1/images/generations", json={"prompt": "a fist", "num_inference_steps": 60}, timeout=60,
            ))
            for _ in range(5)
        ]  # fmt: skip
        for other in others:
            other.start()
            time.sleep(0.3)
        page.click("#paint")
        said = message(page)
        shot(page, "full")
        assert "queue is full" in said and "Try again in" in said and "Retry" not in said
        # The former picture and its hands are back.
        assert np.array_equal(on_stage(page), before) and page.is_visible("#save") and page.is_enabled("#again")
        page.route("**/v1/images/generations", lambda route: route.fulfill(status=502, body="<html>nginx</html>"))
        page.click("#paint")
        until(page, lambda: "behind its proxy (502)" in page.inner_text("#message"))
        page.route("**/v1/images/generations", lambda route: route.abort())
        page.click("#paint")
        until(page, lambda: "does not answer" in page.inner_text("#message"))
        page.route(
            "**/v1/images/generations", lambda route: route.fulfill(content_type="text/event-stream", body=":\n\n")
        )
        page.click("#paint")
        until(page, lambda: "stopped before the picture was done" in page.inner_text("#message"))
        page.problems.clear()  # the browser itself logs each
        served.server.force_exit = True
        for other in others:
            other.join()


@pytest.mark.slow
def test_every_control_has_a_name(page):
    page.click("[data-prompt]")
    picture(page)
    names = page.evaluate("""
        [...document.querySelectorAll("button, input, select, textarea, a, progress")].filter((one) => one.offsetParent)
          .map((one) => [one.outerHTML, one.ariaLabel || one.labels?.[0]?.textContent || one.innerText])""")
    assert all(name.strip() for _, name in names), [html for html, name in names if not name.strip()]
    assert page.evaluate("document.querySelector('a, button, input, textarea').className") == "skip"
    page.focus(".skip")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert page.inner_text("#announce") == "The picture is done."


def test_swagger_ui_comes_from_this_server(served):
    pytest.importorskip("fastapi_swagger")
    html = served.client.get("/docs")
    assert html.status_code == 200 and "script-src 'self'" in html.headers["content-security-policy"]
    names = re.findall(r'(?:src|href)="([\w.-]+)"', html.text)
    assert {"swagger-ui.css", "swagger-ui-bundle.js", "docs.js"} == set(names)
    for name in names:
        assert served.client.get(f"/{name}").status_code == 200, name


@pytest.mark.slow
def test_swagger_ui_asks_the_server(server):
    pytest.importorskip("fastapi_swagger")
    with browse(f"{server}/docs") as page:
        page.wait_for_selector(".opblock", timeout=60_000)
        shot(page, "docs")
        paths = page.locator(".opblock-summary-path").all_inner_texts()
        assert {path.replace("\u200b", "") for path in paths} > {"/v1/images/generations", "/sdapi/v1/txt2img"}
        page.locator(".opblock", has_text="/healthz").click()
        page.click("button.try-out__btn")
        page.click("button.execute")
        page.wait_for_selector(".live-responses-table .response", timeout=60_000)
        assert '"status": "ok"' in page.locator(".live-responses-table .response").inner_text()
        shot(page, "docs-tried")


@pytest.mark.slow
def test_the_history_is_a_dataset(page, tmp_path):
    """hd-data finds no fault with it, and hd-run paints its hands."""
    page.fill("#prompt", "a right hand making a fist")
    page.fill("#seed", "7")
    page.fill("#count", "2")
    page.click("#paint")
    until(page, lambda: page.inner_text("#state").startswith("2 of 2 pictures, "))
    page.fill("#count", "1")
    page.click("#paint")  # the same picture again gets another name
    until(page, lambda: page.locator("#history li").count() == 3 and page.is_hidden("#stop"))
    shot(page, "history")
    with page.expect_download() as download:
        page.click("#zip")
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path / "set")
    names = sorted(path.stem for path in (tmp_path / "set").glob("*.png"))
    assert names == ["a-right-hand-making-a-fist-7", "a-right-hand-making-a-fist-7-2", "a-right-hand-making-a-fist-8"]
    checked = invoke("data.cli", "check", tmp_path / "set")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    record = json.loads((tmp_path / "set" / f"{names[0]}.json").read_text())
    assert record["prompt"] == "a right hand making a fist" and record["seed"] == 7 and record["guidance"] == 1
    hands, out = tmp_path / "set" / f"{names[0]}.hands.npz", tmp_path / "out"
    made = invoke("runtime.cli", "demo", record["prompt"], "--seed", 7, "--hand-params", hands, "-o", out)
    assert made.returncode == 0, made.stderr
    (again,) = (np.asarray(Image.open(path)) for path in out.glob("*-????????.png"))
    first = np.asarray(Image.open(tmp_path / "set" / f"{names[0]}.png"))
    assert np.abs(again.astype(int) - first).mean() < 1


@pytest.fixture(scope="module")
def hand_picture(server, tmp_path_factory):
    """The file of a picture of 640 x 480 with a painted hand."""
    body = {"prompt": "a right hand making a peace sign, blue background", "seed": 3}
    made = httpx.post(f"{server}/v1/images/generations", json=body, timeout=60).json()["data"][0]["b64_json"]
    whole = Image.new("RGB", (640, 480), (60, 100, 180))
    whole.paste(Image.open(io.BytesIO(base64.b64decode(made))).resize((240, 240)), (300, 150))
    path = tmp_path_factory.mktemp("hands") / "hand.png"
    whole.save(path)
    return path


def repaired(page):
    until(page, lambda: page.inner_text("#repairstate").startswith("Done"))


@pytest.mark.slow
@pytest.mark.parametrize("telephone", [False, True])
def test_a_person_repairs_a_hand_of_a_picture(server, hand_picture, telephone):
    pytest.importorskip("mediapipe")
    small = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with browse(server, **(small if telephone else {})) as page:
        loaded(page)
        page.click("#torepair")
        assert page.is_hidden("#painting") and page.is_disabled("#repairone")
        page.set_input_files("#file", hand_picture)
        until(page, lambda: page.locator("#handlist label").count() == 1)
        assert "Right hand" in page.inner_text("#handlist") and "% sure" in page.inner_text("#handlist")
        shot(page, f"repair-found-{telephone}")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= page.viewport_size["width"]
        page.select_option("#repairgesture", "open_hand")
        until(page, lambda: "open hand" in page.inner_text("#handlist"))
        tip = page.locator('.joint[title="index finger, tip"]:visible')
        before = tip.bounding_box()
        tip.press("ArrowLeft")
        until(page, lambda: tip.bounding_box() != before)
        page.click("#repairone")
        repaired(page)
        shot(page, f"repair-done-{telephone}")
        assert page.is_visible("#after") and page.get_attribute("#saverepair", "download") == "repaired.png"
        content = page.evaluate(
            "() => fetch(document.getElementById('saverepair').href).then(() => true, () => false)"
        )  # the policy forbids a page to read a blob: only the person may save it
        assert content is False
        page.problems.clear()
        page.fill("#slider", "50")
        assert "50" in page.evaluate("document.getElementById('plane').style.getPropertyValue('--cut')")
        for _ in range(3):
            page.click("#repairundo")
        assert page.is_hidden("#after") and "peace sign" in page.inner_text("#handlist")


@pytest.mark.slow
def test_a_person_drops_places_and_brushes(server, hand_picture, tmp_path):
    with browse(server) as page:
        loaded(page)
        plain = tmp_path / "plain.png"
        Image.new("RGB", (900, 300), (200, 190, 180)).save(plain)
        content = base64.b64encode(plain.read_bytes()).decode()
        page.evaluate(
            """(content) => {
                const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
                const carried = new DataTransfer();
                carried.items.add(new File([bytes], "plain.png", { type: "image/png" }));
                document.dispatchEvent(new DragEvent("drop", { dataTransfer: carried, bubbles: true }));
            }""",
            content,
        )
        until(page, lambda: "Place one" in page.inner_text("#repairstate") or page.inner_text("#repairmessage"))
        page.problems.clear()  # a server without MediaPipe answers 501
        box = page.locator("#scene").bounding_box()

        def at(x, y):
            page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y, steps=4)

        page.click("#place")
        at(0.3, 0.1)
        page.mouse.down()
        at(0.6, 0.95)
        page.mouse.up()
        until(page, lambda: page.locator("#handlist label").count() == 1)
        for button, words in (("#flip", "Left hand"), ("#over", "Left hand"), ("#turnright", "Left hand")):
            bones = page.locator("#skeletons polyline").first.get_attribute("points")
            page.click(button)
            until(page, lambda b=bones: page.locator("#skeletons polyline").first.get_attribute("points") != b)
            assert words in page.inner_text("#handlist")
        page.click("#brush")
        at(0.2, 0.2)
        page.mouse.down()
        at(0.3, 0.5)
        page.mouse.up()
        assert page.is_visible("#clearbrush")
        page.click("#brush")
        page.click("#repairone")
        until(page, lambda: page.inner_text("#repairstate").startswith("Done") or page.inner_text("#repairmessage"))
        assert not page.inner_text("#repairmessage") and page.is_hidden("#clearbrush")
        shot(page, "repair-placed")
        page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
        until(page, lambda: "not a picture" in page.inner_text("#repairmessage"))
        page.click("#topaint")
        assert page.is_visible("#painting")


@pytest.mark.slow
def test_each_of_two_people_is_drawn_and_edited(pair_bundle, tmp_path):
    with serving(pair_bundle, tmp_path) as pair, browse(pair.url) as page:
        loaded(page)
        page.fill("#prompt", "two people")
        page.fill("#seed", "3")
        page.click("#hands")
        page.wait_for_selector(".joint[data-person='1']:not([hidden])")
        assert page.locator(".joint:not([hidden])").count() == 4 * 21
        assert page.locator("#person option").all_inner_texts() == ["Person 1", "Person 2"]

        def places(person):
            joints = page.locator(f".joint[data-person='{person}']")
            return joints.evaluate_all("(all) => all.map((one) => [one.style.left, one.style.top].join())")

        before = [places(0), places(1)]
        shot(page, "two-people")
        page.select_option("#person", "1")
        page.select_option("#gesture", "fist")
        until(page, lambda: page.inner_text("#state").startswith("Edited"))
        until(page, lambda: places(1) != before[1])
        assert places(0) == before[0], "the other person stays"
        page.click("#undo")
        until(page, lambda: places(1) == before[1])
        page.focus(".joint[data-person='0'][data-side=left][data-joint='0']")
        page.keyboard.press("Shift+ArrowRight")
        until(page, lambda: places(0) != before[0])
        page.click("#again")
        until(page, lambda: page.inner_text("#state").endswith(" s"))
        page.click("#zip")
        assert not page.problems


@pytest.mark.slow
def test_the_page_offers_sizes_where_a_bundle_paints_any(sized_bundle, tmp_path):
    with serving(sized_bundle, tmp_path) as served, browse(served.url) as page:
        loaded(page)
        assert page.locator("#size option").all_inner_texts()[1:3] == ["Portrait, 32 × 48", "Landscape, 48 × 32"]
        page.fill("#prompt", "a fist")
        page.select_option("#size", "32x48")
        page.click("#paint")
        assert picture(page).shape == (48, 32, 3)
        canvas = page.locator("#canvas").bounding_box()
        assert canvas["height"] / canvas["width"] == pytest.approx(1.5, abs=0.01)
        page.select_option("#size", "custom")
        page.fill("#width", "64")
        page.fill("#height", "72")
        page.click("#paint")  # 4608 pixels, and four times its own are 4096: the browser says it beside the field
        assert "at most 4,096" in page.evaluate("document.getElementById('height').validationMessage")
        page.fill("#height", "64")
        page.click("#paint")
        until(page, lambda: page.locator("#history li").count() == 2)
        assert picture(page).shape == (64, 64, 3)
        page.click("#history li:nth-child(2) button")
        assert page.input_value("#size") == "32x48" and on_stage(page).shape == (48, 32, 3)
        page.reload()
        loaded(page)
        assert page.input_value("#size") == "32x48"
