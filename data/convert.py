"""From others' annotations to the sample format. docs/data.md says where files lie; `hd-data convert` runs it.

    write_shards(FORMATS["amass"](Path("AMASS"), Options(body, texts=Path("HumanML3D"))), "out")

What each format holds, and what it becomes:

amass       `.npz` with poses [N, 156] (axis-angle: pelvis, 21 body joints, 15 left, 15 right), betas; z up, metres;
            fingers relative to the flat hand. Texts as HumanML3D has them (index.csv at 20 frames a second,
            texts/*.txt), or a .txt of the same name beside. Without a picture, the person turns to the camera, framed.
motion-x    `.npy` [N, 322]: pelvis, body, left and right hand, ..., y up, fingers relative to the flat hand. Betas are
            SMPL-X's, which SMPL-H cannot use: zeros. A .txt of the same name beside, or in --texts.
mano        an `.npz` beside each picture with what HaMeR and WiLoR give: is_right, global_orient, hand_pose (matrices),
            pred_cam, box_center, box_size, pred_keypoints_3d; camera frame x right, y down, z away; a left hand as the
            right hand of the mirrored crop (see `mano`); fingers relative to the flat hand. Captions in a .txt beside.
captions    pictures with a .txt or .caption of captions beside, as kohya's trainers take them; no hands.
interhand   InterHand2.6M's json: MANO pose in the world, fingers relative to MANO's mean hand (--hand-mean), joints in
            millimetres, pinhole cameras.

The readers follow public descriptions; tests check their mathematics on made cases, not on these datasets.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..detection.arms import LEFT, RIGHT, HandEstimate, people
from ..detection.mano import FLIP_YZ, MAX_ANGLE, are_rotations, hand_means, in_picture, mano_estimates
from ..errors import DatasetError
from ..models.smplh import HAND_JOINTS, SMPLH
from ..pictures import FOREIGN, PICTURES
from ..rotations import axis_angle_to_matrix, matrix_to_axis_angle
from ..schema import MisfitError
from .captions import Caption, holding, read_captions, read_text
from .files import Bad
from .hands import joints_at_rest
from .samples import Sample, picture_size

FPS = 20.0  # HumanML3D's frames a second
# Seconds that HumanML3D cuts off the beginning of these parts of AMASS before it counts frames.
CUT = {"Eyes_Japan_Dataset": 3, "MPI_HDM05": 3, "TotalCapture": 1, "MPI_Limits": 1, "Transitions_mocap": 0.5}
Z_UP = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # (x, y, z) -> (x, z, -y)
FILL = 0.9  # of the picture's height, for a framed person
OTHER_BODIES = {165: "SMPL-X's", 72: "SMPL's, without fingers"}  # numbers a frame -> body
STILL = 1e-3  # radians: fingers that move less count as not captured


@dataclass
class Options:
    """A converter's options.

    texts: a folder of captions, if they do not lie beside the files. every: seconds between two samples of a sequence.
    frame: "person" or "hands", the content of the frame in data without a camera. turn: largest random turn of a person
    away from the camera, in degrees. hand_mean: an .npz with hands_meanl and hands_meanr [45], added to fingers that
    are relative to MANO's mean hand. body: frames people and places their arms.
    """

    body: SMPLH
    texts: Path | None = None
    every: float = 1.0
    frame: str = "person"
    turn: float = 30.0
    hand_mean: Path | None = None


Converter = Callable[[Path, Options], Iterator[Sample | Bad]]


# --- motion capture: no picture ---


def amass(source: Path, options: Options) -> Iterator[Sample | Bad]:
    """AMASS sequences, with HumanML3D's texts where `options.texts` holds its index.csv, or a .txt beside each."""
    index = _human_ml3d_index(options.texts) if options.texts is not None else None
    if index is not None:
        texts = _human_ml3d_texts(index.parent)
        for row in _rows(index):
            yield from _human_ml3d(row, source, texts, options)
        return
    for path in _files(source, ".npz"):
        if path.name in ("shape.npz", "neutral_stagei.npz", "male_stagei.npz", "female_stagei.npz"):
            continue
        key = _key(path.relative_to(source).with_suffix(""))
        try:
            captions = _captions(path, source, options.texts)
            poses, betas, rate = _amass_poses(path)
        except MisfitError as error:
            yield Bad(key, str(path), str(error))
            continue
        frames = np.arange(0, len(poses), max(1, round(options.every * rate)))
        said = [holding(captions, frame / rate) for frame in frames]
        yield from _framed(poses[frames], betas, frames, key, said, "AMASS", options, Z_UP)


