"""Solves how the hands of two people hold each other: handshake, high five, holding hands.

    python -m handiffuser.demo.clasps                # writes clasps.json

The first hand is a left one in its own frame. The other one is of the same side and the first one turned half about
an axis (handshake, high five), or a right hand with angles of its own (holding hands). As in `grasps.py`, contacts come
within 2 mm, and no hand lies deeper than 2 mm in the other one.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from . import contacts
from .contacts import LIMITS, Poser, left_hand, surface_distance, turns_of
from .gestures import Bones, pose_of
from .grasps import _angle, _patch, _samples, _short, inside_hand
from .human_gestures import BACK, HANDS, PAD, I, M, R, T, _bone, _tip

FILE = Path(__file__).with_name("clasps.json")
VARIANTS, STEPS = 2, 260
NEAR, DEEP = 0.016, 0.0006  # metres: within which a point behind a surface counts as inside, and the solver's margin
PALM, BACK_OF_HAND = (-1, 0, PAD), (-1, 0, BACK)
FLIP = np.array([-1.0, 1, 1])


@dataclass(frozen=True)
class Clasp:
    """Where the solver begins. `pairs`: what touches, a part of the first hand and one of the other. axis, through:
    the half turn that makes the other hand (the same in both directions); or turn, place: where a right hand is."""

    pairs: tuple
    fingers: tuple
    thumb: Bones
    roll: float = 0.0
    axis: tuple[float, float, float] | None = None
    through: tuple[float, float, float] = (0.0, 0.0, 0.0)
    turn: tuple = ()
    place: tuple[float, float, float] = (0.0, 0.0, 0.0)


def _wrap(knuckle: float, middle: float, end: float) -> tuple:
    return tuple((knuckle + 3 * k, 2 - 2 * k, middle, end) for k in range(4))


CLASPS = {
    "handshake": Clasp(
        ((PALM, PALM), *((_tip(f), BACK_OF_HAND) for f in (I, M, R)), (_tip(T), BACK_OF_HAND)),
        _wrap(38, 38, 22),
        ((0.52, -0.20, 0.83), (0.55, -0.60, 0.58), (0.90, -0.40, 0.00)),
        axis=(-0.50, 0.0, 0.86),
        through=(0.073, -0.024, -0.003),
    ),
    "high_five": Clasp(
        ((PALM, PALM), (_tip(M), _tip(M)), (_tip(I), _tip(R)), (_bone(M, 0, PAD), _bone(M, 0, PAD))),
        HANDS["prayer"].fingers,
        HANDS["prayer"].thumb,
        axis=(1.0, 0.0, 0.0),
        through=(0.0, -0.022, 0.003),
    ),
    "holding_hands": Clasp(
        ((PALM, PALM), *((_tip(f), PALM) for f in (M, R))),
        _wrap(40, 40, 22),
        ((0.72, -0.40, 0.56), (0.86, -0.46, 0.22), (0.86, -0.50, -0.05)),
        turn=((-0.342, 0.0, -0.94), (0.0, -1.0, 0.0), (-0.94, 0.0, 0.342)),
        place=(0.046, -0.046, -0.066),
    ),
}


@lru_cache(maxsize=1)
def clasps() -> dict[str, list[dict]]:
    """The solutions: "hands" (two of {"fingers", "thumb", "roll"}), "turn" [3,3] and "place" [3] of the other hand in
    the frame of the first, "gap_mm", "inside_mm"."""
    return json.loads(FILE.read_text())["clasps"]


def fingers_of(hand: dict, side: int) -> ndarray:
    """Finger rotations [15,3,3] float32 of one of "hands"."""
    return pose_of(np.array(hand["fingers"]), np.array(hand["thumb"]), hand["roll"], side)


# --- measuring ---


def _posed(hand: dict) -> ndarray:
    args = (torch.tensor(hand[key], dtype=torch.float32) for key in ("fingers", "thumb", "roll"))
    with torch.no_grad():
        return Poser(left_hand())(turns_of(*args))[0].double().numpy()


def both_hands(name: str, row: dict) -> tuple[ndarray, ndarray]:
    """The two posed hands [N,3] in the first one's frame."""
    first, second = (_posed(hand) for hand in row["hands"])
    if CLASPS[name].axis is None:
        second = second * FLIP
    return first, second @ np.array(row["turn"]).T + row["place"]


