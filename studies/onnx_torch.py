"""An exported step or decoder as a PyTorch module: the very graph and weights that other backends run.

    module = OnnxModule(Path("work/unet.onnx"), {"B": 1, "G": 2})
    latents, history, finite = module(*inputs)

It knows the operators of these graphs, and names one that it does not know. All sizes are fixed. `gpu_inductor.py`
compiles it, so that Inductor's figures are of the same numbers as ONNX Runtime's and TensorRT's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
import torch.nn.functional as F
from handiffuser.engines.fixing import fix_sizes
from onnx import inliner, numpy_helper
from torch import Tensor, nn

TYPES = {1: torch.float32, 2: torch.uint8, 7: torch.int64, 9: torch.bool, 10: torch.float16, 16: torch.bfloat16}
Operator = Callable[[dict[str, Any], list[Any]], Any]
SIMPLE: dict[str, Callable[..., Tensor]] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "Cos": torch.cos,
    "Div": torch.div,
    "LessOrEqual": torch.le,
    "MatMul": torch.matmul,
    "Mul": torch.mul,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
}


def attention(a: dict[str, Any], x: list[Any]) -> Tensor:
    """[N, heads, L, d], or [N, L, heads * d] with the number of heads as an attribute."""
    flat = x[0].dim() == 3
    heads = (a.get("q_num_heads"), a.get("kv_num_heads"), a.get("kv_num_heads"))
    q, k, v = (one.unflatten(2, (n, -1)).transpose(1, 2) if n else one for one, n in zip(x, heads, strict=True))
    out = F.scaled_dot_product_attention(q, k, v, scale=a.get("scale"))
    return out.transpose(1, 2).flatten(2) if flat else out


def convolution(a: dict[str, Any], x: list[Any]) -> Tensor:
    pads = a.get("pads", [0] * 4)
    if pads[:2] != pads[2:]:
        x = [F.pad(x[0], (pads[1], pads[3], pads[0], pads[2])), *x[1:]]
        pads = [0] * 4
    bias = x[2] if len(x) > 2 else None
    return F.conv2d(x[0], x[1], bias, a.get("strides", 1), pads[:2], a.get("dilations", 1), a.get("group", 1))


def depth_to_space(a: dict[str, Any], x: list[Any]) -> Tensor:
    side = a["blocksize"]
    parts = x[0].unflatten(1, (side, side, -1))  # mode DCR: [N, side, side, C, h, w]
    return parts.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


def gather(a: dict[str, Any], x: list[Any]) -> Tensor:
    if x[1].ndim == 0:
        return x[0].select(a.get("axis", 0), int(x[1]))
    return x[0].index_select(a.get("axis", 0), torch.from_numpy(x[1]).to(x[0].device))


def pad(a: dict[str, Any], x: list[Any]) -> Tensor:
    before, after = np.split(x[1], 2)
    return F.pad(x[0], [int(n) for pair in zip(before[::-1], after[::-1], strict=True) for n in pair])


def reshape(a: dict[str, Any], x: list[Any]) -> Tensor:
    copied = not a.get("allowzero")
    return x[0].reshape([x[0].shape[i] if n == 0 and copied else int(n) for i, n in enumerate(x[1])])


def resize(a: dict[str, Any], x: list[Any]) -> Tensor:
    assert a["mode"] == b"nearest" and a["coordinate_transformation_mode"] == b"asymmetric"
    return F.interpolate(x[0], scale_factor=[float(n) for n in x[-1][2:]], mode="nearest")


def slices(a: dict[str, Any], x: list[Any]) -> Tensor:
    out, steps = x[0], x[4] if len(x) > 4 else np.ones_like(x[1])
    for start, end, axis, step in zip(*x[1:4], steps, strict=True):
        cut = [slice(None)] * out.dim()
        cut[int(axis)] = slice(int(start), int(end), int(step))
        out = out[tuple(cut)]
    return out


def unsqueeze(a: dict[str, Any], x: list[Any]) -> Tensor:
    out = x[0]
    for axis in sorted(int(n) % (out.dim() + len(x[1])) for n in x[1]):
        out = out.unsqueeze(axis)
    return out


OPERATORS: dict[str, Operator] = {
    **{name: (lambda a, x, one=one: one(*x)) for name, one in SIMPLE.items()},
    "Attention": attention,
    "Cast": lambda a, x: x[0].to(TYPES[a["to"]]),
    "Clip": lambda a, x: torch.clamp(*x),
    "Concat": lambda a, x: torch.cat(x, a["axis"]),
    "Conv": convolution,
    "DepthToSpace": depth_to_space,
    "Expand": lambda a, x: x[0].expand(torch.broadcast_shapes(x[0].shape, tuple(map(int, x[1])))),
    "Gather": gather,
    "Gelu": lambda a, x: F.gelu(x[0], approximate=a.get("approximate", b"none").decode()),
    "GroupNormalization": lambda a, x: F.group_norm(x[0], a["num_groups"], x[1], x[2], a["epsilon"]),
    "LayerNormalization": lambda a, x: F.layer_norm(x[0], x[0].shape[-1:], x[1], x[2], a["epsilon"]),
    "Pad": pad,
    "ReduceMean": lambda a, x: x[0].mean([int(n) for n in x[1]], keepdim=bool(a.get("keepdims", 1))),
    "ReduceMin": lambda a, x: x[0].amin([int(n) for n in x[1]], keepdim=bool(a.get("keepdims", 1))),
    "Reshape": reshape,
    "Resize": resize,
    "Slice": slices,
    "Split": lambda a, x: x[0].chunk(a["num_outputs"], a.get("axis", 0)),
    "Squeeze": lambda a, x: x[0].squeeze([int(n) for n in x[1]]),
    "Transpose": lambda a, x: x[0].permute(a["perm"]),
    "Unsqueeze": unsqueeze,
}


class OnnxModule(nn.Module):
    """A graph for fixed sizes. Raises NotImplementedError for an operator that it does not know."""

    def __init__(self, path: Path, sizes: Mapping[str, int]) -> None:
        super().__init__()
        model = ir.from_proto(inliner.inline_local_functions(onnx.load(str(path))))
        fix_sizes(model, sizes)
        graph = ir.to_proto(model).graph
        self.inputs, self.results = [one.name for one in graph.input], [one.name for one in graph.output]
        self.nodes = [
            (
                one.op_type,
                {a.name: onnx.helper.get_attribute_value(a) for a in one.attribute},
                [*one.input],
                [*one.output],
            )
            for one in graph.node
        ]
        if unknown := sorted({kind for kind, *_ in self.nodes} - set(OPERATORS)):
            raise NotImplementedError(f"{path} must have known operators, got {', '.join(unknown)}. Add them here.")
        # Sizes, axes and scales of Resize stay numbers of Python: they decide shapes.
        sizing = {name for kind, _, given, _ in self.nodes if kind == "Resize" for name in given[1:]}
        self.numbers: dict[str, np.ndarray] = {}
        self.names: dict[str, str] = {}  # of initializers -> of buffers, which may not have dots
        for number, tensor in enumerate(graph.initializer):
            value = numpy_helper.to_array(tensor)
            if value.dtype.kind == "i" or tensor.name in sizing:
                self.numbers[tensor.name] = value
            else:
                self.names[tensor.name] = f"weight_{number}"
                self.register_buffer(f"weight_{number}", torch.from_numpy(np.array(value)))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        known: dict[str, Any] = {**self.numbers, **{name: getattr(self, own) for name, own in self.names.items()}}
        known |= zip(self.inputs, inputs, strict=True)
        for kind, attributes, given, made in self.nodes:
            results = OPERATORS[kind](attributes, [known[name] for name in given if name])
            known |= zip(made, results if isinstance(results, tuple) else (results,), strict=True)
        return tuple(known[name] for name in self.results)
