"""Random access to a dataset, and the order in which training sees it: exact to the sample, on any number of processes.

    index = Index.open("photos")
    index.sample(7)                                            # Sample, or Bad with a sentence
    for step, rows in batches(index, seed=0, batch=64, rank=1, world=2, start=5000):
        ...                                                    # global step, this process's 32 samples

All processes share one order: position p of the training is sample p % N of the permutation of (seed, p // N). Step i
takes positions i B ... (i + 1) B, and process r of R takes every R-th of them from r on. So each sample comes once an
epoch, and a run goes on from its step alone, on any number of processes. That needs random access to tar files:
`index.npz` keeps where their members lie, some 80 bytes a sample, made once.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import DatasetError
from ..files import written
from .files import HANDS_NPZ, PICTURE, Bad, Entry, scan, shards
from .samples import GROUP, Sample, load

INDEX = "index.npz"
_FORMAT = 2
_COLUMNS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "offsets": (np.int64, (3,)),
    "sizes": (np.int64, (3,)),
    "suffixes": (np.int8, ()),
    "key_ends": (np.int64, ()),
}


class Index:
    """Where each sample of a dataset lies. Make one with `open`.

    groups: (name, first sample, one after the last) of each shard, or of each GROUP plain files. problems: of the
    shards themselves. The pictures stay on disk.
    """

    def __init__(self, folder: Path, parts: list[_Part]) -> None:
        self.folder = folder
        self.problems = [bad for part in parts for bad in part.problems]
        self.groups: list[tuple[str, int, int]] = []
        self._parts = parts
        first = 0
        for part in parts:
            self.groups.append((part.name, first, first + len(part)))
            first += len(part)
        self._starts = np.array([start for _, start, _ in self.groups], np.int64)
        self._length = first

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Reads the folder's index, and indexes shards that are new or changed (about a second a GB).

        Raises DatasetError where the folder is missing or holds no sample.
        """
        folder = Path(folder)
        tars = shards(folder)
        if tars:
            known = {part.stamp: part for part in _read(folder / INDEX)}
            stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in tars]
            fresh = any(stamp not in known for stamp in stamps)
            parts = [
                known[stamp] if stamp in known else _Part.of(path.name, *scan(path), stamp)
                for path, stamp in zip(tars, stamps, strict=True)
            ]
            if fresh:
                _write(folder / INDEX, parts)
        else:
            entries, problems = scan(folder)
            parts = [
                _Part.of(f"files-{start // GROUP:05d}", entries[start : start + GROUP], [])
                for start in range(0, len(entries), GROUP)
            ]
            if parts:
                parts[0].problems = problems
        index = cls(folder, parts)
        if not len(index):
            why = f" {index.problems[0]}" if index.problems else ""
            raise DatasetError(f"{folder} holds no samples: neither .tar shards nor <key>.json files.{why}")
        return index

    def __len__(self) -> int:
        return self._length

    def entry(self, i: int) -> Entry:
        """Where sample i lies."""
        if not 0 <= i < self._length:
            raise IndexError(i)
        number = int(np.searchsorted(self._starts, i, "right")) - 1
        return self._parts[number].entry(i - int(self._starts[number]))

    def sample(self, i: int) -> Sample | Bad:
        """Reads sample i."""
        return load(self.folder, self.entry(i))

    @property
    def has_picture(self) -> np.ndarray:
        """Which samples come with a picture: bool [N]."""
        return np.concatenate([part.offsets[:, PICTURE] >= 0 for part in self._parts])

    @property
    def has_hands(self) -> np.ndarray:
        """Which samples come with a `.hands.npz`: bool [N]."""
        return np.concatenate([part.offsets[:, HANDS_NPZ] >= 0 for part in self._parts])

    def digests(self) -> list[str]:
        """A hash of each group's layout: which keys, where and how large."""
        return [part.digest() for part in self._parts]

    def path(self, group: int) -> Path | None:
        """The tar file of a group; None for plain files."""
        stamp = self._parts[group].stamp
        return self.folder / stamp[0] if stamp[0] else None


