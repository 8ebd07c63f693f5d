"""From a photograph to hands on disk and a new picture, with a detector that knows the truth."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from commands import invoke
from handiffuser.contract import HAND_JOINTS
from handiffuser.detection import photo as module
from handiffuser.detection.arms import HandEstimate
from handiffuser.detection.convention import Convention, sureness
from handiffuser.detection.detect import Found
from handiffuser.detection.hands import (
    LOOK,
    Seen,
    arrays_of,
    closer,
    find,
    from_estimates,
    of_one_person,
    window_of,
)
from handiffuser.detection.photo import Photo, caption
from handiffuser.errors import DetectionError
from handiffuser.fingers import SIDES, gestures
from handiffuser.hands import POSES, keep_camera, load_hands, save_hands
from handiffuser.kinematics import forward
from handiffuser.rotations import axis_angle_to_matrix
from handiffuser.runtime.rest import joints_at_rest
from PIL import Image

# How a hand stands that shows its palm: columns are where fingers, the back and the thumb point.
PALM = (np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]), np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]))
SIZE = (300, 400)


@pytest.fixture(scope="module")
def rest() -> np.ndarray:
    return joints_at_rest("demo")


def hand(rest: np.ndarray, side: int, gesture: str, middle: tuple[float, float], tall: float) -> HandEstimate:
    """A hand in a picture: the middle of its points, and the height of their box, pixels."""
    rotations = np.tile(np.eye(3), (52, 1, 1))
    fingers = gestures()[gesture].reshape(15, 3) * ((1, -1, -1) if side else 1)
    rotations[22 + 15 * side : 37 + 15 * side] = axis_angle_to_matrix(fingers)
    points = (forward(rotations, rest)[1][list(HAND_JOINTS[side])] @ PALM[side].T)[:, :2] * (1, -1)
    points = points * tall / np.ptp(points[:, 1])
    return HandEstimate(side, PALM[side], fingers, points - points.mean(0) + middle)


class Truth:
    """A detector that is told where the hands are."""

    name, settings, convention = "Truth", {}, Convention.true(0.004)

    def __init__(self, *hands: HandEstimate, size: tuple[int, int] = SIZE) -> None:
        self.found = [Found(SIDES[one.side], 0.98 - 0.02 * k, one.joints_2d / (size[1], size[0]))
                      for k, one in enumerate(hands)]  # fmt: skip
        self.size, self.shape = size, (0, 0, 0)

    def __call__(self, image: np.ndarray) -> list[Found]:
        if image.shape[:2] != self.size:  # a crop
            return []
        self.shape = image.shape
        return self.found

    def once(self, image: np.ndarray) -> list[Found]:
        return self(image)

    def sureness(self, found: Found, residual: float, degrees: float) -> float:
        return found.score

    def close(self) -> None: ...


def write(path: Path, mode: str = "RGB", size: tuple[int, int] = SIZE, **how) -> Path:
    Image.new(mode, (size[1], size[0]), 128 if mode in ("L", "P") else None).save(path, **how)
    return path


def projected(arrays: dict[str, np.ndarray], rest: np.ndarray, aspect: float) -> np.ndarray:
    """Both hands' joints [2, 21, 2] in [0, 1] by SMPL-H's rotations and the camera alone."""
    vectors = np.concatenate([arrays[name].reshape(-1, 3) for name in POSES]).astype(float)
    joints = forward(axis_angle_to_matrix(vectors), rest)[1][np.array(HAND_JOINTS), :2]
    s, *shift = arrays["camera"]
    view = s * (joints + shift)
    return np.stack([0.5 + 0.5 * view[..., 0] / aspect, 0.5 - 0.5 * view[..., 1]], -1)


def test_rotations_and_camera_alone_give_the_joints(rest, tmp_path):
    """What a file says, forward kinematics puts where the hand is, and a load keeps the camera."""
    for side in range(2):
        one = hand(rest, side, "victory", (150, 120), 140)
        arrays = arrays_of([Seen(one)], SIZE, rest)
        seen = projected(arrays, rest, 4 / 3)[side] * (400, 300)
        assert np.abs(seen - one.joints_2d).max() < 1e-3 and np.allclose(seen, arrays["joints_2d"][side] * (400, 300))
        save_hands(tmp_path / "a.npz", arrays, "a hand")
        again = load_hands(tmp_path / "a.npz")
        assert again.camera is not None and np.allclose(again.camera, arrays["camera"])
        assert np.isfinite(keep_camera(again, arrays["joints"])).all() and arrays["visibility"].tolist()[side] == 1


def test_a_left_and_a_right_hand_are_one_person(rest):
    pair = [Seen(hand(rest, 1, "victory", (110, 150), 120), None, 0.9), Seen(hand(rest, 0, "ok_sign", (290, 150), 125))]
    chosen, said = of_one_person(pair, SIZE, rest)
    assert len(chosen) == 2 and said == []
    arrays = arrays_of(chosen, SIZE, rest)
    seen = projected(arrays, rest, 4 / 3) * (400, 300)
    for one in pair:
        away = np.linalg.norm(seen[one.hand.side] - one.hand.joints_2d, axis=1).mean()
        assert away < 0.06 * 120, "one camera sees both: within the difference of their sizes"
    assert caption(pair) == "both hands"


def test_a_person_who_names_the_side_of_a_single_hand_is_right(rest):
    """Of several hands, each is what the detector says, and all are told."""
    left, right = hand(rest, 0, "victory", (110, 150), 120), hand(rest, 1, "fist", (290, 150), 120)
    image = np.zeros((*SIZE, 3), np.uint8)
    assert [one.side for one in find(image, rest, Truth(left), side="right")] == ["right"]
    assert {one.side for one in find(image, rest, Truth(left, right), side="right")} == {"left", "right"}


class Looks(Truth):
    """Sees what it is told to, look after look."""

    def __init__(self, *looks: Found | None) -> None:
        self.looks = list(looks)

    def __call__(self, image: np.ndarray) -> list[Found]:
        one = self.looks.pop(0)
        return [] if one is None else [one]


def test_looks_from_near_outvote_the_first_one(rest):
    """The first look takes palm for back. Two looks from near, one of them in a mirror, see the hand as it is."""
    true = hand(rest, 0, "victory", (150, 150), 120).joints_2d
    first = Found("right", 0.97, (true * (-1, 1) + (2 * true[:, 0].mean(), 0)) / (400, 300))
    low, high = first.joints.min(0) * (400, 300), first.joints.max(0) * (400, 300)
    half = np.round(LOOK * float((high - low).max())) / 2
    share = (true - np.round((low + high) / 2 - half)) / (2 * half)
    plain, mirrored = Found("left", 0.8, share), Found("right", 0.9, share * (-1, 1) + (1, 0))
    image = np.zeros((*SIZE, 3), np.uint8)
    near = closer(image, first, Looks(plain, mirrored))
    assert near.side == "left" and near.score == pytest.approx(0.85) and near.apart < 0.02
    assert np.abs(near.joints * (400, 300) - true).max() < 2
    unseen = closer(image, first, Looks(None, None))
    assert unseen.side == "right" and np.allclose(unseen.joints, first.joints) and unseen.apart == 0.5
    said = closer(image, first, Looks(plain, None), side="right")
    assert said.side == "right"
    other = Found("left", 0.9, share / 8)  # another hand in a corner of the crop
    assert np.allclose(closer(image, first, Looks(other, other)).joints, first.joints)


def test_what_one_person_cannot_show_is_said(rest):
    right = [Seen(hand(rest, 1, "fist", (60 + 120 * k, 150), 100 + k), None, 0.9 - 0.1 * k) for k in range(3)]
    chosen, said = of_one_person(right, SIZE, rest)
    assert chosen == right[:1] and "shows 3 hands" in said[0] and "a right hand, 90% sure" in said[0]
    large = Seen(hand(rest, 0, "fist", (290, 150), 250), None, 0.5)
    chosen, said = of_one_person([right[0], large], SIZE, rest)
    assert chosen == right[:1] and "cannot show both" in said[0]
    assert of_one_person([], SIZE, rest) == ([], [])


@pytest.mark.parametrize("tall, near", [(150, False), (20, True)])
def test_small_hands_are_brought_nearer(rest, tall, near):
    one = Seen(hand(rest, 0, "spread_fingers", (110, 110), tall))
    window = window_of([one], SIZE, (128, 128))
    assert window.width == pytest.approx(window.height)
    assert (window.height < 200) == near
    inside = window.inside(one).hand.joints_2d
    assert (inside > 0).all() and (inside < window.height).all()
    assert np.ptp(inside, axis=0).max() / window.height * 128 >= 40
    if not near:
        assert window.x >= 0 and window.y >= 0 and window.height == 300


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("P", "png"), ("RGBA", "webp"), ("CMYK", "jpg"), ("1", "png")])
def test_pictures_of_all_modes(rest, tmp_path, mode, suffix):
    path = write(tmp_path / f"a.{suffix}", mode)
    detector = Truth(hand(rest, 1, "victory", (150, 150), 150))
    photo = Photo.read(path, detector)
    assert detector.shape == (300, 400, 3) and photo.size == SIZE


def test_a_phone_held_upright(rest, tmp_path):
    """EXIF says that the camera lay on its side: the hands are found in the upright picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "a.jpg", exif=exif)
    detector = Truth(hand(rest, 1, "victory", (150, 200), 180), size=(400, 300))
    told = Photo.read(tmp_path / "a.jpg", detector).hands_for(rest, (128, 128))
    assert detector.shape == (400, 300, 3) and told.drawing.shape == (400, 300, 3)
    assert told.caption == "a right hand making a peace sign"
    assert told.said[0].endswith("a.jpg shows a right hand, victory, 98% sure.")
    assert Image.open(io.BytesIO(told.png())).size == (300, 400) and (told.drawing != 0).any()


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_what_is_not_a_picture_is_a_sentence(tmp_path, content):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DetectionError, match=r"The picture .*a\.png"):
        Photo.read(path, Truth())


