"""Repairing hands: regions and pasting on made pictures, files that carry more than pixels, the command on the demo."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
from commands import invoke
from handiffuser import HanDiffuser, Request, RequestError, find_hands, repair_hands, shipped
from handiffuser.contract import Manifest
from handiffuser.detection.convention import Convention
from handiffuser.detection.detect import Found
from handiffuser.detection.fit import fit
from handiffuser.detection.hands import Seen
from handiffuser.detection.poses import Poses
from handiffuser.errors import DetectionError
from handiffuser.hands import SHAPES, save_hands
from handiffuser.runtime.rest import joints_at_rest
from PIL import Image, ImageOps, PngImagePlugin

cv2 = pytest.importorskip("cv2")
from handiffuser.repair import regions  # noqa: E402 (it needs OpenCV)
from handiffuser.repair.arm import arm_of  # noqa: E402
from handiffuser.repair.files import NOTE, Original  # noqa: E402
from handiffuser.repair.patch import plan  # noqa: E402
from handiffuser.repair.place import placed  # noqa: E402
from handiffuser.repair.repair import given_hands, repair  # noqa: E402
from handiffuser.repair.wish import Wish, choose  # noqa: E402


@pytest.fixture(scope="module")
def rest():
    return joints_at_rest("demo")


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """A picture of the demo's and the file of its hands."""
    folder = tmp_path_factory.mktemp("painted")
    with HanDiffuser.load("demo", threads=1) as pipeline:
        made = pipeline.generate("a right hand, open palm, grey background", seed=3)[0]
        save_hands(folder / "own.hands.npz", made.hands)
        yield made, folder / "own.hands.npz", pipeline


def square(size: int = 40) -> np.ndarray:
    """Points of a hand in a square of that many pixels."""
    fan = [(10, 40), (2, 20), (12, 2), (20, 0), (28, 2), (36, 8)]
    wrist, tips = np.array(fan[0], float), np.array(fan[1:], float)
    joints = [wrist] + [wrist + (tip - wrist) * share for tip in tips for share in (0.5, 0.7, 0.85, 1.0)]
    return np.array(joints) * size / 40


def test_a_box_is_filled_by_the_hand_that_is_placed_there(rest):
    box = np.array([40.0, 60, 200, 300])
    for side in ("left", "right"):
        joints = placed(box, side, "open_hand", rest).hand.joints_2d
        low, high = joints.min(0), joints.max(0)
        np.testing.assert_allclose((low + high) / 2, (box[:2] + box[2:]) / 2, atol=1e-6)
        assert ((high - low) / (box[2:] - box[:2])).max() == pytest.approx(1)
        assert joints[12, 1] < joints[0, 1]  # the middle finger points up


def test_thumbs_lie_on_the_inner_side(rest):
    """With the palm towards the viewer, the thumb of a left hand is to its right in the picture."""
    box = np.array([0.0, 0, 100, 100])
    left, right = (placed(box, side, "open_hand", rest).hand.joints_2d for side in ("left", "right"))
    assert (left[4, 0] - left[0, 0]) * (right[4, 0] - right[0, 0]) < 0


def test_another_hand_keeps_its_pixels(rest, painted):
    """Two hands of one skin touch. What belongs to the other is neither the old hand nor in the mask."""
    picture = np.full((128, 256, 3), (60, 140, 90), np.uint8)
    hands = [placed(np.array([low, 20.0, low + 90, 120]), side, "open_hand", rest)
             for low, side in ((38.0, "left"), (124.0, "right"))]  # fmt: skip
    drawn = [regions.silhouette(one.hand.joints_2d, np.full(20, 4.0), (128, 256)) for one in hands]
    for one in drawn:
        picture[one] = (220, 170, 140)
    alone, beside = (plan(picture, hands[0], rest, (128, 128), others=others) for others in ((), hands))
    theirs = beside.window.cut(np.uint8(255) * (drawn[1] & ~drawn[0]), (128, 128)) > 250
    own = beside.window.cut(np.uint8(255) * drawn[0], (128, 128)) > 250
    assert theirs.sum() > 50 and (beside.old & theirs).mean() < 0.02 * theirs.mean()
    assert (beside.old & own).sum() > 0.9 * own.sum() and (beside.kept & theirs).sum() > 0.9 * theirs.sum()
    assert not alone.kept.any()


