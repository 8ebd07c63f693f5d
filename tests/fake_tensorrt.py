"""TensorRT-RTX without a GPU: the installed module, whose plans are computed by ONNX Runtime on the fake GPU's memory.

    gpu = FakeRuntime().install(monkeypatch)
    trt = FakeTensorRT(gpu).install(monkeypatch)      # what `hd-engines build` and `hd-run` take for TensorRT-RTX
    FakeTensorRT(gpu, rtx=False).install(monkeypatch)       # and for TensorRT: the same without what RTX alone has
    FakeTensorRT(gpu, lean=True, version="11.4.0").install(monkeypatch)     # and for its lean run time: no builder

What builds is the real thing up to the last call: builder, parser, network, configuration and profiles are NVIDIA's,
and only `build_serialized_network` gives, instead of a plan, a few lines of JSON: the ONNX file, and its shapes.
What runs plans is made here. Its classes can do nothing that the real ones cannot: each name and each parameter is
compared with the installed module when a class is made, and what is not here raises.

An engine declares what a real one touches: it reads its inputs, writes its outputs and its scratch memory (which it
leaves as garbage), all at the addresses that were set when it was enqueued. It wants to run once before it is captured,
as kernels are loaded then. A captured engine must live as long as the graph.

A refit changes initializers of the file, by name. As in the real one it takes only weights that were marked when the
plan was built, in their type and number, and reads them when it refits. A stripped plan does not run before it has all.

Faults: `refuse` = n lets the n-th call that can fail do so, as TensorRT does: None or False, and a line in the log.
"""

from __future__ import annotations

import base64
import ctypes
import functools
import inspect
import json
import re
import sys
import weakref
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import tensorrt_rtx as real
from fake_runtime import GARBAGE, OK, CallError, FakeRuntime, Op
from handiffuser.contract import CONTEXT, SIDES
from onnx import helper

SCRATCH = 1024  # bytes of scratch memory for each row
WEIGHTS = 4096  # bytes that a plan takes on the device


def parameters(function) -> list[set[str]]:
    """The parameter names of each overload of a function of the real module, as its docstring says them."""
    heads = re.findall(r"^(?:\d+\. )?\w+\((self: .*?)\) -> ", function.__doc__, re.M)
    return [set(re.findall(r"(\w+): ", re.sub("<[^>]*>", "", head))) - {"self"} for head in heads]


class Strict:
    """Has no public name that `real` lacks, and no other parameters."""

    real: type
    lacks: frozenset[str] = frozenset()  # names that only TensorRT-RTX has, in a class of TensorRT's

    def __init_subclass__(cls) -> None:
        cls.real = getattr(real, cls.__name__)
        for name, value in vars(cls).items():
            if name.startswith("_") or name in ("real", "lacks"):
                continue
            theirs = inspect.getattr_static(cls.real, name, None)
            assert theirs is not None, f"{cls.__name__} has no {name}"
            assert isinstance(value, property) == isinstance(theirs, property), name
            if callable(value):
                ours = set(inspect.signature(value).parameters) - {"self"}
                assert any(ours == names for names in parameters(theirs)), (cls.__name__, name, parameters(theirs))

    def __getattribute__(self, name: str):
        if name in type(self).lacks:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return object.__getattribute__(self, name)

    def __getattr__(self, name: str):
        if hasattr(type(self).real, name) and name not in type(self).lacks:
            raise NotImplementedError(f"The fake {type(self).__name__} has no {name} yet; write it.")
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def __setattr__(self, name: str, value) -> None:
        if not name.startswith("_") and not hasattr(type(self).real, name):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        object.__setattr__(self, name, value)


def may_fail(answer):
    """A call that answers with `answer` when it is told to."""

    def decorate(function):
        @functools.wraps(function)
        def wrapper(self, *arguments):
            fake = self._fake
            fake.number += 1
            if fake.number == fake.refuse or fake.refuse == function.__name__:
                self._log(f"Error Code 9: {function.__name__} was told to fail")
                return answer
            return function(self, *arguments)

        return wrapper

    return decorate


