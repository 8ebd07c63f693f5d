"""`benchmarks/gpu.sh` without a GPU: its steps in order, resumed, limited, and whole on a GPU that is not there."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_floor
import gpu_plans
import gpu_profile
import gpu_variants
import pytest
from click.testing import CliRunner
from gpu import Step, measure, run_step, steps

ROOT = Path(__file__).parent.parent.parent


def test_function_comes_before_speed_and_the_cheap_before_the_dear(tmp_path):
    found = steps(tmp_path, tmp_path, ("onnxruntime", "tensorrt"), "sd15", on_gpu=True, quick=False)
    names = [step.name for step in found]
    assert names[:3] == ["machine", "gpu-tests", "demo-export"]
    assert max(names.index(f"demo-{b}") for b in ("onnxruntime", "tensorrt")) < names.index("random")
    assert names.index("tensorrt-1") < names.index("onnxruntime-4-8")
    assert sum("export.cli" in " ".join(step.command) for step in found) == 2, "one export for all backends"
    assert sum("--peers" in step.command for step in found) == 1
    assert {name for step in found for name in step.needs} <= set(names)


def test_what_is_done_is_not_done_again(tmp_path):
    calls = []
    product = tmp_path / "product"

    def runner(command, log, limit):
        calls.append(command[0])
        if command[0] == "makes":
            product.mkdir()
        return 7 if command[0] == "fails" and calls.count("fails") == 1 else 0

    def step(name, makes=None, needs=()):
        return Step(name, (name,), 5, makes, needs)

    found = [step("first"), step("makes", product), step("fails"), step("after", needs=("fails",)), step("last")]
    said = []
    assert measure(found, tmp_path, runner, said.append) == 2
    assert calls == ["first", "makes", "fails", "last"]
    assert "after: left out, because fails failed" in said and any("exit code 7" in line for line in said)
    assert measure(found, tmp_path, runner, said.append) == 0
    assert calls[4:] == ["fails", "after"], "only what was not done"
    product.rmdir()  # a fresh machine has the results, and not the working files
    assert measure(found, tmp_path, runner, said.append) == 0
    assert calls[6:] == ["makes"]


def test_an_act_leaves_for_its_next_call_what_does_not_fit(tmp_path):
    calls = []

    def runner(command, log, limit):
        calls.append((command[0], limit))
        time.sleep(0.1)
        return 0

    found, said = [Step("first", ("first",), 60), Step("second", ("second",), 60)], []
    assert measure(found, tmp_path, runner, said.append, budget=gpu.MIN_STEP_SECONDS + 0.05) == 1
    assert [name for name, _ in calls] == ["first"] and calls[0][1] < 60
    assert said[-1] == "second: left for the next call of the same command"
    assert measure(found, tmp_path, runner, said.append, budget=gpu.ACT_SECONDS) == 0
    assert [name for name, _ in calls] == ["first", "second"]


@pytest.mark.parametrize("act", ["a", "b"])
def test_the_steps_of_an_act(tmp_path, act):
    """What tells most comes first, each need is there, and what must be run fits into the time."""
    found = gpu.act_steps(act, tmp_path, tmp_path, False, on_gpu=True, planned=("tensorrt",), compiles=True)
    names = [step.name for step in found]
    assert len(set(names)) == len(names)
    for number, step in enumerate(found):
        assert set(step.needs) <= set(names[:number]) and Path(step.command[0]).exists()
    first = ("machine", "floor-libraries") if act == "a" else ("variant-weights", "variant-unet-1-bundle")
    assert tuple(names[:2]) == first
    assert names[-1] in ("floor-decide", "variant-table")
    assert (act == "b") == ("plan-unet-tensorrt-build" in names) == ("compiled-unet-build" in names)
    if act == "b":
        order = ("variant-unet-1-derived-graph", "plan-unet-tensorrt", "compiled-unet", "variant-unet-1-derived-search")
        assert [name for name in names if name in order] == [*order], "each backend before more options of one"
    for step in found:
        assert step.least <= step.limit < gpu.ACT_SECONDS - 2 * gpu.MIN_STEP_SECONDS, "the next call can do it"


def test_a_build_waits_for_a_call_that_has_time_for_it(tmp_path):
    calls, said = [], []

    def runner(command, log, limit):
        calls.append(command[0])
        return 0

    found = [Step("build", ("build",), 300, least=150.0), Step("run", ("run",), 60, needs=("build",)),
             Step("other", ("other",), 60), Step("table", ("table",), 30, always=True)]  # fmt: skip
    assert measure(found, tmp_path, runner, said.append, budget=100) == 2 and calls == ["other", "table"]
    assert said[-1].startswith("table: ")
    assert said[:2] == ["build: left for the next call of the same command", "run: left out, because build failed"]
    assert measure(found, tmp_path, runner, said.append, budget=400) == 0 and calls[2:] == ["build", "run", "table"]


@pytest.mark.parametrize(
    ("libraries", "compiled", "words"),
    [(4.0, None, "would pay"), (4.0, 4.9, "never"), (4.0, 9.0, "would pay"), (5.0, 8.0, "tune"), (7.0, 9.0, "not pay")],
)
def test_what_the_floor_means(libraries, compiled, words):
    assert words in gpu_floor.decide(libraries, compiled)[-1]


def test_what_the_variants_mean():
    def line(variant, ms, graph="unet"):
        return {"graph": graph, "batch": 1, "variant": variant, "ms": ms, "device": "cuda"}

    said = " ".join(gpu_variants.decide([line("bundle", 16.0), line("derived", 8.0), line("derived-bias", 7.0)]))
    assert "2.00 times" in said and "options of derived-bias the default" in said and "out again" not in said
    assert "out again" in " ".join(gpu_variants.decide([line("bundle", 7.0), line("derived", 8.0)]))


def test_what_a_recording_of_kernels_says():
    """Of a trace as torch.profiler writes it: two streams, a copy, work of the host that does not count."""
    names = ("sm90_xmma_fprop_implicit_gemm_f16f16", "void GroupNormNHWCScaleKernel<__half>", "Memcpy DtoD")
    events = [
        {"ph": "X", "cat": "kernel", "name": names[0], "ts": 100.0, "dur": 40, "args": {"stream": 7}},
        {"ph": "X", "cat": "kernel", "name": names[1], "ts": 120.0, "dur": 40, "args": {"stream": 8}},
        {"ph": "X", "cat": "gpu_memcpy", "name": names[2], "ts": 280.0, "dur": 20},
        {"ph": "X", "cat": "kernel", "name": names[0], "ts": 200.0, "dur": 40},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 90.0, "dur": 5},
        {"ph": "M", "name": "process_name"},
    ]
    found = gpu_profile.summary(gpu_profile.kernels_of({"traceEvents": events}), runs=2)
    assert (found["count"], found["busy_ms"], found["wall_ms"]) == (2.0, 0.06, 0.1)
    assert found["kernels"][0] == {"name": names[0], "count": 1.0, "ms": 0.04}
    assert {row["name"]: row["ms"] for row in found["kinds"]} == {"convolution": 0.04, "norm": 0.02, "layout": 0.01}
    said = gpu_profile.text("unet", "derived", found)
    assert (
        "2 kernels, 0.06 ms of kernels in 0.10 ms a run; the GPU is idle for 40 %" in said[0] and "captured" in said[1]
    )
    assert "no kernels were recorded" in gpu_profile.text("unet", "derived", gpu_profile.summary([], 2))[0]


def test_a_plan_is_timed_beside_the_graph(toy_bundle, tmp_path, monkeypatch):
    """By the clock of a GPU that is not there, from a captured graph, with outputs that are compared."""
    pytest.importorskip("cuda.bindings.runtime")
    pytest.importorskip("tensorrt_rtx")
    from fake_runtime import FakeRuntime
    from fake_tensorrt import FakeTensorRT

    def invoke(commands, *words):
        words = [*map(str, words), "--model", str(toy_bundle)]
        return CliRunner().invoke(commands, words)

    fake = FakeRuntime(seed=1).install(monkeypatch)
    trt = FakeTensorRT(fake).install(monkeypatch)
    trt.seconds = lambda name, rows: 3e-3
    assert gpu_plans.runs_here("tensorrt-rtx")
    done = invoke(gpu_variants.commands, "run", tmp_path, "unet", "bundle", "--quick")
    assert done.exit_code == 0, done.output
    for command in ("build", "run"):
        done = invoke(gpu_plans.commands, command, tmp_path, "unet", "tensorrt-rtx")
        assert done.exit_code == 0, (done.output, done.exception)
    line = json.loads(done.output)
    assert line["ms"] == pytest.approx(3.0, rel=0.01) and line["error"] < 1e-5 and not fake.problems
    assert trt.runs["unet"] == 2 and not fake.live()


@pytest.mark.slow
def test_the_acts_run_whole_on_a_cpu(tmp_path):
    """A few small shapes, and the demo's graphs with all variants; figures of a CPU mean nothing here."""
    for act in ("a", "b"):
        command = [
            ROOT / "benchmarks" / "gpu.sh",
            act,
            "--quick",
            "--out",
            tmp_path / "out",
            "--work",
            tmp_path / "work",
        ]
        environment = {**os.environ, "PYTHON": sys.executable}
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, cwd=tmp_path)
        logs = "\n".join(path.read_text() for path in (tmp_path / "out").glob("*.txt"))
        assert done.returncode == 0, done.stderr + logs
    assert "A CPU decides nothing" in done.stdout and "derived-all" in done.stdout
    assert "image_decoder (derived): no kernels were recorded" in logs


