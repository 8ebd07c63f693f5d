"""Edited hands, by their values: a person drags a joint in the picture, and the rotations of the finger follow.

    hands = edit(hands, drags=[Drag("right", 8, 0.4, 0.3)])       # the tip of the right index finger
    hands = edit(hands, gesture=("left", "fist"))
    hands = mirrored(hands)
    hands = edit(hands, gesture=("left", "fist"), person=1)       # of several people, from 0

`hands` are those of a picture (see `runtime.results.Picture`): arrays of SMPL-H, the camera, and the joints' places.
The code needs no body model: the length of each bone follows from the joints and rotations that come with the hands. It
runs without an engine, in numpy.

A hand's joints are the wrist, then thumb, index, middle, ring and little finger, each from its root to its tip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from .contract import HAND_JOINTS, NUM_JOINTS
from .errors import RequestError
from .fingers import SIDES, axes, gestures, limits
from .hands import POSES, given_arrays, people_in
from .hands import person as person_of
from .kinematics import at_rest, forward
from .rotations import axis_angle_to_matrix, matrix_to_axis_angle

Arrays = dict[str, np.ndarray]

# The joint at each place of the mirror image.
MIRROR = np.array([0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20,
                   *range(37, 52), *range(22, 37), *range(57, 62), *range(52, 57)])  # fmt: skip
FLIP = np.array([1.0, -1.0, -1.0])  # multiplies a rotation vector in a mirror at x = 0

# Of the solver: rounds at most, the first damping, and the weight of the old pose.
MAX_ROUNDS, DAMPING, REST = 30, 1e-3, 2e-3
FAR = 1.0  # widths and heights of the picture that a joint may be dragged beyond it


@dataclass(frozen=True)
class Drag:
    """A joint of a hand and its new place, in [0, 1] of the picture's width and height."""

    side: str
    joint: int  # 0 ... 20
    x: float
    y: float


def edit(
    hands: Arrays, drags: list[Drag] | None = None, gesture: tuple[str, str] | None = None, person: int = 0
) -> Arrays:
    """New hands, with new `joints` and `joints_2d`. The camera changes only if a wrist is dragged.

    hands: a Picture's, or what `find_hands` yields. drags: places in [0, 1]. gesture: (side, name). person: whose, of
    several people, from 0; the others stay.
    Raises RequestError for an unknown side, joint, gesture or person, a place that is not a number, and hands
    without camera or joints.
    """
    return _of_one(hands, person, lambda one: _edited(one, drags or [], gesture))


def _of_one(hands: Arrays, person: int, change: Callable[[Arrays], Arrays]) -> Arrays:
    """The hands with one person changed. Raises RequestError for a person that is not there."""
    arrays = given_arrays(hands, *POSES)
    count = people_in(arrays)
    if isinstance(person, bool) or not isinstance(person, Integral) or not 0 <= person < count:
        raise RequestError(
            f"person must be a whole number from 0 to {count - 1} for these hands, got {person!r}.", "person"
        )
    if count == 1:
        return change(arrays)
    changed = change(person_of(arrays, int(person)))
    people = [changed if number == person else person_of(arrays, number) for number in range(count)]
    return {name: np.stack([one[name] for one in people]) for name in changed}


