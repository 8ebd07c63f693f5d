"""Captions beside pictures and motions: one a line, in UTF-8, with optional seconds in which they hold.

    captions = read_captions(Path("texts/000007.txt"))
    holding(captions, 2.5)        # ["a person walks", "he waves"]

A line is a plain caption, or HumanML3D's `caption#tokens#from#to` in seconds; 0 and 0 mean the whole motion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..schema import MisfitError

# Byte order marks and their encodings. UTF-32's begins with UTF-16's.
MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\0\0", "utf-32-le"),
    (b"\0\0\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


class Caption(NamedTuple):
    """A text, and the seconds in which it holds; from 0 to 0: always."""

    text: str
    start: float = 0.0
    end: float = 0.0


def read_text(path: Path) -> str:
    """A text in UTF-8, or in UTF-16 or UTF-32 with its mark. Raises OSError, or MisfitError for another encoding."""
    content = path.read_bytes()
    mark, encoding = next(((m, e) for m, e in MARKS if content.startswith(m)), (b"", "utf-8"))
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise MisfitError(
            f"{path.name} must be {encoding.upper()}, fails at byte {len(mark) + error.start + 1}. Save it as UTF-8."
        ) from None
    if "\0" in text:
        raise MisfitError(f"{path.name} must be UTF-8, got NUL bytes, as in UTF-16 without a mark. Save it as UTF-8.")
    return text


def read_captions(path: Path) -> list[Caption]:
    """The captions of a .txt, at least one. Raises MisfitError with a sentence."""
    try:
        lines = read_text(path).splitlines()
    except FileNotFoundError:
        lines = []
    except OSError as error:
        raise MisfitError(f"{path.name} cannot be read: {error.strerror or error}.") from None
    captions = [caption for line in lines if (caption := _caption(line)).text]
    if not captions:
        raise MisfitError(f"It has no caption. Write one or more into {path.name}, one a line.")
    return captions


def holding(captions: Sequence[Caption], at: float) -> list[str]:
    """The texts that hold at a second."""
    return [text for text, start, end in captions if start == end == 0 or start <= at < end]


def _caption(line: str) -> Caption:
    parts = line.strip().split("#")
    try:
        start, end = (float(part) for part in parts[2:4])
    except ValueError:
        return Caption(line.strip())
    if not (math.isfinite(start) and math.isfinite(end)):  # HumanML3D has a few
        start = end = 0.0
    return Caption(parts[0].strip(), start, end)