def _human_ml3d_index(texts: Path) -> Path | None:
    """HumanML3D's index.csv in a folder, or beside it if the folder is HumanML3D/ or texts/."""
    inner = texts.name in ("HumanML3D", "texts")
    folders = (texts, *((texts.parent, texts.parent.parent) if inner else ()))
    return next((folder / "index.csv" for folder in folders if (folder / "index.csv").is_file()), None)


def _human_ml3d_texts(root: Path) -> Path:
    """The folder of texts. Users unpack its archive in HumanML3D/, where it lies, or beside index.csv."""
    outer = (root / "texts", root / "HumanML3D/texts")
    for folder in (*outer, *(folder / "texts" for folder in outer)):
        if next(folder.glob("*.txt"), None) is not None:
            return folder
    raise DatasetError(f"{root} has an index.csv, but lacks texts/*.txt. Unpack HumanML3D/texts.zip there.")


def _human_ml3d(row: dict[str, str], source: Path, texts: Path, options: Options) -> Iterator[Sample | Bad]:
    """One row of HumanML3D's index.csv: a part of a sequence, and the captions that hold for parts of it."""
    name = Path(row["new_name"]).stem
    relative = Path(*[part for part in Path(row["source_path"]).parts if part not in (".", "..", "pose_data")])
    path, key = source / relative.with_suffix(".npz"), _key(Path("humanml3d") / name)
    try:
        if "humanact12" in row["source_path"]:
            raise MisfitError("It must be of AMASS, got HumanAct12, which has no fingers.")
        captions = read_captions(texts / f"{name}.txt")
        poses, betas, rate = _amass_poses(path)
        start, end = int(row["start_frame"]), int(row["end_frame"])
    except MisfitError as error:
        yield Bad(key, str(path), str(error))
        return
    except (TypeError, ValueError):
        yield Bad(key, str(path), "Its start_frame and end_frame must be whole numbers.")
        return
    # HumanML3D keeps every int(rate / 20)-th frame, cuts some off the beginning, and counts the rest as 20 a second.
    step = max(1, int(rate / FPS))
    cut = next((seconds for part, seconds in CUT.items() if part in relative.parts), 0)
    counted = np.arange(0, len(poses), step)[int(cut * FPS) :][start:end]
    chosen = np.arange(0, len(counted), max(1, round(options.every * rate / step)))
    said = [holding(captions, number / FPS) for number in chosen]
    frames = counted[chosen]
    yield from _framed(poses[frames], betas, frames, key, said, "AMASS, HumanML3D", options, Z_UP)


