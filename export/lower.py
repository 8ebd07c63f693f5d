"""Makes a bundle of lower precision near enough to float32: parts that lose too much keep a higher precision.

    report, kept = mend(checkpoint, Path("work/candidate"), body=None, opset=23)
    report, kept = quantize(checkpoint, Path("work/candidate"), "int8", body=None, opset=23)

The candidate runs beside a float32 bundle of the same checkpoint: every graph on the inputs of a real run, and pictures
of the same seeds. When it fails, the nodes that overflow or lose too much go into float32, and it is measured again.
Likewise the quantised layers that lose most stay unquantised. The candidate's manifest gets the report. The bars are in
`engines/verdict.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..calibration.fidelity import Report, beside_bfloat16, fidelity
from ..calibration.mixed import keep_sensitive
from ..calibration.quantize import Group, calibrate, quantize_bundle
from ..calibration.record import record
from ..contract import Manifest
from ..cpu import cpu_name
from ..engines.openvino import WORDS, inference
from ..errors import EngineError
from ..models.checkpoint import Checkpoint
from .bundle import make_bundle

REFERENCE = "fp32"  # the folder beside a candidate; it is made in a workspace, where finished graphs stay
MAX_COMPARED_PARAMETERS = 100_000_000  # of a UNet, for a CPU to compare both bundles by default: minutes, not hours
QUANTIZED = ("unet", "image_decoder")  # most of a picture's time
CALIBRATION_SEEDS = (1,)  # scales come from other runs than the report, whose seed is 0
# Steps of the runs that give the scales where nothing is compared, with a row of each call. More steps of a large model
# take hours, and more rows gigabytes.
MAX_RECORDED_STEPS = 10
# Tried in turn until a report passes: (how much of the activations' unevenness moves into the weights, the share of
# layers that stay in float16). With more layers in float16 there is nothing to gain.
ATTEMPTS = ((0.0, 0.0), (0.5, 0.0), (0.5, 0.25), (0.5, 0.5))


def is_small(checkpoint: Checkpoint) -> bool:
    """Whether comparing precisions on a CPU takes minutes at most."""
    return sum(parameter.numel() for parameter in checkpoint.unet.parameters()) <= MAX_COMPARED_PARAMETERS


def mend(
    checkpoint: Checkpoint,
    candidate: Path,
    body: Path | None,
    opset: int,
    on_step: Callable[[str], Any] = lambda _: None,
) -> tuple[Report, dict[str, list[str]]]:
    """Compares a candidate, mends it where it fails, and writes the report into its manifest.

    on_step: called with what begins, in words.
    Returns the report on the candidate as it is now, and the names of the nodes that went into float32, by graph.
    """
    kept: dict[str, list[str]] = {}
    reference = candidate.with_name(REFERENCE)
    make_bundle(checkpoint, reference, "fp32", body, opset, on_step=lambda graph, _: on_step(f"{graph} in float32"))
    with TemporaryDirectory(dir=candidate.parent) as folder:
        mended = Path(folder) / "mended"
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
    shutil.rmtree(reference)
    manifest = Manifest.load(candidate, verify=False)
    manifest.made_by["fidelity"] = report.to_json()
    if kept:
        manifest.made_by["kept_in_float32"] = kept
    manifest.save(candidate)
    return report, kept


def quantize(
    checkpoint: Checkpoint, candidate: Path, kind: str, body: Path | None, opset: int, compare: bool = True
) -> tuple[Report | None, dict[str, list[str]]]:
    """Quantises a candidate and compares it. Layers that the report cannot do without stay unquantised.

    candidate: in float16, for TensorRT; or in float32, for OpenVINO, which then makes the report's pictures, too.
    kind: "fp8" or "int8". compare: without it the first attempt counts, from shorter runs, and there is no report.
    Returns the report on the candidate as it is now, and the names of the unquantised layers, by graph.

    Raises EngineError where int8 is not faster with OpenVINO on this processor than without. Without a comparison it
    also raises where one picture is not near enough.
    """
    for_cpu = Manifest.load(candidate, verify=False).base == "fp32"
    reference = candidate if for_cpu else candidate.with_name(REFERENCE)
    if not for_cpu:
        make_bundle(checkpoint, reference, "fp32", body, opset)
    with TemporaryDirectory(dir=candidate.parent) as folder:
        out = Path(folder) / "quantized"
        few: dict[str, Any] = {}
        if not compare:
            steps = Manifest.load(reference, verify=False).defaults["steps"]
            few = {"rows": 1, "steps": min(MAX_RECORDED_STEPS, steps)}
        inputs = record(reference, seeds=CALIBRATION_SEEDS, **few)[0]
        report, kept = None, {}
        for smooth, share in ATTEMPTS:
            groups = {name: calibrate(candidate / f"{name}.onnx", inputs[name], kind, smooth) for name in QUANTIZED}
            keep = most_lost(groups, share)
            shutil.rmtree(out, ignore_errors=True)
            manifest = quantize_bundle(candidate, out, groups, kind, keep)
            manifest.made_by["smooth"] = smooth
            kept = {name: sorted(nodes) for name, nodes in keep.items() if nodes}
            if compare:
                report = fidelity(reference, out, backend="openvino" if for_cpu else "")
                manifest.made_by["fidelity"] = report.to_json()
            manifest.save(out)
            gain = beside_bfloat16(reference, out, 1) if for_cpu and not compare else None
            if report.passes if report else gain is None or gain.near or not gain.faster:
                break
        if for_cpu:
            gain = gain or beside_bfloat16(reference, out, 4)
            if not gain.faster or not (compare or gain.near):
                raise EngineError(
                    f"{' '.join(gain.sentences(kind, WORDS[inference()]))} That is with OpenVINO on this processor "
                    f"({cpu_name()}). Nothing was written. Export without --precision."
                )
            manifest.made_by["beside_bfloat16"] = round(gain.exact / gain.fast, 3)
            manifest.save(out)
        shutil.rmtree(candidate)
        out.replace(candidate)
    if not for_cpu:
        shutil.rmtree(reference)
    return report, kept


def most_lost(groups: dict[str, list[Group]], share: float) -> dict[str, list[str]]:
    """The layers of each graph whose products lose most, up to a share of them. Those of one input go together."""
    kept: dict[str, list[str]] = {}
    for graph, found in groups.items():
        most = share * sum(len(group.nodes) for group in found)
        names: list[str] = []
        for group in sorted(found, key=lambda group: -group.error):
            if len(names) + len(group.nodes) > most:
                break
            names += group.nodes
        kept[graph] = names
    return kept