def test_masks_end_at_the_crop_unless_the_picture_ends_there():
    mask = np.ones((20, 30), bool)
    inside = regions.depth(mask, (False, False, False, False))
    assert inside[0].max() <= 1.01 and inside[10, 15] == pytest.approx(10, abs=0.6)
    edges = regions.depth(mask, (True, False, False, False))
    assert edges[0, 15] > 9 and edges[-1].max() <= 1.01


def test_the_old_hand_is_found_by_its_colour():
    picture = np.full((80, 80, 3), (60, 90, 160), np.uint8)
    points = square(40) + 20
    thick = np.full(20, 3.0)
    hand = regions.silhouette(points, thick, (80, 80))
    sixth = np.zeros((80, 80), np.uint8)
    cv2.line(sixth, (40, 45), (62, 40), 1, 5)
    picture[hand | (sixth > 0)] = (220, 170, 140)
    found, _ = regions.old_hand(picture, points)
    assert (found & (sixth > 0)).sum() > 0.9 * (sixth > 0).sum()
    between = regions.closed(hand | (sixth > 0), 3)  # it closes cracks between fingers
    assert (found & ~between).sum() < 0.02 * hand.sum()


def test_fingers_of_another_gesture_belong_to_the_old_hand_to_their_nails():
    """Far beyond the points, in one piece with the hand; the arm behind the wrist stays."""
    picture = np.full((128, 128, 3), (60, 90, 160), np.uint8)
    points = square(30) + np.array([49, 70])
    finger, nail, arm = (np.zeros((128, 128), np.uint8) for _ in range(3))
    cv2.line(finger, (60, 75), (60, 53), 1, 5)
    cv2.line(nail, (60, 50), (60, 48), 1, 3)
    cv2.rectangle(arm, (50, 106), (66, 127), 1, -1)
    picture[regions.silhouette(points, np.full(20, 3.0), (128, 128)) | (finger > 0) | (arm > 0)] = (220, 170, 140)
    picture[nail > 0] = (250, 225, 220)
    found, _ = regions.old_hand(picture, points)
    assert found[finger > 0].mean() > 0.9 and found[nail > 0].mean() > 0.5  # the mask is wider still
    assert found[arm > 0].mean() < 0.1


def test_a_wall_stays_a_wall_where_the_old_hand_was(rest):
    """Neither the arm nor another hand nor the mixed colours at the old hand's border run into it."""
    y, x = np.mgrid[:256, :256] / 255.0
    wall = np.stack([90 + 30 * x, 120 + 20 * y, 190 - 25 * x * y], -1)
    seen = placed(np.array([60.0, 40, 190, 190]), "right", "spread_fingers", rest)
    other = placed(np.array([200.0, 60, 256, 130]), "left", "fist", rest)
    skin = np.zeros((256, 256), np.uint8)
    for one, thick in ((seen, 7.0), (other, 6.0)):
        skin |= regions.silhouette(one.hand.joints_2d, np.full(20, thick), (256, 256))
    wrist = seen.hand.joints_2d[0].round().astype(int)
    cv2.rectangle(skin, (int(wrist[0]) - 16, int(wrist[1]) - 8), (int(wrist[0]) + 16, 255), 1, -1)
    cover = cv2.GaussianBlur(skin.astype(np.float32), (0, 0), 1.0)[..., None]
    picture = (wall * (1 - cover) + cover * (235, 190, 165) + 0.5).astype(np.uint8)
    patch = plan(picture, seen, rest, (128, 128), others=[seen, other])
    patch.new = patch.old & (regions.along(patch.points + 200, (128, 128)) > 9)  # no new hand
    patch.mask = regions.dilate(patch.old, 8) & ~patch.kept
    out = patch.paste(picture, patch.crop).astype(float)
    fingers = (regions.along(seen.hand.joints_2d, (256, 256)) > 0.12) & (cover[..., 0] > 0.01) & patch.covered(picture)
    assert fingers.sum() > 3000 and np.abs(out - wall)[fingers].max() < 6 and np.abs(out - wall)[fingers].mean() < 1.5


