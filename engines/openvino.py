"""OpenVINO: the fastest way to compute on many CPUs, in bfloat16 where they have instructions for it, else in float32.

    engines = load_openvino(folder, manifest, inference(), threads=4)
    outputs = engines["unet"](feeds)                # numpy in, numpy out

It runs UNet and decoder, which take most of a picture's time. ONNX Runtime runs the small graphs of stage 1 in float32,
because bfloat16 moves the hands. What the UNet's graph does with latents, history and rows before its first and after
its last convolution stays float32, too: OpenVINO lowers no node behind the last layer with weights, and a test holds it
to that.

OpenVINO compiles a graph for each size of its free axes: dynamic shapes cost half as much again. `plans.Shelf` keeps
the compiled graphs.
"""

from __future__ import annotations

import contextlib
import functools
import io
import mmap
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import installed
from ..commands import imported
from ..contract import BRANCHES, GraphSpec, Manifest, Size
from ..cpu import cpu_name, target, usable_cores
from ..cpu import has_bf16 as cpu_has_bf16
from ..errors import BundleError, EngineError, HanDiffuserError
from .backends import BACKENDS
from .base import check_feeds, powers_of_two
from .openvino_rewrites import REWRITES, rewrite
from .plans import Built, OnBuild, PlanStore, Wanted, picture_sizes, size_text, usual
from .shelf import Shelf

LOWERED = ("unet", "image_decoder")  # the graphs that OpenVINO runs
TYPES = {"bf16": "bf16", "fp32": "f32"}  # our name of a precision -> OpenVINO's
WORDS = {"bf16": "bfloat16", "fp32": "float32"}
CONVERTER = "openvino.tools.ovc"
MIN_PICTURES_BATCHED = 64  # pictures of a run that make it worth compiling the UNet for larger batches, too
BATCHES = (1, 2, 4)  # the sizes that such a run tries


@dataclass(frozen=True)
class Options:
    """What a compiled graph depends on beside its sizes. inference: a key of TYPES."""

    inference: str
    rewrites: str = REWRITES


class OpenVinoEngine:
    """One graph, compiled for each size that it is called with. See `Engine` for calling it."""

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
        rewritten: bool = True,
    ) -> None:
        """precision: "bf16", which raises EngineError where the CPU has none, or "fp32". shelf: of compiled graphs.
        check: called before the graph's file is read; raises BundleError for a damaged one.
        rewritten: with the rewrites of `openvino_rewrites`, which peers in benchmarks do without; a shelf needs them.
        """
        self.rewritten = rewritten
        self.path, self.spec, self.precision, self.shelf = Path(path), spec, precision, shelf
        self.batches: Sequence[int] | None = batches
        self._check = check
        if precision == "bf16" and not has_bf16():
            raise EngineError(
                f"This processor ({cpu_name()}) has no instructions for bfloat16, so OpenVINO gains nothing. Take "
                "--backend onnxruntime."
            )
        self.threads = threads or usable_cores()
        self.axes = sorted({size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)})
        self._mapped: list[mmap.mmap] = []  # files from which imported graphs read their weights
        self._requests: dict[tuple[int, ...], Any] = {}
        self._bound: dict[tuple[int, ...], dict[str, np.ndarray]] = {}  # the inputs of each request

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        check_feeds(self.spec, feeds)
        sizes = self._sizes(feeds)
        request, bound = self._request(sizes), self._bound[self._key(sizes)]
        try:
            for name, value in feeds.items():
                array = np.require(value, requirements=("C", "W"))
                # Most arrays stay in place from step to step, and binding them again takes a twentieth of a step. The
                # engine keeps what it bound, so another array cannot be in the same place.
                if name not in bound or _place(bound[name]) != _place(array):
                    request.set_tensor(name, _import().Tensor(array, shared_memory=True))
                    bound[name] = array
            request.start_async()
            request.wait()
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            raise self._failure(error) from error
        # Copies: the request writes its next outputs into the same memory.
        return {
            tensor.name: request.get_output_tensor(index).data.copy() for index, tensor in enumerate(self.spec.outputs)
        }

    def prepare(self, sizes: Mapping[str, int], beside: bool = False) -> None:
        """Finds or compiles the graph for these sizes, such as {"B": 1, "G": 2}.

        beside: keep it beside the bundle, or raise EngineError. Raises BundleError for a graph that OpenVINO cannot
        read.
        """
        self._request(sizes, beside)

    def _request(self, sizes: Mapping[str, int], beside: bool = False) -> Any:
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
            "ENABLE_CPU_PINNING": False,  # other processes may use the cores, too
        }
        kept = shelf.find(name, sizes) if shelf is not None and not beside else None
        if kept is not None:
            with contextlib.suppress(RuntimeError, OSError, ValueError):  # another build of the same version wrote it
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
        if self.rewritten:
            rewrite(model)
        compiled = core.compile_model(model, "CPU", options)
        if shelf is not None and (beside or shelf.keeps(name)):  # a copy takes gigabytes
            exported = compiled.export_model()
            content = exported.getbuffer() if isinstance(exported, io.BytesIO) else exported
            shelf.keep(name, sizes, content, time.monotonic() - started, beside)
        return compiled

    def _imported(self, path: Path, options: Mapping[str, Any]) -> Any:
        """A kept graph, mapped into memory: a large UNet that is read is there three times and takes ten times as long.

        OpenVINO packs the weights again for its kernels, so the pages that it read need not stay in memory.
        """
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # OpenVINO refuses a read-only one
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