def measure(name: str, row: dict) -> tuple[float, float]:
    """The widest gap of a clasp's contacts and the deepest penetration, between the hands and within, millimetres."""
    hands = both_hands(name, row)
    ids, shares = (x.numpy() for x in _samples())
    points = [(v[ids] * shares[..., None]).sum(1) for v in hands]
    faces, wide = left_hand().faces, 0.0
    for a, b in CLASPS[name].pairs:
        patch = np.unique(ids[_patch(b)])
        target = faces[np.isin(faces, patch).all(1)]
        corners = [hands[1][target[:, k]] for k in range(3)]
        wide = max(wide, float(surface_distance(points[0][_patch(a)], *corners).min()))
    # A mirrored solid is wound the other way round: both are mirrored back.
    own = FLIP if CLASPS[name].axis is None else np.ones(3)
    into = [(points[1], hands[0], np.ones(3)), (points[0], hands[1], own)]
    deep = max(inside_hand(p * flip, v * flip) for p, v, flip in into)
    deep = max(deep, *(contacts.penetration(_posed(hand))[0] for hand in row["hands"]))
    return round(wide * 1000, 2), round(deep * 1000, 2)


# --- solving ---


def _into(points: Tensor, normals: Tensor, other: Tensor, its: Tensor) -> Tensor:
    """Squared depth of points of one hand behind the nearest ones of the other, cm²."""
    with torch.no_grad():
        ids = ((points > other.amin(0)) & (points < other.amax(0))).all(1).nonzero()[:, 0]
        near, which = torch.cdist(points[ids], other).min(1)
        ids, which = ids[near < NEAR], which[near < NEAR]
    depth = -((points[ids] - other[which]) * its[which]).sum(1)
    facing = (normals[ids].detach() * its[which].detach()).sum(1) < 0.3
    return ((depth + DEEP).clamp(0, NEAR) ** 2 * facing).sum() * 1e4


