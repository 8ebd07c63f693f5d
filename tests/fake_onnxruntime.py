"""ONNX Runtime's CUDA provider without a GPU: sessions that are bound to the fake GPU's memory, computed on the CPU.

    gpu = FakeRuntime().install(monkeypatch)
    ort = FakeOnnxRuntime(gpu).install(monkeypatch)     # what `import onnxruntime` finds from here on

All but sessions with the CUDA provider is the installed package. Of those it has what the engines use, with the real
classes' names and parameters, and what can be seen from outside of it, as documented or as its sources show:

- a run goes to the session's `user_compute_stream`, or to a stream of its own; it reads what is bound as input and
  writes what is bound as output, and scratch memory, which it allocates when it first sees a batch size;
- then the host waits for the end, unless `disable_synchronize_execution_providers` is 1;
- with `enable_cuda_graph` the first run is three (two to settle memory, the third is captured), later ones launch that
  graph, whatever is bound by then, and the host waits for each (which releases since August 2026 can be told not to).

`problems` of the GPU also tell of a run inside of somebody else's capture (it copies from host memory that is freed
when it is over) and of a graph that would have to run on other memory than it was captured with.
Not here: kernels' own mistakes. `refuse`: graphs that ONNX Runtime will not capture. `no_kernel`: kinds of nodes that
the CUDA provider leaves to the CPU, as it does with the arithmetic of shapes.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as real
from fake_runtime import GARBAGE, OK, CallError, FakeRuntime, Op
from fake_tensorrt import DTYPES, SCRATCH, WEIGHTS
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

# The provider's options, as ONNX Runtime's documentation lists them.
OPTIONS = {
    "device_id",
    "user_compute_stream",
    "do_copy_in_default_stream",
    "use_ep_level_unified_stream",
    "gpu_mem_limit",
    "arena_extend_strategy",
    "cudnn_conv_algo_search",
    "cudnn_conv_use_max_workspace",
    "cudnn_conv1d_pad_to_nc1d",
    "enable_cuda_graph",
    "enable_skip_layer_norm_strict_mode",
    "use_tf32",
    "prefer_nhwc",
}
BFLOAT16 = 16  # how a binding is told, by the number in ONNX
SHAPE_KINDS = ("Shape", "Gather", "Squeeze", "Unsqueeze")  # what the provider leaves to the CPU wherever it stands


DERIVED = "derived.onnx"  # the name of a graph that came as bytes


def _expanded(content: bytes) -> bytes:
    import onnx
    from handiffuser.engines.standins import expanded

    return expanded(onnx.load_model_from_string(content)).SerializeToString()


class Strict:
    """Has no public name that the real class lacks, and no other parameters."""

    def __init_subclass__(cls) -> None:
        theirs = getattr(real, cls.__name__)
        for name, value in vars(cls).items():
            if not name.startswith("_"):
                want, have = (list(inspect.signature(one).parameters) for one in (getattr(theirs, name), value))
                assert have == want, (cls.__name__, name, want)
        cls.real = theirs

    def __getattr__(self, name: str):
        if hasattr(type(self).real, name):
            raise NotImplementedError(f"The fake {type(self).__name__} has no {name} yet; write it.")
        raise AttributeError(f"{type(self).__name__} has no {name}")


class IOBinding(Strict):
    def __init__(self) -> None:
        self._bound: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        assert (device_type, device_id) == ("cuda", 0), "the fake's memory is on its only GPU"
        assert element_type != BFLOAT16, "what computes here knows no bfloat16"
        self._bound[name] = (int(buffer_ptr), np.dtype(element_type), tuple(shape))

    def bind_output(self, name, device_type="cpu", device_id=0, element_type=None, shape=None, buffer_ptr=None):
        assert buffer_ptr is not None, "an output that ONNX Runtime places itself is none of ours"
        self.bind_input(name, device_type, device_id, element_type, shape, buffer_ptr)


def _ended(gpu: Any, name: str, waiting: list[int]) -> None:
    """As seen on an H200: the stream's callback would free the session's buffers, which CUDA forbids there."""
    if waiting[0] and gpu.broken is None:
        gpu.problem(f"the session of {name} ends while the device still has to run it")


class InferenceSession(Strict):
    def __init__(self, fake: FakeOnnxRuntime, path: str | bytes, options: Any, choices: dict[str, str]) -> None:
        assert set(choices) <= OPTIONS, f"the CUDA provider has no option {set(choices) - OPTIONS}"
        if isinstance(path, bytes):  # derived: its operators have no kernel on a CPU, so their definitions run
            content, path = _expanded(path), DERIVED
            if DERIVED in fake.refuse:
                raise Fail("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : no kernel for GroupNorm")
        else:
            content = path
        self._fake, self._gpu, self._path, self.choices = fake, fake.gpu, Path(path), choices
        self._replays = choices.get("enable_cuda_graph", "0") == "1"
        if self._replays and self._path.stem in fake.refuse:
            raise Fail("This session cannot use the graph capture feature as requested by the user")
        self._session = real.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._stream = int(choices.get("user_compute_stream", 0))
        if not self._stream:
            own = self._call("cudaStreamCreateWithFlags", self._gpu.cudaStreamNonBlocking)
            weakref.finalize(self, self._gpu.cudaStreamDestroy, own)
            self._stream = int(own)
        self._weights, self._scratch = self._allocate(WEIGHTS), {}
        self._gpu.put(self._weights)
        self._captured: tuple[Any, dict] | None = None  # executable graph, and what was bound to it
        self._waiting, self._watched = [0], 0  # runs that the device has not come to
        fake.sessions.append((self._path.stem, choices))

    def get_inputs(self):
        return self._session.get_inputs()

    def get_outputs(self):
        return self._session.get_outputs()

    def get_provider_graph_assignment_info(self):
        """What the real session says, with the GPU's share taken out of the CPU's."""
        parts = self._session.get_provider_graph_assignment_info()
        on_cpu = (*SHAPE_KINDS, *self._fake.no_kernel)
        return [
            SimpleNamespace(ep_name=place, get_nodes=lambda nodes=nodes: nodes)
            for part in parts
            for node in part.get_nodes()
            for place, nodes in [
                ("CPUExecutionProvider" if node.op_type in on_cpu else "CUDAExecutionProvider", [node])
            ]
        ]

    def get_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self):
        return IOBinding()

    def run(self, output_names, input_feed, run_options=None):
        """On arrays of the host: it waits for the end."""
        self._fake.trials.append(self._path.stem)
        return self._session.run(output_names, input_feed)

    def run_with_iobinding(self, iobinding, run_options=None):
        bound = iobinding._bound
        if self._captured is not None:
            graph, captured = self._captured
            if captured != bound:
                self._gpu.problem(f"{self._path.stem} replays a graph that was captured with other memory")
            self._call("cudaGraphLaunch", graph, self._stream)
            self._call("cudaStreamSynchronize", self._stream)
            return
        if self._gpu.capturing is not None:
            self._gpu.problem(f"ONNX Runtime runs {self._path.stem} in a capture that is not its own")
        op = self._op(bound)
        if len(self._scratch) != self._watched:  # the latest is called first, before memory is freed
            self._watched = len(self._scratch)
            weakref.finalize(self, _ended, self._gpu, self._path.stem, self._waiting)
        for _ in range(2 if self._replays else 1):
            self._waiting[0] += 1
            self._enqueue(op)
        if self._replays:
            self._call("cudaStreamSynchronize", self._stream)
            self._capture(op, bound)
            self._call("cudaStreamSynchronize", self._stream)
        elif run_options is None or not _is_on(run_options, "disable_synchronize_execution_providers"):
            self._call("cudaStreamSynchronize", self._stream)
        self._fake.runs[self._path.stem] = self._fake.runs.get(self._path.stem, 0) + 1

    def _op(self, bound: dict) -> Op:
        """One run on what is bound. Raises as ONNX Runtime does for what does not fit."""
        takes, gives = self.get_inputs(), self.get_outputs()
        for tensor in (*takes, *gives):
            if tensor.name not in bound:
                raise InvalidArgument(f"[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : {tensor.name} is not bound")
            _, dtype, shape = bound[tensor.name]
            same = all(not isinstance(n, int) or n == m for n, m in zip(tensor.shape, shape, strict=False))
            if dtype != DTYPES[tensor.type] or len(shape) != len(tensor.shape) or not same:
                raise InvalidArgument(
                    f"[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid dimensions for {tensor.name}"
                )
        given, given_back = ({t.name: bound[t.name] for t in tensors} for tensors in (takes, gives))
        rows = next(iter(given.values()))[2][0]
        if rows not in self._scratch:
            self._scratch[rows] = self._allocate(SCRATCH * rows)
        gpu, session, name = self._gpu, self._session, self._path.stem
        scratch, waiting = (self._scratch[rows], SCRATCH * rows), self._waiting

        def view(tensor):
            address, dtype, shape = tensor
            return gpu.view(address, _size(tensor)).view(dtype).reshape(shape)

        def work() -> None:
            waiting[0] = max(0, waiting[0] - 1)
            feeds = {key: view(tensor).copy() for key, tensor in given.items()}
            gpu.view(*scratch)[:] = GARBAGE
            results = dict(zip(given_back, session.run(list(given_back), feeds), strict=True))
            for key, value in results.items():
                assert value.shape == given_back[key][2], f"{name} gives {key} of another size than bound"
                view(given_back[key])[...] = value

        reads, writes = ([(tensor[0], _size(tensor)) for tensor in some.values()] for some in (given, given_back))
        op = Op(f"ONNX Runtime's {name}", [*reads, (self._weights, WEIGHTS)], [*writes, scratch], work)
        op.owner = weakref.ref(self)
        return op

    def _enqueue(self, op: Op) -> None:
        try:
            self._gpu.enqueue(self._stream, op)
        except CallError as refused:
            raise _failure(self._gpu, refused.code) from None
        if self._gpu.broken is not None:
            raise _failure(self._gpu, self._gpu.broken)

    def _capture(self, op: Op, bound: dict) -> None:
        mode = self._gpu.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        self._enqueue(op)
        graph = self._call("cudaStreamEndCapture", self._stream)
        executable = self._call("cudaGraphInstantiate", graph, 0)
        weakref.finalize(self, self._gpu.cudaGraphExecDestroy, executable)
        self._call("cudaGraphDestroy", graph)
        self._captured = (executable, dict(bound))
        self._call("cudaGraphLaunch", executable, self._stream)

    def _allocate(self, size: int) -> int:
        """Memory that goes with the session."""
        error, pointer = self._gpu.cudaMalloc(size)
        if error == self._gpu.cudaError_t.cudaErrorMemoryAllocation:
            raise RuntimeException(
                "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bfc_arena.cc:376 AllocateRawInternal Failed to allocate "
                f"memory for requested buffer of size {size}"
            )
        if error != OK:
            raise _failure(self._gpu, error)
        weakref.finalize(self, self._gpu.cudaFree, pointer)
        return pointer

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._gpu, name)(*arguments)
        if error != OK:
            raise _failure(self._gpu, error)
        return values[0] if values else None


class FakeOnnxRuntime:
    """The module. sessions: (graph, provider's options) of those made on the GPU so far.

    runs: graph -> how often it was computed, replays of its own graph not counted.
    """

    def __init__(self, gpu: FakeRuntime) -> None:
        self.gpu, self.runs, self.refuse, self.no_kernel, self.preloaded = gpu, {}, (), (), 0
        self.sessions: list[tuple[str, dict[str, str]]] = []
        self.trials: list[str] = []  # graphs that ran on arrays of the host
        self.module = ModuleType("onnxruntime")
        vars(self.module).update({k: v for k, v in vars(real).items() if k not in ("__name__", "__spec__")})
        self.module.get_available_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
        self.module.InferenceSession, self.module.preload_dlls = self._session, self._preload

    def install(self, monkeypatch) -> FakeOnnxRuntime:
        monkeypatch.setitem(sys.modules, "onnxruntime", self.module)
        return self

    def _preload(self, *_: Any, **__: Any) -> None:
        self.preloaded += 1

    def _session(self, path: str, options: Any = None, providers: Any = None) -> Any:
        if providers is None or providers == ["CPUExecutionProvider"]:
            return real.InferenceSession(path, options, providers=providers)
        (first, choices), *others = providers
        assert first == "CUDAExecutionProvider" and others == ["CPUExecutionProvider"]
        assert self.preloaded, "CUDA's libraries from pip packages load only after preload_dlls"
        return InferenceSession(self, path, options, choices)


def _size(tensor: tuple[int, np.dtype, tuple[int, ...]]) -> int:
    _, dtype, shape = tensor
    return int(np.prod(shape)) * dtype.itemsize


def _is_on(options: Any, key: str) -> bool:
    try:
        return options.get_run_config_entry(key) == "1"
    except RuntimeError:  # it was not set
        return False


def _failure(gpu: FakeRuntime, error: Any) -> Exception:
    """What ONNX Runtime makes of a call that failed, word for word but for the paths."""
    where = "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:{} "
    what = (
        "std::conditional_t<THRW, void, onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE, const char*, const "
        "char*, ERRTYPE, const char*, const char*, int) [with ERRTYPE = cudaError; bool THRW = true; "
        "std::conditional_t<THRW, void, onnxruntime::common::Status> = void] "
    )
    return Fail(
        f"[ONNXRuntimeError] : 1 : FAIL : {where.format(121)}{what}{where.format(114)}{what}CUDA failure {int(error)}: "
        f"{error.name} ; GPU=0 ; hostname=here ; file=cuda_stream_handle.cc ; line=1 ; expr=cudaGetLastError();"
    )
