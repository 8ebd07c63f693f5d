"""The hands of one picture: found or given, shaped as a person says, painted in few batches, pasted.

hands = wanted(found, gesture="open_hand")            # with reasons for those that stay as they are
for done in repaired(pipeline, picture, hands, rest, settings): ...
"""

from __future__ import annotations

import tempfile
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
from ..hands import POSES, hand_arrays, load_hands
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
    it. Raises RequestError for a file that cannot be read, and DetectionError where it names no place."""
    hands = load_hands(path)
    arrays = hand_arrays(hands.params)
    shown = arrays["placement"][:, 0] > 0.5
    if hands.camera is None or not shown.any():
        raise DetectionError(f"{path} must say where its hands are, got no camera or no hand. Take one of hd-run's.")
    made = _hands(pipeline, [Request("hands", id="given", hands=str(path))])[0]  # with the body's shape
    vectors = np.concatenate([arrays[name].reshape(-1, 3) for name in POSES]).astype(np.float64)
    turns, fingers = world(axis_angle_to_matrix(vectors)), vectors[22:].reshape(2, 15, 3)
    view = hands.camera[0] * (made["joints"][:, :2] + hands.camera[1:])
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
        with tempfile.TemporaryDirectory(prefix="hd-repair-") as folder:
            _pose(pipeline, patches, Path(folder))
            alone = apart(patches)
            done = {id(patch.seen) for patch in alone}
            rest_of = [one for one in rest_of if id(one) not in done]
            requests = [_request(patch, Path(folder) / f"{k}.npz", wish, settings) for k, patch in enumerate(alone)]
            prepared, refused = pipeline.prepare(requests, seed=int(settings.get("seed") or 0))
            if refused:
                raise RequestError(refused[0].sentence)
            pictures = {}
            for made in (run or pipeline.run)(prepared):
                if isinstance(made, Failure):
                    raise EngineError(f"A hand could not be painted: {made.sentence}")
                pictures[made.id] = made
        for patch, request in zip(alone, prepared, strict=True):
            made = pictures[str(request.id)]
            repaired = patch.paste(outcome.image, made.image)
            note: dict[str, Any] = {"side": patch.seen.side, "gesture": patch.seen.gesture, "caption": request.prompt,
                    "seed": request.seed, "strength": request.strength, "window": list(patch.bounds)}  # fmt: skip
            if patch.seen.found is not None and detector is not None:
                note["moved"] = moved = patch.moved(outcome.image, repaired, detector)
                if wish.automatic and moved > MOVED:
                    outcome.said.append(f"{the(patch.seen)} came out otherwise than it was, so it stays. {SAY}")
                    continue
            outcome.image = repaired
            outcome.mask |= patch.covered(picture)
            outcome.painted.append(note)
            if patch.magnified > SOFT:
                outcome.said.append(
                    f"{the(patch.seen)} is {patch.magnified:.0f} times as large as the model paints, so it looks soft."
                )
    return outcome


def _pose(pipeline: HanDiffuser, patches: Sequence[Patch], folder: Path) -> None:
    requests = []
    for k, patch in enumerate(patches):
        patch.save(folder / f"pose-{k}.npz")
        requests.append(Request(patch.caption(), id=f"pose-{k}", hands=str(folder / f"pose-{k}.npz")))
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


def _request(patch: Patch, hands: Path, wish: Wish, settings: dict[str, Any]) -> Request:
    own = {name: value for name, value in settings.items() if name != "seed"}
    return patch.request(hands, wish.caption, wish.strong, **own)