class Runtime(Strict):
    def __init__(self, fake, logger) -> None:
        self._fake, self._logger = fake, logger
        self.engine_host_code_allowed = False

    def _log(self, message: str) -> None:
        self._logger.log(real.ILogger.ERROR, message)

    def get_engine_validity(self, buffer):
        known = bytes(buffer).startswith(b'{"onnx"')
        diagnostics = real.EngineInvalidityDiagnostics
        return (real.EngineValidity.VALID, 0) if known else (real.EngineValidity.INVALID, diagnostics.MALFORMED_ENGINE)

    @may_fail(None)
    def deserialize_cuda_engine(self, serialized_engine):
        engine = self._fake.engine(self, json.loads(bytes(serialized_engine)))
        return engine if engine._weights is not None else None


class ICudaEngine(Strict):
    def __init__(self, runtime: Runtime, plan: dict) -> None:
        self._fake, self._runtime, self._log = runtime._fake, runtime, runtime._log
        self._plan = plan
        self._values = {name: base64.b64decode(text) for name, text in plan["weights"].items()}  # by a refit
        self._stripped = set(plan["stripped"])
        self._session({name: profiles[0][2] for name, profiles in plan["inputs"].items()})
        gpu = self._fake.gpu
        error, self._weights = gpu.cudaMalloc(WEIGHTS)
        if error != OK:
            self._log(f"Error Code 1: Cuda Runtime (In deserialize: {error.name})")
            if error == gpu.cudaError_t.cudaErrorMemoryAllocation:
                self._log("Error Code 2: OutOfMemory (Requested size was 4096 bytes.)")
        else:
            weakref.finalize(self, gpu.cudaFree, self._weights)
            gpu.put(self._weights)

    def _session(self, shapes):
        return self._fake.session(self._plan["onnx"], shapes, self._values)

    @property
    def refittable(self):
        return bool(self._plan["refit"])

    @may_fail(None)
    def serialize(self):
        weights = {name: base64.b64encode(value).decode() for name, value in self._values.items()}
        # One that was stripped is not refittable any more: that takes SerializationFlag.INCLUDE_REFIT.
        refit = {} if self._plan["stripped"] else self._plan["refit"]
        plan = self._plan | {"weights": weights, "stripped": sorted(self._stripped), "refit": refit}
        return memoryview(json.dumps(plan).encode())

    @property
    def num_io_tensors(self):
        return len(self._plan["inputs"]) + len(self._plan["outputs"])

    @property
    def device_memory_size_v2(self):
        return SCRATCH * self._plan["rows"]

    def get_tensor_name(self, index):
        return [*self._plan["inputs"], *self._plan["outputs"]][index]

    def get_tensor_shape(self, name):
        if name in self._plan["outputs"]:
            return tuple(self._plan["outputs"][name])
        shapes = [shape for profile in self._plan["inputs"][name] for shape in profile]
        return tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True))

    @property
    def num_optimization_profiles(self):
        return len(next(iter(self._plan["inputs"].values())))

    def get_tensor_profile_shape(self, name, profile_index):
        return [tuple(shape) for shape in self._plan["inputs"][name][profile_index]]

    def create_runtime_config(self):
        return IRuntimeConfig(self)

    @may_fail(None)
    def create_execution_context(self, runtime_config):
        assert isinstance(runtime_config, IRuntimeConfig)
        return IExecutionContext(self, runtime_config)


