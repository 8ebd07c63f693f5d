"""Whether a picture of some size fits into this machine's memory, before anything runs.

    room = Room(manifest)
    room.check((768, 512), chunks=3)          # RequestError: "size must be smaller ..."
    room.rows((768, 512), 3, most=8)          # how many such pictures may run at once

The manifest says what a graph's intermediate tensors take at the bundle's own size; they grow with the pixels. A prompt
of several chunks adds its keys and values, and what the UNet's cross-attention makes of them. Memory that such pictures
have used before stays with the process, so what has run is not asked for again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ..contract import CONTEXT, Manifest, Size, shown_size
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
        self._ran = self._row(manifest.image_size, 1)  # bytes of the largest picture that has run

    def _row(self, size: Size, chunks: int) -> float:
        """Bytes that the UNet takes for a picture of this size, of a prompt of so many chunks."""
        own, unet = self.manifest.image_size, self.manifest.graphs["unet"]
        if not unet.memory:  # of an older bundle
            return 0
        shapes = [tensor.shape for tensor in unet.inputs if CONTEXT in tensor.shape]  # [B, G, heads, L, d] of most
        heads = max((shape[2] for shape in shapes if isinstance(shape[2], int)), default=1)
        width = sum(math.prod(axis for axis in shape if isinstance(axis, int)) for shape in shapes)
        pixels = math.prod(self.manifest.latents_at(size)[1:])
        more = (chunks - 1) * self.manifest.tokenizer["length"]  # tokens: each branch has their products and weights
        return unet.memory * size[0] * size[1] / (own[0] * own[1]) + 2 * 4 * more * (width + 2 * heads * pixels)

    def needed(self, size: Size, rows: int = 1, chunks: int = 1) -> int:
        """Bytes that `rows` pictures of this size take at once, beside the engines. 0 for an unknown bundle."""
        own, graphs = self.manifest.image_size, self.manifest.graphs
        share = size[0] * size[1] / (own[0] * own[1])
        others = (share * graphs[name].memory for name in graphs if name.startswith("image_"))
        return int(SPARE * max(rows * self._row(size, chunks), *others, 0))

    def check(self, size: Size, chunks: int = 1) -> None:
        """Raises RequestError where one picture of this size does not fit."""
        if self._row(size, chunks) <= self._ran:
            return
        needed, there = self.needed(size, 1, chunks), self.free()
        if there is not None and needed > there:
            self.refuse(size, needed, chunks)

    def refuse(self, size: Size, needed: int, chunks: int = 1) -> NoReturn:
        """Raises the RequestError for a size that takes so many bytes."""
        prompt, shorter = (f" with {chunks} chunks of a prompt", ", or a shorter prompt") if chunks > 1 else ("", "")
        raise RequestError(
            f"size must fit into memory: {shown_size(size)}{prompt} takes about {needed / 1e9:.1f} GB, and "
            f"{(self.free() or 0) / 1e9:.1f} GB are free. Take a smaller one, such as "
            f"{shown_size(self.manifest.image_size)}{shorter}.",
            "size",
        )

    def rows(self, size: Size, chunks: int, most: int) -> int:
        """How many pictures of this size may run at once: at least 1, at most `most`."""
        there = self.free()
        rows, row = most, self._row(size, chunks)
        while rows > 1 and there is not None and rows * row > most * self._ran:
            if self.needed(size, rows, chunks) <= there:
                break
            rows -= 1
        return rows

    def ran(self, size: Size, chunks: int = 1) -> None:
        """Notes that a picture of this size was made."""
        self._ran = max(self._ran, self._row(size, chunks))


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
