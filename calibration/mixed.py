"""Mixed precision: nodes of a half-precision graph that overflow or lose too much stay in float32.

    found = find_sensitive("bundle/unet.onnx", "bundle_fp16/unet.onnx", inputs["unet"])
    keep_float32("bundle_fp16/unet.onnx", "unet.onnx", {node.name for node in found})

Every node is tried alone, on the values of the float32 graph. So a node counts for its own error only, not for the
errors and infinities of nodes before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..contract import Manifest
from ..engines.onnxruntime import session_options
from ..errors import BundleError
from .emulate import MOVES, emulate
from .graphs import HALF, cast, element_types, label, rewrite_bundle, save_model, value_info, widen
from .record import Inputs

HEADROOM = 0.5  # of the largest number: other prompts may give larger values than those recorded
# Own error, root mean square relative to the values. Rounding alone costs 3e-4 and 2.4e-3.
MAX_ERROR: dict[int, float] = {TensorProto.FLOAT16: 1e-2, TensorProto.BFLOAT16: 8e-2}


@dataclass
class Sensitive:
    """A node that does not hold in half precision."""

    name: str
    op: str
    reason: str  # "overflow", "error", or "feeds NAME": the node NAME needs its output unrounded
    largest: float  # largest magnitude in float32 of those of its inputs and outputs that are half
    error: float  # its own, root mean square relative to the values, over the finite ones


def keep_float32(model_path: str | Path, out_path: str | Path, names: Iterable[str]) -> None:
    """Writes a half-precision graph in which the nodes called `names` compute in float32.

    Their weights stay stored in half behind a Cast. Between two such nodes, and to others in float32, values pass in
    float32, unrounded; elsewhere they are cast. The graph's inputs and outputs keep their types.
    Raises BundleError when a node is missing.
    """
    save_model(_keep(onnx.load(model_path), set(names)), Path(out_path))


def keep_sensitive(
    reference: str | Path, half: str | Path, out: str | Path, inputs: Inputs, limit: float | None = None
) -> dict[str, list[Sensitive]]:
    """Writes the bundle `half` into the folder `out`, its sensitive nodes in float32; returns them by graph.

    inputs: what `record` kept of a run of the float32 bundle `reference`.
    """
    reference, found = Path(reference), {}
    graphs = Manifest.load(reference).graphs

    def change(name: str, model: ModelProto) -> ModelProto:
        found[name] = find_sensitive(reference / graphs[name].file, model, inputs.get(name, []), limit)
        return _keep(model, {node.name for node in found[name]})

    rewrite_bundle(Path(half), Path(out), change)
    return {name: nodes for name, nodes in found.items() if nodes}


def find_sensitive(
    reference: str | Path | ModelProto,
    half: str | Path | ModelProto,
    inputs: Sequence[Mapping[str, np.ndarray]],
    limit: float | None = None,
    chunk: int = 32,
    threads: int | None = None,
) -> list[Sensitive]:
    """The nodes of the graph `half` that overflow or lose too much, in the order in which they run.

    reference: the float32 graph of the same export. inputs: calls to it, as `record` keeps them.
    limit: largest error that a node may add of its own, root mean square relative to its values; default: MAX_ERROR.
    chunk: nodes whose values are in memory at a time, beside those that later nodes need.
    An overflow is NaN or infinity where float32 is finite, or a value above half of the largest number. A node that
    loses too much keeps the nodes that make its inputs in float32, too: the loss is in the rounding between them.
    Raises BundleError when the graphs are not two precisions of one.
    """
    exact, halves = Pieces(reference), Pieces(half)
    pairs = _pair(exact, halves)
    counterpart = {theirs: ours for a, b in pairs for theirs, ours in zip(b.output, a.output, strict=True)}
    tried = [(a, b) for a, b in pairs if halves.half_tensors(b)]
    if not tried or not inputs:
        return []
    found = {label(b): Sensitive(label(b), b.op_type, "", 0.0, 0.0) for _, b in tried}
    # The inputs of each node that is tried, and their names in the float32 graph.
    sources = {label(b): {name: halves.source(name) for name in halves.dynamic(b)} for _, b in tried}
    sources = {node: {name: counterpart.get(s, s) for name, s in names.items()} for node, names in sources.items()}

    users = [(label(a), sources[label(b)].values()) for a, b in tried]
    current, try_out = -1, None
    for piece, values in exact.walk(inputs, users, chunk, threads):
        if piece != current:
            here = [(a, b) for a, b in tried if exact.piece_of[label(a)] == piece]
            try_out = runner(emulate(halves.cut([b for _, b in here], apart=True)), threads) if here else None
            current = piece
        if try_out is not None:
            feeds = {
                f"{name}/in": values[source].astype(halves.numpy_type(name), copy=False)
                for _, b in here
                for name, source in sources[label(b)].items()
            }
            got = try_out(feeds)
            for a, b in here:
                _measure(found[label(b)], halves, (a, b), values, feeds, got)

    for _, b in tried:
        node = found[label(b)]
        kinds = halves.half_tensors(b)
        if node.largest > HEADROOM * min(HALF[kind] for kind in kinds):
            node.reason = "overflow"
        most = max(MAX_ERROR[kind] for kind in kinds) if limit is None else limit
        if not node.reason and node.error > most:
            node.reason = "error"
            _keep_feeders(found, halves, b, f"feeds {node.name}")
    return [node for node in found.values() if node.reason]


def _measure(
    node: Sensitive,
    halves: Pieces,
    pair: tuple[NodeProto, NodeProto],
    values: dict[str, np.ndarray],
    feeds: dict[str, np.ndarray],
    got: dict[str, np.ndarray],
) -> None:
    """Notes a node's errors in one call. feeds, got: its inputs and outputs in half; values: of the float32 graph."""
    a, b = pair
    for name in halves.dynamic(b):
        if halves.types[name] in HALF:
            node.largest = max(node.largest, _largest(feeds[f"{name}/in"]))
    for ours, theirs in zip(a.output, b.output, strict=True):
        if halves.types.get(theirs) not in HALF:
            continue
        exact, half = values[ours], got[theirs]
        if exact.shape != half.shape:
            raise BundleError(
                f"The graphs are not two precisions of one: {node.name} gives {list(half.shape)} in one and "
                f"{list(exact.shape)} in the other. Export both from one checkpoint."
            )
        node.largest = max(node.largest, _largest(exact))
        fine = np.isfinite(exact)
        exact, half = exact[fine].astype(np.float64), half[fine].astype(np.float64)
        if not np.isfinite(half).all():
            node.reason = "overflow"
        elif exact.any():
            node.error = max(node.error, float(np.sqrt(np.square(half - exact).sum() / np.square(exact).sum())))


