"""`hd-engines`: lists, verifies, builds and removes the plans of an engines folder. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from .. import shipped
from ..commands import run
from ..contract import EIGHT_BITS, Manifest, Size, read_size
from ..errors import EngineError
from . import inspect, timing, verdict
from .adapted import chosen, make_bundle, sentences
from .backends import BACKENDS, GPU_PLANNED, PLANNED, runner
from .build import choose_builder, fitting, gpu
from .cost import costs
from .cost import text as cost_text
from .current import installed_versions, not_here, shown_adapters, stale
from .eight_bits import CHOICES as EIGHT_CHOICES
from .plans import Built, PlanStore, Sizes, Wanted, belongs, size_text
from .rates import GPUS
from .refit import Adapted, refit, unfit
from .tensorrt import HARDWARE, NAMES, TILING, Options

console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def parse_batch_sizes(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """ "1,2,4" -> (1, 2, 4)."""
    if value is None:
        return None
    try:
        sizes = tuple(int(size) for size in value.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise click.BadParameter(f"--batch-sizes must be a list such as 1,2,4,8, got {value!r}.")
    return sizes


def parse_sizes(_: click.Context, __: click.Parameter, value: str | None) -> tuple[Size, ...]:
    """ "512x768,768x512" -> ((768, 512), (512, 768)), height first."""
    try:
        return tuple(read_size(size.strip().lower()) for size in (value or "").split(",") if value)
    except ValueError:
        raise click.BadParameter(
            f"--sizes must be a list of WIDTHxHEIGHT in pixels, such as 512x768,768x512, got {value!r}."
        ) from None


def build_options(command):  # type: ignore[no-untyped-def]
    """Adds the options of a build, for `hd-engines build` and `hd-export` alike."""
    for option in reversed(
        [
            click.option("--batch-sizes", callback=parse_batch_sizes, metavar="N,N,...",
                         help="Build a static plan for each.  [default: 1,2,4,8; openvino: 1]"),
            click.option("--sizes", callback=parse_sizes, metavar="WxH,WxH,...",
                         help="Compile for these sizes of pictures, too; the bundle's own is always among them."),
            click.option("--dynamic", is_flag=True, help="One plan for all batch sizes up to the largest; slower."),
            click.option("--shared-weights", is_flag=True,
                         help="One plan for all batch sizes and --sizes, compiled for each: one copy of the weights.  "
                         "[default: where a copy for each would take over half of its memory]"),
            click.option("--guidance-free", is_flag=True,
                         help="Also build UNets without the unconditional branch: half the work where guidance is 1."),
            click.option("--build-level", type=click.IntRange(0, 5), help="How hard TensorRT searches, 0 to 5."),
            click.option("--tiling", type=click.Choice(TILING),
                         help="How hard TensorRT searches for cache-friendly tiling."),
            click.option("--aux-streams", type=click.IntRange(0, 8), help="Additional streams inside a graph."),
            click.option("--workspace", type=click.IntRange(1), metavar="MIB", help="Scratch memory of one kernel."),
            click.option("--compute-capability", "compute_capabilities", multiple=True, metavar="X.Y",
                         help="TensorRT-RTX: only for these GPUs, such as 8.9. A plan for 7.5 serves no other GPU. "
                         "[default: all from 8.0 on that it supports]"),
            click.option("--hardware-compatibility-level", "hardware", type=click.Choice(["none", *HARDWARE]),
                         default="none", show_default=True,
                         help="TensorRT: which GPUs a plan serves: this one alone, all of its compute capability, or "
                         "all from 8.0 on. More GPUs may mean slower steps."),
            click.option("--version-compatible", is_flag=True,
                         help="TensorRT: plans that later versions and --backend tensorrt-lean run, too. They may be "
                         "slower."),
            click.option("--eight-bits", type=click.Choice(EIGHT_CHOICES), default="all", show_default=True,
                         help="TensorRT, fp8 and int8: which quantised layers stay so. products: no convolutions. A "
                         "layer without such a kernel is always in half precision. On a GPU, products are tried where "
                         "all are not faster."),
            click.option("--refittable", is_flag=True,
                         help="TensorRT: plans that hd-engines refit and hd-run --lora put adapters into, in seconds. "
                         "They may be slower."),
            click.option("--strip-weights", is_flag=True,
                         help="TensorRT: small plans, which get the bundle's weights when they are loaded. They may be "
                         "slower."),
            click.option("--faster-than", metavar="FOLDER", type=click.Path(path_type=Path),
                         help="Engines of the same model in fp16: fp8 and int8 are refused where they take longer on "
                         "this GPU. [default: fp16 plans that the folder still has]"),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def wanted_of(values: dict) -> Wanted:
    """What the options of `build_options` ask for."""
    options = Options(
        values["build_level"],
        values["tiling"],
        values["aux_streams"],
        values["workspace"],
        tuple(values["compute_capabilities"]),
        None if values["hardware"] == "none" else values["hardware"],
        values["version_compatible"] or None,
        None if values["eight_bits"] == "all" else values["eight_bits"],
        values["refittable"] or None,
        values["strip_weights"] or None,
    )
    return Wanted(
        values["batch_sizes"] or (),
        values["dynamic"],
        values["shared_weights"],
        values["guidance_free"],
        options,
        values["sizes"],
    )


def check_options(backend: str, precision: str, wanted: Wanted, faster_than: Path | None = None) -> None:
    """Raises EngineError for an option of `build_options` that has no effect on what is made for a backend."""
    options = wanted.options or Options()
    if options.eight_bits and precision not in EIGHT_BITS:
        raise EngineError(f"--eight-bits is an option of fp8 and int8, got --precision {precision}. Leave it out.")
    if backend in GPU_PLANNED:
        return
    sizes = {
        "--batch-sizes": wanted.batch_sizes, "--sizes": wanted.pictures, "--guidance-free": wanted.guidance_free
    }  # fmt: skip
    given = {
        **sizes,
        "--dynamic": wanted.dynamic,
        "--shared-weights": wanted.shared,
        "--build-level": options.level is not None,
        "--tiling": options.tiling,
        "--aux-streams": options.aux_streams is not None,
        "--workspace": options.workspace,
        "--compute-capability": options.compute_capabilities,
        "--hardware-compatibility-level": options.hardware,
        "--version-compatible": options.version_compatible,
        "--eight-bits": options.eight_bits,
        "--refittable": options.refittable,
        "--strip-weights": options.stripped,
        "--faster-than": faster_than,
    }
    takes = sizes if BACKENDS[backend].plans or BACKENDS[backend].compiles else {}
    for name in (name for name, value in given.items() if value and name not in takes):
        kind = "compiled plans" if name in sizes else "TensorRT"
        raise EngineError(
            f"{name} is an option of {kind}, got --backend {backend}. Leave it out, or name another backend, such as "
            "--backend tensorrt."
        )


def resolve_backend(backend: str) -> str:
    """The backend that "auto" means on this machine, which is printed."""
    if backend != "auto":
        return backend
    backend, sentence = choose_builder(gpu())
    console.print(sentence)
    return backend


def build_with_progress(folder: Path, backend: str, wanted: Wanted, faster_than: Path | None = None) -> list[Built]:
    """Builds what is missing, with a line and a true bar for each plan. Raises EngineError where it is not worth it.

    faster_than: see `judge_on_gpu`.
    """
    check_options(backend, Manifest.load(folder, verify=False).precision, wanted, faster_than)
    if backend in GPU_PLANNED:
        wanted, why = fitting(folder, wanted, gpu())
        if why:
            console.print(why)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    done, manifest = list[Built](), Manifest.load(folder, verify=False)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0, visible=False)

        def on_build(number: int, total: int, graph: str, sizes: Sizes, why: str, fraction: float) -> bool:
            text = f"{number + 1}/{total} {graph} {size_text(sizes)} ({why})"
            progress.update(task, description=text, completed=fraction, visible=True)
            return True

        for built in BACKENDS[backend].builder().build(backend, folder, wanted, on_build):
            done.append(built)
            if built.why:
                cpu_types = json.loads(built.plan.parts["options"]).get("inference", "")
                if built.plan.parts["precision"] in EIGHT_BITS:
                    cpu_types = f"{built.plan.parts['precision']} and {cpu_types}"
                types = ", ".join(f"{n} {kind.lower()}" for kind, n in built.plan.proof.get("types", {}).items())
                console.print(
                    f"{built.plan.graph:18} {built.plan.shown(manifest):16} {built.plan.seconds:6.1f} s "
                    f"{built.plan.size / 1e6:8.1f} MB   computes in: {types or cpu_types}   ({built.why})"
                )
    new = sum(bool(built.why) for built in done)
    if new:
        seconds = sum(built.plan.seconds for built in done if built.why)
        console.print(f"Built {new} of {len(done)} plans in {seconds:.0f} s; the others were there.")
    else:
        console.print(f"All {len(done)} plans are there and current: nothing was built.")
    if BACKENDS[backend].measured:
        judge_on_cpu(folder, backend)
        return done
    try:
        judge_on_gpu(folder, backend, faster_than)
    except timing.NotFasterError as slower:
        options = wanted.options or Options()
        if options.eight_bits is not None:
            raise
        console.print(f"{slower} Building again with convolutions in half precision (--eight-bits products).")
        wanted = replace(wanted, options=replace(options, eight_bits="products"))
        return build_with_progress(folder, backend, wanted, faster_than)
    return done


def judge_on_cpu(folder: Path, backend: str) -> None:
    """Prints the verdict on a backend of the CPU on this processor, and keeps it for `hd-run`.

    Raises EngineError where the pictures are not near enough or not faster, and removes what was compiled.
    """
    module = BACKENDS[backend].on_host()
    with console.status(f"comparing {backend} with ONNX Runtime"):
        from ..calibration.fidelity import fidelity
        from ..runtime.comparing import compare_backend

        manifest = Manifest.load(folder, verify=False)
        shelf = module.shelf_of(folder, manifest, module.inference())
        small, found = shelf.keeps("unet"), verdict.read(shelf)
        # hd-export measured already how near int8 is.
        compare = small and found is None and manifest.precision == "fp32"
        report = fidelity(folder, folder, backend=backend) if compare else None
        found = found or compare_backend(folder, backend, 2 if small else 1)
    if report is not None:
        console.print(report.summary())
    if found.passes and (report is None or report.passes):
        from_on = "always" if found.pays == 1 else f"from {found.pays} pictures on"
        console.print(f"On this processor it is {found}; hd-run takes it {from_on}.")
        return
    store = PlanStore(folder)
    for plan in list(store):
        if plan.parts["backend"] == backend and belongs(plan, manifest):
            store.remove(plan)
    raise EngineError(
        f"{backend} is {found}. {' '.join(report.sentences()) if report is not None else ''} Nothing compiled was "
        "kept; run it with --backend onnxruntime."
    )


def judge_on_gpu(folder: Path, backend: str, other: Path | None) -> None:
    """Prints how much faster than float16 a folder in eight bits is here. Raises EngineError where it is not faster.

    other: engines of the same model in float16. Prints why where it cannot measure.
    """
    precision = Manifest.load(folder, verify=False).precision
    if precision not in EIGHT_BITS:
        return
    unknown = f"Whether {precision} is faster than {timing.OTHER} on "
    if gpu() is None:
        console.print(f"{unknown}a GPU is measured where there is one: hd-engines build {folder} --faster-than FOLDER.")
        return
    with console.status(f"timing the UNet in {precision} and {timing.OTHER}"):
        found = timing.compare(folder, other or folder, backend)
    if found:
        console.print(timing.report(found, precision))
    elif other is not None:
        raise EngineError(
            f"{other} has no {timing.OTHER} plan of the UNet for {backend}, this GPU and a batch size that {folder} "
            f"has. Build it: hd-engines build {other} --backend {backend}."
        )
    else:
        console.print(f"{unknown}this GPU was not measured: name engines in {timing.OTHER} (--faster-than FOLDER).")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="handiffuser", prog_name="hd-engines")
def commands() -> None:
    """Builds, lists, verifies and removes the compiled plans of an engines folder."""


@commands.command()
@click.argument("folder")
@click.option("--backend", type=click.Choice(["auto", *PLANNED]), default="auto",
              show_default=True, help="auto: TensorRT-RTX where it runs on this machine's GPU, else TensorRT. "
              "openvino: for this CPU.")  # fmt: skip
@build_options
def build(folder: str, backend: str, **values) -> int:  # type: ignore[no-untyped-def]
    """Builds the plans of the bundle FOLDER that are missing or stale."""
    path = shipped.resolve(folder, "bundle")
    build_with_progress(path, resolve_backend(backend), wanted_of(values), values["faster_than"])
    if shipped.is_shipped(path):
        console.print(f"The demo's plans are in {PlanStore(path).folder}, not in the installed package.")
    return 0


@commands.command()
@click.argument("folder")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--lora", multiple=True, required=True, metavar="FILE[:SCALE]",
              help="An adapter (LoRA, .safetensors) to merge; repeatable.")  # fmt: skip
def merge(folder: str, out: Path, lora: tuple[str, ...]) -> int:
    """Writes the bundle FOLDER with adapters merged into its weights to OUT, in seconds and without PyTorch.

    `hd-engines build OUT` then builds plans of it. Files that the adapters leave alone are links.
    """
    path, adapters = shipped.resolve(folder, "bundle"), chosen(lora)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EngineError(f"{out} must be a new or an empty folder. Choose another one, or empty it.")
    if not adapters:
        raise EngineError("--lora must have a scale other than 0. The bundle itself is what scale 0 gives.")
    made = make_bundle(out.absolute(), path, adapters)
    for sentence in sentences(adapters, path):
        console.print(sentence)
    console.print(f"The bundle is in {made}. For TensorRT, build its plans: hd-engines build {out}.")
    return 0


@commands.command("refit")
@click.argument("folder")
@click.option("--lora", multiple=True, metavar="FILE[:SCALE]",
              help="An adapter (LoRA, .safetensors) to put in; repeatable. Scale 0 leaves it out.")  # fmt: skip
def refit_plans(folder: str, lora: tuple[str, ...]) -> int:
    """Writes TensorRT plans of FOLDER with adapters, in seconds, for `hd-run --lora` with the same ones.

    They lie beside the plans that were built with --refittable, which stay as they are. Without adapters it removes
    what it wrote before: then FOLDER has the base's plans alone.
    """
    path, adapters = shipped.resolve(folder, "bundle"), chosen(lora)
    manifest = Manifest.load(path, verify=False)
    if not adapters:
        console.print(f"Removed {len(unfit(path))} plans with adapters. The base's are as they were built.")
        return 0
    adapted, built = Adapted(path, adapters), {plan.parts["backend"] for plan in PlanStore(path) if plan.refittable}
    names = [runner(name) for name in NAMES if name in built]
    for name in [name for name in names if BACKENDS[name].installed()] or names[:1] or NAMES[:1]:
        for plan, seconds in refit(name, path, adapted):
            what = f"{seconds:6.1f} s" if seconds else "was there"
            console.print(f"{plan.graph:18} {plan.shown(manifest):16} {plan.size / 1e6:8.1f} MB   {what}")
    for sentence in sentences(adapters, path):
        console.print(sentence)
    return 0


@commands.command("list")
@click.argument("folder")
def list_plans(folder: str) -> int:
    """Lists the plans of FOLDER, and whether they belong to its bundle as it is now."""
    path = shipped.resolve(folder, "bundle")
    manifest, store = Manifest.load(path, verify=False), PlanStore(path)
    versions = installed_versions()
    heading = ""
    for plan in sorted(store, key=lambda plan: plan.made_for):
        if plan.made_for != heading:
            heading = plan.made_for
            click.echo(f"{heading}, {plan.parts['precision']}")
        state = stale(plan, manifest, versions) or store.problem(plan, verify=False) or not_here(plan) or "current"
        size = f"{plan.size / 1e6:8.1f} MB   built in {plan.seconds:6.1f} s"
        shown = plan.shown(manifest) if plan.graph in manifest.graphs else plan.parts["sizes"]
        click.echo(f"  {plan.graph:18} {shown:16} {size}   {state}{shown_adapters(plan)}")
    if not heading:
        click.echo(f"{path} has no plans. Build some: hd-engines build {folder}")
    return 0


@commands.command("inspect")
@click.argument("path", metavar="PLAN|FOLDER")
@click.option("--graph", help="For a folder: show only this graph's plans.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON for each plan, with every layer.")
@click.option(
    "--cost",
    is_flag=True,
    help="For a folder: kernels, bytes, operations and the least time of each graph, read off the graphs.",
)
@click.option(
    "--gpu",
    "card",
    type=click.Choice(list(GPUS)),
    help="With --cost: the GPU whose rates to take. None need be here.  [default: h200]",
)
@click.option("--batch-size", type=click.IntRange(1), help="With --cost: pictures.  [default: 1]")
def inspect_plans(
    path: str, graph: str | None, as_json: bool, cost: bool, card: str | None, batch_size: int | None
) -> int:
    """Says what a plan was compiled to: layers by kind, type and kernel, and its memory.

    --cost needs no plans: it says what each backend would run, and what that takes at least.
    """
    if cost:
        return show_cost(shipped.resolve(path, "bundle"), graph, as_json, card or "h200", batch_size or 1)
    if card or batch_size:
        raise click.UsageError("--gpu and --batch-size must come with --cost. Add --cost, or leave them out.")
    where = Path(path) if path.endswith(".plan") else shipped.resolve(path, "bundle")
    for plan in inspect.find_plans(where, graph):
        counts = inspect.summary(plan)
        click.echo(json.dumps(counts) if as_json else inspect.text(counts))
    return 0


def show_cost(folder: Path, graph: str | None, as_json: bool, card: str, batch: int) -> int:
    with console.status("reading the graphs"):
        found = list(costs(folder, Manifest.load(folder, verify=False), GPUS[card], graph, batch))
    click.echo("\n".join(json.dumps(one) for one in found) if as_json else cost_text(found, GPUS[card]))
    return 0


@commands.command()
@click.argument("folder")
@click.option("--graph", help="Compare only this graph.")
@click.option("--backend", type=click.Choice(["auto", *NAMES]), default="auto", show_default=True)
@click.option("--output", "-o", type=click.Path(path_type=Path),
              help="Where Polygraphy's files go.  [default: FOLDER's name and -compare]")  # fmt: skip
def compare(folder: str, graph: str | None, backend: str, output: Path | None) -> int:
    """Runs a real run's inputs through the plans of FOLDER and through float32, and compares every output.

    Without a GPU it runs a graph that rounds as a GPU does, instead of a plan. It writes inputs, graphs and commands
    for Polygraphy into a folder. The exit code is 1 where an output is too far off, or not finite.
    """
    with console.status("loading"):
        from ..calibration.compare import compare as compared
        from ..calibration.compare import hint, text
    path = shipped.resolve(folder, "bundle")
    out = output or Path(f"{path.name}-compare")
    wrong = 0
    for found in compared(path, out, graph, backend):
        console.print(text(found), style=None if found.passes else "red")
        wrong += not found.passes
    console.print(hint(out))
    return 1 if wrong else 0


@commands.command()
@click.argument("folder")
def verify(folder: str) -> int:
    """Hashes the bundle and every plan of FOLDER. The exit code is 1 when something is damaged."""
    path = shipped.resolve(folder, "bundle")
    manifest, store = Manifest.load(path, verify=False), PlanStore(path)
    problems = list(manifest.problems(path))
    count = 0
    for plan in store:
        count += 1
        if problem := store.problem(plan, verify=True):
            problems.append(f"{plan.graph} {plan.parts['sizes']}: {problem}. Build it again: hd-engines build {folder}")
    for stray, why in store.strays().items():
        console.print(f"{stray}: {why}; `hd-engines prune {folder}` removes it.", style="yellow")
    for problem in problems:
        console.print(problem, style="red")
    if not problems:
        console.print(f"{len(manifest.files)} files of the bundle and {count} plans are sound.")
    return 1 if problems else 0


@commands.command()
@click.argument("folder")
@click.option("--all", "everything", is_flag=True, help="Remove current plans, too.")
@click.option("--dry-run", is_flag=True, help="Remove nothing; print what the command would remove.")
def prune(folder: str, everything: bool, dry_run: bool) -> int:
    """Removes plans of FOLDER that are stale or damaged, and leftovers of interrupted builds."""
    path = shipped.resolve(folder, "bundle")
    manifest, store = Manifest.load(path, verify=False), PlanStore(path)
    versions, freed = installed_versions(), 0
    verb = "would remove" if dry_run else "removed"
    for plan in list(store):
        why = "asked for" if everything else stale(plan, manifest, versions) or store.problem(plan, verify=True)
        if why:
            freed += plan.size
            console.print(f"{verb} {plan.path.name} ({why})")
            if not dry_run:
                store.remove(plan)
    for stray, why in store.strays().items():
        freed += stray.stat().st_size
        console.print(f"{verb} {stray.name} ({why})")
        if not dry_run:
            stray.unlink()
    console.print(f"{freed / 1e6:.1f} MB {'would be ' if dry_run else ''}freed.")
    return 0


def main() -> None:
    """Entry point: one sentence and an exit code instead of a traceback."""
    run("hd-engines", commands, "Stopped. What is built stays; the same command goes on.")


if __name__ == "__main__":
    main()
