"""Whole-body poses of the demo's people: where arms and hands go, for bodies of any shape.

A pose says for each arm where the wrist is, where fingers and the back of the hand look, and where the elbow points;
the arm follows by two-bone inverse kinematics. Hands that lie on something (hips, a cheek, each other) are moved until
they touch it. Everything is written for the left arm in metres of a body of average height; the right one is its mirror
image.

    rotations = sample_pose("waving", betas, rng).rotations      # [52,3,3]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy import ndarray

from ..models.smplh import HAND_JOINTS, PARENTS
from .gestures import between, rotation
from .human import CLOTHES, SKIN, human_body, load_human
from .human_gestures import HANDS, hand_pose
from .human_render import Camera
from .human_touch import BONES, PALM, plane, settle

X, Y, Z = np.eye(3)
MIRROR = np.array([[1.0, -1, -1], [-1, 1, 1], [-1, 1, 1]])  # S R S with S = diag(-1, 1, 1), as a mask
FLIP = np.array([-1.0, 1, 1])
ARM_LENGTH = 0.478  # metres from shoulder to wrist of the average body
LEFT, RIGHT = 0, 1


@dataclass(frozen=True)
class Arm:
    """Where a left arm goes. `wrist`: metres from the shoulder, scaled with the arm; `fingers` and `back`: where the
    fingers and the back of the hand look; `elbow`: where the elbow points; `wobble`: degrees by which the hand
    varies."""

    wrist: tuple[float, float, float]
    fingers: tuple[float, float, float]
    back: tuple[float, float, float]
    elbow: tuple[float, float, float] = (0.5, -1.0, -0.2)
    gesture: str = "relaxed"
    wobble: float = 5.0


@dataclass(frozen=True)
class Pose:
    """A posed person. `rotations` [52,3,3] float32, each relative to its parent; `betas` [10]; `vertices` [V,3] and
    `joints` [62,3] of the body, metres; `head` [3,3] the head's orientation in the world."""

    rotations: ndarray
    betas: ndarray
    vertices: ndarray
    joints: ndarray
    head: ndarray


HANGING = Arm((0.10, -0.455, 0.03), (0.05, -1, 0.12), (1, 0, 0.2), (0.5, -0.4, -1.0), wobble=4)
# How a raised hand can be seen, its gesture left open.
RAISED = {
    "palm": Arm((0.10, 0.02, 0.28), (0.05, 1, 0.05), (0.1, 0.05, -1), (0.5, -1, 0.0)),
    "back": Arm((0.02, 0.00, 0.28), (-0.05, 1, 0.05), (0.1, -0.05, 1), (0.6, -1, 0.1)),
    "side": Arm((0.06, 0.00, 0.27), (0, 1, 0.1), (1, 0, -0.2), (0.5, -1, 0.0)),
}
RAISED["up"] = Arm((0.0, -0.16, 0.32), (-0.15, -0.45, 0.85), (0.0, -0.85, -0.5), (0.6, -1, -0.2))  # palm up, shown
THUMB_UP = Arm((0.0, -0.10, 0.32), (-0.85, 0.1, 0.5), (0.45, 0.0, 0.9), (0.7, -1, 0.0), "thumbs_up")
THUMB_DOWN = replace(THUMB_UP, wrist=(0.05, -0.02, 0.3), back=(-0.45, 0, -0.9), fingers=(-0.8, -0.05, 0.55),
                     gesture="thumbs_down")  # fmt: skip


def unit(v: ndarray) -> ndarray:
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


