"""Every mode that Pillow opens becomes RGB on purpose, or is refused by name; and so is every name of a file."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from handiffuser.data.samples import Bad, Sample, picture, read
from handiffuser.pictures import decode, encode_png, kind_of, size_of
from handiffuser.schema import MisfitError
from PIL import Image

RED, CLEAR = (200, 40, 40), (0, 0, 0, 0)


def content(image: Image.Image, form: str = "PNG", **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **more)
    return buffer.getvalue()


def half_clear() -> Image.Image:
    """Red on the left, transparent black on the right."""
    image = Image.new("RGBA", (8, 4), CLEAR)
    image.paste((*RED, 255), (0, 0, 4, 4))
    return image


def palette(**more) -> bytes:
    image = Image.new("P", (8, 4), 1)
    image.putpalette([*RED, 10, 20, 30])
    image.paste(0, (0, 0, 4, 4))
    return content(image, transparency=1, **more)


RAMP = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (4, 1))
PLAIN = {
    "1": (content(Image.new("1", (8, 4), 1)), (255, 255, 255)),
    "L": (content(Image.new("L", (8, 4), 77)), (77, 77, 77)),
    "LA": (content(Image.new("LA", (8, 4), (77, 255))), (77, 77, 77)),
    "RGB": (content(Image.new("RGB", (8, 4), RED)), RED),
    "RGBA": (content(Image.new("RGBA", (8, 4), (*RED, 255))), RED),
    "CMYK": (content(Image.new("RGB", (8, 8), RED).convert("CMYK"), "JPEG", quality=100), RED),
    "YCbCr": (content(Image.new("RGB", (8, 8), RED).convert("YCbCr"), "JPEG", quality=100), RED),
    "YCbCr TIFF": (content(Image.new("RGB", (8, 8), RED).convert("YCbCr"), "TIFF"), RED),
    "WebP": (content(Image.new("RGB", (8, 4), RED), "WEBP", lossless=True), RED),
}


@pytest.mark.parametrize("name", PLAIN)
def test_modes_become_rgb(name):
    image, colour = PLAIN[name]
    found = decode(image)
    assert found.shape[:2] == size_of(image) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - colour).max() <= 3


def test_grey_of_16_bits_keeps_its_upper_byte():
    assert np.array_equal(decode(content(Image.fromarray(RAMP)))[..., 0], RAMP >> 8)
    tiff = content(Image.fromarray(RAMP.astype(">u2")), "TIFF")
    assert np.array_equal(decode(tiff)[..., 1], RAMP >> 8)


@pytest.mark.parametrize(
    "image",
    [content(half_clear()), content(half_clear(), "WEBP", lossless=True), palette()],
    ids=["RGBA", "WebP", "palette"],
)
def test_what_is_transparent_lies_on_white(image):
    found = decode(image)
    assert (found[:, :4] == RED).all() and (found[:, 4:] == 255).all()


def test_grey_and_colours_with_a_transparent_value():
    grey = content(Image.new("L", (4, 4), 9), transparency=9)
    colour = content(Image.new("RGB", (4, 4), RED), transparency=RED)
    assert (decode(grey) == 255).all() and (decode(colour) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("JPEG", "PNG", "WEBP"):
        image = content(Image.new("RGB", (6, 4), RED), form, exif=exif)
        assert decode(image).shape[:2] == size_of(image) == ((6, 4) if orientation >= 5 else (4, 6))


FRAMES = [Image.new("RGB", (8, 4), (value, 0, 0)) for value in (0, 99, 200)]
REFUSED = {
    "I": (content(Image.new("I", (4, 4), 70_000), "TIFF"), "mode I. "),
    "F": (content(Image.new("F", (4, 4), 0.5), "TIFF"), "mode F. "),
    "LAB": (content(Image.new("LAB", (4, 4)), "TIFF"), "mode LAB. "),
    "GIF": (content(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "animation of 3 frames"),
    "APNG": (content(FRAMES[0], save_all=True, append_images=FRAMES[1:]), "animation of 3 frames"),
    "animated WebP": (content(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "animation of 3 frames"),
    "nothing": (b"", "cannot be decoded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_white_or_several_frames_is_refused_by_name(name):
    image, words = REFUSED[name]
    with pytest.raises(MisfitError, match=words):
        decode(image)


def test_the_first_picture_of_a_telephones_jpeg_is_taken():
    image = content(FRAMES[2], "MPO", save_all=True, append_images=FRAMES[:1])
    assert np.abs(decode(image).astype(int) - (200, 0, 0)).max() <= 3


ENDINGS = (".jpg", ".JPG", ".Jpg", ".jpeg", ".JPEG", ".png", ".PNG", ".webp", ".WEBP", ".Webp")


def plain(folder: Path, *names: str) -> None:
    for name in names:
        image = encode_png(np.full((4, 6, 3), 9, np.uint8))
        (folder / name).write_bytes(json.dumps({"prompt": name}).encode() if name.lower().endswith("json") else image)


@pytest.mark.parametrize("ending", ENDINGS)
def test_endings_are_read_as_cameras_write_them(tmp_path, ending):
    plain(tmp_path, "IMG_1.json", f"IMG_1{ending}")
    (sample,) = read(tmp_path)
    assert sample.key == "IMG_1" and picture(sample).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a.json", "a.heic"), "a.heic must be PNG, JPEG or WebP"),
        (("a.json", "a.TIF"), "a.TIF must be"),
        (("a.json", "a.jPg"), "Rename it in lower case"),
        (("a.JSON", "a.jpg"), "Rename it in lower case"),
        (("a.json", "a.jpg", "a.JPEG"), "a picture twice"),
        (("a.JPG",), "lacks its a.json"),
    ],
)
def test_names_that_are_not_read_are_named(tmp_path, names, words):
    plain(tmp_path, "b.json", "b.PNG", *names)
    a, b = sorted(read(tmp_path), key=lambda one: one.key)
    assert isinstance(a, Bad) and words in a.sentence and isinstance(b, Sample)


@pytest.mark.filterwarnings("ignore:Image size")
def test_photographs_of_telephones():
    """HEIC is named, a picture of 108 million pixels is refused, and so is half a file."""
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
    for read_it in (decode, kind_of):
        with pytest.raises(MisfitError, match=r"must be PNG, JPEG or WebP, got HEIC\. Save it as JPEG"):
            read_it(heic)
    header = content(Image.new("L", (1, 1)), "PNG")
    huge = header[:16] + (12000).to_bytes(4, "big") + (9000).to_bytes(4, "big") + header[24:29]
    huge += zlib.crc32(huge[12:29]).to_bytes(4, "big") + header[33:]
    with pytest.raises(MisfitError, match="at most 89 million pixels, got 12000 x 9000"):
        decode(huge)
    cut = content(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    with pytest.raises(MisfitError, match="cannot be decoded: image file is truncated"):
        decode(cut[: len(cut) // 2])
