"""TensorRT and TensorRT for RTX: one implementation over the two modules, which share one interface.

    backend = Backend("tensorrt-rtx")
    plan, proof = backend.build("bundle/unet.onnx", {"B": 4}, "fp16", Options())       # needs no GPU with TensorRT-RTX
    engine = TensorRTEngine(backend.load(plan, "unet", cuda), spec, Scratch(cuda))
    engine.bind({"latents": array, ...}); engine.enqueue(stream)
    backend.close()

Networks are strongly typed: a tensor has the type that the ONNX graph gives it, and nothing is lowered or raised
behind the user's back. So the precision is a property of the exported graph, and `build` proves it from the types of
the layers that compute. One thing types do not show: TF32, which TensorRT allows unless told otherwise, and in which
float32 keeps 10 of its 23 bits. It is off always: what is float32 here (kinematics, the solver, what half precision
could not hold, bundles in fp32) is so because it needs the bits.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..commands import imported
from ..contract import EIGHT_BITS, FLOAT32_GRAPHS, LARGEST, GraphSpec
from ..errors import EngineError
from ..installed import version
from . import inspect
from .base import check_feeds
from .cuda import DRIVERS, Cuda, DeviceArray, Stream
from .plans import MODULES

TILING = ("none", "fast", "moderate", "full")
# The layers that do the arithmetic, and so decide speed and precision.
COMPUTE = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "ATTENTION_INPUT", "EINSUM")
TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
TYPES |= dict.fromkeys(EIGHT_BITS, "HALF")  # what is not quantised
EIGHT_BIT_TYPES = ("FP8", "INT8")
# Of the layers that compute, at least so many must have the precision that was asked for. Not all: the solver's tail,
# the embedding of timesteps and layers that calibration keeps in float32 are not.
SHARE = 0.8
# Compute capabilities that TensorRT-RTX runs on: not 9.0 and 10.0, Hopper and B200. A plan that names none is for those
# from 8.0 on; 7.5 (Turing) must be named, and stands alone. It has no bfloat16.
TURING = "7.5"
RTX_GPUS = (TURING, "8.0", "8.6", "8.9", "12.0", "12.1")
EVERYWHERE = "8.x or 12.x"
FP8_FROM = (8, 9)  # the first compute capability that computes in fp8
FP8_TARGETS = ("8.9", "12.0")  # of TensorRT-RTX, unless GPUs are named
FREE_MAX = {"B": LARGEST, "S": 1000}  # the largest sizes of free axes that any plan allows

PATIENCE = 2.0  # seconds that an interrupted build gets to stop by itself; some of its phases take a minute

# Of free axes: one size, a range (least, best, most), or several sizes.
Sizes = Mapping[str, "int | tuple[int, int, int] | list[int]"]
OnProgress = Callable[[str, float], bool]  # (phase, done 0..1) -> whether to go on


@dataclass(frozen=True)
class Options:
    """What can be chosen about a build. None leaves it to TensorRT.

    level: 0 ... 5, how hard it searches. tiling: one of TILING. aux_streams: additional streams a graph may run on.
    workspace: MiB of scratch that a kernel may want. compute_capabilities: of the GPUs a TensorRT-RTX plan is for,
    such as ("8.9", "12.0"); empty: every one from 8.0 on that it supports.
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
            self.module: Any = imported(MODULES[name])
            self.version: str = self.module.__version__
        except (ImportError, AttributeError, OSError) as error:  # placeholders import, but lack everything
            raise EngineError(
                f"{name} cannot be imported ({error}). Install it: pip install "
                f'"handiffuser[{name}]"'
                + (" --extra-index-url https://pypi.nvidia.com." if name == "tensorrt" else ".")
            ) from error
        self.messages: list[str] = []
        self.report: list[str] = []  # what the builder says of the plan
        self.loaded: weakref.WeakSet[LoadedPlan] = weakref.WeakSet()  # weak: nothing may need a collection to be freed
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
            return self.refusal(cuda) == "" and cuda.compute_capability != TURING
        return cuda.compute_capability in named.split(", ")

    def refusal(self, cuda: Cuda) -> str:
        """Why this backend runs on no GPU of that kind, and what does; "" where it runs."""
        capability = cuda.compute_capability
        if not self.rtx or capability in RTX_GPUS or capability.startswith("12."):
            return ""
        return (
            f"TensorRT-RTX does not run on this GPU ({cuda.name}, compute capability {capability}), only on "
            f"{', '.join(RTX_GPUS)}. Take --backend tensorrt, which does "
            '(pip install "handiffuser[tensorrt]" --extra-index-url https://pypi.nvidia.com), or --backend onnxruntime.'
        )

    def for_gpu(self, options: Options, cuda: Cuda | None) -> Options:
        """Options with the GPUs that a plan which names none is for. EngineError where it would run on none of them.

        cuda: the GPU that is there; plans for other GPUs can be built beside it by naming them.
        """
        if not self.rtx:
            return options
        named = options.compute_capabilities
        if not named and cuda is not None:
            if refusal := self.refusal(cuda):
                raise EngineError(f"{refusal} For other machines, name their GPUs: --compute-capability 8.9.")
            if cuda.compute_capability == TURING:
                return replace(options, compute_capabilities=(TURING,))
        if TURING in named and len(named) > 1:
            raise EngineError(
                f"A plan for compute capability {TURING} is for no other: build twice, once with --compute-capability "
                f"{TURING}, once for {', '.join(name for name in named if name != TURING)}."
            )
        return options

    def build(
        self,
        onnx: str | Path,
        sizes: Sizes,
        precision: str,
        options: Options,
        on_progress: OnProgress | None = None,
        timing_cache: Path | None = None,
    ) -> tuple[bytes, dict[str, Any]]:
        """Builds a plan and says what is in it.

        sizes: of the free axes; one number makes them static, (least, best, most) a profile between them, and of a list
        each size gets a profile of its own: kernels as good as a static plan's, over one copy of the weights.
        precision: "fp32", "fp16", "bf16", "fp8" or "int8", as the graph was exported; EngineError where it is another.
        on_progress: called from another thread; False stops the build, as Ctrl-C does, with KeyboardInterrupt.
        timing_cache: a file of kernel timings that is read, and extended (TensorRT only; TensorRT-RTX has none).
        Returns the plan and {"types": layers that compute by type, "inputs", "outputs", "tf32": False, "layers": what
        it was compiled to, "memory": bytes}; see `inspect.py`.
        """
        # Python hands Ctrl-C to the main thread when that is in Python next. There it must not be in TensorRT's
        # callbacks, which swallow every exception, nor in a phase that calls none of them: so TensorRT gets a thread.
        monitor = _monitor(self.module, on_progress)
        result: list[Any] = []

        def work() -> None:
            try:
                result.append(self._build(onnx, sizes, precision, options, monitor, timing_cache))
            except BaseException as error:
                result.append(error)

        # A daemon, because nothing stops a phase of TensorRT's that does not ask whether it should go on.
        thread = threading.Thread(target=work, name="TensorRT", daemon=True)
        thread.start()
        try:
            _wait(thread)
        except BaseException:
            monitor.stopped = True
            _wait(thread, PATIENCE)
            raise
        if isinstance(result[0], BaseException):
            raise result[0]
        return result[0]

    def _build(
        self,
        onnx: str | Path,
        sizes: Sizes,
        precision: str,
        options: Options,
        monitor: Any,
        timing_cache: Path | None,
    ) -> tuple[bytes, dict[str, Any]]:
        trt = self.module
        self.messages.clear()
        self.report.clear()
        if precision == "bf16" and TURING in options.compute_capabilities:
            raise EngineError(
                f"GPUs of compute capability {TURING} do not compute in bfloat16. Leave it out, or export again "
                "with --precision fp16."
            )
        old = [text for text in options.compute_capabilities if tuple(map(int, text.split("."))) < FP8_FROM]
        if precision == "fp8" and old:
            raise EngineError(
                f"GPUs of compute capability {', '.join(old)} do not compute in fp8, which came with 8.9. Leave them "
                "out, or export again with --precision int8 or fp16."
            )
        builder = self._made("Builder")
        # TensorRT 10 wants to be told; from 11 on, and in TensorRT-RTX, every network is strongly typed.
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse_from_file(str(onnx)) or not network.num_outputs:
            raise self.failure(f"cannot read {Path(onnx).name}")
        config = builder.create_builder_config()
        self._configure(config, options)
        count = max((len(size) for size in sizes.values() if isinstance(size, list)), default=1)
        profiles = [builder.create_optimization_profile() for _ in range(count)]
        for i in range(network.num_inputs):
            self._shape(network.get_input(i), sizes, profiles)
        for profile in profiles:
            if config.add_optimization_profile(profile) < 0:
                raise self.failure(f"refuses the sizes {dict(sizes)} for {Path(onnx).name}")
        self._allow_any_attention(network)
        proof = self._proof(network, config, precision, Path(onnx).stem)
        quantized = proof.pop("quantized")
        cache = self._read_timings(config, timing_cache)
        config.progress_monitor = monitor
        plan = None if monitor.stopped else builder.build_serialized_network(network, config)
        if monitor.failure is not None:
            raise monitor.failure
        if monitor.stopped:
            raise KeyboardInterrupt
        if plan is None:
            raise self.failure(f"cannot build {Path(onnx).name}")
        if cache is not None and timing_cache is not None:
            _write(timing_cache, memoryview(cache.serialize()))
        proof |= inspect.read_log(self.report)
        if quantized and proof["layers"]:
            proof["eight_bits"] = prove_kernels(Path(onnx).stem, precision, quantized, proof["layers"])
        return bytes(plan), proof

    def load(self, plan: bytes, graph: str, cuda: Cuda, kernels: Path | None = None) -> LoadedPlan:
        """Loads a verified plan onto the GPU.

        kernels: a file in which TensorRT-RTX keeps the kernels that it compiles for this GPU; see `LoadedPlan`.
        Raises EngineError, in one sentence, where the plan does not run, and why.
        """
        self.messages.clear()
        runtime = self._made("Runtime")
        ask = getattr(runtime, "get_engine_validity", None)
        validity, why = (None, 0) if ask is None else ask(plan)
        invalid = ask is not None and validity == self.module.EngineValidity.INVALID
        engine = None if invalid else runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._refusal(graph, cuda, int(why))
        loaded = LoadedPlan(self, runtime, engine, graph, cuda, kernels)
        self.loaded.add(loaded)
        return loaded

    def keep_kernels(self) -> None:
        """Writes what TensorRT-RTX has compiled since; to be called after a run."""
        for plan in list(self.loaded):
            plan.keep_kernels()

    def close(self) -> None:
        """Lets go of all that was loaded, with its engines. A second call does nothing."""
        for plan in list(self.loaded):
            plan.close()
        self.loaded.clear()

    def _made(self, kind: str) -> Any:
        """The module's "Builder" or "Runtime". EngineError where the driver does not let it be."""
        try:
            return getattr(self.module, kind)(self.logger)
        except TypeError as error:  # "factory function returned nullptr" is all that the bindings say
            details = next(iter(self.messages), str(error))
            raise EngineError(
                f"{self.name} {self.version} does not start ({details[:300]}). It needs an NVIDIA GPU with "
                f"{self._driver()}: check `nvidia-smi`."
            ) from error

    def _driver(self) -> str:
        """The driver that the installed packages need, in words."""
        for cuda, words in sorted(DRIVERS.items(), reverse=True):
            if version(f"{MODULES[self.name]}_cu{cuda}"):
                return words
        return "a driver as new as its release notes say"

    def _refusal(self, graph: str, cuda: Cuda, why: int) -> EngineError:
        """Why a plan was not loaded. why: flags of EngineInvalidityDiagnostics, or 0 where only the log says it."""
        reasons = getattr(self.module, "EngineInvalidityDiagnostics", None)

        def said(name: str) -> bool:
            flag = getattr(reasons, name, None)
            return flag is not None and bool(why & int(flag))

        log = " ".join(self.messages)
        if said("INSUFFICIENT_GPU_MEMORY") or _out_of_memory(log):
            return EngineError(
                f"The plan of {graph} does not fit into the GPU's memory ({cuda.free_memory() / 1e6:.0f} MB are free). "
                "Take a smaller --batch-size, or end what else is on it."
            )
        if said("OLD_CUDA_DRIVER") or said("OLD_CUDA_RUNTIME") or "driver version is insufficient" in log:
            return EngineError(
                f"{self.name} {self.version} needs {self._driver()}: update the driver; `nvidia-smi` shows which it is."
            )
        details = f" It says: {self.messages[-1][:300]}" if self.messages else ""
        return EngineError(
            f"The plan of {graph} does not run here ({cuda.name}, compute capability {cuda.compute_capability}, "
            f"{self.name} {self.version}): it was built by another version or for other GPUs. Build it again: "
            f"hd-engines build FOLDER.{details}"
        )

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
        needed = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)  # without it TensorRT-RTX cannot be captured
        if needed is not None:
            config.set_flag(needed)
            if not config.get_flag(needed):
                raise self.failure("does not take memory of ours (REQUIRE_USER_ALLOCATION)")
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

    def _shape(self, tensor: Any, sizes: Sizes, profiles: list[Any]) -> None:
        """Makes an input static, or gives what each profile says of it."""
        names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
        chosen = [
            sizes[name] if size < 0 and name in sizes else size for name, size in zip(names, tensor.shape, strict=True)
        ]
        if any(isinstance(size, int) and size < 0 for size in chosen):
            raise EngineError(f"The input {tensor.name} has a free axis that no size was given for: {names}.")
        if all(isinstance(size, int) for size in chosen):
            tensor.shape = tuple(chosen)
            return
        for number, profile in enumerate(profiles):
            one = [size[number] if isinstance(size, list) else size for size in chosen]
            ranges = [(size,) * 3 if isinstance(size, int) else size for size in one]
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
        quantized: list[str] = []
        stored: dict[str, str] = {}  # what was dequantised -> the type that it was stored in
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            kind = str(layer.type).rsplit(".", 1)[-1]
            if kind == "DEQUANTIZE":
                stored[layer.get_output(0).name] = str(layer.get_input(0).dtype).rsplit(".", 1)[-1]
            if kind in COMPUTE:
                tensor = layer.get_input(0)
                found = stored.get(tensor.name, str(tensor.dtype).rsplit(".", 1)[-1])
                types[found] += 1
                if found in EIGHT_BIT_TYPES:
                    quantized.append(layer.name)
        wanted = TYPES["fp32" if name in FLOAT32_GRAPHS else precision]
        meant = types[wanted] + (types[precision.upper()] if precision in EIGHT_BITS else 0)
        if types and meant < SHARE * types.total():
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
        return {"types": dict(types), **tensors, "tf32": False, "quantized": quantized}

    def _read_timings(self, config: Any, path: Path | None) -> Any:
        if path is None or self.rtx:
            return None
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        if not config.set_timing_cache(cache, ignore_mismatch=False):  # of another GPU or version: begin anew
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, ignore_mismatch=False)
        return cache

    def failure(self, what: str) -> EngineError:
        details = next((message for message in self.messages if "rror" in message), "no reason was given")
        memory = any(map(_out_of_memory, self.messages))
        remedy = "Free some memory, or take a smaller --batch-sizes." if memory else "Please report this."
        return EngineError(f"{self.name} {self.version} {what}: {details[:400]} {remedy}")


