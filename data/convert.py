"""Others' annotations as samples: AMASS, Motion-X, per-hand estimates (HaMeR, WiLoR) and InterHand2.6M.

    for sample in FORMATS["amass"](Path("CMU"), Path("texts"), every=10):
        ...                                           # a Sample, or a Bad with what is wrong

What all have in common: SMPL-X and SMPL-H order fingers alike (index, middle, little, ring, thumb), angles are radians,
and a flat hand is 0. What differs is said at each format. The makers' files are licensed: what comes out of them is for
you alone unless their licence says otherwise. Where a layout could not be read for certain in public sources, the
docstring says so; the mathematics is tried on cases that are made up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.hands import axis_angle_to_matrix, matrix_to_axis_angle
from .samples import PICTURES, Bad, Sample

Made = Iterator[Sample | Bad]
MIRROR = np.array([1.0, -1.0, -1.0])  # of an axis-angle by x -> -x
# Camera's frame of images (x right, y down, z away) to ours (x right, y up, z towards the viewer).
TURN = np.diag([1.0, -1.0, -1.0])
# The view that motions without a camera get: from the front, the body upright, so that raised hands are seen.
FRONT_CAMERA = np.array([1.1, 0.0, 0.0], np.float32)
WRIST = {"left": 19, "right": 20}  # among the 21 joints of body_pose


def captions(folder: Path, name: str) -> list[str]:
    """Of <name>.txt: a line each; what HumanML3D writes behind "#" (tags, times) is left out."""
    path = folder / f"{name}.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return [text for line in lines if (text := line.partition("#")[0].strip())]


def vector(rotation: np.ndarray) -> np.ndarray:
    """[3, 3] -> axis-angle [3]."""
    return matrix_to_axis_angle(np.asarray(rotation, np.float64)[None])[0]


def matrix(axis_angle: np.ndarray) -> np.ndarray:
    return axis_angle_to_matrix(np.asarray(axis_angle, np.float64).reshape(1, 3))[0]


def upright(orient: np.ndarray, up: str) -> np.ndarray:
    """A body's turn in a world whose y or z axis points up -> in ours, whose y axis does."""
    if up == "y":
        return np.asarray(orient, np.float32)
    to_y = matrix(np.array([-np.pi / 2, 0, 0]))  # z -> y
    return vector(to_y @ matrix(orient)).astype(np.float32)


def body(
    orient: np.ndarray, pose: np.ndarray, left: np.ndarray, right: np.ndarray, betas: np.ndarray
) -> dict[str, np.ndarray]:
    arrays = {"global_orient": orient, "body_pose": pose, "left_hand_pose": left, "right_hand_pose": right}
    out = {name: np.asarray(value, np.float32).reshape(-1) for name, value in arrays.items()}
    out["betas"] = np.zeros(10, np.float32)
    count = min(10, np.size(betas))
    out["betas"][:count] = np.asarray(betas, np.float32).reshape(-1)[:count]
    return out


def amass(source: Path, texts: Path, every: int = 10) -> Made:
    """AMASS's .npz, SMPL-H: `poses` [N, 156] (3 root, 63 body, 45 left hand, 45 right hand), `betas`; z is up.

    Its hands are relative to a flat hand, as ours. Captions (HumanML3D's texts) are <name>.txt; a motion without any is
    left out. There is no camera: the body is seen from the front.
    """
    for path in sorted(source.rglob("*.npz")):
        key = "-".join(path.relative_to(source).with_suffix("").parts)
        prompts = captions(texts, path.stem)
        try:
            with np.load(path, allow_pickle=False) as archive:
                if "poses" not in archive:
                    continue  # shape.npz and the like
                poses, betas = np.asarray(archive["poses"]), np.asarray(archive["betas"])
            if poses.ndim != 2 or poses.shape[1] != 156:
                raise ValueError(f"its poses have the shape {list(poses.shape)}, where [N, 156] is right")
        except Exception as error:  # a bad file fails numpy, zipfile and zlib in many ways
            yield Bad(key, path.name, f"It cannot be converted: {str(error)[:200].rstrip('.')}.")
            continue
        if not prompts:
            yield Bad(key, path.name, f"It has no caption: {path.stem}.txt is missing or empty.")
            continue
        parts = (poses[:, :3], poses[:, 3:66], poses[:, 66:111], poses[:, 111:156])
        yield from _frames(key, parts, betas, prompts, every, "z")


