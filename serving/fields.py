"""The bodies of requests, field by field: OpenAI's images API, common additions to it, and hands.

`/openapi.json` shows the descriptions. Types are strict: a number must not be "3". The server refuses unknown fields.
The answer's `warnings` name fields of OpenAI's that have no effect.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from ..contract import MAX_PEOPLE
from ..editing import Arrays, Drag
from ..errors import RequestError
from ..hands import CAMERA, MAX_CAMERA, SHAPES, people_in, person
from ..settings import MAX_ADAPTERS, MAX_SEED, SETTINGS, Setting, http_name

MAX_PROMPT = 4000  # characters
MAX_PREVIEWS = 16
MAX_TIMEOUT_SECONDS = 3600.0

Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT, pattern=r"\S", description="What to paint.")]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED, description="Without one it is drawn, and named in the answer.")]
Coordinate = Annotated[float, Field(ge=-MAX_CAMERA, le=MAX_CAMERA)]
Lora = Annotated[
    str, Field(min_length=1, max_length=200, description="NAME[:SCALE] of an adapter that the server has.")
]
Unit = Annotated[float, Field(ge=-1, le=2)]
Side = Literal["left", "right"]


def vector(length: int, most: float) -> Any:
    return rows(length, Annotated[float, Field(ge=-most, le=most)])


def rows(length: int, each: Any) -> Any:
    return Annotated[list[each], Field(min_length=length, max_length=length)]


def nullable(schema: dict[str, Any]) -> None:
    """Makes every optional field of an object nullable in its JSON schema."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            kind = {key: field.pop(key) for key in [*field] if key not in ("title", "description", "default")}
            field["anyOf"] = [*(kept if (kept := kind.get("anyOf")) else [kind]), {"type": "null"}]


class Nullable(BaseModel):
    """An object in which null counts as a missing field."""

    model_config = ConfigDict(allow_inf_nan=False, json_schema_extra=nullable)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given: Any) -> Any:
        """OpenAI's clients send null for every field that the caller did not set."""
        return {name: v for name, v in given.items() if v is not None} if isinstance(given, dict) else given


class Strict(Nullable):
    """An object of known fields with exact types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class HandsField(Strict):
    """SMPL-H hands: axis-angle in radians, 0 for a flat hand. joints and visibility serve display and editing."""

    global_orient: vector(3, SHAPES["global_orient"][1])  # type: ignore[valid-type]
    body_pose: vector(63, SHAPES["body_pose"][1])  # type: ignore[valid-type]
    left_hand_pose: vector(45, SHAPES["left_hand_pose"][1])  # type: ignore[valid-type]
    right_hand_pose: vector(45, SHAPES["right_hand_pose"][1])  # type: ignore[valid-type]
    betas: vector(10, SHAPES["betas"][1])  # type: ignore[valid-type]
    placement: Annotated[
        list[vector(4, MAX_CAMERA)],  # type: ignore[valid-type, misc]
        Field(min_length=2, max_length=2, description="Left, right: visibility, centre x and y, log of the size."),
    ]
    camera: (
        Annotated[list[Coordinate], Field(min_length=3, max_length=3, description="Scale, shift x and y.")] | None
    ) = None
    joints: rows(62, vector(3, MAX_CAMERA)) | None = None  # type: ignore[valid-type]
    joints_2d: rows(2, rows(21, vector(2, MAX_CAMERA))) | None = None  # type: ignore[valid-type]
    visibility: vector(2, 10.0) | None = None  # type: ignore[valid-type]

    def arrays(self) -> Arrays:
        """float32 arrays as in a Picture. Raises RequestError for an impossible camera."""
        given = self.model_dump(include={*HandsField.model_fields}, exclude_none=True)
        arrays = {name: np.array(value, np.float32) for name, value in given.items()}
        if CAMERA in arrays and not arrays[CAMERA][0] > 0:
            raise RequestError(
                "hands.camera must have a scale above 0. Correct it, or leave the camera out.", "hands.camera"
            )
        return arrays


People = Annotated[list[HandsField], Field(min_length=1, max_length=MAX_PEOPLE, description="One object a person.")]


def arrays_of(hands: HandsField | list[HandsField]) -> Arrays:
    """float32 arrays as in a Picture: a list is several people, from left to right. Raises RequestError."""
    if isinstance(hands, HandsField):
        return hands.arrays()
    people = [one.arrays() for one in hands]
    if len(people) == 1:
        return people[0]
    for one in people[1:]:
        if missing := sorted(people[0].keys() ^ one.keys()):
            raise RequestError(f"hands must have {missing[0]} for each person, or for none. Add it.", "hands")
    return {name: np.stack([one[name] for one in people]) for name in people[0]}


def _field(setting: Setting) -> Any:
    """The type of a setting's field. Without one, it is as the bundle or the table of settings says."""
    if setting.kind is bool:
        return Annotated[bool, Field(description=setting.help)]
    if setting.kind is tuple:
        share = Annotated[float, Field(ge=0, le=1)]
        return Annotated[list[share], Field(min_length=2, max_length=2, description=setting.help)]
    if setting.choices:
        return Annotated[Literal[setting.choices], Field(description=setting.help)]
    if setting.kind is str:
        return Annotated[str, Field(max_length=MAX_PROMPT, description=setting.help)]
    bounds = {"ge": setting.kind(setting.least), "le": setting.kind(setting.most)}
    return Annotated[setting.kind, Field(**bounds, description=setting.help)]


