"""The hands of a picture, for a server: one detector, in a thread of its own.

    finder = Finder(Path("engines"))
    seen = await finder(image)               # [Seen], the surest first
    hands = finder.shown(seen[0], size)      # arrays that a page can draw and /v1/hands/edit can change

The detector loads at the first picture. It takes one picture at a time, and a few may wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..detection.detect import Detector, MediaPipe
from ..detection.hands import Seen, arrays_of, closer, fitted, seen_again
from ..editing import Arrays
from ..errors import DetectionError, RequestError
from ..fingers import gestures
from ..repair.place import placed
from ..runtime.rest import joints_at_rest
from .dispatch import BusyError
from .service import UnfinishedError

MAX_WAITING = 8  # pictures
AROUND = 1.8  # of a box: what the detector sees of the picture around it


class Finder:
    """Finds and fits hands to the body of a bundle."""

    def __init__(self, engines: Path) -> None:
        self.engines = engines
        self.detector: Detector | None = None
        self.pool = ThreadPoolExecutor(1, "hd-serve-finder")
        self.waiting = 0

    @cached_property
    def rest(self) -> np.ndarray:
        """[62, 3] metres, the joints at rest of the bundle's body. Runs a graph at its first use."""
        return joints_at_rest(self.engines)

    async def __call__(self, image: np.ndarray) -> list[Seen]:
        """image: uint8 [H, W, 3]. Raises BusyError, and UnfinishedError where the detector is missing."""
        return await self.run(self._find, image)

    async def run(self, work: Any, *arguments: Any) -> Any:
        """Calls work(*arguments) in the finder's thread."""
        if self.waiting >= MAX_WAITING:
            raise BusyError(f"{self.waiting} pictures wait for the detector. Try again later.", 5.0)
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, work, *arguments)
        finally:
            self.waiting -= 1

    async def later(self, work: Any, *arguments: Any) -> Any:
        """The same for a request that the server has taken already: it waits for its turn."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *arguments)

    def _find(self, image: np.ndarray) -> list[Seen]:
        if self.detector is None:
            try:
                self.detector = MediaPipe()
            except DetectionError as error:
                raise UnfinishedError(f"This server finds no hands: {error}", 501) from None
        seen = []
        for one in self.detector(image):
            found = closer(image, one, self.detector)
            try:
                seen.append(fitted(found, image.shape[:2], self.rest, self.detector))
            except DetectionError:  # points in one place: what was found there is not a hand
                continue
        return sorted(seen, key=lambda one: -(one.sureness or 0.0))

    def within(self, image: np.ndarray, box: np.ndarray, side: str, gesture: str) -> Seen:
        """The hand in a box [4] of pixels, left, top, right, bottom: the surest that the detector finds there, or one
        that is placed, with this side and gesture. Runs in the finder's thread. Raises RequestError."""
        if gesture not in gestures():
            raise RequestError(f"gesture must be one of {', '.join(gestures())}, got {gesture[:60]!r}.", "gesture")
        size = np.array(image.shape[1::-1])
        spare = (AROUND - 1) / 2 * (box[2:] - box[:2]).max()
        low = np.floor(box[:2] - spare).clip(0, size - 1).astype(int)
        high = np.ceil(box[2:] + spare).clip(low + 1, size).astype(int)
        part = np.ascontiguousarray(image[low[1] : high[1], low[0] : high[0]])
        try:
            found = self._find(part)
        except UnfinishedError:  # a hand can be placed without the detector
            found = []
        for one in found:
            assert one.found is not None and self.detector is not None
            there = replace(one.found, joints=(one.found.joints * (high - low) + low) / size)
            middle = there.joints.mean(0) * size
            if ((middle > box[:2]) & (middle < box[2:])).all():
                return fitted(there, image.shape[:2], self.rest, self.detector)
        return placed(box, side, gesture, self.rest)

    def shown(self, seen: Seen, size: tuple[int, int]) -> Arrays:
        """The arrays of one hand in its picture (height, width), float32, as `/v1/hands` gives those of a picture."""
        return {name: np.asarray(value, np.float32) for name, value in arrays_of([seen], size, self.rest).items()}


def seen_of(hands: Mapping[str, np.ndarray], size: tuple[int, int], gesture: str = "") -> Seen:
    """The one visible hand of arrays with joints_2d and visibility, in pixels of a picture (height, width). Raises
    RequestError."""
    if "joints_2d" not in hands or "visibility" not in hands:
        raise RequestError(
            "hands must have joints_2d and visibility. Take them from /v1/hands/detect or /v1/hands.", "hands"
        )
    visible = np.flatnonzero(np.asarray(hands["visibility"]) >= 0.5)
    if len(visible) != 1:
        raise RequestError(
            f"hands must show one hand each for a repair, got {len(visible)}. Send an object for each hand.", "hands"
        )
    seen = seen_again(hands, int(visible[0]), size, gesture)
    if not np.ptp(seen.hand.joints_2d, axis=0).max() >= 1:
        raise RequestError("hands.joints_2d must span at least a pixel. Make the hand larger.", "hands")
    return seen
