"""Solves how a hand holds a thing, and how two people's hands hold each other, on the meshes themselves.

    python -m handiffuser.demo.grasps                # writes grasps.json
    python -m handiffuser.demo.grasps cup            # one thing again; prints what was measured

As in `contacts.py`: gradient descent on angles, and here on the place of the thing as well. A formula of the thing's
distance (positive outside) leads the solver. What is kept was measured on triangles: contacts come within 2 mm, and
neither hand nor thing lies deeper than 2 mm in the other.
"""

from __future__ import annotations

import json
import sys
from functools import lru_cache

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from . import contacts
from .contacts import LIMITS, NEAR, Poser, left_hand, part_of, solid_parts, surface_distance, turns_of, winding
from .human_gestures import ANY, BACK, HANDS, PAD, PALM_ANY, I, L, M, R, T, _bone, _tip
from .things import FILE, SIZES, THINGS, Mesh, Size, grasp_of, thing_mesh

STEPS = 260
DEEP = 0.0006  # metres: how far outside the solver keeps vertices
WRAPPED = tuple(part for f in (I, M, R, L) for part in (_tip(f), _bone(f, 1, PAD)))
# What touches a thing: parts of the hand.
TOUCHING: dict[str, tuple] = {
    "cup": (*WRAPPED, _tip(T), PALM_ANY),
    "ball": (*(_tip(f) for f in (T, I, M, R, L)), PALM_ANY),
    "phone": (*(_tip(f) for f in (T, I, M, R)), PALM_ANY),
    "pen": (_tip(T), _tip(I), _tip(M, ANY), _bone(I, 0, ANY)),
    "stick": (*(_tip(f) for f in (T, I, M, R)), PALM_ANY),
    "book": (_tip(T), _tip(I), _tip(M), _tip(R)),
}
GRIP = HANDS["grip"]


def _start(thing: str, size: Size, number: int) -> tuple[ndarray, ndarray, float, ndarray, ndarray]:
    """Where the solver begins: fingers, thumb, roll, and turn (columns: the thing's axes in the hand) and place."""
    fingers, thumb, roll = np.array(GRIP.fingers, float), np.array(GRIP.thumb, float), 0.0
    x, y, z = np.eye(3)
    if thing == "cup":
        radius = max(size[:2])
        turn, place = np.stack([-y, z, -x], 1), np.array([0.085, -0.024 - radius, 0.004])
        if size[3]:  # the handle looks away from palm and fingers
            turn = np.stack([x, z, -y], 1) @ _about_y(np.radians(215))
        fingers = np.array([(30, 2, 40, 25), (32, 0, 42, 25), (34, 0, 42, 25), (36, 0, 42, 25)], float)
    elif thing == "ball":
        turn, place = np.stack([x, z, -y], 1), np.array([0.098, -0.028 - size[0], 0.012])
        fingers = np.array([(28, 8, 42, 25), (30, 0, 44, 25), (32, -6, 42, 25), (36, -12, 40, 25)], float)
        thumb = np.array([(0.55, -0.72, 0.42), (0.62, -0.78, 0.05), (0.75, -0.65, -0.1)])
    elif thing == "phone":
        tilt = np.radians((20, 32, 26)[number])
        along = np.cos(tilt) * z + np.sin(tilt) * x
        turn = np.stack([np.cross(along, -y), along, -y], 1)
        place = np.array([0.092, -0.027 - size[2], 0.022])
        fingers = np.array([(14, 0, 45, 25), (16, 0, 48, 30), (20, 0, 48, 30), (28, 0, 45, 25)], float)
        thumb = np.array([(0.66, -0.50, 0.56), (0.80, -0.55, 0.25), (0.80, -0.55, -0.2)])
    elif thing == "pen":
        along = np.array([-0.42, 0.76, 0.50])
        along /= np.linalg.norm(along)
        side = np.cross(along, z)
        side /= np.linalg.norm(side)
        turn = np.stack([side, along, np.cross(side, along)], 1)
        place = np.array([0.125, -0.052, 0.026]) + along * (size[1] - 0.036)
        fingers = np.array([(46, 2, 44, 18), (56, 2, 54, 28), (64, 4, 62, 35), (66, 8, 64, 38)], float)
        thumb = np.array([(0.68, -0.62, 0.38), (0.88, -0.46, -0.05), (0.94, -0.28, -0.18)])
    elif thing == "stick":
        turn, place = np.stack([-y, z, -x], 1), np.array([0.088, -0.026 - size[0], 0.0])
        place = place + z * size[1] * (0.3, -0.1, 0.5)[number]
        turn = _about(x, np.radians(-6)) @ turn
        fingers = np.array([(48, 0, 62, 34), (52, 0, 64, 34), (56, 0, 64, 34), (58, 2, 60, 34)], float)
        thumb = np.array([(0.58, -0.76, 0.28), (0.72, -0.69, -0.10), (0.82, -0.48, -0.32)])
    else:
        bend = np.radians(48)
        along, out = np.array([np.cos(bend), -np.sin(bend), 0]), np.array([-np.sin(bend), -np.cos(bend), 0])
        if number == 1:  # by a long side
            turn = np.stack([along, z, np.cross(along, z)], 1)
            reach = size[0] - 0.034
        else:
            turn, reach = np.stack([np.cross(along, out), along, out], 1), size[1] - 0.034
        place = np.array([0.137, -0.033, 0.012]) + out * (size[2] + 0.008) + along * reach
        fingers = np.array([(45, 3, 8, 4), (45, 0, 8, 4), (45, -3, 10, 4), (45, -6, 14, 6)], float)
        thumb = np.array([(0.58, -0.76, 0.28), (0.72, -0.68, 0.05), (0.80, -0.58, -0.05)])
    return fingers, thumb / np.linalg.norm(thumb, axis=1, keepdims=True), roll, turn, place


