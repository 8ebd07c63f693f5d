"""The sample format: what `hd-run` writes is what `hd-train` reads.

    for sample in read("photos"):
        if isinstance(sample, Bad):
            print(sample)                         # 00003.tar: hand-17: It lacks left_hand_pose.
        else:
            sample.prompts, sample.hands["right_hand_pose"], picture(sample)
    write_shards(samples, "photos")               # photos/00000.tar, ...

A dataset is a folder of WebDataset shards (`00000.tar`, ...), or of plain files: the output folder of `hd-run` is one.
The files of a sample share a key:

    <key>.json                  prompt, or prompts: several wordings; perhaps source, licence, labels, annotated
    <key>.hands.npz             SMPL-H: the arrays of HANDS; no such file where the picture shows no hands
    <key>.jpg | .png | .webp    the picture, for stage 2; endings may be in upper case

The reader ignores all other files (`<key>.hands.png`, `index.html`). It names and skips a sample that is damaged or
wrong, and reads the rest. docs/data.md has a complete example.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from ..errors import DatasetError
from ..files import written
from ..hands import SHAPES
from ..hands import person as person
from ..pictures import SPELLINGS, decode, kind_of, size_of
from ..pictures import encode_png as encode_png
from ..schema import TRUTH, MisfitError, fit, parse_json
from .files import HANDS_NPZ, JSON, PICTURE, Bad, Entry, scan, shards

MAX_MEMBER = 1 << 28  # bytes: far above any picture
MAX_ARRAY = 1 << 24  # bytes of one array of hands, unpacked
PER_SHARD = 1000
GROUP = 1000  # samples in plain files that count as one shard

# The arrays of a `.hands.npz`: name -> shape, largest magnitude. A sample needs `placement` or `camera` (weak
# perspective s, tx, ty: image = s (metres + t), y up, +-1 over the picture's height); `placement` wins.
# `visibility` says which hands (left, right) the picture shows. With several people each array has an axis in front.
HANDS: dict[str, tuple[tuple[int, ...], float]] = {
    **SHAPES,
    "camera": ((3,), 1e4),
    "visibility": ((2,), 1.0),
    "joints_2d": ((2, 21, 2), 1e3),  # in [0, 1] of width and height, y down; for checks and for looking at
}
POSE = ("global_orient", "body_pose", "left_hand_pose", "right_hand_pose", "betas")


@dataclass
class Sample:
    """One picture to learn from, or one prompt with its hands.

    prompts: at least one wording. hands: the arrays of HANDS, float32 (each [N, ...] with N people), or None for a
    picture without hands. image: the picture's file. meta: the other entries of `<key>.json`, such as source, licence
    and labels.
    """

    key: str
    prompts: list[str]
    hands: dict[str, np.ndarray] | None = None
    image: bytes | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def annotated(self) -> bool:
        """Whether the data says which hands the picture shows. If not, stage 1 must not learn that it shows no hand."""
        return self.hands is not None or self.meta.get("annotated") is not False

    @property
    def people(self) -> int:
        """How many people `hands` holds."""
        if self.hands is None:
            return 0
        return len(self.hands["global_orient"]) if self.hands["global_orient"].ndim == 2 else 1


Words = Annotated[str, Meta(min_length=1, max_length=100_000)]


class _Record(msgspec.Struct):
    """What a `<key>.json` may say; other entries are kept as they are."""

    prompt: Annotated[Words | None, Meta(description="text")] = None
    prompts: Annotated[list[Words] | None, Meta(description="a list of texts")] = None
    labels: Annotated[dict[str, str] | None, Meta(description="names with a word each")] = None
    annotated: Annotated[bool | None, TRUTH] = None
    source: Annotated[str | None, Meta(description="text")] = None
    licence: Annotated[str | None, Meta(description="text")] = None


def read(folder: str | Path) -> Iterator[Sample | Bad]:
    """All samples, shard by shard, one in memory at a time; a Bad for each unreadable sample and each damaged shard.

    Raises DatasetError where the folder is missing or empty.
    """
    folder = Path(folder)
    found = False
    for path in shards(folder) or [folder]:
        entries, problems = scan(path)
        found = found or bool(entries or problems)
        for entry in entries:
            yield load(folder, entry)
        yield from problems
    if not found:
        raise DatasetError(f"{folder} holds no samples: neither .tar shards nor <key>.json files.")


def load(folder: Path, entry: Entry) -> Sample | Bad:
    """Reads one sample and checks it; the picture is not decoded (see `picture`)."""
    try:
        record, hands, image = (_member(folder, entry, member) for member in (JSON, HANDS_NPZ, PICTURE))
        if record is None:
            raise MisfitError(f"It lacks its {entry.key}.json, which holds its prompts.")
        prompts, meta = _read_record(record)
        return Sample(entry.key, prompts, None if hands is None else read_hands(hands), image, meta)
    except MisfitError as error:
        return Bad(entry.key, entry.shard, str(error))
    except OSError as error:
        return Bad(entry.key, entry.shard, f"It cannot be read: {error.strerror or error}.")


def picture(sample: Sample) -> np.ndarray:
    """The decoded picture, uint8 [H, W, 3], upright. Raises MisfitError for one that is missing, damaged or refused."""
    if sample.image is None:
        raise MisfitError("It has no picture.")
    return decode(sample.image)


def picture_size(sample: Sample) -> tuple[int, int] | None:
    """Height and width of the upright picture by its header alone; None without one. Raises MisfitError."""
    return None if sample.image is None else size_of(sample.image)


# --- writing ---


def write_shards(
    samples: Iterable[Sample | Bad], folder: str | Path, per_shard: int = PER_SHARD, progress: Any = None
) -> list[Bad]:
    """Writes samples as shards `00000.tar`, ... of `per_shard` samples each, and returns a Bad for each it leaves out.

    Every shard in the folder is whole. A second call with the same samples skips keys that the shards hold and writes
    the rest into new shards. progress: called with each key. Left out are: each Bad among the samples, a key with dots,
    a key that comes twice, a picture of another format, and hands that `load` refuses.
    Raises DatasetError where the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tar.*.tmp"):
        if leftover.stat().st_mtime < time.time() - 3600:  # another run may still write a younger one
            leftover.unlink(missing_ok=True)
    present = shards(folder)
    done = {entry.key for path in present for entry in scan(path)[0]}
    number = 1 + max((int(path.stem) for path in present if path.stem.isdigit()), default=-1)
    bad: list[Bad] = []
    seen: set[str] = set()
    waiting: list[Sample] = []
    for sample in samples:
        if isinstance(sample, Bad):
            bad.append(sample)
            continue
        try:
            shard_key(sample.key)
            if sample.image is not None:
                kind_of(sample.image)
            if sample.hands is not None:
                check_hands(sample.hands)
            if sample.key in seen:
                raise MisfitError("Another sample has this key. Give each its own.")
        except MisfitError as error:
            bad.append(Bad(sample.key, "", str(error)))
            continue
        seen.add(sample.key)
        if progress is not None:
            progress(sample.key)
        if sample.key in done:
            continue
        waiting.append(sample)
        if len(waiting) == per_shard:
            write_shard(folder / f"{number:05d}.tar", waiting)
            number, waiting = number + 1, []
    if waiting:
        write_shard(folder / f"{number:05d}.tar", waiting)
    return bad


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Writes one whole shard; the same samples give the same bytes.

    Raises DatasetError, or MisfitError for a sample that a shard cannot hold.
    """
    try:
        with (
            written(path, durable=True) as temporary,
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for sample in samples:
                key = shard_key(sample.key)
                for suffix, content in sorted(members(sample).items()):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size, info.mode = len(content), 0o444
                    archive.addfile(info, io.BytesIO(content))
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be written: {error.strerror or error}. Earlier shards are complete. Run the same command "
            "again to go on."
        ) from error


def shard_key(key: str) -> str:
    """The key, if a shard can hold it: WebDataset ends a key at its first dot. Raises MisfitError."""
    name = key.rpartition("/")[2]
    if not name or "." in name or key.startswith(("/", "__")) or len(key.encode()) > 90 or "\0" in key:
        raise MisfitError(
            f"The key must be 1 to 90 bytes without dots, got {key[:100]!r}. WebDataset ends a key at its first dot: "
            "rename the sample."
        )
    return key


def members(sample: Sample) -> dict[str, bytes]:
    """Suffix (without its dot) -> content of a sample's files."""
    words = {"prompt": sample.prompts[0]} if len(sample.prompts) == 1 else {"prompts": sample.prompts}
    out = {"json": json.dumps({**words, **sample.meta}, ensure_ascii=False).encode()}
    if sample.hands is not None:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = dict(sample.hands)
        np.savez(buffer, **arrays)
        out["hands.npz"] = buffer.getvalue()
    if sample.image is not None:
        out[kind_of(sample.image)] = sample.image
    return out