def solve(name: str, number: int) -> dict:
    """One solution of a clasp, as in `clasps`."""
    clasp, poser, losses = CLASPS[name], Poser(left_hand()), contacts.Losses(())
    rng, twins = np.random.default_rng(number), CLASPS[name].axis is not None
    ids, shares = _samples()
    pairs = [(torch.from_numpy(_patch(a)), torch.from_numpy(_patch(b))) for a, b in clasp.pairs]
    count = 1 if twins else 2
    noise = rng.normal(0, 0.15, (count, 4, 4)) * (number > 0)
    start = torch.tensor(np.array([clasp.fingers] * count) / 20 + noise, dtype=torch.float32)
    bones = np.array([clasp.thumb] * count)
    thumb0 = torch.tensor(bones / np.linalg.norm(bones, axis=2, keepdims=True), dtype=torch.float32)
    fingers, thumb = start.clone().requires_grad_(), thumb0.clone().requires_grad_()
    roll = torch.full((count,), clasp.roll / 20).requires_grad_()
    move = torch.zeros(2, 3, requires_grad=True)  # rotation in units of 0.3 rad, step in centimetres
    low, high = (torch.tensor([x[i] for x in LIMITS]) / 20 for i in range(2))
    flip = torch.tensor([-1.0, 1, 1])
    best: tuple[float, dict] = (np.inf, {})
    pull_in = push_out = 1.0
    adam = torch.optim.Adam([fingers, thumb, roll, move], lr=0.04)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS, 0.002)
    for step in range(STEPS):
        hands = [poser(turns_of(fingers[i] * 20, thumb[i], roll[i] * 20)) for i in range(count)]
        if twins:
            axis = _angle(0.3 * move[0]) @ torch.tensor(clasp.axis)
            axis = axis / axis.norm()
            through = torch.tensor(clasp.through) + 0.01 * move[1]
            turn = 2 * axis[:, None] * axis - torch.eye(3)
            place = 2 * (through - axis * (axis @ through))
            hands = [hands[0], hands[0]]
        else:
            turn = _angle(0.3 * move[0]) @ torch.tensor(clasp.turn)
            place = torch.tensor(clasp.place) + 0.01 * move[1]
            hands[1] = (hands[1][0] * flip, hands[1][1] * flip)
        (v, n), (w, m) = hands[0], (hands[1][0] @ turn.T + place, hands[1][1] @ turn.T)
        a, b = ((x[ids] * shares[..., None]).sum(1) for x in (v, w))
        na, nb = ((x[ids] * shares[..., None]).sum(1) for x in (n, m))
        contact = v.new_zeros(())
        for one, other in pairs:
            with torch.no_grad():
                i, j = divmod(int(torch.cdist(a[one], b[other]).argmin()), len(other))
            gap = a[one[i]] - b[other[j]]
            height = (gap * nb[other[j]]).sum().clamp_min(0)
            contact = contact + ((height - 0.0003).clamp_min(0) ** 2 + (gap.norm() - 0.004).clamp_min(0) ** 2) * 1e4
        inside = _into(a, na, b, nb) + (0 if twins else _into(b, nb, a, na))
        inside = inside + sum(losses.inside(*hand) for hand in hands[:count])
        keep = ((fingers - start) ** 2).sum() + 12 * ((thumb - thumb0) ** 2).sum() + (roll**2).sum() + (move**2).sum()
        loss = 40 * pull_in * contact + 6 * push_out * inside + (0.02 if step < STEPS // 2 else 0.005) * keep
        loss = loss + ((low - fingers).clamp_min(0) ** 2 + (fingers - high).clamp_min(0) ** 2).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step % 30 == 29 and step > 110:
            row = _row(name, fingers * 20, thumb, roll * 20, turn, place)
            score = max(row["gap_mm"] - 1.5, 0) + max(row["inside_mm"] - 1.5, 0) + 0.02 * keep.item()
            if score < best[0]:
                best = score, row
            if row["gap_mm"] <= 1.5 >= row["inside_mm"]:
                break
            push_out *= 1.4 if row["inside_mm"] > 1.5 else 1.0
            pull_in *= 1.4 if row["gap_mm"] > 1.5 else 1.0
    return best[1]


def _row(name: str, fingers: Tensor, thumb: Tensor, roll: Tensor, turn: Tensor, place: Tensor) -> dict:
    fingers, thumb, roll, turn, place = (x.detach() for x in (fingers, thumb, roll, turn, place))
    thumb = thumb / thumb.norm(dim=2, keepdim=True)
    hands = [{"fingers": _short(f, 2), "thumb": _short(t, 4), "roll": round(float(r), 2)}
             for f, t, r in zip(fingers, thumb, roll, strict=True)]  # fmt: skip
    row = {"hands": [hands[0], hands[-1]], "turn": _short(turn, 5), "place": _short(place, 5)}
    return row | dict(zip(("gap_mm", "inside_mm"), measure(name, row), strict=True))


def solve_all(names: list[str]) -> None:
    """Solves clasps, prints what was measured and writes it into the file."""
    for name in names:
        found = [solve(name, number) for number in range(VARIANTS)]
        good = [row for row in found if row["gap_mm"] <= 2 >= row["inside_mm"]]
        found = good or found
        rows = json.loads(FILE.read_text()) if FILE.exists() else {"clasps": {}}
        rows["clasps"][name] = found
        gaps, depths = ([row[key] for row in found] for key in ("gap_mm", "inside_mm"))
        print(f"{name:16} gap {gaps} mm, inside {depths} mm", flush=True)
        FILE.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    solve_all(sys.argv[1:] or list(CLASPS))
