"""ONNX Runtime: the backend that runs everywhere. CPU by default, CUDA with I/O binding where it is installed.

engine = OnnxRuntimeEngine("bundle/unet.onnx", manifest.graphs["unet"], device="cpu", threads=4)
outputs = engine(feeds)                         # numpy in, numpy out
on_gpu = OnnxRuntimeDeviceEngine(engine)        # CUDA: bound to device arrays, enqueued on a stream
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np

from ..commands import imported
from ..contract import BRANCHES, FLOAT32_GRAPHS, LARGEST, GraphSpec, Manifest
from ..errors import BundleError, EngineError
from ..installed import version
from . import cpu
from .base import Engine, check_feeds, check_host
from .cuda import Cuda
from .plans import Shelf

DEVICES = ("auto", "cpu", "cuda")
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
# A graph that was optimised is for every size, written as (least, best, most).
EVERY = {"B": (1, 1, LARGEST), BRANCHES: (1, 2, 2), "S": (1, 20, 1000)}
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
# What ONNX Runtime keeps on the CPU by design: the arithmetic of shapes, a few integers each, which stay there.
SHAPES = frozenset(
    (
        "Add Cast Concat Constant ConstantOfShape Div Equal Expand Floor Gather Identity Less Max Min Mod Mul Neg "
        + "Range ReduceMax ReduceMin ReduceProd Reshape Shape Size Slice Split Squeeze Sub Tile Unsqueeze Where"
    ).split()
)


def load_engines(
    folder: str | Path,
    device: str = "auto",
    threads: int | None = None,
    verify: bool = True,
    others: Callable[[Manifest], Mapping[str, Engine]] | None = None,
) -> tuple[Manifest, dict[str, Engine]]:
    """Loads a bundle: its manifest, and one engine for each of its graphs.

    device: "cpu", "cuda" (an error where there is none) or "auto" (CUDA where it works, else the CPU).
    threads: CPU threads of one graph; by default as many as there are usable cores.
    verify: check every file against the manifest's SHA-256 (about 1 s a GB): a graph before it is loaded, weights in a
    file of their own beside the loading.
    others: gives engines of another backend, which verifies what it reads itself; the rest is loaded here.

    Raises BundleError for a bundle that is missing, damaged or not what its manifest says, EngineError for one in
    bfloat16, and when ONNX Runtime is not installed or the device is not there. Warns when both of ONNX Runtime's
    packages are installed.
    """
    if device not in DEVICES:
        raise EngineError(f"There is no device {device!r}. Choose one of {', '.join(DEVICES)}.")
    if threads is not None and threads < 1:
        raise EngineError(f"{threads} threads cannot run anything. Give 1 or more, or leave it out.")
    folder = Path(folder)
    manifest = Manifest.load(folder, verify, files=False)
    check_host(manifest, folder)
    ort = _import_onnxruntime()
    if problem := both_installed():
        warnings.warn(problem, RuntimeWarning, stacklevel=2)
    given = dict(others(manifest)) if others is not None else {}
    files = {name: spec.file for name, spec in manifest.graphs.items() if name not in given}
    shelf = None
    if device == "cpu":
        shelf = Shelf(manifest, folder, "onnxruntime", ort.__version__, cpu.target(), Optimised())

    def load(name: str) -> Engine:
        if verify:
            manifest.check_files(folder, [files[name]])
        half = in_half(manifest, name)
        return OnnxRuntimeEngine(folder / files[name], manifest.graphs[name], device, threads, shelf=shelf, half=half)

    # ONNX Runtime optimises a graph while it loads and lets go of the GIL meanwhile: two at a time on two cores.
    # The biggest go first, so that none of them is left alone at the end.
    names = sorted(files, key=lambda name: -_size(folder / files[name]))
    theirs = {file for name in given for file in manifest.files_of(name)}
    rest = [name for name in manifest.files if name not in files.values() and name not in theirs]
    with ThreadPoolExecutor(min(4, usable_cores()) + 1) as pool:
        checked = pool.submit(manifest.check_files, folder, rest if verify else [])
        loaded = [pool.submit(load, name) for name in names]
        checked.result()  # damaged weights are why a graph cannot be loaded, not what follows from them
        engines: dict[str, Engine] = given | {name: one.result() for name, one in zip(names, loaded, strict=True)}
    return manifest, engines


@dataclass(frozen=True)
class Optimised:
    """What a session's optimised graph depends on beside ONNX Runtime's version and the processor."""

    level: str = "all"


def in_half(manifest: Manifest, graph: str) -> bool:
    """Whether a graph computes in half precision: TF32, a way to compute float32, does not concern it."""
    return manifest.precision != "fp32" and graph not in FLOAT32_GRAPHS


class OnnxRuntimeEngine:
    """One graph in ONNX Runtime. See `Engine` for calling it; `device` says where it really runs."""

    def __init__(
        self,
        path: str | Path,
        spec: GraphSpec,
        device: str = "auto",
        threads: int | None = None,
        stream: int = 0,
        capture: Mapping[str, int] | None = None,
        shelf: Shelf | None = None,
        half: bool = False,
    ) -> None:
        """Loads the graph and compares its tensors with `spec`. stream: the CUDA stream it runs on, if not its own.
        capture: sizes of the free axes, such as {"B": 4}; the session is then for these alone, and ONNX Runtime replays
        it as a CUDA graph, see `OnnxRuntimeDeviceEngine`. shelf: on a CPU, where the graph is found and kept as ONNX
        Runtime optimised it for this processor, which spares that work at the next start. half: its convolutions are
        in half precision, see `in_half`.

        Raises BundleError when the file is broken, when its tensors differ from `spec`, or when some node of what is to
        be captured does not run on the GPU; EngineError when `device` is "cuda" and there is none, or when nodes of the
        UNet would run on the CPU beside it.
        """
        ort = _import_onnxruntime()
        self.spec = spec
        cuda = device != "cpu" and "CUDAExecutionProvider" in ort.get_available_providers()
        if device == "cuda" and not cuda:
            raise EngineError(NO_CUDA)
        # Batch sizes change as requests come and go: look the convolution up, do not benchmark it for every size.
        providers: list[Any] = ["CPUExecutionProvider"]
        if cuda:
            if hasattr(ort, "preload_dlls"):  # finds CUDA and cuDNN in NVIDIA's pip packages
                ort.preload_dlls()
            # TF32 keeps 10 of float32's 23 bits: too few for joints, and no float32 any more. Without it cuDNN may take
            # no tensor core at all, which convolutions in half precision need: ONNX Runtime 1.31 then prints an error
            # for each of them, and tries again with the bias as a kernel of its own.
            choices = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "1" if half else "0"}
            if stream:
                choices["user_compute_stream"] = str(stream)
            if capture:
                choices["enable_cuda_graph"] = "1"
            providers.insert(0, ("CUDAExecutionProvider", choices))
        options = session_options(threads)
        if cuda:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        for axis, size in (capture or {}).items():  # a captured graph is for one shape; let the session know it
            options.add_free_dimension_override_by_name(axis, size)
        try:
            if shelf is None or cuda:
                self.session = ort.InferenceSession(str(path), options, providers=providers)
            else:
                self.session = _kept_session(Path(path), spec, options, shelf)
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
        self.device = "cuda" if self.session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
        if device == "cuda" and self.device != "cuda":
            raise EngineError(
                "ONNX Runtime found no usable GPU: check that `nvidia-smi` lists one and that CUDA and cuDNN are "
                "of the versions your onnxruntime-gpu asks for, or take --device cpu."
            )
        if self.device == "cuda" and Path(path).stem == "unet":
            self._check_places()
        self.captures = bool(capture) and self.device == "cuda"
        _check_contract(path, spec, self.session.get_inputs(), self.session.get_outputs(), capture or {})
        self.names = [tensor.name for tensor in spec.outputs]
        self.file_names = [tensor.name for tensor in self.session.get_outputs()]

    def __del__(self) -> None:
        # Buffers that a run needed on the host are given back by a callback of the stream. The last to hold a session's
        # allocator must not be that callback: CUDA refuses to free anything there, and ONNX Runtime ends the process.
        if getattr(self, "device", "cpu") == "cuda":
            with contextlib.suppress(Exception):  # such as at the interpreter's end
                Cuda().call("cudaDeviceSynchronize")

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        check_feeds(self.spec, feeds)
        try:
            values = self.session.run(self.file_names, feeds)
        except Exception as error:
            raise self.failure(error) from error
        return dict(zip(self.names, values, strict=True))

    def _check_places(self) -> None:
        """Raises EngineError when a node that computes was put on the CPU: its tensors would cross the bus each step.

        ONNX Runtime does that without a word where its CUDA provider lacks a kernel (Attention, until 1.25).
        """
        ask = getattr(self.session, "get_provider_graph_assignment_info", None)  # since 1.24
        left = [
            f"{node.op_type} {node.name}".strip()
            for part in (ask() if ask is not None else [])
            if part.ep_name == "CPUExecutionProvider"
            for node in part.get_nodes()
            if node.op_type not in SHAPES
        ]
        if left:
            names = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            raise EngineError(
                f"onnxruntime-gpu {_import_onnxruntime().__version__} has no CUDA kernel for {names} of "
                f"{Path(self.spec.file).stem}: every step would wait for the CPU. Update it (pip install --upgrade "
                '"handiffuser[cuda]"), or take --backend tensorrt or tensorrt-rtx, or --device cpu.'
            )

    def failure(self, error: Exception) -> EngineError:
        """What ONNX Runtime's exception means for the user."""
        name = Path(self.spec.file).stem
        if _is_memory(error):
            return EngineError(f"There is not enough memory to run {name}. Take a smaller --batch-size.")
        return EngineError(f"ONNX Runtime failed in {name}: {_sentence(error)}")


