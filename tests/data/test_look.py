"""The page: known colours get their known skin tones, counts are right, captions cannot break out of it."""

from __future__ import annotations

import base64
import io
import re
from itertools import pairwise

import numpy as np
import pytest
from commands import invoke
from datasets import made_sample
from handiffuser.data.look import TONES, Facts, gather, histogram, look, skin_tone, srgb_to_lab, tone_name
from handiffuser.data.samples import Sample, write_shards
from handiffuser.demo.dataset import samples_of, scene_of
from handiffuser.demo.prompts import SKINS
from handiffuser.demo.render import demo_body
from PIL import Image


@pytest.fixture(scope="module")
def body():
    return demo_body()


@pytest.fixture(scope="module")
def scenes(body):
    scenes, prompts = zip(*(scene_of(3, i) for i in range(48)), strict=True)
    return samples_of(scenes, prompts, [f"k{i}" for i in range(48)], body, 64)


def test_colours_are_cielab():
    """Values of CIE 15 as published for sRGB's primaries and white."""
    found = srgb_to_lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [119, 119, 119]]))
    wanted = [
        [100, 0, 0],
        [0, 0, 0],
        [53.24, 80.09, 67.2],
        [87.73, -86.18, 83.18],
        [32.3, 79.19, -107.86],
        [50.03, 0, 0],
    ]
    assert np.abs(found - wanted).max() < 0.1


def test_the_angle_of_a_plain_colour_is_its_own():
    points = np.random.default_rng(0).uniform(4, 28, (21, 2))
    for colour in ((237, 194, 171), (191, 138, 102), (74, 46, 34)):
        lightness, _, b = srgb_to_lab(np.array([colour]))[0]
        found = skin_tone(np.full((32, 32, 3), colour, np.uint8), points)
        assert found == pytest.approx(np.degrees(np.arctan2(lightness - 50, b)), abs=1e-4)
    assert skin_tone(np.zeros((32, 32, 3), np.uint8), points + 100) is None


def test_tones_of_renders_rise_with_their_skin(scenes, body):
    """The demo's six skins, dark to light, as measured in its pictures."""
    angles: dict[str, list[float]] = {name: [] for name in SKINS}
    for sample in scenes:
        facts = Facts()
        gather([sample], facts, body, 0)
        angles[sample.meta["labels"]["skin"]] += facts.tones
    medians = [np.median(angles[name]) for name in SKINS]  # pale to deep
    assert all(a > b for a, b in pairwise(medians)), medians
    assert tone_name(medians[0]) in ("very light", "light") and tone_name(medians[-1]) == "dark"


def test_names_of_tones_follow_the_published_limits():
    assert [tone_name(angle) for angle in (80, 50, 30, 20, 0, -50, -90)] == [
        "very light", "light", "intermediate", "tan", "brown", "dark", "dark",
    ]  # fmt: skip
    assert len(TONES) == 6


def test_what_is_counted_is_there(scenes, body):
    facts = Facts()
    figures = gather(scenes, facts, body, 5)
    both = sum(sample.meta["labels"]["side"] == "both" for sample in scenes)
    assert len(figures) == 5 and facts.hands.count(2) == both and facts.hands.count(1) == 48 - both
    assert len(facts.pixels) == len(facts.tones) == 48 + both and len(facts.bends) == 15 * (48 + both)
    lengths = [np.ptp(s.hands["joints_2d"][i] * 64, axis=0).max() for s in scenes for i in range(2)
               if s.hands["visibility"][i]]  # fmt: skip
    assert np.allclose(sorted(facts.pixels), sorted(lengths), atol=0.1)
    assert sum(facts.labels["gesture"].values()) == 48


def test_the_skeleton_lies_on_the_picture_and_the_page_is_whole(tmp_path, scenes, body):
    write_shards(
        [*scenes[:6], Sample("text", ["only words"]), Sample("bad", ["x"], image=b"\x89PNG")], tmp_path / "set"
    )
    facts = look(tmp_path / "set", tmp_path / "page.html", body, shown=4)
    page = (tmp_path / "page.html").read_text()
    assert len(facts.hands) == 8 and [bad.key for bad in facts.bad] == ["bad"]
    assert "bad: Its picture cannot be decoded" in page and page.count("<figure>") == 4
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # needs nothing from elsewhere
    for data in re.findall(r"base64,([^\"]+)", page):
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert image.format == "JPEG" and max(image.size) >= 256


def test_captions_cannot_break_out(tmp_path, body):
    nasty = '<script>alert("1")</script>'
    sample = made_sample(0, prompts=[nasty], meta={"labels": {nasty: nasty}})
    sample.key = "a<b"
    write_shards([sample], tmp_path / "set<i>")
    look(tmp_path / "set<i>", tmp_path / "page.html", body)
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "<i>" not in page.split("<section>")[0] and "a<b" not in page


@pytest.mark.parametrize(
    ("values", "rows"),
    [([], 0), ([5.0] * 9, 1), ([0, 0, 1], 10), (list(range(1000)), 10), ([-3.0, 40.0, 1e6], 0)],
)
def test_histograms_hold_all_values(values, rows):
    text = histogram("a", values, "")
    shares = [float(share) for share in re.findall(r"<span>([\d.]+)%</span>", text)]
    assert len(shares) <= 13 and (not rows or len(shares) == rows)
    assert not values or sum(shares) == pytest.approx(100, abs=1)


def test_the_command_writes_the_page(tmp_path, scenes):
    write_shards(scenes[:4], tmp_path / "set")
    result = invoke("data.cli", "look", tmp_path / "set", "--output", tmp_path / "page.html", "--shown", 2)
    assert result.returncode == 0 and "Open" in result.stderr, result.stderr
    assert (tmp_path / "page.html").read_text().count("<figure>") == 2
    missing = invoke("data.cli", "look", tmp_path / "set", "--output", tmp_path / "no" / "page.html")
    assert missing.returncode == 1 and "cannot be written" in missing.stderr and "Traceback" not in missing.stderr
