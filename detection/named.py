"""Hands whose gesture a person names: the fingers are known, and points tell only where the wrist is.

    hand = posed(fit(points, "right", rest), "open_hand", rest)

Points of a spoiled hand contradict the gesture: a finger is missing, or there is one too many. So the wrist's rotation,
the size and the place are fitted again with the fingers held, by a robust cost (Cauchy's, with Gauss-Newton on
reweighted squares; Holland and Welsch 1977). Knuckles and the wrist count more than fingers. Where the points show
quite another gesture, they explain the wrist better with their own fingers, and the wrist stays as it was.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..contract import HAND_JOINTS
from ..fingers import MANO
from ..rotations import axis_angle_to_matrix
from .arms import HandEstimate
from .convention import Convention
from .fit import FACING, FLIP, MIRROR, Fitted, Rig
from .poses import Poses

PALM, FINGERS = [0, 1, 5, 9, 13, 17], [2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 16, 18, 19, 20]
SHARPER = 1.5  # the palm's points, beside what the convention says of their noise
TRUSTED = np.ones(21)  # standard deviations from where on a point counts less: a finger's, and the palm's below
TRUSTED[PALM] = 3.0
ROUNDS = 15
EXPLAINED = 20.0  # of the cost: above it the points show another gesture


def posed(hand: HandEstimate, gesture: str, rest: np.ndarray, poses: Poses | None = None) -> Fitted:
    """The hand with the fingers of a gesture, where a person says what it shall do. A hand that was fitted to points
    gets the wrist that explains them best; of others wrist, direction and size stay.

    rest: [62, 3] metres, as `fit` had them. Raises DetectionError for an unknown gesture."""
    poses = (poses or Poses.load()).only(gesture)
    bones = np.asarray(rest, np.float64)[list(HAND_JOINTS[hand.side])]
    mirror = np.array((-1.0, 1.0, 1.0)) if hand.side else np.ones(3)
    bones = (bones - bones[0]) * mirror
    if isinstance(hand, Fitted) and hand.points is not None and hand.convention is not None:
        found = _wrist(hand.points * mirror[:2] * (1, -1), bones, hand.convention, poses)
    else:
        found = None
    rig = Rig(bones, np.zeros((21, 3)))
    turn, angles = (hand.turn * MIRROR if hand.side else hand.turn), poses.mean[:1]
    if found is not None:
        turn, angles, scale, shift = found
    flat = rig.points(turn[None], angles)[0, :, :2] * mirror[:2] * (1, -1)  # metres from the wrist, y down
    if found is None:
        seen = hand.joints_2d[PALM[2:]] - hand.joints_2d[0]  # bending fingers moves no knuckle
        scale, shift = (flat[PALM[2:]] * seen).sum() / np.square(flat[PALM[2:]]).sum(), hand.joints_2d[0]
    else:
        shift = shift * mirror[:2] * (1, -1)
    vectors = np.empty((15, 3))
    vectors[MANO] = rig.local(angles)[0].reshape(15, 3)
    if hand.side:
        turn, vectors = turn * MIRROR, vectors * FLIP
    return Fitted(hand.side, turn, vectors, shift + scale * flat, 0.0, np.zeros(16), {gesture: 1.0})


def turned(hand: Fitted, way: np.ndarray) -> tuple[Fitted, float]:
    """The hand after a turn in the picture about the middle of its points, so that its knuckles lie from the wrist in
    the direction `way`, a unit vector [2], y down; and how far that turns it, degrees."""
    now = hand.joints_2d[PALM[2:]].mean(0) - hand.joints_2d[0]
    angle = float(np.arctan2(now[0] * way[1] - now[1] * way[0], now @ way))
    spin = axis_angle_to_matrix(np.array([[0.0, 0, angle]]))[0]
    points = hand.joints_2d if hand.points is None else hand.points
    middle = points.mean(0)
    places = (middle + (one - middle) @ spin[:2, :2].T for one in (hand.joints_2d, points))
    joints, points = places
    turn = spin.T @ hand.turn  # y points up there
    return replace(hand, turn=turn, joints_2d=joints, points=points), abs(float(np.degrees(angle)))


def _wrist(
    points: np.ndarray, bones: np.ndarray, convention: Convention, poses: Poses
) -> tuple[np.ndarray, np.ndarray, float, np.ndarray] | None:
    """Turn [3, 3], angles [1, 45], pixels a metre and place of the wrist [2] of the left hand that explains points [21,
    2] best, y up; None where it explains them badly. bones: [21, 3] metres."""
    size, middle = float(np.ptp(points, axis=0).max()), points.mean(0)
    target = (points - middle) / size
    noise = np.broadcast_to(convention.noise, 21).copy()
    noise[PALM] /= SHARPER
    way = target[[9, 13]].mean(0) - target[0]
    spin = axis_angle_to_matrix(np.array([[0, 0, np.arctan2(way[1], way[0]) - np.pi / 2]]))[0]
    turns = np.tile(spin @ FACING, (len(poses.mean), 1, 1))
    angles = np.repeat(poses.mean, len(FACING), 0)
    rig = Rig(bones, convention.offsets * np.linalg.norm(bones[9]))
    shapes = rig.points(np.broadcast_to(np.eye(3), turns.shape), angles)
    around = shapes - shapes.mean(1, keepdims=True)
    spread = np.square((around @ turns.swapaxes(1, 2))[..., :2]).sum((1, 2))
    scale = np.log(0.9 * np.sqrt(np.square(target).sum() / spread))
    shift = -np.exp(scale)[:, None] * (shapes @ turns.swapaxes(1, 2))[..., :2].mean(1)

    def cost(turns: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, ...]:
        placed = np.exp(scale)[:, None, None] * (shapes @ turns.swapaxes(1, 2))  # [N, 21, 3]
        away = placed[..., :2] + shift[:, None] - target
        square = np.square(away).sum(-1) / (2 * np.square(noise * TRUSTED))
        return (np.square(TRUSTED) * np.log1p(square)).sum(1), placed, away, 1 / (np.square(noise) * (1 + square))

    now, placed, away, weight = cost(turns, scale, shift)
    damping = np.full(len(turns), 1e-2)
    for _ in range(ROUNDS):
        slope = np.zeros((len(turns), 21, 2, 6))  # by the wrist's rotation, the scale's logarithm and the shift
        slope[..., 0, 1], slope[..., 0, 2] = placed[..., 2], -placed[..., 1]
        slope[..., 1, 0], slope[..., 1, 2] = -placed[..., 2], placed[..., 0]
        slope[..., 3] = placed[..., :2]
        slope[..., 0, 4] = slope[..., 1, 5] = 1
        flat, pull = slope.reshape(-1, 42, 6), np.repeat(weight, 2, 1)
        gradient = np.einsum("nri,nr->ni", flat, pull * away.reshape(-1, 42))
        hessian = (flat * pull[..., None]).swapaxes(1, 2) @ flat
        np.einsum("nii->ni", hessian)[:] *= 1 + damping[:, None]
        step = -np.linalg.solve(hessian + 1e-9 * np.eye(6), gradient[..., None])[..., 0].clip(-0.5, 0.5)
        tried = axis_angle_to_matrix(step[:, :3]) @ turns, scale + step[:, 3], shift + step[:, 4:]
        new = cost(*tried)
        better = new[0] < now
        turns, scale, shift, now, placed, away, weight = (
            np.where(better.reshape(-1, *[1] * (b.ndim - 1)), a, b)
            for a, b in zip((*tried, *new), (turns, scale, shift, now, placed, away, weight), strict=True)
        )
        damping = np.where(better, damping / 4, damping * 5)
    best = int(now.argmin())
    if now[best] > EXPLAINED:
        return None
    return turns[best], angles[best : best + 1], float(np.exp(scale[best])) * size, shift[best] * size + middle
