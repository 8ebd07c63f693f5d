"""From hands estimated one by one (MANO, in a picture) to a person in SMPL-H who shows them.

    arrays = people([HandEstimate(LEFT, turn, fingers, joints_2d), ...], (height, width), rest)

A hand alone does not determine its arm. One hand: the arm is stretched in the forearm's direction, with a straight
wrist. A left and a right hand of similar size, within reach, become one person: inverse kinematics moves
the wrists to their places in the picture and bends them least. Other hands become people of one hand each. The torso
stands upright and faces the camera; it is a guess, and only the hands are data.

`rest` is the body that shows them: its 62 joints at rest, metres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..contract import HAND_JOINTS
from ..hands import ABSENT, POSES
from ..kinematics import forward, radius
from ..rotations import axis_angle_to_matrix, matrix_to_axis_angle

Arrays = dict[str, np.ndarray]
Size = tuple[float, float]  # height, width

LEFT, RIGHT = 0, 1
MIRROR = np.diag([-1.0, 1.0, 1.0])
SHOULDER, ELBOW, WRIST = (16, 17), (18, 19), (20, 21)
SIZES = 1.6  # ratio of sizes from which two hands belong to two people
REACH = 0.97  # of an arm's length, at most
AHEAD = 0.3  # metres from the shoulders forward to two wrists
SWIVELS = 36  # directions of the elbow to try


@dataclass
class HandEstimate:
    """One hand. side: LEFT or RIGHT; turn: [3, 3], from the template's frame to ours (x right in the picture, y up, z
    towards the camera); fingers: [15, 3] axis-angle in MANO's order, flat hand = 0; joints_2d: [21, 2] pixels, wrist,
    then thumb to little finger."""

    side: int
    turn: np.ndarray
    fingers: np.ndarray
    joints_2d: np.ndarray


def people(hands: Sequence[HandEstimate], size: Size, rest: np.ndarray) -> Arrays:
    """The SMPL-H arrays for all hands of a picture (height, width): of one person, or with an axis of
    several in front."""
    left, right = ([hand for hand in hands if hand.side == side] for side in (LEFT, RIGHT))
    if len(left) == len(right) == 1:
        both = person_of([left[0], right[0]], size, rest)
        if both is not None:
            return both
    each = [one for hand in hands if (one := person_of([hand], size, rest)) is not None]
    if len(each) == 1:
        return each[0]
    return {name: np.stack([one[name] for one in each]) for name in each[0]}


def person_of(hands: Sequence[HandEstimate], size: Size, rest: np.ndarray) -> Arrays | None:
    """One hand, or a left and a right one, as a person; None where one person cannot have both."""
    hands = sorted(hands, key=lambda hand: hand.side)
    rotations = np.tile(np.eye(3), (52, 1, 1))
    placement, joints_2d = ABSENT.copy(), np.zeros((2, 21, 2), np.float32)
    for hand in hands:
        rotations[22 + 15 * hand.side : 37 + 15 * hand.side] = axis_angle_to_matrix(hand.fingers.astype(np.float64))
        placement[hand.side] = place(hand.joints_2d, size)
        joints_2d[hand.side] = hand.joints_2d / (size[1], size[0])
    if len(hands) == 1:
        rotations[SHOULDER[hands[0].side]] = hands[0].turn
    elif not _reach(rotations, placement, [hand.turn for hand in hands], rest):
        return None
    vectors = matrix_to_axis_angle(rotations).astype(np.float32)
    visibility = np.zeros(2, np.float32)
    visibility[[hand.side for hand in hands]] = 1
    return {
        **{name: vectors[joints].reshape(-1) for name, joints in POSES.items()},
        "betas": np.zeros(10, np.float32),
        "placement": placement,
        "visibility": visibility,
        "joints_2d": joints_2d,
    }


def place(joints_2d: np.ndarray, size: Size) -> np.ndarray:
    """[21, 2] pixels of a picture (height, width) -> presence, centre x, y, log size, as the contract has them."""
    view = (joints_2d - np.array([size[1], size[0]]) / 2) / (size[0] / 2) * (1, -1)
    return np.array([1, *view.mean(0), np.log(np.maximum(radius(view), 1e-6))], np.float32)


def _reach(rotations: np.ndarray, placement: np.ndarray, turns: Sequence[np.ndarray], rest: np.ndarray) -> bool:
    """Writes both arms' rotations so that one camera sees both hands in their places; False if none can."""
    relative = [_from_wrist(rotations, side, turns[side], rest) for side in (LEFT, RIGHT)]  # [21, 3] metres
    means = [points[:, :2].mean(0) for points in relative]
    radii = [radius(points[:, :2]) for points in relative]
    scales = np.exp(placement[:, 3]) / radii
    if scales.max() / scales.min() > SIZES:
        return False
    scale = np.sqrt(scales.prod())
    wrists = np.stack([placement[side, 1:3] / scale - means[side] for side in (LEFT, RIGHT)])
    shoulders = rest[list(SHOULDER)]
    wrists += shoulders[:, :2].mean(0) - wrists.mean(0)  # the camera's shift is free: between the shoulders
    for side in (LEFT, RIGHT):
        upper, fore = (rest[b[side]] - rest[a[side]] for a, b in ((SHOULDER, ELBOW), (ELBOW, WRIST)))
        most = REACH * float(np.linalg.norm(upper) + np.linalg.norm(fore))
        flat = float(np.linalg.norm(wrists[side] - shoulders[side, :2]))
        if flat > most:
            return False
        depth = min(AHEAD, float(np.sqrt(most**2 - flat**2)))
        target = np.append(wrists[side] - shoulders[side, :2], depth)
        least = 1.05 * abs(float(np.linalg.norm(upper) - np.linalg.norm(fore))) + 0.05
        if np.linalg.norm(target) < least:  # at the shoulder itself: farther ahead
            target[2] = np.sqrt(least**2 - flat**2)
        above, below = _arm(upper, fore, target, turns[side])
        rotations[SHOULDER[side]] = above
        rotations[ELBOW[side]] = above.T @ below
        rotations[WRIST[side]] = below.T @ turns[side]
    return True


