"""SMPL-H's skeleton in numpy: forward kinematics of joints without a mesh.

    turns, joints = forward(rotations, rest)      # [52, 3, 3] and [62, 3]

The 52 joints are exact. A finger tip is a vertex, and here it moves rigidly with the last bone of its finger: exact for
a body whose tips belong to that bone alone, and within millimetres for others.
"""

from __future__ import annotations

import numpy as np

from .contract import NUM_JOINTS

# The parents of SMPL-H's 52 joints (pelvis, 21 body joints, 15 joints of the left hand, 15 of the right), and of the
# ten finger tips that follow them in `joints_3d`.
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19,
           20, 22, 23, 20, 25, 26, 20, 28, 29, 20, 31, 32, 20, 34, 35,
           21, 37, 38, 21, 40, 41, 21, 43, 44, 21, 46, 47, 21, 49, 50,
           36, 24, 27, 33, 30, 51, 39, 42, 48, 45)  # fmt: skip
ABOVE = np.array((0, *PARENTS[1:]))


def bones(rest: np.ndarray) -> np.ndarray:
    """Each joint's place [62, 3] from its parent, of joints [62, 3] at rest; the pelvis keeps its own place."""
    return np.concatenate([rest[:1], rest[1:] - rest[ABOVE[1:]]])


def world(rotations: np.ndarray) -> np.ndarray:
    """Orientations [..., 52, 3, 3] in the world of joints that turn by `rotations` relative to their parents."""
    turns = np.array(rotations, np.float64)
    for joint in range(1, NUM_JOINTS):
        turns[..., joint, :, :] = turns[..., PARENTS[joint], :, :] @ turns[..., joint, :, :]
    return turns


def forward(rotations: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turns and places the joints (Loper et al. 2015, eq. 3-4).

    rotations: [..., 52, 3, 3], each relative to its parent; rest: [62, 3] metres, in the template's pose.
    Returns the orientations in the world [..., 52, 3, 3] and the places [..., 62, 3] in metres."""
    turns, steps = world(rotations), bones(np.asarray(rest, np.float64))
    moved = (turns[..., ABOVE, :, :] @ steps[:, :, None])[..., 0]  # [..., 62, 3]
    moved[..., 0, :] = steps[0]
    for joint in range(1, len(PARENTS)):
        moved[..., joint, :] += moved[..., PARENTS[joint], :]
    return turns, moved


def at_rest(joints: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """The joints at rest [62, 3] of a body whose joints [62, 3] were turned by rotations [52, 3, 3]."""
    turns = world(rotations)
    rest = np.array(joints, np.float64)
    for joint in range(1, len(PARENTS)):
        parent = PARENTS[joint]
        rest[joint] = rest[parent] + turns[parent].T @ (joints[joint] - joints[parent])
    return rest


def radius(points: np.ndarray) -> np.ndarray:
    """Root mean square distance [...] of points [..., N, D] from their centre."""
    return np.sqrt(np.square(points - points.mean(-2, keepdims=True)).sum(-1).mean(-1))
