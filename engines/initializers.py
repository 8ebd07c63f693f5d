"""The weights of an ONNX file, read and replaced without the `onnx` package: `hd-run` does without it.

    graph = OnnxWeights(Path("bundle/unet.onnx"))
    graph.shapes["unet.conv_in.weight"]                    # (320, 4, 3, 3)
    graph.write(Path("merged/unet.onnx"), {"unet.conv_in.weight": merged})

It walks the protocol buffer's outer fields (https://protobuf.dev/programming-guides/encoding, onnx.proto) and copies
everything but the replaced tensors byte for byte. Weights of large graphs lie in a file beside the graph, and stay
beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import BundleError
from ..tensors import narrowed, widened

# Numbers of fields in onnx.proto.
GRAPH = 7  # of a model
INITIALIZER, VALUE_INFO = 5, 13  # of a graph
DIMS, DATA_TYPE, NAME, RAW_DATA, EXTERNAL, LOCATION = 1, 2, 8, 9, 13, 14  # of a tensor
FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16  # types of tensors; bfloat16 is read as its sixteen bits
TYPES: dict[int, np.dtype[Any]] = {FLOAT: np.dtype("<f4"), FLOAT16: np.dtype("<f2"), BFLOAT16: np.dtype("<u2")}
ALIGNED = 64  # bytes: ONNX's writers begin each tensor of a file of weights at such a multiple, for mapping
BLOCK = 1 << 24


@dataclass(frozen=True)
class Stored:
    """An initializer of floating-point numbers: its bytes are `size` from `start` on, in the graph or beside it."""

    kind: int
    shape: tuple[int, ...]
    start: int
    size: int
    beside: str  # the file of weights beside the graph; "": in the graph


class OnnxWeights:
    """The floating-point initializers of a graph. Raises OSError, BundleError for another file."""

    def __init__(self, path: Path) -> None:
        self.path, self._content = path, memoryview(path.read_bytes())
        try:
            graph = next(value for number, value, _ in _fields(self._content) if number == GRAPH)
            self._graph = list(_fields(graph))
            found = [self._stored(value) for number, value, _ in self._graph if number == INITIALIZER]
        except (IndexError, StopIteration, TypeError, ValueError) as error:
            raise BundleError(f"{path} is not an ONNX graph. Export the bundle again with hd-export.") from error
        self.tensors = {name: stored for name, stored in found if stored is not None}
        self.shapes = {name: stored.shape for name, stored in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """An initializer's numbers as float32, which holds all types exactly."""
        stored = self.tensors[name]
        if stored.beside:
            with open(self.path.with_name(stored.beside), "rb") as file:
                file.seek(stored.start)
                content: bytes | memoryview = file.read(stored.size)
        else:
            content = self._content[stored.start : stored.start + stored.size]
        array = np.frombuffer(content, TYPES[stored.kind]).reshape(stored.shape)
        return widened(array) if stored.kind == BFLOAT16 else array.astype(np.float32)

    def most(self, name: str, wide: bool) -> float:
        """The largest number that an initializer holds. wide: see `write`."""
        return 65504.0 if self.tensors[name].kind == FLOAT16 and not wide else float(np.finfo(np.float32).max)

    def write(self, path: Path, new: Mapping[str, np.ndarray], wide: frozenset[str] = frozenset()) -> None:
        """Writes the graph to another folder, with other numbers in some initializers. A file of weights is written
        beside it.

        new: float32 arrays of the old shapes; they are rounded to the initializer's type. wide: initializers that
        become float32 instead. Raises OSError, such as for a full disk.
        """
        beside = {stored.beside for stored in self.tensors.values() if stored.beside}
        arrays = {name: self._encoded(name, array, name in wide) for name, array in new.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not beside:
            self._write_graph(path, {name: _tensor(name, *one) for name, one in arrays.items()})
            return
        (file_name,) = beside  # our exporter writes one
        lies = path.with_name(file_name)
        gone = [(one.start, one.start + one.size) for one in map(self.tensors.__getitem__, arrays) if one.beside]
        _copy(self.path.with_name(file_name), lies, gone)
        replaced = {}
        with open(lies, "r+b") as file:
            for name, (kind, array) in arrays.items():
                stored = self.tensors[name]
                start = stored.start if stored.beside and array.nbytes <= stored.size else _end(file)
                file.seek(start)
                file.write(array.data)
                replaced[name] = _tensor(name, kind, array, (file_name, start))
        self._write_graph(path, replaced)

    def _encoded(self, name: str, array: np.ndarray, wide: bool) -> tuple[int, np.ndarray]:
        stored = self.tensors[name]
        assert array.shape == stored.shape, f"{name}: {array.shape} for {stored.shape}"
        if wide or stored.kind == FLOAT:
            return FLOAT, np.ascontiguousarray(array, TYPES[FLOAT])
        if stored.kind == BFLOAT16:
            return BFLOAT16, narrowed(array)
        return FLOAT16, np.ascontiguousarray(array.astype(TYPES[FLOAT16]))

    def _write_graph(self, path: Path, replaced: Mapping[str, bytes]) -> None:
        parts: list[bytes | memoryview] = []
        for number, value, whole in self._graph:
            if number == INITIALIZER and (name := _name(value, NAME)) in replaced:
                parts.append(_field(INITIALIZER, replaced[name]))
            elif number != VALUE_INFO or _name(value, 1) not in replaced:  # it would contradict another type
                parts.append(whole)
        with open(path, "wb") as file:
            for number, _, whole in _fields(self._content):
                if number != GRAPH:
                    file.write(whole)
                    continue
                file.write(_varint(GRAPH << 3 | 2) + _varint(sum(map(len, parts))))
                for part in parts:
                    file.write(part)

    def _stored(self, tensor: memoryview | int) -> tuple[str, Stored | None]:
        """The name of a TensorProto and where its numbers are; None for other types and forms."""
        name, kind, shape, external = "", 0, list[int](), dict[str, str]()
        raw: memoryview | None = None
        for number, value, _ in _fields(tensor):
            if number == NAME:
                name = bytes(value).decode()
            elif number == DATA_TYPE:
                kind = value  # type: ignore[assignment]
            elif number == DIMS:
                shape += [value] if isinstance(value, int) else [n for n, _ in _varints(value)]
            elif number == RAW_DATA:
                assert isinstance(value, memoryview)
                raw = value
            elif number == EXTERNAL:
                external[_name(value, 1)] = _name(value, 2)
        if kind not in TYPES or (raw is None and "location" not in external):
            return name, None
        size = int(np.prod(shape, dtype=np.int64)) * TYPES[kind].itemsize
        if raw is not None:
            start, beside = _place(raw, self._content), ""
        else:
            start, beside = int(external.get("offset", 0)), external["location"]
            if not self.path.with_name(beside).resolve().parent == self.path.resolve().parent:
                raise ValueError(beside)
        if raw is not None and len(raw) != size:
            raise ValueError(name)
        return name, Stored(kind, tuple(shape), start, size, beside)


def _place(part: memoryview, whole: memoryview) -> int:
    """Where a part of a buffer begins in it."""
    first, all_ = (np.frombuffer(view, np.uint8).__array_interface__["data"][0] for view in (part, whole))
    return int(first - all_)


def _fields(message: memoryview | int) -> Iterator[tuple[int, memoryview | int, memoryview]]:
    """(number, value, the whole field) of each field of a message. Raises ValueError, IndexError for other bytes."""
    assert isinstance(message, memoryview)
    at, end = 0, len(message)
    while at < end:
        start = at
        key, at = _read_varint(message, at)
        value: memoryview | int
        if key & 7 == 0:
            value, at = _read_varint(message, at)
        else:
            if key & 7 == 2:
                length, at = _read_varint(message, at)
            else:
                length = {1: 8, 5: 4}[key & 7] if key & 7 in (1, 5) else end + 1
            if at + length > end:
                raise ValueError("a field is longer than its message")
            value, at = message[at : at + length], at + length
        yield key >> 3, value, message[start:at]


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")


def _varints(packed: memoryview) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(packed):
        value, at = _read_varint(packed, at)
        yield value, at


def _name(message: memoryview | int, wanted: int) -> str:
    """A text in a message."""
    assert isinstance(message, memoryview)
    return next((bytes(value).decode() for number, value, _ in _fields(message) if number == wanted), "")  # type: ignore[arg-type]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _tensor(name: str, kind: int, array: np.ndarray, place: tuple[str, int] | None = None) -> bytes:
    """A TensorProto. place: the file of weights and the offset in it; None: with its numbers."""
    parts = [_field(DIMS, size) for size in array.shape]
    parts += [_field(DATA_TYPE, kind), _field(NAME, name.encode())]
    if place is None:
        return b"".join([*parts, _field(RAW_DATA, array.tobytes())])
    for key, value in {"location": place[0], "offset": str(place[1]), "length": str(array.nbytes)}.items():
        parts.append(_field(EXTERNAL, _field(1, key.encode()) + _field(2, value.encode())))
    return b"".join([*parts, _field(LOCATION, 1)])


def _copy(source: Path, target: Path, without: list[tuple[int, int]]) -> None:
    """Copies a file but for some ranges, which become holes: they take no room where the file system knows holes."""
    with open(source, "rb") as old, open(target, "wb") as new:
        size, at = old.seek(0, 2), 0
        for start, stop in [*sorted(without), (size, size)]:
            old.seek(at)
            new.seek(at)
            while at < start:
                block = old.read(min(BLOCK, start - at))
                new.write(block)
                at += len(block) or start  # a file that is cut off meanwhile fails its check
            at = max(at, stop)
        new.truncate(size)


def _end(file: IO[bytes]) -> int:
    """The next aligned place behind a file's end."""
    return -(-file.seek(0, 2) // ALIGNED) * ALIGNED