def _amass_poses(path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """poses [N, 156], betas [10], frames a second. Raises MisfitError."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            rates = [name for name in ("mocap_framerate", "mocap_frame_rate") if name in archive]
            missing = [name for name in ("poses", "betas") if name not in archive]
            missing += [] if rates else ["mocap_framerate"]
            if missing:
                raise MisfitError(f"It must be an AMASS sequence, but lacks {', '.join(missing)}.")
            poses, betas = archive["poses"].astype(np.float64), archive["betas"].astype(np.float64)
            rate = float(archive[rates[0]])
    except MisfitError:
        raise
    except FileNotFoundError:
        raise MisfitError(f"{path} does not exist.") from None
    except Exception as error:  # numpy, zipfile and zlib fail in many ways
        raise MisfitError(
            f"It must be an AMASS sequence with poses, betas and mocap_framerate, got {_why(error)}."
        ) from None
    if poses.ndim != 2 or poses.shape[1] != 156 or not len(poses):
        other = OTHER_BODIES.get(poses.shape[-1] if poses.ndim else 0, "")
        raise MisfitError(
            f"Its poses must be SMPL-H's of shape [N, 156], got {list(poses.shape)}{f', {other}' if other else ''}. "
            "Download AMASS's SMPL+H G."
        )
    if betas.ndim != 1 or len(betas) < 10 or not 1 <= rate <= 1000:
        raise MisfitError(f"It must have 10 betas and 1 to 1000 frames a second, got {list(betas.shape)} and {rate}.")
    return poses, betas[:10], rate


def motion_x(source: Path, options: Options) -> Iterator[Sample | Bad]:
    """Motion-X sequences of 322 numbers a frame, at 30 frames a second."""
    for path in _files(source, ".npy"):
        key = _key(path.relative_to(source).with_suffix(""))
        try:
            captions = _captions(path, source, options.texts)
            motion = np.load(path, allow_pickle=False).astype(np.float64)
        except MisfitError as error:
            yield Bad(key, str(path), str(error))
            continue
        except Exception as error:
            yield Bad(key, str(path), f"It must hold plain numbers, got {type(error).__name__}.")
            continue
        if motion.ndim != 2 or motion.shape[1] != 322 or not len(motion):
            yield Bad(key, str(path), f"It must be of shape [N, 322], got {list(motion.shape)}.")
            continue
        frames = np.arange(0, len(motion), max(1, round(options.every * 30)))
        # The first 156 numbers are SMPL-H's own: pelvis, 21 body joints, 15 left, 15 right.
        said = [holding(captions, frame / 30) for frame in frames]
        yield from _framed(motion[frames, :156], np.zeros(10), frames, key, said, "Motion-X", options, np.eye(3))


def _framed(
    poses: np.ndarray,
    betas: np.ndarray,
    frames: np.ndarray,
    key: str,
    said: list[list[str]],
    source: str,
    options: Options,
    upright: np.ndarray,
) -> Iterator[Sample | Bad]:
    """Samples of axis-angle poses [N, 156], upright, turned to the camera and framed.

    said: captions of each. upright: [3, 3], from the poses' world to y up.
    """
    if not np.isfinite(poses).all() or not len(poses):
        yield Bad(key, "", "Its poses must be finite and have a frame.")
        return
    most = np.abs(poses).max()
    if most > MAX_ANGLE:
        yield Bad(key, "", f"Its poses must be in radians, got {most:g}.")
        return
    if not any(said):
        yield Bad(key, "", "No caption holds at any frame taken. Take more frames: a smaller --every.")
        return
    fingers = poses[:, 66:].reshape(-1, 2, 45).copy()
    for side, mean in enumerate(hand_means(options.hand_mean)):
        fingers[:, side] += mean
    moving = "moving" if len(fingers) > 1 and np.ptp(fingers, axis=0).max() > STILL else "still"
    pelvis = upright @ axis_angle_to_matrix(poses[:, :3])
    turned = np.stack(
        [_facing(turn, _angle(f"{key}-{f}", options.turn)) for turn, f in zip(pelvis, frames, strict=True)]
    )
    rotations = axis_angle_to_matrix(np.concatenate([poses[:, :66], fingers.reshape(-1, 90)], 1).reshape(-1, 3))
    rotations = rotations.reshape(len(poses), 52, 3, 3)
    rotations[:, 0] = turned
    for i in range(len(poses)):
        if not said[i]:
            continue
        hands = {
            "global_orient": matrix_to_axis_angle(turned[i : i + 1])[0],
            "body_pose": wrapped(poses[i, 3:66]),
            "left_hand_pose": wrapped(fingers[i, LEFT]),
            "right_hand_pose": wrapped(fingers[i, RIGHT]),
            "betas": betas,
            "camera": _camera(rotations[i], betas, options),
            "visibility": np.ones(2),
        }
        meta = {"source": source, "labels": {"fingers": moving}}
        arrays = {name: np.asarray(value, np.float32) for name, value in hands.items()}
        yield Sample(f"{key}-{frames[i]:06d}", said[i], arrays, None, meta)


def _facing(turn: np.ndarray, angle: float) -> np.ndarray:
    """A pelvis' orientation, turned about the vertical to face the camera up to `angle` radians."""
    forward = turn[:, 2]
    away = np.arctan2(forward[0], forward[2]) if np.hypot(forward[0], forward[2]) > 1e-6 else 0.0
    c, s = np.cos(angle - away), np.sin(angle - away)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]) @ turn


