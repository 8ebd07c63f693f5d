"""Hands that lie flat on something: their fingers bend until palm and fingers touch it, and nothing enters it.

    settle(figure, LEFT, surface, elbow, contacts)        # surface: points [S,3] -> heights [S], normals [S,3]

Every part of the hand has a lowest point above the surface. Damped least squares on finger joints, the hand's turn and
its place bring these points down to the surface; then the whole hand is lifted until its lowest point lies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy import ndarray

from ..models.smplh import HAND_JOINTS
from .gestures import rotation
from .hand_mesh import FRAMES
from .human import SKIN, load_human

FLIP = np.array([-1.0, 1, 1])
BLOCKS = (4, 0, 1, 3, 2)  # a finger's place in SMPL-H's order, thumb first
BONES = tuple((finger, bone) for finger in range(1, 5) for bone in range(3))
# Parts of the palm: the heel below the thumb, the heel below the little finger, the mounds below the four fingers.
PALM = ("thumb's heel", "little finger's heel", "mounds")
ROUNDS, DAMPING = 12, 0.001
BENDS, TURN, STEP = 9.0, 7.0, 0.03  # degrees, degrees and metres that a part moves as easily as others
HYPER = -12.0  # degrees to which a finger's joint bends backwards
FULL = 100.0
Surface = Callable[[ndarray], tuple[ndarray, ndarray]]
Part = tuple[int, int] | str


class Figure(Protocol):
    """What is needed of `human_poses.Figure`."""

    rotations: ndarray

    def kinematics(self) -> tuple[ndarray, ndarray]: ...
    def vertices(self) -> tuple[ndarray, ndarray]: ...
    def reach(self, side: int, wrist: ndarray, hand: ndarray, elbow: ndarray) -> None: ...


@lru_cache(maxsize=2)
def parts_of(side: int) -> dict[Part, ndarray]:
    """Vertices of a hand's parts: the inner side of each finger bone (finger 1 to 4, bone), those of PALM, and "rest":
    all others of the hand."""
    human = load_human()
    mirrored = human.mirror if side else np.arange(len(human.template))
    left = np.flatnonzero((human.kind == SKIN) & np.isin(human.owner, HAND_JOINTS[0]))
    place = human.template[left] - human.joints[20]
    normal = _normals()[left]
    owner = human.owner[left]
    out: dict[Part, ndarray] = {}
    for finger, bone in BONES:
        inner = normal @ FRAMES[finger, 1] < -0.3
        out[finger, bone] = left[(owner == 22 + 3 * BLOCKS[finger] + bone) & inner]
    palm = (owner == 20) & (normal[:, 1] < -0.3)
    low = place[:, 0] < 0.05
    for name, region in zip(PALM, (low & (place[:, 2] > 0.008), low & (place[:, 2] < -0.008), place[:, 0] > 0.075),
                            strict=True):  # fmt: skip
        out[name] = left[palm & region]
    out["rest"] = np.setdiff1d(left, np.concatenate(list(out.values())))
    return {name: mirrored[ids] for name, ids in out.items()}


@lru_cache(maxsize=1)
def _normals() -> ndarray:
    human = load_human()
    v, f = human.template.astype(float), human.arrays["f"]
    face = np.cross(v[f[:, 1]] - v[f[:, 0]], v[f[:, 2]] - v[f[:, 0]])
    out = np.stack([sum(np.bincount(f[:, i], face[:, c], len(v)) for i in range(3)) for c in range(3)], 1)
    return out / np.linalg.norm(out, axis=1, keepdims=True).clip(1e-12)


def plane(point: ndarray, normal: ndarray) -> Surface:
    """The heights above a plane."""
    return lambda points: ((points - point) @ normal, np.broadcast_to(normal, points.shape))


def shell(vertices: ndarray, faces: ndarray, near: ndarray, radius: float) -> Surface:
    """The heights above a mesh [N,3], [F,3], wound outwards, within a radius (metres) of a place: above the plane of
    the nearest of its vertices and triangles' middles. Elsewhere it has no surface."""
    corners = vertices[faces]
    middle = corners.mean(1)
    close = np.linalg.norm(middle - near, axis=1) < radius
    faces, corners, middle = faces[close], corners[close], middle[close]
    face = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    ids, index = np.unique(faces, return_inverse=True)
    index = index.reshape(faces.shape)
    around = np.stack([sum(np.bincount(index[:, i], face[:, c], len(ids)) for i in range(3)) for c in range(3)], 1)
    places = torch.from_numpy(np.concatenate([vertices[ids], middle])).float()
    normals = np.concatenate([around, face])
    normals = normals / np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-12)

    def heights(points: ndarray) -> tuple[ndarray, ndarray]:
        far, which = (x.numpy() for x in torch.cdist(torch.from_numpy(points).float(), places).min(1))
        height = ((points - places.numpy()[which]) * normals[which]).sum(1)
        # Behind the surface's rim nothing is inside; far before it the distance itself counts.
        return np.where(far > 0.04, far, height), normals[which]

    return heights


