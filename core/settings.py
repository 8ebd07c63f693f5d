"""The settings of a request: one table, from which every front end follows.

    SETTINGS["steps"].constraint        # "a whole number from 1 to 1000"
    fit({"steps": 0}, checked())        # MisfitError: "steps must be a whole number from 1 to 1000, got 0."

The options of `hd-run`, the keys of a .jsonl line, the fields of HTTP, Triton's inputs, `Request`, the manifest's
defaults and the table in docs/run.md are made from SETTINGS. To add a setting, add it to SETTINGS, Settings and
RequestFields here, and use `request.<name>` where it acts. Tests hold all of them to the same set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import msgspec
from msgspec import Meta

from .schema import one_of, whole

MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_SEED = 2**63 - 1
MAX_REDRAWS = 4
MAX_TEXT = 100_000  # characters
MAX_SIDE = 4096  # pixels of a picture's side
# `schedules.SOLVERS` has a function for each.
SOLVERS = ("ddim", "ddpm", "euler", "dpm++2m", "dpm++2m-karras", "plms", "lcm", "ddim-early")


@dataclass(frozen=True)
class Setting:
    """One setting of a request.

    kind: bool, int, float, str, or tuple for a part of the steps, (start, stop) with 0 <= start < stop <= 1.
    alias: diffusers' name. hd-run accepts it, too; over HTTP it is the field's name.
    bundle: whether a request without it takes it from the bundle's defaults. default: the value where there is no
    other; where both are there, bundles may leave it out.
    """

    kind: type
    help: str  # one line
    least: float = 0
    most: float = 0
    choices: tuple[str, ...] = ()
    pattern: str = ""  # of a text, with `must`, what it says in words
    must: str = ""
    unit: str = ""
    alias: str = ""
    bundle: bool = False
    default: Any = None
    origin: str = ""  # says where the default comes from, where that is neither the bundle nor `default`

    @property
    def constraint(self) -> str:
        """What a value must be: "a number from 0 to 100"."""
        if self.kind is bool:
            return "true or false"
        if self.kind is tuple:
            return "two numbers that rise, from 0 to 1, such as [0, 0.5]"
        if self.pattern:
            return self.must
        if self.kind is str:
            return f"one of {', '.join(self.choices)}" if self.choices else f"text of at most {MAX_TEXT:,} characters"
        return f"a {'whole ' * (self.kind is int)}number from {int(self.least)} to {int(self.most)}"

    @property
    def annotation(self) -> Any:
        """The type and bounds of a value, for `schema.fit`."""
        if self.kind is bool:
            return Annotated[bool, Meta(description=self.constraint)]
        if self.kind is tuple:
            return Annotated[tuple[float, float], Meta(description=self.constraint)]
        if self.kind is int:
            return Annotated[int, whole(int(self.least), int(self.most))]
        if self.kind is float:
            return Annotated[float, Meta(ge=self.least, le=self.most, description=self.constraint)]
        if self.choices:
            return Annotated[str, one_of(*self.choices)]
        if self.pattern:
            return Annotated[str, Meta(pattern=self.pattern, description=self.constraint)]
        return Annotated[str, Meta(max_length=MAX_TEXT, description=self.constraint)]

    @property
    def default_said(self) -> str:
        """Where a value comes from that a request does not give: "the bundle's", "0 1"."""
        if self.origin or self.bundle:
            return self.origin or "the bundle's"
        if self.kind is bool:
            return str(self.default).lower()
        if isinstance(self.default, tuple):
            return " ".join(f"{value:g}" for value in self.default)
        return str(self.default or "none")


def _steps(help: str, alias: str = "") -> Setting:
    return Setting(int, help, 1, MAX_STEPS, unit="steps", alias=alias, bundle=True)


def _guidance(help: str, alias: str = "") -> Setting:
    return Setting(float, help, 0, MAX_GUIDANCE, alias=alias, bundle=True)


SETTINGS: dict[str, Setting] = {
    "seed": Setting(
        int,
        "The noise that a picture starts from.",
        0,
        MAX_SEED,
        origin="0, and the next one for a repeated prompt",
    ),
    "size": Setting(
        str,
        "Width and height of the picture in pixels.",
        pattern=r"^[1-9]\d{1,4}x[1-9]\d{1,4}\Z",
        must=f"WIDTHxHEIGHT with sides from 10 to {MAX_SIDE} pixels, such as 512x768",
        origin="the bundle's",
    ),
    "steps": _steps("Steps of the picture.", "num_inference_steps"),
    "solver": Setting(str, "Solver of the picture.", choices=SOLVERS, bundle=True),
    "guidance": _guidance("How strictly the picture follows the prompt; 1 is off.", "guidance_scale"),
    "guidance_interval": Setting(
        tuple,
        "The part of the steps that is guided, such as 0 0.5, which is faster.",
        default=(0.0, 1.0),
    ),
    "negative_prompt": Setting(str, "What the picture must not show.", default=""),
    "plain_prompts": Setting(
        bool,
        "Read brackets and BREAK in prompts as text, and cut long prompts.",
        default=False,
    ),
    "noise_offset": Setting(
        float,
        "How much colours vary that the prompt leaves open.",
        0,
        1,
        bundle=True,
        default=0.0,
    ),
    "strength": Setting(
        float,
        "With an image: how much of it is painted again, as a part of the steps.",
        0,
        1,
        origin="0.8, with a mask 1",
    ),
    "hand_steps": _steps("Steps of the hands."),
    "hand_solver": Setting(str, "Solver of the hands.", choices=SOLVERS, bundle=True),
    "hand_guidance": _guidance("How strictly the hands follow the prompt; 1 is off."),
    "hand_redraws": Setting(
        int,
        "How often hands are drawn again that lie over each other or leave the picture.",
        0,
        MAX_REDRAWS,
        unit="draws",
        bundle=True,
        default=0,
    ),
}
# How many pictures a prompt gets is a setting of a run: each of them is a request.
IMAGES_PER_PROMPT = Setting(
    int,
    "Pictures of each prompt, with the seeds seed, seed + 1, ...",
    1,
    10_000,
    unit="pictures",
    alias="num_images_per_prompt",
    default=1,
)


class Settings(TypedDict, total=False):
    """What `generate` takes beside prompts, for editors and type checkers. None: as if it were left out."""

    id: str | None
    seed: int | None
    size: str | None
    steps: int | None
    solver: str | None
    guidance: float | None
    guidance_interval: tuple[float, float]
    negative_prompt: str
    plain_prompts: bool
    noise_offset: float | None
    strength: float | None
    hand_steps: int | None
    hand_solver: str | None
    hand_guidance: float | None
    hand_redraws: int | None
    hands: Any
    image: Any
    mask: Any
    lora: str | Path | Sequence[str | Path] | None


@dataclass(frozen=True)
class RequestFields:
    """The fields of a `Request`. None: as SETTINGS says."""

    prompt: str
    id: str | None = None
    seed: int | None = None
    steps: int | None = None
    solver: str | None = None
    guidance: float | None = None
    negative_prompt: str = ""
    hand_steps: int | None = None
    hand_solver: str | None = None
    hand_guidance: float | None = None
    hands: Any = field(default=None, repr=False)  # the name of a file (str), or the content of one (bytes)
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    noise_offset: float | None = None
    hand_redraws: int | None = None
    image: Any = field(default=None, repr=False)  # the name of a file (str), or the content of one (bytes)
    mask: Any = field(default=None, repr=False)  # the same
    strength: float | None = None
    size: str | None = None
    plain_prompts: bool = False
    lora: Any = None  # FILE[:SCALE] of each adapter; a tuple once it is checked


_TEXT = Setting(str, "").annotation
_PICTURE = Meta(pattern=r"^[^\0]{1,4096}\Z", description="the name of a picture's file, its content, or an array")
# Fields that say of what a picture is made: each front end has its own way to say them.
GIVEN = {
    "id": Meta(
        pattern=r"^(?!\.)[A-Za-z0-9._-]{1,100}\Z",
        description="up to 100 letters, digits, dots, dashes and underscores, no path, no dot at the start: it names "
        "files",
    ),
    "hands": Meta(pattern=r"^[^\0]{1,4096}\Z", description="the name of a .hands.npz file, or its arrays"),
    "image": _PICTURE,
    "mask": _PICTURE,
}
MAX_ADAPTERS = 16
LORA = Annotated[
    tuple[Annotated[str, Meta(pattern=r"^[^\0]{1,4096}\Z")], ...],
    Meta(min_length=1, max_length=MAX_ADAPTERS, description=f"FILE[:SCALE], or a list of 1 to {MAX_ADAPTERS} of them"),
]


@cache
def checked() -> type[msgspec.Struct]:
    """What a request may be, for `schema.fit`: a struct with the fields of RequestFields."""
    kinds: dict[str, Any] = {"prompt": _TEXT, **{name: Annotated[str, meta] | None for name, meta in GIVEN.items()}}
    kinds["lora"] = LORA | None
    for name, setting in SETTINGS.items():
        optional = setting.bundle or setting.default is None
        kinds[name] = setting.annotation | None if optional else setting.annotation
    return msgspec.defstruct("Request", list(kinds.items()))


def with_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A bundle's defaults, with those that it leaves out."""
    own = {
        name: setting.default for name, setting in SETTINGS.items() if setting.bundle and setting.default is not None
    }
    return {**own, **defaults}


