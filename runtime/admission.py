"""Whether OpenVINO in bfloat16 is worth having for a bundle on this machine: measured once, and noted.

    admission = measure(bundle, exact, fast, ready=1.2)      # a few pictures by both, turn by turn
    if admission.passes: ...                                 # true enough, and faster
    write(shelf, admission); read(shelf)                     # beside the compiled UNet

A note is as long-lived as what it speaks of: another graph, processor or OpenVINO, and there is none.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta

from ..engines import Engine
from ..engines.openvino import usual
from ..engines.plans import ADMITTED, Shelf
from ..errors import EngineError
from ..schema import MisfitError, fit, read_json
from .bundle import Bundle
from .host import HostLoop
from .requests import Request, Resolver, resolve
from .results import Failure, Picture

PSNR_MUST = 35.0  # dB, mean over pictures: above it, two pictures side by side look the same
FIRST = 16  # pictures of a run from which on it is worth to compile, and to measure whether bfloat16 holds
STEPS = 4  # of a picture at most: more come no farther from float32, and a large model's step takes half a minute
PROMPTS = (
    "a right hand making a fist, blue background",
    "two open hands",
    "a left hand giving a thumbs up",
    "a right hand pointing",
)

Seconds = Annotated[float, Meta(ge=0, le=1e9, description="a time in seconds")]


@dataclass
class Admission:
    """What was measured."""

    psnr: Annotated[float, Meta(ge=0, le=1000)]  # dB, mean over the pictures; 1000 where all are equal
    exact: Seconds  # CPU seconds of a picture in float32 with ONNX Runtime
    fast: Seconds  # of the same picture with OpenVINO
    ready: Seconds  # until the first picture can begin, beyond what ONNX Runtime needs, from the cache

    @property
    def faster(self) -> bool:
        return self.fast < self.exact

    @property
    def passes(self) -> bool:
        return self.psnr >= PSNR_MUST and self.faster

    @property
    def pays(self) -> int:
        """Pictures of a run from which on it takes less time with OpenVINO."""
        return 1 + math.floor(self.ready / (self.exact - self.fast)) if self.passes else 1 << 60

    def __str__(self) -> str:
        return (
            f"{self.exact / self.fast:.2f} times as fast as ONNX Runtime here and {self.psnr:.0f} dB from its pictures"
        )


def measure(
    bundle: Bundle, exact: Mapping[str, Engine], fast: Mapping[str, Engine], ready: float, count: int = 2
) -> Admission:
    """Makes `count` pictures with both, in alternation; of several, one more to warm up. Raises EngineError where one
    fails.

    Times are CPU seconds: what else runs on this machine just now must not decide for all later runs.
    """
    loops = [HostLoop(bundle, engines, 1) for engines in (exact, fast)]
    requests = asked(bundle, count)
    seconds: tuple[list[float], list[float]] = ([], [])
    distances = []
    warm_up = requests[:1] if count > 1 else []  # pays for memory and kernels; a large model's picture takes minutes
    for request in (*warm_up, *requests):
        pair = []
        for loop, taken in zip(loops, seconds, strict=True):
            picture, spent = timed(loop, request)
            pair.append(picture)
            taken.append(spent)
        distances.append(psnr(*(picture.image for picture in pair)))
    differing = [value for value in distances[len(warm_up) :] if value < math.inf]
    mean = sum(differing) / len(differing) if differing else 1000.0
    exactly, fastly = (min(taken[len(warm_up) :]) for taken in seconds)
    return Admission(mean, exactly, fastly, ready)


def asked(bundle: Bundle, count: int) -> list[Request]:
    """`count` requests of a few steps, as the bundle's defaults have all else."""
    steps = min(STEPS, bundle.manifest.defaults["steps"])
    some = [Request(prompt, seed=seed, steps=steps) for seed, prompt in enumerate(PROMPTS[:count])]
    return resolve(some, Resolver(bundle.manifest.defaults))[0]


def timed(loop: HostLoop, request: Request) -> tuple[Picture, float]:
    """A picture, and the CPU seconds that it took. Raises EngineError where it cannot be made."""
    started = time.process_time()
    (result,) = loop.run([request], lambda kind, count: None)
    if isinstance(result, Failure):
        raise EngineError(f"{request.prompt!r}: {result.sentence}")
    return result, time.process_time() - started


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, dB; infinite where they are equal."""
    error = np.square(a.astype(np.float64) - b).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


def read(shelf: Shelf) -> Admission | None:
    """What was noted beside the UNet on this shelf; None where nothing was, or nothing that can be read."""
    try:
        path = _path(shelf)
        return None if path is None else fit(read_json(path), Admission)
    except (OSError, MisfitError):
        return None


def write(shelf: Shelf, admission: Admission) -> None:
    """Notes it, where the UNet was kept."""
    path = _path(shelf)
    if path is None:
        return
    try:
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(asdict(admission)), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        pass  # it is measured again


def _path(shelf: Shelf) -> Path | None:
    found = shelf.plan("unet", usual(shelf.manifest.graphs["unet"], shelf.manifest))
    return None if found is None else found[1].path.with_suffix(ADMITTED)
