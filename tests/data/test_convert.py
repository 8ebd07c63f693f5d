"""Converters on made cases whose answer is known: a hand that points along x points along x.

What HaMeR, InterHand2.6M or a motion capture would say of a hand is made here from the demo's body, by formulas of this
file's own, and must come back.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from annotations import SIZE, UPRIGHT, amass_file, convert, estimate, hamer, in_camera, standing, turn
from commands import invoke
from datasets import made_sample
from handiffuser.data.augment import flip_hands
from handiffuser.data.check import check_samples
from handiffuser.data.convert import FORMATS, Options
from handiffuser.data.hands import joints_at_rest, joints_in_picture
from handiffuser.data.samples import Bad, Sample, person, read, write_shards
from handiffuser.demo.render import demo_body
from handiffuser.detection.arms import LEFT, RIGHT, between
from handiffuser.detection.mano import mano_estimates
from handiffuser.errors import DatasetError
from handiffuser.hands import POSES
from handiffuser.models.smplh import HAND_JOINTS, LEFT_WRIST, RIGHT_WRIST, SMPLH
from handiffuser.rotations import axis_angle_to_matrix, matrix_to_axis_angle
from hypothesis import example, given
from hypothesis import strategies as st

X, Y, Z = np.eye(3)
TIP, WRIST = 12, 0  # the middle finger's tip, of 21 joints


@pytest.fixture(scope="module")
def body() -> SMPLH:
    return demo_body()


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """Degrees between two directions."""
    return float(np.degrees(np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))))


def posed(hands: dict[str, np.ndarray], body: SMPLH) -> tuple[np.ndarray, np.ndarray]:
    """A person's joints [62, 3] and the joints' orientations [52, 3, 3]."""
    vectors = np.concatenate([hands[name].reshape(-1, 3) for name in POSES]).astype(np.float64)
    rotations = torch.from_numpy(axis_angle_to_matrix(vectors)).float()[None]
    betas = torch.from_numpy(np.asarray(hands["betas"])).float()[None]
    turns, _, _ = body.kinematics(rotations, betas)
    return body(rotations, betas)[1][0].numpy(), turns[0].numpy()


def drawn(sample: Sample, body: SMPLH, aspect: float = 1.0) -> np.ndarray:
    """Joints in the picture [2, 21, 2] (y down), as training is told."""
    return joints_in_picture([sample.hands], [aspect], body)[0][0]


# --- motion capture ---


def test_amass_stands_upright_and_hands_along_x_point_along_x(tmp_path, body):
    amass_file(tmp_path / "CMU/01/walk_poses.npz", standing())
    (tmp_path / "CMU/01/walk_poses.txt").write_text("a person stands\nsomeone, arms out\n")
    (sample,) = convert("amass", tmp_path, body)
    assert sample.key == "CMU/01/walk_poses-000000" and sample.prompts == ["a person stands", "someone, arms out"]
    joints, _ = posed(sample.hands, body)
    assert angle(joints[15] - joints[0], Y) < 5  # the head is above the pelvis
    for side, direction in ((LEFT, X), (RIGHT, -X)):
        hand = joints[list(HAND_JOINTS[side])]
        assert angle(hand[TIP] - hand[WRIST], direction) < 5
    picture = drawn(sample, body)
    assert picture[LEFT, TIP, 0] > picture[LEFT, WRIST, 0] > 0.5 > picture[RIGHT, WRIST, 0] > picture[RIGHT, TIP, 0]
    assert picture.min() > 0 and picture.max() < 1


@pytest.mark.parametrize("yaw", [0.0, 1.0, -2.5, 3.1])
def test_a_person_turned_away_faces_the_camera(tmp_path, body, yaw):
    """The person turned about AMASS's vertical, z, looks the same."""
    poses = standing()
    poses[0, :3] = matrix_to_axis_angle((turn(0, 0, yaw) @ turn(np.pi / 2, 0, 0))[None])[0]
    amass_file(tmp_path / "a.npz", poses)
    (tmp_path / "a.txt").write_text("a person stands")
    (sample,) = convert("amass", tmp_path, body)
    assert np.allclose(sample.hands["global_orient"], 0, atol=1e-5)


