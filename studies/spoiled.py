"""Pictures of the demo's world whose hands are spoiled, with the truth beside them.

    case = make(7)              # the seventh case: its kind and its ground follow from the number
    case.picture, case.truth    # uint8 [H, W, 3], the same but for the hand
    case.hand                   # what the hand should be, in pixels

A hand has 30 to 200 pixels, a picture up to 1024. The arm comes in over the picture's edge.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import cv2
import numpy as np
import torch
from handiffuser.contract import HAND_JOINTS
from handiffuser.demo.body import vertex_colours
from handiffuser.demo.gestures import pose, rotation
from handiffuser.demo.prompts import BACKGROUNDS, Spec, allowed_views, sample_spec
from handiffuser.demo.render import demo_body, hand_faces, render
from handiffuser.demo.scenes import Scene, forward_joints, sample_scene
from handiffuser.detection.arms import HandEstimate
from handiffuser.kinematics import world
from handiffuser.models.smplh import SMPLH
from handiffuser.rotations import matrix_to_axis_angle

SEED = 20_300_000
KINDS = ("six", "missing", "melted", "fused", "gesture", "whole")  # whole: nothing is wrong with the hand
GROUNDS = ("flat", "gradient", "textured")
SMALLEST, LARGEST = 30, 200  # pixels of a hand
WIDEST = 1024  # pixels of a picture
# Fingers that stand apart from the rest of the hand, as its silhouette shows them.
STRETCHED = {"spread_fingers": 5, "four_fingers": 4, "three_fingers": 3, "love_you": 3, "three_with_thumb": 3,
             "victory": 2, "horns": 2, "call_me": 2, "pointing": 1, "pinky_up": 1}  # fmt: skip
ADDED = ("spread_fingers", "four_fingers", "three_fingers", "love_you")  # hands with room for another finger
FINGERS = {"spread_fingers": (1, 2, 3, 4), "four_fingers": (1, 2, 3, 4), "three_fingers": (1, 2, 3),
           "love_you": (1, 4)}  # fmt: skip
BLOCK = {1: 0, 2: 3, 3: 9, 4: 6}  # finger -> its first joint in SMPL-H's order


@dataclass
class Case:
    """picture: the spoiled one; truth: the same with a good hand; ground: without any; all uint8 [H, W, 3].
    cover: how much of a pixel the good hand and its arm cover, float32 [H, W]. count: how many fingers stand apart, or
    None where the silhouette does not tell. shown: the same of the spoiled picture."""

    kind: str
    surface: str
    picture: np.ndarray = field(repr=False)
    truth: np.ndarray = field(repr=False)
    ground: np.ndarray = field(repr=False)
    cover: np.ndarray = field(repr=False)
    hand: HandEstimate = field(repr=False)
    gesture: str
    prompt: str
    count: int | None
    shown: int | None

    @property
    def side(self) -> str:
        return ("left", "right")[self.hand.side]

    @property
    def pixels(self) -> float:
        return float(np.ptp(self.hand.joints_2d, axis=0).max())


@lru_cache(maxsize=1)
def body() -> tuple[SMPLH, np.ndarray, np.ndarray, np.ndarray]:
    """The body, the faces of hands and forearms, the side of each, and the joint that each vertex follows."""
    made = demo_body()
    faces, side = hand_faces(made)
    return made, faces.numpy(), side.numpy(), made.weights.argmax(1).numpy()


@dataclass
class Mesh:
    """vertices [V, 3] metres, colours [V, 3], faces [F, 3], joints [52 or more, 3]."""

    vertices: np.ndarray
    colours: np.ndarray
    faces: np.ndarray
    joints: np.ndarray

    @classmethod
    def of(cls, scene: Scene, side: int) -> Mesh:
        made, faces, sides, _ = body()
        with torch.no_grad():
            vertices, joints = made(torch.from_numpy(scene.rotations)[None], torch.from_numpy(scene.betas)[None])
        colours = vertex_colours(scene.skin[None])[0]
        return cls(vertices[0].numpy(), colours, faces[sides == side], joints[0].numpy())

    def drawn(self, scene: Scene, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Light of the hand, float32 [S, S, 3] in 0..255 and darker where it covers less, and cover [S, S]."""
        used, faces = np.unique(self.faces, return_inverse=True)
        arrays = [torch.from_numpy(np.ascontiguousarray(a, np.float32))[None] for a in
                  (self.vertices[used], self.colours[used], scene.camera, scene.light)]  # fmt: skip
        vertices, colours, camera, light = arrays
        corners = torch.from_numpy(faces.reshape(-1, 3))
        black, white = (
            render(vertices, corners, colours, camera, torch.full((1, 3), value), light, size)[0].numpy()
            for value in (0.0, 1.0)
        )
        empty = render(vertices, corners[:0], colours, camera, torch.ones(1, 3), light, size)[0].numpy()
        through = (white.astype(np.float32) - black).mean(-1) / empty.mean(-1)
        return black.astype(np.float32), (1 - through).clip(0, 1)


