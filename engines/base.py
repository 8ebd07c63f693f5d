"""What an engine is, and the check of its inputs.

A backend's own complaint about a wrong tensor is a riddle ("Got invalid dimensions for input"), or there is none and
the picture is black. So every backend calls `check_feeds` first: it names the graph, the tensor, what came, what is
allowed and what to do. It costs about a microsecond a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..contract import GraphSpec, Manifest
from ..errors import EngineError

# The first compute capability that has a precision, its name in a sentence, and what does instead on older GPUs.
FIRST_GPU = {"bf16": ("8.0", "bfloat16", "fp16"), "fp8": ("8.9", "fp8", "int8"), "int8": ("7.5", "int8", "fp16")}


class Engine(Protocol):
    """One graph, ready to run. `spec` says which tensors it takes and gives."""

    spec: GraphSpec

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Runs the graph on arrays of the dtypes and shapes in `spec.inputs`; returns its outputs by name.

        Raises EngineError when a tensor is unknown, missing, of another dtype or of another shape.
        """
        ...


class DeviceEngine(Protocol):
    """One graph on a GPU, for one bucket: told once where its tensors are, then enqueued again and again."""

    spec: GraphSpec
    own_graph: bool  # whether what it enqueues is a CUDA graph of its own making already

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Says where tensors lie; arrays have `dtype`, `shape` and `pointer`. Raises EngineError for wrong ones."""
        ...

    def enqueue(self, stream: Any) -> None:
        """Puts one run on the stream and returns at once."""
        ...

    def capturable(self, stream: Any) -> bool:
        """Whether a run may be captured into a CUDA graph."""
        ...


def check_host(manifest: Manifest, folder: str | Path) -> None:
    """Raises EngineError for a bundle that only a GPU runs: one in bfloat16, of which numpy knows nothing.

    ONNX Runtime's CPU provider has no kernels for it either: it would complain of the first operator.
    """
    specs = manifest.graphs.values()
    if any(tensor.dtype == "bfloat16" for spec in specs for tensor in (*spec.inputs, *spec.outputs)):
        raise EngineError(
            f"{folder} computes in bfloat16, which runs on NVIDIA GPUs only, best with TensorRT. To run here, export "
            "it in another precision: hd-export CHECKPOINT OUT --precision fp32."
        )


def check_gpu(manifest: Manifest, cuda: Any) -> None:
    """Raises EngineError for a bundle in a precision that came with a later GPU than this one.

    cuda: whatever has a `name` and a `compute_capability`, such as "8.9".
    """
    first, name, instead = FIRST_GPU.get(manifest.precision, ("0.0", "", ""))
    if tuple(map(int, cuda.compute_capability.split("."))) < tuple(map(int, first.split("."))):
        raise EngineError(
            f"The bundle computes in {name}, which this GPU does not ({cuda.name}, compute capability "
            f"{cuda.compute_capability}). Export it again: hd-export CHECKPOINT OUT --precision {instead}."
        )


def check_feeds(spec: GraphSpec, feeds: Mapping[str, Any]) -> None:
    """Raises EngineError unless `feeds` holds exactly the tensors that `spec.inputs` asks for.

    A free dimension ("B") may have any size from 1 on, but the same one in every tensor of the call. Values need a
    `dtype` and a `shape`: numpy arrays, or device tensors that mimic them.
    """
    sizes: dict[str, tuple[int, str]] = {}  # free dimension -> its size, and the tensor that fixed it
    for want in spec.inputs:
        value = feeds.get(want.name)
        if value is None:
            raise _refusal(spec, f"lacks its input {want.name}", f"Pass {want}.")
        dtype = getattr(value, "dtype", None)
        if dtype != want.dtype:
            came = type(value).__name__ if dtype is None else dtype
            raise _refusal(spec, f"got {want.name} as {came}", f"It takes {want}: convert with astype first.")
        shape = value.shape
        if len(shape) != len(want.shape):
            raise _refusal(spec, f"got {want.name} of shape {_text(shape)}", f"It takes {want}.")
        for axis, (size, allowed) in enumerate(zip(shape, want.shape, strict=True)):
            if size == allowed:
                continue
            if isinstance(allowed, int):
                raise _refusal(
                    spec,
                    f"got {want.name} of shape {_text(shape)}",
                    f"It takes {want}: axis {axis} must be {allowed}. Other sizes need another export.",
                )
            if size == 0:
                raise _refusal(spec, f"got {want.name} with nothing in it ({_text(shape)})", f"It takes {want}.")
            fixed, by = sizes.setdefault(allowed, (size, want.name))
            if fixed != size:
                raise _refusal(
                    spec,
                    f"got {want.name} of shape {_text(shape)} beside {by}, where {allowed} is {fixed}",
                    f"{allowed} must be the same in both.",
                )
    if len(feeds) > len(spec.inputs):
        unknown = sorted(set(feeds) - {want.name for want in spec.inputs})
        raise _refusal(
            spec,
            f"got {', '.join(unknown)}, which it does not know",
            f"It takes {', '.join(want.name for want in spec.inputs)}.",
        )


def _refusal(spec: GraphSpec, what: str, remedy: str) -> EngineError:
    return EngineError(f"The graph {Path(spec.file).stem} {what}. {remedy}")


def _text(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