def _from_wrist(rotations: np.ndarray, side: int, turn: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """A hand's joints [21, 3] relative to its wrist, in metres, turned by `turn`."""
    alone = np.tile(np.eye(3), (52, 1, 1))
    alone[22:] = rotations[22:]
    points = forward(alone, rest)[1][list(HAND_JOINTS[side])]
    return (points - points[0]) @ turn.T


def _arm(upper: np.ndarray, fore: np.ndarray, target: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orientations of upper arm and forearm that move the wrist to `target` (from the shoulder) and bend it least.

    upper, fore: the bones at rest; turn: the hand's orientation. Two bones and two lengths: the elbow lies on a circle.
    """
    a, b, d = (float(np.linalg.norm(vector)) for vector in (upper, fore, target))
    axis = target / d
    along = (a**2 + d**2 - b**2) / (2 * d)
    radius = np.sqrt(max(a**2 - along**2, 0.0))
    first = np.cross(axis, [1.0, 0.0, 0.0] if abs(axis[0]) < 0.9 else [0.0, 1.0, 0.0])
    first /= np.linalg.norm(first)
    second = np.cross(axis, first)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for angle in np.linspace(0, 2 * np.pi, SWIVELS, endpoint=False):
        elbow = along * axis + radius * (np.cos(angle) * first + np.sin(angle) * second)
        above = between(upper / a, elbow / a)
        below = between(above @ fore / b, (target - elbow) / b) @ above
        straight = float(np.trace(below.T @ turn))  # 1 + 2 cos(the wrist's angle)
        if best is None or straight > best[0]:
            best = straight, above, below
    assert best is not None
    return best[1], best[2]


def between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smallest rotation [3, 3] that takes unit vector a to unit vector b."""
    axis, cosine = np.cross(a, b), float(a @ b)
    square = float(axis @ axis)  # (1 + cosine) (1 - cosine), exact near cosine = -1
    if cosine < 0 and square < 1e-14:  # half a turn about anything across
        across = np.cross(a, np.eye(3)[np.abs(a).argmin()])
        across /= np.linalg.norm(across)
        return 2 * np.outer(across, across) - np.eye(3)
    k = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + k + k @ k * ((1 - cosine) / square if cosine < 0 else 1 / (1 + cosine))