def test_people_are_turned_by_a_random_angle_that_is_always_the_same(tmp_path, body):
    amass_file(tmp_path / "a.npz", standing(600))
    (tmp_path / "a.txt").write_text("a person stands")
    angles = [s.hands["global_orient"] for s in convert("amass", tmp_path, body, turn=30.0, every=0.5)]
    again = [s.hands["global_orient"] for s in convert("amass", tmp_path, body, turn=30.0, every=0.5)]
    assert np.array_equal(angles, again) and len(angles) == 20
    about_y = np.degrees(np.array(angles)[:, 1])
    assert np.abs(about_y).max() <= 30 and about_y.min() < -10 and about_y.max() > 10
    assert np.allclose(np.array(angles)[:, [0, 2]], 0, atol=1e-5)


def test_every_number_of_a_pose_is_where_it_belongs(tmp_path, body):
    poses = standing()
    poses[0, 3:] = np.linspace(-1, 1, 153)
    amass_file(tmp_path / "a.npz", poses, betas=np.linspace(0, 1.5, 16))
    (tmp_path / "a.txt").write_text("someone")
    (sample,) = convert("amass", tmp_path, body)
    found = np.concatenate([sample.hands[name] for name in ("body_pose", "left_hand_pose", "right_hand_pose")])
    assert np.allclose(found, poses[0, 3:], atol=1e-5)
    assert np.allclose(sample.hands["betas"], np.linspace(0, 1.5, 16)[:10])


def test_fingers_relative_to_a_mean_hand_get_it_added(tmp_path, body):
    rng = np.random.default_rng(0)
    left, right = rng.normal(0, 0.2, (2, 45))
    np.savez(tmp_path / "mean.npz", hands_meanl=left, hands_meanr=right)
    poses = standing()
    poses[0, 66:111], poses[0, 111:] = -left, 0.1
    amass_file(tmp_path / "set/a.npz", poses)
    (tmp_path / "set/a.txt").write_text("someone")
    (flat,) = convert("amass", tmp_path / "set", body)
    (sample,) = convert("amass", tmp_path / "set", body, hand_mean=tmp_path / "mean.npz")
    assert np.allclose(flat.hands["left_hand_pose"], -left, atol=1e-5)
    assert np.allclose(sample.hands["left_hand_pose"], 0, atol=1e-5)  # the flat hand
    assert np.allclose(sample.hands["right_hand_pose"], 0.1 + right, atol=1e-5)
    np.savez(tmp_path / "none.npz", a=left)
    with pytest.raises(DatasetError, match="hands_meanl and hands_meanr"):
        convert("amass", tmp_path / "set", body, hand_mean=tmp_path / "none.npz")


def test_humanml3ds_texts_go_to_their_frames(tmp_path, body):
    """Rows count at 20 frames a second; MPI_HDM05 is cut by three seconds first; captions may hold for a part."""
    poses = standing(60 * 12)
    poses[:, 66] = np.arange(len(poses)) / 1000  # says which frame it is
    amass_file(tmp_path / "amass/MPI_HDM05/bk/walk_poses.npz", poses)
    texts = tmp_path / "texts"
    (texts / "texts").mkdir(parents=True)
    (texts / "index.csv").write_text(
        "source_path,start_frame,end_frame,new_name\n"
        "./pose_data/MPI_HDM05/bk/walk_poses.npy,20,120,000007.npy\n"
        "./pose_data/humanact12/humanact12/x.npy,0,50,000008.npy\n"
        "./pose_data/MPI_HDM05/bk/gone_poses.npy,0,50,000009.npy\n"
    )
    (texts / "texts/000007.txt").write_text(
        "a person walks#a/DET person/NOUN walk/VERB#0.0#0.0\nhe waves#he/PRON wave/VERB#2.0#4.0\n"
    )
    (texts / "texts/000009.txt").write_text("x#x#0.0#0.0")
    *samples, other, bad = convert("amass", tmp_path / "amass", body, texts=texts, every=1.0)
    frames = [round(sample.hands["left_hand_pose"][0] * 1000) for sample in samples]
    assert frames == [60 * second for second in (4, 5, 6, 7, 8)]  # 3 of the cut, 1 of start_frame 20, to 3 + 6
    assert [sample.prompts for sample in samples] == [
        ["a person walks"], ["a person walks"], ["a person walks", "he waves"], ["a person walks", "he waves"],
        ["a person walks"],
    ]  # fmt: skip
    assert samples[0].meta["labels"] == {"fingers": "moving"}
    assert isinstance(bad, Bad) and "gone_poses.npz" in bad.sentence and "HumanAct12" in other.sentence


