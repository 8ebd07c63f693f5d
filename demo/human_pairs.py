"""Two people who touch: they shake hands, give a high five, hold hands, pass a thing, or one lays an arm around the
other's shoulders.

    people = pose_pair("handshake", (betas, betas), rng)       # left to right in the picture

Hands meet as `clasps.py` and `grasps.py` solved it on hands of average size. For other hands the distance grows with
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy import ndarray

from ..models.smplh import HAND_JOINTS
from .clasps import clasps, fingers_of
from .contacts import surface_distance
from .gestures import rotation
from .human import load_human
from .human_clothes import Look, outside, surface
from .human_gestures import hand_pose
from .human_holding import BENT, PoseError, bend, frame_of, hand_scale, places_of
from .human_poses import (
    FLIP,
    HANGING,
    LEFT,
    MIRROR,
    RIGHT,
    Figure,
    Pose,
    X,
    Y,
    Z,
    body_ids,
    unit,
    vertex_normals,
)
from .human_touch import BONES, PALM, Surface, gaps, parts_of, settle, shell
from .things import Grasp, grasps, thing_mesh

PASSED = {"book": (0, 1, 2), "stick": (0, 2)}  # things that two hands can hold, and which of their grasps
APART = 0.002  # metres by which a wrist may miss its place
BEFORE = replace(HANGING, wrist=(0.0, -0.43, 0.15), fingers=(-0.1, -1, 0.3))
ELBOWS = ((-0.2, 1.0, -0.7), (-0.2, 0.2, -1.0))  # where it points, if free
UNLIKE = 0.07  # metres by which two shoulders' heights may differ
LEGS = (1, 2, 4, 5, 7, 8, 10, 11)
BENT_OVER = 85.0  # degrees that the wrist of a hand on a shoulder may turn against the forearm
# Metres: gaps of a hand on a shoulder, how deep it is inside, and how deep anything that two people wear is.
TOUCHING, PRESSED, DEEPEST = 0.0014, 0.003, 0.0018


@dataclass(frozen=True)
class Pair:
    """Two posed people, left to right in the picture. sides: the hands that are meant, of each. thing, grasp, where:
    what is passed, as the first hand holds it, and the places of its mesh [N,3]."""

    poses: tuple[Pose, Pose]
    sides: tuple[tuple[int, ...], tuple[int, ...]]
    thing: str = ""
    grasp: Grasp | None = None
    where: ndarray | None = None


@dataclass(frozen=True)
class Meeting:
    """How two hands meet, for left ones: finger rotations of both, turn [3,3] and place [3] of the second hand in the
    frame of the first; `up` and `ahead` [3] in that frame look up and forward from the first person."""

    first: ndarray
    second: ndarray
    turn: ndarray
    place: ndarray
    up: ndarray
    ahead: ndarray


def _clasp(name: str, sides: tuple[int, int], rng: np.random.Generator) -> Meeting:
    rows = clasps()[name]
    row = rows[rng.integers(len(rows))]
    turn, place = np.array(row["turn"]), np.array(row["place"])
    hands = [fingers_of(hand, side) for hand, side in zip(row["hands"], sides, strict=True)]
    up, ahead = X, -Y
    if name == "handshake":
        axis = np.linalg.eigh(turn + turn.T)[1][:, -1]  # the half turn's axis
        up, ahead = axis * np.sign(axis[2]), X
    elif name == "holding_hands":  # fingers down, palm back
        up, ahead = unit(X + turn @ -X) * -1, Y
    return Meeting(hands[0], hands[1], turn, place, up, ahead)


def _passing(thing: str, sides: tuple[int, int], rng: np.random.Generator) -> tuple[Meeting, Grasp]:
    """Both hold the thing alike: the second hand is the first one's, half a turn around the thing."""
    number = PASSED[thing][rng.integers(len(PASSED[thing]))]
    grasp = grasps(thing)[number]
    _, y, z = grasp.turn.T
    middle, axis, shift = grasp.place, y, np.zeros(3)
    if thing == "stick":  # one hand above the other
        shift = 2 * y * (y @ grasp.place)
    elif number != 1:
        axis = z
    turn = 2 * np.outer(axis, axis) - np.eye(3)
    first, second = (grasp.hand(side) for side in sides)
    return Meeting(first, second, turn, middle - turn @ middle + shift, axis, X), grasp


