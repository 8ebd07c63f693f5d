"""Builds a plan with TensorRT or TensorRT for RTX from an ONNX graph, and proves the precision that it computes in.

    plan, proof = build_plan(TensorRT("tensorrt-rtx"), "bundle/unet.onnx", {"B": 4, "G": 2}, "fp16", Options())

TensorRT-RTX needs no GPU for that. Networks are strongly typed: a tensor has the type that the ONNX graph gives it. So
the exported graph sets the precision, and `build_plan` proves it from the types of the layers that compute. Types do
not show TF32, which TensorRT allows by default, and in which float32 keeps 10 of its 23 bits. It is always off: what is
float32 here (kinematics, the solver, nodes that half precision cannot hold, bundles in fp32) needs the bits.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..contract import EIGHT_BITS, FLOAT32_GRAPHS
from ..errors import EngineError
from ..files import written
from . import eight_bits, inspect, refit
from .plans import Sizes
from .tensorrt import TURING, Options, TensorRT

# The layers that do the arithmetic, and so decide speed and precision.
COMPUTE = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "ATTENTION_INPUT", "EINSUM")
TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
TYPES |= dict.fromkeys(EIGHT_BITS, "HALF")  # of layers that are not quantised
EIGHT_BIT_TYPES = ("FP8", "INT8")
# The share of the layers that compute which must have the precision asked for. It is below 1: the solver's tail, the
# embedding of timesteps and layers that calibration keeps in float32 have another.
SHARE = 0.8
FP8_FROM = (8, 9)  # the first compute capability that computes in fp8
STOP_SECONDS = 2.0  # that an interrupted build gets to stop by itself; some of its phases take a minute

OnProgress = Callable[[str, float], bool]  # (phase, done 0..1) -> whether to go on


def build_plan(
    backend: TensorRT,
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
    timing_cache: a file of kernel timings, which TensorRT reads and extends; TensorRT-RTX has none.
    Returns the plan and {"types": layers that compute by type, "inputs", "outputs", "tf32": False, "layers": what
    it was compiled to, "memory": bytes}; see `inspect.py`. Of a graph in eight bits also {"eight_bits": {"asked":
    quantised layers, "compiled": kernels were chosen for}, "in_half": names of the others}. These are in half precision
    then, in a second build.
    """
    # Python raises KeyboardInterrupt in the main thread, the next time that this runs Python. That must not be inside
    # TensorRT's callbacks, which swallow every exception, and some phases call none: so TensorRT gets a thread.
    monitor = _monitor(backend.module, on_progress)
    result: list[Any] = []

    def work() -> None:
        try:
            result.append(_build_proven(backend, Path(onnx), sizes, precision, options, monitor, timing_cache))
        except BaseException as error:
            result.append(error)

    # A daemon: nothing stops a phase of TensorRT that calls no callback.
    thread = threading.Thread(target=work, name="TensorRT", daemon=True)
    thread.start()
    try:
        _wait(thread)
    except BaseException:
        monitor.stopped = True
        _wait(thread, STOP_SECONDS)
        raise
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def _build_proven(
    backend: TensorRT, onnx: Path, sizes: Sizes, precision: str, options: Options, monitor: Any, cache: Path | None
) -> tuple[bytes, dict[str, Any]]:
    """Builds a plan; of a graph in eight bits once more without the layers that no such kernel was chosen for."""
    in_half = eight_bits.convolutions(onnx) if options.eight_bits == "products" else set()
    asked = 0
    while True:
        content = eight_bits.restored(onnx, in_half) if in_half else None
        plan, proof, quantized = _build(backend, onnx, sizes, precision, options, monitor, cache, content)
        asked = asked or len(quantized) + len(in_half)
        missing = left_out(onnx.stem, precision, quantized, proof["layers"]) if quantized and proof["layers"] else set()
        if not missing:
            break
        in_half |= missing
        monitor.restart()
    if asked and proof["layers"]:
        proof["eight_bits"] = {"asked": asked, "compiled": asked - len(in_half)}
    return plan, proof | ({"in_half": sorted(in_half)} if in_half else {})