def test_a_finger_fades_once_and_keeps_its_colour():
    """With a bright nail, painted over another background than the picture has, and larger in the silhouette."""
    ground, skin, nail = np.array([200.0, 60, 160]), np.array([150.0, 105, 80]), np.array([215.0, 170, 155])
    drawn, tip = np.zeros((96, 96), np.uint8), np.zeros((96, 96), np.uint8)
    cv2.line(drawn, (48, 95), (48, 40), 1, 9)
    cv2.circle(tip, (48, 40), 2, 1, -1)
    cover, light = (cv2.GaussianBlur(one.astype(np.float32), (0, 0), 0.9)[..., None] for one in (drawn, tip))
    painted = (ground * (1 - cover) + cover * (skin * (1 - light) + nail * light) + 0.5).astype(np.uint8)
    alike = (np.abs(painted - skin).max(-1) < 30) & (np.random.default_rng(0).random((96, 96)) < 0.4)  # in tatters
    colours, alpha = regions.matte(painted, regions.dilate(drawn > 0, 2), alike)
    along = alpha[20:90, 48]
    assert (np.diff(along) >= -0.03).all() and along[0] < 0.02 and along[-1] > 0.99 and along[25:].min() > 0.95
    border = (cover[..., 0] > 0.2) & (cover[..., 0] < 0.8)
    assert np.abs(colours - skin)[border & (np.mgrid[:96, :96][0] > 50)].max() < 30  # nothing of the ground


def test_the_end_of_a_thumb_belongs_to_its_hand():
    """Detectors see a tip before its end: the end does not belong to the hand that it touches."""
    one = square(40) + np.array([10, 20])
    other = one + np.array([60.0, 0])
    one[4] = (58, 50)  # the thumb, which ends at 66
    one[3] = (40, 50)
    other[1:5] = other[0]
    other[5:] = np.array([70.0, 50]) + np.arange(16)[:, None] * (0, 0.5)
    assert not regions.nearer(one, [other], (100, 120))[50, 50:66].any()


class Eyes:
    """A detector that finds one hand in pictures of a brightness, in shares of the picture, and none in others."""

    def __init__(self, **hands: Found) -> None:
        self.hands = hands

    def once(self, image: np.ndarray) -> list[Found]:
        one = self.hands.get("bright" if image.mean() > 150 else "dark")
        return [] if one is None else [one]


def test_a_painted_hand_is_compared_with_the_old_one(rest):
    before, after = np.full((200, 200, 3), 120, np.uint8), np.full((200, 200, 3), 180, np.uint8)
    seen = placed(np.array([50.0, 50, 150, 150]), "left", "fist", rest)
    patch = plan(before, seen, rest, (128, 128))
    joints = np.random.default_rng(0).uniform(0.3, 0.7, (21, 2))
    old, size = Found("left", 0.9, joints), np.ptp(joints, axis=0).max()
    for new, wanted in (
        (old, 0.0),
        (Found("left", 0.9, joints + np.array([0.03, 0.04])), 0.05 / size),
        (Found("right", 0.9, joints), 1.0),
        (None, 1.0),
    ):
        assert patch.moved(before, after, Eyes(dark=old, bright=new)) == pytest.approx(wanted)
    assert patch.moved(before, after, Eyes(bright=old)) == 1.0


def test_without_a_word_a_hand_that_comes_out_elsewhere_stays(painted, rest):
    made, file, pipeline = painted
    (one,) = given_hands(file, (128, 128), pipeline)
    one.found, one.sureness = Found("right", 0.9, one.hand.joints_2d / 128), 1.0
    told = repair(pipeline, made.image, [one], rest, Wish(every=True), Eyes(), seed=1)
    assert told.painted[0]["moved"] == 1.0 and told.mask.any() and (told.image == made.image)[~told.mask].all()
    alone = repair(pipeline, made.image, [one], rest, Wish(), Eyes(), seed=1)
    assert alone.image is made.image and not alone.mask.any() and "so it stays" in alone.said[0]


def test_pixels_outside_the_mask_keep_their_bytes(rest):
    """At the edge of a picture of odd size, too."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (201, 333, 3), np.uint8)
    seen = placed(np.array([250.0, 120, 340, 215]), "left", "fist", rest)
    patch = plan(picture, seen, rest, (128, 128))
    patch.new = regions.silhouette(patch.points + 64, np.full(20, 9.0), (128, 128))
    patch.mask = regions.dilate(patch.new, 8)
    out = patch.paste(picture, np.zeros((128, 128, 3), np.uint8))
    left, top, right, bottom = patch.bounds
    assert right > 333 and (out != picture).any()
    changed = (out != picture).any(-1)
    assert not changed[:top].any() and not changed[:, :left].any()
    held = cv2.resize(patch.mask.astype(np.float32), (right - left, bottom - top))[: 201 - top, : 333 - left]
    assert not changed[top:bottom, left:right][held <= 0].any()


def test_own_files_say_where_hands_are(painted):
    made, file, pipeline = painted
    (one,) = given_hands(file, (128, 128), pipeline)
    truth = made.hands["joints_2d"][1] * 128
    assert one.side == "right"
    np.testing.assert_allclose(one.hand.joints_2d, truth, atol=0.05)


def with_an_arm(size, points, way):
    """A picture [size, size, 3] of skin where the points are, and of an arm that comes from the edge in the direction
    `way`; and the arm's mask."""
    picture, arm = np.full((size, size, 3), (60, 90, 160), np.uint8), np.zeros((size, size), np.uint8)
    middle, wide = points.mean(0), round(0.3 * np.ptp(points, axis=0).max())
    cv2.line(arm, middle.astype(int).tolist(), (middle - 2 * size * way).astype(int).tolist(), 1, wide)
    picture[(arm > 0) | regions.silhouette(points, np.full(20, 0.06 * wide * 4), (size, size))] = (220, 170, 140)
    return picture, arm > 0


