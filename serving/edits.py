"""`POST /v1/images/edits` and `POST /v1/hands/detect`: requests that bring pictures, as forms.

    curl http://localhost:8000/v1/images/edits -F image=@photo.jpg -F mask=@hole.png -F prompt="an open hand"
    curl http://localhost:8000/v1/images/edits -F image=@photo.jpg -F repair=true

The first is OpenAI's: the model paints the picture again where the mask is transparent, or all of it. With `repair`,
the server paints the picture's hands alone, each by itself at the model's size; see `repairing`.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response
from PIL import Image, ImageFilter
from pydantic import ConfigDict, Field

from ..detection.hands import Seen
from ..errors import RequestError
from ..pictures import resized
from .fields import Generation, HandsField, Prompt, Side, Strict, as_json, rows, vector
from .finding import Finder
from .forms import Files, Upload, fit_fields, mask_of, read_form
from .guard import FORM, own_page
from .pictures import Painting, paint
from .problems import RESPONSES, check_model
from .repairing import Repair
from .service import Service

EDITS, DETECT = "/v1/images/edits", "/v1/hands/detect"
UPLOADS = {EDITS: FORM, DETECT: FORM}
FEW, MANY = 1, 16  # images of a request


class Placed(HandsField):
    """One hand of a picture. old: where the picture has it, if elsewhere: 21 points in [0, 1] of width and height."""

    old: rows(21, vector(2, 10.0)) | None = None  # type: ignore[valid-type]
    gesture: Annotated[str, Field(max_length=50)] | None = None


Wanted = (
    Annotated[list[Placed], Field(min_length=1, max_length=16)]
    | Placed
    | Annotated[str, Field(max_length=100, description="As in /v1/images/generations; with repair, the new hands.")]
)


class EditForm(Generation):  # type: ignore[misc]
    """The text of the form. As in every form, numbers are text; objects and lists are JSON."""

    model_config = ConfigDict(extra="forbid", strict=False)

    prompt: Prompt | None = None  # type: ignore[assignment]
    hands: Wanted | None = None  # type: ignore[assignment]
    repair: Annotated[bool, Field(description="Paints the picture's hands again, and nothing else.")] = False
    input_fidelity: Annotated[str, Field(max_length=20)] | None = None

    def warnings(self) -> list[str]:
        said: list[str] = super().warnings()
        if self.input_fidelity is not None:
            said.append("The field input_fidelity has no effect: strength decides it.")
        return said


class DetectForm(Strict):
    """The text of the form of `/v1/hands/detect`."""

    model_config = ConfigDict(extra="forbid", strict=False)

    box: (
        Annotated[
            rows(4, Annotated[float, Field(ge=-1, le=2)]),  # type: ignore[valid-type]
            Field(
                description="Left, top, right, bottom in [0, 1]: looks there alone, and places a hand if it finds none."
            ),
        ]
        | None
    ) = None
    side: Side = "right"
    gesture: Annotated[str, Field(max_length=50)] = "open_hand"
    model: Annotated[str, Field(max_length=200)] | None = None


class Editing(Painting):
    """A request that begins with pictures. With a mask and no size, the answer is the picture in its own size, the same
    outside the mask."""

    kind = "image_edit"

    def __init__(self, service: Service, body: EditForm, http: Http, images: list[Upload], mask: np.ndarray | None):
        super().__init__(service, body, http)
        if body.prompt is None:
            raise RequestError("prompt must be given. Say what the picture shows.", "prompt")
        if isinstance(body.hands, list) and service.bundle.manifest.num_people == 1:
            raise RequestError("hands must be one object without repair, got a list.", "hands")
        if body.n * len(images) > service.most:
            raise RequestError(
                f"n must be at most {service.most // len(images)} with {len(images)} images, got {body.n}. Send more "
                "requests.",
                "n",
            )
        if body.stream and len(images) > 1:
            raise RequestError(f"image must be one with stream, got {len(images)}. Send a request for each.", "image")
        self.kept = images[0] if mask is not None and body.size in (None, "auto") else None
        self.mask = mask
        if len(images) == 1:
            original = images[0].original.in_colours()
            self.original = original if self.kept is not None else original.profile_alone()
        height, width = self.painted
        self.brought = [{"image": resized(one.pixels, (height, width))} for one in images]
        if mask is not None:
            self.brought[0]["mask"] = resized(mask, (height, width), box=True)
        if self.kept is not None:
            h, w = self.kept.size
            self.about["size"] = f"{w}x{h}"
            if h > 2 * height or w > 2 * width:
                self.warnings.append(
                    f"The engine paints {service.size}, and the image is {w}x{h}: what is painted looks soft. Cut the "
                    "part out first."
                )
        elif any(one.size[0] * width != one.size[1] * height for one in images):
            self.warnings.append(
                f"The image has another shape than {width}x{height}, and was stretched. Cut it first to keep its "
                "proportions."
            )

    def shown(self, image: np.ndarray) -> np.ndarray:
        return super().shown(image) if self.kept is None else laid(self.kept.pixels, image, self.mask)


def laid(picture: np.ndarray, painted: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The painted picture, scaled, where the mask uint8 [H, W] is white; it fades in over a painted pixel. The same
    bytes elsewhere."""
    assert mask is not None
    size = picture.shape[0], picture.shape[1]
    fade = max(size[0] / painted.shape[0], size[1] / painted.shape[1]) / 2
    blurred = np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(fade)), np.float32) / 255
    alpha = (mask / np.float32(255) * (2 * blurred - 1).clip(0, 1))[..., None]
    out = resized(painted, size) * alpha + picture * (1 - alpha)
    result: np.ndarray = np.where(mask[..., None] > 0, (out + 0.5).astype(np.uint8), picture)
    return result


