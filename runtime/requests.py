"""Requests: what one picture is asked to be, and how lists of them are read and checked.

    file = RequestFile("prompts.jsonl", steps=8)
    resolver = Resolver(manifest.defaults)
    for number, request in file:                # parsed as they are asked for; a RequestError for a bad line
        filled = list(resolver.each(request))

A `.txt` file holds a prompt a line. A `.jsonl` (or `.ndjson`) file holds an object a line with the key `prompt` and,
where a line differs from the rest, `seed`, `steps`, `solver`, `guidance`, `guidance_interval`, `negative_prompt`,
`hand_steps`, `hand_solver`, `hand_guidance`, `hand_redraws`, `noise_offset`, `id`, `hands` (a `.hands.npz`, relative to
the file). A line that cannot be run is refused with a sentence, and the rest goes on. What a line may say is what the
annotations of `Request` say.

Seeds: without one a request takes `--seed`, which is 0 unless given, so that the same command makes the same pictures.
A prompt that is repeated takes the next seed each time: three equal lines are three different pictures.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import msgspec
import numpy as np
from msgspec import Meta

from ..contract import MAX_REDRAWS
from ..errors import RequestError
from ..hands import MAX_HANDS, NO_HANDS
from ..schedules import SOLVERS, Table
from ..schema import MisfitError, fit, one_of, parse_json, read_file, whole
from .noise import LATENTS, RequestNoise, drawn_again

MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 100.0
MAX_FILE, MAX_LINE = 1 << 28, 1 << 20  # bytes of a prompts file, and of a line of it
# How a file says that it is not UTF-8 (UTF-32 first: its mark begins as that of UTF-16).
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
JSON_LINES = (".jsonl", ".ndjson")
# Files that hold no prompt a line, and how to make one that does.
_CONVERT = (
    """Convert it to .jsonl: jq -c '.[] | if type == "object" then . else {{prompt: .}} end' {} > prompts.jsonl"""
)
_TABLE = "Save its column of prompts as .txt, a prompt a line."
_UNPACK = "Unpack it first."
_OTHERS = {
    ".json": _CONVERT,
    **dict.fromkeys((".csv", ".tsv", ".xls", ".xlsx", ".ods", ".parquet"), _TABLE),
    **dict.fromkeys((".yaml", ".yml", ".toml", ".xml", ".html"), "Save its prompts as .txt, a prompt a line."),
    **dict.fromkeys((".gz", ".zip", ".bz2", ".xz", ".zst", ".tar"), _UNPACK),
}
# Names that Windows keeps for devices, whatever follows the first dot.
_DEVICES = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)}

Text = Annotated[str, Meta(max_length=100_000, description="text of at most 100,000 characters")]
Steps = Annotated[int, whole(1, MAX_STEPS)]
Seed = Annotated[int, whole(0, MAX_SEED)]
Guidance = Annotated[float, Meta(ge=0, le=MAX_GUIDANCE, description=f"a number from 0 to {MAX_GUIDANCE:g}")]
Redraws = Annotated[int, whole(0, MAX_REDRAWS)]
Offset = Annotated[float, Meta(ge=0, le=1, description="a number from 0 to 1")]
Solver = Annotated[str, one_of(*SOLVERS)]
Id = Annotated[
    str,
    Meta(
        pattern=r"^(?!\.)[A-Za-z0-9._-]{1,100}\Z",
        description="up to 100 letters, digits, dots, dashes and underscores, no path, no dot at the start: it "
        "names files",
    ),
]
Hands = Annotated[str, Meta(pattern=r"^[^\0]{1,4096}\Z", description="the name of a .hands.npz file")]
Interval = Annotated[tuple[float, float], Meta(description="two numbers that rise, from 0 to 1, such as [0, 0.5]")]


@dataclass(frozen=True)
class Request:
    """One picture. None means "as the bundle's defaults have it"; `resolve` fills it in.

    seed: 0 to 2**63 - 1. steps, hand_steps: 1 to 1000. guidance, hand_guidance: 0 to 100, where 1 is none.
    guidance_interval: the part of the steps that is guided, 0 <= start < stop <= 1; see `rows`.
    noise_offset: 0 to 1: how much the picture's colours vary where the prompt leaves them open; see `noise.initial`.
    hand_redraws: 0 to 4: how often stage 1 draws two hands again that do not fit into one picture; see `clash`.
    id: letters, digits, dots, dashes and underscores; the files of the picture are named after it.
    hands: a `.hands.npz` whose hands are taken instead of stage 1's; "none" for a picture without hands.
    """

    prompt: Text
    id: Id | None = None
    seed: Seed | None = None
    steps: Steps | None = None
    solver: Solver | None = None
    guidance: Guidance | None = None
    negative_prompt: Text = ""
    hand_steps: Steps | None = None
    hand_solver: Solver | None = None
    hand_guidance: Guidance | None = None
    hands: Hands | None = None
    guidance_interval: Interval = (0.0, 1.0)
    noise_offset: Offset | None = None
    hand_redraws: Redraws | None = None

    def __post_init__(self) -> None:
        """Raises RequestError for anything that cannot be run."""
        given = {name: value.item() if isinstance(value, np.generic) else value for name, value in vars(self).items()}
        try:
            checked = fit(given, _fields())
        except MisfitError as error:
            raise RequestError(str(error), error.entry) from None
        for name in given:
            object.__setattr__(self, name, getattr(checked, name))  # 3 and 3.0 are the same picture
        if not self.prompt.strip():
            raise RequestError("The prompt is empty. Say what the picture shows.", "prompt")
        for name in ("prompt", "negative_prompt", "hands"):
            try:
                (getattr(self, name) or "").encode("utf-8")
            except UnicodeEncodeError:
                raise RequestError(f"The {name} holds broken Unicode. Save it as UTF-8.", name) from None
        start, stop = self.guidance_interval
        if not 0 <= start < stop <= 1:
            raise RequestError(
                f"The guidance_interval is {start:g} to {stop:g}; it must rise, from 0 to 1.", "guidance_interval"
            )
        if self.id is not None and (self.id.split(".")[0].lower() in _DEVICES or self.id.lower().endswith(".hands")):
            raise RequestError(f"The id {self.id!r} is reserved for other files. Choose another one.", "id")

    def noise(self, stream: str, table: Table, draw: int = 0) -> RequestNoise:
        """What a stage (HANDS or LATENTS) starts from, and what its steps add; of a request without gaps.

        draw: how often hands were drawn before. Each time they are drawn from another stream of the same seed.
        """
        offset = (self.noise_offset or 0.0) if stream == LATENTS else 0.0
        return RequestNoise(
            self.seed or 0, drawn_again(stream, draw), table.init_sigma, table.stochastic, offset, self.prompt
        )


@cache
def _fields() -> type[msgspec.Struct]:
    """What the fields of a Request may be, for `fit`: the same annotations, without what __post_init__ adds."""
    hints = get_type_hints(Request, include_extras=True)
    return msgspec.defstruct("Request", [(field.name, hints[field.name]) for field in fields(Request)])


class Refused(NamedTuple):
    """A line (or argument) that cannot be run: its number, from 1, and a sentence that says why."""

    line: int
    sentence: str


class RequestFile:
    """A `.txt` or `.jsonl` file of requests; "-" is standard input, whose lines are JSON when the first is an object.

    Other kinds of file are refused, and so is text whose first line begins with `[` (a JSON list) or is a JSON object.

    It is read at once and parsed line by line, so that the first picture need not wait for the last line. Iterating
    yields (number of the line, Request), or a RequestError for a line that cannot be run; `len` is how many there are.
    """

    def __init__(self, path: str | Path, **shared: Any) -> None:
        """shared: settings of Request for the lines that do not give their own.

        Raises RequestError when the file cannot be read at all.
        """
        self.shared, self.name = shared, "standard input" if str(path) == "-" else str(path)
        self.folder = Path() if str(path) == "-" else Path(path).parent
        suffix = "" if str(path) == "-" else Path(path).suffix.lower()
        if suffix in _OTHERS:
            raise RequestError(_must_be(self.name, _OTHERS[suffix]))
        try:
            if str(path) == "-":
                content = sys.stdin.buffer.read(MAX_FILE + 1)
            else:
                with open(path, "rb") as file:
                    content = file.read(MAX_FILE + 1)
        except OSError as error:
            raise RequestError(f"The prompts file {path} cannot be read: {error.strerror or error}.") from error
        if len(content) > MAX_FILE:
            raise RequestError(f"{self.name} is larger than {MAX_FILE >> 20} MB. Split it and run the parts in turn.")
        # Lines may end as on Windows, or as on an old Macintosh, where all would else be one prompt.
        self.content = _as_utf8(content, self.name).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        start = self.content.lstrip()[: MAX_LINE + 1].partition(b"\n")[0].strip()
        if start.startswith(b"["):
            raise RequestError(_must_be(self.name, _CONVERT, "a list: its first line begins with ["))
        if start == b"{":
            remedy = "Put the object on one line: jq -c . {} > prompts.jsonl"
            raise RequestError(_must_be(self.name, remedy, "an object over several lines"))
        if _is_object(start) and str(path) != "-" and suffix not in JSON_LINES:
            raise RequestError(_must_be(self.name, "Rename it to .jsonl.", "JSON under another name"))
        self.jsonl = start.startswith(b"{") if str(path) == "-" else suffix in JSON_LINES

    def __len__(self) -> int:
        return sum(not line.isspace() for line in io.BytesIO(self.content))

    def __iter__(self) -> Iterator[tuple[int, Request | RequestError]]:
        for number, line in enumerate(io.BytesIO(self.content), 1):
            if line.isspace():
                continue
            try:
                yield number, self._request(line)
            except RequestError as error:
                yield number, error

    def _request(self, line: bytes) -> Request:
        if len(line) > MAX_LINE:
            raise RequestError(f"The line has more than {MAX_LINE >> 20} MB. Shorten it.")
        if self.jsonl:
            values = _json_line(line)
            if isinstance(values.get("hands"), str) and values["hands"] != NO_HANDS:
                values["hands"] = str(self.folder / values["hands"])
        else:
            if b"\0" in line:
                raise RequestError("The line holds NUL bytes. Save the file as UTF-8.")
            try:
                values = {"prompt": line.decode("utf-8").strip()}
            except UnicodeDecodeError:
                raise RequestError("The line is not UTF-8. Save the file as UTF-8.") from None
        return Request(**{**self.shared, **values})


class Resolver:
    """Fills in every None of requests, one after the other, and gives each an id of its own.

    defaults: the manifest's: steps, solver, guidance, hand_steps, hand_solver, hand_guidance, perhaps noise_offset,
    hand_redraws.
    bundle: the bundle's digest. It is part of the ids, so that another bundle's pictures do not pass for this one's.
    seed: of requests that name none. One that was there before (same prompt, same settings) takes the next.
    images: pictures of each request, with the seeds seed, seed + 1, ...; a given id becomes `<id>-<seed>` then.
    check: called with each filled request; raises RequestError when it cannot be run.
    """

    def __init__(
        self,
        defaults: Mapping[str, Any],
        *,
        bundle: str = "",
        seed: int = 0,
        images: int = 1,
        check: Callable[[Request], None] | None = None,
    ) -> None:
        self.defaults, self.bundle, self.seed, self.images, self.check = defaults, bundle, seed, images, check
        self._taken: set[str] = set()  # ids in lower case: many file systems do not tell the cases apart
        self._seen: Counter[Request] = Counter()

    def each(self, request: Request) -> Iterator[Request]:
        """The pictures of a request. Raises RequestError for one that cannot be run, or whose id is taken."""
        first = request.seed
        if first is None:
            first = self.seed + self.images * self._seen[request]
            self._seen[request] += 1
        defaults = {"noise_offset": 0.0, "hand_redraws": 0, **self.defaults}
        gaps = {name: value for name, value in defaults.items() if getattr(request, name) is None}
        for seed in range(first, first + self.images):
            filled = replace(request, seed=seed, **gaps)
            if self.check is not None:
                self.check(filled)
            if request.id is None:
                name = default_id(filled, self.bundle)
            else:
                name = f"{request.id}-{seed}" if self.images > 1 else request.id
            if name.lower() in self._taken:
                raise RequestError(
                    f"The id {name} is taken already. Give another one."
                    if request.id
                    else f"The same prompt with the same settings and seed {seed} is there already. Give another seed."
                )
            filled = replace(filled, id=name)
            self._taken.add(name.lower())
            yield filled


def resolve(requests: Iterable[Request], resolver: Resolver) -> tuple[list[Request], list[Refused]]:
    """All requests filled in, and a Refused (numbered from 1) for each that cannot be run."""
    resolved: list[Request] = []
    refused: list[Refused] = []
    for number, request in enumerate(requests, 1):
        try:
            resolved.extend(resolver.each(request))
        except RequestError as error:
            refused.append(Refused(number, str(error)))
    return resolved, refused


def take(source: Iterator[Request | None], most: int) -> tuple[list[Request], bool]:
    """Up to `most` of the requests that are there now, and whether more may come. None: not yet, ask again later."""
    batch: list[Request] = []
    while len(batch) < most:
        try:
            request = next(source)
        except StopIteration:
            return batch, False
        if request is None:
            break
        batch.append(request)
    return batch, True


def picture_key(request: Request, bundle: str = "") -> str:
    """A hash (hexadecimal) of everything that determines a resolved request's picture.

    The content of the hands file counts, not its name. Raises RequestError when that file cannot be read.
    """
    values: dict[str, Any] = {**vars(request), "id": None, "bundle": bundle}
    if not values["hand_redraws"]:  # the pictures from before there was such a thing
        del values["hand_redraws"]
    if request.hands is not None and request.hands != NO_HANDS:  # a name that stands for itself
        try:
            values["hands"] = hashlib.sha256(read_file(Path(request.hands), MAX_HANDS)).hexdigest()
        except (OSError, MisfitError) as error:
            why = getattr(error, "strerror", None) or error
            raise RequestError(f"The hands file {request.hands} cannot be read: {why}.", "hands") from error
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def default_id(request: Request, bundle: str = "") -> str:
    """`<words of the prompt>-<seed>-<hash>`: readable, and another one for every other picture."""
    words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower())[:40].strip("-")
    return f"{words or 'picture'}-{request.seed}-{picture_key(request, bundle)[:8]}"


def _as_utf8(content: bytes, name: str) -> bytes:
    """A file's content in UTF-8, by its mark. Raises RequestError when it is not what the mark says, or not text."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            if encoding == "utf-8":
                return content.removeprefix(mark)
            try:
                return content.decode(encoding).encode("utf-8")
            except UnicodeError:
                raise RequestError(
                    f"{name} is marked as {encoding.upper()} and is damaged. Save it as UTF-8."
                ) from None
    if content[:4096].count(0) > len(content[:4096]) // 4:  # UTF-16 without its mark; a single one spoils its own line
        raise RequestError(f"{name} is no UTF-8 text: it holds NUL bytes. Save it as UTF-8.")
    return content


def _must_be(name: str, remedy: str, got: str = "") -> str:
    """A sentence about a file of another kind."""
    found = f"{got} ({name})" if got else name
    return (
        f"The prompts file must be .txt (a prompt a line) or .jsonl (an object a line), got {found}. "
        f"{remedy.format('' if name == 'standard input' else shlex.quote(name))}"
    )


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except MisfitError:
        return False


def _json_line(line: bytes) -> dict[str, Any]:
    try:
        values = parse_json(line)
    except MisfitError as error:
        raise RequestError(str(error)) from None
    if not isinstance(values, dict):
        raise RequestError('The line is no object such as {"prompt": "a fist"}.')
    known = [field.name for field in fields(Request)]
    if unknown := [name for name in values if name not in known]:
        raise RequestError(f"The key {unknown[0][:60]!r} is unknown. The keys are {', '.join(known)}.")
    values = {name: value for name, value in values.items() if value is not None}
    if "prompt" not in values:
        raise RequestError('The line has no "prompt".')
    return values
