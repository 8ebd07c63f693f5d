"""Engines: what they refuse and how they say it, and ONNX Runtime behind them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from handiffuser import BundleError, EngineError
from handiffuser.contract import IMAGE_ENCODER, GraphSpec, Manifest, TensorSpec
from handiffuser.cpu import usable_cores
from handiffuser.engines import OnnxRuntimeEngine, check_feeds, load_engines
from handiffuser.engines import onnxruntime as backend
from handiffuser.engines.cuda import Cuda, DeviceArray
from handiffuser.engines.onnxruntime_cuda import (
    OnnxRuntimeCudaEngine,
    OnnxRuntimeDeviceEngine,
    _element_type,
    device_engines,
)
from handiffuser.engines.plans import user_cache
from onnx import parser

SPEC = GraphSpec(
    "toy.onnx",
    [TensorSpec("x", "float32", ("B", 3)), TensorSpec("row", "float32", ("B", 2))],
    [TensorSpec("x", "float32", ("B", 3))],
)
MODEL = """<ir_version: 10, opset_import: ["" : 18]>
toy (float[B,3] x, float[B,2] row) => (float[B,3] next_x) <int64[1] one = {1}>
{ s = ReduceSum (row, one)
  next_x = Add (x, s) }"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    path = tmp_path / "toy.onnx"
    onnx.save(parser.parse_model(MODEL), str(path))
    return path


def feeds(batch: int = 2) -> dict[str, np.ndarray]:
    return {"x": np.ones((batch, 3), np.float32), "row": np.ones((batch, 2), np.float32)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": None}, ["toy", "lacks its input x", "float32[B, 3]"]),
        ({"y": np.ones(1)}, ["y, which it does not know", "x, row"]),
        ({"x": np.ones((2, 3))}, ["x as float64", "float32[B, 3]", "astype"]),
        ({"x": [[1.0, 2.0, 3.0]]}, ["x as list"]),
        ({"x": np.ones((2, 4), np.float32)}, ["[2, 4]", "axis 1 must be 3"]),
        ({"x": np.ones(3, np.float32)}, ["[3]", "float32[B, 3]"]),
        ({"row": np.ones((3, 2), np.float32)}, ["row of shape [3, 2]", "beside x, where B is 2"]),
        ({"x": np.ones((0, 3), np.float32), "row": np.ones((0, 2), np.float32)}, ["nothing in it"]),
    ],
)
def test_wrong_feeds_are_named(change, words):
    wrong = {name: value for name, value in {**feeds(), **change}.items() if value is not None}
    with pytest.raises(EngineError) as caught:
        check_feeds(SPEC, wrong)
    for word in words:
        assert word in str(caught.value)


def test_device_arrays_know_bfloat16():
    array = DeviceArray(1000, (4, 3), "bfloat16")
    assert array.nbytes == 24 and array[2].pointer == 1012 and array[1:3].nbytes == 12 and array[1].dtype == "bfloat16"
    spec = GraphSpec("toy.onnx", [TensorSpec("x", "bfloat16", ("B", 3))], [])
    check_feeds(spec, {"x": array})
    for other in ("float16", np.float32):
        with pytest.raises(EngineError, match=r"x as float.*bfloat16\[B, 3\]"):
            check_feeds(spec, {"x": DeviceArray(1000, (4, 3), other)})
    assert _element_type(array) == onnx.TensorProto.BFLOAT16
    assert _element_type(DeviceArray(0, (1,), "uint8")) is np.uint8


def test_bfloat16_without_a_kernel_is_one_sentence(tmp_path):
    text = '<ir_version: 10, opset_import: ["" : 18]> toy (bfloat16[B,3] x) => (bfloat16[B,3] y) { y = Exp (x) }'
    onnx.save(parser.parse_model(text), str(tmp_path / "toy.onnx"))
    tensors = [TensorSpec(name, "bfloat16", ("B", 3)) for name in ("x", "y")]
    with pytest.raises(EngineError, match=r"lacks a kernel .* in bfloat16: .*Exp.*--precision fp16\.$"):
        OnnxRuntimeEngine(tmp_path / "toy.onnx", GraphSpec("toy.onnx", tensors[:1], tensors[1:]))


