"""The hands of a picture, found and fitted, and how sure each of them is.

    hands, size = find(image, rest), image.shape[:2]   # the surest first
    pair, said = of_one_person(hands, size, rest)      # what a bundle of one person can show
    arrays = arrays_of(pair, size, rest)               # save_hands("photo.hands.npz", arrays)

`rest` are the 62 joints at rest of the body that shall show the hands, in metres; `runtime.rest.joints_at_rest` has
those of a bundle. Estimates of HaMeR and WiLoR need no detector: `from_estimates`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..contract import HAND_JOINTS
from ..errors import DetectionError
from ..fingers import SIDES
from ..hands import POSES
from ..kinematics import forward, radius, world
from ..rotations import axis_angle_to_matrix
from .arms import Arrays, HandEstimate, Size, person_of
from .detect import Detector, Found, MediaPipe
from .fit import Fitted, fit
from .mano import hand_means, in_picture, mano_estimates
from .poses import Poses

LANCZOS = Image.Resampling.LANCZOS
LOOK = 2.2  # boxes of the hand: a crop to look at again
LOOKED_AT = 190, 190  # its pixels
ASIDE = 0.5  # sizes of the hand: another hand is farther away
UNSEEN = 0.5  # sizes of the hand: so far apart count two looks where one sees no hand
FIRST, TOLD = 0.5, 3.0  # what the first look counts beside those from near, and a look that sees the side a person says
MIN_HAND_PIXELS = 40  # pixels of a painted picture: smaller hands are brought nearer
NEAR = 1.6  # a window that brings hands nearer, times their box


@dataclass(eq=False)  # arrays do not compare
class Seen:
    """A hand of a picture. hand: its pose and joints; a Fitted where points were fitted. found: what the detector said.

    sureness: 0 to 1, how likely its pose is right, see `Detector.sureness`; None where hands came from a file, which
    does not say.
    """

    hand: HandEstimate
    found: Found | None = field(default=None, repr=False)
    sureness: float | None = None

    @property
    def side(self) -> str:
        return SIDES[self.hand.side]

    @property
    def gesture(self) -> str:
        """The likeliest gesture, or "" where none is known."""
        return self.hand.gesture if isinstance(self.hand, Fitted) else ""

    def __str__(self) -> str:
        shows = f", {self.gesture.replace('_', ' ')}" if self.gesture else ""
        sure = "" if self.sureness is None else f", {self.sureness:.0%} sure"
        return f"a {self.side} hand{shows}{sure}"


def find(
    image: np.ndarray,
    rest: np.ndarray,
    detector: Detector | None = None,
    poses: Poses | None = None,
    side: str | None = None,
) -> list[Seen]:
    """The hands that a detector finds, fitted; the surest first. image: uint8 [H, W, 3]. side: where the detector finds
    one hand, a person who names its side is right. Raises DetectionError."""
    used = detector or MediaPipe()
    try:
        found = used(image)
        said = side if len(found) == 1 else None
        seen = [fitted(closer(image, one, used, said), image.shape[:2], rest, used, poses, said) for one in found]
    finally:
        if detector is None:
            used.close()
    return sorted(seen, key=lambda one: -(one.sureness or 0.0))


def closer(image: np.ndarray, found: Found, detector: Detector, side: str | None = None) -> Found:
    """A found hand after two looks from near: at a crop of it, and at the crop's mirror image.

    A detector that confuses thumb and little finger in one look rarely does so in others. So the looks vote which side
    the hand is and which way round it lies, and the mean of those that agree is taken. image: uint8 [H, W, 3]. side:
    what a person says. The score becomes the share of the votes, times their mean score; `apart` says how far the two
    looks are apart, in sizes of the hand."""
    wide = np.array(image.shape[1::-1], np.float64)
    points = found.joints * wide
    size = max(float(np.ptp(points, axis=0).max()), 1.0)
    corner = points.min(0) / 2 + points.max(0) / 2 - LOOK * size / 2
    window = Window(float(corner[0]), float(corner[1]), LOOK * size, LOOK * size)
    left, top, right, bottom = window.bounds
    crop = window.cut(image, LOOKED_AT)
    looks = [found]
    for mirrored in (False, True):
        there = []
        for one in detector.once(np.ascontiguousarray(crop[:, ::-1]) if mirrored else crop):
            joints, name = one.joints, one.side
            if mirrored:
                joints, name = joints * (-1, 1) + (1, 0), SIDES[1 - SIDES.index(name)]
            joints = joints * (right - left, bottom - top) + (left, top)
            ratio = float(np.ptp(joints, axis=0).max()) / size
            if np.linalg.norm(joints.mean(0) - points.mean(0)) < ASIDE * size and ASIDE < ratio < 1 / ASIDE:
                there.append(Found(name, one.score, joints / wide))
        looks += sorted(there, key=lambda one: -one.score)[:1]
    near = [one.joints * wide for one in looks[1:]]
    apart = float(np.linalg.norm(near[0] - near[1], axis=1).mean()) / size if len(near) == 2 else UNSEEN
    votes: dict[tuple[str, bool], list[tuple[float, Found]]] = {}
    for number, one in enumerate(looks):
        weight = one.score * (1 if number else FIRST) * (TOLD if one.side == side else 1)
        votes.setdefault((side or one.side, _clockwise(one.joints * wide)), []).append((weight, one))
    most = max(votes.values(), key=lambda group: sum(weight for weight, _ in group))
    agreeing = [one for _, one in most if one is not found] or [found]
    score = float(np.mean([one.score for one in agreeing])) * len(agreeing) / max(len(near), 1)
    return Found(side or agreeing[0].side, score, np.mean([one.joints for one in agreeing], axis=0), apart)


def _clockwise(points: np.ndarray) -> bool:
    """Whether the knuckles of index and little finger follow each other clockwise around the wrist: palm or back."""
    a, b = points[5] - points[0], points[17] - points[0]
    return bool(a[0] * b[1] - a[1] * b[0] > 0)


def fitted(
    found: Found,
    size: Size,
    rest: np.ndarray,
    detector: Detector,
    poses: Poses | None = None,
    side: str | None = None,
    gesture: str | None = None,
) -> Seen:
    """The hand of a detector's points in a picture (height, width). side, gesture: what a person says of it."""
    points = found.joints * (size[1], size[0])
    hand = fit(points, side or found.side, rest, poses, detector.convention, gesture)
    return Seen(hand, found, detector.sureness(found, hand.residual, float(hand.degrees.mean())))


