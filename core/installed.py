"""Which packages are installed, by the names of the folders in which installers note them (PEP 376 and 427).

`importlib.metadata` says the same and more, but it reads mail headers, and its import takes as long as ONNX Runtime's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys

NOTED = ".dist-info"


def version(package: str) -> str | None:
    """The version of an installed package, such as "1.27.0"; None for a package that is not installed."""
    return _versions(tuple(sys.path)).get(_normal(package))


@functools.lru_cache(maxsize=4)
def _versions(places: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for place in places:
        with contextlib.suppress(OSError):  # an archive, or a folder that is gone
            for name in os.listdir(place or "."):
                package, dash, number = name.removesuffix(NOTED).partition("-")
                if dash and name.endswith(NOTED):
                    found.setdefault(_normal(package), number)
    return found


def _normal(package: str) -> str:
    return re.sub("[-_.]+", "-", package).lower()
