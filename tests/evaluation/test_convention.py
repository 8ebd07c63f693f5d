"""Joints in the detector's convention: constant offsets in the bones' frames, mirrored for right hands."""

from __future__ import annotations

import numpy as np
import pytest
from handiffuser.data.samples import read
from handiffuser.demo import human_skin
from handiffuser.demo.dataset import make
from handiffuser.demo.human import human_body
from handiffuser.demo.human_dataset import sample_of, scene_of
from handiffuser.detection.convention import BONES, bone_frames, in_convention, mediapipe
from handiffuser.detection.detect import Found
from handiffuser.evaluation import pictures
from handiffuser.evaluation.hands import match
from handiffuser.evaluation.measure import NAMES, SHARES, Seen, columns
from handiffuser.kinematics import world
from handiffuser.models.smplh import HAND_JOINTS

FLIP = np.array([-1.0, 1, 1])


@pytest.fixture(scope="module")
def sample():
    sizes = human_skin.HAND_SIZE, human_skin.HEAD_SIZE
    human_skin.textures.cache_clear()
    human_skin.HAND_SIZE, human_skin.HEAD_SIZE = 128, 64
    scene, captions = next(
        found for found in (scene_of(5, i) for i in range(40)) if found[0].present.all() and len(found[0].poses) == 1
    )
    made = sample_of(scene, captions, "human-5", 64)
    human_skin.HAND_SIZE, human_skin.HEAD_SIZE = sizes
    human_skin.textures.cache_clear()
    return made


def test_the_offsets_are_those_of_a_hand():
    table = mediapipe().offsets
    assert table.shape == (21, 3) and np.abs(table).max() < 0.25
    assert table[0, 0] > 0.08  # the wrist lies nearer to the fingers
    assert (table[[5, 9, 13, 17], 1] < 0.01).all()  # knuckles lie nearer to the palm
    assert (table[[8, 12, 16, 20], 0] < 0.03).all()  # finger ends reach no farther


def test_right_hands_are_mirror_images():
    mask = np.array([[1.0, -1, -1], [-1, 1, 1], [-1, 1, 1]])
    rng = np.random.default_rng(0)
    turns = np.linalg.qr(rng.normal(size=(52, 3, 3)))[0]
    turns[list(BONES[1])] = turns[list(BONES[0])] * mask
    left = rng.normal(size=(21, 3))
    joints = np.stack([left, left * FLIP])
    moved = in_convention(joints, turns, mediapipe().offsets)
    assert np.allclose(moved[1], moved[0] * FLIP) and np.abs(moved - joints).max() > 0.01
    assert bone_frames(turns, 0).shape == (21, 3, 3)


def test_turns_follow_the_tree():
    quarter = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    rotations = np.tile(np.eye(3), (52, 1, 1))
    rotations[18] = quarter  # the left elbow turns hand and fingers
    turns = world(rotations)
    assert (turns[[18, 20, 22, 36]] == quarter).all() and (turns[[16, 19, 21, 37]] == np.eye(3)).all()


def test_marks_lie_on_the_hand_and_do_not_depend_on_the_body(sample):
    joints = sample.hands["joints_2d"]
    marks = pictures.marks_in(sample.hands, joints, 1.0, human_body())
    size = np.ptp(joints, axis=1).max(-1)[:, None]
    apart = np.linalg.norm(marks - joints, axis=-1) / size
    assert 0.01 < apart.mean() < 0.12 and apart.max() < 0.3
    other = pictures._load_body(pictures.shipped.body_path())
    assert np.abs(pictures.marks_in(sample.hands, joints, 1.0, other) - marks).max() < 0.03 * size.max()
    wide = pictures.marks_in(sample.hands, joints / (2, 1), 2.0, human_body())
    assert np.allclose(wide * (2, 1), marks, atol=1e-6)


def test_a_detector_that_sees_the_marks_is_right_by_its_own_convention(sample):
    asked = pictures.asked_hands(sample, pictures.picture(sample), None)
    assert [hand.side for hand in asked] == ["left", "right"] and all(hand.marks is not None for hand in asked)
    hands = match(asked, [Found(hand.side, 0.9, hand.marks) for hand in asked], (64, 64, 3))
    seen = Seen(keys=["a"], hands=hands, owners=[0, 0], extra=[0], asked=2)
    found = {name: values.mean() for name, (values, _) in columns(seen).items()}
    assert found["pck_5_marks"] == found["pck_10_marks"] == 1 and 0.3 < found["pck_5"] < 0.95
    assert {"pck_5_marks", "pck_10_marks"} <= NAMES.keys() & set(SHARES)
    missed = columns(Seen(keys=["a"], hands=match(asked, [], (64, 64, 3)), owners=[0, 0], extra=[0], asked=2))
    assert missed["pck_10_marks"][0].tolist() == [0, 0]


def test_samples_of_todays_demo_have_marks(tmp_path):
    make(tmp_path, 2, size=32, processes=1)
    for sample in read(tmp_path):
        for hand in pictures.asked_hands(sample, pictures.picture(sample), None):
            assert hand.marks is not None and hand.marks.shape == (21, 2)
            assert 0.005 < np.abs(hand.marks - hand.joints).mean() < 0.1
    assert len(HAND_JOINTS[0]) == 21
