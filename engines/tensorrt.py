"""TensorRT and TensorRT for RTX: one implementation over the two modules, which share one interface.

    backend = Backend("tensorrt-rtx")
    plan, proof = backend.build("bundle/unet.onnx", {"B": 4}, "fp16", Options())       # needs no GPU with TensorRT-RTX
    engine = TensorRTEngine(backend, backend.load(plan, "unet", cuda), spec, Scratch(cuda))
    engine.bind({"latents": array, ...}); engine.enqueue(stream)

Networks are strongly typed: a tensor has the type that the ONNX graph gives it, and nothing is lowered or raised
behind the user's back. So the precision is a property of the exported graph, and `build` proves it from the types of
the layers that compute. One thing types do not show: TF32, which TensorRT allows unless told otherwise, and in which
float32 keeps 10 of its 23 bits. It is off always: what is float32 here (kinematics, the solver, what half precision
could not hold, bundles in fp32) is so because it needs the bits.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..contract import LARGEST, GraphSpec
from ..errors import EngineError
from . import inspect
from .base import check_feeds
from .cuda import Cuda, DeviceArray, Stream

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
TILING = ("none", "fast", "moderate", "full")
# The layers that do the arithmetic, and so decide speed and precision.
COMPUTE = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "ATTENTION_INPUT", "EINSUM")
TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
FLOAT32_GRAPHS = ("hand_features",)  # kinematics are float32 whatever was asked for
# Of the layers that compute, at least so many must have the precision that was asked for. Not all: the solver's tail,
# the embedding of timesteps and layers that calibration keeps in float32 are not.
SHARE = 0.8
EVERYWHERE = (
    "7.5, 8.x or 12.x"  # where TensorRT-RTX runs unless a plan names GPUs; not on 9.0 and 10.0, Hopper and B200
)
NO_BFLOAT16 = "7.5"  # the one that TensorRT-RTX supports and that has none: bf16 plans for all leave it out
FREE_MAX = {"B": LARGEST, "S": 1000}  # the largest sizes of free axes that any plan allows

OnProgress = Callable[[str, float], bool]  # (phase, done 0..1) -> whether to go on


@dataclass(frozen=True)
class Options:
    """What can be chosen about a build. None leaves it to TensorRT.

    level: 0 ... 5, how hard it searches. tiling: one of TILING. aux_streams: additional streams a graph may run on.
    workspace: MiB of scratch that a kernel may want. compute_capabilities: of the GPUs a TensorRT-RTX plan is for,
    such as ("8.9", "12.0"); empty: every one that it supports.
    """

    level: int | None = None
    tiling: str | None = None
    aux_streams: int | None = None
    workspace: int | None = None
    compute_capabilities: tuple[str, ...] = ()


class Backend:
    """One of the two modules. Raises EngineError when it is not installed."""

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self.module: Any = __import__(MODULES[name])
            self.version: str = self.module.__version__
        except (ImportError, AttributeError, OSError) as error:  # placeholders import, but lack everything
            raise EngineError(
                f"{name} cannot be imported ({error}). Install it: pip install "
                f'"handiffuser[{name}]"'
                + (" --extra-index-url https://pypi.nvidia.com." if name == "tensorrt" else ".")
            ) from error
        self.messages: list[str] = []
        self.report: list[str] = []  # what the builder says of the plan
        self.runtimes: list[Any] = []
        self.logger = _logger(self.module, self.messages, self.report)
        self.rtx = name == "tensorrt-rtx"

    def target(self, options: Options, cuda: Cuda | None) -> str:
        """What a plan is for: compute capabilities, or one GPU. Part of its key."""
        if self.rtx:
            return "compute capability " + (", ".join(options.compute_capabilities) or EVERYWHERE)
        if cuda is None:
            raise EngineError(
                "TensorRT builds on the GPU that will run the engine, and there is none here. Build there: copy the "
                "bundle and run `hd-engines build`; or take --backend tensorrt-rtx, which builds anywhere."
            )
        return f"{cuda.name}, compute capability {cuda.compute_capability}"

    def runs_on(self, target: str, cuda: Cuda) -> bool:
        """Whether a plan for `target` is for this GPU."""
        if not self.rtx:
            return target == self.target(Options(), cuda)
        named = target.removeprefix("compute capability ")
        if named == EVERYWHERE:
            return cuda.compute_capability in ("7.5", "8.0", "8.6", "8.9") or cuda.compute_capability.startswith("12.")
        return cuda.compute_capability in named.split(", ")

    def build(
        self,
        onnx: str | Path,
        sizes: Mapping[str, int | tuple[int, int, int]],
        precision: str,
        options: Options,
        on_progress: OnProgress | None = None,
        timing_cache: Path | None = None,
    ) -> tuple[bytes, dict[str, Any]]:
        """Builds a plan and says what is in it.

        sizes: of the free axes; one number makes them static, (least, best, most) a profile between them.
        precision: "fp32", "fp16" or "bf16", as the graph was exported; EngineError where it is another.
        timing_cache: a file of kernel timings that is read, and extended (TensorRT only; TensorRT-RTX has none).
        Returns the plan and {"types": layers that compute by type, "inputs", "outputs", "tf32": False, "layers": what
        it was compiled to, "memory": bytes}; see `inspect.py`.
        """
        trt = self.module
        self.messages.clear()
        self.report.clear()
        if precision == "bf16" and NO_BFLOAT16 in options.compute_capabilities:
            raise EngineError(
                f"GPUs of compute capability {NO_BFLOAT16} do not compute in bfloat16. Leave it out, or export again "
                "with --precision fp16."
            )
        builder = trt.Builder(self.logger)
        # TensorRT 10 wants to be told; from 11 on, and in TensorRT-RTX, every network is strongly typed.
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse_from_file(str(onnx)) or not network.num_outputs:
            raise self.failure(f"cannot read {Path(onnx).name}")
        config = builder.create_builder_config()
        self._configure(config, options)
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            self._shape(tensor, sizes, profile)
        config.add_optimization_profile(profile)
        self._allow_any_attention(network)
        proof = self._proof(network, config, precision, Path(onnx).stem)
        cache = self._read_timings(config, timing_cache)
        monitor = _monitor(trt, on_progress) if on_progress is not None else None
        if monitor is not None:
            config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if monitor is not None and monitor.stopped:
            raise KeyboardInterrupt
        if plan is None:
            raise self.failure(f"cannot build {Path(onnx).name}")
        if cache is not None and timing_cache is not None:
            _write(timing_cache, memoryview(cache.serialize()))
        return bytes(plan), {**proof, **inspect.read_log(self.report)}

    def load(self, plan: bytes, graph: str, cuda: Cuda) -> Any:
        """Loads a verified plan onto the GPU. Raises EngineError, in one sentence, where it does not run."""
        self.messages.clear()
        runtime = self.module.Runtime(self.logger)
        ask = getattr(runtime, "get_engine_validity", None)
        invalid = ask is not None and ask(plan)[0] == self.module.EngineValidity.INVALID
        engine = None if invalid else runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(
                f"The plan of {graph} does not run here ({cuda.name}, compute capability {cuda.compute_capability}, "
                f"{self.name} {self.version}): it was built by another version or for other GPUs. Build it again: "
                "hd-engines build FOLDER."
            )
        self.runtimes.append(runtime)  # must outlive its engines
        return engine

    def _configure(self, config: Any, options: Options) -> None:
        trt = self.module
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the report; it changes no kernel
        config.clear_flag(trt.BuilderFlag.TF32)
        if options.level is not None:
            config.builder_optimization_level = options.level
        if options.tiling is not None:
            config.tiling_optimization_level = getattr(trt.TilingOptimizationLevel, options.tiling.upper())
        if options.aux_streams is not None:
            config.max_aux_streams = options.aux_streams
        if options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # without it TensorRT-RTX cannot be captured
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if self.rtx and options.compute_capabilities:
            config.num_compute_capabilities = len(options.compute_capabilities)
            for i, text in enumerate(options.compute_capabilities):
                value = getattr(trt.ComputeCapability, "SM" + text.replace(".", ""), None)
                if value is None or not config.set_compute_capability(value, i):
                    known = [n[2:] for n in trt.ComputeCapability.__members__ if n.startswith("SM")]
                    raise EngineError(
                        f"TensorRT-RTX does not build for compute capability {text}. It knows "
                        f"{', '.join(f'{n[:-1]}.{n[-1]}' for n in known)}; others run in --backend onnxruntime, "
                        "inductor or tensorrt."
                    )

    def _shape(self, tensor: Any, sizes: Mapping[str, int | tuple[int, int, int]], profile: Any) -> None:
        """Makes an input static, or gives its profile."""
        names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
        chosen = [
            sizes[name] if size < 0 and name in sizes else size for name, size in zip(names, tensor.shape, strict=True)
        ]
        if any(isinstance(size, int) and size < 0 for size in chosen):
            raise EngineError(f"The input {tensor.name} has a free axis that no size was given for: {names}.")
        if all(isinstance(size, int) for size in chosen):
            tensor.shape = tuple(chosen)
            return
        ranges = [(size,) * 3 if isinstance(size, int) else size for size in chosen]
        profile.set_shape(tensor.name, *(tuple(r[i] for r in ranges) for i in range(3)))

    def _allow_any_attention(self, network: Any) -> None:
        """Lets attention without a dedicated kernel (float32, odd head sizes) be computed in parts, not refused."""
        trt = self.module
        output = getattr(trt, "IAttentionOutputLayer", None)
        for i in range(network.num_layers if output is not None else 0):
            layer = network.get_layer(i)
            if layer.type == trt.LayerType.ATTENTION_OUTPUT:
                layer.__class__ = output  # the bindings hand out the base class
                layer.attention.decomposable = True

    def _proof(self, network: Any, config: Any, precision: str, name: str) -> dict[str, Any]:
        """Counts the layers that compute by the type they compute in. EngineError for another precision than asked."""
        if config.get_flag(self.module.BuilderFlag.TF32):
            raise EngineError(
                f"{self.name} {self.version} would compute the float32 layers of {name} in TF32. Please report this."
            )
        types: Counter[str] = Counter()
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            if str(layer.type).rsplit(".", 1)[-1] in COMPUTE:
                types[str(layer.get_input(0).dtype).rsplit(".", 1)[-1]] += 1
        wanted = TYPES["fp32" if name in FLOAT32_GRAPHS else precision]
        if types and types[wanted] < SHARE * types.total():
            found = ", ".join(f"{count} in {kind}" for kind, count in types.items())
            raise EngineError(
                f"{name} was to be {precision}, but of its layers that compute {found}. Export it again with "
                f"--precision {precision}."
            )
        tensors = {
            kind: {
                (t := getattr(network, f"get_{kind[:-1]}")(i)).name: str(t.dtype).rsplit(".", 1)[-1]
                for i in range(getattr(network, f"num_{kind}"))
            }
            for kind in ("inputs", "outputs")
        }
        return {"types": dict(types), **tensors, "tf32": False}

    def _read_timings(self, config: Any, path: Path | None) -> Any:
        if path is None or self.rtx:
            return None
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
        return cache

    def failure(self, what: str) -> EngineError:
        details = next((message for message in self.messages if "rror" in message), "no reason was given")
        memory = any("out of memory" in message.lower() for message in self.messages)
        remedy = "Free some memory, or take a smaller --batch-sizes." if memory else "Please report this."
        return EngineError(f"{self.name} {self.version} {what}: {details[:400]} {remedy}")


class Scratch:
    """Device memory that contexts share which never run at once. Grows; what was captured keeps its own."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.array: DeviceArray | None = None

    def reserve(self, size: int) -> DeviceArray:
        if self.array is None or self.array.nbytes < size:
            self.array = self.cuda.zeros((max(size, 1),), "uint8")
        return self.array


