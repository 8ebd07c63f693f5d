"""Small datasets for tests: samples that differ from each other in everything."""

from __future__ import annotations

import numpy as np
from handiffuser.data.samples import Sample, encode_png


def made_hands(seed: int, people: int | None = None, camera: bool = False) -> dict[str, np.ndarray]:
    """SMPL-H arrays: one hand near the middle of the picture, or with a camera both; of several people with an axis in
    front."""
    rng = np.random.default_rng((7, seed))
    lead = () if people is None else (people,)

    def random(size: int, spread: float) -> np.ndarray:
        return rng.normal(0, spread, (*lead, size)).astype(np.float32)

    out = {
        "global_orient": random(3, 0.3),
        "body_pose": random(63, 0.2),
        "left_hand_pose": random(45, 0.4),
        "right_hand_pose": random(45, 0.4),
        "betas": random(10, 0.5),
        "visibility": np.broadcast_to(np.float32([1, 1] if camera else [1 - seed % 2, seed % 2]), (*lead, 2)).copy(),
    }
    if camera:
        out["camera"] = np.concatenate([np.abs(random(1, 0.1)) + 0.6, random(2, 0.1)], -1)
    else:
        place = np.concatenate([random(2, 0.2), random(1, 0.1) - 1.5, random(2, 0.2), random(1, 0.1) - 1.5], -1)
        place = np.concatenate([np.ones((*lead, 2, 1), np.float32), place.reshape(*lead, 2, 3)], -1)
        absent = np.concatenate([np.zeros((*lead, 2, 1), np.float32), place[..., ::-1, 1:]], -1)  # beside the other
        out["placement"] = np.where(out["visibility"][..., None] > 0, place, absent).astype(np.float32)
    return out


def made_sample(i: int, size: tuple[int, int] = (32, 48), **more) -> Sample:
    """A sample with noise for a picture (height, width). more: other fields of Sample."""
    rng = np.random.default_rng((5, i))
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    side = ("left", "right")[i % 2]
    fields = {
        "prompts": [f"a {side} hand, number {i}", f"{side}, {i}"],
        "hands": made_hands(i, camera=i % 3 == 0),
        "image": encode_png(image),
        "meta": {"source": "a test", "labels": {"side": side}},
    }
    return Sample(f"key-{i:04d}", **{**fields, **more})


def same(a: Sample, b: Sample) -> bool:
    """Whether two samples are equal in everything."""
    if (a.key, a.prompts, a.image, a.meta) != (b.key, b.prompts, b.image, b.meta):
        return False
    if a.hands is None or b.hands is None:
        return a.hands is b.hands
    return a.hands.keys() == b.hands.keys() and all((a.hands[name] == b.hands[name]).all() for name in a.hands)
