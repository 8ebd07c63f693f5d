"""The demo's scenes on the human body: the same captions, drawn with real hands."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from handiffuser.data.dataset import Index
from handiffuser.data.samples import Sample, picture
from handiffuser.demo import arms, scenes
from handiffuser.demo.dataset import labels_of, make
from handiffuser.demo.human import human_body
from handiffuser.demo.prompts import Spec
from handiffuser.models.smplh import HAND_JOINTS

pytestmark = pytest.mark.usefixtures("coarse_skin")


def test_joints_are_those_of_the_human_body_and_in_the_picture():
    for seed in range(12):
        scene = scenes.sample_scene(np.random.default_rng(seed), anatomy=arms.HUMAN)
        rotations, betas = (torch.from_numpy(x)[None] for x in (scene.rotations, scene.betas))
        joints = human_body()(rotations, betas)[1][0].numpy()
        assert np.abs(joints - scenes.forward_joints(scene.rotations, scene.betas, arms.HUMAN)).max() < 1e-4
        hands = np.concatenate([joints[list(HAND_JOINTS[side]), :2] for side in range(2) if scene.present[side]])
        assert (np.abs((hands + scene.camera[1:]) * scene.camera[0]) < 1).all()


def test_a_picture_shows_the_arm_and_nothing_else_of_the_person():
    spec = Spec("right", "open_hand", "palm", "tan", "blue")
    scene = scenes.sample_scene(np.random.default_rng(3), spec, anatomy=arms.HUMAN)
    image = arms.render_scenes([scene], size=64)[0].numpy().astype(float)
    wall = image[:3].reshape(-1, 3).mean(0)
    far = np.abs(image - wall).max(-1) > 60
    seen = 0.5 + 0.5 * scene.camera[0] * (
        scenes.forward_joints(scene.rotations, scene.betas, arms.HUMAN)[[19, *HAND_JOINTS[1]], :2] + scene.camera[1:]
    )
    low, high = 64 * seen.min(0) - 6, 64 * seen.max(0) + 6
    rows, columns = np.nonzero(far)
    assert far.mean() > 0.05, "a hand is there"
    assert (columns > low[0]).all() and (columns < high[0]).all()
    assert (64 - rows > low[1]).all() and (64 - rows < high[1]).all()


def test_other_hands_in_a_scene_keep_sleeve_nails_and_skin():
    scene = scenes.sample_scene(
        np.random.default_rng(1), Spec("left", "fist", "back", "brown", "white"), anatomy=arms.HUMAN
    )
    bent = scene.rotations.copy()
    bent[22:25] = np.eye(3)  # the index finger, straight
    other = replace(scene, rotations=bent)
    one, again, moved = arms.render_scenes([scene, scene, other], size=48)
    assert (one == again).all() and not (one == moved).all()
    change = (one.int() - moved.int()).abs().amax(-1)
    assert (change > 0).float().mean() < 0.3 and (change > 60).any(), "the wall stays, grain and all; the hand does not"
    assert change[-8:].max() < 20, "the arm keeps its skin"


def test_a_dataset_of_arms_has_its_body(tmp_path):
    make(tmp_path, 2, size=48, world="arms", processes=1, both=0.0)
    index = Index.open(tmp_path)
    assert (tmp_path / "body.npz").exists() and len(index) == 2
    for number in range(2):
        sample = index.sample(number)
        assert isinstance(sample, Sample) and sample.key.startswith("arms-1-")
        assert picture(sample).shape == (48, 48, 3)
        assert set(sample.meta["labels"]) >= {"gesture", "side", "skin", "background"}
    first = picture(index.sample(0))
    make(tmp_path, 2, size=48, world="arms", processes=1, both=0.0)  # keeps what is there
    assert (picture(Index.open(tmp_path).sample(0)) == first).all()


def test_the_labels_are_those_of_the_scene():
    spec = Spec("both", "fist", "palm", "dark", "grey", "victory")
    assert labels_of(scenes.sample_scene(np.random.default_rng(0), spec, anatomy=arms.HUMAN).spec)["other"] == "victory"
