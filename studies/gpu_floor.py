"""What the parts of a guided step of Stable Diffusion 1.5's size cost on a GPU, and what compiling reaches.

    python studies/gpu_floor.py libraries OUT.json      # each convolution, product and attention alone, by its library
    python studies/gpu_floor.py step OUT.json           # the UNet of diffusers: eager, channels last, torch.compile
    python studies/gpu_floor.py decide OUT.json OUT.json

Needs torch and diffusers, and for `libraries` onnx. The shapes are those of the exported step (tests/engines/sd15). It
measures replays of CUDA graphs, so launches do not count. Without a GPU it runs a few small shapes on the CPU, which
shows that it works and no more. `benchmarks/gpu.sh a` calls it.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

GRAPHS = Path(__file__).parents[1] / "tests" / "engines" / "sd15"
REPEATS, INSIDE = 20, 10  # replays, and calls in one graph
# ms on an H200. Below the first sum of library calls, a step plan of our own would pay; above the second it would not.
PAYS, DOES_NOT = 4.5, 6.0
NEAR = 1.25  # a compiled step within this of the sum leaves too little to gain
SIZES = {  # of diffusers' UNet2DConditionModel
    "cuda": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "cpu": {
        "sample_size": 8, "cross_attention_dim": 64, "attention_head_dim": 8, "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
}  # fmt: skip


def shapes_of_step() -> Counter[tuple[Any, ...]]:
    """(kind, shapes and settings) of the products in a guided step of one picture -> how often.

    conv: x, weight, pads, stride. matmul: rows, K, columns. attention: batch, heads, queries, keys, width.
    """
    import onnx
    from handiffuser.engines.cost import Graph

    model = onnx.load_model_from_string(gzip.decompress((GRAPHS / "unet.onnx.gz").read_bytes()))
    shapes = Graph(model, {"B": 1, "G": 2}).shapes
    found: Counter[tuple[Any, ...]] = Counter()
    for node in model.graph.node:
        given = [shapes.get(name) for name in node.input]
        settings = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        if node.op_type == "Conv":
            found[
                "conv", given[0], given[1], tuple(settings.get("pads", [0] * 4)), settings.get("strides", [1])[0]
            ] += 1
        elif node.op_type == "MatMul":
            rows, inner = given[0][0] * given[0][1], given[0][2]
            found["matmul", rows, inner, given[1][1]] += 1
        elif node.op_type == "Attention":
            (batch, heads, queries, width), keys = given[0], given[1][2]
            found["attention", batch, heads, queries, keys, width] += 1
        elif node.op_type == "MultiHeadAttention":
            (batch, queries, width), heads = given[0], settings["num_heads"]
            found["attention", batch, heads, queries, given[1][1], width // heads] += 1
    return found


def decide(libraries: float, compiled: float | None) -> list[str]:
    """What the figures mean for this project; ms of the sum of library calls and of the compiled step."""
    said = [f"The library calls of a step take {libraries:.2f} ms."]
    if compiled is not None and compiled <= NEAR * libraries:
        said.append(f"The compiled step takes {compiled / libraries:.2f} of that: never write a step plan of our own.")
    elif libraries < PAYS:
        said.append(f"That is under {PAYS} ms: a step plan over cuDNN, cuBLASLt and Triton kernels would pay.")
    elif libraries > DOES_NOT:
        said.append(f"That is over {DOES_NOT} ms: a step plan of our own would not pay.")
    else:
        said.append(f"That is between {PAYS} and {DOES_NOT} ms: tune graphs and options first, then measure again.")
    return said


class Bench:
    """Milliseconds of calls on the GPU, or on the CPU without one."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.float16 if self.device == "cuda" else torch.float32
        torch.set_grad_enabled(False)
        torch.backends.cudnn.benchmark = True

    def random(self, *shape: int) -> Any:
        return self.torch.randn(*shape, device=self.device, dtype=self.dtype)

    def __call__(self, call: Callable[[], Any], inside: int = INSIDE) -> float:
        torch = self.torch
        if self.device == "cpu":
            call()
            started = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - started)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            for _ in range(inside):
                call()
        taken = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / inside)
        return statistics.median(taken)


def convolution(bench: Bench, x: tuple, weight: tuple, pads: tuple, stride: int) -> dict[str, float]:
    """With channels first and last. Uneven padding is done beforehand."""
    import torch.nn.functional as F

    picture, taps, bias = bench.random(*x), 0.02 * bench.random(*weight), bench.random(weight[0])
    even = pads[:2] == pads[2:]
    picture = picture if even else F.pad(picture, (pads[1], pads[3], pads[0], pads[2]))
    padding, last = pads[:2] if even else (0, 0), bench.torch.channels_last
    moved, turned = picture.contiguous(memory_format=last), taps.contiguous(memory_format=last)
    return {
        "NCHW": bench(lambda: F.conv2d(picture, taps, bias, stride, padding)),
        "NHWC": bench(lambda: F.conv2d(moved, turned, bias, stride, padding)),
    }