class TensorRTEngine:
    """A loaded plan with a context of its own. All engines that share `scratch` must be on one stream."""

    own_graph = False

    def __init__(
        self, backend: Backend, engine: Any, spec: GraphSpec, scratch: Scratch, kernels: Path | None = None
    ) -> None:
        """engine: what `Backend.load` gave. kernels: a file in which TensorRT-RTX keeps the kernels that it compiles
        for this GPU when the engine first runs; without it every process compiles them again.
        Raises EngineError when the plan's tensors are not those of `spec`.
        """
        self.backend, self.engine, self.spec = backend, engine, spec
        # ONNX gives a name to one value only: a state that comes in and goes out is next_... on its way out.
        self.inputs = {tensor.name for tensor in spec.inputs}
        self.outputs = {t.name: f"next_{t.name}" if t.name in self.inputs else t.name for t in spec.outputs}
        found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        if found != {*self.inputs, *self.outputs.values()}:
            raise EngineError(
                f"The plan of {Path(spec.file).stem} has the tensors {', '.join(sorted(found))}, which is not what the "
                "manifest says. Build it again: hd-engines build FOLDER."
            )
        strategy = backend.module.ExecutionContextAllocationStrategy.USER_MANAGED
        self.kernels, self.compiled = kernels, None
        if backend.rtx:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            self.compiled = config.create_runtime_cache()
            if kernels is not None and kernels.exists():
                self.compiled.deserialize(kernels.read_bytes())  # refuses, and stays empty, for another GPU or version
            config.set_runtime_cache(self.compiled)
            self.context = engine.create_execution_context(config)
        else:
            self.context = engine.create_execution_context(strategy)
        if self.context is None:
            raise backend.failure(f"cannot make a context for {Path(spec.file).stem}")
        self.scratch = scratch.reserve(int(engine.device_memory_size_v2))
        self.context.set_device_memory(self.scratch.pointer, self.scratch.nbytes)

    def bind(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """Says where tensors are. Shapes are checked against the contract, and against the plan's profile."""
        check_feeds(self.spec, inputs)
        for name, array in inputs.items():
            self._check_profile(name, array)
            if not self.context.set_input_shape(name, array.shape):
                raise self.backend.failure(f"refuses {name} of shape {list(array.shape)}")
            self.context.set_tensor_address(name, array.pointer)
        for name, array in outputs.items():
            self.context.set_tensor_address(self.outputs[name], array.pointer)
        self.bound = (dict(inputs), dict(outputs))  # keeps them alive

    def enqueue(self, stream: Stream) -> None:
        """Puts one run on the stream."""
        if not self.context.execute_async_v3(int(stream.handle)):
            raise self.backend.failure(f"failed in {Path(self.spec.file).stem}")

    def keep_kernels(self) -> None:
        """Writes the kernels that were compiled so far, once; to be called after a run."""
        if self.compiled is None or self.kernels is None:
            return
        path, self.kernels = self.kernels, None
        content = bytes(self.compiled.serialize())
        try:
            if not path.exists() or path.read_bytes() != content:
                _write(path, memoryview(content))
        except OSError:
            pass  # a folder that cannot be written to costs the next process its compilation, no more

    def capturable(self, stream: Stream) -> bool:
        """Whether a run can be captured into a CUDA graph; what TensorRT does not know to ask is tried."""
        ask = getattr(self.context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(int(stream.handle)))

    def _check_profile(self, name: str, array: DeviceArray) -> None:
        least, _, most = (tuple(shape) for shape in self.engine.get_tensor_profile_shape(name, 0))
        shape = array.shape
        if all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            return
        graph = Path(self.spec.file).stem
        allowed = f"{list(least)}" if least == most else f"{list(least)} to {list(most)}"
        raise EngineError(
            f"The engine of {graph} got {name} of shape {list(shape)}; its profile allows {allowed}. Build one for it: "
            f"hd-engines build FOLDER --batch-sizes {shape[0]}."
        )


def _logger(trt: Any, messages: list[str], report: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps errors for our own message instead of printing them, and what it says of a plan."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                messages.append(message)
            elif inspect.wanted(message):
                report.append(message)

    return Logger()


def _monitor(trt: Any, on_progress: OnProgress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Turns TensorRT's nested phases into one fraction: each step of a phase shares out what its parent has."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int, int]] = {}  # name -> (parent, steps, done)
            self.stopped, self.furthest = False, 0.0

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            self.phases[name] = (parent, max(num_steps, 1), 0)

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.phases:
                parent, steps, _ = self.phases[name]
                self.phases[name] = (parent, steps, min(step + 1, steps))
            try:
                self.stopped = self.stopped or not on_progress(name, self.fraction())
            except KeyboardInterrupt:
                self.stopped = True  # an exception must not cross TensorRT's frames
            return not self.stopped

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)

        def fraction(self) -> float:
            total, share = 0.0, 1.0
            for _, steps, done in self.phases.values():  # in the order in which they were opened: outermost first
                total += share * done / steps
                share /= steps
            self.furthest = max(self.furthest, min(total, 1.0))  # phases that are opened later take nothing back
            return self.furthest

    return Monitor()


def _write(path: Path, content: memoryview) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