_fields: dict[str, Any] = {http_name(name): (_field(setting) | None, None) for name, setting in SETTINGS.items()}
_fields["seed"] = (Seed | None, None)
_WithSettings: Any = create_model("_WithSettings", __base__=Strict, **_fields)


class Generation(_WithSettings):  # type: ignore[misc]
    """`POST /v1/images/generations`."""

    prompt: Prompt
    n: Annotated[int, Field(ge=1, le=1024, description="Number of pictures, with the seeds seed, seed + 1, ...")] = 1
    size: Annotated[str, Field(max_length=20, description="WIDTHxHEIGHT, or auto for the bundle's own.")] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100, description="Quality of jpeg and webp.")] | None = None
    model: Annotated[str, Field(max_length=200)] | None = None
    user: Annotated[str, Field(max_length=500, description="A name for the log.")] | None = None
    safety_identifier: Annotated[str, Field(max_length=500, description="OpenAI's newer name of user.")] | None = None
    stream: bool = False
    partial_images: Annotated[
        int, Field(ge=0, le=MAX_PREVIEWS, description="With stream: the skeleton and previews.")
    ] = 0
    hands: (
        HandsField
        | People
        | Annotated[str, Field(max_length=100, description='An id from hands_id, or "none" for no hands.')]
        | None
    ) = None
    lora: Lora | Annotated[list[Lora], Field(max_length=MAX_ADAPTERS)] | None = None
    return_hands: Annotated[bool, Field(description="SMPL-H arrays and joints with each picture.")] = False
    timeout: (
        Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS, description="Seconds until the request fails.")] | None
    ) = None
    # Fields of OpenAI's without effect.
    background: Literal["auto", "opaque", "transparent"] | None = None
    quality: Annotated[str, Field(max_length=20)] | None = None
    style: Annotated[str, Field(max_length=20)] | None = None
    moderation: Annotated[str, Field(max_length=20)] | None = None
    complexity: Annotated[str, Field(max_length=20)] | None = None

    def settings(self) -> dict[str, Any]:
        """The settings that the client gave, by our names."""
        values = {name: getattr(self, http_name(name)) for name in SETTINGS}
        return {name: value for name, value in values.items() if value is not None}

    def warnings(self) -> list[str]:
        """A sentence for each field without effect."""
        said = []
        for name, why in {
            "quality": "num_inference_steps and solver decide it",
            "style": "the prompt decides it",
            "moderation": "this server does not moderate",
            "complexity": "the prompt decides it",
        }.items():
            if getattr(self, name) not in (None, "auto"):
                said.append(f"The field {name} has no effect: {why}.")
        if self.output_compression is not None and self.output_format == "png":
            said.append("The field output_compression has no effect on png, which is lossless.")
        if self.partial_images and not self.stream:
            said.append("The field partial_images has no effect without stream.")
        return said


class HandsRequest(Strict):
    """`POST /v1/hands`: the hands of a prompt without a picture, or the joints of the given hands."""

    prompt: Prompt = "hands"
    seed: Seed | None = None
    model: Annotated[str, Field(max_length=200)] | None = None
    user: Annotated[str, Field(max_length=500, description="A name for the log.")] | None = None
    hands: HandsField | People | Annotated[str, Field(max_length=100)] | None = None

    def warnings(self) -> list[str]:
        """A sentence for each field without effect."""
        idle = sorted(self.model_fields_set & {"prompt", "seed"}) if self.hands is not None else []
        return [f"The field {name} has no effect with hands." for name in idle]


class DragField(Strict):
    hand: Side
    joint: Annotated[int, Field(ge=0, le=20, description="0 is the wrist; then four for each finger, from the thumb.")]
    x: Unit
    y: Unit


class GestureField(Strict):
    hand: Side
    name: Annotated[str, Field(max_length=50)]


class Edit(Strict):
    """`POST /v1/hands/edit`: hands as /v1/hands returns them, and the changes."""

    hands: HandsField | People
    person: Annotated[int, Field(ge=0, lt=MAX_PEOPLE, description="Whose hands change; mirror changes all.")] = 0
    drags: Annotated[list[DragField], Field(max_length=42)] = []
    gesture: GestureField | None = None
    mirror: bool = False
    swap: bool = False
    flip: Annotated[bool, Field(description="The mirror image of the hands, in their place.")] = False
    over: Annotated[bool, Field(description="Turns palms to the viewer away, or back.")] = False
    turn: Annotated[float, Field(ge=-360, le=360, description="Degrees clockwise in the picture.")] = 0.0
    scale: Annotated[float, Field(ge=0.05, le=20, description="Factor of the hands' size.")] = 1.0

    def moves(self) -> list[Drag]:
        return [Drag(drag.hand, drag.joint, drag.x, drag.y) for drag in self.drags]


def as_json(hands: Arrays) -> Any:
    """Arrays as lists of numbers, exact for float32; a list of people where there are several."""
    if (count := people_in(hands)) > 1:
        return [as_json(person(hands, number)) for number in range(count)]
    return {name: _listed(np.asarray(value, np.float32)) for name, value in hands.items()}


def _listed(value: np.ndarray) -> Any:
    if value.ndim > 1:
        return [_listed(row) for row in value]
    return [float(f"{number:.9g}") for number in value.tolist()]
