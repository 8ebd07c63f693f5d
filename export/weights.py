"""Finds where a checkpoint's parameters are in its finished graphs, and notes it in the bundle (`weights.WeightMap`).

    record_weights(checkpoint, Path("bundle"))

The exporter renames, transposes and folds weights, and calibration quantises some. So parameters are found by their
numbers, in the graphs as they are at the end. A parameter that is not found, or that others share an initializer with,
has no place: an adapter that changes it must be merged by `hd-export --lora`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ..contract import WEIGHTS, Manifest, file_digest
from ..engines.initializers import OnnxWeights
from ..models.checkpoint import Checkpoint
from ..models.lora import parts
from ..tensors import narrowed, widened
from ..weights import Place, WeightMap, written_as

# The graphs that hold each part of a checkpoint. Others may hold equal numbers: the hand prior's text encoder begins as
# the same CLIP.
GRAPHS_OF = {
    "unet": ("unet", "unet_context", "unet_time"),
    "text_hand_encoder": ("text_hand_encoder",),
    "position_kernel": ("unet_context",),
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
    found = WeightMap({name: tuple(value.shape) for name, value in named.items()}, places)
    found.save(folder)
    manifest.files[WEIGHTS] = file_digest(folder / WEIGHTS)
    manifest.save(folder)
    return found


class Found:
    """A graph's initializers by shape and content."""

    def __init__(self, graph: str, weights: OnnxWeights) -> None:
        self.graph, self.shapes = graph, set(weights.shapes.values())
        self.names: defaultdict[str, list[str]] = defaultdict(list)
        for name in weights.shapes:
            self.names[_digest(weights.read(name))].append(name)


def find(parameters: dict[str, np.ndarray], stored: Iterable[Found]) -> dict[str, list[Place]]:
    """Where each parameter is. Leaves out those that are nowhere, and those of which others share an initializer."""
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
    if array.shape not in graph.shapes:
        return []
    with np.errstate(over="ignore"):
        half = array.astype(np.float16).astype(np.float32)
    for rounded in (array, half, widened(narrowed(array))):
        if found := graph.names.get(_digest(rounded)):
            return [Place(graph.graph, name, form) for name in found]
    return []


def _digest(array: np.ndarray) -> str:
    shape = str(array.shape).encode()
    return hashlib.blake2b(shape + np.ascontiguousarray(array, np.float32).tobytes(), digest_size=16).hexdigest()