def test_frames_may_be_of_the_hands(tmp_path, body):
    poses = standing()
    poses[0, 3 + 3 * 15 + 2], poses[0, 3 + 3 * 16 + 2] = -1.2, 1.2  # arms down
    amass_file(tmp_path / "a.npz", poses)
    (tmp_path / "a.txt").write_text("someone")
    person_, hands = (drawn(convert("amass", tmp_path, body, frame=frame)[0], body) for frame in ("person", "hands"))
    assert np.ptp(hands.reshape(-1, 2), axis=0).max() == pytest.approx(0.9, abs=1e-3)
    assert np.ptp(person_.reshape(-1, 2), axis=0).max() < 0.7 and person_.max() < 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"poses": np.zeros((3, 72))}, "[N, 156], got [3, 72]"),
        ({"poses": np.zeros((0, 156))}, "[0, 156]"),
        ({"poses": np.full((2, 156), np.nan)}, "must be finite"),
        ({"betas": np.zeros(4)}, "10 betas and 1 to 1000 frames a second, got [4]"),
        ({"mocap_framerate": 0.0}, "and 0.0"),
        ({"poses": np.array([None])}, "must be an AMASS sequence"),
    ],
)
def test_a_wrong_sequence_is_named_and_the_rest_goes_on(tmp_path, body, change, words):
    amass_file(tmp_path / "a.npz", **{"poses": standing(), **change})
    amass_file(tmp_path / "b.npz", standing())
    amass_file(tmp_path / "c.npz", standing())
    (tmp_path / "d.npz").write_bytes(b"hello")
    for name in "abd":
        (tmp_path / f"{name}.txt").write_text("someone")
    a, b, c, d = convert("amass", tmp_path, body)
    assert isinstance(a, Bad) and words in a.sentence and a.key == "a", a
    assert isinstance(b, Sample) and "no caption" in c.sentence and "must be an AMASS sequence" in d.sentence


def test_motion_x_slots_are_where_they_belong(tmp_path, body):
    """322 numbers: root_orient 3, pose_body 63, pose_hand 90 (left, right), and what SMPL-H has not."""
    frame = np.concatenate([np.zeros(3), np.linspace(-1, 1, 153), np.full(166, 9.0)])
    np.save(tmp_path / "wave.npy", np.tile(frame, (61, 1)))
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "wave.txt").write_text("someone waves")
    samples = convert("motion-x", tmp_path, body, texts=texts)
    assert [sample.key for sample in samples] == ["wave-000000", "wave-000030", "wave-000060"]
    hands = samples[0].hands
    found = np.concatenate([hands[name] for name in ("body_pose", "left_hand_pose", "right_hand_pose")])
    assert np.allclose(found, np.linspace(-1, 1, 153), atol=1e-5) and not hands["betas"].any()
    np.save(tmp_path / "short.npy", np.zeros((5, 10)))
    (texts / "short.txt").write_text("x")
    bad = next(s for s in convert("motion-x", tmp_path, body, texts=texts) if isinstance(s, Bad))
    assert "[N, 322], got [5, 10]" in bad.sentence


def test_motion_x_hands_along_x_point_along_x(tmp_path, body):
    np.save(tmp_path / "a.npy", np.zeros((1, 322)))
    (tmp_path / "a.txt").write_text("someone")
    (sample,) = convert("motion-x", tmp_path, body)
    joints, _ = posed(sample.hands, body)
    hand = joints[list(HAND_JOINTS[LEFT])]
    assert angle(hand[TIP] - hand[WRIST], X) < 5