def _keep_feeders(found: dict[str, Sensitive], halves: Pieces, node: NodeProto, reason: str) -> None:
    """Finds the nodes that compute the half inputs of `node`, and those that only move them on their way."""
    for name in halves.dynamic(node):
        maker = halves.makers.get(halves.source(name))
        if halves.types[name] in HALF and maker is not None and label(maker) in found:
            found[label(maker)].reason = found[label(maker)].reason or reason
            if maker.op_type in MOVES:
                _keep_feeders(found, halves, maker, reason)


def _largest(value: np.ndarray) -> float:
    finite = value[np.isfinite(value)]
    return float(np.abs(finite).max(initial=0.0))


class Pieces:
    """A graph whose nodes can run a few at a time, or each alone."""

    def __init__(self, model: str | Path | ModelProto) -> None:
        model = model if isinstance(model, ModelProto) else onnx.load(model)
        self.model, self.types = model, element_types(model)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        # Weights may be stored in half behind a Cast: such a Cast belongs to the weight.
        self.casts: dict[str, NodeProto] = {}
        for node in model.graph.node:
            if node.op_type == "Cast" and (node.input[0] in self.weights or node.input[0] in self.casts):
                self.casts[node.output[0]] = node
        self.nodes = [node for node in model.graph.node if node.output[0] not in self.casts]
        self.makers = {name: node for node in self.nodes for name in node.output if name}

    def dynamic(self, node: NodeProto) -> list[str]:
        """The inputs of a node that are computed."""
        return [name for name in node.input if name and name not in self.weights and name not in self.casts]

    def source(self, name: str) -> str:
        """The tensor behind a tensor's Casts."""
        while name in self.makers and self.makers[name].op_type == "Cast":
            name = self.makers[name].input[0]
        return name

    def half_tensors(self, node: NodeProto) -> set[int]:
        """Half-precision types among a node's inputs and outputs."""
        return {self.types[name] for name in (*node.input, *node.output) if name} & set(HALF)

    def numpy_type(self, name: str) -> Any:
        """numpy's dtype of a tensor in the emulation of this graph."""
        kind = self.types[name]
        return np.float32 if kind in HALF else helper.tensor_dtype_to_np_dtype(kind)

    def walk(
        self,
        inputs: Sequence[Mapping[str, np.ndarray]],
        users: Iterable[tuple[str, Iterable[str]]],
        chunk: int = 32,
        threads: int | None = None,
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Runs the graph once, `chunk` nodes at a time; yields (number of the piece, values) for each call in `inputs`.

        Half precision is emulated: such values are float32.

        users: nodes, and further tensors that the caller needs with them. `values` has a tensor until the piece of its
        last user is done, and everything that this piece gave.
        """
        self.piece_of = {label(node): i // chunk for i, node in enumerate(self.nodes)}
        needed_until: dict[str, int] = {}
        for user, names in (*((label(node), node.input) for node in self.nodes), *users):
            needed_until.update({name: max(needed_until.get(name, 0), self.piece_of[user]) for name in names})
        live: list[dict[str, np.ndarray]] = [dict(feeds) for feeds in inputs]
        for piece in range(-(-len(self.nodes) // chunk)):
            nodes = self.nodes[piece * chunk : (piece + 1) * chunk]
            run = runner(emulate(self.cut(nodes, apart=False)), threads)
            for values in live:
                values.update(run(values))
                yield piece, values
                for name in [name for name in values if needed_until.get(name, -1) <= piece]:
                    del values[name]

    def cut(self, nodes: list[NodeProto], apart: bool) -> ModelProto:
        """A graph of some nodes, every output of theirs an output.

        apart: every computed tensor NAME that a node takes becomes the input `NAME/in`, even where another of the nodes
        gives it. Otherwise only tensors from outside are inputs, under their own names.
        """
        copies, inputs = [], {}
        made = {name for node in nodes for name in node.output}
        for node in nodes:
            copy = NodeProto()
            copy.CopyFrom(node)
            fed = {name: f"{name}/in" if apart else name for name in self.dynamic(node) if apart or name not in made}
            copy.input[:] = [fed.get(name, name) for name in node.input]
            inputs.update({new: self.types[name] for name, new in fed.items()})
            copies.append(copy)
        used = {name for node in nodes for name in node.input}
        for name, node in reversed(self.casts.items()):
            if name in used:
                used.add(node.input[0])
        casts = [node for name, node in self.casts.items() if name in used]
        graph = helper.make_graph(
            [*casts, *copies],
            self.model.graph.name,
            [value_info(name, kind) for name, kind in inputs.items()],
            [value_info(name, self.types[name]) for node in nodes for name in node.output if name],
            [tensor for name, tensor in self.weights.items() if name in used],
            value_info=[value_info(node.output[0], self.types[node.output[0]]) for node in casts],
        )
        return helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)


def _pair(exact: Pieces, halves: Pieces) -> list[tuple[NodeProto, NodeProto]]:
    """The nodes of two precisions of one graph, side by side, without Casts.

    The exporter keeps their order. Names do not match: an additional Cast in one precision shifts the numbers in them.
    """
    a = [node for node in exact.nodes if node.op_type != "Cast"]
    b = [node for node in halves.nodes if node.op_type != "Cast"]
    if [node.op_type for node in a] != [node.op_type for node in b]:
        raise BundleError(
            "The graphs are not two precisions of one: their operators differ. Export both from one checkpoint, with "
            "the same version and opset."
        )
    return list(zip(a, b, strict=True))


def runner(model: ModelProto, threads: int | None) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """A model as a function, which picks its inputs out of a mapping."""
    import onnxruntime

    options = session_options(threads)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]

    def run(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = session.run(outputs, {name: values[name] for name in inputs})
        return dict(zip(outputs, results, strict=True))

    return run


def _keep(model: ModelProto, names: set[str]) -> ModelProto:
    """See `keep_float32`."""
    types, graph = element_types(model), model.graph
    if missing := names - {label(node) for node in graph.node}:
        raise BundleError(f"The graph {graph.name} has no node {', '.join(sorted(missing))}. Look for them again.")
    shapes = {value.name: value.type.tensor_type.shape for value in (*graph.value_info, *graph.input, *graph.output)}
    unrounded = {name for node in graph.node if label(node) in names for name in node.output if types.get(name) in HALF}

    def takes_twin(node: NodeProto) -> bool:
        """Whether a node casts to float32 a value that exists in float32. Rounding it to half first could overflow."""
        goal = [attribute.i for attribute in node.attribute if attribute.name == "to"]
        return node.op_type == "Cast" and node.input[0] in unrounded and goal == [TensorProto.FLOAT]

    # Tensors that another node, or the caller, takes in half.
    wanted = {value.name for value in graph.output}
    others = [node for node in graph.node if label(node) not in names and not takes_twin(node)]
    wanted.update(name for node in others for name in node.input)
    nodes: list[NodeProto] = []
    # Half tensor -> its float32 twin, which a Cast before may already have as its input.
    casts = [node for node in graph.node if node.op_type == "Cast"]
    wide = {node.output[0]: node.input[0] for node in casts if types[node.input[0]] == TensorProto.FLOAT}
    suffix = "/float32"
    while any(name.endswith(suffix) for name in types):  # the graph is already mixed
        suffix += "+"

    def declare(name: str) -> str:
        wide[name] = name + suffix
        graph.value_info.append(value_info(wide[name], TensorProto.FLOAT, shapes.get(name)))
        return wide[name]

    def widened(name: str) -> str:
        if types.get(name) not in HALF:
            return name
        if name not in wide:
            nodes.append(cast(name, declare(name), TensorProto.FLOAT))
        return wide[name]

    for node in graph.node:
        if label(node) not in names:
            if takes_twin(node):
                node.input[0] = wide[node.input[0]]
            nodes.append(node)
            continue
        kept = NodeProto()
        kept.CopyFrom(node)
        kept.input[:] = [widened(name) for name in node.input]
        widen(kept)
        kept.output[:] = [declare(name) if types.get(name) in HALF else name for name in node.output]
        nodes.append(kept)
        nodes += [cast(wide[n], n, types[n]) for n in node.output if types.get(n) in HALF and n in wanted]
    del graph.node[:]
    graph.node.extend(nodes)
    made = {name for node in nodes for name in node.output}
    declared = [
        value for value in graph.value_info if value.name in made
    ]  # without tensors that now exist in float32 only
    del graph.value_info[:]
    graph.value_info.extend(declared)
    return model