def host_engines(
    folder: Path,
    manifest: Manifest,
    threads: int | None,
    slots: int,
    pictures: int,
    only: Collection[str] = LOWERED,
) -> dict[str, OpenVinoEngine]:
    """UNet and decoder, ready for one picture. only: graphs to load. Raises EngineError where OpenVINO cannot run."""
    shared_core()  # says what is missing, before anything is loaded
    batches = batches_for(folder, manifest, slots, pictures)
    engines = load_openvino(folder, manifest, inference(), threads, batches, only)
    for engine in engines.values():  # before the other graphs are loaded: compiling takes twice the memory
        engine.prepare(usual(engine.spec, manifest))
    return engines


def inference() -> str:
    """The precision in which OpenVINO runs float32 bundles on this processor, a key of TYPES; does not import it.

    In float32, compiled for fixed shapes, it is within a tenth of ONNX Runtime's time on an EPYC with AVX2.
    """
    return "bf16" if cpu_has_bf16() else "fp32"


def batches_for(folder: Path, manifest: Manifest, slots: int, pictures: int) -> list[int]:
    """Batch sizes of the UNet to try: 1, compiled ones, and BATCHES in a long run of a small model."""
    shelf, unet = shelf_of(folder, manifest, inference()), manifest.graphs["unet"]
    long = pictures >= MIN_PICTURES_BATCHED and shelf.keeps("unet")
    sizes = [size for size in powers_of_two(slots) if size <= slots]
    kept = {size: shelf.plan("unet", usual(unet, manifest, size)) is not None for size in sizes}
    return [size for size in sizes if size == 1 or (long and size in BATCHES) or kept[size]]


def load_openvino(
    folder: Path,
    manifest: Manifest,
    precision: str,
    threads: int | None = None,
    batches: Sequence[int] = (1,),
    only: Collection[str] = LOWERED,
) -> dict[str, OpenVinoEngine]:
    """Engines for LOWERED, or those in `only`. Compiling a graph verifies its files; a compiled graph needs none."""
    shelf = shelf_of(folder, manifest, precision)
    engines: dict[str, OpenVinoEngine] = {}
    for name in (name for name in LOWERED if name in only):
        spec = manifest.graphs[name]
        check = functools.partial(manifest.check_files, folder, manifest.files_of(name))
        sizes = batches if spec.dominant else (1,)
        engines[name] = OpenVinoEngine(folder / spec.file, spec, precision, threads, shelf, sizes, check)
    return engines


