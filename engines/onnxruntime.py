"""ONNX Runtime on the CPU: the backend that runs every graph everywhere. `onnxruntime_cuda.py` is the one on GPUs.

engine = OnnxRuntimeEngine("bundle/unet.onnx", manifest.graphs["unet"], threads=4)
outputs = engine(feeds)                         # numpy in, numpy out
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np

from ..commands import imported
from ..contract import BRANCHES, MAX_ROWS, MAX_SIDE, GraphSpec, Manifest
from ..cpu import target, usable_cores
from ..errors import BundleError, EngineError
from ..installed import version
from .base import Engine, check_feeds
from .cuda import Cuda
from .shelf import Shelf

NO_CUDA = (
    "ONNX Runtime was installed without CUDA. Replace it; onnxruntime and onnxruntime-gpu overwrite each other: "
    '`pip uninstall -y onnxruntime`, then `pip install "handiffuser[cuda]"`. Or take --device cpu.'
)

# ONNX Runtime's type names <-> numpy's.
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
# An optimised graph takes every size, written as (least, best, most).
EVERY = {"B": (1, 1, MAX_ROWS), BRANCHES: (1, 2, 2), "S": (1, 20, 1000)}
SIDE = (1, 64, MAX_SIDE)  # of an axis of a picture
SMALL_BYTES = 1 << 28  # of a graph: a second copy of its weights costs little, and sizes are a part of its time


def host_engines(*_: Any, **__: Any) -> dict[str, Engine]:
    """Nothing: `load_engines` loads every graph that another backend leaves out."""
    return {}


def device_for(folder: Path, device: str) -> str:
    """The device that ONNX Runtime takes, "cpu" or "cuda". Raises EngineError for "cuda" without a usable GPU."""
    if device == "cpu" or (device == "auto" and not has_cuda_provider()):
        return "cpu"
    if not has_cuda_provider():
        raise EngineError(NO_CUDA)
    try:
        Cuda()
    except EngineError:
        if device == "cuda":
            raise
        return "cpu"
    return "cuda"


def shelf_of(folder: Path, manifest: Manifest) -> Shelf:
    """Where graphs that ONNX Runtime optimised for this processor are kept."""
    return Shelf(manifest, folder, "onnxruntime", import_onnxruntime().__version__, target(), Optimised())


@dataclass(frozen=True)
class Optimised:
    """What a session's optimised graph depends on beside ONNX Runtime's version and the processor."""

    level: str = "all"


class OnnxRuntimeEngine:
    """One graph in ONNX Runtime on the CPU. See `Engine` for calling it."""

    device, batches = "cpu", None
    _fixed: list[tuple[str, int, tuple[int, ...]]] | None = None

    def __init__(
        self,
        path: str | Path,
        spec: GraphSpec,
        threads: int | None = None,
        shelf: Shelf | None = None,
        own: Mapping[str, int] | None = None,
    ) -> None:
        """Loads the graph and compares its tensors with `spec`.

        shelf: keeps the graph as ONNX Runtime optimised it for this processor, which the next start finds there.
        own: sizes of axes that most calls have, see `Manifest.sides`. A small graph then has a session for these, which
        saves the arithmetic of sizes, and another for all others, which is loaded at its first use.
        Raises BundleError when the file is broken or its tensors differ from `spec`.
        """
        fixed = {axis: size for axis, size in (own or {}).items() if axis in spec.free} if _is_small(Path(path)) else {}
        self._load = functools.partial(self._session, path, spec, threads, shelf)
        # The inputs with axes that are fixed in the session, and their last axes, which are numbers then.
        sided = [tensor.name for tensor in spec.inputs if set(tensor.shape) & fixed.keys()]
        tails = [(t.name, _numbers(t.shape)) for t in spec.at(fixed).inputs if t.name in sided]
        self._fixed = [(name, -len(tail), tail) for name, tail in tails] if fixed else None
        self._others: Any = None
        self.session = self._load(fixed)
        self._settle(path, spec, own if fixed else None)

    @staticmethod
    def _session(
        path: str | Path, spec: GraphSpec, threads: int | None, shelf: Shelf | None, fixed: Mapping[str, int]
    ) -> Any:
        options = session_options(threads)
        for axis, size in fixed.items():
            options.add_free_dimension_override_by_name(axis, size)
        with loading(path, spec):
            return cpu_session(path, options) if shelf is None else _kept_session(path, spec, options, shelf, fixed)

    def _settle(self, path: str | Path, spec: GraphSpec, sizes: Mapping[str, int] | None = None) -> None:
        """Compares the session's tensors with `spec`. sizes: of axes that are fixed."""
        self.spec = spec
        _check_contract(path, spec, self.session.get_inputs(), self.session.get_outputs(), sizes or {})
        self.names = [tensor.name for tensor in spec.outputs]
        self.file_names = [tensor.name for tensor in self.session.get_outputs()]

    def prepare(self, sizes: Mapping[str, int]) -> None:
        """Nothing: a session takes every size at once."""

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        check_feeds(self.spec, feeds)
        try:
            values = self._session_for(feeds).run(self.file_names, feeds)
        except Exception as error:
            raise self.failure(error) from error
        return dict(zip(self.names, values, strict=True))

    def _session_for(self, feeds: Mapping[str, Any]) -> Any:
        """The session that takes tensors of these sizes."""
        if self._fixed is None or all(feeds[name].shape[start:] == tail for name, start, tail in self._fixed):
            return self.session
        if self._others is None:
            self._others = self._load({})
        return self._others

    def failure(self, error: Exception) -> EngineError:
        """What ONNX Runtime's exception means for the user."""
        name = Path(self.spec.file).stem
        if _is_memory(error):
            return EngineError(f"There is not enough memory to run {name}. Take a smaller --batch-size.")
        return EngineError(f"ONNX Runtime failed in {name}: {_sentence(error)}")


