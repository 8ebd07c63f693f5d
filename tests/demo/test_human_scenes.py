"""Scenes of the demo's people: what captions name is in the picture, captions are those of people, datasets repeat."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from handiffuser.data.check import check
from handiffuser.data.cli import commands
from handiffuser.data.hands import joints_in_picture
from handiffuser.data.samples import person, picture, read
from handiffuser.demo import dataset
from handiffuser.demo.human import human_body
from handiffuser.demo.human_dataset import sample_of, scene_of
from handiffuser.demo.human_poses import FRAMINGS as EVERY_FRAMING
from handiffuser.demo.human_poses import LEFT, RIGHT
from handiffuser.demo.human_prompts import (
    FRAMINGS,
    GESTURES,
    PLACES,
    POSES,
    Someone,
    Spec,
    is_held_out,
    is_held_out_spec,
    says,
    write_caption,
)
from handiffuser.demo.human_scenes import CLOSE, in_picture, labels_of, name_of, sample_scene, seen_shares
from handiffuser.demo.wording import All, Maybe, One, Shuffled, matches, write
from handiffuser.errors import DatasetError
from handiffuser.models.smplh import HAND_JOINTS, SMPLH

SEED = 3
CONTACT = ("handshake", "two people shaking hands", "high five", "holding hands", "a hand holding a cup")


pytestmark = pytest.mark.usefixtures("coarse_skin")


@pytest.fixture(scope="module")
def scenes():
    return [scene_of(SEED, i) for i in range(24)]


# --- grammar ---


def test_a_grammar_knows_its_own_captions():
    grammar = All(One("a", "the"), Maybe("old"), "hand", Shuffled(Maybe(", outdoors"), Maybe(All(",", "palm up"))))
    rng = np.random.default_rng(0)
    written = {write(grammar, rng, 0.5) for _ in range(300)}
    assert len(written) == 2 * 2 * 5 and all(matches(grammar, text) for text in written)
    assert "an old hand, palm up, outdoors" in written and "a hand" in written
    for other in ("a", "a hand old", "a hand, indoors", "a handy"):
        assert not matches(grammar, other)
    assert matches(grammar, "An old hand.") and write(One("b", "a", weights=(0, 1)), rng) == "a"


SMILING = Someone("thumbs_up", "right", person="woman", smiling=True, shirt="red", pattern="stripes", skin="tan")
EXPRESSED = {  # the README's prompts, and what newcomers type
    "a right hand making a fist, blue background": Spec((Someone("fist", "right"),), "close-up", "wall", "blue"),
    "two open hands": Spec((Someone("open_hand", "both", "palm"),), "close-up", "garden"),
    "thumbs up": Spec((SMILING,), "bust", "garden"),
    "a person waving": Spec((Someone("waving", "left", person="man"),), "half body", "beach"),
    "a portrait of a woman with her hand on her cheek": Spec(
        (Someone("hand_on_cheek", "left", person="woman"),), "bust", "room"
    ),
    "praying hands": Spec((Someone("praying", "both"),), "close-up", "studio"),
    "hand": Spec((Someone("victory", "left", "palm"),), "close-up", "street"),
    "hands": Spec((Someone("fist", "both", "palm"),), "close-up", "street"),
    "a smiling woman in a striped shirt giving a thumbs up in a garden": Spec((SMILING,), "half body", "garden"),
    "close-up of two hands, palms up": Spec((Someone("open_hand", "both", "up"),), "close-up", "wall"),
    "peace sign": Spec((Someone("victory", "right", "palm"),), "bust", "night"),
    "a man giving a thumbs up": Spec((replace(SMILING, person="man"),), "bust", "office"),
    "OK sign": Spec((Someone("ok_sign", "right", "palm"),), "close-up", "office"),
    "a woman making a heart with her hands": Spec((Someone("heart", "both", person="woman"),), "bust", "garden"),
    "clapping": Spec((Someone("clapping", "both"),), "half body", "office"),
    "a person with arms crossed": Spec((Someone("arms_crossed", "both"),), "half body", "office"),
    "fist": Spec((Someone("fist", "left", "back"),), "close-up", "gradient"),
    "two people waving": Spec((Someone("waving", "left"), Someone("waving", "left")), "half body", "beach"),
    "a hand pointing": Spec((Someone("pointing", "left", "palm"),), "close-up", "office"),
    "holding up three fingers": Spec((Someone("three_fingers", "left", "palm"),), "bust", "office"),
    "open palm": Spec((Someone("open_hand", "left", "palm"),), "close-up", "room"),
    "an old man's hand making a fist": Spec((Someone("fist", "left", person="man", age="old"),), "close-up", "room"),
}


@pytest.mark.parametrize("prompt", EXPRESSED)
def test_prompts_of_newcomers_can_be_written(prompt):
    spec = EXPRESSED[prompt]
    assert says(spec, prompt)
    shrugging = Spec((Someone("shrug", "both", person="man", shirt="blue"),), "half body", "night")
    assert not says(shrugging, prompt)
    if len(prompt.split()) <= 3:  # words that training shows often
        rng = np.random.default_rng(0)
        texts = [write_caption(spec, rng, brief=1.0).lower().rstrip(".") for _ in range(400)]
        assert texts.count(prompt.lower()) >= 4


def test_what_needs_two_people_or_a_thing_is_not_said_of_others():
    for framing in FRAMINGS:
        for name in (*GESTURES, *(CLOSE if framing == "close-up" else POSES)):
            for side in ("left", "both"):
                spec = Spec((Someone(name, side, person="woman"),), framing, "room")
                assert not any(says(spec, prompt) for prompt in CONTACT), name


def test_captions_say_what_a_picture_shows_in_many_wordings():
    spec = EXPRESSED["a smiling woman in a striped shirt giving a thumbs up in a garden"]
    spec = replace(spec, people=(replace(SMILING, age="young", hair="brown", haircut="long"),))
    rng = np.random.default_rng(0)
    texts = [write_caption(spec, rng) for _ in range(400)]
    assert len(set(texts)) > 330 and all(says(spec, text) for text in texts)
    for word, low, high in (("striped", 0.2, 0.7), ("garden", 0.05, 0.4), ("young", 0.4, 0.8), ("thumb", 0.98, 1.01),
                            ("left", -1, 0.0), ("right", 0.05, 0.6), ("hair", 0.02, 0.4)):  # fmt: skip
        share = np.mean([word in text.lower() for text in texts])
        assert low <= share <= high, (word, share)
    whole = [write_caption(spec, rng, 0.0, 0.0) for _ in range(40)]
    assert all("smiling" in t.lower() or "happy" in t.lower() or "friendly" in t.lower() for t in whole)
    assert not any("  " in t or " ," in t or t.endswith(",") for t in texts)


def test_wide_sleeves_are_said():
    one = Someone("thumbs_up", "right", person="woman", shirt="red", cuff="kimono", sleeve="long", neck="v")
    spec = Spec((one,), "half body", "room")
    for text in (
        "a woman in a red kimono giving a thumbs up",
        "a woman wearing a red robe with wide sleeves giving a thumbs up in a room",
        "a woman in a wide-sleeved kimono giving a thumbs up",
    ):
        assert says(spec, text), text
        assert not says(replace(spec, people=(replace(one, cuff=""),)), text), text
    bell = replace(spec, people=(replace(one, cuff="bell"),))
    assert says(bell, "a woman in a blouse with bell sleeves giving a thumbs up")
    assert not says(bell, "a woman in a red kimono giving a thumbs up")
    texts = [write_caption(bell, np.random.default_rng(i), 0.1, 0.0) for i in range(60)]
    assert all(says(bell, text) for text in texts) and sum("sleeve" in text for text in texts) > 10
    assert labels_of(bell)["cuff"] == "bell"


def test_two_people_are_told_apart_by_place():
    spec = Spec((Someone("fist", "left", person="man"), Someone("waving", "right", person="woman")), "bust", "beach")
    assert says(spec, "two people, the one on the left making a fist, the one on the right waving")
    assert not says(spec, "two people, the one on the left waving, the one on the right making a fist")
    assert says(spec, "a woman waving next to a man making a fist on the beach")
    assert not says(spec, "two people waving") and not says(spec, "two men, one making a fist, the other waving")


# --- scenes ---


@pytest.mark.slow
def test_named_hands_are_in_the_picture_and_seen(scenes):
    names = Counter()
    for scene, prompts in scenes:
        shares, _ = seen_shares([pose.vertices for pose in scene.poses], scene.camera)
        for i, (one, pose) in enumerate(zip(scene.spec.people, scene.poses, strict=True)):
            for side in {"left": (LEFT,), "right": (RIGHT,), "both": (LEFT, RIGHT)}[one.side]:
                places = in_picture(pose.joints[list(HAND_JOINTS[side])], scene.camera)
                assert places.min() > 0 and places.max() < 1
                assert one.gesture in ("arms_crossed", "hands_on_hips") or (
                    scene.present[i, side] and shares[i, side] >= 0.3
                )
        assert len(prompts) == 4 and all(says(scene.spec, text) for text in prompts)
        assert not any(map(is_held_out, prompts)) and not is_held_out_spec(scene.spec)
        names[scene.spec.framing] += 1
        labels = labels_of(scene.spec)
        assert labels["framing"] in EVERY_FRAMING and labels["background"] in PLACES
        assert all(isinstance(value, str) and value for value in labels.values())
    assert names["close-up"] + names["bust"] >= 0.55 * len(scenes) and len(names) == 3


def test_scenes_repeat_and_are_kept_apart(scenes):
    scene, prompts = scenes[5]
    again, same = scene_of(SEED, 5)
    assert same == prompts and again.spec == scene.spec and again.looks == scene.looks
    assert (again.poses[0].vertices == scene.poses[0].vertices).all() and again.camera == scene.camera
    for number in range(3):
        kept, _ = scene_of(SEED, number, held_out=True)
        assert is_held_out_spec(kept.spec)


def test_another_hand_before_a_hand_hides_it():
    scene = next(s for s in (sample_scene(np.random.default_rng(i), framing="close-up") for i in range(20))
                 if s.spec.people[0].side == "left" and s.spec.people[0].gesture in GESTURES)  # fmt: skip
    vertices = scene.poses[0].vertices
    assert seen_shares([vertices], scene.camera)[0][0, LEFT] > 0.6
    behind, _ = seen_shares([vertices, vertices + np.float32([0, 0, 0.5])], scene.camera)
    assert behind[0, LEFT] < 0.2 and behind[1, LEFT] > 0.6


def test_colours_have_names():
    for colour, name in (
        ((0.9, 0.1, 0.1), "red"),
        ((0.1, 0.15, 0.5), "blue"),
        ((0.5, 0.5, 0.5), "grey"),
        ((0.06, 0.06, 0.07), "black"),
        ((0.97, 0.97, 0.97), "white"),
        ((0.1, 0.4, 0.15), "green"),
    ):
        assert name_of(np.array(colour)) == name  # fmt: skip


# --- datasets ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("people") / "world"
    arguments = ["demo", str(path), "--world", "human", "--scenes", "8", "--size", "64", "--seed", str(SEED)]
    result = CliRunner().invoke(commands, [*arguments, "--processes", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    return path


def test_a_dataset_of_people_passes_its_check(folder):
    report = check(folder, SMPLH.load(folder / "body.npz"))
    assert report.problems == [] and report.counts["samples"] == report.counts["pictures"] == 8
    result = CliRunner().invoke(commands, ["check", str(folder)])
    assert result.exit_code == 0, result.output
    page = folder.parent / "page.html"
    result = CliRunner().invoke(commands, ["look", str(folder), "--output", str(page), "--shown", "3"])
    assert result.exit_code == 0 and page.stat().st_size > 5000
    for sample in read(folder):
        hands = [person(sample.hands, i) for i in range(sample.people)]
        joints, said = joints_in_picture(hands, [1.0] * len(hands), human_body())
        for one, places, seen in zip(hands, joints, said, strict=True):
            assert (seen == (one["visibility"] > 0.5)).all()
            assert np.abs(places - one["joints_2d"])[seen].max(initial=0) < 0.004
        assert picture(sample).shape == (64, 64, 3) and sample.meta["labels"]["framing"] in FRAMINGS


def test_two_people_are_a_sample_with_two(monkeypatch):
    monkeypatch.setattr("handiffuser.demo.human_scenes.TWO_PEOPLE", 1.0)
    rng = np.random.default_rng(1)
    scene = sample_scene(rng, framing="half body")
    sample = sample_of(scene, ["two people"], "human-1", 48)
    assert sample.people == 2 and sample.hands["joints_2d"].shape == (2, 2, 21, 2)
    first, second = (sample.hands["joints_2d"][i, ..., 0].mean() for i in range(2))
    assert first < second  # left to right
    hands = [person(sample.hands, i) for i in range(2)]
    joints, said = joints_in_picture(hands, [1.0] * 2, human_body())
    assert np.abs(joints - sample.hands["joints_2d"])[said].max() < 0.004
    assert labels_of(scene.spec)["second gesture"] == scene.spec.people[1].gesture


@pytest.mark.slow
def test_it_goes_on_where_it_stopped_with_the_same_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD", 4)
    make = partial(dataset.make, world="human", size=64, seed=SEED, processes=1)
    make(tmp_path, 4)
    first = (tmp_path / "00000.tar").read_bytes()
    make(tmp_path, 8)
    assert (tmp_path / "00000.tar").read_bytes() == first
    ours = [(s.key, s.prompts, s.image) for s in read(tmp_path)]
    assert ours == [(s.key, s.prompts, s.image) for s in read(folder)]
    assert (tmp_path / "body.npz").read_bytes() == (folder / "body.npz").read_bytes()
    with pytest.raises(DatasetError, match="this dataset"):
        dataset.make(tmp_path, 4, world="hands", size=64, seed=SEED, processes=1)
    hands = tmp_path / "hands"
    dataset.make(hands, 2, size=32, processes=1)
    with pytest.raises(DatasetError, match="this dataset"):
        make(hands, 4)
    assert not (hands / "body.npz").exists()  # it would be another body's
    assert torch.get_num_threads() == 1
