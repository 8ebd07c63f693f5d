"""Hands from 21 points in a picture: wrist, finger joints and camera by damped Gauss-Newton from many starts.

    hand = fit(points, "right", rest)             # points [21, 2] pixels, rest [62, 3] of the bundle's body
    hand.turn, hand.fingers, hand.gesture         # [3, 3] of the wrist in the world, [15, 3] axis-angle, a name

Points in a picture do not tell depth. What a hand does decides it: each gesture of `Poses` is a Gaussian over the 45
finger angles, a wide Gaussian is for all other hands, and the fit is the most likely of all (a maximum of the
posterior, whose mixture is that of SMPLify's, Bogo et al. 2016, eq. 5). The camera is a weak perspective. Fingers stay
within the limits of `fingers`. The solver is Levenberg and Marquardt's, with exact derivatives (Buss 2004) and bounds
held by an active set; all starts run side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..contract import HAND_JOINTS
from ..errors import DetectionError
from ..fingers import MANO, SIDES, axes, limits
from ..rotations import axis_angle_to_matrix
from .arms import HandEstimate
from .convention import Convention
from .poses import Poses

EXACT = 0.004  # what a true point is worth: its standard deviation in sizes of the hand
STARTS, KEPT, FREE = 24, 8, 5  # hands that are solved, those solved to the end, and of them without their gesture
ROUNDS, FIRST, ALIGNED = 30, 5, 8  # of all unknowns, of those before the worse starts end, and of the wrist alone
GAIN = 1e-3  # of the posterior's logarithm: less ends the rounds
BEHIND = 30.0  # of it: a hand that is farther behind the best one goes no further
X, Y, Z = np.eye(3)
# How a left hand may face the viewer: palm, back, thumb's side, little finger's. Columns are where fingers, the back of
# the hand and the thumb point.
FACING = np.stack([np.stack(v, 1) for v in ((Y, -Z, -X), (Y, Z, X), (Y, -X, Z), (Y, X, -Z))])
MIRROR = np.array([[1.0, -1, -1], [-1, 1, 1], [-1, 1, 1]])  # S R S with S = diag(-1, 1, 1), as a mask
FLIP = np.array([1.0, -1.0, -1.0])
# The places of a finger's points among the 21, and of the joint that each of the 21 follows: itself, a tip its last.
CHAIN = np.arange(1, 21).reshape(5, 4)
# The unknowns: three of the wrist, 45 angles, the scale's logarithm, two of the shift.
WRIST, ANGLES, SCALE, SHIFT = slice(0, 3), slice(3, 48), 48, slice(49, 51)
UNKNOWN = 51


@dataclass
class Fitted(HandEstimate):
    """A fitted hand. `joints_2d`: pixels, where it has its joints, which are not the detector's points.

    residual: how far its points are from the given ones, root mean square in sizes of the hand. degrees: [16], the
    standard deviation of the wrist and the 15 joints in MANO's order, by the curvature of the posterior. gestures:
    names with their probabilities, the likeliest first; "" stands for all hands without a known gesture. points,
    convention: what it was fitted to, [21, 2] pixels.
    """

    residual: float
    degrees: np.ndarray = field(repr=False)
    gestures: dict[str, float]
    points: np.ndarray | None = field(default=None, repr=False)
    convention: Convention | None = field(default=None, repr=False)

    @property
    def gesture(self) -> str:
        """The likeliest gesture, or "" where the hand shows none that is known."""
        return next(iter(self.gestures), "")


class Rig:
    """A left hand at the origin. N hands at once: turns [N, 3, 3], angles [N, 45]."""

    def __init__(self, rest: np.ndarray, offsets: np.ndarray) -> None:
        """rest: [21, 3] metres from the wrist; offsets: [21, 3] metres in the bones' frames, see `Convention`."""
        self.rest, self.offsets, self.axes = rest, offsets, axes(rest, 0)

    def local(self, angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors and matrices [N, 5, 3, ...] of the finger joints."""
        vectors = np.einsum("nfja,fjac->nfjc", angles.reshape(-1, 5, 3, 3), self.axes)
        return vectors, axis_angle_to_matrix(vectors.reshape(-1, 3)).reshape(*vectors.shape, 3)

    def points(self, turns: np.ndarray, angles: np.ndarray, offset: bool = True) -> np.ndarray:
        """[N, 21, 3] metres: in the detector's convention, or the joints themselves."""
        return self._place(turns, angles, offset)[0]

    def _place(self, turns: np.ndarray, angles: np.ndarray, offset: bool = True) -> tuple[np.ndarray, ...]:
        """Points [N, 21, 3], and of the finger joints: vectors, frames [N, 5, 3, 3, 3] and places [N, 5, 3, 3]."""
        vectors, local = self.local(angles)
        points = np.zeros((len(turns), 21, 3))
        offsets = self.offsets if offset else np.zeros((21, 3))
        points[:, 0] = turns @ offsets[0]
        frame = np.broadcast_to(turns[:, None], (len(turns), 5, 3, 3))
        at = np.einsum("nij,fj->nfi", turns, self.rest[CHAIN[:, 0]])
        frames, places = [], []
        for joint in range(3):
            frame = frame @ local[:, :, joint]
            frames.append(frame)
            places.append(at)
            points[:, CHAIN[:, joint]] = at + np.einsum("nfij,fj->nfi", frame, offsets[CHAIN[:, joint]])
            bone = self.rest[CHAIN[:, joint + 1]] - self.rest[CHAIN[:, joint]]
            at = at + np.einsum("nfij,fj->nfi", frame, bone)
        points[:, CHAIN[:, 3]] = at + np.einsum("nfij,fj->nfi", frame, offsets[CHAIN[:, 3]])
        return points, vectors, np.stack(frames, 2), np.stack(places, 2)

    def derivatives(self, turns: np.ndarray, angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points [N, 21, 3] and how x and y move with wrist and angles [N, 21, 2, 48]."""
        points, vectors, frames, places = self._place(turns, angles)
        out = np.zeros((len(turns), 21, 2, 48))
        out[..., 0, 1], out[..., 0, 2] = points[..., 2], -points[..., 1]  # e x p, for each axis e
        out[..., 1, 0], out[..., 1, 2] = -points[..., 2], points[..., 0]
        # A joint's angle turns what follows about this axis of the world.
        about = np.einsum("nfjcd,nfjde,fjae->nfjac", frames, _right_jacobian(vectors), self.axes)
        own = np.zeros((len(turns), 5, 4, 2, 9))  # of a finger's points, by its own angles
        for joint in range(3):
            arm = points[:, CHAIN[:, joint:]] - places[:, :, joint, None]  # [N, 5, points, 3]
            axis = about[:, :, joint, None]  # [N, 5, 1, 3 axes, 3]
            columns = slice(3 * joint, 3 * joint + 3)
            own[:, :, joint:, 0, columns] = axis[..., 1] * arm[..., None, 2] - axis[..., 2] * arm[..., None, 1]
            own[:, :, joint:, 1, columns] = axis[..., 2] * arm[..., None, 0] - axis[..., 0] * arm[..., None, 2]
        for finger in range(5):
            out[:, CHAIN[finger], :, 3 + 9 * finger : 12 + 9 * finger] = own[:, finger]
        return points, out


def _right_jacobian(vectors: np.ndarray) -> np.ndarray:
    """[..., 3, 3] of the exponential map at vectors [..., 3] (Chirikjian 2012, eq. 10.86)."""
    angle = np.linalg.norm(vectors, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(vectors, -1, 0)
    zero = np.zeros_like(x)
    k = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*vectors.shape, 3)
    small = angle < 1e-4
    safe = np.where(small, 1.0, angle)
    first = np.where(small, 0.5, (1 - np.cos(safe)) / safe**2)
    second = np.where(small, 1 / 6, (safe - np.sin(safe)) / safe**3)
    return np.eye(3) - first * k + second * (k @ k)


def _bounds() -> tuple[np.ndarray, np.ndarray]:
    table = np.radians(np.concatenate([limits(finger) for finger in range(5)]))
    return table[:, 0], table[:, 1]


class _Problem:
    """One hand's points and the hands that may explain them. Everything is in sizes of the hand, y up."""

    def __init__(self, rig: Rig, target: np.ndarray, noise: np.ndarray, poses: Poses) -> None:
        """target: [21, 2]; noise: [21] standard deviations; poses: the prior."""
        self.rig, self.target, self.poses = rig, target, poses
        self.weight = np.repeat(1 / noise, 2)
        low, high = _bounds()
        self.low, self.high = np.minimum(low, poses.mean.min(0)), np.maximum(high, poses.mean.max(0))

    def starts(self) -> tuple[np.ndarray, ...]:
        """Turns, angles, scale and shift of the best STARTS hands, and the component of the prior of each."""
        count = len(self.poses.mean)
        way = self.target[[9, 13]].mean(0) - self.target[0]
        spin = axis_angle_to_matrix(np.array([[0, 0, np.arctan2(way[1], way[0]) - np.pi / 2]]))[0]
        turns = np.tile(spin @ FACING, (count, 1, 1))
        angles = np.repeat(self.poses.mean.clip(self.low, self.high), len(FACING), 0)
        parts = np.repeat(np.arange(count), len(FACING))
        shapes = self.rig.points(np.broadcast_to(np.eye(3), turns.shape), angles)  # fingers rest while the wrist turns
        points = shapes @ turns.swapaxes(1, 2)
        scale, shift = self.placed(points)
        for _ in range(ALIGNED):
            x, y, z = np.moveaxis(points, -1, 0)
            zero = np.zeros_like(x)
            move = np.stack([np.stack([zero, z, -y], -1), np.stack([-z, zero, x], -1)], -2)  # [N, 21, 2, 3]
            move = (move - move.mean(1, keepdims=True)) * scale[:, None, None, None]
            away = (scale[:, None, None] * points[..., :2] + shift[:, None] - self.target).reshape(len(turns), -1)
            step = _solve(move.reshape(len(turns), 42, 3), away, 1e-3)
            length = np.linalg.norm(step, axis=1, keepdims=True)
            turns = axis_angle_to_matrix(step * np.minimum(1, 0.6 / np.maximum(length, 1e-9))) @ turns
            points = shapes @ turns.swapaxes(1, 2)
            scale, shift = self.placed(points)
        away = scale[:, None, None] * points[..., :2] + shift[:, None] - self.target
        order = np.argsort(np.square(away).sum((1, 2)))[:STARTS]
        return turns[order], angles[order], scale[order], shift[order], parts[order]

    def placed(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The scale [N] and shift [N, 2] with which points [N, 21, 3] fit best."""
        flat = points[..., :2]
        middle, goal = flat.mean(1), self.target.mean(0)
        around = flat - middle[:, None]
        scale = (around * (self.target - goal)).sum((1, 2)) / np.maximum(np.square(around).sum((1, 2)), 1e-12)
        scale = np.maximum(scale, 1e-3 / np.linalg.norm(self.rig.rest[9]))
        return scale, goal - scale[:, None] * middle

    def cost(self, turns: np.ndarray, x: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, ...]:
        """Half the squares [N], residuals [N, 42], their derivatives [N, 42, 51], and the prior's slope [N, 45].
        x: [N, 48], angles, log scale, shift."""
        points, move = self.rig.derivatives(turns, x[:, :45])
        scale = np.exp(x[:, 45])[:, None, None]
        away = scale * points[..., :2] + x[:, None, 46:] - self.target
        slope = np.zeros((len(x), 21, 2, UNKNOWN))
        slope[..., :48] = scale[..., None] * move
        slope[..., SCALE] = scale * points[..., :2]
        slope[..., 0, 49] = slope[..., 1, 50] = 1
        residual = away.reshape(len(x), 42) * self.weight
        off = x[:, :45] - self.poses.mean[parts]
        pull = np.einsum("nij,nj->ni", self.poses.precision[parts], off)
        half = 0.5 * np.square(residual).sum(1) + 0.5 * (off * pull).sum(1)
        return half, residual, slope.reshape(len(x), 42, UNKNOWN) * self.weight[:, None], pull

    def solve(self) -> tuple[np.ndarray, ...]:
        """Turns, x, components, costs and Hessians [N, 51, 51] of all hands, solved: those of the gestures, and from
        the best of them on as hands without a gesture."""
        turns, angles, scale, shift, parts = self.starts()
        first = self.solved(turns, np.concatenate([angles, np.log(scale)[:, None], shift], 1), parts)
        if "" not in self.poses.names:
            return first[:5]
        order = np.argsort(np.square(first[5]).sum(1))[:FREE]
        wide = np.full(len(order), self.poses.names.index(""))
        second = self.solved(first[0][order], first[1][order], wide)
        return tuple(np.concatenate(pair) for pair in zip(first[:5], second[:5], strict=True))

    def solved(self, turns: np.ndarray, x: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, ...]:
        """Turns, x, components, costs, Hessians [N, 51, 51] and residuals [N, 42] after ROUNDS of Gauss-Newton."""
        low = np.concatenate([np.full(3, -9.0), self.low, np.full(3, -np.inf)])
        high = np.concatenate([np.full(3, 9.0), self.high, np.full(3, np.inf)])
        damping = np.full(len(x), 1e-3)
        now, residual, slope, pull = self.cost(turns, x, parts)
        live = np.ones(len(x), bool)
        for number in range(ROUNDS):
            if number == FIRST and len(x) > KEPT:
                best = np.argsort(now)[:KEPT]
                turns, x, parts, damping, now, residual, slope, pull, live = (
                    one[best] for one in (turns, x, parts, damping, now, residual, slope, pull, live)
                )
            gradient = np.einsum("nrk,nr->nk", slope, residual)
            gradient[:, ANGLES] += pull
            hessian = slope.swapaxes(1, 2) @ slope
            hessian[:, ANGLES, ANGLES] += self.poses.precision[parts]
            full = np.concatenate([np.zeros((len(x), 3)), x], 1)
            held = ((full <= low + 1e-9) & (gradient > 0)) | ((full >= high - 1e-9) & (gradient < 0))
            free = (~held).astype(float)
            diagonal = np.einsum("nkk->nk", hessian)
            damped = hessian * (free[:, :, None] * free[:, None])
            np.einsum("nkk->nk", damped)[:] = np.where(held, 1.0, diagonal * (1 + damping[:, None]) + 1e-9)
            step = -np.linalg.solve(damped, (gradient * free)[..., None])[..., 0].clip(-0.5, 0.5)
            moved = (full + step).clip(low, high)
            tried_turns = axis_angle_to_matrix(moved[:, WRIST]) @ turns
            cost, *rest = self.cost(tried_turns, moved[:, 3:], parts)
            better = (cost < now) & live
            gain = np.where(better, now - cost, 0.0)
            turns = np.where(better[:, None, None], tried_turns, turns)
            x = np.where(better[:, None], moved[:, 3:], x)
            residual, slope, pull = (
                np.where(better.reshape(-1, *[1] * (old.ndim - 1)), new, old)
                for old, new in zip((residual, slope, pull), rest, strict=True)
            )
            now = np.where(better, cost, now)
            damping = np.where(better, np.maximum(damping / 4, 1e-7), damping * 6)
            live = ((gain > GAIN) | (~better & (damping < 1e4))) & (now < now.min() + BEHIND)
            if not live.any():
                break
        hessian = slope.swapaxes(1, 2) @ slope
        hessian[:, ANGLES, ANGLES] += self.poses.precision[parts]
        return turns, x, parts, now, hessian, residual


def _solve(slope: np.ndarray, residual: np.ndarray, damping: float) -> np.ndarray:
    """The damped step [N, K] of residuals [N, R] with slopes [N, R, K]."""
    square = slope.swapaxes(1, 2) @ slope + damping * np.eye(slope.shape[2])
    return -np.linalg.solve(square, np.einsum("nrk,nr->nk", slope, residual)[..., None])[..., 0]


def fit(
    points: np.ndarray,
    side: str,
    rest: np.ndarray,
    poses: Poses | None = None,
    convention: Convention | None = None,
    gesture: str | None = None,
) -> Fitted:
    """The hand that explains 21 points best.

    points: [21, 2] pixels, y down: the wrist, then thumb to little finger, each from root to tip. side: "left" or
    "right". rest: [62, 3] metres, the joints at rest of the body that shall show the hand. poses: the prior, by default
    the one that ships. convention: how the points' maker places them and how far it errs; by default they are the
    joints themselves and true to EXACT. gesture: one of `poses.names`, where a person names what the hand does.
    Raises DetectionError for other points or another gesture.
    """
    points = np.asarray(points, np.float64)
    if points.shape != (21, 2) or not np.isfinite(points).all() or not np.ptp(points, axis=0).max() > 0:
        raise DetectionError(
            f"points must be 21 places of a hand in pixels, finite and not all the same, got {list(points.shape)}. "
            "Give the wrist, then thumb to little finger, each from root to tip."
        )
    number = SIDES.index(side)
    poses = (poses or Poses.load()).only(gesture)
    convention = convention or Convention.true(EXACT)
    hand = np.asarray(rest, np.float64)[list(HAND_JOINTS[number])]
    hand = hand - hand[0]
    view = points * (1, -1)
    if number:  # a right hand is solved as the left hand of the mirrored picture
        hand, view = hand * (-1, 1, 1), view * (-1, 1)
    size, middle = float(np.ptp(view, axis=0).max()), view.mean(0)
    rig = Rig(hand, convention.offsets * np.linalg.norm(hand[9]))
    problem = _Problem(rig, (view - middle) / size, np.broadcast_to(convention.noise, 21), poses)
    turns, x, parts, costs, hessians = problem.solve()
    log = poses.log_weight[parts] - costs - 0.5 * np.linalg.slogdet(hessians)[1]
    best = int(np.argmax(log))
    turn, angles, scale = turns[best], x[best, :45], float(np.exp(x[best, 45]))
    away = scale * rig.points(turn[None], angles[None])[0, :, :2] + x[best, 46:] - problem.target
    joints = (scale * rig.points(turn[None], angles[None], offset=False)[0, :, :2] + x[best, 46:]) * size + middle
    vectors = np.empty((15, 3))
    vectors[MANO] = rig.local(angles[None])[0].reshape(15, 3)
    covariance = np.diagonal(np.linalg.inv(hessians[best]))
    spread = np.sqrt(covariance[:48].reshape(16, 3).sum(1))
    degrees = np.empty(16)
    degrees[0], degrees[1 + MANO] = spread[0], spread[1:]
    if number:
        turn, vectors, joints = turn * MIRROR, vectors * FLIP, joints * (-1, 1)
    residual = float(np.sqrt(np.square(away).sum(1).mean()))
    told = upright(poses.told(parts, log), joints[4, 1] > joints[2, 1])  # y points up here
    return Fitted(number, turn, vectors, joints * (1, -1), residual, np.degrees(degrees), told, points, convention)


def upright(gestures: dict[str, float], up: bool) -> dict[str, float]:
    """Thumbs up and thumbs down are one pose; the thumb's direction in the picture tells them apart."""
    pair, kept = ("thumbs_up", "thumbs_down"), gestures.copy()
    share = sum(kept.pop(name, 0.0) for name in pair)
    if share:
        kept[pair[0] if up else pair[1]] = share
    return dict(sorted(kept.items(), key=lambda item: -item[1]))


def angles_of(fingers: np.ndarray, rest: np.ndarray, side: int) -> np.ndarray:
    """The 45 angles of `fingers.axes` [..., 45] of finger rotations [..., 15, 3] (axis-angle, MANO's order), as of a
    left hand. rest: [62, 3]."""
    hand = np.asarray(rest, np.float64)[list(HAND_JOINTS[side])] * ((-1, 1, 1) if side else 1)
    vectors = np.asarray(fingers, np.float64)[..., MANO, :] * (FLIP if side else 1)
    turning = axes(hand, 0).reshape(15, 3, 3)
    return np.einsum("jac,...jc->...ja", turning, vectors).reshape(*vectors.shape[:-2], 45)