def motion_x(source: Path, texts: Path, every: int = 10) -> Made:
    """Motion-X's .npy [N, 322]: SMPL-X root 0:3, body 3:66, left hand 66:111, right hand 111:156, jaw 156:159,
    expression 159:209, face shape 209:309, translation 309:312, betas 312:322; y is up.

    SMPL-X's body joints and hands are SMPL-H's; its betas are of another shape space and are left at 0. Captions are
    <name>.txt.
    """
    for path in sorted(source.rglob("*.npy")):
        key = "-".join(path.relative_to(source).with_suffix("").parts)
        prompts = captions(texts, path.stem)
        try:
            frames = np.load(path, allow_pickle=False)
            if frames.ndim != 2 or frames.shape[1] != 322:
                raise ValueError(f"its frames have the shape {list(frames.shape)}, where [N, 322] is right")
        except Exception as error:
            yield Bad(key, path.name, f"It cannot be converted: {str(error)[:200].rstrip('.')}.")
            continue
        if not prompts:
            yield Bad(key, path.name, f"It has no caption: {path.stem}.txt is missing or empty.")
            continue
        parts = (frames[:, :3], frames[:, 3:66], frames[:, 66:111], frames[:, 111:156])
        yield from _frames(key, parts, np.zeros(10), prompts, every, "y")


def _frames(
    key: str, parts: tuple[np.ndarray, ...], betas: np.ndarray, prompts: list[str], every: int, up: str
) -> Made:
    """parts: root, body, left hand and right hand of all frames."""
    orient, pose, left, right = parts
    for frame in range(0, len(orient), every):
        name = f"{key}-{frame:06}".replace(".", "_")
        hands = body(upright(orient[frame], up), pose[frame], left[frame], right[frame], betas)
        hands["camera"] = FRONT_CAMERA
        if not all(np.isfinite(value).all() for value in hands.values()):
            yield Bad(name, "", "Its frame holds NaN or infinity.")
            continue
        yield Sample(name, list(prompts), hands)


def one_hand(rotation: np.ndarray, fingers: np.ndarray, right: bool) -> tuple[np.ndarray, np.ndarray]:
    """A hand's turn in the camera's frame of images and its 15 joints -> (its turn in ours [3, 3], pose [45]).

    rotation: [3, 3], fingers: [15, 3, 3], of the right hand; a left one was estimated on the mirrored picture as a
    right hand, and is mirrored back: rotations R become S R S, S = diag(-1, 1, 1).
    """
    turn = TURN @ np.asarray(rotation, np.float64)
    pose = matrix_to_axis_angle(np.asarray(fingers, np.float64).reshape(15, 3, 3))
    if not right:
        flip = np.diag([-1.0, 1.0, 1.0])
        turn, pose = flip @ turn @ flip, pose * MIRROR
    return turn, pose.reshape(-1).astype(np.float32)


def full_camera(crop: np.ndarray, centre: np.ndarray, size: float, picture: tuple[int, int], right: bool) -> np.ndarray:
    """HaMeR's crop camera (s, tx, ty) -> ours (s, tx, ty) of the whole picture (height, width).

    In the crop, of `size` pixels about `centre`, a point (x, y) metres, y down, is seen at s (x + tx), s (y + ty); 1 is
    half the crop. Of a left hand the crop was mirrored. Ours counts in half heights of the picture, y up.
    """
    height, width = picture
    s, tx, ty = np.asarray(crop, np.float64)
    if not right:
        tx = -tx
    scale = s * size / height
    x, y = (2 * centre[0] - width) / height, -(2 * centre[1] - height) / height
    return np.array([scale, tx + x / scale, -ty + y / scale], np.float32)


def mano(source: Path, texts: Path, every: int = 1) -> Made:
    """Per-hand estimates beside pictures, as HaMeR and WiLoR give them, saved as <picture>.json:

    {"hands": [{"is_right": 1, "global_orient": [3, 3] or [1, 3, 3], "hand_pose": [15, 3, 3], "betas": [10], "pred_cam":
    [3], "box_center": [2], "box_size": pixels}, ...], "prompt": "..."}

    Names and conventions are those of HaMeR's `pred_mano_params` and `pred_cam`, read in its public code; how you save
    them is yours, this is the layout that is read. Rotations are absolute with respect to MANO's flat hand, in the
    camera's frame of images. The body is at rest and faces the viewer: wrists become local by the turns of the joints
    above them. Both hands share the camera of the larger one, so that the smaller one's place is as near as one arm's
    length allows.
    """
    del every
    for path in sorted(source.rglob("*.json")):
        key = "-".join(path.relative_to(source).with_suffix("").parts).replace(".", "_")
        pictures = [found for suffix in PICTURES if (found := path.with_suffix(suffix)).exists()]
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            prompts = [value["prompt"]] if value.get("prompt") else captions(texts, path.stem)
            if not prompts:
                raise ValueError("it has neither a prompt nor a caption")
            if not pictures:
                raise ValueError("there is no picture of its name beside it")
            yield Sample(key, prompts, _estimated(value["hands"], pictures[0]), pictures[0].read_bytes())
        except Exception as error:
            yield Bad(key, path.name, f"It cannot be converted: {str(error)[:200].rstrip('.')}.")