class Figure:
    """A person while it is posed."""

    def __init__(self, betas: ndarray, rng: np.random.Generator) -> None:
        self.betas, self.rng = np.asarray(betas, float), rng
        template, moves = _rest()
        self.rest = template + moves @ self.betas
        self.scale = np.linalg.norm(self.rest[20] - self.rest[16]) / ARM_LENGTH
        self.rotations = np.tile(np.eye(3), (52, 1, 1))
        self.arms: dict[int, tuple[ndarray, ndarray, Arm]] = {}

    def stand(self, yaw: float = 0.0) -> None:
        """A slightly varied upright body, turned by `yaw` degrees."""
        wobble = self.rng.normal
        for joint in (3, 6, 9):
            self.rotations[joint] = rotation(X, wobble(0, 1.5)) @ rotation(Y, wobble(0, 2)) @ rotation(Z, wobble(0, 1))
        self.rotations[12] = rotation(Y, wobble(0, 5)) @ rotation(X, wobble(0, 3))
        self.rotations[15] = rotation(Y, wobble(-yaw * 0.4, 5)) @ rotation(X, wobble(2, 4)) @ rotation(Z, wobble(0, 3))
        self.rotations[0] = rotation(Y, yaw)

    def kinematics(self) -> tuple[ndarray, ndarray]:
        """Orientations [52,3,3] and places [52,3] of the joints."""
        turns, places = [self.rotations[0]], [self.rest[0]]
        for joint in range(1, 52):
            parent = PARENTS[joint]
            places.append(places[parent] + turns[parent] @ (self.rest[joint] - self.rest[parent]))
            turns.append(turns[parent] @ self.rotations[joint])
        return np.stack(turns), np.stack(places)

    def reach(self, side: int, wrist: ndarray, hand: ndarray, elbow: ndarray) -> None:
        """Brings a wrist to a place, with the hand's orientation [3,3] in the world; the elbow points to `elbow`."""
        turns, places = self.kinematics()
        shoulder, lower, end = (16 + side, 18 + side, 20 + side)
        out = (X, -X)[side]
        a = np.linalg.norm(self.rest[lower] - self.rest[shoulder])
        b = np.linalg.norm(self.rest[end] - self.rest[lower])
        way = wrist - places[shoulder]
        far = np.clip(np.linalg.norm(way), abs(a - b) + 0.02, (a + b) * 0.995)
        way = unit(way)
        along = (a * a - b * b + far * far) / (2 * far)
        across = unit(elbow - way * (elbow @ way))
        upper = unit(along * way + np.sqrt(max(a * a - along * along, 0)) * across)
        fore = unit(far * way - a * upper)
        lower_turn = between(hand @ out, fore) @ hand
        plain = between(out, upper)
        relative = plain.T @ (between(fore, upper) @ lower_turn)
        twist = np.degrees(np.arctan2(relative[2, 1] - relative[1, 2], relative[1, 1] + relative[2, 2]))
        upper_turn = plain @ rotation(X, 0.6 * twist)
        self.rotations[shoulder] = turns[PARENTS[shoulder]].T @ upper_turn
        self.rotations[lower] = upper_turn.T @ lower_turn
        self.rotations[end] = lower_turn.T @ hand

    def place(self, side: int, arm: Arm, wrist: ndarray | None = None, vary: bool = True) -> None:
        """Poses an arm and its hand. wrist: a place in the body's frame instead of the arm's own."""
        fingers, back = np.array(arm.fingers, float), np.array(arm.back, float)
        fingers = unit(fingers)
        back = unit(back - fingers * (fingers @ back))
        hand = np.stack([fingers, back, np.cross(fingers, back)], 1)
        if vary and arm.wobble:
            axis = unit(self.rng.normal(size=3))
            hand = rotation(axis, abs(self.rng.normal(0, arm.wobble))) @ hand
        elbow = np.array(arm.elbow)
        if side:
            hand, elbow = hand * MIRROR, elbow * FLIP
        root = self.rotations[0]
        _, places = self.kinematics()
        if wrist is None:
            step = np.array(arm.wrist) + (self.rng.normal(0, 0.012, 3) if vary else 0)
            where = places[16 + side] + root @ ((step * self.scale) * (FLIP if side else 1))
        else:
            where = root @ (wrist - self.rest[0]) + self.rest[0]
        first = 22 + 15 * side
        self.rotations[first : first + 15] = hand_pose(arm.gesture, side, self.rng if vary else None)
        self.arms[side] = where, hand, arm
        self.reach(side, where, root @ hand, root @ elbow)

    def move(self, side: int, step: ndarray) -> None:
        """Moves a placed wrist by `step` metres in the body's frame; the hand keeps its orientation."""
        where, hand, arm = self.arms[side]
        root = self.rotations[0]
        where = where + root @ step
        self.arms[side] = where, hand, arm
        self.reach(side, where, root @ hand, root @ (np.array(arm.elbow) * (FLIP if side else 1)))

    def vertices(self) -> tuple[ndarray, ndarray]:
        """The posed body [V,3] and its joints [62,3]."""
        with torch.no_grad():
            v, j = human_body()(torch.from_numpy(self.rotations[None]).float(),
                                torch.from_numpy(self.betas[None]).float())  # fmt: skip
        return v[0].numpy(), j[0].numpy()

    def local(self, points: ndarray) -> ndarray:
        """Points of the world in the body's frame."""
        return (points - self.rest[0]) @ self.rotations[0] + self.rest[0]

    def touch(self, side: int, way: ndarray, target: ndarray, what: ndarray | None = None, air: float = 0.0) -> float:
        """Moves a hand along `way` (unit, body's frame, away from the target) until it rests on `target` (vertex ids)
        with `air` metres between. `what`: the vertices that may touch, those of the hand if None. Returns the last
        step in metres."""
        step = 0.0
        mine = hand_ids(side) if what is None else what
        for _ in range(5):
            v = self.local(self.vertices()[0])
            normal = vertex_normals(v)
            a, b = torch.from_numpy(v[mine]), torch.from_numpy(v[target])
            near, which = torch.cdist(a, b).min(1)
            away, n = v[mine] - v[target[which.numpy()]], normal[target[which.numpy()]]
            height = (away * n).sum(1)  # above the surface, where it is near
            close = near.numpy() < 0.05
            if not close.any():
                self.move(side, -0.6 * way * float(near.min()))
                continue
            lean = np.clip(n @ way, 0.35, 1)  # a step along `way` lifts by that part
            step = float(((air - height) / lean)[close].max())
            self.move(side, way * step)
            if abs(step) < 0.0007:
                break
        return step

    def pose(self) -> Pose:
        v, j = self.vertices()
        turns, _ = self.kinematics()
        return Pose(self.rotations.astype(np.float32), self.betas.astype(np.float32), v, j, turns[15])