def _angle(key: str, most: float) -> float:
    """A random angle in radians up to `most` degrees either way, the same for the same key."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return np.deg2rad(most) * (2 * number - 1)


@torch.no_grad()
def _camera(rotations: np.ndarray, betas: np.ndarray, options: Options) -> np.ndarray:
    """(s, tx, ty) that centres the person, or the hands, in the picture."""
    _, joints = options.body(torch.from_numpy(rotations).float()[None], torch.from_numpy(betas).float()[None])
    points = joints[0, :, :2].numpy()
    if options.frame == "hands":
        points = points[[joint for side in HAND_JOINTS for joint in side]]
    low, high = points.min(0), points.max(0)
    return np.array([2 * FILL / max((high - low).max(), 0.1), *(-(low + high) / 2)])


def wrapped(vectors: np.ndarray) -> np.ndarray:
    """The same rotations with angles of at most half a turn."""
    return matrix_to_axis_angle(axis_angle_to_matrix(vectors.reshape(-1, 3))).reshape(-1)


# --- hands in pictures ---


def mano(source: Path, options: Options) -> Iterator[Sample | Bad]:
    """Pictures with an .npz of estimated hands beside each (HaMeR, WiLoR), and a .txt of captions, a line each."""
    means, rest = hand_means(options.hand_mean), joints_at_rest(options.body)
    for sample, path in _pictures(source, options, "MANO estimates"):
        try:
            if isinstance(sample, Sample):
                size = picture_size(sample)
                assert size is not None
                estimates = mano_estimates(path.with_suffix(".npz"), means, rest)
                if estimates:
                    sample.hands = people([in_picture(one, size) for one in estimates], size, rest)
            yield sample
        except ValueError as error:
            yield Bad(sample.key, str(path), str(error))
    pictures = {path.with_suffix("") for path in _files(source, *PICTURES, *FOREIGN)}
    for path in sorted(source.rglob("*.npz")):
        if path.with_suffix("") not in pictures:
            yield Bad(
                _key(path.relative_to(source).with_suffix("")),
                str(path),
                "It lacks a picture of the same name beside it.",
            )


def captions(source: Path, options: Options) -> Iterator[Sample | Bad]:
    """Pictures with a .txt or .caption beside each, as kohya's trainers take them; their hands are not annotated."""
    for sample, _ in _pictures(source, options, "captioned pictures"):
        if isinstance(sample, Sample):
            sample.meta["annotated"] = False
        yield sample


def _pictures(source: Path, options: Options, origin: str) -> Iterator[tuple[Sample | Bad, Path]]:
    """All pictures below a folder with their captions, and where they lie."""
    for path in _files(source, *PICTURES, *FOREIGN):
        key = _key(path.relative_to(source).with_suffix(""))
        try:
            if path.suffix.lower() in FOREIGN:
                raise MisfitError(f"{path.name} must be PNG, JPEG or WebP. Convert it first.")
            texts = [caption.text for caption in _captions(path, source, options.texts)]
            yield Sample(key, texts, None, path.read_bytes(), {"source": origin}), path
        except MisfitError as error:
            yield Bad(key, str(path), str(error)), path
        except OSError as error:
            yield Bad(key, str(path), f"It cannot be read: {error.strerror or error}."), path


# InterHand2.6M's joints of a hand (finger tips first, thumb to little finger, the wrist last) in our order.
INTERHAND_ORDER = (20, *(4 * finger + 3 - joint for finger in range(5) for joint in range(4)))


def interhand(source: Path, options: Options) -> Iterator[Sample | Bad]:
    """InterHand2.6M: SOURCE/annotations/SPLIT/InterHand2.6M_SPLIT_{data,camera,joint_3d,MANO_NeuralAnnot}.json and
    SOURCE/images/SPLIT/. Captions name the hands; the sequence's name is a label."""
    means, rest = hand_means(options.hand_mean), joints_at_rest(options.body)
    if options.hand_mean is None:
        raise DatasetError("InterHand2.6M's fingers are relative to MANO's mean hand: name --hand-mean SMPLH.npz.")
    splits = sorted(source.glob("annotations/*/InterHand2.6M_*_data.json"))
    if not splits:
        raise DatasetError(f"{source} has no annotations/SPLIT/InterHand2.6M_SPLIT_data.json.")
    for path in splits:
        split = path.parent.name
        data, cameras, joints, poses = (
            _json(path.with_name(f"InterHand2.6M_{split}_{name}.json"))
            for name in ("data", "camera", "joint_3d", "MANO_NeuralAnnot")
        )
        kinds = {entry["image_id"]: entry["hand_type"] for entry in data["annotations"]}
        bare = 0  # pictures of frames without fitted hands
        for image in data["images"]:
            capture, frame, camera = str(image["capture"]), str(image["frame_idx"]), str(image["camera"])
            key = _key(Path(split) / Path(image["file_name"]).with_suffix(""))
            file = source / "images" / split / image["file_name"]
            try:
                size = int(image["height"]), int(image["width"])
                world = joints[capture][frame]["world_coord"]
                parameters = poses.get(capture, {}).get(frame) or {}
                hands = [
                    _interhand_hand(side, parameters[name], np.asarray(world), cameras[capture], camera, means[side])
                    for side, name in enumerate(("left", "right"))
                    if parameters.get(name) is not None
                ]
                if not hands:
                    bare += 1
                    continue
                content = file.read_bytes()
            except (KeyError, TypeError, ValueError, IndexError) as error:
                yield Bad(key, split, f"Its annotations contradict each other: {_why(error)}.")
                continue
            except OSError as error:
                yield Bad(key, split, f"{file} cannot be read: {error.strerror or error}.")
                continue
            kind = kinds.get(image["id"], "")
            prompt = "two hands" if kind == "interacting" else f"a {kind} hand" if kind else "a hand"
            meta = {
                "source": "InterHand2.6M",
                "licence": "CC BY-NC 4.0",
                "labels": {"sequence": str(image["seq_name"])},
            }
            yield Sample(key, [prompt], people(hands, size, rest), content, meta)
        if bare:
            yield Bad("", split, f"{bare} pictures have no fitted hands.")


