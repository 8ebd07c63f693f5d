"""Whether a picture of some size fits into this machine's memory, before anything runs.

    room = Room(manifest)
    room.check((768, 512))          # RequestError: "size must be smaller ..."
    room.rows((768, 512), most=8)   # how many such pictures may run at once

The manifest says what a graph's intermediate tensors take at the bundle's own size; they grow with the pixels. Memory
that such pictures have used before stays with the process, so a size that has run is not asked for again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ..contract import Manifest, Size, shown_size
from ..errors import RequestError

SPARE = 1.25  # of an estimate: what engines pack, and what their arenas lose
MACHINE = Path("/proc/meminfo")
LIMIT, USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


class Room:
    """The memory of a bundle's pictures on this machine, or on its GPU.

    free: bytes that may still be taken; None: unknown. By default of this machine, for this process.
    """

    def __init__(self, manifest: Manifest, free: Callable[[], int | None] | None = None) -> None:
        self.manifest = manifest
        self.free = free or (lambda: available())
        self._ran = manifest.image_size[0] * manifest.image_size[1]  # pixels of rows at once that have run

    def needed(self, size: Size, rows: int = 1) -> int:
        """Bytes that `rows` pictures of this size take at once, beside the engines. 0 for an unknown bundle."""
        own = self.manifest.image_size
        share = size[0] * size[1] / (own[0] * own[1])
        graphs = self.manifest.graphs
        unet, others = graphs["unet"].memory, (graphs[name].memory for name in graphs if name.startswith("image_"))
        return int(SPARE * share * max(rows * unet, *others, 0))

    def lacking(self, size: Size, rows: int) -> int:
        """As `needed`; 0 where pictures have used so much memory before."""
        return 0 if size[0] * size[1] <= self._ran else self.needed(size, rows)

    def check(self, size: Size) -> None:
        """Raises RequestError where one picture of this size does not fit."""
        needed, there = self.lacking(size, 1), self.free()
        if there is not None and needed > there:
            self.refuse(size, needed)

    def refuse(self, size: Size, needed: int) -> NoReturn:
        """Raises the RequestError for a size that takes so many bytes."""
        raise RequestError(
            f"size must fit into memory: {shown_size(size)} takes about {needed / 1e9:.1f} GB, and "
            f"{(self.free() or 0) / 1e9:.1f} GB are free. Take a smaller one, such as "
            f"{shown_size(self.manifest.image_size)}.",
            "size",
        )

    def rows(self, size: Size, most: int) -> int:
        """How many pictures of this size may run at once: at least 1, at most `most`."""
        there = self.free()
        rows = most
        while rows > 1 and there is not None and rows * size[0] * size[1] > most * self._ran:
            if self.needed(size, rows) <= there:
                break
            rows -= 1
        return rows

    def ran(self, size: Size) -> None:
        """Notes that a picture of this size was made."""
        self._ran = max(self._ran, size[0] * size[1])


def available() -> int | None:
    """Bytes of memory that this process may still take, of the machine's and of its cgroup's; None: unknown."""
    found = []
    with suppress(OSError, ValueError):
        for line in MACHINE.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):  # "max", or no such file
        found.append(int(LIMIT.read_text(encoding="ascii")) - int(USED.read_text(encoding="ascii")))
    return min(found, default=None)
