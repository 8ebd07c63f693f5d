"""Prompts to token ids, as CLIP in diffusers does it: begin, at most 75 tokens, end, padding up to 77.

tokenizer = PromptTokenizer("bundle/tokenizer.json", manifest.tokenizer)
ids, dropped = tokenizer.encode("a right hand making a fist")     # as it is written, cut at 75 tokens
read = tokenizer.read("a (right:1.2) hand", "prompt")             # with weights, in chunks of 75 tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from .contract import MAX_CHUNKS
from .errors import BundleError, RequestError
from .placeholders import runs
from .prompts import Part, parse

WORD_ENDS = "</w>"  # of CLIP's tokens
SENTENCE, PHRASE = (".",), (".", ",", ";", ":")
MAX_WEAK = 64  # texts of a prompt with weights below 1: the encoder runs again for each


class Weak(NamedTuple):
    """A text with a weight below 1: its tokens are start ... stop - 1 of all chunks, one after the other."""

    weight: float
    start: int
    stop: int


@dataclass(frozen=True)
class Reading:
    """A prompt as the text encoder reads it: n chunks of begin, tokens, end and padding.

    ids: int64 [n, length]. weights: float32 [n, length], 1 for most. parts: (first chunk, last chunk + 1, its texts
    with weights below 1) of each part between breaks. text: the words without marks. cut: the end of them that was
    left out. tokens: how many there are.
    """

    ids: np.ndarray = field(repr=False)
    weights: np.ndarray = field(repr=False)
    parts: tuple[tuple[int, int, tuple[Weak, ...]], ...]
    text: str
    cut: str = ""
    tokens: int = 0

    @property
    def weighted(self) -> bool:
        """Whether any weight differs from 1."""
        return bool((self.weights != 1).any())


class PromptTokenizer:
    """The bundle's tokenizer. `special` is the manifest's `tokenizer`: bos, eos, pad (ids) and length (77)."""

    def __init__(self, path: str | Path, special: Mapping[str, int]) -> None:
        """Raises BundleError when the file is missing or not a tokenizer."""
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
            self.bos, self.eos, self.pad = special["bos"], special["eos"], special["pad"]
            self.length = special["length"]
        except KeyError as error:
            raise BundleError(f"The manifest's tokenizer lacks {error}. Export the bundle again.") from error
        except Exception as error:  # tokenizers raises bare Exceptions
            raise BundleError(f"{path} cannot be read as a tokenizer ({error}). Export the bundle again.") from error
        # The file's own ideas of padding and cutting would hide what was cut.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._runs = runs(self._tokenizer)

    @property
    def room(self) -> int:
        """Tokens of a prompt that a chunk holds: 75."""
        return self.length - 2

    def encode(self, prompt: str) -> tuple[np.ndarray, str]:
        """Returns ids, int64 [length], and the end of the prompt that did not fit ("" when all of it did)."""
        found = self._tokens(prompt)
        return self._chunk([number for number, _ in found[: self.room]]), self._rest(prompt, found, self.room)

    def read(self, prompt: str, name: str, plain: bool = False, chunks: int = MAX_CHUNKS, weak: bool = True) -> Reading:
        """Reads a prompt with its weights and breaks. name: of its field.

        plain: read the text as it is written, and cut it after one chunk. chunks: 1 also cuts, and breaks then mean
        nothing; otherwise a longer prompt is refused. weak: False reads weights below 1 as 1.
        Raises RequestError for more chunks or more texts with weights below 1 than there may be, and as `parse` does.
        """
        if plain:
            parts: Sequence[Part] = (((prompt, 1.0),),)
        else:
            parts = parse(prompt, name)
        if plain or chunks == 1:
            chunks, parts = 1, [tuple(pair for part in parts for pair in (*part, (" ", 1.0)))[:-1]]
        rows, weights, ranges, cut, total = list[np.ndarray](), list[np.ndarray](), [], "", 0
        for part in parts:
            tokens = [
                (number, weight if weak else max(weight, 1.0), which)
                for which, (text, weight) in enumerate(part)
                for number, _ in self._tokens(text)
            ]
            total += len(tokens)
            if chunks == 1 and len(tokens) > self.room:
                cut, tokens = self._dropped(part), tokens[: self.room]
            first, start, places = len(rows), 0, dict[int, list[int]]()  # text of the part -> where its tokens are
            while start < len(tokens) or len(rows) == first:
                some = tokens[start : start + self.room + 1]
                some = some[: self._split([number for number, *_ in some])]
                row = np.ones(self.length, np.float32)
                for place, (_, weight, which) in enumerate(some, 1):
                    row[place] = weight
                    if weight < 1:
                        places.setdefault(which, []).append(len(rows) * self.length + place)
                rows.append(self._chunk([number for number, *_ in some]))
                weights.append(row)
                start += len(some)
            weakened = tuple(Weak(part[which][1], at[0], at[-1] + 1) for which, at in places.items())
            ranges.append((first, len(rows), weakened))
        if len(rows) > chunks:
            raise RequestError(
                f"{name} must fit into {chunks} chunks of {self.room} tokens, got {total:,} tokens in {len(rows)} "
                "chunks. Shorten it.",
                name,
            )
        if (found := sum(len(weakened) for *_, weakened in ranges)) > MAX_WEAK:
            raise RequestError(
                f"{name} must have at most {MAX_WEAK} texts with weights below 1, got {found}. Put several into one "
                "pair of brackets.",
                name,
            )
        text = " ".join("".join(text for text, _ in part) for part in parts)
        return Reading(np.stack(rows), np.stack(weights), tuple(ranges), text, cut, total)

    def _tokens(self, text: str) -> list[tuple[int, int]]:
        """Ids, and where each begins in the text."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        return [(part, start) for number, (start, _) in found for part in self._runs.get(number, (number,))]

    def _rest(self, text: str, tokens: Sequence[tuple[int, int]], room: int) -> str:
        return text[tokens[room][1] :] if len(tokens) > room else ""

    def _dropped(self, part: Part) -> str:
        """The end of a part that one chunk does not hold."""
        room = self.room
        for which, (text, _) in enumerate(part):
            tokens = self._tokens(text)
            if len(tokens) > room:
                return self._rest(text, tokens, room) + "".join(text for text, _ in part[which + 1 :])
            room -= len(tokens)
        return ""

    def _split(self, ids: Sequence[int]) -> int:
        """How many tokens go into the next chunk: up to the end of a sentence, else of a phrase, else of a word, as in
        compel 2.5 (`SplitLongTextMode.SENTENCES`)."""
        if len(ids) <= self.room:
            return len(ids)
        texts = [self._tokenizer.id_to_token(number) or "" for number in ids[: self.room]]
        for marks in (SENTENCE, PHRASE):
            ends = [place for place, text in enumerate(texts, 1) if text in {mark + WORD_ENDS for mark in marks}]
            if ends:
                return ends[-1]
        ends = [place for place, text in enumerate(texts, 1) if text.endswith(WORD_ENDS)]
        return ends[-1] if ends else self.room

    def _chunk(self, ids: Sequence[int]) -> np.ndarray:
        row = [self.bos, *ids, self.eos]
        return np.array(row + [self.pad] * (self.length - len(row)), np.int64)
