"""Hands that a picture should show beside hands that a detector found: who is who, how far apart, and crops of them.

rows = match(asked, found, (128, 128))       # a Hand for each that was asked for, found or missed
crop(image, rows[0].joints)                  # uint8 [S, S, 3]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np

from .detect import Found

PCK = (0.05, 0.10, 0.20)  # of a hand's size
FAR = 1.0  # hand sizes: a hand that is farther than this on the average is another one
MARGIN = 1.2  # of a crop, times the joints' box
LEAST = 32  # pixels of a crop's side


@dataclass
class Asked:
    """A hand that a picture was painted from. joints: [21, 2] in [0, 1] of width and height."""

    side: str
    joints: np.ndarray = field(repr=False)


@dataclass
class Hand:
    """A hand that was asked for, that was found, or both. Distances are in sizes of the hand, one a joint: [21]."""

    asked: Asked | None
    found: Found | None
    distances: np.ndarray | None = field(default=None, repr=False)

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
    """A Hand for each that was asked for, with the found one that is nearest, in the way that is nearest altogether.

    What the detector takes a hand for (left or right) has no say in it: that is measured, too. Where nothing was asked
    for, each picture has one Hand: the one that the detector is surest of, or a miss. shape: of the picture.
    """
    if not asked:
        return [Hand(None, max(found, key=lambda one: one.score, default=None))]
    scale = np.array([shape[1], shape[0]])
    apart = np.array([[_apart(one, other, scale, shape).mean() for other in found] for one in asked])
    apart = apart.reshape(len(asked), len(found))
    # A handful at most: all ways are tried. Those that go without one are far from nothing.
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
            hands.append(Hand(asked[i], found[k], _apart(asked[i], found[k], scale, shape)))
    return hands


def _apart(asked: Asked, found: Found, scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.linalg.norm((asked.joints - found.joints) * scale, axis=1) / max(hand_size(asked.joints, shape), 1.0)


def _nearest_first(apart: np.ndarray) -> tuple[int, ...]:
    """For crowds: pairs from the nearest on, each hand once."""
    way, left = [-1] * len(apart), apart.copy()
    while left.size and left.min() < np.inf:
        i, k = np.unravel_index(left.argmin(), left.shape)
        way[int(i)] = int(k)
        left[i, :] = left[:, k] = np.inf
    return tuple(way)


def crop(image: np.ndarray, joints: np.ndarray, margin: float = MARGIN, least: int = LEAST) -> np.ndarray:
    """A square around a hand: `margin` times its joints' box, at least `least` pixels; the picture's edge goes on
    outside. image: uint8 [H, W, 3], joints: [21, 2] in [0, 1]."""
    height, width = image.shape[:2]
    points = joints * (width, height)
    low, high = points.min(0), points.max(0)
    largest = 4 * max(height, width)  # of what lies far outside
    side = round(min(max(margin * float((high - low).max()), least), largest))
    x, y = (np.clip((low + high) / 2, -side, (width + side, height + side)) - side / 2).round().astype(int)
    rows = np.clip(np.arange(y, y + side), 0, height - 1)
    columns = np.clip(np.arange(x, x + side), 0, width - 1)
    return image[rows[:, None], columns]
