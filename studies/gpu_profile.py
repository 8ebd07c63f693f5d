"""Which kernels ONNX Runtime runs for a step and a decoder of Stable Diffusion 1.5's size, and how long each takes.

    python studies/gpu_variants.py weights WORK                      # random numbers for the graphs; seconds
    python studies/gpu_profile.py run WORK OUT.json                  # on a GPU; needs torch
    python studies/gpu_profile.py run WORK OUT.json --model BUNDLE   # another model's graphs

torch.profiler records every kernel of the process (CUPTI), also those that ONNX Runtime launches. It needs a PyTorch
for CUDA. Without a GPU the graphs run on the CPU, and there are no kernels to list. `benchmarks/gpu.sh a` calls it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from gpu_variants import NAMES, VARIANTS, inputs_of, session, sizes_of

RUNS = 5  # that are recorded, after as many that are not
SHOWN = 25  # kernels in the table
IDLE = 0.15  # of the time: more of it means that launching is what takes long
# What a kernel does, by words of its name; the first that fits counts. cuDNN, cuBLASLt and ONNX Runtime give the names.
KINDS = {
    "attention": "attention|flash|fmha|mha_|sdpa|softmax",
    "norm": "norm",
    "layout": "transpose|nchw|nhwc.*to|tonhwc|permute|concat|split|copy|cast|memcpy|memset",
    "convolution": "conv|fprop|wgrad|implicit|im2col|winograd|dgrad",
    "product": "gemm|cublas|cutlass|matmul|splitk|nvjet|xmma",
    "activation": "gelu|silu|sigmoid|tanh|quick",
    "elementwise": "elementwise|binary|unary|add|mul|bias|where|expand|gather|resize|upsample",
}


def kernels_of(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The work on the device in a Chrome trace of torch.profiler, in the order in which it began.

    Returns [{"name", "start": us, "us"}] of kernels, copies and fills.
    """
    found = [
        {"name": event["name"], "start": float(event["ts"]), "us": float(event["dur"])}
        for event in trace.get("traceEvents", [])
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(found, key=lambda one: one["start"])


def kind_of(name: str) -> str:
    """What a kernel does, a key of KINDS, or "other"."""
    plain = name.lower()
    return next((kind for kind, words in KINDS.items() if re.search(words, plain)), "other")


def summary(kernels: list[dict[str, Any]], runs: int) -> dict[str, Any]:
    """Kernels and milliseconds of one run, by name and by kind.

    busy: at least one kernel runs. wall: from the first kernel's begin to the last one's end.
    """
    names: dict[str, list[float]] = {}
    kinds: dict[str, list[float]] = {}
    busy, end = 0.0, 0.0
    for one in kernels:
        for found, key in ((names, one["name"]), (kinds, kind_of(one["name"]))):
            found.setdefault(key, []).append(one["us"])
        last = one["start"] + one["us"]
        busy += max(0.0, last - max(end, one["start"]))
        end = max(end, last)

    def rows(found: dict[str, list[float]]) -> list[dict[str, Any]]:
        made = [{"name": name, "count": len(us) / runs, "ms": sum(us) / runs / 1e3} for name, us in found.items()]
        return sorted(made, key=lambda row: -row["ms"])

    wall = end - kernels[0]["start"] if kernels else 0.0
    return {
        "count": len(kernels) / runs, "busy_ms": busy / runs / 1e3, "wall_ms": wall / runs / 1e3,
        "kinds": rows(kinds), "kernels": rows(names),
    }  # fmt: skip


def text(graph: str, variant: str, found: dict[str, Any]) -> list[str]:
    """The summary as a table, and what it means."""
    if not found["count"]:
        return [f"{graph} ({variant}): no kernels were recorded. A CPU has none."]
    idle = 1 - found["busy_ms"] / found["wall_ms"]
    lines = [
        f"{graph} ({variant}): {found['count']:.0f} kernels, {found['busy_ms']:.2f} ms of kernels in "
        f"{found['wall_ms']:.2f} ms a run; the GPU is idle for {100 * idle:.0f} %."
    ]
    if idle > IDLE:
        lines.append("Launching takes longer than computing: a captured graph would pay.")
    lines += [f"  {row['ms']:8.3f} ms {row['count']:6.0f}  {row['name']}" for row in found["kinds"]]
    lines.append("  by kernel:")
    most = found["kernels"][:SHOWN]
    return lines + [f"  {row['ms']:8.3f} ms {row['count']:6.0f}  {row['name'][:90]}" for row in most]


def recorded(found: Any, device: str, given: dict[str, Any], runs: int) -> list[dict[str, Any]]:
    """The kernels of so many runs of a session, after as many that warm it up."""
    import onnxruntime
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("torch must be built for CUDA to record kernels. Install such a build beside onnxruntime-gpu.")
    binding = found.io_binding()
    held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value, device, 0) for name, value in given.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for one in found.get_outputs():
        binding.bind_output(one.name, device)

    def run() -> None:
        for _ in range(runs):
            found.run_with_iobinding(binding)
        binding.synchronize_outputs()

    run()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorder:
        run()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(path))
        return kernels_of(json.loads(path.read_text()))


@click.group()
def commands() -> None:
    """Kernels of ONNX Runtime on this machine."""


@commands.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), help="A bundle, in place of random weights.")
@click.option("--variant", type=click.Choice(list(VARIANTS)), default="derived", show_default=True)
@click.option("--batch", default=1)
def run(work: Path, out: Path, model: Path | None, variant: str, batch: int) -> None:
    """Records both graphs, and prints their kernels."""
    summaries: dict[str, Any] = {}
    for graph in NAMES:
        path = (model or work) / f"{graph}.onnx"
        sizes = sizes_of(path, batch)
        found, device = session(path, VARIANTS[variant], sizes)
        runs = RUNS if device == "cuda" else 1
        summaries[graph] = summary(recorded(found, device, inputs_of(found, sizes), runs), runs)
        out.write_text(json.dumps({"variant": variant, "batch": batch, "graphs": summaries}))
        click.echo("\n".join(text(graph, variant, summaries[graph])))


if __name__ == "__main__":
    commands()
