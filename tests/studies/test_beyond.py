"""Scenes beyond the training: each group is what it says, in closed form; and the command once, seen by stubs."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import beyond
import numpy as np
import pytest
from beyond import BEND, MOVED, NEW, SYNONYMS, WORDINGS
from click.testing import CliRunner
from handiffuser.demo.gestures import NAMES, pose, rotation
from handiffuser.demo.prompts import (
    SKINS,
    VIEWS,
    Spec,
    _subject,
    allowed_views,
    is_held_out,
    is_held_out_pair,
    write_prompt,
)
from handiffuser.demo.render import render_scenes
from handiffuser.demo.scenes import WRIST, sample_scenes
from handiffuser.detection.detect import Found
from handiffuser.errors import EvaluationError
from handiffuser.evaluation.features import RandomFilters
from handiffuser.evaluation.hands import Asked, Hand
from handiffuser.evaluation.measure import Instruments, Seen
from handiffuser.models.smplh import HAND_JOINTS

COUNT = 9


@pytest.fixture(scope="module")
def groups():
    return beyond.groups(COUNT)


def changed(groups, name: str):
    """Pairs of scenes, before and after."""
    assert groups[name].keys() <= groups["usual"].keys() and len(groups[name]) >= COUNT - 1
    return [(groups["usual"][key], scene) for key, scene in groups[name].items()]


def joints_that_differ(before, after) -> list[int]:
    return np.flatnonzero((before.rotations != after.rotations).any((1, 2))).tolist()


def same_but(before, after, *fields: str) -> bool:
    names = {"prompt", "spec", "rotations", "betas", "camera", "present", "background", "skin", "light"}
    return all(np.array_equal(getattr(before, n), getattr(after, n)) for n in names - set(fields))


def in_frame(scene) -> bool:
    places = beyond.in_picture(scene, scene.rotations)[list(HAND_JOINTS[beyond.side_of(scene)])]
    return bool((places >= 0).all() and (places <= 1).all())


@pytest.mark.slow
def test_a_group_has_the_same_scenes_whatever_their_number(groups):
    for name, scenes in beyond.groups(3).items():
        for key, scene in scenes.items():
            assert same_but(scene, groups[name][key]), (name, key)


def test_pairs_are_held_out(groups):
    for name, new in (("new-pairs", True), ("known-pairs", False)):
        for scene in groups[name].values():
            assert scene.present.all() and scene.spec.other not in ("", scene.spec.gesture)
            assert is_held_out_pair(scene.spec.gesture, scene.spec.other) == new


def bare(text: str) -> str:
    return re.sub(r"\b(a|an|the) ", "", text.lower())


def subjects(spec: Spec) -> set[str]:
    """All that the grammar can call the hand that is left or right and what it does, articles aside; each of its
    prompts that says the side holds one of these."""
    rng = np.random.default_rng(0)
    tones = ("", *SKINS[spec.skin][1])
    return {bare(_subject(spec, tone, rng)) for tone in tones for _ in range(800)}


@pytest.mark.parametrize("gesture", NAMES)
def test_no_wording_is_one_that_the_grammar_makes(gesture):
    spec = Spec("left", gesture, allowed_views(gesture, "left")[0], "tan", "orange")
    rng, grammar = np.random.default_rng(1), subjects(spec)
    for _ in range(40):
        prompt = bare(write_prompt(spec, rng, leave_out=0.0))
        assert any(subject in prompt for subject in grammar), prompt
    scene = replace(sample_scenes(1)[0], spec=spec)
    for kind, sentences in WORDINGS.items():
        for number in range(len(sentences)):
            prompt = beyond.reworded(scene, kind, number, rng).prompt.lower()
            assert not any(subject in bare(prompt) for subject in grammar), prompt
            for words in (SKINS["tan"][1], VIEWS[spec.view], ("left",), ("orange",)):
                assert any(word in prompt for word in words), (prompt, words)
            assert "{" not in prompt and "right" not in prompt


def test_wordings_change_nothing_but_the_words(groups):
    assert set(SYNONYMS) == set(NAMES)
    for kind in WORDINGS:
        for before, after in changed(groups, f"wordings-{kind}"):
            assert same_but(before, after, "prompt") and before.prompt != after.prompt
    assert groups["wordings-polite"]["held-out-0002"].prompt.isupper()


def test_a_blend_lies_on_the_arc():
    axis = np.array([1.0, 2.0, 2.0]) / 3
    a, b = (np.stack([rotation(axis, d) for d in degrees]) for degrees in ((10, -20), (70, 100)))
    expected = np.stack([rotation(axis, d) for d in (30, 20)])
    assert np.allclose(beyond.blend(a, b, 1 / 3), expected, atol=1e-6)
    assert np.allclose(beyond.blend(a, b, 1.0), b, atol=1e-6)


def test_between_lies_in_the_middle_third_and_is_no_gesture(groups):
    for before, after in changed(groups, "between"):
        side = beyond.side_of(before)
        fingers = beyond.fingers_of(side)
        assert same_but(before, after, "rotations", "camera", "spec") and in_frame(after)
        assert set(joints_that_differ(before, after)) == set(range(fingers.start, fingers.stop))
        a, mixed = before.rotations[fingers], after.rotations[fingers]
        assert beyond.strangeness(mixed, side) >= NEW
        # Its pose varies the target gesture: the way by the mixed pose is hardly longer.
        ways = {}
        for name in NAMES:
            b = pose(name, side)
            first, second, whole = (beyond.degrees_apart(x, y).mean() for x, y in ((a, mixed), (mixed, b), (a, b)))
            ways[name] = first + second - whole, first / (first + second)
        detour, share = min(ways.values())
        assert detour < 6 and 0.28 < share < 0.72


def test_mirrored_joints_are_mirrored_and_so_is_the_picture(groups):
    for number, (before, after) in enumerate(changed(groups, "mirrored")):
        assert same_but(before, after, "prompt", "spec", "rotations", "camera", "present", "light")
        assert {before.spec.side, after.spec.side} == {"left", "right"} and after.spec.side in after.prompt.lower()
        assert is_held_out(after.prompt) and before.spec.side not in after.prompt.lower()
        ours, theirs = (beyond.in_picture(scene, scene.rotations) for scene in (before, after))
        for side in range(2):
            mirror = ours[list(HAND_JOINTS[side])] * (-1, 1) + (1, 0)
            assert np.allclose(theirs[list(HAND_JOINTS[1 - side])], mirror, atol=2e-4)
        if number < 2:
            pictures = render_scenes([before, after]).numpy().astype(float)
            assert np.abs(pictures[0, :, ::-1] - pictures[1]).mean() < 1.5
            assert np.abs(pictures[0] - pictures[1]).mean() > 5


@pytest.mark.parametrize("degrees", [30, 60])
def test_wrists_are_turned_beyond_the_training(groups, degrees):
    straight = np.eye(3)
    for before, after in changed(groups, f"turned-{degrees}"):
        wrist = WRIST[beyond.side_of(before)]
        assert same_but(before, after, "prompt", "spec", "rotations", "camera") and in_frame(after)
        assert joints_that_differ(before, after) == [wrist]
        assert beyond.degrees_apart(after.rotations[wrist], straight) == pytest.approx(BEND + degrees, abs=0.05)
        said = after.prompt.lower()
        assert not any(words in said for names in VIEWS.values() for words in names) and is_held_out(said)
        assert after.spec.side in said and after.spec.gesture == before.spec.gesture
    trained = [
        beyond.degrees_apart(scene.rotations[WRIST[side]], straight)
        for scene in sample_scenes(150, seed=4)
        for side in range(2)
        if scene.present[side]
    ]
    assert BEND - 3 < max(trained) <= BEND


def test_only_the_edited_finger_differs(groups):
    assert len({next(iter(joints_that_differ(*pair))) for pair in changed(groups, "edited")}) > 2, "any finger"
    for before, after in changed(groups, "edited"):
        side = beyond.side_of(before)
        own, differ = HAND_JOINTS[side], joints_that_differ(before, after)
        assert same_but(before, after, "rotations", "spec") and in_frame(after)
        finger = next(f for f in range(5) if differ[0] in own[1 + 4 * f : 5 + 4 * f])
        chain = own[1 + 4 * finger : 5 + 4 * finger]
        assert set(differ) <= set(chain[:3])
        was, now = beyond.joints_of({"": before})[""], beyond.joints_of({"": after})[""]
        moved = np.linalg.norm(now - was, axis=-1)
        assert moved[4 + 4 * finger] >= MOVED * np.ptp(was, axis=0).max()
        assert np.delete(moved, np.arange(2 + 4 * finger, 5 + 4 * finger)).max() < 1e-9
        assert beyond.strangeness(after.rotations[beyond.fingers_of(side)], side) >= NEW


def test_whether_joints_follow_an_edit():
    before = np.stack([np.linspace(0.2, 0.8, 21), np.full(21, 0.5)], -1)
    after = before.copy()
    after[[6, 7, 8], 1] -= 0.2  # a third of the hand's size
    places = [after, before, 0.5 * after + 0.5 * before - (0, 0.02), None]
    near = before.copy()
    near[8] = after[8]
    seen = Seen(keys=["a", "b", "c", "d", "e", "unedited"], owners=list(range(6)), extra=[0] * 6)
    for joints in (*places, near, after):
        seen.hands.append(Hand(Asked("left", after), None if joints is None else Found("left", 1.0, joints)))
    edits = [dict.fromkeys("abcde", joints) for joints in (after, before)]
    values, owners = beyond.follows(seen, *edits)
    assert values.tolist() == pytest.approx([1, 0, 1, 1 / 3]) and owners.tolist() == [0, 1, 2, 4]
    seen.labels = [{"side": "left"}] * 5 + [{"side": "both"}]
    assert beyond.hands_as_asked(seen)[0].tolist() == [1, 1, 1, 0, 1, 0]
    seen.extra[0] = seen.extra[5] = 1
    assert beyond.hands_as_asked(seen)[0].tolist() == [0, 1, 1, 0, 1, 1]


def test_hands_that_changed_places():
    def judge(image, labels):  # sees a fist on the left, and a claw on the right
        return {name: float(labels[name] == {"gesture": "fist", "other": "claw"}[name]) for name in labels}

    read, nothing = beyond.reads_pairs(judge), np.zeros((2, 2, 3), np.uint8)
    assert read(nothing, {"gesture": "fist"}) == {"gesture": 1}
    for left, right, both, swapped in (("fist", "claw", 1, 0), ("claw", "fist", 0, 1), ("fist", "pinch", 0, 0)):
        found = read(nothing, {"gesture": left, "other": right})
        assert (found["both"], found["swapped"]) == (both, swapped)


def test_somebody_must_look(tmp_path):
    with pytest.raises(EvaluationError, match="nothing to look with"):
        CliRunner().invoke(beyond.command, [str(tmp_path), "--no-detector"], catch_exceptions=False)


class Left:
    """Finds one left hand in the middle of whatever it is shown."""

    name, settings = "left", {}

    def __call__(self, image: np.ndarray) -> list[Found]:
        return [Found("left", 0.5, np.random.default_rng(0).uniform(0.3, 0.7, (21, 2)))]


def agreeable(image: np.ndarray, labels: dict[str, str]) -> dict[str, float]:
    return dict.fromkeys(labels, 1.0)


@pytest.mark.slow
def test_every_group_is_painted_once_and_measured(tiny_checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(beyond, "load_tools", lambda *_: Instruments(Left(), RandomFilters(), judge=agreeable))
    words = [tmp_path / "out", "--checkpoint", tiny_checkpoint_folder, "--count", 4, "-o", tmp_path / "d.json"]

    def once() -> dict:
        result = CliRunner().invoke(beyond.command, [*map(str, words)], catch_exceptions=False)
        assert result.exit_code == 0 and "turned-60" in result.stdout, result.output
        return json.loads(result.stdout.splitlines()[-1])

    document = once()
    assert document == json.loads((tmp_path / "d.json").read_text()) and document["count"] == 4
    scenes = beyond.groups(4)
    assert list(document["groups"]) == list(scenes)
    for group, ways in document["groups"].items():
        assert tuple(ways) == beyond.ways_of(group)
        for way, row in ways.items():
            metrics = row["metrics"]
            assert row["pictures"] == 4
            assert all(0 <= e["low"] <= e["value"] + 1e-9 <= e["high"] + 2e-9 for e in metrics.values())
            labels = {"gesture", "side", "view"} - {"between": {"gesture"}, "edited": {"gesture"},
                      "turned-30": {"view"}, "turned-60": {"view"}}.get(group, set())  # fmt: skip
            judged = {name.removeprefix("judge_") for name in metrics if name.startswith("judge_")}
            if "pairs" not in group:
                assert judged == {*labels, "skin", "background"}
                assert ("follows" in metrics) == (group == "edited" or (group == "usual" and way != "full-pipeline"))
            if way == "renders" and "pairs" not in group:
                left = np.mean([scene.spec.side == "left" for scene in scenes[group].values()])
                assert metrics["handedness"]["value"] == left and metrics["hands_as_asked"]["value"] == 1
    assert document["groups"]["new-pairs"]["renders"]["metrics"]["hands_as_asked"]["value"] == 0
    for way in ("renders", "true-hands"):  # what is painted has the very hands of the scenes
        assert len(list((tmp_path / "out" / "edited" / way).glob("**/*.hands.npz"))) == 4
    painted = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*/*/*.png")}
    assert len(painted) == 2 * 4 * (3 * 2 + 4 + 5) and once() == document  # each with its skeleton
    assert painted == {path: path.stat().st_mtime_ns for path in painted}, "nothing is painted twice"
