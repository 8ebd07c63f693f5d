"""The picture that a request brings: read, brought to the model's size, and kept through the steps.

    canvas = canvas_of(image, mask, manifest)      # its pixels, and the part to paint again
    blend = Blend(latents, noise, canvas.mask, shares)
    x = blend.start()
    x = blend(i, x)                            # after step i

Without a mask the whole picture is painted again: noise is laid on it, and the steps begin there (Meng et al., SDEdit,
arXiv 2108.01073). With one, the rest is put back after each step, with as much noise as the step leaves (Avrahami et
al., Blended Latent Diffusion, arXiv 2206.02779). A UNet that was trained for inpainting sees mask and picture instead.
Settings, sizes and noise are those of diffusers' img2img and inpaint pipelines.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..contract import Manifest
from ..errors import RequestError
from ..pictures import decode, decode_mask, encode_png, resized
from ..schema import MisfitError, read_file

MAX_PICTURE = 1 << 27  # bytes of a file
GREY = 128  # of a hidden pixel: 0 for the VAE, as near as 8 bits come
FAINT = 0.5  # a mask below it changes little
ADVICE = "Give a PNG, JPEG or WebP file."


@dataclass
class Canvas:
    """What a request brings, at the model's size.

    pixels: uint8 [H, W, 3]. mask: float32 [1, h, w] at the latents' size, 1 where the request paints, 0 where it keeps.
    cover: bool [H, W], the mask at the pictures' size.
    """

    pixels: np.ndarray
    mask: np.ndarray
    cover: np.ndarray
    warnings: list[str] = field(default_factory=list)

    @property
    def keeps(self) -> bool:
        """Whether the request keeps a part of the picture."""
        return bool(self.mask.min() < 1)

    @property
    def hidden(self) -> np.ndarray:
        """uint8 [H, W, 3]: the pixels, and grey where the request paints. A UNet of inpainting sees its latents."""
        return np.where(self.cover[..., None], np.uint8(GREY), self.pixels)

    @property
    def binary(self) -> np.ndarray:
        """float32 [1, h, w], the mask as 0 or 1, as a UNet of inpainting knows it."""
        return (self.mask >= 0.5).astype(np.float32)


class Blend:
    """The start of a request with a picture, and what it keeps after each step.

        x <- m x + (1 - m) (α' z0 + σ' ε)

    z0: the picture's latents, float32 [C, h, w]. ε: the noise that the request starts from, of unit variance. m: the
    mask, which may be soft; None paints all. α' and σ' are the shares of picture and noise in the state after the step
    (`Bundle.shares`), so a solver in sigma space keeps z0 + s ε.

    Multistep solvers keep a history of the network's outputs, and this does not blend it, as in diffusers. Where m is 0
    the state is replaced, so history has no effect. Where m is between, the solver's part follows its own history, and
    the sum stays on the right noise level, because both parts are on it.
    """

    def __init__(self, known: np.ndarray, noise: np.ndarray, mask: np.ndarray | None, shares: np.ndarray) -> None:
        self.known, self.noise, self.mask, self.shares = known, noise, mask, shares

    def start(self) -> np.ndarray:
        """The picture with the noise of the first step, [C, h, w]."""
        return self._kept(0)

    def __call__(self, step: int, x: np.ndarray) -> np.ndarray:
        """The state after a step, [C, h, w]."""
        return x if self.mask is None else self.mask * x + (1 - self.mask) * self._kept(step + 1)

    def _kept(self, i: int) -> np.ndarray:
        picture, noise = self.shares[i]
        kept: np.ndarray = picture * self.known + noise * self.noise
        return kept


def as_source(name: str, value: object) -> str | bytes | None:
    """A picture of a `Request`: the name of a file, or the content of one. Arrays become the content of a PNG.

    value: a path, bytes, a picture of Pillow's, or an array uint8 or bool [H, W], or uint8 [H, W, 3] or [H, W, 4].
    Raises RequestError for anything else.
    """
    if value is None or isinstance(value, (str, bytes)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Image.Image):
        if value.mode not in ("1", "L", "RGB", "RGBA"):
            raise RequestError(f"{name} must be in mode L, RGB or RGBA, got {value.mode}. Convert it first.", name)
        value = np.asarray(value)
    if not isinstance(value, np.ndarray):
        raise RequestError(f"{name} must be a path, bytes, a picture or an array, got {type(value).__name__}.", name)
    array = value[..., 0] if value.ndim == 3 and value.shape[-1] == 1 else value
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if array.dtype != np.uint8 or not shaped or not array.size:
        raise RequestError(
            f"{name} must be an array of uint8 [H, W, 3], got {value.dtype}{list(value.shape)}. Scale it to 0 to 255.",
            name,
        )
    return encode_png(np.ascontiguousarray(array), 1)


def content_of(name: str, source: str | bytes) -> bytes:
    """The content of a request's picture. Raises RequestError where its file cannot be read."""
    if isinstance(source, bytes):
        return source
    try:
        return read_file(Path(source), MAX_PICTURE)
    except FileNotFoundError:
        raise RequestError(
            f"{name} must be a picture, got {source}, which does not exist. Check the path.", name
        ) from None
    except (OSError, MisfitError) as error:
        why = str(getattr(error, "strerror", None) or error).rstrip(".")
        raise RequestError(f"The {name} {source} cannot be read: {why}. {ADVICE}", name) from None


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def canvas_of(
    image: bytes | None, mask: bytes | None, manifest: Manifest, size: tuple[int, int] | None = None
) -> Canvas:
    """The picture and the mask of a request, at the size (H, W) that is painted; None: the model's own.

    image: None for nothing but what will be painted. Raises RequestError for what is not a picture, for a mask of
    another size than its picture, and for a black mask.
    """
    H, W = size or manifest.image_size
    _, h, w = manifest.latents_at((H, W))
    warnings: list[str] = []
    everywhere = (np.ones((1, h, w), np.float32), np.ones((H, W), bool))
    if image is None:
        return Canvas(np.full((H, W, 3), GREY, np.uint8), *everywhere)
    given = _decoded("image", image)
    height, width = given.shape[:2]
    if height * W != width * H:
        warnings.append(
            f"The image is {width}x{height} and was stretched to {W}x{H}, another shape. Crop it first to keep its "
            "proportions."
        )
    pixels = resized(given, (H, W))
    if mask is None:
        return Canvas(pixels, *everywhere, warnings)
    found = _decoded("mask", mask)
    if found.shape != (height, width):
        raise RequestError(
            f"mask must have the size of its image, {width}x{height}, got {found.shape[1]}x{found.shape[0]}. Draw it "
            "over the image.",
            "mask",
        )
    if not found.any():
        raise RequestError("mask must be white where to paint, got black alone. Paint a part of it white.", "mask")
    small = resized(found, (h, w), box=True)[None].astype(np.float32) / 255
    if small.max() < FAINT:
        warnings.append(
            f"The mask changes little: its white part is grey or smaller than {width / w:.3g} x {height / h:.3g} "
            "pixels, the least that can be painted."
        )
    return Canvas(pixels, small, resized(found, (H, W)) >= 128, warnings)


def _decoded(name: str, content: bytes) -> np.ndarray:
    try:
        return decode(content) if name == "image" else decode_mask(content)
    except MisfitError as error:
        said = str(error).replace("Its picture", f"The {name}", 1)
        raise RequestError(f"{said} {ADVICE}" if "decoded" in said else said, name) from None
