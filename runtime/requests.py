"""Requests: what one picture is asked to be, and how lists of them are read and checked.

    lines, refused = read_requests("prompts.jsonl")
    requests, more_refused = resolve(lines.values(), manifest.defaults)

A `.txt` file holds a prompt a line. A `.jsonl` file holds an object a line with the key `prompt` and, where a line
differs from the rest, `seed`, `steps`, `solver`, `guidance`, `guidance_interval`, `negative_prompt`, `hand_steps`,
`hand_solver`, `hand_guidance`, `id`, `hands` (a `.hands.npz`, relative to the file). A line that cannot be run is
refused with a sentence, and the rest goes on.

Seeds: without one a request takes `--seed`, which is 0 unless given, so that the same command makes the same pictures.
A prompt that is repeated takes the next seed each time: three equal lines are three different pictures.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RequestError
from .schedules import SOLVERS

MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 100.0
_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")
# Names that Windows keeps for devices, whatever follows the first dot.
_DEVICES = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)}


@dataclass(frozen=True)
class Request:
    """One picture. None means "as the bundle's defaults have it"; `resolve` fills it in.

    seed: 0 to 2**63 - 1. steps, hand_steps: 1 to 1000. guidance, hand_guidance: 0 to 100, where 1 is none.
    guidance_interval: the part of the steps that is guided, 0 <= start < stop <= 1; see `rows`.
    id: letters, digits, dots, dashes and underscores; the files of the picture are named after it.
    hands: a `.hands.npz` whose hands are taken instead of stage 1's.
    """

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
    hands: str | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Raises RequestError for anything that cannot be run."""
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise RequestError(f"The {name} is {_kind(text)}; it must be text.")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise RequestError(f"The {name} holds broken Unicode. Save it as UTF-8.") from None
        if not self.prompt.strip():
            raise RequestError("The prompt is empty. Say what the picture shows.")
        _check_integer("seed", self.seed, 0, MAX_SEED)
        _check_integer("steps", self.steps, 1, MAX_STEPS)
        _check_integer("hand_steps", self.hand_steps, 1, MAX_STEPS)
        for name in ("guidance", "hand_guidance"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_GUIDANCE:
                raise RequestError(f"The {name} is {_shown(value)}; it must be a number from 0 to {MAX_GUIDANCE:g}.")
            object.__setattr__(self, name, float(value))  # 3 and 3.0 are the same picture
        object.__setattr__(self, "guidance_interval", _interval(self.guidance_interval))
        for name in ("solver", "hand_solver"):
            value = getattr(self, name)
            if value is not None and value not in SOLVERS:
                raise RequestError(f"There is no {name} {_shown(value)}. Choose one of {', '.join(SOLVERS)}.")
        if self.hands is not None and (not isinstance(self.hands, str) or not self.hands):
            raise RequestError(f"The entry hands is {_kind(self.hands)}; it must name a .hands.npz file.")
        if self.id is not None:
            _check_id(self.id)


class Refused(NamedTuple):
    """A line (or argument) that cannot be run: its number, from 1, and a sentence that says why."""

    line: int
    sentence: str


def read_requests(path: str | Path, **shared: Any) -> tuple[dict[int, Request], list[Refused]]:
    """Reads a `.txt` or `.jsonl` file: the requests by line number, and the lines that cannot be run.

    shared: settings of Request for the lines that do not give their own.
    Raises RequestError when the file cannot be read at all.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(f"The prompts file {path} cannot be read: {error.strerror or error}.") from error
    requests: dict[int, Request] = {}
    refused: list[Refused] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8").strip()
            values = _json_line(text) if path.suffix.lower() == ".jsonl" else {"prompt": text}
            if isinstance(values.get("hands"), str):
                values["hands"] = str(path.parent / values["hands"])
            requests[number] = Request(**{**shared, **values})
        except UnicodeDecodeError:
            refused.append(Refused(number, "The line is not UTF-8. Save the file as UTF-8."))
        except RequestError as error:
            refused.append(Refused(number, str(error)))
    return requests, refused


def resolve(
    requests: Iterable[Request],
    defaults: Mapping[str, Any],
    *,
    bundle: str = "",
    seed: int = 0,
    images: int = 1,
    check: Callable[[Request], None] | None = None,
) -> tuple[list[Request], list[Refused]]:
    """Fills in every None and gives every request an id of its own.

    defaults: the manifest's: steps, solver, guidance, hand_steps, hand_solver, hand_guidance.
    bundle: the bundle's digest. It is part of the ids, so that another bundle's pictures do not pass for this one's.
    seed: of requests that name none. One that was there before (same prompt, same settings) takes the next.
    images: pictures of each request, with the seeds seed, seed + 1, ...; a given id becomes `<id>-<seed>` then.
    check: called with each filled request; raises RequestError when it cannot be run.
    Returns the requests, and a Refused (numbered from 1) for each that cannot be run or whose id is taken.
    """
    resolved: list[Request] = []
    refused: list[Refused] = []
    taken: set[str] = set()  # ids in lower case: many file systems do not tell the cases apart
    seen: Counter[Request] = Counter()
    for number, request in enumerate(requests, 1):
        first = request.seed
        if first is None:
            first = seed + images * seen[request]
            seen[request] += 1
        try:
            for each in range(first, first + images):
                filled = _fill(replace(request, seed=each), defaults)
                if check is not None:
                    check(filled)
                if request.id is None:
                    filled = replace(filled, id=default_id(filled, bundle))
                elif images > 1:
                    filled = replace(filled, id=f"{request.id}-{each}")
                if str(filled.id).lower() in taken:
                    raise RequestError(
                        f"The id {filled.id} is taken already. Give another one."
                        if request.id
                        else f"The same prompt with the same settings and seed {each} is there already. "
                        "Give another seed."
                    )
                taken.add(str(filled.id).lower())
                resolved.append(filled)
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
    values: dict[str, Any] = {**asdict(request), "id": None, "bundle": bundle}
    if request.hands is not None:
        try:
            values["hands"] = hashlib.sha256(Path(request.hands).read_bytes()).hexdigest()
        except OSError as error:
            raise RequestError(f"The hands file {request.hands} cannot be read: {error.strerror or error}.") from error
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def default_id(request: Request, bundle: str = "") -> str:
    """`<words of the prompt>-<seed>-<hash>`: readable, and another one for every other picture."""
    words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower())[:40].strip("-")
    return f"{words or 'picture'}-{request.seed}-{picture_key(request, bundle)[:8]}"


def _fill(request: Request, defaults: Mapping[str, Any]) -> Request:
    names = ("steps", "solver", "guidance", "hand_steps", "hand_solver", "hand_guidance")
    return replace(request, **{name: defaults[name] for name in names if getattr(request, name) is None})


def _json_line(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The line is not JSON ({error}).") from None
    if not isinstance(values, dict):
        raise RequestError(f'The line is {_kind(values)}, not an object such as {{"prompt": "a fist"}}.')
    known = [field.name for field in fields(Request)]
    if unknown := [name for name in values if name not in known]:
        raise RequestError(f"The key {unknown[0]!r} is unknown. The keys are {', '.join(known)}.")
    if "prompt" not in values:
        raise RequestError('The line has no "prompt".')
    return {name: value for name, value in values.items() if value is not None}


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"The {name} is {_shown(value)}; it must be a whole number from {low} to {high}.")


def _interval(value: Any) -> tuple[float, float]:
    """A pair of numbers from 0 to 1; JSON has it as a list."""
    fine = isinstance(value, (tuple, list)) and len(value) == 2
    if not fine or not all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in value):
        raise RequestError(f"The guidance_interval is {_shown(value)}; it must be two numbers, such as [0, 0.5].")
    start, stop = map(float, value)
    if not 0 <= start < stop <= 1:
        raise RequestError(f"The guidance_interval is {start:g} to {stop:g}; it must rise, from 0 to 1.")
    return start, stop


def _check_id(value: Any) -> None:
    if not isinstance(value, str) or not _ID.fullmatch(value) or value.startswith("."):
        raise RequestError(
            f"The id {_shown(value)} cannot name a file. Take up to 100 letters, digits, dots, dashes and "
            "underscores, no path, and no dot at the start."
        )
    if value.split(".")[0].lower() in _DEVICES or value.lower().endswith(".hands"):
        raise RequestError(f"The id {value!r} is reserved for other files. Choose another one.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
