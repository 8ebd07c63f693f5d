"""`hd-data check` and `look`: each kind of fault is named, what is sound stays, the page opens from disk."""

from __future__ import annotations

import io

import numpy as np
import pytest
from commands import run_command
from handiffuser.data.samples import Sample, read, write_shards
from PIL import Image


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check") / "world"
    result = run_command("data.cli", "demo", folder, "--scenes", 16, "--size", 64, "--processes", 1)
    assert result.returncode == 0, result.stderr
    return folder


def png(size):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


def spoiled(world, out):
    """The world with a sample of each fault."""
    samples = [sample for sample in read(world) if isinstance(sample, Sample)]
    one = [i for i, sample in enumerate(samples) if sample.hands["visibility"].sum() == 1]
    small, torn, moved, wrong = (samples[i] for i in one[:4])
    small.image = png((20, 20))
    torn.image = torn.image[:200]
    moved.hands = {name: value for name, value in moved.hands.items() if name not in ("placement", "joints_2d")}
    moved.hands["camera"] = moved.hands["camera"] + np.array([0, 3, 0], np.float32)
    other = "right" if wrong.hands["visibility"][0] > 0.5 else "left"
    wrong.prompts = [f"a {other} hand making a fist"]
    write_shards(samples, out)
    return {"small": small.key, "torn": torn.key, "moved": moved.key, "wrong": wrong.key}


def test_a_sound_dataset_has_no_problems(world):
    result = run_command("data.cli", "check", world, "--min-size", 32)
    assert result.returncode == 0 and not result.stdout.strip(), result.stdout + result.stderr


def test_each_fault_is_named_and_moved_aside(world, tmp_path):
    keys = spoiled(world, tmp_path / "bad")
    result = run_command("data.cli", "check", tmp_path / "bad", "--min-size", 32)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    for fault, key in keys.items():
        assert any(key in line for line in result.stdout.splitlines()), (fault, result.stdout)
    assert len({line.split(":")[1].strip() for line in result.stdout.splitlines()}) == 4, result.stdout
    result = run_command("data.cli", "check", tmp_path / "bad", "--min-size", 32, "--fix")
    assert result.returncode == 0, result.stderr
    left = {sample.key for sample in read(tmp_path / "bad") if isinstance(sample, Sample)}
    assert len(left) == 12 and not left & set(keys.values())
    result = run_command("data.cli", "check", tmp_path / "bad", "--min-size", 32)
    assert result.returncode == 0, result.stdout


def test_a_page_that_needs_nothing_from_elsewhere(world, tmp_path):
    result = run_command("data.cli", "look", world, "--output", tmp_path / "page.html")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/") >= 16
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text


def test_a_folder_that_is_none(tmp_path):
    for name in ("check", "look", "latents"):
        words = {"latents": ("demo", tmp_path / "none"), "look": (tmp_path / "none", "--output", tmp_path / "p.html")}
        words = words.get(name, (tmp_path / "none",))
        result = run_command("data.cli", name, *words)
        assert result.returncode == 1 and "no dataset folder" in result.stderr, result.stderr
