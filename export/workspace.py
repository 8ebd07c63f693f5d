"""Where a folder is made before it takes its place: beside its target, in a folder that is one process's alone.

    with workspace(Path("bundle")) as folder:
        ...                                   # make folder / "new"
        install(folder / "new", Path("bundle"))

An export that is stopped leaves the graphs that it finished, in a folder with records of them (see `kept.py`); the
next one for the same target takes what still fits. All else goes, and all of it when an export ends.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..engines.plans import FOLDER as PLANS
from ..errors import ExportError, HanDiffuserError

OLD = "old"  # what stood in the target's place
KEPT = ".kept"  # in a folder of graphs: records of those that are finished


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """The folder `.NAME.partial` beside `out`, empty but for finished graphs; it is removed with all that is in it.

    Where the work in it is stopped (Ctrl-C, a full disk; no refusal of ours) finished graphs stay there.
    Raises ExportError when another process works on the same target.
    """
    out = out.resolve()
    folder = out.with_name(f".{out.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder, out)
    ended = True
    try:
        _take_over(folder / OLD, out)  # of a process that was killed in the middle of `install`
        _clear(folder)
        yield folder
    except HanDiffuserError:
        raise
    except BaseException:
        ended = False
        raise
    finally:
        if not ended:
            _clear(folder)
        if ended or not any(folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, out: Path) -> int | None:
    """Makes the folder and locks it until its file descriptor is closed, by a kill at the latest."""
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
            os.close(lock)  # its last owner removed it in between
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
    """Puts a finished folder of a workspace of `out` into its place; an older bundle's plans stay."""
    out, old = out.resolve(), made.with_name(OLD)
    shutil.rmtree(made / KEPT, ignore_errors=True)
    if out.exists():
        out.replace(old)
    made.replace(out)
    _take_over(old, out)
    shutil.rmtree(old, ignore_errors=True)


def _take_over(old: Path, out: Path) -> None:
    """What an older bundle still has to give: itself, if its successor never came, or its plans."""
    if old.exists() and not out.exists():
        old.replace(out)
    elif (old / PLANS).exists() and not (out / PLANS).exists():
        (old / PLANS).replace(out / PLANS)
