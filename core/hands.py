"""Hands on disk: parameters <-> standard SMPL-H arrays, and `.hands.npz`.

    save_hands("fist.hands.npz", hands, prompt="a fist")
    hands = load_hands("fist.hands.npz")      # after editing body_pose, right_hand_pose, ... with any tool

The arrays are smplx's: axis-angle in radians with `flat_hand_mean=True`, so
`smplx.create(..., model_type="smplh", use_pca=False, flat_hand_mean=True, num_betas=10)` poses them as they are.

Where the hands are in the picture is said twice. `camera` (s, tx, ty) sees a point at s (metres + t), x to the right
and y up, +-1 over the picture's height. Bending a finger must leave the wrist and the other fingers in place, so a file
with a camera keeps it. Without a camera, `placement` says where each hand's middle is and how large the hand is.
Bending a finger then moves the whole hand a little. `placement` always says which hands are there.

With several people each array has an axis of people in front, from left to right in the picture. A person without hands
is absent.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .contract import BETAS, HAND_JOINTS, MAX_PEOPLE, NUM_JOINTS, NUM_PARAMS, PLACEMENT, ROTATIONS
from .errors import RequestError
from .rotations import axis_angle_to_matrix, matrix_to_axis_angle, rotation_6d_to_matrix
from .schema import MisfitError, read_file

# Array -> which of the 52 joints it poses.
POSES = {
    "global_orient": slice(0, 1),
    "body_pose": slice(1, 22),
    "left_hand_pose": slice(22, 37),
    "right_hand_pose": slice(37, 52),
}
# What `load_hands` reads back: array -> shape, largest magnitude that makes sense.
SHAPES: dict[str, tuple[tuple[int, ...], float]] = {
    "global_orient": ((3,), 4 * np.pi),
    "body_pose": ((63,), 4 * np.pi),
    "left_hand_pose": ((45,), 4 * np.pi),
    "right_hand_pose": ((45,), 4 * np.pi),
    "betas": ((10,), 20.0),
    "placement": ((2, 4), 10.0),
}
CAMERA = "camera"  # may be left out
# Of the arrays that hands have beside them or in the same file, for looking and editing.
SHOWN: dict[str, tuple[int, ...]] = {
    **{name: shape for name, (shape, _) in SHAPES.items()},
    CAMERA: (3,), "joints": (62, 3), "joints_2d": (2, 21, 2), "visibility": (2,),
}  # fmt: skip
MAX_CAMERA = 1e6  # of s, in half heights of the picture a metre, and of tx and ty, in metres
MAX_HANDS, MAX_ARRAY = 1 << 24, 1 << 16  # bytes of a .hands.npz, and of an array in it that is read

# The placement of a person without hands in the picture, as training has it.
ABSENT = np.array([[0.0, 0.0, 0.0, -0.6931]] * 2, np.float32)
NO_HANDS = "none"  # instead of a file's name: a picture without hands (./none is a file of this name)


def hand_arrays(params: np.ndarray) -> dict[str, np.ndarray]:
    """params [330] (not normalised) -> the arrays of SHAPES, float32. Those of several people, in a row or a row each,
    give arrays with an axis of people in front."""
    if params.size != NUM_PARAMS:
        each = [hand_arrays(one) for one in params.reshape(-1, NUM_PARAMS)]
        return {name: np.stack([one[name] for one in each]) for name in each[0]}
    vectors = matrix_to_axis_angle(rotation_6d_to_matrix(params[ROTATIONS].reshape(NUM_JOINTS, 6)))
    arrays: dict[str, np.ndarray] = {name: vectors[joints].reshape(-1) for name, joints in POSES.items()}
    arrays["betas"] = params[BETAS]
    arrays["placement"] = params[PLACEMENT].reshape(2, 4)
    return {name: np.ascontiguousarray(value, np.float32) for name, value in arrays.items()}


def hand_params(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The arrays of SHAPES -> params float32 [330], not normalised; with an axis of people in front, [people, 330]."""
    if np.ndim(arrays["global_orient"]) == 2:
        people = range(len(arrays["global_orient"]))
        return np.stack([hand_params({name: arrays[name][i] for name in SHAPES}) for i in people])
    params = np.empty(NUM_PARAMS, np.float32)
    vectors = np.concatenate([np.reshape(arrays[name], (-1, 3)) for name in POSES])
    matrices = axis_angle_to_matrix(vectors.astype(np.float64))
    params[ROTATIONS] = np.concatenate([matrices[..., 0], matrices[..., 1]], -1).reshape(-1)
    params[BETAS] = arrays["betas"]
    params[PLACEMENT] = np.reshape(arrays["placement"], -1)
    return params