class OnnxRuntimeDeviceEngine:
    """A CUDA session bound to given device arrays: see `DeviceEngine`. Its session's stream is the one it runs on.

    Of a session that captures, the first run is three in one (two to settle memory, one to capture), and the later
    ones replay it: the arrays must stay where they are, as ours do, all runs come from one thread, and one session is
    for one set of arrays. It costs that the host waits for the end of each run, as ONNX Runtime always does then.
    """

    def __init__(self, engine: OnnxRuntimeEngine) -> None:
        self.engine, self.spec, self.own_graph = engine, engine.spec, engine.captures
        self.options = _import_onnxruntime().RunOptions()
        # The caller orders work by streams and events; without this every run would wait for the device.
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        check_feeds(self.spec, inputs)
        self.binding = self.engine.session.io_binding()
        for name, array in inputs.items():
            self.binding.bind_input(name, "cuda", 0, _element_type(array), list(array.shape), array.pointer)
        for name, file_name in zip(self.engine.names, self.engine.file_names, strict=True):
            array = outputs[name]
            self.binding.bind_output(file_name, "cuda", 0, _element_type(array), list(array.shape), array.pointer)
        self.bound = (dict(inputs), dict(outputs))  # keeps them alive

    def enqueue(self, stream: Any) -> None:
        try:
            self.engine.session.run_with_iobinding(self.binding, self.options)
        except Exception as error:
            raise self.engine.failure(error) from error

    def capturable(self, stream: Any) -> bool:
        # Not by us: it allocates while it runs, and frees host memory that its copies come from when a run is over. A
        # replay would read what is no longer there.
        return False


