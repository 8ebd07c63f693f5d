"""`hd-bench ENGINES` measures how fast a bundle runs on this machine, and where the time goes.

hd-bench demo --batch-sizes 1,4 --steps 12 --threads 1
hd-bench demo --batch-sizes 1 --peers --load --report bench.html
hd-bench --random sd15 --batch-sizes 1 --steps 2 --repeats 2

The last line of stdout is one JSON document with every sample. The tables above it are for people.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from .. import commands, shipped
from ..commands import INTERRUPTED
from ..contract import MANIFEST, Manifest
from ..engines.backends import CHOICES, DEVICES
from ..engines.cost import count
from ..engines.cuda import Cuda
from ..errors import EngineError, HanDiffuserError
from ..runtime.device import DeviceLoop
from ..runtime.loading import SERVER_PICTURES
from ..runtime.pipeline import HanDiffuser
from ..settings import MAX_GUIDANCE, MAX_STEPS, SOLVERS
from . import load as load_test
from . import measure, tables
from .card import Others, bf16_ceiling, card
from .soak import soak

FORMAT = 1  # of the JSON document
LEAVABLE = ("torch.compile", "onnxruntime", "openvino")  # peers; the others are made from diffusers eager
RANDOM = ("tiny", "demo", "sd15")
BUSY = 0.1  # cores of other processes: from here on a warning says so
SHARES, SERVED_ROUNDS, SERVED_STEPS = (0.5, 0.7, 0.9), 3, (4, 24)  # of --serve
MAX_BATCH, MAX_REQUESTS, MAX_REPEATS = 1024, 1_000_000, 10_000

notes = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def numbers(most: int) -> Any:
    """A click callback: "1,2,4" -> [1, 2, 4], each from 1 to `most`."""

    def parse(_: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
        if value is None:
            return None
        try:
            found = [int(part) for part in value.split(",")]
        except ValueError:
            found = [0]
        if any(not 1 <= number <= most for number in found):
            raise click.BadParameter(
                f"must be whole numbers from 1 to {most}, got {value!r}. Separate them with commas, such as 1,2,4."
            )
        return list(dict.fromkeys(found))

    return parse


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("engines", required=False)
@click.option("--random", "size", type=click.Choice(RANDOM), help="Measure an untrained bundle of this size instead.")
@click.option(
    "--workdir", type=click.Path(path_type=Path), help="Keep the bundle of --random here.  [default: temporary]"
)
@click.option(
    "--batch-sizes", callback=numbers(MAX_BATCH), default="1,2,4,8", show_default=True, help="Pictures at once."
)
@click.option("--steps", callback=numbers(MAX_STEPS), help="Steps of a picture.  [default: the bundle's]")
@click.option("--solver", type=click.Choice(list(SOLVERS)), help="[default: the bundle's]")
@click.option("--guidance", type=click.FloatRange(0, MAX_GUIDANCE), help="[default: the bundle's]")
@click.option(
    "--repeats", type=click.IntRange(1, MAX_REPEATS), default=5, show_default=True, help="Samples of each figure."
)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: all cores]")
@click.option("--backend", type=click.Choice(CHOICES), default="auto", show_default=True)
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--cpu-clock", is_flag=True, help="Measure CPU seconds of one thread: for busy machines.")
@click.option("--peers", is_flag=True, help="Alternate with diffusers, torch.compile, plain ONNX Runtime and OpenVINO.")
@click.option("--checkpoint", metavar="FOLDER", help="The checkpoint that ENGINES was exported from, for --peers.")
@click.option("--body", metavar="FILE", help="The SMPL-H body that ENGINES was exported with, for --peers.")
@click.option(
    "--leave-out",
    type=click.Choice(LEAVABLE),
    multiple=True,
    help="Leave out a peer. torch.compile takes minutes; plain ONNX Runtime keeps a second copy of the networks.",
)
@click.option("--load", is_flag=True, help="Send requests at random times: in-flight and static batching.")
@click.option("--serve", "served", is_flag=True, help="Measure hd-serve over HTTP beside the bare loop.")
@click.option(
    "--requests", type=click.IntRange(2, MAX_REQUESTS), default=60, show_default=True, help="Requests of a load test."
)
@click.option(
    "--load-runs",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="Repeat the load test with other requests, for means and 95 % intervals.",
)
@click.option("--arrival-rate", type=click.FloatRange(0, min_open=True), help="Requests a second of the load test.")
@click.option(
    "--utilisation",
    type=click.FloatRange(0, 2, min_open=True),
    default=0.7,
    show_default=True,
    help="The arrival rate as a share of the capacity, which is measured first.",
)
@click.option(
    "--soak", "soaked", type=click.IntRange(1, MAX_REQUESTS), metavar="N", help="Run N requests in one process."
)
@click.option(
    "--first-picture/--no-first-picture", default=True, help="Time fresh hd-run processes.", show_default=True
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Write the JSON document to a file, too.",
)
@click.option("--report", type=click.Path(path_type=Path), metavar="FILE.html", help="Write a page with plots.")
@click.version_option(package_name="handiffuser", prog_name="hd-bench")
def bench(engines: str | None, size: str | None, **options: Any) -> int:
    """Measures ENGINES: a bundle folder that hd-export made, or the word `demo`.

    It prints latency, throughput, time per stage and memory for each batch size and number of steps. Options add other
    ways to run the same weights (--peers), load (--load, --serve), and a long run (--soak). Ctrl-C ends it with the
    results so far and exit code 130.
    """
    if (engines is None) == (size is None):
        raise click.UsageError("Name what to measure: a bundle folder, the word demo, or --random with a size.")
    if options["peers"] and options["checkpoint"] is None and size is None:
        if engines != "demo":
            raise click.UsageError("--peers needs the checkpoint that ENGINES was exported from: --checkpoint FOLDER.")
        options["checkpoint"] = "demo"
    document: dict[str, Any] = {"hd_bench": FORMAT, "runs": []}
    pictures: dict[str, Any] = {}
    code = 0
    with ExitStack() as stack:
        check_outputs(options)
        try:
            if size is not None:
                engines = random_bundle(size, options, stack)
            assert engines is not None
            document["settings"] = {
                "engines": engines if size is None else f"random {size}",
                **{name: value for name, value in options.items() if not isinstance(value, Path)},
            }
            work(engines, document, options, pictures)
        except KeyboardInterrupt:
            commands.ending()
            code = INTERRUPTED
            document["interrupted"] = True
            notes.print("hd-bench: Interrupted. The results so far follow.")
        except HanDiffuserError as error:
            if not document["runs"]:
                raise
            code = 1  # keep the results so far
            document["error"] = str(error)
            notes.print(f"hd-bench: {error}", style="red")
        # A second signal must not lose the results.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        close(document, options, pictures)
        for number, handler in before.items():
            signal.signal(number, handler)
    return code


def check_outputs(options: dict[str, Any]) -> None:
    """Raises EngineError for unwritable outputs and missing packages, before any work starts."""
    for name in ("output", "report"):
        path: Path | None = options[name]
        if path is None:
            continue
        there = path.exists()
        try:
            with path.open("a"):
                pass
        except OSError as error:
            raise EngineError(
                f"--{name} must be a file that can be written, got {path}: {error.strerror}. "
                "Name a file in a folder that you may write to."
            ) from error
        if not there:
            path.unlink()
    if options["cpu_clock"] and (options["threads"] != 1 or options["device"] == "cuda"):
        raise EngineError("--cpu-clock must have one CPU thread. Add --threads 1, and leave --device cuda out.")
    if options["report"] is not None:
        need("matplotlib", "--report", "bench")
    if options["peers"]:
        need("torch", "--peers", "export")
        need("diffusers", "--peers", "export")


def need(module: str, option: str, extra: str) -> None:
    """Raises EngineError when a package is missing, and names the extra to install."""
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise EngineError(f'{option} needs {module}. Install it: pip install "handiffuser[{extra}]".')


def random_bundle(size: str, options: dict[str, Any], stack: ExitStack) -> str:
    """Makes an untrained checkpoint and its bundle, or takes those in the work folder. Returns the bundle."""
    need("torch", "--random", "export")
    from ..export.bundle import export_bundle
    from ..models.checkpoint import Checkpoint, random_checkpoint
    from ..models.configs import CONFIGS
    from ..models.foreign import MODEL_INDEX

    folder = options["workdir"] or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hd-bench-")))
    checkpoint, bundle = folder / f"{size}-checkpoint", folder / f"{size}-bundle"
    options["checkpoint"] = options["checkpoint"] or str(checkpoint)
    if (bundle / MANIFEST).exists() and (checkpoint / MODEL_INDEX).exists():
        notes.print(f"The {size} bundle in {folder} is used.")
        return str(bundle)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(
            f"--workdir must be a folder that can be made, got {folder}: {error.strerror}. Name another folder."
        ) from error
    with notes.status(f"making a random {size} checkpoint"):
        random_checkpoint(CONFIGS[size], body=shipped.body_path()).save(checkpoint)
        loaded = Checkpoint.load(checkpoint, mapped=True)
    with notes.status(f"exporting {size}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's warnings do not concern a user
        export_bundle(loaded, bundle, on_graph=lambda graph: notes.print(f"{graph.name}: {graph.megabytes:.1f} MB"))
    return str(bundle)


def work(engines: str, document: dict[str, Any], options: dict[str, Any], pictures: dict[str, Any]) -> None:
    """Measures what the options ask for. The document and the peers' pictures grow on the way."""
    folder = shipped.resolve(engines, "bundle")
    manifest = Manifest.load(folder, verify=False)
    say, others = tables.Tables(), Others()
    clock = time.process_time if options["cpu_clock"] else time.perf_counter
    document["clock"] = "CPU seconds" if options["cpu_clock"] else "wall clock"
    with notes.status("measuring the ceilings of this machine"):
        document["card"] = card(options["threads"], options["device"], clock)
    say.card(document["card"])
    defaults = manifest.defaults
    solver = options["solver"] or defaults["solver"]
    guidance = defaults["guidance"] if options["guidance"] is None else options["guidance"]
    pipeline = load_pipeline(engines, max(options["batch_sizes"]), options, document)
    ceilings = document["card"]["ceilings"]
    if pipeline.made_by.get("inference") == "bf16":
        ceilings["matmul"] = bf16_ceiling(options["threads"], clock)
        say.ceiling(ceilings["matmul"])
    operations = operations_of(folder, manifest, 1 if guidance == 1 else 2, document)
    meter, energy = measure.Meter(pipeline, clock), measure.Energy()
    for steps in options["steps"] or [defaults["steps"]]:
        for batch in options["batch_sizes"]:
            run = measure.new_run(batch, steps, solver, guidance)
            with notes.status(f"batch {batch}, {steps} steps"):
                measure_run(pipeline, run, options["repeats"], meter, energy, document)
            run.update(measure.summary(run))
            if operations:
                flops = ceilings["matmul"]["flops"]
                run["flops"] = measure.utilisation(run, operations, flops, defaults["hand_steps"])
    say.runs(document["runs"], document["clock"])
    say.stages(document["runs"])
    if options["first_picture"]:
        first_picture(engines, document, options)
        say.first_picture(document["first_picture"])
    if options["peers"]:
        peers(engines, pipeline, document, options, pictures, say)
    if options["load"]:
        load(pipeline, solver, document, options)
        say.load(document["load"])
    if options["served"]:
        serve(engines, pipeline, solver, document, options)
        say.serve(document["serve"])
    if options["soaked"]:
        document["soak"] = {}
        with notes.status(f"{options['soaked']} requests") as status:
            soak(
                pipeline,
                options["soaked"],
                on_picture=lambda number: status.update(f"{number} of {options['soaked']} requests"),
                result=document["soak"],
            )
        say.soak(document["soak"])
    document["others"] = others.cores()
    if document["others"] is not None and document["others"] > BUSY:
        advice = "Use --cpu-clock --threads 1, or repeat it when the machine is idle."
        if options["cpu_clock"]:
            advice = "CPU seconds show little of that. Repeat it when the machine is idle."
        notes.print(
            f"hd-bench: warning: Other processes used {document['others']:.2f} of this machine's cores meanwhile. "
            + advice,
            style="yellow",
        )


