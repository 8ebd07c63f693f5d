"""A hand where a person says that one is: upright, its palm or back towards the viewer, as large as its box."""

from __future__ import annotations

import numpy as np

from ..contract import HAND_JOINTS
from ..detection.arms import HandEstimate
from ..detection.fit import FACING, MIRROR
from ..detection.hands import Seen
from ..detection.named import posed
from ..fingers import SIDES


def placed(box: np.ndarray, side: str, gesture: str, rest: np.ndarray) -> Seen:
    """box: left, top, right, bottom in pixels. rest: [62, 3] metres. Raises DetectionError for an unknown gesture."""
    number = SIDES.index(side)
    bones = np.asarray(rest, np.float64)[list(HAND_JOINTS[number])]
    turn = FACING[0] * MIRROR if number else FACING[0]
    flat = (turn @ (bones - bones[0]).T).T[:, :2] * (1, -1)
    hand = posed(HandEstimate(number, turn, np.zeros((15, 3)), flat), gesture, rest)
    low, high = hand.joints_2d.min(0), hand.joints_2d.max(0)
    scale = float(((box[2:] - box[:2]) / np.maximum(high - low, 1e-9)).min())
    hand.joints_2d = (hand.joints_2d - (low + high) / 2) * scale + (box[:2] + box[2:]) / 2
    return Seen(hand)
