"""Builds the plans of an engines folder, those that are not there yet. Needs no torch: a bundle is enough.

    for built in build_plans("engines/", "tensorrt-rtx", batch_sizes=[1, 4]):
        print(built.plan.graph, built.why or "cached")

By default each batch size gets a static plan of its own, because static engines are faster; `dynamic` makes one plan
for all sizes up to the largest. `shared` makes one plan that is compiled for each size: the same kernels over one copy
of the weights, and another size means all anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..contract import BRANCHES, GRAPHS, Manifest
from ..errors import EngineError
from .base import check_gpu
from .cuda import Cuda
from .openvino import load_openvino, shelf_of, wanted_sizes
from .plans import MODULES, Plan, PlanStore, Sizes, parts, size_text
from .tensorrt import EVERYWHERE, FP8_TARGETS, FREE_MAX, TURING, Backend, OnProgress, Options

# Steps of a schedule that unet_time takes at once: cheap, so one dynamic plan does for all.
STEPS = (1, 20, 1000)


@dataclass
class Built:
    """One plan of the list: `why` says why it was built, and is empty when it was there."""

    plan: Plan
    why: str


# Called before and while a plan is built: (number of the plan, of so many, graph, sizes, why, done 0..1) -> go on?
OnBuild = Callable[[int, int, str, Sizes, str, float], bool]


def wanted_plans(
    manifest: Manifest,
    batch_sizes: Sequence[int],
    dynamic: bool = False,
    guidance_free: bool = False,
    shared: bool = False,
) -> list[tuple[str, Sizes]]:
    """Graphs and sizes to build for. Raises EngineError for sizes that make no sense.

    guidance_free: also UNets that run the conditional branch alone. The hand prior, which is small and by default not
    guided, has both always.
    """
    sizes = sorted(set(batch_sizes))
    if not sizes or sizes[0] < 1 or sizes[-1] > FREE_MAX["B"]:
        raise EngineError(
            f"Batch sizes must be 1 to {FREE_MAX['B']}; got {', '.join(map(str, batch_sizes)) or 'none'}."
        )
    if dynamic and shared:
        raise EngineError("A plan is for a range of sizes or for each: leave out --dynamic or --shared-weights.")
    batches: list[Sizes] = [{"B": size} for size in sizes]
    if dynamic:
        batches = [{"B": (1, sizes[-1], sizes[-1])}]
    elif shared and len(sizes) > 1:
        batches = [{"B": sizes}]
    out: list[tuple[str, Sizes]] = []
    for name in GRAPHS:
        free = {size for tensor in manifest.graphs[name].inputs for size in tensor.shape if isinstance(size, str)}
        if free == {"S"}:
            out.append((name, {"S": STEPS}))
        elif BRANCHES in free:
            branches = (2, 1) if name == "hand_prior" or (guidance_free and name == "unet") else (2,)
            out += [(name, {**batch, BRANCHES: count}) for count in branches for batch in batches]
        else:
            out += [(name, batch) for batch in batches]
    return out


def current_parts(
    manifest: Manifest,
    backend: Backend,
    cuda: Cuda | None,
    batch_sizes: Sequence[int],
    dynamic: bool = False,
    options: Options | None = None,
    guidance_free: bool = False,
    shared: bool = False,
) -> list[tuple[str, Sizes, dict[str, str]]]:
    """Graph, sizes and parts of every plan that a folder should hold for this machine."""
    options = options_for(manifest, backend, options)
    target = backend.target(options, cuda)
    return [
        (name, sizes, parts(manifest, name, sizes, backend.name, backend.version, target, options))
        for name, sizes in wanted_plans(manifest, batch_sizes, dynamic, guidance_free, shared)
    ]


def build_plans(
    folder: str | Path,
    backend_name: str,
    batch_sizes: Sequence[int] = (1, 2, 4, 8),
    dynamic: bool = False,
    options: Options | None = None,
    on_build: OnBuild | None = None,
    guidance_free: bool = False,
    shared: bool = False,
) -> Iterator[Built]:
    """Yields every plan the folder should hold, building those that are missing, damaged or stale.

    Plans that are there are hashed (about 1 s a GB). What is built stays when a later one fails or is interrupted.
    Raises BundleError for a folder that is no bundle or damaged, EngineError when the backend is missing or refuses.
    """
    if backend_name not in MODULES:
        raise EngineError(f"There is no backend {backend_name!r} that builds plans; there are {', '.join(MODULES)}.")
    folder = Path(folder)
    manifest = Manifest.load(folder, verify=False)
    if manifest.precision != "fp32" and manifest.base == "fp32":
        raise EngineError(
            f"{folder} is in {manifest.precision} for OpenVINO. Export it again with --backend {backend_name}."
        )
    backend = Backend(backend_name)
    cuda = gpu()
    if cuda is not None and not (options and options.compute_capabilities):  # it is for this very GPU
        check_gpu(manifest, cuda)
    store, options = PlanStore(folder), backend.for_gpu(options_for(manifest, backend, options), cuda)
    jobs = current_parts(manifest, backend, cuda, batch_sizes, dynamic, options, guidance_free, shared)
    verified = False
    for number, (name, sizes, wanted) in enumerate(jobs):
        plan, why = store.find(wanted, verify=True), ""
        if plan is None:
            if not verified:  # what is built from must be what the manifest says; hits need no look at it
                for problem in manifest.problems(folder):
                    raise EngineError(f"{problem} Export the bundle again with hd-export.")
                verified = True
            why = store.why(wanted)
            tell = _reporter(on_build, number, len(jobs), name, sizes, why)
            started = time.monotonic()
            file = folder / manifest.graphs[name].file
            content, proof = backend.build(
                file, sizes, manifest.precision, options, tell, store.folder.parent / "timings.cache"
            )
            plan = store.add(wanted, content, proof, time.monotonic() - started)
        yield Built(plan, why)


def build_openvino(
    folder: str | Path, batch_sizes: Sequence[int] = (1,), guidance_free: bool = False, on_build: OnBuild | None = None
) -> Iterator[Built]:
    """Yields what OpenVINO is to compile of a folder for this processor, in bfloat16, compiling what is missing.

    Raises BundleError for a damaged folder, EngineError where OpenVINO is missing or the processor has no bfloat16.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    if manifest.base != "fp32":
        raise EngineError(
            f"{folder} is in {manifest.precision}, and made for TensorRT; OpenVINO rounds a float32 bundle to bfloat16 "
            "itself. Export it with --backend openvino."
        )
    store, shelf = PlanStore(folder), shelf_of(folder, manifest, "bf16")
    engines = load_openvino(folder, manifest)
    jobs = [
        (name, engine, sizes)
        for name, engine in engines.items()
        for sizes in wanted_sizes(engine.spec, manifest, sorted(set(batch_sizes)), guidance_free)
    ]
    for number, (name, engine, sizes) in enumerate(jobs):
        wanted = shelf.parts(name, sizes)
        plan, why = store.find(wanted, verify=True), ""
        if plan is None:
            why = store.why(wanted)
            if on_build is not None:
                on_build(number, len(jobs), name, sizes, why, 0.0)
            engine.prepare(sizes, beside=True)  # type: ignore[attr-defined]
            plan = store.find(wanted)
            assert plan is not None, f"{name} {size_text(sizes)} was compiled and is not there"
        yield Built(plan, why)


