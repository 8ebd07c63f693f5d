"""Shows what a compiled plan consists of: its layers by kind and kernel, the types they compute in, and its memory.

TensorRT's own inspector needs a GPU that can load the plan. With detailed profiling verbosity TensorRT-RTX's builder
writes the same report into its verbose log, even without a GPU. `build_plan` picks it out, or asks full TensorRT's
inspector. `PlanStore` keeps it beside the plan, and `hd-engines inspect` reads it there. A layer is a kernel, so a step
costs as many launches as there are layers.
TensorRT-RTX leaves the choice of some kernels (its `__myelin_CASK_STUB`: convolutions and matrix products) to the GPU
that runs the plan.

    hd-engines inspect bundle --graph unet
    hd-engines inspect bundle/plans/unet.B1.G2.<key>.plan --json | jq '.layers[] | select(.kernel == "__myl_Move")'
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from ..contract import EIGHT_BITS, Manifest
from ..errors import EngineError
from ..schema import MisfitError, fit, read_json
from .eight_bits import computes_in
from .plans import LAYERS, Plan, PlanStore, belongs

MAX_LAYER_BYTES = 1 << 28  # bytes of a file of layers
# Messages of the builder to keep: its report, and how many bytes the plan will take on the GPU.
REPORT = "Layers:"
MEMORY = {"Total Weights Memory: ": "weights", "Total Activation Memory: ": "scratch"}

_LAYER = re.compile(r"Name: (.*?), LayerType: (\w+)(.*)")
_FIELD = re.compile(r", (Inputs|Constants|Outputs|TacticName|TacticValue|StreamId|Metadata): ")
# Names may hold any brackets; TensorRT says "Format/Datatype" where TensorRT-RTX says "Datatype".
_TENSOR = re.compile(r"\{ Name: (.*?), (?:Location: \w+, )?Dimensions: \[([-\d,]*)\].*?Datatype: ([^,}]*?)(?:,| ?\})")
_HASH = re.compile(r"_0x[0-9a-f]+")
_NUMBER = re.compile(r"_myl\d+_\d+$")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")

_MANY = Meta(max_length=1_000_000)


class Tensor(TypedDict):
    """An input or output of a layer."""

    name: str
    shape: Annotated[list[int], _MANY]
    type: str


class Layer(TypedDict):
    """One kernel of a plan. nodes: of the ONNX graph, from which it was compiled."""

    name: str
    kind: str
    kernel: str
    tactic: str
    inputs: Annotated[list[Tensor], _MANY]
    weights: Annotated[list[Tensor], _MANY]
    outputs: Annotated[list[Tensor], _MANY]
    nodes: Annotated[list[str], _MANY]


def wanted(message: str) -> bool:
    """Whether `read_log` reads a message of the builder."""
    return message.startswith((REPORT, *MEMORY))


def read_log(messages: Iterable[str]) -> dict[str, Any]:
    """The builder's messages -> {"layers": of the plan, in order, "memory": bytes of weights and scratch}."""
    layers: list[Layer] = []
    memory: dict[str, int] = {}
    for message in messages:
        if message.startswith(REPORT):
            layers = [_layer(*found.groups()) for line in message.splitlines() if (found := _LAYER.match(line))]
        for start, name in MEMORY.items():
            if message.startswith(start):
                memory[name] = int(message.removeprefix(start).split()[0])
    return {"layers": layers, "memory": memory}


def read_report(text: str) -> list[Layer]:
    """The JSON of TensorRT's `IEngineInspector` -> layers of the plan, in order. It skips those with a mere name."""

    def tensors(found: list[dict[str, Any]]) -> list[Tensor]:
        return [
            {
                "name": one.get("Name", ""),
                "shape": one.get("Dimensions", []),
                "type": one.get("Format/Datatype") or one.get("Datatype", ""),
            }
            for one in found
        ]

    layers: list[Layer] = []
    for one in json.loads(text).get("Layers", []):
        if not isinstance(one, dict):
            continue
        weights = tensors(one.get("Constants", []))
        if isinstance(kept := one.get("Weights"), dict) and kept.get("Count"):  # of a convolution
            weights.append({"name": "weights", "shape": [kept["Count"]], "type": kept.get("Type", "")})
        tactic = one.get("TacticName", "")
        layers.append(
            {
                "name": one.get("Name", ""),
                "kind": one.get("LayerType", ""),
                "kernel": _HASH.sub("", tactic) or _NUMBER.sub("", one.get("Name", "")),
                "tactic": tactic or str(one.get("TacticValue", "")),
                "inputs": tensors(one.get("Inputs", [])),
                "weights": weights,
                "outputs": tensors(one.get("Outputs", [])),
                "nodes": _NODE.findall(one.get("Metadata", "")),
            }
        )
    return layers


