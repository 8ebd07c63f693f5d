"""Who may ask: API keys from a file, a line each, `name: key` or the key alone. `#` begins a comment.

Only their SHA-256 is kept, and all are compared, each in constant time: how long it takes says nothing about any.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from ..errors import HanDiffuserError
from ..schema import MisfitError, read_file

LARGEST = 1 << 20  # bytes of a file of keys
SHORTEST = 8  # characters


class Keys:
    """`path` None: everyone may ask."""

    def __init__(self, path: str | Path | None) -> None:
        """Raises HanDiffuserError when the file cannot be read or holds no key."""
        self.path = Path(path) if path is not None else None
        self.digests: list[tuple[bytes, str]] = []
        self.load()

    def load(self) -> None:
        """Reads the file again. The old keys stay where that fails."""
        if self.path is None:
            return
        try:
            text = read_file(self.path, LARGEST).decode("utf-8")
        except (OSError, UnicodeDecodeError, MisfitError) as error:
            why = getattr(error, "strerror", None) or error
            raise HanDiffuserError(f"The keys file {self.path} cannot be read: {why}.") from None
        digests = []
        for number, line in enumerate(text.splitlines(), 1):
            line = line.partition("#")[0].strip()
            name, _, key = (part.strip() for part in line.rpartition(":"))
            if not line:
                continue
            if len(key) < SHORTEST:
                raise HanDiffuserError(
                    f"The key in line {number} of {self.path} is shorter than {SHORTEST} characters. Take a longer one."
                )
            digests.append((_digest(key), name or f"key {number}"))
        if not digests:
            raise HanDiffuserError(f"The keys file {self.path} holds no key. Write one a line, as `name: key`.")
        self.digests = digests

    def who(self, key: str) -> str | None:
        """The name of a key's owner, or None."""
        given, found = _digest(key), None
        for digest, name in self.digests:
            if hmac.compare_digest(digest, given):
                found = name
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
