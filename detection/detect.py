"""Detectors find hands in a picture: where each hand is, which side it is, and how sure the detector is.

    with MediaPipe() as detector:
        detector(image)        # [Found(side="right", score=0.97, joints=[21, 2])]

A detector has a name, settings, and a call from a picture to a list of `Found`. MediaPipe Hands (Zhang et al. 2020,
arXiv 2006.10214) is the one here. It was trained on photographs, not on our pictures.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..errors import DetectionError
from .convention import Convention, mediapipe, sureness

SMALL, WINDOW = 0.4, 0.7  # shares of a picture's sides: a smaller hand lies whole in one of the windows
SQUARES, LEAST = (1, 2, 3, 4), 96  # where no hand is found: parts of the shorter side, and pixels of a square at least
SAME_LOOK, OTHER_LOOK = 1 / 6, 1 / 2  # sizes of a hand: joints this near on the mean are of one hand
SEEN, EDGE = 96, 6  # pixels of a side of a part, and levels between neighbours from which on it shows an edge


@dataclass(frozen=True)
class Found:
    """A hand that a detector found."""

    side: str  # "left" or "right", as the person in the picture would say
    score: float  # the detector's confidence, 0 to 1
    joints: np.ndarray = field(repr=False)  # [21, 2] in [0, 1] of width and height: wrist, thumb to little finger
    apart: float | None = None  # how far looks from near are apart, see `hands.closer`; None without any


class Detector(Protocol):
    """Finds hands. `settings` goes into every report; `convention` says where it puts its points."""

    name: str
    settings: dict[str, Any]
    convention: Convention

    def __call__(self, image: np.ndarray) -> list[Found]:
        """uint8 [H, W, 3] -> its hands, in any order."""

    def once(self, image: np.ndarray) -> list[Found]:
        """The same by one look at the whole, which misses hands that are small in it."""

    def sureness(self, found: Found, residual: float, degrees: float) -> float:
        """How likely the pose of a fitted hand is right, 0 to 1. residual, degrees: as in `fit.Fitted`, their mean."""

    def close(self) -> None:
        """Frees its models."""


def padded(image: np.ndarray, share: float, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resizes the picture and extends it on all sides by `share` of its size: the longer side is then `size` pixels.

    Returns the new picture, scale and shift, both [2] (x, y). joints * scale + shift leads from places in the new
    picture back to places in the old one, each in [0, 1].
    """
    height, width = image.shape[:2]
    factor = size / (max(height, width) * (1 + 2 * share))
    rows, columns = max(round(height * factor), 1), max(round(width * factor), 1)
    small = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC, reducing_gap=3.0))
    dy, dx = round(rows * share), round(columns * share)
    wide = np.pad(small, ((dy, dy), (dx, dx), (0, 0)), mode="edge")
    return wide, np.array([1 + 2 * dx / columns, 1 + 2 * dy / rows]), np.array([-dx / columns, -dy / rows])


