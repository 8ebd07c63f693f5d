"""Which files PyTorch compiled of a bundle, found and told apart without PyTorch.

    found = find_compiled(folder, manifest, Here("2.13.0", gpu=True), "auto")
    found.device, found.sizes, found.batches(manifest, (512, 512))
    plan = found.plan("unet", manifest, (512, 512), batch=1, branches=2)

They are plans of `plans.py`, with its keys and its hashes. A graph without convolutions has one file for any batch,
with its weights. A graph with convolutions (PICTURES) has a file of code for each shape, and one of weights for all.
Axis T of the latter is the number of its tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..contract import BRANCHES, MAX_ROWS, PICTURES, Manifest, Size
from ..errors import EngineError
from .plans import Plan, PlanStore, Sizes, Wanted, belongs, picture_sizes

BATCH_SIZES = {"cpu": (1,), "cuda": (1, 4, 8)}  # unless others are asked for: each takes minutes to compile
ANY_BATCH = {"B": (1, 2, MAX_ROWS)}
WEIGHTS = "T"  # the axis of a file of weights


@dataclass(frozen=True)
class Options:
    """What a file depends on beside its shape. layout: of the convolutions. weights: where they are."""

    layout: str | None = None
    weights: str | None = None


class Here(NamedTuple):
    """PyTorch's version, and whether it sees a GPU."""

    version: str
    gpu: bool


class Compiled(NamedTuple):
    """The files of a bundle for one device.

    loose: graph -> its file for any batch. shapes: graph -> each shape, such as {"B": 1, "G": 2, "h": 64, "w": 64},
    with its file. weights: graph -> the file of its weights. sizes: of pictures that all graphs have files for.
    """

    device: str
    loose: dict[str, Plan]
    shapes: dict[str, list[tuple[dict[str, int], Plan]]]
    weights: dict[str, Plan]
    sizes: frozenset[Size]

    def batches(self, manifest: Manifest, size: Size, branches: int = 2) -> list[int]:
        """Batch sizes that all graphs have files for, rising; branches: of the UNet alone."""
        found = [
            {s["B"] for s, _ in some if manifest.size_at(s) == size and s.get(BRANCHES, branches) == branches}
            for some in self.shapes.values()
        ]
        return sorted(set.intersection(*found))

    def plan(self, graph: str, manifest: Manifest, size: Size, batch: int, branches: int = 2) -> Plan:
        """The file for a shape that is there."""
        return next(
            plan
            for shape, plan in self.shapes[graph]
            if shape["B"] == batch and shape.get(BRANCHES, branches) == branches and manifest.size_at(shape) == size
        )


def options_of(graph: str) -> Options:
    """The options that a graph is compiled with."""
    return Options("channels last", "apart") if graph in PICTURES else Options()


def wanted_files(manifest: Manifest, wanted: Wanted, device: str) -> list[tuple[str, Sizes]]:
    """Graphs and shapes to compile for. Raises EngineError for impossible sizes.

    The conditional branch alone is compiled where the bundle's own guidance is 1, or on request. A loop on a processor
    runs single rows, whatever else it may.
    """
    batches = sorted({*(wanted.batch_sizes or BATCH_SIZES[device]), *((1,) if device == "cpu" else ())})
    if batches[0] < 1 or batches[-1] > MAX_ROWS:
        raise EngineError(f"batch_sizes must be 1 to {MAX_ROWS}, got {', '.join(map(str, batches))}.")
    alone = wanted.guidance_free or manifest.defaults["guidance"] == 1
    out: list[tuple[str, Sizes]] = []
    for name, spec in manifest.graphs.items():
        if name not in PICTURES:
            out.append((name, ANY_BATCH))
            continue
        for size in picture_sizes(manifest, wanted.pictures):
            sides = {axis: n for axis, n in manifest.sides(size).items() if axis in spec.free}
            kinds = [{BRANCHES: 2}, *([{BRANCHES: 1}] if alone else [])] if spec.branched else [{}]
            out += [(name, {"B": batch, **kind, **sides}) for batch in batches for kind in kinds]
    return out


def shape_of(plan: Plan) -> dict[str, int] | None:
    """The shape that a file is for; None for one that takes any batch."""
    parts = dict(part.split("=") for part in plan.parts["sizes"].split(","))
    return {axis: int(text) for axis, text in parts.items()} if all(t.isdecimal() for t in parts.values()) else None


def find_compiled(folder: Path, manifest: Manifest, here: Here, device: str = "auto") -> Compiled:
    """The compiled graphs of a folder for this PyTorch, and the device they are for.

    device: "cpu", "cuda", or "auto" for the GPU where there is one and all is compiled for it, else the CPU.
    Raises EngineError when a graph is missing.
    """
    tried = (device,) if device != "auto" else ("cuda", "cpu") if here.gpu else ("cpu", "cuda")
    missing = []
    for target in tried:
        found = _found(folder, manifest, here.version, target)
        if not isinstance(found, str):
            return found
        missing.append(found)
    raise EngineError(
        f"{folder} has no compiled {missing[0]} for PyTorch {here.version} on {tried[0]}. Compile it on this machine: "
        "hd-export CHECKPOINT OUT --backend inductor."
    )


def _found(folder: Path, manifest: Manifest, version: str, target: str) -> Compiled | str:
    """What is compiled for a device, or the first graph that is missing."""
    loose: dict[str, Plan] = {}
    shapes: dict[str, list[tuple[dict[str, int], Plan]]] = {name: [] for name in manifest.graphs if name in PICTURES}
    weights: dict[str, Plan] = {}
    for plan in PlanStore(folder):
        if (
            not belongs(plan, manifest)
            or plan.parts["backend"] != "inductor"
            or plan.parts["version"].partition("+")[0] != version
            or plan.parts["target"].partition(" ")[0] != target
        ):
            continue
        shape = shape_of(plan)
        if plan.graph not in PICTURES:
            loose[plan.graph] = plan
        elif shape is not None and WEIGHTS in shape:
            weights[plan.graph] = plan
        elif shape is not None:
            shapes[plan.graph].append((shape, plan))
    for name in manifest.graphs:
        if name not in loose and not (name in weights and shapes.get(name)):
            return name
    compiled = Compiled(target, loose, shapes, weights, frozenset())
    painted = {manifest.size_at(shape) for shape, _ in shapes["unet"]}
    sizes = frozenset(size for size in painted if compiled.batches(manifest, size))
    return compiled._replace(sizes=sizes) if manifest.image_size in sizes else "unet"
