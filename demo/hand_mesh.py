"""The surface of the demo's left hand: an implicit hand (round cones for bones, smooth unions for flesh) that a quad
mesh is shot onto, ring by ring.

    mesh = hand_mesh()
    mesh["points"], mesh["faces"]      # [N, 3] millimetres in the hand's frame, [F, 3]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy import ndarray

# The left hand in its own frame, millimetres: (along the fingers, up out of the back, towards the thumb),
# wrist = 0. Order: index, middle, ring, pinky. `SPLAY` turns a finger towards the thumb (degrees).
KNUCKLES = np.array([(90, 3.5, 26), (92, 5.5, 4.5), (86, 4, -16.5), (78, 0.5, -35.5)], float)
PHALANGES = np.array([(43, 26, 22), (47, 30, 23), (44, 28, 23), (35, 21, 20)], float)
SPLAY = np.array([5.0, 0.5, -4.0, -9.5])
FINGER_RADII = np.array([(11.0, 9.2, 8.0, 6.6), (11.3, 9.5, 8.2, 6.8), (10.7, 8.9, 7.7, 6.4), (9.7, 7.9, 6.9, 5.7)])
THUMB = np.array([(20, -9, 20), (53, -18, 46), (82, -23.5, 64), (107, -27, 76)], float)  # CMC, MCP, IP, end
THUMB_RADII = np.array([15.0, 11.8, 10.2, 7.8])
THUMB_BACK = np.array([-0.30, 0.80, 0.52])  # the nail's normal, not yet square to the bone
WEB = 15.0  # the fingers separate this far beyond the knuckle joints

RING = 10  # vertices around a finger


def unit(v: ndarray) -> ndarray:
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def smoothstep(lo: float, hi: float, x: ndarray) -> ndarray:
    t = np.clip((x - lo) / (hi - lo), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def finger_frames() -> ndarray:
    """[5, 3, 3]: per finger (thumb, index, middle, ring, pinky) the rest axes of the left hand as rows: along
    the bone (the thumb's last two), out of the nail, and their cross product (towards the thumb's side)."""
    frames = []
    for finger in range(5):
        if finger == 0:
            along, back = unit(THUMB[3] - THUMB[1]), THUMB_BACK
        else:
            angle = np.radians(SPLAY[finger - 1])
            along, back = np.array([np.cos(angle), 0.0, np.sin(angle)]), np.array([0.0, 1.0, 0.0])
        back = unit(back - along * (along @ back))
        frames.append((along, back, np.cross(along, back)))
    return np.array(frames)


FRAMES = finger_frames()


def _chains() -> list[ndarray]:
    """Per finger (thumb first) its three joints and the tip, [4, 3], in millimetres of the hand frame."""
    chains = [THUMB]
    for finger in range(4):
        reach = np.concatenate([[0.0], np.cumsum(PHALANGES[finger])])
        chains.append(KNUCKLES[finger] + reach[:, None] * FRAMES[finger + 1, 0])
    return chains


CHAINS = _chains()


# --- the implicit hand ---


def cone(p: ndarray, a: ndarray, b: ndarray, ra: float, rb: float, waist: float = 0.0) -> ndarray:
    """Approximate signed distance to a round cone from a to b; `waist` thins its middle by that much."""
    axis = b - a
    t = np.clip((p - a) @ axis / (axis @ axis), 0, 1)
    return np.linalg.norm(p - a - t[:, None] * axis, axis=1) - (ra + (rb - ra) * t - waist * 4 * t * (1 - t))


def _blend(a: ndarray, b: ndarray, k: float) -> ndarray:
    """Smooth union, fillet of about k."""
    h = np.clip(0.5 + 0.5 * (b - a) / k, 0, 1)
    return b + (a - b) * h - k * h * (1 - h)


def _finger(p: ndarray, finger: int) -> ndarray:
    joints = CHAINS[finger].copy()
    radii = THUMB_RADII if finger == 0 else FINGER_RADII[finger - 1]
    along, back = FRAMES[finger, 0], FRAMES[finger, 1]
    joints[3] = joints[3] - unit(joints[3] - joints[2]) * radii[3]  # the tip's sphere ends at the tip
    d = cone(p, joints[0], joints[1], radii[0], radii[1], 0.0 if finger == 0 else 0.5)
    d = _blend(d, cone(p, joints[1], joints[2], radii[1], radii[2], 0.7), 1.5)
    d = _blend(d, cone(p, joints[2], joints[3], radii[2], radii[3], 0.2), 1.5)
    pulp = joints[2] + 0.55 * (joints[3] - joints[2]) - 1.3 * back
    d = _blend(d, cone(p, pulp, pulp + 3 * along, 0.93 * radii[2], 0.93 * radii[3] + 0.3), 3)
    if finger:  # flesh of the first phalanx, palm side
        flesh = joints[0] + 0.68 * (joints[1] - joints[0]) - 2.0 * back
        d = _blend(d, cone(p, flesh - 4 * along, flesh + 4 * along, radii[1], radii[1] - 0.5), 4)
    return d


def _palm(p: ndarray) -> ndarray:
    flat = p * np.array([1.0, 0.97, 1.0])
    d = np.full(len(p), 1e3)
    for i, carpal in enumerate([(8, 1, 13), (6, 2, 3), (6, 2, -6), (8, 0, -14)]):
        a, b = np.array(carpal, float), KNUCKLES[i] - np.array([0, 1.5, 0])
        d = _blend(d, cone(flat, a, b, 15.0, FINGER_RADII[i, 0] + 0.6), 6)
    for i in range(3):  # the web between two fingers
        a, b = (KNUCKLES[i] + KNUCKLES[i + 1]) / 2, np.array([WEB - 7.0, -3.0, 0.0])
        d = _blend(d, cone(flat, a - (0, 3, 0), a + b, 9.0, 6.5), 5)
    d = _blend(d, cone(p, np.array([18.0, -9, 17]), np.array([52.0, -15, 38]), 15.5, 12.0), 9)  # thenar
    d = _blend(d, cone(p, np.array([16.0, -6, -17]), np.array([58.0, -6.5, -31]), 15.0, 11.0), 9)  # hypothenar
    d = _blend(d, cone(p, np.array([74.0, -7, 20]), np.array([72.0, -7, -26]), 9.0, 8.5), 8)  # pads under the fingers
    return _blend(d, _forearm(p), 14)


def _stubs(p: ndarray) -> ndarray:
    """The roots of the four fingers, which carry the palm's last ring."""
    d = np.full(len(p), 1e3)
    for i in range(4):
        a, radii = KNUCKLES[i], FINGER_RADII[i]
        d = _blend(d, cone(p, a, a + (WEB + 8) * FRAMES[i + 1, 0], radii[0] - 0.3, radii[1] + 0.6), 2)
    return d


