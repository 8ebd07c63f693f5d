"""Hands fitted to 21 points whose truth is known by formula, and the exact derivatives that the fit relies on."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from handiffuser.contract import HAND_JOINTS
from handiffuser.demo.gestures import NAMES, pose
from handiffuser.demo.render import demo_body
from handiffuser.demo.scenes import sample_scene
from handiffuser.detection import fit as module
from handiffuser.detection.convention import Convention, mediapipe
from handiffuser.detection.fit import Fitted, angles_of, fit, upright
from handiffuser.detection.named import posed
from handiffuser.detection.poses import Poses
from handiffuser.errors import DetectionError
from handiffuser.fingers import SIDES
from handiffuser.kinematics import at_rest, forward, world
from handiffuser.rotations import axis_angle_to_matrix, matrix_to_axis_angle


@pytest.fixture(scope="module")
def rest() -> np.ndarray:
    with torch.no_grad():
        return demo_body()(torch.eye(3).expand(1, 52, 3, 3), torch.zeros(1, 10))[1][0].double().numpy()


def degrees(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The angle between rotations [..., 3, 3]."""
    return np.degrees(np.arccos(((np.einsum("...ij,...ij->...", a, b) - 1) / 2).clip(-1, 1)))


def made(number: int, rest: np.ndarray, fingers: np.ndarray | None = None):
    """A hand of the demo's world: side, gesture, rotations [52, 3, 3], points [21, 2] in a picture of 640 pixels."""
    scene = sample_scene(np.random.default_rng((11, number)))
    side = 1 if scene.spec.side in ("right", "both") else 0
    rotations = scene.rotations.astype(np.float64)
    if fingers is not None:
        rotations[22 + 15 * side : 37 + 15 * side] = fingers
    points = forward(rotations, rest)[1][list(HAND_JOINTS[side]), :2]
    return side, scene.spec.gesture_of(side), rotations, points * (1, -1) * 320 * scene.camera[0] + 320


def errors(found: Fitted, rotations: np.ndarray, points: np.ndarray) -> tuple[float, float, float]:
    """Of the points in per cent of the hand's size, of the finger joints and of the wrist in degrees."""
    away = np.linalg.norm(found.joints_2d - points, axis=1).mean() / np.ptp(points, axis=0).max()
    joints = degrees(axis_angle_to_matrix(found.fingers), rotations[22 + 15 * found.side : 37 + 15 * found.side])
    return 100 * away, joints.mean(), float(degrees(found.turn, world(rotations)[20 + found.side]))


def test_kinematics_are_those_of_the_body(rest):
    """To 1e-6 metres, tips too: the demo's belong to their last bone alone."""
    rng = np.random.default_rng(0)
    rotations = axis_angle_to_matrix(rng.normal(0, 0.7, (52, 3))).astype(np.float32)
    with torch.no_grad():
        turns = demo_body().kinematics(torch.from_numpy(rotations)[None], torch.zeros(1, 10))[0][0].numpy()
        joints = demo_body()(torch.from_numpy(rotations)[None], torch.zeros(1, 10))[1][0].numpy()
    ours, places = forward(rotations, rest)
    assert np.abs(ours - turns).max() < 2e-6 and np.abs(places - joints).max() < 1e-6
    assert np.abs(at_rest(places, rotations) - rest).max() < 1e-6


def test_derivatives_are_exact(rest):
    rng = np.random.default_rng(1)
    hand = rest[list(HAND_JOINTS[0])] - rest[20]
    rig = module.Rig(hand, 0.02 * rng.normal(size=(21, 3)))
    turns, angles = axis_angle_to_matrix(rng.normal(size=(2, 3))), rng.normal(0, 0.6, (2, 45))
    angles[1] = 0.0  # where the exponential map's Jacobian is a limit
    points, slope = rig.derivatives(turns, angles)
    for k in range(48):
        step = np.zeros(48)
        step[k] = 1e-6
        there, back = (
            rig.points(axis_angle_to_matrix(sign * step[None, :3]) @ turns, angles + sign * step[3:])
            for sign in (1, -1)
        )
        assert np.allclose((there - back)[..., :2] / 2e-6, slope[..., k], atol=1e-6), k
    assert np.allclose(points, rig.points(turns, angles))


def test_true_points_give_the_hand(rest):
    """Eight hands of all views: within 0.5 % of the hand's size, 4 degrees a joint, and the gesture's name."""
    found, named = [], 0
    for number in range(8):
        side, gesture, rotations, points = made(number, rest)
        hand = fit(points, SIDES[side], rest)
        found.append(errors(hand, rotations, points))
        named += hand.gesture == gesture
    points, joints, wrists = np.mean(found, axis=0)
    assert points < 0.5 and joints < 4 and wrists < 4 and named >= 7, (found, named)


def test_a_hand_without_a_gesture(rest):
    """Each finger of another gesture: no name, and the points lie where they were."""
    rng = np.random.default_rng(4)
    poses = [pose(NAMES[k], 1, rng) for k in (0, 1, 4, 9, 2)]
    fingers = np.concatenate([one[3 * block : 3 * block + 3] for block, one in enumerate(poses)])
    side, _, rotations, points = made(next(n for n in range(20) if made(n, rest)[0] == 1), rest, fingers)
    hand = fit(points, SIDES[side], rest)
    away, joints, _ = errors(hand, rotations, points)
    assert away < 1.5 and joints < 20 and hand.gesture == ""