def test_check_is_cheap_enough_for_every_step():
    names = [f"key_{n:02}" for n in range(28)]
    spec = GraphSpec("unet.onnx", [TensorSpec(name, "float32", ("B", 2, 195, 64)) for name in names], [])
    values = {name: np.zeros((8, 2, 195, 64), np.float32) for name in names}
    best = min(_seconds(lambda: check_feeds(spec, values)) for _ in range(50))
    assert best < 50e-6 * 2  # twice the aim: the machine may be busy


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_runs_any_batch_and_maps_state_outputs(toy):
    engine = OnnxRuntimeEngine(toy, SPEC)
    for batch in (1, 5):
        (name, value), *rest = engine(feeds(batch)).items()
        assert name == "x" and not rest
        np.testing.assert_array_equal(value, np.full((batch, 3), 3, np.float32))


@pytest.mark.parametrize(
    "spec",
    [
        GraphSpec("toy.onnx", SPEC.inputs[:1], SPEC.outputs),
        GraphSpec("toy.onnx", SPEC.inputs, [TensorSpec("image", "float32", ("B", 3))]),
        GraphSpec("toy.onnx", [TensorSpec("x", "float16", ("B", 3)), SPEC.inputs[1]], SPEC.outputs),
        GraphSpec("toy.onnx", [TensorSpec("x", "float32", ("B", 4)), SPEC.inputs[1]], SPEC.outputs),
    ],
)
def test_a_file_that_differs_from_the_manifest_is_refused(toy, spec):
    with pytest.raises(BundleError, match=r"manifest says .* Export the bundle again"):
        OnnxRuntimeEngine(toy, spec)


@pytest.mark.parametrize("content", [b"", b"not an onnx file", b"\x08\x0a\x12\x07"])
def test_a_broken_file_is_one_sentence(tmp_path, content):
    path = tmp_path / "toy.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="cannot load") as caught:
        OnnxRuntimeEngine(path, SPEC)
    assert "\n" not in str(caught.value)


def test_loads_a_bundle(toy_bundle):
    manifest, engines = load_engines(toy_bundle, "cpu", threads=1)
    assert set(engines) == set(manifest.graphs)
    text = engines["text_encoder"]({"input_ids": np.zeros((3, 77), np.int64)})["text"]
    assert text.shape == (3, 4)


def test_a_flipped_byte_and_a_missing_file_are_found(toy_copy):
    path = toy_copy / "unet.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"unet\.onnx is damaged"):
        load_engines(toy_copy)
    path.unlink()
    with pytest.raises(BundleError, match=r"unet\.onnx is missing"):
        load_engines(toy_copy)


@pytest.mark.parametrize(("device", "threads", "words"), [("tpu", None, "tpu"), ("cpu", 0, "at least 1, got 0")])
def test_impossible_settings(toy_bundle, device, threads, words):
    with pytest.raises(EngineError, match=words):
        load_engines(toy_bundle, device, threads)


def test_cuda_without_a_provider_says_how_to_get_one(toy):
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(EngineError, match=r"handiffuser\[cuda\]"):
        OnnxRuntimeCudaEngine(toy, SPEC)


def test_both_packages_installed_is_a_warning(toy_bundle, tmp_path, monkeypatch):
    assert backend.both_installed() is None
    for name in ("onnxruntime", "onnxruntime_gpu"):
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.0.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(RuntimeWarning, match="pip uninstall -y onnxruntime onnxruntime-gpu"):
        load_engines(toy_bundle, "cpu")


def test_without_onnxruntime_the_message_says_what_to_install(toy_bundle):
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from handiffuser import EngineError\n"
        "from handiffuser.engines import load_engines\n"
        f"try: load_engines({str(toy_bundle)!r})\n"
        "except EngineError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "handiffuser[cpu]"' in result.stdout


def test_memory_and_other_failures_while_running(toy):
    engine = OnnxRuntimeEngine(toy, SPEC)

    class Broken:
        def run(self, *_):
            raise self.error

    broken = Broken()
    engine.session = broken
    broken.error = RuntimeError("std::bad_alloc")
    with pytest.raises(EngineError, match=r"not enough memory to run toy.*batch-size"):
        engine(feeds())
    broken.error = RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Non-zero status code.\nmore")
    with pytest.raises(EngineError, match=r"failed in toy: Non-zero status code\.$"):
        engine(feeds())


