"""The finished graphs of an export, with which a stopped one (even by kill -9) continues.

    shelf = Shelf(folder, keys(checkpoint, body, precision="fp16", opset=23))
    shelf.clear()                                   # removes half-written, changed and foreign graphs
    if (found := shelf.find("unet")) is None:
        ...                                         # export it into `folder` and check it
        shelf.note("unet", spec, {"error": 1e-7})

A finished graph has a record in the folder KEPT, which is written last: its key, the SHA-256 of its files, and its
entry in the manifest. The key is a hash of everything that could change the graph: its weights and those before it in
the flow of data (with adapters merged), every configuration, this package's code, the libraries' versions and the
settings.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..contract import GraphSpec, file_digest
from ..files import written
from ..models.checkpoint import Checkpoint
from ..models.smplh import SMPLH
from ..schema import MisfitError, fit, read_json
from .source import code_digest
from .workspace import KEPT

# Graph -> the parts that first affect it. A part affects all later graphs, too: their example inputs come from it.
FIRST: dict[str, tuple[str, ...]] = {
    "text_encoder": ("text_encoder", "hand_prior"),
    "hand_prior": (),
    "hand_features": ("body", "text_hand_encoder"),
    "text_hand_encoder": (),
    "unet_context": ("unet", "position_kernel"),
    "unet_time": (),
    "unet": (),
    "image_decoder": ("vae",),
    "image_encoder": (),
}


def keys(checkpoint: Checkpoint, body: SMPLH, **settings: Any) -> dict[str, str]:
    """For each graph 64 hexadecimal digits for everything that could change it. Reads all weights once."""
    modules: dict[str, nn.Module] = {**checkpoint.modules(), "body": body}
    rest = [code_digest(), checkpoint.special_tokens, checkpoint.image_size, settings]
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, module in checkpoint.modules().items():
        config: Any = module.config  # transformers' is an object, diffusers' a dict
        config = config.to_dict() if hasattr(config, "to_dict") else config
        settled = {key: str(value) for key, value in config.items() if not key.startswith("_")}  # not where it lay
        digest.update(f"{name} {json.dumps(settled, sort_keys=True)}\n".encode())
    found = {}
    for graph, parts in FIRST.items():
        for part in parts:
            digest.update(f"{part} {_digest(modules[part]) if part in modules else 'none'}\n".encode())
        found[graph] = hashlib.sha256(f"{graph} {digest.hexdigest()}".encode()).hexdigest()
    return found


def _digest(module: nn.Module) -> str:
    """SHA-256 of a module's tensors, with the buffers that its state_dict leaves out."""
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor.detach().numpy()).data)
    return digest.hexdigest()


class Shelf:
    """A folder in which a bundle is made, and the records of its finished graphs."""

    def __init__(self, folder: Path, keys: Mapping[str, str]) -> None:
        self.folder, self.keys = folder, keys

    def clear(self) -> None:
        """Removes all but finished, unchanged graphs of these keys from the folder."""
        good: set[str] = set()
        for graph in self.keys:
            record = self._record(graph)
            try:
                files = fit(record["files"], dict[str, str])
                whole = record["key"] == self.keys[graph] and bool(files)
                whole = whole and all(file_digest(self.folder / Path(name).name) == sha for name, sha in files.items())
            except (KeyError, OSError, MisfitError):
                whole = False
            if whole:
                good |= files.keys()
            else:
                self._path(graph).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir() and path.name != KEPT:
                shutil.rmtree(path)
            elif path.is_file() and path.name not in good:
                path.unlink()

    def find(self, graph: str) -> tuple[GraphSpec, dict[str, Any]] | None:
        """The contract of a graph that `clear` left, and its note."""
        record = self._record(graph)
        return (fit(record["spec"], GraphSpec), record["noted"]) if record else None

    def note(self, graph: str, spec: GraphSpec, noted: dict[str, Any]) -> None:
        """Notes that a graph is finished. noted: what `find` returns with it."""
        files = {path.name: file_digest(path) for path in sorted(self.folder.glob(f"{spec.file}*"))}
        record = {"key": self.keys[graph], "files": files, "spec": asdict(spec), "noted": noted}
        record = json.loads(json.dumps(record))
        path = self._path(graph)
        path.parent.mkdir(exist_ok=True)
        with written(path) as temporary:
            temporary.write_text(json.dumps({**record, "sha256": _hash(record)}), encoding="utf-8")

    def _record(self, graph: str) -> dict[str, Any]:
        """A record as `note` wrote it; empty where it is missing or changed."""
        try:
            record = fit(read_json(self._path(graph)), dict[str, Any])
        except (OSError, MisfitError):
            return {}
        return record if record.pop("sha256", None) == _hash(record) else {}

    def _path(self, graph: str) -> Path:
        return self.folder / KEPT / f"{graph}.json"


def _hash(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
