"""Hands: parameters and SMPL-H arrays there and back, files that are refused, and the skeleton."""

from __future__ import annotations

import io
import pickle
import resource
import zipfile

import numpy as np
import pytest
from handiffuser import RequestError
from handiffuser import hands as H
from handiffuser import rotations as R
from handiffuser import skeleton as S
from handiffuser.contract import NUM_PARAMS


def some_params(seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    params = generator.normal(size=NUM_PARAMS).astype(np.float32)
    return params


def rotations(params: np.ndarray) -> np.ndarray:
    return R.rotation_6d_to_matrix(params[:312].reshape(52, 6))


def test_there_and_back():
    params = some_params()
    again = H.hand_params(H.hand_arrays(params))
    np.testing.assert_allclose(rotations(again), rotations(params), atol=1e-6)
    np.testing.assert_array_equal(again[312:], params[312:])


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-5, 0.1, 1.0, 3.0, np.pi - 1e-7, np.pi])
def test_axis_angle_at_every_angle(angle):
    axes = np.random.default_rng(1).normal(size=(100, 3))
    axes = np.concatenate([axes, np.eye(3), -np.eye(3)])
    vectors = axes / np.linalg.norm(axes, axis=-1, keepdims=True) * angle
    matrices = R.axis_angle_to_matrix(vectors)
    back = R.matrix_to_axis_angle(matrices)
    np.testing.assert_allclose(R.axis_angle_to_matrix(back), matrices, atol=1e-12)
    if angle < 3:
        np.testing.assert_allclose(back, vectors, atol=1e-9)


def test_agrees_with_the_models_rotations():
    torch = pytest.importorskip("torch")
    from handiffuser.models.smplh import rotation_6d_to_matrix

    x = np.random.default_rng(2).normal(size=(50, 6))
    np.testing.assert_allclose(R.rotation_6d_to_matrix(x), rotation_6d_to_matrix(torch.tensor(x)).numpy(), atol=1e-12)


def full_hands(params: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "params": params,
        **H.hand_arrays(params),
        "joints": np.zeros((62, 3), np.float32),
        "joints_2d": np.full((2, 21, 2), 0.5, np.float32),
        "vertices": np.zeros((9, 3), np.float32),
        "visibility": np.ones(2, np.float32),
        "camera": np.array([7.0, 0.25, -0.5], np.float32),
    }


def test_file_there_and_back(tmp_path):
    params = some_params(3)
    path = tmp_path / "a.hands.npz"
    H.save_hands(path, full_hands(params), "a fist ✊")
    hands = H.load_hands(path)
    np.testing.assert_allclose(rotations(hands.params), rotations(params), atol=1e-5)
    assert hands.camera.tolist() == [7.0, 0.25, -0.5]
    with np.load(path) as archive:
        assert str(archive["prompt"]) == "a fist ✊" and "params" not in archive
        assert archive["left_hand_pose"].shape == (45,) and archive["vertices"].shape == (9, 3)


def test_edits_count(tmp_path):
    arrays = H.hand_arrays(some_params(4))
    arrays["right_hand_pose"] = np.zeros(45)
    np.savez(tmp_path / "a.npz", **arrays)
    params, camera = H.load_hands(tmp_path / "a.npz")
    assert camera is None
    np.testing.assert_allclose(rotations(params)[37:], np.broadcast_to(np.eye(3), (15, 3, 3)), atol=1e-7)


