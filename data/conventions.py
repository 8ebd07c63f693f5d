"""Checks that a hand's pose and its annotated joints follow one convention, in units of the hand's own size.

    sentences = conventions(people, joints, seen, aspects, body)     # [N] lists: "Its left hand ..."

A wrong convention moves the fingers of a small hand by less than any fixed share of the picture. So the unit is the
hand's own size: the root mean square distance of its 21 joints from their centre, in space. The check compares the pose
with `joints_2d` as it is and with each usual mistake undone: fingers inverted or mirrored, fingers or joints in another
order, a mirrored picture, fingers without their bend. It names a mistake that explains the joints much better.

Seen along the palm's normal, a bend forwards looks like a bend backwards. Fingers do not bend backwards: the check
tests that by the pose alone, also without joints_2d.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch

from ..contract import HAND_JOINTS
from ..hands import POSES
from ..kinematics import radius
from ..models.smplh import SMPLH, TIP_VERTICES
from ..rotations import axis_angle_to_matrix
from .augment import Hands

AWAY = 0.6  # hand sizes between the centres of the pose's joints and of joints_2d
LARGER = 1.7  # ratio to joints_2d, either way
UNLIKE = 0.5  # hand sizes, root mean square: more than annotators miss by
NOISE = 0.2  # hand sizes, root mean square: annotators' errors and other people's bones explain this
BETTER = 1.25  # a named mistake must bring the hand this many times closer to joints_2d
CURLED, BENT = 0.3, 1.45  # the same two for bent fingers, which fit any noise a little better
FLAT = np.radians(15)  # fingers that bend less on average are nearly flat
BACKWARDS = np.radians(15)  # fingers bend backwards by less on average
SPREAD = 1.25  # times that noise makes joints_2d larger than the hand

# A finger bends about this axis of the template (left hand, right hand), where fingers lie along x, palms down.
FLEXION = np.array([[0.0, 0.0, -1.0], [0.0, 0.0, 1.0]])
# Joint k of ours (wrist, thumb to little finger) is joint MANO[k] of MANO's 16 joints with the 5 tips behind them.
MANO = np.array((0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20))
# Fingers from thumb to little finger, in MANO's order (index, middle, little, ring, thumb).
THUMB_FIRST = (1, 2, 4, 3, 0)
# Radians that bend a finger's three joints: evenly, or all but the knuckle.
BENDS = np.array([(b, b, b) for b in (0.0, 0.3, 0.6, 0.9, 1.2, 1.5)] + [(-0.2, b, 0.6 * b) for b in (0.8, 1.2, 1.6)])
# Turns [27, 3, 3] of a straight thumb.
THUMBS = axis_angle_to_matrix(0.6 * np.array(list(product((-1.0, 0.0, 1.0), repeat=3))))

MISTAKES = {
    "inverted": "once its fingers bend the other way: their rotations are inverted",
    "mirrored": "once its fingers are mirrored: they are another hand's, or a mirrored picture's",
    "fingers": "once its fingers are sorted: the rotations go from thumb to little finger, not in MANO's order",
    "joints": "once joints_2d is sorted: it is in MANO's order, not from thumb to little finger",
    "across": "once joints_2d is mirrored: it is of the mirrored picture, or of the other hand",
    "upright": "once joints_2d is turned upside down: its y must point down",
    "flat": "once its fingers bend: its own are nearly flat. Add MANO's mean hand (--hand-mean), if they lack it",
}


@torch.no_grad()
def conventions(
    people: Sequence[Hands], joints: np.ndarray, seen: np.ndarray, aspects: Sequence[float], body: SMPLH
) -> list[list[str]]:
    """The problems of some people's conventions, a list of sentences for each person.

    joints: [N, 2, 21, 2], where their poses put them, in [0, 1] of the picture; seen: bool [N, 2], the visible
    hands; aspects: [N], width / height of the pictures. joints_2d is optional in each of people.
    """
    vectors = np.stack([np.concatenate([one[name].reshape(-1, 3) for name in POSES]) for one in people])
    matrices = axis_angle_to_matrix(vectors.reshape(-1, 3).astype(np.float64)).reshape(-1, 52, 3, 3)
    betas = torch.from_numpy(np.stack([one["betas"] for one in people])).float()
    turns, _, rest = body.kinematics(torch.from_numpy(matrices).float(), betas)
    tips = list(TIP_VERTICES)
    shaped = body.v_template + (betas @ body.shape_dirs).reshape(len(people), -1, 3)
    points = torch.cat([rest, shaped[:, tips]], 1).numpy().astype(np.float64)
    out: list[list[str]] = [[] for _ in people]
    for i, side in np.argwhere(seen).tolist():
        hand = Hand(side, matrices[i, 22 + 15 * side : 37 + 15 * side], turns[i, 20 + side].numpy(), points[i])
        bends = vectors[i, 22 + 15 * side : 34 + 15 * side].astype(np.float64)  # without the thumb
        given = people[i].get("joints_2d")
        scale = np.array([aspects[i], 1.0])
        sentence = hand.judge(bends, joints[i, side] * scale, None if given is None else given[side] * scale)
        if sentence:
            out[i].append(f"Its {('left', 'right')[side]} hand {sentence}.")
    return out


class Hand:
    """One posed hand as a rig of its own, which takes other poses."""

    def __init__(self, side: int, fingers: np.ndarray, turn: np.ndarray, points: np.ndarray) -> None:
        """fingers: [15, 3, 3]; turn: [3, 3] of the wrist; points: [62, 3] metres at rest."""
        self.side, self.fingers, self.turn = side, fingers, turn
        self.points = points[list(HAND_JOINTS[side])]
        self.slots = np.array(HAND_JOINTS[side]) - 22 - 15 * side

    def posed(self, fingers: np.ndarray) -> np.ndarray:
        """Joints [..., 21, 3] in metres, from the wrist, of finger rotations [..., 15, 3, 3]."""
        out = np.zeros((*fingers.shape[:-3], 21, 3))
        for finger in range(5):
            turn, place, before = np.eye(3), np.zeros(3), self.points[0]
            for joint in range(1 + 4 * finger, 5 + 4 * finger):
                place = place + (turn @ (self.points[joint] - before)[:, None])[..., 0]
                out[..., joint, :], before = place, self.points[joint]
                if joint < 4 + 4 * finger:
                    turn = turn @ fingers[..., self.slots[joint], :, :]
        return out @ self.turn.T

    def judge(self, bends: np.ndarray, joints: np.ndarray, given: np.ndarray | None) -> str:
        """The problem, or "". bends: [12, 3], axis-angles without the thumb; joints, given (joints_2d): [21, 2] in
        heights of the picture, y down."""
        backwards = -float((bends @ FLEXION[self.side]).mean())
        bent = f"has fingers that bend backwards by {np.degrees(backwards):.0f} degrees on average. "
        bent += "The sign of their rotations is wrong, or their side"
        if given is None:
            return bent if backwards > BACKWARDS else ""
        own = self.posed(self.fingers)
        size = radius(own) * radius(joints) / max(radius(own[:, :2]), 1e-6)  # as if seen flat
        away = float(np.linalg.norm(joints.mean(0) - given.mean(0)))
        if away > AWAY * size:
            return f"lies {away / size:.1f} hand sizes away from joints_2d"
        larger = radius(joints) / max(radius(given), 1e-6)
        if not 1 / LARGER < larger < LARGER:
            return f"is {larger:.2g} times as large as in joints_2d"
        target = (given - given.mean(0)) * (1, -1)  # y up, as the pose has it
        apart = float(misfit(own, target))
        found = self.explained(own, target)
        limits = {name: (CURLED, BENT) if name == "flat" else (NOISE, BETTER) for name in found}
        explained = [name for name, (least, times) in limits.items() if apart > max(least, times * found[name])]
        if explained or apart > UNLIKE:
            best = min(explained, key=found.__getitem__, default="")
            so = f" It fits ({found[best]:.2f}) {MISTAKES[best]}" if best else " Their conventions differ"
            return f"does not fit joints_2d: they lie {apart:.2f} hand sizes apart.{so}"
        if backwards > BACKWARDS and found["inverted"] < BETTER * apart:  # the picture does not explain the bend
            return bent
        return ""

    def explained(self, own: np.ndarray, target: np.ndarray) -> dict[str, float]:
        """The hand's distance from joints_2d [21, 2] (centred, y up) with each of MISTAKES undone."""
        inverse = self.fingers.swapaxes(-1, -2)
        mirror = np.array([[1.0, -1, -1], [-1, 1, 1], [-1, 1, 1]])  # S R S with S = diag(-1, 1, 1)
        order = self.fingers.reshape(5, 3, 3, 3)[list(THUMB_FIRST)].reshape(15, 3, 3)
        others = self.posed(np.stack([inverse, self.fingers * mirror, order]))
        found = dict(zip(("inverted", "mirrored", "fingers"), misfit(others, target).tolist(), strict=True))
        found["joints"] = float(misfit(own, target[MANO]))
        found["across"] = float(misfit(own, target * (-1, 1)))
        found["upright"] = float(misfit(own, target * (1, -1)))
        angles = np.arccos(np.clip((np.trace(self.fingers[:12], axis1=1, axis2=2) - 1) / 2, -1, 1))
        if angles.mean() < FLAT:
            found["flat"] = self.curled(own, target)
        return found

    def curled(self, own: np.ndarray, target: np.ndarray) -> float:
        """The hand's distance from joints_2d with each finger bent as fits it best."""
        bends = np.tile(BENDS, 4)[..., None] * FLEXION[self.side]  # [9, 12, 3]
        curls = axis_angle_to_matrix(bends.reshape(-1, 3)).reshape(-1, 12, 3, 3)
        bent = np.repeat(self.fingers[None], len(curls), 0)
        bent[:, :12] = curls @ bent[:, :12]
        thumbs = np.repeat(self.fingers[None], len(THUMBS), 0)
        thumbs[:, 12] = THUMBS @ thumbs[:, 12]
        fingers, thumb, best = self.posed(bent), self.posed(thumbs), own
        for finger in (0, 1, 2, 3, 4) * 2:  # twice: the fingers share a centre
            tried = thumb if finger == 0 else fingers
            part = slice(1 + 4 * finger, 5 + 4 * finger)
            others = np.repeat(best[None], len(tried), 0)
            others[:, part] = tried[:, part]
            best = others[misfit(others, target).argmin()]
        return float(misfit(best, target))


def misfit(joints: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Root mean square distance [...] in hand sizes of joints [..., 21, 3] (metres) from target [21, 2] (centred), both
    moved to one centre and one scale. Noise only makes the target larger than the hand."""
    flat = (joints - joints.mean(-2, keepdims=True))[..., :2]
    square = np.maximum(np.square(flat).sum((-1, -2)), 1e-12)
    most = radius(target) / np.sqrt(square / flat.shape[-2])
    scale = np.clip((flat * target).sum((-1, -2)) / square, most / SPREAD, most)
    apart = scale[..., None, None] * flat - target
    return np.sqrt(np.square(apart).sum(-1).mean(-1)) / np.maximum(scale * radius(joints), 1e-12)
