"""Adapters put into built plans, with a stand-in for TensorRT: by the command, by hd-run, and what is refused."""

from __future__ import annotations

import base64
import gc
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

pytest.importorskip("cuda.bindings.runtime")
pytest.importorskip("tensorrt_rtx")

from adaptable import adaptable, write
from commands import invoke
from fake_runtime import FakeRuntime
from fake_tensorrt import FakeTensorRT
from handiffuser.contract import Manifest, file_digest
from handiffuser.engines import build as build_module
from handiffuser.engines import refit as refits
from handiffuser.engines import timing
from handiffuser.engines.adapted import chosen
from handiffuser.engines.cuda import Cuda
from handiffuser.engines.initializers import OnnxWeights
from handiffuser.engines.plans import PlanStore
from handiffuser.engines.tensorrt import Options, TensorRT
from handiffuser.engines.tensorrt_loading import usable_plans
from handiffuser.errors import EngineError
from handiffuser.shipped import bundle_path
from handiffuser.weights import WeightMap
from onnx import numpy_helper
from whole import hd_run, pictures, same

pytestmark = pytest.mark.usefixtures("all_at_once")


@pytest.fixture
def gpu(monkeypatch):
    gpu = FakeRuntime(seed=1).install(monkeypatch)
    yield gpu
    gc.collect()
    assert not gpu.problems and not gpu.live()


@pytest.fixture
def trt(gpu, monkeypatch):
    return FakeTensorRT(gpu, rtx=False).install(monkeypatch)


@pytest.fixture
def lora(tmp_path):
    """Changes the UNet alone, and the context alone."""
    return {name: write(tmp_path / f"{name}.safetensors", word) for name, word in (("s", "conv_in"), ("k", "to_k"))}


@pytest.fixture(scope="module")
def plain(toy_bundle, tmp_path_factory):
    """A bundle without plans, whose weights are stored as exporters do."""
    folder = adaptable(toy_bundle, tmp_path_factory.mktemp("plain") / "bundle")
    manifest = Manifest.load(folder)
    for spec in manifest.graphs.values():
        model = onnx.load(folder / spec.file)
        for one in model.graph.initializer:
            one.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(one), one.name))
        onnx.save(model, folder / spec.file)
    manifest.files = {name: file_digest(folder / name) for name in manifest.files}
    manifest.save(folder)
    return folder


