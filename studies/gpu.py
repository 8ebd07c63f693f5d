"""Measures everything on a GPU in one run: first whether it works, then how fast. `benchmarks/gpu.sh` calls it.

    benchmarks/gpu.sh a                 # seven minutes: what a step costs at least, and what compiling reaches
    benchmarks/gpu.sh b                 # seven minutes a call: ONNX Runtime's graphs, TensorRT's plans, Inductor
    benchmarks/gpu.sh                   # every backend; Stable Diffusion 1.5's size with random weights
    benchmarks/gpu.sh --size tiny --backends onnxruntime        # another size; without a GPU it runs on the CPU

First the demo, batch 1, on every backend, with its pictures beside the CPU's; then the large size: each backend alone,
peers, larger batches. What tells most for its time comes first. Each step is a process of its own with a time limit;
what it printed is kept in OUT/<step>.txt, and a step that is done is not done again by the same command: an interrupted
or failed one is. The acts export nothing, and leave what does not fit into their time for the next call. Results go to
benchmarks/results/<date>-<GPU>/, working files (bundles, plans) to --work.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
from handiffuser import shipped
from handiffuser.commands import run
from handiffuser.engines.backends import BACKENDS as TABLE
from handiffuser.engines.backends import GPU_PLANNED
from handiffuser.engines.build import gpu
from handiffuser.errors import EngineError
from handiffuser.installed import version

BACKENDS = tuple(name for name, one in TABLE.items() if one.gpu and not one.plans_of)
NAMES = (
    "torch", "diffusers", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-lean", "tensorrt-rtx",
    "cuda-bindings", "numpy", "handiffuser",
)  # fmt: skip
PROMPTS = ("a right hand making a fist, blue background", "two open hands", "a left hand giving a thumbs up")
CPU_PATIENCE = 5.0  # a step's limit on a CPU, in limits on a GPU
MIN_STEP_SECONDS, ACT_SECONDS = 15.0, 420.0  # seconds that a step needs at least, and those of an act
BUILD, BUILD_LEAST = 380.0, 150.0  # seconds that a plan or a compilation may take, and without which none begins
LIKE = 35.0  # dB between pictures of half precision on the GPU and of the same bundle on the CPU
Runner = Callable[[Sequence[str], Path, float], int]


@dataclass(frozen=True)
class Step:
    """name; the command (after `python`); seconds it may take; what it leaves for later steps, if anything. least: with
    fewer seconds left in an act, it waits for the next call. always: it takes a second, and each call does it again."""

    name: str
    command: tuple[str, ...]
    limit: float
    makes: Path | None = None
    needs: tuple[str, ...] = ()  # steps without which this one makes no sense
    least: float = MIN_STEP_SECONDS
    always: bool = False


def steps(work: Path, out: Path, backends: Sequence[str], size: str, on_gpu: bool, quick: bool) -> list[Step]:
    """Everything, in order."""
    precision, device = ("fp16", "cuda") if on_gpu else ("fp32", "cpu")
    export, engines, bench = (("-m", f"handiffuser.{room}.cli") for room in ("export", "engines", "benchmarks"))
    here, speed = (str(Path(__file__).with_name(name)) for name in ("gpu.py", "training_speed.py"))

    def build(backend: str, folder: Path, checkpoint: Path | str, sizes: str) -> tuple[str, ...]:
        """The command that makes a folder run on a backend; ONNX Runtime needs none."""
        if backend == "inductor":  # compiles from the checkpoint; the bundle in the folder stays
            given = ("--precision", precision, "--fidelity", "never", "--backend", backend)
            return (*export, str(checkpoint), str(folder), *given)
        return (*engines, "build", str(folder), "--backend", backend, "--batch-sizes", sizes, "--guidance-free")

    small, large, checkpoint = work / "demo", work / size, work / f"{size}-checkpoint"
    bare = ("--precision", precision, "--fidelity", "never")
    found = [Step("machine", (here, "machine"), 60)]
    if on_gpu:
        found.append(Step("gpu-tests", ("-m", "pytest", "-q", "-n", "0", "-m", "gpu", "tests"), 300))
    found.append(Step("demo-export", (*export, "demo", str(small), *bare), 300, small))
    for backend in backends:
        needs = ["demo-export"]
        if backend != "onnxruntime":
            found.append(Step(f"demo-build-{backend}", build(backend, small, "demo", "1"), 240, needs=tuple(needs)))
            needs.append(f"demo-build-{backend}")
        same = (here, "same", str(small), "--backend", backend, "--device", device)
        found.append(Step(f"demo-{backend}", same, 120, needs=tuple(needs)))
    found.append(Step("random", (here, "random", size, str(checkpoint)), 120, checkpoint))
    train = (speed, str(checkpoint), "--output", str(out / "training.json"))
    found.append(Step("training", train, 240, needs=("random",)))
    found.append(Step("export", (*export, str(checkpoint), str(large), *bare), 900, large, ("random",)))
    counts = [("1", ("--steps", "20")), ("4,8", ("--steps", "20"))]
    repeats = ("--repeats", "1" if quick else "3")
    for number, (sizes, more) in enumerate(counts):
        for place, backend in enumerate(backends):
            name, needs = f"{backend}-{sizes.replace(',', '-')}", ["export", f"demo-{backend}"]
            if backend != "onnxruntime" and not (backend == "inductor" and number):
                found.append(Step(f"build-{name}", build(backend, large, checkpoint, sizes), 420, needs=("export",)))
                needs.append(f"build-{name}")
            peers = ("--peers",) if not place and not number else ()  # the same for every backend
            command = (*bench, str(large), "--checkpoint", str(checkpoint), "--backend", backend, "--device", device,
                       "--batch-sizes", sizes, *more, *repeats, *peers, "--output", str(out / f"{name}.json"),
                       "--report", str(out / f"{name}.html"))  # fmt: skip
            found.append(Step(name, command, 420, needs=tuple(needs)))
    return found


def act_steps(
    act: str,
    work: Path,
    out: Path,
    quick: bool,
    on_gpu: bool,
    planned: Sequence[str] = (),
    compiles: bool = False,
) -> list[Step]:
    """What act "a" or "b" runs: first what tells most. planned: backends whose plans run on this GPU. compiles: whether
    Inductor can compile here."""
    scripts = ("gpu_floor.py", "gpu_variants.py", "gpu_profile.py", "gpu_plans.py", "gpu_inductor.py")
    floor, variants, profile, plans, inductor = (str(Path(__file__).with_name(name)) for name in scripts)
    weights = Step("variant-weights", (variants, "weights", str(work)), 120, work / "unet.onnx.data")
    demo = ("--model", str(shipped.bundle_path()))  # in place of random weights: its graphs run on a CPU, too
    if act == "a":
        results = [str(out / f"floor-{name}.json") for name in ("libraries", "step")]
        record = (profile, "run", str(work), str(out / "kernels.json"))
        return [
            Step("machine", (str(Path(__file__)), "machine"), 30),
            Step("floor-libraries", (floor, "libraries", results[0]), 120),
            *([weights] if on_gpu else []),
            Step("kernels", record if on_gpu else (*record, *demo), 60, None, (weights.name,) if on_gpu else ()),
            Step("floor-step", (floor, "step", results[1], "--seconds", "150"), 260),
            Step("floor-decide", (floor, "decide", *results), 30, needs=("floor-libraries", "floor-step")),
        ]
    more = ("--quick",) if quick else ()
    found = [weights]
    if not on_gpu:
        found, more = [], (*more, *demo)
    first = ("bundle", "derived", "derived-graph", "derived-bias", "derived-search", "derived-all", "bundle-nhwc")
    ready = tuple(step.name for step in found)

    def variant(graph: str, batch: int, name: str) -> Step:
        base = f"variant-{graph}-{batch}-bundle"
        words = (variants, "run", str(work), graph, name, "--batch", str(batch), *more)
        return Step(f"variant-{graph}-{batch}-{name}", words, 60, None, ready if name == "bundle" else (base,))

    def compiled(name: str, script: str, words: tuple[str, ...], makes: Path) -> list[Step]:
        """A build of one picture, which takes minutes, and its run."""
        base, of_model = f"variant-{words[1]}-1-bundle", () if on_gpu else demo
        build = Step(f"{name}-build", (script, "build", *words, *of_model), BUILD, makes, (base,), BUILD_LEAST)
        return [build, Step(name, (script, "run", *words, *more), 60, None, (build.name,))]

    for graph in ("unet", "image_decoder"):
        found += [variant(graph, 1, name) for name in first[:3]]
        for backend in planned:
            words = (str(work), graph, backend)
            found += compiled(f"plan-{graph}-{backend}", plans, words, work / f"{graph}-1-{backend}.plan")
        if compiles:
            words = (str(work), graph)
            found += compiled(f"compiled-{graph}", inductor, words, work / f"{graph}-1-inductor.pt2")
    found += [variant(graph, 1, name) for graph in ("unet", "image_decoder") for name in first[3:]]
    found += [variant(graph, 4, name) for graph in ("unet", "image_decoder") for name in first[:3]]
    found.append(Step("variant-table", (variants, "table", str(work)), 30, always=True))
    return found


def run_step(command: Sequence[str], log: Path, limit: float) -> int:
    """Runs `python command`, its output into a file; the exit code, 124 when it took longer than `limit` seconds."""
    with open(log, "wb") as file:
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return 124
        finally:
            if process.poll() is None:  # also when Ctrl-C came: whatever the step has started goes with it
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def measure(
    found: Sequence[Step],
    out: Path,
    runner: Runner = run_step,
    say: Callable[[str], None] = print,
    budget: float = math.inf,
) -> int:
    """Runs the steps that are not done. Names failed steps, leaves out what needs them, and returns their number.

    budget: seconds for all of them. A step that has less than its `least` of them left waits for the next call.
    """
    out.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    ends = time.monotonic() + budget
    for step in found:
        left = ends - time.monotonic()
        done, log = out / f"{step.name}.done", out / f"{step.name}.txt"
        if done.exists() and not step.always and (step.makes is None or step.makes.exists()):
            say(f"{step.name}: done already")
            continue
        missing = [name for name in step.needs if name in failed]
        if missing:
            failed[step.name] = f"{missing[0]} failed"
            say(f"{step.name}: left out, because {failed[step.name]}")
            continue
        if left < step.least and not step.always:
            say(f"{step.name}: left for the next call of the same command")
            failed[step.name] = "the time was up"
            continue
        started = time.monotonic()
        limit = step.limit if step.always else min(step.limit, left)
        code = runner(step.command, log, limit)
        seconds = time.monotonic() - started
        if code:
            what = f"took longer than {limit:.0f} s" if code == 124 else f"failed with exit code {code}"
            failed[step.name] = what
            say(f"{step.name}: {what} after {seconds:.0f} s; see {log}")
        else:
            temporary = done.with_suffix(".tmp")
            temporary.write_text(json.dumps({"seconds": round(seconds, 1)}) + "\n")
            temporary.replace(done)
            say(f"{step.name}: {seconds:.0f} s")
    return len(failed)


def folders(out: Path | None, work: Path | None) -> tuple[Path, Path, Any]:
    """Where results and working files go, and the GPU, if there is one."""
    cuda = gpu()
    name = "CPU" if cuda is None else cuda.name.replace(" ", "-").replace("/", "-")
    out = out or Path("benchmarks/results") / f"{date.today()}-{name}"
    work = work or out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    return out, work, cuda


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def commands() -> None:
    """Proves and measures this toolkit on a GPU; see `all`. The other commands are its steps."""


@commands.command("all")
@click.option("--size", type=click.Choice(["tiny", "demo", "sd15"]), default="sd15", show_default=True)
@click.option("--backends", help="With commas.  [default: those that are installed]")
@click.option("--out", type=click.Path(path_type=Path), help="[default: benchmarks/results/<date>-<GPU>]")
@click.option("--work", type=click.Path(path_type=Path), help="Bundles and plans.  [default: a folder beside OUT]")
@click.option("--quick", is_flag=True, help="One sample of each figure.")
@click.option("--list", "listed", is_flag=True, help="Only say which steps there are.")
def everything(size: str, backends: str | None, out: Path | None, work: Path | None, quick: bool, listed: bool) -> int:
    """Runs every step that is not done yet."""
    cuda = gpu()
    chosen = backends.split(",") if backends else [name for name in BACKENDS if TABLE[name].installed()]
    if wrong := set(chosen) - set(BACKENDS):
        raise EngineError(f"--backends must be of {', '.join(BACKENDS)}, got {sorted(wrong)[0]!r}. Name others.")
    out, work, _ = folders(out, work)
    found = steps(work, out, chosen, size, cuda is not None, quick)
    if listed:
        for step in found:
            click.echo(f"{step.name:24} up to {step.limit:4.0f} s   python {' '.join(step.command)}")
        return 0
    work.mkdir(parents=True, exist_ok=True)
    failed = measure(found, out, say=lambda text: click.echo(text, err=True))
    click.echo(
        f"Results are in {out}. {f'{failed} steps failed; the same command tries them again.' if failed else ''}"
    )
    return 1 if failed else 0


@commands.command("act")
@click.argument("act", type=click.Choice(["a", "b"]))
@click.option("--out", type=click.Path(path_type=Path), help="[default: benchmarks/results/<date>-<GPU>]")
@click.option("--work", type=click.Path(path_type=Path), help="Graphs.  [default: a folder beside OUT]")
@click.option("--seconds", default=ACT_SECONDS, show_default=True, help="What does not fit is left for the next call.")
@click.option("--quick", is_flag=True, help="One sample of each figure.")
def act_command(act: str, out: Path | None, work: Path | None, seconds: float, quick: bool) -> int:
    """Runs one act, and prints what its figures mean."""
    out, work, cuda = folders(out, work)
    planned: list[str] = []
    if cuda is not None:
        from gpu_plans import runs_here

        planned = [name for name in GPU_PLANNED if TABLE[name].installed() and runs_here(name)]
    compiles = TABLE["inductor"].installed() and bool(shutil.which(os.environ.get("CXX", "g++")))
    found = act_steps(act, work, out, quick, cuda is not None, planned, compiles)
    if cuda is None:  # a trial of the act: a CPU may take its time
        found = [replace(step, limit=step.limit * CPU_PATIENCE) for step in found]
    failed = measure(found, out, say=lambda text: click.echo(text, err=True), budget=seconds)
    last = out / f"{found[-1].name}.txt"
    click.echo(last.read_text() if last.exists() else f"Results are in {out}.")
    return 1 if failed else 0


@commands.command()
def machine() -> int:
    """Prints GPU, driver, processor and versions."""
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    click.echo(f"CPU {model[0].partition(':')[2].strip() if model else 'unknown'}, {os.cpu_count()} threads")
    for name in NAMES:
        if number := version(name):
            click.echo(f"{name} {number}")
    return 0


@commands.command()
@click.argument("size")
@click.argument("folder", type=click.Path(path_type=Path))
def random(size: str, folder: Path) -> int:
    """Writes a checkpoint of random weights, with the demo's free body."""
    from handiffuser.models.checkpoint import random_checkpoint
    from handiffuser.models.configs import CONFIGS

    random_checkpoint(CONFIGS[size], body=shipped.checkpoint_path() / "body" / "smplh.npz").save(folder)
    return 0