def make_router(service: Service) -> APIRouter:
    """The routes of pictures that come in."""
    router = APIRouter()
    finder = Finder(service.engines)

    async def given(http: Http, names: tuple[str, ...]) -> tuple[Files, dict[str, str]]:
        """The form of a request. Raises RequestError."""
        own_page(http, service.front.cors)
        files, fields = await read_form(http, names)
        if "image" not in files:
            raise RequestError("image must be given, as a file of the form.", "image")
        return files, fields

    @router.post(EDITS, responses=RESPONSES, openapi_extra=form_of(EditForm, "image", "mask"))
    async def edits(http: Http) -> Response:
        """Paints pictures again, or the part of one that a mask names, as OpenAI's images API does; or their hands."""
        with service.bringing():
            files, fields = await given(http, ("image", "mask"))
            body = fit_fields(EditForm, fields, ("hands", "guidance_interval", "lora"))
            check_model(service, body.model)
            images, mask = await asyncio.to_thread(read_pictures, files, service.limits.pixels, not body.repair)
            files.clear()  # the pictures are read
            if body.repair:
                return await Repair(service, finder, body, http, images, mask).answer()
            return await paint(Editing(service, body, http, images, mask), http)

    @router.post(DETECT, responses=RESPONSES, openapi_extra=form_of(DetectForm, "image"))
    async def detect(http: Http) -> Response:
        """The hands of a picture: where they are, which gesture they show, and how sure that is."""
        with service.bringing():
            files, fields = await given(http, ("image",))
            body = fit_fields(DetectForm, fields, ("box",))
            check_model(service, body.model)
            (image,), _ = await asyncio.to_thread(read_pictures, files, service.limits.pixels, False)
            files.clear()
            if body.box is None:
                seen = await finder(image.pixels)
            else:
                box = np.array(body.box) * (*image.size[::-1], *image.size[::-1])
                if (box[2:] - box[:2] < 8).any():
                    raise RequestError("box must be at least 8 pixels wide and high. Draw a larger one.", "box")
                seen = [await finder.run(finder.within, image.pixels, box, body.side, body.gesture)]
            found = await finder.run(lambda: [described(finder, one, image.size) for one in seen])
            height, width = image.size
            return JSONResponse({"size": f"{width}x{height}", "data": found})

    return router


def read_pictures(files: Files, most: int, holes: bool) -> tuple[list[Upload], np.ndarray | None]:
    """The images of a form, and the mask of the first. holes: whether an image without a mask is painted where it is
    transparent. Raises RequestError. Runs in a thread."""
    contents, masks = files["image"], files.get("mask", [])
    limit = MANY if holes else FEW
    if len(contents) > limit:
        raise RequestError(f"image must be at most {limit} files, got {len(contents)}. Send several requests.", "image")
    if len(masks) > 1 or (masks and len(contents) > 1):
        raise RequestError("mask must be one file, with one image. Send a request for each.", "mask")
    images = [Upload.read("image", content, most) for content in contents]
    if masks:
        mask = mask_of(masks[0], images[0].size, most)
        if not mask.any():
            raise RequestError("mask must be transparent or white where to paint, got a mask that keeps all.", "mask")
        return images, mask
    return images, images[0].hole if holes and len(images) == 1 else None


def described(finder: Finder, seen: Seen, size: tuple[int, int]) -> dict[str, Any]:
    """A hand as `/v1/hands/detect` gives it: points in [0, 1] where the picture has it, and its arrays."""
    points = seen.hand.joints_2d / (size[1], size[0]) if seen.found is None else seen.found.joints
    return {
        "side": seen.side,
        "gesture": seen.gesture or None,
        "sureness": None if seen.sureness is None else round(seen.sureness, 4),
        "score": None if seen.found is None else round(seen.found.score, 4),
        "points": points.round(6).tolist(),
        "hands": as_json(finder.shown(seen, size)),
    }


def form_of(kind: Any, *files: str) -> dict[str, Any]:
    """What `/openapi.json` says of a form: its files beside its text."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    for name in files:
        one: dict[str, Any] = {"type": "string", "format": "binary"}
        schema["properties"][name] = {"type": "array", "items": one} if name == "image" and len(files) > 1 else one
    schema["required"] = sorted({*schema.get("required", []), "image"})
    parts = schema.pop("$defs", {})
    return {"requestBody": {"required": True, "content": {FORM: {"schema": inlined(schema, parts)}}}}


def inlined(value: Any, parts: dict[str, Any]) -> Any:
    """A schema without references: those of a form are not among the components."""
    if isinstance(value, dict):
        if "$ref" in value:
            return inlined(parts[value["$ref"].rpartition("/")[2]], parts)
        return {name: inlined(one, parts) for name, one in value.items()}
    return [inlined(one, parts) for one in value] if isinstance(value, list) else value
