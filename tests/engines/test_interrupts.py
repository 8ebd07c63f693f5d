"""Ctrl-C ends a build at once, wherever TensorRT is; what was finished stays, and the same command goes on."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import listen
from handiffuser import shipped
from handiffuser.engines.plans import PlanStore
from handiffuser.engines.tensorrt import Options, TensorRT
from handiffuser.engines.tensorrt_build import build_plan

pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def bundle(tmp_path) -> Path:
    return shutil.copytree(shipped.resolve("demo", "bundle"), tmp_path / "demo", ignore=shutil.ignore_patterns("plans"))


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=listen)


@pytest.mark.slow
def test_ctrl_c_at_any_moment_of_a_build(bundle):
    """Once the first plan is there, at moments drawn at random, five times over."""
    draw = random.Random(5)
    for attempt in range(5):
        before = len(list(PlanStore(bundle)))
        process = start(
            "handiffuser.engines.cli", "build", bundle, "--batch-sizes", "1,2,4,8,16,32", "--backend", "tensorrt-rtx"
        )
        while len(list(PlanStore(bundle))) == before and process.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.random() * 3)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130, (attempt, errors)
        assert time.monotonic() - began < 8, attempt  # the machine may be busy
        assert errors.strip().endswith("hd-engines: Stopped. What is built stays; the same command goes on."), errors
        assert "Traceback" not in errors
        store = PlanStore(bundle)
        assert len(list(store)) > before and not store.strays()
        assert not any(store.problem(plan, verify=True) for plan in store)


def test_a_callback_that_fails_is_no_crash_and_no_loss():
    """Exceptions do not cross TensorRT's frames; they come out of `build`."""

    def fail(phase, done):
        raise ZeroDivisionError("in the callback")

    graph = shipped.resolve("demo", "bundle") / "unet_context.onnx"
    with pytest.raises(ZeroDivisionError, match="in the callback"):
        build_plan(TensorRT("tensorrt-rtx"), graph, {"B": 1, "G": 2, "L": 121}, "fp32", Options(), fail)
