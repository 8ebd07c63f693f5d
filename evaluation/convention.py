"""Joints in the detector's convention: MediaPipe puts its points elsewhere on a hand than a rig has its joints.

One offset for each of the 21 joints, in the frame of the bone that it belongs to, in lengths of the hand (wrist to the
middle finger's knuckle). `studies/convention.py` fits them on renders of the demo's people and tests them on others.

    detected = in_convention(joints, turns)     # [P,2,21,3], where MediaPipe would look for them
"""

from __future__ import annotations

import json
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


def bone_frames(turns: ndarray, side: int) -> ndarray:
    """[...,21,3,3]: how an offset of a left hand moves its points, from orientations [...,52,3,3] in the world."""
    frames = turns[..., list(BONES[side]), :, :]
    return frames * MIRROR if side else frames


def hand_length(joints: ndarray) -> ndarray:
    """[...]: from wrist to the middle finger's knuckle, of joints [...,21,3]."""
    return np.linalg.norm(joints[..., KNUCKLE, :] - joints[..., WRIST, :], axis=-1)


@lru_cache(maxsize=1)
def offsets() -> ndarray:
    """[21,3] in lengths of the hand."""
    return np.array(json.loads(FILE.read_text())["offsets"])


def in_convention(joints: ndarray, turns: ndarray) -> ndarray:
    """Where the detector has its points: joints [...,2,21,3] of left and right hands, moved by the offsets.

    turns: orientations [...,52,3,3] in the world of the body's joints."""
    moved = [
        joints[..., side, :, :]
        + hand_length(joints[..., side, :, :])[..., None, None]
        * np.einsum("...jcd,jd->...jc", bone_frames(turns, side), offsets())
        for side in range(2)
    ]
    return np.stack(moved, -3)