def sixth(mesh: Mesh, side: int, finger: int) -> Mesh:
    """The mesh with a copy of a finger beside the little finger (4) or the index finger (1)."""
    owner = body()[3]
    first = 22 + 15 * side + BLOCK[finger]
    moved = np.flatnonzero(np.isin(owner, range(first, first + 3)))
    place = np.full(len(owner), -1)
    place[moved] = np.arange(len(moved)) + len(mesh.vertices)
    faces = mesh.faces[np.isin(mesh.faces, moved).all(1)]
    points = mesh.joints[list(HAND_JOINTS[side])]
    near, next_to = (points[17], points[13]) if finger == 4 else (points[5], points[9])
    out = (near - next_to) / np.linalg.norm(near - next_to)
    along = points[9] - points[0]
    across = np.cross(points[5] - points[0], points[17] - points[0])
    turn = rotation(across / np.linalg.norm(across), 20)
    turn = turn if (turn @ along - along) @ out > 0 else turn.T
    root = near - 0.002 * out - 0.032 * along / np.linalg.norm(along)
    copy = (mesh.vertices[moved] - mesh.joints[first]) @ turn.T + root
    return Mesh(
        np.concatenate([mesh.vertices, copy]),
        np.concatenate([mesh.colours, mesh.colours[moved]]),
        np.concatenate([mesh.faces, place[faces]]),
        mesh.joints,
    )


def without(mesh: Mesh, side: int, finger: int) -> Mesh:
    """The mesh with a finger drawn into its knuckle."""
    first = 22 + 15 * side + BLOCK[finger]
    share = body()[0].weights.numpy()[:, first : first + 3].sum(1)[:, None]
    return replace(mesh, vertices=mesh.vertices + 0.92 * share * (mesh.joints[first] - mesh.vertices))


