"""HanDiffuser's deployment toolkit: prompt -> SMPL-H hands -> picture, without PyTorch at run time.

from handiffuser import HanDiffuser

pictures = HanDiffuser.load("demo").generate(["a right hand making a fist, blue background"], seed=7)
pictures[0].save("fist.png")  # .image is uint8 [H, W, 3], .hands are SMPL-H arrays

The names of `__all__` and the module `handiffuser.editing` are the public face: what other programs may rely on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import telemetry
from .errors import (
    BundleError,
    CheckpointError,
    DatasetError,
    DetectionError,
    EngineError,
    EvaluationError,
    ExportError,
    HanDiffuserError,
    HubError,
    OutputError,
    RequestError,
    TrainingError,
)

if TYPE_CHECKING:
    from .hands import load_hands, save_hands
    from .repair.pictures import find_hands, repair_hands
    from .runtime.pipeline import HanDiffuser
    from .runtime.requests import Request
    from .runtime.results import Failure, Picture
    from .settings import SETTINGS
    from .skeleton import draw_skeleton

    __version__: str

__all__ = [
    "SETTINGS",
    "BundleError",
    "CheckpointError",
    "DatasetError",
    "DetectionError",
    "EngineError",
    "EvaluationError",
    "ExportError",
    "Failure",
    "HanDiffuser",
    "HanDiffuserError",
    "HubError",
    "OutputError",
    "Picture",
    "Request",
    "RequestError",
    "TrainingError",
    "__version__",
    "draw_skeleton",
    "find_hands",
    "load_hands",
    "repair_hands",
    "save_hands",
]

telemetry.off()  # before a library that asks is imported

_LAZY = {
    "HanDiffuser": "runtime.pipeline",
    "Picture": "runtime.results",
    "Failure": "runtime.results",
    "Request": "runtime.requests",
    "SETTINGS": "settings",
    "load_hands": "hands",
    "save_hands": "hands",
    "draw_skeleton": "skeleton",
    "find_hands": "repair.pictures",
    "repair_hands": "repair.pictures",
}


def __getattr__(name: str) -> Any:
    # The contract and the errors must stay cheap to import, so names that need numpy and engines load on first use.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    if name == "__version__":
        from .installed import version

        return version("handiffuser") or "0+unknown"  # run from a source tree that was never installed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
