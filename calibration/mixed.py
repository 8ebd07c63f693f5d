"""Mixed precision: the nodes of a half-precision graph that overflow or lose too much stay in float32.

    found = find_sensitive("bundle/unet.onnx", "bundle_fp16/unet.onnx", inputs["unet"])
    keep_float32("bundle_fp16/unet.onnx", "unet.onnx", {node.name for node in found})

Every node is tried alone, on the values that the float32 graph really gives it. So a node is blamed for what it does
itself: not for an error that came down to it, and not for the infinity of a node before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..contract import Manifest
from ..engines.onnxruntime import session_options
from ..errors import BundleError
from .emulate import MOVES, emulate
from .graphs import HALF, cast, element_types, label, rewrite_bundle, save_model, value_info, widen
from .record import Inputs

HEADROOM = 0.5  # of the largest number: other prompts may give larger values than those recorded
LIMIT = 2e-2  # own error, root mean square relative to the values. Rounding alone costs 3e-4 in float16


@dataclass
class Sensitive:
    """A node that does not hold in half precision."""

    name: str
    op: str
    reason: str  # "overflow", "error", or "feeds NAME": what it gives must come unrounded to the node NAME
    largest: float  # largest magnitude that the float32 graph has in its inputs and outputs that are half
    error: float  # its own, root mean square relative to the values, over those that are finite


def keep_float32(model_path: str | Path, out_path: str | Path, names: Iterable[str]) -> None:
    """Writes a half-precision graph in which the nodes called `names` compute in float32.

    Their weights stay stored in half behind a Cast. Between two such nodes values pass in float32, unrounded;
    elsewhere they are cast. The graph's own inputs and outputs keep their types.
    Raises BundleError when a node is not there.
    """
    save_model(_keep(onnx.load(model_path), set(names)), Path(out_path))


def keep_sensitive(
    reference: str | Path, half: str | Path, out: str | Path, inputs: Inputs, limit: float = LIMIT
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
    limit: float = LIMIT,
    chunk: int = 32,
    threads: int | None = None,
) -> list[Sensitive]:
    """The nodes of the graph `half` that overflow or lose too much, in the order in which they run.

    reference: the float32 graph of the same export. inputs: calls to it, as `record` keeps them.
    limit: largest error that a node may add of its own, root mean square relative to its values.
    chunk: nodes whose values are in memory at a time, beside those that later nodes need.
    An overflow is NaN or infinity where float32 has none, or a value above half of the largest number. What makes the
    input of a node that loses too much is kept with it, because the loss is in the rounding between the two.
    Raises BundleError when the graphs are not two precisions of one.
    """
    exact, halves = _Pieces(reference), _Pieces(half)
    pairs = _pair(exact, halves)
    counterpart = {theirs: ours for a, b in pairs for theirs, ours in zip(b.output, a.output, strict=True)}
    halved = [(a, b) for a, b in pairs if halves.half_tensors(b)]
    if not halved or not inputs:
        return []

    # The float32 graph runs once, a few nodes at a time. What later pieces need stays in `live`, call by call.
    places = {label(node): i // chunk for i, node in enumerate(exact.nodes)}
    needed_until: dict[str, int] = {}
    for node in exact.nodes:
        for name in node.input:
            needed_until[name] = max(needed_until.get(name, 0), places[label(node)])
    for a, b in halved:
        for name in halves.dynamic(b):
            source = halves.source(name)
            source = counterpart.get(source, source)
            needed_until[source] = max(needed_until.get(source, 0), places[label(a)])
    live: list[dict[str, np.ndarray]] = [dict(feeds) for feeds in inputs]
    tally = {label(b): [0.0, 0.0, False] for _, b in halved}  # largest, error, not finite
    for start in range(0, len(exact.nodes), chunk):
        nodes = exact.nodes[start : start + chunk]
        here = {label(node) for node in nodes}
        run = _runner(exact.cut(nodes, apart=False), threads)
        mine = [(a, b) for a, b in halved if label(a) in here]
        try_out = _runner(emulate(halves.cut([b for _, b in mine], apart=True)), threads) if mine else None
        for values in live:
            values.update(run(values))
            if try_out is None:
                continue
            feeds = {}
            for _, b in mine:
                for name in halves.dynamic(b):
                    source = halves.source(name)
                    value = values[counterpart.get(source, source)]
                    feeds[f"{name}/in"] = value.astype(halves.numpy_type(name), copy=False)
            got = try_out(feeds)
            for a, b in mine:
                largest = [_largest(feeds[f"{name}/in"]) for name in halves.dynamic(b) if halves.types[name] in HALF]
                entry = tally[label(b)]
                for ours, theirs in zip(a.output, b.output, strict=True):
                    if halves.types.get(theirs) in HALF:
                        largest.append(_largest(values[ours]))
                    if theirs:
                        _compare(values[ours], got[theirs], entry)
                entry[0] = max(entry[0], *largest, 0.0)
        stop = start // chunk
        for values in live:
            for name in [name for name in values if needed_until.get(name, -1) <= stop]:
                del values[name]
    return _verdict(halves, [b for _, b in halved], tally, limit)


def _verdict(halves: _Pieces, nodes: list[NodeProto], tally: dict[str, list[Any]], limit: float) -> list[Sensitive]:
    reasons: dict[str, str] = {}
    for node in nodes:
        name = label(node)
        largest, error, not_finite = tally[name]
        kinds = halves.half_tensors(node)
        if not_finite or largest > HEADROOM * min(HALF[kind] for kind in kinds):
            reasons[name] = "overflow"
        elif not error <= limit:
            reasons.setdefault(name, "error")
            _feeders(halves, node, f"feeds {name}", reasons)
    known = {label(node): node for node in halves.nodes}
    return [
        Sensitive(name, known[name].op_type, reasons[name], *tally.get(name, [0.0, 0.0])[:2])
        for name in known
        if name in reasons
    ]


def _feeders(halves: _Pieces, node: NodeProto, reason: str, reasons: dict[str, str]) -> None:
    """Notes the nodes that compute the half inputs of `node`, and those that only move them on their way."""
    for name in halves.dynamic(node):
        maker = halves.makers.get(halves.source(name))
        if halves.types[name] in HALF and maker is not None and halves.half_tensors(maker):
            reasons.setdefault(label(maker), reason)
            if maker.op_type in MOVES:
                _feeders(halves, maker, reason, reasons)


def _compare(exact: np.ndarray, got: np.ndarray, entry: list[Any]) -> None:
    """Notes in entry[1:] the larger error, and whether `got` is not finite where `exact` is."""
    if exact.shape != got.shape:
        raise BundleError(
            "The graphs are not two precisions of one: their tensors differ in shape. Export both from one checkpoint."
        )
    if exact.dtype.kind != "f":
        return
    fine = np.isfinite(exact)
    exact, got = exact[fine].astype(np.float64), got[fine].astype(np.float64)
    if not np.isfinite(got).all():
        entry[2] = True
    elif exact.any():
        entry[1] = max(entry[1], float(np.sqrt(np.square(got - exact).sum() / np.square(exact).sum())))


def _largest(value: np.ndarray) -> float:
    finite = value[np.isfinite(value)]
    return float(np.abs(finite).max(initial=0.0))


class _Pieces:
    """A graph whose nodes can be run a few at a time, or each alone."""

    def __init__(self, model: str | Path | ModelProto) -> None:
        model = model if isinstance(model, ModelProto) else onnx.load(model)
        self.model, self.types = model, element_types(model)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        # Weights may be stored in half behind a Cast: such a Cast belongs to the weight.
        self.casts = {n.output[0]: n for n in model.graph.node if n.op_type == "Cast" and n.input[0] in self.weights}
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

    def cut(self, nodes: list[NodeProto], apart: bool) -> ModelProto:
        """A graph of some nodes, every output of theirs an output.

        apart: a computed tensor NAME that a node takes is the input `NAME/in`, also where another of the nodes gives
        it; else only what none of them gives is an input, and bears its name.
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
        casts = [node for name, node in self.casts.items() if name in used]
        used |= {node.input[0] for node in casts}
        graph = helper.make_graph(
            [*casts, *copies],
            self.model.graph.name,
            [value_info(name, kind) for name, kind in inputs.items()],
            [value_info(name, self.types[name]) for node in nodes for name in node.output if name],
            [tensor for name, tensor in self.weights.items() if name in used],
            value_info=[value_info(node.output[0], self.types[node.output[0]]) for node in casts],
        )
        return helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)


