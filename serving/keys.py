"""API keys from a file with a line for each, `name: key` or the key alone. `#` begins a comment.

The server keeps only their SHA-256. It compares all of them, each in constant time, so that the time reveals nothing.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from ..errors import HanDiffuserError
from ..schema import MisfitError, read_file

MAX_FILE_BYTES = 1 << 20
MIN_KEY_CHARACTERS = 8


class Keys:
    """path: None if the server takes requests without a key."""

    def __init__(self, path: str | Path | None) -> None:
        """Raises HanDiffuserError when the file cannot be read or has no key in it."""
        self.path = Path(path) if path is not None else None
        self.digests: list[tuple[bytes, str]] = []
        self.load()

    def load(self) -> None:
        """Reads the file again. If that fails, the old keys stay."""
        if self.path is None:
            return
        try:
            text = read_file(self.path, MAX_FILE_BYTES).decode("utf-8")
        except (OSError, UnicodeDecodeError, MisfitError) as error:
            why = getattr(error, "strerror", None) or error
            raise HanDiffuserError(f"The keys file {self.path} cannot be read: {why}.") from None
        digests = []
        for number, line in enumerate(text.splitlines(), 1):
            line = line.partition("#")[0].strip()
            name, _, key = (part.strip() for part in line.rpartition(":"))
            if not line:
                continue
            if len(key) < MIN_KEY_CHARACTERS:
                raise HanDiffuserError(
                    f"The key in line {number} of {self.path} must have at least {MIN_KEY_CHARACTERS} characters, got "
                    f"{len(key)}. Choose a longer one."
                )
            digests.append((_digest(key), name or f"key {number}"))
        if not digests:
            raise HanDiffuserError(
                f"The keys file {self.path} must have at least one key, got 0. Write lines of `name: key`."
            )
        self.digests = digests

    def owner(self, key: str) -> str | None:
        """The name of a key's owner, or None."""
        given, found = _digest(key), None
        for digest, name in self.digests:
            if hmac.compare_digest(digest, given):
                found = name
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
