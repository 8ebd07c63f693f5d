"""Whole commands with ONNX Runtime on a GPU that is not there; see `fake_runtime.py` and `fake_onnxruntime.py`."""

from __future__ import annotations

import gc
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.runtime")
pytest.importorskip("onnxruntime")

import whole
from adaptable import adaptable, write
from fake_onnxruntime import FakeOnnxRuntime
from fake_runtime import FakeRuntime
from handiffuser import HanDiffuser
from handiffuser.contract import GRAPHS, PICTURES
from handiffuser.engines.onnxruntime_cuda import OnnxRuntimeCudaEngine, OnnxRuntimeDeviceEngine
from handiffuser.errors import EngineError, RequestError
from whole import hd_run, mixed, pictures, run, same

pytestmark = pytest.mark.usefixtures("all_at_once")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU at which nothing may go wrong."""
    gpu = FakeRuntime(seed=1).install(monkeypatch)
    yield gpu
    gc.collect()
    assert not gpu.problems


@pytest.fixture
def ort(gpu, monkeypatch):
    return FakeOnnxRuntime(gpu).install(monkeypatch)


def test_any_size_on_a_gpu(sized_bundle, gpu, ort):
    """A session of UNet and decoder for each size, which goes with the size; the other graphs have one for all."""
    requests = [replace(request, size=("40x24", None, "24x40")[i % 3]) for i, request in enumerate(mixed(8))]
    with HanDiffuser.load(sized_bundle, device="cpu") as on_cpu:
        expected = run(on_cpu, requests)
    with HanDiffuser.load(sized_bundle, device="cuda", batch_size=4) as pipeline:
        same(run(pipeline, requests), expected)
        counts = Counter(name.removesuffix(".onnx") for name, _ in ort.sessions)
        del counts["hand_prior"]  # which has one for each batch size
        assert counts == {name: 3 if name in PICTURES else 1 for name in GRAPHS if name != "hand_prior"}
        live, sizes = gpu.live(), pipeline.loop.sizes
        sizes.drop((24, 40))
        gc.collect()
        assert gpu.live() < live - 10
        same(run(pipeline, requests), expected)
    gc.collect()
    assert not gpu.live()


def test_a_run_on_a_gpu_has_one_set_of_adapters(toy_bundle, gpu, ort, tmp_path):
    bundle, lora = adaptable(toy_bundle, tmp_path / "bundle"), write(tmp_path / "a.safetensors", "conv_in")
    for device in ("cpu", "cuda"):
        said = ("--device", device, "--backend", "onnxruntime", "--lora", f"{lora}:0.5")
        assert hd_run(bundle, tmp_path / device, *said) == (0, "")
    same(pictures(tmp_path / "cuda"), pictures(tmp_path / "cpu"))
    with HanDiffuser.load(bundle, "cuda", backend="onnxruntime", lora=f"{lora}:0.5") as pipeline:
        with pytest.raises(RequestError, match=r"lora must be a\.safetensors:0\.5, as these .* got a\.safetensors:1\."):
            pipeline.generate("a fist", lora=lora)
        assert pipeline.generate("a fist")[0].request.lora == (f"{lora}:0.5",)


@pytest.mark.parametrize("extra", [(), ("--no-overlap", "--no-warm-up"), ("--solver", "ddpm"), ("--guidance", "1")])
def test_pictures_are_those_of_the_cpu(toy_bundle, gpu, ort, tmp_path, extra):
    assert hd_run(toy_bundle, tmp_path / "cpu", "--device", "cpu", *extra) == (0, "")
    assert not ort.sessions
    assert hd_run(toy_bundle, tmp_path / "gpu", "--backend", "onnxruntime", "--device", "cuda", *extra) == (0, "")
    same(pictures(tmp_path / "gpu"), pictures(tmp_path / "cpu"))
    replayed = [name for name, choices in ort.sessions if choices.get("enable_cuda_graph") == "1"]
    assert set(replayed) == {"hand_prior"} and sorted({name for name, _ in ort.sessions}) == sorted(GRAPHS)
    assert len(ort.sessions) - len(replayed) == len(GRAPHS) - 1, "one session for each other graph"
    for _, choices in ort.sessions:
        assert choices["use_tf32"] == "0"
    assert len({choices["user_compute_stream"] for _, choices in ort.sessions}) == (1 if "--no-overlap" in extra else 3)
    assert gpu.first == ([] if "--no-overlap" in extra else [-5]), "steps go before hands and decoder"
    assert gpu.calls["cudaStreamBeginCapture"] == len(replayed), "ONNX Runtime's own"
    gc.collect()
    assert not gpu.live(), "everything is freed at the end"


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_any_order_that_streams_allow_gives_the_same(toy_bundle, gpu, ort, seed, graphs):
    """ONNX Runtime captures the steps of stage 1 itself, with `graphs` those of stage 2, too.

    hand_prior refuses for one of the seeds.
    """
    gpu.random, gpu.lazy = np.random.default_rng(seed), seed == 1
    ort.refuse = ("hand_prior",) if seed == 2 else ()
    with HanDiffuser.load(toy_bundle, device="cpu") as on_cpu:
        expected = run(on_cpu, mixed(11, seed))
    with HanDiffuser.load(toy_bundle, device="cuda", batch_size=4, onnxruntime_graphs=graphs) as pipeline:
        assert pipeline.made_by["backend"] == "onnxruntime"
        pipeline.warm_up()
        before = dict(ort.runs)
        same(run(pipeline, mixed(11, seed)), expected)
        assert (ort.runs["unet"] == before["unet"]) == graphs, "with graphs of its own nothing is computed again"
        assert (ort.runs["hand_prior"] == before["hand_prior"]) == (seed != 2)
    gc.collect()
    assert not gpu.live()


@pytest.mark.parametrize(
    ("kind", "places"),
    [("a call fails", 4), *(pytest.param(kind, 16, marks=pytest.mark.slow) for kind in whole.KINDS)],
)
def test_a_fault_anywhere_ends_in_one_sentence(toy_bundle, monkeypatch, tmp_path, capsys, kind, places):
    def fresh(at):
        gpu = FakeRuntime(seed=at or 0).install(monkeypatch)
        FakeOnnxRuntime(gpu).install(monkeypatch)
        if at is not None:
            whole.fault(kind, gpu, at)
        return gpu, lambda: whole.counted(kind, gpu)

    arguments = ("--backend", "onnxruntime", "--device", "cuda")
    whole.faults_end_in_one_sentence(toy_bundle, tmp_path, arguments, capsys, fresh, places)


def test_a_node_of_the_unet_on_the_cpu_is_named(toy_bundle, gpu, ort, tmp_path, capsys):
    """The arithmetic of shapes may stay there; what computes may not."""
    ort.no_kernel = ("Tanh", "Sum")
    code, error = hd_run(toy_bundle, tmp_path, "--backend", "onnxruntime", "--device", "cuda")
    spoken = capsys.readouterr().err + error
    assert code == 1 and re.search(r"has no CUDA kernel for (Tanh|Sum)\b.* of unet: .*Update it", spoken), spoken
    assert not pictures(tmp_path) and "Traceback" not in spoken


# Tests of the test: mistakes that the engine could make, and what is said of them.
def no_stream(patch):
    make = OnnxRuntimeCudaEngine.__init__
    patch.setattr(OnnxRuntimeCudaEngine, "__init__", lambda self, *a, **k: make(self, *a, **{**k, "stream": 0}))


def captured_by_us(patch):
    patch.setattr(OnnxRuntimeDeviceEngine, "capturable", lambda engine, stream: True)


def one_session_for_several_sets_of_arrays(patch):
    """Sessions that replay are shared by all batch sizes."""
    made, make = {}, OnnxRuntimeCudaEngine.__init__

    def shared(self, path, *arguments, capture=None, **more):
        if capture and path in made:
            vars(self).update(vars(made[path]))
            return
        make(self, path, *arguments, capture=capture and {"G": 2}, **more)
        made[path] = self

    patch.setattr(OnnxRuntimeCudaEngine, "__init__", shared)


MISTAKES = {
    no_stream: "race",
    captured_by_us: "a capture that is not its own",
    one_session_for_several_sets_of_arrays: "captured with other memory",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_found(toy_bundle, monkeypatch, mistake):
    gpu = FakeRuntime(seed=1, lazy=True).install(monkeypatch)
    FakeOnnxRuntime(gpu).install(monkeypatch)
    mistake(monkeypatch)
    graphs = mistake is one_session_for_several_sets_of_arrays
    try:
        with HanDiffuser.load(toy_bundle, device="cuda", batch_size=4, onnxruntime_graphs=graphs) as pipeline:
            pipeline.warm_up()
            list(pipeline.run(pipeline.prepare(mixed(11), 0)[0]))
    except EngineError:
        pass  # the pictures may fail, too
    assert re.search(MISTAKES[mistake], " ".join(gpu.problems)), gpu.problems
