"""The output folder: complete or not there, locked, honest about full disks, and its contact sheet."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from handiffuser import Picture, Request, RequestError
from handiffuser.errors import OutputError
from handiffuser.hands import hand_arrays
from handiffuser.runtime.outputs import OutputFolder, contact_sheet
from PIL import Image


def picture(name: str = "fist", prompt: str = "a fist ✊ <b>&") -> Picture:
    request = Request(prompt, name, 7, 3, "ddim", 2.0, "blur", 4, "ddim", 1.0)
    params = np.random.default_rng(0).normal(size=330).astype(np.float32)
    hands = {
        "params": params,
        **hand_arrays(params),
        "joints": np.zeros((62, 3), np.float32),
        "joints_2d": np.full((2, 21, 2), 0.5, np.float32),
        "vertices": np.zeros((9, 3), np.float32),
        "visibility": np.ones(2, np.float32),
        "camera": np.zeros(3, np.float32),
    }
    image = np.random.default_rng(1).integers(0, 256, (16, 24, 3), np.uint8)
    return Picture(name, request, image, hands, 0.5, ["It was cut: '<i>'"], {"bundle": "abc", "handiffuser": "1"})


def test_a_picture_and_its_files(tmp_path):
    one = picture()
    with OutputFolder(tmp_path / "deep" / "out") as folder:
        assert not folder.done(one.request, "abc")
        folder.save(one)
        folder.flush()
        assert folder.saved == ["fist"] and folder.done(one.request, "abc")
        index = folder.write_index()
    names = sorted(path.name for path in folder.path.iterdir() if not path.name.startswith("."))
    assert names == ["fist.hands.npz", "fist.hands.png", "fist.json", "fist.png", "index.html"]
    with Image.open(folder.path / "fist.png") as image:
        np.testing.assert_array_equal(np.asarray(image), one.image)
        assert image.text["prompt"] == one.request.prompt and image.text["seed"] == "7"
        assert image.text["bundle"] == "abc"
    record = json.loads((folder.path / "fist.json").read_text(encoding="utf-8"))
    assert record["prompt"] == one.request.prompt and record["steps"] == 3 and record["width"] == 24
    assert "fist" in index.read_text(encoding="utf-8")


def test_a_picture_saves_and_shows_itself(tmp_path):
    one = picture()
    path = one.save(tmp_path / "one.png")
    assert path == tmp_path / "one.png" and one._repr_png_() == path.read_bytes()
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), one.image)
        assert image.text["prompt"] == one.request.prompt and image.text["steps"] == "3"
    np.testing.assert_array_equal(np.asarray(one.pil), one.image)
    for suffix in ("jpg", "JPEG", "webp"):
        with Image.open(one.save(str(tmp_path / f"one.{suffix}"))) as image:
            assert image.size == (24, 16) and image.format == ("WEBP" if suffix == "webp" else "JPEG")
    with pytest.raises(OutputError, match=r"path must end in \.png, .* got .*one\.gif"):
        one.save(tmp_path / "one.gif")
    with pytest.raises(OutputError, match="cannot be written"):
        one.save(tmp_path / "missing" / "one.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.JPEG", "one.jpg", "one.png", "one.webp"]


def test_what_is_being_written_is_no_picture_yet(tmp_path):
    """Another writer's file in the making, or one that it left when it was killed."""
    with OutputFolder(tmp_path) as folder:
        folder.save(picture())
        folder.flush()
        (tmp_path / ".hd-run.tmp.open.json").write_text((tmp_path / "fist.json").read_text())
        page = folder.write_index().read_text(encoding="utf-8")
    assert "1 picture" in page and "tmp" not in page


@pytest.mark.parametrize("lost", ["fist.png", "fist.hands.npz", "fist.hands.png", "fist.json"])
def test_incomplete_is_not_done(tmp_path, lost):
    with OutputFolder(tmp_path) as folder:
        folder.save(picture())
        folder.flush()
        (tmp_path / lost).unlink()
        assert not folder.done(picture().request, "abc")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"key": 5}', b"\xff"])
