"""From a sample's arrays to the numbers that the stages learn: parameters [330], joints in the picture, cues.

    features = HandFeatures(body, zeros, ones, basis, aspect)
    rows = hand_rows([sample.hands], features)       # params, joints, rotations, bps, visibility

Where a sample has a camera and no placement, the placement follows by forward kinematics. A hand that is not to be
seen (by `visibility`, by a presence below a half, or because more than half of its joints lie outside) counts as absent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..contract import NUM_JOINTS, NUM_PARAMS, PLACEMENT, ROTATIONS
from ..models.hand_features import HandFeatures, placement_of
from ..models.smplh import SMPLH, rotation_6d_to_matrix
from ..runtime.hands import hand_params
from .augment import Hands
from .samples import person

NEUTRAL = (0.0, 0.0, 0.0, -0.6931)  # the placement of an absent hand, as `placement_of` has it
FEATURES = ("joints", "rotations", "bps", "visibility")


def plain_features(body: SMPLH, basis: Tensor, aspect: float = 1.0) -> HandFeatures:
    """HandFeatures of parameters that are not normalised. basis: [2, N, 3]; aspect: width / height of the picture."""
    return HandFeatures(body, torch.zeros(NUM_PARAMS), torch.ones(NUM_PARAMS), basis, aspect)


def present(hands: Hands) -> np.ndarray:
    """Which hands are to be seen: bool [..., 2]. `visibility` says it; else the placement; else both are."""
    shown = np.ones((*hands["global_orient"].shape[:-1], 2), bool)
    if "placement" in hands:
        shown &= hands["placement"][..., 0] > 0.5
    if "visibility" in hands:
        shown &= hands["visibility"] > 0.5
    return shown


@torch.no_grad()
def params_of(hands: Sequence[Hands | None], body: SMPLH) -> Tensor:
    """Parameters [N, 330] float32, not normalised, of one person each. None: at rest, with no hand to be seen."""
    rows, cameras = [], []
    for number, one in enumerate(hands):
        arrays = dict(one) if one is not None else rest()
        if "placement" not in arrays:
            cameras.append(number)
            arrays["placement"] = np.tile(np.float32(NEUTRAL), (2, 1))
        params = hand_params(arrays)
        shown = present(arrays) if number not in cameras else np.array([True, True])
        place = params[PLACEMENT].reshape(2, 4)
        params[PLACEMENT] = np.where(shown[:, None], np.column_stack([np.ones(2), place[:, 1:]]), NEUTRAL).reshape(-1)
        rows.append(params)
    out = torch.from_numpy(np.stack(rows))
    if cameras:
        some = out[cameras]
        rotations = rotation_6d_to_matrix(some[:, ROTATIONS].reshape(-1, NUM_JOINTS, 6))
        _, joints = body(rotations, some[:, 312:322])
        given = [hands[number] or {} for number in cameras]
        camera = torch.from_numpy(np.stack([one["camera"] for one in given]))
        shown = torch.from_numpy(np.stack([present(one) for one in given]))
        out[cameras, PLACEMENT] = placement_of(joints, camera, shown).flatten(1)
    return out


def rest() -> Hands:
    """A person at rest who shows no hand."""
    return {
        "global_orient": np.zeros(3, np.float32),
        "body_pose": np.zeros(63, np.float32),
        "left_hand_pose": np.zeros(45, np.float32),
        "right_hand_pose": np.zeros(45, np.float32),
        "betas": np.zeros(10, np.float32),
        "placement": np.tile(np.float32(NEUTRAL), (2, 1)),
    }


@torch.no_grad()
def hand_rows(hands: Sequence[Hands | None], features: HandFeatures) -> dict[str, Tensor]:
    """What both stages are told of some people: params [N, 330], joints [N, 2, 21, 2], rotations [N, 2, 16, 6],
    bps [N, 2, 512], visibility [N, 2], float32. features: of `plain_features`."""
    params = params_of(hands, features.body)
    found = features(params)
    place = params[:, PLACEMENT].unflatten(1, (2, 4))
    off = (place[..., 0] > 0.5) & (found["visibility"] < 0.5)
    if off.any():  # a hand off the picture is no hand of it, and no longer shares the camera
        place = torch.where(off[..., None], torch.tensor(NEUTRAL), place)
        params = torch.cat([params[:, : PLACEMENT.start], place.flatten(1)], 1)
        found = features(params)
    return {"params": params, **{name: found[name] for name in FEATURES}}


def most_visible(hands: Hands, body: SMPLH) -> int:
    """The number of the person whose hands are largest in the picture, both together; 0 where nobody's are."""
    if hands["global_orient"].ndim == 1:
        return 0
    people = [person(hands, number) for number in range(len(hands["global_orient"]))]
    place = params_of(people, body)[:, PLACEMENT].unflatten(1, (2, 4))
    return int(((place[..., 0] > 0.5) * place[..., 3].exp()).sum(1).argmax())