def _about(axis: ndarray, radians: float) -> ndarray:
    return contacts._rotate(torch.tensor(axis), torch.tensor(radians)).numpy()


def _about_y(radians: float) -> ndarray:
    return _about(np.eye(3)[1], radians)


# --- distance to a thing ---


def _box(p: Tensor, half: tuple[float, float, float], corner: float) -> Tensor:
    """Rounded in the plane of x and y."""
    flat = (p[:, :2].abs() - p.new_tensor(half[:2]) + corner).clamp_min(0).norm(dim=1) - corner
    flat = torch.maximum(flat, torch.full_like(flat, -corner))
    inner = (p[:, :2].abs() - p.new_tensor(half[:2])).amax(1)
    flat = torch.where(inner < -corner, inner, flat)
    return _both(flat, p[:, 2].abs() - half[2])


def _both(a: Tensor, b: Tensor) -> Tensor:
    """Distance to what lies inside two outlines that are square to each other."""
    d = torch.stack([a, b], 1)
    return (d.clamp_min(0) ** 2).sum(1).clamp_min(1e-16).sqrt() + d.amax(1).clamp_max(0)


def distance(thing: str, size: Size, p: Tensor) -> Tensor:
    """Signed distance [N] (metres) of points [N,3] in the thing's frame; the solver's, near enough to the mesh."""
    if thing == "ball":
        return p.norm(dim=1) - size[0]
    if thing in ("phone", "book"):
        return _box(p, size, 0.009 if thing == "phone" else 0.001)  # type: ignore[arg-type]
    around = (p[:, [0, 2]] ** 2).sum(1).clamp_min(1e-12).sqrt()
    if thing != "cup":
        return _both(around - size[0], p[:, 1].abs() - size[1])
    low, high, half, handle = size
    radius = low + (high - low) * (p[:, 1] + half) / (2 * half)
    out = _both(around - radius, p[:, 1].abs() - half)
    if handle:
        q = p + p.new_tensor([0.0, 0.0, 0.5 * (low + high) + 0.006])
        ring = (((q[:, 1] / 0.028) ** 2 + (q[:, 2] / 0.022) ** 2).clamp_min(1e-9).sqrt() - 1) * 0.025
        ring = (ring**2 + q[:, 0] ** 2).clamp_min(1e-12).sqrt() - 0.0045
        out = torch.minimum(out, torch.where(q[:, 2] < 0.01, ring, torch.ones_like(ring)))
    return out


# --- points of the hand ---


@lru_cache(maxsize=1)
def _samples() -> tuple[Tensor, Tensor]:
    """Corners [S,3] and shares [S,3] of points on the hand: its vertices, and the middles of faces and edges of the
    palm, where vertices are far apart."""
    hand = left_hand()
    n = len(hand.vertices)
    ids = [np.stack([np.arange(n)] * 3, 1)]
    shares = [np.tile([1.0, 0, 0], (n, 1))]
    palm = hand.faces[(hand.part[hand.faces] == 0).any(1)]
    for share in ((1 / 3, 1 / 3, 1 / 3), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)):
        ids.append(palm)
        shares.append(np.tile(share, (len(palm), 1)))
    return torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(shares)).float()


