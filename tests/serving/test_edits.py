"""Pictures come in: OpenAI's edits by its own client, hands of a picture, and repairs."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import zlib
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from handiffuser import shipped
from handiffuser.detection.convention import Convention
from handiffuser.detection.detect import Found
from handiffuser.detection.hands import arrays_of
from handiffuser.pictures import encode_png
from handiffuser.repair.place import placed
from handiffuser.runtime.rest import joints_at_rest
from handiffuser.serving.edits import EditForm, laid
from handiffuser.serving.fields import as_json
from handiffuser.serving.finding import seen_of
from handiffuser.serving.service import Front, Limits
from PIL import Image
from served import serving

pytestmark = pytest.mark.skipif(find_spec("python_multipart") is None, reason="needs python-multipart")
needs_detector = pytest.mark.skipif(find_spec("mediapipe") is None, reason="needs the extra detect")
EDITS, DETECT = "/v1/images/edits", "/v1/hands/detect"


def noise(height, width, seed=0):
    """uint8 [H, W, 3], smooth."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def edit(served, image, mask=None, **fields):
    """POST of arrays or bytes as a form."""
    files = [("image", ("../../etc/x.png", one)) for one in ([image] if isinstance(image, bytes) else image)]
    files += [("mask", ("m", mask))] if mask is not None else []
    text = {name: json.dumps(v) if isinstance(v, (list, dict, bool)) else str(v) for name, v in fields.items()}
    return served.client.post(EDITS, files=files, data={"prompt": "a fist", "num_inference_steps": "2", **text})


