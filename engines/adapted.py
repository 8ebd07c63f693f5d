"""A bundle with adapters merged into its weights, without PyTorch: what `hd-export --lora` would have exported.

    adapters = chosen(["style.safetensors:0.8"])          # their contents and scales, not their names, are the key
    folder = adapted_bundle(Path("bundle"), adapters)     # in the user's cache; made once

Such a folder is a whole bundle. Only the graphs that the adapters change are written, the other files are links to the
base's. The cache has a bound, and the least recently used goes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..adapters import PEFT_CONFIG, Adapter, Change, diverged, read, split, summary
from ..contract import Manifest, file_digest
from ..errors import BundleError, CheckpointError, EngineError
from ..files import FULL, open_to_others
from ..schema import listed
from ..weights import Place, WeightMap, changed
from .initializers import OnnxWeights
from .plans import cache_folder

OnMerge = Callable[[int, int], None]  # weights that are merged, and how many there are
FORMAT = "1"  # of what is merged; part of the key
MAX_BYTES = 32 << 30  # of the cache on the disk
SPARED_SECONDS = 600.0  # for which a bundle that was used, or a half-written one, is left alone
WIDE = "_half"  # the end of initializers that a Cast makes float32, see `export.bundle.compact`


@dataclass(frozen=True)
class Chosen:
    """An adapter that a request names. digest: SHA-256 of all that decides its updates."""

    path: Path
    scale: float
    digest: str

    @property
    def key(self) -> tuple[str, float]:
        return self.digest, self.scale

    @property
    def typed(self) -> str:
        """FILE:SCALE, from which `chosen` reads the very same scale."""
        short = f"{self.scale:g}"
        return f"{self.path}:{short if float(short) == self.scale else self.scale}"

    def __str__(self) -> str:
        return f"{self.path.name}:{self.scale:g} sha256 {self.digest}"


def chosen(said: Iterable[str] | None) -> tuple[Chosen, ...]:
    """The adapters of texts FILE[:SCALE], in order, without those of scale 0, which change nothing.

    Raises CheckpointError for a file that cannot be read, and for a scale out of bounds.
    """
    pairs = [split(text) for text in said or ()]
    return tuple(Chosen(path, scale, digest_of(path)) for path, scale in pairs if scale)


def digest_of(path: Path) -> str:
    """SHA-256 of an adapter, with the file beside it that holds its strength where peft saved it."""
    try:
        files = [path, *(path.parent / PEFT_CONFIG,) * (path.name == "adapter_model.safetensors")]
        found = [_digest(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    except OSError as error:
        raise CheckpointError(f"The adapter {path} cannot be read: {error.strerror or error}.") from None
    if not path.is_file():
        what = "must be a file, got a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"The adapter {path} {what}. Give the path of a .safetensors file.")
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


@functools.lru_cache(1024)
def _digest(path: Path, size: int, changed_ns: int) -> str:
    return file_digest(path)


def changes(folder: Path, adapters: Sequence[Chosen]) -> tuple[WeightMap, list[tuple[Chosen, Adapter]]]:
    """What adapters change in a bundle, read. Raises BundleError for a bundle without a map of its weights,
    CheckpointError for an adapter that does not fit, or that changes what the map lacks."""
    weights = WeightMap.load(folder)
    found = [(one, read(weights.shapes, one.path)) for one in adapters]
    for one, adapter in found:
        lost = [name for name in adapter.changes(one.scale) if name not in weights.places]
        if lost:
            raise CheckpointError(
                f"{one.path} changes {listed(lost)}, which this bundle's graphs hold in another form, such as "
                "quantised. Merge it when you export: hd-export CHECKPOINT OUT --lora FILE[:SCALE]."
            )
    return weights, found


def graphs_of(weights: WeightMap, adapters: Iterable[tuple[Chosen, Adapter]]) -> list[str]:
    """The graphs that adapters change, sorted."""
    names = {name for one, adapter in adapters for name in adapter.changes(one.scale)}
    return sorted({place.graph for name in names for place in weights.places[name]})


def adapted_bundle(folder: Path, adapters: Sequence[Chosen], tell: OnMerge = lambda done, total: None) -> Path:
    """The bundle with these adapters, from the cache or made now; `folder` itself without adapters.

    tell: called while it is made, with the weights that are merged and how many there are.

    Raises CheckpointError for an adapter that does not fit, BundleError for a bundle that cannot take any, EngineError
    where the cache cannot be written.
    """
    if not adapters:
        return folder
    manifest = Manifest.load(folder, verify=False)
    cache = cache_folder() / "adapted"
    made = cache / key_of(manifest, adapters)
    if _is_whole(made):
        used(made)
        return made
    with contextlib.suppress(OSError):
        shrink(cache, MAX_BYTES)
    try:
        return make_bundle(made, folder, adapters, tell)
    except EngineError as error:
        if _is_whole(made):  # another process was faster: a folder that is not empty keeps its name
            return made
        raise EngineError(f"{error} Or set XDG_CACHE_HOME to another folder.") from error


def make_bundle(out: Path, folder: Path, adapters: Sequence[Chosen], tell: OnMerge = lambda done, total: None) -> Path:
    """Writes a bundle with adapters to `out`, whole or not at all; replaces a folder there. Returns `out`.

    Raises as `adapted_bundle` does.
    """
    manifest, (weights, found) = Manifest.load(folder, verify=False), changes(folder, adapters)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        merge_into(unfinished, folder, manifest, weights, found, tell)
        shutil.rmtree(out, ignore_errors=True)
        unfinished.rename(out)
    except OSError as error:
        why = "the disk is full" if error.errno in FULL else error.strerror or error
        raise EngineError(
            f"The weights with {', '.join(one.path.name for one in adapters)} cannot be written to {out.parent}: "
            f"{why}. Make room there."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def key_of(manifest: Manifest, adapters: Sequence[Chosen]) -> str:
    """16 hexadecimal digits that stand for a bundle's graphs, adapters and scales."""
    said = [FORMAT, manifest.files, manifest.precision, [one.key for one in adapters]]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def merge_into(
    out: Path,
    folder: Path,
    manifest: Manifest,
    weights: WeightMap,
    adapters: Sequence[tuple[Chosen, Adapter]],
    tell: OnMerge = lambda done, total: None,
) -> Manifest:
    """Writes a bundle with adapters merged into `out`, a new folder. Returns its manifest, which is written last."""
    out.mkdir(parents=True)
    graphs = graphs_of(weights, adapters)
    written = {file for graph in graphs for file in manifest.files_of(graph)}
    manifest.check_files(folder, sorted(written))
    for file in manifest.files:
        if file not in written:
            link(folder / file, out / file)
    names = {name for one, adapter in adapters for name in adapter.changes(one.scale)}
    total = len({(at.graph, at.initializer) for name in names for at in weights.places[name]})
    done = 0
    for graph in graphs:
        file = manifest.graphs[graph].file
        stored = OnnxWeights(folder / file)
        new = {}
        for initializer, array in merged(graph, stored, weights, adapters):
            new[initializer] = array
            done += 1
            tell(done, total)
        stored.write(out / file, new, frozenset(name for name in new if name.endswith(WIDE)))
        open_to_others(*(out / name for name in manifest.files_of(graph)))
    files = manifest.files | {file: file_digest(out / file) for file in sorted(written)}
    before = manifest.made_by.get("adapters") or []  # of a bundle that `hd-engines merge` wrote
    made_by = {**manifest.made_by, "adapters": [*before, *(str(one) for one, _ in adapters)]}
    made_by.pop("source", None)  # hd-export would take it for what this source gives
    adapted = replace(manifest, files=files, made_by=made_by)
    adapted.save(out)
    return adapted


