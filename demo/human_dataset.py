"""Scenes of the demo's people as samples: captions, hands, picture and labels.

scene, captions = scene_of(seed=1, number=0)
sample = sample_of(scene, captions, "human-1-0000000", size=256)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..data.samples import Sample, encode_png
from ..hands import POSES
from ..models.hand_features import placement_of
from ..models.smplh import HAND_JOINTS
from ..rotations import matrix_to_axis_angle
from .human import human_body
from .human_prompts import is_held_out, write_caption
from .human_scenes import Scene, draw, in_picture, labels_of, sample_scene

CAPTIONS = 4  # of each picture: training learns words from those that change while the picture stays


def scene_of(
    seed: int,
    number: int,
    both: float = 0.2,
    leave_out: float = 0.05,
    held_out: bool = False,
    things: float = 0.0,
    pairs: float = 0.0,
) -> tuple[Scene, list[str]]:
    """Scene `number` of a seed, and CAPTIONS captions for it.

    The first says what people say, the next nearly all, and half of the last ones little. leave_out: how often the
    later ones leave a thing out. held_out: only combinations that are kept for tests, with any caption. things, pairs:
    shares of the scenes with a thing in a hand, and of those with two people who touch. The others do not depend on
    these shares.
    """
    rng = np.random.default_rng((seed, number))
    lot = np.random.default_rng((seed, number, 1)).random()
    kind = "things" if lot < things else "pairs" if lot < things + pairs else "people"
    scene = sample_scene(rng, both, held_out, kind=kind)
    captions: list[str] = []
    while len(captions) < CAPTIONS:
        first, last = not captions, len(captions) == CAPTIONS - 1
        brief = 0.5 if last else 0.08 if first else 0.0
        text = write_caption(scene.spec, rng, 0.35 if first else leave_out, brief)
        if held_out or not is_held_out(text):
            captions.append(text)
    return scene, captions


@torch.no_grad()
def sample_of(scene: Scene, captions: Sequence[str], key: str, size: int = 256) -> Sample:
    """A drawn scene as a sample. With two people the arrays of hands have an axis of people in front, left to
    right: visibility [2,2] and joints_2d [2,2,21,2] say whose each hand is."""
    camera = np.array([scene.camera.s, scene.camera.tx, scene.camera.ty], np.float32)
    people = []
    for pose, present in zip(scene.poses, scene.present, strict=True):
        rotations, betas = (torch.from_numpy(array)[None] for array in (pose.rotations, pose.betas))
        _, joints = human_body()(rotations, betas)
        step = pose.joints[0] - joints[0, 0].numpy()  # arrays place a body at the origin: its camera takes the step
        own = camera + np.array([0, step[0], step[1]], np.float32)
        vectors = matrix_to_axis_angle(pose.rotations).astype(np.float32)  # [52, 3]
        hands = {name: vectors[joints_of].reshape(-1) for name, joints_of in POSES.items()}
        hands |= {
            "betas": pose.betas,
            "placement": placement_of(joints, torch.from_numpy(own)[None], torch.from_numpy(present)[None])[0].numpy(),
            "camera": own,
            "visibility": present.astype(np.float32),
            "joints_2d": in_picture(pose.joints[np.array(HAND_JOINTS)], scene.camera).astype(np.float32),
        }
        people.append(hands)
    arrays = people[0] if len(people) == 1 else {name: np.stack([one[name] for one in people]) for name in people[0]}
    meta = {"source": "handiffuser demo", "licence": "Apache-2.0", "labels": labels_of(scene.spec)}
    return Sample(key, list(captions), arrays, encode_png(draw(scene, size)), meta)