def windows(image: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Four overlapping parts of a picture: (the part's corner, [2] (x, y) in [0, 1] of the picture; the part)."""
    height, width = image.shape[:2]
    rows, columns = round(height * WINDOW), round(width * WINDOW)
    for y in np.linspace(0, height - rows, 2).round().astype(int):
        for x in np.linspace(0, width - columns, 2).round().astype(int):
            yield np.array([x / width, y / height]), image[y : y + rows, x : x + columns]


def squares(image: np.ndarray, side: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Squares of `side` pixels that cover a picture and overlap by at least half, as `windows` gives them."""
    height, width = image.shape[:2]
    rows, columns = (
        np.linspace(0, length - side, 1 + -(-2 * (length - side) // side)).round().astype(int)
        for length in (height, width)
    )
    for y in rows:
        for x in columns:
            yield np.array([x / width, y / height]), image[y : y + side, x : x + side]


def even(part: np.ndarray) -> bool:
    """Whether a part of a picture, uint8 [H, W, 3], has no edge, so that no hand can be in it.

    It is brought to SEEN pixels a side at most, as small as a detector sees it; neighbours there differ by less than
    EDGE levels."""
    small = Image.fromarray(part)
    small.thumbnail((SEEN, SEEN), Image.Resampling.BOX)
    levels = np.asarray(small, np.int16)
    return all(np.abs(np.diff(levels, axis=axis)).max(initial=0) < EDGE for axis in (0, 1))


def distinct(looks: Iterable[Sequence[Found]]) -> list[Found]:
    """Keeps the surest of hands that overlap. The result starts with the surest hand.

    looks: what each look at the picture found. Two looks may find one hand twice, some way apart. One look hardly does:
    hands that press on each other are two."""
    kept: list[tuple[int, Found]] = []
    found = [(number, hand) for number, look in enumerate(looks) for hand in look]
    for number, hand in sorted(found, key=lambda one: -one[1].score):
        for other, there in kept:
            way = np.linalg.norm(hand.joints - there.joints, axis=1).mean()
            size = max(_size(hand.joints), _size(there.joints))
            if way <= size * (SAME_LOOK if number == other else OTHER_LOOK):
                break
        else:
            kept.append((number, hand))
    return [hand for _, hand in kept]


def _size(joints: np.ndarray) -> float:
    """The longer side of the joints' box, in [0, 1] of the picture."""
    return float(np.ptp(joints, axis=0).max())


class MediaPipe:
    """MediaPipe Hands on single pictures.

    It misses hands that fill a small picture, so `padded` extends the picture by a quarter and enlarges it. The score
    is MediaPipe's handedness score; it gives no other.

    It misses hands that are small in their picture. Where it finds small hands only, it searches `windows`, too. Where
    it finds none, it searches `squares`, smaller and smaller ones.

    It names sides as in a mirror: its "left" is the right hand of the person in the picture.
    """

    name = "MediaPipe Hands"

    def __init__(self, pad: float = 0.25, size: int = 768, hands: int = 8, confidence: float = 0.5) -> None:
        """hands: how many it searches for at first. When it finds that many, it searches for twice as many, and so on.

        Raises DetectionError where MediaPipe is missing, or is a version without these models."""
        try:
            with silence():
                import mediapipe as package
        except ImportError as error:
            raise DetectionError(
                "MediaPipe, which finds the hands, is not installed. "
                'Install it under Python 3.12 or older: pip install "handiffuser[detect]".'
            ) from error
        if not hasattr(package, "solutions"):
            raise DetectionError(
                f"MediaPipe must bring its hand models, got version {package.__version__}, which does not. "
                "Install mediapipe==0.10.14."
            )
        self.settings: dict[str, Any] = {
            "version": package.__version__,
            "padded by": pad,
            "scaled to": size,
            "most hands": f"all: {hands}, doubled where so many are found",
            "where hands are smaller than": f"{SMALL} of the picture: also in 4 windows of {WINDOW}",
            "where no hand is found": f"also in squares of 1 to 1/4 of the shorter side, at least {LEAST} pixels",
            "one hand": f"joints within {SAME_LOOK:.2f} of its size in one look, {OTHER_LOOK:.2f} in two",
            "left out": f"parts whose neighbouring pixels, {SEEN} a side, differ by less than {EDGE} levels",
            "min_detection_confidence": confidence,
            "static_image_mode": True,
        }
        self.pad, self.size, self.hands, self.convention = pad, size, hands, mediapipe()
        warnings.filterwarnings("ignore", message="SymbolDatabase.GetPrototype")  # protobuf announces a removal
        self._make = partial(package.solutions.hands.Hands, static_image_mode=True, min_detection_confidence=confidence)
        self._models: dict[int, Any] = {}  # by how many hands they find at most
        self._model(hands)

    def _model(self, most: int) -> Any:
        if most not in self._models:
            with silence():
                self._models[most] = self._make(max_num_hands=most)
                self._models[most].process(np.zeros((64, 64, 3), np.uint8))  # it prints while it loads
        return self._models[most]

    def __call__(self, image: np.ndarray) -> list[Found]:
        looks = [self.once(image)]
        if looks[0] and max(_size(hand.joints) for hand in looks[0]) < SMALL:
            looks += self._within(image, windows(image))
        for part in SQUARES:
            side = min(image.shape[:2]) // part
            if not any(looks) and LEAST <= side < max(image.shape[:2]):
                looks = self._within(image, squares(image, side))
        return distinct(looks)

    def _within(self, image: np.ndarray, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[list[Found]]:
        """The hands in each part of a picture."""
        looks = []
        for place, part in parts:
            if even(part):
                continue
            scale = np.array(part.shape[1::-1]) / image.shape[1::-1]
            looks.append([replace(hand, joints=hand.joints * scale + place) for hand in self.once(part)])
        return looks

    def once(self, image: np.ndarray) -> list[Found]:
        """See `Detector`."""
        shown, scale, shift = padded(image, self.pad, self.size)
        most = self.hands
        result = self._model(most).process(shown)
        while len(result.multi_hand_landmarks or []) >= most:  # there may be more
            most *= 2
            result = self._model(most).process(shown)
        found = []
        for marks, sides in zip(result.multi_hand_landmarks or [], result.multi_handedness or [], strict=True):
            side = {"Left": "right", "Right": "left"}[sides.classification[0].label]
            joints = np.array([(mark.x, mark.y) for mark in marks.landmark]) * scale + shift
            found.append(Found(side, float(sides.classification[0].score), joints))
        return found

    def sureness(self, found: Found, residual: float, degrees: float) -> float:
        """See `Detector`. A logistic regression on renders; `mediapipe.json` has its numbers."""
        return sureness(found.score, residual, degrees, found.apart)

    def close(self) -> None:
        for model in self._models.values():
            model.close()


@contextmanager
def silence() -> Iterator[None]:
    """Keeps messages of native libraries off the terminal: they write to file descriptor 2, not to sys.stderr."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
