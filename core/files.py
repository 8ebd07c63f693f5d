"""Whole files or none: write beside, then rename."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary name beside `path` that becomes `path` when the block ends. When the block raises, both the
    temporary file and the change are gone.

        with written(folder / "weights.safetensors") as temporary:
            save_file(tensors, temporary)

    The file gets the mode that the umask says: safetensors and ONNX's external data leave theirs to the owner alone.
    durable: the content is on the disk before the name is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        open_to_others(temporary)
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def open_to_others(*paths: Path) -> None:
    """Gives files the mode that the umask says, so that a server of another user can read them."""
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        path.chmod(0o666 & ~umask)
