"""An output folder that lies elsewhere: any URL that fsspec knows, such as s3://bucket/run.

    with open_folder("s3://bucket/run") as folder: ...       # else as OutputFolder

An object is there as a whole or not at all, so that nothing is renamed: `<id>.json` is written last. There are no locks
in object stores. The one who writes keeps an object that says so, and changes it every few seconds. Another one who
finds it looks whether it still changes: then it is refused. What does not change for STALE seconds is a dead one's, and
its place is taken. No two clocks are ever compared: those of two machines differ, and may be set while a run goes on.
A writer whose place was taken meanwhile, because its machine slept, sees that by the same object, and ends.
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

from ..schema import LARGEST_JSON, MisfitError, parse_json
from .outputs import _SUFFIXES, INDEX, OutputError, OutputFolder, contact_sheet

LOCK = ".hd-run.lock"
RENEWED, STALE = 5.0, 30.0  # seconds, by the clock of the one who waits, which nobody can set


class RemoteFolder(OutputFolder):
    """Pictures under a URL. Raises OutputError where fsspec or what it needs for this kind is missing."""

    def __init__(self, url: str, shared: bool = False, say: Callable[[str], None] = lambda sentence: None) -> None:
        super().__init__(url, shared)
        self.where = self.url = url.rstrip("/")
        self.say = say
        kind = url.partition("://")[0]
        try:
            import fsspec

            self.files, self.root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:  # fsspec wraps the one of s3fs in a sentence, without its name
            name = error.name or {"s3": "s3fs"}.get(kind, str(error))
            needed = {"s3fs": "s3fs (handiffuser[s3])"}.get(name, name)
            raise OutputError(f"{kind}:// needs {needed}, which is not installed.") from None
        except ValueError as error:
            raise OutputError(f"{url} cannot be written: {str(error).rstrip('.')}.") from None
        self._stop = threading.Event()
        self._names: set[str] | None = None
        self._mark = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(4)}"
        self._beats = 0
        self._lost = ""  # who has taken this one's place

    def _ask(self, what: str, *arguments: Any, **named: Any) -> Any:
        """A method of the store's. Raises FileNotFoundError, and OutputError for all else: stores fail in many ways."""
        try:
            return getattr(self.files, what)(*arguments, **named)
        except FileNotFoundError:
            raise
        except Exception as error:
            words = str(getattr(error, "strerror", None) or error).strip().splitlines() or [type(error).__name__]
            raise OutputError(
                f"{self.url} cannot be used: {words[0].rstrip('.')[:300]}. The pictures finished so far are kept: see "
                "to it and run the same command again, it goes on from there."
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
        """Names of all that is there."""
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
        """Returns when there is no lock, or nobody who renews it. Raises OutputError when somebody does."""
        before = self._lock_content()
        if before is None:
            return
        self.say(f"Looking for {STALE:g} s whether the hd-run that wrote into {self.url} is still alive ...")
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
        """A sign of life. Sets `_lost` instead where the lock has become somebody else's."""
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
            except Exception:  # what is written next says what is wrong
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
                f"Another hd-run ({self._lost}) has taken over {self.url}, because this one did not say for "
                f"{STALE:g} s that it was alive. What it wrote stays."
            )

    def _record(self, id: str) -> dict[str, Any] | None:
        """Raises OutputError where the store cannot say: what is there must not be made again."""
        names = self._names
        if names is not None and f"{id}.json" not in names:  # listed once: a store is asked by the thousand otherwise
            return None
        try:
            content = self._ask("cat_file", self._at(f"{id}.json"))
            value = parse_json(content) if len(content) <= LARGEST_JSON else None
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
                raise OutputError(f"{self.url} is not there (any more). Make it, or name another --output.") from None

    def write_index(self) -> Any:
        """Rebuilds `index.html`; returns its URL."""
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
    """Who a lock says that it belongs to."""
    try:
        return str(json.loads(lock)["by"])[:200]
    except (ValueError, TypeError, LookupError):
        return "that says nothing of itself"