@pytest.mark.parametrize("degrees", [0, 75, 160, 250])
def test_an_unsure_hand_that_does_what_is_said_lies_along_its_arm(rest, degrees):
    """Points of a melted hand lie across the arm. A sure hand bends as its points say."""
    turn = np.radians(degrees)
    way = np.array([np.sin(turn), -np.cos(turn)])
    spin = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    upright = placed(np.array([150.0, 150, 250, 250]), "left", "open_hand", rest).hand
    points = (upright.joints_2d - 200) @ spin.T + 200  # along the arm
    across = (points - points.mean(0)) @ np.array([[0, 1.0], [-1, 0]]).T + points.mean(0)
    picture, _ = with_an_arm(400, points, way)
    np.testing.assert_allclose(arm_of(picture, across), way, atol=0.1)
    for sureness, wanted in ((0.6, way), (0.95, np.array([way[1], -way[0]]))):
        hand = fit(across, "left", rest, gesture="open_hand")
        one = Seen(hand, Found("left", 0.9, across / 400), sureness)
        (made,), _ = choose([one], Wish(gesture="open_hand"), picture, rest)
        lies = made.hand.joints_2d[9] - made.hand.joints_2d[0]
        assert lies @ wanted > 0.95 * np.linalg.norm(lies)
        size = np.ptp(points, axis=0).max()
        if sureness < 0.9:
            assert np.linalg.norm(made.hand.joints_2d - points, axis=1).mean() < 0.1 * size
            assert abs(made.hand.turn @ fit(points, "left", rest, gesture="open_hand").turn.T - np.eye(3)).max() < 0.2


def test_skin_on_several_sides_is_no_arm(rest):
    points = placed(np.array([150.0, 150, 250, 250]), "left", "open_hand", rest).hand.joints_2d
    picture, arm = with_an_arm(400, points, np.array([0.0, -1.0]))
    assert arm_of(picture, points) is not None
    picture[170:230] = (220, 170, 140)  # a second arm goes through
    assert arm_of(picture, points) is None
    picture[arm] = picture[0, 0]
    assert arm_of(np.full_like(picture, 90), points) is None


def test_hands_of_every_person_of_a_file_are_painted_by_a_bundle_of_one(painted, tmp_path):
    """Each hand is painted on its own, so the bundle need not know two people; who shows no hand is left out."""
    made, _, pipeline = painted
    shown = {name: made.hands[name] for name in (*SHAPES, "camera")}
    beside = shown | {"camera": shown["camera"] + np.float32([0, 0.05, 0])}
    hidden = shown | {"placement": np.zeros((2, 4), np.float32)}
    for number, people in enumerate(((shown, beside), (hidden, beside))):
        file = tmp_path / f"{number}.hands.npz"
        save_hands(file, {name: np.stack([one[name] for one in people]) for name in shown})
        seen = given_hands(file, (128, 128), pipeline)
        assert [one.side for one in seen] == ["right"] * (2 - number)
        step = np.array([0.5 * 128 * shown["camera"][0] * 0.05, 0])
        np.testing.assert_allclose(seen[-1].hand.joints_2d, made.hands["joints_2d"][1] * 128 + step, atol=0.05)
    save_hands(tmp_path / "none.hands.npz", {name: np.stack([value] * 2) for name, value in hidden.items()})
    with pytest.raises(DetectionError, match="must say where its hands are"):
        given_hands(tmp_path / "none.hands.npz", (128, 128), pipeline)


