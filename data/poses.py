"""What the hands of a dataset do, as the prior of `detection.fit`: `hd-data poses FOLDER OUT.npz`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..detection.fit import angles_of
from ..detection.poses import Poses
from ..errors import DatasetError
from ..models.smplh import SMPLH
from .dataset import Index
from .hands import joints_at_rest, present
from .samples import Bad, person

FEWEST = 8  # hands that make a gesture, and hands that make a prior


def poses_of(folder: Path, body: SMPLH, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Poses:
    """The prior of a dataset's visible hands. Labels name their gestures: `gesture`, and `other` for the right hand
    of two that differ. Hands without a label, and of gestures with fewer than FEWEST hands, have no name.

    on_progress: called with (samples done, in all). Raises DatasetError for a dataset with fewer than FEWEST hands."""
    index, rest = Index.open(folder), joints_at_rest(body)
    names: list[str] = []
    angles: list[np.ndarray] = []
    for number in range(len(index)):
        sample = index.sample(number)
        on_progress(number + 1, len(index))
        if isinstance(sample, Bad) or sample.hands is None:
            continue
        labels = sample.meta.get("labels") or {}
        for k in range(sample.people):
            one, first = person(sample.hands, k), "second " if k else ""
            for side in np.flatnonzero(present(one)).tolist():
                name = labels.get(f"{first}other" if side else f"{first}gesture") or labels.get(f"{first}gesture")
                fingers = one[("left_hand_pose", "right_hand_pose")[side]].reshape(15, 3)
                names.append(name if isinstance(name, str) else "")
                angles.append(angles_of(fingers, rest, side))
    if len(angles) < FEWEST:
        raise DatasetError(f"{folder} must show at least {FEWEST} hands, got {len(angles)}. Name a larger dataset.")
    counts = Counter(names)
    return Poses.made([name if counts[name] >= FEWEST else "" for name in names], np.stack(angles))
