"""A judge that counts fingers: those that stand apart from the hand, as its silhouette shows them.

    shape = silhouette(picture, ground, palette, points)     # bool [UNIT * 3, UNIT * 3], the hand brought to one size
    count(shape, placed)                                     # 5

It knows three things of the truth: what lies behind the hand, which colours skin has, and where the hand should be. It
does not know what the hand does. Each pixel belongs to the skin or to the ground, whichever colour is nearer. Distances
inside the silhouette grow from the wrist; each of their peaks is a finger, where it rises by RISE palms above the
saddle that joins it to a higher one.
"""

from __future__ import annotations

import cv2
import numpy as np

UNIT = 72  # pixels of the palm, wrist to middle knuckle
FIELD = 4 * UNIT  # pixels of the judge's picture
RISE = 0.22  # palms that a finger rises above its neighbours
COLOURS = 10  # of the skin
LIGHTNESS = 0.6  # how much it counts in a colour's distance
ROUND = 3  # pixels of noise that an opening removes


def upright(points: np.ndarray) -> np.ndarray:
    """[2, 3]: brings the picture's pixels to the judge's: the palm's middle in the middle, fingers up."""
    wrist, knuckles = points[0], points[[5, 9, 13, 17]].mean(0)
    along = knuckles - wrist
    scale = UNIT / max(float(np.linalg.norm(along)), 1e-6)
    angle = -np.pi / 2 - np.arctan2(along[1], along[0])
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.concatenate([turn, (np.array([FIELD, 1.1 * FIELD]) / 2 - turn @ ((wrist + knuckles) / 2))[:, None]], 1)


def warped(picture: np.ndarray, move: np.ndarray) -> np.ndarray:
    """The picture as the judge sees it; its edge goes on beyond it."""
    small = np.linalg.norm(move[:, 0]) > 1
    way = cv2.INTER_CUBIC if small else cv2.INTER_AREA
    return cv2.warpAffine(picture, move, (FIELD, FIELD), flags=way, borderMode=cv2.BORDER_REPLICATE)


def _lab(picture: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(picture, cv2.COLOR_RGB2LAB).astype(np.float32) * (LIGHTNESS, 1, 1)


def palette(truth: np.ndarray, cover: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The COLOURS of a good hand, Lab float32 [K, 3]. truth: uint8 [H, W, 3]; cover: [H, W]; points: [21, 2]."""
    move = upright(points)
    lab = _lab(warped(truth, move))[warped(cover, move) > 0.98].astype(np.float32)
    rule = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.5)
    cv2.setRNGSeed(0)
    colours: np.ndarray = cv2.kmeans(lab, min(COLOURS, len(lab)), None, rule, 1, cv2.KMEANS_PP_CENTERS)[2]
    return colours


def silhouette(picture: np.ndarray, ground: np.ndarray, skin: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Where the hand is, bool [FIELD, FIELD], upright. ground: the picture without a hand. skin: from `palette`; it
    moves to the colour that the picture has in the palm."""
    move = upright(points)
    seen, behind = (_lab(warped(one, move)) for one in (picture, ground))
    palm = np.zeros((FIELD, FIELD), np.uint8)
    hull = cv2.convexHull((points[[0, 5, 9, 13, 17]] @ move[:, :2].T + move[:, 2]).astype(np.float32))
    cv2.fillConvexPoly(palm, hull.round().astype(np.int32), 1)
    own = seen[(palm > 0) & (np.linalg.norm(seen - behind, axis=-1) > 8)]
    shift = np.zeros(3)
    if len(own) > 50:
        nearest = np.linalg.norm(own[:, None] - skin, axis=-1).argmin(1)
        shift = np.median(own - skin[nearest], 0)
    to_skin = np.linalg.norm(seen[:, :, None] - (skin + shift), axis=-1).min(-1)
    shape = (to_skin < np.linalg.norm(seen - behind, axis=-1)).astype(np.uint8)
    shape = cv2.morphologyEx(shape, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (ROUND, ROUND)))
    return cv2.morphologyEx(shape, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8)) > 0


def count(shape: np.ndarray) -> int:
    """How many fingers stand apart in an upright silhouette bool [FIELD, FIELD]."""
    knuckles, wrist = 0.55 * FIELD - UNIT / 2, 0.55 * FIELD + UNIT / 2
    far = _from_wrist(shape, round(wrist))
    level = wrist - knuckles  # a closed hand ends here
    return sum(top - (saddle or level) >= RISE * UNIT for top, saddle in peaks(far)) + _loose(shape, far)


def _from_wrist(shape: np.ndarray, wrist: int) -> np.ndarray:
    """Steps within the silhouette from the row of the wrist upwards, int32 [H, W]; -1 where none leads."""
    inside = shape.astype(np.uint8)
    inside[wrist:] = 0
    far = np.full(shape.shape, -1, np.int32)
    reached = np.zeros_like(inside)
    middle = slice(FIELD // 2 - UNIT // 2, FIELD // 2 + UNIT // 2)
    reached[wrist - 2 : wrist, middle] = inside[wrist - 2 : wrist, middle]
    kernels = np.ones((3, 3), np.uint8), cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    step = 0
    while True:  # squares and crosses in turn are nearly circles
        new = (reached > 0) & (far < 0)
        if not new.any():
            return far
        far[new] = step
        reached = cv2.dilate(reached, kernels[step % 2]) & inside
        step += 1


def peaks(heights: np.ndarray) -> list[tuple[int, int]]:
    """Each peak of a landscape int [H, W] and the saddle where it meets a higher one; 0 for the highest of an island.
    Below 0 there is water. It is the persistence of superlevel sets in dimension 0 (Edelsbrunner 2002)."""
    width = heights.shape[1] + 2
    padded = np.pad(heights, 1, constant_values=-1).ravel()
    order = np.flatnonzero(padded >= 0)
    order = order[np.argsort(-padded[order], kind="stable")]
    parent: dict[int, int] = {}
    found: list[tuple[int, int]] = []

    def root(cell: int) -> int:
        while parent[cell] != cell:
            parent[cell] = parent[parent[cell]]
            cell = parent[cell]
        return cell

    for cell in order.tolist():
        parent[cell] = cell
        for step in (1, -1, width, -width, width + 1, width - 1, 1 - width, -1 - width):
            if cell + step in parent:
                a, b = root(cell), root(cell + step)
                if a == b:
                    continue
                low, high = sorted((a, b), key=lambda one: padded[one])
                if padded[low] > padded[cell]:
                    found.append((int(padded[low]), int(padded[cell])))
                parent[low] = high
    return found + [(int(padded[cell]), 0) for cell in parent if parent[cell] == cell]


def _loose(shape: np.ndarray, far: np.ndarray) -> int:
    """Fingers that hang in the air: pieces as long as a finger's rise, near the hand, that no step reaches."""
    pieces = (shape & (far < 0)).astype(np.uint8)
    pieces[round(0.55 * FIELD + UNIT / 2) :] = 0
    _, _, stats, _ = cv2.connectedComponentsWithStats(pieces)
    long = np.maximum(stats[1:, cv2.CC_STAT_WIDTH], stats[1:, cv2.CC_STAT_HEIGHT]) >= 1.6 * RISE * UNIT
    return int((long & (stats[1:, cv2.CC_STAT_AREA] >= 0.02 * UNIT**2)).sum())