def test_a_step_that_hangs_is_ended_with_all_it_started(tmp_path):
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); "
    began = time.monotonic()
    assert run_step(("-c", code + "time.sleep(99)"), tmp_path / "log", 1.5) == 124
    assert time.monotonic() - began < 30
    assert run_step(("-c", "print('said')"), tmp_path / "log", 30) == 0
    assert (tmp_path / "log").read_text() == "said\n"


def test_killed_in_the_middle_it_goes_on(tmp_path):
    """The command as it is typed, ended in its second step."""
    command = [ROOT / "benchmarks" / "gpu.sh", "--size", "tiny", "--backends", "onnxruntime", "--quick",
               "--out", tmp_path / "out", "--work", tmp_path / "work"]  # fmt: skip
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    while not (tmp_path / "out" / "machine.done").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.strip().endswith("the same command goes on.")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.done")) == ["machine.done"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorrt-rtx"])
def test_the_steps_run_on_a_gpu_that_is_not_there(toy_bundle, tmp_path, monkeypatch, backend):
    """Every step of a backend by the real commands, in this process; exports, training and gpu tests stand aside."""
    pytest.importorskip("cuda.bindings.runtime")
    pytest.importorskip("tensorrt_rtx")
    from fake_runtime import FakeRuntime
    from fake_tensorrt import FakeTensorRT

    monkeypatch.setattr(gpu, "LIKE", 45.0)

    def runner(command, log, limit):
        if command[1] in ("handiffuser.export.cli", "pytest") or "random" in command or "training_speed" in command[0]:
            if "export.cli" in command[1]:
                shutil.copytree(toy_bundle, command[3])
            elif "random" in command:
                Path(command[-1]).mkdir()
            return 0
        FakeTensorRT(FakeRuntime(seed=1).install(monkeypatch)).install(monkeypatch)  # a process has a GPU of its own
        ours = command[0] == gpu.__file__
        module = gpu if ours else importlib.import_module(command[1])
        words = [word for word in command[1 if ours else 2 :] if word != "--peers"]  # they need a GPU that PyTorch sees
        if "--checkpoint" in words:
            at = words.index("--checkpoint")
            words = [*words[:at], *words[at + 2 :], "--no-first-picture"]
        click_command = getattr(module, "bench", None) or module.commands
        result = CliRunner().invoke(click_command, words, standalone_mode=False)
        log.write_text(f"{result.output}\n{result.exception or ''}")
        return result.exit_code or result.return_value

    found = steps(tmp_path / "work", tmp_path / "out", (backend,), "tiny", on_gpu=True, quick=True)
    (tmp_path / "work").mkdir()
    said = []
    failed = measure(found, tmp_path / "out", runner, said.append)
    logs = "\n".join(path.read_text() for path in sorted((tmp_path / "out").glob("*.txt")))
    assert not failed, (said, logs)
    assert (tmp_path / "out" / f"{backend}-4-8.json").exists() and "psnr_db" in logs
