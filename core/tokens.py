"""Prompts to token ids, as CLIP in diffusers does it: begin, at most 75 tokens, end, padding up to 77.

tokenizer = PromptTokenizer("bundle/tokenizer.json", manifest.tokenizer)
ids, dropped = tokenizer.encode("a right hand making a fist")
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .errors import BundleError
from .placeholders import runs

# What other programs read as weights and parts of a prompt: (word:1.3), [word], BREAK.
_MARKS = re.compile(r"\([^()]*:\s*\d*\.?\d+\s*\)|\[[^\[\]]+\]|\bBREAK\b")


def marks(prompt: str) -> str:
    """The first mark in a prompt that other programs read as a weight or a new part; "" without one."""
    found = _MARKS.search(prompt)
    return found[0] if found else ""


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

    def encode(self, prompt: str) -> tuple[np.ndarray, str]:
        """Returns ids, int64 [length], and the end of the prompt that did not fit ("" when all of it did)."""
        encoding = self._tokenizer.encode(prompt, add_special_tokens=False)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        tokens = [(part, start) for number, (start, _) in found for part in self._runs.get(number, (number,))]
        room = self.length - 2
        dropped = prompt[tokens[room][1] :] if len(tokens) > room else ""
        row = [self.bos, *(number for number, _ in tokens[:room]), self.eos]
        return np.array(row + [self.pad] * (self.length - len(row)), np.int64), dropped
