"""Times whole runs of the product's own loop, and says where the time goes.

    pipeline = HanDiffuser.load("demo", threads=1, batch_size=2)
    run, meter = new_run(2, steps=12, solver="ddim", guidance=2.0), Meter(pipeline)
    for sample in samples(pipeline, run, repeats=5, meter=meter):
        run["samples"].append(sample)
    summary(run)["latency"]["p50"]                # seconds

A sample is one batch of new prompts from text to pictures in memory: its wall clock, the CPU seconds of the process,
and the seconds in each engine. The rest is the host's: stages and host add up to the total. Every sample is kept;
percentiles are samples, not interpolations. PNG encoding is measured apart, because hd-run does it on other threads.
All times come from one clock. On a busy machine CPU seconds of one thread are close to an idle machine's clock.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..contract import GRAPHS, IMAGE_ENCODER
from ..engines.base import Engine
from ..errors import EngineError
from ..runtime.device import DeviceLoop
from ..runtime.host import HostLoop
from ..runtime.pipeline import HanDiffuser
from ..runtime.requests import Request
from ..runtime.results import Failure, Picture
from ..runtime.results import png as encode

try:
    import resource
except ImportError:  # Windows
    import psutil

    resource = None  # type: ignore[assignment]

POLL = 0.01  # seconds between two looks at a fresh process
WARM_UP = 1  # runs before the first sample: they load kernels, fill caches and schedules
PROMPTS = (
    "a right hand making a fist, blue background",
    "two open hands",
    "a left hand giving a thumbs up",
    "a right hand pointing",
)
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def new_run(batch: int, steps: int, solver: str, guidance: float) -> dict[str, Any]:
    """A run of the table that has no samples yet."""
    return {"batch": batch, "steps": steps, "solver": solver, "guidance": guidance, "warm_up": WARM_UP, "samples": []}


def make_requests(pipeline: HanDiffuser, count: int, first_seed: int = 0, **settings: Any) -> list[Request]:
    """`count` requests, each with its own seed. Raises EngineError for settings that cannot be run."""
    prompt = settings.pop("prompt", None)
    asked = [Request(prompt or PROMPTS[i % len(PROMPTS)], seed=first_seed + i, **settings) for i in range(count)]
    resolved, refused = pipeline.prepare(asked)
    for problem in refused:
        raise EngineError(problem.sentence)
    return resolved


def finish(results: Sequence[Picture | Failure]) -> list[Picture]:
    """The pictures. Raises EngineError for a failure: its time would not be that of a picture."""
    for result in results:
        if isinstance(result, Failure):
            raise EngineError(f"{result.id}: {result.sentence}")
    return [result for result in results if isinstance(result, Picture)]


class Meter:
    """Seconds in each engine of a pipeline so far, by any clock. Empty on a GPU, where the loop calls no engine."""

    def __init__(self, pipeline: HanDiffuser, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}
        loop = pipeline.loop
        for name, timed in loop.engines.items() if isinstance(loop, HostLoop) else ():
            self.seconds[name] = 0.0
            timed.engine = self._metered(name, timed.engine)

    def _metered(self, name: str, engine: Engine) -> Any:
        def call(feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
            start = self.clock()
            try:
                return engine(feeds)
            finally:
                self.seconds[name] += self.clock() - start

        return call


def samples(pipeline: HanDiffuser, run: dict[str, Any], repeats: int, meter: Meter) -> Iterator[dict[str, Any]]:
    """Yields `repeats` samples of a run, after warming up; the run gets its memory figures on the way."""
    settings = {name: run[name] for name in ("steps", "solver", "guidance")}
    reset_peak()
    for number in range(-WARM_UP, repeats):
        # Other seeds in each run, so that a cache cannot help.
        requests = make_requests(pipeline, run["batch"], (number + WARM_UP) * run["batch"], **settings)
        before = dict(meter.seconds)
        start, wall, cpu = meter.clock(), time.perf_counter(), time.process_time()
        pictures = finish(list(pipeline.run(requests)))
        total, wall, cpu = meter.clock() - start, time.perf_counter() - wall, time.process_time() - cpu
        stages = {name: meter.seconds[name] - before[name] for name in GRAPHS if name in before}
        start = meter.clock()
        for picture in pictures:
            encode(picture.image, picture)
        png = meter.clock() - start
        run["memory"] = memory()
        if number >= 0:
            host = total - sum(stages.values()) if stages else None
            yield {"total": total, "wall": wall, "cpu": cpu, "stages": stages, "host": host, "png": png}


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """The run with its figures: medians of the samples; stages are seconds of the median sample.

    A middle sample that was really measured, not a median of each column: its stages and host add up to its total.
    """
    runs, batch, steps = run["samples"], run["batch"], run["steps"]
    totals = [sample["total"] for sample in runs]
    middle = runs[int(np.argsort(totals, kind="stable")[(len(totals) - 1) // 2])]
    out = {
        **run,
        "latency": percentiles(totals),
        "cpu_seconds": float(np.median([sample["cpu"] for sample in runs])),
        "pictures_per_second": batch / middle["total"],
        "guided_steps_per_second": batch * steps / middle["total"],
        "total": middle["total"],
        "stages": middle["stages"] or run.get("device_stages"),
        "host": middle["host"],
        "png": float(np.median([sample["png"] for sample in runs])) / batch,
    }
    if out["stages"]:
        out["unet_step"] = out["stages"]["unet"] / steps
    return out


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Percentiles that are values themselves, not interpolations."""
    return {name: float(np.quantile(np.asarray(values), at, method="inverted_cdf")) for name, at in PERCENTILES.items()}


