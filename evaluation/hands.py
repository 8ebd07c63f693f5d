"""Matches the hands that a picture should show with the hands that a detector found, and crops them.

rows = match(asked, found, (128, 128))       # a Hand for each requested hand, found or missed
crop(image, rows[0].joints)                  # uint8 [S, S, 3]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

import numpy as np

from ..detection.detect import Found

PCK = (0.05, 0.10, 0.20)  # of a hand's size
FAR = 1.0  # hand sizes: a found hand with a larger mean distance is another hand
MARGIN = 1.2  # of a crop, times the joints' box
MIN_CROP_PIXELS = 32  # pixels of a crop's side


@dataclass
class Asked:
    """A hand that a picture was painted from. joints: [21, 2] in [0, 1] of width and height; marks: the same in the
    detector's convention (`convention.py`), None where the hand's pose is not known."""

    side: str
    joints: np.ndarray = field(repr=False)
    marks: np.ndarray | None = field(default=None, repr=False)


@dataclass
class Hand:
    """A hand that was asked for, that was found, or both. distances: of each joint, in sizes of the hand [21];
    marked: the same in the detector's convention."""

    asked: Asked | None
    found: Found | None
    distances: np.ndarray | None = field(default=None, repr=False)
    marked: np.ndarray | None = field(default=None, repr=False)

    @property
    def score(self) -> float:
        return 0.0 if self.found is None else self.found.score

    @property
    def joints(self) -> np.ndarray:
        """The joints that were asked for, else those that were found."""
        hand = self.asked or self.found
        assert hand is not None
        return hand.joints


def hand_size(joints: np.ndarray, shape: tuple[int, ...]) -> float:
    """The longer side of the joints' box in pixels, of a picture [H, W, ...]."""
    return float(np.ptp(joints * (shape[1], shape[0]), axis=0).max())


def match(asked: Sequence[Asked], found: Sequence[Found], shape: tuple[int, ...]) -> list[Hand]:
    """Matches each requested hand with a found one, or with none, so that the sum of distances is smallest.

    The detector's side (left or right) does not influence the match, because it is measured, too. Without requested
    hands the result is one Hand: the detector's surest one, or a miss. shape: of the picture.
    """
    if not asked:
        return [Hand(None, max(found, key=lambda one: one.score, default=None))]
    scale = np.array([shape[1], shape[0]])
    apart = np.array([[_apart(one, other, scale, shape).mean() for other in found] for one in asked])
    apart = apart.reshape(len(asked), len(found))
    # Few hands: try all ways. A hand without a partner costs FAR.
    places = [*range(len(found)), *[-1] * len(asked)]
    best = min(
        set(permutations(places, len(asked))) if len(places) < 9 else [_nearest_first(apart)],
        key=lambda way: sum(FAR if k < 0 or apart[i, k] > FAR else apart[i, k] for i, k in enumerate(way)),
    )
    hands = []
    for i, k in enumerate(best):
        if k < 0 or apart[i, k] > FAR:
            hands.append(Hand(asked[i], None))
        else:
            one, other = asked[i], found[k]
            marks = None if one.marks is None else _apart(replace(one, joints=one.marks), other, scale, shape)
            hands.append(Hand(one, other, _apart(one, other, scale, shape), marks))
    return hands


def _apart(asked: Asked, found: Found, scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.linalg.norm((asked.joints - found.joints) * scale, axis=1) / max(hand_size(asked.joints, shape), 1.0)


def _nearest_first(apart: np.ndarray) -> tuple[int, ...]:
    """For many hands: takes the nearest pair first, each hand once."""
    way, left = [-1] * len(apart), apart.copy()
    while left.size and left.min() < np.inf:
        i, k = np.unravel_index(left.argmin(), left.shape)
        way[int(i)] = int(k)
        left[i, :] = left[:, k] = np.inf
    return tuple(way)


def crop(image: np.ndarray, joints: np.ndarray, margin: float = MARGIN, least: int = MIN_CROP_PIXELS) -> np.ndarray:
    """Cuts a square around a hand: `margin` times its joints' box, at least `least` pixels.

    Outside the picture its edge repeats. image: uint8 [H, W, 3], joints: [21, 2] in [0, 1].
    """
    height, width = image.shape[:2]
    points = joints * (width, height)
    low, high = points.min(0), points.max(0)
    largest = 4 * max(height, width)  # for hands far outside
    side = round(min(max(margin * float((high - low).max()), least), largest))
    x, y = (np.clip((low + high) / 2, -side, (width + side, height + side)) - side / 2).round().astype(int)
    rows = np.clip(np.arange(y, y + side), 0, height - 1)
    columns = np.clip(np.arange(x, x + side), 0, width - 1)
    return image[rows[:, None], columns]