def shelf_of(folder: Path, manifest: Manifest, precision: str) -> Shelf:
    """Where graphs that OpenVINO compiled for this processor are kept."""
    return Shelf(manifest, folder, "openvino", version(), target(), Options(precision))


def wanted_sizes(
    spec: GraphSpec, manifest: Manifest, batches: Iterable[int], guidance_free: bool, pictures: Iterable[Size]
) -> list[dict[str, int]]:
    """The sizes to compile a graph for: the usual ones, and perhaps the conditional branch alone, too."""
    if not spec.branched:
        return [usual(spec, manifest, size=size) for size in pictures]  # the decoder takes pictures one by one
    sizes = [usual(spec, manifest, batch, size) for size in pictures for batch in batches]
    return sizes + [size | {BRANCHES: 1} for size in sizes if guidance_free and size[BRANCHES] != 1]


def build(_: str, folder: Path, wanted: Wanted, on_build: OnBuild | None = None) -> Iterator[Built]:
    """Yields what OpenVINO is to compile of a folder for this processor, compiling what is missing.

    Raises BundleError for a damaged folder, EngineError where OpenVINO is missing.
    """
    manifest = Manifest.load(folder)
    if manifest.base != "fp32":
        raise EngineError(
            f"{folder} is in {manifest.precision}, and made for TensorRT; OpenVINO takes float32 bundles, and rounds "
            "to bfloat16 itself. Export it with --backend openvino."
        )
    store, shelf = PlanStore(folder), shelf_of(folder, manifest, inference())
    batches, pictures = sorted(set(wanted.batch_sizes or (1,))), picture_sizes(manifest, wanted.pictures)
    jobs = [
        (name, engine, sizes)
        for name, engine in load_openvino(folder, manifest, inference()).items()
        for sizes in wanted_sizes(engine.spec, manifest, batches, wanted.guidance_free, pictures)
    ]
    for number, (name, engine, sizes) in enumerate(jobs):
        parts = shelf.parts(name, sizes)
        plan, why = store.find(parts, verify=True), ""
        if plan is None:
            why = store.why(parts)
            if on_build is not None:
                on_build(number, len(jobs), name, sizes, why, 0.0)
            engine.prepare(sizes, beside=True)
            plan = store.find(parts)
            assert plan is not None, f"{name} {size_text(sizes)} was compiled and is not there"
        yield Built(plan, why)


def check_build(_: str, options: Any = None) -> None:
    """Raises EngineError where OpenVINO is not installed."""
    shared_core()


def elsewhere(_: str, made_for: str) -> str:
    """Why a plan for this target does not serve this machine; "" where it does."""
    return "" if made_for == target() else "for another processor"


@functools.cache
def has_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor with instructions of its own."""
    return "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def version(_: str = "") -> str:
    """The installed package's, such as "2026.4.1". Importing it would take a tenth of a second."""
    return installed.version("openvino") or str(_import().__version__).partition("-")[0]


@functools.cache
def shared_core() -> Any:
    """The process's only `openvino.Core`.

    A second Core ends the process at the next signal, such as Ctrl-C or a child's end (segmentation fault). Each Core
    gives the thread that makes it a stack for signal handlers, and takes it away at its own end, even from another
    thread or from under a later Core.
    """
    return _import().Core()


@functools.cache
def _import() -> Any:
    # OpenVINO imports its converter, too, which takes time and is unused here. While this entry says that it is
    # missing, OpenVINO does without. (`handiffuser.telemetry` keeps the converter from reporting to its makers.)
    alone = sys.modules.setdefault(CONVERTER, None) is None  # type: ignore[arg-type]
    try:
        return imported("openvino")
    except ImportError as error:
        raise EngineError(
            f"OpenVINO cannot be imported ({error}). Install it with `{BACKENDS['openvino'].install}`, or take "
            "--backend onnxruntime."
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