def device_stages(loop: DeviceLoop, run: dict[str, Any], launches: int = 10) -> dict[str, float]:
    """Seconds of each graph on a GPU in a run of that many steps, each measured alone after the run's samples.

    The loop never waits for a stage, so the stages are timed apart. Overlapped stages cost less than this.
    """
    out = {}
    defaults = loop.bundle.manifest.defaults
    times = {"unet": run["steps"], "hand_prior": defaults["hand_steps"]}
    alone = {"unet": run["guidance"] == 1, "hand_prior": defaults["hand_guidance"] == 1}
    # A graph is captured at its first launch, so a step must be captured with the update that follows it.
    after = {"unet": loop.own.sampler.advance, "hand_prior": loop.hands_sampler.advance}
    for name, graph in loop.graphs.items():
        count = run["steps"] if name == "unet_time" else run["batch"]
        stream = {"unet": loop.main, "unet_time": loop.main, "image_decoder": loop.out}.get(name, loop.side)
        how = (count, after.get(name), alone.get(name, False))
        graph.launch(stream, *how)
        stream.synchronize()
        start = time.perf_counter()
        for _ in range(launches):
            graph.launch(stream, *how)
        stream.synchronize()
        out[name] = (time.perf_counter() - start) / launches * times.get(name, 1)
    return out


def utilisation(
    run: dict[str, Any], flops: dict[str, dict[str, int]], ceiling: float | None, hand_steps: int
) -> dict[str, Any]:
    """Operations of a run and the share of the measured ceiling at which they were done.

    flops: graph -> operations of one row by kind. One run of the UNet is a guided step: both branches.
    """
    rows = {name: sum(kinds.values()) * run["batch"] for name, kinds in flops.items()}
    # Time rows are kept from run to run, and no request here brings a picture.
    times = {"unet": run["steps"], "hand_prior": hand_steps, "unet_time": 0, IMAGE_ENCODER: 0}
    total = sum(count * times.get(name, 1) for name, count in rows.items())
    out: dict[str, Any] = {"flops": total, "unet_step_flops": rows["unet"]}
    if ceiling:
        out["of_ceiling"] = total / run["total"] / ceiling
        if run.get("unet_step"):
            out["unet_of_ceiling"] = rows["unet"] / run["unet_step"] / ceiling
        if run["stages"]:
            out["decoder_of_ceiling"] = rows["image_decoder"] / run["stages"]["image_decoder"] / ceiling
    return out


def first_picture(engines: str, options: Sequence[str], repeats: int = 3) -> dict[str, Any]:
    """A fresh `hd-run` for one picture, from the start of the process to its end; seconds, and megabytes at the peak.

    options: passed on to hd-run. Raises EngineError when it fails.
    """
    command = [sys.executable, "-m", "handiffuser.runtime.cli", engines, PROMPTS[0], "--quiet", *options]
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(fresh([*command, "--output", folder]))
    return {"samples": runs} | {
        name: float(np.median([run[name] for run in runs])) for name in ("wall", "cpu", "peak_mb")
    }


def fresh(command: Sequence[str]) -> dict[str, float]:
    """Runs a process; {"wall", "cpu", "peak_mb"}. Raises EngineError with its last line when it fails."""
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            cpu, peak = _until_it_ends(process)
        except BaseException:
            process.kill()
            raise
        wall = time.perf_counter() - start
        if process.returncode:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise EngineError(f"{' '.join(command[1:4])} ended with code {process.returncode}: {said[-1]}")
    return {"wall": wall, "cpu": cpu, "peak_mb": peak}


def _until_it_ends(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """CPU seconds of a process and of those it started, and its peak in megabytes."""
    peak = 0.0
    if resource is None:
        watched, cpu = psutil.Process(process.pid), 0.0
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):  # it may end meanwhile
                times, found = watched.cpu_times(), _of_windows(watched)
                cpu, peak = times.user + times.system, max(peak, found["peak_mb"])
            time.sleep(POLL)
        return cpu, peak
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        # Not ru_maxrss: that begins with the memory of the process which started it.
        peak = max(peak, _status(process.pid).get("VmHWM", 0.0))
        time.sleep(POLL)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime, peak or usage.ru_maxrss * _RSS_UNIT / 1e6


def _of_windows(process: Any) -> dict[str, float]:
    info = process.memory_info()
    return {"rss_mb": info.rss / 1e6, "peak_mb": getattr(info, "peak_wset", info.rss) / 1e6}


# ru_maxrss is in kilobytes, but on macOS in bytes.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def reset_peak() -> bool:
    """Resets the peak of this process's memory; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return True
    except OSError:
        return False


def memory() -> dict[str, float]:
    """Megabytes of this process: resident now, and at the peak (since `reset_peak`, or ever)."""
    if resource is None:
        return _of_windows(psutil.Process())
    found = _status("self")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT / 1e6
    return {"rss_mb": found.get("VmRSS", peak), "peak_mb": found.get("VmHWM", peak)}


def _status(process: int | str) -> dict[str, float]:
    """VmRSS and VmHWM (its peak) of a process, in megabytes; empty where the system does not tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
        fields = [line.split() for line in lines if line.startswith(("VmRSS:", "VmHWM:"))]
        return {name.rstrip(":"): int(size) * 1024 / 1e6 for name, size, _ in fields}
    except (OSError, ValueError):
        return {}


class Energy:
    """Joules that the GPU has taken, where pynvml and the driver tell; `read` gives None where they do not."""

    def __init__(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle, self._read = pynvml.nvmlDeviceGetHandleByIndex(0), pynvml.nvmlDeviceGetTotalEnergyConsumption
            self._read(self._handle)
        except Exception as error:  # without the package, the driver or a counter
            self._handle, self.reason = None, str(error) or type(error).__name__

    def read(self) -> float | None:
        return None if self._handle is None else self._read(self._handle) / 1e3
