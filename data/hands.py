"""From a sample's arrays to the numbers that the stages learn: parameters [330], joints in the picture, cues.

    features = HandFeatures(body, zeros, ones, basis, aspect)
    rows = hand_rows([sample.hands], features)       # params, joints, rotations, bps, visibility

Where a sample has a camera instead of a placement, forward kinematics computes the placement. A hand counts as absent
where `visibility` or its presence says so, or where more than half of its joints lie outside the picture. For a model
of several people, `people_rows` takes those of each picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..contract import BETAS, NUM_JOINTS, NUM_PARAMS, PLACEMENT, ROTATIONS
from ..hands import ABSENT, hand_params
from ..models.hand_features import HandFeatures, placement, placement_of
from ..models.smplh import HAND_JOINTS, SMPLH, rotation_6d_to_matrix
from .augment import Hands
from .samples import person

FEATURES = ("joints", "rotations", "bps", "visibility")


def plain_features(body: SMPLH, basis: Tensor, aspect: float = 1.0) -> HandFeatures:
    """HandFeatures of parameters that are not normalised. basis: [2, N, 3]; aspect: width / height of the picture."""
    return HandFeatures(body, torch.zeros(NUM_PARAMS), torch.ones(NUM_PARAMS), basis, aspect)


def present(hands: Hands) -> np.ndarray:
    """The visible hands: bool [..., 2], by `visibility` and `placement`; without either, both hands."""
    shown = np.ones((*hands["global_orient"].shape[:-1], 2), bool)
    if "placement" in hands:
        shown &= hands["placement"][..., 0] > 0.5
    if "visibility" in hands:
        shown &= hands["visibility"] > 0.5
    return shown


@torch.no_grad()
def params_of(hands: Sequence[Hands | None], body: SMPLH) -> Tensor:
    """Parameters [N, 330] float32, not normalised, of one person each. None: at rest, without visible hands."""
    people = [one if one is not None else rest() for one in hands]
    shown = np.stack([present(one) for one in people])  # [N, 2]
    out = torch.from_numpy(np.stack([hand_params({"placement": ABSENT, **one}) for one in people]))
    place = out[:, PLACEMENT].unflatten(1, (2, 4)).clone()
    filmed = [number for number, one in enumerate(people) if "placement" not in one]
    if filmed:
        rotations = rotation_6d_to_matrix(out[filmed, ROTATIONS].unflatten(1, (NUM_JOINTS, 6)))
        _, joints = body(rotations, out[filmed, BETAS])
        camera = torch.from_numpy(np.stack([people[number]["camera"] for number in filmed]))
        place[filmed] = placement_of(joints, camera, torch.ones(len(filmed), 2))
    out[:, PLACEMENT] = placement(place[..., 1:], torch.from_numpy(shown)).flatten(1)
    return out


def rest() -> Hands:
    """A person at rest who shows no hand."""
    return {
        "global_orient": np.zeros(3, np.float32),
        "body_pose": np.zeros(63, np.float32),
        "left_hand_pose": np.zeros(45, np.float32),
        "right_hand_pose": np.zeros(45, np.float32),
        "betas": np.zeros(10, np.float32),
        "placement": ABSENT,
    }


@torch.no_grad()
def joints_at_rest(body: SMPLH) -> np.ndarray:
    """The body's joints [62, 3] in the template's pose, metres."""
    return body(torch.eye(3).expand(1, NUM_JOINTS, 3, 3), torch.zeros(1, 10))[1][0].numpy().astype(np.float64)


@torch.no_grad()
def hand_rows(hands: Sequence[Hands | None], features: HandFeatures) -> dict[str, Tensor]:
    """The inputs of both stages for some people: params [N, 330], joints [N, 2, 21, 2], rotations [N, 2, 16, 6],
    bps [N, 2, 512], visibility [N, 2], float32. features: of `plain_features`."""
    params = params_of(hands, features.body)
    found = features(params)
    place = params[:, PLACEMENT].unflatten(1, (2, 4))
    off = (place[..., 0] > 0.5) & (found["visibility"] < 0.5)
    if off.any():  # a hand off the picture counts as absent, and must not share the camera
        place = placement(place[..., 1:], (place[..., 0] > 0.5) & ~off)
        params = torch.cat([params[:, : PLACEMENT.start], place.flatten(1)], 1)
        found = features(params)
    return {"params": params, **{name: found[name] for name in FEATURES}}


@torch.no_grad()
def people_rows(pictures: Sequence[Sequence[Hands | None]], features: HandFeatures, count: int) -> dict[str, Tensor]:
    """As `hand_rows` for pictures of up to `count` people each: params [N, count * 330], and of 2 * count hands joints,
    rotations, bps and visibility. features: of one person.

    People stand from left to right, by their pelvis. A person without a visible hand is absent: at rest, and last.
    """
    if count == 1:
        return hand_rows([people[0] for people in pictures], features)
    filled = [[*people, *[None] * (count - len(people))] for people in pictures]
    rows = hand_rows([one for people in filled for one in people], features)
    found = features(rows["params"])
    absent = rows["visibility"].amax(1) < 0.5
    for name, value in hand_rows([None], features).items():
        rows[name][absent] = value
    pelvis = found["camera"][:, 0] * (found["joints_3d"][:, 0, 0] + found["camera"][:, 1])
    order = torch.where(absent, torch.inf, pelvis).unflatten(0, (-1, count)).argsort(dim=1, stable=True)
    order = (order + count * torch.arange(len(pictures))[:, None]).flatten()
    ordered = {name: value[order].unflatten(0, (-1, count)) for name, value in rows.items()}
    return {name: value.flatten(1, 2) for name, value in ordered.items()}


def most_visible(hands: Hands, body: SMPLH, count: int = 1) -> list[int]:
    """The numbers of up to `count` people with the largest hands in the picture, both together; the largest first."""
    if hands["global_orient"].ndim == 1:
        return [0]
    people = [person(hands, number) for number in range(len(hands["global_orient"]))]
    place = params_of(people, body)[:, PLACEMENT].unflatten(1, (2, 4))
    size = ((place[..., 0] > 0.5) * place[..., 3].exp()).sum(1)
    return size.argsort(dim=0, descending=True, stable=True)[:count].tolist()


@torch.no_grad()
def joints_in_picture(hands: Sequence[Hands], aspects: Sequence[float], body: SMPLH) -> tuple[np.ndarray, np.ndarray]:
    """Where forward kinematics puts the joints of some people: [N, 2, 21, 2] in [0, 1] of their pictures (width /
    height: aspects), and the annotated hands: bool [N, 2]."""
    params = params_of(hands, body)
    place = params[:, PLACEMENT].unflatten(1, (2, 4))
    rotations = rotation_6d_to_matrix(params[:, ROTATIONS].unflatten(1, (NUM_JOINTS, 6)))
    joints = body(rotations, params[:, BETAS])[1][:, HAND_JOINTS, :2]  # [N, 2, 21, 2]
    camera = HandFeatures.camera(joints, place, (place[..., 0] > 0.5).float())[:, None, None]
    view = (camera[..., :1] * (joints + camera[..., 1:])).numpy()
    x = 0.5 + 0.5 * view[..., 0] / np.asarray(aspects)[:, None, None]
    return np.stack([x, 0.5 - 0.5 * view[..., 1]], -1), (place[..., 0] > 0.5).numpy()
