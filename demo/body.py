"""A licence-free body in the SMPL-H file format, whose hands are worth looking at.

Nothing here comes from SMPL-H: the surface is an implicit hand (round cones for bones, smooth unions for
flesh) that a quad mesh is shot onto, ring by ring. The layout is SMPL-H's: 6890 vertices, 52 joints, finger
tips at the ids that everybody uses, T-pose in metres, left arm along +x, palms down (-y), thumbs forward
(+z), zero pose correctives. The right side is the mirror image of the left. Ten mild shape directions are
named in `SHAPES`.

    python -m handiffuser.demo.body smplh_demo.npz
"""

from __future__ import annotations

import sys
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy import ndarray

from ..models.smplh import PARENTS, TIP_VERTICES

VERTICES = 6890
SHAPES = ("hand size", "finger length", "finger thickness", "palm width", "forearm thickness", "thumb length",
          "hand thickness", "finger taper", "pinky length", "stature")  # fmt: skip

# Body joints of the middle and the left side; the right side is mirrored. Metres.
JOINTS = {0: (0, -0.22, 0.02), 1: (0.06, -0.32, 0.01), 3: (0, -0.11, 0), 4: (0.10, -0.70, 0),
          6: (0, 0.03, 0.01), 7: (0.09, -1.10, -0.03), 9: (0, 0.08, 0.02), 10: (0.11, -1.16, 0.09),
          12: (0, 0.30, -0.02), 13: (0.08, 0.19, -0.01), 15: (0, 0.38, 0.02), 16: (0.18, 0.22, -0.03),
          18: (0.44, 0.22, -0.03), 20: (0.69, 0.22, -0.03)}  # fmt: skip
WRIST = np.array(JOINTS[20])

# The left hand in its own frame, millimetres: (along the fingers, up out of the back, towards the thumb),
# wrist = 0. Order: index, middle, ring, pinky. `SPLAY` turns a finger towards the thumb (degrees).
KNUCKLES = np.array([(90, 3.5, 26), (92, 5.5, 4.5), (86, 4, -16.5), (78, 0.5, -35.5)], float)
PHALANGES = np.array([(43, 26, 22), (47, 30, 23), (44, 28, 23), (35, 21, 20)], float)
SPLAY = np.array([5.0, 0.5, -4.0, -9.5])
FINGER_RADII = np.array([(11.0, 9.2, 8.0, 6.6), (11.3, 9.5, 8.2, 6.8), (10.7, 8.9, 7.7, 6.4), (9.7, 7.9, 6.9, 5.7)])
THUMB = np.array([(20, -9, 20), (53, -18, 46), (82, -23.5, 64), (107, -27, 76)], float)  # CMC, MCP, IP, end
THUMB_RADII = np.array([15.0, 11.8, 10.2, 7.8])
THUMB_BACK = np.array([-0.30, 0.80, 0.52])  # the nail's normal, before it is made square to the bone
WEB = 15.0  # fingers part this far beyond the knuckle joints

RING = 10  # vertices around a finger
COLUMNS = 13  # palm columns on each side: four fingers share them, three edges each