class Refitter(Strict):
    def __init__(self, fake, engine: ICudaEngine, logger) -> None:
        self._fake, self._engine, self._set = fake, engine, {}
        self._log = lambda message: logger.log(real.ILogger.ERROR, message)
        if not engine.refittable:
            self._log("Error Code 3: API Usage Error (Parameter check failed, condition: e.isRefittable())")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def get_all_weights(self):
        return [*self._engine._plan["refit"]]

    def get_missing_weights(self):
        joined = {other for name in self._set for other in self._fake.joined.get(name, ())}
        return sorted((self._engine._stripped | joined) - set(self._set))

    def get_weights_prototype(self, weights_name):
        kind, count = self._engine._plan["refit"].get(weights_name, ["FLOAT", -1])
        return real.Weights(getattr(real.DataType, kind), 0, count)

    @may_fail(False)
    def set_named_weights(self, name, weights):
        kind, count = self._engine._plan["refit"].get(name, [None, None])
        if kind is None or weights.size != count or weights.dtype.name != kind:
            self._log(f"Error Code 3: {name} of {weights.size} {weights.dtype.name} is not {count} {kind}")
            return False
        self._set[name] = weights
        return True

    @may_fail(False)
    def refit_cuda_engine(self):
        if missing := self.get_missing_weights():
            self._log(f"Error Code 4: missing weights {missing}")
            return False
        for name, weights in self._set.items():  # now, as no copy was made
            self._engine._values[name] = ctypes.string_at(weights.numpy().ctypes.data, weights.nbytes)
            self._engine._stripped.discard(name)
        return True


class IRuntimeCache(Strict):
    def __init__(self, config) -> None:
        self._fake, self._log = config._fake, config._log
        self._content = b"kernels"

    def serialize(self):
        return memoryview(self._content)

    def deserialize(self, blob):
        return bytes(blob) == self._content


class IRuntimeConfig(Strict):
    def __init__(self, engine: ICudaEngine) -> None:
        self._fake, self._log = engine._fake, engine._log
        self._strategy = real.ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = real.DynamicShapesKernelSpecializationStrategy.LAZY

    def create_runtime_cache(self):
        return IRuntimeCache(self)

    @may_fail(False)
    def set_runtime_cache(self, cache):
        return isinstance(cache, IRuntimeCache)

    def set_execution_context_allocation_strategy(self, strategy):
        assert isinstance(strategy, real.ExecutionContextAllocationStrategy)
        self._strategy = strategy