@lru_cache(maxsize=1)
def _rest() -> tuple[ndarray, ndarray]:
    arrays = load_human().arrays
    regressor = arrays["J_regressor"].astype(float)
    return regressor @ arrays["v_template"], np.einsum("jv,vck->jck", regressor, arrays["shapedirs"])


def rest_joints() -> ndarray:
    """[52,3] metres: the joints of the average body."""
    return _rest()[0]


@lru_cache(maxsize=2)
def hand_ids(side: int) -> ndarray:
    """Vertices of a hand."""
    human = load_human()
    return np.flatnonzero((human.kind == SKIN) & np.isin(human.owner, HAND_JOINTS[side]))


@lru_cache(maxsize=8)
def body_ids(*joints: int) -> ndarray:
    """Vertices of skin and clothes that follow some joints most."""
    human = load_human()
    return np.flatnonzero(np.isin(human.owner, joints) & ((human.kind == CLOTHES) | (human.kind == SKIN)))


def vertex_normals(v: ndarray) -> ndarray:
    f = load_human().arrays["f"]
    face = np.cross(v[f[:, 1]] - v[f[:, 0]], v[f[:, 2]] - v[f[:, 0]])
    out = np.stack([sum(np.bincount(f[:, i], face[:, c], len(v)) for i in range(3)) for c in range(3)], 1)
    return out / np.linalg.norm(out, axis=1, keepdims=True).clip(1e-12)


# --- poses of the whole body ---


def _waving(figure: Figure, sides: tuple[int, ...]) -> None:
    tilt = figure.rng.uniform(-0.45, 0.35)
    gesture = ("spread_fingers", "open_hand", "flat")[figure.rng.integers(3)]
    for side in sides:
        figure.place(side, Arm((0.16, 0.10, 0.22), (tilt, 1, 0.1), (0.05, 0.1, -1), (0.8, -0.9, 0.1), gesture, 6))


def _shrug(figure: Figure, sides: tuple[int, ...]) -> None:
    lift = figure.rng.uniform(6, 14)
    figure.rotations[13], figure.rotations[14] = rotation(Z, lift), rotation(Z, -lift)
    for side in sides:
        arm = Arm((0.22, -0.16, 0.24), (0.85, 0.15, 0.5), (-0.1, -1, 0.1), (0.3, -1, -0.3), "spread_fingers", 5)
        figure.place(side, replace(arm, gesture=("spread_fingers", "relaxed")[figure.rng.integers(2)]))


