"""Found hands drawn over their picture, each with its side, its gesture and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..skeleton import draw_hands
from .hands import Seen

MAX_DRAWN_PIXELS = 1600  # pixels of a drawing's longer side


def draw(image: np.ndarray, seen: Sequence[Seen]) -> np.ndarray:
    """Skeletons over a picture, uint8 [H, W, 3]; the result has 256 to MAX_DRAWN_PIXELS a side. An unsure hand is
    fainter."""
    height, width = image.shape[:2]
    if max(height, width) > MAX_DRAWN_PIXELS:
        share = MAX_DRAWN_PIXELS / max(height, width)
        small = Image.fromarray(image).resize((max(round(width * share), 1), max(round(height * share), 1)))
        return draw_hands(np.asarray(small), [_drawn(one, (height, width)) for one in seen])
    return draw_hands(image, [_drawn(one, (height, width)) for one in seen])


def _drawn(one: Seen, size: tuple[int, int]) -> tuple[np.ndarray, str, float]:
    sure = 1.0 if one.sureness is None else one.sureness
    words = [one.side[0].upper(), one.gesture.replace("_", " "), "" if one.sureness is None else f"{sure:.0%}"]
    places = one.hand.joints_2d / (size[1], size[0])
    return (
        places,
        " ".join(word for word in words if word),
        0.35 + 0.65 * (1.0 if one.sureness is None else one.sureness),
    )
