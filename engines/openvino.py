"""OpenVINO: the fastest way to compute in bfloat16 on a CPU that has instructions for it.

    engines = load_openvino(folder, manifest, "bf16", threads=4)
    outputs = engines["unet"](feeds)                # numpy in, numpy out

Only what a picture's time goes into is computed so: UNet and decoder. The small graphs of stage 1 stay with ONNX
Runtime in float32, because bfloat16 moves the hands. What the UNet's graph does with latents, history and rows before
its first and after its last convolution stays float32, too: OpenVINO lowers no node that stands behind the last layer
with weights, and a test holds it to that.

A graph is compiled for each size of its free axes that is asked for: dynamic shapes cost half as much again. What was
compiled is kept, see `plans.Shelf`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import mmap
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import installed
from ..commands import imported
from ..contract import BRANCHES, GraphSpec, Manifest
from ..errors import BundleError, EngineError, HanDiffuserError
from . import cpu
from .base import Engine, check_feeds
from .onnxruntime import usable_cores
from .openvino_rewrites import REWRITES, rewrite
from .plans import Shelf

BACKEND = "openvino"
LOWERED = ("unet", "image_decoder")  # what runs in OpenVINO
TYPES = {"bf16": "bf16", "fp32": "f32"}  # our names of what it computes in -> its own
CONVERTER = "openvino.tools.ovc"
INSTALL = 'pip install "handiffuser[openvino]"'


@dataclass(frozen=True)
class Options:
    """What a compiled graph depends on beside its sizes. inference: a key of TYPES."""

    inference: str
    rewrites: str = REWRITES


class OpenVinoEngine:
    """One graph, compiled for each size that it is called with. See `Engine` for calling it.

    batches: the batch sizes that are worth asking for, the smallest first; others work and are compiled when they come.
    """

    device = "cpu"

    def __init__(
        self,
        path: str | Path,
        spec: GraphSpec,
        precision: str = "bf16",
        threads: int | None = None,
        shelf: Shelf | None = None,
        batches: Sequence[int] = (1,),
        check: Callable[[], None] | None = None,
    ) -> None:
        """precision: "bf16", which raises EngineError where the CPU has none, or "fp32". shelf: of compiled graphs.
        check: called before the graph's file is read; raises BundleError for a damaged one."""
        self.path, self.spec, self.precision, self.shelf, self.batches = Path(path), spec, precision, shelf, batches
        self._check = check
        if precision == "bf16" and not has_bf16():
            raise EngineError(
                f"This processor ({cpu.cpu_name()}) has no instructions for bfloat16, so that OpenVINO would gain "
                "nothing. Take --backend onnxruntime."
            )
        self.threads = threads or usable_cores()
        self.axes = sorted({size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)})
        self._mapped: list[mmap.mmap] = []  # files that what was imported reads its weights from
        self._requests: dict[tuple[int, ...], Any] = {}
        self._bound: dict[tuple[int, ...], dict[str, np.ndarray]] = {}  # of each request: its inputs

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        check_feeds(self.spec, feeds)
        sizes = self._sizes(feeds)
        request, bound = self.prepare(sizes), self._bound[self._key(sizes)]
        try:
            for name, value in feeds.items():
                array = np.require(value, requirements=("C", "W"))
                # Most arrays are where they were at the last step: telling so anew takes a twentieth of one. What is
                # bound is kept, so that no other array can be there.
                if name not in bound or _place(bound[name]) != _place(array):
                    request.set_tensor(name, _import().Tensor(array, shared_memory=True))
                    bound[name] = array
            request.start_async()
            request.wait()
        except Exception as error:  # OpenVINO raises RuntimeError for all there is
            raise self._failure(error) from error
        # Copies: the request writes its next outputs into the same memory.
        return {
            tensor.name: request.get_output_tensor(index).data.copy() for index, tensor in enumerate(self.spec.outputs)
        }

    def prepare(self, sizes: Mapping[str, int], beside: bool = False) -> Any:
        """The graph for these sizes, such as {"B": 1, "G": 2}, compiled or found.

        beside: keep it beside the bundle, or raise EngineError. Raises BundleError for a graph that OpenVINO does not
        read.
        """
        key = self._key(sizes)
        if key not in self._requests:
            try:
                self._requests[key] = self._compiled(sizes, beside).create_infer_request()
            except HanDiffuserError:
                raise
            except Exception as error:
                raise self._failure(error) from error
            self._bound[key] = {}
        return self._requests[key]

    def _key(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[axis] for axis in self.axes)

    def _compiled(self, sizes: Mapping[str, int], beside: bool) -> Any:
        core, name, shelf = shared_core(), self.path.stem, self.shelf
        options = {
            "INFERENCE_PRECISION_HINT": TYPES[self.precision],
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # others may use the cores, too
        }
        kept = shelf.find(name, sizes) if shelf is not None and not beside else None
        if kept is not None:
            with contextlib.suppress(RuntimeError, OSError, ValueError):  # what another build of the same version wrote
                return self._imported(kept, options)
        if self._check is not None:
            self._check()
            self._check = None  # once is enough
        started = time.monotonic()
        try:
            model = core.read_model(self.path)
        except Exception as error:
            raise BundleError(
                f"OpenVINO cannot read {self.path}: {_sentence(error)} Take --backend onnxruntime, or export the "
                "bundle again with hd-export."
            ) from error
        model.reshape({t.name: [sizes[n] if isinstance(n, str) else n for n in t.shape] for t in self.spec.inputs})
        rewrite(model)
        compiled = core.compile_model(model, "CPU", options)
        if shelf is not None and (beside or shelf.keeps(name)):  # what is not kept need not be copied: gigabytes
            exported = compiled.export_model()
            content = exported.getbuffer() if isinstance(exported, io.BytesIO) else exported
            shelf.keep(name, sizes, content, time.monotonic() - started, beside)
        return compiled

    def _imported(self, path: Path, options: Mapping[str, Any]) -> Any:
        """What was kept, mapped: read into memory, a large UNet would be there three times and take ten times as long.

        OpenVINO packs weights anew for its kernels; pages that it has read them from need not stay in memory.
        """
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # it takes none that cannot be written to
        content = _import().Tensor(np.frombuffer(mapped, np.uint8), shared_memory=True)
        compiled = shared_core().import_model(content, "CPU", options)
        self._mapped.append(mapped)
        if hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_DONTNEED)
        return compiled

    def _sizes(self, feeds: Mapping[str, Any]) -> dict[str, int]:
        return {
            size: feeds[tensor.name].shape[axis]
            for tensor in self.spec.inputs
            for axis, size in enumerate(tensor.shape)
            if isinstance(size, str)
        }

    def _failure(self, error: Exception) -> EngineError:
        name = self.path.stem
        if isinstance(error, MemoryError) or any(word in str(error).lower() for word in ("bad_alloc", "allocate")):
            return EngineError(f"There is not enough memory to run {name}. Take a smaller --batch-size.")
        return EngineError(f"OpenVINO failed in {name}: {_sentence(error)} Take --backend onnxruntime.")


