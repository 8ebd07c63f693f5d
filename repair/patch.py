"""One hand of a picture, cut out at the model's size, painted again and put back.

    patch = plan(picture, seen, rest, (512, 512))         # seen: detection.hands.Seen, in the picture's pixels
    request = patch.request(strength=0.95)                # for HanDiffuser.prepare, after `patch.pose(made)`
    picture = patch.paste(picture, painted)               # the same bytes outside the mask

The crop is NEAR times the box of the old and the new hand, so that a small hand gets all the pixels that the model has
(as ADetailer does; RHanDS, arXiv 2404.13984). The mask is the new hand's silhouette with the old hand's region, MARGIN
wider. The steps start from the crop without the old hand. Only the painted hand is taken from the result, by a matte,
and laid over the crop without the old one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..contract import HAND_JOINTS
from ..detection.arms import Arrays, Size
from ..detection.detect import Detector
from ..detection.hands import Seen, Window, arrays_of
from ..errors import DetectionError
from ..fingers import SIDES
from ..grammar import BACKGROUNDS, PHRASES, SKINS
from ..hands import person
from ..runtime.requests import Request
from . import regions
from .wish import STRENGTH

NEAR = 1.6  # a crop's side, in boxes of the hands
WIDE = 2.8  # of the crop in which the old hand is looked for
LOOK, LOOKED_AT = 2.0, (160, 160)  # the crop in which a detector compares hands: in boxes, in pixels
MARGIN = 1 / 16  # of the crop's side: the mask around both hands
FADE = 4  # pixels of the painted crop over which it fades in
GLOW = 4  # pixels of the crop around the old hand whose colours are mixed with it
SAME = 0.35  # sizes of a hand between the points of two reports of it, at most
LARGEST = 2.0  # of a hand, in the longer sides of its picture


@dataclass
class Patch:
    """seen: the hand, in pixels of the picture. window: the crop. crop: uint8 [H, W, 3] at the model's size. old: where
    the old hand is, bool [H, W]. arrays: of `Request.hands`, framed by the window. After `pose`: new, the silhouette,
    and mask, bool [H, W], and points, the new hand's joints [21, 2] in pixels of the crop. kept: bool [H, W], where
    other hands are. skin: bool [H, W], what has the old hand's colour, or is another hand."""

    seen: Seen
    window: Window
    crop: np.ndarray = field(repr=False)
    old: np.ndarray = field(repr=False)
    arrays: Arrays = field(repr=False)
    kept: np.ndarray = field(repr=False)
    skin: np.ndarray = field(repr=False)
    new: np.ndarray | None = field(default=None, repr=False)
    mask: np.ndarray | None = field(default=None, repr=False)
    points: np.ndarray = field(default_factory=lambda: np.zeros((21, 2)), repr=False)  # of the new hand in the crop

    @property
    def magnified(self) -> float:
        """Pixels of the picture that one painted pixel covers; above 4 the hand looks soft."""
        return self.window.height / self.crop.shape[0]

    def pose(self, made: Mapping[str, np.ndarray]) -> None:
        """What `HanDiffuser.hands` says of `arrays`: its mesh gives the silhouette and the mask."""
        shape, made = self.crop.shape[:2], person(made, 0)  # a crop shows one person
        side = self.seen.hand.side
        self.points = points = made["joints_2d"][side] * (shape[1], shape[0])
        thick = regions.radii(
            made["vertices"], made["joints"][list(HAND_JOINTS[side])], made["camera"][0] * shape[0] / 2
        )
        self.new = regions.silhouette(points, thick, shape)
        self.mask = regions.dilate(self.new | self.old, round(MARGIN * shape[0])) & (self.new | ~self.kept)

    def moved(self, before: np.ndarray, after: np.ndarray, detector: Detector) -> float:
        """How far a detector sees the hand of a repaired picture from where it sees the old one: mean distance of the
        points in sizes of the hand, and 1 at most, where it finds none or another side."""
        window = _window(self.seen.hand.joints_2d, LOOKED_AT, LOOK)
        old, new = (detector.once(window.cut(picture, LOOKED_AT)) for picture in (before, after))
        if not old:
            return 1.0
        was = min(old, key=lambda one: float(np.linalg.norm(one.joints.mean(0) - 0.5)))
        alike = [one.joints for one in new if one.side == was.side]
        size = float(np.ptp(was.joints, axis=0).max())
        return min([float(np.linalg.norm(joints - was.joints, axis=1).mean()) / size for joints in alike] + [1.0])

    def caption(self) -> str:
        """What one sees of the crop: the skin's tone, the side, the gesture and the colour around."""
        skin = _nearest(
            self.crop[regions.erode(self.old, 2)], {name: 0.93 * np.array(v[0]) for name, v in SKINS.items()}
        )
        around = regions.dilate(self.old, 8) & ~regions.dilate(self.old, 3)
        ground = _nearest(self.crop[around], {name: np.array(v) for name, v in BACKGROUNDS.items()})
        phrase = PHRASES[self.seen.gesture][0] if self.seen.gesture in PHRASES else ""
        hand = " ".join(word for word in (f"a {skin}", f"{SIDES[self.seen.hand.side]} hand", phrase) if word)
        return f"{hand}, {ground} background"

    def request(self, caption: str | None = None, strength: float = STRENGTH, **settings: Any) -> Request:
        """The request that paints the crop. Raises RequestError for a setting."""
        assert self.mask is not None, "pose comes first"
        start = regions.prefill(self.crop, self.mask, self.skin)
        return Request(
            caption or self.caption(), hands=self.arrays, image=start, mask=self.mask, strength=strength, **settings
        )

    def paste(self, picture: np.ndarray, painted: np.ndarray) -> np.ndarray:
        """A picture uint8 [h, w, 3] with the painted crop uint8 [H, W, 3] in it; the same bytes outside the mask."""
        assert self.new is not None and self.mask is not None, "pose comes first"
        shift, skin = regions.skin_shift(painted, self.new, self.crop, self.old)
        arm = skin & (regions.along(self.points, self.crop.shape[:2]) < 0.06)
        colours, alpha = regions.matte(painted, self.new | arm, skin)
        fade = ((regions.depth(self.mask, self._at_edges(picture)) - 0.5) / FADE).clip(0, 1)
        return self._composed(picture, regions.shifted(colours, shift), alpha * fade)

    def _at_edges(self, picture: np.ndarray) -> tuple[bool, bool, bool, bool]:
        """Whether the crop's top, bottom, left and right edge lie at or beyond those of the picture."""
        left, top, right, bottom = self.bounds
        return top <= 0, bottom >= picture.shape[0], left <= 0, right >= picture.shape[1]

    def _composed(self, picture: np.ndarray, hand: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        """Brings all to the picture's own pixels: what the crop shows beyond the picture is left out."""
        hole = regions.dilate(self.old, GLOW) & self.mask
        size = picture.shape[0], picture.shape[1]
        inside = self.window.within(size)
        part = picture[inside]
        mask = self.covered(picture)[inside]
        opaque = np.where(mask, self._stretched(alpha, size), 0)[..., None]
        gone = self._stretched(hole, size)[..., None]
        behind = self.window.laid(regions.prefill(self.crop, hole, self.skin), size) * gone + part * (1 - gone)
        laid = self.window.laid(hand, size) * opaque + behind * (1 - opaque)
        out = picture.copy()
        out[inside] = np.where(mask[..., None], (laid + 0.5).clip(0, 255).astype(np.uint8), part)
        return out

    def covered(self, picture: np.ndarray) -> np.ndarray:
        """The mask in the picture's own pixels, bool [h, w]."""
        assert self.mask is not None, "pose comes first"
        size = picture.shape[0], picture.shape[1]
        out = np.zeros(size, bool)
        out[self.window.within(size)] = self._stretched(self.mask, size) > 0.5
        return out

    def _stretched(self, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """float32 [H, W] of the crop at the picture's pixels."""
        return self.window.laid(values.astype(np.float32), size, Image.Resampling.BILINEAR)

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in the picture's pixels; they may lie beyond it."""
        return self.window.bounds


def plan(
    picture: np.ndarray,
    seen: Seen,
    rest: np.ndarray,
    size: tuple[int, int],
    old: np.ndarray | None = None,
    others: Iterable[Seen] = (),
) -> Patch:
    """The crop of a hand. picture: uint8 [h, w, 3]. rest: [62, 3] of the bundle's body. size: (H, W) of its pictures.
    old: [21, 2] pixels, where the old hand is, if not where `seen` is. others: hands of the picture, whose pixels stay;
    this one may be among them.
    Raises DetectionError."""
    there = place_of(seen, picture) if old is None else old
    places = [place_of(one, picture) for one in others if one is not seen]
    beside = [place for place in places if not _one_hand(place, there)]
    points = np.concatenate([seen.hand.joints_2d, there])
    reach = np.abs(points / max(*picture.shape[:2], 16) - 0.5).max()
    hidden = (there.max(0) < 0).any() or (there.min(0) >= picture.shape[1::-1]).any()
    if not reach <= LARGEST or hidden:
        raise DetectionError("A hand must lie in its picture, got one beyond the edges. Place it again.")
    wide = _window(points, size, WIDE)
    found = _old(picture, there, wide, size, beside)[1]
    y, x = np.nonzero(found)
    fingers = np.stack([x, y], -1)[:: max(len(x) // 500, 1)] * (wide.height / size[0]) + (wide.x, wide.y)
    window = _window(np.concatenate([points, fingers]), size, NEAR)
    crop, region, kept, skin = _old(picture, there, window, size, beside)
    return Patch(seen, window, crop, region, arrays_of([window.inside(seen)], window.size, rest), kept, skin)


def place_of(seen: Seen, picture: np.ndarray) -> np.ndarray:
    """Where a hand is in a picture uint8 [h, w, 3], as it was found: pixels [21, 2]."""
    return seen.hand.joints_2d if seen.found is None else seen.found.joints * picture.shape[1::-1]


def _one_hand(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two places are those of one hand: a detector may report it twice."""
    return float(np.linalg.norm(one - other, axis=1).mean()) < SAME * regions.size_of(other)


def _old(
    picture: np.ndarray, there: np.ndarray, window: Window, size: tuple[int, int], beside: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The window's pixels, where the old hand is in them, where other hands are, and where skin is."""
    crop = window.cut(picture, size)
    scale = size[0] / window.height
    points, others = (there - (window.x, window.y)) * scale, [(one - (window.x, window.y)) * scale for one in beside]
    others = [one for one in others if ((one >= 0) & (one < size[::-1])).all(1).any()]
    (region, skin), theirs = regions.old_hand(crop, points), regions.nearer(points, others, size)
    kept = np.zeros(size, bool)
    for one in others:
        kept |= regions.old_hand(crop, one)[0] & theirs
    return crop, region & ~theirs, regions.dilate(kept, 2) & theirs, skin | kept


def _window(points: np.ndarray, size: Size, near: float) -> Window:
    low, high = points.min(0), points.max(0)
    aspect = size[1] / size[0]
    height = max(near * max(high[1] - low[1], (high[0] - low[0]) / aspect), 8.0)
    x, y = (low + high) / 2 - np.array([height * aspect, height]) / 2
    return Window(float(round(x)), float(round(y)), float(round(height * aspect)), float(round(height)))


def _nearest(pixels: np.ndarray, named: Mapping[str, np.ndarray]) -> str:
    if not len(pixels):
        return next(iter(named))
    colour = np.median(pixels, 0) / 255
    return min(named, key=lambda name: float(np.abs(named[name] - colour).sum()))