@commands.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--backend", required=True)
@click.option("--device", required=True)
@click.option("--steps", "count", default=8)
def same(folder: Path, backend: str, device: str, count: int) -> int:
    """Makes pictures one by one on a backend and on the CPU, and compares them."""
    from handiffuser.runtime.pipeline import HanDiffuser

    settings = {"seed": 5, "steps": count}
    with HanDiffuser.load(folder, device="cpu", backend="onnxruntime", batch_size=1) as on_cpu:
        expected = on_cpu.generate(PROMPTS, **settings)
    backend_device = "auto" if backend in GPU_PLANNED else device
    with HanDiffuser.load(folder, device=backend_device, backend=backend, batch_size=1) as pipeline:
        found = pipeline.generate(PROMPTS, **settings)
    decibels = []
    for ours, theirs in zip(found, expected, strict=True):
        error = np.square(ours.image.astype(float) - theirs.image.astype(float)).mean()
        decibels.append(round(float(10 * np.log10(255**2 / max(error, 1e-6))), 1))
    click.echo(json.dumps({"backend": backend, "made_by": pipeline.made_by, "psnr_db": decibels}))
    if min(decibels) < LIKE:
        raise EngineError(f"The pictures of {backend} are {min(decibels)} dB from the CPU's; at least {LIKE} is right.")
    return 0


def main() -> None:
    run("gpu.sh", commands, "Stopped. What is done stays; the same command goes on.")


if __name__ == "__main__":
    main()
