"""How people hold things up: which way a thing stands and looks, and where hand and arm follow.

grasp = hold(figure, RIGHT, "cup", rng)
places_of(figure, RIGHT, grasp, thing_mesh("cup", grasp.size).vertices)     # [N,3] in the world
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from .gestures import rotation
from .human_poses import FLIP, MIRROR, Figure, X, Y, Z, rest_joints, unit
from .things import Grasp, grasps, held

BENT = 75.0  # degrees that a wrist may turn against the forearm
HELD_AT = (0.02, -0.12, 0.30)  # metres from the shoulder to the wrist
MIDDLE_FINGER = [20, 25, 26, 27]


class PoseError(Exception):
    """Why a body cannot do what it was told."""


@dataclass(frozen=True)
class Carry:
    """How a left hand holds a thing upright, in degrees. `headings`: about the vertical, which way the fingers look, or
    the thing's front (`front`): 0 to the viewer, 90 to the middle of the body, 180 to the person. `lean`: how far it
    tips at random; `tip`: how far its upper end tips to the person."""

    headings: tuple[tuple[float, float], ...]
    front: bool = False
    lean: float = 7.0
    tip: float = 0.0


CARRIES = {
    "cup": Carry(((-25, 80),), lean=5),
    "ball": Carry(((-40, 80),), lean=14),
    "phone": Carry(((145, 215), (150, 205), (-25, 25)), front=True, lean=8),
    "pen": Carry(((0, 90),), lean=10, tip=25),
    "stick": Carry(((-10, 95),), lean=16),
    "book": Carry(((145, 210), (-30, 30)), front=True, lean=8),
}


def hold(figure: Figure, side: int, thing: str, rng: np.random.Generator) -> Grasp:
    """Holds a thing up with one hand of a standing figure. Raises PoseError where the wrist cannot turn so."""
    rows, carry = grasps(thing), CARRIES[thing]
    grasp = rows[rng.integers(len(rows))]
    low, high = carry.headings[rng.integers(len(carry.headings))]
    up = rotation(X, -carry.tip) @ Y
    local_up, local_ahead = grasp.turn[:, 1], grasp.turn[:, 2] if carry.front else X
    if thing == "ball":  # the palm looks up, or forward
        up, local_up = rotation(Z, rng.uniform(-20, 40)) @ rotation(X, rng.uniform(-10, 85)) @ Y, -Y
    up = rotation(unit(rng.normal(size=3)), rng.normal(0, carry.lean)) @ up
    angle = np.radians(rng.uniform(low, high))
    ahead = np.array([-np.sin(angle), 0.0, np.cos(angle)])
    if thing == "ball":  # its fingers look up where the palm looks forward
        ahead = ahead * (1, 0, max(up[1], 0.05)) + (0, 1 - abs(up[1]), 0)
    wrist = np.array(HELD_AT) + rng.normal(0, (0.04, 0.04, 0.02))
    reach(figure, side, wrist, frame_of(up, ahead) @ frame_of(local_up, local_ahead).T, grasp.hand(side))
    return grasp


def reach(figure: Figure, side: int, wrist: ndarray, hand: ndarray, fingers: ndarray) -> None:
    """Brings a hand to a place beside the shoulder; wrist [3] (metres) and hand [3,3] are written for the left one.
    Raises PoseError where the wrist cannot turn so."""
    elbow = np.array([0.6, -1.0, 0.0])
    if side:
        wrist, hand, elbow = wrist * FLIP, hand * MIRROR, elbow * FLIP
    root = figure.rotations[0]
    _, places = figure.kinematics()
    figure.rotations[22 + 15 * side : 37 + 15 * side] = fingers
    figure.reach(side, places[16 + side] + root @ (wrist * figure.scale), root @ hand, root @ elbow)
    if bend(figure.rotations[20 + side]) > BENT:
        raise PoseError("bent")


def frame_of(up: ndarray, ahead: ndarray) -> ndarray:
    """[3,3]: columns ahead (made square to up), up, and what is square to both."""
    up = unit(up)
    ahead = unit(ahead - up * (ahead @ up))
    return np.stack([ahead, up, np.cross(ahead, up)], 1)


def bend(turn: ndarray) -> float:
    """Degrees by which a rotation [3,3] turns."""
    return float(np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1))))


def hand_scale(figure: Figure) -> float:
    """The length of a figure's hand, as part of the average one's."""
    lengths = [np.linalg.norm(np.diff(j[MIDDLE_FINGER], axis=0), axis=1).sum() for j in (figure.rest, rest_joints())]
    return float(lengths[0] / lengths[1])


def places_of(figure: Figure, side: int, grasp: Grasp, points: ndarray) -> ndarray:
    """Where points [N,3] of a thing are in the world, while a figure's hand holds it."""
    turns, places = figure.kinematics()
    return held(points, grasp, places[20 + side], turns[20 + side], side, hand_scale(figure))
