"""Hand gestures of the demo's people: the demo's twenty-four on a real hand, and those that need one.

Angles are `contacts.json`'s, which `contacts.py` solves on the mesh: what shall touch touches, and nothing passes
through anything else. Each gesture has a few solutions, so that hands differ; free fingers vary by some degrees.

    hand_pose("ok_sign", side=0, rng=np.random.default_rng(0))   # [15,3,3], SMPL-H's finger joints 22-36
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy import ndarray

from .gestures import ACROSS, BESIDE, DOWN, GESTURES, OUT, OVER, Bones, Finger, Gesture, pose_of

FILE = Path(__file__).with_name("contacts.json")
RELAXED = [(18, -2, 22, 12), (22, 0, 26, 14), (26, 3, 28, 15), (30, 6, 28, 15)]
EASY = ((0.80, -0.36, 0.45), (0.90, -0.33, 0.22), (0.95, -0.25, 0.08))  # the thumb of a relaxed hand
STRAIGHT = [(2, -5, 2, 1), (2, 0, 2, 1), (2, 4, 2, 1), (3, 9, 3, 2)]

# Parts of a hand: finger (thumb, index, middle, ring, little: 0-4) and bone (0-2, from the palm), or the palm.
PALM = (-1, 0)
T, I, M, R, L = range(5)
PAD, BACK, ANY = -1, 1, 0  # which side of a part: where the finger print is, where the nail is, either


def _tip(finger: int, where: int = PAD) -> tuple[int, int, int]:
    return finger, 2, where


def _bone(finger: int, bone: int, where: int = BACK) -> tuple[int, int, int]:
    return finger, bone, where


PALM_ANY = (*PALM, ANY)
FOLDED = {f: ((_tip(f, ANY), PALM_ANY),) for f in (I, M, R, L)}  # a folded finger's end lies on the palm


def _folded(*fingers: int) -> tuple:
    return tuple(pair for f in fingers for pair in FOLDED[f])


def _new(name: str, phrases: str, fingers: Sequence[Finger], thumb: Bones) -> Gesture:
    return Gesture(name, tuple(phrase.strip() for phrase in phrases.split("|")), tuple(fingers), thumb)


NEW = {
    g.name: g
    for g in (
        _new("relaxed", "relaxed | hanging loosely", RELAXED, EASY),
        _new("flat", "held flat with straight fingers", STRAIGHT, BESIDE),
        _new("prayer", "held straight, the thumb beside the palm",
             [(-2, -5, 1, 1), (-2, 0, 1, 1), (-2, 4, 1, 1), (-2, 9, 1, 1)],
             ((0.75, 0.22, 0.60), (0.93, 0.20, 0.30), (0.97, 0.15, 0.20))),
        _new("two_with_thumb",
                "showing thumb and index finger | counting two with the thumb | making an L",
                [(0, 4, 3, 2), *DOWN[1:]], OUT),
        _new(
            "four_with_thumb",
            "showing four fingers with the thumb | counting four with the thumb",
            [(0, 8, 3, 2), (0, 2, 3, 2), (0, -6, 3, 2), DOWN[3]],
            OUT,
        ),
        _new("half_heart", "forming half a heart",
                [(34, 0, 66, 36), (36, 0, 66, 36), (38, 2, 66, 36), (42, 5, 64, 36)],
                ((0.62, -0.66, 0.42), (0.42, -0.90, 0.10), (0.22, -0.97, 0.0))),
        _new("grip", "holding something | gripping",
                [(52, -3, 52, 28), (54, 0, 54, 30), (56, 3, 54, 30), (58, 6, 52, 30)],
                ((0.55, -0.76, 0.32), (0.60, -0.78, -0.05), (0.72, -0.66, -0.2))),
        _new("finger_heart", "making a finger heart | making a Korean finger heart",
                [(42, 4, 55, 25), *DOWN[1:]], ((0.68, -0.55, 0.48), (0.86, -0.42, 0.28), (0.93, 0.1, -0.1))),
    )
}  # fmt: skip
# The thumb across the palm and over folded fingers: its first bone points into the palm more than in `gestures.py`, or
# the knuckle at its root would stand out beside the hand.
ACROSS_LOW = ((0.62, -0.76, 0.05), (0.60, -0.15, -0.78), (0.40, 0.10, -0.90))
OVER_LOW = ((0.60, -0.78, 0.20), (0.62, -0.62, -0.45), (0.25, -0.30, -0.92))
LOW = {ACROSS: (ACROSS_LOW, 45.0), OVER: (OVER_LOW, 35.0)}
# Starts that suit this hand better: the middle finger crosses behind the index, finger ends meet in one place.
AMENDED: dict[str, dict] = {
    "horns": {"thumb": OVER_LOW, "roll": 35.0},
    "crossed_fingers": {"fingers": ((24, -10, 6, 4), (-8, 20, 26, 18), *DOWN[2:])},
    "pinched_fingers": {
        "fingers": ((60, -4, 38, 18), (63, 1, 36, 17), (62, 8, 36, 17), (60, 18, 34, 15)),
        "thumb": ((0.66, -0.72, 0.20), (0.80, -0.59, -0.06), (0.93, -0.35, -0.10)),
    },
}


def _amended(name: str, gesture: Gesture) -> Gesture:
    if gesture.thumb in LOW:
        thumb, roll = LOW[gesture.thumb]
        gesture = replace(gesture, thumb=thumb, roll=roll)
    return replace(gesture, **AMENDED.get(name, {}))


HANDS: dict[str, Gesture] = {name: _amended(name, g) for name, g in (GESTURES | NEW).items()}

# What touches in a gesture: pairs of parts. In all gestures, nothing passes through anything else.
CONTACTS: dict[str, tuple] = {
    "fist": (*_folded(I, M, R, L), (_tip(T), _bone(M, 1))),
    "pointing": (*_folded(M, R, L), (_tip(T), _bone(M, 1))),
    "victory": (*_folded(R, L), (_tip(T), _bone(R, 1))),
    "three_fingers": (*_folded(L), (_tip(T), _bone(L, 1))),
    "four_fingers": ((_tip(T), PALM_ANY),),
    "thumbs_up": _folded(I, M, R, L),
    "thumbs_down": _folded(I, M, R, L),
    "ok_sign": ((_tip(T), _tip(I)),),
    "call_me": _folded(I, M, R),
    "horns": (*_folded(M, R), (_tip(T), _bone(M, 1))),
    "love_you": _folded(M, R),
    "pinky_up": (*_folded(I, M, R), (_tip(T), _bone(M, 1))),
    "finger_gun": _folded(M, R, L),
    "pinch": (*_folded(M, R, L), (_tip(T), _tip(I))),
    "crossed_fingers": (*_folded(R, L), (_tip(T), _bone(R, 1)), (_tip(M), _bone(I, 1, BACK))),
    "three_with_thumb": _folded(R, L),
    "tucked_thumb": ((_tip(T), PALM_ANY),),
    "pinched_fingers": ((_tip(T), _tip(I)), (_tip(T), _tip(M)), (_tip(T, ANY), _tip(R)), (_tip(R, ANY), _tip(L, ANY))),
    "four_with_thumb": _folded(L),
    "two_with_thumb": _folded(M, R, L),
    "finger_heart": (*_folded(M, R, L), (_bone(T, 2, ANY), _bone(I, 2, ANY))),
}  # fmt: skip


# One to five, as most people count: index finger first, or thumb first.
COUNTING = (
    ("pointing", "victory", "three_fingers", "four_fingers", "spread_fingers"),
    ("thumbs_up", "two_with_thumb", "three_with_thumb", "four_with_thumb", "spread_fingers"),
)


@lru_cache(maxsize=1)
def solved() -> dict[str, list[Gesture]]:
    """The solutions of each gesture."""
    out = {}
    for name, rows in json.loads(FILE.read_text())["gestures"].items():
        out[name] = [
            replace(
                HANDS[name],
                fingers=tuple(tuple(f) for f in row["fingers"]),
                thumb=tuple(tuple(b) for b in row["thumb"]),
                roll=row["roll"],
            )
            for row in rows
        ]
    return out


@cache
def touching(name: str) -> ndarray:
    """Which fingers touch something in a gesture, [5] bool, thumb first."""
    out = np.zeros(5, bool)
    for pair in CONTACTS.get(name, ()):
        for finger, *_ in pair:
            if finger >= 0:
                out[finger] = True
    return out


def hand_pose(name: str, side: int = 0, rng: np.random.Generator | None = None) -> ndarray:
    """Finger rotations of a gesture, [15,3,3] float32 in SMPL-H's order, for side 0 (left) or 1 (right).

    With `rng`: one of the solutions, its free fingers varied by a few degrees; else the first solution. Raises KeyError
    for an unknown name."""
    rows = solved()[name]
    chosen = rows[0] if rng is None else rows[int(rng.integers(len(rows)))]
    fingers, bones, roll = np.array(chosen.fingers, float), np.array(chosen.thumb, float), chosen.roll
    if rng is not None:
        free = ~touching(name)
        noise = rng.normal(size=(4, 4)).clip(-2, 2) * (3.0, 1.2, 3.5, 2.5) + rng.normal(size=1) * (2, 0, 2, 1)
        fingers = fingers + chosen.loose * noise * free[1:, None]
        bones = bones + chosen.loose * free[0] * 0.04 * rng.normal(size=(3, 3)).clip(-2, 2)
    return pose_of(fingers, bones, roll, side)