# --- hands in pictures ---


@pytest.mark.parametrize("side", [LEFT, RIGHT])
@pytest.mark.parametrize(
    ("wanted", "axis"), [((1, 0), X), ((-1, 0), -X), ((0, 1), -Y), ((0, -1), Y)]
)  # in the picture (y down), in the body's frame (y up)
def test_a_hand_that_points_along_an_axis_points_along_it(tmp_path, body, side, wanted, axis):
    """The template's left fingers point along x, its right ones against it: turned in the picture's plane."""
    now = X if side == LEFT else -X
    orientation = UPRIGHT @ between(now, axis)
    hamer(tmp_path / "a", [estimate(body, side, orientation, np.zeros((15, 3)), (200, 150), 120, (8.0, 0, 0))])
    (sample,) = convert("mano", tmp_path, body)
    joints, turns = posed(sample.hands, body)
    hand = joints[list(HAND_JOINTS[side])]
    assert angle(hand[TIP] - hand[WRIST], axis) < 5
    wrist = (LEFT_WRIST, RIGHT_WRIST)[side]
    assert np.allclose(turns[wrist] @ now, axis, atol=1e-5)
    picture = drawn(sample, body, 4 / 3)[side]
    across = (picture[TIP] - picture[WRIST]) * (4 / 3, 1)
    assert angle(across, np.array(wanted)) < 6
    assert sample.hands["visibility"].tolist() == [1 - side, side]


@pytest.mark.parametrize("seed", range(6))
def test_one_hand_comes_back_as_it_was(tmp_path, body, seed):
    """Random pose, crop and camera: fingers, orientation and every joint's pixel."""
    rng = np.random.default_rng(seed)
    side, fingers = seed % 2, rng.normal(0, 0.4, (15, 3))
    orientation = UPRIGHT @ turn(*rng.normal(0, 1, 3))
    centre, box = rng.uniform(100, 200, 2), rng.uniform(60, 120)
    camera = np.array([rng.uniform(5, 9), *rng.normal(0, 0.02, 2)])
    hamer(tmp_path / "a", [estimate(body, side, orientation, fingers, centre, box, camera)])
    (sample,) = convert("mano", tmp_path, body)
    assert np.allclose(sample.hands[("left_hand_pose", "right_hand_pose")[side]], fingers.reshape(-1), atol=1e-5)
    _, turns = posed(sample.hands, body)
    assert np.allclose(turns[(LEFT_WRIST, RIGHT_WRIST)[side]], UPRIGHT @ orientation, atol=1e-5)
    points = in_camera(body, side, orientation, fingers)
    pixels = centre + box / 2 * camera[0] * (points[:, :2] + camera[1:])
    assert np.abs(drawn(sample, body, 4 / 3)[side] * (SIZE[1], SIZE[0]) - pixels).max() < 0.3
    assert np.allclose(sample.hands["joints_2d"][side] * (SIZE[1], SIZE[0]), pixels, atol=0.01)
    assert check_samples([sample], body)[0] == []


def test_a_left_hand_is_the_mirror_image_of_a_right_one(tmp_path, body):
    """The same picture mirrored: the same estimate of the same crop, its box on the other side, is_right 0."""
    rng = np.random.default_rng(1)
    right = estimate(body, RIGHT, UPRIGHT @ turn(0.2, -0.4, 0.9), rng.normal(0, 0.4, (15, 3)), (90, 140), 80,
                     (6.0, 0.01, -0.02))  # fmt: skip
    left = {**right, "is_right": np.float64(0), "box_center": np.array([SIZE[1] - 90.0, 140.0])}
    hamer(tmp_path / "a/x", [right])
    hamer(tmp_path / "b/x", [left])
    (a,), (b,) = convert("mano", tmp_path / "a", body), convert("mano", tmp_path / "b", body)
    mirrored = flip_hands(a.hands)
    for name in ("left_hand_pose", "right_hand_pose", "body_pose", "placement", "visibility", "global_orient"):
        assert np.allclose(b.hands[name], mirrored[name], atol=1e-4), name
    assert np.allclose(b.hands["joints_2d"][LEFT], mirrored["joints_2d"][LEFT], atol=1e-4)