def _interhand_hand(
    side: int, parameters: dict[str, Any], world: np.ndarray, cameras: dict[str, Any], camera: str, mean: np.ndarray
) -> HandEstimate:
    pose = np.asarray(parameters["pose"], np.float64).reshape(16, 3)
    turn = np.asarray(cameras["camrot"][camera], np.float64).reshape(3, 3)
    focal = np.asarray(cameras["focal"][camera], np.float64)
    if not are_rotations(turn) or not (focal > 0).all():
        raise ValueError("a camera must have a rotation and a focal length above 0")
    points = world.reshape(42, 3)[(21 if side == LEFT else 0) + np.array(INTERHAND_ORDER)]  # right first
    seen = (points - np.asarray(cameras["campos"][camera])) @ turn.T  # millimetres, y down, z away
    if (seen[:, 2] <= 0).any():
        raise ValueError("a hand behind the camera")
    pixels = seen[:, :2] / seen[:, 2:] * focal + np.asarray(cameras["princpt"][camera])
    orientation = FLIP_YZ @ turn @ axis_angle_to_matrix(pose[:1])[0]
    return HandEstimate(side, orientation, pose[1:] + mean.reshape(15, 3), pixels)


FORMATS: dict[str, Converter] = {
    "amass": amass,
    "motion-x": motion_x,
    "mano": mano,
    "interhand": interhand,
    "captions": captions,
}


# --- files ---


def _files(source: Path, *suffixes: str) -> list[Path]:
    """All files below a folder with these endings, sorted. Raises DatasetError where none exists."""
    if not source.is_dir():
        raise DatasetError(f"The folder {source} does not exist.")
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not found:
        raise DatasetError(f"{source} holds no {' or '.join(suffixes)} files.")
    return found


def _key(path: Path) -> str:
    """A path as a key: without dots, which end a WebDataset key, and short enough for a shard."""
    name = path.as_posix().replace(".", "_")
    if len(name.encode()) <= 80:
        return name
    start = name.encode()[:50].decode(errors="ignore").replace("/", "-")
    return f"{start}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _captions(path: Path, source: Path, texts: Path | None) -> list[Caption]:
    """The captions in the .txt (or .caption) of the same name, beside a file or at the same place in the folder of
    texts. Raises MisfitError."""
    base = path if texts is None else texts / path.relative_to(source)
    kohya = base.with_suffix(".caption")
    return read_captions(kohya if kohya.is_file() else base.with_suffix(".txt"))


def _why(error: Exception) -> str:
    """An error in a few words: its kind, and its message if it has one."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _rows(index: Path) -> Iterator[dict[str, str]]:
    try:
        rows = csv.DictReader(io.StringIO(read_text(index), newline=""))
    except (OSError, MisfitError) as error:
        raise DatasetError(f"{index} cannot be read: {error}") from None
    wanted = {"source_path", "start_frame", "end_frame", "new_name"}
    missing = sorted(wanted - set(rows.fieldnames or ()))
    if missing:
        raise DatasetError(f"{index} is not HumanML3D's index.csv: it lacks {', '.join(missing)}.")
    yield from rows


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} cannot be read: {error}.") from None
