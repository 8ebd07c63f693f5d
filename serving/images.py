"""Pictures as clients get them: encoded, scaled, as skeletons and as previews."""

from __future__ import annotations

import base64

import numpy as np
from PIL import Image, ImageOps

from ..editing import Arrays
from ..repair.files import Original
from ..skeleton import draw_skeleton

MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def encoded(image: np.ndarray, format: str = "png", quality: int | None = None, parameters: str = "") -> bytes:
    """uint8 [H, W, 3] -> the content of a file. quality: 0 to 100, of jpeg and webp. parameters: a text that a PNG
    holds under this name, where AUTOMATIC1111's web UI looks for it."""
    return over(Original(b"", image, None, False, {"text": {}}), image, format, quality, parameters)


def over(
    original: Original, image: np.ndarray, format: str = "png", quality: int | None = None, parameters: str = ""
) -> bytes:
    """The same for a picture that was painted over another one: it keeps what the original's file carried."""
    return original.encoded(image, {"parameters": parameters} if parameters else {}, format, quality)


def skeleton(hands: Arrays, size: tuple[int, int]) -> np.ndarray:
    """The bones of a request's hands on grey, in the picture's size or 256 pixels. size: height, width."""
    ground = np.full((*size, 3), 40, np.uint8)
    return draw_skeleton(ground, hands["joints_2d"], hands["visibility"])


def preview(colours: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [H, W, 3]. size: height, width."""
    return np.asarray(Image.fromarray(colours).resize(size[::-1], Image.Resampling.BICUBIC))


def preview_steps(steps: int, previews: int) -> list[int]:
    """The steps after which previews follow: `previews` of them, evenly spaced, without the first and the last."""
    wanted = {round(steps * i / (previews + 1)) for i in range(1, previews + 1)}
    return sorted(
        {max(step, min(2, steps - 1)) for step in wanted if 0 < step < steps}
    )  # an estimate of the noise needs two


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def fitted(image: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """A picture, uint8 [h, w, 3], scaled to `size` (height, width); unchanged if that is None.

    A picture of another shape gets bars in the mean colour of its border.
    """
    if size is None:
        return image
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).mean(0)
    colour = tuple(int(value) for value in border.round())
    return np.asarray(ImageOps.pad(Image.fromarray(image), size[::-1], Image.Resampling.LANCZOS, colour))