def test_a_large_photograph_has_a_small_drawing(rest, tmp_path):
    size = (2000, 4000)
    told = Photo.read(write(tmp_path / "a.jpg", size=size),
                      Truth(hand(rest, 0, "fist", (2500, 900), 1000), size=size)).hands_for(rest, (64, 64))  # fmt: skip
    assert told.drawing.shape == (800, 1600, 3) and told.caption == "a left hand making a fist"


def test_estimates_of_others_need_no_detector(rest, tmp_path):
    from annotations import LEFT, estimate, hamer
    from handiffuser.demo.render import demo_body

    fingers = gestures()["victory"].reshape(15, 3)
    one = estimate(demo_body(), LEFT, np.diag([1.0, -1, -1]), fingers, (200, 150), 160, (4.0, 0.0, 0.0))
    hamer(tmp_path / "a", [one], SIZE)
    (seen,) = from_estimates(tmp_path / "a.npz", SIZE, rest)
    assert seen.side == "left" and np.allclose(seen.hand.fingers, fingers, atol=1e-5) and seen.sureness is None
    assert str(seen) == "a left hand" and arrays_of([seen], SIZE, rest)["camera"].shape == (3,)
    for name in ("b.npz", "a.txt"):
        with pytest.raises(DetectionError, match=name):
            from_estimates(tmp_path / name, SIZE, rest)


