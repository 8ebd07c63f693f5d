"""Pictures as their files hold them: read upright, painted over, written back with all that they carried.

    original = Original.read(path)                    # or Original.of(content)
    original.image                                    # uint8 [H, W, 3], upright
    content = original.encoded(repaired, {NOTE: note})

The new file is upright, and its EXIF says so: many programs do not turn a PNG.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from ..errors import DetectionError
from ..pictures import decode
from ..schema import MisfitError, read_file

MAX_BYTES = 1 << 28  # of a picture's file
NOTE = "handiffuser-repair"  # the PNG text that says what was painted
ORIENTATION = 0x0112  # EXIF's tag
PNG_LEVEL = 4  # of zlib: less than half the time of the usual level, for files that are 4 % larger
CARRIED = ("exif", "icc_profile", "dpi")


@dataclass
class Original:
    """image: uint8 [H, W, 3], upright. alpha: uint8 [H, W], upright, or None. grey: whether it had no colours. info:
    EXIF, profile, resolution, and its texts."""

    content: bytes = field(repr=False)
    image: np.ndarray = field(repr=False)
    alpha: np.ndarray | None = field(repr=False)
    grey: bool
    info: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> Original:
        """Raises DetectionError for a file that cannot be read as a picture."""
        try:
            return cls.of(read_file(path, MAX_BYTES))
        except FileNotFoundError:
            raise DetectionError(f"The picture {path} does not exist. Check the path.") from None
        except OSError as error:
            raise DetectionError(f"The picture {path} cannot be read: {error.strerror or error}.") from None
        except MisfitError as error:
            raise DetectionError(f"The picture {path} cannot be read: {error}") from None

    @classmethod
    def of(cls, content: bytes) -> Original:
        """content: of a file. Raises MisfitError as `pictures.decode` does."""
        image, alpha = decode(content), None
        with Image.open(io.BytesIO(content)) as held:
            if held.has_transparency_data:
                upright = np.asarray(ImageOps.exif_transpose(held).convert("RGBA"))
                image, alpha = upright[..., :3].copy(), upright[..., 3]
            exif = held.getexif()
            info = {name: held.info[name] for name in CARRIED if held.info.get(name)}
            if exif.get(ORIENTATION, 1) != 1:
                exif[ORIENTATION] = 1
                info["exif"] = exif.tobytes()
            if held.mode == "CMYK":  # its profile does not fit what is written
                info.pop("icc_profile", None)
            texts = {name: text for name, text in getattr(held, "text", {}).items() if isinstance(text, str)}
            grey = held.mode in ("1", "L", "LA") or held.mode.startswith("I")
        return cls(content, image, alpha, grey, {**info, "text": texts})

    @property
    def shown(self) -> np.ndarray:
        """uint8 [H, W, 3]: what one sees of it, on white where it is transparent."""
        if self.alpha is None or (self.alpha == 255).all():
            return self.image
        share = self.alpha[..., None] / np.float32(255)
        return (self.image * share + 255 * (1 - share) + 0.5).astype(np.uint8)

    def in_colours(self) -> Original:
        """What an opaque picture in colours takes of it."""
        info = {name: value for name, value in self.info.items() if not (self.grey and name == "icc_profile")}
        return replace(self, alpha=None, grey=False, info=info)

    def profile_alone(self) -> Original:
        """What a picture takes of it that begins with its colours, and shows something else."""
        return replace(self, info={"text": {}, "icc_profile": self.info.get("icc_profile", b"")})

    def encoded(
        self, image: np.ndarray, texts: Mapping[str, str], format: str = "png", quality: int | None = None
    ) -> bytes:
        """A file of a painted picture uint8 [H, W, 3], with all that the original carried. A JPEG has no alpha: its
        transparent pixels are white. format: png, jpeg or webp. quality: 0 to 100, of the last two. texts: more of
        them, for a PNG."""
        if self.alpha is not None:
            image = np.concatenate([image, self.alpha[..., None]], -1)
        made = Image.fromarray(image)
        if self.alpha is not None and format == "jpeg":
            made = Image.alpha_composite(Image.new("RGBA", made.size, "white"), made).convert("RGB")
        if self.grey and format != "webp":
            made = made.convert("LA" if made.mode == "RGBA" else "L")
        kept: dict[str, Any] = {name: value for name, value in self.info.items() if value and name != "text"}
        if format == "png":
            kept["pnginfo"] = PngImagePlugin.PngInfo()
            for name, text in {**self.info["text"], **texts}.items():
                kept["pnginfo"].add_itxt(name, text.replace("\0", " "))
            kept["compress_level"] = PNG_LEVEL
        else:
            kept["quality"] = 90 if quality is None else quality
        buffer = io.BytesIO()
        made.save(buffer, format.upper(), **kept)
        return buffer.getvalue()
