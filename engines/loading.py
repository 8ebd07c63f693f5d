"""Loads a bundle's graphs as engines that take and give numpy arrays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..contract import IMAGE_ENCODER, GraphSpec, Manifest
from ..cpu import usable_cores
from ..errors import EngineError
from .backends import DEVICES
from .base import Engine, check_host
from .onnxruntime import OnnxRuntimeEngine, both_installed, device_for, import_onnxruntime, shelf_of


def load_engines(
    folder: str | Path,
    device: str = "auto",
    threads: int | None = None,
    verify: bool = True,
    others: Callable[[Manifest], Mapping[str, Engine]] | None = None,
    only: Collection[str] | None = None,
) -> tuple[Manifest, dict[str, Engine]]:
    """Loads a bundle: its manifest, and one engine for each of its graphs.

    device: "cpu", "cuda" (an error without a usable GPU) or "auto" (CUDA where it works, else the CPU).
    threads: CPU threads of one graph; by default as many as there are usable cores.
    verify: check every file against the manifest's SHA-256 (about 1 s a GB).
    others: gives engines of another backend, which verifies the files that it reads. ONNX Runtime runs the rest.
    only: graphs to load and verify; by default all.

    Raises BundleError for a bundle that is missing, damaged or not what its manifest says. Raises EngineError for one
    in bfloat16, and without ONNX Runtime or the device. Warns when both of ONNX Runtime's packages are installed.
    """
    if device not in DEVICES:
        raise EngineError(f"device must be one of {', '.join(DEVICES)}, got {device!r}.")
    if threads is not None and threads < 1:
        raise EngineError(f"threads must be at least 1, got {threads}. Leave it out to use every core.")
    folder = Path(folder)
    manifest = Manifest.load(folder, verify, files=False)
    check_host(manifest, folder)
    wanted = frozenset(manifest.graphs if only is None else only)
    given = {name: one for name, one in (others(manifest) if others is not None else {}).items() if name in wanted}
    files = {name: manifest.graphs[name].file for name in wanted - given.keys()}
    open_graph = _opener(folder, manifest, device, threads) if files else None

    def load(name: str) -> Engine:
        assert open_graph is not None
        if verify:
            manifest.check_files(folder, [files[name]])
        return open_graph(folder / files[name], manifest.graphs[name])

    later: dict[str, Engine] = {}
    if IMAGE_ENCODER in files:
        later[IMAGE_ENCODER] = Later(manifest.graphs[IMAGE_ENCODER], lambda: load(IMAGE_ENCODER))
    # ONNX Runtime optimises a graph while it loads and lets go of the GIL meanwhile: two at a time on two cores.
    # The biggest go first, so that none of them is left alone at the end.
    names = sorted(files.keys() - later.keys(), key=lambda name: -_size(folder / files[name]))
    theirs = {file for name in (*given, *later) for file in manifest.files_of(name)}
    mine = manifest.files if only is None else [file for name in files for file in manifest.files_of(name)]
    rest = [name for name in mine if name not in files.values() and name not in theirs]
    with ThreadPoolExecutor(min(4, usable_cores()) + 1) as pool:
        checked = pool.submit(manifest.check_files, folder, rest if verify else [])
        loaded = [pool.submit(load, name) for name in names]
        checked.result()  # damaged weights are why a graph does not load, so their error goes first
        engines: dict[str, Engine] = given | {name: one.result() for name, one in zip(names, loaded, strict=True)}
    return manifest, engines | later


class Later:
    """An engine that is loaded, and its files verified, at its first use: few runs bring pictures."""

    batches = None

    def __init__(self, spec: GraphSpec, load: Callable[[], Engine]) -> None:
        self.spec, self._load = spec, load

    @cached_property
    def _engine(self) -> Engine:
        return self._load()

    @property
    def device(self) -> str:
        return self._engine.device

    def prepare(self, sizes: Mapping[str, int]) -> None:
        self._engine.prepare(sizes)

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return self._engine(feeds)


def _opener(folder: Path, manifest: Manifest, device: str, threads: int | None) -> Callable[[Path, GraphSpec], Engine]:
    """What opens a graph with ONNX Runtime on a device."""
    import_onnxruntime()
    if problem := both_installed():
        warnings.warn(problem, RuntimeWarning, stacklevel=3)
    if device_for(folder, device) == "cpu":
        shelf = shelf_of(folder, manifest) if device == "cpu" else None
        return lambda path, spec: OnnxRuntimeEngine(path, spec, threads, shelf, manifest.sides())
    from .onnxruntime_cuda import open_cuda

    return lambda path, spec: open_cuda(folder, manifest, path.stem, threads=threads)


def open_engine(
    path: str | Path,
    spec: GraphSpec,
    device: str = "cpu",
    threads: int | None = None,
    own: Mapping[str, int] | None = None,
) -> Engine:
    """One graph in ONNX Runtime, on "cpu" or "cuda". own: see `OnnxRuntimeEngine`."""
    if device == "cpu":
        return OnnxRuntimeEngine(path, spec, threads, own=own)
    from .onnxruntime_cuda import OnnxRuntimeCudaEngine

    return OnnxRuntimeCudaEngine(path, spec, threads)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
