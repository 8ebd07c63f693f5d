"""Finds the problems of a dataset's samples, and moves these samples aside.

    report = check("photos", body)
    report.problems      # Problem(key, shard, kind, sentence)
    set_aside("photos", report.problems)        # into photos/aside/

Reading finds damaged files and arrays that are missing, misshapen or not finite. `check` also finds keys that come
twice, pictures that cannot be decoded or are small, hands with joints outside the picture, poses that contradict
joints_2d, and captions that name the other hand.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from ..commands import end_with_parent, undisturbed
from ..errors import DatasetError
from ..models.hand_features import MIN_IN_FRAME
from ..models.smplh import SMPLH
from ..schema import MisfitError
from .augment import Hands
from .conventions import conventions
from .files import Bad, Entry, packed, scan, scattered, shards, split_name
from .hands import joints_in_picture, present
from .samples import GROUP, Sample, load, person, picture

ASIDE = "aside"
MIN_SIZE = 64  # pixels of a picture's shorter side
BATCH = 64
STAYS = ("packed", "scattered")  # problems of a shard's packing: its samples are right
SCATTERED = (
    "The members of its samples must lie side by side for other readers of WebDataset; training reads it as it is. "
    "Unpack it, and pack it again with tar --sort=name."
)

_NAMED = re.compile(
    r"(?<!on the )(?<!to the )(?<!at the )\b(left|right) (?:[\w-]+ ){0,3}?"
    r"(?:hand|fist|palm|thumb|finger|pinky|wrist)s?\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Problem:
    """One problem. at: offsets of the sample's members in its shard, by which `set_aside` finds it."""

    key: str
    shard: str
    kind: str  # unreadable, packed, scattered, twice, no picture, small, outside, apart, words
    sentence: str
    at: tuple[int, ...] = ()

    def __str__(self) -> str:
        return str(Bad(self.key, self.shard, self.sentence))