class _Part:
    """The entries of one shard, as arrays: a million samples as Python objects would be a GB."""

    def __init__(
        self, name: str, arrays: dict[str, np.ndarray], keys: bytes, stamp: tuple[str, int, int], problems: list[Bad]
    ) -> None:
        self.name, self.keys, self.stamp, self.problems = name, keys, stamp, problems
        self.offsets, self.sizes = arrays["offsets"], arrays["sizes"]
        self.suffixes, self.key_ends = arrays["suffixes"], arrays["key_ends"]

    @classmethod
    def of(
        cls, name: str, entries: Sequence[Entry], problems: list[Bad], stamp: tuple[str, int, int] = ("", 0, 0)
    ) -> _Part:
        keys = [entry.key.encode("utf-8", "surrogateescape") for entry in entries]
        values = {
            "offsets": [entry.offsets for entry in entries],
            "sizes": [entry.sizes for entry in entries],
            "suffixes": [entry.suffix for entry in entries],
            "key_ends": np.cumsum([len(key) for key in keys]),
        }
        arrays = {
            column: np.array(values[column], kind).reshape(-1, *shape) for column, (kind, shape) in _COLUMNS.items()
        }
        return cls(name, arrays, b"".join(keys), stamp, problems)

    def __len__(self) -> int:
        return len(self.suffixes)

    def entry(self, i: int) -> Entry:
        start = int(self.key_ends[i - 1]) if i else 0
        key = self.keys[start : int(self.key_ends[i])].decode("utf-8", "surrogateescape")
        offsets, sizes = self.offsets[i].tolist(), self.sizes[i].tolist()
        return Entry(key, self.stamp[0], tuple(offsets), tuple(sizes), int(self.suffixes[i]))

    def digest(self) -> str:
        digest = hashlib.sha256(self.keys)
        for array in (self.key_ends, self.offsets, self.sizes):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _write(path: Path, parts: list[_Part]) -> None:
    """Keeps the index. In a folder that cannot be written, `Index.open` makes it again each time."""
    arrays: dict[str, Any] = {column: np.concatenate([getattr(part, column) for part in parts]) for column in _COLUMNS}
    arrays["format"] = np.array(_FORMAT)
    arrays["names"] = np.array([part.stamp[0] for part in parts])
    arrays["stamps"] = np.array([part.stamp[1:] for part in parts], np.int64)
    arrays["counts"] = np.array([(len(part), len(part.keys)) for part in parts], np.int64)
    arrays["keys"] = np.frombuffer(b"".join(part.keys for part in parts), np.uint8)
    arrays["problems"] = np.array(
        [(b.key, b.shard, b.sentence) for part in parts for b in part.problems] or [("",) * 3]
    )
    with contextlib.suppress(OSError), written(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _read(path: Path) -> list[_Part]:
    """The parts of a kept index; an empty list where it is missing, damaged or of another version."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            held = {name: archive[name] for name in archive.files}
        if int(held["format"]) != _FORMAT:
            return []
        keys, out, first, byte = held["keys"].tobytes(), [], 0, 0
        problems: dict[str, list[Bad]] = {}
        for key, shard, sentence in held["problems"].tolist():
            problems.setdefault(shard, []).append(Bad(key, shard, sentence))
        counts = held["counts"].tolist()
        rows, size = (sum(column) for column in zip(*counts, strict=True))
        if size != len(keys) or any(
            held[column].shape != (rows, *shape) or held[column].dtype != kind
            for column, (kind, shape) in _COLUMNS.items()
        ):
            return []
        for name, stamp, (count, length) in zip(held["names"].tolist(), held["stamps"].tolist(), counts, strict=True):
            arrays = {column: held[column][first : first + count] for column in _COLUMNS}
            own = keys[byte : byte + length]
            out.append(_Part(name, arrays, own, (name, *stamp), problems.get(name, [])))
            first, byte = first + count, byte + length
        return out
    except Exception:  # `Index.open` makes the index again
        return []


# --- the order ---


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: int64 [count], the same on every machine and with every numpy.

    Sorted by SplitMix64 (Steele et al. 2014) of (seed, epoch, number): numpy's own shuffles change between versions.
    """
    key = _mix(_mix(np.array([seed % 2**64], np.uint64)) + np.uint64(epoch % 2**64))
    with np.errstate(over="ignore"):
        return np.argsort(_mix(np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key), kind="stable")


def _mix(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def batches(
    index: Sized,
    seed: int,
    batch: int,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    among: Sequence[int] | np.ndarray | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yields (global step, this process's sample numbers) for all steps from `start` on, without end.

    batch: samples a step, of all processes together. rank, world: which process of how many. among: the samples to
    draw from (a LatentCache's `usable`, or a part without the held-out ones); all by default. The last batch of an
    epoch takes its missing samples from the next epoch. Raises DatasetError where `among` is empty.
    """
    rows = np.arange(len(index)) if among is None else np.asarray(among, np.int64)
    if not len(rows):
        raise DatasetError(
            "The dataset must have one sample to train on, got 0: all were left out. hd-data check says why."
        )
    if batch < world or not 0 <= rank < world:
        raise DatasetError(f"batch must be at least {world}, one sample for each process, got {batch}.")
    orders: dict[int, np.ndarray] = {}
    step = start
    while True:
        positions = np.arange(step * batch + rank, (step + 1) * batch, world)
        epochs, places = np.divmod(positions, len(rows))
        needed = np.unique(epochs).tolist()
        orders = {e: orders[e] if e in orders else permutation(len(rows), seed, e) for e in needed}
        yield step, [int(rows[orders[int(e)][place]]) for e, place in zip(epochs, places, strict=True)]
        step += 1


class Samples(IterableDataset):
    """The samples of `batches` for a DataLoader, read and prepared by its workers, in the same order for any number.

        DataLoader(Samples(index, 0, 64, prepare=prepare), batch_size=None, num_workers=4)

    Yields (global step, prepare(samples)). An unreadable sample comes as a Bad in its place in the batch: `prepare`
    decides what to do with it, and runs in the workers.
    """

    def __init__(
        self, index: Index, seed: int, batch: int, *, prepare: Callable[[list[Sample | Bad]], Any], **where: Any
    ) -> None:
        """where: rank, world, start, among of `batches`."""
        self.index, self.seed, self.batch, self.prepare, self.where = index, seed, batch, prepare, where

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        for number, (step, rows) in enumerate(batches(self.index, self.seed, self.batch, **self.where)):
            if number % workers == worker:  # a DataLoader asks its workers in turn
                yield step, self.prepare([self.index.sample(row) for row in rows])
