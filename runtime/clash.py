"""Whether the two hands that stage 1 made fit into one picture. Where they do not, they may be drawn again.

    clash(features["joints_3d"], features["visibility"], params)     # one row of each

A prompt that leaves the number of hands open ("thumbs up") allows one hand or two. In few steps stage 1 may end between
the two: both hands are at one place, and stage 2 paints arms that have grown into each other. Or the camera cannot show
both hands where they should be, and one of them leaves the picture.

Two hands clash where, in the camera's view, more than OVERLAP of the bones of one lie over the other. Depth does not
count: stage 2 saw hands side by side only, and paints a hand before another one no better. Finger tips may touch.
"""

from __future__ import annotations

import numpy as np

from ..contract import HAND_JOINTS, NUM_PARAMS, PLACEMENT

ELBOWS = (18, 19)  # of the 62 joints: left, right
BONES = tuple((0 if k % 4 == 1 else k - 1, k) for k in range(1, 21))  # of a hand's 21 joints, finger by finger
SAMPLES = np.linspace(0, 1, 5)[:, None]  # along each bone
FLESH, FOREARM = 0.14, 0.3  # around bones, in lengths of the palm (wrist to the middle finger's root: some 9 cm)
OVERLAP = 0.05  # share of a hand's bones: two finger tips that touch are less, two fists are more


def clash(joints: np.ndarray, visibility: np.ndarray, params: np.ndarray) -> bool:
    """Whether stage 1 wants two hands and they lie over each other, or the camera does not show one of them.

    joints: [62, 3] metres, x and y in the camera's view. visibility: [2]. params: [330], not normalised. With several
    people, all of their joints, hands and parameters: each person is judged alone, because hands of two may touch.
    """
    if params.size != NUM_PARAMS:
        people = zip(joints, visibility.reshape(-1, 2), params.reshape(-1, NUM_PARAMS), strict=True)
        return any(clash(*one) for one in people)
    presence = params[PLACEMENT].reshape(2, 4)[:, 0]
    if presence.sum() <= 1.5:  # as `HandFeatures` decides it: one hand, or none
        return False
    return bool((visibility < 0.5).any()) or overlap(joints) > OVERLAP


def overlap(joints: np.ndarray) -> float:
    """The share of a hand's bones that lie over the other hand or its forearm: the larger share of the two hands.

    joints: [62, 3] metres.
    """
    points, arms = [], []
    for hand, elbow in zip(HAND_JOINTS, ELBOWS, strict=True):
        own = joints[list(hand), :2].astype(np.float64)
        palm = float(np.linalg.norm(joints[hand[9]] - joints[hand[0]]))
        starts, ends = own[[a for a, _ in BONES]], own[[b for _, b in BONES]]
        points.append((starts[:, None] + SAMPLES * (ends - starts)[:, None]).reshape(-1, 2))
        # The half of the forearm at the wrist: most pictures do not show the other half.
        half = (own[0] + joints[elbow, :2]) / 2
        width = np.append(np.full(len(BONES), FLESH), FOREARM) * palm
        arms.append((np.vstack([starts, own[:1]]), np.vstack([ends, half]), width))
    return max(_covered(points[0], *arms[1]), _covered(points[1], *arms[0]))


def _covered(points: np.ndarray, starts: np.ndarray, ends: np.ndarray, width: np.ndarray) -> float:
    """The share of points [N, 2] nearer to any segment [M, 2] than its width [M]."""
    along = ends - starts
    to = points[:, None] - starts  # [N, M, 2]
    share = ((to * along).sum(-1) / np.maximum(np.square(along).sum(-1), 1e-12)).clip(0, 1)
    return float((np.linalg.norm(to - share[..., None] * along, axis=-1) < width).any(1).mean())
