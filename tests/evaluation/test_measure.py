"""Figures of pictures whose truth is known, by detectors that know what to find; and the commands."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from commands import run_command
from datasets import made_sample
from handiffuser import shipped
from handiffuser.data.samples import Sample, encode_png, read
from handiffuser.detection.detect import Found, MediaPipe, distinct, even, squares, windows
from handiffuser.errors import EvaluationError, RequestError
from handiffuser.evaluation import eager, measure, painting, pictures, run
from handiffuser.evaluation.cli import evaluate
from handiffuser.evaluation.distances import interval
from handiffuser.evaluation.features import RandomFilters
from handiffuser.evaluation.hands import Asked
from handiffuser.evaluation.measure import Instruments, figures, look
from handiffuser.evaluation.pictures import Shown
from handiffuser.evaluation.reference import compare, psnr, verdict
from handiffuser.evaluation.report import page
from handiffuser.runtime.requests import Request
from report import held_out_scenes
from rows import key_of, save
from tokenizers import Tokenizer, models, pre_tokenizers

COUNT = 40


class Told:
    """A detector that finds what the first pixel says: 0 nothing, 1 the hand, 2 the hand with the wrong side.

    It moves the joints by 0.15 of the hand's size where the pixel's second channel is 1.
    """

    name, settings = "told", {"eyes": "none"}

    def __init__(self, hands: dict[int, Asked]) -> None:
        self.hands = hands

    def __call__(self, image: np.ndarray) -> list[Found]:
        kind, moved, number = image[0, 0]
        if not kind:
            return []
        hand = self.hands[int(number)]
        side = hand.side if kind == 1 else {"left": "right", "right": "left"}[hand.side]
        size = np.ptp(hand.joints, axis=0).max()
        return [Found(side, 0.8, hand.joints + moved * np.array([0.15 * size, 0]))]


class Blind:
    """A detector that finds nothing. It has only what `Detector` asks for."""

    name, settings = "blind", {}

    def __call__(self, image: np.ndarray) -> list[Found]:
        return []


def world(missed: int = 8, wrong: int = 6, moved: int = 10, seed: int = 0) -> tuple[list[Shown], Told]:
    rng, hands, shown = np.random.default_rng(seed), {}, []
    for i in range(COUNT):
        image = rng.integers(0, 256, (48, 48, 3), np.uint8)
        kind = 0 if i < missed else 2 if i < missed + wrong else 1
        image[0, 0] = kind, i >= COUNT - moved, i
        hands[i] = Asked(("left", "right")[i % 2], rng.uniform(0.3, 0.7, (21, 2)))
        labels = {"gesture": ("fist", "open_hand")[i >= COUNT // 2], "skin": ("pale", "deep")[i % 2]}
        shown.append(Shown(f"k{i:02d}", image, "a hand", [hands[i]], labels))
    return shown, Told(hands)


def seen_by(detector: Any, shown: list[Shown], **more: Any) -> measure.Seen:
    return look(shown, Instruments(detector, RandomFilters()), len(shown), lambda done, total: None, **more)


def test_the_figures_are_the_truth():
    shown, told = world()
    document = figures(seen_by(told, shown), None)
    found = {name: entry["value"] for name, entry in document["metrics"].items()}
    assert found["detection_rate"] == pytest.approx(32 / 40) and document["hands_asked_for"] == 40
    assert found["hand_confidence"] == pytest.approx(0.8 * 32 / 40), "misses count 0"
    assert found["pck_10"] == pytest.approx(22 / 40) and found["pck_20"] == pytest.approx(32 / 40)
    assert found["handedness"] == pytest.approx(26 / 32), "of those found"
    assert found["distance"] == pytest.approx(0.15 * 10 / 32)
    for entry in document["metrics"].values():
        assert entry["low"] <= entry["value"] <= entry["high"] and entry["n"] in (32, 40)
    assert document["metrics"]["detection_rate"]["low"] > 0.6
    limits = dict(document["curve"])
    assert limits[0.1] == pytest.approx(22 / 40) and limits[0.4] == pytest.approx(32 / 40)


def test_another_detector_and_none():
    shown, _ = world()
    document = figures(seen_by(Blind(), shown), None)
    assert document["metrics"]["hand_confidence"]["value"] == 0 and "distance" not in document["metrics"]
    document = figures(seen_by(None, shown), seen_by(None, shown))
    assert set(document["metrics"]) == {"fid", "kid", "fid_h", "kid_h"} and document["hands"] == []
    assert document["metrics"]["fid"]["value"] == pytest.approx(0, abs=1e-6)


def test_groups_show_which_hands_are_worse():
    """Only fists are missed: the gap of fists leaves 0 out, the gap of skins does not."""
    shown, told = world(wrong=0)
    entries = {(e["by"], e["group"]): e for e in figures(seen_by(told, shown), None)["groups"]}
    gap = entries["gesture", "fist"]["hand_confidence"]["gap"]
    assert gap["high"] < 0 and gap["value"] == pytest.approx(0.8 * 12 / 20 - 0.8)
    skin = entries["skin", "pale"]["hand_confidence"]["gap"]
    assert skin["low"] < 0 < skin["high"]
    assert {by for by, _ in entries} == {"gesture", "skin", "side"}


def test_labels_come_from_the_other_set_where_there_are_none():
    shown, told = world()
    labels = {one.key: one.labels for one in shown}
    for one in shown:
        one.labels = {}
    assert any(e["by"] == "gesture" for e in figures(seen_by(told, shown, labels=labels), None)["groups"])


def test_distances_see_a_change_of_pictures():
    shown, _ = world()
    dark = [Shown(f"other-{one.key}", one.image // 2, one.prompt, one.hands, one.labels) for one in shown]
    same = figures(seen_by(None, world(seed=1)[0]), seen_by(None, shown))["metrics"]
    other = figures(seen_by(None, dark), seen_by(None, shown))["metrics"]
    for name in ("kid", "kid_h", "fid", "fid_h"):
        assert other[name]["value"] > 3 * abs(same[name]["value"]), name
    assert other["kid"]["low"] > 0


def test_the_cost_of_a_candidate():
    """Hands that only the candidate misses show in every figure. The same pictures cost nothing."""
    shown, told = world(missed=2, wrong=0)
    worse = [Shown(s.key, s.image.copy(), s.prompt, s.hands, s.labels) for s in shown]
    for one in worse[10:20]:
        one.image[0, 0, 0] = 0
    reference, candidate = seen_by(told, shown), seen_by(told, worse)
    found = compare(reference, candidate, None)
    assert found["detection_rate"]["value"] == pytest.approx(-10 / 40) and found["detection_rate"]["high"] < 0
    assert found["handedness"]["value"] == 0
    sentence = verdict(found, {"value": 30.0, "n": 40, "equal": 0})
    assert "worse beyond chance" in sentence and "hands found -25.0" in sentence
    same = compare(reference, seen_by(told, shown), seen_by(None, world(seed=5)[0]))
    assert all(entry["value"] == 0 == entry["low"] for entry in same.values()) and {"fid", "kid"} <= same.keys()
    assert "deployment cost nothing" in verdict(same, {"value": 99.0, "n": 40, "equal": 40})
    with pytest.raises(EvaluationError, match="in common"):
        compare(reference, seen_by(told, [Shown("x", s.image, "", s.hands, {}) for s in shown[:2]]), None)


def test_the_page_is_whole_and_fetches_nothing():
    shown, told = world()
    shown[0].prompt = "<script>alert(1)</script>"
    seen = seen_by(told, shown)
    document = {"what": "a <b>", "folder": "f", "settings": {"a": {"b": 1}}, "notes": ["n"], "cpu_seconds": 1.0,
                **figures(seen, None)}  # fmt: skip
    text = page(document, seen.best, seen.worst)
    assert "<script" not in text and "a &lt;b&gt;" in text and text.count("<img") == 24
    assert not re.search(r"(src|href)=\"?(http|//)", text)
    assert "asked: left, found: right" in text or "asked: right, found: left" in text
    assert seen.worst[0].hand.found is None and seen.best[0].hand.found is not None


# --- the commands ---


def folder_of(path, count=6, **more):
    save(path, [made_sample(i, **more) for i in range(count)])
    return path


def invoke(*words: object, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(evaluate, [*map(str, words)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_a_folder_is_measured_without_a_detector(tmp_path):
    ours, theirs = folder_of(tmp_path / "ours"), folder_of(tmp_path / "theirs", 8, size=(40, 40))
    (ours / "key-0001.png").write_bytes(b"no picture")
    report = tmp_path / "page.html"
    document = invoke(ours, "--against", theirs, "--no-detector", "--report", report, "-o", tmp_path / "d.json")
    assert document["pictures"] == 5 and document["metrics"]["fid"]["n_against"] == 8
    assert any("not comparable" in note for note in document["notes"])
    assert "not comparable" in report.read_text() and json.loads((tmp_path / "d.json").read_text()) == document


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "WHAT must be a folder, got nowhere"),
        (["."], "holds no samples"),
        (["demo"], "nothing to paint"),
        (["demo", "--reference", "."], "two that paint"),
        ([".", "--weights", "nothing.pt"], "--weights must be a file, got nothing.pt"),
        ([".", "--clip", "."], "lacks config.json"),
        ([".", "--report", "no/such/page.html"], "file that can be written"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=sentence):
        CliRunner().invoke(evaluate, [*words, "--no-detector"], catch_exceptions=False)


def test_without_mediapipe_a_sentence_says_so(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(EvaluationError, match=r"handiffuser\[detect\].*--no-detector"):
        run.instruments({"clip_folder": None, "threads": None, "no_detector": False, "crops": "asked"})


def test_an_engine_paints_the_prompts_of_a_folder_and_goes_on(tiny_bundle, tmp_path):
    theirs = folder_of(tmp_path / "theirs", 4)
    words = [tiny_bundle, "--against", theirs, "--pictures", tmp_path / "made", "--no-detector", "--threads", 1]
    document = invoke(*words)
    made = list((tmp_path / "made").glob("*/*.hands.npz"))
    assert len(made) == 4 and document["pictures"] == 4
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "made").glob("*/*.json"))]
    assert [record["seed"] for record in records] == [0, 1, 2, 3], "a seed of its own each"
    assert {record["prompt"] for record in records} == {sample.prompts[0] for sample in read(theirs)}
    before = {path: path.stat().st_mtime_ns for path in made}
    assert invoke(*words)["metrics"] == document["metrics"]
    assert before == {path: path.stat().st_mtime_ns for path in made}, "nothing is painted twice"
    assert invoke(*words, "--count", 2)["pictures"] == 2, "what else is in the folder does not count"


def test_a_bundle_beside_its_checkpoint(tiny_bundle, tiny_checkpoint_folder, tmp_path):
    """From the same noise PyTorch and the graphs paint the same pictures to a level or two."""
    (tmp_path / "prompts.txt").write_text("a fist\ntwo open hands\na left hand\n")
    document = invoke(
        tiny_bundle, "--reference", tiny_checkpoint_folder, "--prompts", tmp_path / "prompts.txt", "--no-detector",
        "--pictures", tmp_path / "made", "--threads", 1, "--against", folder_of(tmp_path / "theirs", 4),
        "--report", tmp_path / "page.html",
    )  # fmt: skip
    assert document["psnr"]["n"] == 3 and document["psnr"]["low"] > 45
    assert document["verdict"] in (tmp_path / "page.html").read_text()
    assert abs(document["differences"]["fid"]["value"]) < 1


def test_given_hands_are_painted(tiny_bundle, tiny_checkpoint_folder, tmp_path):
    theirs = tmp_path / "theirs"
    save(theirs, [made_sample(i) for i in (1, 2, 4)])
    painted = []
    for what in (tiny_bundle, tiny_checkpoint_folder):
        made = invoke(what, "--against", theirs, "--given-hands", "--no-detector", "--pictures", tmp_path / "made")
        with np.load(f"{made['folder']}/key-0002.hands.npz") as file:
            painted.append((file["right_hand_pose"], file["joints_2d"]))
    wanted = next(s for s in read(theirs) if isinstance(s, Sample) and s.key == "key-0002").hands["right_hand_pose"]
    for pose, joints in painted:
        assert np.allclose(pose, wanted, atol=1e-4)
        assert np.allclose(joints, painted[0][1], atol=1e-4)


def test_captions_are_read_as_they_are_written(tmp_path):
    """As in training. And what PyTorch does not paint is refused there."""
    save(tmp_path / "a", [Sample("one", ["a (right) hand"], None, None), Sample("two", ["a fist"], None, None)])
    asked = painting.wanted(tmp_path / "a", None, None, None, 0, pytest.fail)
    assert [one.plain_prompts for one in asked] == [True, True]
    words = Tokenizer(models.WordLevel({"a": 0, "fist": 1, "right": 2, "hand": 3, "?": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    checkpoint = SimpleNamespace(image_size=(64, 32), num_people=1, tokenizer=words, special_tokens={"length": 77})
    for request in (*asked, Request("a fist", solver="ddim", size="32x64", guidance_interval=(0, 1))):
        eager.check(replace(request, solver="ddim"), checkpoint)
    for field, given in (("size", "64x64"), ("lora", "a.safetensors"), ("guidance_interval", (0, 0.5))):
        with pytest.raises(RequestError, match=f"{field} must be left out for a checkpoint in PyTorch, got one"):
            eager.check(Request("a fist", solver="ddim", **{field: given}), checkpoint)
    with pytest.raises(RequestError, match=r"prompt must have no weights and no BREAK for .* got 'a \(fist:1.2\)'"):
        eager.check(Request("a (fist:1.2)", solver="ddim"), checkpoint)
    for name, length in (("prompt", 75), ("negative_prompt", 75)):
        fits, long = ({"prompt": "a fist", name: "a " * n} for n in (length, length + 1))
        eager.check(Request(**fits, solver="ddim"), checkpoint)
        eager.check(Request(**long, solver="ddim", plain_prompts=True), checkpoint)
        with pytest.raises(RequestError, match=f"^{name} must have at most 75 tokens .*, got 76. Set plain_prompts"):
            eager.check(Request(**long, solver="ddim"), checkpoint)


def test_psnr_of_equal_and_of_other_pictures(tmp_path):
    image = np.full((8, 8, 3), 100, np.uint8)
    for name, value in (("a", 0), ("b", 5)):
        save(tmp_path / name, [Sample("same", ["x"], None, encode_png(image)),
                               Sample("other", ["x"], None, encode_png(image + np.uint8(value)))])  # fmt: skip
    found = psnr(tmp_path / "a", tmp_path / "b", {"same", "other"})
    assert found["equal"] == 1 and found["value"] == pytest.approx((99 + 20 * np.log10(255 / 5)) / 2)


def test_clip_score_of_a_model_that_the_user_gives(tmp_path, tiny_checkpoint):
    transformers = pytest.importorskip("transformers")
    from handiffuser.evaluation.clip import Clip

    text = {"vocab_size": 2000, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(tmp_path)
    tiny_checkpoint.tokenizer.save(str(tmp_path / "tokenizer.json"))
    score = Clip(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    assert 0 <= score(image, "a right hand making a fist") <= 100
    assert score(image, "a fist") == score(image, "a fist")
    shown, _ = world()
    tools = Instruments(None, RandomFilters(), score)
    found = figures(look(shown[:4], tools, 4, lambda done, total: None), None)
    assert found["metrics"]["clip_score"]["n"] == 4


def test_views_come_equally_often_and_prompts_are_held_out():
    from handiffuser.demo.prompts import is_held_out

    scenes = held_out_scenes(12)
    assert [scene.spec.view for scene in scenes] == ["palm", "back", "side"] * 4
    assert all(is_held_out(scene.prompt) for scene in scenes) and key_of(3) == "held-out-0003"
    assert pictures.picture_id("a/b c.d") == "a-b-c-d" and run.remarks  # names of files


def test_mediapipe_finds_hands_that_it_never_saw():
    """A detector trained on photographs finds most hands of our renders, their joints and their sides."""
    mediapipe = pytest.importorskip("mediapipe", exc_type=ImportError)
    if not hasattr(mediapipe, "solutions"):
        pytest.skip("this MediaPipe has no hand models")
    from handiffuser.demo.dataset import samples_of
    from handiffuser.demo.render import demo_body

    scenes = [scene for scene in held_out_scenes(30) if scene.spec.view != "side"]
    samples = samples_of(scenes, [[s.prompt] for s in scenes], [key_of(i) for i in range(20)], demo_body(), 128)
    shown = []
    for sample in samples:
        image = pictures.picture(sample)
        shown.append(Shown(sample.key, image, "", pictures.asked_hands(sample, image, None), {}))
    found = figures(seen_by(MediaPipe(), shown), None)["metrics"]
    assert found["detection_rate"]["value"] >= 0.8 and found["handedness"]["value"] >= 0.9
    assert found["pck_10"]["value"] >= 0.7


def test_help_is_there():
    result = run_command("evaluation.cli", "--help")
    assert result.returncode == 0 and "preferences" in result.stdout


def test_as_a_reference_the_word_demo_is_the_shipped_checkpoint(monkeypatch):
    eager = pytest.importorskip("handiffuser.evaluation.eager")
    monkeypatch.setattr(eager, "Torch", lambda path, options, what: (path, what))
    monkeypatch.setattr(painting, "Engines", lambda what, options, say: what)
    assert painting.painter_of("demo", {}, print, checkpoint=True) == (shipped.checkpoint_path(), "demo")
    assert painting.painter_of("demo", {}, print) == "demo"


def photographs(folder, count=6):
    folder.mkdir()
    for i in range(count):
        (folder / f"IMG_{i}.{('PNG', 'png')[i % 2]}").write_bytes(made_sample(i + 20).image)
    return folder


def test_plain_photographs_need_no_annotation(tmp_path):
    ours, photos = folder_of(tmp_path / "ours"), photographs(tmp_path / "photos")
    (photos / "notes.txt").write_text("nothing")
    (photos / "IMG_5.png").write_bytes(b"no picture")
    document = invoke(ours, "--against", photos, "--no-detector")
    assert document["metrics"]["fid"]["n_against"] == 5 and "kid" in document["metrics"]
    assert "fid_h" not in document["metrics"] and any("FID-H and KID-H are missing" in n for n in document["notes"])
    document = invoke(photos, "--against", ours, "--no-detector")
    assert document["pictures"] == 5 and document["hands_asked_for"] == 0
    with pytest.raises(EvaluationError, match=r"without prompts.*--prompts FILE"):
        CliRunner().invoke(evaluate, ["demo", "--against", str(photos), "--no-detector"], catch_exceptions=False)


def test_one_picture_has_no_fid_and_the_note_says_so(tmp_path):
    document = invoke(folder_of(tmp_path / "ours", 1), "--against", folder_of(tmp_path / "theirs"), "--no-detector")
    assert not {"fid", "kid"} & document["metrics"].keys()
    (said,) = [note for note in document["notes"] if "FID and KID" in note]
    assert "1 picture here" in said and not any("read KID" in note for note in document["notes"])


def test_a_distance_is_never_negative():
    """Equal sets with different keys have FID 0, and an interval above it."""
    shown, _ = world()
    others = [Shown(f"other-{one.key}", one.image, one.prompt, one.hands, one.labels) for one in shown]
    found = figures(seen_by(None, others), seen_by(None, shown))["metrics"]
    for name in ("fid", "fid_h"):
        assert found[name]["low"] == 0 < found[name]["high"]
    assert interval(0.0, np.array([1.0, 3.0]), spread=True)["low"] < 0, "differences may be"


def mediapipe_of(*places: float) -> MediaPipe:
    """A MediaPipe whose model finds hands at these places, up to its limit."""
    detector = MediaPipe.__new__(MediaPipe)
    detector.pad, detector.size, detector.hands, detector._models = 0.25, 768, 8, {}

    class Model:
        def __init__(self, most: int) -> None:
            self.most = most

        def process(self, image: np.ndarray) -> Any:
            marks = [SimpleNamespace(landmark=[SimpleNamespace(x=x + 0.04 * (k % 5), y=0.5) for k in range(21)])
                     for x in places[: self.most]]  # fmt: skip
            side = SimpleNamespace(classification=[SimpleNamespace(label="Left", score=0.9)])
            return SimpleNamespace(multi_hand_landmarks=marks, multi_handedness=[side] * len(marks))

    detector._make = lambda max_num_hands: Model(max_num_hands)
    return detector


def test_the_detector_has_no_limit_of_hands():
    """With a limit of two hands, at most half of four requested hands were found."""
    image = np.zeros((64, 64, 3), np.uint8)
    for count in (1, 4, 9, 20):
        assert len(mediapipe_of(*np.linspace(-3, 3, count)).once(image)) == count


def test_parts_without_an_edge_are_not_searched():
    """A hand in a corner of an even wall: only the squares that show it, or an edge, are looked at."""
    y, x = np.mgrid[:400, :600] / 600.0
    wall = np.stack([255 * x, 255 * y, 128 + 0 * x], -1).astype(np.uint8)
    assert even(wall) and even(wall[:3, :2]) and even(np.zeros((1, 1, 3), np.uint8))
    for width, darker in ((8, 30), (60, 10)):  # far and small, or near and of nearly the same colour
        shown = wall.copy()
        shown[300 : 300 + width, 500 : 500 + width] -= np.uint8(darker)
        assert not even(shown) and not even(shown[200:, 400:])
    detector, seen = mediapipe_of(), []
    detector.once = lambda image: seen.append(image.shape) or []
    assert detector(wall) == [] and seen == [(400, 600, 3)]
    assert detector(shown) == [] and 4 < len(seen) < 25


def test_hands_that_lie_on_one_another_are_one():
    joints = np.random.default_rng(0).uniform(0.4, 0.6, (21, 2))
    sure, other, far = Found("left", 0.9, joints), Found("left", 0.6, joints + 0.02), Found("left", 0.5, joints + 0.3)
    assert distinct([[other, far], [sure]]) == [sure, far]
    assert distinct([[other, far, sure]]) == [sure, far]


def test_hands_that_press_on_each_other_are_two():
    """In one look, that is: another look may see the same hand some way off."""
    joints = np.random.default_rng(0).uniform(0.4, 0.6, (21, 2))
    one, other = Found("right", 0.9, joints), Found("right", 0.8, joints + np.array([0.06, 0]))
    assert distinct([[other, one]]) == [one, other] and distinct([[one], [other]]) == [one]


def test_windows_are_four_parts():
    parts = list(windows(np.zeros((100, 50, 3), np.uint8)))
    assert len(parts) == 4 and parts[-1][0] == pytest.approx([0.3, 0.3]) and parts[0][1].shape == (70, 35, 3)


@pytest.mark.parametrize(("size", "side"), [((100, 250), 100), ((100, 250), 50), ((64, 64), 64), ((333, 97), 31)])
def test_squares_cover_a_picture_and_overlap_by_half(size, side):
    covered = np.zeros(size, int)
    for place, part in squares(np.zeros((*size, 3), np.uint8), side):
        x, y = (place * size[::-1]).round().astype(int)
        assert part.shape == (side, side, 3)
        covered[y : y + side, x : x + side] += 1
    assert covered.min() >= 1
    inner = covered[side // 2 : size[0] - side // 2, side // 2 : size[1] - side // 2]
    assert inner.size == 0 or inner.min() >= sum(length > side for length in size)
