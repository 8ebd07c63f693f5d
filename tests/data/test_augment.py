"""Flips and crops: twice is nothing, kinematics agree, and a rendered flip is the render of what was flipped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import made_hands, made_sample, same
from handiffuser.data.augment import (
    OTHER_JOINT,
    centre_box,
    crop_hands,
    crop_picture,
    fit_picture,
    flip,
    flip_hands,
    flip_words,
)
from handiffuser.data.hands import hand_rows, params_of, plain_features
from handiffuser.data.samples import picture
from handiffuser.demo.dataset import samples_of, scene_of
from handiffuser.demo.render import demo_body, render_scenes
from handiffuser.hands import POSES
from handiffuser.models.hand_features import make_basis
from handiffuser.models.smplh import PARENTS
from handiffuser.rotations import axis_angle_to_matrix
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def body():
    return demo_body()


def test_flip_twice_is_nothing():
    for i in range(6):
        people = None if i % 2 else 3
        sample = made_sample(i, hands=made_hands(i, people=people, camera=i % 3 == 0))
        sample.hands["joints_2d"] = np.random.default_rng(i).random((*(() if people is None else (3,)), 2, 21, 2))
        twice = flip(flip(sample))
        assert not same(sample, flip(sample))
        assert (picture(twice) == picture(sample)).all()
        assert (twice.key, twice.prompts, twice.meta) == (sample.key, sample.prompts, sample.meta)
        for name, value in sample.hands.items():
            assert np.allclose(twice.hands[name], value, atol=1e-6), name
    assert flip(made_sample(0, hands=None, image=None)).hands is None


@given(st.text(alphabet="leftrighLEFTRIGHT -'.,s", max_size=40))
def test_words_twice_are_nothing(text):
    assert flip_words(flip_words(text)) == text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a left hand and a right hand", "a right hand and a left hand"),
        ("Left hand, RIGHT thumb.", "Right hand, LEFT thumb."),
        ("the leftmost finger of a right-handed player", "the rightmost finger of a left-handed player"),
        (
            "an upright hand, copyright 2024, brightly lit, cleft",
            "an upright hand, copyright 2024, brightly lit, cleft",
        ),
        ("two hands", "two hands"),
    ],
)
def test_words_are_swapped_and_others_kept(text, wanted):
    assert flip_words(text) == wanted


def test_joints_of_the_body_are_paired():
    parents = np.array(PARENTS[1:22]) - 1  # without the pelvis; -1 is the pelvis
    other = np.array(OTHER_JOINT)
    assert (other[other] == np.arange(21)).all()
    assert all((other[p] if p >= 0 else -1) == parents[other[j]] for j, p in enumerate(parents))


def test_the_mirrored_body_stands_where_the_mirror_image_stands(body):
    """Forward kinematics of flipped arrays: every joint of the other side, x the other way round."""
    hands = {**made_hands(0, camera=True), "betas": np.zeros(10, np.float32)}

    def joints(arrays):
        vectors = np.concatenate([arrays[name].reshape(-1, 3) for name in POSES]).astype(np.float64)
        rotations = torch.from_numpy(axis_angle_to_matrix(vectors)).float()[None]
        return body(rotations, torch.zeros(1, 10))[1][0].numpy()

    plain, mirrored = joints(hands), joints(flip_hands(hands))
    other = [0, *(1 + j for j in OTHER_JOINT), *range(37, 52), *range(22, 37), *range(57, 62), *range(52, 57)]
    assert np.abs(mirrored[other] * (-1, 1, 1) - plain).max() < 2e-3  # as symmetric as the body is
    assert np.abs(mirrored - plain).max() > 0.1


@pytest.mark.parametrize("camera", [False, True])
def test_features_of_a_flip_are_the_flip_of_features(body, camera):
    features = plain_features(body, make_basis(), 1.5)
    hands = made_hands(3, camera=camera)
    plain, mirrored = (hand_rows([one], features) for one in (hands, flip_hands(hands)))
    assert plain["visibility"].sum() > 0
    shown = plain["visibility"][0] > 0.5
    moved = mirrored["joints"].flip(1)[0]
    assert torch.allclose(1 - moved[shown][..., 0], plain["joints"][0][shown][..., 0], atol=5e-3)
    assert torch.allclose(moved[shown][..., 1], plain["joints"][0][shown][..., 1], atol=5e-3)
    assert torch.equal(mirrored["visibility"].flip(1), plain["visibility"])
    assert torch.allclose(mirrored["bps"].flip(1)[0][shown], plain["bps"][0][shown], atol=3e-3)


def test_the_render_of_flipped_parameters_is_the_flipped_render(body):
    scenes = [scene_of(5, i)[0] for i in range(6)]
    prompts = [[scene.prompt] for scene in scenes]
    samples = samples_of(scenes, prompts, [f"k{i}" for i in range(6)], body, 96)
    for scene, sample in zip(scenes, samples, strict=True):
        flipped = flip(sample)
        vectors = np.concatenate([flipped.hands[name].reshape(-1, 3) for name in POSES]).astype(np.float64)
        mirrored = replace(
            scene,
            rotations=axis_angle_to_matrix(vectors).astype(np.float32),
            camera=flipped.hands["camera"],
            present=flipped.hands["visibility"] > 0.5,
            light=scene.light * np.float32([-1, 1, 1]),
        )
        drawn = render_scenes([mirrored], body, 96)[0].numpy().astype(int)
        error = np.abs(drawn - picture(flipped))
        assert error.mean() < 0.5 and (error > 24).mean() < 0.004, (error.mean(), (error > 24).mean())
        unlike = np.abs(drawn - picture(sample))
        assert unlike.mean() > 10 * error.mean()
        side = scene.spec.side
        assert flipped.meta["labels"]["side"] == {"left": "right", "right": "left", "both": "both"}[side]
        assert flipped.prompts == [flip_words(prompt) for prompt in sample.prompts]


def seen(hands, size, body):
    """Joints in the picture [2, 21, 2], in pixels, by forward kinematics."""
    features = plain_features(body, make_basis(), size[1] / size[0])
    joints = features(params_of([hands], body))["joints"][0].numpy()
    return joints * (size[1], size[0])


@pytest.mark.parametrize("camera", [False, True])
@pytest.mark.parametrize("size", [(80, 60), (60, 80), (64, 64)])
@pytest.mark.parametrize("wanted", [(32, 48), (48, 32), (50, 50)])
def test_a_crop_moves_joints_as_pixels_move(body, camera, size, wanted):
    hands = made_hands(2, camera=camera)
    hands["joints_2d"] = seen(hands, size, body).astype(np.float32) / (size[1], size[0])
    left, top, w, h = centre_box(size, wanted)
    assert w / h == pytest.approx(wanted[1] / wanted[0])
    assert left >= 0 and top >= 0 and max(w / size[1], h / size[0]) == pytest.approx(1)
    for box in ((left, top, w, h), (left - 5, top + 9, 0.8 * w, 0.8 * h)):
        cropped = crop_hands(hands, size, box)
        want = (seen(hands, size, body) - box[:2]) * wanted[0] / box[3]
        shown = hands["visibility"] > 0.5
        assert np.abs(seen(cropped, wanted, body) - want)[shown].max() < 0.02  # pixels
        assert np.abs(cropped["joints_2d"] * (wanted[1], wanted[0]) - want).max() < 0.02


def test_hands_lie_on_the_cropped_picture(body):
    """A demo scene cut to the upper two thirds of its middle: drawn joints are still on the hand."""
    scenes, prompts = zip(*(scene_of(8, i) for i in range(8)), strict=True)
    samples = samples_of(scenes, prompts, [f"k{i}" for i in range(8)], body, 128)
    for scene, sample in zip(scenes, samples, strict=True):
        image, hands = picture(sample), sample.hands
        box = (20.0, 6.0, 96.0, 100.0)
        part, moved = crop_picture(image, box, (150, 144)), crop_hands(hands, (128, 128), box)
        features = plain_features(body, make_basis(), 144 / 150)
        joints = features(params_of([moved], body))["joints"][0].numpy() * (144, 150)
        x, y = joints[hands["visibility"] > 0.5].reshape(-1, 2).T
        inside = (x >= 0) & (x < 144) & (y >= 0) & (y < 150)
        bare = np.abs(part / 255 - scene.background).max(-1)[y[inside].astype(int), x[inside].astype(int)]
        assert inside.mean() > 0.5 and (bare > 0.1).mean() > 0.8


def test_the_wanted_size_changes_nothing():
    sample = made_sample(1, (32, 48))
    image, hands = fit_picture(picture(sample), sample.hands, (32, 48))
    assert (image == picture(sample)).all()
    assert all(np.array_equal(hands[name], sample.hands[name]) for name in hands)
