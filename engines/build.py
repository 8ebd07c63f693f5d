"""Builds the missing plans of a bundle with TensorRT or TensorRT for RTX. Needs no torch.

    for built in build("tensorrt-rtx", "engines/", Wanted(batch_sizes=(1, 4))):
        print(built.plan.graph, built.why or "cached")

By default each batch size and each size of pictures gets a static plan of its own, because static engines are faster,
and another size later builds its own plans alone. `dynamic` makes one plan for all batch sizes up to the largest.
`shared` makes one plan that is compiled for each size: the same kernels over one copy of the weights. Another size then
means building it all again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..contract import BRANCHES, MAX_ROWS, SIDES, Manifest
from ..errors import EngineError
from .backends import BACKENDS
from .base import check_gpu
from .cuda import Cuda
from .plans import Built, OnBuild, PlanStore, Sizes, Wanted, parts, picture_sizes
from .refit import check_refits, options_by_graph
from .tensorrt import EVERYWHERE, NAMES, TURING, Options, TensorRT, fits
from .tensorrt_build import OnProgress, build_plan

BATCH_SIZES = (1, 2, 4, 8)  # unless others are asked for
# Steps of a schedule that unet_time takes at once: cheap, so one dynamic plan does for all.
SCHEDULE_LENGTHS = (1, 20, 1000)
WEIGHTS_MAY = 0.5  # of a GPU's memory: the rest is for other graphs, scratch and what runs beside
FP8_TARGETS = ("8.9", "12.0")  # compute capabilities of TensorRT-RTX's plans in fp8, unless the user names GPUs


def wanted_plans(manifest: Manifest, wanted: Wanted) -> list[tuple[str, Sizes]]:
    """Graphs and sizes to build for. Raises EngineError for impossible sizes.

    The hand prior, which is small and by default not guided, always gets both kinds: with both guidance branches, and
    with the conditional one alone.
    """
    sizes = sorted(set(wanted.batch_sizes or BATCH_SIZES))
    if sizes[0] < 1 or sizes[-1] > MAX_ROWS:
        raise EngineError(f"batch_sizes must be 1 to {MAX_ROWS}, got {', '.join(map(str, wanted.batch_sizes))}.")
    if wanted.dynamic and wanted.shared:
        raise EngineError("A plan takes a range of sizes or each of several: leave out --dynamic or --shared-weights.")
    batches: list[Sizes] = [{"B": size} for size in sizes]
    if wanted.dynamic:
        batches = [{"B": (1, sizes[-1], sizes[-1])}]
    elif wanted.shared and len(sizes) > 1:
        batches = [{"B": sizes}]
    pictures = picture_sizes(manifest, wanted.pictures)
    out: list[tuple[str, Sizes]] = []
    for name, spec in manifest.graphs.items():
        sides: list[Sizes] = []
        for size in pictures:
            some = {axis: n for axis, n in manifest.sides(size).items() if axis in spec.free}
            sides += [some] if some not in sides else []
        shapes: list[tuple[Sizes, Sizes]] = [(batch, some) for some in sides for batch in batches]
        if wanted.shared and len(sides) > 1:  # a profile for each pair of batch size and size
            pairs = [{**batch, **some} for some in sides for batch in ({"B": size} for size in sizes)]
            axes = {axis: [pair[axis] for pair in pairs] for axis in pairs[0]}
            several: dict[str, Any] = {axis: numbers for axis, numbers in axes.items() if axis in ("B", *SIDES)}
            shapes = [({"B": several.pop("B")}, {**sides[0], **several})]
        if spec.free == ["S"]:
            out.append((name, {"S": SCHEDULE_LENGTHS}))
        elif BRANCHES in spec.free:
            branches = (2, 1) if name == "hand_prior" or (wanted.guidance_free and spec.dominant) else (2,)
            out += [(name, {**batch, BRANCHES: count, **some}) for count in branches for batch, some in shapes]
        else:
            out += [(name, {**batch, **some}) for batch, some in shapes]
    return out


def fitting(folder: Path, wanted: Wanted, cuda: Cuda | None) -> tuple[Wanted, str]:
    """What to build where a copy of the UNet's weights for each batch size would not fit the GPU, and why.

    Else what was asked for, and "". The one plan for all sizes may be slower, so it is taken for need only.
    """
    sizes = len(set(wanted.batch_sizes or BATCH_SIZES)) * (2 if wanted.guidance_free else 1)
    sizes *= len({*wanted.pictures, Manifest.load(folder, verify=False).image_size})
    if cuda is None or wanted.shared or wanted.dynamic or sizes == 1:
        return wanted, ""
    file = folder / Manifest.load(folder, verify=False).graphs["unet"].file
    files = (file, file.with_name(file.name + ".data"))
    needed, there = sizes * sum(one.stat().st_size for one in files if one.exists()), cuda.memory()
    if needed <= WEIGHTS_MAY * there:
        return wanted, ""
    return replace(wanted, shared=True), (
        f"{sizes} copies of the UNet's weights would take {needed / 1e9:.1f} of this GPU's {there / 1e9:.1f} GB, so "
        "one plan serves all of them (--shared-weights). Name fewer --batch-sizes or --sizes for a plan each."
    )


def build(name: str, folder: str | Path, wanted: Wanted, on_build: OnBuild | None = None) -> Iterator[Built]:
    """Yields every plan the folder should hold, building those that are missing, damaged or stale.

    name: "tensorrt" or "tensorrt-rtx". Finished plans are hashed (about 1 s a GB). They stay when a later build fails
    or is interrupted. Raises BundleError for a damaged bundle, EngineError when the backend is missing or refuses.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder, verify=False)
    if manifest.precision != "fp32" and manifest.base == "fp32":
        raise EngineError(f"{folder} is in {manifest.precision} for OpenVINO. Export it again with --backend {name}.")
    backend = TensorRT(name)
    cuda = gpu()
    if cuda is not None and not (wanted.options and wanted.options.compute_capabilities):  # it is for this very GPU
        check_gpu(manifest, cuda)
    store, options = PlanStore(folder), backend.for_gpu(options_for(manifest, backend, wanted.options), cuda)
    target = backend.target(options, cuda)
    check_refits(backend, options, cuda)
    jobs, of_graph = wanted_plans(manifest, wanted), options_by_graph(folder, options)
    verified = False
    for number, (graph, sizes) in enumerate(jobs):
        needed = parts(manifest, graph, sizes, name, backend.version, target, of_graph(graph))
        plan, why = store.find(needed, verify=True), ""
        if plan is None:
            if not verified:  # a build reads the bundle's files, and a finished plan does not
                for problem in manifest.problems(folder):
                    raise EngineError(f"{problem} Export the bundle again with hd-export.")
                verified = True
            why = store.why(needed)
            tell = _reporter(on_build, number, len(jobs), graph, sizes, why)
            started, timings = time.monotonic(), store.folder.parent / "timings.cache"
            file = folder / manifest.graphs[graph].file
            content, proof = build_plan(backend, file, sizes, manifest.precision, of_graph(graph), tell, timings)
            plan = store.add(needed, content, proof, time.monotonic() - started)
        yield Built(plan, why)