def _pair(exact: _Pieces, halves: _Pieces) -> list[tuple[NodeProto, NodeProto]]:
    """The nodes of two precisions of one graph, side by side, without Casts.

    By their order, which the exporter keeps. Their names say nothing: where a precision has a Cast more, the numbers
    in them shift, and the same name is another node's.
    """
    a = [node for node in exact.nodes if node.op_type != "Cast"]
    b = [node for node in halves.nodes if node.op_type != "Cast"]
    if [node.op_type for node in a] != [node.op_type for node in b]:
        raise BundleError(
            "The graphs are not two precisions of one: their operators differ. Export both from one checkpoint, with "
            "the same version and opset."
        )
    return list(zip(a, b, strict=True))


def _runner(model: ModelProto, threads: int | None) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """A model as a function; it picks its inputs out of what it is given."""
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
    makers = {name: node for node in graph.node for name in node.output}
    # Tensors that some other node, or the caller, takes in half.
    wanted = {value.name for value in graph.output}
    wanted.update(name for node in graph.node if label(node) not in names for name in node.input)
    nodes: list[NodeProto] = []
    wide: dict[str, str] = {}  # half tensor -> its float32 twin

    def declare(name: str) -> str:
        wide[name] = f"{name}/float32"
        graph.value_info.append(value_info(wide[name], TensorProto.FLOAT, shapes.get(name)))
        return wide[name]

    def widened(name: str) -> str:
        if types.get(name) not in HALF:
            return name
        maker = makers.get(name)
        if (
            name not in wide
            and maker is not None
            and maker.op_type == "Cast"
            and types[maker.input[0]] == TensorProto.FLOAT
        ):
            wide[name] = maker.input[0]  # what was in float32 just before is taken from there
        if name not in wide:
            nodes.append(cast(name, declare(name), TensorProto.FLOAT))
        return wide[name]

    for node in graph.node:
        if label(node) not in names:
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
    made = {name for node in nodes for name in node.output} | set(types) - set(makers)
    declared = [value for value in graph.value_info if value.name in made]
    del graph.value_info[:]
    graph.value_info.extend(declared)
    return model