def shown(answer, i=0):
    assert answer.status_code == 200, answer.text[:400]
    content = base64.b64decode(answer.json()["data"][i]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def error_of(answer, status=400):
    assert answer.status_code == status, answer.text[:400]
    return answer.json()["error"]


def size(served):
    return served.service.bundle.manifest.image_size


@pytest.fixture(scope="module")
def picture(served):
    return encode_png(noise(*size(served)))


def transparent(height, width, rows, columns):
    """A mask as OpenAI has it: a PNG whose transparent part is to be painted."""
    array = np.full((height, width, 4), 255, np.uint8)
    array[rows, columns, 3] = 0
    return encode_png(array)


def test_the_picture_decides_the_result(served, picture):
    other = encode_png(noise(*size(served), seed=1))
    one, same, two = (shown(edit(served, image, seed=3, strength=0.5)) for image in (picture, picture, other))
    assert one.shape == (*size(served), 3)
    assert np.array_equal(one, same) and not np.array_equal(one, two)


def test_the_official_client_edits(served, picture):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    height, width = size(served)
    extra = {"num_inference_steps": 2, "seed": 5}
    answer = client.images.edit(image=picture, prompt="a fist", n=2, size=f"{width}x{height}", extra_body=extra)
    assert len(answer.data) == 2 and [one.seed for one in answer.data] == [5, 6]
    answer = client.images.edit(image=[picture, picture], prompt="a fist", extra_body=extra)
    assert len(answer.data) == 2 and answer.data[0].b64_json == answer.data[1].b64_json
    mask = transparent(height, width, slice(0, height // 2), slice(None))
    answer = client.images.edit(image=picture, mask=mask, prompt="a fist", response_format="b64_json", extra_body=extra)
    out = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))))
    assert np.array_equal(out[height // 2 :], noise(height, width)[height // 2 :])
    assert not np.array_equal(out[: height // 2], noise(height, width)[: height // 2])
    events = client.images.edit(image=picture, prompt="a fist", stream=True, partial_images=2, extra_body=extra)
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_edit.completed" and set(kinds[:-1]) == {"image_edit.partial_image"}


def test_the_form_of_open_webui(served, picture):
    """By its source: a list of files is image[], and a model that was not chosen is empty."""
    form = {"model": "", "prompt": "a fist", "n": "1", "response_format": "b64_json"}
    files = [("image[]", ("1.png", picture, "image/png"))]
    assert shown(served.client.post(EDITS, files=files, data=form)).shape == (*size(served), 3)


def test_with_a_mask_the_picture_keeps_its_size_and_its_bytes_outside(served):
    big = noise(150, 230)
    answer = edit(served, encode_png(big), transparent(150, 230, slice(30, 90), slice(50, 120)))
    out = shown(answer)
    inside = np.zeros((150, 230), bool)
    inside[30:90, 50:120] = True
    assert out.shape == big.shape and answer.json()["size"] == "230x150"
    assert np.array_equal(out[~inside], big[~inside]) and (out[inside] != big[inside]).mean() > 0.3
    assert "looks soft" in answer.json()["warnings"][0]
    height, width = size(served)
    small = shown(edit(served, encode_png(big), transparent(150, 230, 5, 5), size=f"{width}x{height}"))
    assert small.shape == (height, width, 3)


def test_a_transparent_part_of_the_image_is_its_mask(served):
    height, width = size(served)
    own = np.dstack([noise(height, width), np.full((height, width), 255, np.uint8)])
    own[: height // 2, :, 3] = 0
    out = shown(edit(served, encode_png(own)))
    assert np.array_equal(out[height // 2 :], own[height // 2 :, :, :3])


def test_laid_fades_inwards():
    picture, painted = np.zeros((40, 40, 3), np.uint8), np.full((10, 10, 3), 200, np.uint8)
    mask = np.zeros((40, 40), np.uint8)
    mask[10:30, 10:30] = 255
    out = laid(picture, painted, mask)
    assert (out[mask == 0] == 0).all() and (out[20, 20] == 200).all() and 0 < out[10, 20, 0] < 200
    assert (laid(picture, painted, np.full((40, 40), 255, np.uint8)) == 200).all()


def test_pictures_lie_as_their_exif_says(served):
    height, width = 90, 60
    array = noise(height, width)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(array)).save(buffer, "PNG", exif=exif)
    answer = edit(served, buffer.getvalue(), transparent(height, width, 5, 5))
    out = shown(answer)
    assert answer.json()["size"] == f"{width}x{height}" and np.array_equal(out[20:], array[20:])


def test_the_profile_of_a_picture_stays(served):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    buffer = io.BytesIO()
    Image.fromarray(noise(60, 60)).save(buffer, "PNG", icc_profile=profile)
    answer = edit(served, buffer.getvalue(), transparent(60, 60, 5, 5)).json()
    made = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert made.info["icc_profile"] == profile


def test_a_repaired_picture_keeps_what_its_file_carried(demo):
    """As hd-repair does: alpha, EXIF, profile and greys; a JPEG is white where the picture was transparent."""
    pytest.importorskip("cv2")
    array = np.full((150, 200, 4), (60, 90, 140, 255), np.uint8)
    array[45:125, 50:110, :3] = (220, 170, 140)  # what lies under the new hand
    array[:20, :, 3] = 0
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010E] = 6, "mine"
    Image.fromarray(np.rot90(array)).save(buffer, "PNG", exif=exif, icc_profile=b"colours")
    rest = joints_at_rest(shipped.bundle_path())
    hand = arrays_of([placed(np.array([40.0, 40, 120, 130]), "right", "fist", rest)], (150, 200), rest)
    form = {"repair": "true", "hands": json.dumps(as_json(hand)), "seed": "1", "n": "2", "num_inference_steps": "2"}
    answer = demo.client.post(EDITS, files={"image": buffer.getvalue()}, data=form)
    assert answer.status_code == 200, answer.text
    first, second = (Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))) for one in answer.json()["data"])
    assert not np.array_equal(first, second)
    for made in (first, second):
        out = np.asarray(made)
        assert made.info["icc_profile"] == b"colours" and dict(made.getexif()) == {0x0112: 1, 0x010E: "mine"}
        assert np.array_equal(out[..., 3], array[..., 3]) and np.array_equal(out[:10], array[:10])
    files = {"image": buffer.getvalue()}
    answer = demo.client.post(EDITS, files=files, data={**form, "n": "1", "output_format": "jpeg"})
    made = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    assert made.format == "JPEG" and made.getexif()[0x010E] == "mine" and np.asarray(made)[:8].min() > 240
    said = error_of(demo.client.post(EDITS, files=files, data={**form, "lora": "style"}))
    assert said["param"] == "lora", "a repair takes adapters, and this server has none"


@pytest.mark.slow
def test_the_servers_negative_prompt_is_that_of_a_repair(tmp_path):
    """Where the guidance is above 1, and the client gives none of its own."""
    pytest.importorskip("cv2")
    rest = joints_at_rest(shipped.bundle_path())
    hand = arrays_of([placed(np.array([40.0, 40, 120, 130]), "right", "fist", rest)], (150, 200), rest)
    form = {"repair": "true", "hands": json.dumps(as_json(hand)), "seed": "1", "num_inference_steps": "2"}
    form |= {"guidance_scale": "4", "prompt": "a right hand making a fist"}
    with serving(shipped.bundle_path(), tmp_path, front=Front(negative_prompt="a blue background")) as own:
        files = {"image": encode_png(noise(150, 200))}
        unsaid, same, other = (
            shown(own.client.post(EDITS, files=files, data={**form, **said}))
            for said in ({}, {"negative_prompt": "a blue background"}, {"negative_prompt": "a red background"})
        )
    assert np.array_equal(unsaid, same) and not np.array_equal(unsaid, other)


class Eyes:
    """A detector that finds one hand in every picture."""

    convention, name = Convention.true(0.004), "Eyes"

    def __call__(self, image):
        rest = joints_at_rest(shipped.bundle_path())
        joints = placed(np.array([40.0, 40, 120, 130]), "right", "open_hand", rest).hand.joints_2d
        return [Found("right", 0.9, joints / (200, 150))]

    once = __call__

    def sureness(self, found, residual, degrees):
        return 0.9


@pytest.mark.slow
def test_the_detector_looks_again_at_painted_hands(tmp_path, monkeypatch):
    """As in hd-repair: the hand comes out elsewhere in the second of two pictures, so it stays there."""
    pytest.importorskip("cv2")
    from handiffuser.repair.patch import Patch
    from handiffuser.serving import finding

    moved = {Eyes: iter([0.0, 1.0, 0.0, 0.0])}  # of the first picture, the second, and those of later requests
    monkeypatch.setattr(finding, "MediaPipe", Eyes)
    monkeypatch.setattr(Patch, "moved", lambda self, before, after, detector: next(moved[type(detector)]))
    plain = noise(150, 200)
    files, form = {"image": encode_png(plain)}, {"repair": "true", "seed": "1", "num_inference_steps": "2"}
    with serving(shipped.bundle_path(), tmp_path) as own:
        answer = own.client.post(EDITS, files=files, data={**form, "n": "2"})
        first, second = shown(answer), shown(answer, 1)
        assert not np.array_equal(first, plain) and np.array_equal(second, plain)
        assert [one["repaired"] for one in answer.json()["data"]] == [1, 0]
        (said,) = answer.json()["warnings"]
        assert said.startswith("Picture 2: The right hand at (") and "so it stays. Send it as hands" in said
        given = {**form, "stream": "true", "partial_images": "4", "return_hands": "true", "num_inference_steps": "8"}
        lines = own.client.post(EDITS, files=files, data=given).text.splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        hands, *previews, done = events
        assert hands["kind"] == "hands" and [one["visibility"] for one in hands["hands"]] == [[0, 1]]
        assert 1 <= len(previews) <= 3 and done["type"] == "image_edit.completed" and done["repaired"] == 1
        assert [one["step"] for one in previews] == sorted({one["step"] for one in previews})
        assert {(one["type"], one["steps"], one["size"]) for one in previews} == {
            ("image_edit.partial_image", 8, "200x150")
        }
        pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))) for one in [*previews, done]]
        whole = own.client.post(EDITS, files=files, data={**form, "num_inference_steps": "8"})
        assert np.array_equal(pictures[-1], shown(whole)) and not np.array_equal(pictures[0], pictures[-1])
        assert (pictures[0][:, 180:] == plain[:, 180:]).all()
        wrong = own.client.post(EDITS, files=files, data={**form, "stream": "true", "num_inference_steps": "5000"})
        assert "num_inference_steps must be" in error_of(wrong)["message"]


