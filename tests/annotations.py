"""What others say of hands, made from the demo's body by formulas of this file's own: motion capture, and HaMeR."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from handiffuser.data.convert import FORMATS, Options
from handiffuser.data.files import Bad
from handiffuser.data.samples import Sample, encode_png
from handiffuser.detection.arms import LEFT
from handiffuser.models.smplh import HAND_JOINTS, SMPLH
from handiffuser.rotations import axis_angle_to_matrix

SIZE = (300, 400)  # height, width
UPRIGHT = np.diag([1.0, -1.0, -1.0])  # the template in a camera's frame


def turn(*vector: float) -> np.ndarray:
    """The rotation [3, 3] of an axis-angle."""
    return axis_angle_to_matrix(np.array([vector], float))[0]


def amass_file(path: Path, poses: np.ndarray, rate: float = 60.0, **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"poses": poses, "betas": np.zeros(16), "trans": np.zeros((len(poses), 3)), "mocap_framerate": rate}
    np.savez(path, **{**values, **more})


def standing(frames: int = 1) -> np.ndarray:
    """T-pose in AMASS's world, where z is up: the template (y up, facing z) turned a quarter about x."""
    poses = np.zeros((frames, 156))
    poses[:, 0] = np.pi / 2
    return poses


def convert(form: str, source: Path, body: SMPLH, **options) -> list[Sample | Bad]:
    return list(FORMATS[form](source, Options(body, **{"turn": 0.0, **options})))


def in_camera(body: SMPLH, side: int, orientation: np.ndarray, fingers: np.ndarray) -> np.ndarray:
    """A hand's joints [21, 3] around its wrist in a camera's frame: x right, y down, z away.

    orientation: [3, 3], from the template to that frame; fingers: [15, 3]."""
    rotations = np.tile(np.eye(3), (52, 1, 1))
    rotations[22 + 15 * side : 37 + 15 * side] = axis_angle_to_matrix(fingers)
    joints = body(torch.from_numpy(rotations).float()[None], torch.zeros(1, 10))[1][0].numpy()
    hand = joints[list(HAND_JOINTS[side])]
    return (hand - hand[0]) @ orientation.T


def hamer(path: Path, hands: list[dict], size: tuple[int, int] = SIZE, caption: str | None = "a hand") -> None:
    """A picture with estimates beside: dicts of the names that HaMeR uses, a hand each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".png").write_bytes(encode_png(np.zeros((*size, 3), np.uint8)))
    np.savez(path.with_suffix(".npz"), **{n: np.stack([h[n] for h in hands]) for n in hands[0]} if hands else {})
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def estimate(body, side, orientation, fingers, centre, box, camera) -> dict[str, np.ndarray]:
    """What HaMeR says of a hand: of a left one, what it says of the mirrored crop's right one."""
    joints = in_camera(body, side, orientation, fingers)
    s, tx, ty = camera
    matrices = axis_angle_to_matrix(fingers)
    if side == LEFT:
        m = np.diag([-1.0, 1, 1])
        joints, orientation, matrices, tx = joints @ m, m @ orientation @ m, m @ matrices @ m, -tx
    return {
        "is_right": np.float64(side), "global_orient": orientation[None], "hand_pose": matrices,
        "pred_cam": np.array([s, tx, ty]), "box_center": np.array(centre, float), "box_size": np.float64(box),
        "pred_keypoints_3d": joints, "betas": np.zeros(10),
    }  # fmt: skip
