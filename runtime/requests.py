"""Requests: what the client wants one picture to be, and how files of them are read and checked.

    file = RequestFile("prompts.jsonl", steps=8)
    resolver = Resolver(manifest.defaults)
    for number, request in file:                # parsed one by one; a RequestError for a bad line
        filled = list(resolver.each(request))

A `.txt` file holds a prompt a line. A `.jsonl` (or `.ndjson`) file holds an object a line with the key `prompt`. Where
a line differs from the rest, it also gives `id`, `hands` (a `.hands.npz`), `image`, `mask` (files are relative to this
one) or any of `settings.SETTINGS`. A bad line is refused with a sentence, and the others go on.

Seeds: a request without one takes `--seed`, which is 0 by default, so that the same command makes the same pictures.
A repeated prompt takes the next seed each time: three equal lines are three different pictures.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..engines.adapted import Chosen, chosen
from ..errors import CheckpointError, RequestError
from ..hands import CAMERA, NO_HANDS, SHAPES, given_arrays, hands_file
from ..hands import content_of as hands_content
from ..hints import hint
from ..prompts import marked, words
from ..schedules import Table
from ..schema import MisfitError, fit, parse_json
from ..settings import SETTINGS, RequestFields, checked, with_defaults
from .canvas import as_source, content_of, digest
from .noise import LATENTS, RequestNoise, drawn_again

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
PICTURES = ("image", "mask")
FILES = ("hands", *PICTURES)  # fields that name files
STRENGTH, MASKED_STRENGTH = 0.8, 1.0  # by default, as in diffusers
# Files of other kinds, and how to convert them.
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


@dataclass(frozen=True)
class Request(RequestFields):
    """One picture. `Resolver` replaces None by the bundle's default.

    Settings and their ranges are in `settings.SETTINGS`; see also `schedules.rows` (guidance_interval), `noise.initial`
    (noise_offset) and `clash` (hand_redraws).
    id: letters, digits, dots, dashes and underscores; the files of the picture are named after it.
    hands: what replaces the hands of stage 1: a `.hands.npz`; or its arrays in a dictionary, such as those of a
    Picture; or what `find_hands` yields. "none" for a picture without hands.
    image: a picture to start from: its file, the content of one (bytes), or an array, uint8 [H, W, 3]. mask: the same,
    as large: white where the request paints again, black where it keeps, grey between. Transparent pixels count as
    white.
    strength: the part of the steps that run; see `canvas`.
    size: width and height, "512x768"; see `Bundle.size`.
    lora: adapters, "FILE[:SCALE]" each: one, or several in a tuple; see `engines.adapted`.
    """

    def __post_init__(self) -> None:
        """Raises RequestError for a value outside its range."""
        given = {name: value.item() if isinstance(value, np.generic) else value for name, value in vars(self).items()}
        given |= {name: as_source(name, given[name]) for name in PICTURES}
        lora = (given["lora"],) if isinstance(given["lora"], (str, Path)) else given["lora"]
        if isinstance(lora, (list, tuple)):
            lora = tuple(str(one) if isinstance(one, Path) else one for one in lora)
        given["lora"] = lora or None
        if isinstance(self.hands, Path):
            given["hands"] = str(self.hands)
        elif not isinstance(self.hands, (str, bytes, type(None))):
            arrays = given_arrays(self.hands, *SHAPES)
            given["hands"] = hands_file({name: arrays[name] for name in (*SHAPES, CAMERA) if name in arrays}, "")
        contents = {name: given.pop(name) for name in FILES if isinstance(given[name], bytes)}
        try:
            fitted = fit({**given, **dict.fromkeys(contents)}, checked())
        except MisfitError as error:
            raise RequestError(str(error), error.entry) from None
        for name, value in {**{name: getattr(fitted, name) for name in given}, **contents}.items():
            object.__setattr__(self, name, value)  # 3 and 3.0 are the same picture
        if not self.prompt.strip():
            raise RequestError("The prompt is empty. Say what the picture shows.", "prompt")
        for name in ("prompt", "negative_prompt", *FILES, "lora"):
            try:
                str(getattr(self, name) or "").encode("utf-8")
            except UnicodeEncodeError:
                raise RequestError(f"{name} must be valid Unicode. Save it as UTF-8.", name) from None
        for name in ("mask", "strength"):
            if self.image is None and getattr(self, name) is not None:
                raise RequestError(f"{name} must come with an image. Give one, or leave {name} out.", name)
        start, stop = self.guidance_interval
        if not 0 <= start < stop <= 1:
            must = SETTINGS["guidance_interval"].constraint
            raise RequestError(f"guidance_interval must be {must}, got [{start:g}, {stop:g}].", "guidance_interval")
        if self.id is not None and (self.id.split(".")[0].lower() in _DEVICES or self.id.lower().endswith(".hands")):
            raise RequestError(
                f"id must be a name that other files do not need, got {self.id!r}. Choose another.", "id"
            )

    def noise(self, stream: str, table: Table, draw: int = 0) -> RequestNoise:
        """The noise of a stage (HANDS or LATENTS), of a request whose settings are filled in.

        draw: how often its hands were drawn before. Each draw has a stream of its own, of the same seed.
        """
        offset = (self.noise_offset or 0.0) if stream == LATENTS else 0.0
        said = self.prompt if self.plain_prompts else words(self.prompt)  # other weights, the same colours
        return RequestNoise(self.seed or 0, drawn_again(stream, draw), table.init_sigma, table.stochastic, offset, said)

    def said(self, adapters: Iterable[Chosen] = ()) -> dict[str, Any]:
        """All fields as plain values, for a record: a picture that is not in a file is named by its hash.

        adapters: what `lora` named when the picture was painted.
        """
        said = {
            name: f"sha256 {digest(value)}" if isinstance(value, bytes) else value for name, value in vars(self).items()
        }
        if said.pop("lora") is not None:
            said["lora"] = [str(one) for one in adapters]
        return said


def adapters_of(request: Request) -> tuple[Chosen, ...]:
    """The adapters of a request that change something. Raises RequestError for a file that cannot be read."""
    try:
        return chosen(request.lora)
    except CheckpointError as error:
        raise RequestError(str(error), "lora") from None


KEYS = tuple(field.name for field in fields(Request))


def absolute(request: Request) -> Request:
    """The same request for a process that runs in another folder."""
    named: dict[str, Any] = {name: getattr(request, name) for name in FILES}
    for name, value in named.items():
        if isinstance(value, str) and value != NO_HANDS:
            named[name] = str(Path(value).resolve())
    if request.lora is not None:
        named["lora"] = moved(request.lora, Path.cwd())
    return replace(request, **named)


def moved(lora: Any, folder: Path) -> Any:
    """Adapters of a file's line, whose names are relative to a folder."""
    if isinstance(lora, str):
        return str(folder / lora)
    return tuple(str(folder / one) if isinstance(one, str) else one for one in lora)


