"""The hands of a photograph for a new picture (pose transfer): `hd-run ENGINES --image PHOTO`.

photo = Photo.read("photo.jpg")                    # found at once, before an engine loads
told = photo.hands_for(rest, (512, 512))           # fitted to a bundle's body, framed for its pictures
told.arrays, told.caption, told.said, told.drawing
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import DetectionError
from ..grammar import PHRASES
from ..pictures import decode, encode_png
from ..schema import MisfitError, read_file
from .arms import Arrays, Size
from .detect import Detector, Found, MediaPipe
from .draw import draw
from .hands import Seen, Window, arrays_of, closer, fitted, of_one_person, window_of
from .poses import Poses

MAX_PHOTO = 1 << 28  # bytes


@dataclass
class Told:
    """arrays: of `save_hands`, empty where no hand was found; caption: what the hands show; said: sentences for the
    user; drawing: uint8 [H, W, 3], every found hand over the photograph. whole: whether the places of the hands are
    those in the whole photograph. `generate(hands=told)` and `repair_hands(engines, picture, told)` take it as it is.
    """

    arrays: Arrays = field(repr=False)
    caption: str
    said: list[str]
    drawing: np.ndarray = field(repr=False)
    whole: bool = False

    def png(self) -> bytes:
        """The drawing as a PNG file."""
        return encode_png(self.drawing)


@dataclass
class Photo:
    """A photograph, upright, and what a detector found in it."""

    path: Path
    image: np.ndarray = field(repr=False)
    found: list[Found]
    detector: Detector

    @classmethod
    def read(cls, path: str | Path, detector: Detector | None = None) -> Photo:
        """Any of Pillow's modes, any size that Pillow opens, upright by EXIF. Raises DetectionError for a file
        that cannot be read, and for a picture without hands."""
        path = Path(path)
        image = read_photo(path)
        detector = detector or MediaPipe()
        found = detector(image)
        if not found:
            raise DetectionError(
                f"{detector.name} found no hand in {path}. Show the hand whole, larger and sharper, or give hands with "
                "--hand-params."
            )
        return cls(path, image, found, detector)

    @property
    def size(self) -> Size:
        return self.image.shape[0], self.image.shape[1]

    def hands_for(self, rest: np.ndarray, target: Size, poses: Poses | None = None, whole: bool = False) -> Told:
        """What a bundle can show of them. rest: [62, 3] of its body; target: height and width of its pictures. whole:
        the hands have their places in the whole photograph, not in the part that a new picture shows."""
        near = [closer(self.image, one, self.detector) for one in self.found]
        seen = [fitted(one, self.size, rest, self.detector, poses) for one in near]
        seen.sort(key=lambda one: -(one.sureness or 0.0))
        pair, said = of_one_person(seen, self.size, rest)
        window = Window(0, 0, self.size[1], self.size[0]) if whole else window_of(pair, self.size, target)
        framed = [window.inside(one) for one in pair]
        if not whole and window.height < 0.999 * min(self.size[0], self.size[1] * target[0] / target[1]):
            said.append(f"The hands are small in {self.path}, so the picture shows them nearer.")
        said = [f"{self.path} shows {' and '.join(str(one) for one in pair)}.", *said]
        return Told(arrays_of(framed, window.size, rest), caption(pair), said, draw(self.image, seen), whole)


def read_photo(path: str | Path) -> np.ndarray:
    """uint8 [H, W, 3], upright. Raises DetectionError."""
    try:
        return decode(read_file(Path(path), MAX_PHOTO))
    except FileNotFoundError:
        raise DetectionError(f"The picture {path} does not exist. Check the path.") from None
    except OSError as error:
        raise DetectionError(f"The picture {path} cannot be read: {error.strerror or error}.") from None
    except MisfitError as error:
        raise DetectionError(f"The picture {path} cannot be read: {error}") from None


def caption(seen: list[Seen]) -> str:
    """What one or two hands show, in the demo's words."""
    phrases = {one.side: PHRASES[one.gesture][0] if one.gesture in PHRASES else "" for one in seen}
    if len(phrases) == 1:
        ((side, phrase),) = phrases.items()
        return f"a {side} hand {phrase}".strip()
    if phrases["left"] == phrases["right"]:
        return f"both hands {phrases['left']}".strip()
    return "both hands" + "".join(f", the {side} one {phrases[side]}" for side in ("left", "right") if phrases[side])
