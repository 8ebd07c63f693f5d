"""Whole files or none: write beside, then rename. And locks, so that two processes do not write into one folder."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from weakref import WeakSet

FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # numbers of an OSError where the disk has no room
_held: WeakSet[IO[str]] = WeakSet()  # the locks of this process


@contextlib.contextmanager
def written(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary name beside `path` that becomes `path` when the block ends.

    When the block raises, `path` stays as it was, and the temporary file is removed.

        with written(folder / "weights.safetensors") as temporary:
            save_file(tensors, temporary)

    The file gets the mode that the umask says; safetensors and ONNX would let the owner alone read it.
    durable: the content reaches the disk before the new name does.
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
    """Gives files the mode that the umask says, so that a server can read them as another user."""
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        path.chmod(0o666 & ~umask)


def lock(path: Path) -> IO[str]:
    """Takes a lock, which the system releases when this process ends, however it ends, or when the file is closed.

    Raises BlockingIOError when another process has it, or removes it just now. Only its owner may remove the file.
    Processes that this one forks do not hold it: they may outlive it by seconds.
    """
    file = open(path, "a+", encoding="ascii")  # noqa: SIM115 (open as long as the lock is held)
    try:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise BlockingIOError(errno.EAGAIN, "")  # two runs would lock two files
        except ImportError:  # Windows
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError as error:
        file.seek(0)
        owner = file.read(20).strip()
        file.close()
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise BlockingIOError(errno.EAGAIN, f"process {owner}" if owner else "its lock is held") from None
        raise
    file.seek(0)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()
    _held.add(file)
    return file


def _let_go() -> None:
    """In a forked process: closes its copies, which would hold the locks as long as it lives."""
    for file in list(_held):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