def _forearm(p: ndarray) -> ndarray:
    d = np.full(len(p), 1e3)
    for side in (1, -1):  # radius and ulna: together an ellipse, narrowest just above the wrist
        at = np.array([(8, 0, 10), (-25, 0, 9), (-120, -2, 9), (-205, -2, 7), (-240, 0, 7)]) * (
            1.0,
            1.0,
            side,
        )
        radii = (17.5, 18.0, 27.0, 34.0, 33.0)
        for k in range(4):
            d = _blend(d, cone(p, at[k], at[k + 1], radii[k], radii[k + 1]), 8)
    return d


def _surface(finger: int | None):
    """The implicit surface of a vertex: a finger blended into the palm, or the palm with the thumb's root.

    Two fingers never blend with each other: they would grow together.
    """
    if finger is None:
        return lambda p: _blend(_blend(_palm(p), _stubs(p), 5), cone(p, THUMB[0], THUMB[1], *THUMB_RADII[:2]), 14)
    return lambda p: _blend(_palm(p), _finger(p, finger), 14.0 if finger == 0 else 7.0)


def _shoot(distance, origin: ndarray, direction: ndarray, reach: float) -> ndarray:
    """Walks from inside along unit directions to distance zero, at most `reach` far."""
    t = np.zeros(len(origin))
    for _ in range(40):
        t = np.clip(t - 0.8 * distance(origin + t[:, None] * direction), 0, reach)
    return origin + t[:, None] * direction


