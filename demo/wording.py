"""Small grammars of captions: one writes captions, and tells whether a caption is one of its own.

grammar = All("a", Maybe("left"), "hand", One("waving", "making a fist"))
write(grammar, np.random.default_rng(0))      # "a hand making a fist"
matches(grammar, "a left hand waving")        # True
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


class One:
    """One of several parts. weights: how often each comes, compared with the others."""

    def __init__(self, *parts: Node, weights: tuple[float, ...] | None = None) -> None:
        self.parts, self.weights = parts, weights


class All:
    """Parts one after another."""

    def __init__(self, *parts: Node) -> None:
        self.parts = parts


class Shuffled:
    """Parts in any order."""

    def __init__(self, *parts: Node) -> None:
        self.parts = parts


@dataclass(frozen=True)
class Maybe:
    """A part that may be left out. chance: how often it comes; None: as the writer's `leave_out` has it."""

    part: Node
    chance: float | None = None


Node = str | One | All | Shuffled | Maybe


def write(grammar: Node, rng: np.random.Generator, leave_out: float = 0.35) -> str:
    """A random caption of the grammar. leave_out: how often a `Maybe` without a chance of its own is left out."""
    text = " ".join(_words(grammar, rng, leave_out))
    text = re.sub(r"(\s*,)+\s*", ", ", text).strip(" ,")
    return re.sub(r"\b([aA]) (?=[aeiouAEIOU])", r"\1n ", text)


def _words(node: Node, rng: np.random.Generator, leave_out: float) -> list[str]:
    if isinstance(node, str):
        return [node] if node else []
    if isinstance(node, Maybe):
        chance = 1 - leave_out if node.chance is None else node.chance
        return _words(node.part, rng, leave_out) if rng.random() < chance else []
    if isinstance(node, One):
        share = None if node.weights is None else np.array(node.weights) / sum(node.weights)
        return _words(node.parts[rng.choice(len(node.parts), p=share)], rng, leave_out)
    order = rng.permutation(len(node.parts)) if isinstance(node, Shuffled) else range(len(node.parts))
    return [word for i in order for word in _words(node.parts[i], rng, leave_out)]


def matches(grammar: Node, caption: str) -> bool:
    """Whether the grammar may write a caption. Case, commas and a full stop do not matter."""
    return re.fullmatch(_pattern(grammar), _plain(caption)) is not None


def _plain(text: str) -> str:
    """Lower-case words with a space after each; "an" is "a"."""
    words = re.sub(r"[,.]", " ", text.lower()).split()
    return "".join("a " if word == "an" else f"{word} " for word in words)


def _pattern(node: Node) -> str:
    if isinstance(node, str):
        return re.escape(_plain(node))
    if isinstance(node, Maybe):
        return f"(?:{_pattern(node.part)})?"
    if isinstance(node, One):
        return f"(?:{'|'.join(map(_pattern, node.parts))})"
    if isinstance(node, All):
        return "".join(map(_pattern, node.parts))
    return f"(?:{'|'.join(_pattern(part) for part in node.parts)}){{0,{len(node.parts)}}}"


def texts(grammar: Node) -> Iterator[str]:
    """All pieces of text that a grammar holds."""
    if isinstance(grammar, str):
        yield grammar
    else:
        for part in (grammar.part,) if isinstance(grammar, Maybe) else grammar.parts:
            yield from texts(part)
