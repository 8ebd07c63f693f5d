"""Notes what an export was made from, so that the same command again exports nothing. Imports neither torch nor ONNX.

    source = fingerprint(Path("checkpoint"), body=None, precision="fp16", image_size=None, opset=23)
    changed(Path("bundle"), source)          # [] when the bundle is current, else what changed, in words

It tells files apart by name, size and time of their last change, as git and make do: hashing a Stable Diffusion
checkpoint takes too long for "nothing to do". A needless export gives the same graphs, byte for byte, and so the same
engines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import contract, installed
from ..contract import MANIFEST, Manifest
from ..errors import BundleError

WORDS = {
    "checkpoint": "the checkpoint changed",
    "body": "the body changed",
    "adapters": "the adapters changed",
    "settings": "the settings changed",
    "code": "this package or one that exports changed",
}
REWRITES = (
    "graphs",
    "bundle",
    "attention",
    "branches",
    "norms",
    "sizes",
    "upsampling",
    "weights",
)  # modules that decide what a graph computes
LOWER = ("export/lower", "calibration/fidelity", "calibration/mixed", "calibration/quantize")  # for less than float32
# And those of other rooms: shapes and names, adapters, half precision, and the map of weights.
OTHERS = ("core/contract", "core/adapters", "core/tensors", "core/weights", "engines/initializers")
PACKAGES = ("handiffuser", "torch", "diffusers", "transformers", "onnx", "onnxscript")
CHECKERS = ("onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy")  # and packages that make and check a graph


def fingerprint(
    checkpoint: Path, body: Path | None, adapters: Sequence[tuple[Path, float]] = (), **settings: Any
) -> dict[str, str]:
    """Sixteen digits for each thing an export depends on. adapters: LoRA files and their scales, in order; settings:
    precision, image_size, opset."""
    rooms = Path(__file__).resolve().parent.parent
    code = [*sorted((rooms / "models").glob("*.py")), *(rooms / "export" / f"{name}.py" for name in REWRITES)]
    code += map(_module, OTHERS)
    if settings.get("precision") != "fp32":
        code += map(_module, LOWER)
    return {
        "checkpoint": _digest([_stat(checkpoint, file) for file in sorted(checkpoint.rglob("*")) if file.is_file()]),
        "body": _digest([] if body is None or not body.exists() else _stat(body.parent, body)),
        "adapters": _digest([[scale, *(_stat(p.parent, p) for p in _files(path))] for path, scale in adapters]),
        "settings": json.dumps(settings, sort_keys=True),
        "code": _digest([_versions(*PACKAGES), _contents(code)]),
    }


def code_digest() -> str:
    """Sixteen digits for the code that makes graphs, and for the versions of the packages that make and check them."""
    rooms = Path(__file__).resolve().parent.parent
    code = [path for room in ("models", "export") for path in sorted((rooms / room).glob("*.py"))]
    code += map(_module, OTHERS)
    return _digest([_versions(*PACKAGES, *CHECKERS), _contents(code)])


def changed(bundle: Path, source: dict[str, str]) -> list[str]:
    """Why `bundle` must be exported, in words; empty when it is whole and made from `source`."""
    if not (bundle / MANIFEST).exists():
        return ["it does not exist yet"]
    try:
        manifest = Manifest.load(bundle, verify=False)
    except BundleError as error:
        return [str(error)]
    if any(not (bundle / name).is_file() for name in manifest.files):
        return ["a file is missing"]
    before = manifest.made_by.get("source")
    if not isinstance(before, dict):
        return ["it does not say what it was made from"]
    return [words for name, words in WORDS.items() if before.get(name) != source[name]]


def _module(name: str) -> Path:
    """The file of a module "room/name"; `core` is the package's own folder where it is installed."""
    room, _, module = name.partition("/")
    package = Path(contract.__file__).parent
    return package / f"{module}.py" if room == "core" else Path(__file__).parent.parent / room / f"{module}.py"


def _files(adapter: Path) -> list[Path]:
    """An adapter, and the file beside it in which peft keeps its scale."""
    return [path for path in (adapter, adapter.with_name("adapter_config.json")) if path.is_file()]


def _versions(*packages: str) -> dict[str, str]:
    return {package: installed.version(package) or "" for package in packages}


def _contents(files: Iterable[Path]) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _stat(root: Path, file: Path) -> list[Any]:
    stat = file.stat()
    return [str(file.relative_to(root)), stat.st_size, stat.st_mtime_ns]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
