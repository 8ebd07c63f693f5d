"""Things that the demo's people hold: a cup, a ball, a phone, a pen, a stick and a book, as small meshes of our own.

A thing stands in its own frame: y along its length, z out of its front, the origin in its middle. `grasps.py` solves
how a hand holds it and keeps the solutions in grasps.json.

    grasp = grasps("cup")[0]
    mesh = thing_mesh("cup", grasp.size)
    held(mesh.vertices, grasp, wrist, turn, side=0)      # [N,3] where they are in the world
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy import ndarray

from .gestures import Bones, Finger, pose_of

FILE = Path(__file__).with_name("grasps.json")
THINGS = ("cup", "ball", "phone", "pen", "stick", "book")
ROUND = 40  # corners of a circle
FLIP = np.array([-1.0, 1, 1])
Size = tuple[float, ...]
# Sizes in metres, one for each solution. cup: radius below, radius above, half the height, whether it has a handle;
# ball: radius; phone, book: half width, half length, half thickness; pen, stick: radius, half the length.
SIZES: dict[str, tuple[Size, ...]] = {
    "cup": ((0.037, 0.039, 0.047, 1), (0.029, 0.038, 0.052, 0), (0.032, 0.034, 0.058, 0)),
    "ball": ((0.033,), (0.036,), (0.030,)),
    "phone": ((0.036, 0.075, 0.0042), (0.034, 0.071, 0.0040), (0.0355, 0.077, 0.0045)),
    "pen": ((0.0046, 0.071), (0.0052, 0.066), (0.0042, 0.075)),
    "stick": ((0.0165, 0.19), (0.0185, 0.22), (0.0150, 0.17)),
    "book": ((0.066, 0.098, 0.009), (0.074, 0.108, 0.013), (0.058, 0.088, 0.007)),
}
# What a thing's faces are made of, by number: its colours are given in this order.
PARTS = {
    "cup": ("cup", "drink"),
    "ball": ("ball", "second"),
    "phone": ("case", "screen", "lens"),
    "pen": ("barrel", "tip"),
    "stick": ("bark", "end"),
    "book": ("cover", "pages"),
}


@dataclass(frozen=True)
class Mesh:
    """A thing at rest: vertices [N,3] metres, faces [F,3] wound outwards, part [F]. Sharp edges have two vertices."""

    vertices: ndarray
    faces: ndarray
    part: ndarray


@dataclass(frozen=True)
class ThingLook:
    """How a thing looks: for each of its PARTS a display colour and gloss (strength, roughness). `grain` [3]: how fine
    its spots are along x, y, z, per metre; `rough`: how strong."""

    colours: tuple[tuple[float, float, float], ...]
    gloss: tuple[tuple[float, float], ...]
    grain: tuple[float, float, float] = (300.0, 300.0, 300.0)
    rough: float = 0.1


@dataclass(frozen=True)
class Grasp:
    """How a left hand of average size holds a thing: angles of the hand as in `gestures`, and the thing's `turn` [3,3]
    and `place` [3] (metres) in the hand's frame, the wrist being its origin."""

    size: Size
    fingers: tuple[Finger, ...]
    thumb: Bones
    roll: float
    turn: ndarray
    place: ndarray

    def hand(self, side: int) -> ndarray:
        """Finger rotations [15,3,3] float32."""
        return pose_of(np.array(self.fingers), np.array(self.thumb), self.roll, side)


@cache
def grasps(thing: str) -> tuple[Grasp, ...]:
    """The solutions of a thing, one for each of its SIZES."""
    rows = json.loads(FILE.read_text())["things"][thing]
    return tuple(grasp_of(thing, number, row) for number, row in enumerate(rows))


def grasp_of(thing: str, number: int, row: dict) -> Grasp:
    """A row of grasps.json."""
    fingers, thumb = (tuple(map(tuple, row[name])) for name in ("fingers", "thumb"))
    return Grasp(SIZES[thing][number], fingers, thumb, row["roll"], np.array(row["turn"]), np.array(row["place"]))


