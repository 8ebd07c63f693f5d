"""The pictures to judge, read from a folder in the sample format or from a folder of plain photographs.

for shown in read_pictures(Path("out"), body=None, say=print):
    shown.image, shown.prompt, shown.hands
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from .. import shipped
from ..contract import MANIFEST
from ..data.dataset import Index
from ..data.hands import joints_in_picture
from ..data.samples import Bad, Sample, person, picture
from ..detection.convention import marks_of, mediapipe
from ..errors import EvaluationError
from ..hands import POSES
from ..kinematics import world
from ..models.foreign import MODEL_INDEX
from ..models.smplh import HAND_JOINTS, SMPLH
from ..pictures import PICTURES
from ..rotations import axis_angle_to_matrix
from ..schema import MisfitError
from .hands import Asked

SIDES = ("left", "right")
PLAIN = (*PICTURES, ".bmp", ".tif", ".tiff")
Say = Callable[[str], None]
Show = Callable[[int, int], None]  # done, in all


@dataclass
class Shown:
    """A picture and what its sample says about it."""

    key: str
    image: np.ndarray = field(repr=False)  # uint8 [H, W, 3]
    prompt: str
    hands: list[Asked] = field(repr=False)  # that it was painted from; empty where the sample has none
    labels: dict[str, str]


def kind_of(what: str) -> str:
    """What the user names: "bundle", "checkpoint" or "folder". Raises EvaluationError for anything else."""
    path = shipped.resolve(what, "bundle")
    if (path / MANIFEST).is_file():
        return "bundle"
    if (path / MODEL_INDEX).is_file():
        return "checkpoint"
    if path.is_dir():
        return "folder"
    raise EvaluationError(
        f"WHAT must be a folder, got {what}, which does not exist. Name a folder of pictures (as hd-run writes), a "
        "bundle, a checkpoint, or demo."
    )


def read_pictures(
    folder: Path, body: Path | None, say: Say, keys: Collection[str] | None = None
) -> Iterator[Shown | None]:
    """Yields the folder's pictures, or those of `keys` alone. For an unreadable one: None, and `say` has why."""
    if plain := plain_pictures(folder):
        yield from _read_plain(plain, say)
        return
    index = Index.open(folder)
    for number in range(len(index)):
        if keys is not None and index.entry(number).key not in keys:
            continue
        sample = index.sample(number)
        if isinstance(sample, Bad):
            say(f"left out: {sample}")
            yield None
            continue
        try:
            image = picture(sample)
            yield Shown(sample.key, image, sample.prompts[0], asked_hands(sample, image, body), labels_of(sample))
        except MisfitError as error:
            say(f"left out: {sample.key}: {error}")
            yield None


def count_pictures(folder: Path) -> int:
    """How many samples, or plain pictures, a folder holds. Raises DatasetError for an empty folder."""
    return len(plain_pictures(folder)) or len(Index.open(folder))


def plain_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder without shards and `.json` files: photographs without annotation."""
    if not folder.is_dir():
        return []
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    if any(path.suffix.lower() in (".json", ".tar") for path in files):
        return []
    return [path for path in files if path.suffix.lower() in PLAIN]


def _read_plain(paths: Sequence[Path], say: Say) -> Iterator[Shown | None]:
    for path in paths:
        try:
            yield Shown(path.stem, picture(Sample(path.stem, [""], None, path.read_bytes())), "", [], {})
        except (OSError, MisfitError) as error:
            say(f"left out: {path.name}: {getattr(error, 'strerror', None) or error}")
            yield None


def labels_of(sample: Sample) -> dict[str, str]:
    return {name: word for name, word in (sample.meta.get("labels") or {}).items() if isinstance(word, str)}


def asked_hands(sample: Sample, image: np.ndarray, body: Path | None) -> list[Asked]:
    """The hands that a sample shows. Without joints_2d they are posed with `body`, or with the demo's. The detector's
    convention needs such a body, too; there any will do."""
    if sample.hands is None:
        return []
    people = [person(sample.hands, number) for number in range(sample.people)]
    aspect = image.shape[1] / image.shape[0]
    loaded = _load_body(body or shipped.body_path())
    if all("joints_2d" in one and "visibility" in one for one in people):
        places = [(one["joints_2d"], one["visibility"] > 0.5) for one in people]
    else:
        joints, seen = joints_in_picture(people, [aspect] * len(people), loaded)
        places = list(zip(joints, seen, strict=True))
    return [
        Asked(name, joints[side].astype(np.float64), marks[side])
        for one, (joints, seen) in zip(people, places, strict=True)
        for marks in (marks_in(one, joints, aspect, loaded),)
        for side, name in enumerate(SIDES)
        if seen[side]
    ]


@torch.no_grad()
def marks_in(hands: dict[str, np.ndarray], places: np.ndarray, aspect: float, body: SMPLH) -> np.ndarray:
    """Where MediaPipe has the points of one person's hands, [2, 21, 2] in [0, 1]; see `convention.marks_of`."""
    vectors = np.concatenate([hands[name].reshape(-1, 3) for name in POSES]).astype(np.float64)
    rotations = axis_angle_to_matrix(vectors)
    posed, betas = torch.from_numpy(rotations).float()[None], torch.from_numpy(hands["betas"]).float()[None]
    joints = body(posed, betas)[1][0, np.array(HAND_JOINTS)].numpy().astype(np.float64)  # [2, 21, 3]
    return marks_of(joints, world(rotations), places, aspect, mediapipe().offsets)


_load_body = lru_cache(maxsize=1)(SMPLH.load)


def picture_id(key: str) -> str:
    """A sample's key as the id of a picture: dashes replace the characters that a file name cannot have."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", key)[:100] or "picture"
