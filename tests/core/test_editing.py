"""Edited hands: fingers follow a drag within their limits, and everything else stays."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from handiffuser import HanDiffuser, Request, RequestError
from handiffuser.contract import HAND_JOINTS
from handiffuser.editing import Drag, Pose, edit, mirrored, moved, swapped
from handiffuser.fingers import SIDES, axes, gestures
from handiffuser.hands import POSES, save_hands
from handiffuser.kinematics import PARENTS

pytest.importorskip("fastapi")
from handiffuser.serving.fields import HandsField, as_json

PROMPTS = {"right": "a right hand with spread fingers", "left": "a left hand making a fist", "both": "two open hands"}


@pytest.fixture(scope="module")
def pipeline():
    return HanDiffuser.load("demo", device="cpu", threads=1)


@pytest.fixture(scope="module")
def made(pipeline):
    requests, _ = pipeline.prepare([Request(prompt, seed=1) for prompt in PROMPTS.values()])
    return dict(zip(PROMPTS, pipeline.hands(requests), strict=True))


def again(pipeline, hands, tmp_path):
    """The engine's hands for edited ones."""
    save_hands(tmp_path / "a.npz", {name: np.asarray(value, np.float32) for name, value in hands.items()})
    requests, _ = pipeline.prepare([Request("a", hands=str(tmp_path / "a.npz"))])
    return pipeline.hands(requests)[0]


def test_the_tree_is_that_of_smplh():
    from handiffuser.models import smplh

    assert list(PARENTS[:52]) == list(smplh.PARENTS)
    for hand in HAND_JOINTS:
        for finger in range(5):
            chain = hand[1 + 4 * finger : 5 + 4 * finger]
            assert PARENTS[chain[0]] == hand[0] and all(PARENTS[b] == a for a, b in pairwise(chain))