def held(points: ndarray, grasp: Grasp, wrist: ndarray, turn: ndarray, side: int, scale: float = 1.0) -> ndarray:
    """Where points [N,3] of a thing are in the world. wrist [3], turn [3,3]: place and orientation of the hand that
    holds it; scale: its size beside the average hand. A right hand holds the mirror image."""
    local = scale * (points @ grasp.turn.T + grasp.place)
    return wrist + (local * FLIP if side else local) @ turn.T


# --- meshes ---


class _Builder:
    def __init__(self) -> None:
        self.vertices: list[ndarray] = []
        self.faces: list[ndarray] = []
        self.part: list[ndarray] = []
        self.count = 0

    def add(self, vertices: ndarray, faces: ndarray, part: int) -> None:
        self.vertices.append(vertices)
        self.faces.append(faces + self.count)
        self.part.append(np.full(len(faces), part))
        self.count += len(vertices)

    def rings(self, rings: Sequence[ndarray], part: int) -> None:
        """Joins closed rings of as many points each, [K,3], counter-clockwise seen from where the last one lies."""
        count = len(rings[0])
        i = np.arange(count)
        j = (i + 1) % count
        faces = []
        for step in range(len(rings) - 1):
            a, b = step * count, (step + 1) * count
            faces += [np.stack([a + i, a + j, b + j], 1), np.stack([a + i, b + j, b + i], 1)]
        self.add(np.concatenate(rings), np.concatenate(faces), part)

    def lid(self, ring: ndarray, part: int, down: bool = False) -> None:
        """Closes a ring with a fan."""
        i = np.arange(len(ring))
        faces = np.stack([i, np.roll(i, -1), np.full(len(ring), len(ring))], 1)
        self.add(np.concatenate([ring, ring.mean(0, keepdims=True)]), faces[:, ::-1] if down else faces, part)

    def mesh(self) -> Mesh:
        vertices, faces, part = (np.concatenate(x) for x in (self.vertices, self.faces, self.part))
        a, b, c = vertices[faces].transpose(1, 0, 2)
        real = (np.cross(b - a, c - a) ** 2).sum(1) > 1e-17  # corners of outlines may fall into one place
        return Mesh(vertices, faces[real], part[real])


def _circle(radius: float, y: float) -> ndarray:
    """Counter-clockwise seen from above."""
    angle = -np.arange(ROUND) / ROUND * 2 * np.pi
    return np.stack([radius * np.cos(angle), np.full(ROUND, y), radius * np.sin(angle)], 1)


def _lathe(build: _Builder, profile: Sequence[tuple[float, float]], part: int, rows: int = 1) -> None:
    """A surface of revolution: (radius, y) from the bottom to the top, each step cut into `rows`."""
    points = np.array(profile, float)
    at = np.linspace(0, len(points) - 1, rows * (len(points) - 1) + 1)
    fine = np.stack([np.interp(at, np.arange(len(points)), points[:, k]) for k in range(2)], 1)
    build.rings([_circle(max(radius, 1e-5), y) for radius, y in fine], part)


def _cup(low: float, high: float, half: float, handle: float) -> Mesh:
    build, edge = _Builder(), 0.002
    build.lid(_circle(low - edge, -half), 0, down=True)
    _lathe(build, [(low - edge, -half), (low, -half + edge), (high, half - 0.001)], 0, 8)
    _lathe(build, [(high, half - 0.001), (high - 0.0012, half), (high - 0.0026, half - 0.001)], 0)
    _lathe(build, [(high - 0.0026, half - 0.001), (high - 0.003, half - 0.012)], 0)
    build.lid(_circle(high - 0.003, half - 0.012), 1)
    if handle:
        middle, ring = np.array([0.0, 0.0, -0.5 * (low + high) - 0.006]), []
        around = np.arange(10) / 10 * 2 * np.pi
        for angle in np.linspace(np.pi / 2, -np.pi / 2, 16):  # from above to below, on the far side
            out = np.array([0.0, np.sin(angle), -np.cos(angle)])
            tube = np.cos(around)[:, None] * out + np.sin(around)[:, None] * np.array([1.0, 0, 0])
            ring.append(middle + out * (0.028, 0.028, 0.022) + 0.0045 * tube)
        first = middle + np.array([0, 0.028, 0.014])
        last = middle + np.array([0, -0.028, 0.014])
        build.rings([ring[0] - middle - (0, 0.028, 0) + first, *ring, ring[-1] - middle + (0, 0.028, 0) + last], 0)
    return build.mesh()


