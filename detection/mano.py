"""Estimated hands in an .npz, as HaMeR, WiLoR and WiLoR-mini give them, and their places in the picture.

    hands = [in_picture(one, size) for one in mano_estimates(Path("photo-0001.npz"), means, rest)]

These programs estimate a left hand as the right hand of the mirrored crop. Some mirror it back before they save it, in
part or in whole: HaMeR's demo negates tx in place, WiLoR's on a CPU the joints as well, and WiLoR-mini mirrors all.
Forward kinematics shows whether pose and joints are mirrored: only one reading of them fits together. tx follows from
the box, because a crop has its hand in the middle; `pred_cam_t` states it exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..contract import HAND_JOINTS
from ..errors import DatasetError
from ..kinematics import forward, radius
from ..rotations import axis_angle_to_matrix, matrix_to_axis_angle
from .arms import MIRROR, RIGHT, HandEstimate, Size

FLIP_YZ = np.diag([1.0, -1.0, -1.0])  # from a camera frame with y down and z away to ours
# Array -> shape of one hand's. Rotations may be axis-angles as well.
ARRAYS: dict[str, tuple[int, ...]] = {
    "is_right": (), "global_orient": (3, 3), "hand_pose": (15, 3, 3), "pred_cam": (3,), "box_center": (2,),
    "box_size": (), "pred_keypoints_3d": (21, 3),
}  # fmt: skip
CAMERA_T = "pred_cam_t"  # optional, [3]: tx, ty of the crop's camera, which the demos do not change in place
ROTATION = 0.02  # largest error of a rotation matrix: half precision is within 0.005
MAX_ANGLE = 4 * np.pi  # radians of an axis-angle: more are degrees
HAND = (0.01, 0.5)  # metres: a hand's size, see `radius`
MIRRORED = 0.7  # joints count as mirrored if mirroring reduces their distance from the pose to this share
BESIDE, CENTRED = 0.2, 0.4  # halves of the box: a hand's allowed and usual distance from its middle


@dataclass
class Estimate:
    """A hand in the camera's frame: x right, y down, z away. A left one is mirrored back."""

    side: int
    turn: np.ndarray  # [3, 3]
    fingers: np.ndarray  # [15, 3] axis-angle
    keypoints: np.ndarray  # [21, 3] metres
    camera: np.ndarray  # [3] of the crop: s, tx, ty
    centre: np.ndarray  # [2] pixels
    box: float  # pixels


def mano_estimates(path: Path, means: tuple[np.ndarray, np.ndarray], rest: np.ndarray) -> list[Estimate]:
    """The hands in an .npz (H of them): is_right [H], global_orient [H, 3, 3], hand_pose [H, 15, 3, 3] (or axis-angle
    [H, 3], [H, 45]), pred_cam [H, 3], box_center [H, 2], box_size [H], pred_keypoints_3d [H, 21, 3]; perhaps pred_cam_t
    [H, 3]. means: added to the fingers, [45] of the left and the right hand. rest: [62, 3] joints of a body, metres.
    Raises ValueError with a sentence."""
    held = _read(path)
    if not held:
        return []
    out = []
    for i in range(len(held["is_right"])):
        side = int(held["is_right"][i])
        one = Estimate(
            RIGHT, held["global_orient"][i], held["hand_pose"][i], held["pred_keypoints_3d"][i], held["pred_cam"][i],
            held["box_center"][i], float(held["box_size"][i]),
        )  # fmt: skip
        if side != RIGHT:
            told = held[CAMERA_T][i, 0] if CAMERA_T in held else None
            one = _left(one, told, rest, f"{path.name}: hand {i + 1} (left)")
        vectors = matrix_to_axis_angle(one.fingers) + means[side].reshape(15, 3)
        out.append(replace(one, fingers=vectors))
    return out


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays [H, ...], rotations as matrices; none of an empty file. Raises ValueError."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            held = {name: archive[name].astype(np.float64) for name in (*ARRAYS, CAMERA_T) if name in archive}
    except FileNotFoundError:
        raise ValueError(f"It lacks {path.name} with its hands. Write an empty .npz if it shows no hands.") from None
    except Exception as error:
        raise ValueError(
            f"{path.name} must be an .npz of plain numbers, got {type(error).__name__}. Save it again."
        ) from None
    if not held:
        return {}
    missing = [name for name in ARRAYS if name not in held]
    if missing:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}.")
    count = held["is_right"].size
    if count == 1 < held["box_size"].size:
        raise ValueError(
            f"{path.name} must have an is_right for each of {held['box_size'].size} hands, got 1: the loop of HaMeR's "
            "demo overwrites it. "
            'Save batch["right"].'
        )
    for name, value in held.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{name} in {path.name} must be finite, got NaN or infinity.")
    for name, joints in (("global_orient", 1), ("hand_pose", 15)):
        if held[name].size == count * joints * 3:
            most = np.abs(held[name]).max(initial=0)
            if most > MAX_ANGLE:
                raise ValueError(f"{name} in {path.name} must be in radians, got {most:g}.")
            held[name] = axis_angle_to_matrix(held[name].reshape(-1, 3))
    for name, value in held.items():
        shape = ARRAYS.get(name, (3,))
        if value.size != count * int(np.prod(shape)):
            raise ValueError(f"{name} in {path.name} must be of shape {[count, *shape]}, got {list(value.shape)}.")
        held[name] = value.reshape(count, *shape)
    _make_sense(held, path.name)
    return held


