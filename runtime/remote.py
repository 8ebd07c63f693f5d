"""An output folder at any URL that fsspec knows, such as s3://bucket/run.

    with open_folder("s3://bucket/run") as folder: ...       # else as OutputFolder

Object stores write whole objects, so that nothing is renamed: `<id>.json` is written last. Object stores have no locks.
A writer keeps a lock object and changes it every RENEWED seconds. A second writer watches that object: while it
changes, the second writer is refused. After STALE seconds without a change the second writer takes over. Clocks of two
machines are never compared. A writer that lost its place, because its machine slept, finds another name in the object,
and ends.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import OutputError
from ..schema import MAX_JSON_BYTES, MisfitError, parse_json
from .outputs import _SUFFIXES, INDEX, OutputFolder, contact_sheet

LOCK = ".hd-run.lock"
RENEWED, STALE = 5.0, 30.0  # seconds of the monotonic clock of the writer that waits


def open_folder(path: str, shared: bool = False, say: Callable[[str], None] = lambda sentence: None) -> OutputFolder:
    """Makes an OutputFolder, or a RemoteFolder for a URL. say: called with the reason why opening takes long."""
    return RemoteFolder(path, shared, say) if "://" in path else OutputFolder(path, shared)


class RemoteFolder(OutputFolder):
    """Pictures under a URL. Raises OutputError where fsspec, or the package for this kind of URL, is missing."""

    def __init__(self, url: str, shared: bool = False, say: Callable[[str], None] = lambda sentence: None) -> None:
        super().__init__(url, shared)
        self.where = self.url = url.rstrip("/")
        self.say = say
        kind = url.partition("://")[0]
        try:
            import fsspec

            self.files, self.root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:  # fsspec drops the name where s3fs is missing
            name = error.name or {"s3": "s3fs"}.get(kind, str(error))
            needed = {"s3fs": "s3fs (handiffuser[s3])"}.get(name, name)
            raise OutputError(f"{kind}:// needs {needed}, which is not installed. Install it.") from None
        except ValueError as error:
            raise OutputError(f"{url} cannot be written: {str(error).rstrip('.')}.") from None
        self._stop = threading.Event()
        self._names: set[str] | None = None
        self._mark = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(4)}"
        self._beats = 0
        self._lost = ""  # the writer that has taken over

    def _ask(self, what: str, *arguments: Any, **named: Any) -> Any:
        """Calls a method of the store. Raises FileNotFoundError, and OutputError for any other failure."""
        try:
            return getattr(self.files, what)(*arguments, **named)
        except FileNotFoundError:
            raise
        except Exception as error:
            words = str(getattr(error, "strerror", None) or error).strip().splitlines() or [type(error).__name__]
            raise OutputError(
                f"{self.url} cannot be used: {words[0].rstrip('.')[:300]}. The finished pictures are kept. Mend the "
                "cause and run the same command again: it goes on from there."
            ) from error

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _open(self) -> None:
        if self.shared:
            return
        self._look_for_life()
        self._ask("makedirs", self.root, exist_ok=True)
        self._renew()
        try:
            self._names = self._listed()
        except BaseException:
            self._close()
            raise
        threading.Thread(target=self._keep, daemon=True).start()

    def _listed(self) -> set[str]:
        """The names of all objects."""
        self.files.invalidate_cache()
        try:
            return {path.rpartition("/")[2] for path in self._ask("find", self.root)}
        except FileNotFoundError:
            return set()

    def _lock_content(self) -> bytes | None:
        try:
            content: bytes = self._ask("cat_file", self._at(LOCK))
        except FileNotFoundError:
            return None
        return content

    def _look_for_life(self) -> None:
        """Returns when the lock is gone, or its writer. Raises OutputError when that writer is alive."""
        before = self._lock_content()
        if before is None:
            return
        self.say(
            f"Another hd-run has written into {self.url}. Waiting up to {STALE:g} s to see whether it still does ..."
        )
        end = time.monotonic() + STALE
        while time.monotonic() < end:
            time.sleep(min(1.0, STALE / 20))
            now = self._lock_content()
            if now is None:
                return
            if now != before:
                raise OutputError(
                    f"Another hd-run is writing into {self.url} ({_owner(now)}). Wait for it, or name another place "
                    "with --output."
                )

    def _renew(self) -> None:
        """Changes the lock. Sets `_lost` instead where another writer has taken it."""
        now = self._lock_content()
        if self._beats and now is not None and self._mark.encode() not in now:
            self._lost = _owner(now)
            return
        self._beats += 1
        self._ask("pipe_file", self._at(LOCK), json.dumps({"by": self._mark, "beat": self._beats}).encode())

    def _keep(self) -> None:
        while not self._lost and not self._stop.wait(RENEWED):
            try:
                self._renew()
            except Exception:  # the next write raises the cause
                continue

    def _close(self) -> None:
        self._stop.set()
        if not self.shared and not self._lost:
            try:
                self._ask("rm_file", self._at(LOCK))
            except (OSError, OutputError):
                return

    def flush(self) -> None:
        super().flush()
        self._check()

    def _check(self) -> None:
        if self._lost:
            raise OutputError(
                f"Another hd-run ({self._lost}) has taken over {self.url}, because this one was silent for "
                f"{STALE:g} s. The pictures of both stay."
            )

    def _record(self, id: str) -> dict[str, Any] | None:
        """Raises OutputError where the store fails: a finished picture must not be made twice."""
        names = self._names
        if names is not None and f"{id}.json" not in names:  # listed once, to save thousands of calls
            return None
        try:
            content = self._ask("cat_file", self._at(f"{id}.json"))
            value = parse_json(content) if len(content) <= MAX_JSON_BYTES else None
        except (FileNotFoundError, MisfitError):
            return None
        there = all(
            id + suffix in names if names is not None else self._ask("exists", self._at(id + suffix))
            for suffix in _SUFFIXES
        )
        return value if there and isinstance(value, dict) and isinstance(value.get("key"), str) else None

    def _write(self, files: dict[str, bytes]) -> None:
        self._check()
        for name, content in files.items():
            try:
                self._ask("pipe_file", self._at(name), content)
            except FileNotFoundError:
                raise OutputError(f"{self.url} does not exist. Make it, or name another --output.") from None

    def write_index(self) -> Any:
        """Rebuilds `index.html` and returns its URL."""
        self._names = self._listed()
        records = []
        for name in sorted(self._names):
            if name.endswith(".json"):
                record = self._record(name[:-5])
                if record is not None:
                    records.append({**record, "id": name[:-5]})
        self._write({INDEX: contact_sheet(records).encode()})
        return f"{self.url}/{INDEX}"


def _owner(lock: bytes) -> str:
    """The writer that a lock names."""
    try:
        return str(json.loads(lock)["by"])[:200]
    except (ValueError, TypeError, LookupError):
        return "without a name"
