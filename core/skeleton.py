"""The skeletons of hands, drawn over a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Thumb, index, middle, ring, little finger, in OpenPose's order of hues.
FINGER_COLOURS = ((230, 60, 60), (220, 190, 30), (60, 190, 70), (40, 150, 230), (190, 80, 220))
MIN_SKELETON, MAX_SKELETON = 256, 4096  # pixels: smaller pictures are enlarged, or their bones would be a blot


def draw_skeleton(image: np.ndarray, joints_2d: np.ndarray, visibility: np.ndarray) -> np.ndarray:
    """Draws the hands' bones over a picture, a colour a finger, with L and R at the wrists; L2 and R2 are those of the
    second of several people.

    image: uint8 [H, W, 3]. joints_2d: [2, 21, 2], in [0, 1] of width and height, wrist then thumb to little finger.
    visibility: [2]; a hand below 0.5 is not drawn. Both may have an axis of people in front. Returns uint8, enlarged to
    at least 256 pixels a side.
    """
    hands = enumerate(zip(joints_2d.reshape(-1, 21, 2), visibility.reshape(-1), strict=True))
    shown = [(joints, f"{'LR'[i % 2]}{i // 2 + 1 if i > 1 else ''}", 1.0) for i, (joints, seen) in hands if seen >= 0.5]
    return draw_hands(image, shown)


def draw_hands(image: np.ndarray, hands: Sequence[tuple[np.ndarray, str, float]]) -> np.ndarray:
    """Draws hands' bones over a picture, a colour a finger.

    image: uint8 [H, W, 3]. hands: joints [21, 2] in [0, 1] of width and height, the words beside the wrist, and how
    opaque the bones are, 0 to 1. Returns uint8, enlarged to at least 256 pixels a side.
    """
    height, width = image.shape[:2]
    factor = max(1.0, min(MIN_SKELETON / min(height, width), MAX_SKELETON / max(height, width)))
    size = round(width * factor), round(height * factor)
    picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).convert("RGBA")
    fine = 3  # drawn larger and shrunk again: Pillow's lines have stairs
    layer = Image.new("RGBA", (size[0] * fine, size[1] * fine))
    draw = ImageDraw.Draw(layer)
    bone = max(2, round(min(size) / 110)) * fine
    font = ImageFont.load_default(size=max(min(size) // 18, 1) * fine)  # a picture may be a thin strip
    for joints, words, strength in hands:
        points = joints * (size[0] * fine, size[1] * fine)
        if not np.isfinite(points).all() or np.abs(points).max() > 1e6:
            continue
        full, edge = round(255 * strength), round(150 * strength)
        for finger, colour in enumerate(FINGER_COLOURS):
            chain = [tuple(point) for point in points[[0, *range(1 + 4 * finger, 5 + 4 * finger)]].tolist()]
            draw.line(chain, fill=(0, 0, 0, edge), width=bone + 2 * fine, joint="curve")
            draw.line(chain, fill=(*colour, full), width=bone, joint="curve")
            for x, y in chain[1:]:
                draw.circle((x, y), bone * 0.85, fill=(*colour, full), outline=(0, 0, 0, edge), width=fine // 2)
        x, y = points[0].tolist()
        draw.circle((x, y), bone * 1.1, fill=(255, 255, 255, full), outline=(0, 0, 0, 200), width=fine)
        # Beside the wrist on the side away from the fingers, inside the picture.
        away = points[0] - points[1:].mean(0)
        place = points[0] + away / max(float(np.linalg.norm(away)), 1e-6) * bone * 4
        half = draw.textlength(words, font=font) / 2 if len(words) > 1 else bone * 4
        margins = (min(max(half, bone * 4), size[0] * fine / 2), bone * 4)
        x, y = (float(np.clip(v, margin, s * fine - margin)) for v, margin, s in zip(place, margins, size, strict=True))
        draw.text((x, y), words, fill="white", font=font, anchor="mm", stroke_width=fine, stroke_fill=(0, 0, 0, 220))
    picture.alpha_composite(layer.resize(size, Image.Resampling.BOX))
    return np.asarray(picture.convert("RGB"))