def _gradient(distance, p: ndarray) -> ndarray:
    e = np.eye(3) * 0.05
    return np.stack([distance(p + e[i]) - distance(p - e[i]) for i in range(3)], 1) / 0.1


# --- the mesh of the left hand and forearm ---


def _lines(c: ndarray) -> tuple[ndarray, ndarray]:
    """Palm columns (0..12, thumb side to pinky side) as lines from wrist to knuckle, and the finger
    directions there."""
    centres = np.array([1.5, 4.5, 7.5, 10.5])
    c = np.clip(c, 1.5, 10.5)
    wrist = np.stack([np.zeros_like(c), np.zeros_like(c), np.interp(c, [1.5, 10.5], [11.0, -11.0])], 1)
    knuckle = np.stack([np.interp(c, centres, KNUCKLES[:, k]) for k in range(3)], 1)
    along = np.stack([np.interp(c, centres, FRAMES[1:, 0, k]) for k in range(3)], 1)
    return np.stack([wrist, knuckle], 1), unit(along)


@dataclass
class _Mesh:
    """A mesh under construction. part: of each vertex, -1 for palm and forearm, 0..4 for a finger; nail: 0..1."""

    points: list[ndarray] = field(default_factory=list)
    part: list[int] = field(default_factory=list)
    nail: list[float] = field(default_factory=list)
    quads: list[tuple[int, int, int, int]] = field(default_factory=list)
    triangles: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, p: ndarray, which: int, nails: ndarray | float = 0.0) -> ndarray:
        """Adds points [n, 3] of a part; returns their ids."""
        start = sum(len(q) for q in self.points)
        self.points.append(p)
        self.part.extend([which] * len(p))
        self.nail.extend(np.broadcast_to(nails, len(p)).tolist())
        return np.arange(start, start + len(p))

    def skin(self, a: ndarray, b: ndarray) -> None:
        """Joins two rings of ids by quads."""
        for i in range(len(a)):
            j = (i + 1) % len(a)
            self.quads.append((a[i], a[j], b[j], b[i]))

    def arrays(self, tips: list[int]) -> dict[str, ndarray]:
        """Triangles and points, without points that no face uses, evened out."""
        p = np.concatenate(self.points)
        halves = [t for a, b, c, d in self.quads for t in ((a, c, b), (a, d, c))]
        faces = np.array(halves + [t[::-1] for t in self.triangles])
        used = np.zeros(len(p), bool)
        used[faces] = True
        number = np.cumsum(used) - 1
        kind, faces = np.array(self.part)[used], number[faces]
        return {
            "points": _relax(p[used], faces, kind),
            "faces": faces,
            "part": kind,
            "nail": np.array(self.nail)[used],
            "tips": number[tips],
        }


STATIONS = (-246, -215, -175, -135, -95, -60, -32, -13)  # rings around the forearm, millimetres from the wrist
THUMB_ROW = len(STATIONS) + 1  # the first of three rows of faces on the thumb side that the thumb's root replaces
THUMB_SIDE = (26, 27, 0)  # columns there: palm corner, thumb side, back corner


def hand_mesh() -> dict[str, ndarray]:
    """Left hand and forearm: points [N, 3] in millimetres of the hand's frame, faces [F, 3], part [N] (-1 palm and
    forearm, 0..4 finger), nail [N] (0..1), and tips: the ids of the finger tips [5], thumb first."""
    mesh = _Mesh()
    palm = _skin_palm(mesh)
    tips = _skin_fingers(mesh, palm)
    return mesh.arrays([tips[4], *tips[:4]])


