"""Weights and parts of a prompt, read as AUTOMATIC1111's web UI reads them.

    parse("a (red:1.3) fist BREAK [blurry]")  # (("a ", 1), ("red", 1.3), (" fist", 1)), (("blurry", 0.909),)
    words("a (red:1.3) fist")                 # "a red fist"

`(word)` multiplies the weight by 1.1, `[word]` divides it by 1.1, `(word:1.3)` multiplies it by 1.3, and all of them
nest. An open bracket without its partner reaches to the end, and a closing one is text. A backslash makes the next
bracket text. `BREAK` begins a new part, which the text encoder reads apart from the others.

Three things differ from the web UI. A number may have an exponent. `BREAK` between brackets is a break, too. A part
without words is left out.
"""

from __future__ import annotations

import re
from functools import lru_cache

from .errors import RequestError

STEP = 1.1  # of a bracket
MAX_WEIGHT = 10.0
MAX_BRACKETS = 1000
_TOKENS = re.compile(
    r"\\[\\()\[\]]|\\|\(|\[|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\)|\)|\]|[^\\()\[\]:]+|:"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
# What the web UI reads as a change between steps, or as several prompts at once.
_FOREIGN = re.compile(r"\[[^\[\]]*\|[^\[\]]*\]|\[[^\[\]]*:\s*\d*\.?\d+\s*\]|\bAND\b")

Part = tuple[tuple[str, float], ...]  # texts and their weights; neighbours have different weights


@lru_cache(maxsize=64)
def parse(prompt: str, name: str = "prompt") -> tuple[Part, ...]:
    """The parts of a prompt; at least one, which may be empty.

    name: of its field. Raises RequestError for a weight beyond MAX_WEIGHT, and more brackets than MAX_BRACKETS.
    """
    if sum(map(prompt.count, "()[]")) > MAX_BRACKETS:
        raise RequestError(f"{name} must have at most {MAX_BRACKETS:,} brackets. Leave some out.", name)
    found: list[list] = []  # [text, weight]; the text of a break is None
    round_, square = list[int](), list[int]()  # where open brackets stand in `found`
    apart = True  # whether the next text begins an entry of its own

    def multiply(start: int, factor: float) -> None:
        for entry in found[start:]:
            entry[1] *= factor

    def add(text: str) -> None:
        nonlocal apart
        if text and (apart or found[-1][0] is None):
            found.append([text, 1.0])
            apart = False
        elif text:
            found[-1][0] += text

    for match in _TOKENS.finditer(prompt):
        token, weight = match[0], match["weight"]
        opened = {"(": round_, "[": square}.get(token)
        if opened is not None:
            opened.append(len(found))
        elif weight is not None and round_:
            multiply(round_.pop(), float(weight))
        elif token == ")" and round_:
            multiply(round_.pop(), STEP)
        elif token == "]" and square:
            multiply(square.pop(), 1 / STEP)
        elif token.startswith("\\"):
            add(token[1:])
            continue
        else:
            for number, text in enumerate(_BREAK.split(token)):
                if number:
                    found.append([None, 1.0])
                add(text)
            continue
        apart = True
    for starts, factor in ((round_, STEP), (square, 1 / STEP)):
        for start in starts:
            multiply(start, factor)
    return _parts(found, name)


def _parts(found: list[list], name: str) -> tuple[Part, ...]:
    """The entries between breaks; neighbours of one weight are joined."""
    parts: list[list[tuple[str, float]]] = [[]]
    for text, weight in found:
        if text is None:
            parts.append([])
            continue
        if not abs(weight) <= MAX_WEIGHT:
            raise RequestError(
                f"{name} must have weights from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}, got {weight:g} for "
                f"{text.strip()[:60]!r}. Take a smaller one.",
                name,
            )
        if parts[-1] and parts[-1][-1][1] == weight:
            text = parts[-1].pop()[0] + text
        parts[-1].append((text, weight))
    worded = [tuple(part) for part in parts if "".join(text for text, _ in part).strip()]
    return tuple(worded) or ((),)


def words(prompt: str) -> str:
    """The text of a prompt without weights and breaks. Raises RequestError as `parse` does."""
    return " ".join("".join(text for text, _ in part) for part in parse(prompt))


def marked(prompt: str) -> bool:
    """Whether a prompt means another picture than its plain text. Raises RequestError as `parse` does."""
    return bool(prompt.strip()) and parse(prompt) != (((prompt, 1.0),),)


def foreign(prompt: str) -> str:
    """The first mark of the web UI's that has no meaning here: `[a|b]`, `[a:b:0.5]`, `AND`; "" without one."""
    found = _FOREIGN.search(prompt)
    return found[0] if found else ""
