"""Prompts with weights and of several chunks: what becomes of the text encoder's states before the UNet reads them.

    wanted = Wanted(works)
    states = {key: context for each ids, mask of wanted.rows}        # the loop runs its encoder over them
    context = wanted.context(work, own, states)                      # [G, L, W] instead of the encoder's own

The encoder reads the first chunk together with the hands, and every other chunk apart. Their states follow each other
in the context, and the shorter prompt of the two is filled up with the empty prompt. So is a diffusers pipeline's
`prompt_embeds` that compel makes (https://github.com/damian0815/compel, 2.5).

Weights act on the states as in compel. A state z with weight w becomes e + w (z - e), where e is the empty prompt's. A
text with a weight below 1 also pulls all states of its part towards z', those of a prompt whose other words do not read
this text: (z + t z') / (1 + t), t = tan((1 - w) pi/2). Hand tokens keep what they have read of the words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..tokens import Reading
from .requests import Request
from .results import Work

LEAST = 1e-5  # of a weight, in t, which is infinite at 0
Key = bytes  # of token ids and their mask


def chunks_of(work: Work) -> int:
    """Chunks of a request's context: those of the longer of its prompts, if both are read."""
    return chunks_read(work.readings, work.request)


def chunks_read(readings: Sequence[Reading], request: Request) -> int:
    """As `chunks_of`. readings: of the negative prompt and of the prompt."""
    negative, prompt = readings
    return max(len(prompt.ids), len(negative.ids) if request.guidance != 1 else 1)


def is_plain(work: Work) -> bool:
    """Whether the encoder's own context is that of the request."""
    return chunks_of(work) == 1 and not any(reading.weighted for reading in work.readings)


class Wanted:
    """What the encoder must read beside the first chunks of these requests, and what follows from it.

    rows: key -> (ids [length], attention mask [length]), int64.
    """

    def __init__(self, works: Iterable[Work], empty: np.ndarray) -> None:
        """empty: ids of the empty prompt [length]."""
        self.works = [work for work in works if not is_plain(work)]
        self.rows: dict[Key, tuple[np.ndarray, np.ndarray]] = {}
        self.empty = self._want(empty, np.ones_like(empty)) if self.works else b""
        for work in self.works:
            for reading in work.readings:
                for ids in reading.ids[1:]:
                    self._want(ids, np.ones_like(ids))
                for first, last, weakened in reading.parts:
                    for weak in weakened:
                        for chunk, mask in _masks(reading, first, last, weak.start, weak.stop):
                            self._want(reading.ids[chunk], mask)

    def _want(self, ids: np.ndarray, mask: np.ndarray) -> Key:
        key = _key(ids, mask)
        self.rows.setdefault(key, (ids, mask))
        return key

    def context(self, work: Work, own: np.ndarray, states: Mapping[Key, np.ndarray]) -> np.ndarray:
        """The context [G, L, W] of one of `works`. own: what the encoder gave for its first chunks and its hands,
        [G, 77 + hands, W]. states: key -> what it gave for the words of a row of `rows`, float32 [77, W]."""
        length, chunks = work.ids.shape[1], chunks_of(work)
        branches = []
        for row, reading in zip(own, work.readings[-len(own) :], strict=True):
            read = self._weighed(reading, row[:length].astype(np.float32), states)[:chunks]
            read += [states[self.empty]] * (chunks - len(read))
            branches.append(np.concatenate([read[0].astype(own.dtype), row[length:], *read[1:]]).astype(own.dtype))
        return np.stack(branches)

    def _weighed(self, reading: Reading, first: np.ndarray, states: Mapping[Key, np.ndarray]) -> list[np.ndarray]:
        """The states of each chunk, [77, W]. first: those of the first one, as the encoder gave them."""
        empty = states[self.empty]

        def weigh(chunk: int, z: np.ndarray) -> np.ndarray:
            weights = reading.weights[chunk][:, None]
            return np.where(weights == 1, z, empty + (z - empty) * weights)

        plain = [first, *(states[_key(ids, np.ones_like(ids))] for ids in reading.ids[1:])]
        read = [weigh(chunk, z) for chunk, z in enumerate(plain)]
        for start, stop, weakened in reading.parts:
            total, sums = 1.0, {chunk: read[chunk].astype(np.float64) for chunk in range(start, stop)}
            for weak in weakened:
                pull = math.tan((1 - max(weak.weight, LEAST)) * math.pi / 2)
                total += pull
                masks = dict(_masks(reading, start, stop, weak.start, weak.stop))
                for chunk in sums:
                    masked = chunk in masks
                    z = states[_key(reading.ids[chunk], masks[chunk])] if masked else plain[chunk]
                    sums[chunk] += pull * weigh(chunk, z)
            if weakened:
                for chunk, value in sums.items():
                    read[chunk] = (value / total).astype(np.float32)
        return read


def _key(ids: np.ndarray, mask: np.ndarray) -> Key:
    return ids.tobytes() + mask.tobytes()


def _masks(reading: Reading, first: int, last: int, start: int, stop: int) -> Sequence[tuple[int, np.ndarray]]:
    """(chunk, attention mask) of each chunk in first ... last - 1 with tokens of start ... stop - 1."""
    length = reading.ids.shape[1]
    mask = np.ones(reading.ids.shape, np.int64)
    mask.reshape(-1)[start:stop] = 0
    mask[:, [0, -1]] = 1  # begin and end are read, also where the text goes on in the next chunk
    return [
        (chunk, mask[chunk]) for chunk in range(first, last) if chunk * length < stop and start < (chunk + 1) * length
    ]
