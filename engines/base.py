"""What an engine is, what a backend gives to the loop on a GPU, and the check of an engine's inputs.

Backends explain a wrong tensor badly ("Got invalid dimensions for input"), or say nothing and make a black picture. So
every engine calls `check_feeds` first. It names the graph, the tensor, what came, what is allowed and what to do. It
costs about a microsecond a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..contract import MAX_SIDE, GraphSpec, Manifest, Size, nearest_size, shown_size
from ..errors import EngineError

# The first compute capability that has a precision, its name in a sentence, and what does instead on older GPUs.
FIRST_GPU = {"bf16": ("8.0", "bfloat16", "fp16"), "fp8": ("8.9", "fp8", "int8"), "int8": ("7.5", "int8", "fp16")}


class Engine(Protocol):
    """One graph, ready to run.

    spec: the tensors that it takes and gives. device: "cpu" or "cuda". batches: the batch sizes that are worth asking
    for, the smallest first, where others must be compiled first; None where every size is as good.
    """

    @property
    def spec(self) -> GraphSpec: ...

    @property
    def device(self) -> str: ...

    @property
    def batches(self) -> Sequence[int] | None: ...

    def prepare(self, sizes: Mapping[str, int]) -> None:
        """Makes it ready for these sizes of its free axes, such as {"B": 1, "G": 2}, where that takes time."""
        ...

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Runs the graph on arrays of the dtypes and shapes in `spec.inputs`; returns its outputs by name.

        Raises EngineError when a tensor is unknown, missing, of another dtype or of another shape.
        """
        ...


class DeviceEngine(Protocol):
    """One graph on a GPU for one bucket. The loop binds it to its tensors once, then enqueues it for every run."""

    @property
    def spec(self) -> GraphSpec: ...

    @property
    def own_graph(self) -> bool:
        """Whether it enqueues a CUDA graph that it captured itself."""
        ...

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Says where tensors lie; arrays have `dtype`, `shape` and `pointer`. Raises EngineError for wrong ones."""
        ...

    def enqueue(self, stream: Any) -> None:
        """Puts one run on the stream and returns at once."""
        ...

    def capturable(self, stream: Any) -> bool:
        """Whether a run may be captured into a CUDA graph."""
        ...


Load = Callable[[str, int, int], DeviceEngine]  # (graph, bucket, guidance branches) -> engine


def nothing() -> None:
    """What a backend does after a run and at the end, unless it says otherwise."""


class Sized(NamedTuple):
    """Engines for pictures of one size.

    load: makes an engine when the loop first needs it. buckets: batch sizes, rising. single: graph -> buckets that also
    have an engine of the conditional branch alone. weights: bytes that the UNet and its like take of the GPU's memory
    for this size alone.
    """

    load: Load
    buckets: Sequence[int]
    single: Mapping[str, Collection[int]] = {}
    weights: int = 0


@dataclass
class DeviceEngines:
    """What a backend gives to the loop on a GPU.

    at: the engines for a size of pictures; those of another size than the bundle's own only have PICTURES. sizes: that
    it paints; None: any. sentences: what the user should know. after_run, close: the loop calls them after each run and
    at its end.
    """

    at: Callable[[Size], Sized]
    sizes: frozenset[Size] | None = None
    sentences: list[str] = field(default_factory=list)
    after_run: Callable[[], None] = nothing
    close: Callable[[], None] = nothing


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4 ... up to the first that is at least `most`."""
    out = [1]
    while out[-1] < most:
        out.append(2 * out[-1])
    return out


def enough(buckets: list[int], slots: int) -> list[int]:
    """Of rising batch sizes those up to the first that holds all slots."""
    return [size for size in buckets if size < slots] + [size for size in buckets if size >= slots][:1]


def check_host(manifest: Manifest, folder: str | Path) -> None:
    """Raises EngineError for a bundle in bfloat16, which only a GPU runs.

    numpy has no bfloat16, and ONNX Runtime has no CPU kernels for it.
    """
    specs = manifest.graphs.values()
    if any(tensor.dtype == "bfloat16" for spec in specs for tensor in (*spec.inputs, *spec.outputs)):
        raise EngineError(
            f"{folder} computes in bfloat16, which runs on NVIDIA GPUs only, best with TensorRT. To run here, export "
            "it in another precision: hd-export CHECKPOINT OUT --precision fp32."
        )


def check_gpu(manifest: Manifest, cuda: Any) -> None:
    """Raises EngineError for a bundle in a precision that this GPU lacks.

    cuda: has a `name` and a `compute_capability`, such as "8.9".
    """
    first, name, instead = FIRST_GPU.get(manifest.precision, ("0.0", "", ""))
    if tuple(map(int, cuda.compute_capability.split("."))) < tuple(map(int, first.split("."))):
        raise EngineError(
            f"This GPU ({cuda.name}, compute capability {cuda.compute_capability}) lacks {name}, in which the bundle "
            f"computes. Export it again: hd-export CHECKPOINT OUT --precision {instead}."
        )


def check_feeds(spec: GraphSpec, feeds: Mapping[str, Any]) -> None:
    """Raises EngineError unless `feeds` holds exactly the tensors that `spec.inputs` asks for.

    A free dimension ("B") may have any size from 1 on, the same in every tensor of the call. Values have a `dtype` and
    a `shape`: numpy arrays or device arrays.
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


def check_sizes(wanted: Iterable[Size], multiple: int, own: Size) -> None:
    """Raises EngineError for a size of --sizes that a bundle cannot paint. multiple: see `Manifest.size_multiple`."""
    for size in wanted:
        near = nearest_size(size, multiple, own)
        if size != near:
            may = (
                f"multiples of {multiple} up to {MAX_SIDE} pixels" if multiple else f"{shown_size(own)} for this bundle"
            )
            instead = f"The nearest is {shown_size(near)}." if multiple else "Leave it out."
            raise EngineError(f"--sizes must be {may}, got {shown_size(size)}. {instead}")
