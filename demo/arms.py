"""The world of the demo's hands on the human body: one or two raised arms before a coloured wall.

Scenes and captions are those of `scenes.py` and `prompts.py`; hands, sleeves, nails and skin are those of people. The
shipped demo's stage 1 can pose these hands, too.

    scene = sample_scene(np.random.default_rng(0), anatomy=HUMAN)    # of scenes.py
    render_scenes([scene], size=256).shape      # [1, 256, 256, 3]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from ..models.smplh import SMPLH
from . import gestures
from .backdrops import plain_wall, three
from .human import human_body, load_human
from .human_clothes import sample_look
from .human_gestures import hand_pose
from .human_render import Camera, Lamp, Person, render
from .scenes import LEFT_ARM, RIGHT_ARM, Anatomy, Scene, rest_of

SIZE = 256
DRAWN = tuple(frozenset(arm[2:]) for arm in (LEFT_ARM, RIGHT_ARM))  # from the elbow on


def pose(name: str, side: int, rng: np.random.Generator) -> ndarray:
    """Finger rotations [15,3,3] of a gesture, solved on this hand or plain: stage 2 meets both."""
    return (hand_pose if rng.random() < 0.5 else gestures.pose)(name, side, rng)


HUMAN = Anatomy(lru_cache(maxsize=1)(lambda: rest_of(load_human().arrays)), pose)


@torch.no_grad()
def render_scenes(scenes: Sequence[Scene], body: SMPLH | None = None, size: int = SIZE) -> Tensor:
    """Poses and draws scenes -> uint8 [N, size, size, 3]. body: the human one by default.

    A scene's skin, wall and lamp decide its sleeves and nails, too, so other hands in the same scene keep them.
    """
    return torch.stack([_draw(scene, body or human_body(), size) for scene in scenes])


def _draw(scene: Scene, body: SMPLH, size: int) -> Tensor:
    colours = np.concatenate([scene.skin, scene.background, scene.light]).astype(np.float32)
    rng = np.random.default_rng(np.frombuffer(colours.tobytes(), np.uint32))
    look = replace(sample_look(rng, scene.betas), skin=three(scene.skin))
    rotations, betas = (torch.from_numpy(np.asarray(x, np.float32))[None] for x in (scene.rotations, scene.betas))
    vertices = body(rotations, betas)[0][0].numpy()
    drawn = frozenset().union(*(DRAWN[side] for side in range(2) if scene.present[side]))
    person = Person(vertices, look, joints=drawn)
    lamp, camera = Lamp(direction=three(scene.light)), Camera(*three(scene.camera))
    return render([person], camera, lamp, plain_wall(scene.background, rng), size, int(rng.integers(2**31)))
