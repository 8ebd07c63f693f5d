"""The body of the demo's people: a human in the SMPL-H file format, free to use and to pass on.

It is MakeHuman's mesh (CC0), turned into SMPL-H's rest pose and 52 joints by `make_human.py`; NOTICE names its makers.
The surface has four kinds of vertices (`KINDS`): skin of head, neck, upper chest, arms and hands; a shell of clothes
from neck to feet with nothing under it; hair; eyes. Left and right are mirror images. At rest the left arm points
along +x, palms down (-y), thumbs forward (+z), and finger bones point where CHAINS and FRAMES of `body.py` say.
Ten shape components vary build, face and hands of adults, one standard deviation each. There are no pose correctives:
they would double the size of an exported hand encoder.

    python -m handiffuser.demo.human smplh_human.npz      # a file for SMPLH.load, smplx.create and hd-body show
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy import ndarray

from ..models.smplh import PARENTS, SMPLH, TIP_VERTICES

FILE = Path(__file__).with_name("human.npz")
KINDS = ("skin", "clothes", "hair", "eye")
SKIN, CLOTHES, HAIR, EYE = range(4)
UNIT = 5e-5  # metres of one step of the stored template
SMILE_UNIT = 2e-5
# The left hand's and half the head's rectangles (u0, v0, u1, v1) in MakeHuman's UV square.
ATLAS = ((0.570, 0.011, 0.763, 0.196), (0.641, 0.4836, 0.9945, 0.8185))
HAND_CHART, HEAD_CHART, NO_CHART = range(3)  # where a face's texture is: the hand's picture, the head's, nowhere
OTHER = np.array([0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20,
                  *range(37, 52), *range(22, 37)])  # fmt: skip


@dataclass(frozen=True)
class Human:
    """The body and what a picture of it needs. V vertices, Q quads."""

    arrays: dict[str, ndarray]  # SMPL-H's
    kind: ndarray  # [V] one of SKIN, CLOTHES, HAIR, EYE
    owner: ndarray  # [V] the joint that a vertex follows most
    mirror: ndarray  # [V] the vertex on the other side
    quads: ndarray  # [Q,4]
    chart: ndarray  # [Q] HAND_CHART, HEAD_CHART or NO_CHART
    uv: ndarray  # [Q,4,2] float32 place in the chart, 0..1; left and right share it
    nails: ndarray  # [S,S] float32 in 0..1, in the hand's chart; row is v
    lips: ndarray  # [S,S] float32 in 0..1, in the head's chart
    traits: ndarray  # [11,2] how male and how old a body is: of the mean one, then what each component adds
    smile: ndarray  # [V,3] metres that a smile moves each vertex at rest

    @property
    def template(self) -> ndarray:
        """[V,3] metres."""
        return self.arrays["v_template"]

    @property
    def joints(self) -> ndarray:
        """[52,3] metres, at rest."""
        return self.arrays["J_regressor"].astype(float) @ self.template


@lru_cache(maxsize=1)
def load_human() -> Human:
    """Reads the array file that lies beside this module."""
    with np.load(FILE, allow_pickle=False) as archive:
        half = {name: archive[name] for name in archive.files}
    count, middle = len(half["template"]), int(half["middle"])
    total = 2 * count - middle
    # Both halves, the middle once; then finger tips go to the ids that SMPL-H gives them.
    left = np.arange(count)
    right = np.where(left < middle, left, left + count - middle)
    number = np.full(total, -1)
    number[np.concatenate([half["tips"], right[half["tips"]]])] = TIP_VERTICES
    number[number < 0] = np.setdiff1d(np.arange(total), TIP_VERTICES)
    left, right = number[left], number[right]
    mirror = np.empty(total, int)
    mirror[left], mirror[right] = right, left

    flip = np.array([-1.0, 1, 1])
    template = half["template"] * UNIT
    template[:middle, 0] = 0
    dirs = half["dirs"].astype(np.float64)  # [count,3,10]
    dirs[:middle, 0] = 0
    weights = np.zeros((count, 52))
    np.put_along_axis(weights, half["weight_joints"].astype(int), half["weights"] / 1024, 1)
    # The middle follows left and right alike. Multiples of 1/1024 are exact in half precision.
    weights[:middle] = (weights[:middle] + weights[:middle][:, OTHER]) / 2
    smile = half["smile"] * SMILE_UNIT
    quads, uv = half["quads"].astype(int), half["uv"][half["quad_uv"]].astype(np.float32) / 65535
    owner = weights.argmax(1)
    chart, uv = _charts(quads, uv, owner, half["kind"])

    arrays = {
        "v_template": _both(total, left, right, template, template * flip).astype(np.float32),
        "shapedirs": _both(total, left, right, dirs, dirs * flip[:, None]).astype(np.float32),
        "posedirs": np.zeros((total, 3, 459), np.float32),
        "J_regressor": _regressor(half, left, right, total),
        "kintree_table": np.stack([np.array(PARENTS), np.arange(52)]).astype(np.int64),
        "weights": _both(total, left, right, weights, weights[:, OTHER]).astype(np.float32),
        "hands_componentsl": np.eye(45, dtype=np.float32),
        "hands_componentsr": np.eye(45, dtype=np.float32),
        "hands_meanl": np.zeros(45, np.float32),
        "hands_meanr": np.zeros(45, np.float32),
    }
    turned = [0, 3, 2, 1]  # winds the other way round, with the same diagonal
    whole = np.concatenate([left[quads], right[quads][:, turned]])
    arrays["f"] = np.concatenate([whole[:, [0, 1, 2]], whole[:, [0, 2, 3]]])
    return Human(
        arrays=arrays,
        kind=_both(total, left, right, half["kind"], half["kind"]),
        owner=arrays["weights"].argmax(1),
        mirror=mirror,
        quads=whole,
        chart=np.concatenate([chart, chart]),
        uv=np.concatenate([uv, uv[:, turned]]),
        nails=half["nails"].astype(np.float32) / 15,
        lips=half["lips"].astype(np.float32) / 15,
        traits=half["traits"],
        smile=_both(total, left, right, smile, smile * flip).astype(np.float32),
    )


def _both(total: int, left: ndarray, right: ndarray, on_left: ndarray, on_right: ndarray) -> ndarray:
    out = np.zeros((total, *on_left.shape[1:]), on_left.dtype)
    out[right], out[left] = on_right, on_left
    return out


def _charts(quads: ndarray, uv: ndarray, owner: ndarray, kind: ndarray) -> tuple[ndarray, ndarray]:
    """Chart of each quad and its corners' places in it: the hand's and the half head's parts of MakeHuman's UV
    square, each stretched to 0..1."""
    skin = kind[quads[:, 0]] == SKIN
    chart = np.full(len(quads), NO_CHART)
    out = np.zeros_like(uv)
    for which, (u0, v0, u1, v1) in enumerate(ATLAS):
        low, high = np.array([u0, v0], np.float32), np.array([u1, v1], np.float32)
        inside = skin & (uv >= low - 2e-3).all((1, 2)) & (uv <= high + 2e-3).all((1, 2))
        chart[inside] = which
        out[inside] = ((uv[inside] - low) / (high - low)).clip(0, 1)
    return chart, out


def _regressor(half: dict[str, ndarray], left: ndarray, right: ndarray, total: int) -> ndarray:
    """[52,V]: the stored rows of the middle and left joints, and their mirror images."""
    out = np.zeros((52, total), np.float32)
    mine = [j for j in range(52) if OTHER[j] >= j]
    for joint, ids, values in zip(mine, half["regressor_ids"], half["regressor"], strict=True):
        if OTHER[joint] == joint:
            np.add.at(out[joint], left[ids], values / 2)
            np.add.at(out[joint], right[ids], values / 2)
        else:
            out[joint, left[ids]] = values
            out[OTHER[joint], right[ids]] = values
    return out


def traits_of(betas: ndarray) -> tuple[float, float]:
    """How male and how old a body looks, each 0 to 1 or a little beyond: what captions say of it."""
    table = load_human().traits
    male, old = table[0] + np.asarray(betas, float) @ table[1:]
    return float(male), float(old)


@lru_cache(maxsize=1)
def human_body() -> SMPLH:
    """The body as the product's own model."""
    return SMPLH(load_human().arrays)


def make_body(path: str | Path) -> Path:
    """Writes the body as a compressed SMPL-H .npz (about 1 MB). Returns the path."""
    np.savez_compressed(path, **load_human().arrays)  # type: ignore[arg-type]
    return Path(path)


if __name__ == "__main__":
    print(make_body(sys.argv[1] if len(sys.argv) > 1 else "smplh_human.npz"))
