"""Libraries that report their use to their makers: off in every process that imports handiffuser.

`import handiffuser` calls `off` before it imports any of them. Processes that we start inherit the variables. A
variable that the user has set stays as it is, so `ORT_DISABLE_TELEMETRY=0` turns ONNX Runtime's reports on.

Looked through, and silent as we use them: PyTorch, accelerate (only with a tracker, and we give it none), TensorRT,
Polygraphy, peft, MediaPipe 0.10.14, tensorboard, FastAPI and uvicorn.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import cast

OFF = {
    # On Linux and macOS (microsoft/onnxruntime#27379; seen in 1.32): a device id and events in ~/.cache/Microsoft, and
    # uploads. It reads the variable once, while it is imported.
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray sends a report an hour from the process that starts the cluster
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub; diffusers and transformers ask it
}


def off() -> None:
    """Sets each variable of OFF that is not set, and keeps OpenVINO from its package for reports."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
    if not openvino_is_wanted():
        # `import openvino` sends an event to Google Analytics, and no variable stops it. While this entry is None, the
        # package cannot be imported, and OpenVINO uses its own stub.
        sys.modules.setdefault("openvino_telemetry", cast(ModuleType, None))


def openvino_is_wanted() -> bool:
    """Whether the user said yes to OpenVINO's reports, with its own command: `opt_in_out --opt_in`."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the user has no home, as in a container
        if os.name == "nt":
            folder = Path(os.environ.get("LOCALAPPDATA", "")) / "Intel Corporation"
        else:
            folder = Path.home() / "intel"
        return (folder / "openvino_telemetry").read_text(encoding="utf-8").strip() == "1"
    return False
