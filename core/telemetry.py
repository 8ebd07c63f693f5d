"""Libraries that report their use to their makers: off in every process that imports handiffuser.

`import handiffuser` calls `off` before it imports any of them. Processes that we start inherit the variables. A
variable that the user has set stays as it is, so `ORT_DISABLE_TELEMETRY=0` turns ONNX Runtime's reports on.

Looked through, and silent as we use them: OpenVINO (only its model converter reports), PyTorch, accelerate (only with a
tracker, and we give it none), TensorRT, Polygraphy, MediaPipe 0.10.14, tensorboard, FastAPI and uvicorn.
"""

from __future__ import annotations

import os

OFF = {
    # On Linux and macOS, since 1.29 (microsoft/onnxruntime#27379): a device id and events in ~/.cache/Microsoft, and
    # uploads. It reads the variable once, while it is imported.
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray sends a report an hour from the process that starts the cluster
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub; diffusers and transformers ask it
}


def off() -> None:
    """Sets each variable of OFF that is not set."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