def gaps(figure: Figure, side: int, surface: Surface) -> dict[Part, float]:
    """The lowest height (metres) of each part of a posed hand; below 0 it is inside."""
    v = figure.vertices()[0].astype(float)
    return {name: float(surface(v[ids])[0].min()) for name, ids in parts_of(side).items()}


def settle(
    figure: Figure, side: int, surface: Surface, elbow: ndarray, contacts: Sequence[Part], sink: float = 0.0003
) -> None:
    """Brings a hand that is near a surface down on it: `contacts` are to touch, nothing goes deeper than `sink` metres.

    elbow: where it points, in the world. The shoulder stays; the wrist moves by a few centimetres."""
    joints = [22 + 15 * side + 3 * BLOCKS[finger] + bone for finger, bone in BONES]
    turns, places = figure.kinematics()
    start = figure.rotations[joints].copy()
    now = best = (np.zeros(len(BONES)), places[20 + side].copy(), turns[20 + side].copy())
    least = np.inf
    scale = np.array([np.radians(BENDS)] * len(BONES) + [np.radians(TURN)] * 3 + [STEP] * 3)
    for _ in range(ROUNDS):
        h, n, rows = _lowest(figure, side, surface, joints)
        touching = np.array([name in contacts for name in parts_of(side)])
        spread = h[touching].max() - h.min()  # the widest gap, once the hand is lifted
        if spread < least:
            up = n[touching].mean(0)
            lift = up / np.linalg.norm(up) * float((-sink - h).max())
            least, best = spread, (now[0], now[1] + lift, now[2])
        counted = touching | (h < 0)
        weight = np.where(touching, 1.0, 2.0)[counted]
        a = np.concatenate([rows[counted] * scale * weight[:, None], DAMPING * np.eye(len(scale))])
        wanted = np.concatenate([-(h[counted] + sink) * weight, np.zeros(len(scale))])
        now = _moved(now, np.linalg.lstsq(a, wanted, rcond=None)[0] * scale)
        _pose(figure, side, joints, start, now, elbow)
    _pose(figure, side, joints, start, best, elbow)


State = tuple[ndarray, ndarray, ndarray]  # of a hand: bends of BONES in degrees, its wrist [3] and its turn [3,3]


def _moved(state: State, step: ndarray) -> State:
    """A state after a step of its 18 numbers, which is cut where it is long."""
    bends, wrist, hand = state
    bends = np.clip(bends + np.degrees(step[:12]).clip(-12, 12), HYPER, FULL)
    angle, length = (float(np.linalg.norm(part)) for part in (step[12:15], step[15:]))
    if angle > 1e-6:
        hand = rotation(step[12:15] / angle, float(np.degrees(min(angle, 0.15)))) @ hand
    return bends, wrist + step[15:] * min(1.0, 0.02 / max(length, 1e-9)), hand


def _pose(figure: Figure, side: int, joints: list[int], start: ndarray, state: State, elbow: ndarray) -> None:
    for joint, turn, (finger, _), bend in zip(joints, start, BONES, state[0], strict=True):
        axis = FRAMES[finger, 2] * (FLIP if side else -1)
        figure.rotations[joint] = turn @ rotation(axis, bend)
    figure.reach(side, state[1], state[2], elbow)


def _lowest(figure: Figure, side: int, surface: Surface, joints: list[int]) -> tuple[ndarray, ndarray, ndarray]:
    """The heights [K] of the lowest points of a hand's K parts, the surface's normals there [K,3], and how the heights
    follow bends of the joints of BONES, turns about the wrist and steps [K,18]."""
    v = figure.vertices()[0].astype(float)
    turns, places = figure.kinematics()
    axes = (turns[joints] @ (FRAMES[[f for f, _ in BONES], 2] * (FLIP if side else -1))[..., None])[..., 0]
    parts = parts_of(side)
    h, n, rows = np.zeros(len(parts)), np.zeros((len(parts), 3)), np.zeros((len(parts), 18))
    weights = load_human().arrays["weights"]
    for number, ids in enumerate(parts.values()):
        height, normal = surface(v[ids])
        low = int(height.argmin())
        point, h[number], n[number] = v[ids[low]], height[low], normal[low]
        for k, (_, bone) in enumerate(BONES):  # skin follows a joint as far as its weights and those beyond it say
            share = weights[ids[low], joints[k] : joints[k] + 3 - bone].sum()
            rows[number, k] = share * (n[number] @ np.cross(axes[k], point - places[joints[k]]))
        rows[number, 12:15] = np.cross(point - places[20 + side], n[number])
        rows[number, 15:] = n[number]
    return h, n, rows
