"""The graph that ONNX Runtime's CUDA provider is given in place of a bundle's: same numbers, its layout and operators.

    content = derived_graph(folder, manifest, "unet")   # bytes of an ONNX model, or None: take the bundle's
    model = derive(Path("bundle/unet.onnx"), manifest.sides())

The bundle stays the one portable form, in ONNX's own operators. What is derived from it is small, because its weights
stay where they are: it turns and pads them by operators on constants, which ONNX Runtime computes when it loads the
graph. `plans.Shelf` keeps it in the user's cache, keyed by the bundle's content and the rewrite's own code.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..contract import PICTURES, Manifest
from ..errors import EngineError
from .onnxruntime import every
from .shelf import Shelf

PRECISIONS = ("fp32", "fp16")  # of bundles; the contributed kernels know no other types
REWRITES = (
    "editing",
    "fixing",
    "nhwc",
    "fusions",
)  # modules, which are imported where they are needed: they need `onnx_ir`
BACKEND = "onnxruntime-cuda"  # as plans name it


@functools.cache
def rewrite_digest() -> str:
    """16 hexadecimal digits that stand for the code of the rewrite."""
    sources = (Path(__file__).with_name(f"{name}.py").read_bytes() for name in REWRITES)
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


@dataclass(frozen=True)
class Options:
    """What a derived graph depends on beside the bundle's."""

    rewrite: str


def shelf_of(folder: Path, manifest: Manifest) -> Shelf:
    """Where derived graphs are kept."""
    return Shelf(manifest, folder, BACKEND, "1", "any NVIDIA GPU", Options(rewrite_digest()))


def has_derived(manifest: Manifest, graph: str) -> bool:
    """Whether a graph may have a derived form: one with convolutions, in float32 or float16."""
    return manifest.precision in PRECISIONS and graph in PICTURES


def derived_graph(folder: Path, manifest: Manifest, graph: str, sides: Mapping[str, int] | None = None) -> bytes | None:
    """The derived form of a bundle's graph; None for graphs and precisions that have none.

    sides: of the pictures, see `Manifest.sides`; None: of the bundle's own size.
    """
    if not has_derived(manifest, graph):
        return None
    spec, shelf = manifest.graphs[graph], shelf_of(folder, manifest)
    sides = sides or manifest.sides()
    sizes = every(spec, sides)
    if (kept := shelf.find(graph, sizes)) is not None:
        return kept.read_bytes()
    started = time.monotonic()
    model = derive(folder / spec.file, sides)
    if model is None:
        return None
    content: bytes = model.SerializeToString()
    shelf.keep(graph, sizes, content, time.monotonic() - started)
    return content


def derive(path: Path, sides: Mapping[str, int] | None = None) -> Any:
    """The `onnx.ModelProto` of a derived graph for pictures of these sides; None for a graph without convolutions.

    Weights in a file of their own stay there, so ONNX Runtime must be told the folder. Raises EngineError without the
    `onnx_ir` package.
    """
    try:
        import onnx_ir as ir
    except ImportError as error:
        raise EngineError('A derived graph needs onnx-ir. Install it: pip install "handiffuser[cuda]".') from error
    from .fixing import fix_sizes

    model = ir.load(path)
    fix_sizes(model, sides or {})
    return rewrite(model)


def rewrite(model: Any) -> Any:
    """Like `derive`, for an `onnx_ir.Model`, which it changes."""
    import onnx_ir as ir

    from .fusions import fuse
    from .nhwc import channels_last, read_norms

    read_norms(model)
    if not channels_last(model):
        return None
    fuse(model)
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]  # the exporter's names of sizes, which fixed sizes would contradict
    del proto.functions[:]  # every operator has a kernel
    return proto