def test_kinematics_reproduce_the_joints(made):
    for hands in made.values():
        pose = Pose(hands)
        np.testing.assert_allclose(pose.joints(), hands["joints"], atol=1e-6)
        np.testing.assert_allclose(pose.seen(pose.joints()[np.array(HAND_JOINTS)]), hands["joints_2d"], atol=1e-5)
        unchanged = edit(hands)
        for name in POSES:
            np.testing.assert_allclose(unchanged[name], hands[name], atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("finger", range(5))
@pytest.mark.parametrize("shorter", [0.6, 0.85])
def test_a_dragged_tip_reaches_its_target(pipeline, made, tmp_path, side, finger, shorter):
    hands, s, joint = made["both"], SIDES.index(side), 4 + 4 * finger
    root, tip = hands["joints_2d"][s, joint - 3], hands["joints_2d"][s, joint]
    to = root + shorter * (tip - root)
    new = edit(hands, [Drag(side, joint, *to)])
    length = np.linalg.norm(tip - root)
    assert np.linalg.norm(new["joints_2d"][s, joint] - to) < 0.06 * length
    others = np.ones((2, 21), bool)
    others[s, joint - 2 : joint + 1] = False
    np.testing.assert_allclose(new["joints_2d"][others], hands["joints_2d"][others], atol=1e-6)
    # The engine gives the same joints and the same camera.
    painted = again(pipeline, new, tmp_path)
    np.testing.assert_allclose(painted["joints_2d"], new["joints_2d"], atol=0.02)
    np.testing.assert_allclose(painted["camera"], hands["camera"], atol=0.02)


def test_fingers_stay_within_their_limits(made):
    """Random drags keep every angle within its limits and every value finite."""
    random = np.random.default_rng(0)
    for hands in made.values():
        for _ in range(6):
            side, joint = int(random.integers(2)), int(random.integers(1, 21))
            x, y = random.uniform(-0.5, 1.5, 2)
            new = edit(hands, [Drag(SIDES[side], joint, x, y)])
            assert all(np.isfinite(value).all() for value in new.values())
            before, after = Pose(hands), Pose(new)
            finger = (joint - 1) // 4
            for i, joint_id in enumerate(HAND_JOINTS[side][1 + 4 * finger : 4 + 4 * finger]):
                if finger == 0:
                    continue
                turning = axes(after.rest[list(HAND_JOINTS[side])], side)[finger, i]
                bends = []
                for pose in (before, after):
                    from handiffuser.rotations import matrix_to_axis_angle

                    bends.append(np.degrees(turning @ matrix_to_axis_angle(pose.local[[joint_id]])[0]))
                low, high = ((-30, 95), (-8, 115), (-12, 90))[i]
                assert min(low, bends[0][0]) - 1 <= bends[1][0] <= max(high, bends[0][0]) + 1


def test_the_wrist_moves_the_whole_hand(made):
    hands = made["right"]
    new = edit(hands, [Drag("right", 0, 0.5, 0.6)])
    np.testing.assert_allclose(new["joints_2d"][1, 0], [0.5, 0.6], atol=1e-6)
    moved = new["joints_2d"][1] - hands["joints_2d"][1]
    np.testing.assert_allclose(moved, np.broadcast_to(moved[0], moved.shape), atol=1e-6)


def test_gestures(made):
    for side in SIDES:
        new = edit(made["both"], gesture=(side, "fist"))
        pose = new[f"{side}_hand_pose"].reshape(15, 3)
        flip = 1 if side == "left" else np.array([1, -1, -1])
        np.testing.assert_allclose(pose, gestures()["fist"].reshape(15, 3) * flip, atol=1e-4)
    with pytest.raises(RequestError, match=r"gesture.name must be one of fist, .*, got 'wave'"):
        edit(made["both"], gesture=("left", "wave"))


def test_gestures_match_the_demo():
    from handiffuser.demo.gestures import GESTURES, pose
    from handiffuser.rotations import axis_angle_to_matrix

    for name, vectors in gestures().items():
        if name in GESTURES:
            np.testing.assert_allclose(axis_angle_to_matrix(vectors.reshape(15, 3)), pose(name), atol=1e-3)
    assert len(gestures()) >= 24


def test_mirror_and_swap(pipeline, made, tmp_path):
    for hands in made.values():
        new = mirrored(hands)
        np.testing.assert_allclose(new["joints_2d"][0, :, 0], 1 - hands["joints_2d"][1, :, 0], atol=1e-6)
        painted = again(pipeline, new, tmp_path)
        for side in range(2):
            if new["visibility"][side] > 0.5:
                np.testing.assert_allclose(painted["joints_2d"][side], new["joints_2d"][side], atol=0.05)
        twice = mirrored(new)
        for name in hands.keys() & twice.keys():
            np.testing.assert_allclose(twice[name], hands[name], atol=1e-6, err_msg=name)
    changed = edit(made["both"], gesture=("left", "fist"))
    new = swapped(changed)
    np.testing.assert_allclose(
        new["right_hand_pose"].reshape(15, 3), changed["left_hand_pose"].reshape(15, 3) * [1, -1, -1], atol=1e-5
    )
    np.testing.assert_allclose(new["joints_2d"][:, 0], changed["joints_2d"][:, 0], atol=1e-6)


def test_json_keeps_every_number(made):
    for hands in made.values():
        small = {name: value for name, value in hands.items() if name not in ("params", "vertices")}
        arrays = HandsField.model_validate(as_json(small)).arrays()
        assert arrays.keys() == small.keys()
        for name, value in small.items():
            assert (arrays[name] == value).all(), name


def test_without_torch():
    code = (
        "import sys, handiffuser.serving.app, handiffuser.serving.cli, handiffuser.editing\n"
        "handiffuser.editing.gestures(); assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_hands_move_around_their_middle(made, pipeline, tmp_path):
    shown = {**made["right"], "visibility": np.array([0.0, 1.0])}
    middle, size = Pose(shown).middle(), np.ptp(shown["joints_2d"][1], axis=0)
    for change in ({"scale": 1.5}, {"turn": 40.0}, {"over": True}, {"scale": 0.5, "turn": -90.0, "over": True}):
        out = moved(shown, **change)
        assert np.allclose(out["joints_2d"][1].mean(0), middle, atol=1e-4), change
        assert np.allclose(Pose(out).seen(Pose(out).joints()[list(HAND_JOINTS[1])]), out["joints_2d"][1], atol=1e-4)
    assert np.allclose(np.ptp(moved(shown, scale=2.0)["joints_2d"][1], axis=0), 2 * size, rtol=1e-3)
    painted = again(pipeline, moved(shown, scale=0.8, turn=30.0), tmp_path)  # the engine agrees
    assert np.allclose(painted["joints_2d"][1], moved(shown, scale=0.8, turn=30.0)["joints_2d"][1], atol=5e-3)
    back = moved(moved(shown, turn=70.0, scale=1.2), turn=-70.0, scale=1 / 1.2)
    assert np.allclose(back["joints_2d"], shown["joints_2d"], atol=1e-4)
    flipped = moved(shown, flip=True)
    assert flipped["visibility"].tolist() == [1, 0]
    assert np.allclose(flipped["joints_2d"][0].mean(0), middle, atol=1e-4)
    right = moved(shown, turn=90.0)["joints_2d"][1]  # clockwise: what was above the middle is to its right
    was = shown["joints_2d"][1] - middle
    assert np.allclose((right - middle)[:, 0], -was[:, 1], atol=2e-3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda hands: edit(hands, [Drag("Left", 8, 0.5, 0.5)]), "drags.hand must be left or right, got 'Left'"),
        (lambda hands: edit(hands, [Drag("left", 21, 0.5, 0.5)]), "drags.joint must be a whole number from 0 to 20"),
        (lambda hands: edit(hands, [Drag("left", 8, np.nan, 0.5)]), "drags.x must be a number from -1 to 2 .* got nan"),
        (lambda hands: edit(hands, gesture=("both", "fist")), "gesture.hand must be left or right, got 'both'"),
        (lambda hands: edit(hands, gesture=("left", "fists")), "gesture.name must be one of fist"),
        (lambda hands: moved(hands, 0), "scale must be a number from 0.05 to 20, got 0"),
        (lambda hands: moved(hands, turn=np.inf), "turn must be a number from -360 to 360 degrees, got inf"),
        (lambda hands: swapped({**hands, "joints": None}), r"hands.joints must be finite numbers \[62, 3\]"),
        (
            lambda hands: mirrored({**hands, "camera": hands["camera"][:2]}),
            r"hands.camera must be finite numbers \[3\]",
        ),
        (lambda hands: edit({"camera": hands["camera"]}), "hands.global_orient must be given"),
        (lambda hands: mirrored({}), "hands must hold arrays, got none"),
        (lambda hands: mirrored([hands]), "hands must be a dictionary of arrays, got list"),
    ],
)
def test_wrong_values_are_sentences(made, call, said):
    with pytest.raises(RequestError, match=said):
        call(made["both"])


def test_hands_of_a_picture_go_straight_into_the_next_one(pipeline, made):
    """As a dictionary, as in a file; and the ids tell other hands apart."""
    hands = made["left"]
    requests, refused = pipeline.prepare([Request("a", hands=hands), Request("a", hands=mirrored(hands))], seed=1)
    assert not refused and requests[0].id != requests[1].id and "sha256" in requests[0].said()["hands"]
    again = pipeline.hands(requests[:1])[0]
    np.testing.assert_allclose(again["joints_2d"][0], hands["joints_2d"][0], atol=0.01)
    for wrong, said in ((7, "got int"), ({}, "got none"), ({**hands, "betas": np.full(10, np.nan)}, "hands.betas")):
        with pytest.raises(RequestError, match=said):
            Request("a", hands=wrong)
    _, refused = pipeline.prepare([Request("a", hands={**hands, "betas": np.full(10, 99.0)})])
    assert "betas must be at most 20 in magnitude, got 99 in the dictionary of hands" in refused[0].sentence
