"""Hands that do not fit into one picture are found, and drawn again: each request by itself, in any company."""

from __future__ import annotations

import json

import numpy as np
import pytest
from handiffuser import HanDiffuser, Request
from handiffuser.contract import HAND_JOINTS, NUM_PARAMS, PLACEMENT
from handiffuser.hands import load_hands, save_hands
from handiffuser.runtime.clash import OVERLAP, clash, overlap
from handiffuser.runtime.outputs import OutputFolder
from handiffuser.runtime.requests import picture_key


def hands(apart: float, height: float = 0.0, depth: float = 0.0) -> np.ndarray:
    """Joints [62, 3] of two hands that point up, palms of 9 cm, their wrists so far apart."""
    joints = np.zeros((62, 3))
    for side, sign in enumerate((1, -1)):
        own = np.zeros((21, 3))
        for k in range(1, 21):
            finger, along = divmod(k - 1, 4)
            own[k] = 0.02 * (finger - 2), 0.09 + 0.025 * along, 0
        own += np.array([sign * apart / 2, sign * height / 2, sign * depth / 2])
        joints[list(HAND_JOINTS[side])] = own
        joints[18 + side] = own[0] - np.array([0, 0.25, 0])
    return joints


def params(*present: float) -> np.ndarray:
    out = np.zeros(NUM_PARAMS)
    out[PLACEMENT] = np.ravel([[one, 0, 0, 0] for one in present])
    return out


BOTH, SEEN = params(1, 1), np.ones(2)


def test_two_hands_that_lie_over_each_other_clash():
    assert overlap(hands(0.2)) == 0 and not clash(hands(0.2), SEEN, BOTH)
    assert overlap(hands(0.0)) == 1
    assert clash(hands(0.05), SEEN, BOTH) and clash(hands(0.05, depth=0.3), SEEN, BOTH), "depth has no say"
    assert overlap(hands(0.0, height=0.27)) > OVERLAP, "a hand over the other one's forearm"
    many = [overlap(hands(apart)) for apart in np.linspace(0, 0.15, 20)]
    assert many == sorted(many, reverse=True)
    assert overlap(3 * hands(0.05)) == pytest.approx(overlap(hands(0.05))), "of any size"


def test_finger_tips_may_touch():
    joints = hands(0.3)
    tip, other = HAND_JOINTS[0][8], HAND_JOINTS[1][8]  # of both index fingers, stretched to one place
    joints[tip] = joints[other] = (joints[tip] + joints[other]) / 2
    assert 0 < overlap(joints) < OVERLAP


def test_one_hand_never_clashes_and_a_lost_one_always():
    assert not clash(hands(0.0), np.array([1, 0]), params(0.9, 0.4))
    assert clash(hands(0.2), np.array([1, 0]), BOTH) and clash(hands(0.2), np.zeros(2), params(0.9, 0.7))


@pytest.fixture
def pipeline(toy_bundle, monkeypatch) -> HanDiffuser:
    """Of what it draws a half or so counts as a clash."""
    monkeypatch.setattr("handiffuser.runtime.bundle.clash", lambda joints, seen, params: bool(params[0] > -0.41))
    return HanDiffuser.load(toy_bundle, device="cpu", threads=1, batch_size=4)


def test_each_request_draws_again_by_itself(pipeline, toy_bundle):
    requests = [Request(f"prompt {n}", seed=n, hand_redraws=2, hand_solver=("ddim", "ddpm")[n % 2]) for n in range(12)]
    together = pipeline.generate(requests)
    draws = [picture.hand_draws for picture in together]
    assert set(draws) == {1, 2, 3}, "or this test says nothing"
    for picture in together:
        assert picture.hand_draws == 3 or not picture.hands["params"][0] > -0.41
    first = pipeline.generate([Request(r.prompt, seed=r.seed, hand_solver=r.hand_solver) for r in requests])
    for one, picture in zip(first, together, strict=True):
        same = np.allclose(one.hands["params"], picture.hands["params"], atol=1e-5)
        assert same == (picture.hand_draws == 1) and one.hand_draws == 1
    alone = HanDiffuser.load(toy_bundle, device="cpu", threads=1, batch_size=1)
    for request, picture in zip(requests, together, strict=True):
        (one,) = alone.generate(request)
        assert (one.id, one.hand_draws) == (picture.id, picture.hand_draws)
        np.testing.assert_allclose(one.hands["params"], picture.hands["params"], atol=1e-5)
        assert np.abs(one.image.astype(int) - picture.image).max() <= 1
    only = pipeline.hands(pipeline.prepare(requests[:4])[0])
    for picture, found in zip(together, only, strict=False):
        np.testing.assert_allclose(found["params"], picture.hands["params"], atol=1e-5)


def test_given_hands_are_never_drawn_again(pipeline, tmp_path):
    (made,) = pipeline.generate("prompt", hand_redraws=0)
    save_hands(tmp_path / "a.hands.npz", made.hands)
    for given in ("none", str(tmp_path / "a.hands.npz")):
        (picture,) = pipeline.generate("prompt", hands=given, hand_redraws=4)
        assert picture.hand_draws == 0


def test_what_is_saved_is_what_was_painted(pipeline, tmp_path):
    requests = [Request("a prompt", seed=seed, hand_redraws=2) for seed in range(6)]
    made = next(picture for picture in pipeline.generate(requests) if picture.hand_draws > 1)
    with OutputFolder(tmp_path) as folder:
        folder.save(made)
        folder.flush()
    record = json.loads((tmp_path / f"{made.id}.json").read_text())
    assert record["hand_draws"] == made.hand_draws and record["hand_redraws"] == 2
    kept = load_hands(tmp_path / f"{made.id}.hands.npz").params
    np.testing.assert_allclose(kept[322:], made.hands["params"][322:], rtol=1e-6)
    with np.load(tmp_path / f"{made.id}.hands.npz") as file:
        for name in ("left_hand_pose", "joints_2d", "vertices", "camera"):
            np.testing.assert_array_equal(file[name], made.hands[name])


def test_without_it_pictures_keep_their_names(pipeline):
    (request,), _ = pipeline.prepare([Request("a fist")])
    assert request.hand_redraws == 0, "bundles that say nothing do not draw again"
    (other,), _ = pipeline.prepare([Request("a fist", hand_redraws=1)])
    assert picture_key(request) != picture_key(other)


def test_the_demo_shows_two_thumbs_that_do_not_grow_together():
    with HanDiffuser.load("demo", device="cpu") as demo:
        before, _ = demo.prepare([Request("thumbs up", seed=seed, hand_redraws=0) for seed in (0, 1, 6)])
        after, _ = demo.prepare([Request("thumbs up", seed=seed) for seed in (0, 1, 6)])
        assert all(request.hand_redraws == 2 for request in after)
        for requests, clashes in ((before, True), (after, False)):
            for found in demo.hands(requests):
                assert clash(found["joints"], found["visibility"], found["params"]) == clashes