def test_the_crops_camera_is_the_pictures(tmp_path, body):
    """A point on the camera's axis is in the middle of the box, one at 1 / s is on its edge, whatever the picture."""
    one = estimate(body, RIGHT, UPRIGHT, np.zeros((15, 3)), (250, 80), 60, (4.0, 0.0, 0.0))
    points = np.zeros((21, 3))
    points[1], points[2] = (0.25, 0, 0), (0, -0.25, 0.1)
    hamer(tmp_path / "a", [{**one, "pred_keypoints_3d": points}])
    (sample,) = convert("mano", tmp_path, body)
    pixels = sample.hands["joints_2d"][RIGHT] * (SIZE[1], SIZE[0])
    assert np.allclose(pixels[:3], [[250, 80], [280, 80], [250, 50]], atol=1e-3)
    (moved,) = convert_one(
        tmp_path / "b", {**one, "pred_keypoints_3d": points, "pred_cam": np.array([4, 0.25, 0])}, body
    )
    assert np.allclose((moved.hands["joints_2d"][RIGHT] * (SIZE[1], SIZE[0]))[0], [280, 80], atol=1e-3)


def convert_one(folder: Path, hand: dict, body: SMPLH) -> list[Sample | Bad]:
    hamer(folder / "a", [hand])
    return convert("mano", folder, body)


def both(body, apart: float, scale: float = 1.0, seed: int = 0) -> list[dict]:
    """A right hand in the picture's left half and a left one to the right of it, `apart` pixels between the boxes."""
    rng = np.random.default_rng(seed)
    hands = []
    for side, x in ((RIGHT, 200 - apart / 2), (LEFT, 200 + apart / 2)):
        up = between(X if side == LEFT else -X, Y)
        orientation = UPRIGHT @ turn(*rng.normal(0, 0.4, 3)) @ up
        box = 80 * (scale if side == LEFT else 1)
        fingers = rng.normal(0, 0.3, (15, 3))
        hands.append(estimate(body, side, orientation, fingers, (x, rng.uniform(120, 180)), box, (7.0, 0.0, 0.0)))
    return hands


@pytest.mark.parametrize("apart", [0, 60, 150])
@pytest.mark.parametrize("seed", range(4))
def test_two_hands_are_one_person_who_holds_them_there(tmp_path, body, apart, seed):
    hands = both(body, apart, seed=seed)
    hamer(tmp_path / "a", hands)
    (sample,) = convert("mano", tmp_path, body)
    assert sample.people == 1 and sample.hands["visibility"].tolist() == [1, 1]
    joints, turns = posed(sample.hands, body)
    picture = drawn(sample, body, 4 / 3) * (SIZE[1], SIZE[0])
    for hand in hands:
        side = int(hand["is_right"])
        mirror = np.eye(3) if side else np.diag([-1.0, 1, 1])
        wanted = hand["box_center"] + 80 / 2 * 7 * (hand["pred_keypoints_3d"] @ mirror)[:, :2]
        assert np.abs(picture[side] - wanted).max() < 1.0, side
        orientation = UPRIGHT @ mirror @ hand["global_orient"][0] @ mirror
        assert np.allclose(turns[(LEFT_WRIST, RIGHT_WRIST)[side]], orientation, atol=1e-5)
    assert check_samples([sample], body)[0] == []
    rest = body.j_template.numpy()
    for a, b in ((16, 18), (17, 19), (18, 20), (19, 21)):  # bones keep their lengths
        assert np.linalg.norm(joints[b] - joints[a]) == pytest.approx(np.linalg.norm(rest[b] - rest[a]), abs=1e-5)
    assert (joints[[20, 21], 2] > joints[[16, 17], 2]).all()  # in front of the shoulders


@pytest.mark.parametrize(("apart", "scale"), [(2000, 1.0), (60, 2.0)])
def test_hands_too_far_apart_or_unlike_in_size_are_two_peoples(tmp_path, body, apart, scale):
    hands = both(body, apart, scale)
    hamer(tmp_path / "a", hands, size=(300, 2400) if apart == 2000 else SIZE)
    (sample,) = convert("mano", tmp_path, body)
    assert sample.people == 2
    assert sample.hands["visibility"].tolist() == [[0, 1], [1, 0]]  # in the order of the estimates
    assert sample.hands["placement"].shape == (2, 2, 4)