def pose_pair(
    name: str, betas: tuple[ndarray, ndarray], rng: np.random.Generator, looks: Sequence[Look] = (Look(), Look())
) -> Pair:
    """Two people who do what `name` says: handshake, high_five, holding_hands, passing or arm_around. looks: what they
    wear, on which an arm lies.

    Raises PoseError where their bodies do not allow it."""
    if name == "arm_around":
        return _arm_around(betas, rng, looks)
    if name == "holding_hands":
        sides: tuple[int, int] = (LEFT, RIGHT)
    else:
        both = RIGHT if name == "handshake" or rng.random() < 0.75 else LEFT
        sides = (both, both)
    thing = ("book", "stick")[rng.integers(2)] if name == "passing" else ""
    meeting, grasp = _passing(thing, sides, rng) if thing else (_clasp(name, sides, rng), None)
    beside = name == "holding_hands"
    turned = rng.uniform(-12, 12, 2) if beside else (90 - rng.uniform(8, 45), rng.uniform(8, 45) - 90)
    figures = [Figure(b, rng) for b in betas]
    for figure, yaw in zip(figures, turned, strict=True):
        figure.stand(yaw)
        for side in (LEFT, RIGHT):
            figure.place(side, HANGING)
    first, second = figures
    # The first hand, in the world: `heading` is where the first person's hand looks.
    heading = 0.0 if beside else 90.0 + rng.uniform(-18, 18)
    lean = rotation(unit(rng.normal(size=3)), rng.normal(0, 4))
    if thing == "book":  # its cover leans to the viewer
        lean = rotation(X, rng.uniform(20, 55)) @ lean
    angle = np.radians(heading)
    mirror = MIRROR if sides[0] == RIGHT else np.ones((3, 3))
    hand = lean @ rotation(Y, heading) @ (mirror * (frame_of(Y, Z) @ frame_of(meeting.up, meeting.ahead).T))
    offset = _reaches(name, rng)
    _, places = first.kinematics()
    away = np.array([np.sin(angle), 0, np.cos(angle)])
    across = np.array([np.cos(angle), 0, -np.sin(angle)])  # to the first person's left
    aim = offset[2] * away + offset[0] * across * (1 if sides[0] == LEFT else -1) + offset[1] * Y
    wrist = places[16 + sides[0]] + aim * first.scale
    _bring(first, sides[0], wrist, hand, meeting.first, beside)
    # The second hand where it belongs, and the second person behind it.
    scale = 0.5 * (hand_scale(first) + hand_scale(second))
    turn, place = meeting.turn * mirror, meeting.place * (FLIP if sides[0] == RIGHT else 1)
    other_hand = hand @ turn
    other_wrist = first.kinematics()[1][20 + sides[0]] + scale * hand @ place
    _, theirs = second.kinematics()
    back = np.array([-aim[0], aim[1], aim[2] if beside else -aim[2]]) * second.scale
    step = other_wrist - (theirs[16 + sides[1]] + back)
    step[1] = _floor(first) - _floor(second)
    _bring(second, sides[1], other_wrist - step, other_hand, meeting.second, beside)
    poses = (first.pose(), moved(second.pose(), step))
    where = None if grasp is None else places_of(first, sides[0], grasp, thing_mesh(thing, grasp.size).vertices)
    pair = Pair(poses, ((sides[0],), (sides[1],)), thing, grasp, where)
    _check_apart(pair)
    return pair


def _reaches(name: str, rng: np.random.Generator) -> ndarray:
    """From the shoulder to the wrist: to the outside, up, and away, metres of the average body."""
    low, high = {
        "handshake": ((-0.10, -0.30, 0.24), (-0.02, -0.18, 0.33)),
        "high_five": ((-0.08, -0.02, 0.24), (0.04, 0.14, 0.34)),
        "passing": ((-0.10, -0.26, 0.22), (0.02, -0.10, 0.32)),
        "holding_hands": ((0.10, -0.45, 0.0), (0.16, -0.40, 0.08)),
    }[name]
    return rng.uniform(low, high)


