"""From a folder to a loop that runs: which backend, on what, and where each backend's engines come from.

loop, sentences = load_loop(folder, backend="auto", device="auto", slots=8)
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

from ..contract import BRANCHES, GRAPHS, Manifest
from ..engines import Engine, cpu, load_engines, openvino
from ..engines.base import DeviceEngine, check_gpu
from ..engines.cuda import Cuda
from ..engines.inductor import InductorDeviceEngine, InductorEngine, find_compiled, load_inductor
from ..engines.onnxruntime import DEVICES, OnnxRuntimeDeviceEngine, OnnxRuntimeEngine, has_cuda_provider, in_half
from ..engines.plans import KERNELS, Plan, PlanStore, belongs
from ..engines.tensorrt import MODULES, Backend, Scratch, TensorRTEngine
from ..errors import BundleError, EngineError
from .admission import FIRST, Admission, measure, read, write
from .bundle import Bundle
from .device import DeviceLoop
from .device_graphs import STREAM, Load, Streams, connect
from .host import HostLoop

BACKENDS = ("auto", "onnxruntime", "openvino", *MODULES, "inductor")
LONG = 64  # pictures of a run from which on it is worth to compile the UNet for larger batches, too
BATCHES = (1, 2, 4)  # which are tried then
DRIVER = Path("/proc/driver/nvidia/version")  # there where an NVIDIA driver is loaded
STEPS = ("hand_prior", "unet")  # the graphs that run again and again, with guidance or without


def load_loop(
    folder: Path,
    backend: str = "auto",
    device: str = "auto",
    slots: int = 8,
    threads: int | None = None,
    overlap: bool = True,
    onnxruntime_graphs: bool = False,
    pictures: int = 1,
) -> tuple[HostLoop | DeviceLoop, list[str]]:
    """The loop of a bundle or engines folder on this machine, and what the user should know about it.

    See `HanDiffuser.load` for the arguments. Raises BundleError for a missing or damaged bundle, EngineError when it
    cannot run here.
    """
    if backend not in BACKENDS:
        raise EngineError(f"There is no backend {backend!r}. Choose one of {', '.join(BACKENDS)}.")
    chosen = choose_backend(folder, backend, device)
    if chosen == "inductor" and find_compiled(folder, Manifest.load(folder, verify=False), device)[0] == "cpu":
        bundle = Bundle.load(folder)
        return HostLoop(bundle, load_inductor(folder, bundle.manifest, device, threads), slots), []
    if chosen == "openvino":
        if device == "cuda":
            raise EngineError("openvino runs on CPUs only here. Leave out --device cuda, or take another --backend.")
        return load_openvino_loop(folder, slots, threads, pictures), []
    if chosen == "onnxruntime" and not on_gpu(device):
        sentences = idle_gpu() if device == "auto" else []
        loop = None
        if backend == "auto":
            loop, said = try_openvino(folder, slots, threads, pictures)
            sentences += said
        if loop is None:
            manifest, engines = load_engines(folder, "cpu", threads)
            loop = HostLoop(Bundle.load(folder, manifest), engines, slots)
        return loop, sentences
    return load_device_loop(Bundle.load(folder), folder, chosen, slots, overlap, onnxruntime_graphs)


def load_openvino_loop(folder: Path, slots: int, threads: int | None, pictures: int) -> HostLoop:
    """UNet and decoder in bfloat16 with OpenVINO, the rest with ONNX Runtime. Raises EngineError where it cannot be."""
    openvino.has_bf16()  # says what is missing, before anything is loaded

    def others(manifest: Manifest) -> dict[str, Engine]:
        batches = batches_for(folder, manifest, slots, pictures)
        engines = openvino.load_openvino(folder, manifest, "bf16", threads, batches)
        for engine in engines.values():  # before the rest is there: it takes twice what it then keeps
            engine.prepare(openvino.usual(engine.spec, manifest))  # type: ignore[attr-defined]
        return engines

    manifest, engines = load_engines(folder, "cpu", threads, others=others)
    loop = HostLoop(Bundle.load(folder, manifest), engines, slots)
    loop.bundle.made_by |= {"backend": "openvino", "inference": "bf16"}
    return loop


def batches_for(folder: Path, manifest: Manifest, slots: int, pictures: int) -> list[int]:
    """Batch sizes of the UNet to try: 1, those that were compiled, and BATCHES in a long run of a small model."""
    shelf, unet = openvino.shelf_of(folder, manifest, "bf16"), manifest.graphs["unet"]
    long = pictures >= LONG and shelf.keeps("unet")
    sizes = [size for size in powers_of_two(slots) if size <= slots]
    kept = {size: shelf.plan("unet", openvino.usual(unet, manifest, size)) is not None for size in sizes}
    return [size for size in sizes if size == 1 or (long and size in BATCHES) or kept[size]]


def try_openvino(folder: Path, slots: int, threads: int | None, pictures: int) -> tuple[HostLoop | None, list[str]]:
    """The loop with OpenVINO where that is installed, true enough, and pays for a run of so many pictures; else None.

    Whether it is true enough is measured once, on a few pictures, and noted beside what was compiled.
    """
    if not (openvino.is_installed() and cpu.has_bf16()):
        return None, []
    manifest = Manifest.load(folder, verify=False)
    shelf = openvino.shelf_of(folder, manifest, "bf16")
    admission = read(shelf)
    if manifest.base != "fp32" or pictures < (admission.pays if admission else FIRST):
        return None, []
    if admission is None and not shelf.keeps("unet"):
        return None, [
            "OpenVINO may make these pictures in less time, and was not compiled for this bundle: "
            f"hd-engines build {folder} --backend openvino --batch-sizes 1."
        ]
    try:
        admission = admission or admit_openvino(folder, threads=threads)
        loop = load_openvino_loop(folder, slots, threads, pictures) if admission.passes else None
    except EngineError as error:
        return None, [f"ONNX Runtime is used instead of OpenVINO. {error}"]
    if loop is None:
        return None, [f"ONNX Runtime makes these pictures: OpenVINO was {admission}."]
    if manifest.precision != "fp32":
        return loop, [f"OpenVINO makes these pictures in {manifest.precision} and bfloat16, {admission}."]
    return loop, [
        f"OpenVINO makes these pictures in bfloat16, {admission}. --backend onnxruntime makes the exact ones."
    ]


def admit_openvino(folder: Path, count: int = 2, threads: int | None = None) -> Admission:
    """Makes `count` pictures with OpenVINO and with ONNX Runtime, and notes the outcome where the UNet is kept."""
    load_engines(folder, "cpu", threads)  # makes what is missing, which later runs find; and so does the next line
    load_openvino_loop(folder, 1, threads, 1)
    started = time.process_time()
    loop = load_openvino_loop(folder, 1, threads, 1)
    between = time.process_time()
    manifest, exact = load_engines(folder, "cpu", threads)
    ready = max(0.0, (between - started) - (time.process_time() - between))
    fast = {name: timed.engine for name, timed in loop.engines.items()}
    admission = measure(loop.bundle, exact, fast, ready, count)
    write(openvino.shelf_of(folder, manifest, "bf16"), admission)
    return admission


def load_device_loop(
    bundle: Bundle,
    folder: Path,
    backend: str,
    slots: int,
    overlap: bool = True,
    onnxruntime_graphs: bool = False,
) -> tuple[DeviceLoop, list[str]]:
    """The loop of a bundle on this machine's GPU, and what the user should know about it.

    backend: "tensorrt" or "tensorrt-rtx" (with plans in `folder`), "inductor" (with graphs compiled for the GPU there)
    or "onnxruntime" (its CUDA provider). onnxruntime_graphs: see `onnxruntime_loader`.
    Raises EngineError without a GPU, without the backend, or without plans for them.
    """
    cuda, manifest, sentences = Cuda(), bundle.manifest, []
    check_gpu(manifest, cuda)
    streams = Streams.make(cuda, overlap)
    module: Backend | None = None
    if backend in ("onnxruntime", "inductor"):
        buckets = powers_of_two(slots)
        if backend == "inductor":
            load = inductor_loader(manifest, folder)
        else:
            load = onnxruntime_loader(manifest, folder, streams, onnxruntime_graphs)
        single = dict.fromkeys(STEPS, buckets)
    else:
        module = Backend(backend)
        store = PlanStore(folder)
        plans = usable_plans(store, manifest, module, cuda)
        singles = usable_plans(store, manifest, module, cuda, branches=1)
        single = {name: list(sizes) for name, sizes in singles.items()}
        buckets = sorted(set.intersection(*(set(sizes) for name, sizes in plans.items() if name != "unet_time")))
        if not buckets:
            raise EngineError(f"{folder} has no batch size that all graphs have plans for: hd-engines build {folder}.")
        if slots > buckets[-1]:
            sentences.append(
                f"The engines take up to {buckets[-1]} pictures at once, so the batch size {slots} became that. For "
                f"more: hd-engines build {folder} --batch-sizes {','.join(map(str, (*buckets, slots)))}."
            )
            slots = buckets[-1]
        buckets = enough(buckets, slots)
        load = tensorrt_loader(manifest, store, {2: plans, 1: singles}, module, cuda)
    loop = DeviceLoop(bundle, cuda, connect(cuda, manifest, buckets, load, single=single), streams, slots)
    bundle.made_by |= {"device": cuda.name, "backend": backend}
    if module is not None:
        loop.after_run, loop.at_close = module.keep_kernels, module.close
    return loop, sentences


def choose_backend(folder: Path, backend: str, device: str) -> str:
    """The backend that "auto" means: that of the folder's plans where there is a GPU, else ONNX Runtime."""
    if backend != "auto" and not (backend in MODULES and device == "cpu"):
        return backend
    # Not "inductor": it needs PyTorch, which nothing is to import unasked.
    made_for = sorted({plan.parts["backend"] for plan in PlanStore(folder)} & set(MODULES))
    if backend in MODULES:
        raise EngineError(f"{backend} runs on NVIDIA GPUs only. Leave out --device cpu, or take --backend onnxruntime.")
    if not made_for or device == "cpu":
        return "onnxruntime"
    try:
        cuda, manifest, store = Cuda(), Manifest.load(folder, verify=False), PlanStore(folder)
    except EngineError as error:
        warnings.warn(f"The plans in {folder} are not used. {error}", RuntimeWarning, stacklevel=3)
        return "onnxruntime"
    for name in made_for:
        try:
            usable_plans(store, manifest, Backend(name), cuda)
            return name
        except EngineError as error:
            warnings.warn(f"ONNX Runtime is used instead of {name}. {error}", RuntimeWarning, stacklevel=3)
    return "onnxruntime"