class IExecutionContext(Strict):
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        self._fake, self._engine, self._log, self._config = engine._fake, engine, engine._log, config
        self._memory, self._shapes, self._addresses, self._ran, self._profile = (0, 0), {}, {}, False, 0
        self._output_shapes: dict[tuple, dict[str, tuple[int, ...]]] = {}

    @may_fail(False)
    def set_optimization_profile_async(self, profile_index, stream_handle):
        if self._fake.gpu.capturing is not None or not 0 <= profile_index < self._engine.num_optimization_profiles:
            self._log(f"Error Code 3: profile {profile_index} cannot be chosen")
            return False
        self._profile, self._shapes = profile_index, {}
        self._fake.gpu.enqueue(stream_handle, Op("a change of profile", [], [], lambda: None))
        return True

    def set_device_memory(self, memory, size):
        self._fake.number += 1
        if self._fake.number == self._fake.refuse or self._fake.refuse == "set_device_memory":
            return self._log("Error Code 9: set_device_memory was told to fail")
        if memory % 256 or size < self._engine.device_memory_size_v2:
            return self._log(f"Error Code 3: device memory of {size} bytes at {memory:#x} is too small or not aligned")
        self._memory = (memory, size)

    @may_fail(False)
    def set_input_shape(self, name, shape):
        if name not in self._engine._plan["inputs"]:
            self._log(f"Error Code 3: no input {name}")
            return False
        least, _, most = self._engine._plan["inputs"][name][self._profile]
        fits = len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        if fits:
            self._shapes[name] = tuple(shape)
        else:
            self._log(f"Error Code 3: {name} of shape {shape} is outside of the profile")
        return fits

    @may_fail(False)
    def set_tensor_address(self, name, memory):
        plan = self._engine._plan
        if name not in plan["inputs"] and name not in plan["outputs"]:
            self._log(f"Error Code 3: no tensor {name}")
            return False
        self._addresses[name] = int(memory)
        return True

    def is_stream_capturable(self, stream):
        return True

    def _tried(self, session, inputs):
        """The shapes of outputs that ONNX Runtime does not infer from the inputs' shapes: it computes some once."""
        key = tuple(shape for _, _, shape in inputs.values())
        if key not in self._output_shapes:
            zeros = {name: np.zeros(shape, dtype) for name, (_, dtype, shape) in inputs.items()}
            names = [t.name for t in session.get_outputs()]
            made = session.run(names, zeros)
            self._output_shapes[key] = {name: one.shape for name, one in zip(names, made, strict=True)}
        return self._output_shapes[key]

    @may_fail(False)
    def execute_async_v3(self, stream_handle):
        gpu, plan = self._fake.gpu, self._engine._plan
        if self._engine._stripped:
            self._log("Error Code 4: the engine's weights were stripped; refit it first")
            return False
        missing = {*plan["inputs"], *plan["outputs"]} - set(self._addresses)
        if missing or set(self._shapes) != set(plan["inputs"]) or not self._memory[0]:
            self._log(f"Error Code 3: not bound: {missing or 'shapes or scratch memory'}")
            return False
        if gpu.capturing is not None and not self._ran:
            self._log("Error Code 1: kernels cannot be loaded during a capture; run once before")
            return False
        session = self._engine._session(self._shapes)
        inputs = {
            t.name: (self._addresses[t.name], np.dtype(DTYPES[t.type]), self._shapes[t.name])
            for t in session.get_inputs()
        }
        sizes = {}
        for t in session.get_inputs():
            sizes |= zip(t.shape, self._shapes[t.name], strict=True)
        outputs = {
            t.name: (self._addresses[t.name], np.dtype(DTYPES[t.type]), tuple(sizes.get(s, s) for s in t.shape))
            for t in session.get_outputs()
        }
        if any(isinstance(size, str) for _, _, shape in outputs.values() for size in shape):
            shapes = self._tried(session, inputs)
            outputs = {name: (*there[:2], shapes[name]) for name, there in outputs.items()}
        ranges = [
            [(address, int(np.prod(shape)) * dtype.itemsize) for address, dtype, shape in tensors.values()]
            for tensors in (inputs, outputs)
        ]
        scratch, spoil, name = self._memory, self._fake.spoil, self._engine._plan["name"]

        def view(tensor):
            address, dtype, shape = tensor
            return gpu.view(address, int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)

        def work() -> None:
            feeds = {key: view(tensor).copy() for key, tensor in inputs.items()}
            gpu.view(*scratch)[:] = GARBAGE
            results = dict(zip(outputs, session.run(list(outputs), feeds), strict=True))
            if name in spoil:
                spoil[name](feeds, results)
            for key, value in results.items():
                view(outputs[key])[...] = value

        seconds = self._fake.seconds(name, next(iter(self._shapes.values()))[0])
        weights = (self._engine._weights, WEIGHTS)
        op = Op(f"the engine of {name}", [*ranges[0], weights], [*ranges[1], scratch], work, seconds)
        op.owner = weakref.ref(self)
        try:
            gpu.enqueue(stream_handle, op)
        except CallError as refused:
            self._log(f"Error Code 1: Cuda Runtime ({refused})")
            return False
        if gpu.broken is not None:
            self._log(f"Error Code 1: Cuda Runtime ({gpu.broken.name})")
            return False
        self._ran = True
        self._fake.runs[name] = self._fake.runs.get(name, 0) + 1
        return True


DTYPES = {
    "tensor(float)": "float32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(float16)": "float16",
}


FILES: dict[int, str] = {}  # id of a network -> what was parsed into it


