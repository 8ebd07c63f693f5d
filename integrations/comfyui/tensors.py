"""ComfyUI's tensors and our arrays: images, masks, and the skeletons of hands.

`IMAGE` and `MASK` are float32 tensors [B, H, W, 3] and [B, H, W] in [0, 1]. `Hands` is what `Picture.hands` is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from handiffuser import draw_skeleton
from PIL import Image, ImageDraw

FINGER_WIDTH = 0.28  # of the palm's length, for masks; a finger and a rim around it
Hands = dict[str, np.ndarray]


def as_pictures(image: Any) -> list[np.ndarray]:
    """IMAGE, or MASK, -> uint8 [H, W, 3], or [H, W], each."""
    levels = (image.detach().cpu().numpy().clip(0, 1) * 255).round().astype(np.uint8)
    return [np.ascontiguousarray(one[..., :3] if one.ndim == 3 else one) for one in levels]


def as_image(pictures: list[np.ndarray]) -> Any:
    """uint8 [H, W, 3] each -> IMAGE."""
    import torch

    return torch.from_numpy(np.stack(pictures).astype(np.float32) / 255)


def as_mask(hands: list[Hands], height: int, width: int) -> Any:
    """MASK [B, H, W]: 1 where a hand's palm and fingers are by its joints, with a rim."""
    return as_masks([hand_mask(one, height, width) for one in hands])


def as_masks(masks: list[np.ndarray]) -> Any:
    """float32 [H, W] each -> MASK."""
    import torch

    return torch.from_numpy(np.stack(masks))


def hand_mask(hands: Hands, height: int, width: int) -> np.ndarray:
    """float32 [H, W]: the palm as a polygon, the fingers as wide lines."""
    layer = Image.new("L", (width, height))
    draw = ImageDraw.Draw(layer)
    for joints, seen in zip(hands["joints_2d"].reshape(-1, 21, 2), hands["visibility"].reshape(-1), strict=True):
        points = joints * (width, height)
        if seen < 0.5 or not np.isfinite(points).all() or np.abs(points).max() > 1e6:
            continue
        line = max(1, round(FINGER_WIDTH * float(np.linalg.norm(points[9] - points[0]))))
        palm = [tuple(points[joint]) for joint in (0, 1, 5, 9, 13, 17)]
        draw.polygon(palm, fill=255)
        for chain in (palm + palm[:1], *([tuple(p) for p in points[1 + 4 * i : 5 + 4 * i]] for i in range(5))):
            draw.line(chain, fill=255, width=line, joint="curve")
            for x, y in chain:
                draw.ellipse((x - line / 2, y - line / 2, x + line / 2, y + line / 2), fill=255)
    return np.asarray(layer, np.float32) / 255


def skeletons(hands: list[Hands], size: int = 512) -> Any:
    """IMAGE of the hands' bones on grey."""
    ground = np.full((size, size, 3), 40, np.uint8)
    return as_image([draw_skeleton(ground, one["joints_2d"], one["visibility"]) for one in hands])
