"""Backgrounds of the demo's pictures: walls, gradients, rooms, gardens and streets as simple shapes out of focus.

picture, lamp = backdrop("garden", np.random.default_rng(0))
"""

from __future__ import annotations

import numpy as np
import torch
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from .human_render import Lamp

KINDS = ("wall", "gradient", "studio", "room", "office", "garden", "street", "beach", "night")
SIZE = 96  # pixels a side: everything is blurred anyway
FALLOFF = 0.12  # of a plain wall's light, from its middle to its darkest side


def _colour(rng: np.random.Generator, base: tuple[float, float, float], spread: float = 0.08) -> tuple[int, int, int]:
    value = np.clip(np.array(base) * rng.uniform(0.75, 1.2) + rng.normal(0, spread, 3), 0.02, 1)
    return tuple(int(255 * v) for v in value)  # type: ignore[return-value]


def _canvas(colour: tuple[int, int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIZE, SIZE), colour)
    return image, ImageDraw.Draw(image)


def _box(
    draw: ImageDraw.ImageDraw, x: float, y: float, w: float, h: float, colour: tuple, round_: bool = False
) -> None:
    corners = [x * SIZE, y * SIZE, (x + w) * SIZE, (y + h) * SIZE]
    (draw.ellipse if round_ else draw.rectangle)(corners, fill=colour)


def _wall(rng: np.random.Generator, base: ndarray) -> Image.Image:
    image, draw = _canvas(_colour(rng, tuple(base), 0.02))
    if rng.random() < 0.3:  # a skirting or a darker lower half
        _box(draw, 0, rng.uniform(0.6, 0.9), 1, 1, _colour(rng, tuple(base * 0.75), 0.02))
    return image


def _room(rng: np.random.Generator, base: ndarray) -> Image.Image:
    image, draw = _canvas(_colour(rng, (0.74, 0.70, 0.64)))
    floor = rng.uniform(0.68, 0.9)
    _box(draw, 0, floor, 1, 1, _colour(rng, (0.45, 0.33, 0.24)))
    x = rng.uniform(-0.1, 0.7)
    _box(draw, x - 0.02, 0.06, 0.38, 0.44, _colour(rng, (0.85, 0.83, 0.8), 0.02))
    _box(draw, x, 0.08, 0.34, 0.4, _colour(rng, (0.83, 0.9, 0.97), 0.04))
    _box(draw, x + 0.16, 0.08, 0.02, 0.4, _colour(rng, (0.8, 0.78, 0.75), 0.02))
    for _ in range(rng.integers(2, 6)):  # furniture and pictures
        w, h = rng.uniform(0.1, 0.4), rng.uniform(0.1, 0.35)
        colour = ((0.5, 0.3, 0.2), (0.3, 0.36, 0.45), (0.6, 0.55, 0.45), (0.35, 0.45, 0.3))[rng.integers(4)]
        _box(draw, rng.uniform(-0.1, 0.95), floor - h * rng.uniform(0.4, 1.2), w, h, _colour(rng, colour))
    _box(draw, rng.uniform(0, 0.9), floor - 0.35, 0.14, 0.2, _colour(rng, (0.25, 0.45, 0.22)), True)
    return image


def _office(rng: np.random.Generator, base: ndarray) -> Image.Image:
    image, draw = _canvas(_colour(rng, (0.72, 0.75, 0.78), 0.03))
    for k in range(rng.integers(2, 5)):  # window panes or shelves
        _box(draw, k * 0.27 + rng.uniform(-0.05, 0.05), 0.05, 0.2, rng.uniform(0.4, 0.75),
             _colour(rng, (0.82, 0.88, 0.93) if rng.random() < 0.6 else (0.42, 0.4, 0.4)))  # fmt: skip
    for _ in range(rng.integers(3, 8)):
        _box(draw, rng.uniform(-0.05, 0.95), rng.uniform(0.5, 0.85), rng.uniform(0.06, 0.3), rng.uniform(0.05, 0.3),
             _colour(rng, (0.45, 0.45, 0.47), 0.12))  # fmt: skip
    return image


def _garden(rng: np.random.Generator, base: ndarray) -> Image.Image:
    image, draw = _canvas(_colour(rng, (0.68, 0.82, 0.93), 0.04))
    horizon = rng.uniform(0.25, 0.6)
    _box(draw, 0, horizon + 0.15, 1, 1, _colour(rng, (0.38, 0.55, 0.24), 0.04))
    for _ in range(rng.integers(14, 26)):  # trees and bushes
        w = rng.uniform(0.15, 0.5)
        _box(draw, rng.uniform(-0.2, 1), horizon + rng.uniform(-0.3, 0.15), w, w * rng.uniform(0.6, 1.2),
             _colour(rng, (0.22, 0.40, 0.16), 0.06), True)  # fmt: skip
    for _ in range(rng.integers(0, 16)):  # flowers and light between leaves
        w = rng.uniform(0.02, 0.06)
        colour = ((0.9, 0.4, 0.5), (0.95, 0.85, 0.4), (0.9, 0.95, 0.85), (0.8, 0.9, 0.6))[rng.integers(4)]
        _box(draw, rng.uniform(0, 1), rng.uniform(0.1, 1), w, w, _colour(rng, colour), True)
    return image