def _skin_palm(mesh: _Mesh) -> list[ndarray]:
    """Adds forearm and palm: rings of 13 columns on the back, the pinky side, 13 on the palm, the thumb side.

    Returns the ids [28] of each ring; the thumb's root stays open.
    """
    column = np.concatenate([np.arange(13), [12], np.arange(12, -1, -1), [0]]).astype(float)
    bottom = np.concatenate([np.zeros(13), [0.5], np.ones(13), [0.5]])
    off = column - np.clip(column, 1.5, 10.5)
    angle = np.radians(np.where(bottom == 0.5, 90 * np.sign(off), np.where(bottom == 1, 180 - 36 * off, 36 * off)))
    direction = np.stack([np.zeros(28), np.cos(angle), -np.sin(angle)], 1)
    ends, along = _lines(column)
    rings = [(ends[:, 0] * (1, 1, 0.8) + (x, 0, 0)) for x in STATIONS]
    rings += [ends[:, 0] + v * (ends[:, 1] - ends[:, 0]) for v in (0.02, 0.15, 0.29, 0.43, 0.57, 0.73, 0.88)]
    rings += [ends[:, 1] + s * along for s in (-2.0, 8.0, WEB)]
    palm = [mesh.add(_shoot(_surface(None), origin, direction, 48.0), -1) for origin in rings]
    for row, (a, b) in enumerate(pairwise(palm)):
        for i in range(28):
            j = (i + 1) % 28
            if not (THUMB_ROW <= row < THUMB_ROW + 3 and i in THUMB_SIDE[:2]):
                mesh.quads.append((a[i], a[j], b[j], b[i]))
    pole = mesh.add(np.array([[-262.0, 0, 0]]), -1)
    mesh.triangles.extend((int(pole[0]), int(palm[0][(i + 1) % 28]), int(palm[0][i])) for i in range(28))
    return palm