@dataclass
class Report:
    """The problems, and counts: samples, pictures, people, dropped (all people but the most visible one of a picture,
    the one that training takes), hands 0, hands 1, ... (samples that show this number of hands), unknown (samples
    whose hands are not annotated)."""

    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def check(
    folder: str | Path,
    body: SMPLH,
    *,
    min_size: int = MIN_SIZE,
    processes: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Reads and checks every sample. body: places the joints. on_progress: called with (shards done, shards in all)."""
    folder = Path(folder)
    jobs = [(path, 0, None) for path in shards(folder)] or _plain_jobs(folder)
    total, report = len(jobs), Report()
    keys: dict[str, str] = {}
    work = partial(_check_shard, folder=folder, body=body, min_size=min_size)
    if processes == 1 or total == 1:
        parts: Iterable[tuple[list[Problem], Counter[str], list[Entry]]] = map(work, jobs)
        pool = None
    else:
        # multiprocessing's Pool waits for ever for a process that was killed.
        pool = ProcessPoolExecutor(min(processes, total), get_context("spawn"), begin_worker)
        with undisturbed():
            parts = pool.map(work, jobs)
    try:
        for done, (problems, counts, entries) in enumerate(parts, 1):
            report.problems += problems
            report.counts += counts
            for entry in entries:
                if entry.key in keys:
                    where = keys[entry.key] or "the folder"
                    sentence = f"Its key is in {where} already. Give it another one."
                    report.problems.append(Problem(entry.key, entry.shard, "twice", sentence, entry.offsets))
                else:
                    keys[entry.key] = entry.shard
            if on_progress is not None:
                on_progress(done, total)
    except BrokenProcessPool:
        raise DatasetError(
            "The system killed a process that reads, most often for lack of memory. Take fewer --processes."
        ) from None
    finally:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
    if not report.counts["samples"] and not report.problems:
        raise DatasetError(f"{folder} holds no samples: neither .tar shards nor <key>.json files.")
    return report


def _plain_jobs(folder: Path) -> list[tuple[Path, int, int | None]]:
    count = len(scan(folder)[0])
    return [(folder, start, start + GROUP) for start in range(0, max(count, 1), GROUP)]


def begin_worker() -> None:
    """Prepares a process of a pool: one thread, deaf to Ctrl-C, ended with the first process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process handles Ctrl-C
    end_with_parent()
    torch.set_num_threads(1)


def _check_shard(
    job: tuple[Path, int, int | None], folder: Path, body: SMPLH, min_size: int
) -> tuple[list[Problem], Counter[str], list[Entry]]:
    path, start, stop = job
    entries, bad = scan(path)
    entries = entries[start:stop]
    form = "packed" if path.is_file() and packed(path) else "unreadable"
    problems = [Problem(b.key, b.shard, form, b.sentence) for b in bad] if not start else []
    if path.is_file() and scattered(entries):
        problems.append(Problem("", path.name, "scattered", SCATTERED))
    counts: Counter[str] = Counter(samples=len(entries))
    for first in range(0, len(entries), BATCH):
        part = entries[first : first + BATCH]
        wrong = check_samples([load(folder, entry) for entry in part], body, min_size, counts)
        for entry, found in zip(part, wrong, strict=True):
            problems += [Problem(entry.key, entry.shard, kind, sentence, entry.offsets) for kind, sentence in found]
    return problems, counts, entries


def check_samples(
    samples: list[Sample | Bad], body: SMPLH, min_size: int = MIN_SIZE, counts: Counter[str] | None = None
) -> list[list[tuple[str, str]]]:
    """(kind, sentence) of each problem of each sample. counts: the function adds to it, see `Report`."""
    counts = Counter() if counts is None else counts
    out: list[list[tuple[str, str]]] = []
    people: list[Hands] = []
    aspects: list[float] = []
    owners: list[int] = []
    for number, sample in enumerate(samples):
        found: list[tuple[str, str]] = []
        out.append(found)
        if isinstance(sample, Bad):
            found.append(("unreadable", sample.sentence))
            continue
        aspect = 1.0
        if sample.image is not None:
            try:
                height, width = picture(sample).shape[:2]
                aspect = width / height
                counts["pictures"] += 1
                if min(height, width) < min_size:
                    found.append(("small", f"Its picture must have {min_size} pixels a side, got {width} x {height}."))
            except MisfitError as error:
                found.append(("no picture", str(error)))
        shown = 0 if sample.hands is None else int(present(sample.hands).sum())
        counts[f"hands {shown}" if sample.annotated else "unknown"] += 1
        counts["people"] += sample.people
        counts["dropped"] += max(sample.people - 1, 0)
        if sample.hands is not None:
            for i in range(sample.people):
                people.append(person(sample.hands, i))
                aspects.append(aspect)
                owners.append(number)
            found += _contradicted(sample)
    if people:
        joints, said = joints_in_picture(people, aspects, body)
        wrong = conventions(people, joints, said, aspects, body)
        for i, number in enumerate(owners):
            out[number] += _outside(joints[i], said[i]) + [("apart", sentence) for sentence in wrong[i]]
    return out


def _outside(joints: np.ndarray, said: np.ndarray) -> list[tuple[str, str]]:
    """joints: [2, 21, 2] in [0, 1]; said: [2], which hands the sample claims to show."""
    found = []
    for side, name in enumerate(("left", "right")):
        if not said[side]:
            continue
        inside = ((joints[side] >= 0) & (joints[side] <= 1)).all(-1).mean()
        if inside < MIN_IN_FRAME:
            sentence = f"Its {name} hand is annotated as visible, but has {inside:.0%} of its joints in the picture."
            found.append(("outside", sentence))
    return found


def _contradicted(sample: Sample) -> list[tuple[str, str]]:
    """A caption that names one hand, where the picture shows only the other one."""
    assert sample.hands is not None
    left, right = (bool(shown) for shown in present(sample.hands).reshape(-1, 2).max(0))
    if left == right:
        return []
    seen, other = ("left", "right") if left else ("right", "left")
    for prompt in sample.prompts:
        named = {word.lower() for word in _NAMED.findall(prompt)}
        if named == {other} and not re.search(rf"\b{seen}\b", prompt, re.IGNORECASE):
            return [("words", f'Its caption says "{prompt[:80]}", but only a {seen} hand is annotated.')]
    return []


# --- moving aside ---


def set_aside(folder: str | Path, problems: Iterable[Problem]) -> int:
    """Moves the samples that have problems into FOLDER/aside, and returns the number of files moved.

    Nothing is lost: a new shard without these samples replaces the old one. A damaged shard moves as a whole, and a new
    one keeps its readable samples.
    """
    folder = Path(folder)
    moved = 0
    by_shard: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.kind in STAYS:
            continue
        by_shard.setdefault(problem.shard, []).append(problem)
    for shard, found in by_shard.items():
        try:
            (folder / ASIDE).mkdir(exist_ok=True)
            moved += _from_shard(folder / shard, found) if shard else _from_folder(folder, found)
        except OSError as error:
            raise DatasetError(f"{folder / ASIDE} cannot be written: {error.strerror or error}.") from error
    return moved


def _free(path: Path) -> Path:
    """The path, with a number if it is taken."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def _from_folder(folder: Path, problems: list[Problem]) -> int:
    keys = {problem.key for problem in problems}
    moved = 0
    for path in sorted(folder.iterdir()):
        name = split_name(path.name)
        key = name[0] if name else path.name.removesuffix(".hands.png")
        if path.is_file() and key in keys:
            path.replace(_free(folder / ASIDE / path.name))
            moved += 1
    return moved


def _from_shard(path: Path, problems: list[Problem]) -> int:
    damaged = any(not problem.key for problem in problems)
    offsets = {offset for problem in problems for offset in problem.at if offset >= 0}
    keys = {problem.key for problem in problems if not problem.at}
    whole = {offset for entry in scan(path)[0] for offset in entry.offsets}
    kept, bad = (path.with_name(f".{path.name}.{os.getpid()}.{end}.tmp") for end in ("kept", "bad"))
    stay = leave = 0
    try:
        with (
            tarfile.open(path, "r:") as source,
            tarfile.open(kept, "w") as good,
            tarfile.open(bad, "w") as other,
            contextlib.suppress(tarfile.TarError),  # a damaged shard is read up to its damage
        ):
            for info in source:
                name = split_name(info.name)
                if damaged and info.offset_data not in whole:
                    continue
                leaves = info.offset_data in offsets or (name is not None and name[0] in keys)
                (other if leaves else good).addfile(info, source.extractfile(info))
                stay, leave = stay + (not leaves), leave + leaves
        if damaged:
            path.replace(_free(path.parent / ASIDE / path.name))
        elif leave:
            bad.replace(_free(path.parent / ASIDE / path.name))
        if stay:
            kept.replace(path)
        else:
            path.unlink(missing_ok=True)
    finally:
        kept.unlink(missing_ok=True)
        bad.unlink(missing_ok=True)
    return leave + damaged
