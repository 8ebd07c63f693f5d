"""A licence-free body in the SMPL-H file format, with detailed hands.

Nothing here comes from SMPL-H. The layout is SMPL-H's: 6890 vertices, 52 joints, finger tips at the usual ids, T-pose
in metres, left arm along +x, palms down (-y), thumbs forward (+z), zero pose correctives. The right side mirrors the
left. Ten mild shape directions are named in `SHAPES`.

    python -m handiffuser.demo.body smplh_demo.npz
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy import ndarray

from ..models.smplh import PARENTS, TIP_VERTICES
from .hand_mesh import (
    CHAINS,
    FRAMES,
    KNUCKLES,
    PHALANGES,
    THUMB,
    THUMB_RADII,
    WEB,
    cone,
    hand_mesh,
    smoothstep,
    unit,
)

VERTICES = 6890
SHAPES = ("hand size", "finger length", "finger thickness", "palm width", "forearm thickness", "thumb length",
          "hand thickness", "finger taper", "pinky length", "stature")  # fmt: skip

# Body joints of the middle and the left side; the right side is mirrored. Metres.
JOINTS = {0: (0, -0.22, 0.02), 1: (0.06, -0.32, 0.01), 3: (0, -0.11, 0), 4: (0.10, -0.70, 0),
          6: (0, 0.03, 0.01), 7: (0.09, -1.10, -0.03), 9: (0, 0.08, 0.02), 10: (0.11, -1.16, 0.09),
          12: (0, 0.30, -0.02), 13: (0.08, 0.19, -0.01), 15: (0, 0.38, 0.02), 16: (0.18, 0.22, -0.03),
          18: (0.44, 0.22, -0.03), 20: (0.69, 0.22, -0.03)}  # fmt: skip
WRIST = np.array(JOINTS[20])


def _hand_weights(p: ndarray, part: ndarray) -> ndarray:
    """[N, 17]: forearm, wrist, then index, middle, pinky, ring, thumb with three joints each, in SMPL-H's order."""
    n = len(p)
    share = np.zeros((n, 5))  # a vertex's share of each finger, before the distance to the knuckle counts
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
        a = smoothstep(-11, 13, s)
        b, c = smoothstep(l1 - 6.5, l1 + 6.5, s), smoothstep(l1 + l2 - 5.5, l1 + l2 + 5.5, s)
        first = 2 + 3 * (0, 0, 1, 3, 2)[finger]
        out[:, first] = share[:, finger] * a * (1 - b)
        out[:, first + 1] = share[:, finger] * b * (1 - c)
        out[:, first + 2] = share[:, finger] * c
    # The thumb takes the thenar with it, fading into the palm.
    axis = unit(THUMB[1] - THUMB[0])
    s = (p - THUMB[0]) @ axis
    far = cone(p, THUMB[0], THUMB[1], *THUMB_RADII[:2])
    root = smoothstep(-6, 26, s) * (1 - smoothstep(0, 22, far))
    root = np.where(part == 0, np.maximum(root, smoothstep(6, 30, s)), np.where(part > 0, 0, root))
    s1 = (p - THUMB[1]) @ unit(unit(THUMB[2] - THUMB[1]) + axis)
    s2 = (p - THUMB[2]) @ FRAMES[0, 0]
    b = np.where(part == 0, smoothstep(-8, 8, s1), 0)
    c = np.where(part == 0, smoothstep(-6.5, 6.5, s2), 0)
    out[:, 2:14] *= (1 - root)[:, None]
    out[:, 14], out[:, 15], out[:, 16] = root * (1 - b), root * b * (1 - c), root * c
    rest = 1 - out.sum(1)
    hand = smoothstep(-20, 12, p[:, 0])
    out[:, 0], out[:, 1] = rest * (1 - hand), rest * hand
    return out


def _paint(p: ndarray, normals: ndarray, part: ndarray, nail: ndarray) -> dict[str, ndarray]:
    """The skin's palm, nail, blush and crease, each [N] in 0..1."""
    down = -normals[:, 1]
    thumb = part == 0
    down = np.where(thumb, -(normals @ FRAMES[0, 1]), down)
    palm = smoothstep(-0.15, 0.45, down) * smoothstep(-25, 8, p[:, 0])
    crease, blush = np.zeros(len(p)), np.zeros(len(p))
    for finger in range(5):
        chain = CHAINS[finger]
        for joint in range(1, 3):
            s = (p - chain[joint]) @ FRAMES[finger, 0]
            crease = np.maximum(crease, (part == finger) * np.exp(-((s / 3.0) ** 2)))
        s = (p - chain[3]) @ FRAMES[finger, 0]
        blush = np.maximum(blush, (part == finger) * smoothstep(-24, -4, s))
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
    return unit(out + 1e-12)


