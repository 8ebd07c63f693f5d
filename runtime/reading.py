"""The prompts of requests as a bundle's text encoder reads them, and what it does not read of them.

reader = Reader(manifest, PromptTokenizer(folder / TOKENIZER, manifest.tokenizer))
reading = reader.read(request, "prompt")        # RequestError for a prompt that is too long
reader.unread(request, "prompt")                # sentences
"""

from __future__ import annotations

from ..contract import MAX_CHUNKS, Manifest
from ..errors import RequestError
from ..prompts import foreign, parse
from ..tokens import PromptTokenizer, Reading
from .requests import Request

READINGS = 64  # in the cache
MASK = "attention_mask"  # input of the text encoder for weights below 1, which older bundles lack
PROMPTS = ("negative_prompt", "prompt")  # in the order of the guidance branches
AGAIN = "To have all of it read, export the bundle again: hd-export CHECKPOINT OUT."


class Reader:
    """engine_chunks: chunks of a prompt that the engines take; None: as many as the graphs."""

    def __init__(self, manifest: Manifest, tokenizer: PromptTokenizer) -> None:
        self.tokenizer = tokenizer
        self.chunks = MAX_CHUNKS if manifest.any_length else 1
        self.engine_chunks: int | None = None
        self.weakens = any(tensor.name == MASK for tensor in manifest.graphs["text_hand_encoder"].inputs)
        self._readings: dict[tuple[str, str, bool], Reading] = {}

    def read(self, request: Request, name: str) -> Reading:
        """One of PROMPTS of a request. Raises RequestError for one that is too long, and for impossible weights."""
        key = (getattr(request, name), name, request.plain_prompts)
        if key in self._readings:
            return self._readings[key]
        reading = self.tokenizer.read(*key, self.chunks, self.weakens)
        if len(self._readings) >= READINGS:
            self._readings.pop(next(iter(self._readings)))
        self._readings[key] = reading
        return reading

    def check(self, request: Request) -> None:
        """Raises RequestError as `read` does, and for prompts that these engines do not take."""
        for name in PROMPTS:
            reading = self.read(request, name)
            if name == "negative_prompt" and request.guidance == 1:  # off, and never read
                continue
            if len(reading.ids) > (most := self.engine_chunks or self.chunks):
                raise RequestError(
                    f"{name} must fit into {most} chunk of {self.tokenizer.room} tokens with these engines, got "
                    f"{reading.tokens:,} tokens in {len(reading.ids)} chunks. Shorten it, or set plain_prompts, which "
                    "cuts it. --backend onnxruntime --device cpu reads all of it.",
                    name,
                )

    def unread(self, request: Request, name: str) -> list[str]:
        """Sentences about text that was cut off, and about marks without meaning."""
        text, reading, what = getattr(request, name), self.read(request, name), name.replace("_", " ")
        said = []
        if reading.cut:
            dropped = reading.cut.strip()
            excerpt = dropped if len(dropped) <= 200 else dropped[:200] + " ..."
            again = "" if request.plain_prompts or self.chunks > 1 else f". {AGAIN}"
            said.append(
                f"The {what} is longer than {self.tokenizer.room} tokens. This part was cut: {excerpt!r}{again}"
            )
        if request.plain_prompts:
            return said
        parts = parse(text, name)
        if self.chunks == 1 and len(parts) > 1:
            said.append(f"The {what} has BREAK, which this bundle reads as a space. {AGAIN}")
        if not self.weakens and any(weight < 1 for part in parts for _, weight in part):
            said.append(f"The {what} has weights below 1, which this bundle reads as 1. {AGAIN}")
        if mark := foreign(text):
            said.append(f"The {what} has {mark[:60]!r}. It changes nothing between steps here: all words are read.")
        return said