def test_sureness_is_a_probability_that_falls_with_the_residual():
    sure = [sureness(score, residual, 5.0) for score, residual in ((0.99, 0.02), (0.99, 0.08), (0.5, 0.08))]
    assert 1 > sure[0] > sure[1] > sure[2] > 0
    assert 0 <= sureness(1.0, 0.0, 0.0) <= 1 and 0 <= sureness(0.0, 9.0, 900.0) <= 1


def test_hd_run_paints_the_hands_of_a_photograph(rest, tmp_path, monkeypatch):
    right = hand(rest, 1, "victory", (150, 150), 150)
    monkeypatch.setattr(module, "MediaPipe", lambda: Truth(right))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "me.png")
    done = [invoke("runtime.cli", "demo", "--image", "me.png", "--threads", 1, "-o", "out") for _ in range(2)]
    assert done[0].returncode == done[1].returncode == 0, done[0].stderr
    assert "me.png shows a right hand, victory, 98% sure." in done[0].stderr and "1 skipped" in done[1].stderr
    assert (tmp_path / "out/me.photo.hands.png").is_file()
    (made,) = (tmp_path / "out").glob("a-right-hand-making-a-peace-sign-0-*.hands.npz")
    with np.load(made) as held:
        moved = held["joints_2d"][1] * 300 - right.joints_2d  # as high as the photograph, and a part of its width
    assert np.ptp(moved[:, 0]) < 0.5 and np.abs(moved[:, 1]).max() < 0.5 and 0 < -moved[0, 0] < 100
    told = invoke("runtime.cli", "demo", "two words", "--image", "me.png", "--threads", 1, "-o", "out", "-q")
    assert told.returncode == 0 and "shows" not in told.stderr and list((tmp_path / "out").glob("two-words-0-*.png"))


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--image", "missing.png"], "The picture missing.png does not exist"),
        (["--image", "me.png", "--no-hands"], "--image must stand without --no-hands"),
        (["--image", "me.png", "-o", "s3://bucket/run"], "--output must be a folder of this machine"),
        (["--image", "me.png", "-o", "me.png"], "cannot be written"),
        (["--image", "me.png"], "found no hand in me.png"),
    ],
)
def test_what_hd_run_cannot_do_is_a_sentence(rest, tmp_path, monkeypatch, words, sentence):
    hands = () if sentence.startswith("found") else (hand(rest, 1, "victory", (150, 150), 150),)
    monkeypatch.setattr(module, "MediaPipe", lambda: Truth(*hands))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "me.png")
    result = invoke("runtime.cli", "demo", *words)
    assert result.returncode == 1 and sentence in result.stderr.replace("\n", " ")


def test_without_mediapipe_hd_run_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mediapipe", None)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "me.png")
    result = invoke("runtime.cli", "demo", "--image", "me.png")
    assert result.returncode == 1 and 'pip install "handiffuser[detect]"' in result.stderr.replace("\n", " ")
