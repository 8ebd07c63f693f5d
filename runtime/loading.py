"""From a folder to a loop that runs: which backend, and on which device.

loop, sentences = load_loop(folder, backend="auto", device="auto", slots=8)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..contract import Manifest
from ..engines import verdict
from ..engines.adapted import Chosen, adapted_bundle, changes, graphs_of
from ..engines.adapted import chosen as chosen_adapters
from ..engines.backends import BACKENDS, CHOICES, DEFAULT, DEVICES, GPU_PLANNED, Backend, runner
from ..engines.cuda import Cuda
from ..engines.inductor_files import Here, find_compiled
from ..engines.onnxruntime import NO_CUDA, has_cuda_provider
from ..engines.plans import PlanStore
from ..errors import EngineError
from ..installed import version
from .bundle import Bundle
from .comparing import compare_backend, load_host_loop
from .host import HostLoop

if TYPE_CHECKING:
    from .device import DeviceLoop

SERVER_PICTURES = 1 << 30  # pictures of a server, which does not know how many it will make
# Pictures of a run that make it worth compiling, and measuring a backend. float32 gains a tenth, bfloat16 a half.
MIN_PICTURES_COMPILED = {"bf16": 16, "fp32": 128}
DRIVER = Path("/proc/driver/nvidia/version")  # exists where an NVIDIA driver is loaded


class Choice(NamedTuple):
    """What runs a bundle: a backend of the table, "cpu" or "cuda", and what the user should know about it."""

    backend: str
    device: str
    sentences: list[str]


def load_loop(
    folder: Path,
    backend: str = "auto",
    device: str = "auto",
    slots: int = 8,
    threads: int | None = None,
    overlap: bool = True,
    onnxruntime_graphs: bool = False,
    pictures: int = 1,
    lora: Sequence[str] = (),
    lora_memory: int | None = None,
) -> tuple[HostLoop | DeviceLoop, list[str]]:
    """The loop of a bundle or engines folder on this machine, and what the user should know about it.

    See `HanDiffuser.load` for the arguments. Raises BundleError for a missing or damaged bundle, EngineError when it
    cannot run here, CheckpointError for an adapter that does not fit.
    """
    refused = list[str]()
    if adapters := chosen_adapters(lora):
        check_merges(backend, adapters)
        refitted, refused = load_refitted(folder, adapters, backend, device, slots, threads, overlap, pictures)
        if refitted is not None:
            return refitted
        made = adapted_bundle(folder, adapters)
        # What was measured of the bundle holds for it with adapters, but plans hold one set of weights.
        where = folder if not has_plans(folder) and not has_plans(made) else made
        chosen = choose(where, backend, device, threads, pictures)
        if runs_plans(chosen.backend) and not has_plans(made):
            from ..engines.tensorrt import TensorRT  # a run on a CPU does without, and starts sooner

            raise EngineError(
                f"{folder} must have refittable plans to run with --lora on {backend}, and has none. Build them: "
                f"{TensorRT(backend).how_to_build(folder, ' --refittable')}."
            )
        if where is made and not has_plans(made):
            chosen.sentences.extend(plans_without(folder, adapters))
    else:
        made, chosen = folder, choose(folder, backend, device, threads, pictures)
    loop, sentences = load_chosen(
        made, chosen, backend == "auto", slots, threads, overlap, onnxruntime_graphs, pictures, lora_memory
    )
    if adapters:
        base = Bundle.load(folder, Manifest.load(folder, verify=False))
        loop.bundle.loaded, loop.bundle.folder, loop.bundle.digest = adapters, folder, base.digest
        loop.bundle.adapted = made
        loop.bundle.made_by["bundle"] = base.digest
    return loop, refused + sentences


def load_chosen(
    folder: Path,
    chosen: Choice,
    auto: bool,
    slots: int,
    threads: int | None,
    overlap: bool,
    onnxruntime_graphs: bool,
    pictures: int,
    lora_memory: int | None,
) -> tuple[HostLoop | DeviceLoop, list[str]]:
    """The loop of a choice. auto: where a backend of the CPU fails, ONNX Runtime runs instead."""
    if chosen.device == "cuda":
        from .device_loading import load_device_loop  # a run on a CPU does without, and starts sooner

        loop, sentences = load_device_loop(
            Bundle.load(folder), folder, chosen.backend, slots, overlap, onnxruntime_graphs
        )
        return loop, chosen.sentences + sentences
    try:
        return load_host_loop(folder, chosen.backend, slots, threads, pictures, lora_memory), chosen.sentences
    except EngineError as error:
        if not auto or chosen.backend == DEFAULT:
            raise
        instead = f"ONNX Runtime is used instead of {chosen.backend}. {error}"
        said = [sentence for sentence in chosen.sentences if not sentence.startswith(chosen.backend)]
        return load_host_loop(folder, DEFAULT, slots, threads, pictures, lora_memory), [*said, instead]


def load_refitted(
    folder: Path,
    adapters: tuple[Chosen, ...],
    backend: str,
    device: str,
    slots: int,
    threads: int | None,
    overlap: bool,
    pictures: int,
) -> tuple[tuple[DeviceLoop, list[str]] | None, list[str]]:
    """The loop over a folder's own plans with adapters, where TensorRT runs it and plans can be refitted; and why not.

    Raises EngineError where that fails and the user named the backend.
    """
    if not takes_adapters(folder, backend, device):
        return None, []
    how = choose(folder, backend, device, threads, pictures)
    if not runs_plans(how.backend):
        return None, []
    from .device_loading import load_device_loop

    try:
        loop, said = load_device_loop(Bundle.load(folder), folder, how.backend, slots, overlap, adapters=adapters)
        try_refits(loop, graphs_of(*changes(folder, adapters)))
    except EngineError as error:
        if backend != "auto":
            raise
        return None, [f"The plans in {folder} are not refitted. {error}"]
    loop.bundle.loaded = adapters
    return (loop, how.sentences + said), []


def try_refits(loop: DeviceLoop, graphs: Sequence[str]) -> None:
    """Loads a plan of each graph that adapters change. Closes the loop and raises EngineError where one cannot get
    them."""
    held: list[Any] = []  # until the first run has engines of its own for the same plans
    try:
        held += [loop.graphs[name].load(loop.graphs[name].buckets[0], 2) for name in graphs]
    except EngineError:
        loop.close()
        raise
    after = loop.after_run

    def after_run() -> None:
        held.clear()
        after()

    loop.after_run = after_run


def check_merges(backend: str, adapters: Sequence[Chosen]) -> None:
    """Raises EngineError for a backend that cannot run a bundle with adapters merged."""
    if adapters and backend in BACKENDS and BACKENDS[backend].compiles:
        raise EngineError(
            f"lora must be left out with {backend}, whose files hold one set of weights, got {adapters[0].typed}. "
            f"Take another backend, or compile with it: hd-export CHECKPOINT OUT --backend {backend} --lora FILE."
        )


def runs_plans(backend: str) -> bool:
    """Whether a backend runs plans for GPUs that were built beforehand."""
    return backend in BACKENDS and (BACKENDS[backend].plans_of or backend) in GPU_PLANNED


def takes_adapters(folder: Path, backend: str, device: str) -> bool:
    """Whether a folder has plans that adapters can be put into, or were, and these options may run them."""
    may = device != "cpu" and (backend == "auto" or runs_plans(backend))
    return may and any(plan.refittable or plan.adapters for plan in PlanStore(folder))


def has_plans(folder: Path) -> bool:
    """Whether a folder has plans of a backend of the GPU, or graphs that were compiled for one."""
    return any(
        plan.parts["backend"] in GPU_PLANNED or plan.parts["target"].startswith("cuda") for plan in PlanStore(folder)
    )


def plans_without(folder: Path, adapters: Sequence[Chosen]) -> list[str]:
    """A sentence about plans that lack the adapters."""
    said = " ".join(f"--lora {one.typed}" for one in adapters)
    return [
        f"The plans in {folder} lack these adapters and are not used. For TensorRT type: hd-engines merge {folder} OUT "
        f"{said}, then hd-engines build OUT, and run OUT."
    ]


def choose(folder: Path, backend: str, device: str, threads: int | None = None, pictures: int = 1) -> Choice:
    """What `--backend` and `--device` mean for a folder on this machine, for a run of so many pictures.

    "auto" takes a backend of the GPU whose plans the folder has, else what Inductor compiled if it was measured to be
    faster, else ONNX Runtime on a GPU, else a backend of the CPU that is measured to be faster and near enough, else
    ONNX Runtime on the CPU.
    Raises EngineError for names that are not in the table, and for a device that the backend cannot use.
    """
    if backend not in CHOICES:
        raise EngineError(f"backend must be one of {', '.join(CHOICES)}, got {backend!r}.")
    if device not in DEVICES:
        raise EngineError(f"device must be one of {', '.join(DEVICES)}, got {device!r}.")
    name = backend
    if backend == "auto":
        name = (backend_of_plans(folder) if device != "cpu" else None) or DEFAULT
    one = BACKENDS[name]
    if refusal := one.refusal(device):
        raise EngineError(refusal)
    target = one.devices[0] if len(one.devices) == 1 else one.on_host().device_for(folder, device)
    if target == "cuda" or name != DEFAULT:
        return Choice(name, target, [])
    sentences = idle_gpu() if device == "auto" else []
    for other in BACKENDS.values() if backend == "auto" else ():
        if other.auto and other.host and other.installed():
            takes, said = worth_it(other, folder, threads, pictures)
            sentences += said
            if takes:
                return Choice(other.name, "cpu", sentences)
    return Choice(DEFAULT, "cpu", sentences)


def backend_of_plans(folder: Path) -> str | None:
    """The first backend whose plans in the folder run on this machine's GPU. Warns where plans do not run.

    What Inductor compiled counts only where its step was measured to be faster than ONNX Runtime's.
    """
    made_for = {plan.parts["backend"] for plan in PlanStore(folder)}
    names = [runner(name) for name in GPU_PLANNED if name in made_for and BACKENDS[name].auto]
    compiled = "inductor" in made_for and BACKENDS["inductor"].installed()
    if not names and not compiled:
        return None
    try:
        cuda, manifest = Cuda(), Manifest.load(folder, verify=False)
    except EngineError as error:
        warnings.warn(f"The plans in {folder} are not used. {error}", RuntimeWarning, stacklevel=3)
        return None
    for name in names:
        try:
            BACKENDS[name].on_gpu().check_plans(name, folder, manifest, cuda)
            return name
        except EngineError as error:
            warnings.warn(f"ONNX Runtime is used instead of {name}. {error}", RuntimeWarning, stacklevel=3)
    return "inductor" if compiled and faster_compiled(folder, manifest, cuda) else None


def faster_compiled(folder: Path, manifest: Manifest, cuda: Cuda) -> bool:
    """Whether the folder has a step that Inductor compiled for this GPU, and that was faster than ONNX Runtime's."""
    try:
        found = find_compiled(folder, manifest, Here((version("torch") or "").partition("+")[0], True), "cuda")
    except EngineError:
        return False
    plans = [plan for _, plan in found.shapes["unet"]]
    for_this = f"cuda sm_{cuda.compute_capability.replace('.', '')}"
    verdicts = [verdict.read_beside(plan.path) for plan in plans if plan.parts["target"] == for_this]
    return any(one is not None and one.passes for one in verdicts)


