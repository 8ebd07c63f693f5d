"""A model repository for NVIDIA Triton: its Python backend, decoupled, so that requests share the loop's batches.

    hd-export CHECKPOINT engines --triton repository
    tritonserver --model-repository repository          # with handiffuser in its Python

Inputs: PROMPT (string) and, optional, the settings of `settings.SETTINGS` in capitals: SEED, STEPS, ..., and LORA
(strings NAME[:SCALE]), adapters of the folder that the parameter `lora_folder` of config.pbtxt names. Outputs: IMAGE
uint8 [H, W, 3], JOINTS_2D float32 [2, 21, 2], VISIBILITY float32 [2], SEED int64 [1], WARNINGS (string). With several
people JOINTS_2D and VISIBILITY have an axis of people in front. A request is one picture. One that the client cancels
leaves the batch at the next step.
"""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

from ..contract import Manifest
from ..errors import ExportError
from ..settings import SETTINGS, Setting

NAME = "handiffuser"
FIELDS = {name.upper(): name for name in ("prompt", *SETTINGS, "lora")}  # Triton's input -> the field of Request


def _type(setting: Setting) -> str:
    if setting.kind is bool:
        return "TYPE_BOOL"
    if setting.kind is int:
        return "TYPE_INT32" if setting.most < 2**31 else "TYPE_INT64"
    return "TYPE_STRING" if setting.kind is str else "TYPE_FP32"


def config(manifest: Manifest, slots: int = 8) -> str:
    """The text of config.pbtxt."""
    height, width = (-1, -1) if manifest.size_multiple else manifest.image_size
    people = [manifest.num_people] if manifest.num_people > 1 else []
    outputs = {
        "IMAGE": ("TYPE_UINT8", [height, width, 3]),
        "JOINTS_2D": ("TYPE_FP32", [*people, 2, 21, 2]),
        "VISIBILITY": ("TYPE_FP32", [*people, 2]),
        "SEED": ("TYPE_INT64", [1]),
        "WARNINGS": ("TYPE_STRING", [-1]),
    }
    inputs = ",\n".join(
        ['  { name: "PROMPT" data_type: TYPE_STRING dims: [ 1 ] }']
        + [
            f'  {{ name: "{name.upper()}" data_type: {_type(setting)} dims: [ {1 + (setting.kind is tuple)} ] '
            "optional: true }"
            for name, setting in SETTINGS.items()
        ]
        + ['  { name: "LORA" data_type: TYPE_STRING dims: [ -1 ] optional: true }']
    )
    given = ",\n".join(
        f'  {{ name: "{name}" data_type: {kind} dims: {dims} }}' for name, (kind, dims) in outputs.items()
    )
    return f"""name: "{NAME}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [
{inputs}
]
output [
{given}
]
instance_group [ {{ kind: KIND_MODEL count: 1 }} ]
parameters {{ key: "slots" value {{ string_value: "{slots}" }} }}
parameters {{ key: "device" value {{ string_value: "auto" }} }}
parameters {{ key: "backend" value {{ string_value: "auto" }} }}
parameters {{ key: "lora_folder" value {{ string_value: "" }} }}
parameters {{ key: "lora_memory" value {{ string_value: "" }} }}
"""


def write(engines: Path, repository: Path) -> Path:
    """Writes `repository`/handiffuser, or nothing, with a copy of the engines. Returns that folder.

    Raises ExportError if the folder exists.
    """
    manifest = Manifest.load(engines, verify=False)
    folder, temporary = repository / NAME, repository / f".{NAME}.tmp"
    if folder.exists():
        raise ExportError(
            f"--triton must be a repository without the model {NAME}, got {repository}. Remove {folder} first."
        )
    shutil.rmtree(temporary, ignore_errors=True)
    version = temporary / "1"
    version.mkdir(parents=True)
    (temporary / "config.pbtxt").write_text(config(manifest), encoding="utf-8")
    model = resources.files(__name__.rpartition(".")[0]).joinpath("triton_model.py").read_bytes()
    (version / "model.py").write_bytes(model)
    shutil.copytree(engines, version / "engines")
    temporary.rename(folder)
    return folder
