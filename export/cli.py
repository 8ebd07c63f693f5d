"""`hd-export`: a trained checkpoint -> a bundle of ONNX graphs, and engines of it, for `hd-run` without PyTorch."""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

# PyTorch's threads spin beside ONNX Runtime's; and the exporter's remarks are no news to a user.
os.environ.setdefault("TORCH_LOGS", "-all")
warnings.filterwarnings("ignore")

import click  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: E402

from .. import commands  # noqa: E402
from ..contract import EIGHT_BITS, GRAPHS, MANIFEST, Manifest  # noqa: E402
from ..engines import openvino  # noqa: E402
from ..engines.build import check_backend  # noqa: E402
from ..engines.cli import build_options, build_with_progress, options_of, resolve_backend  # noqa: E402
from ..engines.plans import MODULES  # noqa: E402
from ..errors import HanDiffuserError  # noqa: E402
from ..models.layout import read_layout  # noqa: E402
from ..shipped import resolve  # noqa: E402
from .source import changed, fingerprint  # noqa: E402

STOPPED = "Stopped. What is finished stays; the same command goes on."
KEPT = "taken from the export that was stopped"
STEPS = {"tracing": "tracing and writing", "comparing": "running beside PyTorch"}
BACKENDS = ("onnxruntime", "auto", "openvino", *MODULES, "inductor")
console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def parse_size(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """ "512" -> (512, 512); "512x768" -> (512, 768), height first."""
    if value is None:
        return None
    try:
        sides = [int(side) for side in value.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 8:
        raise click.BadParameter(f"{value!r} is no size; write 512, or 512x768 for height x width.")
    return sides[0], sides[-1]


def parse_adapters(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[Path, float], ...]:
    """ "style.safetensors:0.8" -> (path, 0.8)."""
    found = []
    for value in values:
        path, scale = value.rpartition(":")[::2]
        try:
            found.append((Path(path), float(scale)) if path else (Path(value), 1.0))
        except ValueError:  # the colon is the path's own
            found.append((Path(value), 1.0))
        if not -10 <= found[-1][1] <= 10:
            raise click.BadParameter(f"{value!r}: a scale is a number from -10 to 10, most often 0.5 to 1.")
    return tuple(found)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="onnxruntime",
    show_default=True,
    help="What the pictures will be made with. TensorRT and OpenVINO get plans built for it; auto: the one for this "
    "machine's GPU.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", *EIGHT_BITS]),
    help="Of the networks; hand features, latents and solver state stay float32. fp8 and int8: convolutions and "
    "products of UNet and decoder, for TensorRT, or int8 for OpenVINO; the rest is fp16 or fp32. "
    "[default: fp16 for TensorRT, else fp32]",
)
@click.option("--body", type=click.Path(path_type=Path), help="SMPL-H body (.npz); default: the checkpoint's own.")
@click.option(
    "--lora",
    "adapters",
    multiple=True,
    callback=parse_adapters,
    metavar="FILE[:SCALE]",
    help="An adapter (.safetensors), of hd-train --lora or for Stable Diffusion, merged into the weights; repeatable.",
)
@click.option("--image-size", callback=parse_size, metavar="H[xW]", help="Pixels; default: as trained.")
@click.option("--opset", type=click.IntRange(18, 24), default=23, show_default=True, help="ONNX opset.")
@click.option(
    "--fidelity",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Compare half precision with float32 in whole runs; auto: for models small enough for a CPU.",
)
@click.option("--accept-low-fidelity", is_flag=True, help="Write the bundle even if it fails that comparison.")
@click.option("--triton", type=click.Path(path_type=Path), metavar="FOLDER", help="A model repository for Triton, too.")
@build_options
@click.version_option(package_name="handiffuser", prog_name="hd-export")
def command(
    checkpoint: str,
    out: Path,
    backend: str,
    precision: str | None,
    body: Path | None,
    adapters: tuple[tuple[Path, float], ...],
    image_size: tuple[int, int] | None,
    opset: int,
    fidelity: str,
    accept_low_fidelity: bool,
    triton: Path | None,
    **values: Any,
) -> None:
    """Exports CHECKPOINT (a folder in Hugging Face layout, or the word demo) into the bundle OUT.

    Each graph is run in ONNX Runtime right away and compared with PyTorch; one over its tolerance is not written.
    With a TensorRT backend, plans are then built for each batch size. The same command again does only what is not
    done yet. On another machine, `hd-engines build OUT` builds plans from the bundle, without PyTorch.
    """
    if backend == "auto":
        backend = resolve_backend(backend)
    precision = precision or ("fp16" if backend in MODULES else "fp32")
    folder = resolve(checkpoint, "checkpoint")
    read_layout(folder)  # before PyTorch is loaded
    if backend in MODULES:
        check_backend(backend, options_of(values))  # before minutes of exporting
    if backend == "openvino":
        check_openvino(precision)
    base = precision
    if precision in EIGHT_BITS:
        base = "fp32" if backend == "openvino" else "fp16"
    for_cpu = {"base": base} if precision in EIGHT_BITS and base == "fp32" else {}
    source = fingerprint(folder, body, adapters, precision=precision, image_size=image_size, opset=opset, **for_cpu)
    why = changed(out, source)
    if why:
        if (out / MANIFEST).exists():
            console.print(f"Exporting again: {', '.join(why)}.")
        export(folder, out, precision, base, body, adapters, image_size, opset, source, fidelity, accept_low_fidelity)
    else:
        console.print(f"The bundle in {out} is current: nothing was exported.")
    if backend in (*MODULES, "openvino"):
        build_with_progress(out, backend, values)
    if backend == "inductor":
        compile_with_inductor(folder, out, body, adapters, image_size)
    if triton is not None:
        from ..serving.triton import write

        console.print(f"Triton's repository is {write(out, triton).parent}.")
    if Manifest.load(out, verify=False).made_by.get("body", "").startswith("the user's"):
        console.print(
            f"{out} now contains arrays of your SMPL-H body. Its licence forbids passing them on: keep this bundle, "
            "and every engine built from it, on your own machines.",
            style="yellow",
        )
    if precision == "bf16":
        console.print("It computes in bfloat16, which runs on NVIDIA GPUs only, best with TensorRT.")
    if backend == "openvino" and precision == "int8":
        gain = Manifest.load(out, verify=False).made_by["beside_bfloat16"]
        console.print(f"With OpenVINO on this processor int8 is {gain:.2f} times as fast as bfloat16.")
    elif precision in EIGHT_BITS:
        console.print(
            f"It computes in {precision} with TensorRT, on GPUs of compute capability "
            f"{'8.9, 9.0, 10.0 and 12.0' if precision == 'fp8' else '8.0 and later'}. Other backends give the same "
            "pictures and gain nothing."
        )
    console.print(f'The bundle is in {out}. Try it: hd-run {out} "a right hand making a fist"')


