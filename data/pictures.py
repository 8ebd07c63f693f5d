"""Pictures of all kinds to plain RGB: each of Pillow's modes is converted on purpose, or refused by name.

    decode(content)      # uint8 [H, W, 3], upright
    size_of(content)     # (H, W) of the same, by the header alone

Grey, palettes, YCbCr, HSV and CMYK (without its colour profile) become RGB. What is transparent is laid on white. Of
16-bit grey the upper byte is taken. A camera's EXIF orientation is applied. Refused: 32-bit and floating-point numbers,
which say nothing of where white is; LAB, which needs a profile; animations, for which frame would it be?
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..schema import MisfitError

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
# As they are written; a camera writes .JPG.
SPELLINGS = tuple(spelling for name in PICTURES for spelling in (name, name.upper(), "." + name[1:].capitalize()))
# Pictures that are not read: they are named, not passed over.
FOREIGN = (".tif", ".tiff", ".bmp", ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".jfif", ".tga", ".dng")
PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
SEVERAL = ("MPO",)  # a JPEG of a telephone, with further pictures behind the first


def decode(content: bytes) -> np.ndarray:
    """The picture, uint8 [H, W, 3], upright. Raises MisfitError for one that is damaged or refused."""
    with _opened(content) as image:
        return np.asarray(_rgb(ImageOps.exif_transpose(image)))


def size_of(content: bytes) -> tuple[int, int]:
    """Height and width of the upright picture by its header alone. Raises MisfitError."""
    with _opened(content) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # the camera lay on its side
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(content)) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format not in SEVERAL:
                raise MisfitError(f"Its picture is an animation of {frames} frames. Save one of them.")
            yield image
    except MisfitError:
        raise
    except Exception as error:  # Pillow fails on bad files in many ways
        why = "it is none" if isinstance(error, UnidentifiedImageError) else str(error)[:200].rstrip(".")
        raise MisfitError(f"Its picture cannot be decoded: {why}.") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    if image.mode in PLAIN:
        return image.convert("RGB")
    raise MisfitError(f"Its picture has Pillow's mode {image.mode}, which is not read. Save it as 8-bit RGB.")


def kind_of(content: bytes) -> str:
    """ "png", "jpg" or "webp", by the first bytes. Raises MisfitError for another format."""
    if content.startswith(b"\x89PNG"):
        return "png"
    if content.startswith(b"\xff\xd8"):
        return "jpg"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    raise MisfitError("Its picture is neither PNG nor JPEG nor WebP. Convert it first.")


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> the content of a .png."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