def product(bench: Bench, rows: int, inner: int, columns: int) -> dict[str, float]:
    """In half, and in fp8 where the GPU and the shape allow it."""
    torch, x, weight = bench.torch, bench.random(rows, inner), 0.02 * bench.random(columns, inner)
    found = {"half": bench(lambda: torch.nn.functional.linear(x, weight))}
    if bench.device == "cuda" and inner % 16 == columns % 16 == 0:
        small, narrow = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        with contextlib.suppress(RuntimeError):  # a GPU without fp8
            found["fp8"] = bench(lambda: torch._scaled_mm(small, narrow.t(), one, one, out_dtype=bench.dtype))
    return found


def attention(bench: Bench, batch: int, heads: int, queries: int, keys: int, width: int) -> dict[str, float]:
    """By each fused kernel that takes it."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = bench.random(batch, queries, heads, width).transpose(1, 2)
    k, v = (bench.random(batch, keys, heads, width).transpose(1, 2) for _ in range(2))
    found = {}
    for kind in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        if kind == "MATH" and found:
            break
        try:
            with sdpa_kernel([getattr(SDPBackend, kind)]):
                found[kind] = bench(lambda: F.scaled_dot_product_attention(q, k, v))
        except RuntimeError:
            continue
    return found


@click.group()
def commands() -> None:
    """The floor of a step on this machine."""


@commands.command()
@click.argument("out", type=click.Path(path_type=Path))
def libraries(out: Path) -> None:
    """Times each product of a step alone, and sums them up."""
    bench, rows = Bench(), []
    measured = {"conv": convolution, "matmul": product, "attention": attention}
    wanted = sorted(shapes_of_step().items(), key=str)
    if bench.device == "cpu":
        wanted = [
            ((kind, *(1, 2, 64, 32, 8)[: 5 if kind == "attention" else 3]), 1) for kind in ("matmul", "attention")
        ]
        wanted.append((("conv", (1, 4, 8, 8), (8, 4, 3, 3), (1, 1, 1, 1), 1), 1))
    for (kind, *shape), count in wanted:
        taken = measured[kind](bench, *shape)
        rows.append({"kind": kind, "shape": shape, "count": count, "ms": taken})
    totals = {
        f"{kind} {how}": sum(
            one["count"] * one["ms"].get(how, min(one["ms"].values())) for one in rows if one["kind"] == kind
        )
        for kind, how in (("conv", "NCHW"), ("conv", "NHWC"), ("matmul", "half"), ("matmul", "fp8"))
    }
    totals["attention"] = sum(one["count"] * min(one["ms"].values()) for one in rows if one["kind"] == "attention")
    total = totals["conv NHWC"] + totals["matmul half"] + totals["attention"]
    out.write_text(json.dumps({"device": bench.device, "sum": total, "totals": totals, "rows": rows}))
    for name, value in totals.items():
        click.echo(f"{name:14} {value:8.3f} ms")
    click.echo("\n".join(decide(total, None)) if bench.device == "cuda" else "A CPU decides nothing.")


@commands.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seconds", default=200.0, help="No further compilation begins after so long.")
def step(out: Path, seconds: float) -> None:
    """Times diffusers' UNet in a CUDA graph: eager, channels last, compiled for fixed shapes. Writes after each."""
    started, bench = time.monotonic(), Bench()
    torch = bench.torch
    import torch._inductor.config as inductor
    from diffusers import UNet2DConditionModel

    sizes = SIZES[bench.device]
    with torch.device(bench.device):
        unet = UNet2DConditionModel(**sizes).to(bench.dtype).eval()
    x = bench.random(2, 4, sizes["sample_size"], sizes["sample_size"])
    words, now = bench.random(2, 77, sizes["cross_attention_dim"]), torch.tensor(500.0, device=bench.device)
    found: dict[str, float] = {}

    def measure(name: str, model: Any) -> None:
        found[name] = bench(lambda: model(x, now, words, return_dict=False)[0], inside=1)
        out.write_text(json.dumps({"device": bench.device, "ms": found}))
        click.echo(f"{name:24} {found[name]:8.3f} ms after {time.monotonic() - started:.0f} s")

    measure("eager NCHW", unet)
    unet = unet.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    measure("eager NHWC", unet)
    inductor.conv_1x1_as_mm, inductor.max_autotune_conv_backends = True, "ATEN"
    for name, options in (("compiled", {}), ("compiled, tuned products", {"max_autotune": True})):
        if time.monotonic() - started > seconds or (options and bench.device == "cpu"):  # a CPU has nothing to tune
            break
        torch._dynamo.reset()
        # A CPU's figure means nothing, so Inductor's minutes of C++ are spared there.
        how = {"options": options} if bench.device != "cpu" else {"backend": "aot_eager"}
        measure(name, torch.compile(unet, fullgraph=True, dynamic=False, **how))


@commands.command("decide")
@click.argument("floor", type=click.Path(path_type=Path, exists=True))
@click.argument("steps", type=click.Path(path_type=Path, exists=True))
def decide_command(floor: Path, steps: Path) -> None:
    """Prints what the two results mean."""
    found = json.loads(steps.read_text())["ms"]
    compiled = [value for name, value in found.items() if name.startswith("compiled")]
    said = decide(json.loads(floor.read_text())["sum"], min(compiled) if compiled else None)
    click.echo("\n".join(said))


if __name__ == "__main__":
    commands()