def check_openvino(precision: str) -> None:
    """Raises HanDiffuserError unless OpenVINO computes bfloat16 on this processor, and this precision is one of its."""
    if precision not in ("fp32", "int8"):
        raise HanDiffuserError(
            f"OpenVINO rounds a float32 bundle to bfloat16 itself: leave out --precision {precision}, or take int8, or "
            "TensorRT."
        )
    if not openvino.has_bf16():
        raise HanDiffuserError("This processor has no bfloat16, so that OpenVINO gains nothing: take onnxruntime.")


def load_checkpoint(folder: Path, adapters: tuple[tuple[Path, float], ...], size: tuple[int, int] | None) -> Any:
    """The checkpoint with its adapters merged, for pictures of that size."""
    from ..models import lora
    from ..models.checkpoint import Checkpoint
    from .bundle import at_image_size

    loaded = Checkpoint.load(folder, mapped=True)
    for path, scale in adapters:
        console.print(lora.merge(loaded, path, scale))
    return loaded if size is None else at_image_size(loaded, *size)


def compile_with_inductor(
    folder: Path,
    out: Path,
    body: Path | None,
    adapters: tuple[tuple[Path, float], ...],
    image_size: tuple[int, int] | None,
) -> None:
    """Compiles what has no current plan, for the GPU if PyTorch finds one."""
    import torch

    from .inductor import compile_bundle

    with console.status("compiling; a minute or two a graph"):
        count = compile_bundle(
            lambda: load_checkpoint(folder, adapters, image_size),
            out,
            body,
            "cuda" if torch.cuda.is_available() else "cpu",
            lambda plan, why: console.print(
                f"{plan.graph:18} {plan.size / 1e6:8.1f} MB   compiled in {plan.seconds:.0f} s   ({why})"
            ),
        )
    if not count:
        console.print("All graphs are compiled and current: nothing was compiled.")


