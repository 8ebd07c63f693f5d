"""The adapters that clients may name: the .safetensors files of one folder. A client never names a path.

adapters = Adapters(Path("loras"))
adapters.paths(["style:0.8"])       # ("loras/style.safetensors:0.8",), for `Request.lora`
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import HanDiffuserError, RequestError
from ..schema import listed

SHOWN = 20  # names in an error


class Adapters:
    """folder: read at each request, so that new files count at once; None: the server has none. option: what names it
    to the server's owner."""

    def __init__(self, folder: Path | None, option: str = "--lora-folder") -> None:
        if folder is not None and not folder.is_dir():
            raise HanDiffuserError(f"{option} must be a folder, got {folder}. Name one with .safetensors files.")
        self.folder, self.option = folder, option

    def names(self) -> dict[str, Path]:
        """Name -> file. Links that lead out of the folder count: its owner put them there."""
        if self.folder is None:
            return {}
        found = sorted(self.folder.glob("*.safetensors"))
        return {path.stem: path for path in found if path.is_file() and not path.name.startswith(".")}

    def paths(self, said: str | Sequence[str] | None) -> tuple[str, ...] | None:
        """What a client names, NAME[:SCALE] each, as `Request.lora`. Raises RequestError for unknown names."""
        if not said:
            return None
        known = self.names()
        return tuple(self._path(known, one) for one in ([said] if isinstance(said, str) else said))

    def hidden(self, sentence: str) -> str:
        """A sentence with names in place of files of this machine."""
        for name, path in self.names().items():
            sentence = sentence.replace(str(path.resolve()), name).replace(str(path), name)
        return sentence

    def listed(self) -> list[dict[str, Any]]:
        """As the web UI lists its own. `path` is the name: the server's folders are not for clients."""
        return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in self.names()]

    def _path(self, known: dict[str, Path], said: str) -> str:
        name, scale = said, "1"
        if name.removesuffix(".safetensors") not in known:
            name, _, scale = said.rpartition(":")
        name = name.removesuffix(".safetensors")
        if name not in known:
            there = f"one of {listed(known, SHOWN)}" if known else "left out: this server has no adapters"
            remedy = "Ask with one of these names." if known else f"Its owner gives it some with {self.option}."
            raise RequestError(f"lora must be {there}, got {said[:60]!r}. {remedy}", "lora")
        try:
            return f"{known[name]}:{float(scale)}"
        except ValueError:
            raise RequestError(
                f"lora must be NAME:SCALE with a number such as 0.8, got {said[:60]!r}. Correct it.", "lora"
            ) from None