def _estimated(found: list[Mapping[str, Any]], picture: Path) -> dict[str, np.ndarray] | None:
    """SMPL-H arrays of one person from estimates of hands; the largest of each side is taken."""
    from PIL import Image

    if not found:
        return None
    with Image.open(picture) as image:
        size = image.height, image.width
    best: dict[str, Mapping[str, Any]] = {}
    for hand in sorted(found, key=lambda hand: float(np.max(hand["box_size"]))):
        best["right" if hand["is_right"] else "left"] = hand
    pose, hands, visible = np.zeros((21, 3)), {"left": np.zeros(45), "right": np.zeros(45)}, np.zeros(2, np.float32)
    for side, hand in best.items():
        turn, fingers = one_hand(
            np.reshape(hand["global_orient"], (3, 3)), np.asarray(hand["hand_pose"]), side == "right"
        )
        pose[WRIST[side]] = vector(turn)  # every joint above it is at rest
        hands[side], visible[["left", "right"].index(side)] = fingers, 1.0
    main = max(best.values(), key=lambda hand: float(np.max(hand["box_size"])))
    right = bool(main["is_right"])
    out = body(np.zeros(3), pose.reshape(-1), hands["left"], hands["right"], np.asarray(main["betas"]))
    camera = full_camera(
        main["pred_cam"], np.asarray(main["box_center"], float), float(np.max(main["box_size"])), size, right
    )
    # MANO's hand lies about its own origin, ours at the end of an arm: the wrist of the body at rest is taken there.
    wrist = rest_wrist("right" if right else "left")
    out["camera"] = np.array([camera[0], camera[1] - wrist[0], camera[2] - wrist[1]], np.float32)
    out["visibility"] = visible
    return out


def rest_wrist(side: str) -> np.ndarray:
    """Where the demo body's wrist is at rest, metres: close to SMPL-H's. MANO's own wrist lies near its origin."""
    import torch

    from ..demo.render import demo_body
    from ..models.smplh import LEFT_WRIST, RIGHT_WRIST

    _, joints = demo_body()(torch.eye(3).expand(1, 52, 3, 3), torch.zeros(1, 10))
    return joints[0, LEFT_WRIST if side == "left" else RIGHT_WRIST].numpy()


def interhand(source: Path, texts: Path, every: int = 10) -> Made:
    """InterHand2.6M's MANO annotations: {capture: {frame: {"left": {"pose": [48], "shape": [10], "trans": [3]} or null,
    "right": ...}}}, poses absolute with respect to the flat hand, in the world's frame (its y axis points down).

    Cameras and pictures are kept apart by its makers and are not read: the samples are for stage 1. Each capture's
    captions are <file's name>.txt; without any, a sentence says which hands there are.
    """
    for path in sorted(source.rglob("*.json")):
        try:
            captures = json.loads(path.read_text(encoding="utf-8"))
            frames = [(c, f, hands) for c, some in captures.items() for f, hands in some.items()]
        except Exception as error:
            yield Bad(path.stem, path.name, f"It cannot be converted: {str(error)[:200].rstrip('.')}.")
            continue
        prompts = captions(texts, path.stem)
        for capture, frame, both in frames[::every]:
            key = f"{path.stem}-{capture}-{frame}".replace(".", "_").replace("/", "_")
            try:
                yield _interhand(key, both, prompts)
            except Exception as error:
                yield Bad(key, path.name, f"It cannot be converted: {str(error)[:200].rstrip('.')}.")


def _interhand(key: str, both: Mapping[str, Any], prompts: list[str]) -> Sample:
    pose, hands, visible = np.zeros((21, 3)), {"left": np.zeros(45), "right": np.zeros(45)}, np.zeros(2, np.float32)
    betas = np.zeros(10)
    for number, side in enumerate(("left", "right")):
        hand = both.get(side)
        if not hand:
            continue
        values = np.asarray(hand["pose"], np.float64)
        if values.shape != (48,):
            raise ValueError(f"the pose of its {side} hand has the shape {list(values.shape)}, where [48] is right")
        pose[WRIST[side]] = vector(TURN @ matrix(values[:3]))
        hands[side], visible[number], betas = values[3:], 1.0, np.asarray(hand["shape"])
    if not visible.any():
        raise ValueError("it shows no hand")
    out = body(np.zeros(3), pose.reshape(-1), hands["left"], hands["right"], betas)
    out["camera"], out["visibility"] = FRONT_CAMERA, visible
    which = "two hands" if visible.all() else f"a {'left' if visible[0] else 'right'} hand"
    return Sample(key, prompts or [which], out)


FORMATS: dict[str, Callable[[Path, Path, int], Made]] = {
    "amass": amass,
    "motion-x": motion_x,
    "mano": mano,
    "interhand": interhand,
}
