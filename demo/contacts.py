"""Solves hand gestures on the mesh: what shall touch touches, and no part of a hand passes through another.

    python -m handiffuser.demo.contacts              # writes contacts.json: the angles of all gestures
    python -m handiffuser.demo.contacts ok_sign      # one gesture again; prints what was measured

A hand is cut into 16 parts, the palm and the 15 bones, by which joint a vertex follows most. A part closed with caps is
a solid, so whether a vertex lies inside another part is its winding number (Jacobson et al. 2013), and how deep is its
distance to that part's surface. Parts that share a joint are left out: skin folds there. The solver is gradient descent
on contacts, penetration by nearest vertices, and the distance to the gesture as it is written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from .gestures import ORDER
from .hand_mesh import CHAINS, FRAMES
from .human import SKIN, load_human
from .human_gestures import CONTACTS, FILE, FOLDED, HANDS
from .human_skin import rest_normals

VARIANTS = 3  # solutions of each gesture
FIT_STEPS = 150
NEAR = 0.013  # metres within which a vertex behind a surface counts as inside
BLOCK = {0: 4, 1: 0, 2: 1, 3: 3, 4: 2}  # a finger's place in SMPL-H's order
SPREAD = np.array([4.0, 2.0, 5.0, 4.0])  # degrees by which the starts of the solutions differ
LIMITS = ((-25, 100), (-28, 28), (-5, 118), (-5, 85))  # degrees: knuckle, spread, middle and end joint


@dataclass(frozen=True)
class Hand:
    """The left hand at rest, wrist at the origin. N vertices; part 0 is the palm, part 1 + 3 finger + bone a bone's
    (thumb first)."""

    vertices: ndarray  # [N,3] metres
    normals: ndarray  # [N,3]
    weights: ndarray  # [N,16] palm, then SMPL-H's 15 joints
    joints: ndarray  # [16,3]
    part: ndarray  # [N]
    back: ndarray  # [N] -1 on a finger's print side, 1 on the nail's, 0 between
    faces: ndarray  # [F,3]


def part_of(finger: int, bone: int) -> int:
    """Number of a part; finger -1 is the palm."""
    return 0 if finger < 0 else 1 + 3 * finger + bone


@lru_cache(maxsize=1)
def left_hand() -> Hand:
    """Reads the hand off the body."""
    human = load_human()
    mine = (human.kind == SKIN) & np.isin(human.owner, [20, *range(22, 37)])
    keep = np.flatnonzero(mine)
    number = np.full(len(mine), -1)
    number[keep] = np.arange(len(keep))
    faces = human.arrays["f"]
    faces = number[faces[mine[faces].all(1)]]
    joints = human.joints[[20, *range(22, 37)]]
    weights = human.arrays["weights"].astype(float)
    weights = np.concatenate([weights[keep][:, :22].sum(1, keepdims=True), weights[keep][:, 22:37]], 1)
    order = np.zeros(16, int)  # SMPL-H's joint -> part
    for finger, block in BLOCK.items():
        for bone in range(3):
            order[1 + 3 * block + bone] = part_of(finger, bone)
    part = order[weights.argmax(1)]
    normals = rest_normals(human)[keep]
    finger = (part - 1) // 3
    facing = (normals * FRAMES[finger.clip(0), 1]).sum(1)
    return Hand(
        vertices=human.template[keep] - joints[0],
        normals=normals,
        weights=weights,
        joints=joints - joints[0],
        part=part,
        back=np.where(facing > 0.3, 1, np.where(facing < -0.3, -1, 0)) * (part > 0),
        faces=faces,
    )


@lru_cache(maxsize=1)
def related() -> ndarray:
    """[16,16] bool: parts that are one, or share a joint."""
    out = np.eye(16, dtype=bool)
    for finger in range(5):
        for bone in range(3):
            here, before = part_of(finger, bone), part_of(finger if bone else -1, bone - 1)
            out[here, before] = out[before, here] = True
    out[0, 2] = out[2, 0] = True  # the ball of the thumb is skin of the palm
    for a in range(5):  # neighbours' roots share the web between them
        for b in range(5):
            out[part_of(a, 0), part_of(b, 0)] = True
    return out


# --- posing, in torch ---


def _rotate(axis: Tensor, radians: Tensor) -> Tensor:
    """[...,3,3] rotation about a unit axis [3] or [...,3] (Rodrigues)."""
    x, y, z = axis.unbind(-1)
    o = torch.zeros_like(x)
    k = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).view(*axis.shape[:-1], 3, 3)
    s, c = radians.sin()[..., None, None], radians.cos()[..., None, None]
    return torch.eye(3) + s * k + (1 - c) * (k @ k)


def _between(a: Tensor, b: Tensor) -> Tensor:
    v, c = torch.linalg.cross(a, b), (a * b).sum()
    o = torch.zeros(())
    k = torch.stack([o, -v[2], v[1], v[2], o, -v[0], -v[1], v[0], o]).view(3, 3)
    return torch.eye(3) + k + k @ k / (1 + c).clamp_min(1e-4)


def turns_of(fingers: Tensor, thumb: Tensor, roll: Tensor) -> Tensor:
    """gestures.pose_of for the left hand with gradients: [4,4] degrees, [3,3], degrees -> [15,3,3]."""
    frames = torch.tensor(FRAMES[list(ORDER)], dtype=torch.float32)
    back, side = frames[:, 1], frames[:, 2]
    knuckle, spread, middle, end = torch.deg2rad(fingers[[f - 1 for f in ORDER]]).unbind(1)
    bends = _rotate(side.repeat(3, 1), -torch.cat([knuckle, middle, end])).view(3, 4, 3, 3)
    first = _rotate(back, -spread) @ bends[0]
    out = [torch.stack([first, bends[1], bends[2]], 1).view(12, 3, 3)]
    rest = F.normalize(torch.tensor(np.diff(CHAINS[0], axis=0), dtype=torch.float32), dim=1)
    world = torch.eye(3)
    for bone in range(3):
        target = F.normalize(thumb[bone], dim=0)
        turned = _between(world @ rest[bone], target) @ world
        if bone == 0:
            turned = _rotate(target, torch.deg2rad(roll)) @ turned
        out.append((world.T @ turned)[None])
        world = turned
    return torch.cat(out)


class Poser:
    """Linear blend skinning of the left hand: rotations [15,3,3] -> vertices and normals [N,3]."""

    def __init__(self, hand: Hand) -> None:
        self.vertices, self.normals, self.weights, self.joints = (
            torch.tensor(x, dtype=torch.float32) for x in (hand.vertices, hand.normals, hand.weights, hand.joints)
        )

    def __call__(self, rotations: Tensor) -> tuple[Tensor, Tensor]:
        local = rotations.view(5, 3, 3, 3)
        step = self.joints[1:].view(5, 3, 3)
        step = torch.cat([step[:, :1], step[:, 1:] - step[:, :-1]], 1)  # from joint to joint
        turn, place = torch.eye(3).expand(5, 3, 3), torch.zeros(5, 3)
        turns, places = [], []
        for bone in range(3):
            place = place + (turn @ step[:, bone, :, None])[..., 0]
            turn = turn @ local[:, bone]
            turns.append(turn)
            places.append(place)
        turn = torch.cat([torch.eye(3)[None], torch.stack(turns, 1).view(15, 3, 3)])
        place = torch.cat([torch.zeros(1, 3), torch.stack(places, 1).view(15, 3)])
        shift = place - (turn @ self.joints[..., None])[..., 0]
        blended = (self.weights @ turn.view(16, 9)).view(-1, 3, 3)
        moved = (blended @ self.vertices[..., None])[..., 0] + self.weights @ shift
        return moved, F.normalize((blended @ self.normals[..., None])[..., 0], dim=1)


# --- measuring, exactly ---


@lru_cache(maxsize=1)
def _solids() -> list[tuple[ndarray, list[ndarray]]]:
    """Faces of each part [F,3], and the closed loops of edges [E,2] at which it was cut off."""
    hand = left_hand()
    owner = hand.part[hand.faces]
    most = np.where(owner[:, 1] == owner[:, 2], owner[:, 1], owner[:, 0])
    out = []
    for part in range(16):
        faces = hand.faces[most == part]
        edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
        have = {(int(a), int(b)) for a, b in edges}
        free = [(a, b) for a, b in have if (b, a) not in have]
        after: dict[int, list[int]] = {}
        for a, b in free:
            after.setdefault(a, []).append(b)
        loops = []
        while after:
            start = next(iter(after))
            loop, here = [], start
            while here in after:
                step = after[here].pop()
                if not after[here]:
                    del after[here]
                loop.append((here, step))
                here = step
            loops.append(np.array(loop))
        out.append((faces, loops))
    return out


def winding(points: ndarray, a: ndarray, b: ndarray, c: ndarray) -> ndarray:
    """Winding number [P] of triangles around points (Van Oosterom and Strackee 1983)."""
    a, b, c = (x[None] - points[:, None] for x in (a, b, c))
    la, lb, lc = (np.linalg.norm(x, axis=2) for x in (a, b, c))
    top = np.einsum("ptc,ptc->pt", a, np.cross(b, c))
    bottom = la * lb * lc + (a * b).sum(2) * lc + (b * c).sum(2) * la + (c * a).sum(2) * lb
    return np.arctan2(top, bottom).sum(1) / (2 * np.pi)


def surface_distance(points: ndarray, a: ndarray, b: ndarray, c: ndarray) -> ndarray:
    """Distance [P] of points to the nearest of some triangles."""
    p = points[:, None]
    ab, ac, n = b - a, c - a, np.cross(b - a, c - a)
    area = (n * n).sum(1).clip(1e-18)
    w = p - a
    gamma = np.einsum("ptc,tc->pt", np.cross(ab[None], w), n) / area
    beta = np.einsum("ptc,tc->pt", np.cross(w, ac[None]), n) / area
    inside = (gamma >= 0) & (beta >= 0) & (gamma + beta <= 1)
    best = np.where(inside, np.abs(np.einsum("ptc,tc->pt", w, n)) / np.sqrt(area), np.inf)
    for start, end in ((a, b), (b, c), (c, a)):
        edge = end - start
        t = (np.einsum("ptc,tc->pt", p - start, edge) / (edge * edge).sum(1).clip(1e-18)).clip(0, 1)
        best = np.minimum(best, np.linalg.norm(p - start - t[..., None] * edge, axis=2))
    return best.min(1)


def solid_parts(vertices: ndarray) -> Iterator[tuple[int, list[ndarray], list[ndarray]]]:
    """The parts of a posed hand [N,3]: number, the corners of its surface's triangles (three [F,3]), and those of the
    closed solid, caps included."""
    for part, (faces, loops) in enumerate(_solids()):
        corners = [vertices[faces[:, i]] for i in range(3)]
        closed = [corners]
        for loop in loops:
            middle = np.broadcast_to(vertices[loop[:, 0]].mean(0), (len(loop), 3))
            closed.append([vertices[loop[:, 1]], vertices[loop[:, 0]], middle])
        yield part, corners, [np.concatenate([c[i] for c in closed]) for i in range(3)]


def penetration(vertices: ndarray) -> tuple[float, tuple[int, int]]:
    """How deep (metres) any part of a posed hand [N,3] lies inside another one, and which two parts."""
    hand, worst, where = left_hand(), 0.0, (0, 0)
    for part, corners, solid in solid_parts(vertices):
        low, high = solid[0].min(0), solid[0].max(0)
        other = ~related()[part][hand.part] & ((vertices > low) & (vertices < high)).all(1)
        ids = np.flatnonzero(other)
        if len(ids) == 0:
            continue
        ids = ids[winding(vertices[ids], *solid) > 0.5]
        if len(ids) == 0:
            continue
        deep = surface_distance(vertices[ids], *corners)
        if deep.max() > worst:
            worst, where = float(deep.max()), (int(hand.part[ids[deep.argmax()]]), part)
    return worst, where


def gap(vertices: ndarray, pair: tuple) -> float:
    """Distance (metres) between two parts (finger, bone, side) of a posed hand [N,3]: 0 where they overlap."""
    hand, out = left_hand(), np.inf
    for (finger, bone, side), (f2, b2, _) in (pair, pair[::-1]):
        ids = np.flatnonzero((hand.part == part_of(finger, bone)) & ((hand.back == side) | (side == 0)))
        faces = _solids()[part_of(f2, b2)][0]
        out = min(out, float(surface_distance(vertices[ids], *(vertices[faces[:, i]] for i in range(3))).min()))
    return out


# --- solving ---


def _patch(part: tuple[int, int, int]) -> Tensor:
    hand = left_hand()
    finger, bone, side = part
    return torch.from_numpy(np.flatnonzero((hand.part == part_of(finger, bone)) & ((hand.back == side) | (side == 0))))


class Losses:
    def __init__(self, pairs: tuple) -> None:
        hand = left_hand()
        self.pairs = [(_patch(a), _patch(b)) for a, b in pairs]
        self.parts = [torch.from_numpy(np.flatnonzero(hand.part == part)) for part in range(16)]
        apart = ~related()
        self.apart = [(a, b) for a in range(16) for b in range(16) if apart[a, b]]

    def contact(self, v: Tensor, n: Tensor) -> Tensor:
        """Squared distance of each pair beyond a third of a millimetre, in cm²."""
        total = v.new_zeros(())
        for a, b in self.pairs:
            with torch.no_grad():
                far = torch.cdist(v[a], v[b])
                i, j = divmod(int(far.argmin()), len(b))
            step = v[a[i]] - v[b[j]]
            height = (step * n[b[j]]).sum()  # vertices 3 mm beside each other touch, too
            slide = (step.norm() - 0.004).clamp_min(0)
            total = total + (height.clamp_min(0) - 0.0003).clamp_min(0) ** 2 + slide**2
        return total * 1e4

    def inside(self, v: Tensor, n: Tensor) -> Tensor:
        """Squared depth of vertices behind the nearest vertex of another part, in cm²."""
        inner, outer = [], []
        with torch.no_grad():
            boxes = [(v[ids].amin(0), v[ids].amax(0)) for ids in self.parts]
            low, high = (torch.stack(x).numpy() for x in zip(*boxes, strict=True))
            for one, other in self.apart:
                if (low[one] > high[other]).any() or (low[other] > high[one]).any():
                    continue
                ids = self.parts[one]
                ids = ids[((v[ids] > boxes[other][0]) & (v[ids] < boxes[other][1])).all(1)]
                if len(ids):
                    near, which = torch.cdist(v[ids], v[self.parts[other]]).min(1)
                    inner.append(ids[near < NEAR])
                    outer.append(self.parts[other][which[near < NEAR]])
        if not inner:
            return v.new_zeros(())
        a, b = torch.cat(inner), torch.cat(outer)
        depth = -((v[a] - v[b]) * n[b]).sum(1)
        facing = (n[a].detach() * n[b].detach()).sum(1) < 0.5
        return ((depth + 0.0006).clamp(0, NEAR) ** 2 * facing).sum() * 1e4


def solve(name: str, seed: int = 0, fist: dict | None = None) -> dict:
    """One solution of a gesture: {"fingers", "thumb", "roll", "gap_mm", "inside_mm"}."""
    torch.manual_seed(0)
    rng = np.random.default_rng((seed, list(HANDS).index(name)))
    gesture, losses, poser = HANDS[name], Losses(CONTACTS.get(name, ())), Poser(left_hand())
    start = np.array(gesture.fingers, float)
    if name != "fist" and fist:  # its folded fingers serve all gestures
        for finger in range(1, 5):
            if FOLDED[finger][0] in CONTACTS.get(name, ()):
                start[finger - 1] = fist["fingers"][finger - 1]
    if seed:
        start = start + (0.4 if fist else 1.0) * gesture.loose * rng.normal(size=(4, 4)).clip(-2, 2) * SPREAD
    bones = np.array(gesture.thumb, float)
    bones = bones / np.linalg.norm(bones, axis=1, keepdims=True)
    written = _row(name, start, bones, gesture.roll)
    if written["gap_mm"] <= 1.5 and written["inside_mm"] <= 1:
        return written
    fingers0, thumb0 = torch.tensor(start / 20, dtype=torch.float32), torch.tensor(bones, dtype=torch.float32)
    fingers, thumb = fingers0.clone().requires_grad_(), thumb0.clone().requires_grad_()
    roll = torch.tensor(gesture.roll / 20, dtype=torch.float32, requires_grad=True)
    low, high = (torch.tensor([x[i] for x in LIMITS]) / 20 for i in range(2))
    best: tuple[float, dict] = (np.inf, {})
    pull_in = push_out = 1.0
    adam = torch.optim.Adam([fingers, thumb, roll], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, FIT_STEPS, 0.002)
    for step in range(FIT_STEPS):
        v, n = poser(turns_of(fingers * 20, thumb, roll * 20))
        keep = ((fingers - fingers0) ** 2).sum() + 12 * ((thumb - thumb0) ** 2).sum() + (roll - gesture.roll / 20) ** 2
        pull = 0.02 if step < FIT_STEPS // 2 else 0.005
        loss = 60 * pull_in * losses.contact(v, n) + 6 * push_out * losses.inside(v, n) + pull * keep
        loss = loss + ((low - fingers).clamp_min(0) ** 2 + (fingers - high).clamp_min(0) ** 2).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step % 20 == 19 and step > 60:
            row = _row(name, (fingers * 20).detach().numpy(), thumb.detach().numpy(), 20 * roll.item())
            score = max(row["gap_mm"] - 1.5, 0) + max(row["inside_mm"] - 1.6, 0) + 0.2 * keep.item()
            if score < best[0]:
                best = score, row
            if row["gap_mm"] <= 1.5 >= row["inside_mm"]:
                break
            push_out *= 1.5 if row["inside_mm"] > 1.5 else 1.0  # what the nearest vertices do not tell
            pull_in *= 1.5 if row["gap_mm"] > 1.5 else 1.0
    return best[1]


def _row(name: str, fingers: ndarray, thumb: ndarray, roll: float) -> dict:
    thumb = thumb / np.linalg.norm(thumb, axis=1, keepdims=True)
    row = {"fingers": fingers.round(2).tolist(), "thumb": thumb.round(4).tolist(), "roll": round(roll, 2)}
    return row | dict(zip(("gap_mm", "inside_mm"), measure(name, row)[:2], strict=True))


def measure(name: str, row: dict) -> tuple[float, float, tuple[int, int]]:
    """The widest gap of a solution's contacts and its deepest penetration in millimetres, and the parts of that."""
    args = (torch.tensor(row[key], dtype=torch.float32) for key in ("fingers", "thumb", "roll"))
    with torch.no_grad():
        vertices = Poser(left_hand())(turns_of(*args))[0].double().numpy()
    wide = max((gap(vertices, pair) for pair in CONTACTS.get(name, ())), default=0.0)
    deep, where = penetration(vertices)
    return round(wide * 1000, 2), round(deep * 1000, 2), where


def _good(row: dict) -> bool:
    return row["gap_mm"] <= 1.9 and row["inside_mm"] <= 1.9


def solve_all(names: list[str]) -> None:
    """Solves gestures, prints what was measured and writes it into the file."""
    rows = json.loads(FILE.read_text())["gestures"] if FILE.exists() else {}
    for name in names:
        fists = rows.get("fist", [None] * VARIANTS)
        wanted, found = VARIANTS if name in CONTACTS else 1, []
        for seed in range(3 * wanted):  # a start that ends badly is left out
            found.append(solve(name, seed, fists[seed % len(fists)]))
            if sum(_good(row) for row in found) == wanted:
                break
        rows[name] = sorted(found, key=lambda row: not _good(row))[:wanted]
        gaps, depths = ([row[key] for row in rows[name]] for key in ("gap_mm", "inside_mm"))
        print(f"{name:20} gap {gaps} mm, inside {depths} mm", flush=True)
        FILE.write_text(json.dumps({"gestures": {n: rows[n] for n in HANDS if n in rows}}, indent=None) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    solve_all(sys.argv[1:] or list(HANDS))
