"""The body of `POST /sdapi/v1/img2img`: AUTOMATIC1111's img2img and its inpainting.

    body = Img2Img(prompt="an open hand", init_images=["iVBORw0KGgo..."], mask="data:image/png;base64,...")

As in the web UI, a picture without a mask is brought to width and height (resize_mode) and painted again. With a mask
and inpaint_full_res, which is its default, the model paints the part around the mask at its own size, and the picture
returns in the size that it has. Pixels where the blurred mask is black stay the same bytes.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from typing import Annotated, Any

import numpy as np
from fastapi import Request as Http
from PIL import Image, ImageFilter, ImageOps
from pydantic import Field

from ..detection.hands import Window
from ..errors import RequestError
from ..pictures import resized
from .fields import Generation
from .forms import Upload, mask_of
from .pictures import Painting
from .service import Service
from .txt2img import Txt2Img

RESIZES = {0: "just resize", 1: "crop and resize", 2: "resize and fill"}
FILLS = {0: "fill", 1: "original", 3: "latent nothing"}
GREY = 128

Pixels = Annotated[int, Field(ge=0, le=256)]


class Img2Img(Txt2Img):
    """`POST /sdapi/v1/img2img`. Pictures are base64, with or without `data:image/png;base64,` before it."""

    init_images: Annotated[list[str], Field(min_length=1, description="One picture, as base64.")]
    mask: Annotated[str, Field(description="White, or opaque, where to paint.")] | None = None
    denoising_strength: Annotated[float, Field(ge=0, le=1)] = 0.75
    resize_mode: int = 0
    mask_blur: (
        Annotated[Pixels, Field(description="Pixels of the picture that the mask's border fades over.")] | None
    ) = None
    mask_blur_x: Pixels = 4
    mask_blur_y: Pixels = 4
    inpainting_fill: int = 0
    inpaint_full_res: Annotated[bool, Field(description="Paints the part around the mask at the model's size.")] = True
    inpaint_full_res_padding: Annotated[int, Field(ge=0, le=2048)] = 0
    inpainting_mask_invert: Annotated[int, Field(ge=0, le=1)] = 0
    include_init_images: bool = False

    def warnings(self) -> list[str]:
        said = super().warnings()
        for name, known, lacking in (
            ("resize_mode", RESIZES, "upscales no latents"),
            ("inpainting_fill", FILLS, "fills with no latent noise; a denoising_strength of 1 starts from noise"),
        ):
            if (value := getattr(self, name)) not in known:
                names = ", ".join(f"{number} ({words})" for number, words in known.items())
                raise RequestError(f"{name} must be one of {names}, got {value}. This server {lacking}.", name)
        if len(self.init_images) > 1:
            raise RequestError(
                f"init_images must be one picture, got {len(self.init_images)}. Send a request for each.", "init_images"
            )
        if self.override_settings.get("img2img_color_correction"):
            said.append("The option img2img_color_correction has no effect.")
        return said

    @property
    def cropped(self) -> bool:
        """Whether the part around the mask is painted alone."""
        return self.mask is not None and self.inpaint_full_res

    def generation(self, service: Service, solver: str | None) -> Generation:
        """With a mask and inpaint_full_res, width and height do not count: the picture keeps its size."""
        update = {"strength": self.denoising_strength, **({"size": None} if self.cropped else {})}
        return super().generation(service, solver).model_copy(update=update)

    async def painting(self, service: Service, solver: str | None, http: Http) -> Painting:
        painting = Repainting(service, self.generation(service, solver), http)
        await asyncio.to_thread(painting.bring, self)
        return painting

    def parameters(self) -> dict[str, Any]:
        pictures = {} if self.include_init_images else {"init_images": None, "mask": None}
        return super().parameters() | pictures

    def notes(self) -> str:
        return f", Denoising strength: {self.denoising_strength:g}"


class Repainting(Painting):
    """A request that begins with a picture."""

    bars = False
    ground: np.ndarray  # uint8 [H, W, 3], the answer but for what is painted again
    cover: np.ndarray | None = None  # uint8 [H, W], where it is
    window: Window

    def bring(self, body: Img2Img) -> None:
        """Reads the pictures. Raises RequestError. Runs in a thread."""
        most, painted = self.service.limits.pixels, self.painted
        picture = Upload.read("init_images", content_of("init_images", body.init_images[0]), most)
        mask = mask_in(body, picture.size, most) if body.mask else None
        self.original, self.ground, self.cover = picture.original.in_colours().profile_alone(), picture.pixels, mask
        if mask is None or not body.cropped:
            size = self.size or painted
            self.ground = brought(picture.pixels, size, body.resize_mode)
            self.cover = None if mask is None else brought(mask, size, body.resize_mode)
            self.window = whole(size, painted)
        else:
            self.window = around(mask, body.inpaint_full_res_padding, painted)
            if self.window.height > 2 * painted[0]:
                self.warnings.append(
                    f"The engine paints {self.service.size}, and the part around the mask is "
                    f"{self.window.width:.0f}x{self.window.height:.0f}: what is painted looks soft."
                )
        self.size = self.ground.shape[0], self.ground.shape[1]
        start = self.window.cut(self.ground, painted)
        self.brought = [{"image": start}]
        if self.cover is not None:
            hole = self.window.cut(self.cover, painted)
            if not hole.any():
                raise RequestError("mask must be white where the picture is painted, got none of it there.", "mask")
            if body.inpainting_fill == 0:
                start = filled(start, hole)
            elif body.inpainting_fill == 3:
                start = np.where(hole[..., None] > 127, np.uint8(GREY), start)
            self.brought = [{"image": start, "mask": hole}]

    def shown(self, image: np.ndarray) -> np.ndarray:
        assert self.size is not None
        y, x = self.window.within(self.size)
        part = self.window.laid(image, self.size)
        if self.cover is not None:
            alpha = self.cover[y, x][..., None] / np.float32(255)
            part = (part * alpha + self.ground[y, x] * (1 - alpha) + 0.5).astype(np.uint8)
        out = self.ground.copy()
        out[y, x] = part
        return out


def content_of(name: str, text: str) -> bytes:
    """The content of a picture's file. Raises RequestError."""
    if re.match(r"\s*https?://", text):
        raise RequestError(f"{name} must be base64, got a URL. This server fetches no pictures.", name)
    if text.lstrip()[:5] == "data:":
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{name} must be base64, got {text[:20]!r}. Encode the picture's file.", name) from None


