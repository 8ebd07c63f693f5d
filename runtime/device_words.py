"""From token ids to keys and values on a GPU: the text encoder, the weights of prompts, `unet_context`.

    words = DeviceWords(staging, graphs, stream, slots)
    words.encode(side, works, empty)       # enqueues; hand features must be there

Weights act on the host (`words.py`). It waits for the encoder's states, in batches with such a prompt alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..engines.cuda import DeviceArray
from .device_graphs import DeviceGraph, Staging
from .reading import MASK
from .results import Work
from .words import Key, Wanted, is_plain

BITS = "uint16"  # of bfloat16 on the host: numpy lacks it


class DeviceWords:
    """graphs: the bundle's, as `DeviceGraph`. slots: rows of a batch."""

    def __init__(self, staging: Staging, graphs: dict[str, DeviceGraph], stream: Any, slots: int) -> None:
        self.staging, self.slots = staging, slots
        self.encoder, self.keys = graphs["text_hand_encoder"], graphs["unet_context"]
        if (mask := self.encoder.inputs.get(MASK)) is not None:  # all tokens count
            staging.upload(stream, mask, np.ones(mask.shape, np.int64))

    def encode(self, stream: Any, works: list[Work], empty: np.ndarray) -> None:
        """Enqueues keys and values of these works, row by row. empty: ids of the empty prompt [77]."""
        count, ids = len(works), self.encoder.inputs["input_ids"]
        wanted = Wanted(works, empty)
        states = self._states(stream, wanted)
        self.staging.upload(stream, ids[:count], np.stack([work.ids for work in works]))
        self.encoder.launch(stream, count)
        if wanted.works:
            context = self.encoder.outputs["context"]
            own = self._read(stream, context[:count])
            for row, work in enumerate(works):
                if not is_plain(work):
                    value = wanted.context(work, _floats(own[row], context.dtype), states)
                    self._write(stream, context[row], _stored(value, context.dtype))
        self.keys.launch(stream, count)

    def _states(self, stream: Any, wanted: Wanted) -> dict[Key, np.ndarray]:
        """Runs the encoder over `wanted.rows`. Its words never read hands, so those of any request may lie there."""
        ids, mask = self.encoder.inputs["input_ids"], self.encoder.inputs.get(MASK)
        context: Any = self.encoder.outputs["context"]
        rows, states = list(wanted.rows.items()), dict[Key, np.ndarray]()
        for start in range(0, len(rows), self.slots):
            some = rows[start : start + self.slots]
            for target, values in ((ids, [one for _, (one, _) in some]), (mask, [one for _, (_, one) in some])):
                if target is not None:
                    self.staging.upload(stream, target[: len(some)], np.stack(values)[:, None].repeat(2, 1))
            self.encoder.launch(stream, len(some))
            read = self._read(stream, context[: len(some)])
            words = _floats(read[:, -1, : ids.shape[2]], context.dtype)
            states |= {key: words[row] for row, (key, _) in enumerate(some)}
        if rows and mask is not None:
            self.staging.upload(stream, mask, np.ones(mask.shape, np.int64))
        return states

    def _read(self, stream: Any, source: Any) -> np.ndarray:
        """A copy on the host, for which it waits."""
        source = _bits(source)
        pinned = self.staging.take(tuple(source.shape), source.dtype)
        stream.copy(pinned, source)
        stream.record().synchronize()
        value: np.ndarray = pinned.copy()
        self.staging.give(pinned)
        return value

    def _write(self, stream: Any, target: Any, value: np.ndarray) -> None:
        pinned = self.staging.take(value.shape, value.dtype)
        pinned[...] = value
        stream.copy(_bits(target), pinned)
        self.staging.busy.append((stream.record(), pinned))


def _bits(array: DeviceArray) -> DeviceArray:
    """The same memory, as numbers that numpy has."""
    if array.dtype != "bfloat16":
        return array
    return DeviceArray(array.pointer, array.shape, BITS, array.owner or array)


def _floats(value: np.ndarray, dtype: Any) -> np.ndarray:
    """float32 of what lies on the device. bfloat16, which numpy lacks, is its upper half."""
    if dtype != "bfloat16":
        return value.astype(np.float32)
    return (value.astype(np.uint32) << 16).view(np.float32)


def _stored(value: np.ndarray, dtype: Any) -> np.ndarray:
    """The inverse of `_floats`, rounded to the nearest."""
    if dtype != "bfloat16":
        return value.astype(dtype)
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(BITS)
