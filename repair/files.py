"""Pictures as they lie on disk: read upright, repaired, written back with all that they carried.

original = Original.read(path)
original.image                        # uint8 [H, W, 3], upright
content = original.encoded(repaired, note)
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
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
# How to bring an upright picture back to the orientation that its EXIF names.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@dataclass
class Original:
    """image: uint8 [H, W, 3], upright. alpha: uint8 [H, W], upright, or None. grey: whether it had no colours."""

    path: Path
    content: bytes = field(repr=False)
    image: np.ndarray = field(repr=False)
    alpha: np.ndarray | None = field(repr=False)
    grey: bool
    orientation: int
    info: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> Original:
        """Raises DetectionError for a file that cannot be read as a picture."""
        try:
            content = read_file(path, MAX_BYTES)
            image = decode(content)
            with Image.open(io.BytesIO(content)) as held:
                info = {name: held.info[name] for name in ("exif", "icc_profile", "dpi") if held.info.get(name)}
                if held.mode == "CMYK":  # its profile does not fit what is written
                    info.pop("icc_profile", None)
                texts = {name: text for name, text in getattr(held, "text", {}).items() if isinstance(text, str)}
                orientation = held.getexif().get(ORIENTATION, 1)
                alpha = None
                if held.has_transparency_data:
                    alpha = np.asarray(ImageOps.exif_transpose(held).convert("RGBA"))[..., 3]
                    image = np.asarray(ImageOps.exif_transpose(held).convert("RGBA"))[..., :3].copy()
                return cls(
                    path, content, image, alpha, held.mode in ("1", "L", "LA"), orientation, {**info, "text": texts}
                )
        except FileNotFoundError:
            raise DetectionError(f"The picture {path} does not exist. Check the path.") from None
        except OSError as error:
            raise DetectionError(f"The picture {path} cannot be read: {error.strerror or error}.") from None
        except MisfitError as error:
            raise DetectionError(f"The picture {path} cannot be read: {error}") from None

    def encoded(self, image: np.ndarray, note: str) -> bytes:
        """A PNG of a repaired picture uint8 [H, W, 3], in the stored orientation, with EXIF, profile, resolution, texts
        and alpha as they were. note: what was painted, as JSON."""
        if self.alpha is not None:
            image = np.concatenate([image, self.alpha[..., None]], -1)
        made = Image.fromarray(image)
        if self.grey:
            made = made.convert("LA" if self.alpha is not None else "L")
        if self.orientation in STORED:
            made = made.transpose(STORED[self.orientation])
        texts = PngImagePlugin.PngInfo()
        for name, text in {**self.info["text"], NOTE: note}.items():
            texts.add_itxt(name, text)
        buffer = io.BytesIO()
        kept = {name: value for name, value in self.info.items() if name != "text"}
        made.save(buffer, "PNG", pnginfo=texts, **kept)
        return buffer.getvalue()
