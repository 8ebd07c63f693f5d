"""Where the samples of a dataset lie: in tar shards, or in a folder of plain files. This module decodes nothing.

for path in shards("photos") or [Path("photos")]:
    entries, problems = scan(path)
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ..errors import DatasetError
from ..pictures import FOREIGN, PICTURES, SPELLINGS

JSON, HANDS_NPZ, PICTURE, UNREAD = range(4)  # a sample's members, and a picture of a format we do not read
BODY = "body.npz"  # in a dataset: the SMPL-H body that its hands are for
PACKED = {".gz": b"\x1f\x8b", ".tgz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ", ".zst": b"\x28\xb5\x2f\xfd"}


@dataclass(frozen=True)
class Bad:
    """A sample that cannot be read (with an empty key: a shard), and a sentence that says why."""

    key: str
    shard: str
    sentence: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.shard, self.key, self.sentence) if part)


class Entry(NamedTuple):
    """Where a sample's members lie: offset and size of `.json`, `.hands.npz` and picture; -1 for a missing member."""

    key: str
    shard: str  # "" for plain files; their offsets are the times of their last changes (ns)
    offsets: tuple[int, int, int]
    sizes: tuple[int, int, int]
    suffix: int = -1  # of SPELLINGS


def shards(folder: str | Path) -> list[Path]:
    """The folder's tar shards by name; an empty list for plain files. Raises DatasetError for a missing folder.

    The list includes compressed shards: `scan` refuses them by name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"The dataset folder {folder} does not exist.")
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    found = [path for path in files if path.suffix == ".tar"]
    if found or not any(path.suffix.lower() == ".json" for path in files):
        found += [path for path in files if path.suffix in PACKED and (path.suffix == ".tgz" or ".tar." in path.name)]
    return sorted(found)


def packed(path: Path) -> str:
    """A shard's compression as the ending of a file's name, such as ".gz"; "" for a plain one."""
    with open(path, "rb") as file:
        start = file.read(8)
    return next((name for name, mark in PACKED.items() if start.startswith(mark)), "")


def scan(path: Path) -> tuple[list[Entry], list[Bad]]:
    """The samples of a tar shard or of a folder of plain files, by their names alone; and the problems found."""
    return _scan_folder(path) if path.is_dir() else _scan_tar(path)


def split_name(name: str) -> tuple[str, int, int] | None:
    """A file's key, member and number in SPELLINGS (-1: not in it); None for a file outside all samples."""
    base = name.rpartition("/")[2].lower()
    if base.startswith((".", "__")) or base.endswith(".hands.png"):
        return None
    if base.endswith(".hands.npz"):
        return name[: -len(".hands.npz")], HANDS_NPZ, -1
    if base.endswith(".json"):
        return name[: -len(".json")], JSON, -1
    for suffix in (*PICTURES, *FOREIGN):
        if base.endswith(suffix):
            spelling = name[-len(suffix) :]
            number = SPELLINGS.index(spelling) if spelling in SPELLINGS else -1
            return name[: -len(suffix)], PICTURE if suffix in PICTURES else UNREAD, number
    return None


