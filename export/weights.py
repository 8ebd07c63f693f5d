"""Finds where a checkpoint's parameters are in its finished graphs, and notes it in the bundle (`weights.WeightMap`).

    record_weights(checkpoint, Path("bundle"))

The exporter renames, transposes and folds weights, and calibration quantises some. So parameters are found by their
numbers, in the graphs as they are at the end. A parameter that is not found, or that others share an initializer with,
has no place: an adapter that changes it must be merged by `hd-export --lora`.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ..contract import WEIGHTS, Manifest, file_digest
from ..engines.initializers import OnnxWeights
from ..models.checkpoint import Checkpoint
from ..models.lora import parts
from ..models.position_kernel import GATED, SCALE, PositionKernel
from ..tensors import narrowed, widened
from ..weights import Place, WeightMap, written_as

# The graphs that hold each part of a checkpoint. Others may hold equal numbers: the hand prior's text encoder begins as
# the same CLIP.
GRAPHS_OF = {
    "unet": ("unet", "unet_context", "unet_time"),
    "text_hand_encoder": ("text_hand_encoder",),
}


def record_weights(checkpoint: Checkpoint, folder: Path) -> WeightMap:
    """Writes the map of a bundle's weights into it, and its hash into the manifest."""
    manifest = Manifest.load(folder, verify=False)
    named = {name: parameter.detach() for name, parameter in parts(checkpoint).named_parameters()}
    places: dict[str, list[Place]] = {}
    for part, graphs in GRAPHS_OF.items():
        stored = [Found(graph, OnnxWeights(folder / manifest.graphs[graph].file)) for graph in graphs]
        own = {name: value.float().numpy() for name, value in named.items() if name.startswith(f"{part}.")}
        places |= find(own, stored)
    if checkpoint.position_kernel is not None:
        spec = manifest.graphs["unet_context"]
        places |= kernel_places(checkpoint.position_kernel, Found("unet_context", OnnxWeights(folder / spec.file)))
    found = WeightMap({name: tuple(value.shape) for name, value in named.items()}, places)
    found.save(folder)
    manifest.files[WEIGHTS] = file_digest(folder / WEIGHTS)
    manifest.save(folder)
    return found


class Found:
    """A graph's initializers by their numbers in order."""

    def __init__(self, graph: str, weights: OnnxWeights) -> None:
        self.graph, self.shapes = graph, weights.shapes
        self.sizes = {math.prod(shape) for shape in weights.shapes.values()}
        self.names: defaultdict[str, list[str]] = defaultdict(list)
        for name in weights.shapes:
            self.names[_digest(weights.read(name))].append(name)


def kernel_places(kernel: PositionKernel, graph: Found) -> dict[str, list[Place]]:
    """Where the positional kernel's parameters are. A layer's constant holds all three kinds in columns, and layers
    whose kernels begin as equals have one each, in their order."""
    places: dict[str, list[Place]] = {}
    layers: defaultdict[str, list[int]] = defaultdict(list)
    for layer in range(len(kernel.amplitudes)):
        layers[_digest(kernel.weights(layer).detach().numpy())].append(layer)
    for digest, equal in layers.items():
        names = graph.names.get(digest, [])
        for layer, name in zip(equal, names, strict=True) if len(names) == len(equal) else ():
            width = kernel.amplitudes[layer].shape[-1]
            starts = {"amplitudes": range(0, 4 * width, width), "constants": [4 * width]}
            if kernel.config.gated:
                starts["gates"] = [4 * width + GATED]
            for kind, columns in starts.items():
                places[f"position_kernel.{kind}.{layer}"] = [
                    Place(graph.graph, name, "columns", column, SCALE) for column in columns
                ]
    return places


def find(parameters: dict[str, np.ndarray], stored: Iterable[Found]) -> dict[str, list[Place]]:
    """Where each parameter is. Leaves out those that are nowhere, and those that share an initializer."""
    places: defaultdict[str, list[Place]] = defaultdict(list)
    owners: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for graph in stored:
        for name, value in parameters.items():
            for forms in _forms(value):
                matched = [_match(graph, one, array) for one, array in forms.items()]
                if matched and all(matched):
                    places[name] += (found := [place for some in matched for place in some])
                    for place in found:
                        owners[graph.graph, place.initializer].add(name)
                    break
    return {
        name: found
        for name, found in places.items()
        if all(owners[place.graph, place.initializer] == {name} for place in found)
    }


def _forms(value: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """The arrays that a graph may hold in place of a parameter, by the names of the forms."""
    yield {"plain": value}
    if value.ndim == 2:
        yield {"transposed": value.T}
    if value.ndim == 4 and value.shape[2:] == (3, 3):
        yield {f"taps_{i}": written_as(value, f"taps_{i}") for i in range(4)}


def _match(graph: Found, form: str, array: np.ndarray) -> list[Place]:
    """The initializers that hold these numbers, as they are or rounded to half or bfloat16."""
    if array.size not in graph.sizes:
        return []
    with np.errstate(over="ignore"):
        half = array.astype(np.float16).astype(np.float32)
    for rounded in (array, half, widened(narrowed(array))):
        names = graph.names.get(_digest(rounded), ())
        if found := [name for name in names if form == "plain" or graph.shapes[name] == array.shape]:
            return [Place(graph.graph, name, form) for name in found]
    return []


def _digest(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array, np.float32).tobytes(), digest_size=16).hexdigest()
