"""The results of a run, and the state of a request on its way."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..engines.adapted import Chosen
from ..errors import HanDiffuserError, OutputError, RequestError
from ..files import written
from ..tokens import Reading
from .canvas import Canvas
from .requests import Request

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

# A loop calls it: "warm-up" with the number of engines that became ready, "hands" with the number of requests whose
# hands are made, "steps" with the number of requests that made one step of stage 2.
OnEvent = Callable[[str, int], None]


@dataclass
class Picture:
    """A finished request.

    hands: `params` [330]; SMPL-H arrays `global_orient` [3], `body_pose` [63], `left_hand_pose` [45],
    `right_hand_pose` [45] (axis-angle, radians), `betas` [10], `placement` [2, 4]; `joints` [62, 3] and `vertices`
    [V, 3] in metres, `joints_2d` [2, 21, 2] in [0, 1] of the image, `visibility` [2], `camera` [3]. From a bundle of
    several people each has an axis of people in front: from left to right, and absent ones without a visible hand.
    """

    id: str
    request: Request
    image: np.ndarray = field(repr=False)  # uint8 [H, W, 3]
    hands: dict[str, np.ndarray] = field(repr=False)
    seconds: float  # from the start of its stage 1 to its picture, shared with the rest of its batch
    warnings: list[str] = field(default_factory=list)
    made_by: dict[str, str] = field(default_factory=dict)  # versions, device, digest of the bundle
    hand_draws: int = 0  # how often stage 1 drew the hands; 0 where they were given
    adapters: tuple[Chosen, ...] = ()  # that its weights had; their files may have changed meanwhile

    @property
    def pil(self) -> Image.Image:
        """The picture as an image of Pillow's."""
        return Image.fromarray(self.image)

    def save(self, path: str | Path) -> Path:
        """Writes the picture as .png, with its settings as text, or as .jpg or .webp without them; returns the path.

        Raises OutputError for another suffix, or where the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() not in FORMATS:
            raise OutputError(f"path must end in {', '.join(FORMATS)}, got {path}. Choose one of these formats.")
        try:
            with written(path) as temporary:
                if path.suffix.lower() == ".png":
                    temporary.write_bytes(png(self.image, self))
                else:
                    self.pil.save(temporary, FORMATS[path.suffix.lower()], quality=95)
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written: {error.strerror or error}. Make its folder, or name another path."
            ) from error
        return path

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return png(self.image, self)


def png(image: np.ndarray, picture: Picture) -> bytes:
    """PNG with the settings as text, so that a picture alone still says how it was made. image: uint8 [H, W, 3]."""
    info = PngInfo()
    settings = {**picture.request.said(picture.adapters), "hand_draws": picture.hand_draws, **picture.made_by}
    for name, value in settings.items():
        if value is not None:
            info.add_itxt(name, str(value).replace("\0", " "))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@dataclass
class Failure:
    """A request that failed while it ran; the others go on. refused: because of what it asks for."""

    id: str
    request: Request
    sentence: str
    refused: bool = False


@dataclass
class Peek:
    """A copy of where a request is, between two steps: it has done `step` of the `steps` of its picture.

    hands: as in `Picture`. latents: its state, float32 [C, h, w]; None before the first step.
    """

    step: int
    steps: int
    hands: dict[str, np.ndarray] = field(repr=False)
    latents: np.ndarray | None = field(repr=False)


@dataclass
class Work:
    """A request on its way through the two stages."""

    request: Request
    started: float
    readings: tuple[Reading, Reading]  # of the negative prompt and the prompt
    warnings: list[str]
    x: np.ndarray | None = None  # hand parameters [P], normalised
    params: np.ndarray = field(default_factory=lambda: np.empty(0))  # the same, not normalised
    features: dict[str, np.ndarray] = field(default_factory=dict)  # a row of every output of hand_features
    inputs: dict[str, np.ndarray] = field(default_factory=dict)  # a row of every output of unet_context
    adapters: tuple[Chosen, ...] = ()
    told: bool = False  # whether its inputs have what unet_context says
    draws: int = 0  # how often stage 1 has drawn its hands
    canvas: Canvas | None = None  # the picture that it brings
    known: np.ndarray = field(default_factory=lambda: np.empty(0))  # its latents [C, h, w]

    @property
    def ids(self) -> np.ndarray:
        """int64 [2, length]: the first chunks of the negative prompt and the prompt."""
        return np.stack([reading.ids[0] for reading in self.readings])


def failed(request: Request, error: HanDiffuserError) -> Failure:
    return Failure(str(request.id), request, str(error), isinstance(error, RequestError))


def cancelled(request: Request) -> Failure:
    return Failure(str(request.id), request, "It was cancelled.")


def not_finite(request: Request, where: str) -> Failure:
    return Failure(
        str(request.id),
        request,
        f"{where} gave NaN or infinity, so the picture is missing. Try another seed or lower guidance. If that does "
        "not help, the bundle's precision is too low: export it in fp32.",
    )
