"""Twenty-four hand gestures as finger joint rotations, with names and English phrases.

A finger is four angles in degrees (knuckle flexion, spread towards the thumb, middle and end joint flexion); the thumb
is the directions of its three bones in the hand's frame (along the fingers, out of the back, towards the thumb). Poses
are of the left hand; the right hand mirrors them.

    pose("victory", side=0, rng=np.random.default_rng(0))   # [15, 3, 3], SMPL-H's finger joints 22-36
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from ..grammar import PHRASES
from .hand_mesh import CHAINS, FRAMES

Finger = tuple[float, float, float, float]
Bones = tuple[tuple[float, float, float], ...]

DOWN: list[Finger] = [(82, -3, 100, 55), (84, 0, 100, 55), (84, 3, 98, 55), (82, 8, 95, 55)]  # a fist's four fingers
TOGETHER: list[Finger] = [(3, -6, 3, 2), (3, 0, 3, 2), (3, 5, 3, 2), (4, 11, 4, 3)]
SPREAD: list[Finger] = [(-3, 9, 3, 2), (-4, 2, 3, 2), (-3, -6, 3, 2), (-3, -13, 4, 3)]

# The thumb's bones: beside the palm, far out, straight up from a fist, across the palm, at the index finger's tip (the
# pads touch), over folded fingers.
BESIDE: Bones = ((0.84, -0.20, 0.50), (0.95, -0.10, 0.28), (0.98, -0.08, 0.15))
OUT: Bones = ((0.58, -0.15, 0.80), (0.50, -0.08, 0.86), (0.42, 0.02, 0.90))
UP: Bones = ((0.62, -0.22, 0.75), (0.18, -0.12, 0.98), (-0.06, 0.0, 1.0))
ACROSS: Bones = ((0.72, -0.52, 0.30), (0.62, 0.02, -0.78), (0.40, 0.12, -0.90))
TOUCH: Bones = ((0.68, -0.65, 0.35), (0.87, -0.49, -0.02), (0.96, -0.25, -0.12))
OVER: Bones = ((0.66, -0.55, 0.50), (0.62, -0.62, -0.40), (0.25, -0.30, -0.92))


@dataclass(frozen=True)
class Gesture:
    """One gesture.

    spin: degrees that turn the picture so that the thumb rises. turn: degrees of the hand about its long axis, so that
    the opening between thumb and fingers shows the background. tip: degrees that the fingers lean to the viewer.
    loose: its variation (1: a few degrees; less where fingers must touch). views: those that show the gesture.
    """

    name: str
    phrases: tuple[str, ...]
    fingers: tuple[Finger, ...]
    thumb: Bones
    roll: float = 0.0  # twist of the thumb's first bone, degrees
    spin: float = 0.0
    turn: float = 0.0
    tip: float = 0.0
    loose: float = 1.0
    views: tuple[str, ...] = ("palm", "back")


def _g(name: str, fingers: Sequence[Finger], thumb: Bones, **more) -> Gesture:
    return Gesture(name, PHRASES[name], tuple(fingers), thumb, **more)


ALL = ("palm", "back", "side")
GESTURES: dict[str, Gesture] = {
    g.name: g
    for g in (
        _g("fist", DOWN, OVER, roll=35, views=ALL),
        _g("open_hand", TOGETHER, BESIDE),
        _g("spread_fingers", SPREAD, OUT),
        _g("pointing", [(2, 0, 3, 2), *DOWN[1:]], OVER, roll=35, views=ALL),
        _g("victory", [(0, 10, 3, 2), (0, -8, 3, 2), *DOWN[2:]], ACROSS, roll=30),
        _g("three_fingers", [(0, 8, 3, 2), (0, 0, 3, 2), (0, -8, 3, 2), DOWN[3]], ACROSS, roll=30),
        _g("four_fingers", SPREAD, ACROSS, roll=30),
        _g("thumbs_up", DOWN, UP, spin=80),
        _g("thumbs_down", DOWN, UP, spin=-80),
        _g("ok_sign", [(44, 6, 50, 29), (10, 2, 10, 5), (2, -4, 6, 4), (-4, -12, 6, 4)],
           TOUCH, loose=0.4, turn=40, views=ALL),
        _g("call_me", [*DOWN[:3], (-2, -14, 4, 3)], OUT),
        _g("horns", [(0, 3, 3, 2), DOWN[1], DOWN[2], (0, -3, 4, 3)], ACROSS, roll=30),
        _g("love_you", [(0, 6, 3, 2), DOWN[1], DOWN[2], (-2, -8, 4, 3)], OUT),
        _g("pinky_up", [*DOWN[:3], (0, -2, 4, 3)], OVER, roll=35),
        _g("finger_gun", [(2, 0, 3, 2), *DOWN[1:]], UP, spin=75),
        _g("pinch", [(46, 6, 49, 25), *DOWN[1:]], TOUCH, loose=0.4, turn=52, views=ALL),
        _g("claw", [(-12, 9, 68, 42), (-14, 2, 68, 42), (-12, -6, 68, 42), (-10, -13, 66, 42)],
           ((0.62, -0.35, 0.70), (0.70, -0.45, 0.45), (0.75, -0.6, -0.1)), views=ALL, turn=10, tip=-10),
        _g("cupped_hand", [(38, -5, 24, 12), (36, 0, 24, 12), (38, 5, 24, 12), (40, 11, 24, 12)],
           ((0.82, -0.45, 0.36), (0.90, -0.40, 0.10), (0.95, -0.30, 0.0)), spin=30, tip=-18, views=ALL),
        _g("crossed_fingers", [(14, -12, 4, 2), (-5, 13, 12, 8), *DOWN[2:]], ACROSS, roll=30, loose=0.5),
        _g("vulcan", [(0, 7, 3, 2), (0, 12, 3, 2), (0, -14, 3, 2), (0, -8, 4, 3)], OUT),
        _g("c_shape", [(42, -5, 42, 24), (42, 0, 42, 24), (42, 4, 42, 24), (42, 10, 42, 24)],
           ((0.52, -0.78, 0.35), (0.55, -0.83, -0.05), (0.75, -0.65, -0.1)), turn=55, views=ALL),
        _g("three_with_thumb", [(0, 8, 3, 2), (0, -6, 3, 2), *DOWN[2:]], OUT),
        _g("tucked_thumb", TOGETHER, ACROSS, roll=30),
        _g("pinched_fingers", [(57, -6, 36, 18), (61, 1, 34, 16), (60, 10, 34, 16), (56, 24, 32, 14)],
           ((0.72, -0.69, 0.12), (0.85, -0.52, -0.08), (0.95, -0.28, -0.12)),
           loose=0.4, views=ALL, turn=35, tip=-15),
    )
}  # fmt: skip
NAMES = tuple(GESTURES)
ORDER = (1, 2, 4, 3)  # SMPL-H stores index, middle, little, ring, then the thumb


def rotation(axis: ndarray, degrees: float) -> ndarray:
    """[3,3] rotation by `degrees` about a unit axis (Rodrigues)."""
    x, y, z = axis
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * (k @ k)


def between(a: ndarray, b: ndarray) -> ndarray:
    """[3, 3] smallest rotation from unit vector a to unit vector b (undefined for opposite ones)."""
    v, c = np.cross(a, b), a @ b
    k = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    return np.eye(3) + k + k @ k / max(1 + c, 1e-6)


def _finger(angles: ndarray, finger: int) -> list[ndarray]:
    _, back, side = FRAMES[finger]
    knuckle, spread, middle, end = angles
    first = rotation(back, -spread) @ rotation(side, -knuckle)
    return [first, rotation(side, -middle), rotation(side, -end)]


def _thumb(bones: ndarray, roll: float) -> list[ndarray]:
    rest = np.diff(CHAINS[0], axis=0)
    out, world = [], np.eye(3)
    for bone in range(3):
        target = bones[bone] / np.linalg.norm(bones[bone])
        turned = between(world @ rest[bone] / np.linalg.norm(rest[bone]), target) @ world
        if bone == 0 and roll:
            turned = rotation(target, roll) @ turned
        out.append(world.T @ turned)
        world = turned
    return out


def pose(name: str, side: int = 0, rng: np.random.Generator | None = None) -> ndarray:
    """Finger rotations of a gesture, [15, 3, 3] float32 in SMPL-H's order, for side 0 (left) or 1 (right).

    With `rng` the pose varies by a few degrees. Raises KeyError for an unknown name.
    """
    gesture = GESTURES[name]
    fingers, bones, roll = np.array(gesture.fingers, float), np.array(gesture.thumb, float), gesture.roll
    if rng is not None:
        noise = rng.normal(size=(4, 4)).clip(-2, 2) * (3.5, 1.8, 4.0, 3.0) + rng.normal(size=1) * (2, 0, 2, 1)
        fingers = fingers + gesture.loose * noise
        bones = bones + gesture.loose * 0.045 * rng.normal(size=(3, 3)).clip(-2, 2)
        roll += gesture.loose * 4 * rng.normal()
    return pose_of(fingers, bones, roll, side)


def pose_of(fingers: ndarray, thumb: ndarray, roll: float, side: int = 0) -> ndarray:
    """Finger rotations [15,3,3] float32 in SMPL-H's order from four fingers' angles [4,4] and the thumb's bones [3,3],
    written for the left hand; mirrored for side 1."""
    out = np.stack([r for finger in ORDER for r in _finger(fingers[finger - 1], finger)] + _thumb(thumb, roll))
    if side:
        out = out * np.array([[1.0, -1, -1], [-1, 1, 1], [-1, 1, 1]])  # S R S with S = diag(-1, 1, 1)
    return out.astype(np.float32)