def by_person(hands: dict[str, np.ndarray], num_people: int) -> dict[str, np.ndarray]:
    """The arrays of a picture with an axis of people in front, where a model knows several: it gives `params` and the
    hands of `joints_2d` and `visibility` in a row."""
    if num_people == 1:
        return hands
    rows = {"params": (-1,), "joints_2d": (2, 21, 2), "visibility": (2,)}
    return {name: value.reshape(num_people, *rows[name]) if name in rows else value for name, value in hands.items()}


def people_in(hands: Mapping[str, np.ndarray]) -> int:
    """How many people the arrays of hands hold, absent ones too."""
    return len(hands["global_orient"]) if np.ndim(hands["global_orient"]) == 2 else 1


def person(hands: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """The arrays of one of several people (number from 0); of one person as they are."""
    if np.ndim(hands["global_orient"]) == 1:
        return dict(hands)
    count = len(hands["global_orient"])
    return {name: value[number] if np.shape(value)[:1] == (count,) else value for name, value in hands.items()}


def hands_file(hands: dict[str, np.ndarray], prompt: str) -> bytes:
    """The content of a `.hands.npz`: SMPL-H arrays and whatever else `hands` holds, but not `params`.

    What a Picture has: joints [62, 3] and vertices [V, 3] in metres, joints_2d [2, 21, 2] in [0, 1] of the image,
    visibility [2], camera [3]; with several people each has an axis of people in front. Only the
    arrays of SHAPES and the camera are read back; the others are for looking at.
    """
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: value for name, value in hands.items() if name != "params"}
    np.savez_compressed(buffer, **arrays, prompt=np.array(prompt))
    return buffer.getvalue()


def save_hands(path: str | Path, hands: dict[str, np.ndarray], prompt: str = "") -> None:
    """Writes a `.hands.npz`. See `hands_file`."""
    Path(path).write_bytes(hands_file(hands, prompt))


class Hands(NamedTuple):
    """What a `.hands.npz` says: params float32 [330], not normalised, and the camera (s, tx, ty) to keep, if any.

    With several people: params [people, 330], and a camera for each, or for the first of them.
    """

    params: np.ndarray
    camera: np.ndarray | None = None

    def of(self, num_people: int) -> Hands:
        """The same hands for a model of so many people: absent people are added, or left out.

        Raises RequestError where more people than that show a hand.
        """
        if self.params.ndim == 1 and num_people == 1:
            return self
        params = self.params.reshape(-1, NUM_PARAMS)
        cameras = None if self.camera is None else self.camera.reshape(-1, 3)
        if len(params) > num_people:
            there = np.flatnonzero(params[:, PLACEMENT].reshape(-1, 2, 4)[..., 0].max(1) > 0.5)
            if len(there) > num_people:
                people = "person" if num_people == 1 else "people"
                raise RequestError(
                    f"hands must show at most {num_people} {people} with this bundle, got {len(there)}. Remove some, "
                    "or take a bundle of more people (hd-train --num-people).",
                    "hands",
                )
            rest = np.setdiff1d(np.arange(len(params)), there)
            kept = np.concatenate([there, rest])[:num_people]
            params, cameras = params[kept], None if cameras is None else cameras[kept]
        if num_people == 1:
            return Hands(params[0], None if cameras is None else cameras[0])
        return Hands(np.stack([*params, *[absent()] * (num_people - len(params))]), cameras)


