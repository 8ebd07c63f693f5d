"""Whether a bundle in half precision is true enough to float32; what does not hold is kept in float32.

    report, kept = admit(checkpoint, Path("work/candidate"), body=None, opset=23)

The candidate is run beside a float32 bundle of the same checkpoint: every graph on what it sees in a real run, and the
pictures of the same seeds. When it fails, the nodes that overflow or lose too much are put into float32, and it is
measured again. The report goes into the candidate's manifest.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..calibration.fidelity import Report, fidelity
from ..calibration.mixed import keep_sensitive
from ..calibration.record import record
from ..contract import Manifest
from ..models.checkpoint import Checkpoint
from .bundle import export_bundle

# UNet parameters up to which both bundles are run on a CPU without being asked to: minutes, not hours.
SMALL = 100_000_000


def is_small(checkpoint: Checkpoint) -> bool:
    """Whether comparing precisions on a CPU takes minutes at most."""
    return sum(parameter.numel() for parameter in checkpoint.unet.parameters()) <= SMALL


def admit(
    checkpoint: Checkpoint,
    candidate: Path,
    body: Path | None,
    opset: int,
    on_step: Callable[[str], Any] = lambda _: None,
) -> tuple[Report, dict[str, list[str]]]:
    """Compares, mends if it must, and notes the outcome in the candidate's manifest.

    on_step: called with what begins, in words.
    Returns the report of what the candidate is now, and the names of the nodes that were put into float32, by graph.
    """
    kept: dict[str, list[str]] = {}
    with TemporaryDirectory(dir=candidate.parent) as folder:
        reference, mended = Path(folder) / "fp32", Path(folder) / "mended"
        export_bundle(
            checkpoint, reference, "fp32", body, opset, on_step=lambda graph, _: on_step(f"{graph} in float32")
        )
        on_step("pictures")
        report = fidelity(reference, candidate)
        if not report.passes:
            on_step("what must stay in float32")
            found = keep_sensitive(reference, candidate, mended, record(reference)[0])
            if found:
                on_step("pictures again")
                again = fidelity(reference, mended)
                if again.passes or len(again.sentences()) < len(report.sentences()):
                    report, kept = again, {graph: [node.name for node in nodes] for graph, nodes in found.items()}
                    shutil.rmtree(candidate)
                    mended.replace(candidate)
    manifest = Manifest.load(candidate, verify=False)
    manifest.made_by["fidelity"] = report.to_json()
    if kept:
        manifest.made_by["kept_in_float32"] = kept
    manifest.save(candidate)
    return report, kept