def on_gpu(device: str) -> bool:
    """Whether ONNX Runtime is to run on a GPU. Raises EngineError when it must and cannot."""
    if device not in DEVICES:
        raise EngineError(f"There is no device {device!r}. Choose one of {', '.join(DEVICES)}.")
    if device == "cpu" or (device == "auto" and not has_cuda_provider()):
        return False
    try:
        Cuda()
    except EngineError:
        if device == "cuda":
            raise
        return False
    return True


def idle_gpu() -> list[str]:
    """A sentence about a GPU of this machine that is left out, if there is one: nobody owns it for that."""
    if not DRIVER.exists():
        return []
    why = 'ONNX Runtime was installed without CUDA: `pip uninstall onnxruntime`, then `pip install "handiffuser[cuda]"`'
    if has_cuda_provider():
        try:
            Cuda()
        except EngineError as error:
            why = str(error)
    return [
        f"The NVIDIA GPU of this machine is not used, the CPU is. {why.rstrip('.')}. --device cpu says it is meant."
    ]


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4 ... up to the first that holds `most`."""
    out = [1]
    while out[-1] < most:
        out.append(2 * out[-1])
    return out


def enough(buckets: list[int], slots: int) -> list[int]:
    """Of rising batch sizes those up to the first that holds all slots, which is among them."""
    return [size for size in buckets if size < slots] + [size for size in buckets if size >= slots][:1]


def usable_plans(
    store: PlanStore, manifest: Manifest, backend: Backend, cuda: Any, branches: int = 2
) -> dict[str, dict[int, Plan]]:
    """Graph -> batch size -> plan, of the plans that belong to this bundle, backend and GPU; the newest of equals.

    branches: those that run this many guidance branches; of one branch alone there may be none.
    Raises EngineError when a graph has no plan.
    """
    if refusal := backend.refusal(cuda):
        raise EngineError(refusal)
    found: dict[str, dict[int, Plan]] = {name: {} for name in GRAPHS}
    for plan in sorted(store, key=lambda plan: plan.path.stat().st_mtime if plan.path.exists() else 0):
        if plan.graph not in found or plan.branches != branches or store.problem(plan, verify=False):
            continue
        made_by = (plan.parts["backend"], plan.parts["version"])
        if (
            not belongs(plan, manifest)
            or made_by != (backend.name, backend.version)
            or not backend.runs_on(plan.parts["target"], cuda)
        ):
            continue
        least, most = plan.batch
        sizes = plan.batches or [n for n in powers_of_two(most) if least <= n <= most]
        found[plan.graph].update(dict.fromkeys({*sizes, most}, plan))
    missing = [name for name, sizes in found.items() if not sizes]
    if missing and branches == 2:
        raise EngineError(
            f"{store.folder.parent} has no {backend.name} {backend.version} plans of {', '.join(missing)} for this GPU "
            f"({cuda.name}, compute capability {cuda.compute_capability}). Build them: hd-engines build "
            f"{store.folder.parent} --backend {backend.name}."
        )
    return found


def tensorrt_loader(
    manifest: Manifest,
    store: PlanStore,
    plans: dict[int, dict[str, dict[int, Plan]]],
    backend: Backend,
    cuda: Any,
) -> Load:
    """(graph, bucket, guidance branches) -> engine. A plan is read, verified and put on the GPU when it is first used.

    plans: by branches, see `usable_plans`.
    """
    scratch = {stream: Scratch(cuda) for stream in Streams._fields}
    loaded: dict[str, Any] = {}

    def load(name: str, bucket: int, branches: int) -> DeviceEngine:
        sizes = plans[branches][name]
        plan = next(iter(sizes.values())) if name == "unet_time" else sizes[bucket]
        if plan.key not in loaded:
            kernels = plan.path.with_suffix(KERNELS)
            loaded[plan.key] = backend.load(store.read(plan), name, cuda, kernels)
        return TensorRTEngine(loaded[plan.key], manifest.graphs[name], scratch[STREAM[name]])

    return load


def onnxruntime_loader(manifest: Manifest, folder: Path, streams: Streams, graphs: bool = False) -> Load:
    """(graph, bucket, branches) -> engine: one session a graph on its stream, one binding a bucket.

    graphs: have ONNX Runtime replay the sampling steps as CUDA graphs of its own, with a session, and its weights, a
    bucket. Not unless asked for: it spares the launching of each kernel, but makes the host wait for every step. A
    session that refuses runs without.
    """
    sessions: dict[str, OnnxRuntimeEngine] = {}

    def session(name: str, capture: dict[str, int] | None = None) -> OnnxRuntimeEngine:
        spec, stream = manifest.graphs[name], getattr(streams, STREAM[name])
        return OnnxRuntimeEngine(
            folder / spec.file, spec, "cuda", stream=int(stream.handle), capture=capture, half=in_half(manifest, name)
        )

    def load(name: str, bucket: int, branches: int) -> DeviceEngine:
        if graphs and name in STEPS:
            try:
                return OnnxRuntimeDeviceEngine(session(name, {"B": bucket, BRANCHES: branches}))
            except BundleError:
                pass  # a node that does not run on the GPU; anything else is said again
        if name not in sessions:
            sessions[name] = session(name)
        return OnnxRuntimeDeviceEngine(sessions[name])

    return load


def inductor_loader(manifest: Manifest, folder: Path) -> Load:
    """(graph, bucket, branches) -> engine: one compiled file a graph, one binding a bucket.

    A file is verified and loaded when it is first used, on the thread and for the stream that it stays with.
    """
    _, plans = find_compiled(folder, manifest, "cuda")
    store, loaded = PlanStore(folder), {}

    def load(name: str, bucket: int, branches: int) -> DeviceEngine:
        if name not in loaded:
            store.read(plans[name])
            loaded[name] = InductorEngine(plans[name].path, manifest.graphs[name], "cuda", asynchronous=True)
        return InductorDeviceEngine(loaded[name])

    return load
