"""What comes out of a run, and what is known of a request on its way there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .requests import Request

# Called as a loop goes on: "warm-up" with the number of engines that became ready, "hands" with the number of requests
# whose hands are, "steps" with the number of requests that made one step of stage 2.
OnEvent = Callable[[str, int], None]


@dataclass
class Picture:
    """A finished request.

    hands: `params` [330]; SMPL-H arrays `global_orient` [3], `body_pose` [63], `left_hand_pose` [45],
    `right_hand_pose` [45] (axis-angle, radians), `betas` [10], `placement` [2, 4]; `joints` [62, 3] and `vertices`
    [V, 3] in metres, `joints_2d` [2, 21, 2] in [0, 1] of the image, `visibility` [2], `camera` [3].
    """

    id: str
    request: Request
    image: np.ndarray = field(repr=False)  # uint8 [H, W, 3]
    hands: dict[str, np.ndarray] = field(repr=False)
    seconds: float  # from the start of its stage 1 to its picture, shared with the rest of its batch
    warnings: list[str] = field(default_factory=list)
    made_by: dict[str, str] = field(default_factory=dict)  # versions, device, digest of the bundle
    hand_draws: int = 0  # how often stage 1 drew the hands; 0 where they were given


@dataclass
class Failure:
    """A request that came to nothing while it ran; others are not affected."""

    id: str
    request: Request
    sentence: str


@dataclass
class Peek:
    """Where a request in flight is, between two steps. `step` of `steps` of the picture are done.

    hands: as in `Picture`. latents: the state as it is now, float32 [4, h, w], good for keeping; None before the first
    step.
    """

    step: int
    steps: int
    hands: dict[str, np.ndarray] = field(repr=False)
    latents: np.ndarray | None = field(repr=False)


@dataclass
class Work:
    """A request on its way through the stages."""

    request: Request
    started: float
    ids: np.ndarray  # int64 [2, length]: negative prompt, prompt
    warnings: list[str]
    x: np.ndarray | None = None  # hand parameters [P], normalised
    params: np.ndarray = field(default_factory=lambda: np.empty(0))  # the same, not normalised
    features: dict[str, np.ndarray] = field(default_factory=dict)  # a row of every output of hand_features
    inputs: dict[str, np.ndarray] = field(default_factory=dict)  # a row of every output of unet_context
    draws: int = 0  # how often stage 1 drew its hands so far


def cancelled(request: Request) -> Failure:
    return Failure(str(request.id), request, "It was cancelled.")


def not_finite(request: Request, where: str) -> Failure:
    return Failure(
        str(request.id),
        request,
        f"{where} gave NaN or infinity, so there is no picture. Try another seed or lower guidance; if it stays, "
        "the bundle's precision does not hold: export it in fp32.",
    )
