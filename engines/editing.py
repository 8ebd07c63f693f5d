"""Edits of an ONNX graph that several rewrites share; needs `onnx_ir`, not PyTorch.

edit = Editor(model, "nhwc")
value = edit.add(node, "Transpose", [x], shape, perm=[0, 2, 3, 1])     # stands before `node`
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from .standins import CONTRIBUTED as CONTRIBUTED

Shape = Sequence["int | ir.SymbolicDim"]


class Editor:
    """Adds nodes and constants to a model's graph. Equal constants are stored once. label: part of the nodes' names."""

    def __init__(self, model: ir.Model, label: str) -> None:
        self.graph, self.label, self._count = model.graph, label, 0
        self.settled = settled(model.graph)

    def constant(self, array: np.ndarray) -> ir.Value:
        """An initializer with these numbers."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        kind = f"{array.dtype}{list(array.shape)}".encode()
        name = f"derived_{hashlib.sha256(kind + array.tobytes()).hexdigest()[:16]}"
        if name not in self.graph.initializers:
            tensor = ir.tensor(array, name=name)
            kept = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.graph.register_initializer(kept)
        return self.graph.initializers[name]

    def ints(self, *numbers: Any) -> ir.Value:
        return self.constant(np.array(numbers, np.int64))

    def add(
        self,
        before: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        shape: Shape,
        domain: str = "",
        attributes: Mapping[str, Any] | None = None,
        kind: ir.DataType | None = None,
    ) -> ir.Value:
        """A new node before another; its output. kind: of the output, if not that of the first input."""
        self._count += 1
        node = ir.node(
            op, inputs, attributes, domain=domain, name=f"{before.name or 'node'}_{self.label}_{self._count}"
        )
        self.graph.insert_before(before, node)
        first = next(value for value in inputs if value is not None)
        out = node.outputs[0]
        out.name, out.shape = f"{node.name}_out", ir.Shape(list(shape))
        out.type = first.type if kind is None else ir.TensorType(kind)
        return out


def number(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a constant, also of one behind a Cast, in the type that its users see; else None."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is not None and node.op_type == "Cast" and (inner := number(node.inputs[0])) is not None:
        return inner.astype(ir.DataType(node.attributes["to"].as_int()).numpy())
    return None


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is a constant, also behind a Cast; does not read its numbers."""
    if value is None:
        return False
    node = value.producer()
    return value.const_value is not None or (
        node is not None and node.op_type == "Cast" and is_constant(node.inputs[0])
    )


def settled(graph: ir.Graph) -> set[ir.Value]:
    """The values that follow from constants alone: computed once, when a graph is loaded."""
    found: set[ir.Value] = set(graph.initializers.values())
    for node in graph:
        if all(value is None or value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def made_by(value: ir.Value | None, op: str, domain: str = "") -> ir.Node | None:
    """The node that makes a value, if it is of this kind."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op and node.domain == domain else None


def users(value: ir.Value) -> list[ir.Node]:
    """The nodes that take a value, once each."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def only_user(value: ir.Value, op: str) -> ir.Node | None:
    """The one node that takes a value, if it is of this kind and the graph does not output the value."""
    found = users(value)
    return found[0] if len(found) == 1 and found[0].op_type == op and not value.is_graph_output() else None


def sizes(value: ir.Value | None) -> list[int | str] | None:
    """The shape of a value, with the names of free axes; None where it is unknown."""
    if value is None or value.shape is None:
        return None
    return [size if isinstance(size, int) else str(size.value) for size in value.shape]


def fixed(value: ir.Value) -> list[int]:
    """The shape of a constant."""
    return [size for size in sizes(value) or [] if isinstance(size, int)]


def replace(old: ir.Value, new: ir.Value) -> None:
    """Gives all users of a value another one. An output of the graph keeps its name."""
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}_before"
        new.name = name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