def _ball(radius: float) -> Mesh:
    build = _Builder()
    angle = np.linspace(-np.pi / 2, np.pi / 2, 25)
    rings = [_circle(max(radius * float(np.cos(a)), 1e-5), radius * float(np.sin(a))) for a in angle]
    build.rings(rings, 0)
    mesh = build.mesh()
    middle = mesh.vertices[mesh.faces].mean(1)
    around = np.arctan2(middle[:, 2], middle[:, 0])
    seam = np.abs(middle[:, 1]) < 0.12 * radius
    return Mesh(mesh.vertices, mesh.faces, np.where(seam | (np.abs(np.sin(around)) < 0.12), 1, 0))


def _rod(radius: float, half: float) -> Mesh:
    build, edge = _Builder(), 0.0015
    build.lid(_circle(radius - edge, -half), 1, down=True)
    _lathe(build, [(radius - edge, -half), (radius, -half + edge)], 1)
    _lathe(build, [(radius, -half + edge), (radius, half - edge)], 0, 24)
    _lathe(build, [(radius, half - edge), (radius - edge, half)], 1)
    build.lid(_circle(radius - edge, half), 1)
    return build.mesh()


def _pen(radius: float, half: float) -> Mesh:
    build = _Builder()
    _lathe(build, [(0, -half), (0.0009, -half + 0.001), (radius * 0.8, -half + 0.013)], 1, 2)
    _lathe(build, [(radius * 0.8, -half + 0.013), (radius, -half + 0.018), (radius, half - 0.02)], 0, 10)
    _lathe(build, [(radius, half - 0.02), (radius * 0.95, half - 0.001), (radius * 0.7, half)], 1, 2)
    build.lid(_circle(radius * 0.7, half), 1)
    return build.mesh()


def _outline(half_width: float, half_length: float, corner: float, z: float) -> ndarray:
    """A rectangle with round corners in the plane of x and y, counter-clockwise seen from +z, [K,3]."""
    out = []
    for k, (sx, sy) in enumerate(((1, 1), (-1, 1), (-1, -1), (1, -1))):
        for angle in (k + np.linspace(0, 1, 6)) * np.pi / 2:
            x = sx * (half_width - corner) + corner * np.cos(angle)
            out.append((x, sy * (half_length - corner) + corner * np.sin(angle), z))
    points, fine = np.array(out), []
    for a, b in zip(points, np.roll(points, -1, 0), strict=True):  # long edges are cut
        count = max(1, int(np.linalg.norm(b - a) / 0.008))
        fine += [a + (b - a) * t / count for t in range(count)]
    return np.array(fine)


def _slab(
    build: _Builder, half_width: float, half_length: float, low: float, high: float, corner: float, edge: float,
    part: int
) -> None:  # fmt: skip
    """A plate between two heights, without its front and back."""

    def ring(inset: float, z: float) -> ndarray:
        return _outline(half_width - inset, half_length - inset, max(corner - inset, 1e-4), z)

    build.rings([ring(edge, low), ring(0.3 * edge, low + 0.3 * edge), ring(0, low + edge), ring(0, high - edge),
                 ring(0.3 * edge, high - 0.3 * edge), ring(edge, high)], part)  # fmt: skip


def _phone(half_width: float, half_length: float, half: float) -> Mesh:
    build, corner, edge, bezel = _Builder(), 0.009, 0.0012, 0.0035
    _slab(build, half_width, half_length, -half, half, corner, edge, 0)
    outer = _outline(half_width - edge, half_length - edge, corner - edge, half)
    inner = outer * ((half_width - bezel) / (half_width - edge), (half_length - bezel) / (half_length - edge), 1)
    build.rings([outer, inner], 0)
    build.lid(inner, 1)
    build.lid(_outline(half_width - edge, half_length - edge, corner - edge, -half), 0, down=True)
    for x, y in ((0.5, 0.78), (0.5, 0.62)):  # lenses on the back
        ring = _circle(0.0055, 0)[:, [0, 2, 1]] + (x * half_width, y * half_length, -half - 0.0004)
        build.lid(ring, 2, down=False)
    return build.mesh()