class _Group:
    """The members of one sample that the scan has found so far."""

    def __init__(self, key: str, shard: str) -> None:
        self.key, self.shard, self.suffix, self.wrong = key, shard, -1, ""
        self.offsets, self.sizes, self.unread = [-1, -1, -1], [0, 0, 0], ""

    def add(self, member: int, suffix: int, offset: int, size: int, name: str) -> None:
        """name: of the file, for error messages."""
        if member == UNREAD:
            self.unread = name
            return
        if self.offsets[member] >= 0:
            self.wrong = f"It has {('a .json', 'a .hands.npz', 'a picture')[member]} twice. Keep one."
        self.offsets[member], self.sizes[member] = offset, size
        self.suffix = suffix if member == PICTURE else self.suffix
        # `load` joins the key and the ending to the name of a plain file.
        spelling = (".json", ".hands.npz", SPELLINGS[suffix] if suffix >= 0 else "")[member]
        if not self.shard and not (spelling and name.endswith(spelling)):
            self.wrong = f"The ending of {name} must be spelt as usual. Rename it in lower case."

    def has(self, member: int) -> bool:
        return member != UNREAD and self.offsets[member] >= 0

    def members(self) -> int:
        """The number of members found."""
        return sum(offset >= 0 for offset in self.offsets)

    def close(self, entries: list[Entry], problems: list[Bad]) -> None:
        if not self.members():
            return  # only a picture of a format we do not read
        if self.unread and not self.has(PICTURE):
            self.wrong = f"Its picture {self.unread} must be PNG, JPEG or WebP. Convert it first."
        if self.wrong:
            problems.append(Bad(self.key, self.shard, self.wrong))
        else:
            entries.append(Entry(self.key, self.shard, tuple(self.offsets), tuple(self.sizes), self.suffix))  # type: ignore[arg-type]


def scattered(samples: Iterable[Entry | _Group]) -> bool:
    """Whether the members of some sample do not lie side by side. `scan` finds them; WebDataset's own readers take each
    run of them for a sample."""
    found = [[offset for offset in one.offsets if offset >= 0] for one in samples]
    spans = sorted((min(offsets), max(offsets)) for offsets in found if offsets)
    return any(after[0] < before[1] for before, after in pairwise(spans))


def _scan_tar(path: Path) -> tuple[list[Entry], list[Bad]]:
    groups: list[_Group] = []
    latest: dict[str, _Group] = {}  # members of scattered samples join an earlier group
    group: _Group | None = None
    damage = ""
    try:
        form = packed(path)
        if form:
            sentence = f"The shard must be a plain .tar, got {form}: training reads it at random. Unpack it."
            return [], [Bad("", path.name, sentence)]
        length = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                name = split_name(info.name)
                if name is None or not info.isreg():
                    continue
                key, member, suffix = name
                if info.offset_data + info.size > length:
                    raise tarfile.ReadError(f"it ends within {info.name}")
                if group is None or group.key != key:
                    group = latest.get(key)
                    if group is None or group.has(member):
                        group = latest[key] = _Group(key, path.name)
                        groups.append(group)
                group.add(member, suffix, info.offset_data, info.size, info.name)
            end = archive.offset
        with open(path, "rb") as file:  # tarfile stops at a damaged header, as at the end
            file.seek(end)
            if file.read(512).strip(b"\0") or length < end + 512:
                raise tarfile.ReadError(f"what follows byte {end} is damaged or missing")
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        damage = str(getattr(error, "strerror", None) or error)[:200].rstrip(".") or type(error).__name__
    entries: list[Entry] = []
    problems: list[Bad] = []
    # The last sample may lack its picture; in a scattered shard, every sample with fewer members than another may.
    cut = [group] if damage and group is not None else []
    if damage and scattered(groups):
        most = max(map(_Group.members, groups))
        cut = [one for one in groups if one.members() < most]
    incomplete = set(map(id, cut))
    for one in groups:
        if id(one) not in incomplete:
            one.close(entries, problems)
    if damage:
        problems.append(Bad("", path.name, f"The shard is damaged after {len(entries)} samples: {damage}."))
    problems += [Bad(one.key, path.name, "It may be incomplete: its shard is damaged right after it.") for one in cut]
    return entries, problems


def _scan_folder(folder: Path) -> tuple[list[Entry], list[Bad]]:
    groups: dict[str, _Group] = {}
    with os.scandir(folder) as files:
        for file in sorted(files, key=lambda file: file.name):
            name = split_name(file.name)
            if name is not None and file.is_file():
                key, member, suffix = name
                stat = file.stat()
                groups.setdefault(key, _Group(key, "")).add(member, suffix, stat.st_mtime_ns, stat.st_size, file.name)
    entries: list[Entry] = []
    problems: list[Bad] = []
    for key in sorted(groups):
        groups[key].close(entries, problems)
    return entries, problems
