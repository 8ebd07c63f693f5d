"""The verdict on a lower precision: whether its pictures are near enough, and whether it is faster.

    verdict = Verdict(psnr=41.0, exact=0.30, fast=0.12)
    if not verdict.passes:
        print(*verdict.sentences("int8", "bfloat16"))

Every bar that a precision must clear is here. What measures for it:

- `export/check.py`: each graph beside PyTorch while it is exported, with the tolerances of `export/bundle.py`;
- `calibration/fidelity.py`: each graph and whole pictures of a bundle beside the float32 bundle;
- `runtime/comparing.py`: pictures and CPU time of a backend that lowers a float32 bundle, beside ONNX Runtime;
- `engines/timing.py`: steps of the UNet on a GPU, in eight bits beside float16, and Inductor's beside ONNX Runtime's.

A verdict is kept beside the compiled UNet that it is about, so another graph, processor or version has none.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta

from ..files import written
from ..schema import MisfitError, fit, read_json
from .plans import VERDICT, usual
from .shelf import Shelf

PSNR_MUST = 35.0  # dB, mean over pictures: above it, two pictures side by side look the same
# Root mean square error of each graph's outputs, relative. bfloat16 has 3 bits less than float16, eight bits fewer
# still. The pictures decide.
RMS_MAY = {"fp16": 1e-2, "bf16": 5e-2, "fp8": 5e-2, "int8": 5e-2}
EQUAL = 1000.0  # dB, in place of the infinity of equal pictures
NEVER = 1 << 60  # pictures

Seconds = Annotated[float, Meta(ge=0, le=1e9, description="a time in seconds")]


@dataclass
class Verdict:
    """What was measured of a precision beside a more exact one."""

    psnr: Annotated[float, Meta(ge=0, le=EQUAL)]  # dB, mean over the pictures; EQUAL where all are, or none was made
    exact: Seconds  # of a picture or a step in the more exact precision: CPU seconds, or seconds of a GPU
    fast: Seconds  # of the same one in the lower precision
    ready: Seconds = 0.0  # until the first picture can begin, beyond what the exact one needs
    sizes: Annotated[str, Meta(max_length=100)] = ""  # of the step, as in a plan's parts: "B=4,G=2"

    @property
    def near(self) -> bool:
        return self.psnr >= PSNR_MUST

    @property
    def faster(self) -> bool:
        return self.fast < self.exact

    @property
    def passes(self) -> bool:
        return self.near and self.faster

    @property
    def pays(self) -> int:
        """The number of pictures of a run from which on it takes less time in the lower precision."""
        return 1 + math.floor(self.ready / (self.exact - self.fast)) if self.passes else NEVER

    def sentences(self, precision: str, other: str) -> list[str]:
        """A sentence for each bar that it fails."""
        found = []
        if not self.faster:
            found.append(
                f"{precision} takes {self.fast * 1e3:.0f} ms of CPU time a picture and {other} "
                f"{self.exact * 1e3:.0f} ms."
            )
        if not self.near:
            found.append(
                f"Pictures in {precision} must be at least {PSNR_MUST:.0f} dB from those in {other}, got "
                f"{self.psnr:.0f} dB, in {self.fast / self.exact:.2f} of the time."
            )
        return found

    def __str__(self) -> str:
        return (
            f"{self.exact / self.fast:.2f} times as fast as ONNX Runtime here and {self.psnr:.0f} dB from its pictures"
        )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, dB; infinite where they are equal."""
    error = np.square(a.astype(np.float64) - b).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


def mean_psnr(values: list[float]) -> float:
    """dB over the pictures that differ, so that an equal one does not hide another; EQUAL where all are equal."""
    differing = [value for value in values if value < math.inf]
    return sum(differing) / len(differing) if differing else EQUAL


def read(shelf: Shelf) -> Verdict | None:
    """The verdict beside the UNet on this shelf; None where it cannot be read."""
    path = _path(shelf)
    return None if path is None else read_beside(path)


def read_beside(plan: Path) -> Verdict | None:
    """The verdict beside a plan; None where it cannot be read."""
    try:
        return fit(read_json(plan.with_suffix(VERDICT)), Verdict)
    except (OSError, MisfitError):
        return None


def write(shelf: Shelf, verdict: Verdict) -> None:
    """Writes a verdict beside the UNet, where the shelf holds the UNet."""
    path = _path(shelf)
    if path is not None:
        write_beside(path, verdict)


def write_beside(plan: Path, verdict: Verdict) -> None:
    """Writes a verdict beside a plan, where that can be written to."""
    try:
        with written(plan.with_suffix(VERDICT)) as temporary:
            temporary.write_text(json.dumps(asdict(verdict)), encoding="utf-8")
    except OSError:
        pass  # the next run measures again


def _path(shelf: Shelf) -> Path | None:
    found = shelf.plan("unet", usual(shelf.manifest.graphs["unet"], shelf.manifest))
    return None if found is None else found[1].path
