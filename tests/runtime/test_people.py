"""A bundle of two people: hands have an axis of people in front, in results, files, and hands that are given."""

from __future__ import annotations

import numpy as np
import pytest
from handiffuser import HanDiffuser, Request, RequestError
from handiffuser.contract import BUNDLE_FORMAT, Manifest
from handiffuser.editing import Drag, edit, mirrored, moved
from handiffuser.hands import NO_HANDS, Hands, by_person, hand_arrays, keep_camera, load_hands, person, save_hands
from handiffuser.runtime.clash import clash
from handiffuser.runtime.outputs import OutputFolder
from handiffuser.runtime.rest import joints_at_rest


@pytest.fixture(scope="module")
def pipeline(pair_bundle) -> HanDiffuser:
    return HanDiffuser.load(pair_bundle, device="cpu", threads=1, batch_size=3)


SHAPES = {
    "params": (330,), "global_orient": (3,), "body_pose": (63,), "left_hand_pose": (45,), "right_hand_pose": (45,),
    "betas": (10,), "placement": (2, 4), "joints": (62, 3), "joints_2d": (2, 21, 2), "vertices": (5, 3),
    "visibility": (2,), "camera": (3,),
}  # fmt: skip


def test_hands_have_an_axis_of_people(pipeline, tmp_path):
    first, second = pipeline.generate(["two people", "a fist"], steps=2)
    for one in (first, second):
        assert {name: value.shape for name, value in one.hands.items()} == {n: (2, *s) for n, s in SHAPES.items()}
        assert abs(one.hands["params"][0] - one.hands["params"][1]).max() > 0.1
    with OutputFolder(tmp_path) as folder:
        folder.save(first)
        folder.flush()
    loaded = load_hands(tmp_path / f"{first.id}.hands.npz")
    assert loaded.params.shape == (2, 330) and loaded.camera.shape == (2, 3)
    np.testing.assert_allclose(hand_arrays(loaded.params)["placement"], first.hands["placement"], atol=1e-6)
    (again,) = pipeline.generate("others", steps=2, hands=tmp_path / f"{first.id}.hands.npz")
    np.testing.assert_allclose(again.hands["right_hand_pose"], first.hands["right_hand_pose"], atol=1e-5)
    (array,) = pipeline.generate("others", steps=2, hands=first.hands)
    assert (array.image == again.image).all(), "the arrays are as good as their file"
    (alone,) = pipeline.generate("a fist", steps=2)
    assert np.abs(alone.image.astype(int) - second.image).max() <= 1


def test_a_file_of_one_person_is_the_first_of_two(pipeline, toy_bundle, tmp_path):
    (one,) = HanDiffuser.load(toy_bundle, device="cpu", threads=1).generate("a fist", steps=2)
    given = {name: value for name, value in one.hands.items() if name != "camera"}
    given["placement"] = np.float32([[1, 0, 0, -1], [1, 0.5, 0, -1]])
    save_hands(tmp_path / "one.hands.npz", given)
    (found,) = pipeline.hands(pipeline.prepare([Request("a", hands=str(tmp_path / "one.hands.npz"))])[0])
    np.testing.assert_allclose(found["left_hand_pose"][0], given["left_hand_pose"], atol=1e-5)
    np.testing.assert_allclose(found["placement"][:, :, 0], [[1, 1], [0, 0]], atol=1e-6)
    assert np.abs(found["body_pose"][1]).max() < 1e-6
    (none,) = pipeline.hands(pipeline.prepare([Request("a", hands=NO_HANDS)])[0])
    assert not none["placement"][..., 0].round(5).any()


def test_a_bundle_takes_as_many_people_as_it_knows():
    params = np.random.default_rng(0).normal(size=(3, 330)).astype(np.float32)
    params[:, 322:330] = 1.0
    params[1, [322, 326]] = 0.0
    camera = np.arange(9.0).reshape(3, 3) + 1
    two = Hands(params, camera).of(2)
    assert (two.params == params[[0, 2]]).all() and (two.camera == camera[[0, 2]]).all(), "the absent one is left out"
    with pytest.raises(RequestError, match=r"hands must show at most 1 person with this bundle, got 2\. Remove some"):
        Hands(params).of(1)
    one = Hands(params[:2], camera[:2]).of(1)
    assert (one.params == params[0]).all() and (one.camera == camera[0]).all()
    four = Hands(params, camera).of(4)
    assert four.params.shape == (4, 330) and len(four.camera) == 3
    assert (four.params[3] == load_hands(NO_HANDS).params).all()
    joints = np.random.default_rng(1).normal(size=(4, 62, 3))
    kept = keep_camera(four, joints)
    for i in range(3):
        assert (kept[i] == keep_camera(Hands(params[i], camera[i]), joints[i])).all()
    assert (kept[3] == four.params[3]).all()


def test_each_person_clashes_alone():
    """Hands of one person that lie over each other are drawn again; those of two people may touch."""
    joints, params = np.zeros((2, 62, 3)), np.zeros((2, 330))
    rng = np.random.default_rng(0)
    joints[:] = rng.normal(size=(62, 3))
    params[:, 322] = 1  # a left hand each, at one place
    assert not clash(joints, np.ones(4), params.reshape(-1))
    params[1, 326] = 1
    visible = np.ones((2, 2))
    visible[1, 1] = 0
    assert clash(joints, visible, params)


def test_editing_changes_one_person(pipeline):
    (picture,) = pipeline.generate("two people", steps=1)
    hands = {name: value.copy() for name, value in picture.hands.items()}
    changed = edit(hands, [Drag("left", 8, 0.4, 0.4)], ("right", "fist"), person=1)
    wanted = edit(person(hands, 1), [Drag("left", 8, 0.4, 0.4)], ("right", "fist"))
    for name, value in wanted.items():
        np.testing.assert_array_equal(changed[name][1], value)
        np.testing.assert_array_equal(changed[name][0], hands[name][0])
    assert np.abs(moved(hands, scale=2.0)["camera"][0] - hands["camera"][0]).max() > 0.1
    turned = mirrored(hands)
    np.testing.assert_array_equal(turned["left_hand_pose"][0], mirrored(person(hands, 1))["left_hand_pose"])
    with pytest.raises(RequestError, match="person must be a whole number from 0 to 1 for these hands, got 2"):
        edit(hands, person=2)
    with pytest.raises(RequestError, match="from 0 to 0 for these hands, got 1"):
        edit(person(hands, 0), person=1)


def test_the_manifest_says_how_many(pair_bundle, toy_bundle):
    pair, toy = Manifest.load(pair_bundle), Manifest.load(toy_bundle)
    assert (pair.num_people, pair.format) == (2, BUNDLE_FORMAT) and (toy.num_people, toy.format) == (1, 2)
    assert "num_people" not in (toy_bundle / "manifest.json").read_text(), "as earlier versions wrote it"
    assert joints_at_rest(pair_bundle).shape == (62, 3)
    row = {"params": np.zeros(660), "joints_2d": np.zeros((4, 21, 2)), "visibility": np.zeros(4)}
    assert {name: value.shape[0] for name, value in by_person(row, 2).items()} == dict.fromkeys(row, 2)