@pytest.fixture
def fake_ort(monkeypatch):
    """ONNX Runtime with a CUDA provider, on a fake GPU."""
    pytest.importorskip("cuda.bindings.runtime")
    from fake_onnxruntime import FakeOnnxRuntime
    from fake_runtime import FakeRuntime

    gpu = FakeRuntime().install(monkeypatch)
    yield FakeOnnxRuntime(gpu).install(monkeypatch)
    assert not gpu.problems


def test_a_session_may_capture_a_graph_of_its_own(toy, fake_ort):
    """For one size, with our own capture keeping out of it."""
    stream = int(Cuda().stream().handle)
    engine = OnnxRuntimeCudaEngine(toy, SPEC, stream=stream, capture={"B": 4})
    ((_, choices),) = fake_ort.sessions
    assert choices["enable_cuda_graph"] == "1" and choices["user_compute_stream"] == str(stream)
    assert [tensor.shape for tensor in engine.session.get_inputs()] == [[4, 3], [4, 2]]
    on_device = OnnxRuntimeDeviceEngine(engine)
    assert on_device.own_graph and not on_device.capturable(None)
    plain = OnnxRuntimeDeviceEngine(OnnxRuntimeCudaEngine(toy, SPEC, stream=stream))
    assert not plain.own_graph and "enable_cuda_graph" not in fake_ort.sessions[1][1]


def test_a_session_ends_after_its_last_run(toy, fake_ort):
    """Else its host buffers are freed in a callback of the stream, which CUDA forbids: the process ends."""
    cuda = Cuda()
    stream = cuda.stream()
    engine = OnnxRuntimeDeviceEngine(OnnxRuntimeCudaEngine(toy, SPEC, stream=int(stream.handle)))
    engine.bind(
        {tensor.name: cuda.zeros((4, *tensor.shape[1:]), tensor.dtype) for tensor in SPEC.inputs},
        {tensor.name: cuda.zeros((4, *tensor.shape[1:]), tensor.dtype) for tensor in SPEC.outputs},
    )
    engine.enqueue(stream)
    del engine  # the fixture asks what the fake GPU thinks of it


def test_only_steps_replay_and_a_refusal_runs_without(toy_bundle, fake_ort):
    manifest, cuda = Manifest.load(toy_bundle), Cuda()
    stream = cuda.stream()
    fake_ort.refuse = ("hand_prior",)
    load = device_engines("onnxruntime", toy_bundle, manifest, cuda, lambda _: stream, 4, replay=True)
    load = load.at(manifest.image_size).load
    own = {name: load(name, 4, 2).own_graph for name in manifest.graphs}
    assert own == {name: name == "unet" for name in manifest.graphs}
    a, b, c = load("unet", 2, 2), load("unet", 4, 2), load("image_decoder", 2, 2)
    assert a.own_graph and a.engine is not b.engine and c.engine is load("image_decoder", 4, 2).engine
    found = device_engines("onnxruntime", toy_bundle, manifest, cuda, lambda _: stream, 3).at(manifest.image_size)
    assert not found.load("unet", 4, 2).own_graph
    assert found.buckets == [1, 2, 4] == found.single["hand_prior"] and len(found.single) == 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_half_precision_may_use_tensor_cores_and_float32_is_no_tf32(toy_bundle, fake_ort, precision):
    """use_tf32=0 forbids cuDNN every tensor core: in half precision it tries all convolutions twice."""
    manifest, cuda = replace(Manifest.load(toy_bundle), precision=precision), Cuda()
    stream = cuda.stream()
    load = device_engines("onnxruntime", toy_bundle, manifest, cuda, lambda _: stream, 2)
    load = load.at(manifest.image_size).load
    for name in manifest.graphs:
        load(name, 2, 2)
        half = precision == "fp16" and name != "hand_features"
        assert fake_ort.sessions[-1][1]["use_tf32"] == ("1" if half else "0"), name


