"""The shipped demo, as a newcomer meets it: real pictures that follow the prompt, without PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import invoke
from handiffuser import HanDiffuser, shipped
from handiffuser.contract import Manifest
from PIL import Image

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pipeline() -> HanDiffuser:
    return HanDiffuser.load("demo", device="cpu")


@pytest.fixture(scope="module")
def first_command(tmp_path_factory) -> Path:
    """What the README's first command runs, from an empty folder."""
    folder = tmp_path_factory.mktemp("newcomer")
    result = invoke(
        "runtime.cli", "demo", "a right hand making a fist, blue background", "two open hands",
        "--seed", 2, "--output", "out", cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "out" in result.stderr + result.stdout
    return folder / "out"


def test_the_first_command_writes_everything(first_command):
    names = sorted(path.name for path in first_command.iterdir() if not path.name.startswith("."))
    assert sum(name.endswith(".json") for name in names) == 2
    for record in first_command.glob("*.json"):
        stem = record.name.removesuffix(".json")
        assert {f"{stem}.png", f"{stem}.hands.npz", f"{stem}.hands.png"} <= set(names)
        assert json.loads(record.read_text())["seed"] == 2
    assert "index.html" in names


def test_the_background_is_blue_and_the_fist_is_the_right_one(first_command):
    path = next(first_command.glob("a-right-hand*.json"))
    stem = str(path).removesuffix(".json")
    picture = np.asarray(Image.open(stem + ".png"), float)
    edge = np.concatenate(
        [picture[:4].reshape(-1, 3), picture[:30, :4].reshape(-1, 3), picture[:30, -4:].reshape(-1, 3)]
    )
    red, green, blue = np.median(edge, 0)
    assert blue > 1.5 * red and blue > 1.2 * green, (red, green, blue)
    hands = np.load(stem + ".hands.npz")
    assert hands["visibility"].tolist() == [0.0, 1.0], "only the right hand is in the picture"
    bent = np.linalg.norm(hands["right_hand_pose"].reshape(15, 3), axis=1)
    assert bent[:12].mean() > 0.7, "the four fingers of a fist are bent, radians"


def test_stage_1_gives_the_gesture_that_was_asked_for(pipeline):
    """Straight and bent fingers by name; the prompt alone decides."""
    pictures = pipeline.generate(
        ["a left hand making a fist", "an open left hand", "a left hand pointing"], seed=1, steps=1
    )
    fist, flat, pointing = (
        np.linalg.norm(p.hands["left_hand_pose"].reshape(5, 3, 3), axis=-1).sum(1) for p in pictures
    )  # radians a finger: index, middle, little, ring, thumb
    assert (fist[:4] > 2.0).all() and (flat[:4] < 1.0).all(), (fist, flat)
    assert pointing[0] < 1.0 and (pointing[1:4] > 2.0).all(), pointing


@pytest.mark.parametrize("position", [pytest.param(0, marks=pytest.mark.slow), 7])
def test_a_picture_does_not_depend_on_its_company(pipeline, position):
    """Alone, first or last of eight: the same noise, and pixels within one level."""
    prompt = "a right hand giving a peace sign, green background"
    alone = pipeline.generate(prompt, seed=42)[0]
    company = [f"a left hand making a fist, {colour} background" for colour in
               ("red", "blue", "white", "black", "pink", "grey", "yellow")]  # fmt: skip
    from handiffuser import Request

    requests = [Request(text, seed=i) for i, text in enumerate(company)]
    requests.insert(position, Request(prompt, seed=42))
    together = pipeline.generate(requests)[position]
    assert np.abs(alone.image.astype(int) - together.image).max() <= 1
    np.testing.assert_allclose(alone.hands["params"], together.hands["params"], atol=1e-4)


def test_prompts_from_outside_the_grammar_run(pipeline):
    prompts = ["an astronaut plays chess on the moon", "手を振る人 👋🏽", "x", "left " * 400]
    for picture in pipeline.generate(prompts, steps=2):
        assert picture.image.shape == (128, 128, 3)


def test_running_needs_no_torch(tmp_path):
    """`hd-run` in a process that cannot import PyTorch, diffusers or transformers at all."""
    code = (
        "import sys\n"
        "heavy = ('torch', 'diffusers', 'transformers', 'onnx')\n"
        "for name in heavy: sys.modules[name] = None\n"
        "from handiffuser.runtime.cli import main\n"
        "sys.argv = ['hd-run', 'demo', 'a left hand', '--steps', '1', '--output', 'out']\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "loaded = {n.split('.')[0] for n, m in sys.modules.items() if m is not None}\n"
        "assert not loaded & set(heavy), loaded & set(heavy)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "out").glob("*.png"))


def test_it_reads_its_own_pictures(pipeline):
    """Encoder and decoder are near inverses; what a mask keeps stays nearly as it was."""
    (before,) = pipeline.generate("a right hand making a fist, blue background", seed=3)
    engines = pipeline.loop.engines
    latents = engines["image_encoder"]({"image": before.image[None]})["latents"]
    again = engines["image_decoder"]({"latents": latents})["image"][0]
    assert np.abs(again.astype(int) - before.image).mean() < 2
    mask = np.zeros((128, 128), np.uint8)
    mask[48:] = 255
    given = {"image": before.image, "mask": mask}
    (after,) = pipeline.generate("a right hand giving a thumbs up, blue background", seed=4, **given)
    change = np.abs(after.image.astype(int) - before.image)
    assert change[:40].mean() < 5 < 20 < change[56:].mean()


def test_what_ships_is_small_and_free(pipeline):
    files = [path for path in (ROOT / "demo").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert (
        sum(path.stat().st_size for path in files) <= 48e6
    )  # the model and its bundle 46.2 MB, the human body of the next world 0.5
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".ckpt", ".pth")]
    assert "licence-free" in Manifest.load(shipped.bundle_path()).made_by["body"]


def test_without_hands_the_prompt_alone_paints(tmp_path):
    """By the option, and by a line of a .jsonl; hands that are given with it are no hands."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "blue background", "hands": "none", "seed": 3}\n')
    common = ("demo", "--steps", "2", "--seed", "3")
    for out, more in (("a", ("blue background", "--no-hands")), ("b", ("--prompts", tmp_path / "p.jsonl"))):
        result = invoke("runtime.cli", *common, *more, "-o", tmp_path / out)
        assert result.returncode == 0, result.stderr
    pictures = [next(p for p in (tmp_path / out).glob("*.png") if ".hands" not in p.name) for out in "ab"]
    assert pictures[0].name == pictures[1].name and pictures[0].read_bytes() == pictures[1].read_bytes()
    with np.load(next((tmp_path / "a").glob("*.npz"))) as hands:
        assert not hands["visibility"].any()


def test_the_report_is_in_the_checkpoint():
    """The figures that the page shows are those that were measured on this checkpoint."""
    notes = json.loads((shipped.checkpoint_path() / "model_index.json").read_text())["_notes"]["examined"]
    page = (ROOT / "docs" / "demo.md").read_text()
    assert notes["prompts"] >= 480 and len(notes["rows"]) == 5
    for row, values in notes["rows"].items():
        line = next(line for line in page.splitlines() if line.startswith(f"| {row} |"))
        for name, value in values.items():
            assert (f"{value:.3f}" if name == "confidence" else f"{value:.1f} %") in line, (row, name)


def test_it_paints_in_four_runs_of_its_network(pipeline):
    """Peers and references take the checkpoint as it says itself: it must say what the bundle does."""
    checkpoint = json.loads((shipped.checkpoint_path() / "model_index.json").read_text())
    manifest = pipeline.manifest
    assert checkpoint["_defaults"] == manifest.defaults and checkpoint["_words"] == manifest.words
    assert (manifest.defaults["steps"], manifest.defaults["guidance"]) == (4, 1.0)
    assert {"fist", "thumbs", "blue"} <= set(manifest.words)


def test_no_file_names_the_machine_it_was_made_on():
    for path in [*shipped.checkpoint_path().rglob("*.json"), *shipped.bundle_path().rglob("*.json")]:
        text = path.read_text(encoding="utf-8")
        assert "_name_or_path" not in text and str(Path.home()) not in text, path
    for path in shipped.bundle_path().glob("*.onnx"):
        assert str(Path(__file__).parents[1]).encode() not in path.read_bytes(), path


BENT = slice(0, 9)  # of a hand's pose: the index finger's three joints
INDEX = slice(5, 9)  # of its 21 joints: the index finger


@pytest.mark.parametrize("side", ["left", "right"])
def test_bending_a_finger_leaves_the_others_where_they_are(pipeline, side, tmp_path):
    (first,) = pipeline.generate("two open hands", seed=3)
    row = ("left", "right").index(side)
    arrays = {name: value.copy() for name, value in first.hands.items() if name != "params"}
    arrays[f"{side}_hand_pose"][BENT] += np.tile([0.0, 0.0, 1.0], 3)
    np.savez(tmp_path / "bent.hands.npz", **arrays)
    (bent,) = pipeline.generate("two open hands", seed=3, hands=str(tmp_path / "bent.hands.npz"))
    moved = np.linalg.norm((bent.hands["joints_2d"] - first.hands["joints_2d"]) * 128, axis=-1)  # pixels [2, 21]
    assert moved[row, INDEX].max() > 3, "the finger is bent"
    moved[row, INDEX] = 0
    assert moved.max() < 0.01
    np.testing.assert_allclose(bent.hands["camera"], first.hands["camera"], rtol=1e-5, atol=1e-6)
    assert (bent.image != first.image).any()

    # Without the camera placement counts: the mean and the size of each hand's joints stay, and the hand moves.
    del arrays["camera"]
    np.savez(tmp_path / "placed.hands.npz", **arrays)
    (placed,) = pipeline.generate("two open hands", seed=3, hands=str(tmp_path / "placed.hands.npz"))
    np.testing.assert_allclose(placed.hands["placement"], first.hands["placement"], atol=1e-6)
    moved = np.linalg.norm((placed.hands["joints_2d"] - first.hands["joints_2d"]) * 128, axis=-1)
    assert np.delete(moved[row], np.arange(21)[INDEX]).max() > 1


def test_hands_that_were_not_edited_make_the_same_picture(pipeline, tmp_path):
    for number, prompt in enumerate(("a right hand making a fist", "two open hands", "a left hand, palm")):
        (first,) = pipeline.generate(prompt, seed=number)
        np.savez(tmp_path / "same.hands.npz", **{name: v for name, v in first.hands.items() if name != "params"})
        (again,) = pipeline.generate(prompt, seed=number, hands=str(tmp_path / "same.hands.npz"))
        np.testing.assert_allclose(again.hands["joints_2d"], first.hands["joints_2d"], atol=1e-5)
        if "two" not in prompt:  # two hands share a camera, which may not put both where each was wanted
            np.testing.assert_allclose(again.hands["placement"], first.hands["placement"], atol=1e-4)
        assert np.abs(again.image.astype(int) - first.image.astype(int)).max() <= 1