def melted(light: np.ndarray, cover: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Hand and cover, swirled about the hand's middle, wavy and blurred. points: [21, 2] pixels."""
    size = float(np.ptp(points, axis=0).max())
    middle, n = points.mean(0), len(light)
    y, x = np.mgrid[0:n, 0:n].astype(np.float32)
    dx, dy = x - middle[0], y - middle[1]
    near = np.clip(1 - np.hypot(dx, dy) / (0.75 * size), 0, 1)
    turn = rng.choice([-1, 1]) * rng.uniform(1.0, 1.8) * near**1.2
    waves = [cv2.resize(rng.normal(size=(10, 10)).astype(np.float32), (n, n), interpolation=cv2.INTER_CUBIC)
             * 0.035 * size * near for _ in range(2)]  # fmt: skip
    from_x = middle[0] + np.cos(turn) * dx - np.sin(turn) * dy + waves[0]
    from_y = middle[1] + np.sin(turn) * dx + np.cos(turn) * dy + waves[1]
    out = []
    for layer in (light, cover):
        bent = cv2.remap(layer, from_x.astype(np.float32), from_y.astype(np.float32), cv2.INTER_LINEAR)
        soft = cv2.GaussianBlur(bent, (0, 0), 0.02 * size)
        share = np.clip(3 * near, 0, 1) if layer.ndim == 2 else np.clip(3 * near, 0, 1)[..., None]
        out.append(bent * (1 - share) + soft * share)
    return out


def fused(
    light: np.ndarray, cover: np.ndarray, points: np.ndarray, fingers: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Hand and cover with skin between two neighbouring fingers, from knuckles to tips."""
    a, b = (points[1 + 4 * finger : 5 + 4 * finger] for finger in fingers)
    web = np.zeros(cover.shape, np.uint8)
    hull = cv2.convexHull(np.round(np.concatenate([a, b]) * 16).astype(np.int32))
    cv2.fillConvexPoly(web, hull, 1, shift=4)
    gap = (web > 0) & (cover < 0.98)
    known, wide = (cover > 0.98).astype(np.float32), 0.03 * float(np.ptp(points, axis=0).max())
    skin = cv2.GaussianBlur(light * known[..., None], (0, 0), wide) / (
        cv2.GaussianBlur(known, (0, 0), wide)[..., None] + 1e-6
    )
    soft = np.maximum(cv2.GaussianBlur(gap.astype(np.float32), (0, 0), 0.6), gap)[..., None] * (web > 0)[..., None]
    return light * (1 - soft) + skin * soft, np.maximum(cover, soft[..., 0])


def surface(kind: str, size: tuple[int, int], name: str, rng: np.random.Generator) -> np.ndarray:
    """What lies behind the hand, uint8 [H, W, 3]."""
    height, width = size
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    colours = [np.array(BACKGROUNDS[name])]
    colours += [np.array(list(BACKGROUNDS.values())[k]) for k in rng.choice(len(BACKGROUNDS), 2, replace=False)]
    if kind == "flat":
        out = colours[0] * (1.02 - 0.05 * y - 0.09 * ((x**2 + y**2) / 2) ** 1.5)[..., None]
    elif kind == "gradient":
        way = rng.uniform(0, 2 * np.pi)
        share = np.clip(0.5 + 0.5 * (x * np.cos(way) + y * np.sin(way)), 0, 1)[..., None]
        out = colours[0] * (1 - share) + colours[1] * share
    else:
        waves = np.zeros((height, width, 3))
        for cells, strong in ((4, 1.0), (8, 0.7), (16, 0.5), (32, 0.35)):
            grid = rng.normal(size=(cells, cells, 3))
            waves += strong * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        out = 0.5 * colours[0] + 0.3 * colours[1] + 0.2 * colours[2] + 0.06 * waves
    return (out.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def over(ground: np.ndarray, light: np.ndarray, cover: np.ndarray, corner: tuple[int, int]) -> np.ndarray:
    """The ground with a hand's layers at (left, top)."""
    left, top = corner
    part = np.s_[top : top + len(light), left : left + len(light)]
    out = ground.copy()
    out[part] = (light + (1 - cover)[..., None] * out[part] + 0.5).clip(0, 255).astype(np.uint8)
    return out


def _spec(kind: str, rng: np.random.Generator) -> Spec:
    spec = sample_spec(rng, both=0.0, even=True)
    if kind in ("six", "missing"):
        name = ADDED[0] if rng.random() < 0.5 else ADDED[rng.integers(1, len(ADDED))]
        spec = replace(spec, gesture=name, view=("palm", "back")[rng.integers(2)])
    elif kind == "fused":
        name = ("spread_fingers", "four_fingers", "three_fingers")[rng.integers(3)]
        spec = replace(spec, gesture=name, view=("palm", "back")[rng.integers(2)])
    return spec


def _edges(cover: np.ndarray) -> tuple[bool, bool, bool, bool]:
    """Over which of the left, top, right and bottom edges the arm comes in."""
    left, top, right, bottom = (float(e.max()) > 0.2 for e in (cover[:, 0], cover[0], cover[:, -1], cover[-1]))
    return left, top, right, bottom


def _spoil(
    kind: str, scene: Scene, mesh: Mesh, size: int, points: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Light and cover of the spoiled hand, and how many fingers of it stand apart."""
    side, name = int(scene.present[1]), scene.spec.gesture
    count = STRETCHED.get(name) if scene.spec.view != "side" else None
    if kind == "six":
        finger = 4 if 4 in FINGERS[name] and (rng.random() < 0.6 or name == "spread_fingers") else 1
        return *sixth(mesh, side, finger).drawn(scene, size), STRETCHED[name] + 1
    if kind == "missing":
        finger = int(rng.choice(FINGERS[name]))
        return *without(mesh, side, finger).drawn(scene, size), STRETCHED[name] - 1
    if kind == "gesture":
        others = [other for other in STRETCHED if other != name and scene.spec.view in allowed_views(other, "left")]
        others = others or ["fist"]
        other = others[rng.integers(len(others))]
        rotations = scene.rotations.copy()
        rotations[22 + 15 * side : 37 + 15 * side] = pose(other, side, rng)
        shown = STRETCHED.get(other) if scene.spec.view != "side" else None
        return *Mesh.of(replace(scene, rotations=rotations), side).drawn(scene, size), shown
    light, cover = mesh.drawn(scene, size)
    if kind == "melted":
        return *melted(light, cover, points, rng), None
    if kind == "fused":
        first = int(rng.choice([1, 2, 3] if name != "three_fingers" else [1, 2]))
        return *fused(light, cover, points, (first, first + 1)), STRETCHED[name] - 1
    return light, cover, count


def make(number: int, seed: int = SEED) -> Case:
    """A case of each kind before the next ground: after 18 numbers all of them came once."""
    kind, ground_kind = KINDS[number % len(KINDS)], GROUNDS[number // len(KINDS) % len(GROUNDS)]
    rng = np.random.default_rng((seed, number))
    scene = sample_scene(rng, _spec(kind, rng), close_up=bool(rng.random() < 0.7))
    side = int(scene.present[1])
    points = forward_joints(scene.rotations, scene.betas)[list(HAND_JOINTS[side])]
    s, tx, ty = scene.camera
    shares = 0.5 + 0.5 * s * np.stack([points[:, 0] + tx, -(points[:, 1] + ty)], -1)
    wanted = np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST)))
    size = max(4 * round(wanted / float(np.ptp(shares, axis=0).max()) / 4), 36)
    mesh = Mesh.of(scene, side)
    good, cover = mesh.drawn(scene, size)
    bad, bad_cover, shown = _spoil(kind, scene, mesh, size, shares * size, rng)
    width, height = (int(np.exp(rng.uniform(np.log(max(size, 160)), np.log(WIDEST)))) for _ in range(2))
    room = width - size, height - size
    left, top = int(rng.integers(room[0] + 1)), int(rng.integers(room[1] + 1))
    from_left, from_top, from_right, from_bottom = _edges(cover)
    left = 0 if from_left else room[0] if from_right else left
    top = 0 if from_top else room[1] if from_bottom else top
    ground = surface(ground_kind, (height, width), scene.spec.background, rng)
    whole = np.zeros((height, width), np.float32)
    whole[top : top + size, left : left + size] = cover
    fingers = matrix_to_axis_angle(scene.rotations[22 + 15 * side : 37 + 15 * side].astype(np.float64))
    turn = world(scene.rotations.astype(np.float64))[20 + side]
    hand = HandEstimate(side, turn, fingers, shares * size + (left, top))
    count = STRETCHED.get(scene.spec.gesture) if scene.spec.view != "side" else None
    return Case(kind, ground_kind, over(ground, bad, bad_cover, (left, top)), over(ground, good, cover, (left, top)),
                ground, whole, hand, scene.spec.gesture, scene.prompt, count, shown)  # fmt: skip