def http_name(name: str) -> str:
    """The field of a setting over HTTP: OpenAI's servers and diffusers agree on it where there is an alias."""
    return (SETTINGS[name].alias or name) if name in SETTINGS else name


def option(name: str, setting: Setting) -> tuple[str, ...]:
    """The names of a setting's option, first ours, then the alias."""
    return tuple(f"--{word.replace('_', '-')}" for word in (name, setting.alias) if word)


def table() -> str:
    """The settings as a table in Markdown, for docs/run.md."""
    lines = ["| setting | values | default | what it does |", "|---|---|---|---|"]
    for name, setting in SETTINGS.items():
        names = f"`{name}`" + f" (`{setting.alias}`)" * bool(setting.alias)
        values = setting.constraint.replace(str(MAX_SEED), "2^63 - 1")
        if setting.unit:
            values = values.replace("number", f"number of {setting.unit}", 1)
        lines.append(f"| {names} | {values} | {setting.default_said} | {setting.help} |")
    return "\n".join(lines) + "\n"


if TYPE_CHECKING:
    Defaults = dict[str, Any]
else:
    # A newer bundle may name a solver that this version lacks: requests that name another one can run.
    _solver = Annotated[str, Meta(max_length=30)]
    _kinds = {name: _solver if one.choices else one.annotation for name, one in SETTINGS.items() if one.bundle}
    _needed = {name: kind for name, kind in _kinds.items() if SETTINGS[name].default is None}
    _left_out = {name: kind for name, kind in _kinds.items() if name not in _needed}

    class Defaults(TypedDict("Needed", _needed), TypedDict("LeftOut", _left_out, total=False)):
        """The manifest's `defaults`: the settings that a bundle gives to requests that leave them out."""