def from_estimates(path: str | Path, size: Size, rest: np.ndarray, hand_mean: str | Path | None = None) -> list[Seen]:
    """The hands in an .npz that HaMeR, WiLoR or WiLoR-mini gave for a picture (height, width); see `mano`.

    hand_mean: the user's SMPL-H .npz, whose mean hand these programs leave out of their rotations; needed where they
    do. Raises DetectionError with a sentence."""
    try:
        means = hand_means(None if hand_mean is None else Path(hand_mean))
        estimates = mano_estimates(Path(path), means, rest)
    except ValueError as error:
        raise DetectionError(str(error)) from None
    return [Seen(in_picture(one, size)) for one in estimates]


def seen_again(hands: Mapping[str, np.ndarray], side: int, size: Size, gesture: str = "") -> Seen:
    """The left (0) or right (1) hand of arrays with joints_2d, in pixels of a picture (height, width)."""
    vectors = np.concatenate([np.reshape(hands[name], (-1, 3)) for name in POSES]).astype(np.float64)
    turn = world(axis_angle_to_matrix(vectors))[20 + side]
    points = np.asarray(hands["joints_2d"], np.float64)[side] * (size[1], size[0])
    fingers = vectors[22 + 15 * side : 37 + 15 * side]
    if gesture:
        return Seen(Fitted(side, turn, fingers, points, 0.0, np.zeros(16), {gesture: 1.0}))
    return Seen(HandEstimate(side, turn, fingers, points))


def of_one_person(seen: Sequence[Seen], size: Size, rest: np.ndarray) -> tuple[list[Seen], list[str]]:
    """The surest hand, and the surest of the other side where one person can show both; and what was left out, in
    sentences. size: (height, width) of the picture."""
    if not seen:
        return [], []
    first, *others = seen
    second = next((one for one in others if one.hand.side != first.hand.side), None)
    pair, said = [first], []
    if second is not None and person_of([first.hand, second.hand], size, rest) is None:
        said.append(f"One person cannot show both hands, so the surest is taken: {first}.")
    elif second is not None:
        pair.append(second)
    left = [one for one in others if one not in pair]
    if left and not said:
        taken = " and ".join(str(one) for one in pair)
        said.append(f"The picture shows {len(seen)} hands. One person shows a left and a right one, so this takes "
                    f"{taken}.")  # fmt: skip
    return pair, said


def arrays_of(seen: Sequence[Seen], size: Size, rest: np.ndarray) -> Arrays:
    """SMPL-H arrays, placement and camera of one person with these hands (one, or a left and a right one), for
    `save_hands`. size: (height, width) of the picture, or of its `Window`.

    Beside what `load_hands` reads: joints [62, 3] metres, joints_2d [2, 21, 2] in [0, 1], visibility [2]. The camera
    is exact for one hand and least squares for two. Raises DetectionError where one person cannot show both."""
    arrays = person_of([one.hand for one in seen], size, rest)
    if arrays is None:
        raise DetectionError("seen must be hands that one person can show, got two of other sizes. Give one hand.")
    vectors = np.concatenate([arrays[name].reshape(-1, 3) for name in POSES]).astype(np.float64)
    joints = forward(axis_angle_to_matrix(vectors), rest)[1]
    hands = joints[np.array(HAND_JOINTS)][..., :2]  # [2, 21, 2]
    shown = arrays["visibility"] > 0.5
    places = arrays["placement"][shown].astype(np.float64)
    scale = np.exp(np.mean(places[:, 3] - np.log(radius(hands[shown]))))
    shift = np.mean(places[:, 1:3] / scale - hands[shown].mean(1), axis=0)
    view = scale * (hands + shift)
    aspect = size[1] / size[0]
    arrays["joints_2d"] = np.stack([0.5 + 0.5 * view[..., 0] / aspect, 0.5 - 0.5 * view[..., 1]], -1)
    return {**arrays, "joints": joints, "camera": np.array([scale, *shift])}