def bomb(width, height):
    """A PNG of a few bytes whose header promises many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_what_is_refused(served, picture):
    height, width = size(served)

    def said(answer, status=400):
        return error_of(answer, status)["message"]

    assert said(edit(served, b"GIF89a")) == "image must be PNG, JPEG or WebP. Convert it first."
    assert "at most 51 million pixels" in said(edit(served, bomb(60000, 60000)))
    assert "at most 51 million pixels" in said(edit(served, bomb(8200, 6300)))
    assert "cannot be decoded" in said(edit(served, picture[: len(picture) // 2]))
    assert "mask must have the size of its image" in said(edit(served, picture, encode_png(noise(7, 9))))
    assert "mask that keeps all" in said(edit(served, picture, encode_png(np.zeros((height, width), np.uint8))))
    assert "mask must be one file" in said(edit(served, [picture] * 2, picture))
    assert "n must be at most 2 with 3 images" in said(edit(served, [picture] * 3, n=3))
    assert "n must be a valid integer, got 'many'" in said(edit(served, picture, n="many"))
    assert "must be one with stream" in said(edit(served, [picture] * 2, stream=True))
    assert error_of(edit(served, picture, colour="red"))["code"] == "unknown_field"
    assert error_of(edit(served, picture, prompt=" "))["param"] == "prompt"
    assert "hands must be JSON" in said(edit(served, picture, hands="{1"))
    assert error_of(edit(served, picture, model="other"), 404)["code"] == "model_not_found"
    post = served.client.post
    assert "prompt must be given" in said(post(EDITS, files={"image": picture}))
    assert "image must be given" in said(post(EDITS, files={"mask": picture}))
    assert "image must be a file" in said(post(EDITS, files={"mask": picture}, data={"image": "me"}))
    assert "'file' is unknown" in said(post(EDITS, files={"file": picture}))
    assert "must be a form" in said(post(EDITS, json={"prompt": "a fist"}), 415)
    damaged = {"Content-Type": "multipart/form-data; boundary=x"}
    assert "must be a form" in said(post(EDITS, content=b"--y\r\n", headers=damaged))
    cross = {"Sec-Fetch-Site": "cross-site", "Origin": "http://elsewhere.example"}
    assert "must be this server's" in said(post(EDITS, files={"image": picture}, headers=cross))


def test_every_field_is_named_when_it_is_wrong(served, picture):
    for name in sorted(EditForm.model_fields.keys() - {"model"}):
        # A form's text is text: these take any.
        if name not in ("prompt", "user", "safety_identifier", "quality", "style", "moderation", "complexity", "size",
                        "negative_prompt", "input_fidelity", "timeout"):  # fmt: skip
            assert error_of(edit(served, picture, **{name: "\x01 not this"}))["param"] == name


def test_limits_of_bytes_and_pixels(toy_bundle, tmp_path):
    limits = Limits(upload=20_000, pixels=10_000)
    with serving(toy_bundle, tmp_path / "limits", limits=limits, front=Front(response_format="url")) as served:
        answer = edit(served, encode_png(noise(90, 90)))
        name = answer.json()["data"][0]["url"].rpartition("/")[2]
        assert served.client.get(f"/v1/files/{name}").status_code == 200
        assert "at most 0.01 million pixels" in error_of(edit(served, encode_png(noise(101, 100))))["message"]
        assert error_of(edit(served, os.urandom(30_000)), 413)["message"].startswith("The body must have at most")


def test_no_file_is_written(served, picture, monkeypatch):
    import tempfile

    def never(*args, **kwargs):
        raise AssertionError("a file")

    monkeypatch.setattr(tempfile, "TemporaryFile", never)
    monkeypatch.setattr(tempfile, "_TemporaryFileWrapper", never)
    before = sorted(served.service.folder.iterdir())
    large = np.random.default_rng(0).integers(0, 255, (800, 800, 3), np.uint8)  # 2 MB, more than Starlette keeps
    assert edit(served, encode_png(large)).status_code == 200
    assert sorted(served.service.folder.iterdir()) == before


# ---------------------------------------------------------------- hands


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    with serving(shipped.bundle_path(), tmp_path_factory.mktemp("edits")) as one:
        yield one


def scene(demo, size=(300, 480), at=(60, 120), side=160, prompt="a right hand making a peace sign, blue background"):
    """A picture with a painted hand: uint8 [H, W, 3]."""
    painted = shown(demo.generate(prompt, seed=3))
    out = noise(*size)
    out[at[0] : at[0] + side, at[1] : at[1] + side] = np.asarray(Image.fromarray(painted).resize((side, side)))
    return out


def detect(demo, picture, **fields):
    answer = demo.client.post(DETECT, files={"image": encode_png(picture)}, data=fields)
    assert answer.status_code == 200, answer.text[:400]
    return answer.json()["data"]


def repair(demo, picture, mask=None, **fields):
    text = {name: json.dumps(v) if isinstance(v, (list, dict)) else str(v) for name, v in fields.items()}
    files = {"image": encode_png(picture), **({"mask": mask} if mask is not None else {})}
    return demo.client.post(EDITS, files=files, data={"repair": "true", **text})


@pytest.mark.slow
@needs_detector
def test_hands_are_found_changed_and_repaired(demo):
    picture = scene(demo)
    (found,) = detect(demo, picture)
    assert found["side"] == "right" and 0 <= found["sureness"] <= 1
    points = np.array(found["points"])
    assert ((points > (120 / 480, 60 / 300)) & (points < (280 / 480, 220 / 300))).all()
    joints = np.array(found["hands"]["joints_2d"])[1]
    assert np.abs((joints - points) * (480, 300)).max() < 30  # a rig's joints are near the detector's points
    change = {"hands": found["hands"], "gesture": {"hand": "right", "name": "open_hand"}}
    edited = demo.client.post("/v1/hands/edit", json=change).json()["hands"]
    asked = [{**edited, "old": found["points"], "gesture": "open_hand"}]
    answer = repair(demo, picture, hands=asked, seed=4, n=2, return_hands="true")
    out, other = shown(answer), shown(answer, 1)
    assert out.shape == picture.shape and answer.json()["size"] == "480x300"
    changed = (out != picture).any(-1)
    assert changed.any() and not changed[:, :60].any() and not changed[:, 400:].any()
    assert not np.array_equal(out, other)
    assert [one["seed"] for one in answer.json()["data"]] == [4, 5]
    assert np.array_equal(shown(repair(demo, picture, hands=asked, seed=4)), out)  # alone, or in a batch
    again = detect(demo, out)
    assert again and again[0]["gesture"] != "victory"


@pytest.mark.slow
@needs_detector
def test_two_hands_that_touch_follow_each_other(demo):
    picture = scene(demo, (160, 340), (0, 10))
    picture[0:160, 170:330] = picture[0:160, 10:170][:, ::-1]
    found = detect(demo, picture)
    assert {one["side"] for one in found} == {"left", "right"}
    out = shown(repair(demo, picture, hands=[one["hands"] for one in found], seed=1))
    assert (out != picture).any(-1)[:, :170].any() and (out != picture).any(-1)[:, 170:].any()


@pytest.mark.slow
@needs_detector
def test_repairs_that_are_refused(demo):
    plain = np.full((200, 200, 3), 90, np.uint8)
    assert "hand that the detector finds" in error_of(repair(demo, plain))["message"]
    assert "size must be auto" in error_of(repair(demo, plain, size="64x64"))["message"]
    assert "hand that the detector finds" in error_of(repair(demo, plain, stream="true"))["message"]
    (placed,) = detect(demo, plain, box="[0.2,0.2,0.8,0.8]")
    two = {**placed["hands"], "visibility": [1, 1]}
    assert "one hand each" in error_of(repair(demo, plain, hands=[two]))["message"]
    assert (
        "hands must be at most 4 with n = 2"
        in error_of(repair(demo, plain, hands=[placed["hands"]] * 5, n=2))["message"]
    )


@pytest.mark.slow
@needs_detector
def test_a_hand_is_placed_where_none_is_found(demo):
    plain = np.full((240, 320, 3), 90, np.uint8)
    for side, s in (("left", 0), ("right", 1)):
        (placed,) = detect(demo, plain, box="[0.25,0.25,0.75,0.9]", side=side, gesture="fist")
        joints = np.array(placed["hands"]["joints_2d"])[s]
        assert placed["side"] == side and placed["gesture"] == "fist" and placed["sureness"] is None
        assert (joints > (0.2, 0.2)).all() and (joints < (0.8, 0.95)).all() and joints[9, 1] < joints[0, 1]
        mask = np.zeros((240, 320), np.uint8)
        mask[100:140, 150:180] = 255
        out = shown(repair(demo, plain, encode_png(mask), hands=placed["hands"], seed=2))
        assert (out != plain).any(-1)[60:216, 80:240].mean() > 0.05
    answer = demo.client.post(DETECT, files={"image": encode_png(plain)}, data={"box": "[0,0,0.001,0.5]"})
    assert "at least 8 pixels" in error_of(answer)["message"]


def test_without_the_detector_a_sentence_says_how_to_install_it(served, monkeypatch):
    from handiffuser.errors import DetectionError
    from handiffuser.serving import finding

    def missing():
        raise DetectionError('MediaPipe is not installed. Install it: pip install "handiffuser[detect]"')

    monkeypatch.setattr(finding, "MediaPipe", missing)
    answer = served.client.post(DETECT, files={"image": encode_png(noise(30, 30))})
    assert "This server finds no hands: MediaPipe is not installed." in error_of(answer, 501)["message"]


def test_hands_of_a_picture_come_back_from_their_arrays():
    rest = joints_at_rest(shipped.bundle_path())
    one = placed(np.array([30.0, 20, 130, 160]), "right", "victory", rest)
    back = seen_of(arrays_of([one], (200, 300), rest), (200, 300), "victory")
    assert back.side == "right" and back.gesture == "victory"
    assert np.abs(back.hand.joints_2d - one.hand.joints_2d).max() < 1.5
    assert np.abs(back.hand.turn - one.hand.turn).max() < 1e-5
    assert np.abs(back.hand.fingers - one.hand.fingers).max() < 1e-5
    assert replace(back).sureness is None