def _bring(figure: Figure, side: int, wrist: ndarray, hand: ndarray, fingers: ndarray, low: bool) -> None:
    """Brings a wrist to its place in the figure's world. Raises PoseError where it cannot be there."""
    elbow = np.array([0.4, -0.3, -1.0] if low else [0.5, -1.0, -0.1]) * (FLIP if side else 1)
    figure.rotations[22 + 15 * side : 37 + 15 * side] = fingers
    if np.linalg.norm(_aim(figure, side, wrist, hand, figure.rotations[0] @ elbow)) > APART:
        raise PoseError("out of reach")
    if bend(figure.rotations[20 + side]) > BENT:
        raise PoseError("bent")


def _floor(figure: Figure) -> float:
    return float(figure.kinematics()[1][[7, 8], 1].min())


def moved(pose: Pose, step: ndarray) -> Pose:
    step = step.astype(np.float32)
    return replace(pose, vertices=pose.vertices + step, joints=pose.joints + step)


def _check_apart(pair: Pair) -> None:
    """Bodies stand beside each other. Raises PoseError."""
    torso = [pose.vertices[body_ids(0, 3, 6, 9, 13, 14, 15)] for pose in pair.poses]
    if torso[1][:, 0].min() - torso[0][:, 0].max() < 0.0:
        raise PoseError("into each other")


# --- an arm around shoulders ---


def _arm_around(betas: tuple[ndarray, ndarray], rng: np.random.Generator, looks: Sequence[Look]) -> Pair:
    """One person's arm lies behind the other one, the hand on the far shoulder: palm and fingers rest on what the other
    one wears. The one who does it stands on the right of the picture, or on the left."""
    figures = [Figure(b, rng) for b in betas]
    doer = int(rng.integers(2))
    side = (LEFT, RIGHT)[doer]  # the arm next to the other one
    out = np.array([(1.0, -1.0)[doer], 1, 1])  # from the doer to the other one, along x
    for number, figure in enumerate(figures):  # the doer turns a little to the other one
        figure.stand(rng.uniform(5, 20) * out[0] if number == doer else rng.uniform(-8, 8))
        for each in (LEFT, RIGHT):
            figure.place(each, HANGING)
    me, other = figures[doer], figures[1 - doer]
    if abs(me.rest[16, 1] - me.rest[10, 1] - other.rest[16, 1] + other.rest[10, 1]) > UNLIKE:
        raise PoseError("too tall or too small")
    other.place(1 - side, BEFORE)  # its near arm makes room
    place, faces = _worn(other, looks[1 - doer])
    shoulder = other.kinematics()[1][16 + side]  # the far one
    mine, theirs = (figure.kinematics()[1] for figure in (me, other))
    step = np.array([0.0, _floor(other) - _floor(me), 0.0])
    step[0] = theirs[17 - side, 0] - mine[16 + side, 0] - out[0] * rng.uniform(0.03, 0.06)
    step[2] = theirs[17 - side, 2] - mine[16 + side, 2] - rng.uniform(0.07, 0.10)
    owner = load_human().owner[surface().source]
    shown = ~np.isin(owner, LEGS)
    body = shown & ~np.isin(owner, (18 + side, *HAND_JOINTS[side]))
    over = unit(out * np.array([rng.uniform(0.2, 0.6), 0.85, rng.uniform(-0.25, 0.05)]))
    ahead = out * np.array([rng.uniform(0.35, 0.75), -0.2, rng.uniform(0.55, 0.9)])
    me.rotations[22 + 15 * side : 37 + 15 * side] = hand_pose("open_hand", side)
    for _ in range(5):  # the bodies part until only the hand can touch
        rest = shell(place - step, faces, shoulder - step, 0.26)  # where the doer's body is posed
        _lay(me, side, rest, shoulder - step + 0.09 * over, ahead, out * np.array(ELBOWS[0]))
        own, its = _worn(me, looks[doer])
        deep = _depth(own + step, its, place, faces, body, shown)
        if deep <= DEEPEST / 2:
            break
        step = step + unit(out * np.array([-0.45, 0, -0.9])) * (deep + 0.004)
    settle(me, side, rest, out * np.array(ELBOWS[0]), (*PALM, *BONES))
    near = faces[np.linalg.norm(place[faces[:, 0]] - shoulder, axis=1) < 0.26]
    corners = [place[near[:, i]] - step for i in range(3)]
    _check_touch(me, side, rest, corners)
    turns, places = me.kinematics()
    wrist, hand = places[20 + side], turns[20 + side]
    for elbow in ELBOWS:  # the hand stays; the arm swings about the line from shoulder to wrist
        _aim(me, side, wrist, hand, out * np.array(elbow))
        own, its = _worn(me, looks[doer])
        if _depth(own + step, its, place, faces, shown, shown) <= DEEPEST:
            break
    else:
        raise PoseError("into each other")
    _check_touch(me, side, rest, corners)
    if bend(me.rotations[20 + side]) > BENT_OVER:
        raise PoseError("bent")
    poses = [figure.pose() for figure in figures]
    poses[doer] = moved(poses[doer], step)
    sides: list[tuple[int, ...]] = [(), ()]
    sides[doer] = (side,)
    return Pair((poses[0], poses[1]), (sides[0], sides[1]))