# --- the whole body ---


def _tube(a: ndarray, b: ndarray, ra: float, rb: float, joints: tuple[int, int], rings: int = 12, sides: int = 18):
    """A capsule-like limb: points, faces, and weights that go from the first joint to the second along it."""
    axis = unit(b - a)
    u = unit(np.cross(axis, (0.0, 0.0, 1.0) if abs(axis[2]) < 0.9 else (1.0, 0.0, 0.0)))
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
    second = smoothstep(0.7, 1.0, np.array(along))
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
    hand = smoothstep(-30, 20, p[:, 0])
    d[:, :, 0] = 0.045 * p * hand[:, None]
    width = smoothstep(5, 60, p[:, 0])
    d[:, 2, 3] = 0.045 * p[:, 2] * width
    for finger in range(1, 5):
        q = p - KNUCKLES[finger - 1]
        along = FRAMES[finger, 0]
        s = q @ along
        mine = (part == finger)[:, None]
        stretch = np.clip(s - 6, 0, None)[:, None] * along
        radial = q - s[:, None] * along
        length = PHALANGES[finger - 1].sum()
        fade = smoothstep(WEB - 4, WEB + 10, s)[:, None]
        d[:, :, 1] += mine * 0.05 * stretch
        d[:, :, 2] += mine * 0.055 * radial * fade
        d[:, :, 7] += mine * 0.06 * radial * fade * (1 - 2 * s[:, None] / length)
        d[:, :, 8] += mine * (0.06 * stretch if finger == 4 else 0)
        if finger < 4:  # the web follows its fingers a little, so that the skin has no step
            between = (part == -1) & (s > WEB - 2)
            d[between, 0, 1] = 0.05 * (WEB - 6)
    thumb = (part == 0)[:, None]
    s = (p - THUMB[1]) @ FRAMES[0, 0]
    d[:, :, 5] = thumb * 0.06 * np.clip(s, 0, None)[:, None] * FRAMES[0, 0]
    radial = p - THUMB[1] - s[:, None] * FRAMES[0, 0]
    d[:, :, 2] += thumb * 0.055 * radial * smoothstep(-5, 10, s)[:, None]
    arm = 1 - smoothstep(-60, 5, p[:, 0])
    d[:, 1:, 4] = 0.06 * p[:, 1:] * arm[:, None]
    d[:, 1, 6] = 0.05 * p[:, 1] * (part == -1) * hand
    return d


@lru_cache(maxsize=1)
def build_body() -> dict[str, ndarray]:
    """The body's arrays under SMPL-H's names, and `palm`, `nail`, `crease`, `blush` [6890] in 0..1 for the painter."""
    hand = hand_mesh()
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

    # Finger tips take their known ids; all other vertices fill the free ids in order.
    total = sum(len(m[0]) for m in meshes)
    if total > VERTICES:
        raise AssertionError(f"the body has {total} vertices, room for {VERTICES}")
    number = np.full(VERTICES, -1)
    number[np.concatenate([hand["tips"], hand["tips"] + len(mm)])] = TIP_VERTICES
    free = np.setdiff1d(np.arange(VERTICES), TIP_VERTICES)
    number[number < 0] = free
    v = np.tile(joints[0], (VERTICES, 1))  # spare vertices, without faces, lie in the pelvis
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
    """Skinning weights [V, 52] as multiples of 1/1024 that sum to one: exact in half precision, for smaller graphs."""
    units = np.floor(weights * 1024)
    rows = np.arange(len(units))
    units[rows, units.argmax(1)] += 1024 - units.sum(1)
    return (units / 1024).astype(np.float32)


def _regressor(v: ndarray, w: ndarray, joints: ndarray, used: ndarray) -> ndarray:
    """[52, 6890]: each joint as the smallest affine combination of vertices around it.

    The right side copies the left's vertex choice, so that the body stays symmetric for every shape.
    """
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
    """Writes the body as a compressed SMPL-H .npz (about 0.3 MB). Returns the path."""
    arrays: dict = {k: a for k, a in build_body().items() if k not in ("palm", "nail", "crease", "blush")}
    np.savez_compressed(path, **arrays)
    return Path(path)


def vertex_colours(skin: ndarray, which: ndarray | slice = slice(None)) -> ndarray:
    """Colours of the demo body's vertices (all, or `which` ids): skin tones [B, 3] of the back of the hand, in 0..1 ->
    float32 [B, 6890, 3] in 0..1.

    Palms are lighter and pinker, nails lighter still, knuckles and creases darker: so a palm differs from a back.
    """
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