def test_unsure_and_tiny_hands_stay(rest):
    picture = np.zeros((200, 200, 3), np.uint8)
    seen = placed(np.array([10.0, 10, 100, 100]), "left", "fist", rest)
    unsure = Seen(seen.hand, sureness=0.2)
    assert choose([unsure], Wish(), picture, rest)[0] == []
    assert "20% sure" in choose([unsure], Wish(), picture, rest)[1][0]
    assert len(choose([unsure], Wish(every=True), picture, rest)[0]) == 1
    (shaped,), said = choose([unsure], Wish(gesture="open_hand"), picture, rest)
    assert shaped.gesture == "open_hand" and "may lie otherwise" in said[0]
    small = placed(np.array([10.0, 10, 18, 18]), "left", "fist", rest)
    assert "smaller than" in choose([small], Wish(), picture, rest)[1][0]
    outside = placed(np.array([300.0, 300, 400, 400]), "left", "fist", rest)
    assert "outside" in choose([outside], Wish(), picture, rest)[1][0]


@pytest.mark.parametrize("orientation", [1, 5, 6])
def test_files_keep_what_they_carry(tmp_path, orientation):
    """The file of a telephone: it lies on its side, and EXIF says so, with a place and a camera."""
    rng = np.random.default_rng(orientation)
    stored = rng.integers(0, 255, (20, 30, 4), np.uint8)
    exif, texts = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112], exif[0x010E] = orientation, "a description"
    exif.get_ifd(0x8825)[1] = "N"
    exif.get_ifd(0x8769)[0x920A] = 4.2  # focal length
    texts.add_itxt("Author", "somebody")
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif, pnginfo=texts, icc_profile=b"profile", dpi=(300, 300))
    original = Original.read(tmp_path / "a.png")
    assert original.image.shape[:2] == ((30, 20) if orientation >= 5 else (20, 30))
    made = Image.open(io.BytesIO(original.encoded(original.image, {NOTE: "[]"})))
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(np.asarray(made), np.asarray(upright))
    kept = made.getexif()
    assert kept[0x0112] == 1 and kept[0x010E] == "a description"
    assert kept.get_ifd(0x8825)[1] == "N" and float(kept.get_ifd(0x8769)[0x920A]) == pytest.approx(4.2)
    assert made.info["icc_profile"] == b"profile" and made.text["Author"] == "somebody" and made.text[NOTE] == "[]"
    for format in ("jpeg", "webp"):
        made = Image.open(io.BytesIO(original.encoded(original.image, {NOTE: "[]"}, format)))
        assert made.info["icc_profile"] == b"profile" and made.getexif()[0x010E] == "a description"
        assert made.mode == ("RGB" if format == "jpeg" else "RGBA")


def test_grey_pictures_stay_grey(tmp_path):
    Image.fromarray(np.full((20, 30), 90, np.uint8)).save(tmp_path / "a.png")
    original = Original.read(tmp_path / "a.png")
    assert Image.open(io.BytesIO(original.encoded(original.image, {}))).mode == "L"


def test_what_is_no_picture_is_refused(tmp_path):
    with pytest.raises(DetectionError, match="does not exist"):
        Original.read(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(DetectionError, match="cannot be decoded"):
        Original.read(tmp_path / "a.png")


def test_the_command_repairs_and_skips(painted, tmp_path):
    """Given hands in a larger picture: written once, and all pixels far from the hand are as they were."""
    made, file, _ = painted
    picture = np.asarray(Image.fromarray(made.image).resize((300, 300)))
    Image.fromarray(picture).save(tmp_path / "mine.png")
    (tmp_path / "bad.png").write_bytes(b"")
    words = (
        "demo",
        tmp_path / "mine.png",
        tmp_path / "bad.png",
        "--hands",
        file,
        "--gesture",
        "fist",
        "--threads",
        "1",
    )
    first = invoke("repair.cli", *words, "--output", tmp_path / "out")
    assert first.returncode == 1 and "bad.png" in first.stderr and "Traceback" not in first.stderr
    (done,) = (path for path in (tmp_path / "out").glob("mine-*.png") if ".hands" not in path.name)
    image = Image.open(done)
    (note,) = json.loads(image.text[NOTE])
    assert note["side"] == "right" and note["gesture"] == "fist" and "fist" in note["caption"]
    changed = (np.asarray(image) != picture).any(-1)
    left, top, *_ = note["window"]
    assert changed.any() and not changed[: max(top, 0)].any() and not changed[:, : max(left, 0)].any()
    again = invoke("repair.cli", *words, "--output", tmp_path / "out")
    assert "is done" in again.stderr and len(list((tmp_path / "out").glob("mine-*"))) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--gesture", "wave_hello"), "--gesture must be one of"),
        (("--lora", "no.safetensors:0.8"), "no.safetensors does not exist"),
        (("--box", "1,2,3"), "--box must be left,top,right,bottom"),
        (("--box", "10,10,90,90"), "--box must come with --gesture and --side"),
        (
            ("--box", "50,50,90,90", "--gesture", "fist", "--side", "left"),
            "--box must have its middle in the picture of 50x50 pixels, got 50,50,90,90",
        ),
        (("--box", "1,1,9,9", "--gesture", "fist", "--side", "left"), "--box must be at least 12 pixels wide or high"),
    ],
)
def test_wrong_words_are_sentences(tmp_path, words, sentence):
    Image.new("RGB", (50, 50)).save(tmp_path / "a.png")
    result = invoke("repair.cli", "demo", tmp_path / "a.png", *words, "--output", tmp_path / "out")
    assert result.returncode == 1 and sentence in result.stderr


