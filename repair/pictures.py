"""Pictures that a program holds as arrays: their hands found, and painted again.

with HanDiffuser.load("demo") as engines:
    (told,) = find_hands(engines, [picture])
    (new,) = engines.generate(told.caption, hands=told)   # its hands in a new picture
    outcome = repair_hands(engines, picture, gesture="open_hand", seed=4)
    outcome.image, outcome.said
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..detection.detect import Detector, MediaPipe
from ..detection.hands import Seen, find, seen_again
from ..detection.photo import Photo, Told
from ..errors import DetectionError, EngineError, RequestError
from ..fingers import SIDES, gestures
from ..hands import NO_HANDS, POSES, given_arrays, people_in, person
from ..runtime.pipeline import HanDiffuser
from ..runtime.requests import Request
from ..runtime.results import Failure
from .repair import Outcome, Run, repair
from .wish import Wish, choose


def find_hands(
    engines: HanDiffuser, pictures: Iterable[np.ndarray], whole: bool = False, detector: Detector | None = None
) -> Iterator[Told]:
    """The hands of each picture uint8 [H, W, 3], as one person of the bundle shows them: a left and a right one, the
    surest. whole: their places are those in the picture, for `repair_hands`; else those in a new picture, which shows
    small hands nearer, for `generate`. Both take what this yields.

    A picture without hands yields a Told whose `arrays` are empty and whose `said` tells why; the next ones follow.
    Raises DetectionError where the detector is missing, and RequestError for what is not a picture."""
    if getattr(pictures, "ndim", None) == 3:
        raise RequestError("pictures must be a list of arrays uint8 [H, W, 3], got one array. Put it into a list.")
    rest, used = joints_of(engines), detector or MediaPipe()
    try:
        for picture in pictures:
            found = used(_checked(picture))
            if not found:
                said = f"{used.name} found no hand in the picture. Show the hand whole, larger and sharper."
                yield Told({}, "", [said], picture, whole)
                continue
            photo = Photo(Path("The picture"), picture, found, used)
            yield photo.hands_for(rest, engines.manifest.image_size, whole=whole)
    finally:
        if detector is None:
            used.close()


def repair_hands(
    engines: HanDiffuser,
    picture: np.ndarray,
    hands: Mapping[str, np.ndarray] | Told | None = None,
    *,
    gesture: str | None = None,
    side: str | None = None,
    strength: float | None = None,
    caption: str | None = None,
    keep_pose: bool = False,
    every: bool = False,
    detector: Detector | None = None,
    run: Run | None = None,
    **settings: Any,
) -> Outcome:
    """Paints the hands of a picture uint8 [H, W, 3] again, and leaves all other pixels as they are; see `hd-repair`.

    hands: what to paint, with joints_2d in [0, 1] of the picture, as `find_hands` with `whole` yields it; by default
    what is found. gesture: what every hand does. side: "left" or "right" alone. every: also hands whose pose is not
    sure. settings: of SETTINGS, without size: the picture keeps its own. run: in place of `engines.run`. Raises
    DetectionError, RequestError and EngineError."""
    if side not in (None, *SIDES):
        raise RequestError(f"side must be left or right, got {side!r}.", "side")
    if settings.get("size") is not None:
        raise RequestError(
            f"size must be left out of a repair, got {settings['size']!r}. The picture keeps its own size.", "size"
        )
    size = _checked(picture).shape[:2]
    given = None if hands is None else _placed(hands)
    if gesture is not None and gesture not in gestures():
        raise RequestError(f"gesture must be one of {', '.join(gestures())}, got {gesture!r}.", "gesture")
    if hands is None and detector is None:  # one detector finds the hands and looks at what was painted
        wished: dict[str, Any] = {
            "gesture": gesture,
            "side": side,
            "strength": strength,
            "caption": caption,
            **settings,
        }
        with closing(MediaPipe()) as eyes:
            return repair_hands(engines, picture, keep_pose=keep_pose, every=every, detector=eyes, run=run, **wished)
    rest = joints_of(engines)
    try:
        seen = found = find(picture, rest, detector, side=side)
    except DetectionError:
        if hands is None:
            raise
        seen = found = []  # without a detector, the old hands are taken to be where the new ones are
    if given is not None:
        seen = [
            again(one, number, size, seen) for one in given for number in (0, 1) if one["visibility"][number] >= 0.5
        ]
    seen = [one for one in seen if side in (None, one.side)]
    if not seen:
        raise DetectionError("No hand was found in the picture. Show it larger and sharper, or give hands.")
    wish = Wish(gesture, every, caption, strength, keep_pose)
    chosen, said = choose(seen, wish, picture, rest)
    looks = detector if wish.automatic and hands is None else None
    outcome = repair(engines, picture, chosen, rest, wish, looks, run, found, **settings)
    outcome.said = [*said, *outcome.said]
    return outcome


def _placed(hands: object) -> list[dict[str, np.ndarray]]:
    """Arrays of each person's hands, which have their places in the picture. Raises RequestError."""
    if not getattr(hands, "whole", True) and getattr(hands, "arrays", None):
        raise RequestError(
            "hands must have their places in the whole picture, got those for a new one. Call find_hands with "
            "whole=True.",
            "hands",
        )
    arrays = given_arrays(hands, *POSES, "joints_2d", "visibility")
    return [person(arrays, number) for number in range(people_in(arrays))]


def _checked(picture: np.ndarray) -> np.ndarray:
    """Raises RequestError for what is not a picture uint8 [H, W, 3]."""
    shape, kind = getattr(picture, "shape", None), getattr(picture, "dtype", None)
    if shape is None or len(shape) != 3 or shape[2] != 3 or 0 in shape or kind != np.uint8:
        got = f"{kind} {list(shape)}" if shape is not None else type(picture).__name__
        raise RequestError(
            f"A picture must be an array uint8 [H, W, 3], got {got}. Convert it, and give a list of them."
        )
    return picture


def again(hands: Mapping[str, np.ndarray], side: int, size: tuple[int, int], seen: list[Seen]) -> Seen:
    """A given hand, and what the detector found of that side in the picture: the old hand is there."""
    given = seen_again(hands, side, size)
    middle = given.hand.joints_2d.mean(0)
    old = [one.found for one in seen if one.side == given.side and one.found is not None]
    old.sort(key=lambda found: float(np.linalg.norm(found.joints.mean(0) * size[::-1] - middle)))
    return replace(given, found=old[0] if old else None)


def joints_of(engines: HanDiffuser) -> np.ndarray:
    """[62, 3] metres, the joints of the bundle's body at rest."""
    requests, refused = engines.prepare([Request("hands", hands=NO_HANDS)])
    if refused:
        raise RequestError(refused[0].sentence)
    (made,) = engines.hands(requests)
    if isinstance(made, Failure):
        raise EngineError(f"The body could not be posed: {made.sentence}")
    return made["joints"].astype(np.float64)