def test_a_right_hand_is_the_mirror_image_of_a_left_one(rest):
    side, _, _, points = made(0, rest)
    one = fit(points, SIDES[side], rest)
    other = fit(points * (-1, 1) + (640, 0), SIDES[1 - side], rest)
    mask = np.array([[1.0, -1, -1], [-1, 1, 1], [-1, 1, 1]])
    assert np.allclose(other.turn, one.turn * mask, atol=1e-3)
    assert np.allclose(other.fingers, one.fingers * (1, -1, -1), atol=1e-3)
    assert np.allclose(other.joints_2d, one.joints_2d * (-1, 1) + (640, 0), atol=0.5)


def test_size_and_place_of_the_picture_do_not_matter(rest):
    side, _, _, points = made(1, rest)
    one, far = fit(points, SIDES[side], rest), fit(points * 7 + 3000, SIDES[side], rest)
    assert np.allclose(far.fingers, one.fingers, atol=1e-6) and np.allclose(far.joints_2d, one.joints_2d * 7 + 3000)


def test_the_detector_s_offsets_are_taken_back(rest):
    """Points moved by the convention's offsets, which the fit knows, give the joints again."""
    side, _, rotations, points = made(2, rest)
    from handiffuser.detection.convention import marks_of

    turns, joints = forward(rotations, rest)
    places = np.stack([points, points])
    marks = marks_of(joints[np.array(HAND_JOINTS)], turns, places, 1.0, mediapipe().offsets)[side]
    size = np.ptp(points, axis=0).max()
    assert np.linalg.norm(marks - points, axis=1).mean() > 0.03 * size
    hand = fit(marks, SIDES[side], rest, convention=Convention(mediapipe().offsets, np.full(21, 0.004)))
    assert np.linalg.norm(hand.joints_2d - points, axis=1).mean() < 0.01 * size


def test_a_person_may_name_the_gesture(rest):
    side, gesture, _, points = made(3, rest)
    assert fit(points, SIDES[side], rest, gesture=gesture).gestures.keys() == {gesture}
    with pytest.raises(DetectionError, match=r"gesture must be one of .*fist.*, got 'waving'"):
        fit(points, SIDES[side], rest, gesture="waving")


def test_a_named_gesture_gets_the_wrist_that_explains_the_points(rest):
    """A finger is missing: the other points give wrist, size and place. Points of another gesture keep their wrist."""
    number = next(n for n in range(200) if made(n, rest)[1] == "spread_fingers")
    side, gesture, rotations, points = made(number, rest)
    spoiled = points.copy()
    spoiled[10:13] = points[9]  # the middle finger ends at its knuckle
    noisy = Convention.true(0.04)
    hand = posed(fit(spoiled, SIDES[side], rest, convention=noisy), gesture, rest)
    away, joints, wrist = errors(hand, rotations, points)
    assert away < 3 and joints < 6 and wrist < 12 and hand.gestures == {gesture: 1.0}
    whole = fit(points, SIDES[side], rest, convention=noisy)
    assert np.allclose(posed(whole, "fist", rest).turn, whole.turn)


def test_noise_widens_the_error_bars(rest):
    side, _, _, points = made(5, rest)
    sharp, blurred = (fit(points, SIDES[side], rest, convention=Convention.true(s)) for s in (0.004, 0.05))
    assert sharp.degrees.shape == (16,) and (blurred.degrees > sharp.degrees).all() and sharp.degrees.min() > 0


@pytest.mark.parametrize("points", [np.zeros((21, 2)), np.full((21, 2), np.nan), np.zeros((20, 2))])
def test_points_of_no_hand_are_refused(rest, points):
    with pytest.raises(DetectionError, match="points must be 21 places"):
        fit(points, "left", rest)


def test_thumbs_up_and_down_are_one_pose():
    assert upright({"thumbs_up": 0.5, "fist": 0.3, "thumbs_down": 0.2}, False) == {"thumbs_down": 0.7, "fist": 0.3}


def test_a_prior_of_a_dataset(tmp_path, rest):
    rng = np.random.default_rng(0)
    names = ["fist", "victory"] * 20 + [""] * 10
    hands = [matrix_to_axis_angle(pose(name or "claw", 0, rng)) for name in names]
    poses = Poses.made(names, angles_of(np.stack(hands), rest, 0))
    assert poses.names == ("fist", "victory", "") and poses.weight.sum() == pytest.approx(1)
    poses.save(tmp_path / "poses.npz")
    again = Poses.load(tmp_path / "poses.npz")
    assert again.names == poses.names and np.allclose(again.covariance, poses.covariance, atol=1e-6)
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    for name in ("bad.npz", "missing.npz"):
        with pytest.raises(DetectionError, match=name):
            Poses.load(tmp_path / name)


def test_without_torch():
    code = (
        "import sys, handiffuser.detection.photo, handiffuser.runtime.rest as r, handiffuser.detection.fit as f\n"
        "rest = r.joints_at_rest('demo'); assert rest.shape == (62, 3)\n"
        "assert not {'torch', 'diffusers', 'mediapipe'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