def given_arrays(hands: object, *names: str) -> dict[str, np.ndarray]:
    """A copy of the hands that a program gives, which must have the arrays `names`: a dictionary, or an object with
    `arrays`, as `find_hands` yields it. Those of several people keep their axis of people in front. Raises RequestError
    for what lacks some, and for an array of SHOWN with another shape, NaN or infinity."""
    arrays, said = getattr(hands, "arrays", hands), getattr(hands, "said", ())
    if not isinstance(arrays, Mapping):
        raise RequestError(
            f"hands must be a dictionary of arrays, got {type(hands).__name__}. Take those of a picture.", "hands"
        )
    if not arrays:
        raise RequestError(f"hands must hold arrays, got none. {' '.join(said) or 'Take those of a picture.'}", "hands")
    out, people = dict(arrays), np.shape(arrays.get("global_orient", ()))[:-1]
    lead = people if len(people) == 1 and 1 < people[0] <= MAX_PEOPLE else ()
    for name in dict.fromkeys([*names, *(name for name in SHOWN if name in arrays)]):
        if name not in arrays:
            raise RequestError(
                f"hands.{name} must be given, got none. Take hands of a picture, of "
                "find_hands or of /v1/hands, and change their values.",
                f"hands.{name}",
            )
        value, shape = np.asarray(arrays[name]), (*lead, *SHOWN[name])
        if value.dtype.kind not in "fiu" or value.size != np.prod(shape) or not np.isfinite(value).all():
            got = f"{value.dtype} {list(value.shape)}" if value.size != np.prod(shape) else "NaN, infinity or no number"
            raise RequestError(
                f"hands.{name} must be finite numbers {list(shape)}, got {got}. Take hands of a picture.",
                f"hands.{name}",
            )
        out[name] = value.reshape(shape)
    return out


def load_hands(path: str | Path | bytes) -> Hands:
    """Reads the SMPL-H arrays of a `.hands.npz` (its path, or its content), and its camera where it has one. NO_HANDS
    gives absent hands.

    Raises RequestError when the file is missing or is not an `.npz` of plain numbers. Raises it also when an array is
    missing, has another shape, NaN or infinity, or values that no body has.
    """
    if str(path) == NO_HANDS:
        return Hands(absent())
    what = "The dictionary of hands" if isinstance(path, bytes) else f"The hands file {path}"
    wanted = ", ".join(f"{name}{list(shape)}" for name, (shape, _) in SHAPES.items())
    advice = f"Give an .npz as hd-run writes it, with {wanted}."
    lead: tuple[int, ...] = ()  # the axis of people
    try:
        with zipfile.ZipFile(io.BytesIO(content_of(path))) as archive:
            there = {name.removesuffix(".npy") for name in archive.namelist()}
            missing = [name for name in SHAPES if name not in there]
            if missing:
                raise RequestError(f"{what} lacks {', '.join(missing)}. {advice}")
            arrays = {name: _array(archive, name) for name in (*SHAPES, CAMERA) if name in there}
    except FileNotFoundError:
        raise RequestError(f"{what} does not exist. Check the path.") from None
    except MisfitError as error:
        raise RequestError(f"{what} cannot be read: {error} {advice}") from None
    except RequestError:
        raise
    except Exception as error:  # a bad file fails numpy, zipfile and zlib in many ways; pickles are not opened
        raise RequestError(f"{what} cannot be read as plain arrays. {advice}") from error
    if arrays["global_orient"].ndim == 2 and 1 <= len(arrays["global_orient"]) <= MAX_PEOPLE:
        lead = arrays["global_orient"].shape[:1]
    for name, value in arrays.items():
        shape, limit = SHAPES.get(name, ((3,), MAX_CAMERA))
        if name == "placement" and CAMERA in arrays:  # the camera counts, and may see a hand far off the picture
            limit = MAX_CAMERA
        if value.shape != (*lead, *shape):
            raise RequestError(f"{what} has {name} of shape {list(value.shape)}. {advice}")
        if value.dtype.kind not in "fiu":
            raise RequestError(f"{what} has {name} as {value.dtype}, not as numbers. {advice}")
        value = value.astype(np.float64)  # an integer's magnitude may not fit into its own type
        if not np.isfinite(value).all():
            raise RequestError(f"{what} has NaN or infinity in {name}. Mend or remove it.")
        if np.abs(value).max() > np.float32(limit):  # a file of float32 rounds the limit, too
            most = float(np.abs(value).max())
            raise RequestError(
                f"{name} must be at most {limit:.4g} in magnitude, got {most:g} in {what[0].lower()}{what[1:]}. "
                "Angles are in radians, places in [-1, 1] of the image."
            )
    camera = arrays.get(CAMERA)
    if camera is not None and not camera[..., 0].min() > 0:
        raise RequestError(
            f"The scale of the camera must be above 0, got {camera[..., 0].min():g} in {what[0].lower()}{what[1:]}. "
            "Mend it, or remove camera: then placement counts."
        )
    return Hands(hand_params(arrays), None if camera is None else camera.astype(np.float64))


