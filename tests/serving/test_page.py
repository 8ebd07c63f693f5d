"""The page in a browser: type, paint, drag a finger, paint again, and see the finger move."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from served import command

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
PAGE = Path(__file__).parents[2] / "serving" / "page"
SHOTS = os.environ.get("HD_SCREENSHOTS")  # a folder, for who wants to look


def test_nothing_comes_from_elsewhere():
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path.name
        assert "innerHTML" not in text and "eval(" not in text
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=|<style", html)  # what the policy would refuse


def test_every_element_that_the_script_names_is_there():
    html, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("index.html", "page.js"))
    assert set(re.findall(r'\$\("(\w+)"\)', script)) <= set(re.findall(r'id="(\w+)"', html))


@pytest.fixture(scope="module")
def server():
    with command("demo", "--threads", 1) as process:
        assert process.url, process.said
        yield process.url


@pytest.fixture
def page(server):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
        page.goto(server)
        until(page, lambda: page.locator("#solver option").count() > 3)
        yield page
        assert not page.problems
        browser.close()


def until(page, condition, seconds=60):
    """The policy of the page lets no driver evaluate strings in it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, (page.inner_text("#state"), page.inner_text("#message"), page.problems)
        page.wait_for_timeout(20)


def shot(page, name):
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def picture(page):
    """The finished picture on the stage."""
    until(page, lambda: " s, seed " in page.inner_text("#state"))
    source = page.get_attribute("#picture", "src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB")).astype(int)


def at(page, side, joint):
    """Where a joint is on the stage, in pixels of the screen."""
    box = page.locator(f".joint[data-side={side}][data-joint='{joint}']").bounding_box()
    stage = page.locator("#canvas").bounding_box()
    return box["x"] + box["width"] / 2 - stage["x"], box["y"] + box["height"] / 2 - stage["y"]


@pytest.mark.slow
def test_a_finger_is_dragged_and_the_picture_follows(page):
    shot(page, "empty")
    page.fill("#prompt", "a right hand with spread fingers, blue background")
    page.fill("#seed", "5")
    page.fill("#steps", "40")  # long enough for who looks on to see previews
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".joint:not([hidden])", timeout=60_000)
    shot(page, "skeleton")
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
    until(page, lambda: page.inner_text("#state").startswith("edited"))
    after = {joint: at(page, side, joint) for joint in range(21)}
    length = np.hypot(x - wx, y - wy)
    assert np.hypot(after[8][0] - (x + 0.7 * (wx - x)), after[8][1] - (y + 0.7 * (wy - y))) < 0.2 * length
    assert all(np.allclose(before[j], after[j], atol=1) for j in range(21) if j not in (6, 7, 8))
    shot(page, "dragged")
    page.click("#again")
    page.wait_for_selector("#stop:not([hidden])")
    second = picture(page)
    shot(page, "again")
    # Where the finger was there is no finger now; the rest of the picture is what it was.
    changed = np.abs(first - second).mean(-1) > 40
    tx, ty = round(x / stage["width"] * 128), round(y / stage["height"] * 128)
    near = changed[max(0, ty - 5) : ty + 14, max(0, tx - 8) : tx + 8]
    assert near.mean() > 0.25, near.mean()
    assert changed.mean() < 0.2
    assert page.locator("#history li").count() == 2
    # The line that is copied asks for the same picture.
    page.click("#curl")
    line = page.get_attribute("#curl", "data-line")
    asked = json.loads(line[line.index("-d '") + 4 : -1])
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
    until(page, lambda: page.inner_text("#state").startswith("edited"))
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
    # With the keyboard alone.
    page.focus(".joint[data-side=right][data-joint='12']")
    page.keyboard.press("Shift+ArrowDown")
    page.wait_for_timeout(400)
    assert tip()[1] > start[1] + 5
    assert page.get_attribute(".joint[data-side=right][data-joint='12']", "aria-label") == "right middle finger, tip"


@pytest.mark.slow
def test_it_looks_well_in_the_dark_on_a_telephone_and_says_what_is_wrong(page):
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
    page.fill("#steps", "5000")
    page.click("#paint")
    page.wait_for_selector("#message:not([hidden])")
    assert "num_inference_steps" in page.inner_text("#message")
    page.problems.clear()  # the browser itself tells of the 400