# --- reading, in detail ---


def read_hands(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of HANDS in a `.hands.npz`, float32. Raises MisfitError, see `check_hands`."""
    try:
        archive = np.load(io.BytesIO(content), allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile) or archive.zip is None:
            raise ValueError("it is a single array")
        with archive:
            held = {info.filename.removesuffix(".npy"): info.file_size for info in archive.zip.infolist()}
            found = [name for name in HANDS if name in held]
            large = [name for name in found if held[name] > MAX_ARRAY]
            if large:
                raise MisfitError(
                    f"Its {large[0]} must be at most {MAX_ARRAY >> 20} MB, got {held[large[0]] >> 20} MB."
                )
            arrays = {name: np.asarray(archive[name]) for name in found}
    except MisfitError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise many kinds; pickles stay closed
        raise MisfitError(f"Its .hands.npz must hold plain arrays, got: {str(error)[:200].rstrip('.')}.") from None
    return check_hands(arrays)


def check_hands(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays in float32. Raises MisfitError where one is missing, misshapen, not finite or out of range."""
    missing = [name for name in POSE if name not in arrays]
    if missing:
        raise MisfitError(f"Its hands lack {', '.join(missing)}.")
    if "placement" not in arrays and "camera" not in arrays:
        raise MisfitError("Its hands lack placement and camera. One of them must say where they are in the picture.")
    lead = arrays["global_orient"].shape[:-1]
    if len(lead) > 1 or 0 in lead:
        raise MisfitError(f"Its global_orient must be of shape [3], got {list(arrays['global_orient'].shape)}.")
    out = {}
    for name, value in arrays.items():
        shape, limit = HANDS[name]
        if value.shape != (*lead, *shape):
            raise MisfitError(f"Its {name} must be of shape {[*lead, *shape]}, got {list(value.shape)}.")
        if value.dtype.kind not in "fiub":
            raise MisfitError(f"Its {name} must hold numbers, got {value.dtype}.")
        value = value.astype(np.float32)
        if not np.isfinite(value).all():
            raise MisfitError(f"Its {name} must be finite, got NaN or infinity.")
        if value.size and np.abs(value).max() > limit + 1e-3:
            raise MisfitError(f"Its {name} must be at most {limit:.4g} in size, got {np.abs(value).max():g}.")
        out[name] = value
    if "camera" in out and (out["camera"][..., 0] <= 0).any():
        raise MisfitError("Its camera's scale must be above 0.")
    return out


def _read_record(content: bytes) -> tuple[list[str], dict[str, Any]]:
    """Prompts and everything else of a `<key>.json`. Raises MisfitError."""
    value = parse_json(content)
    if not isinstance(value, dict):
        raise MisfitError("Its .json must be an object.")
    try:
        record = fit(value, _Record)
    except MisfitError as error:
        raise MisfitError(f"Its .json does not fit: {error}") from None
    prompts = [text for text in (record.prompts or [record.prompt or ""]) if text.strip()]
    if not prompts:
        raise MisfitError("Its .json has neither a prompt nor prompts.")
    return prompts, {name: entry for name, entry in value.items() if name not in ("prompt", "prompts")}


def _member(folder: Path, entry: Entry, member: int) -> bytes | None:
    offset, size = entry.offsets[member], entry.sizes[member]
    if offset < 0:
        return None
    if size > MAX_MEMBER:
        raise MisfitError(f"Its files must be at most {MAX_MEMBER >> 20} MB, got {size >> 20} MB.")
    if not entry.shard:
        suffix = (".json", ".hands.npz", SPELLINGS[entry.suffix] if entry.suffix >= 0 else "")[member]
        return (folder / (entry.key + suffix)).read_bytes()
    with open(folder / entry.shard, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise MisfitError("Its shard ends within it. Copy the shard again.")
    return content