def _build(
    backend: TensorRT,
    onnx: Path,
    sizes: Sizes,
    precision: str,
    options: Options,
    monitor: Any,
    timing_cache: Path | None,
    content: bytes | None,
) -> tuple[bytes, dict[str, Any], list[str]]:
    """Builds a plan once. content: the graph, if not the file's. Also returns the quantised layers."""
    trt = backend.module
    backend.messages.clear()
    backend.report.clear()
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
    builder = backend.made("Builder")
    # TensorRT 10 needs the flag; from 11 on, and in TensorRT-RTX, every network is strongly typed.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, backend.logger)
    read = parser.parse_from_file(str(onnx)) if content is None else parser.parse(content, str(onnx))
    if not read or not network.num_outputs:
        raise backend.failure(f"cannot read {onnx.name}")
    config = builder.create_builder_config()
    _configure(backend, config, options)
    count = max((len(size) for size in sizes.values() if isinstance(size, list)), default=1)
    profiles = [builder.create_optimization_profile() for _ in range(count)]
    for i in range(network.num_inputs):
        _shape(network.get_input(i), sizes, profiles)
    for profile in profiles:
        if config.add_optimization_profile(profile) < 0:
            raise backend.failure(f"refuses the sizes {dict(sizes)} for {onnx.name}")
    _allow_any_attention(backend.module, network)
    if options.refittable or options.stripped:
        refit.mark(backend, network, config, onnx, options)
    proof = _proof(backend, network, config, precision, onnx.stem)
    quantized = proof.pop("quantized")
    cache = _read_timings(backend, config, timing_cache)
    config.progress_monitor = monitor
    plan = None if monitor.stopped else builder.build_serialized_network(network, config)
    if monitor.failure is not None:
        raise monitor.failure
    if monitor.stopped:
        raise KeyboardInterrupt
    if plan is None:
        raise backend.failure(f"cannot build {onnx.name}")
    if cache is not None and timing_cache is not None:
        timing_cache.parent.mkdir(parents=True, exist_ok=True)
        with written(timing_cache) as temporary:
            temporary.write_bytes(memoryview(cache.serialize()))
    proof |= inspect.read_log(backend.report)
    content = bytes(plan)
    if not proof["layers"] and not backend.rtx:  # TensorRT's log has another form, and its GPU is here
        proof["layers"] = backend.layers(content)
    return content, proof, quantized


def _configure(backend: TensorRT, config: Any, options: Options) -> None:
    trt = backend.module
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
            raise backend.failure("does not take memory of ours (REQUIRE_USER_ALLOCATION)")
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware is not None:
        name = options.hardware.replace("-", "_").upper()
        level = getattr(getattr(trt, "HardwareCompatibilityLevel", None), name, None)
        if level is not None:
            config.hardware_compatibility_level = level
        if level is None or config.hardware_compatibility_level != level:
            raise EngineError(
                f"{backend.name} {backend.version} does not know --hardware-compatibility-level {options.hardware}. "
                "Leave it out, or install a later version."
            )
    if backend.rtx and options.compute_capabilities:
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


def _shape(tensor: Any, sizes: Sizes, profiles: list[Any]) -> None:
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


def _allow_any_attention(trt: Any, network: Any) -> None:
    """Lets attention without a dedicated kernel (float32, odd head sizes) be computed in parts, not refused."""
    output = getattr(trt, "IAttentionOutputLayer", None)
    for i in range(network.num_layers if output is not None else 0):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = output  # the bindings hand out the base class
            layer.attention.decomposable = True


def _proof(backend: TensorRT, network: Any, config: Any, precision: str, name: str) -> dict[str, Any]:
    """Counts the layers that compute by the type they compute in. EngineError for another precision than asked."""
    if config.get_flag(backend.module.BuilderFlag.TF32):
        raise EngineError(
            f"{backend.name} {backend.version} would compute the float32 layers of {name} in TF32. Please report this."
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
            f"The layers of {name} that compute must be in {precision}, got {found}. Export it again with "
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


def _read_timings(backend: TensorRT, config: Any, path: Path | None) -> Any:
    if path is None or backend.rtx:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):  # another GPU's or version's: start over
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def left_out(name: str, precision: str, quantized: list[str], layers: list[inspect.Layer]) -> set[str]:
    """Of the network's layers that are `quantized`, those that became no kernels of eight bits.

    Raises EngineError where these are all.
    """
    missing = set(quantized) - eight_bits.compiled(layers, precision)
    if missing == set(quantized):
        raise EngineError(
            f"None of the {len(quantized)} layers of {name} that are quantised to {precision} was compiled to a kernel "
            "that computes in it. TensorRT would dequantise them, which gains nothing. A GPU that this is for lacks "
            "such kernels: name others (--compute-capability), or export again with --precision fp16."
        )
    return missing


def _monitor(trt: Any, on_progress: OnProgress | None) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Turns TensorRT's nested phases into one fraction: each step of a phase shares out what its parent has.

        stopped: set to stop the build. failure: what `on_progress` raised.
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

        def restart(self) -> None:
            """Another build begins."""
            self.phases.clear()
            self.furthest = 0.0

        def fraction(self) -> float:
            total, share = 0.0, 1.0
            for _, steps, done in self.phases.values():  # in the order in which they were opened: outermost first
                total += share * done / steps
                share /= steps
            self.furthest = max(self.furthest, min(total, 1.0))  # phases that are opened later take nothing back
            return self.furthest

    return Monitor()


def _wait(thread: threading.Thread, seconds: float = float("inf")) -> None:
    """Waits until a thread ends, or for so many seconds. Ctrl-C interrupts it."""
    end = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < end:
        thread.join(0.1)