def _surface_points(mesh: Mesh, count: int = 6000) -> ndarray:
    """Points spread evenly over a thing."""
    corners = mesh.vertices[mesh.faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    rng = np.random.default_rng(0)
    face = rng.choice(len(area), count, p=area / area.sum())
    a, b = np.sqrt(rng.random(count)), rng.random(count)
    share = np.stack([1 - a, a * (1 - b), a * b], 1)
    return np.concatenate([mesh.vertices, (corners[face] * share[..., None]).sum(1)])


# --- measuring, exactly ---


def inside_thing(points: ndarray, mesh: Mesh) -> float:
    """How deep (metres) the deepest of some points lies inside a thing."""
    corners = [mesh.vertices[mesh.faces[:, i]] for i in range(3)]
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    points = points[((points > low) & (points < high)).all(1)]
    points = points[winding(points, *corners) > 0.5] if len(points) else points
    return float(surface_distance(points, *corners).max()) if len(points) else 0.0


def inside_hand(points: ndarray, vertices: ndarray) -> float:
    """How deep (metres) the deepest of some points lies inside the parts of a posed hand [N,3]."""
    worst = 0.0
    for _, surface, solid in solid_parts(vertices):
        near = points[((points > solid[0].min(0)) & (points < solid[0].max(0))).all(1)]
        near = near[winding(near, *solid) > 0.5] if len(near) else near
        if len(near):
            worst = max(worst, float(surface_distance(near, *surface).max()))
    return worst


def _patch(part: tuple[int, int, int]) -> ndarray:
    """Numbers of `_samples` on a part of the hand; of the palm its inner side, or the hand's back for BACK."""
    hand = left_hand()
    ids, _ = (x.numpy() for x in _samples())
    finger, bone, side = part
    mine = (hand.part[ids] == part_of(finger, bone)).all(1)
    if finger < 0:
        out = 1 if side == BACK else -1
        return np.flatnonzero(mine & (out * hand.normals[ids[:, 0], 1] > 0.3))
    return np.flatnonzero(mine & ((hand.back[ids[:, 0]] == side) | (side == 0)))


def posed(row: dict) -> ndarray:
    """The left hand [N,3] of a solution."""
    args = (torch.tensor(row[key], dtype=torch.float32) for key in ("fingers", "thumb", "roll"))
    with torch.no_grad():
        return Poser(left_hand())(turns_of(*args))[0].double().numpy()


def measure(thing: str, number: int, row: dict) -> tuple[float, float]:
    """The widest gap of a grasp's contacts and its deepest penetration (hand and thing, and within the hand), mm."""
    vertices, grasp = posed(row), grasp_of(thing, number, row)
    mesh = thing_mesh(thing, grasp.size)
    ids, shares = (x.numpy() for x in _samples())
    points = (vertices[ids] * shares[..., None]).sum(1)
    local = (points - grasp.place) @ grasp.turn
    corners = [mesh.vertices[mesh.faces[:, i]] for i in range(3)]
    wide = max(float(surface_distance(local[_patch(part)], *corners).min()) for part in TOUCHING[thing])
    of_thing = _surface_points(mesh) @ grasp.turn.T + grasp.place
    deep = max(inside_thing(local, mesh), inside_hand(of_thing, vertices), contacts.penetration(vertices)[0])
    return round(wide * 1000, 2), round(deep * 1000, 2)


# --- solving ---


def _angle(vector: Tensor) -> Tensor:
    """[3,3] rotation of a rotation vector [3]."""
    x, y, z = vector.unbind()
    o = torch.zeros(())
    return torch.linalg.matrix_exp(torch.stack([o, -z, y, z, o, -x, -y, x, o]).view(3, 3))


def _thing_in_hand(spots: Tensor, points: Tensor, normals: Tensor) -> Tensor:
    """Squared depth of points of a thing behind the nearest points of the hand, cm²: thin things slip between them."""
    with torch.no_grad():
        ids = ((spots > points.amin(0)) & (spots < points.amax(0))).all(1).nonzero()[:, 0]
        near, which = torch.cdist(spots[ids], points).min(1)
        ids, which = ids[near < NEAR], which[near < NEAR]
    depth = -((spots[ids] - points[which]) * normals[which]).sum(1)
    return ((depth + DEEP).clamp(0, NEAR) ** 2).sum() * 1e4


def solve(thing: str, number: int) -> dict:
    """One solution of a thing: angles as in contacts.json, "turn" and "place" of the thing, "gap_mm", "inside_mm"."""
    size = SIZES[thing][number]
    fingers0, thumb0, roll0, turn0, place0 = _start(thing, size, number)
    losses, poser = contacts.Losses(()), Poser(left_hand())
    ids, shares = _samples()
    spots = torch.from_numpy(_surface_points(thing_mesh(thing, size), 600)[-600:]).float()
    patches = [torch.from_numpy(_patch(part)) for part in TOUCHING[thing]]
    start, bones0 = torch.tensor(fingers0 / 20, dtype=torch.float32), torch.tensor(thumb0, dtype=torch.float32)
    fingers, thumb = start.clone().requires_grad_(), bones0.clone().requires_grad_()
    roll = torch.tensor(roll0 / 20, requires_grad=True)
    move = torch.zeros(2, 3, requires_grad=True)  # the thing's rotation (units of 0.3 rad) and step (centimetres)
    turn_, place_ = torch.tensor(turn0, dtype=torch.float32), torch.tensor(place0, dtype=torch.float32)
    low, high = (torch.tensor([x[i] for x in LIMITS]) / 20 for i in range(2))
    best: tuple[float, dict] = (np.inf, {})
    pull_in = push_out = 1.0
    adam = torch.optim.Adam([fingers, thumb, roll, move], lr=0.04)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS, 0.002)
    for step in range(STEPS):
        v, n = poser(turns_of(fingers * 20, thumb, roll * 20))
        turn, place = _angle(0.3 * move[0]) @ turn_, place_ + 0.01 * move[1]
        points = (v[ids] * shares[..., None]).sum(1)
        d = distance(thing, size, (points - place) @ turn)
        gaps = torch.stack([d[patch].min() for patch in patches])
        contact = ((gaps.abs() - 0.0003).clamp_min(0) ** 2).sum() * 1e4
        inside = ((DEEP - d).clamp(0, 0.03) ** 2).sum() * 1e4 + losses.inside(v, n)
        inside = inside + _thing_in_hand(spots @ turn.T + place, points, (n[ids] * shares[..., None]).sum(1))
        keep = ((fingers - start) ** 2).sum() + 12 * ((thumb - bones0) ** 2).sum() + (roll - roll0 / 20) ** 2
        keep = keep + (move**2).sum()
        loss = 40 * pull_in * contact + 6 * push_out * inside + (0.02 if step < STEPS // 2 else 0.005) * keep
        loss = loss + ((low - fingers).clamp_min(0) ** 2 + (fingers - high).clamp_min(0) ** 2).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step % 30 == 29 and step > 110:
            row = _row(thing, number, (fingers * 20).detach(), thumb.detach(), 20 * roll.item(), turn.detach(),
                       place.detach())  # fmt: skip
            score = max(row["gap_mm"] - 1.5, 0) + max(row["inside_mm"] - 1.5, 0) + 0.05 * keep.item()
            if score < best[0]:
                best = score, row
            if row["gap_mm"] <= 1.5 >= row["inside_mm"]:
                break
            push_out *= 1.4 if row["inside_mm"] > 1.5 else 1.0
            pull_in *= 1.4 if row["gap_mm"] > 1.5 else 1.0
    return best[1]


def _row(thing: str, number: int, fingers: Tensor, thumb: Tensor, roll: float, turn: Tensor, place: Tensor) -> dict:
    bones = thumb.numpy() / np.linalg.norm(thumb.numpy(), axis=1, keepdims=True)
    row = {"fingers": _short(fingers, 2), "thumb": _short(bones, 4), "roll": round(roll, 2),
           "turn": _short(turn, 5), "place": _short(place, 5)}  # fmt: skip
    return row | dict(zip(("gap_mm", "inside_mm"), measure(thing, number, row), strict=True))


def _short(values: Tensor | ndarray, digits: int) -> list:
    return np.asarray(values).astype(float).round(digits).tolist()


def solve_all(names: list[str]) -> None:
    """Solves things, prints what was measured and writes it into the file."""
    for name in names:
        found = [solve(name, number) for number in range(len(SIZES[name]))]
        rows = json.loads(FILE.read_text()) if FILE.exists() else {"things": {}}
        rows["things"][name] = found
        gaps, depths = ([row[key] for row in found] for key in ("gap_mm", "inside_mm"))
        print(f"{name:12} gap {gaps} mm, inside {depths} mm", flush=True)
        FILE.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    solve_all(sys.argv[1:] or list(THINGS))