def measure_run(
    pipeline: HanDiffuser,
    run: dict[str, Any],
    repeats: int,
    meter: measure.Meter,
    energy: measure.Energy,
    document: dict[str, Any],
) -> None:
    """Samples a run into the document. A run that an interruption leaves without a sample is dropped."""
    document["runs"].append(run)
    joules = energy.read()
    try:
        for sample in measure.samples(pipeline, run, repeats, meter):
            run["samples"].append(sample)
    finally:
        if not run["samples"]:
            document["runs"].remove(run)
    if joules is not None:
        made = run["batch"] * (repeats + measure.WARM_UP)  # the warm-up takes energy, too
        run["joules_per_picture"] = ((energy.read() or joules) - joules) / made
    if isinstance(pipeline.loop, DeviceLoop):
        run["device_stages"] = measure.device_stages(pipeline.loop, run)
        run["memory"]["device_mb"] = document["device_memory_before_mb"] - _free_mb()


def first_picture(engines: str, document: dict[str, Any], options: dict[str, Any]) -> None:
    """Times fresh hd-run processes with the first run's settings."""
    run = document["runs"][0]
    passed = ["--device", options["device"], "--backend", options["backend"], "--solver", run["solver"]]
    passed += ["--guidance", str(run["guidance"]), "--steps", str(run["steps"])]
    if options["threads"]:
        passed += ["--threads", str(options["threads"])]
    with notes.status("first picture: fresh processes"):
        document["first_picture"] = measure.first_picture(engines, passed)


