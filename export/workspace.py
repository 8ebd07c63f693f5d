"""A folder beside a bundle's place, which belongs to one process while it makes the bundle.

    with workspace(Path("bundle")) as folder:
        ...                                   # make folder / "new"
        install(folder / "new", Path("bundle"))

A stopped export leaves its finished graphs there, with records of them (see `kept.py`). The next export for the same
target takes those that still fit. Everything else is removed, and the whole folder when an export ends.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..engines.plans import FOLDER as PLANS
from ..errors import ExportError, HanDiffuserError
from ..files import FULL

OLD = "old"  # the bundle that was in the target's place
KEPT = ".kept"  # in a folder of graphs: records of those that are finished


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """The folder `.NAME.partial` beside `out`, empty but for finished graphs. It is removed at the end.

    When Ctrl-C or a full disk stops the work, finished graphs stay there; after a refusal of ours they do not.
    Raises ExportError when another process works on the same target, and when the disk is full.
    """
    out = out.resolve()
    folder = out.with_name(f".{out.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder, out)
    ended = True
    try:
        _take_over(folder / OLD, out)  # after a kill in the middle of `install`
        _clear(folder)
        yield folder
    except HanDiffuserError:
        raise
    except BaseException as error:
        ended = False
        if isinstance(error, OSError) and error.errno in FULL:
            raise ExportError(
                f"The disk of {folder.parent} is full. Free some space and run the same command again: it goes on with "
                "the graphs that are finished."
            ) from error
        raise
    finally:
        if not ended:
            _clear(folder)
        if ended or not any(folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, out: Path) -> int | None:
    """Makes the folder and locks it until its file descriptor is closed, at the latest by the process's end."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        folder.mkdir(exist_ok=True)
        return None
    while True:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists() and os.path.samestat(os.fstat(lock), folder.stat()):
                return lock
            os.close(lock)  # its last owner removed it meanwhile
        except BlockingIOError:
            os.close(lock)
            raise ExportError(
                f"Another process is exporting into {out} right now. Wait for it, or choose another folder."
            ) from None


def _clear(folder: Path) -> None:
    """Removes all but folders with finished graphs."""
    for path in folder.iterdir():
        if any((path / KEPT).glob("[!.]*.json")):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def install(made: Path, out: Path) -> None:
    """Moves a finished folder of the workspace to `out`. An older bundle's plans stay."""
    out, old = out.resolve(), made.with_name(OLD)
    shutil.rmtree(made / KEPT, ignore_errors=True)
    if out.exists():
        out.replace(old)
    made.replace(out)
    _take_over(old, out)
    shutil.rmtree(old, ignore_errors=True)


def _take_over(old: Path, out: Path) -> None:
    """Restores an older bundle whose successor never came, or moves its plans to the successor."""
    if old.exists() and not out.exists():
        old.replace(out)
    elif (old / PLANS).exists() and not (out / PLANS).exists():
        (old / PLANS).replace(out / PLANS)
