"""From a folder to a loop that runs: which backend, on what, and where each backend's engines come from.

loop, sentences = load_loop(folder, backend="auto", device="auto", slots=8)
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..contract import Manifest
from ..engines import Engine, cpu, load_engines, openvino
from ..engines.cuda import Cuda
from ..engines.onnxruntime import DEVICES, NO_CUDA, has_cuda_provider
from ..engines.plans import MODULES, PlanStore
from ..errors import EngineError
from .admission import FIRST, Admission, measure, read, write
from .bundle import Bundle
from .host import HostLoop

if TYPE_CHECKING:
    from .device import DeviceLoop

BACKENDS = ("auto", "onnxruntime", "openvino", *MODULES, "inductor")
LONG = 64  # pictures of a run from which on it is worth to compile the UNet for larger batches, too
MANY = 1 << 30  # pictures of a server, which does not know how many it will make
BATCHES = (1, 2, 4)  # which are tried then
DRIVER = Path("/proc/driver/nvidia/version")  # there where an NVIDIA driver is loaded


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
    if chosen == "inductor":
        from ..engines import inductor

        if inductor.find_compiled(folder, Manifest.load(folder, verify=False), device)[0] == "cpu":
            bundle = Bundle.load(folder)
            return HostLoop(bundle, inductor.load_inductor(folder, bundle.manifest, device, threads), slots), []
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
    from .device_loading import load_device_loop  # which a run on a CPU has no use for, and would wait for

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
    from .device_loading import first_usable

    return first_usable(folder, made_for)


def on_gpu(device: str) -> bool:
    """Whether ONNX Runtime is to run on a GPU. Raises EngineError when it must and cannot."""
    if device not in DEVICES:
        raise EngineError(f"There is no device {device!r}. Choose one of {', '.join(DEVICES)}.")
    if device != "cpu" and not has_cuda_provider():
        if device == "cuda":
            raise EngineError(NO_CUDA)
        return False
    if device == "cpu":
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
    why = NO_CUDA.replace(" Or take --device cpu.", "")
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