def _book(half_width: float, half_length: float, half: float) -> Mesh:
    """Two covers and the pages between them; the back of the book is at -x."""
    build, cover = _Builder(), 0.0022
    for low, high in ((half - cover, half), (-half, -half + cover)):
        _slab(build, half_width, half_length, low, high, 0.0015, 0.0006, 0)
        for z, down in ((high, False), (low, True)):
            build.lid(_outline(half_width - 0.0006, half_length - 0.0006, 0.0009, z), 0, down)
    pages, spine = _Builder(), _Builder()
    _slab(pages, half_width - 0.003, half_length - 0.003, -half + cover, half - cover, 0.001, 0.0002, 1)
    _slab(spine, cover / 2, half_length, -half + 0.0003, half - 0.0003, 0.0008, 0.0006, 0)
    for one, shift in ((pages, 0.0), (spine, -half_width + cover / 2 - 0.0004)):
        mesh = one.mesh()
        build.add(mesh.vertices + np.array([shift, 0, 0]), mesh.faces, int(mesh.part[0]))
    return build.mesh()


MAKERS: dict[str, Callable[..., Mesh]] = {
    "cup": _cup,
    "ball": _ball,
    "phone": _phone,
    "pen": _pen,
    "stick": _rod,
    "book": _book,
}


@lru_cache(maxsize=32)
def thing_mesh(thing: str, size: Size) -> Mesh:
    """The mesh of a thing. size: of SIZES."""
    return MAKERS[thing](*size)


# --- looks ---

WHITE, DARK, WOOD = (0.92, 0.91, 0.88), (0.08, 0.08, 0.09), (0.52, 0.36, 0.22)
COFFEE, TEA = (0.20, 0.12, 0.07), (0.55, 0.28, 0.08)
SCREENS = ((0.05, 0.05, 0.06), (0.05, 0.05, 0.06), (0.55, 0.68, 0.82), (0.85, 0.86, 0.88))
GLOSS, SATIN, MATT = (0.06, 0.18), (0.04, 0.4), (0.02, 0.8)


def sample_thing(thing: str, rng: np.random.Generator) -> ThingLook:
    """A random look of a thing. Its first colour is the one that captions name."""
    bright = _bright(rng)
    plain = (WHITE, DARK, bright, bright, bright)[rng.integers(5)]
    if thing == "cup":
        return ThingLook((plain, (COFFEE, TEA)[rng.integers(2)]), (SATIN if rng.random() < 0.5 else GLOSS, GLOSS))
    if thing == "ball":
        return ThingLook((bright, (WHITE, bright)[rng.integers(2)]), (SATIN, SATIN), (500.0,) * 3, 0.2)
    if thing == "phone":
        colour = (DARK, DARK, WHITE, bright)[rng.integers(4)]
        return ThingLook((colour, SCREENS[rng.integers(4)], DARK), (SATIN, GLOSS, GLOSS), rough=0.02)
    if thing == "pen":
        return ThingLook((plain, (DARK, (0.6, 0.6, 0.62), bright)[rng.integers(3)]), (GLOSS, SATIN), rough=0.02)
    if thing == "stick":
        shade = rng.uniform(0.6, 1.3)
        bark, end = (tuple(np.clip(np.array(c) * shade, 0, 0.95)) for c in (WOOD, (0.75, 0.6, 0.42)))
        return ThingLook((bark, end), (MATT, MATT), (420.0, 35.0, 420.0), 0.7)
    return ThingLook(((DARK, bright, bright, bright)[rng.integers(4)], (0.88, 0.84, 0.74)), (SATIN, MATT), rough=0.06)


def _bright(rng: np.random.Generator) -> tuple[float, float, float]:
    hue, value = rng.uniform(0, 6), rng.uniform(0.4, 0.95)
    full = np.clip([abs(hue - 3) - 1, 2 - abs(hue - 2), 2 - abs(hue - 4)], 0, 1)
    return tuple(value * (1 - rng.uniform(0.6, 0.95) * (1 - full)))