@dataclass(frozen=True)
class Window:
    """A part of a picture, in pixels: its corner (x, y), width and height. It may reach beyond the picture."""

    x: float
    y: float
    width: float
    height: float

    @property
    def size(self) -> tuple[float, float]:
        """(height, width)."""
        return self.height, self.width

    def inside(self, seen: Seen) -> Seen:
        """The same hand in the window's own pixels."""
        return replace(seen, hand=replace(seen.hand, joints_2d=seen.hand.joints_2d - (self.x, self.y)))

    def cut(self, picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The window's pixels of a picture uint8 [H, W] or [H, W, 3], scaled to `size` (height, width). The edge's
        colour stands for what lies beyond the picture; that takes no memory, however far the window reaches."""
        left, top, right, bottom = self.bounds
        rows, y0, y1 = _seen(top, bottom, size[0], picture.shape[0])
        columns, x0, x1 = _seen(left, right, size[1], picture.shape[1])
        shown = (rows.stop - rows.start, columns.stop - columns.start)
        if (y1 - y0, x1 - x0) == picture.shape[:2] == shown:
            part = picture
        else:
            part = np.asarray(Image.fromarray(picture).resize(shown[::-1], LANCZOS, box=(x0, y0, x1, y1)))
        beyond = [(rows.start, size[0] - rows.stop), (columns.start, size[1] - columns.stop), (0, 0)]
        return np.pad(part, beyond[: picture.ndim], mode="edge")

    def within(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """The rows and columns of a picture (height, width) that the window shows."""
        left, top, right, bottom = self.bounds
        return slice(max(top, 0), min(bottom, size[0])), slice(max(left, 0), min(right, size[1]))

    def laid(self, painted: np.ndarray, size: tuple[int, int], how: Image.Resampling = LANCZOS) -> np.ndarray:
        """What `cut` gave, painted, at the pixels of `within`: uint8 or float32 [h, w] or uint8 [h, w, 3]."""
        left, top, right, bottom = self.bounds
        rows, columns = self.within(size)
        y, x = painted.shape[0] / (bottom - top), painted.shape[1] / (right - left)
        box = ((columns.start - left) * x, (rows.start - top) * y, (columns.stop - left) * x, (rows.stop - top) * y)
        shape = (columns.stop - columns.start, rows.stop - rows.start)
        return np.asarray(Image.fromarray(painted).resize(shape, how, box=box))

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in whole pixels; they may lie beyond the picture."""
        return round(self.x), round(self.y), round(self.x + self.width), round(self.y + self.height)


def _seen(low: int, high: int, count: int, most: int) -> tuple[slice, float, float]:
    """Along one axis: of `count` pixels that show low to high, those whose middle lies in a picture of `most` pixels,
    at least one; and the part of the picture that they show."""
    step = (high - low) / count
    first = min(max(math.ceil(-low / step - 0.5), 0), count - 1)
    last = min(max(math.ceil((most - low) / step - 0.5), first + 1), count)
    start = min(max(low + first * step, 0.0), most - 1.0)
    return slice(first, last), start, max(min(low + last * step, float(most)), start + 1)


def window_of(seen: Sequence[Seen], size: Size, target: Size) -> Window:
    """The part of a picture (height, width) that a painted one of `target` (height, width) shows.

    It has the target's shape. It is as large as fits into the picture, near the hands; where a hand would then be
    smaller than MIN_HAND_PIXELS, it is NEAR times the hands' box."""
    height, width = size
    aspect = target[1] / target[0]
    points = np.concatenate([one.hand.joints_2d for one in seen])
    low, high = points.min(0), points.max(0)
    middle = (low + high) / 2
    tall = min(height, width / aspect)
    smallest = min(float(np.ptp(one.hand.joints_2d, axis=0).max()) for one in seen)
    if smallest * target[0] / tall < MIN_HAND_PIXELS or (high - low > (tall * aspect, tall)).any():
        tall = NEAR * max(float(high[1] - low[1]), float(high[0] - low[0]) / aspect)
        corner = middle - np.array([tall * aspect, tall]) / 2
    else:
        room = np.array([width - tall * aspect, height - tall])
        corner = (middle - np.array([tall * aspect, tall]) / 2).clip(0, np.maximum(room, 0))
    return Window(float(corner[0]), float(corner[1]), tall * aspect, tall)