def test_two_left_hands_are_two_peoples_and_each_comes_back(tmp_path, body):
    hands = [estimate(body, LEFT, UPRIGHT @ turn(0, 0, a), np.zeros((15, 3)), (x, 150), 80, (7.0, 0, 0))
             for a, x in ((0.3, 100), (1.2, 300))]  # fmt: skip
    hamer(tmp_path / "a", hands)
    (sample,) = convert("mano", tmp_path, body)
    assert sample.people == 2
    for i, hand in enumerate(hands):
        one = Sample("a", ["a"], person(sample.hands, i), sample.image)
        wanted = hand["box_center"] + 40 * 7 * (hand["pred_keypoints_3d"] * (-1, 1, 1))[:, :2]
        assert np.abs(drawn(one, body, 4 / 3)[LEFT] * (SIZE[1], SIZE[0]) - wanted).max() < 0.3


def test_axis_angle_is_read_as_matrices_are(tmp_path, body):
    hand = estimate(body, LEFT, UPRIGHT @ turn(0.1, 0.5, 0.2), np.full((15, 3), 0.2), (200, 150), 80, (7.0, 0, 0))
    vectors = {
        **hand,
        "global_orient": matrix_to_axis_angle(hand["global_orient"])[0],
        "hand_pose": matrix_to_axis_angle(hand["hand_pose"]).reshape(-1),
    }
    hamer(tmp_path / "a", [hand])
    hamer(tmp_path / "b", [vectors])
    none = (np.zeros(45), np.zeros(45))
    (a,), (b,) = (
        mano_estimates(tmp_path / "a.npz", none, joints_at_rest(body)),
        mano_estimates(tmp_path / "b.npz", none, joints_at_rest(body)),
    )
    assert np.allclose(a.turn, b.turn) and np.allclose(a.fingers, b.fingers) and a.side == b.side == LEFT


def test_pictures_without_hands_captions_or_estimates(tmp_path, body):
    good = estimate(body, RIGHT, UPRIGHT, np.zeros((15, 3)), (200, 150), 80, (7.0, 0, 0))
    hamer(tmp_path / "a", [])
    hamer(tmp_path / "b", [good], caption=None)
    hamer(tmp_path / "c", [good])
    (tmp_path / "c.npz").unlink()
    hamer(tmp_path / "d", [{**good, "pred_cam": np.full(3, np.nan)}])
    hamer(tmp_path / "e", [{name: value for name, value in good.items() if name != "box_size"}])
    hamer(tmp_path / "f", [good], caption="one\ntwo\n")
    (tmp_path / "g.jpg").write_bytes(b"no picture")
    (tmp_path / "g.txt").write_text("x")
    a, b, c, d, e, f, g = convert("mano", tmp_path, body)
    assert a.hands is None and a.prompts == ["a hand"] and f.prompts == ["one", "two"]
    sentences = [bad.sentence for bad in (b, c, d, e, g)]
    for sentence, words in zip(
        sentences, ("no caption", "lacks c.npz", "NaN", "lacks box_size", "cannot be decoded"), strict=True
    ):
        assert words in sentence