def _hips(figure: Figure, sides: tuple[int, ...]) -> None:
    for side in sides:
        figure.place(side, Arm((0.05, -0.40, -0.02), (-0.45, -0.75, 0.55), (0.75, 0.05, 0.65), (1, -0.1, -0.5),
                               "flat", 3))  # fmt: skip
        figure.touch(side, np.array([(1.0, -1.0)[side], 0, 0.25]) / np.hypot(1, 0.25), body_ids(0, 1, 2, 3, 6))


def _crossed(figure: Figure, sides: tuple[int, ...]) -> None:
    first = int(figure.rng.integers(2))
    torso, low = body_ids(0, 3, 6, 9, 13, 14), figure.rng.uniform(-0.03, 0.02)
    # The first arm lies on the body, the other one on both; its hand holds the first one's upper arm.
    under = Arm((-0.20, -0.25 + low, 0.13), (-0.9, 0.42, -0.15), (-0.1, 0.1, 1), (0.8, -1, 0.2), "flat", 2)
    over = Arm((-0.22, -0.20 + low, 0.16), (-0.85, 0.5, -0.25), (-0.2, 0.2, 1), (0.8, -1, 0.25), "relaxed", 2)
    for side, arm, target in ((first, under, torso), (1 - first, over, np.concatenate([torso, _arm_ids(first)]))):
        figure.place(side, arm)
        figure.touch(side, Z, target, np.concatenate([hand_ids(side), body_ids(18 + side)]))


def _arm_ids(side: int) -> ndarray:
    return np.concatenate([body_ids(16 + side, 18 + side), hand_ids(side)])


def _cheek(figure: Figure, sides: tuple[int, ...]) -> None:
    side = sides[0]
    out = (1.0, -1.0)[side]
    figure.rotations[15] = rotation(Z, -out * figure.rng.uniform(2, 9)) @ rotation(X, figure.rng.uniform(-2, 6))
    _, places = figure.kinematics()
    head = figure.local(places[15][None])[0]
    wrist = head + np.array([out * 0.10, figure.rng.uniform(-0.15, -0.12), 0.06]) * figure.scale
    gesture = ("flat", "relaxed", "open_hand")[figure.rng.integers(3)]
    figure.place(side, Arm((0, 0, 0), (-0.08, 1, -0.12), (0.95, 0.1, 0.3), (0.3, -1, 0.35), gesture, 3), wrist)
    figure.touch(side, unit(np.array([out, -0.1, 0.3])), body_ids(15))


def _chin(figure: Figure, sides: tuple[int, ...]) -> None:
    side = sides[0]
    out = (1.0, -1.0)[side]
    figure.rotations[15] = rotation(X, figure.rng.uniform(2, 8))
    _, places = figure.kinematics()
    head = figure.local(places[15][None])[0]
    wrist = head + np.array([out * 0.035, -0.19, 0.125]) * figure.scale
    gesture = ("fist", "pointing", "relaxed")[figure.rng.integers(3)]
    figure.place(side, Arm((0, 0, 0), (-0.3, 1, -0.1), (0.25, 0.15, 1), (0.3, -1, 0.2), gesture, 3), wrist)
    figure.touch(side, np.array([0, -1.0, 0.25]) / np.hypot(1, 0.25), body_ids(15))