def _check_touch(me: Figure, side: int, rest: Surface, corners: list[ndarray]) -> None:
    """The palm and three fingers touch, and nothing is deep inside; corners: three [F,3], of the surface's triangles.
    Raises PoseError."""
    low = gaps(me, side, rest)
    fingers = [min(low[finger, bone] for bone in range(3)) for finger in range(1, 5)]
    if min(low[part] for part in PALM) > TOUCHING or sorted(fingers)[2] > TOUCHING:
        raise PoseError("in the air")
    hand = me.vertices()[0][np.concatenate(list(parts_of(side).values()))].astype(float)
    below = hand[rest(hand)[0] < 0]
    if len(below) and surface_distance(below, *corners).max() > PRESSED:
        raise PoseError("into each other")


def _aim(figure: Figure, side: int, wrist: ndarray, hand: ndarray, elbow: ndarray) -> ndarray:
    """Reaches for a wrist's place; bones of a body are not quite straight: what is missing is added. Returns what is
    still missing [3]."""
    aim = wrist
    for _ in range(4):
        figure.reach(side, aim, hand, elbow)
        missing = wrist - figure.kinematics()[1][20 + side]
        aim = aim + missing
    return missing


def _lay(me: Figure, side: int, rest: Surface, over: ndarray, ahead: ndarray, elbow: ndarray) -> None:
    """Brings an open hand near a shoulder: over a place [3] above it, the fingers ahead. Raises PoseError."""
    height, normal = (found[0] for found in rest(over[None]))
    back = unit(normal.astype(float))
    fingers = unit(ahead - back * (ahead @ back))
    along = fingers if side == LEFT else -fingers  # a right hand's fingers look along -x of its own frame
    hand = np.stack([along, back, np.cross(along, back)], 1)
    wrist = over + back * (0.035 - height) - fingers * 0.07 * hand_scale(me)
    me.reach(side, wrist, hand, elbow)
    if np.linalg.norm(me.kinematics()[1][20 + side] - wrist) > 15 * APART:
        raise PoseError("out of reach")


def _worn(figure: Figure, look: Look) -> tuple[ndarray, ndarray]:
    v, _ = figure.vertices()
    return outside(v, vertex_normals(v), look)


def _depth(one: ndarray, its: ndarray, other: ndarray, faces: ndarray, mine: ndarray, theirs: ndarray) -> float:
    """How deep (metres) two people's surfaces lie in each other: places [N,3] and triangles [F,3] of both, and which
    places count [N] bool."""
    deepest = 0.0
    sets = ((one, its[mine[its].all(1)]), (other, faces[theirs[faces].all(1)]))
    used = [np.unique(triangles) for _, triangles in sets]
    low = np.maximum(one[used[0]].min(0), other[used[1]].min(0)) - 0.02
    high = np.minimum(one[used[0]].max(0), other[used[1]].max(0)) + 0.02
    middle, radius = 0.5 * (low + high), 0.5 * float(np.linalg.norm(high - low)) + 0.03
    for (places, _), ids, (solid, triangles) in zip(sets, used, sets[::-1], strict=True):
        points = places[ids]
        points = points[((points > low) & (points < high)).all(1)]
        centre = solid[triangles[:, 0]]
        triangles = triangles[((centre > low - 0.05) & (centre < high + 0.05)).all(1)]
        if len(points) and len(triangles):
            deepest = max(deepest, -float(shell(solid, triangles, middle, radius)(points)[0].min()))
    return deepest
