"""TensorRT's plans for more than one GPU and version: how they are built, and what only runs them."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from dataclasses import replace

import pytest

pytest.importorskip("cuda.bindings.runtime")
pytest.importorskip("tensorrt_rtx")

from commands import invoke
from fake_runtime import FakeRuntime, fake_cuda
from fake_tensorrt import FakeTensorRT
from handiffuser.contract import Manifest
from handiffuser.engines import tensorrt
from handiffuser.engines.plans import Plan, PlanStore, parts
from handiffuser.engines.tensorrt import AMPERE_PLUS, Options, TensorRT, fits, loads
from handiffuser.engines.tensorrt_loading import usable_plans
from handiffuser.errors import EngineError
from whole import hd_run, pictures, same

pytestmark = pytest.mark.usefixtures("all_at_once")
PORTABLE = ("--version-compatible", "--hardware-compatibility-level", "same-compute-capability")


@pytest.fixture
def gpu(monkeypatch):
    gpu = FakeRuntime(seed=1).install(monkeypatch)
    yield gpu
    gc.collect()
    assert not gpu.problems and not gpu.live()


def built(bundle, folder, gpu, *options):
    """A copy of a bundle with plans of TensorRT 11.0, which is installed for the build alone."""
    shutil.copytree(bundle, folder)
    with pytest.MonkeyPatch.context() as patch:
        FakeTensorRT(gpu, rtx=False, version="11.0.0").install(patch)
        result = invoke("engines.cli", "build", folder, "--backend", "tensorrt", "--batch-sizes", "1,4", *options)
    assert result.returncode == 0, result.stderr
    return folder


def with_lean_alone(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    return FakeTensorRT(gpu, lean=True, version="11.4.0").install(monkeypatch)


def test_another_gpu_runs_them_with_the_later_lean_run_time(toy_bundle, gpu, monkeypatch, tmp_path):
    folder = built(toy_bundle, tmp_path / "toy", gpu, *PORTABLE)
    plans = [json.loads(plan.path.read_bytes()) for plan in PlanStore(folder)]
    assert {(plan["version_compatible"], plan["hardware"]) for plan in plans} == {(True, "SAME_COMPUTE_CAPABILITY")}
    heading = invoke("engines.cli", "list", folder).stdout.splitlines()[0]
    capability = ".".join(map(str, gpu.capability))
    assert heading.startswith(f"tensorrt 11.0.0 or later, compute capability {capability}, ")
    assert invoke("engines.cli", "verify", folder).returncode == 0
    gpu.name = "Another card"
    lean = with_lean_alone(gpu, monkeypatch)
    assert hd_run(folder, tmp_path / "gpu") == (0, "")  # --backend auto
    assert lean.runs
    assert hd_run(folder, tmp_path / "cpu", "--device", "cpu") == (0, "")
    same(pictures(tmp_path / "gpu"), pictures(tmp_path / "cpu"))
    listed = invoke("engines.cli", "list", folder).stdout
    assert "current" in listed and "stale" not in listed and "another GPU" not in listed


def test_a_later_tensorrt_runs_them_and_keeps_them(toy_bundle, gpu, monkeypatch, tmp_path):
    folder = built(toy_bundle, tmp_path / "toy", gpu, "--version-compatible")
    full = FakeTensorRT(gpu, rtx=False, version="11.4.0").install(monkeypatch)
    FakeTensorRT(gpu, lean=True, version="11.4.0").install(monkeypatch)
    count = len(list(PlanStore(folder)))
    assert invoke("engines.cli", "prune", folder).returncode == 0 and len(list(PlanStore(folder))) == count
    assert hd_run(folder, tmp_path / "gpu") == (0, "") and full.runs  # the lean one is for machines without it


def test_plans_for_one_gpu_and_version_are_refused_with_the_way_out(toy_bundle, gpu, monkeypatch, tmp_path):
    folder = built(toy_bundle, tmp_path / "toy", gpu)
    with_lean_alone(gpu, monkeypatch)
    result = invoke("runtime.cli", folder, "a fist", "--backend", "tensorrt-lean", "--output", tmp_path / "out")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"It has plans for tensorrt 11.0.0, {gpu.name}, compute capability" in result.stderr
    assert "--backend tensorrt --version-compatible, on a machine with tensorrt and the same GPU" in result.stderr
    listed = invoke("engines.cli", "list", folder).stdout
    assert "not for tensorrt-lean: built without --version-compatible" in listed and "current" not in listed
    count = len(list(PlanStore(folder)))
    assert invoke("engines.cli", "prune", folder).returncode == 0 and len(list(PlanStore(folder))) == count


def test_the_plan_for_this_gpu_alone_goes_first(toy_bundle, gpu, monkeypatch, tmp_path):
    manifest, store, cuda = Manifest.load(toy_bundle), PlanStore(tmp_path), fake_cuda()
    FakeTensorRT(gpu, rtx=False, version="11.0.0").install(monkeypatch)
    backend = TensorRT("tensorrt")
    for options in (Options(), Options(version_compatible=True), Options(hardware="same-compute-capability")):
        for graph in manifest.graphs:
            wanted = parts(manifest, graph, {"B": 1}, "tensorrt", "11.0.0", backend.target(options, cuda), options)
            store.add(wanted, b"plan", {}, 1.0)
    chosen = usable_plans(store, manifest, backend, cuda)["unet"][1]
    assert not chosen.version_compatible and chosen.parts["target"].startswith(cuda.name)


def test_an_old_driver_is_found_before_the_lean_run_time_crashes(gpu, monkeypatch):
    cuda, lean = fake_cuda(), FakeTensorRT(gpu, lean=True, version="11.4.0").install(monkeypatch)
    lean.module.Runtime = lambda logger: pytest.fail("it was made")
    monkeypatch.setattr(tensorrt, "version", lambda package: "11.4.0" if package == "tensorrt_lean_cu13" else None)
    monkeypatch.setattr(cuda.api, "cudaDriverGetVersion", lambda: (cuda.api.cudaError_t.cudaSuccess, 12080))
    with pytest.raises(EngineError, match=r"tensorrt-lean 11\.4\.0 needs driver 580 or newer: update the driver"):
        TensorRT("tensorrt-lean").load(b"plan", "unet", cuda)


@pytest.mark.parametrize(
    ("made_by", "version", "expected"),
    [
        ("11.0.0", "11.0.0", True),
        ("11.0.0.106", "11.4.0.106", True),
        ("10.14.1.48", "11.0.0.114", True),
        ("11.4.0", "11.0.0", False),
        ("11.0.0", "10.16.1", False),
        ("10.14.1", "12.0.0", False),
    ],
)
def test_versions_that_load_a_plan(toy_bundle, made_by, version, expected):
    manifest = Manifest.load(toy_bundle)
    wanted = parts(manifest, "unet", {"B": 1}, "tensorrt", made_by, "", Options(version_compatible=True))
    plan = Plan("unet", "0" * 16, wanted, "0" * 64, 1, 1.0, {})
    assert loads(plan, version) is expected
    exact = replace(plan, parts={**wanted, "options": "{}"})
    assert loads(exact, version) is (made_by == version)


@pytest.mark.parametrize(
    ("target", "capability", "expected"),
    [
        ("compute capability 8.9", "8.9", True),
        ("compute capability 8.9", "8.6", False),
        ("compute capability 8.9", "12.0", False),
        (AMPERE_PLUS, "7.5", False),
        (AMPERE_PLUS, "8.0", True),
        (AMPERE_PLUS, "12.0", True),
        ("Another card, compute capability 8.9", "8.9", False),
        ("Fake GPU, compute capability 8.9", "8.9", True),
    ],
)
def test_gpus_that_a_plan_serves(target, capability, expected):
    assert fits(target, fake_cuda(capability)) is expected


def test_what_cannot_be_built_is_one_sentence(toy_bundle, gpu, monkeypatch, tmp_path):
    FakeTensorRT(gpu, rtx=False).install(monkeypatch)
    FakeTensorRT(gpu).install(monkeypatch)
    for options in (PORTABLE[:1], PORTABLE[1:]):
        result = invoke("engines.cli", "build", toy_bundle, "--backend", "tensorrt-rtx", *options)
        assert result.returncode == 1 and "are options of full TensorRT (--backend tensorrt). Leave" in result.stderr
    with pytest.raises(EngineError, match=r"must be built on a GPU of compute capability 8\.0 or later, got 7\.5"):
        TensorRT("tensorrt").target(Options(hardware="ampere-plus"), fake_cuda("7.5"))
    result = invoke("export.cli", "demo", tmp_path / "out", "--backend", "tensorrt-lean")
    assert result.returncode == 1 and "Take --backend tensorrt --version-compatible." in result.stderr
    for options, words in (
        (("--version-compatible",), "--version-compatible is an option of TensorRT, got --backend onnxruntime."),
        (("--batch-sizes", "1"), "--batch-sizes is an option of compiled plans, got --backend onnxruntime."),
        (("--sizes", "64x96"), "--sizes is an option of compiled plans, got --backend onnxruntime."),
        (("--backend", "openvino", "--build-level", "0"), "--build-level is an option of TensorRT, got --backend open"),
    ):
        result = invoke("export.cli", "demo", tmp_path / "out", *options)
        assert result.returncode == 1 and words in result.stderr and "Leave it out" in result.stderr
    assert not list(tmp_path.iterdir())
