"""What a user names where a command asks for a checkpoint or for engines: the shipped demo, a folder, a Hub id.

The word `demo` stands for the demo that ships in the package. A folder of your own with that name is `./demo`.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from . import hub
from .errors import BundleError, CheckpointError

if TYPE_CHECKING:
    import numpy as np

# What tells a body, and the sha256 of these arrays of the demo's bodies: the human one (demo/human.py), and the plain
# one that ships with the demo (demo/body.py). Both lack pose correctives (`posedirs`).
COMPARED = ("v_template", "shapedirs", "J_regressor", "weights")
FREE = (
    "16046fd5a993576844d5f6a65d621ee605eceaad92a6483949fac0c697b9f762",
    "b8873bb2607254d2ce38feb707861bd09fe428305a2bd32e0ff4369e8ded806b",
)


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


def body_path() -> Path:
    """The demo's own SMPL-H body, which is free. Raises CheckpointError when this installation lacks the checkpoint."""
    return checkpoint_path() / "body" / "smplh.npz"


def resolve(name: str | Path, kind: str, quiet: bool = False) -> Path:
    """The folder that a user names: the shipped one for the word "demo", the Hub's copy for an id, else the path.

    kind: "bundle" or "checkpoint". quiet: without progress where it downloads. Raises HubError; see `hub.fetch`.
    """
    if isinstance(name, Path):
        return name
    if name == "demo":
        return bundle_path() if kind == "bundle" else checkpoint_path()
    if hub.parse(name) is not None:
        return hub.fetch(name, kind, quiet=quiet)
    return Path(name)


def is_shipped(bundle: str | Path) -> bool:
    """Whether a folder is that of the shipped bundle, however it is named."""
    return Path(bundle).resolve() == _folder("bundle").resolve()


def is_demo_body(body: Path | Mapping[str, np.ndarray]) -> bool:
    """Whether a body, a file or its arrays, is one of the demo's, which are free. Its content decides, not its place.

    False, too, for a file that cannot be read.
    """
    import numpy as np

    try:
        if isinstance(body, Path):
            with np.load(body, allow_pickle=False) as file:
                body = {name: file[name] for name in (*COMPARED, "posedirs")}
        digest = sha256()
        for name in COMPARED:
            digest.update(np.ascontiguousarray(body[name], np.float32).tobytes())
        return digest.hexdigest() in FREE and not np.any(body["posedirs"])
    except (KeyError, OSError, ValueError):
        return False


def _folder(name: str) -> Path:
    found = find_spec("handiffuser.demo")
    assert found is not None and found.origin is not None
    return Path(found.origin).with_name(name)