def export(
    folder: Path,
    out: Path,
    precision: str,
    base: str,
    body: Path | None,
    adapters: tuple[tuple[Path, float], ...],
    image_size: tuple[int, int] | None,
    opset: int,
    source: dict[str, str],
    fidelity: str,
    accept_low_fidelity: bool,
) -> None:
    """The part that needs PyTorch. base: the precision of what is not quantised."""
    with console.status("reading the checkpoint"):
        from .admit import admit, is_small, quantize
        from .bundle import check_target, make_bundle
        from .workspace import install, workspace

        import_module("onnxruntime")  # runs in another process, where it would be missed after minutes

        loaded = load_checkpoint(folder, adapters, image_size)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("exporting", total=len(GRAPHS))

        def on_step(graph: str, step: str) -> None:
            progress.update(task, description=f"{graph}: {STEPS[step]}")

        def on_graph(result: Any) -> None:
            progress.advance(task)
            progress.console.print(
                f"{result.name:18} {result.megabytes:8.1f} MB   {result.error:.1e} from PyTorch "
                f"(tolerance {result.tolerance:g}{', emulated' if result.emulated else ''})   "
                + (KEPT if result.kept else f"{result.seconds:.0f} s   {result.peak / 1e9:.1f} GB")
            )

        check_target(out)
        with workspace(out) as work:
            made = work / "bundle"
            make_bundle(loaded, made, base, body, opset, source, on_graph, on_step)
            compare = fidelity == "always" or (fidelity == "auto" and is_small(loaded))
            report, kept, other = None, {}, "float32"

            def say(step: str) -> None:
                progress.update(task, description=f"comparing: {step}")

            if precision in EIGHT_BITS:
                progress.update(task, description=f"quantizing to {precision}", total=None)
                report, kept, other = *quantize(loaded, made, precision, body, opset, compare), base
                for graph, noted in Manifest.load(made, verify=False).made_by["quantized"].items():
                    size = sum(file.stat().st_size for file in made.glob(f"{graph}.onnx*")) / 1e6
                    progress.console.print(
                        f"{graph:18} {size:8.1f} MB   {noted['quantized']} of {noted['layers']} layers in {precision}"
                    )
            elif precision != "fp32" and compare:
                progress.update(task, description=f"comparing {precision} with float32", total=None)
                report, kept = admit(loaded, made, body, opset, say)
            if report is not None:
                progress.console.print(report.summary())
                for graph, nodes in kept.items():
                    progress.console.print(f"{graph}: kept in {other} for that: {', '.join(nodes)}")
                if not report.passes and not accept_low_fidelity:
                    raise HanDiffuserError(
                        f"{' '.join(report.sentences())} Nothing was written. Export with --precision "
                        f"{base if precision in EIGHT_BITS else 'fp32'}, or with --accept-low-fidelity if this is "
                        "good enough for you."
                    )
            elif precision != "fp32":
                progress.console.print(f"{precision} was not compared with float32 in whole runs (--fidelity always).")
            install(made, out)


def main() -> None:
    """Entry point: one sentence and an exit code instead of a traceback."""
    commands.run("hd-export", command, STOPPED)


if __name__ == "__main__":
    main()
