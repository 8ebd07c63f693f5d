"""Scenes of the demo world: a prompt, a posed body and a camera that frames the hands.

The hands decide the arms: a scene first places a hand in the picture, then the forearm follows with a small bend of the
wrist, and shoulder and elbow complete the arm. Close-ups do not show the torso.

    scene = sample_scene(np.random.default_rng(0))
    scene.prompt, scene.rotations.shape      # "a left hand making a fist", (52, 3, 3)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy import ndarray

from ..models.smplh import HAND_JOINTS, PARENTS, TIP_VERTICES
from .body import build_body
from .gestures import GESTURES, between, pose, rotation
from .prompts import BACKGROUNDS, SKINS, Spec, is_held_out, sample_spec, write_prompt

X, Y, Z = np.eye(3)
MIRROR = np.array([[1.0, -1, -1], [-1, 1, 1], [-1, 1, 1]])  # S R S, S = diag(-1, 1, 1), written as a mask
MARGIN = 0.06  # free share of the frame around the hand joints
UPPER_ARM, FOREARM, WRIST = (16, 17), (18, 19), (20, 21)
LEFT_ARM, RIGHT_ARM = ([13, 16, 18, 20, *range(22, 37)], [14, 17, 19, 21, *range(37, 52)])
FLESH = 0.012  # metres of finger around a joint


@dataclass(frozen=True)
class Scene:
    """One picture to render. Arrays are float32 (present: bool), colours 0..1, lengths in metres."""

    prompt: str
    spec: Spec
    rotations: ndarray  # [52,3,3], each relative to its parent
    betas: ndarray  # [10]
    camera: ndarray  # [3] (s, tx, ty)
    present: ndarray  # [2] left, right
    background: ndarray  # [3]
    skin: ndarray  # [3]
    light: ndarray  # [3] unit, towards the light


@dataclass(frozen=True)
class Anatomy:
    """Whose hands a scene poses. rest: joints with finger tips [62,3] and their shape directions [62,3,10].

    pose: (gesture, side, rng) -> finger rotations [15,3,3], as `gestures.pose`."""

    rest: Callable[[], tuple[ndarray, ndarray]]
    pose: Callable[..., ndarray]


def rest_of(body: dict[str, ndarray]) -> tuple[ndarray, ndarray]:
    """Rest joints with finger tips [62,3] of a body in SMPL-H's arrays, and their shape directions [62,3,10]."""
    regressor, tips = body["J_regressor"].astype(np.float64), list(TIP_VERTICES)
    joints = np.concatenate([regressor @ body["v_template"], body["v_template"][tips]])
    moves = np.einsum("jv,vck->jck", regressor, body["shapedirs"])
    return joints, np.concatenate([moves, body["shapedirs"][tips]])


PLAIN = Anatomy(lru_cache(maxsize=1)(lambda: rest_of(build_body())), pose)


TIP_PARENTS = tuple(HAND_JOINTS[side][4 * finger + 3] for side in range(2) for finger in range(5))
TREE = (*PARENTS, *TIP_PARENTS)


def forward_joints(rotations: ndarray, betas: ndarray, anatomy: Anatomy = PLAIN) -> ndarray:
    """Joints of a body and its finger tips, [52, 3, 3], [10] -> [62, 3]. A tip follows its last joint alone."""
    joints, moves = anatomy.rest()
    rest = joints + moves @ betas
    turns, places = [rotations[0]], [rest[0]]
    for joint in range(1, 62):
        parent = TREE[joint]
        places.append(places[parent] + turns[parent] @ (rest[joint] - rest[parent]))
        turns.append(turns[parent] @ rotations[joint] if joint < 52 else turns[parent])
    return np.stack(places)


def _wobble(rng: np.random.Generator, degrees: float) -> ndarray:
    """A small random rotation."""
    v = rng.normal(size=3) * degrees
    angle = float(np.linalg.norm(v)) + 1e-9
    return rotation(v / angle, angle)


