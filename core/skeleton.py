"""The skeletons of both hands, drawn over a picture."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Thumb, index, middle, ring, little finger, in OpenPose's order of hues.
FINGER_COLOURS = ((230, 60, 60), (220, 190, 30), (60, 190, 70), (40, 150, 230), (190, 80, 220))
MIN_SKELETON = 256  # pixels: smaller pictures are enlarged, or their bones would be a blot


def draw_skeleton(image: np.ndarray, joints_2d: np.ndarray, visibility: np.ndarray) -> np.ndarray:
    """Draws both hands' bones over a picture, a colour a finger, with L and R at the wrists.

    image: uint8 [H, W, 3]. joints_2d: [2, 21, 2], in [0, 1] of width and height, wrist then thumb to little finger.
    visibility: [2]; a hand below 0.5 is not drawn. Returns uint8, enlarged to at least 256 pixels a side.
    """
    height, width = image.shape[:2]
    factor = max(1.0, MIN_SKELETON / min(height, width))
    size = round(width * factor), round(height * factor)
    picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).convert("RGBA")
    fine = 3  # drawn larger and shrunk again: Pillow's lines have stairs
    layer = Image.new("RGBA", (size[0] * fine, size[1] * fine))
    draw = ImageDraw.Draw(layer)
    bone = max(2, round(min(size) / 110)) * fine
    font = ImageFont.load_default(size=min(size) // 18 * fine)
    for side, name in enumerate("LR"):
        points = joints_2d[side] * (size[0] * fine, size[1] * fine)
        if visibility[side] < 0.5 or not np.isfinite(points).all() or np.abs(points).max() > 1e6:
            continue
        for finger, colour in enumerate(FINGER_COLOURS):
            chain = [tuple(point) for point in points[[0, *range(1 + 4 * finger, 5 + 4 * finger)]].tolist()]
            draw.line(chain, fill=(0, 0, 0, 150), width=bone + 2 * fine, joint="curve")
            draw.line(chain, fill=(*colour, 255), width=bone, joint="curve")
            for x, y in chain[1:]:
                draw.circle((x, y), bone * 0.85, fill=(*colour, 255), outline=(0, 0, 0, 150), width=fine // 2)
        x, y = points[0].tolist()
        draw.circle((x, y), bone * 1.1, fill=(255, 255, 255, 255), outline=(0, 0, 0, 200), width=fine)
        # Beside the wrist on the side away from the fingers, inside the picture.
        away = points[0] - points[1:].mean(0)
        x, y = points[0] + away / max(float(np.linalg.norm(away)), 1e-6) * bone * 4
        x, y = (float(np.clip(v, bone * 4, s * fine - bone * 4)) for v, s in zip((x, y), size, strict=True))
        draw.text((x, y), name, fill="white", font=font, anchor="mm", stroke_width=fine, stroke_fill=(0, 0, 0, 220))
    picture.alpha_composite(layer.resize(size, Image.Resampling.BOX))
    return np.asarray(picture.convert("RGB"))
