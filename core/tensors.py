"""Reads tensors from a safetensors file as numpy arrays, without the library of that name.

    file = TensorFile(Path("style.safetensors"))
    file.shapes["unet.conv_in.lora_A.weight"]      # (4, 4, 3, 3), from the header alone
    file.read("unet.conv_in.lora_A.weight")        # bfloat16 comes as float32, which holds it exactly

The layout: eight bytes with the length of a JSON header, the header, and the tensors' bytes
(https://github.com/huggingface/safetensors#format). A file is data from outside: every number is checked before use.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct

from .schema import MisfitError, fit, parse_json

MAX_HEADER = 100_000_000  # bytes, as in the library
MAX_ELEMENTS = 1 << 40
# The types of a file, in its words -> numpy's; bfloat16 is read as its sixteen bits.
TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_Size = Annotated[int, Meta(ge=0, le=MAX_ELEMENTS)]


class Entry(Struct):
    """What the header says of a tensor. data_offsets: its first byte and the one behind its last, after the header."""

    dtype: Annotated[str, Meta(max_length=20)]
    shape: Annotated[tuple[_Size, ...], Meta(max_length=16)]
    data_offsets: tuple[_Size, _Size]


class TensorFile:
    """A file's header; `read` gives its tensors. Raises OSError, or MisfitError for a file that is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
                raise MisfitError("its header is longer than the file")
            header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise MisfitError("its header must be an object")
        self.metadata: dict[str, str] = fit(header.pop("__metadata__", None) or {}, dict[str, str])
        self._start = 8 + length
        self._entries = {name: self._entry(name, value, size - self._start) for name, value in header.items()}
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor, copied. Raises OSError, and MisfitError for a type that numpy lacks."""
        entry = self._entries[name]
        if entry.dtype not in TYPES:
            raise MisfitError(f"{name} is of the type {entry.dtype}, which is not read")
        with open(self.path, "rb") as file:
            file.seek(self._start + entry.data_offsets[0])
            content = file.read(entry.data_offsets[1] - entry.data_offsets[0])
        array = np.frombuffer(content, TYPES[entry.dtype]).reshape(entry.shape)
        return widened(array) if entry.dtype == "BF16" else array.copy()

    def _entry(self, name: str, value: Any, room: int) -> Entry:
        entry = fit(value, Entry)
        begin, end = entry.data_offsets
        held = math.prod(entry.shape) * np.dtype(TYPES[entry.dtype]).itemsize if entry.dtype in TYPES else end - begin
        if not begin <= end <= room or held != end - begin:
            raise MisfitError(f"{name} lies outside of the file, or is of another size than its shape")
        return entry


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as uint16 of its bits -> the same numbers in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def narrowed(array: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, ties to even, as uint16. NaN stays NaN."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded).astype(np.uint16).reshape(array.shape)