def _stand(spec: Spec, side: int, rng: np.random.Generator) -> tuple[ndarray, ndarray]:
    """Global rotations [3, 3] of hand and forearm, of the left side or mirrored for the right."""
    gesture, view = GESTURES[spec.gesture_of(side)], spec.view_of(side)
    # Columns: where the fingers, the back of the hand and the thumb point.
    facing = {"palm": (Y, -Z, -X), "back": (Y, Z, X), "side": (Y, -X, Z)}[view]
    hand = np.stack(facing, 1)
    inward = 1.0 if view == "palm" else -1.0
    turn = gesture.turn if view != "side" else 0.0
    spin = gesture.spin if view != "side" else 0.0
    if spec.side == "both":
        outside = spin < 0 if view == "palm" else spin > 0  # forearms must not come from between the hands
        spin = np.clip(spin, -60, 60) if outside else 0.0
    hand = rotation(Y, -turn) @ hand
    hand = rotation(X, gesture.tip if view == "palm" else -0.5 * gesture.tip) @ hand
    hand = rotation(Z, -inward * spin) @ hand
    yaw, pitch = rng.uniform(-15, 15), rng.uniform(-12, 12)
    tilt = np.clip(rng.normal(0, 11), -22, 22) if spec.side != "both" else rng.uniform(-4, 14)
    hand = rotation(Z, tilt) @ rotation(X, pitch) @ rotation(Y, yaw) @ hand
    bend = rotation(Z, rng.uniform(-14, 10)) @ rotation(Y, rng.uniform(-8, 8))  # flexion, then towards the thumb
    forearm = hand @ bend.T
    return (hand * MIRROR, forearm * MIRROR) if side else (hand, forearm)


def _global(rotations: ndarray, joint: int) -> ndarray:
    out = np.eye(3)
    while joint >= 0:
        out = rotations[joint] @ out
        joint = PARENTS[joint]
    return out


def _raise_arm(rotations: ndarray, side: int, hand: ndarray, forearm: ndarray, upper: ndarray) -> None:
    """Writes shoulder, elbow and wrist of one arm. upper: unit vector of the upper arm; hand, forearm: [3, 3]."""
    out = (1.0, -1.0)[side] * X
    above = between(out, upper)
    rotations[UPPER_ARM[side]] = _global(rotations, PARENTS[UPPER_ARM[side]]).T @ above
    rotations[FOREARM[side]] = above.T @ forearm
    rotations[WRIST[side]] = forearm.T @ hand


def sample_scene(
    rng: np.random.Generator, spec: Spec | None = None, close_up: bool = True, anatomy: Anatomy = PLAIN
) -> Scene:
    """A random scene. spec: its content, random if None. close_up: False for a hand of about half the size.

    Raises RuntimeError where no camera frames both hands.
    """
    spec = spec or sample_spec(rng)
    present = np.array([spec.side in ("left", "both"), spec.side in ("right", "both")])
    for _ in range(50):
        rotations = np.stack([_wobble(rng, 0.7) for _ in range(22)] + [np.eye(3)] * 30)
        betas = rng.normal(0, 0.8, 10).clip(-2, 2)
        solved = []
        for side in range(2):
            first = 22 + 15 * side
            if not present[side]:
                _wobble(rng, 0.7)  # keeps the random numbers of a seed's scenes
                continue
            rotations[first : first + 15] = anatomy.pose(spec.gesture_of(side), side, rng)
            hand, forearm = _stand(spec, side, rng)
            upper = np.array([(0.35, -0.35)[side], -0.75, 0.55]) + 0.05 * rng.normal(size=3)
            _raise_arm(rotations, side, hand, forearm, upper / np.linalg.norm(upper))
            solved.append((side, hand, forearm))
        if spec.side != "both":  # the hidden arm mirrors the other: the side changes nothing else
            shown, unseen = (LEFT_ARM, RIGHT_ARM) if present[0] else (RIGHT_ARM, LEFT_ARM)
            rotations[unseen] = rotations[shown] * MIRROR
        else:
            _side_by_side(rotations, forward_joints(rotations, betas, anatomy), solved, rng)
        camera = frame(rotations, betas, present, rng, close_up, anatomy)
        if camera is not None:
            break
    else:
        raise RuntimeError(f"no framing found for {spec}")
    prompt = write_prompt(spec, rng)
    skin = np.array(SKINS[spec.skin][0]) * rng.normal(1, 0.02) + rng.normal(0, 0.008, 3)
    background = np.array(BACKGROUNDS[spec.background]) + rng.normal(0, 0.012, 3)
    light = np.array([rng.uniform(-0.55, 0.55), rng.uniform(0.35, 0.75), 1.0])
    light /= np.linalg.norm(light)
    arrays = (rotations, betas, camera, present, background.clip(0, 1), skin.clip(0, 1), light)
    return Scene(prompt, spec, *(np.asarray(a, bool if a is present else np.float32) for a in arrays))


