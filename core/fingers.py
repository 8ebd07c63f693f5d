"""The fingers of a hand as a rig: the axes that their joints turn about, how far they turn, and named gestures.

A finger joint turns by three angles: bend towards the palm, to the side, and twist about its bone. Joints come in the
order of the 21 points: thumb to little finger, three joints each from root to tip.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

import numpy as np

from .contract import HAND_JOINTS

SIDES = ("left", "right")
# How far a finger's joints turn, in degrees: bent towards the palm (from, to), to the side, and about the bone. After
# Lin, Wu and Huang, "Modeling the constraints of human hand motion" (2000), a little wider; thumbs turn more freely.
LIMITS_DEGREES = {
    "root": ((-30, 95), 25, 12),
    "middle": ((-8, 115), 6, 6),
    "end": ((-12, 90), 6, 6),
    "thumb root": ((-60, 70), 60, 50),
    "thumb middle": ((-40, 70), 25, 20),
    "thumb end": ((-25, 95), 12, 12),
}
# The 15 finger joints in our order, as places in a hand's 15 rotations, which follow MANO: index, middle, little, ring,
# thumb.
MANO = np.array([HAND_JOINTS[0][1 + 4 * finger + joint] - 22 for finger in range(5) for joint in range(3)])


def limits(finger: int) -> np.ndarray:
    """Lowest and highest bend, side and twist of a finger's three joints, [9, 2] degrees. finger: 0 is the thumb."""
    names = ("root", "middle", "end") if finger else ("thumb root", "thumb middle", "thumb end")
    return np.array(
        [pair for n in names for pair in (LIMITS_DEGREES[n][0], *((-x, x) for x in LIMITS_DEGREES[n][1:]))], float
    )


def axes(rest: np.ndarray, side: int) -> np.ndarray:
    """The axes of bend, side and twist of each finger joint, [5, 3, 3, 3]: finger, joint, axis, xyz.

    rest: [21, 3], the hand's joints in the template, where all frames are equal. side: 0 is left."""
    index, little = rest[5] - rest[0], rest[17] - rest[0]
    out = _unit(np.cross(little, index)) * (1 if side == 0 else -1)  # away from the back of the hand
    found = np.empty((5, 3, 3, 3))
    for finger in range(5):
        for joint in range(3):
            start = 1 + 4 * finger + joint
            bone = _unit(rest[start + 1] - rest[start])
            bend = _unit(np.cross(bone, out) if finger else np.cross(_unit(index - little), bone))
            found[finger, joint] = bend, np.cross(bone, bend), bone
    return found


@cache
def gestures() -> dict[str, np.ndarray]:
    """Name -> the left hand's axis-angle [45]."""
    text = resources.files(__package__).joinpath("gestures.json").read_text(encoding="utf-8")
    return {name: np.array(values) for name, values in json.loads(text).items()}


def _unit(v: np.ndarray) -> np.ndarray:
    return v / max(float(np.linalg.norm(v)), 1e-9)