def test_a_broken_record_is_not_done(tmp_path, content):
    with OutputFolder(tmp_path) as folder:
        folder.save(picture())
        folder.flush()
        (tmp_path / "fist.json").write_bytes(content)
        assert not folder.done(picture().request, "abc")
        assert "0 pictures" in folder.write_index().read_text()


def test_another_picture_with_the_same_id_is_not_overwritten(tmp_path):
    with OutputFolder(tmp_path) as folder:
        folder.save(picture())
        folder.flush()
        for request, bundle in [(replace(picture().request, steps=4), "abc"), (picture().request, "other")]:
            with pytest.raises(RequestError, match=r"another picture with the id fist.*delete fist\.json"):
                folder.done(request, bundle)


def test_leftovers_are_removed(tmp_path):
    (tmp_path / ".hd-run.tmp.fist.png").write_bytes(b"half")
    (tmp_path / "mine.txt").write_text("kept")
    with OutputFolder(tmp_path):
        pass
    assert not (tmp_path / ".hd-run.tmp.fist.png").exists() and (tmp_path / "mine.txt").exists()


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("")
    for path in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(OutputError, match="must be a folder"), OutputFolder(path):
            pass


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a read-only folder")
def test_an_unwritable_folder():
    with pytest.raises(OutputError, match="cannot be written"), OutputFolder("/proc/handiffuser"):
        pass


def test_two_runs_at_once(tmp_path):
    with OutputFolder(tmp_path):
        code = (
            "from handiffuser.runtime.outputs import OutputFolder\n"
            f"try:\n  with OutputFolder({str(tmp_path)!r}): print('in')\n"
            "except Exception as error: print(error)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert f"Another hd-run is writing into {tmp_path} (process {os.getpid()}). Wait" in result.stdout
    with OutputFolder(tmp_path):
        pass


def test_the_lock_of_a_killed_run_does_not_block(tmp_path):
    code = (
        "import os, signal\nfrom handiffuser.runtime.outputs import OutputFolder\n"
        f"OutputFolder({str(tmp_path)!r}).__enter__()\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with OutputFolder(tmp_path):
        pass


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_a_full_disk_keeps_what_was_finished(tmp_path, monkeypatch, fails_at):
    with OutputFolder(tmp_path) as folder:
        folder.save(picture("first"))
        folder.flush()
        real, calls = Path.write_bytes, []

        def full(path, data):
            calls.append(path)
            if len(calls) >= fails_at:
                real(path, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(path, data)

        monkeypatch.setattr(Path, "write_bytes", full)
        folder.save(picture("second"))
        with pytest.raises(OutputError, match=r"disk .* is full.*same command again"):
            folder.flush()
        monkeypatch.undo()
        assert folder.saved == ["first"] and folder.done(picture("first").request, "abc")
    assert not [path for path in tmp_path.iterdir() if "second" in path.name]


class Checker(HTMLParser):
    """Collects links, and tags that would fetch or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]


def test_contact_sheet_is_relative_escaped_and_quiet():
    evil = {"prompt": '"><script>alert(1)</script>', "solver": "<b>", "warnings": ["<i>"], "negative_prompt": "<u>"}
    page = contact_sheet([{"id": "a.b", "width": 64, **evil}, {"id": "c", "width": 512, "warnings": None}])
    checker = Checker()
    checker.feed(page)
    assert not {"script", "link", "b", "i", "u"} & set(checker.tags)
    assert {"a.b.png", "a.b.hands.png", "a.b.hands.npz"} <= set(checker.links)
    assert not [link for link in checker.links if ":" in link or link.startswith("/")]
    assert page.count('class="small"') == 1 and "color-scheme: light dark" in page


def test_sheet_shows_every_picture_in_the_folder(tmp_path):
    with OutputFolder(tmp_path) as folder:
        for name in ("one", "two"):
            folder.save(picture(name))
            folder.flush()
        (tmp_path / "notes.json").write_text('{"a": 1}')
        page = folder.write_index().read_text(encoding="utf-8")
    assert "2 pictures" in page and page.index("one.png") < page.index("two.png") and "notes" not in page
    assert "a fist ✊ &lt;b&gt;&amp;" in page