def options_for(manifest: Manifest, backend: Backend, options: Options | None) -> Options:
    """The build options of a bundle: plans in fp8 are for the GPUs that have it, unless others are named."""
    options = options or Options()
    if manifest.precision == "fp8" and backend.rtx and not options.compute_capabilities:
        return replace(options, compute_capabilities=FP8_TARGETS)
    return options


def _reporter(
    on_build: OnBuild | None, number: int, total: int, name: str, sizes: Sizes, why: str
) -> OnProgress | None:
    if on_build is None:
        return None
    on_build(number, total, name, sizes, why, 0.0)
    return lambda _, done: on_build(number, total, name, sizes, why, done)


def choose_backend(cuda: Cuda | None) -> tuple[str, str]:
    """The backend to build for on this machine, and a sentence that says for which GPUs that is.

    TensorRT-RTX where it runs on the GPU, else TensorRT; without a GPU only TensorRT-RTX builds.
    Raises EngineError where the one to take is not installed.
    """
    installed = {}
    for name in MODULES:
        try:
            installed[name] = Backend(name)
        except EngineError as error:
            problem = str(error)
    if cuda is None:
        if "tensorrt-rtx" not in installed:
            raise EngineError(
                "There is no GPU here, and TensorRT-RTX, which builds without one, is not installed: pip install "
                '"handiffuser[tensorrt-rtx]". Or build on the machine that has the GPU.'
            )
        return "tensorrt-rtx", (
            f"No GPU here: TensorRT-RTX builds for all GPUs of compute capability {EVERYWHERE} (--compute-capability "
            f"names others, such as {TURING}). Plans for Hopper and B200 are built there, by TensorRT."
        )
    fitting = [name for name in ("tensorrt-rtx", "tensorrt") if name in installed and not installed[name].refusal(cuda)]
    if fitting:
        return fitting[0], f"Building with {fitting[0]} for {cuda.name} (compute capability {cuda.compute_capability})."
    raise EngineError(installed["tensorrt-rtx"].refusal(cuda) if installed else problem)


def check_backend(name: str, options: Options) -> None:
    """Raises EngineError unless this backend builds plans on this machine, for what `options` ask."""
    backend, cuda = Backend(name), gpu()
    backend.target(backend.for_gpu(options, cuda), cuda)


def gpu() -> Cuda | None:
    """The GPU of this machine, or None."""
    try:
        return Cuda()
    except EngineError:
        return None