class Full:
    """Where TensorRT's interface differs from TensorRT-RTX's: fewer names, and contexts made by a strategy alone."""

    class Runtime(Runtime):
        lacks = frozenset({"get_engine_validity"})

        def deserialize_cuda_engine(self, serialized_engine):
            plan, module = json.loads(bytes(serialized_engine)), self._fake.module
            if plan["version_compatible"] and not self.engine_host_code_allowed:
                return self._log("Error Code 6: API Usage Error (the engine contains host code, which is not allowed)")
            if not plan["version_compatible"] and not hasattr(module, "Builder"):
                return self._log("Error Code 1: Internal Error (Unexpected call to stub loadRunner for ReformatRunner)")
            if not plan["version_compatible"] and plan["version"] != module.__version__:
                return self._log(f"Error Code 6: API Usage Error (expecting {module.__version__}, got another version)")
            return super().deserialize_cuda_engine(serialized_engine)

    class IExecutionContext(IExecutionContext):
        lacks = frozenset({"is_stream_capturable"})

    class ICudaEngine(ICudaEngine):
        lacks = frozenset({"create_runtime_config"})

        @may_fail(None)
        def create_execution_context(self, strategy):
            assert strategy == real.ExecutionContextAllocationStrategy.USER_MANAGED
            return Full.IExecutionContext(self, None)

        def create_engine_inspector(self):
            return EngineInspector(self)


class EngineInspector(Strict):
    """Says what `layers_of` noted."""

    def __init__(self, engine) -> None:
        self._fake, self._layers = engine._fake, engine._plan["layers"]

    def get_engine_information(self, format):
        assert format == real.LayerInformationFormat.JSON
        return json.dumps({"Layers": [*self._layers, "a layer with a name alone"], "Bindings": []})


def layers_of(network, no_kernel) -> list[dict]:
    """The layers of a network that compute, as TensorRT's inspector says them.

    no_kernel: kinds of layers that TensorRT dequantises before it computes.
    """
    found, stored = [], {}
    for layer in map(network.get_layer, range(network.num_layers)):
        kind = str(layer.type).rsplit(".", 1)[-1]
        if kind == "DEQUANTIZE":
            stored[layer.get_output(0).name] = str(layer.get_input(0).dtype).rsplit(".", 1)[-1]
        if kind == "SHUFFLE" and layer.get_input(0).name in stored:  # weights of a product, made as deep as its tokens
            stored[layer.get_output(0).name] = stored[layer.get_input(0).name]
        if kind in ("CONVOLUTION", "MATRIX_MULTIPLY"):
            operands = [layer.get_input(i) for i in range(layer.num_inputs)]
            names = ["Half" if kind in no_kernel else stored.get(one.name, "Half") for one in operands]
            entry = {"Name": layer.name, "LayerType": kind, "Metadata": f"[ONNX Layer: {layer.name}]\x1e"}
            entry["TacticName"] = f"sm90_{names[0].lower()}_{kind.lower()}_0x12ab"
            described = [
                {
                    "Name": one.name,
                    "Location": "Device",
                    "Dimensions": [],
                    "Format/Datatype": f"Row major {name} format",
                }
                for one, name in zip(operands, names, strict=True)
            ]
            weights = {"Weights": {"Type": names[-1], "Count": 1}} if kind == "CONVOLUTION" else {}
            found.append({**entry, "Inputs": described[: 1 if weights else 2], "Outputs": [], **weights})
    return found


class OnnxParser(real.OnnxParser):
    """The real one; it remembers which file a network is from."""

    def __init__(self, network, logger) -> None:
        super().__init__(network, logger)
        self.network = network

    def parse_from_file(self, model):
        FILES[id(self.network)] = model
        return super().parse_from_file(model)

    def parse(self, model, path=None):
        FILES[id(self.network)] = path
        return super().parse(model, path)