def prove_kernels(name: str, precision: str, quantized: list[str], layers: list[inspect.Layer]) -> dict[str, int]:
    """Counts what was compiled to kernels that multiply eight-bit numbers, of the network's layers named `quantized`.

    A graph only says what may be computed so: where a GPU lacks a kernel, TensorRT dequantises first, without a word
    (int8 convolutions on Turing). Raises EngineError where that are more than a few.
    """
    kind = precision.upper()
    compiled: set[str] = set()
    for layer in layers:
        operands = [tensor["type"].upper() for tensor in (*layer["inputs"][:2], *layer["weights"][:1])]
        if operands.count(kind) >= 2:
            compiled.update(layer["nodes"])
    count = len(compiled.intersection(quantized))
    if count < SHARE * len(quantized):
        raise EngineError(
            f"Of the {len(quantized)} layers of {name} that are quantised to {precision}, only {count} were compiled "
            "to kernels that compute in it; the others would be dequantised first, and gain nothing. A GPU that this "
            "is for lacks such kernels: name others (--compute-capability), or export again with --precision fp16."
        )
    return {"asked": len(quantized), "compiled": count}


class Scratch:
    """Device memory that contexts share which never run at once. Grows; what was captured keeps its own."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.array: DeviceArray | None = None

    def reserve(self, size: int) -> DeviceArray:
        if self.array is None or self.array.nbytes < size:
            self.array = self.cuda.zeros((max(size, 1),), "uint8")
        return self.array


class LoadedPlan:
    """A plan on the GPU, for any number of engines: they share its weights, and the kernels that TensorRT-RTX compiles
    for this GPU when they first run. Those are kept in a file, or every process would compile them again."""

    def __init__(
        self, backend: Backend, runtime: Any, engine: Any, graph: str, cuda: Cuda, kernels: Path | None = None
    ) -> None:
        """runtime: what deserialised `engine`; it must outlive it. kernels: the file."""
        self.backend, self.runtime, self.engine, self.graph = backend, runtime, engine, graph
        self.cuda, self.kernels = cuda, kernels
        self.engines: weakref.WeakSet[TensorRTEngine] = weakref.WeakSet()
        self.config: Any = None
        self.compiled: Any = None
        self.strategy = backend.module.ExecutionContextAllocationStrategy.USER_MANAGED
        self.fresh = False  # whether something may have been compiled that is not in the file
        if backend.rtx:
            self._configure()

    def _configure(self) -> None:
        """What TensorRT-RTX wants to know before it makes contexts."""
        module = self.backend.module
        self.config = self.engine.create_runtime_config()
        self.config.set_execution_context_allocation_strategy(self.strategy)
        # Lazy, a plan for several sizes runs slow kernels until better ones are compiled: a capture would keep those.
        eager = module.DynamicShapesKernelSpecializationStrategy.EAGER
        self.config.dynamic_shapes_kernel_specialization_strategy = eager
        self.compiled = self.config.create_runtime_cache()
        try:
            content = self.kernels.read_bytes() if self.kernels is not None else b""
        except OSError:
            content = b""
        if content:
            self.compiled.deserialize(content)  # refuses, and stays empty, for another GPU or version
        if not self.config.set_runtime_cache(self.compiled):
            raise self.backend.failure(f"takes no cache of kernels for {self.graph}")

    def context(self) -> Any:
        """A context whose scratch memory is the caller's."""
        context = self.engine.create_execution_context(self.strategy if self.config is None else self.config)
        if context is None:
            raise self.backend.failure(f"cannot make a context for {self.graph}")
        self.fresh = True
        return context

    def keep_kernels(self) -> None:
        """Writes the kernels that were compiled so far, if there may be new ones; to be called after a run."""
        if self.compiled is None or self.kernels is None or not self.fresh:
            return
        self.fresh = False
        content = self.compiled.serialize()
        if content is None:
            return
        try:
            if not self.kernels.exists() or self.kernels.read_bytes() != bytes(content):
                _write(self.kernels, memoryview(bytes(content)))
        except OSError:
            pass  # a folder that cannot be written to costs the next process its compilation, no more

    def close(self) -> None:
        """Lets go of the engines, then of the plan. A second call does nothing."""
        for engine in list(self.engines):
            engine.close()
        self.engines.clear()
        self.config = self.compiled = None
        self.engine = None
        self.runtime = None