def peers(
    engines: str,
    pipeline: HanDiffuser,
    document: dict[str, Any],
    options: dict[str, Any],
    pictures: dict[str, Any],
    say: tables.Tables,
) -> None:
    """Measures the peers beside every run, then a picture of each in a fresh process. Fills the document."""
    from .peers import alone, compare

    document["peers"] = []
    with notes.status("peers") as status:
        for run in document["runs"]:
            table: dict[str, Any] = {}
            document["peers"].append(table)
            pictures |= compare(pipeline, engines, options["checkpoint"], run, options, table, status.update)
            say.peers(table)
        status.update("peers: fresh processes")
        device = "cuda" if pipeline.on_gpu else "cpu"
        document["alone"] = alone(engines, options["checkpoint"], document["runs"][0], options, device)
    say.alone(document["alone"])


def load_pipeline(engines: str, batch: int, options: dict[str, Any], document: dict[str, Any]) -> HanDiffuser:
    """Loads the bundle and writes the seconds into the document."""
    if document["card"]["gpu"]:
        document["device_memory_before_mb"] = _free_mb()
    start = time.perf_counter()
    with warnings.catch_warnings(), notes.status("loading"):
        warnings.showwarning = lambda message, *_, **__: notes.print(f"hd-bench: warning: {message}", style="yellow")
        # A server's choice of a backend: like its pictures, ours are timed without what comes before the first.
        pipeline = HanDiffuser.load(
            engines, options["device"], options["threads"], batch, options["backend"], pictures=SERVER_PICTURES
        )
    document["load_seconds"] = time.perf_counter() - start
    document["made_by"] = pipeline.made_by
    return pipeline


