"""The hands of one picture: found or given, shaped as a person says, painted in few batches, pasted.

hands = wanted(found, gesture="open_hand")            # with reasons for those that stay as they are
for done in repaired(pipeline, picture, hands, rest, settings): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..contract import HAND_JOINTS
from ..detection.arms import HandEstimate, Size
from ..detection.detect import Detector
from ..detection.hands import Seen
from ..errors import DetectionError, EngineError, RequestError
from ..hands import POSES, hand_arrays, load_hands, person
from ..kinematics import world
from ..rotations import axis_angle_to_matrix
from ..runtime.pipeline import HanDiffuser
from ..runtime.requests import Request
from ..runtime.results import Failure, Picture
from .patch import Patch, plan
from .wish import MOVED, SAY, Wish, the

Run = Callable[[list[Request]], Iterable[Picture | Failure]]
SOFT = 4.0  # pixels of the picture that a painted one may cover before the hand looks soft


@dataclass
class Outcome:
    """image: uint8 [H, W, 3]. mask: bool [H, W], outside of it all bytes are as they were. painted: what each painted
    hand was, for the note. said: sentences for the user."""

    image: np.ndarray = field(repr=False)
    mask: np.ndarray = field(repr=False)
    painted: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


def given_hands(path: Path, size: Size, pipeline: HanDiffuser) -> list[Seen]:
    """The hands of a `.hands.npz` that hd-run or hd-repair wrote for a picture (height, width): those with a place in
    it, of every person. The bundle may know fewer people, because each hand is painted on its own.

    Raises RequestError for a file that cannot be read, and DetectionError where it names no place."""
    hands = load_hands(path)
    arrays = hand_arrays(hands.params)
    cameras = np.empty((0, 3)) if hands.camera is None else hands.camera.reshape(-1, 3)
    people = [(person(arrays, i), camera) for i, camera in enumerate(cameras)]
    people = [(own, camera) for own, camera in people if (own["placement"][:, 0] > 0.5).any()]
    if not people:
        raise DetectionError(f"{path} must say where its hands are, got no camera or no hand. Take one of hd-run's.")
    requests = [Request("hands", id=f"given-{i}", hands=own) for i, (own, _) in enumerate(people)]
    made = [person(one, 0) for one in _hands(pipeline, requests)]  # with the body's shape
    return [hand for (own, camera), one in zip(people, made, strict=True) for hand in _seen(own, one, camera, size)]


def _seen(arrays: dict[str, np.ndarray], made: dict[str, np.ndarray], camera: np.ndarray, size: Size) -> list[Seen]:
    """The hands of one person of a file, in a picture's pixels. made: the bundle's joints of them."""
    shown = arrays["placement"][:, 0] > 0.5
    vectors = np.concatenate([arrays[name].reshape(-1, 3) for name in POSES]).astype(np.float64)
    turns, fingers = world(axis_angle_to_matrix(vectors)), vectors[22:].reshape(2, 15, 3)
    view = camera[0] * (made["joints"][:, :2] + camera[1:])
    places = np.stack([0.5 * (size[1] + size[0] * view[:, 0]), 0.5 * size[0] * (1 - view[:, 1])], -1)
    return [
        Seen(HandEstimate(side, turns[HAND_JOINTS[side][0]], fingers[side], places[list(HAND_JOINTS[side])]))
        for side in (0, 1)
        if shown[side]
    ]


def repair(
    pipeline: HanDiffuser,
    picture: np.ndarray,
    seen: Sequence[Seen],
    rest: np.ndarray,
    wish: Wish,
    detector: Detector | None = None,
    run: Run | None = None,
    around: Iterable[Seen] = (),
    **settings: Any,
) -> Outcome:
    """Paints hands into a picture uint8 [H, W, 3]. seen: from `choose`. run: in place of `pipeline.run`, to see each
    step. around: other hands of the picture, whose pixels stay. settings: of `settings.SETTINGS`.

    Where a person says nothing of found hands, the detector looks again at each painted one; where it sees other points
    than before, the old hand stays. Hands whose masks touch are painted one after the other, all others together.
    Raises RequestError for a setting, and EngineError when a hand cannot be painted."""
    outcome = Outcome(picture, np.zeros(picture.shape[:2], bool))
    rest_of = list(seen)
    while rest_of:
        patches = [
            plan(outcome.image, one, rest, pipeline.manifest.image_size, others=[*around, *seen])
            for one in rest_of[: pipeline.batch_size]
        ]
        _pose(pipeline, patches)
        alone = apart(patches)
        done = {id(patch.seen) for patch in alone}
        rest_of = [one for one in rest_of if id(one) not in done]
        own = {name: value for name, value in settings.items() if name != "seed"}
        requests = [patch.request(wish.caption, wish.strong, **own) for patch in alone]
        prepared, refused = pipeline.prepare(requests, seed=int(settings.get("seed") or 0))
        if refused:
            raise RequestError(refused[0].sentence)
        pictures = {}
        for made in (run or pipeline.run)(prepared):
            if isinstance(made, Failure):
                raise EngineError(f"A hand could not be painted: {made.sentence}")
            pictures[made.id] = made
        for patch, request in zip(alone, prepared, strict=True):
            laid, moved = lay(outcome.image, patch, pictures[str(request.id)].image, detector, wish.automatic)
            if laid is outcome.image:
                outcome.said.append(stays(patch, SAY))
                continue
            note: dict[str, Any] = {"side": patch.seen.side, "gesture": patch.seen.gesture, "caption": request.prompt,
                    "seed": request.seed, "strength": request.strength, "window": list(patch.bounds)}  # fmt: skip
            if moved is not None:
                note["moved"] = moved
            outcome.image = laid
            outcome.mask |= patch.covered(picture)
            outcome.painted.append(note)
            outcome.said += soft(patch)
    return outcome


def lay(
    picture: np.ndarray, patch: Patch, painted: np.ndarray, detector: Detector | None = None, automatic: bool = True
) -> tuple[np.ndarray, float | None]:
    """A picture uint8 [H, W, 3] with a painted crop in it, and how far the detector sees the hand from the old one; see
    `Patch.moved`. Without a detector, and for a hand that it did not find before, that is None.

    automatic: where that is farther than MOVED, the old hand stays: `picture` itself comes back."""
    laid = patch.paste(picture, painted)
    if detector is None or patch.seen.found is None:
        return laid, None
    moved = patch.moved(picture, laid, detector)
    return (picture if automatic and moved > MOVED else laid), moved


def stays(patch: Patch, advice: str) -> str:
    """What is said of a hand that `lay` left as it was."""
    return f"{the(patch.seen)} came out otherwise than it was, so it stays. {advice}"


def soft(patch: Patch) -> list[str]:
    """A sentence where a hand is much larger than the model paints it."""
    if patch.magnified <= SOFT:
        return []
    return [f"{the(patch.seen)} is {patch.magnified:.0f} times as large as the model paints, so it looks soft."]


def _pose(pipeline: HanDiffuser, patches: Sequence[Patch]) -> None:
    requests = [Request(patch.caption(), id=f"pose-{k}", hands=patch.arrays) for k, patch in enumerate(patches)]
    for patch, made in zip(patches, _hands(pipeline, requests), strict=True):
        patch.pose(made)


def _hands(pipeline: HanDiffuser, requests: Sequence[Request]) -> list[dict[str, np.ndarray]]:
    """What the bundle makes of given hands. Raises RequestError and EngineError."""
    prepared, refused = pipeline.prepare(requests)
    if refused:
        raise RequestError(refused[0].sentence)
    out = []
    for made in pipeline.hands(prepared):
        if isinstance(made, Failure):
            raise EngineError(f"A hand could not be posed: {made.sentence}")
        out.append(made)
    return out


def rounds_of(patches: Sequence[Patch]) -> int:
    """How often hands are painted, all those `apart` at once, until none is left."""
    left, count = list(patches), 0
    while left:
        now = apart(left)
        left = [patch for patch in left if not any(patch is one for one in now)]
        count += 1
    return count


def apart(patches: Sequence[Patch]) -> list[Patch]:
    """The first patch, and those whose windows touch none before them."""
    out: list[Patch] = []
    for patch in patches:
        left, top, right, bottom = patch.bounds
        free = all(
            right <= other.bounds[0] or left >= other.bounds[2] or bottom <= other.bounds[1] or top >= other.bounds[3]
            for other in out
        )
        if free:
            out.append(patch)
    return out
