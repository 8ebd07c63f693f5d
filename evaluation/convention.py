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
import torch
from numpy import ndarray

from ..hands import POSES
from ..models.smplh import HAND_JOINTS, PARENTS, SMPLH
from ..rotations import axis_angle_to_matrix

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
    hands = []
    for side in range(2):
        hand = joints[..., side, :, :]
        step = np.einsum("...jcd,jd->...jc", bone_frames(turns, side), offsets())
        hands.append(hand + hand_length(hand)[..., None, None] * step)
    return np.stack(hands, -3)


def turns_of(rotations: ndarray) -> ndarray:
    """Orientations [52,3,3] in the world of joints that turn by `rotations` relative to their parents."""
    out = [rotations[0]]
    for joint in range(1, 52):
        out.append(out[PARENTS[joint]] @ rotations[joint])
    return np.stack(out)


@torch.no_grad()
def marks_of(hands: dict[str, ndarray], places: ndarray, aspect: float, body: SMPLH) -> ndarray:
    """Where the detector has the points of one person's hands in a picture, [2,21,2] in [0, 1].

    hands: SMPL-H arrays. places: [2,21,2] of the joints, which tell how large the hands are in the picture; so `body`
    need not be the one that the picture shows. aspect: width / height."""
    vectors = np.concatenate([hands[name].reshape(-1, 3) for name in POSES]).astype(np.float64)
    rotations = axis_angle_to_matrix(vectors)
    posed, betas = torch.from_numpy(rotations).float()[None], torch.from_numpy(hands["betas"]).float()[None]
    joints = body(posed, betas)[1][0, np.array(HAND_JOINTS)].numpy().astype(np.float64)  # [2, 21, 3]
    step = (in_convention(joints, turns_of(rotations)) - joints)[..., :2] * (1, -1)
    wide = np.array([aspect, 1.0])
    scale = _spread(places * wide) / _spread(joints[..., :2]).clip(1e-9)
    return places + step * scale[:, None, None] / wide


def _spread(points: ndarray) -> ndarray:
    """[...]: how far points [...,21,2] lie from their middle."""
    return np.sqrt(((points - points.mean(-2, keepdims=True)) ** 2).sum((-1, -2)))