def interhand_folder(folder: Path, body: SMPLH, pose: dict[str, np.ndarray], rotation: np.ndarray) -> None:
    """One frame seen by one camera ten metres away. pose: side -> [48] in the world; rotation: the camera's."""
    annotations = folder / "annotations/train"
    annotations.mkdir(parents=True)
    position = -rotation.T @ np.array([0, 0, 10_000.0])  # millimetres; the world's origin is straight ahead
    world = np.zeros((42, 3))
    for name, vector in pose.items():
        side = ("left", "right").index(name)
        hand = in_camera(body, side, axis_angle_to_matrix(vector[None, :3])[0], vector[3:].reshape(15, 3))
        hand = hand + np.array([(0.1, 0, 0), (-0.1, 0, 0)][side])
        order = [4, 3, 2, 1, 8, 7, 6, 5, 12, 11, 10, 9, 16, 15, 14, 13, 20, 19, 18, 17, 0]  # tips first, wrist last
        world[(21 if side == LEFT else 0) : (42 if side == LEFT else 21)] = 1000 * hand[order]
    file = "Capture0/ROM01_Fist/cam400/image1.jpg"
    kind = "interacting" if len(pose) == 2 else next(iter(pose))
    files = {
        "data": {
            "images": [{"id": 5, "file_name": file, "capture": 0, "camera": "400", "frame_idx": 1, "width": 400,
                        "height": 300, "seq_name": "ROM01_Fist"}],
            "annotations": [{"id": 1, "image_id": 5, "hand_type": kind}],
        },
        "camera": {"0": {"campos": {"400": position.tolist()}, "camrot": {"400": rotation.tolist()},
                         "focal": {"400": [5000.0, 5000.0]}, "princpt": {"400": [200.0, 150.0]}}},
        "joint_3d": {"0": {"1": {"world_coord": world.tolist(), "joint_valid": [[1]] * 42, "hand_type": kind}}},
        "MANO_NeuralAnnot": {"0": {"1": {
            name: {"pose": pose[name].tolist(), "shape": [0] * 10, "trans": [0] * 3} if name in pose else None
            for name in ("left", "right")
        }}},
    }  # fmt: skip
    for name, value in files.items():
        (annotations / f"InterHand2.6M_train_{name}.json").write_text(json.dumps(value))
    image = folder / "images/train" / file
    image.parent.mkdir(parents=True)
    image.write_bytes(made_sample(0, (300, 400)).image)


@pytest.fixture()
def no_mean(tmp_path) -> Path:
    np.savez(tmp_path / "mean.npz", hands_meanl=np.zeros(45), hands_meanr=np.zeros(45))
    return tmp_path / "mean.npz"


@pytest.mark.parametrize("sides", [("right",), ("left",), ("left", "right")])
def test_interhand_comes_back_through_its_cameras(tmp_path, body, no_mean, sides):
    rng = np.random.default_rng(4)
    rotation = turn(0.3, -0.2, 0.1) @ UPRIGHT
    pose = {side: np.concatenate([rng.normal(0, 0.3, 3), rng.normal(0, 0.3, 45)]) for side in sides}
    interhand_folder(tmp_path / "set", body, pose, rotation)
    (sample,) = convert("interhand", tmp_path / "set", body, hand_mean=no_mean)
    assert sample.prompts == ["two hands" if len(sides) == 2 else f"a {sides[0]} hand"]
    assert sample.meta["labels"] == {"sequence": "ROM01_Fist"} and sample.people == 1
    _, turns = posed(sample.hands, body)
    picture = drawn(sample, body, 4 / 3) * (400, 300)
    for name in sides:
        side = ("left", "right").index(name)
        assert np.allclose(sample.hands[f"{name}_hand_pose"], pose[name][3:], atol=1e-5)
        orientation = axis_angle_to_matrix(pose[name][None, :3])[0]
        assert np.allclose(turns[(20, 21)[side]], UPRIGHT @ rotation @ orientation, atol=1e-5)
        points = in_camera(body, side, orientation, pose[name][3:].reshape(15, 3)) + ((0.1, 0, 0), (-0.1, 0, 0))[side]
        seen = points @ rotation.T + (0, 0, 10)
        pixels = 5000 * seen[:, :2] / seen[:, 2:] + (200, 150)
        assert np.abs(sample.hands["joints_2d"][side] * (400, 300) - pixels).max() < 0.01
        assert np.abs(picture[side] - pixels).max() < 3  # a perspective picture, told by a weak perspective
    assert check_samples([sample], body)[0] == []