def test_every_gesture_fits_a_bundle(rest):
    assert Manifest.load(shipped.bundle_path(), verify=False).image_size == (128, 128)
    for gesture in filter(None, Poses.load().names):
        assert np.isfinite(placed(np.array([0.0, 0, 64, 64]), "right", gesture, rest).hand.joints_2d).all()


def test_a_request_starts_without_the_old_hand(rest):
    picture = np.full((200, 200, 3), 120, np.uint8)
    patch = plan(picture, placed(np.array([50.0, 50, 150, 150]), "left", "fist", rest), rest, (128, 128))
    patch.new = np.zeros((128, 128), bool)
    patch.new[40:80, 40:80] = True
    patch.mask = regions.dilate(patch.new, 8)
    request = patch.request(seed=4)
    assert isinstance(request, Request) and request.strength == 0.95 and "left hand making a fist" in request.prompt


def test_a_misspelt_option_is_named_also_without_opencv(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("handiffuser.repair")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cv2", None)
    result = invoke("repair.cli", "demo", "a.png", "--misspelt")
    assert result.returncode == 2 and "--misspelt" in result.stderr and "cv2" not in result.stderr


class Known:
    """A detector that finds a hand in every picture but dark ones."""

    name, convention = "Known", Convention.true(0.004)

    def __init__(self, joints: np.ndarray) -> None:
        self.joints = joints

    def __call__(self, image: np.ndarray) -> list[Found]:
        return [Found("right", 0.9, self.joints)] if image.mean() > 60 else []

    def once(self, image: np.ndarray) -> list[Found]:
        return self(image)

    def sureness(self, found: Found, residual: float, degrees: float) -> float:
        return 0.9


def test_repair_hands_looks_again(painted, monkeypatch):
    """With a detector of its own, which it closes. This one finds the hand in the whole picture alone."""
    made, _, engines = painted
    closed = []

    class Far(Known):
        def __init__(self) -> None:
            super().__init__(made.hands["joints_2d"][1])

        def __call__(self, image: np.ndarray) -> list[Found]:
            return super().__call__(image) if image.shape == made.image.shape else []

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setitem(repair_hands.__globals__, "MediaPipe", Far)
    outcome = repair_hands(engines, made.image, seed=1)
    assert outcome.image is made.image and "so it stays" in outcome.said[-1] and len(closed) == 1


def test_hands_are_found_in_one_picture_after_the_other(painted):
    """What is found goes straight into a new picture, or into a repair; and what has no hands is refused there."""
    made, _, engines = painted
    eyes = Known(made.hands["joints_2d"][1])
    dark = np.zeros((40, 60, 3), np.uint8)
    first, none, last = find_hands(engines, [made.image, dark, made.image], detector=eyes)
    assert not none.arrays and "found no hand" in none.said[0] and np.array_equal(first.drawing, last.drawing)
    requests, refused = engines.prepare([Request(last.caption, hands=last)])
    assert not refused and requests[0].hands is not None
    for hands, said in (
        (none, "hands must hold arrays, got none. Known found no hand"),
        (first, "Call find_hands with whole=True"),
        ({}, "hands must hold arrays, got none"),
        ({"visibility": [0, 1]}, "hands.global_orient must be given"),
    ):
        with pytest.raises(RequestError, match=said):
            repair_hands(engines, made.image, hands, detector=eyes)
    with pytest.raises(RequestError, match="size must be left out of a repair, got '64x64'"):
        repair_hands(engines, made.image, detector=eyes, size="64x64")
    with pytest.raises(RequestError, match="pictures must be a list"):
        next(find_hands(engines, made.image, detector=eyes))
