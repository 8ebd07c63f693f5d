"""`hd-export`: a trained checkpoint -> a bundle of ONNX graphs, and engines of it, for `hd-run` without PyTorch."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

# A user has no use for the exporter's remarks.
os.environ.setdefault("TORCH_LOGS", "-all")
warnings.filterwarnings("ignore")

import click  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: E402

from .. import commands, hub  # noqa: E402
from ..adapters import split  # noqa: E402
from ..contract import ALL_GRAPHS, EIGHT_BITS, MANIFEST, Manifest  # noqa: E402
from ..engines.backends import BACKENDS, CHOICES, DEFAULT, PRECISIONS, Backend  # noqa: E402
from ..engines.base import check_sizes  # noqa: E402
from ..engines.cli import build_options, build_with_progress, check_options, resolve_backend, wanted_of  # noqa: E402
from ..engines.openvino import WORDS, inference  # noqa: E402
from ..engines.plans import Wanted  # noqa: E402
from ..errors import CheckpointError, HanDiffuserError  # noqa: E402
from ..models.configs import size_multiple  # noqa: E402
from ..models.layout import read_config, read_layout  # noqa: E402
from ..shipped import resolve  # noqa: E402
from .push import check_push  # noqa: E402
from .push import push as upload  # noqa: E402
from .source import changed, fingerprint  # noqa: E402

STOPPED = "Stopped. What is finished stays; the same command goes on."
KEPT = "finished by the export that was stopped"
PHASES = {"tracing": "tracing and writing", "comparing": "running beside PyTorch"}
console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def parse_size(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """ "512" -> (512, 512); "512x768" -> (768, 512): width x height, as every size is typed, to height and width."""
    if value is None:
        return None
    try:
        sides = [int(side) for side in value.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 8:
        raise click.BadParameter(f"--image-size must be 512, or 512x768 for width x height, got {value!r}.")
    return sides[-1], sides[0]


def parse_adapters(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[Path, float], ...]:
    """ "style.safetensors:0.8" -> (path, 0.8)."""
    try:
        return tuple(map(split, values))
    except CheckpointError as error:
        raise click.BadParameter(str(error)) from error


@dataclass(frozen=True)
class Options:
    """What a user asks of hd-export. `checkpoint` is its folder, `out` the bundle's."""

    checkpoint: Path
    out: Path
    backend: Backend
    precision: str
    body: Path | None
    adapters: tuple[tuple[Path, float], ...]
    image_size: tuple[int, int] | None
    opset: int
    fidelity: str
    accept_low_fidelity: bool
    wanted: Wanted
    faster_than: Path | None = None

    @property
    def base(self) -> str:
        """The precision of layers that are not quantised: float32 for a backend of the CPU, which lowers it itself."""
        if self.precision not in EIGHT_BITS:
            return self.precision
        return "fp32" if self.backend.measured else "fp16"

    def source(self) -> dict[str, str]:
        """What the bundle is made from: see `source.py`."""
        for_cpu = {"base": self.base} if self.precision in EIGHT_BITS and self.base == "fp32" else {}
        return fingerprint(
            self.checkpoint, self.body, self.adapters, precision=self.precision, image_size=self.image_size,
            opset=self.opset, **for_cpu,
        )  # fmt: skip

    def check(self) -> None:
        """Raises HanDiffuserError for what cannot work, before minutes of exporting."""
        read_layout(self.checkpoint)
        name = self.backend.name
        if self.precision not in self.backend.precisions:
            allowed = ", ".join(self.backend.precisions)
            raise HanDiffuserError(
                f"--precision must be one of {allowed} for {name}, got {self.precision}. Choose one of them, or "
                "another --backend."
            )
        if self.backend.plans_of:
            raise HanDiffuserError(
                f"--backend must be one that builds plans, got {name}, which only runs those of "
                f"{self.backend.plans_of}. Take --backend {self.backend.plans_of} --version-compatible."
            )
        check_options(name, self.precision, self.wanted, self.faster_than)
        self.check_sizes()
        if self.backend.plans:
            self.backend.builder().check_build(name, self.wanted.options)

    def check_sizes(self) -> None:
        """Raises EngineError for sizes that the bundle will not take."""
        parts, folder = read_layout(self.checkpoint).parts, self.checkpoint
        vae, unet = (read_config(parts[name], folder / name) for name in ("vae", "unet"))
        check_sizes(self.wanted.pictures, size_multiple(vae, unet), (0, 0))

    def load(self) -> Any:
        """The checkpoint with its adapters merged, for pictures of the size asked for."""
        from ..models import lora
        from ..models.checkpoint import Checkpoint
        from .bundle import at_image_size

        loaded = Checkpoint.load(self.checkpoint, mapped=True)
        for path, scale in self.adapters:
            console.print(lora.merge(loaded, path, scale))
        return loaded if self.image_size is None else at_image_size(loaded, *self.image_size)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option(
    "--backend",
    type=click.Choice(CHOICES),
    default=DEFAULT,
    show_default=True,
    help="What will run the bundle. Plans are built for TensorRT and OpenVINO. auto: the TensorRT for this machine's "
    "GPU.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Precision of the networks; hand features, latents and solver state stay float32. fp8 (TensorRT) and int8 "
    "(TensorRT, OpenVINO): for convolutions and products of UNet and decoder; the rest is fp16 or fp32. "
    "[default: fp16 for TensorRT, else fp32]",
)
@click.option("--body", type=click.Path(path_type=Path), help="SMPL-H body (.npz); default: the checkpoint's own.")
@click.option(
    "--lora",
    "adapters",
    multiple=True,
    callback=parse_adapters,
    metavar="FILE[:SCALE]",
    help="Merge an adapter (.safetensors) of hd-train --lora or for Stable Diffusion into the weights; repeatable.",
)
@click.option("--image-size", callback=parse_size, metavar="W[xH]", help="In pixels; default: as trained.")
@click.option("--opset", type=click.IntRange(18, 24), default=23, show_default=True, help="ONNX opset.")
@click.option(
    "--fidelity",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Compare half precision with float32 in whole runs; auto: for models small enough for a CPU.",
)
@click.option("--accept-low-fidelity", is_flag=True, help="Write the bundle even if it fails that comparison.")
@click.option(
    "--triton", type=click.Path(path_type=Path), metavar="FOLDER", help="Write a model repository for Triton, too."
)
@click.option(
    "--push",
    metavar="hf://ORG/NAME",
    help="Upload the bundle to the Hugging Face Hub, too; OUT is NAME where it is not given.",
)
@click.option("--license", "licence", metavar="ID", help="Licence of the weights on the card of --push.")
@build_options
@click.version_option(package_name="handiffuser", prog_name="hd-export")
def command(
    checkpoint: str,
    out: Path | None,
    backend: str,
    precision: str | None,
    triton: Path | None,
    push: str | None,
    licence: str | None,
    **values: Any,
) -> None:
    """Exports CHECKPOINT into the bundle OUT.

    CHECKPOINT is a folder in Hugging Face layout, the word demo, or an id of the Hugging Face Hub (org/name or
    hf://org/name@revision), which is downloaded.

    It runs each graph in ONNX Runtime right away, compares it with PyTorch, and does not write one over its tolerance.
    For TensorRT and OpenVINO it then builds plans. The same command again does only what is not done yet. On another
    machine, `hd-engines build OUT` builds plans from the bundle, without PyTorch.
    """
    chosen = BACKENDS[resolve_backend(backend)]
    asked = {name: values[name] for name in ("body", "adapters", "image_size", "opset", "fidelity",
                                             "accept_low_fidelity")}  # fmt: skip
    if out is None:
        if push is None:
            raise click.MissingParameter(param_hint="'OUT'", param_type="argument")
        out = Path(push.rpartition("/")[2])
    folder = resolve(checkpoint, "checkpoint")
    target = check_push(push, licence, folder, values["body"]) if push is not None else None
    options = Options(
        folder,
        out,
        chosen,
        precision or chosen.precisions[0],
        **asked,
        wanted=wanted_of(values),
        faster_than=values["faster_than"],
    )
    options.check()
    source = options.source()
    why = changed(out, source)
    if why:
        if (out / MANIFEST).exists():
            console.print(f"Exporting again: {', '.join(why)}.")
        export(options, source)
    else:
        console.print(f"The bundle in {out} is current: nothing was exported.")
    if chosen.plans:
        build_with_progress(out, chosen.name, options.wanted, options.faster_than)
    if chosen.compiles:
        compile_graphs(options)
    if triton is not None:
        from ..serving.triton import write

        console.print(f"Triton's repository is {write(out, triton).parent}.")
    say_what_it_is(options)
    if target is not None:
        console.print(f"Uploading to {hub.PREFIX}{target[0].repo}.")
        commit = upload(out, *target, read_layout(folder).notes)
        console.print(
            f"{hub.PREFIX}{target[0].repo} has it, commit {commit[:7]}. A new repository is private until you open it "
            "on its page."
        )