def _make_sense(held: dict[str, np.ndarray], name: str) -> None:
    """Raises ValueError for numbers that cannot be estimates."""
    for array in ("global_orient", "hand_pose"):
        if not are_rotations(held[array]):
            raise ValueError(f"{array} in {name} must hold rotations, got another matrix.")
    if not np.isin(held["is_right"], (0, 1)).all():
        raise ValueError(f"is_right in {name} must be 0 or 1.")
    for array, values in (("pred_cam", held["pred_cam"][:, 0]), ("box_size", held["box_size"])):
        if (values <= 0).any():
            raise ValueError(f"The scale in {array} of {name} must be above 0, got {values.min():g}.")
    sizes = radius(held["pred_keypoints_3d"])
    for size in sizes[(sizes < HAND[0]) | (sizes > HAND[1])]:
        raise ValueError(
            f"pred_keypoints_3d in {name} must be of a hand of {HAND[0]} to {HAND[1]} metres, got {size:.3g}."
        )


def are_rotations(matrices: np.ndarray) -> bool:
    """Whether all matrices [..., 3, 3] are rotations: neither zero nor scaled nor reflections."""
    off = np.abs(matrices @ matrices.swapaxes(-1, -2) - np.eye(3))
    return bool((off <= ROTATION).all() and (np.linalg.det(matrices) > 0).all())


def _left(one: Estimate, told: float | None, rest: np.ndarray, name: str) -> Estimate:
    """A saved left hand, mirrored back where its program did not. fingers: matrices [15, 3, 3]. told: tx in the
    mirrored crop, if the file states it. Raises ValueError."""
    turns, fingers = ([x, MIRROR @ x @ MIRROR] for x in (one.turn, one.fingers))

    def shape(joints: np.ndarray) -> np.ndarray:
        return (joints - joints.mean(0)) / radius(joints)

    # The pose read as the right hand of the mirrored crop, and as one already mirrored back.
    posed = [shape(_posed(turns[back], fingers[back], rest)) for back in (0, 1)]
    apart = {
        (pose, joints): float(radius_of(posed[pose] - shape(one.keypoints @ (MIRROR if joints else np.eye(3)))))
        for pose in (0, 1)
        for joints in (0, 1)
    }
    best = min(apart, key=apart.__getitem__)
    pose, joints = best if apart[best] < MIRRORED * apart[0, 0] else (0, 0)
    s, tx, ty = one.camera
    # From here on as in the picture: a left hand's pose, joints not mirrored.
    keypoints = one.keypoints if joints else one.keypoints @ MIRROR
    tx = -told if told is not None else tx if joints else -tx
    middle = (keypoints[:, 0].min() + keypoints[:, 0].max()) / 2
    beside, other = abs(s * (middle + tx)), abs(s * (middle - tx))
    if told is None and other < CENTRED and beside > other + BESIDE:
        raise ValueError(
            f"{name} must lie within its box; it does with the other sign of tx, which HaMeR's demo negates in "
            'place. Save out["pred_cam"].clone() right after the model, and pred_cam_t.'
        )
    return replace(one, side=0, turn=turns[1 - pose], fingers=fingers[1 - pose], keypoints=keypoints,
                   camera=np.array([s, tx, ty]))  # fmt: skip


def _posed(turn: np.ndarray, fingers: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """A right hand's joints [21, 3] in metres; its wrist stays where it is at rest."""
    rotations = np.tile(np.eye(3), (52, 1, 1))
    rotations[21], rotations[37:] = turn, fingers
    return forward(rotations, rest)[1][list(HAND_JOINTS[RIGHT])]


def radius_of(differences: np.ndarray) -> np.ndarray:
    """Root mean square length of vectors [N, D]."""
    return np.sqrt(np.square(differences).sum(-1).mean())


def in_picture(estimate: Estimate, size: Size) -> HandEstimate:
    """From the crop's weak-perspective camera to pixels of the picture: a point (X, Y) of the crop's frame is at
    centre + box / 2 * s * (X + tx, Y + ty) (the near-affine limit of HaMeR's cam_crop_to_full)."""
    s, tx, ty = estimate.camera
    pixels = estimate.centre + estimate.box / 2 * s * (estimate.keypoints[:, :2] + (tx, ty))
    return HandEstimate(estimate.side, FLIP_YZ @ estimate.turn, estimate.fingers, pixels)


def hand_means(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """MANO's mean left and right hand [45], from the user's body file; zeros without one."""
    if path is None:
        return np.zeros(45), np.zeros(45)
    try:
        with np.load(path, allow_pickle=False) as archive:
            left, right = (archive[f"hands_mean{side}"].astype(np.float64).reshape(45) for side in "lr")
    except Exception as error:
        raise DatasetError(
            f"{path} must hold hands_meanl and hands_meanr of 45 numbers, got {type(error).__name__}. "
            "Make it: hd-body convert SMPLH.pkl OUT.npz"
        ) from None
    return left, right