class Builder(real.Builder):
    """The real one, but for its last step."""

    def create_optimization_profile(self):
        self.profiles = [*getattr(self, "profiles", []), super().create_optimization_profile()]
        return self.profiles[-1]

    rtx, version, no_kernel, folded = True, real.__version__, (), ()

    def build_serialized_network(self, network, config):
        assert config.get_flag(real.BuilderFlag.REQUIRE_USER_ALLOCATION) == self.rtx
        monitor = config.progress_monitor
        monitor.phase_start("building", None, 1)
        go_on = monitor.step_complete("building", 0)
        monitor.phase_finish("building")
        if not go_on:
            return None
        inputs = {}
        for tensor in map(network.get_input, range(network.num_inputs)):
            free = -1 in tuple(tensor.shape)
            inputs[tensor.name] = [
                [list(shape) for shape in (profile.get_shape(tensor.name) if free else [tensor.shape] * 3)]
                for profile in self.profiles
            ]
        outputs = {t.name: list(t.shape) for t in map(network.get_output, range(network.num_outputs))}
        path = FILES[id(network)]
        rows = max(profile[2][0] for profiles in inputs.values() for profile in profiles)
        name = onnx.load(path, load_external_data=False).graph.name
        plan = {"onnx": path, "name": name, "rows": rows, "inputs": inputs, "outputs": outputs, "version": self.version}
        plan["version_compatible"] = config.get_flag(real.BuilderFlag.VERSION_COMPATIBLE)
        plan["layers"] = layers_of(network, self.no_kernel)
        plan["weights"], plan["refit"] = {}, self._refit(network, config, path)
        plan["stripped"] = sorted(plan["refit"]) if config.get_flag(real.BuilderFlag.STRIP_PLAN) else []
        plan["hardware"] = config.hardware_compatibility_level.name
        return json.dumps(plan).encode()

    def _refit(self, network, config, path):
        """The weights that a refit may set, with their types and numbers."""
        flags = real.BuilderFlag
        assert not config.get_flag(flags.REFIT) and not config.get_flag(flags.REFIT_IDENTICAL)
        if not config.get_flag(flags.REFIT_INDIVIDUAL):
            assert not config.get_flag(flags.STRIP_PLAN), "then REFIT_IDENTICAL would be on"
            return {}
        return {
            one.name: [KINDS[one.data_type], int(np.prod(one.dims))]
            for one in onnx.load(path, load_external_data=False).graph.initializer
            if one.data_type in KINDS and one.name not in self.folded
            if network.are_weights_marked_refittable(one.name)
        }


KINDS = {1: "FLOAT", 10: "HALF", 16: "BF16"}  # ONNX's numbers of types


class FullBuilder(Builder):
    rtx = False

    def create_builder_config(self):
        return FullConfig(super().create_builder_config())


class FullConfig:
    """TensorRT-RTX's, with a setting that TensorRT-RTX does not take."""

    def __init__(self, config) -> None:
        vars(self).update(_config=config, hardware_compatibility_level=real.HardwareCompatibilityLevel.NONE)

    def __getattr__(self, name: str):
        return getattr(self._config, name)

    def __setattr__(self, name: str, value) -> None:
        if name == "hardware_compatibility_level":
            vars(self)[name] = real.HardwareCompatibilityLevel(value)
        else:
            setattr(self._config, name, value)


for ours in (OnnxParser, Builder):  # what they replace must be there
    assert all(hasattr(ours.__base__, name) for name in vars(ours) if name.startswith(("parse_", "build_", "create_")))


# What the lean run time lacks of that which we use, seen in tensorrt_lean 11.4.0.106.
LEAN_LACKS = (
    "Builder", "ComputeCapability", "DynamicShapesKernelSpecializationStrategy", "EngineInvalidityDiagnostics",
    "EngineValidity", "IBuilderConfig", "INetworkDefinition", "IRuntimeCache", "LayerType",
    "NetworkDefinitionCreationFlag", "OnnxParser",
)  # fmt: skip