class TensorRTEngine:
    """A loaded plan with a context of its own. All engines that share `scratch` must be on one stream."""

    own_graph = False

    def __init__(self, plan: LoadedPlan, spec: GraphSpec, scratch: Scratch) -> None:
        """plan: what `Backend.load` gave. Raises EngineError when its tensors are not those of `spec`."""
        self.plan, self.backend, self.spec = plan, plan.backend, spec
        engine = plan.engine
        # ONNX gives a name to one value only: a state that comes in and goes out is next_... on its way out.
        self.inputs = {tensor.name for tensor in spec.inputs}
        self.outputs = {t.name: f"next_{t.name}" if t.name in self.inputs else t.name for t in spec.outputs}
        found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        if found != {*self.inputs, *self.outputs.values()}:
            raise EngineError(
                f"The plan of {Path(spec.file).stem} has the tensors {', '.join(sorted(found))}, which is not what the "
                "manifest says. Build it again: hd-engines build FOLDER."
            )
        self.backend.messages.clear()
        self.context = plan.context()
        self.scratch: DeviceArray | None = scratch.reserve(int(engine.device_memory_size_v2))
        self.context.set_device_memory(self.scratch.pointer, self.scratch.nbytes)
        if self.backend.messages:  # it returns nothing
            raise self.backend.failure(f"refuses scratch memory for {plan.graph}")
        self.bound: tuple[dict[str, DeviceArray], dict[str, DeviceArray]] = ({}, {})  # keeps them alive
        plan.engines.add(self)

    def bind(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """Says where tensors are. Shapes are checked against the contract, and against the plan's profile."""
        check_feeds(self.spec, inputs)
        self.backend.messages.clear()
        self._choose_profile(inputs)
        for name, array in inputs.items():
            if not self.context.set_input_shape(name, array.shape):
                raise self.backend.failure(f"refuses {name} of shape {list(array.shape)}")
            self._place(name, array)
        for name, array in outputs.items():
            self._place(self.outputs[name], array)
        self.bound = (dict(inputs), dict(outputs))

    def enqueue(self, stream: Stream) -> None:
        """Puts one run on the stream."""
        if not self.context.execute_async_v3(int(stream.handle)):
            raise self.backend.failure(f"failed in {Path(self.spec.file).stem}")

    def capturable(self, stream: Stream) -> bool:
        """Whether a run can be captured into a CUDA graph; what TensorRT does not know to ask is tried."""
        ask = getattr(self.context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(int(stream.handle)))

    def close(self) -> None:
        """Lets go of the context and of the arrays. A second call does nothing."""
        self.context, self.scratch, self.bound = None, None, ({}, {})

    def _place(self, name: str, array: DeviceArray) -> None:
        if not self.context.set_tensor_address(name, array.pointer):
            raise self.backend.failure(f"refuses the memory of {name} ({self.plan.graph})")

    def _choose_profile(self, inputs: Mapping[str, DeviceArray]) -> None:
        """Has the context use the plan's profile for these shapes. EngineError when there is none."""
        count = int(self.plan.engine.num_optimization_profiles)
        misfit: tuple[str, DeviceArray] | None = None
        seen: list[str] = []
        for number in range(count):
            found = None
            for name, array in inputs.items():
                least, most = self._limits(name, number)
                if not _within(array.shape, least, most):
                    found = (name, array)
                    misfit = misfit or found
                    if misfit[0] == name:
                        seen.append(f"{list(least)}" if least == most else f"{list(least)} to {list(most)}")
                    break
            if found is None:
                if count > 1:
                    cuda = self.plan.cuda
                    if not self.context.set_optimization_profile_async(number, 0):
                        raise self.backend.failure(f"refuses profile {number} of {self.plan.graph}")
                    cuda.call("cudaStreamSynchronize", 0)  # our streams do not wait for the default one
                return
        assert misfit is not None
        name, array = misfit
        raise EngineError(
            f"The engine of {Path(self.spec.file).stem} got {name} of shape {list(array.shape)}; its profile allows "
            f"{' or '.join(seen)}. Build one for it: hd-engines build FOLDER --batch-sizes {array.shape[0]}."
        )

    def _limits(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Least and largest shape of an input."""
        shape = tuple(self.plan.engine.get_tensor_shape(name))
        if all(size >= 0 for size in shape):  # of an input without free axes the profile need not say anything
            return shape, shape
        least, _, most = (tuple(limit) for limit in self.plan.engine.get_tensor_profile_shape(name, profile))
        return least, most


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


def _monitor(trt: Any, on_progress: OnProgress | None) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Turns TensorRT's nested phases into one fraction: each step of a phase shares out what its parent has.

        stopped: set by whoever wants the build to stop. failure: what `on_progress` raised.
        """

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int, int]] = {}  # name -> (parent, steps, done)
            self.stopped, self.furthest = False, 0.0
            self.failure: BaseException | None = None

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            self.phases[name] = (parent, max(num_steps, 1), 0)

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.phases:
                parent, steps, _ = self.phases[name]
                self.phases[name] = (parent, steps, min(step + 1, steps))
            try:
                if not self.stopped and on_progress is not None:
                    self.stopped = not on_progress(name, self.fraction())
            except BaseException as error:  # an exception must not cross TensorRT's frames
                self.stopped, self.failure = True, error
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


def _within(shape: tuple[int, ...], least: tuple[int, ...], most: tuple[int, ...]) -> bool:
    return len(shape) == len(least) and all(
        low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
    )


def _wait(thread: threading.Thread, seconds: float = float("inf")) -> None:
    """Until a thread has ended, or for so many seconds. Ctrl-C is heard meanwhile."""
    end = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < end:
        thread.join(0.1)


def _out_of_memory(message: str) -> bool:
    text = message.lower().replace(" ", "")
    return any(sign in text for sign in ("outofmemory", "memoryallocation", "insufficientmemory"))


def _write(path: Path, content: memoryview) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