@contextlib.contextmanager
def loading(path: str | Path, spec: GraphSpec) -> Iterator[None]:
    """Turns ONNX Runtime's exceptions while it loads a graph into BundleError or EngineError."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class below Exception
        if _is_memory(error):
            raise EngineError(f"There is not enough memory to load {path}.") from error
        if "NOT_IMPLEMENTED" in str(error) and any(tensor.dtype == "bfloat16" for tensor in spec.inputs):
            raise EngineError(
                f"ONNX Runtime lacks a kernel that {path} needs in bfloat16: {_sentence(error)} Take TensorRT "
                "(--backend tensorrt), or export it again with --precision fp16."
            ) from error
        if _gpu_failure(error):
            raise EngineError(
                f"The GPU failed while ONNX Runtime loaded {path}: {_sentence(error)} Check that `nvidia-smi` "
                "lists it, or take --device cpu."
            ) from error
        raise BundleError(
            f"ONNX Runtime cannot load {path}: {_sentence(error)} "
            "Export the bundle again with hd-export, or update onnxruntime."
        ) from error


def cpu_session(path: str | Path, options: Any) -> Any:
    return import_onnxruntime().InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _numbers(shape: Sequence[int | str]) -> tuple[int, ...]:
    """The last sizes of a shape, up to the last free one."""
    numbers: list[int] = []
    for size in shape:
        numbers = [*numbers, size] if isinstance(size, int) else []
    return tuple(numbers)


def _is_small(path: Path) -> bool:
    files = (path, path.with_name(path.name + ".data"))
    return sum(file.stat().st_size for file in files if file.exists()) <= SMALL_BYTES


def every(spec: GraphSpec, fixed: Mapping[str, int]) -> dict[str, int | tuple[int, int, int]]:
    """The sizes that an optimised graph takes: some fixed, and every one of the others."""
    free = dict.fromkeys(size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str))
    return {axis: fixed.get(axis) or EVERY.get(axis, SIDE) for axis in free}


def _kept_session(path: str | Path, spec: GraphSpec, options: Any, shelf: Shelf, fixed: Mapping[str, int]) -> Any:
    """A session from the optimised graph on the shelf, or one that puts it there."""
    path, ort = Path(path), import_onnxruntime()
    name, sizes = path.stem, every(spec, fixed)
    if (kept := shelf.find(name, sizes)) is not None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is optimised already
        return cpu_session(kept, options)
    # ONNX Runtime maps weights in a file of their own, and an optimised graph looks for them beside itself.
    if not shelf.keeps(name) or path.with_name(path.name + ".data").exists():
        return cpu_session(path, options)
    try:
        with TemporaryDirectory() as folder:
            optimised = Path(folder) / path.name
            options.optimized_model_filepath = str(optimised)
            started = time.monotonic()
            session = cpu_session(path, options)
            if optimised.exists():
                shelf.keep(name, sizes, optimised.read_bytes(), time.monotonic() - started)
            return session
    except Exception as error:
        if _is_memory(error):
            raise
    # Either the temporary folder is full or the graph is damaged. The second attempt tells which.
    options.optimized_model_filepath = ""
    session = cpu_session(path, options)
    _say_not_kept()
    return session


@functools.cache
def _say_not_kept() -> None:
    """Warns once in a process."""
    warnings.warn(
        f"The temporary folder {gettempdir()} cannot hold an optimised graph: it may be full. The graphs run, and the "
        "next start optimises them again. Free some space, or set TMPDIR to another folder.",
        RuntimeWarning,
        stacklevel=2,
    )


def session_options(threads: int | None = None) -> Any:
    """Options for low latency: one graph at a time, its operators spread over `threads` cores."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only, which also come as exceptions
    # No busy waiting. On cores with other work (a second run, a training job, a container's share) idle threads that
    # spin starve the one that works: on 2 busy cores, spinning doubled the time of a picture.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # No plan of a whole run's memory: each batch size gets its own, which costs 0.9 GB for Stable Diffusion's UNet
    # beside the arena, and gains no speed.
    options.enable_mem_pattern = False
    _share_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    return options