class Refused(NamedTuple):
    """A line (or argument) that was refused: its number, from 1, and a sentence that says why."""

    line: int
    sentence: str


class RequestFile:
    """A `.txt` or `.jsonl` file of requests; "-" is standard input, whose lines are JSON when the first is an object.

    Other kinds of file are refused, and so is text whose first line begins with `[` (a JSON list) or is a JSON object.

    The file is read at once and parsed line by line: the first picture does not wait for the last line. Iterating
    yields (number of the line, Request), or (number, RequestError) for a bad line. `len` counts both.
    """

    def __init__(self, path: str | Path, **shared: Any) -> None:
        """shared: settings for the lines that do not give their own. Raises RequestError for a file that cannot be
        read."""
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
            raise RequestError(f"{self.name} must be at most {MAX_FILE >> 20} MB. Split it and run the parts in turn.")
        # Lines may end as on Windows, or as on an old Macintosh.
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

    @property
    def names_adapters(self) -> bool:
        """Whether some line may bring adapters of its own; found without parsing them."""
        return self.jsonl and b'"lora"' in self.content

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
            raise RequestError(
                f"The line must have at most {MAX_LINE >> 20} MB, got {len(line) / 2**20:.1f}. Shorten it."
            )
        if self.jsonl:
            values = _json_line(line)
            for name in FILES:
                if isinstance(values.get(name), str) and values[name] != NO_HANDS:
                    values[name] = str(self.folder / values[name])
            if isinstance(values.get("lora"), (str, list)):
                values["lora"] = moved(values["lora"], self.folder)
        else:
            if b"\0" in line:
                raise RequestError("The line must be UTF-8, got NUL bytes. Save the file as UTF-8.")
            try:
                values = {"prompt": line.decode("utf-8").strip()}
            except UnicodeDecodeError:
                raise RequestError("The line must be UTF-8. Save the file as UTF-8.") from None
        return Request(**{**self.shared, **values})


