"""The demo that ships in the package, and the word that names it.

`demo` stands for it where a command asks for a checkpoint or for engines. A folder of your own with that name is
`./demo`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .errors import BundleError, CheckpointError


def bundle_path() -> Path:
    """The folder of the shipped bundle. Raises BundleError when this installation lacks it."""
    path = _folder("bundle")
    if not (path / "manifest.json").is_file():
        raise BundleError(
            "This installation has no demo bundle. Install the package again from a complete copy, or make a bundle "
            "with `hd-export CHECKPOINT OUT` and name its folder instead of `demo`."
        )
    return path


def checkpoint_path() -> Path:
    """The folder of the shipped checkpoint. Raises CheckpointError when this installation lacks it."""
    path = _folder("checkpoint")
    if not (path / "model_index.json").is_file():
        raise CheckpointError(
            "This installation has no demo checkpoint. Install the package again from a complete copy, or train "
            "the demo with `hd-train` and name its folder instead of `demo`."
        )
    return path


def resolve(name: str | Path, kind: str) -> Path:
    """The folder that a user means: the shipped one for the word "demo", else the path itself.

    kind: "bundle" or "checkpoint".
    """
    if str(name) != "demo" or isinstance(name, Path):
        return Path(name)
    return bundle_path() if kind == "bundle" else checkpoint_path()


def _folder(name: str) -> Path:
    found = find_spec("handiffuser.demo")
    assert found is not None and found.origin is not None
    return Path(found.origin).with_name(name)