def _mirrored(
    figure: Figure,
    arm: Arm,
    height: float,
    forward: float,
    apart: float,
    low: float,
    high: float,
    near: tuple[int, ...],
) -> None:
    """Both hands before the chest, mirror images that meet in the plane between them.

    height, forward: metres from the neck to the wrists. The hands tilt towards each other, by `low` to `high` degrees,
    until the joints `near` and the rest of the hand reach equally far."""
    figure.rotations[3:13:3] = np.eye(3)  # the middle must be the body's middle
    wrist = figure.rest[12] + np.array([0.06, height, forward]) * figure.scale
    ids = hand_ids(LEFT)
    first = np.isin(load_human().owner[ids], near)
    fingers, back = unit(np.array(arm.fingers)), unit(np.array(arm.back))
    for _ in range(8):
        tilt = np.radians(0.5 * (low + high))
        turned = np.cos(tilt) * fingers - np.sin(tilt) * back, np.cos(tilt) * back + np.sin(tilt) * fingers
        arm = replace(arm, fingers=tuple(turned[0]), back=tuple(turned[1]))
        figure.place(LEFT, arm, wrist, vary=False)
        x = figure.local(figure.vertices()[0])[ids, 0]
        middle = 0.5 * (low + high)
        low, high = (middle, high) if x[first].min() < x[~first].min() else (low, middle)
    for _ in range(4):
        figure.place(LEFT, arm, wrist, vary=False)
        x = figure.local(figure.vertices()[0])[ids, 0]
        wrist = wrist + np.array([apart / 2 - x.min(), 0, 0])
    for side in (LEFT, RIGHT):
        figure.place(side, arm, wrist * (FLIP if side else 1), vary=False)


THUMB = (34, 35, 36)  # joints of the left one


def _pressed(figure: Figure, arm: Arm, height: float, forward: float, apart: float = 0.0) -> None:
    """Both hands before the chest, flat on each other: palms and all fingers lie on the plane in the middle, or `apart`
    metres from each other. height, forward: metres from the neck to the wrists."""
    figure.rotations[3:13:3] = np.eye(3)  # the middle must be the body's middle
    wrist = figure.rest[12] + np.array([0.04 + apart / 2, height, forward]) * figure.scale
    figure.place(LEFT, arm, wrist, vary=False)
    root = figure.rotations[0]
    middle = plane(figure.rest[0] + root @ X * apart / 2, root @ X)
    settle(figure, LEFT, middle, root @ np.array(arm.elbow), (*PALM, *BONES), sink=0.0008)
    figure.rotations[[17, 19, 21]] = figure.rotations[[16, 18, 20]] * MIRROR
    figure.rotations[37:52] = figure.rotations[22:37] * MIRROR


def _praying(figure: Figure, sides: tuple[int, ...]) -> None:
    arm = Arm((0, 0, 0), (0, 1, figure.rng.uniform(0.1, 0.5)), (1, 0, 0), (0.9, -0.7, -0.1), "prayer", 0)
    _pressed(figure, arm, figure.rng.uniform(-0.23, -0.13), 0.21)
    figure.rotations[15] = rotation(X, figure.rng.uniform(0, 14))


def _clapping(figure: Figure, sides: tuple[int, ...]) -> None:
    apart = figure.rng.choice([0.0, figure.rng.uniform(0.05, 0.2)])
    arm = Arm((0, 0, 0), (0, 0.8, 0.8), (1, 0, 0), (0.9, -0.7, -0.1), "prayer", 0)
    _pressed(figure, arm, figure.rng.uniform(-0.24, -0.12), 0.26, apart)


def _heart(figure: Figure, sides: tuple[int, ...]) -> None:
    arm = Arm((0, 0, 0), (0, 1, 0), (1, 0, 0), (0.9, -0.8, 0.1), "half_heart", 0)
    _mirrored(figure, arm, figure.rng.uniform(-0.22, 0.0), 0.26, 0.0, -25, 65, THUMB)


BODY_POSES: dict[str, Callable[[Figure, tuple[int, ...]], None]] = {
    "waving": _waving,
    "shrug": _shrug,
    "hands_on_hips": _hips,
    "arms_crossed": _crossed,
    "hand_on_cheek": _cheek,
    "hand_on_chin": _chin,
    "praying": _praying,
    "clapping": _clapping,
    "heart": _heart,
}
TWO_HANDED = ("arms_crossed", "praying", "clapping", "heart")