def _layer(name: str, kind: str, rest: str) -> Layer:
    parts = _FIELD.split(rest)
    fields = dict(zip(parts[1::2], parts[2::2], strict=True))

    def tensors(field: str) -> list[Tensor]:
        found = _TENSOR.findall(fields.get(field, ""))
        return [
            {"name": tensor, "shape": [int(size) for size in shape.split(",") if size], "type": kind}
            for tensor, shape, kind in found
        ]

    tactic = fields.get("TacticName", "").strip()
    return {
        "name": name,
        "kind": kind,
        "kernel": _HASH.sub("", tactic) or _NUMBER.sub("", name),  # fusions that the GPU compiles lack a tactic
        "tactic": tactic or fields.get("TacticValue", ""),
        "inputs": tensors("Inputs"),
        "weights": tensors("Constants"),
        "outputs": tensors("Outputs"),
        "nodes": _NODE.findall(fields.get("Metadata", "")),
    }


def find_plans(path: Path, graph: str | None = None) -> list[Plan]:
    """The plan at a path, or the current plans of a folder, for one graph or for all.

    Raises EngineError where it finds none.
    """
    if path.suffix == ".plan":
        found = [plan for plan in PlanStore(path.parent.parent) if plan.path.name == path.name]
        if not found:
            raise EngineError(
                f"{path} must be a finished plan: it, or the .json of the same name, is missing or damaged."
            )
        return found
    manifest = Manifest.load(path, verify=False)
    if graph is not None and graph not in manifest.graphs:
        raise EngineError(f"graph must be one of {', '.join(manifest.graphs)}, got {graph!r}.")
    found = [plan for plan in PlanStore(path) if belongs(plan, manifest) and graph in (None, plan.graph)]
    if not found:
        raise EngineError(f"{path} has no plans{f' of {graph}' if graph else ''}. Build some: hd-engines build {path}.")
    return found


def layers_of(plan: Plan) -> list[Layer]:
    """The layers of a plan, in the order in which they run. Raises EngineError where their file is missing."""
    try:
        layers: list[Layer] = fit(read_json(plan.path.with_suffix(LAYERS), MAX_LAYER_BYTES), list[Layer])
    except (OSError, MisfitError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise EngineError(
            f"The file of {plan.path}'s layers cannot be read ({why.rstrip('.')}). Build it again: hd-engines prune "
            "FOLDER --all, then hd-engines build FOLDER."
        ) from error
    return layers


def types_of(layer: Layer) -> str:
    """The types of a layer's outputs, such as "Half" or "Float, Half"."""
    return ", ".join(sorted({tensor["type"] for tensor in layer["outputs"]}))


def summary(plan: Plan) -> dict[str, Any]:
    """Counts of a plan's layers by kind, by type and by kernel, and its memory in bytes; ready for JSON."""
    layers, precision = layers_of(plan), plan.parts["precision"]
    eight = [layer for layer in layers if precision in EIGHT_BITS and computes_in(layer, precision)]
    proven = {
        "eight_bits": {
            **plan.proof.get("eight_bits", {}),
            "kernels": dict(Counter(layer["kernel"] for layer in eight).most_common()),
            "in_half": plan.proof.get("in_half", []),
        }
    }
    return {
        "plan": plan.path.name,
        "graph": plan.graph,
        **{name: plan.parts[name] for name in ("sizes", "precision", "backend", "version", "target")},
        "bytes": {"plan": plan.size, **plan.proof.get("memory", {})},
        "count": len(layers),
        "kinds": dict(Counter(layer["kind"] for layer in layers).most_common()),
        "types": dict(Counter(types_of(layer) for layer in layers).most_common()),
        "kernels": dict(Counter(layer["kernel"] for layer in layers).most_common()),
        **(proven if eight or "eight_bits" in plan.proof else {}),
        "layers": layers,
    }


def text(counts: dict[str, Any], most: int = 40) -> str:
    """A summary as text, with the kernels that run most often."""
    memory = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in counts["bytes"].items())
    lines = [
        f"{counts['graph']} {counts['sizes']}, {counts['precision']}: {counts['count']} layers; {memory}",
        f"  {counts['backend']} {counts['version']}, {counts['target']}",
    ]
    for title, name in (("by kind", "kinds"), ("by type", "types")):
        lines.append(f"  {title}: " + ", ".join(f"{count} {what or 'none'}" for what, count in counts[name].items()))
    if (found := counts.get("eight_bits")) is not None:
        lines.append(
            f"  in {counts['precision']}: {found.get('compiled', 0)} of {found.get('asked', 0)} quantised layers, in "
            f"{sum(found['kernels'].values())} kernels"
        )
        lines += [f"    {count:5} {name}" for name, count in list(found["kernels"].items())[:most]]
        if found["in_half"]:
            lines.append(f"  in half, without such a kernel: {', '.join(found['in_half'])}")
    lines.append("  by kernel:")
    kernels = list(counts["kernels"].items())
    lines += [f"    {count:5} {name}" for name, count in kernels[:most]]
    if kernels[most:]:
        lines.append(f"    {sum(count for _, count in kernels[most:]):5} in {len(kernels) - most} more: --json has all")
    return "\n".join(lines)