def _kept_session(path: Path, spec: GraphSpec, options: Any, shelf: Shelf) -> Any:
    """A session on the CPU from the optimised graph on the shelf; or one that puts it there."""
    ort = _import_onnxruntime()
    name, sizes = path.stem, {axis: EVERY[axis] for axis in dict.fromkeys(_free_axes(spec))}
    if (kept := shelf.find(name, sizes)) is not None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it has been
        return ort.InferenceSession(str(kept), options, providers=["CPUExecutionProvider"])
    # Weights in a file of their own are mapped, and an optimised graph would look for them where it is.
    if not shelf.keeps(name) or path.with_name(path.name + ".data").exists():
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    try:
        with TemporaryDirectory() as folder:
            optimised = Path(folder) / path.name
            options.optimized_model_filepath = str(optimised)
            started = time.monotonic()
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            if optimised.exists():
                shelf.keep(name, sizes, optimised.read_bytes(), time.monotonic() - started)
            return session
    except Exception as error:
        if _is_memory(error):
            raise
    # The temporary folder may be full, or the graph damaged: that shows now.
    options.optimized_model_filepath = ""
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    _say_not_kept()
    return session


@functools.cache
def _say_not_kept() -> None:
    """Warns once in a process."""
    warnings.warn(
        f"The temporary folder {gettempdir()} cannot hold an optimised graph: it may be full. The graphs run, and are "
        "optimised again at the next start. Free some space, or set TMPDIR to another folder.",
        RuntimeWarning,
        stacklevel=2,
    )


