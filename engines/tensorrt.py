"""TensorRT, its lean run time and TensorRT for RTX: one implementation, as their modules share one interface.

    backend = TensorRT("tensorrt-rtx")
    engine = TensorRTEngine(backend.load(plan, "unet", cuda), spec, Scratch(cuda))
    engine.bind({"latents": array, ...}); engine.enqueue(stream)
    backend.close()

`tensorrt_build.py` builds plans, `tensorrt_loading.py` finds those of a folder that run here.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..commands import imported
from ..contract import GraphSpec
from ..errors import EngineError
from ..files import written
from ..installed import version
from . import inspect
from .backends import BACKENDS
from .base import check_feeds
from .cuda import DRIVERS, Cuda, DeviceArray, Stream
from .plans import Plan

NAMES = ("tensorrt", "tensorrt-rtx")  # those that build
TILING = ("none", "fast", "moderate", "full")
# Compute capabilities that TensorRT-RTX runs on: not 9.0 and 10.0, Hopper and B200. A plan that names none is for those
# from 8.0 on; 7.5 (Turing), which has no bfloat16, must be named and needs a plan of its own.
TURING = "7.5"
RTX_GPUS = (TURING, "8.0", "8.6", "8.9", "12.0", "12.1")
EVERYWHERE = "8.x or 12.x"
# GPUs that a plan of full TensorRT may serve beside the one that builds it: TensorRT's HardwareCompatibilityLevel.
HARDWARE = ("same-compute-capability", "ampere-plus")
AMPERE_PLUS = "compute capability 8.0 and later"
# Of two different major versions, NVIDIA's support matrix has this pair: what builds a version-compatible plan, and
# what runs it.
MAJORS = (10, 11)


@dataclass(frozen=True)
class Options:
    """What can be chosen about a build. None leaves it to TensorRT.

    level: 0 ... 5, how hard it searches. tiling: one of TILING. aux_streams: additional streams a graph may run on.
    workspace: MiB of scratch that a kernel may want. compute_capabilities: of the GPUs a TensorRT-RTX plan is for,
    such as ("8.9", "12.0"); empty: every one from 8.0 on that it supports. hardware: one of HARDWARE, of full TensorRT;
    None: for the GPU that builds. version_compatible: later versions and the lean run time load it, too. eight_bits:
    one of `eight_bits.CHOICES`, which quantised layers stay so; None: all. refittable: a refit may put adapters into
    the plan. stripped: the plan lacks the bundle's weights. See `refit.py` for both.
    """

    level: int | None = None
    tiling: str | None = None
    aux_streams: int | None = None
    workspace: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    hardware: str | None = None
    version_compatible: bool | None = None
    eight_bits: str | None = None
    refittable: bool | None = None
    stripped: bool | None = None


class TensorRT:
    """One of the three modules. Raises EngineError when it is not installed."""

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self.module: Any = imported(BACKENDS[name].package)
            self.version: str = self.module.__version__
        except (ImportError, AttributeError, OSError) as error:  # placeholders import, but lack everything
            raise EngineError(f"{name} cannot be imported ({error}). Install it: {BACKENDS[name].install}.") from error
        self.messages: list[str] = []
        self.report: list[str] = []  # what the builder says of the plan
        self.loaded: weakref.WeakSet[LoadedPlan] = (
            weakref.WeakSet()
        )  # weak: engines are freed without a garbage collection
        self.logger = _logger(self.module, self.messages, self.report)
        self.rtx = name == "tensorrt-rtx"

    @property
    def builder(self) -> str:
        """The backend that builds what this one runs."""
        return BACKENDS[self.name].plans_of or self.name

    def target(self, options: Options, cuda: Cuda | None) -> str:
        """What a plan is for: compute capabilities, or one GPU. Part of its key."""
        if self.rtx:
            return "compute capability " + (", ".join(options.compute_capabilities) or EVERYWHERE)
        if cuda is None:
            raise EngineError(
                "TensorRT builds on the GPU that will run the engine, and this machine has no usable GPU. Copy the "
                "bundle there and run `hd-engines build`, or take --backend tensorrt-rtx, which builds anywhere."
            )
        if options.hardware == "ampere-plus":
            if not fits(AMPERE_PLUS, cuda):
                raise EngineError(
                    "--hardware-compatibility-level ampere-plus must be built on a GPU of compute capability 8.0 or "
                    f"later, got {cuda.compute_capability} ({cuda.name}). Take same-compute-capability."
                )
            return AMPERE_PLUS
        here = f"compute capability {cuda.compute_capability}"
        return here if options.hardware else f"{cuda.name}, {here}"

    def takes(self, plan: Plan, cuda: Cuda) -> bool:
        """Whether this version of this backend runs a plan on this GPU."""
        return (
            plan.parts["backend"] == self.builder
            and (plan.version_compatible or self.builder == self.name)
            and loads(plan, self.version)
            and self.runs_on(plan.parts["target"], cuda)
        )

    def how_to_build(self, folder: Path, more: str = "") -> str:
        """The command that builds plans for this machine, and where to run it. more: options."""
        command = f"hd-engines build {folder} --backend {self.builder}{more}"
        if self.builder == self.name:
            return command
        return f"{command} --version-compatible, on a machine with {self.builder} and the same GPU"

    def runs_on(self, target: str, cuda: Cuda) -> bool:
        """Whether a plan for `target` is for this GPU."""
        if not self.rtx:
            return fits(target, cuda)
        named = target.removeprefix("compute capability ")
        if named == EVERYWHERE:
            return self.refusal(cuda) == "" and cuda.compute_capability != TURING
        return cuda.compute_capability in named.split(", ")

    def refusal(self, cuda: Cuda) -> str:
        """Why this backend does not run on such a GPU, and what does; "" where it runs."""
        capability = cuda.compute_capability
        if not self.rtx or capability in RTX_GPUS or capability.startswith("12."):
            return ""
        return (
            f"TensorRT-RTX does not run on this GPU ({cuda.name}, compute capability {capability}), only on "
            f"{', '.join(RTX_GPUS)}. Take --backend tensorrt, which does "
            '(pip install "handiffuser[tensorrt]" --extra-index-url https://pypi.nvidia.com), or --backend onnxruntime.'
        )

    def for_gpu(self, options: Options, cuda: Cuda | None) -> Options:
        """Options that name the GPUs of a plan where the user names none.

        cuda: this machine's GPU, or None. Raises EngineError where the plan would not run on it, or for GPUs that need
        two plans.
        """
        if not self.rtx:
            return options
        if options.hardware or options.version_compatible:
            raise EngineError(
                "--hardware-compatibility-level and --version-compatible are options of full TensorRT (--backend "
                "tensorrt). Leave them out: --compute-capability says which GPUs a plan of TensorRT-RTX serves, and "
                "one version of TensorRT-RTX runs it."
            )
        named = options.compute_capabilities
        if not named and cuda is not None:
            if refusal := self.refusal(cuda):
                raise EngineError(f"{refusal} For other machines, name their GPUs: --compute-capability 8.9.")
            if cuda.compute_capability == TURING:
                return replace(options, compute_capabilities=(TURING,))
        if TURING in named and len(named) > 1:
            raise EngineError(
                f"A plan for compute capability {TURING} serves no other GPU: build twice, once with "
                f"--compute-capability {TURING}, once for {', '.join(name for name in named if name != TURING)}."
            )
        return options

    def load(
        self, plan: bytes | memoryview, graph: str, cuda: Cuda, kernels: Path | None = None, host_code: bool = False
    ) -> LoadedPlan:
        """Loads a verified plan onto the GPU.

        kernels: a file in which TensorRT-RTX keeps the kernels that it compiles for this GPU; see `LoadedPlan`.
        host_code: whether the plan may run code of its own on the CPU. A version-compatible one carries the lean run
        time of the version that built it. Raises EngineError, in one sentence, where the plan does not run, and why.
        """
        self.messages.clear()
        if cuda.call("cudaDriverGetVersion") // 1000 < self._cuda():  # the lean run time would crash
            raise self._old_driver()
        runtime = self.made("Runtime")
        if host_code:
            runtime.engine_host_code_allowed = True
        ask = getattr(runtime, "get_engine_validity", None)
        validity, why = (None, 0) if ask is None else ask(plan)
        invalid = ask is not None and validity == self.module.EngineValidity.INVALID
        engine = None if invalid else runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._refusal(graph, cuda, int(why))
        loaded = LoadedPlan(self, runtime, engine, graph, cuda, kernels)
        self.loaded.add(loaded)
        return loaded

    def layers(self, plan: bytes) -> list[inspect.Layer]:
        """The layers of a plan for this machine's GPU, by TensorRT's inspector; none where it does not load."""
        self.messages.clear()
        runtime = self.made("Runtime")
        runtime.engine_host_code_allowed = True  # it was built here, right now
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            return []
        text = engine.create_engine_inspector().get_engine_information(self.module.LayerInformationFormat.JSON)
        return inspect.read_report(text)

    def keep_kernels(self) -> None:
        """Writes the kernels that TensorRT-RTX compiled in a run. The loop calls it after each run."""
        for plan in list(self.loaded):
            plan.keep_kernels()

    def close(self) -> None:
        """Frees every loaded plan with its engines. A second call does nothing."""
        for plan in list(self.loaded):
            plan.close()
        self.loaded.clear()

    def made(self, kind: str) -> Any:
        """The module's "Builder" or "Runtime". Raises EngineError where the driver refuses it."""
        try:
            return getattr(self.module, kind)(self.logger)
        except TypeError as error:  # "factory function returned nullptr" is all that the bindings say
            details = next(iter(self.messages), str(error))
            raise EngineError(
                f"{self.name} {self.version} does not start ({details[:300]}). It needs an NVIDIA GPU with "
                f"{self._driver()}: check `nvidia-smi`."
            ) from error

    def _cuda(self) -> int:
        """CUDA's major version that the installed packages need; 0 where they do not say."""
        return max((n for n in DRIVERS if version(f"{BACKENDS[self.name].package}_cu{n}")), default=0)

    def _driver(self) -> str:
        """The driver that the installed packages need, in words."""
        return DRIVERS.get(self._cuda(), "a driver as new as its release notes say")

    def _old_driver(self) -> EngineError:
        return EngineError(
            f"{self.name} {self.version} needs {self._driver()}: update the driver; `nvidia-smi` shows which it is."
        )

    def _refusal(self, graph: str, cuda: Cuda, why: int) -> EngineError:
        """Why a plan does not load. why: flags of EngineInvalidityDiagnostics, or 0 where only the log says why."""
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
            return self._old_driver()
        details = f" It says: {self.messages[-1][:300]}" if self.messages else ""
        return EngineError(
            f"The plan of {graph} does not run here ({cuda.name}, compute capability {cuda.compute_capability}, "
            f"{self.name} {self.version}): it was built by another version or for other GPUs, or on another "
            f"operating system. Build it again: {self.how_to_build(Path('FOLDER'))}.{details}"
        )

    def failure(self, what: str) -> EngineError:
        details = next((message for message in self.messages if "rror" in message), "no reason was given")
        memory = any(map(_out_of_memory, self.messages))
        remedy = "Free some memory, or take a smaller --batch-sizes." if memory else "Please report this."
        return EngineError(f"{self.name} {self.version} {what}: {details[:400]} {remedy}")