def _street(rng: np.random.Generator, base: ndarray) -> Image.Image:
    image, draw = _canvas(_colour(rng, (0.75, 0.82, 0.9), 0.04))
    x = -0.1
    while x < 1:  # houses
        w = rng.uniform(0.15, 0.4)
        top = rng.uniform(-0.1, 0.4)
        front = ((0.6, 0.45, 0.36), (0.7, 0.66, 0.58), (0.5, 0.52, 0.55))[rng.integers(3)]
        _box(draw, x, top, w, 1, _colour(rng, front))
        window = _colour(rng, (0.3, 0.36, 0.42), 0.04)
        for row in range(5):
            for column in range(int(w / 0.09)):
                _box(draw, x + 0.02 + 0.09 * column, top + 0.06 + 0.13 * row, 0.05, 0.07, window)
        x += w
    _box(draw, 0, rng.uniform(0.75, 0.9), 1, 1, _colour(rng, (0.42, 0.42, 0.43), 0.02))
    return image


def _beach(rng: np.random.Generator, base: ndarray) -> Image.Image:
    image, draw = _canvas(_colour(rng, (0.62, 0.82, 0.95), 0.03))
    horizon = rng.uniform(0.35, 0.55)
    _box(draw, 0, horizon, 1, 1, _colour(rng, (0.2, 0.5, 0.65), 0.05))
    _box(draw, 0, horizon + rng.uniform(0.12, 0.25), 1, 1, _colour(rng, (0.85, 0.76, 0.58), 0.03))
    for _ in range(rng.integers(0, 5)):
        _box(draw, rng.uniform(-0.2, 1), rng.uniform(0, horizon - 0.1), 0.4, 0.07, (245, 247, 250), True)
    return image


def _night(rng: np.random.Generator, base: ndarray) -> Image.Image:
    image, draw = _canvas(_colour(rng, (0.08, 0.08, 0.12), 0.02))
    for _ in range(rng.integers(8, 24)):  # lights out of focus
        w = rng.uniform(0.03, 0.12)
        colour = ((1.0, 0.75, 0.4), (0.9, 0.9, 0.8), (0.9, 0.35, 0.3), (0.4, 0.7, 0.95))[rng.integers(4)]
        _box(draw, rng.uniform(-0.05, 1), rng.uniform(-0.05, 1), w, w, _colour(rng, colour, 0.04), True)
    return image


SCENES = {"wall": _wall, "room": _room, "office": _office, "garden": _garden, "street": _street, "beach": _beach,
          "night": _night}  # fmt: skip


def backdrop(kind: str, rng: np.random.Generator, colour: ndarray | None = None) -> tuple[Tensor, Lamp]:
    """A background [S,S,3] float32 in 0..1 (display colours) and a lamp that fits it. colour: of walls, gradients and
    studios, random if None."""
    base = np.asarray(colour, float) if colour is not None else _random_colour(rng)
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    if kind in ("gradient", "studio"):
        centre = rng.uniform(0.2, 0.8, 2) if kind == "studio" else (0.5, 0.5)
        shade = 1.1 - 0.5 * ((x - centre[0]) ** 2 + (y - centre[1]) ** 2) if kind == "studio" else 1.12 - 0.3 * y
        picture = base * shade[..., None]
        if kind == "gradient":
            picture = picture + (rng.uniform(-0.12, 0.12, 3) * y[..., None])
    else:
        image = SCENES[kind](rng, base)
        blur = rng.uniform(0.6, 1.5) if kind == "wall" else rng.uniform(1.5, 4.5)
        picture = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), float) / 255
        picture = picture * (1.05 - 0.12 * y + rng.uniform(-0.1, 0.1) * (x - 0.5))[..., None]
    return torch.from_numpy(picture.clip(0, 1)).float(), lamp_for(kind, rng)


def plain_wall(colour: ndarray, rng: np.random.Generator) -> Tensor:
    """A wall [S,S,3] float32 of one display colour [3], a little darker towards one side."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1) - 0.5
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, FALLOFF)
    light = 1 + 2 * depth * (np.cos(angle) * x + np.sin(angle) * y)
    return torch.from_numpy((colour * light[..., None]).clip(0, 1)).float()


def _random_colour(rng: np.random.Generator) -> ndarray:
    if rng.random() < 0.5:
        return np.full(3, rng.uniform(0.12, 0.92)) + rng.normal(0, 0.03, 3)
    hue = rng.uniform(0, 6)
    full = np.clip([abs(hue - 3) - 1, 2 - abs(hue - 2), 2 - abs(hue - 4)], 0, 1)
    value, saturation = rng.uniform(0.3, 0.95), rng.uniform(0.15, 0.75)
    return value * (1 - saturation * (1 - full))


def lamp_for(kind: str, rng: np.random.Generator) -> Lamp:
    """A lamp as the place has it: warm, cold, from above or from the side."""
    outside = kind in ("garden", "street", "beach")
    direction = (rng.uniform(-0.9, 0.9), rng.uniform(0.35, 1.1), rng.uniform(0.6, 1.1))
    warm = rng.normal(0.06 if outside else 0.03, 0.05)
    if kind == "night":
        warm = rng.normal(0.16, 0.06)
    strength = rng.uniform(0.85, 1.15) * (0.8 if kind == "night" else 1.0)
    colour = (strength * (1 + 0.6 * warm), strength, strength * (1 - warm))
    sky = np.array([0.42, 0.43, 0.46]) if not outside else np.array([0.42, 0.46, 0.54])
    ground = {"garden": (0.21, 0.24, 0.17), "beach": (0.34, 0.31, 0.26)}.get(kind, (0.22, 0.21, 0.20))
    dim = (0.55 if kind == "night" else 1.0) * rng.uniform(0.85, 1.1)
    return Lamp(direction, colour, three(dim * sky), three(dim * np.array(ground)))


def three(values: ndarray) -> tuple[float, float, float]:
    """An array of three numbers as plain ones."""
    x, y, z = values.tolist()
    return x, y, z