def operations_of(
    folder: Path, manifest: Manifest, branches: int, document: dict[str, Any]
) -> dict[str, dict[str, int]]:
    """Graph -> operations of one row by kind of node. Empty when they cannot be counted: the document says why."""
    sizes = {"B": 1, "S": 1, "G": branches, **manifest.sides()}
    try:
        found = {name: count(folder / spec.file, sizes) for name, spec in manifest.graphs.items()}
    except EngineError as error:
        document["no_flops"] = str(error)
        notes.print(f"hd-bench: The operations are left out. {error}", style="yellow")
        return {}
    document["operations"] = found
    return found


def load(pipeline: HanDiffuser, solver: str, document: dict[str, Any], options: dict[str, Any]) -> None:
    """Runs the load test and fills the document on the way."""
    clock: load_test.Clock = load_test.CpuClock() if options["cpu_clock"] else load_test.WallClock()
    requests = load_test.mixed_requests(pipeline, options["requests"], solver=solver)
    result: dict[str, Any] = {
        "requests": len(requests),
        "runs": [],
        "steps": list(load_test.LOAD_STEPS),
        "guidance": list(load_test.GUIDANCE),
        "batch": pipeline.batch_size,
        "clock": document["clock"],
        "rows": [],
    }
    document["load"] = result
    with notes.status("capacity") as status:
        result["capacity"] = load_test.capacity(pipeline, requests[: 4 * pipeline.batch_size], clock)
        rate = options["arrival_rate"] or options["utilisation"] * result["capacity"]
        result |= {"arrival_rate": rate, "utilisation": rate / result["capacity"]}
        document["load"] = result
        for number in range(options["load_runs"]):  # run 0 has the requests of a single run
            if number:
                requests = load_test.mixed_requests(pipeline, options["requests"], number, solver)
            arrivals = load_test.arrival_times(len(requests), rate, number)
            rows: list[dict[str, Any]] = []
            for row in load_test.compare(pipeline, requests, arrivals, clock, status.update):
                rows.append(row)
                if not number:
                    result["rows"].append(row)
            result["runs"].append(rows)
            result["over_runs"] = load_test.over_runs(result["runs"])