def write(path, **changes):
    arrays = {**H.hand_arrays(some_params()), **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"betas": None}, "lacks betas"),
        ({"body_pose": np.zeros(69)}, r"body_pose of shape \[69\]"),
        ({"left_hand_pose": np.zeros((15, 3))}, r"left_hand_pose of shape \[15, 3\]"),
        ({"betas": np.full(10, np.nan)}, "NaN"),
        ({"placement": np.full((2, 4), np.inf)}, "infinity"),
        ({"global_orient": np.full(3, 90.0)}, "radians"),
        ({"betas": np.full(10, "x")}, "not as numbers"),
        ({"betas": np.array([None] * 10)}, "plain arrays"),  # object array: would have to be unpickled
        ({"betas": np.full(10, np.iinfo(np.int64).min)}, "betas must be at most 20 in magnitude, got 9.2"),
        ({"betas": np.zeros(100_000)}, "betas is larger than 64 KB"),
        ({"camera": np.zeros(3)}, "scale of the camera must be above 0, got 0"),
        ({"camera": np.array([-1, 0, 0])}, "above 0"),
        ({"camera": np.ones(4)}, r"camera of shape \[4\]"),
        ({"camera": np.array([1, np.nan, 0])}, "NaN or infinity in camera"),
        ({"camera": np.array([1, 0, 1e7])}, "camera must be at most 1e.06 in magnitude, got 1e.07"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, changes, words):
    path = tmp_path / "a.npz"
    write(path, **changes)
    with pytest.raises(RequestError, match=words):
        H.load_hands(path)


def test_files_that_are_no_hands(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(RequestError, match="does not exist"):
        H.load_hands(path)
    single = io.BytesIO()
    np.save(single, np.zeros(330))
    truncated = io.BytesIO()
    write(truncated)
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        for name in H.SHAPES:
            archive.writestr(f"{name}.npy", b"garbage")
    for content in (
        b"",
        b"hello",
        pickle.dumps({"betas": 1}),
        single.getvalue(),
        truncated.getvalue()[:500],
        zipped.getvalue(),
    ):
        path.write_bytes(content)
        with pytest.raises(RequestError, match=r"plain arrays.*global_orient\[3\]"):
            H.load_hands(path)
    with pytest.raises(RequestError, match="not a regular file"):
        H.load_hands(tmp_path)


@pytest.mark.slow
def test_what_is_packed_small_is_not_unpacked_large(tmp_path):
    """A gigabyte of zeros is a megabyte in an archive."""
    path = tmp_path / "a.npz"
    arrays = {**H.hand_arrays(some_params()), "betas": np.zeros(1 << 27)}
    np.savez_compressed(path, **arrays)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RequestError, match="betas is larger"):
        H.load_hands(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


def test_a_placement_that_keeps_the_camera():
    """Is the opposite of the camera that follows from a placement."""
    torch = pytest.importorskip("torch")
    from handiffuser.models.hand_features import HandFeatures

    random = np.random.default_rng(5)
    for present in ([1, 1], [1, 0], [0, 1]):
        joints = (random.normal(size=(62, 3)) * 0.1).astype(np.float32)
        camera = np.array([random.uniform(0.5, 20), *random.normal(size=2)])
        params = some_params(int(random.integers(100)))
        params[322:330:4] = present
        kept = H.keep_camera(H.Hands(params, camera), joints)
        assert kept[:322].tobytes() == params[:322].tobytes() and kept[322:330:4].tolist() == present
        hands = torch.tensor(joints)[None, H.HAND_JOINTS, :2]
        placement = torch.tensor(kept[322:]).reshape(1, 2, 4)
        found = HandFeatures.camera(hands, placement, torch.tensor([present], dtype=torch.float32))
        np.testing.assert_allclose(found[0].numpy(), camera, rtol=2e-6, atol=2e-6)


def test_skeleton():
    image = np.full((64, 96, 3), 90, np.uint8)
    joints = np.random.default_rng(0).uniform(0.2, 0.8, (2, 21, 2)).astype(np.float32)
    both = S.draw_skeleton(image, joints, np.ones(2))
    assert both.dtype == np.uint8 and both.shape == (256, 384, 3)
    none = S.draw_skeleton(image, joints, np.zeros(2))
    assert (none == 90).all()
    assert (both != 90).any()
    left = S.draw_skeleton(image, joints, np.array([1.0, 0.0]))
    assert (left != both).any() and (left != 90).any()
    assert S.draw_skeleton(np.zeros((512, 512, 3), np.uint8), joints, np.ones(2)).shape == (512, 512, 3)


@pytest.mark.parametrize("value", [np.nan, 1e30, -5.0])
def test_skeleton_of_joints_far_outside(value):
    image = np.zeros((32, 32, 3), np.uint8)
    S.draw_skeleton(image, np.full((2, 21, 2), value, np.float32), np.ones(2))