def gaps(request: Request, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a request leaves to a bundle, with the bundle's defaults; see `settings.Defaults`."""
    found = {name: value for name, value in with_defaults(defaults).items() if getattr(request, name) is None}
    if request.image is not None and request.strength is None:
        found["strength"] = STRENGTH if request.mask is None else MASKED_STRENGTH
    return found


class Resolver:
    """Replaces every None of requests, one after the other, and gives each request an id of its own.

    defaults: the manifest's, see `settings.Defaults`.
    bundle: the bundle's digest. It is part of the ids: the same request gets another id with another bundle.
    seed: of requests without one. A request that repeats an earlier one (prompt and settings) takes the next seed.
    images: pictures of each request, with the seeds seed, seed + 1, ...; a given id then becomes `<id>-<seed>`.
    check: called with each filled request; raises RequestError when the bundle cannot run it.
    lora: adapters of requests that bring none, because they are loaded.
    """

    def __init__(
        self,
        defaults: Mapping[str, Any],
        *,
        bundle: str = "",
        seed: int = 0,
        images: int = 1,
        check: Callable[[Request], None] | None = None,
        lora: Sequence[str] | None = None,
    ) -> None:
        self.lora = lora
        self.defaults, self.bundle, self.seed, self.images, self.check = defaults, bundle, seed, images, check
        self._taken: set[str] = set()  # ids in lower case: many file systems ignore case
        self._seen: Counter[Request] = Counter()

    def each(self, request: Request) -> Iterator[Request]:
        """Yields a filled request for each picture. Raises RequestError when `check` does, or when the id is taken."""
        first = request.seed
        if first is None:
            first = self.seed + self.images * self._seen[request]
            self._seen[request] += 1
        defaults = gaps(request, self.defaults)
        if request.lora is None and self.lora:
            defaults["lora"] = self.lora
        for seed in range(first, first + self.images):
            filled = replace(request, seed=seed, **defaults)
            if self.check is not None:
                self.check(filled)
            if request.id is None:
                name = default_id(filled, self.bundle)
            else:
                name = f"{request.id}-{seed}" if self.images > 1 else request.id
            if name.lower() in self._taken:
                raise RequestError(
                    f"id must be unique, and another request has {name}. Give another one."
                    if request.id
                    else f"Another request has the same prompt, settings and seed {seed}. Give another seed.",
                    "id" if request.id else "seed",
                )
            filled = replace(filled, id=name)
            self._taken.add(name.lower())
            yield filled


def resolve(requests: Iterable[Request], resolver: Resolver) -> tuple[list[Request], list[Refused]]:
    """Returns the filled requests, and a Refused (numbered from 1) for each of the others."""
    resolved: list[Request] = []
    refused: list[Refused] = []
    for number, request in enumerate(requests, 1):
        try:
            resolved.extend(resolver.each(request))
        except RequestError as error:
            refused.append(Refused(number, str(error)))
    return resolved, refused


def take(source: Iterator[Request | None], most: int) -> tuple[list[Request], bool]:
    """Returns up to `most` requests of a source, and whether more may come. The source yields None while it waits."""
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


def picture_key(request: Request, bundle: str = "", adapters: Sequence[Chosen] | None = None) -> str:
    """A hash (hexadecimal) of all that determines the picture of a filled request.

    adapters: those of a painted picture; by default its files are read. The content of files counts, not their names.
    Raises RequestError when one cannot be read.
    """
    values: dict[str, Any] = {**vars(request), "id": None, "bundle": bundle}
    if not values["hand_redraws"]:  # so that older pictures keep their keys
        del values["hand_redraws"]
    for name in PICTURES:
        source = values.pop(name)
        if source is not None:
            values[name] = digest(content_of(name, source))
    for name in ("strength", "size"):
        if values[name] is None:
            del values[name]
    del values["lora"]
    if request.lora is not None and (found := adapters_of(request) if adapters is None else adapters):
        values["lora"] = [one.key for one in found]
    # Prompts without marks keep the keys that they had before marks had a meaning.
    if not (request.plain_prompts or marked(request.prompt) or marked(request.negative_prompt)):
        del values["plain_prompts"]
    if request.hands is not None and request.hands != NO_HANDS:
        try:
            values["hands"] = digest(hands_content(request.hands))
        except (OSError, MisfitError) as error:
            why = getattr(error, "strerror", None) or error
            raise RequestError(f"The hands file {request.hands} cannot be read: {why}.", "hands") from error
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def default_id(request: Request, bundle: str = "") -> str:
    """`<words of the prompt>-<seed>-<hash>`: readable, and different for different pictures."""
    words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower())[:40].strip("-")
    return f"{words or 'picture'}-{request.seed}-{picture_key(request, bundle)[:8]}"


def _as_utf8(content: bytes, name: str) -> bytes:
    """A file's content in UTF-8, by its byte order mark. Raises RequestError where the content does not fit the
    mark."""
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
    if (
        content[:4096].count(0) > len(content[:4096]) // 4
    ):  # UTF-16 without its mark; a single NUL spoils its line alone
        raise RequestError(f"{name} must be UTF-8 text, got NUL bytes. Save it as UTF-8.")
    return content


def _must_be(name: str, remedy: str, got: str = "") -> str:
    """A sentence about a file of the wrong kind."""
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


def check_names(given: Iterable[str], kind: str, known: list[str]) -> None:
    """Raises RequestError for the first name that is not a setting. kind: "key" of a file, or "setting"."""
    for name in given:
        if name not in known:
            what = hint(name, "request", known) or f"The {kind}s are {', '.join(known)}."
            raise RequestError(f"The {kind} {name[:60]!r} is unknown. {what}", name[:60], "unknown_field")


def _json_line(line: bytes) -> dict[str, Any]:
    try:
        values = parse_json(line)
    except MisfitError as error:
        raise RequestError(str(error)) from None
    if not isinstance(values, dict):
        raise RequestError('The line must be an object such as {"prompt": "a fist"}.')
    check_names(values, "key", list(KEYS))
    values = {name: value for name, value in values.items() if value is not None}
    if "prompt" not in values:
        raise RequestError('The line must have a "prompt".', "prompt")
    return values