def merged(
    graph: str, stored: OnnxWeights, weights: WeightMap, adapters: Sequence[tuple[Chosen, Adapter]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each initializer of a graph that adapters change, with its new numbers in float32.

    Raises CheckpointError where they become infinite in the bundle's precision.
    """
    at: defaultdict[str, list[tuple[Place, str, Change, Path]]] = defaultdict(list)
    for one, adapter in adapters:
        for name, change in adapter.changes(one.scale).items():
            for place in weights.places[name]:
                if place.graph == graph:
                    at[place.initializer].append((place, name, change, one.path))
    for initializer, found in at.items():
        array, most = stored.read(initializer), stored.most(initializer, initializer.endswith(WIDE))
        for place, name, change, path in found:
            array = changed(array, place, weights.shapes[name], change)
            if not np.abs(array).max(initial=0) <= most:  # NaN, too
                raise diverged(path, name)
        yield initializer, array


def sentences(adapters: Sequence[Chosen], folder: Path) -> list[str]:
    """What adapters change in a bundle, in words."""
    return [summary(one.path, adapter, one.scale) for one, adapter in changes(folder, adapters)[1]]


def link(source: Path, target: Path) -> None:
    """Gives a file another name without a copy of its content, where the file system can."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        try:
            os.symlink(source.resolve(), target)
        except OSError:  # Windows, without the right to make links
            shutil.copyfile(source, target)


def used(folder: Path) -> None:
    """Notes that an adapted bundle is in use, so that `shrink` of any process takes others first."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def shrink(cache: Path, most: int) -> None:
    """Removes adapted bundles until their own files take at most `most` bytes, the least recently used first, and what
    stopped processes left behind."""
    found = []
    for folder in cache.iterdir():
        with contextlib.suppress(OSError):
            stat = folder.stat()
            own = sum(file.lstat().st_size for file in folder.rglob("*") if file.lstat().st_nlink == 1)
            found.append((stat.st_mtime, own, folder))
    total = sum(own for _, own, _ in found)
    for used, own, folder in sorted(found):
        if time.time() - used > SPARED_SECONDS and (total > most or folder.name.startswith(".")):
            shutil.rmtree(folder, ignore_errors=True)
            total -= own


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the cache holds a bundle whose files are as they were written."""
    try:
        manifest = Manifest.load(folder, files=False)
        return all((folder / file).is_file() for file in manifest.files) and not any(
            manifest.problems(folder, [file for file in manifest.files if (folder / file).lstat().st_nlink == 1])
        )
    except (BundleError, OSError):
        return False
