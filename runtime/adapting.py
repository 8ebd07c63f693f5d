"""Engines of bundles with adapters, for requests that bring them: loaded at first use, the least recently used goes.

adapting = Adapting(folder, load, memory)
engines = adapting.engines(adapters, in_use)     # of the graphs that they change; None: other ones must end first

Merging takes seconds. A thread does it, and `engines` raises NotYetError meanwhile, so that other requests go on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from ..contract import Manifest
from ..engines import Engine
from ..engines.adapted import Chosen, adapted_bundle, changes, graphs_of, used
from ..errors import RequestError
from .room import available

Key = tuple[tuple[str, float], ...]  # digest and scale of each adapter, in order
Made = tuple[Path, list[str], int]  # folder of an adapted bundle, its graphs that differ, and the bytes of these
SOON = 0.02  # seconds: what was merged before is there by then
UNKNOWN_MEMORY = 4 << 30  # bytes for engines with adapters where the machine does not say what is free


class NotYetError(Exception):
    """A thread merges the adapters; ask again later."""


def key_of(adapters: Sequence[Chosen]) -> Key:
    return tuple(one.key for one in adapters)


@dataclass
class Loaded:
    folder: Path  # of the adapted bundle
    engines: Mapping[str, Engine]
    size: int  # bytes of their graphs


class Adapting:
    """load: (folder of an adapted bundle, names of graphs) -> their engines. memory: bytes that the weights of loaded
    engines may take, those of `folder` itself not counted; None: half of what is free."""

    def __init__(
        self, folder: Path, load: Callable[[Path, Collection[str]], Mapping[str, Engine]], memory: int | None = None
    ) -> None:
        self.folder, self._load = folder, load
        self.memory = memory if memory is not None else (available() or 2 * UNKNOWN_MEMORY) // 2
        self._loaded: dict[Key, Loaded] = {}  # the least recently used first
        self._made: dict[Key, Made] = {}  # what waits for room
        self._merging: dict[Key, Future[Made]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters")

    def __contains__(self, key: Key) -> bool:
        """Whether the engines of these adapters are loaded."""
        return key in self._loaded

    def loaded(self, key: Key) -> Mapping[str, Engine]:
        """The engines of adapters that are loaded. Ask each time: who keeps them keeps their memory."""
        return self._loaded[key].engines

    def engines(self, adapters: Sequence[Chosen], in_use: Collection[Key]) -> Mapping[str, Engine] | None:
        """The engines of the graphs that adapters change, or None where those `in_use` leave too little memory.

        Raises NotYetError while they are merged, and HanDiffuserError for adapters that do not fit, a full disk, or
        where they alone take more memory than allowed.
        """
        if not adapters:
            return {}
        key = key_of(adapters)
        if key in self._loaded:
            self._loaded[key] = self._loaded.pop(key)
            used(self._loaded[key].folder)
            return self._loaded[key].engines
        if key not in self._made:
            self._made[key] = self._merged(key, adapters)
        made, graphs, size = self._made[key]
        used(made)
        for old in [*self._loaded]:
            if sum(one.size for one in self._loaded.values()) + size <= self.memory:
                break
            if old not in in_use:
                del self._loaded[old]
        if sum(one.size for one in self._loaded.values()) + size > self.memory:
            return None
        self._made.pop(key, None)  # the disk's cache may drop it later
        self._loaded[key] = Loaded(made, self._load(made, graphs), size)
        return self._loaded[key].engines

    def merging(self, key: Key) -> bool:
        """Whether the thread is at these adapters."""
        return key in self._merging and not self._merging[key].done()

    def wait(self, seconds: float) -> None:
        """Returns when something is merged, or after so many seconds."""
        going = [one for one in self._merging.values() if not one.done()]  # those of cancelled requests stay there
        wait(going, seconds, FIRST_COMPLETED)

    def _merged(self, key: Key, adapters: Sequence[Chosen]) -> Made:
        """What the thread makes. Raises as `engines` does."""
        if key not in self._merging:
            self._merging[key] = self._thread.submit(self._make, adapters)
        wait([self._merging[key]], SOON)
        if self.merging(key):
            raise NotYetError
        return self._merging.pop(key).result()

    def _make(self, adapters: Sequence[Chosen]) -> Made:
        made = adapted_bundle(self.folder, adapters)
        manifest, graphs = Manifest.load(made, verify=False), graphs_of(*changes(self.folder, adapters))
        size = sum((made / file).stat().st_size for graph in graphs for file in manifest.files_of(graph))
        if size > self.memory:
            raise RequestError(
                f"--lora-memory must be at least {size / 1e9:.2g} GB for {adapters[0].path.name}, got "
                f"{self.memory / 1e9:.2g}. Raise it, or merge the adapter when you export: hd-export --lora.",
                "lora",
            )
        return made, graphs, size

    def close(self) -> None:
        """Lets go of the engines."""
        self._loaded = {}