def _side_by_side(rotations: ndarray, joints: ndarray, solved: list, rng: np.random.Generator) -> None:
    """Moves two raised hands next to each other by turning the upper arms: the subject's right hand fills the picture's
    left half."""
    gap = rng.uniform(0.004, 0.02)
    middles = []
    for side, _, _ in solved:
        hand = joints[list(HAND_JOINTS[side]), :2]
        middles.append((hand[:, 1].min() + hand[:, 1].max()) / 2)
    level = np.mean(middles)
    for (side, hand, forearm), middle in zip(solved, middles, strict=True):
        sign = (1.0, -1.0)[side]
        wrist, elbow, shoulder = joints[WRIST[side]], joints[FOREARM[side]], joints[UPPER_ARM[side]]
        # The joints and the first half of the forearm must stay on their side.
        x = np.append(sign * joints[list(HAND_JOINTS[side]), 0] - FLESH, [sign * wrist[0] - 0.03,
                      sign * (wrist[0] + 0.5 * (elbow[0] - wrist[0])) - 0.042])  # fmt: skip
        shift = np.array([sign * (gap / 2 - x.min()), level - middle + rng.uniform(-0.008, 0.008)])
        upper = (elbow - shoulder) / np.linalg.norm(elbow - shoulder)
        length = np.linalg.norm(elbow - shoulder)
        upper[:2] += shift / length
        flat = np.linalg.norm(upper[:2])
        upper[:2] *= min(1.0, 0.98 / flat)
        upper[2] = np.sqrt(1 - upper[:2] @ upper[:2])
        _raise_arm(rotations, side, hand, forearm, upper)


def frame(
    rotations: ndarray,
    betas: ndarray,
    present: ndarray,
    rng: np.random.Generator,
    close_up: bool = True,
    anatomy: Anatomy = PLAIN,
) -> ndarray | None:
    """A camera (s, tx, ty) with all joints of the present hands inside the frame; None if there is none."""
    joints = forward_joints(rotations, betas, anatomy)
    points = [joints[list(HAND_JOINTS[side]), :2] for side in range(2) if present[side]]
    elbows = [joints[FOREARM[side], :2] for side in range(2) if present[side]]
    everything = np.concatenate(points)
    low, high = everything.min(0), everything.max(0)
    extent = high - low
    if len(points) == 2:
        right_most_of_right, left_most_of_left = points[1][:, 0].max(), points[0][:, 0].min()
        if left_most_of_left - right_most_of_right < 0.015 or extent.max() > 0.62:
            return None
        fill, size = rng.uniform(0.83, 0.88), max(extent.max(), 0.22)
    else:
        fill, size = rng.uniform(0.60, 0.82), max(extent.max(), 0.14)
        if not close_up:
            fill *= 0.55
    s = 2 * fill / size
    for _ in range(20):
        free = 1 - 2 * MARGIN - extent * s / 2
        offset = rng.uniform(-0.5, 0.5, 2) * free.clip(0, 0.3)
        centre = (low + high) / 2 - offset * 2 / s
        # The cut end of a forearm must not show.
        if all(np.abs((e - centre) * s).max() > 1.1 for e in elbows):
            return np.array([s, -centre[0], -centre[1]])
        s *= 1.02 if len(points) == 1 and extent.max() * s / 2 < 0.84 else 1.0
    return None


def sample_scenes(
    n: int, seed: int = 0, close_up: bool = True, both: float = 0.15, held_out: bool | None = None
) -> list[Scene]:
    """`n` random scenes, the same for the same arguments; scene i does not depend on n.

    both: share of two-hand scenes. held_out: only prompts on that side of the split, see prompts.is_held_out.
    """
    out = []
    for i in range(n):
        rng = np.random.default_rng((seed, i))
        scene = sample_scene(rng, sample_spec(rng, both), close_up)
        while held_out is not None and is_held_out(scene.prompt) != held_out:
            scene = replace(scene, prompt=write_prompt(scene.spec, rng))
        out.append(scene)
    return out