class Scratch:
    """Device memory shared by contexts that never run at once. It grows; a captured graph keeps what it was given."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.array: DeviceArray | None = None

    def reserve(self, size: int) -> DeviceArray:
        if self.array is None or self.array.nbytes < size:
            self.array = self.cuda.zeros((max(size, 1),), "uint8")
        return self.array


class LoadedPlan:
    """A plan on the GPU, for any number of engines. They share its weights, and the kernels that TensorRT-RTX compiles
    for this GPU when they first run. A file keeps these kernels, or every process would compile them again."""

    def __init__(
        self, backend: TensorRT, runtime: Any, engine: Any, graph: str, cuda: Cuda, kernels: Path | None = None
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
        """Settings that TensorRT-RTX needs before it makes contexts."""
        module = self.backend.module
        self.config = self.engine.create_runtime_config()
        self.config.set_execution_context_allocation_strategy(self.strategy)
        # A lazy plan for several sizes runs slow kernels until better ones are compiled. A capture would keep them.
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
        """Writes the kernels that were compiled so far, if there may be new ones."""
        if self.compiled is None or self.kernels is None or not self.fresh:
            return
        self.fresh = False
        content = self.compiled.serialize()
        if content is None:
            return
        try:
            if not self.kernels.exists() or self.kernels.read_bytes() != bytes(content):
                with written(self.kernels) as temporary:
                    temporary.write_bytes(bytes(content))
        except OSError:
            pass  # in a read-only folder the next process compiles them again

    def close(self) -> None:
        """Frees the engines, then the plan. A second call does nothing."""
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
        """plan: what `TensorRT.load` gave. Raises EngineError when its tensors are not those of `spec`."""
        self.plan, self.backend, self.spec = plan, plan.backend, spec
        engine = plan.engine
        # ONNX gives a name to one value only: a state that comes in and goes out is next_... on its way out.
        self.inputs = {tensor.name for tensor in spec.inputs}
        self.outputs = {t.name: f"next_{t.name}" if t.name in self.inputs else t.name for t in spec.outputs}
        found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        if found != {*self.inputs, *self.outputs.values()}:
            raise EngineError(
                f"The plan of {Path(spec.file).stem} has the tensors {', '.join(sorted(found))}, and the manifest has "
                "others. Build it again: hd-engines build FOLDER."
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
        """Whether a run can be captured into a CUDA graph. Versions without the question are tried."""
        ask = getattr(self.context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(int(stream.handle)))

    def close(self) -> None:
        """Frees the context and the arrays. A second call does nothing."""
        self.context, self.scratch, self.bound = None, None, ({}, {})

    def _place(self, name: str, array: DeviceArray) -> None:
        if not self.context.set_tensor_address(name, array.pointer):
            raise self.backend.failure(f"refuses the memory of {name} ({self.plan.graph})")

    def _choose_profile(self, inputs: Mapping[str, DeviceArray]) -> None:
        """Sets the plan's profile for these shapes. Raises EngineError where the plan has no such profile."""
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
        if all(size >= 0 for size in shape):  # a profile says nothing of an input without free axes
            return shape, shape
        least, _, most = (tuple(limit) for limit in self.plan.engine.get_tensor_profile_shape(name, profile))
        return least, most


