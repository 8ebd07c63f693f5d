"""What a backend compiles of a bundle in a run: kept beside the bundle, or in the user's cache.

    shelf = Shelf(manifest, folder, "openvino", "2026.4.1", cpu.target(), Options())
    path = shelf.find("unet", {"B": 1, "G": 2})     # verified, or None: then make it, and shelf.keep(...)

A run keeps what it compiles in the user's cache, never beside the bundle: `hd-run` does not write into bundles.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

from ..contract import Manifest
from ..errors import EngineError
from .plans import Plan, PlanStore, Sizes, parts, user_cache

MAX_KEPT_BYTES = 256 * 2**20  # bytes of a graph up to which a run keeps its compiled form in the user's cache
MAX_CACHE_BYTES = 2 * 2**30  # bytes of that cache; the least recently used plan goes first


class Shelf:
    """Finds and keeps what a backend compiles of a bundle: beside the bundle, or in the user's cache."""

    def __init__(self, manifest: Manifest, folder: Path, backend: str, version: str, target: str, options: Any) -> None:
        """options: a dataclass of everything else that the compiled graphs depend on."""
        self.manifest, self.folder = manifest, folder
        self._stores = (PlanStore(folder), user_cache())
        self._made_by = (backend, version, target, options)

    def parts(self, graph: str, sizes: Sizes) -> dict[str, str]:
        return parts(self.manifest, graph, sizes, *self._made_by)

    def plan(self, graph: str, sizes: Sizes) -> tuple[PlanStore, Plan] | None:
        """The plan for these sizes, and the store that has it."""
        wanted = self.parts(graph, sizes)
        found = ((store, store.find(wanted)) for store in self._stores)
        return next(((store, plan) for store, plan in found if plan is not None), None)

    def find(self, graph: str, sizes: Sizes) -> Path | None:
        """The file of the plan for these sizes, verified; None where it is missing. Warns of a damaged one."""
        found = self.plan(graph, sizes)
        if found is None:
            return None
        store, plan = found
        if store.problem(plan, verify=True):
            warnings.warn(f"{plan.path} is damaged: it is compiled again.", RuntimeWarning, stacklevel=2)
            return None
        with contextlib.suppress(OSError):
            os.utime(plan.path)  # see `shrink`
        return plan.path

    def keeps(self, graph: str) -> bool:
        """Whether a graph is small enough for the user's cache."""
        files = (self.folder / (self.manifest.graphs[graph].file + end) for end in ("", ".data"))
        return sum(file.stat().st_size for file in files if file.exists()) <= MAX_KEPT_BYTES

    def keep(
        self, graph: str, sizes: Sizes, content: bytes | memoryview, seconds: float, beside: bool = False
    ) -> Plan | None:
        """Keeps a compiled graph beside the bundle, or in the user's cache if it is small and the cache is writable.

        Raises EngineError where it cannot write beside the bundle.
        """
        if beside:
            return self._stores[0].add(self.parts(graph, sizes), content, {}, seconds)
        if len(content) > MAX_KEPT_BYTES:
            return None
        try:
            plan = self._stores[1].add(self.parts(graph, sizes), content, {}, seconds)
            self._stores[1].shrink(MAX_CACHE_BYTES)
        except (EngineError, OSError):
            return None  # caching is optional: the home may be full or read-only
        return plan