@functools.cache
def _share_arena() -> None:
    """One pool of memory for all sessions of the process, whose graphs run in turns, instead of a peak for each.

    Eight of the demo's pictures at once take 250 MB instead of 350.
    """
    ort = import_onnxruntime()
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(info, None)


def has_cuda_provider() -> bool:
    """Whether the installed ONNX Runtime could run on an NVIDIA GPU."""
    return "CUDAExecutionProvider" in import_onnxruntime().get_available_providers()


def both_installed() -> str | None:
    """A sentence when onnxruntime and onnxruntime-gpu are both installed, else None.

    They write the same files: the last one installed wins, most often the one without CUDA.
    """
    if not (version("onnxruntime") and version("onnxruntime-gpu")):
        return None
    return (
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files. Mend it with "
        "`pip uninstall -y onnxruntime onnxruntime-gpu`, then `pip install onnxruntime-gpu` with an NVIDIA GPU or "
        "`pip install onnxruntime` without one."
    )


def import_onnxruntime() -> Any:
    try:
        return imported("onnxruntime")
    except ImportError as error:
        raise EngineError(
            f'ONNX Runtime cannot be imported ({error}). Install it with `pip install "handiffuser[cpu]"`, or '
            '`pip install "handiffuser[cuda]"` for an NVIDIA GPU.'
        ) from error


def _check_contract(
    path: str | Path, spec: GraphSpec, inputs: list[Any], outputs: list[Any], sizes: Mapping[str, int]
) -> None:
    """Raises BundleError unless a session takes and gives what the manifest says. sizes: of fixed axes."""
    # In ONNX, only one value has a name. Where an output has the name of an input (x, latents, history of a step
    # graph), its name in the file differs, so outputs are known by their order.
    taken = {tensor.name for tensor in spec.inputs}
    by_name = {tensor.name: tensor for tensor in inputs}
    found_outputs = [tensor.name for tensor in outputs]
    same_outputs = len(found_outputs) == len(spec.outputs) and all(
        want.name in taken or want.name == name for want, name in zip(spec.outputs, found_outputs, strict=True)
    )
    if taken != set(by_name) or not same_outputs:
        raise BundleError(
            f"{path} takes {', '.join(by_name)} and gives {', '.join(found_outputs)}; the manifest says "
            f"{', '.join(taken)} and {', '.join(want.name for want in spec.outputs)}. "
            "Export the bundle again with hd-export."
        )
    pairs = [(want, by_name[want.name]) for want in spec.inputs]
    pairs += zip(spec.outputs, outputs, strict=True)
    for want, tensor in pairs:
        dtype, shape = _DTYPES.get(tensor.type, tensor.type), tensor.shape
        # ONNX Runtime may lack a size that the manifest has, but must not contradict it.
        same = len(shape) == len(want.shape) and all(
            not isinstance(size, int) or size == (sizes.get(allowed) if isinstance(allowed, str) else allowed)
            for size, allowed in zip(shape, want.shape, strict=True)
        )
        if dtype != want.dtype or not same:
            raise BundleError(
                f"{path} has {want.name} as {dtype}{shape}; the manifest says {want}. "
                "Export the bundle again with hd-export."
            )


def _sentence(error: Exception) -> str:
    """The first line of ONNX Runtime's message, without its error code, ended like a sentence."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = line.split(" : ", 3)[-1] if line.startswith("[ONNXRuntimeError]") else line
    if failure := _gpu_failure(error):  # it stands in the middle of a kilobyte of C++
        line = failure
    return line[:300].rstrip(" .") + "."


def _is_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("bad_alloc", "bad allocation", "failed to allocate", "out of memory", "alloc_failed")
    )


def _gpu_failure(error: Exception) -> str:
    """A GPU library's own words, such as "CUDA failure 719: unspecified launch failure", or ""."""
    found = re.search(r"\b(CUDA|CUDNN|CUBLAS) failure \d[^;]*", str(error))
    return found[0].strip() if found else ""