def test_a_gpu_that_fails_is_not_the_bundle_s_fault(toy, fake_ort):
    """ONNX Runtime says what failed behind half a kilobyte of C++."""
    stream = Cuda().stream()
    engine = OnnxRuntimeCudaEngine(toy, SPEC, stream=int(stream.handle))
    fake_ort.gpu.broken = fake_ort.gpu.cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(EngineError, match=r"^The GPU failed while .*toy\.onnx: CUDA failure 700: \w+\. .*nvidia-smi"):
        OnnxRuntimeCudaEngine(toy, SPEC, stream=int(stream.handle))
    error = engine.failure(RuntimeError("cuda_call.cc:114 onnxruntime::CudaCall CUBLAS failure 13: EXECUTION ; GPU=0"))
    assert str(error) == "ONNX Runtime failed in toy: CUBLAS failure 13: EXECUTION."
    error = engine.failure(RuntimeError("CudaCall CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0"))
    assert str(error).startswith("There is not enough memory to run toy.")


def test_usable_cores_is_sane():
    assert 1 <= usable_cores() <= 4096


@pytest.mark.parametrize("kind", ["fake", pytest.param("real", marks=pytest.mark.gpu)])
def test_cuda_agrees_with_the_cpu(toy, kind, request):
    if kind == "fake":
        request.getfixturevalue("fake_ort")
    elif "CUDAExecutionProvider" not in pytest.importorskip("onnxruntime").get_available_providers():
        pytest.skip("needs onnxruntime-gpu and an NVIDIA GPU")
    cuda = Cuda()
    stream = cuda.stream()
    engine = OnnxRuntimeDeviceEngine(OnnxRuntimeCudaEngine(toy, SPEC, stream=int(stream.handle)))
    given, results = feeds(), OnnxRuntimeEngine(toy, SPEC)(feeds())
    inputs = {name: cuda.zeros(value.shape, value.dtype) for name, value in given.items()}
    outputs = {name: cuda.zeros(value.shape, value.dtype) for name, value in results.items()}
    engine.bind(inputs, outputs)
    for name, value in given.items():
        pinned = cuda.pinned(value.shape, value.dtype)
        pinned[...] = value
        stream.copy(inputs[name], pinned)
        stream.synchronize()  # `pinned` goes
    engine.enqueue(stream)
    for name, value in results.items():
        pinned = cuda.pinned(value.shape, value.dtype)
        stream.copy(pinned, outputs[name])
        stream.synchronize()
        np.testing.assert_array_equal(pinned, value)


def test_optimised_graphs_are_kept_and_give_the_same_bits(toy_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    manifest, plain = load_engines(toy_bundle, "cpu", 1)
    kept = {plan.graph: plan for plan in user_cache()}
    assert kept.keys() == manifest.graphs.keys() - {IMAGE_ENCODER}  # which loads for the first picture
    assert {plan.parts["version"] for plan in kept.values()} == {onnxruntime.__version__}
    levels = []
    session = onnxruntime.InferenceSession

    def noted(model, options, providers):
        levels.append((Path(model).suffix, options.graph_optimization_level))
        return session(model, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noted)
    _, again = load_engines(toy_bundle, "cpu", 1)
    assert set(levels) == {(".plan", onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)}
    ids = np.ones((2, 77), np.int64)
    for name, value in plain["text_encoder"]({"input_ids": ids}).items():
        np.testing.assert_array_equal(again["text_encoder"]({"input_ids": ids})[name], value)

    kept["unet"].path.write_bytes(b"?" * kept["unet"].size)
    with pytest.warns(RuntimeWarning, match=r"unet.*is damaged: it is compiled again"):
        load_engines(toy_bundle, "cpu", 1)
    levels.clear()
    load_engines(toy_bundle, "cpu", 1)
    assert {kind for kind, _ in levels} == {".plan"}

    for nowhere in ("/proc/none", os.devnull):  # where nothing can be written
        monkeypatch.setenv("XDG_CACHE_HOME", nowhere)
        load_engines(toy_bundle, "cpu", 1)


def test_a_cache_that_is_full_loses_what_was_not_used_for_longest(toy_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_engines(toy_bundle, "cpu", 1)
    store = user_cache()
    plans = sorted(store, key=lambda plan: plan.graph)
    for age, plan in enumerate(plans):
        os.utime(plan.path, (1e9 + age, 1e9 + age))
    store.shrink(sum(plan.size for plan in plans[3:]))
    assert [plan.graph for plan in sorted(store, key=lambda plan: plan.graph)] == [p.graph for p in plans[3:]]
    assert not store.strays()
