"""Converters, on cases that can be said in a sentence: what points along x there points along x here."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from commands import run_command
from handiffuser.data.convert import FORMATS, full_camera, matrix, one_hand, upright, vector
from handiffuser.data.samples import Bad, Sample, read
from handiffuser.demo.render import demo_body
from handiffuser.runtime.hands import axis_angle_to_matrix
from PIL import Image

QUARTER = np.pi / 2
X, Y, Z = np.eye(3)


def posed(hands):
    """Joints [62, 3] of a sample's arrays on the demo's body."""
    names = ("global_orient", "body_pose", "left_hand_pose", "right_hand_pose")
    vectors = np.concatenate([hands[name] for name in names])
    rotations = torch.from_numpy(axis_angle_to_matrix(vectors.reshape(52, 3).astype(float))).float()[None]
    return demo_body()(rotations, torch.from_numpy(hands["betas"])[None].float())[1][0].numpy()


def pointing(hands, side):
    """Where the middle finger of a hand points, a unit vector; and where its palm looks, as far as the thumb tells."""
    joints = posed(hands)
    wrist, knuckle, thumb = ((20, 25, 34), (21, 40, 49))[side == "right"]
    along = joints[knuckle] - joints[wrist]
    return along / np.linalg.norm(along), joints[thumb] - joints[wrist]


def write_amass(folder, orient=(0, 0, 0), frames=3, **changes):
    folder.mkdir(exist_ok=True)
    poses = np.zeros((frames, 156))
    poses[:, :3] = orient
    for joint, value in changes.items():
        at = int(joint[1:]) * 3
        poses[:, at : at + 3] = value
    np.savez(folder / "walk.npz", poses=poses, betas=np.arange(16) / 10, trans=np.zeros((frames, 3)))
    (folder / "walk.txt").write_text("a person waves#a/DET person/NOUN#0.0#0.0\n\n")
    return folder


def test_amass_z_is_up(tmp_path):
    """A body that stands upright in AMASS's world, where z is up, stands upright here, where y is."""
    source = write_amass(tmp_path / "amass", orient=QUARTER * X)  # SMPL's y-up rest pose, stood up along z
    (first, *_) = FORMATS["amass"](source, source, 1)
    assert isinstance(first, Sample) and first.prompts == ["a person waves"]
    np.testing.assert_allclose(first.hands["global_orient"], 0, atol=1e-6)
    joints = posed(first.hands)
    assert joints[15, 1] > joints[0, 1] + 0.3, "the head is above the hips"
    np.testing.assert_allclose(first.hands["betas"], np.arange(10) / 10, atol=1e-6)
    np.testing.assert_allclose(pointing(first.hands, "left")[0], X, atol=0.1)  # arms are spread: left along +x
    np.testing.assert_allclose(pointing(first.hands, "right")[0], -X, atol=0.1)


def test_amass_hands_keep_their_sides(tmp_path):
    """Joint 22 is the left hand's first (index), joint 37 the right hand's."""
    source = write_amass(tmp_path / "amass", j22=(0.1, 0.2, 0.3), j37=(0.4, 0.5, 0.6), j20=(0, 0, QUARTER))
    samples = list(FORMATS["amass"](source, source, 2))
    assert [sample.key for sample in samples] == ["walk-000000", "walk-000002"]
    hands = samples[0].hands
    np.testing.assert_allclose(hands["left_hand_pose"][:3], (0.1, 0.2, 0.3), atol=1e-6)
    np.testing.assert_allclose(hands["right_hand_pose"][:3], (0.4, 0.5, 0.6), atol=1e-6)
    np.testing.assert_allclose(hands["body_pose"][57:60], (0, 0, QUARTER), atol=1e-6)


def test_motion_x_slices(tmp_path):
    frames = np.arange(2 * 322, dtype=np.float32).reshape(2, 322) / 1e4
    (tmp_path / "x").mkdir()
    np.save(tmp_path / "x" / "dance.npy", frames)
    (tmp_path / "x" / "dance.txt").write_text("a woman dances\n")
    first, second = FORMATS["motion-x"](tmp_path / "x", tmp_path / "x", 1)
    for row, sample in enumerate((first, second)):
        hands = sample.hands
        np.testing.assert_allclose(hands["global_orient"], frames[row, :3])
        np.testing.assert_allclose(hands["body_pose"], frames[row, 3:66])
        np.testing.assert_allclose(hands["left_hand_pose"], frames[row, 66:111])
        np.testing.assert_allclose(hands["right_hand_pose"], frames[row, 111:156])
        assert not hands["betas"].any(), "of another shape space"


def test_what_is_wrong_is_named_and_the_rest_goes_on(tmp_path):
    source = write_amass(tmp_path / "amass")
    (source / "broken.npz").write_bytes(b"PK no archive")
    np.savez(source / "short.npz", poses=np.zeros((2, 72)), betas=np.zeros(10))
    np.savez(source / "silent.npz", poses=np.zeros((2, 156)), betas=np.zeros(10))
    made = list(FORMATS["amass"](source, source, 1))
    assert sum(isinstance(one, Sample) for one in made) == 3
    assert {one.key: one.sentence for one in made if isinstance(one, Bad)}.keys() == {"broken", "short", "silent"}
    result = run_command("data.cli", "convert", "amass", source, tmp_path / "out", "--every", 1)
    assert result.returncode == 1 and "short.npz" in result.stdout and "no caption" in result.stdout, result.stderr
    assert len([one for one in read(tmp_path / "out") if isinstance(one, Sample)]) == 3