class FakeTensorRT:
    """The module. runs: how often each graph was enqueued. spoil: graph -> function(inputs, results).

    seconds: (graph, rows) -> what a run takes by the fake GPU's clock. rtx: TensorRT-RTX, or else TensorRT. lean:
    TensorRT's lean run time. version: of the module, by default the installed one's. no_kernel: see `layers_of`.
    folded: weights that no refit can set, though they were marked. joined: weight -> those that must be set with it.
    """

    def __init__(
        self,
        gpu: FakeRuntime,
        rtx: bool = True,
        lean: bool = False,
        version: str = real.__version__,
        no_kernel: tuple[str, ...] = (),
        folded: tuple[str, ...] = (),
    ) -> None:
        rtx = rtx and not lean
        self.gpu, self.number, self.refuse, self.runs, self.spoil = gpu, 0, None, {}, {}
        self.seconds = lambda name, rows: 1e-6
        self.sessions: dict[tuple, onnxruntime.InferenceSession] = {}
        self.dimensions: dict[str, dict[str, list[str]]] = {}  # of each file: names of the inputs' axes
        name = "tensorrt_rtx" if rtx else "tensorrt_lean" if lean else "tensorrt"
        self.module = ModuleType(name)
        vars(self.module).update({k: v for k, v in vars(real).items() if k not in ("__name__", "__spec__")})
        self.module.__spec__, self.module.__version__ = ModuleSpec(name, None), version
        self.joined: dict[str, tuple[str, ...]] = {}
        own = {"version": version, "no_kernel": no_kernel, "folded": folded}
        builder = type("Builder", (Builder if rtx else FullBuilder,), own)
        self.module.Builder, self.module.OnnxParser = builder, OnnxParser
        runtime, self.engine = (Runtime, ICudaEngine) if rtx else (Full.Runtime, Full.ICudaEngine)
        self.module.Runtime = lambda logger: runtime(self, logger)
        self.module.Refitter = lambda engine, logger: Refitter(self, engine, logger)
        for one in (self.engine, IRuntimeCache, IRuntimeConfig, IExecutionContext if rtx else Full.IExecutionContext):
            setattr(self.module, one.__name__, one)
        if not rtx:
            flags = real.BuilderFlag.__members__.items()
            self.module.BuilderFlag = SimpleNamespace(**{k: v for k, v in flags if k != "REQUIRE_USER_ALLOCATION"})
        for missing in LEAN_LACKS if lean else ():
            delattr(self.module, missing)

    def install(self, monkeypatch) -> FakeTensorRT:
        monkeypatch.setitem(sys.modules, self.module.__name__, self.module)
        return self

    def session(
        self, path: str, shapes: dict[str, tuple[int, ...]], weights: dict[str, bytes]
    ) -> onnxruntime.InferenceSession:
        """shapes: of the inputs. Sides of pictures are fixed, so that the session knows the shapes of its outputs.

        weights: initializers in place of the file's."""
        if path not in self.dimensions:
            graph = onnx.load(path, load_external_data=False).graph
            self.dimensions[path] = {t.name: [d.dim_param for d in t.type.tensor_type.shape.dim] for t in graph.input}
        found = {}
        for name, names in self.dimensions[path].items():
            found |= {side: size for side, size in zip(names, shapes[name], strict=True) if side in (*SIDES, CONTEXT)}
        key = (path, *sorted(found.items()), *sorted(weights.items()))
        if key not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            for side, size in found.items():
                options.add_free_dimension_override_by_name(side, int(size))
            model = path
            if weights:
                whole = onnx.load(path)
                for one in whole.graph.initializer:
                    if one.name in weights:
                        one.CopyFrom(helper.make_tensor(one.name, one.data_type, one.dims, weights[one.name], raw=True))
                model = whole.SerializeToString()
            self.sessions[key] = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return self.sessions[key]