def test_interhand_is_told_the_mean_hand(tmp_path, body):
    mean = np.random.default_rng(0).normal(0, 0.3, 45)
    np.savez(tmp_path / "mean.npz", hands_meanl=np.zeros(45), hands_meanr=mean)
    interhand_folder(tmp_path / "set", body, {"right": np.concatenate([np.zeros(3), -mean])}, UPRIGHT)
    (sample,) = convert("interhand", tmp_path / "set", body, hand_mean=tmp_path / "mean.npz")
    assert np.allclose(sample.hands["right_hand_pose"], 0, atol=1e-6)  # the flat hand
    with pytest.raises(DatasetError, match="--hand-mean"):
        convert("interhand", tmp_path / "set", body)


@pytest.mark.parametrize(("part", "value"), [("camrot", [[0] * 3] * 3), ("focal", [-5000.0, 5000.0])])
def test_interhand_names_cameras_that_are_none(tmp_path, body, no_mean, part, value):
    interhand_folder(tmp_path / "set", body, {"right": np.zeros(48)}, UPRIGHT)
    path = tmp_path / "set/annotations/train/InterHand2.6M_train_camera.json"
    cameras = json.loads(path.read_text())
    cameras["0"][part]["400"] = value
    path.write_text(json.dumps(cameras))
    (bad,) = convert("interhand", tmp_path / "set", body, hand_mean=no_mean)
    assert "a rotation and a focal length" in bad.sentence


def test_interhand_names_what_does_not_fit(tmp_path, body, no_mean):
    interhand_folder(tmp_path / "set", body, {"right": np.zeros(48)}, UPRIGHT)
    path = tmp_path / "set/annotations/train/InterHand2.6M_train_data.json"
    data = json.loads(path.read_text())
    first = data["images"][0]
    data["images"] += [{**first, "camera": "401", "file_name": "b.jpg"}, {**first, "file_name": "gone.jpg"}]
    data["images"] += [{**first, "frame_idx": 2, "file_name": "c.jpg"}]
    path.write_text(json.dumps(data))
    good, camera, gone, frame = convert("interhand", tmp_path / "set", body, hand_mean=no_mean)
    assert isinstance(good, Sample) and "KeyError" in camera.sentence and "No such file" in gone.sentence
    assert "contradict each other" in frame.sentence
    with pytest.raises(DatasetError, match="has no annotations"):
        convert("interhand", tmp_path, body, hand_mean=no_mean)


@given(st.lists(st.floats(-1, 1), min_size=6, max_size=6))
@example([1e-05, -1.0, 0.0, 0.0, 1.0, 0.0])
@example([1e-07, -1.0, 0.0, 0.0, 1.0, 0.0])
def test_between_takes_one_direction_to_the_other(numbers):
    a, b = np.array(numbers[:3]), np.array(numbers[3:])
    if min(np.linalg.norm(a), np.linalg.norm(b)) < 1e-3:
        return
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    for other in (b, a, -a):
        rotation = between(a, other)
        assert np.allclose(rotation @ a, other, atol=1e-6)
        assert np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-6) and np.linalg.det(rotation) > 0


def test_the_command_converts_and_goes_on(tmp_path, body):
    hand = estimate(body, RIGHT, UPRIGHT, np.zeros((15, 3)), (200, 150), 80, (7.0, 0, 0))
    for name in ("a", "c"):
        hamer(tmp_path / "photos" / name, [hand])
    hamer(tmp_path / "photos/bare", [hand], caption=None)
    result = invoke("data.cli", "convert", "mano", tmp_path / "photos", tmp_path / "out")
    assert result.returncode == 0 and "2 samples in" in result.stderr and "left out: " in result.stderr, result.stderr
    assert [sample.key for sample in read(tmp_path / "out")] == ["a", "c"]
    before = (tmp_path / "out/00000.tar").read_bytes()
    hamer(tmp_path / "photos/bare", [hand])
    options = Options(body)
    assert write_shards(FORMATS["mano"](tmp_path / "photos", options), tmp_path / "out") == []
    assert [sample.key for sample in read(tmp_path / "out")] == ["a", "c", "bare"]
    assert (tmp_path / "out/00000.tar").read_bytes() == before
    nothing = invoke("data.cli", "convert", "amass", tmp_path / "photos/none", tmp_path / "out2")
    assert nothing.returncode == 1 and "does not exist" in nothing.stderr and "Traceback" not in nothing.stderr