def raised(name: str, view: str, rng: np.random.Generator) -> Arm:
    """A left arm that holds a hand gesture up, seen from `view` (palm, back, side or up; any if ""). It varies more
    than `place` makes it: the hand leans and turns. Thumbs up and down are held as they are, whatever the view."""
    shift = rng.normal(0, (0.03, 0.04, 0.02)).clip(-0.07, 0.07)
    if name in ("thumbs_up", "thumbs_down"):
        turn = np.radians(rng.uniform(10, 80))  # fingers to the viewer, or inwards
        arm = THUMB_UP if name == "thumbs_up" else THUMB_DOWN
        inward = (-np.sin(turn), 0.08, np.cos(turn))
        sign = 1 if name == "thumbs_up" else -1
        arm = replace(arm, fingers=inward, back=(sign * np.cos(turn), 0.0, sign * np.sin(turn)))
        lean, turned = rng.normal(0, 8), rng.normal(0, 6)
    else:
        view = view or ("palm", "back")[rng.integers(2)]
        arm = replace(RAISED[view], gesture=name)
        gesture = HANDS[name]
        turned = rng.uniform(-18, 18) - (gesture.turn if view in ("palm", "back") else 0) * rng.uniform(0.3, 0.9)
        lean = float(np.clip(rng.normal(-2, 12), -25, 22))
    way = rotation(Z, lean) @ rotation(Y, turned) @ rotation(X, rng.normal(0, 7))
    fingers, back = way @ np.array(arm.fingers, float), way @ np.array(arm.back, float)
    return replace(arm, wrist=tuple(np.array(arm.wrist) + shift), fingers=tuple(fingers), back=tuple(back))


FRAMINGS = ("close-up", "bust", "half body", "whole")


def frame(
    joints: ndarray,
    framing: str,
    rng: np.random.Generator,
    sides: tuple[int, ...] | Sequence[tuple[int, ...]] = (LEFT, RIGHT),
    extra: ndarray | None = None,
) -> Camera:
    """A camera that shows what a framing promises: the hands of `sides` ("close-up"), head and chest with these hands
    ("bust"), down to the hips ("half body"), or all. joints [..., 62, 3] of one person or several, metres; sides: of
    everyone, or one tuple a person; extra [N,3]: other places to show."""
    joints = np.asarray(joints).reshape(-1, 62, 3)
    everyone = [np.ravel(one).tolist() for one in (sides if isinstance(sides[0], tuple) else [sides] * len(joints))]
    points = [j[list(HAND_JOINTS[side]), :2] for j, mine in zip(joints, everyone, strict=True) for side in mine]
    margin = 0.14
    if framing != "close-up":
        head, up, aside = joints[:, 15, :2], np.array([0, 0.19]), np.array([0.11, 0])
        low = {"bust": 9, "half body": 0, "whole": 10}[framing]
        points += [head + up, head + aside, head - aside, joints[:, low, :2]]
        margin = 0.08
    if extra is not None:
        points.append(extra[:, :2])
    everything = np.concatenate(points)
    low, high = everything.min(0), everything.max(0)
    size = max((high - low).max(), 0.17 if framing == "close-up" else 0.4)
    fill = (1 - 2 * margin) * rng.uniform(0.78, 1.0)
    s = 2 * fill / size
    free = (2 / s - (high - low)) / 2 - 2 * margin / s / 2
    centre = (low + high) / 2 + rng.uniform(-0.5, 0.5, 2) * free.clip(0, 0.2)
    return Camera(float(s), float(-centre[0]), float(-centre[1]))


def sample_pose(
    name: str,
    betas: ndarray,
    rng: np.random.Generator,
    side: str = "left",
    view: str = "palm",
    yaw: float | None = None,
) -> Pose:
    """A posed person: `name` is one of BODY_POSES, or a hand gesture that is held up and seen from `view`.

    side: "left", "right" or "both"; yaw: degrees by which the person turns, random if None."""
    figure = Figure(betas, rng)
    figure.stand(rng.normal(0, 10) if yaw is None else yaw)
    sides = {"left": (LEFT,), "right": (RIGHT,), "both": (LEFT, RIGHT)}[side]
    for rest in (LEFT, RIGHT):
        figure.place(rest, HANGING)
    if name in BODY_POSES:
        BODY_POSES[name](figure, (LEFT, RIGHT) if name in TWO_HANDED else sides)
        return figure.pose()
    for shown in sides:
        arm = replace(RAISED[view], gesture=name)
        if name in ("thumbs_up", "thumbs_down"):
            arm = THUMB_UP if name == "thumbs_up" else THUMB_DOWN
        figure.place(shown, arm)
    return figure.pose()
