"""Where a detector puts its points: MediaPipe's lie elsewhere on a hand than a rig has its joints.

One offset for each of the 21 points, in the frame of the bone that it belongs to, in lengths of the hand (wrist to the
middle finger's knuckle). `studies/convention.py` fits them on renders of the demo's people and tests them on others.

    detected = in_convention(joints, turns, mediapipe().offsets)     # [P,2,21,3], where MediaPipe looks for them
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy import ndarray

FILE = Path(__file__).with_name("mediapipe.json")
MIRROR = np.array([-1.0, 1, 1])
# Whose orientation each of the 21 points follows, left and right: wrist, then four a finger, a tip with its last bone.
BONES = tuple(
    (20 + side, *(22 + 15 * side + 3 * block + bone for block in (4, 0, 1, 3, 2) for bone in (0, 1, 2, 2)))
    for side in range(2)
)
WRIST, KNUCKLE = 0, 9
ONCE = 0.06  # sizes of a hand: looks at a hand differ so much where nothing is wrong, or a little


@dataclass(frozen=True)
class Convention:
    """offsets: [21, 3] in lengths of the hand, in the bones' frames of a left hand. noise: [21] or a number, how far
    the detector errs beside them, standard deviation along x and y in sizes of the hand (the longer side of its box).
    """

    offsets: ndarray
    noise: ndarray

    @classmethod
    def true(cls, noise: float) -> Convention:
        """Of points that are the joints themselves."""
        return cls(np.zeros((21, 3)), np.full(21, noise))


@lru_cache(maxsize=1)
def mediapipe() -> Convention:
    """MediaPipe's, as `mediapipe.json` has it."""
    held = json.loads(FILE.read_text())
    return Convention(np.array(held["offsets"]), np.array(held["noise"]))


def sureness(score: float, residual: float, degrees: float, apart: float | None = None) -> float:
    """How likely the pose of a hand is right that was fitted to MediaPipe's points, 0 to 1.

    A logistic regression on good and spoiled hands: `studies/fitting.py --write`. See `Detector.sureness` for the
    arguments. apart: how far two looks at the hand differ; a hand that was looked at once counts as ONCE."""
    held = json.loads(FILE.read_text())["sureness"]["weights"]
    return float(1 / (1 + np.exp(-np.array(held) @ signs(score, residual, degrees, ONCE if apart is None else apart))))


def signs(score: float, residual: float, degrees: float, apart: float) -> ndarray:
    """What `sureness` weighs, [5]."""
    likely = float(np.clip(score, 0.01, 0.999))
    return np.array(
        [1.0, np.log(likely / (1 - likely)), *np.log([max(residual, 1e-4), max(degrees, 1e-2), apart + 0.01])]
    )


def bone_frames(turns: ndarray, side: int) -> ndarray:
    """[...,21,3,3]: how an offset of a left hand moves its points, from orientations [...,52,3,3] in the world."""
    frames = turns[..., list(BONES[side]), :, :]
    return frames * MIRROR if side else frames


def hand_length(joints: ndarray) -> ndarray:
    """[...]: from wrist to the middle finger's knuckle, of joints [...,21,3]."""
    return np.linalg.norm(joints[..., KNUCKLE, :] - joints[..., WRIST, :], axis=-1)


def in_convention(joints: ndarray, turns: ndarray, offsets: ndarray) -> ndarray:
    """Where the detector has its points: joints [...,2,21,3] of left and right hands, moved by the offsets [21,3].

    turns: orientations [...,52,3,3] in the world of the body's joints."""
    hands = []
    for side in range(2):
        hand = joints[..., side, :, :]
        step = np.einsum("...jcd,jd->...jc", bone_frames(turns, side), offsets)
        hands.append(hand + hand_length(hand)[..., None, None] * step)
    return np.stack(hands, -3)


def marks_of(joints: ndarray, turns: ndarray, places: ndarray, aspect: float, offsets: ndarray) -> ndarray:
    """Where the detector has the points of one person's hands in a picture, [2,21,2] in [0, 1].

    joints: [2,21,3] metres of a posed body; turns: [52,3,3], its orientations in the world. places: [2,21,2] of the
    joints in the picture, which tell how large the hands are there; so the body need not be the one that the picture
    shows. aspect: width / height."""
    step = (in_convention(joints, turns, offsets) - joints)[..., :2] * (1, -1)
    wide = np.array([aspect, 1.0])
    scale = _spread(places * wide) / _spread(joints[..., :2]).clip(1e-9)
    return places + step * scale[:, None, None] / wide


def _spread(points: ndarray) -> ndarray:
    """[...]: how far points [...,21,2] lie from their middle."""
    return np.sqrt(((points - points.mean(-2, keepdims=True)) ** 2).sum((-1, -2)))