def test_turns_of_the_world():
    np.testing.assert_allclose(upright(np.zeros(3), "z"), -QUARTER * X, atol=1e-6)
    np.testing.assert_allclose(upright(np.array([0.1, 0.2, 0.3]), "y"), [0.1, 0.2, 0.3], atol=1e-6)


@pytest.mark.parametrize("right", [True, False])
def test_a_hand_that_points_up_in_the_picture_points_up(right):
    """HaMeR's frame: x right, y down, z away. MANO's right hand at rest points along -x, so turned by +90 degrees about
    z (y down!) it points up; a left hand is estimated on the mirrored picture, in which up is up, too."""
    turn, _ = one_hand(matrix(QUARTER * Z), np.tile(np.eye(3), (15, 1, 1)), right)
    rest = -X if right else X
    np.testing.assert_allclose(turn @ rest, Y, atol=1e-6)


def test_a_hand_that_points_along_x_points_along_x():
    """Pointing right in the picture: a right hand turned by 180 degrees, a left one as it is."""
    turn, _ = one_hand(matrix(np.pi * Z), np.tile(np.eye(3), (15, 1, 1)), True)
    np.testing.assert_allclose(turn @ -X, X, atol=1e-6)
    turn, _ = one_hand(matrix(np.pi * Z), np.tile(np.eye(3), (15, 1, 1)), False)  # its mirror image points left
    np.testing.assert_allclose(turn @ X, -X, atol=1e-6)


def test_a_left_hand_is_its_mirror_image():
    fingers = np.stack([matrix(np.array([0.1, 0.2, 0.3]) * i / 15) for i in range(15)])
    _, right = one_hand(np.eye(3), fingers, True)
    _, left = one_hand(np.eye(3), fingers, False)
    np.testing.assert_allclose(left.reshape(15, 3), right.reshape(15, 3) * [1, -1, -1], atol=1e-6)


@pytest.mark.parametrize("right", [True, False])
def test_the_crop_camera_in_the_whole_picture(right):
    """A point is seen at the same pixel through the crop's camera and through ours."""
    picture, centre, size, crop = (480, 640), np.array([400.0, 100.0]), 200.0, np.array([0.8, 0.1, -0.2])
    point = np.array([0.05, 0.03])  # metres, x right, y down, as estimated
    seen = crop[0] * (point + crop[1:])
    pixel = centre + seen * size / 2 * ([1, 1] if right else [-1, 1])  # the crop of a left hand was mirrored
    ours = full_camera(crop, centre, size, picture, right)
    here = point * ([1, -1] if right else [-1, -1])  # y up; mirrored back
    view = ours[0] * (here + ours[1:])
    np.testing.assert_allclose([640 / 2 + view[0] * 480 / 2, 480 / 2 - view[1] * 480 / 2], pixel, atol=1e-3)


def test_estimates_beside_a_picture(tmp_path):
    """The wrist becomes local, the hand is where its crop was, and the whole runs through the dataset."""
    source = tmp_path / "photos"
    source.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (640, 480)).save(buffer, "JPEG")
    (source / "one.jpg").write_bytes(buffer.getvalue())
    hand = {
        "is_right": 1,
        "global_orient": matrix(QUARTER * Z).tolist(),
        "hand_pose": np.tile(np.eye(3), (15, 1, 1)).tolist(),
        "betas": [0.0] * 10,
        "pred_cam": [1.0, 0.0, 0.0],
        "box_center": [480, 240],
        "box_size": 240,
    }
    (source / "one.json").write_text(json.dumps({"hands": [hand], "prompt": "a raised hand"}))
    (source / "none.json").write_text(json.dumps({"hands": [], "prompt": "nobody"}))
    (source / "none.jpg").write_bytes(buffer.getvalue())
    (source / "lost.json").write_text(json.dumps({"hands": [], "prompt": "no picture"}))
    made = {one.key: one for one in FORMATS["mano"](source, source, 1)}
    assert isinstance(made["lost"], Bad) and made["none"].hands is None
    hands = made["one"].hands
    assert hands["visibility"].tolist() == [0, 1]
    along, _ = pointing(hands, "right")
    np.testing.assert_allclose(along, Y, atol=0.1)
    joints, camera = posed(hands), hands["camera"]
    view = camera[0] * (joints[21, :2] + camera[1:])
    np.testing.assert_allclose(view, [(480 - 320) / 240, 0], atol=0.02)  # the wrist, at the crop's middle


def test_interhand(tmp_path):
    """The world's y axis points down there: a hand that points along -y points up here."""
    (tmp_path / "i").mkdir()
    right = {"pose": [*(QUARTER * Z).tolist(), *([0.1] * 45)], "shape": [0.5] * 10, "trans": [0, 0, 0]}
    value = {"0": {"12": {"right": right, "left": None}, "13": {"right": None, "left": None},
                   "14": {"right": {**right, "pose": [0] * 3}, "left": None}}}  # fmt: skip
    (tmp_path / "i" / "train.json").write_text(json.dumps(value))
    made = {one.key: one for one in FORMATS["interhand"](tmp_path / "i", tmp_path / "i", 1)}
    assert made["train-0-12"].prompts == ["a right hand"] and made["train-0-12"].hands["visibility"].tolist() == [0, 1]
    np.testing.assert_allclose(pointing(made["train-0-12"].hands, "right")[0], Y, atol=0.1)
    np.testing.assert_allclose(made["train-0-12"].hands["right_hand_pose"], 0.1, atol=1e-6)
    assert isinstance(made["train-0-13"], Bad) and isinstance(made["train-0-14"], Bad)
    np.testing.assert_allclose(vector(matrix(np.array([0.3, -0.2, 0.1]))), [0.3, -0.2, 0.1], atol=1e-6)
