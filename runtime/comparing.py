"""Measures on this machine what a backend of the CPU costs and gains: see `engines/verdict.py`.

verdict = compare_backend(folder, "openvino")            # measured, and kept beside the compiled UNet
if verdict.passes: ...                                   # near enough, and faster
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from ..contract import Manifest
from ..engines import Engine, load_engines
from ..engines.backends import BACKENDS
from ..engines.verdict import Verdict, mean_psnr, psnr, write
from ..errors import EngineError
from .adapting import Adapting
from .bundle import Bundle
from .host import HostLoop
from .requests import Request, Resolver, resolve
from .results import Failure, Picture

COMPARED_STEPS = (
    4  # of a picture at most: more come no farther from float32, and a large model's step takes half a minute
)
ALIKE, TURNS, TURNS_SECONDS = 5, 15, 15.0  # turns that must agree; most turns, and the CPU seconds after which it ends
PROMPTS = (
    "a right hand making a fist, blue background",
    "two open hands",
    "a left hand giving a thumbs up",
    "a right hand pointing",
)


def load_host_loop(
    folder: Path,
    backend: str,
    slots: int = 1,
    threads: int | None = None,
    pictures: int = 1,
    lora_memory: int | None = None,
) -> HostLoop:
    """The loop of a backend of the CPU. ONNX Runtime runs the graphs that the backend leaves out.

    lora_memory: see `Adapting`.

    Raises BundleError for a damaged bundle, EngineError where the backend cannot run it.
    """
    one = BACKENDS[backend]

    def others(manifest: Manifest) -> Mapping[str, Engine]:
        found: Mapping[str, Engine] = one.on_host().host_engines(folder, manifest, threads, slots, pictures)
        return found

    def adapted(made: Path, graphs: Collection[str]) -> Mapping[str, Engine]:
        def others(manifest: Manifest) -> Mapping[str, Engine]:
            load = one.on_host().host_engines
            found: Mapping[str, Engine] = load(made, manifest, threads, slots, pictures, only=graphs)
            return found

        return load_engines(made, "cpu", threads, False, others, graphs)[1]

    manifest, engines = load_engines(folder, "cpu", threads, others=others)
    adapting = None if one.compiles else Adapting(folder, adapted, lora_memory)  # compiled code has one set of weights
    loop = HostLoop(Bundle.load(folder, manifest), engines, slots, adapting)
    loop.bundle.engine_sizes = getattr(engines["unet"], "sizes", None)
    if loop.bundle.engine_sizes is not None:  # compiled for shapes
        loop.bundle.reader.engine_chunks = 1
    loop.bundle.build_sizes = f"hd-export CHECKPOINT {folder} --backend {backend} --sizes"
    if one.measured:
        loop.bundle.made_by |= {"backend": backend, "inference": one.on_host().inference()}
    return loop


def compare_backend(folder: Path, backend: str, count: int = 2, threads: int | None = None) -> Verdict:
    """Makes `count` pictures with a backend of the CPU and with ONNX Runtime. Keeps the verdict beside the UNet."""
    load_engines(folder, "cpu", threads)  # makes what is missing, which later runs find; and so does the next line
    load_host_loop(folder, backend, threads=threads)
    started = time.process_time()
    loop = load_host_loop(folder, backend, threads=threads)
    between = time.process_time()
    manifest, exact = load_engines(folder, "cpu", threads)
    ready = max(0.0, (between - started) - (time.process_time() - between))
    fast = {name: timed.engine for name, timed in loop.engines.items()}
    verdict = measure(loop.bundle, exact, fast, ready, count)
    module = BACKENDS[backend].on_host()
    write(module.shelf_of(folder, manifest, module.inference()), verdict)
    return verdict


def measure(
    bundle: Bundle, exact: Mapping[str, Engine], fast: Mapping[str, Engine], ready: float = 0.0, count: int = 2
) -> Verdict:
    """Makes `count` pictures or more with both, in alternation; of several, one more to warm up. Raises EngineError
    where one fails.

    Times are CPU seconds, which other processes on this machine change least. They still change them by a tenth. So
    pictures of a small model are made until ALIKE turns, and no other one, say the same, and at most TURNS times. The
    median of the turns' ratios counts.
    """
    loops = [HostLoop(bundle, engines, 1) for engines in (exact, fast)]
    requests = asked(bundle, count)
    turns: list[tuple[float, float]] = []
    distances = []
    if count > 1:  # pays for memory and kernels; a large model's picture takes minutes
        for loop in loops:
            timed(loop, requests[0])
    while len(turns) < count or (
        len(turns) < TURNS and sum(map(sum, turns)) < TURNS_SECONDS and not _alike([b < a for a, b in turns])
    ):
        (one, exact_took), (other, fast_took) = (timed(loop, requests[len(turns) % count]) for loop in loops)
        distances.append(psnr(one.image, other.image))
        turns.append((exact_took, fast_took))
    exactly = statistics.median(seconds[0] for seconds in turns)
    ratio = statistics.median(seconds[1] / seconds[0] for seconds in turns)
    return Verdict(mean_psnr(distances), exactly, exactly * ratio, ready)


def _alike(faster: list[bool]) -> bool:
    return len(faster) >= ALIKE and len(set(faster)) == 1


def asked(bundle: Bundle, count: int) -> list[Request]:
    """`count` requests of a few steps, with the bundle's defaults for the rest."""
    steps = min(COMPARED_STEPS, bundle.manifest.defaults["steps"])
    some = [Request(prompt, seed=seed, steps=steps) for seed, prompt in enumerate(PROMPTS[:count])]
    return resolve(some, Resolver(bundle.manifest.defaults))[0]


def timed(loop: HostLoop, request: Request) -> tuple[Picture, float]:
    """A picture, and the CPU seconds that it took. Raises EngineError where it fails."""
    started = time.process_time()
    (result,) = loop.run([request], lambda kind, count: None)
    if isinstance(result, Failure):
        raise EngineError(f"{request.prompt!r}: {result.sentence}")
    return result, time.process_time() - started
