"""An output folder that lies elsewhere: any URL that fsspec knows, such as s3://bucket/run.

    with open_folder("s3://bucket/run") as folder: ...       # else as OutputFolder

An object is there as a whole or not at all, so that nothing is renamed: `<id>.json` is written last. There are no locks
in object stores. The one who writes keeps an object that says so, and renews it; another one who finds it fresh is
refused. Between two who begin within the same second that does not tell: then both make the same pictures.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from typing import Any

from ..schema import LARGEST_JSON, MisfitError, parse_json
from .outputs import _SUFFIXES, INDEX, OutputError, OutputFolder, contact_sheet

LOCK = ".hd-run.lock"
RENEWED, STALE = 15.0, 60.0  # seconds


def open_folder(path: str, shared: bool = False) -> OutputFolder:
    """A folder on a disk, or a URL's."""
    return RemoteFolder(path, shared) if "://" in path else OutputFolder(path, shared)


class RemoteFolder(OutputFolder):
    """Pictures under a URL. Raises OutputError where fsspec or what it needs for this kind is missing."""

    def __init__(self, url: str, shared: bool = False) -> None:
        super().__init__(url, shared)
        self.url = url.rstrip("/")
        kind = url.partition("://")[0]
        try:
            import fsspec

            self.files, self.root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            needed = {"fsspec": "fsspec", "s3fs": "s3fs (handiffuser[s3])"}.get(
                error.name or "", error.name or str(error)
            )
            raise OutputError(f"{kind}:// needs {needed}, which is not installed.") from None
        except ValueError as error:
            raise OutputError(f"{url} cannot be written: {str(error).rstrip('.')}.") from None
        self._stop = threading.Event()
        self._names: set[str] | None = None
        self._mark = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(4)}"

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _open(self) -> None:
        if self.shared:
            return
        try:
            self._names = {path.rpartition("/")[2] for path in self.files.find(self.root)}
            found = json.loads(self.files.cat_file(self._at(LOCK))) if LOCK in self._names else None
        except (OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError):
                self._names, found = set(), None
            else:
                raise self._refusal(error if isinstance(error, OSError) else OSError(str(error))) from error
        if isinstance(found, dict) and time.time() - float(found.get("time", 0)) < STALE:
            raise OutputError(
                f"Another hd-run is writing into {self.url} ({found.get('by')}). Wait for it, or a minute where it was "
                "killed; or name another place with --output."
            )
        self.files.makedirs(self.root, exist_ok=True)
        self._renew()
        threading.Thread(target=self._keep, daemon=True).start()

    def _renew(self) -> None:
        self.files.pipe_file(self._at(LOCK), json.dumps({"time": time.time(), "by": self._mark}).encode())

    def _keep(self) -> None:
        while not self._stop.wait(RENEWED):
            try:
                self._renew()
            except Exception:  # what is written next says what is wrong
                continue

    def _close(self) -> None:
        self._stop.set()
        if not self.shared:
            try:
                self.files.rm_file(self._at(LOCK))
            except OSError:
                return

    def _record(self, id: str) -> dict[str, Any] | None:
        names = self._names
        if names is not None and f"{id}.json" not in names:  # listed once: a store is asked by the thousand otherwise
            return None
        try:
            content = self.files.cat_file(self._at(f"{id}.json"))
            value = parse_json(content) if len(content) <= LARGEST_JSON else None
            there = all(
                id + suffix in names if names is not None else self.files.exists(self._at(id + suffix))
                for suffix in _SUFFIXES
            )
        except (OSError, MisfitError):
            return None
        return value if there and isinstance(value, dict) and isinstance(value.get("key"), str) else None

    def _write(self, files: dict[str, bytes]) -> None:
        try:
            for name, content in files.items():
                self.files.pipe_file(self._at(name), content)
        except Exception as error:  # stores fail in many ways
            raise OutputError(
                f"{self.url} cannot be written: {str(error).rstrip('.')[:300]}. Try again later."
            ) from error

    def write_index(self) -> Any:
        """Rebuilds `index.html`; returns its URL."""
        self.files.invalidate_cache()
        self._names = {path.rpartition("/")[2] for path in self.files.find(self.root)}
        records = []
        for name in sorted(self._names):
            if name.endswith(".json"):
                record = self._record(name[:-5])
                if record is not None:
                    records.append({**record, "id": name[:-5]})
        self._write({INDEX: contact_sheet(records).encode()})
        return f"{self.url}/{INDEX}"