def load_openvino(
    folder: Path,
    manifest: Manifest,
    precision: str = "bf16",
    threads: int | None = None,
    batches: Sequence[int] = (1,),
) -> dict[str, Engine]:
    """Engines for LOWERED. A graph's files are verified when it is compiled; of one that was, they are not read."""
    shelf = shelf_of(folder, manifest, precision)
    engines: dict[str, Engine] = {}
    for name in LOWERED:
        spec = manifest.graphs[name]
        check = functools.partial(manifest.check_files, folder, manifest.files_of(name))
        sizes = batches if name == "unet" else (1,)
        engines[name] = OpenVinoEngine(folder / spec.file, spec, precision, threads, shelf, sizes, check)
    return engines


def usual(spec: GraphSpec, manifest: Manifest, batch: int = 1) -> dict[str, int]:
    """The sizes that a graph has when a request says nothing else: with both branches of guidance, or without it."""
    branches = 1 if manifest.defaults["guidance"] == 1 else 2
    return {"B": batch, BRANCHES: branches} if spec.branched else {"B": batch}


def shelf_of(folder: Path, manifest: Manifest, precision: str) -> Shelf:
    """Where graphs that OpenVINO compiled for this processor are kept."""
    return Shelf(manifest, folder, BACKEND, version(), cpu.target(), Options(precision))


def wanted_sizes(
    spec: GraphSpec, manifest: Manifest, batches: Iterable[int], guidance_free: bool = False
) -> list[dict[str, int]]:
    """The sizes to compile a graph for: the usual ones, and perhaps the conditional branch alone, too."""
    if not spec.branched:
        return [{"B": 1}]  # the decoder takes pictures one by one
    sizes = [usual(spec, manifest, batch) for batch in batches]
    return sizes + [size | {BRANCHES: 1} for size in sizes if guidance_free and size[BRANCHES] != 1]


def is_installed() -> bool:
    """Whether OpenVINO could be imported; does not import it."""
    from importlib.util import find_spec

    return find_spec("openvino") is not None


@functools.cache
def has_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor with instructions of its own."""
    return "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def version() -> str:
    """Of the installed package, such as "2026.4.1"; importing it would take a tenth of a second."""
    return installed.version("openvino") or str(_import().__version__).partition("-")[0]


@functools.cache
def shared_core() -> Any:
    """The process's one `openvino.Core`, for whoever uses OpenVINO.

    Never another one: each gives the thread that makes it a stack for signal handlers, and takes it away when it is
    gone, also where it is gone in another thread, or where a later one keeps it to give back. The next signal, such as
    Ctrl-C or the end of a child, ends the process then (segmentation fault).
    """
    return _import().Core()


@functools.cache
def _import() -> Any:
    # OpenVINO imports its converter, too, which is of no use here and takes time. It can do without: while this entry
    # says that there is none, it does. (`handiffuser.telemetry` keeps what the converter reports from its makers.)
    alone = sys.modules.setdefault(CONVERTER, None) is None  # type: ignore[arg-type]
    try:
        return imported("openvino")
    except ImportError as error:
        raise EngineError(
            f"OpenVINO cannot be imported ({error}). Install it with `{INSTALL}`, or take --backend onnxruntime."
        ) from error
    finally:
        if alone:
            del sys.modules[CONVERTER]


def _place(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _sentence(error: Exception) -> str:
    """The last line of OpenVINO's message: those before it say in which of its source files it happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1][:300].rstrip(" .") + "."
