"""What comes from outside, checked: JSON of bounded size, fitted to one typed description of what it may be.

    value = read_json(Path("manifest.json"), MAX_JSON_BYTES)
    manifest = fit(value, Manifest)        # MisfitError: "steps must be a whole number from 1 to 1000, got 0."

A description is a class with annotated fields: a dataclass, a TypedDict or a msgspec.Struct. Bounds stand in the
annotation, `Annotated[int, Meta(ge=1, le=1000, description="a whole number from 1 to 1000")]`; where a field has a
description the sentence says it, else it says what msgspec expected. Each class checks what msgspec does not know, such
as that two entries fit together.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import Meta

MAX_JSON_BYTES = 1 << 24  # bytes: no manifest, record or configuration comes near
T = TypeVar("T")

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Word = Annotated[str, Meta(max_length=200)]
TRUTH = Meta(description="true or false")
# msgspec (0.22, too) stores what it knows of a class before it has found out everything. A second thread that fits the
# same class for the first time then reads a null pointer, which kills the process.
_FITTING = threading.RLock()
_AT = re.compile(r"(.*) - at (?:`key` in )?`\$\.?(.*)`", re.DOTALL)


class MisfitError(ValueError):
    """A value is not what it should be; the message is a sentence about the first thing that is wrong.

    `entry` names the entry of the value that the sentence is about, where `fit` found one.
    """

    def __init__(self, sentence: str, entry: str | None = None) -> None:
        super().__init__(sentence)
        self.entry = entry


def read_file(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError; MisfitError for any other file."""
    if path.exists() and not path.is_file():  # a pipe may never answer, and a device never ends
        raise MisfitError("It is not a regular file.")
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise MisfitError(f"It must be at most {limit >> 20} MB, got a larger file.")
    return content


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The JSON value of a regular file. Raises OSError, or MisfitError when the file is not JSON."""
    return parse_json(read_file(path, limit))


def read_python_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The JSON value of a regular file as Python writes it, where NaN and infinity are numbers.

    diffusers writes `"lambda_min_clipped": -Infinity` into schedulers. Fit the value to bounds at both ends:
    they refuse NaN and infinity. Raises OSError, or MisfitError when the file is not JSON.
    """
    content = read_file(path, limit)
    try:
        value = json.loads(content.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()  # an escape can spell half of a surrogate pair: not Unicode
    except UnicodeDecodeError:
        raise MisfitError("It is not UTF-8.") from None
    except UnicodeEncodeError:
        raise MisfitError("It has text that is not Unicode: half of a surrogate pair.") from None
    except RecursionError:
        raise MisfitError("It is nested too deeply.") from None
    except ValueError as error:  # also an integer of thousands of digits
        raise MisfitError(f"It is not JSON: {_sentence(str(error))}") from None
    return value


def parse_json(content: bytes) -> Any:
    """A JSON value. Raises MisfitError, also for NaN, infinity and numbers beyond float64."""
    try:
        return msgspec.json.decode(content.removeprefix(b"\xef\xbb\xbf"))
    except UnicodeDecodeError:
        raise MisfitError("It is not UTF-8.") from None
    except RecursionError:
        raise MisfitError("It is nested too deeply.") from None
    except msgspec.DecodeError as error:  # also a number that float64 cannot hold
        found = _AT.fullmatch(str(error))
        raise MisfitError(f"It is not JSON: {_sentence(found[1] if found else str(error))}") from None


def fit(value: Any, kind: type[T]) -> T:
    """`value` (of dicts, lists, numbers, text) as a `kind`. Raises MisfitError with a sentence that names the entry.

    Many threads may call it at once."""
    try:
        with _FITTING:
            return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise MisfitError(_explain(str(error), value, kind), _entry(str(error))) from None
    except RecursionError:
        raise MisfitError("It is nested too deeply.") from None


def shown(value: Any) -> str:
    """A value in a sentence: short, whatever it is."""
    if isinstance(value, (dict, list, tuple)) and len(value) > 4:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} entries"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        return "too large to show"
    return text if len(text) <= 60 else text[:57] + "..."


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few names in a sentence, and the number of the rest."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def whole(least: int, most: int) -> Meta:
    """The bounds of a whole number, in an annotation."""
    return Meta(ge=least, le=most, description=f"a whole number from {least} to {most}")


def one_of(*words: str) -> Meta:
    """The words that a text may be, in an annotation."""
    return Meta(pattern=f"^({'|'.join(map(re.escape, words))})\\Z", description=f"one of {', '.join(words)}")


def _explain(message: str, value: Any, kind: type) -> str:
    """A sentence from msgspec's "Expected `int` <= 1000 - at `$.steps`"."""
    found = _AT.fullmatch(message)
    if not found:
        return _sentence(message)
    what, path = found.groups()
    name = re.split(r"[.\[]", path)[0]
    if name and isinstance(value, dict):
        described = _description(get_type_hints(kind, include_extras=True).get(name))
        if described:
            return f"{name} must be {described}, got {shown(value.get(name))}."
    return f"In {path}: {_sentence(what)}"


def _entry(message: str) -> str | None:
    """The first name of the path in msgspec's message: "steps" of "... - at `$.steps`"."""
    found = _AT.fullmatch(message)
    return (re.split(r"[.\[]", found[2])[0] or None) if found else None


def _description(hint: Any) -> str | None:
    """What the description of a field's annotation says, also of one that may be None."""
    for part in (hint, *get_args(hint)):
        for meta in getattr(part, "__metadata__", ()):
            if isinstance(meta, Meta) and meta.description:
                return meta.description
    return None


def _sentence(text: str) -> str:
    return text.replace("`", "")[:300].rstrip(".") + "."