def say_what_it_is(options: Options) -> None:
    """Prints what a user should know about the bundle that is made."""
    out, precision, made_by = options.out, options.precision, Manifest.load(options.out, verify=False).made_by
    if made_by.get("body", "").startswith("the user's"):
        console.print(
            f"{out} now contains arrays of your SMPL-H body. Its licence forbids passing them on: keep this bundle, "
            "and every engine built from it, on your own machines.",
            style="yellow",
        )
    if precision == "bf16":
        console.print("It computes in bfloat16, which runs on NVIDIA GPUs only, best with TensorRT.")
    if precision in EIGHT_BITS and options.backend.measured:
        gain = made_by["beside_bfloat16"]
        console.print(
            f"With OpenVINO on this processor {precision} is {gain:.2f} times as fast as {WORDS[inference()]}."
        )
    elif precision in EIGHT_BITS:
        console.print(
            f"It computes in {precision} with TensorRT, on GPUs of compute capability "
            f"{'8.9, 9.0, 10.0 and 12.0' if precision == 'fp8' else '8.0 and later'}. Other backends give the same "
            "pictures and gain nothing."
        )
    console.print(f'The bundle is in {out}. Try it: hd-run {out} "a right hand making a fist"')


def compile_graphs(options: Options) -> None:
    """Compiles what has no current plan with PyTorch, for the GPU if PyTorch finds one."""
    import torch

    from .inductor import compile_bundle

    manifest = Manifest.load(options.out, verify=False)
    with console.status("compiling; a minute or two a graph and shape"):
        count = compile_bundle(
            options.load,
            options.out,
            options.body,
            "cuda" if torch.cuda.is_available() else "cpu",
            options.wanted,
            lambda plan, why: console.print(
                f"{plan.graph:18} {plan.shown(manifest):16} {plan.size / 1e6:8.1f} MB   compiled in "
                f"{plan.seconds:.0f} s   ({why})"
            ),
        )
    if not count:
        console.print("All graphs are compiled and current: nothing was compiled.")
    if torch.cuda.is_available():
        time_compiled(options.out)


