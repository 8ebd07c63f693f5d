"""Kinematics, the derived camera and the hand cues."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from handiffuser.contract import HAND_JOINTS, NUM_PARAMS, PLACEMENT
from handiffuser.errors import CheckpointError
from handiffuser.models.hand_features import HandFeatures, make_basis, pack, placement, placement_of, presence
from handiffuser.models.smplh import SMPLH, matrix_to_rotation_6d, rotation_6d_to_matrix


@pytest.fixture(scope="module")
def body(body_path: Path) -> SMPLH:
    return SMPLH.load(body_path)


@pytest.fixture(scope="module")
def features(body: SMPLH) -> HandFeatures:
    return HandFeatures(body, torch.zeros(NUM_PARAMS), torch.ones(NUM_PARAMS), make_basis(64))


def random_rotations(batch: int, amount: float = 0.4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.matrix_exp(
        torch.stack([skew(v) for v in amount * torch.randn(batch * 52, 3, generator=generator)])
    ).view(batch, 52, 3, 3)


def skew(v: torch.Tensor) -> torch.Tensor:
    x, y, z = v.tolist()
    return torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0.0]])


def test_rotation_6d_round_trip():
    matrices = random_rotations(3, 1.5)
    torch.testing.assert_close(rotation_6d_to_matrix(matrix_to_rotation_6d(matrices)), matrices, atol=1e-5, rtol=0)
    skewed = rotation_6d_to_matrix(torch.randn(50, 6))
    torch.testing.assert_close(skewed @ skewed.mT, torch.eye(3).expand(50, 3, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("present", [(1, 0), (0, 1), (1, 1)])
def test_camera_comes_back_from_placement(body, features, present):
    rotations, betas = random_rotations(4), 0.5 * torch.randn(4, 10)
    _, joints = body(rotations, betas)
    camera = torch.tensor([[4.0, -0.5, -0.2]]).repeat(4, 1) * torch.linspace(0.8, 1.2, 4)[:, None]
    shown = torch.tensor(present).float().expand(4, 2)
    out = features(pack(rotations, betas, placement_of(joints, camera, shown)))
    torch.testing.assert_close(out["camera"], camera, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(out["joints_3d"], joints, atol=1e-5, rtol=1e-4)


def test_joints_are_image_coordinates(body, features):
    """A hand placed in the right half and above the middle is there, at the size that was asked for."""
    rotations = random_rotations(1)
    placement = torch.tensor([[[1.0, 0.4, 0.3, np.log(0.25)], [0, 0, 0, np.log(0.5)]]], dtype=torch.float32)
    out = features(pack(rotations, torch.zeros(1, 10), placement))
    left = out["joints"][0, 0]
    centre = left.mean(0)
    torch.testing.assert_close(centre, torch.tensor([0.5 + 0.2, 0.5 - 0.15]), atol=1e-3, rtol=0)
    size = (2 * (left - centre)).square().sum(-1).mean().sqrt()
    assert abs(size.item() - 0.25) < 1e-3
    assert out["visibility"][0].tolist() == [1.0, 0.0]


def test_a_wide_image_keeps_proportions(body):
    wide = HandFeatures(body, torch.zeros(NUM_PARAMS), torch.ones(NUM_PARAMS), make_basis(8), aspect=2.0)
    square = HandFeatures(body, torch.zeros(NUM_PARAMS), torch.ones(NUM_PARAMS), make_basis(8))
    placement = torch.tensor([[[1.0, 0.0, 0.0, -1.0], [0, 0, 0, 0]]])
    x = pack(random_rotations(1), torch.zeros(1, 10), placement)
    one, other = square(x)["joints"][0, 0] - 0.5, wide(x)["joints"][0, 0] - 0.5
    torch.testing.assert_close(other * torch.tensor([2.0, 1.0]), one, atol=1e-5, rtol=0)


def test_a_portrait_shows_the_hands_that_a_square_shows(features):
    """No hand lands outside more often: the camera moves, and goes away where two hands are far apart."""
    generator = torch.Generator().manual_seed(5)
    count = 64
    places = torch.rand(count, 2, 4, generator=generator) * torch.tensor([1, 1.8, 1.2, 1.5]) - torch.tensor(
        [0, 0.9, 0.6, 2.2]
    )
    x = pack(random_rotations(count), torch.zeros(count, 10), places)
    square = features(x)
    wide, own, tall = (features(x, torch.full((count,), span)) for span in (1.5, 1.0, 0.6))
    for one in (wide, own):
        torch.testing.assert_close(one["camera"], square["camera"], rtol=0, atol=0)
        torch.testing.assert_close(one["joints"], square["joints"], rtol=0, atol=0)
    assert torch.equal(own["visibility"], square["visibility"]) and (wide["visibility"] >= square["visibility"]).all()
    assert (tall["visibility"] >= square["visibility"]).all() and not torch.equal(tall["camera"], square["camera"])
    across = (tall["joints"][..., 0] - 0.5).abs()[presence(places) > 0]
    assert across.max() <= 0.3 + 1e-5  # in widths of the square
    again = features.into_view(
        tall["camera"], tall["joints_3d"][:, HAND_JOINTS, 0], presence(places), torch.full((count,), 0.6)
    )
    torch.testing.assert_close(again, tall["camera"], rtol=1e-4, atol=1e-4)  # hands of a portrait stay where they are


def test_a_hand_off_the_frame_is_not_visible(features):
    placement = torch.tensor([[[1.0, 3.0, 0.0, -1.0], [0, 0, 0, 0]]])
    out = features(pack(random_rotations(1), torch.zeros(1, 10), placement))
    assert out["visibility"][0].tolist() == [0.0, 0.0]
    assert all(torch.isfinite(value).all() for value in out.values())


def test_an_absent_hand_stands_where_the_other_is():
    places = torch.tensor([[[0.1, 0.2, -1.0], [0.3, 0.4, -2.0]]]).expand(4, 2, 3)
    shown = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    out = placement(places, shown)
    assert torch.equal(out[..., 0] > 0.5, shown)
    torch.testing.assert_close(out[0, :, 1:], places[0])
    torch.testing.assert_close(out[1, :, 1:], places[1, [0, 0]])
    torch.testing.assert_close(out[2, :, 1:], places[2, [1, 1]])
    torch.testing.assert_close(out[3, :, 1:], torch.tensor([[0.0, 0.0, -0.6931]]).expand(2, 3))


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ((1, 0), (1, 0)), ((0, 1), (0, 1)), ((1, 1), (1, 1)), ((0, 0), (0, 0)), ((0.2, 0.2), (0, 0)),
        ((0.45, 0.5), (0, 1)), ((0.5, 0.5), (1, 0)), ((0.55, 0.6), (0, 1)), ((1.0, 0.6), (1, 1)),
    ],
)  # fmt: skip
def test_there_are_as_many_hands_as_the_presences_say_together(said, shown):
    assert presence(torch.tensor(said).float()[None, :, None].expand(1, 2, 4))[0].tolist() == list(shown)


def test_no_hand_at_all_stays_finite(features):
    out = features(torch.zeros(2, NUM_PARAMS))
    assert out["visibility"].abs().max() == 0
    assert all(torch.isfinite(value).all() for value in out.values())


def test_bps_sees_the_hand_not_its_place(body, features):
    """Turning the whole body and moving the camera changes neither hand's distances; bending a finger does."""
    rotations = random_rotations(1)
    x = pack(rotations, torch.zeros(1, 10), torch.zeros(1, 2, 4))
    turned = rotations.clone()
    turned[:, 0] = random_rotations(1, 2.0)[:, 5] @ turned[:, 0]
    moved = pack(turned, torch.zeros(1, 10), torch.rand(1, 2, 4))
    torch.testing.assert_close(features(x)["bps"], features(moved)["bps"], atol=1e-4, rtol=0)
    bent = rotations.clone()
    bent[:, 22] = bent[:, 22] @ torch.linalg.matrix_exp(skew(torch.tensor([0.0, 0.0, 1.2])))
    changed = features(pack(bent, torch.zeros(1, 10), torch.zeros(1, 2, 4)))["bps"] - features(x)["bps"]
    assert changed[0, 0].abs().max() > 0.005 and changed[0, 1].abs().max() < 1e-5


def test_presence_is_what_placement_says():
    x = torch.zeros(1, NUM_PARAMS)
    assert PLACEMENT.stop == NUM_PARAMS == x.shape[1]


def test_bad_bodies_are_refused(tmp_path, body_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        SMPLH.load(tmp_path / "none.npz")
    (tmp_path / "body.pkl").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="a pickle can run code"):
        SMPLH.load(tmp_path / "body.pkl")
    (tmp_path / "junk.npz").write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match="cannot be read"):
        SMPLH.load(tmp_path / "junk.npz")
    arrays = dict(np.load(body_path))
    np.savez(tmp_path / "short.npz", **{k: v for k, v in arrays.items() if k != "weights"})
    with pytest.raises(CheckpointError, match="lacks weights"):
        SMPLH.load(tmp_path / "short.npz")
    arrays["posedirs"] = arrays["posedirs"][:, :, :207]
    np.savez(tmp_path / "smpl.npz", **arrays)
    with pytest.raises(CheckpointError, match=r"posedirs in .* must be SMPL-H's"):
        SMPLH.load(tmp_path / "smpl.npz")