def serve(engines: str, pipeline: HanDiffuser, solver: str, document: dict[str, Any], options: dict[str, Any]) -> None:
    """Runs the load test over HTTP and fills the document on the way."""
    from . import serve as over_http

    requests = load_test.mixed_requests(pipeline, options["requests"], solver=solver, steps=SERVED_STEPS)
    how = {name: options[name] for name in ("device", "threads", "backend")} | {"batch_size": pipeline.batch_size}
    rows: list[dict[str, Any]] = []
    document["serve"] = {
        "requests": len(requests),
        "steps": list(SERVED_STEPS),
        "batch": pipeline.batch_size,
        "rows": rows,
    }
    with notes.status("servers") as status:
        for row in over_http.compare(engines, requests, SHARES, SERVED_ROUNDS, how, status.update):
            rows.append(row)


def close(document: dict[str, Any], options: dict[str, Any], pictures: dict[str, Any]) -> None:
    """Summarises runs that an interruption left open, writes the files, and ends stdout with the document."""
    for run in document["runs"]:
        if "latency" not in run:
            run.update(measure.summary(run))
    if document.get("interrupted") or "error" in document:
        say = tables.Tables()
        say.runs(document["runs"], document.get("clock", ""))
        for table in document.get("peers", []):
            say.peers(table)
        if document.get("load", {}).get("rows"):
            say.load(document["load"])
        if document.get("serve", {}).get("rows"):
            say.serve(document["serve"])
        if document.get("soak"):
            say.soak(document["soak"])
    text = json.dumps(document, allow_nan=False)
    if options["output"] is not None:
        options["output"].write_text(text + "\n", encoding="utf-8")
    if options["report"] is not None and document["runs"]:
        from .report import page

        options["report"].write_text(page(document, pictures), encoding="utf-8")
        notes.print(f"The report is in {options['report']}.")
    print(text, flush=True)


def _free_mb() -> float:
    return Cuda().free_memory() / 1e6


def main() -> None:
    """Entry point: prints errors as one sentence, without a traceback."""
    os.environ.setdefault("TORCH_LOGS", "-all")
    commands.run("hd-bench", bench)


if __name__ == "__main__":
    main()