def time_compiled(folder: Path) -> None:
    """Prints how fast a compiled step is on this GPU, and notes it for `hd-run`."""
    from ..engines.timing import beside_onnxruntime

    with console.status("timing the UNet beside ONNX Runtime"):
        try:
            found = beside_onnxruntime(folder)
        except HanDiffuserError as error:
            console.print(f"The compiled step was not timed beside ONNX Runtime's, so take --backend inductor. {error}")
            return
    taken = "inductor" if found.passes else "onnxruntime"
    console.print(
        f"On this GPU a step takes {found.fast * 1e3:.2f} ms with inductor and {found.exact * 1e3:.2f} ms with "
        f"onnxruntime at {found.sizes}, the smallest batch: hd-run --backend auto takes {taken} at every batch size."
    )


def export(options: Options, source: dict[str, str]) -> None:
    """The part that needs PyTorch. source: see `Options.source`."""
    with console.status("reading the checkpoint"):
        from .bundle import check_target, make_bundle
        from .lower import is_small
        from .weights import record_weights
        from .workspace import install, workspace

        import_module("onnxruntime")  # another process runs it, minutes from now
        loaded = options.load()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("exporting", total=len(ALL_GRAPHS))

        def on_step(graph: str, step: str) -> None:
            progress.update(task, description=f"{graph}: {PHASES[step]}")

        def on_graph(result: Any) -> None:
            progress.advance(task)
            progress.console.print(
                f"{result.name:18} {result.megabytes:8.1f} MB   {result.error:.1e} from PyTorch "
                f"(tolerance {result.tolerance:g}{', emulated' if result.emulated else ''})   "
                + (KEPT if result.kept else f"{result.seconds:.0f} s   {result.peak / 1e9:.1f} GB")
            )

        check_target(options.out)
        with workspace(options.out) as work:
            made = work / "bundle"
            make_bundle(loaded, made, options.base, options.body, options.opset, source, on_graph, on_step)
            compare = options.fidelity == "always" or (options.fidelity == "auto" and is_small(loaded))
            if options.precision != "fp32":
                lower(options, loaded, made, compare, progress, task)
            record_weights(loaded, made)
            install(made, options.out)


def lower(options: Options, loaded: Any, made: Path, compare: bool, progress: Progress, task: Any) -> None:
    """Quantises the bundle that is made, compares it with float32, and mends it. Raises HanDiffuserError where it
    fails nevertheless, unless the user accepts that."""
    from ..calibration.fidelity import Report
    from .lower import mend, quantize

    precision, say = options.precision, progress.console.print
    report: Report | None = None
    kept: dict[str, list[str]] = {}
    if precision in EIGHT_BITS:
        progress.update(task, description=f"quantizing to {precision}", total=None)
        report, kept = quantize(loaded, made, precision, options.body, options.opset, compare)
        for graph, noted in Manifest.load(made, verify=False).made_by["quantized"].items():
            size = sum(file.stat().st_size for file in made.glob(f"{graph}.onnx*")) / 1e6
            say(f"{graph:18} {size:8.1f} MB   {noted['quantized']} of {noted['layers']} layers in {precision}")
    elif compare:
        progress.update(task, description=f"comparing {precision} with float32", total=None)

        def on_step(step: str) -> None:
            progress.update(task, description=f"comparing: {step}")

        report, kept = mend(loaded, made, options.body, options.opset, on_step)
    if report is None:
        say(f"{precision} was not compared with float32 in whole runs (--fidelity always).")
        return
    say(report.summary())
    for graph, nodes in kept.items():
        say(f"{graph}: kept in {options.base if precision in EIGHT_BITS else 'float32'} for that: {', '.join(nodes)}")
    if not report.passes and not options.accept_low_fidelity:
        raise HanDiffuserError(
            f"{' '.join(report.sentences())} Nothing was written. Export with --precision "
            f"{options.base if precision in EIGHT_BITS else 'fp32'}, or with --accept-low-fidelity if this is good "
            "enough for you."
        )


def main() -> None:
    """Entry point: one sentence and an exit code instead of a traceback."""
    commands.run("hd-export", command, STOPPED)


if __name__ == "__main__":
    main()