def worth_it(one: Backend, folder: Path, threads: int | None, pictures: int) -> tuple[bool, list[str]]:
    """Whether a run of so many pictures should take this backend of the CPU, and a sentence that says why.

    It is measured once, on a few pictures. The verdict is kept beside the compiled UNet.
    """
    if not one.measured:
        return True, []
    module = one.on_host()
    manifest, inference = Manifest.load(folder, verify=False), module.inference()
    shelf = module.shelf_of(folder, manifest, inference)
    found = verdict.read(shelf)
    if manifest.base != "fp32" or pictures < (found.pays if found else MIN_PICTURES_COMPILED[inference]):
        return False, []
    if found is None and not shelf.keeps("unet"):
        return False, [
            f"{one.name} may make these pictures in less time, and was not compiled for this bundle: "
            f"hd-engines build {folder} --backend {one.name} --batch-sizes 1."
        ]
    try:
        found = found or compare_backend(folder, one.name, threads=threads)
    except EngineError as error:
        return False, [f"ONNX Runtime is used instead of {one.name}. {error}"]
    if not found.passes:
        return False, [f"ONNX Runtime makes these pictures: {one.name} was {found}."]
    if manifest.precision != "fp32":
        return True, [f"{one.name} makes these pictures in {manifest.precision} and {inference}, {found}."]
    return True, [f"{one.name} makes these pictures in {inference}, {found}. --backend {DEFAULT} makes the exact ones."]


def idle_gpu() -> list[str]:
    """A sentence about a GPU of this machine that stays unused, if there is one."""
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