def _skin_fingers(mesh: _Mesh, palm: list[ndarray]) -> list[int]:
    """Adds the fingers, ten vertices around; three more vertices close the web between them.

    Fingers share the palm's last ring, the thumb its open root. Returns the tips' ids, index to pinky, then the thumb.
    """
    last, first = palm[-1], THUMB_ROW
    ring_points = mesh.points[last[0] // 28]
    middles = (0.5 * (ring_points[3 * i + 3] + ring_points[25 - (3 * i + 2)]) for i in range(3))
    web = [mesh.add(middle[None] + (1.0, 0, 0), -1)[0] for middle in middles]
    mids = [last[27], *web, last[13]]
    tips: list[int] = []
    for finger in (1, 2, 3, 4, 0):
        if finger == 0:
            rows = (first + 1, first + 2)
            loop = np.array(
                [palm[first][i] for i in THUMB_SIDE] + [palm[r][0] for r in rows]
                + [palm[first + 3][i] for i in THUMB_SIDE[::-1]] + [palm[r][26] for r in rows[::-1]]
            )  # fmt: skip
        else:
            i = finger - 1
            loop = np.concatenate([last[3 * i : 3 * i + 4], [mids[i + 1]], last[23 - 3 * i : 27 - 3 * i], [mids[i]]])
        for k, (origin, spokes, on_nail) in enumerate(_finger_rings(finger)):
            ring = mesh.add(_shoot(_surface(finger), origin, spokes, 21.0), finger, on_nail)
            if finger == 0 and k == 0:  # the loop must meet the first ring without a twist
                loop = _untwist(loop, ring, np.concatenate(mesh.points))
            mesh.skin(loop, ring)
            loop = ring
        tip = mesh.add(CHAINS[finger][3][None], finger)
        tips.append(int(tip[0]))
        mesh.triangles.extend((int(loop[i]), int(loop[(i + 1) % RING]), int(tip[0])) for i in range(RING))
    return tips


def _finger_rings(finger: int) -> list[tuple[ndarray, ndarray, ndarray]]:
    """A finger's rings before the shot: origins [10, 3], directions [10, 3] and their share of nail [10].

    Rings are closest at the joints, where the skin bends; the last ones lean towards the tip.
    """
    chain, frame = CHAINS[finger], FRAMES[finger]
    lengths = np.linalg.norm(np.diff(chain, axis=0), axis=1)
    radius = THUMB_RADII[3] if finger == 0 else FINGER_RADII[finger - 1, 3]
    centre = 1 - radius / lengths[2]  # of the tip's sphere
    near_1, near_2 = 5.2 / lengths[:2], 4.4 / lengths[1:]
    begin = 0.62 if finger == 0 else (WEB + 0.42 * (lengths[0] - 5.2 - WEB)) / lengths[0]
    places = [(0, begin, 0), (0, 1 - near_1[0], 0), (1, 0, 0), (1, near_1[1], 0), (1, 0.5, 0)]
    places += [
        (1, 1 - near_2[0], 0),
        (2, near_2[1], 0),
        (2, max(centre - 0.1, near_2[1] + 0.1), 0),
        (2, centre, 34),
    ]
    if finger:
        places += [(2, centre, 64)]
    around = np.radians(-54.0 + 36.0 * np.arange(RING))
    out = []
    for k, (bone, t, lean) in enumerate(places):  # (bone, part of it, degrees the ring leans)
        axis = unit(chain[bone + 1] - chain[bone])
        back = unit(frame[1] - axis * (axis @ frame[1]))
        sideways = -np.cross(axis, back)  # away from the thumb's side, as the columns run
        spokes = np.cos(around)[:, None] * back + np.sin(around)[:, None] * sideways
        spokes = np.cos(np.radians(lean)) * spokes + np.sin(np.radians(lean)) * axis
        origin = np.broadcast_to(chain[bone] + t * (chain[bone + 1] - chain[bone]), (RING, 3))
        nail = np.clip((np.cos(around) - 0.45) / 0.4, 0, 1) * (k >= 7) * (0.6 if k == 9 else 1.0)
        out.append((origin, spokes, nail))
    return out


def _untwist(loop: ndarray, ring: ndarray, points: ndarray) -> ndarray:
    """The loop of vertices, rotated or reversed to lie closest to the ring."""
    loops = [np.roll(o, r) for o in (loop, loop[::-1]) for r in range(RING)]
    return min(loops, key=lambda o: np.linalg.norm(points[o] - points[ring], axis=1).sum())


def _relax(p: ndarray, faces: ndarray, kind: ndarray) -> ndarray:
    """Evens out the palm and the roots of the fingers along the surface; rings further out keep their places."""
    near = (kind == -1) | (kind == 0)
    for finger in range(1, 5):
        s = (p - KNUCKLES[finger - 1]) @ FRAMES[finger, 0]
        near |= (kind == finger) & (s < 0.75 * PHALANGES[finger - 1, 0])
    s = (p - THUMB[0]) @ unit(THUMB[1] - THUMB[0])
    near &= ~((kind == 0) & (s > 38)) & (p[:, 0] > -20)
    neighbours: list[set[int]] = [set() for _ in p]
    for a, b, c in faces:
        neighbours[a] |= {b, c}
        neighbours[b] |= {a, c}
        neighbours[c] |= {a, b}
    edges = np.array([(i, j) for i in np.flatnonzero(near) for j in sorted(neighbours[i])])
    count = np.bincount(edges[:, 0], minlength=len(p)).clip(1)
    for _ in range(8):
        mean = np.stack([np.bincount(edges[:, 0], p[edges[:, 1], k], len(p)) for k in range(3)], 1) / count[:, None]
        p = np.where(near[:, None], 0.6 * p + 0.4 * mean, p)
        for which in (-1, 0, 1, 2, 3, 4):
            at = np.flatnonzero(near & (kind == which))
            distance = _surface(None if which < 0 else which)
            for _ in range(2):
                g = _gradient(distance, p[at])
                p[at] -= np.clip(distance(p[at]), -2, 2)[:, None] * g / (g * g).sum(1, keepdims=True).clip(0.3)
    return p