def content_of(source: str | Path | bytes) -> bytes:
    """The content of a `.hands.npz`, or of one that was read. Raises OSError and MisfitError."""
    return source if isinstance(source, bytes) else read_file(Path(source), MAX_HANDS)


def absent() -> np.ndarray:
    """params [330] of a person at rest who shows no hand, as training has it."""
    arrays = {name: np.zeros(shape, np.float32) for name, (shape, _) in SHAPES.items()}
    arrays["placement"][:, 3] = np.log(0.5)
    return hand_params(arrays)


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of an .npz. numpy's own reader of archives would unpack members of any size."""
    member = archive.getinfo(f"{name}.npy")
    if member.file_size > MAX_ARRAY:
        raise MisfitError(f"Its {name} is larger than {MAX_ARRAY >> 10} KB.")
    value = np.load(io.BytesIO(archive.read(member)), allow_pickle=False)
    if not isinstance(value, np.ndarray):
        raise ValueError("an archive in an archive")
    return value


def keep_camera(hands: Hands, joints: np.ndarray) -> np.ndarray:
    """params [330] with the placement that the camera of `hands` sees, so that the same camera follows from it.

    joints: [62, 3] metres, what `hand_features` gives for these params; their place in the picture does not matter.
    With several people each has params and joints, and the first of them, or all, a camera.
    The inverse of `HandFeatures.camera`, which clips sizes to 1/400 to 20 half heights of the picture.
    """
    assert hands.camera is not None
    if hands.params.ndim == 2:
        seen = zip(hands.params, hands.camera, joints, strict=False)  # people without a camera are absent
        placed = [keep_camera(Hands(params, camera), own) for params, camera, own in seen]
        return np.stack([*placed, *hands.params[len(placed) :]])
    params, scale, shift = hands.params.copy(), hands.camera[0], hands.camera[1:]
    placement = params[PLACEMENT].reshape(2, 4).astype(np.float64)
    present = placement[:, 0] > 0.5
    points = joints[np.array(HAND_JOINTS), :2].astype(np.float64)  # [2, 21, 2]
    centre = points.mean(1)
    radius = np.sqrt(np.maximum(np.square(points - centre[:, None]).sum(-1).mean(-1), 1e-8))
    placement[~present, 1:] = placement[~present, 1:].clip(-10, 10)
    placement[present, 1:3] = (scale * (centre + shift))[present]
    placement[present, 3] = np.log(scale * radius)[present]
    # An absent hand has a weight of one in ten thousand. The present hand makes up for it.
    share = present + 1e-4
    share = share / share.sum()
    ours = share[present].sum()
    if ours:
        placement[present, 3] += (np.log(scale) - (share * (placement[:, 3] - np.log(radius))).sum()) / ours
        off = shift - (share[:, None] * (placement[:, 1:3] / scale - centre)).sum(0)
        placement[present, 1:3] += scale * off / ours
    params[PLACEMENT] = placement.reshape(-1)
    return params