def _edited(hands: Arrays, drags: list[Drag], gesture: tuple[str, str] | None) -> Arrays:
    pose = Pose(hands)
    if gesture is not None:
        if isinstance(gesture, str) or len(gesture) != 2:
            raise RequestError(
                f'gesture must be a side and a name, such as ("left", "fist"), got {gesture!r}.', "gesture"
            )
        which, name = gesture
        _side("gesture.hand", which)
        if name not in gestures():
            raise RequestError(f"gesture.name must be one of {', '.join(gestures())}, got {name!r}.", "gesture.name")
        vectors = gestures()[name].reshape(15, 3)
        first = 22 + 15 * SIDES.index(which)
        pose.local[first : first + 15] = axis_angle_to_matrix(vectors * (FLIP if which == "right" else 1.0))
    by_finger: dict[tuple[int, int], list[Drag]] = {}
    for drag in drags:
        _side("drags.hand", drag.side)
        if isinstance(drag.joint, bool) or not isinstance(drag.joint, Integral) or not 0 <= drag.joint <= 20:
            raise RequestError(
                f"drags.joint must be a whole number from 0 to 20, got {drag.joint!r}. 0 is the wrist; then four for "
                "each finger, from the thumb.",
                "drags.joint",
            )
        for axis, value in (("x", drag.x), ("y", drag.y)):
            _number(f"drags.{axis}", value, -FAR, 1 + FAR, " of the picture's width and height")
        side = SIDES.index(drag.side)
        if drag.joint == 0:
            pose.move(side, np.array([drag.x, drag.y]))
        else:
            by_finger.setdefault((side, (drag.joint - 1) // 4), []).append(drag)
    for (side, finger), asked in by_finger.items():
        pose.reach(side, finger, asked)
    return pose.hands()


def _side(name: str, side: object) -> None:
    if side not in SIDES:
        raise RequestError(f"{name} must be left or right, got {side!r}.", name)


def _number(name: str, value: object, least: float, most: float, unit: str) -> None:
    """Raises RequestError; NaN is in no range."""
    if not isinstance(value, Real) or not least <= float(value) <= most:
        raise RequestError(f"{name} must be a number from {least:g} to {most:g}{unit}, got {value!r}.", name)


def mirrored(hands: Arrays) -> Arrays:
    """The mirror image: a right hand becomes a left one. Exact for a symmetric body. Several people stay in order from
    left to right. Raises RequestError."""
    hands = given_arrays(hands, *POSES, "placement")
    if (count := people_in(hands)) > 1:
        people = [mirrored(person_of(hands, number)) for number in reversed(range(count))]
        return {name: np.stack([one[name] for one in people]) for name in people[0]}
    out = dict(hands)
    vectors = np.concatenate([np.reshape(hands[name], (-1, 3)) for name in POSES])[MIRROR[:NUM_JOINTS]] * FLIP
    out.update({name: vectors[joints].reshape(-1) for name, joints in POSES.items()})
    placement = np.reshape(hands["placement"], (2, 4))[::-1].copy()
    placement[:, 1] *= -1
    out["placement"] = placement
    if "camera" in hands:
        out["camera"] = hands["camera"] * np.array([1.0, -1.0, 1.0])
    if "joints" in hands:
        out["joints"] = hands["joints"][MIRROR] * np.array([-1.0, 1.0, 1.0])
    if "joints_2d" in hands:
        out["joints_2d"] = hands["joints_2d"][::-1] * np.array([-1.0, 1.0]) + np.array([1.0, 0.0])
    if "visibility" in hands:
        out["visibility"] = hands["visibility"][::-1].copy()
    return out


def swapped(hands: Arrays, person: int = 0) -> Arrays:
    """Both hands keep their places and exchange their finger poses. person: see `edit`. Raises RequestError."""
    return _of_one(hands, person, _swapped)


def _swapped(hands: Arrays) -> Arrays:
    pose = Pose(hands)
    left, right = (np.reshape(pose.given[f"{side}_hand_pose"], (-1, 3)) for side in SIDES)
    changed = {"left_hand_pose": (right * FLIP).reshape(-1), "right_hand_pose": (left * FLIP).reshape(-1)}
    for name, value in changed.items():
        pose.local[POSES[name]] = axis_angle_to_matrix(value.reshape(-1, 3).astype(np.float64))
    return pose.hands()


def moved(
    hands: Arrays, scale: float = 1.0, turn: float = 0.0, over: bool = False, flip: bool = False, person: int = 0
) -> Arrays:
    """The hands elsewhere around their middle, which stays. scale: factor of their size. turn: degrees clockwise in the
    picture. over: palms that showed turn away. flip: their mirror image: a right hand becomes a left one. person: see
    `edit`. Raises RequestError."""
    _number("scale", scale, 0.05, 20, "")
    _number("turn", turn, -360, 360, " degrees")
    return _of_one(hands, person, lambda one: _moved(one, scale, turn, over, flip))


def _moved(hands: Arrays, scale: float, turn: float, over: bool, flip: bool) -> Arrays:
    middle = Pose(hands).middle()
    pose = Pose(mirrored(hands) if flip else hands)
    angle = -np.radians(turn)  # y points up in the world
    spin = axis_angle_to_matrix(np.array([[0.0, 0.0, angle], [0.0, np.pi * over, 0.0]]))
    pose.local[0] = spin[0] @ spin[1] @ pose.local[0]
    pose.see(pose.to_image[0] * scale, pose.to_image[1])
    pose.see(pose.to_image[0], pose.to_image[1] + middle - pose.middle())
    return pose.hands()


class Pose:
    """The joints' turns in their parents' frames, [52, 3, 3], and the joints at rest, [62, 3]."""

    def __init__(self, hands: Arrays) -> None:
        """Raises RequestError."""
        hands = self.given = given_arrays(hands, *POSES, "camera", "joints", "joints_2d")
        vectors = np.concatenate([np.reshape(hands[name], (-1, 3)) for name in POSES]).astype(np.float64)
        self.local = axis_angle_to_matrix(vectors)
        joints = np.asarray(hands["joints"], np.float64)
        self.rest = at_rest(joints, self.local)
        self.camera = np.asarray(hands["camera"], np.float64)
        self.to_image = _image_map(joints, self.camera, np.asarray(hands["joints_2d"], np.float64))

    def joints(self) -> np.ndarray:
        """[62, 3] metres."""
        return forward(self.local, self.rest)[1]

    def seen(self, joints: np.ndarray) -> np.ndarray:
        """[..., 3] metres -> [..., 2] in [0, 1] of the picture."""
        scale, shift = self.to_image
        return scale * joints[..., :2] + shift

    def middle(self) -> np.ndarray:
        """[2] in [0, 1] of the picture: the middle of the hands that are there."""
        presence = self.given.get("visibility", self.given.get("placement", np.ones((2, 1)))[:, 0])
        shown = np.asarray(presence) >= 0.5
        which = np.array(HAND_JOINTS)[shown if shown.any() else slice(None)]
        found: np.ndarray = self.seen(self.joints()[which]).reshape(-1, 2).mean(0)
        return found

    def see(self, scale: np.ndarray, shift: np.ndarray) -> None:
        """Sets the camera: picture = scale * (X, Y) + shift, both [2]."""
        self.to_image = (scale, shift)
        self.camera = np.array([-2 * scale[1], *((shift - 0.5) / scale)])

    def move(self, side: int, to: np.ndarray) -> None:
        """Shifts the camera, and with it both hands, so that a wrist is at `to`."""
        scale, shift = self.to_image
        off = to - self.seen(self.joints()[HAND_JOINTS[side][0]])
        self.to_image = (scale, shift + off)
        self.camera = self.camera + np.array([0.0, *(off / scale)])

    def reach(self, side: int, finger: int, drags: list[Drag]) -> None:
        """Turns a finger's three joints so that the dragged joints get as close to their targets as LIMITS_DEGREES let.

        Damped least squares (Buss 2004) over three angles of each joint: bend, side, twist. Angles that do not change
        the picture keep their values.
        """
        hand = HAND_JOINTS[side]
        chain = hand[1 + 4 * finger : 5 + 4 * finger]  # three joints and the tip
        turning, bones = chain[:3], np.diff(self.rest[list(chain)], axis=0)
        frames, joints = forward(self.local, self.rest)
        base, origin = frames[hand[0]], joints[chain[0]]
        turns = axes(self.rest[list(hand)], side)[finger]  # [3, 3, 3]: joint, then rows bend, side, twist
        low, high = (np.radians(limits(finger)[:, i]) for i in range(2))  # [9]
        angles = np.concatenate(
            [axis @ v for axis, v in zip(turns, matrix_to_axis_angle(self.local[list(turning)]), strict=True)]
        )
        before = angles.copy()
        low, high = np.minimum(low, before), np.maximum(high, before)  # the present angles are always allowed
        targets = {(drag.joint - 1) % 4: np.array([drag.x, drag.y]) for drag in drags}
        targets = {joint: to for joint, to in targets.items() if joint > 0}  # a finger's root does not move in the palm
        size = abs(self.to_image[0][0]) * np.linalg.norm(bones, axis=-1).sum()
        if not targets or size < 1e-6:  # no target, or a finger too small to see
            return

        def places(angles: np.ndarray) -> np.ndarray:
            """Places of the dragged joints, [J, 2], in lengths of the finger."""
            at, frame, points = origin, base, []
            for i in range(3):
                frame = frame @ axis_angle_to_matrix((angles[3 * i : 3 * i + 3] @ turns[i])[None])[0]
                at = at + frame @ bones[i]
                if i + 1 in targets:
                    points.append(self.seen(at))
            return np.stack(points) / size

        goal = np.stack([targets[joint] for joint in sorted(targets)]) / size
        weights = np.tile([1.0, 3.0, 6.0], 3)  # bending costs least

        def worth(angles: np.ndarray) -> float:
            return float(np.square(goal - places(angles)).sum() + REST * np.square(weights * (angles - before)).sum())

        def solve(angles: np.ndarray) -> np.ndarray:
            damping = DAMPING
            for _ in range(MAX_ROUNDS):
                now = places(angles)
                jacobian = np.stack(
                    [(places(angles + 1e-4 * unit) - now).reshape(-1) / 1e-4 for unit in np.eye(9)], -1
                )  # [2 J, 9]
                miss = np.concatenate([(goal - now).reshape(-1), np.sqrt(REST) * weights * (before - angles)])
                full = np.concatenate([jacobian, np.sqrt(REST) * np.diag(weights)])
                change = np.linalg.solve(full.T @ full + damping * np.eye(9), full.T @ miss)
                tried = (angles + change.clip(-0.4, 0.4)).clip(low, high)
                gain = worth(angles) - worth(tried)
                if gain > 0:
                    angles, damping = tried, max(damping / 3, 1e-6)
                    if gain < 1e-7:
                        break
                else:
                    damping *= 5
            return angles

        # A straight finger, seen from the front, gets shorter whichever way it bends: also start from a bent one.
        bent = (before + np.radians([35, 0, 0, 40, 0, 0, 20, 0, 0])).clip(low, high)
        angles = min((solve(before), solve(bent)), key=worth)
        for i, joint in enumerate(turning):
            self.local[joint] = axis_angle_to_matrix((angles[3 * i : 3 * i + 3] @ turns[i])[None])[0]

    def hands(self) -> Arrays:
        joints = self.joints()
        vectors = matrix_to_axis_angle(self.local)
        out = {name: value for name, value in self.given.items() if name not in ("vertices", "params")}
        out.update({name: vectors[which].reshape(-1) for name, which in POSES.items()})
        out["joints"], out["camera"] = joints, self.camera
        out["joints_2d"] = self.seen(joints[np.array(HAND_JOINTS)])
        return out


def _image_map(joints: np.ndarray, camera: np.ndarray, joints_2d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scale [2], shift [2]): picture = scale * (X, Y) + shift.

    The camera gives the scale of the height. The width follows from the joints that come with the hands.
    """
    s, tx, ty = camera
    scale = np.array([s / 2, -s / 2])
    shift = np.array([0.5 + s / 2 * tx, 0.5 - s / 2 * ty])
    ours, theirs = joints[np.array(HAND_JOINTS), 0].reshape(-1), joints_2d[..., 0].reshape(-1)
    from_centre = scale[0] * (ours + tx)
    if (square := float(from_centre @ from_centre)) > 1e-12:
        share = float(from_centre @ (theirs - 0.5)) / square  # height / width
        if 0.1 < share < 10:
            scale[0] *= share
            shift[0] = 0.5 + scale[0] * tx
    return scale, shift