def _free_axes(spec: GraphSpec) -> list[str]:
    return [size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)]


def session_options(threads: int | None = None) -> Any:
    """Options for low latency: one graph at a time, its operators spread over `threads` cores."""
    ort = _import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only; they reach the user as exceptions
    # No busy waiting. On cores that something else uses too (a second run, a training job, a container's share) idle
    # threads that spin starve the one that works: measured on 2 busy cores, spinning doubles the time of a picture.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # No plan of a whole run's memory: it is made for each batch size anew, and costs 0.9 GB for Stable Diffusion's UNet
    # beside what the arena holds already, for no gain in speed.
    options.enable_mem_pattern = False
    _share_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    return options


@functools.cache
def _share_arena() -> None:
    """One pool of memory for all sessions of the process: graphs run one after the other, and each pool keeps its peak.

    Eight of the demo's pictures at once take 250 MB instead of 350.
    """
    ort = _import_onnxruntime()
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(info, None)


def usable_cores() -> int:
    """Physical cores this process may use: its CPU affinity, without hyperthreads, within its cgroup's quota."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    cores = set()
    for number in cpus:
        siblings = _read(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        cores.add(siblings or str(number))
    count = len(cores)
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        count = min(count, -(-int(quota) // int(period)))
    return max(1, count)


def has_cuda_provider() -> bool:
    """Whether the installed ONNX Runtime could run on an NVIDIA GPU."""
    return "CUDAExecutionProvider" in _import_onnxruntime().get_available_providers()


def both_installed() -> str | None:
    """A sentence when onnxruntime and onnxruntime-gpu are both installed, else None.

    They write the same files: whichever came last wins, most often the one without CUDA.
    """
    if not (version("onnxruntime") and version("onnxruntime-gpu")):
        return None
    return (
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files. Mend it with "
        "`pip uninstall -y onnxruntime onnxruntime-gpu`, then `pip install onnxruntime-gpu` where there is an "
        "NVIDIA GPU or `pip install onnxruntime` where there is none."
    )


def _import_onnxruntime() -> Any:
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
    # ONNX gives a name to one value only. So where an output bears the name of an input (x, latents, history of a
    # step graph), the file calls it otherwise, and outputs are known by their order.
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
        # ONNX Runtime may know less of a size than the manifest does, but must not know it otherwise.
        same = len(shape) == len(want.shape) and all(
            not isinstance(size, int) or size == (sizes.get(allowed) if isinstance(allowed, str) else allowed)
            for size, allowed in zip(shape, want.shape, strict=True)
        )
        if dtype != want.dtype or not same:
            raise BundleError(
                f"{path} has {want.name} as {dtype}{shape}; the manifest says {want}. "
                "Export the bundle again with hd-export."
            )


def _element_type(array: Any) -> Any:
    """How a binding wants to be told the dtype of a device array: as numpy's type, or by its number in ONNX."""
    return _BFLOAT16 if str(array.dtype) == "bfloat16" else np.dtype(array.dtype).type


def _sentence(error: Exception) -> str:
    """The first line of ONNX Runtime's message, without its error code, ended like a sentence."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = line.split(" : ", 3)[-1] if line.startswith("[ONNXRuntimeError]") else line
    if failure := _gpu_failure(error):  # it stands behind half a kilobyte of C++, and before as much
        line = failure
    return line[:300].rstrip(" .") + "."


def _is_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("bad_alloc", "bad allocation", "failed to allocate", "out of memory", "alloc_failed")
    )


def _gpu_failure(error: Exception) -> str:
    """What a library on the GPU said, "CUDA failure 719: unspecified launch failure", or "" if none did."""
    found = re.search(r"\b(CUDA|CUDNN|CUBLAS) failure \d[^;]*", str(error))
    return found[0].strip() if found else ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