@pytest.fixture(scope="module")
def refittable(plain, tmp_path_factory):
    """The same with plans, as `hd-engines build --refittable` makes them."""
    folder = shutil.copytree(plain, tmp_path_factory.mktemp("refittable") / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        FakeTensorRT(FakeRuntime().install(patch), rtx=False).install(patch)
        build(folder, "--refittable")
    return folder


@pytest.fixture
def bundle(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "bundle")


@pytest.fixture
def ready(refittable, tmp_path):
    return shutil.copytree(refittable, tmp_path / "ready")


def engines(*arguments):
    return invoke("engines.cli", *arguments)


def build(bundle, *options):
    result = engines("build", bundle, "--batch-sizes", "1,4", "--backend", "tensorrt", *options)
    assert result.returncode == 0, result.stderr
    return {plan.graph: plan for plan in PlanStore(bundle)}


def test_only_what_adapters_change_is_refittable(bundle, trt):
    plans = build(bundle, "--refittable")
    assert {graph for graph, plan in plans.items() if plan.refittable} == {"unet", "unet_context"}
    inside = json.loads(plans["unet"].path.read_bytes())
    assert list(inside["refit"]) == ["shift"] and not inside["stripped"] and not inside["version_compatible"]
    assert not json.loads(plans["image_decoder"].path.read_bytes())["refit"]
    again = engines("build", bundle, "--batch-sizes", "1,4", "--backend", "tensorrt", "--refittable")
    assert "nothing was built" in again.stderr
    plain = engines("build", bundle, "--batch-sizes", "1,4", "--backend", "tensorrt")
    assert plain.returncode == 0 and "Built 4 of" in plain.stderr and "build options changed" in plain.stderr


@pytest.mark.parametrize("kept", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_hd_run_paints_as_with_the_merged_weights(ready, trt, lora, tmp_path, kept, capsys):
    """kept: by plans that `hd-engines refit` wrote."""
    plain = {path.name: path.read_bytes() for path in (ready / "plans").iterdir()}
    said = ("--lora", f"{lora['s']}:0.5", "--lora", f"{lora['k']}:2")
    if kept:
        result = engines("refit", ready, *said)
        assert result.returncode == 0 and "Merged s.safetensors at 0.5: 1 layers of unet" in result.stderr
        again = engines("refit", ready, *said)
        assert again.returncode == 0 and again.stderr.count("was there") == result.stderr.count(" MB ") == 4
        assert all((ready / "plans" / name).read_bytes() == content for name, content in plain.items())
        listed = engines("list", ready).stdout
        assert listed.count("current, with s.safetensors:0.5 and k.safetensors:2") == 4 and "stale" not in listed
    code, printed = hd_run(ready, tmp_path / "gpu", *said)
    assert code == 0 and trt.runs["unet"] and not printed
    noted = capsys.readouterr().err
    assert ("get the adapters as they are loaded. To keep such plans: hd-engines refit" in noted) != kept
    assert hd_run(ready, tmp_path / "cpu", "--device", "cpu", *said)[0] == 0
    with_adapters = pictures(tmp_path / "cpu")
    same(pictures(tmp_path / "gpu"), with_adapters)
    assert hd_run(ready, tmp_path / "base") == (0, "")
    base = pictures(tmp_path / "base")
    assert any((base[key] != one).any() for key, one in with_adapters.items())
    assert {path.name for path in (ready / "plans").iterdir()} >= set(plain)


def test_other_adapters_and_other_scales_never_run_in_their_place(ready, trt, lora, tmp_path):
    """A folder with plans of several: which one a run takes for the UNet."""
    for said in ([], [lora["s"]], [f"{lora['s']}:0.5"], [lora["k"]], [lora["s"], lora["k"]]):
        if said:
            assert engines("refit", ready, *(word for one in said for word in ("--lora", one))).returncode == 0
    store, manifest, backend = PlanStore(ready), Manifest.load(ready), TensorRT("tensorrt")

    def taken(*said):
        adapters = chosen(said)
        adapted = refits.Adapted(ready, adapters) if adapters else None
        plan = usable_plans(store, manifest, backend, Cuda(), 2, None, adapted)["unet"][1]
        return json.loads(plan.path.read_bytes())["weights"], adapted is not None and adapted.lacking(plan)

    def of(size):
        return {"shift": base64.b64encode(np.float32([size]).tobytes()).decode()}

    assert taken() == ({}, False) == taken(f"{lora['s']}:0")
    assert taken(lora["s"]) == (of(1), {}) and taken(f"{lora['s']}:0.5") == (of(0.5), {})
    assert taken(lora["k"]) == ({}, {}), "it leaves the UNet alone"
    assert taken(lora["s"], lora["k"]) == (of(1), {})
    for said in ([f"{lora['s']}:0.25"], [lora["k"], lora["s"]]):
        weights, lacks = taken(*said)
        assert not weights and [*lacks] == ["shift"], "the base's, which gets the adapters in memory"
    write(tmp_path / "s.safetensors", "conv_in", 3.0)  # other numbers under the name
    weights, lacks = taken(lora["s"])
    assert not weights and lacks["shift"] == 3.0


@pytest.mark.parametrize("said", [(), ("--lora", "s.safetensors:0")])
def test_scale_0_leaves_the_base_s_plans_alone(ready, trt, lora, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in (ready / "plans").iterdir())
    assert engines("refit", ready, "--lora", lora["s"]).returncode == 0
    assert sorted(path.name for path in (ready / "plans").iterdir()) != before
    result = engines("refit", ready, *said)
    assert result.returncode == 0 and "Removed 2 plans with adapters" in result.stderr
    assert sorted(path.name for path in (ready / "plans").iterdir()) == before


def test_a_refit_that_is_stopped_changes_nothing_and_goes_on(ready, trt, lora, monkeypatch):
    before = {path.name: path.read_bytes() for path in (ready / "plans").iterdir()}
    put, calls = refits.put, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return put(*arguments)

    monkeypatch.setattr(refits, "put", stopped)
    assert engines("refit", ready, "--lora", lora["s"]).returncode == 130
    assert all((ready / "plans" / name).read_bytes() == content for name, content in before.items())
    assert not PlanStore(ready).strays()
    result = engines("refit", ready, "--lora", lora["s"])
    assert result.returncode == 0 and result.stderr.count("was there") == 1


def test_the_bundle_changes(ready, trt, lora):
    assert engines("refit", ready, "--lora", lora["s"]).returncode == 0
    manifest = Manifest.load(ready)
    manifest.files["unet.onnx"] = manifest.files["image_decoder.onnx"]
    manifest.save(ready)
    listed = [line for line in engines("list", ready).stdout.splitlines() if line.lstrip().startswith("unet ")]
    assert len(listed) == 4 and all("stale: the bundle changed" in line for line in listed)
    assert engines("prune", ready).stderr.count("the bundle changed") == 4


def test_what_a_kernel_has_joined_is_set_too(bundle, trt, lora, monkeypatch):
    monkeypatch.setattr(refits, "MIN_STRIPPED", 1)  # the toy's weights are few
    plans = build(bundle, "--refittable", "--strip-weights")
    name = next(name for name in json.loads(plans["unet"].path.read_bytes())["refit"] if name != "shift")
    trt.joined = {"shift": (name,)}
    assert engines("refit", bundle, "--lora", lora["s"]).returncode == 0
    (made,) = [plan for plan in PlanStore(bundle) if plan.adapters and plan.batch == (1, 1) and plan.branches == 2]
    weights = json.loads(made.path.read_bytes())["weights"]
    assert {"shift", name} <= set(weights)


@pytest.mark.parametrize("said", [(), pytest.param(("--lora", "{s}:0.5"), marks=pytest.mark.slow)])
def test_stripped_plans_get_the_bundle_s_weights(bundle, trt, lora, tmp_path, said, monkeypatch):
    monkeypatch.setattr(refits, "MIN_STRIPPED", 1)  # the toy's weights are few
    plans = build(bundle, "--refittable", "--strip-weights")
    inside = json.loads(plans["unet"].path.read_bytes())
    assert len(inside["stripped"]) > 1 and plans["unet"].stripped
    said = [word.format(**lora) for word in said]
    assert hd_run(bundle, tmp_path / "gpu", *said)[0] == 0 and trt.runs["unet"]
    assert hd_run(bundle, tmp_path / "cpu", "--device", "cpu", *said)[0] == 0
    same(pictures(tmp_path / "gpu"), pictures(tmp_path / "cpu"))


@pytest.mark.parametrize("call", ["set_named_weights", "refit_cuda_engine", "serialize"])
def test_a_call_that_fails_is_one_sentence(ready, trt, lora, call):
    count, trt.refuse = len(list((ready / "plans").iterdir())), call
    result = engines("refit", ready, "--lora", lora["s"])
    assert result.returncode == 1 and f"{call} was told to fail" in result.stderr and "Traceback" not in result.stderr
    assert len(list((ready / "plans").iterdir())) == count


def test_without_memory_of_the_gpu(ready, trt, lora, monkeypatch):
    module = trt.module

    class Poor:
        def __init__(self, engine, logger):
            self.real, self.logger = module_refitter(engine, logger), logger

        def __getattr__(self, name):
            return getattr(self.real, name)

        def refit_cuda_engine(self):
            self.logger.log(module.ILogger.ERROR, "Error Code 2: OutOfMemory (Requested size was 4096 bytes.)")
            return False

    module_refitter = module.Refitter
    monkeypatch.setattr(module, "Refitter", Poor)
    result = engines("refit", ready, "--lora", lora["s"])
    assert result.returncode == 1 and "cannot refit unet" in result.stderr and "Free some memory" in result.stderr


def test_plans_that_cannot_be_refitted(bundle, trt, lora, tmp_path):
    build(bundle)
    refused = engines("refit", bundle, "--lora", lora["s"])
    assert refused.returncode == 1
    assert (
        "must have refittable plans of unet for this GPU, and has none. Build them: hd-engines build" in refused.stderr
    )
    assert "--backend tensorrt --refittable" in refused.stderr
    code, said = hd_run(bundle, tmp_path / "out", "--backend", "tensorrt", "--lora", lora["s"])
    assert code != 0 and f"{bundle} must have refittable plans to run with --lora on tensorrt" in said, said
    build(bundle, "--refittable")
    strange = write(tmp_path / "strange.safetensors", "conv_in")
    wrong = engines("refit", bundle, "--lora", f"{strange}:99")
    assert wrong.returncode == 1 and "from -10 to 10" in wrong.stderr
    wrong = engines("refit", bundle, "--lora", tmp_path / "nothing.safetensors")
    assert wrong.returncode == 1 and "does not exist" in wrong.stderr


def test_a_weight_that_the_plan_does_not_know(bundle, gpu, lora, tmp_path, monkeypatch, capsys):
    FakeTensorRT(gpu, rtx=False, folded=("shift",)).install(monkeypatch)
    monkeypatch.setattr(refits, "MIN_STRIPPED", 1)  # so that the plan has other weights
    build(bundle, "--refittable", "--strip-weights")
    result = engines("refit", bundle, "--lora", lora["s"])
    assert result.returncode == 1 and "plan of unet does not know shift, which the adapter changes" in result.stderr
    assert "hd-engines merge" in result.stderr
    code, _ = hd_run(bundle, tmp_path / "gpu", "--lora", lora["s"])
    noted = capsys.readouterr().err
    assert code == 0 and f"The plans in {bundle} are not refitted. The plan of unet does not know shift" in noted, noted
    assert hd_run(bundle, tmp_path / "cpu", "--device", "cpu", "--lora", lora["s"])[0] == 0
    same(pictures(tmp_path / "gpu"), pictures(tmp_path / "cpu"))
    code, said = hd_run(bundle, tmp_path / "named", "--backend", "tensorrt", "--lora", lora["s"])
    assert code == 1 and "does not know shift" in said


def test_numbers_that_half_precision_does_not_hold(trt):
    backend, types = TensorRT("tensorrt"), trt.module.DataType
    exact = np.float32([1, 65504.0])
    half = refits._encoded(backend, "unet", "w", types.HALF, exact)
    assert half.dtype == np.float16 and np.array_equal(half, exact)
    assert refits._encoded(backend, "unet", "w", types.BF16, exact).dtype == np.uint16
    with pytest.raises(EngineError, match="w of unet must be at most 65504 in float16"):
        refits._encoded(backend, "unet", "w", types.HALF, 2 * exact)
    with pytest.raises(EngineError, match="must be in float32, float16 or bfloat16"):
        refits._encoded(backend, "unet", "w", types.INT8, exact)


def test_without_adapters_a_folder_must_be_a_bundle(tmp_path):
    for folder, why in ((tmp_path, "is not a bundle"), (tmp_path / "nothing", "does not exist")):
        result = engines("refit", folder)
        assert result.returncode == 1 and why in result.stderr


def test_eight_bits_are_timed_beside_a_plan_that_is_not_made_for_refits(tmp_path):
    store, parts = PlanStore(tmp_path), {"name": "unet", "graph": "0", "sizes": "B=1", "precision": "fp16",
                                         "backend": "tensorrt", "version": "1", "target": "a GPU"}  # fmt: skip
    for age, more in enumerate(({}, {"refittable": True}, {"stripped": True})):
        plan = store.add(parts | {"options": json.dumps(more)}, b"plan", {}, 1.0)
        os.utime(plan.path, (age, age))
    store.add(parts | {"options": '{"refittable": true}', "adapters": "key"}, b"plan", {}, 1.0)
    every = SimpleNamespace(takes=lambda plan, cuda: True)
    assert timing._plans(store, every, None, lambda plan: not plan.adapters)["B=1"].parts["options"] == "{}"


def test_an_export_refuses_before_it_begins(monkeypatch):
    monkeypatch.setattr(build_module, "gpu", lambda: None)
    for options in (Options(refittable=True), Options(stripped=True)):
        with pytest.raises(EngineError, match="must be built on a machine with a GPU"):
            build_module.check_build("tensorrt-rtx", options)
    build_module.check_build("tensorrt-rtx", Options())


def test_tensorrt_rtx_without_a_gpu_is_refused_at_once(bundle):
    for option in ("--refittable", "--strip-weights"):
        result = engines("build", bundle, "--backend", "tensorrt-rtx", option)
        assert result.returncode == 1 and "must be built on a machine with a GPU" in result.stderr
    openvino = engines("build", bundle, "--backend", "openvino", "--refittable")
    assert openvino.returncode == 1 and "--refittable is an option of TensorRT" in openvino.stderr


def test_the_key_is_by_content(bundle, lora, tmp_path):
    one, same_content = lora["s"], write(tmp_path / "another name.safetensors", "conv_in")
    keys = [refits.Adapted(bundle, chosen([f"{name}:0.5"])).key for name in (one, same_content)]
    other = refits.Adapted(bundle, chosen([f"{one}:0.25"]))
    assert keys[0] == keys[1] != other.key and other.graphs == {"unet"}
    shift = OnnxWeights(bundle / "unet.onnx").read("shift")
    assert np.array_equal(other.weights("unet")["shift"], shift + np.float32(0.25))


@pytest.mark.slow
def test_the_real_tensorrt_rtx_knows_the_weights_that_adapters_change():
    """By the names in the bundle's map. Without a GPU it builds no such plan, which `check_refits` says beforehand."""
    from handiffuser.engines.build import gpu
    from handiffuser.engines.tensorrt_build import build_plan

    folder, backend = bundle_path(), TensorRT("tensorrt-rtx")
    places = [place for some in WeightMap.load(folder).places.values() for place in some]
    for graph in ("unet", "unet_context", "unet_time", "text_hand_encoder"):
        network = backend.made("Builder").create_network(0)
        assert backend.module.OnnxParser(network, backend.logger).parse_from_file(str(folder / f"{graph}.onnx"))
        names = {place.initializer for place in places if place.graph == graph}
        assert len(names) > 20 and all(network.mark_weights_refittable(name) for name in names), graph
    if gpu() is None:
        sizes = {"B": 1, "G": 2, **Manifest.load(folder).sides()}
        for options in (Options(refittable=True), Options(stripped=True)):
            with pytest.raises(EngineError, match="cannot build unet_context"):
                build_plan(backend, folder / "unet_context.onnx", sizes, "fp32", options)
