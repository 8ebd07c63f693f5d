"""Where the arm of a hand comes from, by the colours of its skin.

A melted hand has points that lie anywhere, but its arm lies where it lay. So the arm tells in which direction an unsure
hand stretches. Needs OpenCV.
"""

from __future__ import annotations

import numpy as np

from ..detection.hands import Window
from . import regions

WIDE, LOOKED_AT = 3.6, 128  # boxes of the hand: the crop in which the arm is looked for; its pixels
NEAR, FAR = 0.7, 1.5  # sizes of the hand from its middle: between them lies the arm, and no finger
LEAST, TOGETHER = 0.01, 0.8  # squares of the hand's size that an arm covers; and how alike its directions are, 0 to 1


def arm_of(picture: np.ndarray, points: np.ndarray) -> np.ndarray | None:
    """The direction from the forearm to the hand's middle, a unit vector [2] in the picture, y down. None where no skin
    lies around the hand, or skin lies on several sides of it.

    picture: uint8 [H, W, 3]. points: [21, 2] pixels, where the hand is."""
    size = regions.size_of(points)
    left, top = corner = (points.min(0) + points.max(0) - WIDE * size) / 2
    window, scale = Window(float(left), float(top), WIDE * size, WIDE * size), LOOKED_AT / (WIDE * size)
    crop, shown = window.cut(picture, (LOOKED_AT, LOOKED_AT)), (points - corner) * scale
    hand, alike = regions.old_hand(crop, shown)
    skin = regions.hanging(regions.cleaned(hand | alike), hand)
    y, x = np.nonzero(skin)
    away = shown.mean(0) - np.stack([x, y], -1)
    far = np.linalg.norm(away, axis=1) / (scale * size)
    places = np.stack([x, y], -1) / scale + corner
    inside = ((places >= 0) & (places < picture.shape[1::-1])).all(1)  # the edge goes on beyond the picture
    arm = inside & (far > NEAR) & (far < FAR)
    if arm.sum() < LEAST * (scale * size) ** 2:
        return None
    way = (away[arm] / np.linalg.norm(away[arm], axis=1, keepdims=True)).mean(0)
    length = float(np.linalg.norm(way))
    return way / length if length > TOGETHER else None