def _unit(v: ndarray) -> ndarray:
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def _smoothstep(lo: float, hi: float, x: ndarray) -> ndarray:
    t = np.clip((x - lo) / (hi - lo), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def finger_frames() -> ndarray:
    """[5, 3, 3]: per finger (thumb, index, middle, ring, pinky) the rest axes of the left hand as rows: along
    the bone (the thumb's last two), out of the nail, and their cross product (towards the thumb's side)."""
    frames = []
    for finger in range(5):
        if finger == 0:
            along, back = _unit(THUMB[3] - THUMB[1]), THUMB_BACK
        else:
            angle = np.radians(SPLAY[finger - 1])
            along, back = np.array([np.cos(angle), 0.0, np.sin(angle)]), np.array([0.0, 1.0, 0.0])
        back = _unit(back - along * (along @ back))
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


def _cone(p: ndarray, a: ndarray, b: ndarray, ra: float, rb: float, waist: float = 0.0) -> ndarray:
    """Signed distance (nearly) to a round cone from a to b; `waist` takes that much off its middle."""
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
    joints[3] = joints[3] - _unit(joints[3] - joints[2]) * radii[3]  # the tip's sphere ends at the tip
    d = _cone(p, joints[0], joints[1], radii[0], radii[1], 0.0 if finger == 0 else 0.5)
    d = _blend(d, _cone(p, joints[1], joints[2], radii[1], radii[2], 0.7), 1.5)
    d = _blend(d, _cone(p, joints[2], joints[3], radii[2], radii[3], 0.2), 1.5)
    pulp = joints[2] + 0.55 * (joints[3] - joints[2]) - 1.3 * back
    d = _blend(d, _cone(p, pulp, pulp + 3 * along, 0.93 * radii[2], 0.93 * radii[3] + 0.3), 3)
    if finger:  # flesh of the first phalanx, palm side
        flesh = joints[0] + 0.68 * (joints[1] - joints[0]) - 2.0 * back
        d = _blend(d, _cone(p, flesh - 4 * along, flesh + 4 * along, radii[1], radii[1] - 0.5), 4)
    return d


def _palm(p: ndarray) -> ndarray:
    flat = p * np.array([1.0, 0.97, 1.0])
    d = np.full(len(p), 1e3)
    for i, carpal in enumerate([(8, 1, 13), (6, 2, 3), (6, 2, -6), (8, 0, -14)]):
        a, b = np.array(carpal, float), KNUCKLES[i] - np.array([0, 1.5, 0])
        d = _blend(d, _cone(flat, a, b, 15.0, FINGER_RADII[i, 0] + 0.6), 6)
    for i in range(3):  # the web between two fingers
        a, b = (KNUCKLES[i] + KNUCKLES[i + 1]) / 2, np.array([WEB - 7.0, -3.0, 0.0])
        d = _blend(d, _cone(flat, a - (0, 3, 0), a + b, 9.0, 6.5), 5)
    d = _blend(d, _cone(p, np.array([18.0, -9, 17]), np.array([52.0, -15, 38]), 15.5, 12.0), 9)  # thenar
    d = _blend(d, _cone(p, np.array([16.0, -6, -17]), np.array([58.0, -6.5, -31]), 15.0, 11.0), 9)  # hypothenar
    d = _blend(d, _cone(p, np.array([74.0, -7, 20]), np.array([72.0, -7, -26]), 9.0, 8.5), 8)  # pads under the fingers
    return _blend(d, _forearm(p), 14)


def _stubs(p: ndarray) -> ndarray:
    """The roots of the four fingers: the palm's last ring lies on them."""
    d = np.full(len(p), 1e3)
    for i in range(4):
        a, radii = KNUCKLES[i], FINGER_RADII[i]
        d = _blend(d, _cone(p, a, a + (WEB + 8) * FRAMES[i + 1, 0], radii[0] - 0.3, radii[1] + 0.6), 2)
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
            d = _blend(d, _cone(p, at[k], at[k + 1], radii[k], radii[k + 1]), 8)
    return d


def _surface(finger: int | None):
    """The implicit surface that a vertex lies on: a finger blended into the palm, or the palm with the
    thumb's root. Two fingers are never blended with each other: they would grow together."""
    if finger is None:
        return lambda p: _blend(_blend(_palm(p), _stubs(p), 5), _cone(p, THUMB[0], THUMB[1], *THUMB_RADII[:2]), 14)
    return lambda p: _blend(_palm(p), _finger(p, finger), 14.0 if finger == 0 else 7.0)


def _shoot(distance, origin: ndarray, direction: ndarray, reach: float) -> ndarray:
    """Walk from inside along unit directions to where the distance is zero, at most `reach` far."""
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
    return np.stack([wrist, knuckle], 1), _unit(along)


def _hand_mesh() -> dict[str, ndarray]:
    """Left hand and forearm: points [N,3] mm in the hand frame, quads/triangles as faces [F,3], and what a
    vertex is: part (-1 palm and forearm, 0..4 finger), the finger tips' ids, and nail strength."""
    points: list[ndarray] = []
    part: list[int] = []
    nail: list[float] = []
    quads: list[tuple[int, int, int, int]] = []
    triangles: list[tuple[int, int, int]] = []

    def add(p: ndarray, which: int, nails: ndarray | float = 0.0) -> ndarray:
        start = sum(len(q) for q in points)
        points.append(p)
        part.extend([which] * len(p))
        nail.extend(np.broadcast_to(nails, len(p)).tolist())
        return np.arange(start, start + len(p))

    def skin(a: ndarray, b: ndarray) -> None:
        for i in range(len(a)):
            j = (i + 1) % len(a)
            quads.append((a[i], a[j], b[j], b[i]))

    # Rings around forearm and palm: 13 columns on the back, the pinky side, 13 on the palm, the thumb side.
    column = np.concatenate([np.arange(13), [12], np.arange(12, -1, -1), [0]]).astype(float)
    bottom = np.concatenate([np.zeros(13), [0.5], np.ones(13), [0.5]])
    off = column - np.clip(column, 1.5, 10.5)
    angle = np.radians(np.where(bottom == 0.5, 90 * np.sign(off), np.where(bottom == 1, 180 - 36 * off, 36 * off)))
    direction = np.stack([np.zeros(28), np.cos(angle), -np.sin(angle)], 1)
    ends, along = _lines(column)
    stations = [-246, -215, -175, -135, -95, -60, -32, -13]
    rings = [(ends[:, 0] * (1, 1, 0.8) + (x, 0, 0)) for x in stations]
    rings += [ends[:, 0] + v * (ends[:, 1] - ends[:, 0]) for v in (0.02, 0.15, 0.29, 0.43, 0.57, 0.73, 0.88)]
    rings += [ends[:, 1] + s * along for s in (-2.0, 8.0, WEB)]
    palm = []
    for origin in rings:
        palm.append(add(_shoot(_surface(None), origin, direction, 48.0), -1))
    first = len(stations) + 1  # the thumb's root: three rows of faces on the thumb side
    hole = range(first, first + 3)
    side = [26, 27, 0]  # palm corner, thumb side, back corner
    for row, (a, b) in enumerate(pairwise(palm)):
        for i in range(28):
            j = (i + 1) % 28
            if not (row in hole and i in side[:2]):
                quads.append((a[i], a[j], b[j], b[i]))
    pole = add(np.array([[-262.0, 0, 0]]), -1)
    triangles.extend((int(pole[0]), int(palm[0][(i + 1) % 28]), int(palm[0][i])) for i in range(28))

    # Fingers: ten vertices around, sharing the palm's last ring; three vertices close the web between them.
    web = []
    for i in range(3):
        middle = 0.5 * (points[palm[-1][0] // 28][3 * i + 3] + points[palm[-1][0] // 28][25 - (3 * i + 2)])
        web.append(add(middle[None] + (1.0, 0, 0), -1)[0])
    last = palm[-1]
    mids = [last[27], *web, last[13]]
    tips: list[int] = []
    for finger in (1, 2, 3, 4, 0):
        rings_out = _finger_rings(finger)
        if finger == 0:
            rows = (first + 1, first + 2)
            loop = np.array(
                [palm[first][i] for i in side] + [palm[r][0] for r in rows]
                + [palm[first + 3][i] for i in side[::-1]] + [palm[r][26] for r in rows[::-1]]
            )  # fmt: skip
        else:
            i = finger - 1
            loop = np.concatenate([last[3 * i : 3 * i + 4], [mids[i + 1]], last[23 - 3 * i : 27 - 3 * i], [mids[i]]])
        for k, (origin, spokes, on_nail) in enumerate(rings_out):
            ring = add(_shoot(_surface(finger), origin, spokes, 21.0), finger, on_nail)
            if finger == 0 and k == 0:  # turn or flip the loop so that it meets the first ring without a twist
                loop = _untwist(loop, ring, np.concatenate(points))
            skin(loop, ring)
            loop = ring
        tip = add(CHAINS[finger][3][None], finger)
        tips.append(int(tip[0]))
        triangles.extend((int(loop[i]), int(loop[(i + 1) % RING]), int(tip[0])) for i in range(RING))
    tips = [tips[4], *tips[:4]]

    p = np.concatenate(points)
    faces = np.array([t for a, b, c, d in quads for t in ((a, c, b), (a, d, c))] + [t[::-1] for t in triangles])
    used = np.zeros(len(p), bool)
    used[faces] = True
    number = np.cumsum(used) - 1
    p, kind, faces = p[used], np.array(part)[used], number[faces]
    return {
        "points": _relax(p, faces, kind),
        "faces": faces,
        "part": kind,
        "nail": np.array(nail)[used],
        "tips": number[tips],
    }


def _finger_rings(finger: int) -> list[tuple[ndarray, ndarray, ndarray]]:
    """Where a finger's rings are shot from: origins [10,3], directions [10,3] and how much each is nail [10].

    Rings stand closest at the joints, where the skin must bend; the last ones lean towards the tip."""
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
        axis = _unit(chain[bone + 1] - chain[bone])
        back = _unit(frame[1] - axis * (axis @ frame[1]))
        sideways = -np.cross(axis, back)  # away from the thumb's side, as the columns run
        spokes = np.cos(around)[:, None] * back + np.sin(around)[:, None] * sideways
        spokes = np.cos(np.radians(lean)) * spokes + np.sin(np.radians(lean)) * axis
        origin = np.broadcast_to(chain[bone] + t * (chain[bone + 1] - chain[bone]), (RING, 3))
        nail = np.clip((np.cos(around) - 0.45) / 0.4, 0, 1) * (k >= 7) * (0.6 if k == 9 else 1.0)
        out.append((origin, spokes, nail))
    return out


def _untwist(loop: ndarray, ring: ndarray, points: ndarray) -> ndarray:
    """The loop of vertices turned, or turned round, so that it lies closest to the ring."""
    loops = [np.roll(o, r) for o in (loop, loop[::-1]) for r in range(RING)]
    return min(loops, key=lambda o: np.linalg.norm(points[o] - points[ring], axis=1).sum())


def _relax(p: ndarray, faces: ndarray, kind: ndarray) -> ndarray:
    """Even out the palm and the roots of the fingers along the surface; rings further out stay where they
    were shot."""
    near = (kind == -1) | (kind == 0)
    for finger in range(1, 5):
        s = (p - KNUCKLES[finger - 1]) @ FRAMES[finger, 0]
        near |= (kind == finger) & (s < 0.75 * PHALANGES[finger - 1, 0])
    s = (p - THUMB[0]) @ _unit(THUMB[1] - THUMB[0])
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


def _hand_weights(p: ndarray, part: ndarray) -> ndarray:
    """[N, 17]: forearm, wrist, then index, middle, pinky, ring, thumb with three joints each (SMPL-H's
    order)."""
    n = len(p)
    share = np.zeros((n, 5))  # how much a vertex belongs to each finger, were it far enough out
    for finger in range(1, 5):
        q = p - KNUCKLES[finger - 1]
        share[:, finger] = np.exp(-((q @ FRAMES[finger, 2] / 7.0) ** 2))
    share /= share.sum(1, keepdims=True) + 1e-9
    for finger in range(5):
        share[part == finger] = np.eye(5)[finger]
    out = np.zeros((n, 17))
    for finger in range(1, 5):
        s = (p - KNUCKLES[finger - 1]) @ FRAMES[finger, 0]
        l1, l2, _ = PHALANGES[finger - 1]
        a = _smoothstep(-11, 13, s)
        b, c = _smoothstep(l1 - 6.5, l1 + 6.5, s), _smoothstep(l1 + l2 - 5.5, l1 + l2 + 5.5, s)
        first = 2 + 3 * (0, 0, 1, 3, 2)[finger]
        out[:, first] = share[:, finger] * a * (1 - b)
        out[:, first + 1] = share[:, finger] * b * (1 - c)
        out[:, first + 2] = share[:, finger] * c
    # The thumb takes the thenar with it, fading into the palm.
    axis = _unit(THUMB[1] - THUMB[0])
    s = (p - THUMB[0]) @ axis
    far = _cone(p, THUMB[0], THUMB[1], *THUMB_RADII[:2])
    root = _smoothstep(-6, 26, s) * (1 - _smoothstep(0, 22, far))
    root = np.where(part == 0, np.maximum(root, _smoothstep(6, 30, s)), np.where(part > 0, 0, root))
    s1 = (p - THUMB[1]) @ _unit(_unit(THUMB[2] - THUMB[1]) + axis)
    s2 = (p - THUMB[2]) @ FRAMES[0, 0]
    b = np.where(part == 0, _smoothstep(-8, 8, s1), 0)
    c = np.where(part == 0, _smoothstep(-6.5, 6.5, s2), 0)
    out[:, 2:14] *= (1 - root)[:, None]
    out[:, 14], out[:, 15], out[:, 16] = root * (1 - b), root * b * (1 - c), root * c
    rest = 1 - out.sum(1)
    hand = _smoothstep(-20, 12, p[:, 0])
    out[:, 0], out[:, 1] = rest * (1 - hand), rest * hand
    return out


def _paint(p: ndarray, normals: ndarray, part: ndarray, nail: ndarray) -> dict[str, ndarray]:
    """Where the skin is palm, nail, blush and crease, each 0..1."""
    down = -normals[:, 1]
    thumb = part == 0
    down = np.where(thumb, -(normals @ FRAMES[0, 1]), down)
    palm = _smoothstep(-0.15, 0.45, down) * _smoothstep(-25, 8, p[:, 0])
    crease, blush = np.zeros(len(p)), np.zeros(len(p))
    for finger in range(5):
        chain = CHAINS[finger]
        for joint in range(1, 3):
            s = (p - chain[joint]) @ FRAMES[finger, 0]
            crease = np.maximum(crease, (part == finger) * np.exp(-((s / 3.0) ** 2)))
        s = (p - chain[3]) @ FRAMES[finger, 0]
        blush = np.maximum(blush, (part == finger) * _smoothstep(-24, -4, s))
        knuckle = np.linalg.norm(p - (chain[0] + 9 * FRAMES[finger, 1]), axis=1)
        blush = np.maximum(blush, 0.8 * (part <= 0) * np.exp(-((knuckle / 9.0) ** 2)) * (finger > 0))
    thenar = np.abs(np.linalg.norm((p - (20, 0, 30)) * (1, 0, 1), axis=1) - 42)  # the line of life, roughly
    heart = np.abs((p[:, 0] - 70) - 0.25 * p[:, 2])
    lines = np.exp(-((np.minimum(thenar, heart) / 3.5) ** 2)) * (part == -1) * palm * (p[:, 0] > 12)
    return {"palm": palm, "nail": nail, "crease": np.maximum(crease, lines), "blush": blush}


def _normals(p: ndarray, faces: ndarray) -> ndarray:
    a, b, c = (p[faces[:, i]] for i in range(3))
    face = np.cross(b - a, c - a)
    out = np.zeros_like(p)
    for i in range(3):
        np.add.at(out, faces[:, i], face)
    return _unit(out + 1e-12)


# --- the whole body ---


def _tube(a: ndarray, b: ndarray, ra: float, rb: float, joints: tuple[int, int], rings: int = 12, sides: int = 18):
    """A capsule-like limb: points, faces, and weights that go from the first joint to the second along it."""
    axis = _unit(b - a)
    u = _unit(np.cross(axis, (0.0, 0.0, 1.0) if abs(axis[2]) < 0.9 else (1.0, 0.0, 0.0)))
    v = np.cross(axis, u)
    turn = 2 * np.pi * np.arange(sides) / sides
    points, along = [a - axis * ra * 0.5], [0.0]
    for k in range(rings):
        t = k / (rings - 1)
        r = (ra + (rb - ra) * t) * min(1.0, 0.55 + 3.0 * min(t, 1 - t))
        points += list(a + t * (b - a) + r * (np.cos(turn)[:, None] * u + np.sin(turn)[:, None] * v))
        along += [t] * sides
    points.append(b + axis * rb * 0.5)
    along.append(1.0)
    faces = []
    for k in range(rings - 1):
        for i in range(sides):
            p, q = 1 + k * sides + i, 1 + k * sides + (i + 1) % sides
            faces += [(p, q, q + sides), (p, q + sides, p + sides)]
    end = 1 + rings * sides
    for i in range(sides):
        j = (i + 1) % sides
        faces += [(0, 1 + j, 1 + i), (end, end - sides + i, end - sides + j)]
    w = np.zeros((len(points), 52))
    second = _smoothstep(0.7, 1.0, np.array(along))
    w[:, joints[0]] = 1 - second
    w[:, joints[1]] += second
    return np.array(points), np.array(faces), w


def _mirror(p: ndarray) -> ndarray:
    return p * np.array([-1.0, 1.0, 1.0])


def _other(joint: int) -> int:
    """The joint of the other side."""
    if joint >= 22:
        return joint + 15 if joint < 37 else joint - 15
    pairs = {1: 2, 4: 5, 7: 8, 10: 11, 13: 14, 16: 17, 18: 19, 20: 21}
    return {**pairs, **{b: a for a, b in pairs.items()}}.get(joint, joint)


OTHER = np.array([_other(j) for j in range(52)])


def _rest_joints() -> ndarray:
    joints = np.zeros((52, 3))
    for j, place in JOINTS.items():
        joints[j] = place
    for finger, first in enumerate((34, 22, 25, 31, 28)):
        joints[first : first + 3] = WRIST + CHAINS[finger][:3] / 1000
    for j in range(52):
        if j not in JOINTS and not 22 <= j < 37:
            joints[j] = _mirror(joints[OTHER[j]])
    return joints


def _hand_shapes(p: ndarray, part: ndarray) -> ndarray:
    """[N, 3, 10] displacements in millimetres for one unit of each shape direction (see SHAPES)."""
    d = np.zeros((len(p), 3, 10))
    hand = _smoothstep(-30, 20, p[:, 0])
    d[:, :, 0] = 0.045 * p * hand[:, None]
    width = _smoothstep(5, 60, p[:, 0])
    d[:, 2, 3] = 0.045 * p[:, 2] * width
    for finger in range(1, 5):
        q = p - KNUCKLES[finger - 1]
        along = FRAMES[finger, 0]
        s = q @ along
        mine = (part == finger)[:, None]
        stretch = np.clip(s - 6, 0, None)[:, None] * along
        radial = q - s[:, None] * along
        length = PHALANGES[finger - 1].sum()
        fade = _smoothstep(WEB - 4, WEB + 10, s)[:, None]
        d[:, :, 1] += mine * 0.05 * stretch
        d[:, :, 2] += mine * 0.055 * radial * fade
        d[:, :, 7] += mine * 0.06 * radial * fade * (1 - 2 * s[:, None] / length)
        d[:, :, 8] += mine * (0.06 * stretch if finger == 4 else 0)
        if finger < 4:  # the web goes with its fingers: hardly anything, but no step in the skin
            between = (part == -1) & (s > WEB - 2)
            d[between, 0, 1] = 0.05 * (WEB - 6)
    thumb = (part == 0)[:, None]
    s = (p - THUMB[1]) @ FRAMES[0, 0]
    d[:, :, 5] = thumb * 0.06 * np.clip(s, 0, None)[:, None] * FRAMES[0, 0]
    radial = p - THUMB[1] - s[:, None] * FRAMES[0, 0]
    d[:, :, 2] += thumb * 0.055 * radial * _smoothstep(-5, 10, s)[:, None]
    arm = 1 - _smoothstep(-60, 5, p[:, 0])
    d[:, 1:, 4] = 0.06 * p[:, 1:] * arm[:, None]
    d[:, 1, 6] = 0.05 * p[:, 1] * (part == -1) * hand
    return d


@lru_cache(maxsize=1)
def build_body() -> dict[str, ndarray]:
    """The body's arrays under SMPL-H's names, and `palm`, `nail`, `crease`, `blush` [6890] in 0..1 for the
    painter."""
    hand = _hand_mesh()
    mm, faces, part = hand["points"], hand["faces"], hand["part"]
    joints = _rest_joints()
    local = _hand_weights(mm, part)
    weights = np.zeros((len(mm), 52))
    weights[:, [18, 20, *range(22, 37)]] = local
    paint = _paint(mm, _normals(mm, faces), part, hand["nail"])
    shapes = _hand_shapes(mm, part) / 1000
    left = (WRIST + mm / 1000, faces, weights, shapes, paint)
    mirrored = shapes * np.array([-1.0, 1.0, 1.0])[None, :, None]
    right = (_mirror(left[0]), faces[:, ::-1], weights[:, OTHER], mirrored, paint)

    at = joints
    limbs = [_tube(at[0] - (0, 0.06, 0), at[12] - (0, 0.05, 0), 0.15, 0.15, (3, 9), 24, 30),
             _tube(at[12] - (0, 0.04, 0), at[15], 0.055, 0.055, (12, 15), 8),
             _tube(at[15] + (0, 0.02, 0.01), at[15] + (0, 0.17, 0.01), 0.085, 0.085, (15, 15), 16, 24),
             ]  # fmt: skip
    legs_and_arms = ((1, 4, 0.085, 0.055), (4, 7, 0.055, 0.036), (7, 10, 0.036, 0.03),
                     (13, 16, 0.05, 0.055), (16, 18, 0.052, 0.04))  # fmt: skip
    for a, b, ra, rb in legs_and_arms:
        p, f, w = _tube(at[a], at[b], ra, rb, (a, b if a != 16 else 16), 14, 18)
        limbs += [(p, f, w), (_mirror(p), f[:, ::-1], w[:, OTHER])]
    meshes = [left, right]
    for p, f, w in limbs:
        meshes.append((p, f, w, np.zeros((len(p), 3, 10)), {name: np.zeros(len(p)) for name in paint}))

    # Finger tips go to their known ids; everything else fills the free ids in order.
    total = sum(len(m[0]) for m in meshes)
    if total > VERTICES:
        raise AssertionError(f"the body has {total} vertices, room for {VERTICES}")
    number = np.full(VERTICES, -1)
    number[np.concatenate([hand["tips"], hand["tips"] + len(mm)])] = TIP_VERTICES
    free = np.setdiff1d(np.arange(VERTICES), TIP_VERTICES)
    number[number < 0] = free
    v = np.tile(joints[0], (VERTICES, 1))  # what is left over sits, unused by any face, in the pelvis
    w = np.zeros((VERTICES, 52))
    w[:, 0] = 1
    shapedirs = np.zeros((VERTICES, 3, 10))
    painted = {name: np.zeros(VERTICES) for name in paint}
    f = []
    start = 0
    for points, mesh_faces, mesh_weights, mesh_shapes, mesh_paint in meshes:
        ids = number[start : start + len(points)]
        v[ids], w[ids], shapedirs[ids] = points, mesh_weights, mesh_shapes
        f.append(ids[mesh_faces])
        for name, values in mesh_paint.items():
            painted[name][ids] = values
        start += len(points)
    shapedirs[:, 1, 9] = 0.03 * v[:, 1]
    arms = w[:, [18, 19, 20, 21, *range(22, 52)]].sum(1) > 0.5
    shapedirs[arms, 1, 9] = 0.03 * WRIST[1]

    table = np.stack([np.array(PARENTS), np.arange(52)]).astype(np.int64)
    zeros = np.zeros((45,), np.float32)
    faces = np.concatenate(f).astype(np.int64)
    return {
        "v_template": v.astype(np.float32),
        "shapedirs": shapedirs.astype(np.float16).astype(np.float32),
        "posedirs": np.zeros((VERTICES, 3, 459), np.float32),
        "J_regressor": _regressor(v, w, joints, np.unique(faces)),
        "kintree_table": table,
        "weights": _in_1024ths(w),
        "f": faces,
        "hands_componentsl": np.eye(45, dtype=np.float32),
        "hands_componentsr": np.eye(45, dtype=np.float32),
        "hands_meanl": zeros,
        "hands_meanr": zeros,
        **painted,
    }


def _in_1024ths(weights: ndarray) -> ndarray:
    """Skinning weights [V,52] as multiples of 1/1024 that still sum to one: exact in half precision, so that graphs
    which contain them are smaller."""
    units = np.floor(weights * 1024)
    rows = np.arange(len(units))
    units[rows, units.argmax(1)] += 1024 - units.sum(1)
    return (units / 1024).astype(np.float32)


def _regressor(v: ndarray, w: ndarray, joints: ndarray, used: ndarray) -> ndarray:
    """[52, 6890]: each joint as the smallest affine combination of vertices around it. The right side copies
    the left's vertex choice, so that the body stays symmetric for every shape."""
    out = np.zeros((52, VERTICES), np.float32)
    lookup = {tuple(np.round(p * 1e6).astype(int)): i for i, p in zip(used, v[used], strict=True)}
    for j in range(52):
        if OTHER[j] < j:
            continue
        mine = used[w[used][:, [j, max(PARENTS[j], 0)]].sum(1) > 0.5]
        mine = mine if len(mine) > 40 else used
        near = mine[np.argsort(np.linalg.norm(v[mine] - joints[j], axis=1), kind="stable")[:40]]
        offset = v[near] - joints[j]
        spread = np.linalg.norm(offset, axis=1).mean() + 1e-9
        rows = np.concatenate([offset.T / spread, np.ones((1, len(near)))])
        solved = np.linalg.pinv(rows) @ np.array([0.0, 0, 0, 1])
        out[j, near] = solved
        if OTHER[j] != j:
            other = [lookup[tuple(np.round(_mirror(v[i]) * 1e6).astype(int))] for i in near]
            out[OTHER[j], other] = solved
    return out


def make_body(path: str | Path) -> Path:
    """Write the body as a compressed SMPL-H .npz (about 0.3 MB). Returns the path."""
    arrays: dict = {k: a for k, a in build_body().items() if k not in ("palm", "nail", "crease", "blush")}
    np.savez_compressed(path, **arrays)
    return Path(path)


def vertex_colours(skin: ndarray, which: ndarray | slice = slice(None)) -> ndarray:
    """Colours of the demo body's vertices (all, or `which` ids) for skin tones `skin` [B,3] in 0..1, which is
    the tone of the back of the hand -> [B,6890,3] float32 in 0..1.

    Palms are lighter and pinker, nails lighter still, knuckles and creases darker: what tells a palm from a
    back."""
    body = build_body()
    skin = np.asarray(skin, np.float32).reshape(-1, 1, 3)
    palm, nail, crease, blush = (
        body[k].astype(np.float32)[None, which, None] for k in ("palm", "nail", "crease", "blush")
    )
    pale = 0.56 * skin + 0.44 * np.array([0.97, 0.70, 0.62], np.float32)
    colour = skin * (1 - palm) + pale * palm
    colour = colour * (1 - 0.5 * blush * np.array([0.05, 0.22, 0.20], np.float32))
    colour = colour * (1 - crease * (0.24 - 0.06 * palm) * np.array([0.8, 1.1, 1.1], np.float32))
    tint = 0.35 * skin + 0.65 * np.array([1.0, 0.80, 0.77], np.float32)
    colour = colour * (1 - 0.9 * nail) + tint * 0.9 * nail
    return np.clip(colour, 0, 1)


if __name__ == "__main__":
    print(make_body(sys.argv[1] if len(sys.argv) > 1 else "smplh_demo.npz"))
