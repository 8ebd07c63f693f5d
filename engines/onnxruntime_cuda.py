"""ONNX Runtime on an NVIDIA GPU: its CUDA provider, with arrays of the host or bound to arrays of the device.

engine = OnnxRuntimeCudaEngine("bundle/unet.onnx", manifest.graphs["unet"], stream=int(stream.handle))
outputs = engine(feeds)                         # numpy in, numpy out
on_gpu = OnnxRuntimeDeviceEngine(engine)        # bound to device arrays, enqueued on the stream
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..contract import BRANCHES, FLOAT32_GRAPHS, PICTURES, GraphSpec, Manifest, Size
from ..errors import BundleError, EngineError
from .base import DeviceEngine, DeviceEngines, Sized, check_feeds, powers_of_two
from .cuda import Cuda
from .derived import derived_graph
from .onnxruntime import NO_CUDA, OnnxRuntimeEngine, has_cuda_provider, import_onnxruntime, loading, session_options

_SAID: list[str] = []  # why the bundle's graphs run
PRIOR = "hand_prior"
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
# What ONNX Runtime keeps on the CPU by design: the arithmetic of shapes, a few integers each, which stay there.
SHAPES = frozenset(
    (
        "Add Cast Concat Constant ConstantOfShape Div Equal Expand Floor Gather Identity Less Max Min Mod Mul Neg "
        + "Range ReduceMax ReduceMin ReduceProd Reshape Shape Size Slice Split Squeeze Sub Tile Unsqueeze Where"
    ).split()
)


class OnnxRuntimeCudaEngine(OnnxRuntimeEngine):
    """One graph in ONNX Runtime on the GPU. See `Engine` for calling it."""

    device = "cuda"

    def __init__(
        self,
        path: str | Path,
        spec: GraphSpec,
        threads: int | None = None,
        stream: int = 0,
        capture: Mapping[str, int] | None = None,
        half: bool = False,
        derived: bytes | None = None,
        sides: Mapping[str, int] | None = None,
    ) -> None:
        """Loads the graph and compares its tensors with `spec`.

        stream: the CUDA stream it runs on, if not its own. capture: sizes of the free axes, such as {"B": 4}; the
        session then takes these alone, and ONNX Runtime replays it as a CUDA graph, see `OnnxRuntimeDeviceEngine`.
        half: its convolutions are in half precision, see `in_half`. derived: what it is given in place of the file,
        see `derived.py`. sides: of the pictures, see `Manifest.sides`.

        Raises BundleError when the file is broken, when its tensors differ from `spec`, or when a node of a graph to
        capture does not run on the GPU. Raises EngineError without a GPU, and where ONNX Runtime would run nodes of the
        dominant graph on the CPU.
        """
        if not has_cuda_provider():
            raise EngineError(NO_CUDA)
        ort = import_onnxruntime()
        if hasattr(ort, "preload_dlls"):  # finds CUDA and cuDNN in NVIDIA's pip packages
            ort.preload_dlls()
        # Batch sizes change as requests come and go, so cuDNN looks each convolution up and does not benchmark it.
        # TF32 keeps 10 of float32's 23 bits, too few for joints. Without it cuDNN may take no tensor core at all, which
        # convolutions in half precision need: ONNX Runtime 1.31 then prints an error for each of them, and tries again
        # with the bias as a kernel of its own.
        choices = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "1" if half else "0"}
        choices["enable_skip_layer_norm_strict_mode"] = "1"  # sums in float32, as in LayerNormalization
        if stream:
            choices["user_compute_stream"] = str(stream)
        if capture:
            choices["enable_cuda_graph"] = "1"
        options = session_options(threads)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        for axis, size in (sides or {}).items():
            options.add_free_dimension_override_by_name(axis, size)
        for axis, size in (capture or {}).items():  # a captured graph is for one shape, which the session must know
            options.add_free_dimension_override_by_name(axis, size)
        providers = [("CUDAExecutionProvider", choices), "CPUExecutionProvider"]
        if derived is not None:  # its weights are in the bundle's files
            folder = str(Path(path).absolute().parent)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        with loading(path, spec):
            self.session = ort.InferenceSession(derived or str(path), options, providers=providers)
        if self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise EngineError(
                "ONNX Runtime found no usable GPU: check that `nvidia-smi` lists one and that CUDA and cuDNN are "
                "of the versions your onnxruntime-gpu asks for, or take --device cpu."
            )
        if spec.dominant:
            self._check_places(spec)
        self.captures = bool(capture)
        self._settle(path, spec, capture)

    def __del__(self) -> None:
        # A callback of the stream returns the buffers that a run needed on the host. It must not be the last to hold
        # the session's allocator: CUDA refuses to free anything there, and ONNX Runtime ends the process.
        if hasattr(self, "session"):
            with contextlib.suppress(Exception):  # such as at the interpreter's end
                Cuda().call("cudaDeviceSynchronize")

    def _check_places(self, spec: GraphSpec) -> None:
        """Raises EngineError where ONNX Runtime put a node that computes on the CPU: its tensors would cross the bus at
        every step. ONNX Runtime does so silently where its CUDA provider lacks a kernel (Attention, until 1.25).
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
                f"onnxruntime-gpu {import_onnxruntime().__version__} has no CUDA kernel for {names} of "
                f"{Path(spec.file).stem}: every step would wait for the CPU. Update it (pip install --upgrade "
                '"handiffuser[cuda]"), or take --backend tensorrt or tensorrt-rtx, or --device cpu.'
            )


