"""What a person wishes of a picture's hands, and which of them are painted again. Needs OpenCV for found hands alone.

chosen, said = choose(seen, Wish(gesture="open_hand"), picture, rest)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..detection.arms import HandEstimate
from ..detection.fit import Fitted
from ..detection.hands import Seen
from ..detection.named import posed, turned
from ..errors import DetectionError
from ..hints import hint

SURE = 0.5  # a less sure hand is not painted unless a person says what it does
SMALLEST = 12.0  # pixels of a hand's box: below, nothing says what it does
MOVED = 0.04  # sizes of the hand: a painted hand that the detector sees farther from the old one is not kept
SURELY = 0.85  # how sure a hand is that lies as its points say, whatever its arm does
BENT = 20.0  # degrees between a less sure hand and its arm in the picture, at most
STRENGTH = 0.95
KEEP_STRENGTH = 0.6  # with the pose kept
SAY = "Say what it does with --gesture, or take --all."


@dataclass(frozen=True)
class Wish:
    """What a person says. gesture, side: of every hand; None leaves what was found. every: also unsure hands."""

    gesture: str | None = None
    every: bool = False
    caption: str | None = None
    strength: float | None = None
    keep_pose: bool = False

    @property
    def automatic(self) -> bool:
        """Whether the program decides which hands need a repair."""
        return self.gesture is None and not self.every and not self.keep_pose

    @property
    def strong(self) -> float:
        return self.strength if self.strength is not None else KEEP_STRENGTH if self.keep_pose else STRENGTH


def choose(seen: Sequence[Seen], wish: Wish, picture: np.ndarray, rest: np.ndarray) -> tuple[list[Seen], list[str]]:
    """The hands to paint, shaped as the person wishes, and a sentence for each other one. picture: uint8 [H, W, 3]."""
    chosen, said = [], []
    height, width = picture.shape[:2]
    for one in seen:
        if float(np.ptp(one.hand.joints_2d, axis=0).max()) < SMALLEST:
            said.append(f"{the(one)} is smaller than {SMALLEST:.0f} pixels, so it stays. Give a larger picture.")
        elif not (one.hand.joints_2d.mean(0) > 0).all() or not (one.hand.joints_2d.mean(0) < (width, height)).all():
            said.append(f"{the(one)} lies outside of the picture, so it stays.")
        elif one.sureness is not None and one.sureness < SURE and not (wish.gesture or wish.every):
            said.append(f"{the(one)} stays as it is: its pose is only {one.sureness:.0%} sure. {SAY}")
        elif wish.gesture is not None:
            if one.sureness is not None and one.sureness < SURE:
                said.append(f"{the(one)} is only {one.sureness:.0%} sure, so it may lie otherwise. Look at the result.")
            chosen.append(replace(one, hand=posed(_along_its_arm(one, picture), wish.gesture, rest)))
        else:
            chosen.append(one)
    return chosen, said


def _along_its_arm(one: Seen, picture: np.ndarray) -> HandEstimate:
    """The hand; turned in the direction of its arm where it is not quite sure and the arm lies otherwise. Points of a
    melted hand do not tell how it lies."""
    hand, found = one.hand, one.found
    if not isinstance(hand, Fitted) or found is None or (one.sureness or 0.0) >= SURELY:
        return hand
    from .arm import arm_of  # needs OpenCV

    way = arm_of(picture, found.joints * picture.shape[1::-1])
    if way is None:
        return hand
    along, degrees = turned(hand, way)
    return along if degrees > BENT else hand


def the(one: Seen) -> str:
    return f"The {one.side} hand at ({one.hand.joints_2d[:, 0].mean():.0f}, {one.hand.joints_2d[:, 1].mean():.0f})"


def known_gesture(name: str, names: Sequence[str]) -> str:
    """Raises DetectionError for an unknown gesture."""
    if name not in names:
        raise DetectionError(
            f"--gesture must be one of {', '.join(names)}, got {name!r}. {hint(name, '', names)}".rstrip()
        )
    return name
