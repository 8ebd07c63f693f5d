"""Pictures of all kinds to plain RGB: the module converts each of Pillow's modes on purpose, or refuses it by name.

    decode(content)      # uint8 [H, W, 3], upright
    decode_mask(content) # uint8 [H, W], upright: 255 where it is white, or transparent
    size_of(content)     # (H, W) of the same, by the header alone

Grey, palettes, YCbCr, HSV and CMYK (without its colour profile) become RGB. Transparent pixels are laid on white.
16-bit grey keeps its upper byte. A camera's EXIF orientation is applied. Refused: 32-bit and floating-point numbers,
which do not define white; LAB, which needs a profile; animations, whose frame is ambiguous; and more than MAX_PIXELS.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .schema import MisfitError

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
# Cameras write .JPG.
SPELLINGS = tuple(spelling for name in PICTURES for spelling in (name, name.upper(), "." + name[1:].capitalize()))
# Formats that we do not read: their files are reported, not ignored.
FOREIGN = (".tif", ".tiff", ".bmp", ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".jfif", ".tga", ".dng")
PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
SEVERAL = ("MPO",)  # a phone's JPEG with more pictures behind the first
MAX_PIXELS = 89_478_485  # Pillow warns of decompression bombs from here on
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `_opened` refuses them with a sentence
# The brands of ISO base media files that cameras write.
BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC", b"hevc": "HEIC", b"avif": "AVIF"}
HEIC = "Its picture must be PNG, JPEG or WebP, got {}. Save it as JPEG; an iPhone does so itself under Most Compatible."


def decode(content: bytes) -> np.ndarray:
    """The picture, uint8 [H, W, 3], upright. Raises MisfitError for one that is damaged or refused."""
    with _opened(content) as image:
        return np.asarray(_rgb(ImageOps.exif_transpose(image)))


def decode_mask(content: bytes, opaque: bool = False) -> np.ndarray:
    """A mask, uint8 [H, W], upright. Where it has transparent pixels, these count as white and the others as black, as
    in OpenAI's API; opaque: the other way round, as in AUTOMATIC1111's. Else its grey counts. Raises MisfitError as
    `decode` does."""
    with _opened(content) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            alpha = np.asarray(upright.convert("RGBA"))[..., 3]
            if alpha.min() < 255:
                return alpha if opaque else 255 - alpha
        return np.asarray(_rgb(upright).convert("L"))


def size_of(content: bytes) -> tuple[int, int]:
    """Height and width of the upright picture by its header alone. Raises MisfitError."""
    with _opened(content) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # the camera lay on its side
        return (image.width, image.height) if turned else (image.height, image.width)


def _brand(content: bytes) -> str | None:
    """HEIC or AVIF, of a file that is one."""
    return BRANDS.get(content[8:12]) if content[4:8] == b"ftyp" else None


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise MisfitError(
                    f"Its picture must have at most {MAX_PIXELS / 1e6:.0f} million pixels, got {image.width} x "
                    f"{image.height}. Make it smaller."
                )
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format not in SEVERAL:
                raise MisfitError(
                    f"Its picture must have one frame, got an animation of {frames} frames. Save one of them."
                )
            yield image
    except MisfitError:
        raise
    except Image.DecompressionBombError:
        raise MisfitError(
            f"Its picture must have at most {MAX_PIXELS / 1e6:.0f} million pixels, got twice as many. Make it smaller."
        ) from None
    except Exception as error:  # Pillow raises many kinds
        if isinstance(error, UnidentifiedImageError) and (brand := _brand(content)):
            raise MisfitError(HEIC.format(brand)) from None
        why = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error)[:200].rstrip(".")
        raise MisfitError(f"Its picture cannot be decoded: {why}.") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    if image.mode in PLAIN:
        return image.convert("RGB")
    raise MisfitError(f"Its picture must be 8-bit RGB or alike, got Pillow's mode {image.mode}. Save it as 8-bit RGB.")


def kind_of(content: bytes) -> str:
    """ "png", "jpg" or "webp", by the first bytes. Raises MisfitError for another format."""
    if content.startswith(b"\x89PNG"):
        return "png"
    if content.startswith(b"\xff\xd8"):
        return "jpg"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    brand = _brand(content)
    raise MisfitError(HEIC.format(brand) if brand else "Its picture must be PNG, JPEG or WebP. Convert it first.")


def encode_png(image: np.ndarray, level: int = 6) -> bytes:
    """uint8 [H, W], [H, W, 3] or [H, W, 4] -> the content of a .png. level: of compression, 0 to 9."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def resized(image: np.ndarray, size: tuple[int, int], box: bool = False) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3], stretched to `size` (H, W) with Lanczos' filter, as diffusers does. box: each pixel is
    the mean of what it covers."""
    if image.shape[:2] == size:
        return image
    how = Image.Resampling.BOX if box else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), how))