def fits(target: str, cuda: Cuda) -> bool:
    """Whether a plan of full TensorRT for this target is for this GPU."""
    here = f"compute capability {cuda.compute_capability}"
    ampere = int(cuda.compute_capability.split(".")[0]) >= 8
    return target in (f"{cuda.name}, {here}", here) or (target == AMPERE_PLUS and ampere)


def loads(plan: Plan, version: str) -> bool:
    """Whether this version of a plan's backend loads it: the one that built it, or a later one where it allows that.

    Of other major versions only that in MAJORS is later (TensorRT's support matrix, "Engine Portability").
    """
    old, new = (tuple(map(int, re.findall(r"\d+", text))) for text in (plan.parts["version"], version))
    if not plan.version_compatible or not old or not new:
        return plan.parts["version"] == version
    return old <= new and (old[0] == new[0] or (old[0], new[0]) == MAJORS)


def _logger(trt: Any, messages: list[str], report: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps errors for our own message instead of printing them, and the report about a plan."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                messages.append(message)
            elif inspect.wanted(message):
                report.append(message)

    return Logger()


def _within(shape: tuple[int, ...], least: tuple[int, ...], most: tuple[int, ...]) -> bool:
    return len(shape) == len(least) and all(
        low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
    )


def _out_of_memory(message: str) -> bool:
    text = message.lower().replace(" ", "")
    return any(sign in text for sign in ("outofmemory", "memoryallocation", "insufficientmemory"))