def mask_in(body: Img2Img, size: tuple[int, int], most: int) -> np.ndarray:
    """The blurred mask, uint8 [H, W]. size: of its picture. Raises RequestError."""
    mask = mask_of(content_of("mask", body.mask or ""), size, most, opaque=True)
    mask = np.where(mask > 127, np.uint8(255), np.uint8(0))
    if body.inpainting_mask_invert:
        mask = 255 - mask
    if not mask.any():
        raise RequestError("mask must be white where to paint, got a mask that keeps all.", "mask")
    x, y = (body.mask_blur_x, body.mask_blur_y) if body.mask_blur is None else (body.mask_blur,) * 2
    return np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur((x, y))))


def brought(image: np.ndarray, size: tuple[int, int], mode: int) -> np.ndarray:
    """A picture or mask in another size (height, width), by the web UI's resize_mode."""
    if mode == 0 or image.shape[0] * size[1] == image.shape[1] * size[0]:
        return resized(image, size)
    if mode == 1:
        return np.asarray(ImageOps.fit(Image.fromarray(image), size[::-1], Image.Resampling.LANCZOS))
    return whole((image.shape[0], image.shape[1]), size).cut(image, size)


def whole(size: tuple[int, int], shape: tuple[int, int]) -> Window:
    """The least window of a shape (height, width) that shows a whole picture (height, width), in its middle."""
    height = max(size[0], size[1] * shape[0] / shape[1])
    width = height * shape[1] / shape[0]
    return Window((size[1] - width) / 2, (size[0] - height) / 2, width, height)


def around(mask: np.ndarray, padding: int, shape: tuple[int, int]) -> Window:
    """The least window of a shape that shows a mask's white part and `padding` pixels around it; within the picture if
    it fits."""
    size = np.array(mask.shape[::-1])
    found = [np.flatnonzero(mask.any(axis)) for axis in (0, 1)]
    low = np.maximum([each[0] - padding for each in found], 0)
    high = np.minimum([each[-1] + 1 + padding for each in found], size)
    height = max(high[1] - low[1], (high[0] - low[0]) * shape[0] / shape[1])
    extent = np.array([height * shape[1] / shape[0], height])
    room = size - extent
    corner = np.where(room > 0, ((low + high - extent) / 2).clip(0, np.maximum(room, 0)), room / 2)
    return Window(float(corner[0]), float(corner[1]), float(extent[0]), float(extent[1]))


def filled(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """The picture with its hole (uint8 [H, W], 255 where it is) in the blurred colours around it."""
    known = (1 - hole / np.float32(255))[..., None]
    return (pulled(picture * known, known) + 0.5).clip(0, 255).astype(np.uint8)


def pulled(colours: np.ndarray, known: np.ndarray) -> np.ndarray:
    """float32 [H, W, 3], colours times the share of them that is known, float32 [H, W, 1], and the rest from a picture
    half as large, filled in the same way (push and pull: Gortler et al., The Lumigraph, 1996)."""
    height, width = known.shape[:2]
    if known.min() >= 1:
        return colours
    if height * width == 1:
        return colours / known if known > 0 else np.full_like(colours, GREY)
    half = ((height + 1) // 2, (width + 1) // 2)
    share = scaled(known, half, Image.Resampling.BOX)
    enough = (2 * share).clip(0, 1)  # where half of a coarse pixel is known, its colour is
    below = pulled(scaled(colours, half, Image.Resampling.BOX) / np.maximum(share, 1e-6) * enough, enough)
    filling: np.ndarray = colours + (1 - known) * scaled(below, (height, width), Image.Resampling.BILINEAR)
    return filling


def scaled(values: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    """float32 [h, w, C] -> [*size, C]."""
    each = [Image.fromarray(np.ascontiguousarray(values[..., c], np.float32)) for c in range(values.shape[-1])]
    return np.dstack([np.asarray(one.resize(size[::-1], how)) for one in each])