class OnnxRuntimeDeviceEngine:
    """A CUDA session bound to given device arrays: see `DeviceEngine`. It runs on its session's stream.

    The first run of a session that captures is three in one (two to settle memory, one to capture). Later runs replay
    it: the arrays must stay in place, all runs must come from one thread, and a session serves one set of arrays. The
    host then waits for the end of each run.
    """

    def __init__(self, engine: OnnxRuntimeCudaEngine) -> None:
        self.engine, self.spec, self.own_graph = engine, engine.spec, engine.captures
        self.options = import_onnxruntime().RunOptions()
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
        # It allocates while it runs, and frees the host memory of its copies after the run: a replay would read freed
        # memory.
        return False


def device_engines(
    name: str,
    folder: Path,
    manifest: Manifest,
    cuda: Cuda,
    stream_of: Callable[[str], Any],
    slots: int,
    replay: bool = False,
) -> DeviceEngines:
    """One session a graph on its stream, and one binding a bucket; for each size of pictures.

    ONNX Runtime replays the steps of stage 1 as CUDA graphs of its own, with a session and its weights for each bucket.
    That saves the launch of each kernel, but the host waits for every step. The prior is small, so its launches would
    take longer than its kernels, and its copies take little memory.

    replay: likewise the steps of stage 2. A session that refuses runs without.
    """
    shared: dict[str, OnnxRuntimeCudaEngine] = {}  # sessions of graphs without a size

    def at(size: Size) -> Sized:
        """Sessions for a size, which go when the loop lets go of the size. The rewrites for CUDA need numbers, so each
        size has a graph of its own, and the weights of UNet and decoder once more."""
        sessions: dict[str, OnnxRuntimeCudaEngine] = {}

        def session(graph: str, capture: dict[str, int] | None = None) -> OnnxRuntimeCudaEngine:
            stream = int(stream_of(graph).handle)
            return open_cuda(folder, manifest, graph, size, stream=stream, capture=capture)

        def load(graph: str, bucket: int, branches: int) -> DeviceEngine:
            if graph == PRIOR or (replay and manifest.graphs[graph].steps):
                try:
                    return OnnxRuntimeDeviceEngine(session(graph, {"B": bucket, BRANCHES: branches}))
                except BundleError:
                    pass  # a node does not run on the GPU; the plain session repeats any other problem
            kept = sessions if graph in PICTURES else shared
            if graph not in kept:
                kept[graph] = session(graph)
            return OnnxRuntimeDeviceEngine(kept[graph])

        buckets = powers_of_two(slots)
        single = {graph: buckets for graph, spec in manifest.graphs.items() if spec.steps}
        files = (folder / name for graph in PICTURES if graph in manifest.graphs for name in manifest.files_of(graph))
        return Sized(load, buckets, single, sum(file.stat().st_size for file in files))

    return DeviceEngines(at, None if manifest.size_multiple else frozenset({manifest.image_size}))


def open_cuda(
    folder: Path, manifest: Manifest, graph: str, size: Size | None = None, **options: Any
) -> OnnxRuntimeCudaEngine:
    """A session of the graph that is derived from a bundle's, or of the bundle's own where that one fails.

    size: height and width of the pictures; None: the bundle's own. options: of `OnnxRuntimeCudaEngine`. A derived graph
    runs once on zeros, because kernels refuse shapes only then.
    """
    spec, sides = manifest.fixed(size).graphs[graph], manifest.sides(size)
    path, options = folder / spec.file, {"half": in_half(manifest, graph), "sides": sides, **options}
    try:
        derived = derived_graph(folder, manifest, graph, sides)
        if derived is not None:
            engine = OnnxRuntimeCudaEngine(path, spec, derived=derived, **options)
            if not options.get("capture"):
                shapes = {t.name: [n if isinstance(n, int) else 1 for n in t.shape] for t in spec.inputs}
                engine({t.name: np.zeros(shapes[t.name], t.dtype) for t in spec.inputs})
            return engine
        refused = ""
    except (BundleError, EngineError) as error:
        refused = str(error)
    engine = OnnxRuntimeCudaEngine(path, spec, **options)  # where this fails, too, it is not the derived graph's fault
    if refused:
        _say_not_derived(refused)
    return engine


def _say_not_derived(why: str) -> None:
    """Warns once in a process."""
    if _SAID:
        return
    _SAID.append(why)
    warnings.warn(
        f"ONNX Runtime runs the bundle's own graphs, which take longer than those derived for it. {why}",
        RuntimeWarning,
        stacklevel=2,
    )


def in_half(manifest: Manifest, graph: str) -> bool:
    """Whether a graph computes in half precision, which TF32, a way to compute float32, does not change."""
    return manifest.precision != "fp32" and graph not in FLOAT32_GRAPHS


def _element_type(array: Any) -> Any:
    """The dtype of a device array as a binding takes it: numpy's type, or ONNX's number for bfloat16."""
    return _BFLOAT16 if str(array.dtype) == "bfloat16" else np.dtype(array.dtype).type