def version(name: str) -> str:
    """The installed package's, such as "1.7.1". Raises EngineError where it cannot be imported."""
    return TensorRT(name).version


def elsewhere(name: str, made_for: str) -> str:
    """Why a plan for this target does not serve this machine; "" where it may."""
    if name == "tensorrt" and (here := gpu()) is not None and not fits(made_for, here):
        return "for another GPU"
    return ""


def options_for(manifest: Manifest, backend: TensorRT, options: Options | None) -> Options:
    """The build options of a bundle. Plans in fp8 are for the GPUs that have it, unless the user names others."""
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


def choose_builder(cuda: Cuda | None) -> tuple[str, str]:
    """The backend to build for on this machine, and a sentence that names its GPUs.

    TensorRT-RTX where it runs on the GPU, else TensorRT. Without a GPU only TensorRT-RTX builds.
    Raises EngineError where that backend is not installed.
    """
    found, problem = {}, ""
    for name in NAMES:
        try:
            found[name] = TensorRT(name)
        except EngineError as error:
            problem = str(error)
    if cuda is None:
        if "tensorrt-rtx" not in found:
            raise EngineError(
                "This machine has no usable GPU, and TensorRT-RTX, which builds without one, is not installed: "
                f"{BACKENDS['tensorrt-rtx'].install}. Or build on the machine that has the GPU."
            )
        return "tensorrt-rtx", (
            f"This machine has no usable GPU: TensorRT-RTX builds for all GPUs of compute capability {EVERYWHERE} "
            f"(--compute-capability names others, such as {TURING}). On Hopper and B200 themselves TensorRT builds."
        )
    fitting = [name for name in ("tensorrt-rtx", "tensorrt") if name in found and not found[name].refusal(cuda)]
    if fitting:
        return fitting[0], f"Building with {fitting[0]} for {cuda.name} (compute capability {cuda.compute_capability})."
    raise EngineError(found["tensorrt-rtx"].refusal(cuda) if found else problem)


def check_build(name: str, options: Options) -> None:
    """Raises EngineError unless this backend builds plans on this machine with these options."""
    backend, cuda = TensorRT(name), gpu()
    backend.target(backend.for_gpu(options, cuda), cuda)
    check_refits(backend, options, cuda)


def gpu() -> Cuda | None:
    """The GPU of this machine, or None."""
    try:
        return Cuda()
    except EngineError:
        return None
