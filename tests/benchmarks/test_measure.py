"""The figures: operations against those counted by hand, stages that add up, percentiles that are samples."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from handiffuser import EngineError, HanDiffuser, cpu
from handiffuser.benchmarks import measure, soak
from handiffuser.benchmarks.card import Others, bf16_ceiling, card
from handiffuser.contract import GRAPHS, IMAGE_ENCODER, Manifest
from handiffuser.engines import load_engines
from handiffuser.engines.base import Sized
from handiffuser.engines.cost import count
from handiffuser.engines.cuda import Cuda
from handiffuser.runtime.device import DeviceLoop
from handiffuser.runtime.device_graphs import Streams, connect
from onnx import parser, save


@pytest.fixture(scope="module")
def pipeline() -> HanDiffuser:
    return HanDiffuser.load("demo", device="cpu", threads=1, batch_size=2)


def graph(tmp_path, text: str):
    file = tmp_path / "graph.onnx"
    save(parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {text}'), file)
    return file


def test_operations_are_those_counted_by_hand(tmp_path):
    file = graph(
        tmp_path,
        """g (float[B,8,6,10] x, float[16,4,3,3] w, float[7,5] m, float[9,5] k, float[1,8] scale)
           => (float[B,16,3,5] conv, float[B,7,9] gemm_)
        <int64[3] shape = {-1, 6, 5}, int64[2] flat = {-1, 5}>
        {
            c = Conv <strides = [2, 2], pads = [1, 1, 1, 1], group = 2> (x, w)
            conv = GroupNormalization <num_groups = 2> (c, ones, zeros)
            rows = Reshape (x, flat)
            gemm_ = Gemm <transB = 1> (rows, k)
        }""".replace("(c, ones, zeros)", "(c, weight, weight)").replace("float[1,8] scale", "float[16] weight"),
    )
    B = 3
    found = count(file, {"B": B})
    assert found["Conv"] == 2 * (B * 16 * 3 * 5) * (4 * 3 * 3)  # outputs, times what each is a sum of
    assert found["Gemm"] == 2 * (B * 8 * 6 * 10 // 5) * 9 * 5
    assert set(found) == {"Conv", "Gemm"}


def test_operations_of_matrix_products_and_attention(tmp_path):
    file = graph(
        tmp_path,
        """g (float[B,2,11,8] q, float[B,2,7,8] k, float[B,2,7,6] v, float[6,5] w) => (float[B,2,11,5] y)
        { a = Attention (q, k, v)
          y = MatMul (a, w) }""",
    )
    found = count(file, {"B": 4})
    assert found["Attention"] == 2 * 4 * 2 * 11 * 7 * (8 + 6)
    assert found["MatMul"] == 2 * (4 * 2 * 11) * 6 * 5


@pytest.mark.parametrize("branches", [1, 2])
def test_operations_are_those_that_torch_counts(tiny_checkpoint, tiny_bundle, branches):
    """Of the networks that a picture's time goes into, as PyTorch runs what was exported."""
    import torch
    from handiffuser.export.graphs import graphs
    from handiffuser.models.smplh import SMPLH
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    sides = Manifest.load(tiny_bundle, verify=False).sides()
    for exported in graphs(tiny_checkpoint, SMPLH.load(tiny_checkpoint.body), batch=2):
        if exported.name == "hand_features":  # kinematics add up where others multiply
            continue
        inputs = [v[:, -branches:] if name in exported.branched else v for name, v in exported.inputs.items()]
        # Attention in its parts: PyTorch counts no operations of the CPU's fused kernel.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            exported.module(*inputs)
        counts = counter.get_flop_counts()  # module -> kind -> operations
        left = sum(counts.get("UNetStep.unet.time_embedding", {}).values())  # `unet_time` has it; nothing here uses it
        assert bool(left) == (exported.name == "unet")
        found = count(tiny_bundle / f"{exported.name}.onnx", {"B": 2, "S": 3, "G": branches, **sides})
        wanted = counter.get_total_flops() - left
        if exported.name == "unet" and branches == 2:  # what both branches share, the graph computes once
            assert 0.9 * wanted < sum(found.values()) < wanted, found
        else:
            assert sum(found.values()) == wanted, (exported.name, found)
        if exported.name in ("unet", "image_decoder"):
            assert found["Attention"] > 0


def test_operations_grow_with_the_batch(pipeline):
    from handiffuser.contract import Manifest
    from handiffuser.shipped import bundle_path

    sides = Manifest.load(bundle_path(), verify=False).sides()
    for name, spec in pipeline.manifest.graphs.items():
        one, three = (count(bundle_path() / spec.file, {"B": n, "S": n, "G": 2, **sides}) for n in (1, 3))
        assert sum(three.values()) == pytest.approx(3 * sum(one.values()), rel=0.01), name
        assert sum(one.values()) > 0


def test_a_free_dimension_without_a_size_is_an_error(tmp_path):
    file = graph(tmp_path, "g (float[B,4] x, float[4,2] w) => (float[B,2] y) { y = MatMul (x, w) }")
    with pytest.raises(EngineError, match="cannot be inferred"):
        count(file, {})


def test_without_onnx_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EngineError, match=r"handiffuser\[export\]"):
        count(tmp_path / "graph.onnx", {})


@pytest.mark.slow
def test_stages_and_host_add_up_to_the_total(pipeline):
    run, meter = measure.new_run(2, 2, "euler", 2.0), measure.Meter(pipeline)
    run["samples"] = list(measure.samples(pipeline, run, 3, meter))
    for sample in run["samples"]:
        assert sum(sample["stages"].values()) + sample["host"] == pytest.approx(sample["total"])
        assert sample["host"] > 0 and min(sample["stages"].values()) >= 0 and sample["stages"]["unet"] > 0
        assert sample["total"] == pytest.approx(sample["wall"], rel=0.01)
    out = measure.summary(run)
    assert sum(out["stages"].values()) + out["host"] == pytest.approx(out["total"])
    assert out["unet_step"] == out["stages"]["unet"] / 2
    assert out["pictures_per_second"] == pytest.approx(2 / out["total"])
    assert out["guided_steps_per_second"] == pytest.approx(4 / out["total"])
    assert out["memory"]["peak_mb"] >= out["memory"]["rss_mb"] > 10
    totals = [sample["total"] for sample in run["samples"]]
    assert out["latency"] == {"p50": sorted(totals)[1], "p90": max(totals), "p99": max(totals), "max": max(totals)}

    flops = {name: {"MatMul": 100} for name in pipeline.manifest.graphs}
    used = measure.utilisation(out, flops, 1e6, hand_steps=10)
    assert used["flops"] == 2 * 100 * (2 + 10 + 5)  # UNet and hand prior by their steps; time rows are kept
    assert used["of_ceiling"] == pytest.approx(used["flops"] / out["total"] / 1e6)


def test_stages_on_a_device_leave_its_loop_as_it_was(tiny_bundle, all_at_once, monkeypatch):
    """On a fake GPU: a time for each graph, and the pictures after it are those of the host."""
    pytest.importorskip("cuda.bindings.runtime")
    from fake_runtime import FakeDeviceEngine, FakeRuntime

    host = HanDiffuser.load(tiny_bundle, device="cpu", threads=1)
    gpu = FakeRuntime(1).install(monkeypatch)
    cuda, engines = Cuda(), load_engines(tiny_bundle, "cpu", 1)[1]

    def load(name, bucket, branches):
        return FakeDeviceEngine(gpu, engines[name], None if name == "unet_time" else bucket)

    loop = DeviceLoop(host.bundle, cuda, connect(cuda, host.manifest, Sized(load, (1, 2))), Streams.make(cuda, True), 2)
    run = measure.new_run(2, 2, "ddim", 3.0)
    found = measure.device_stages(loop, run, launches=2)
    assert set(found) == {*GRAPHS, IMAGE_ENCODER} and min(found.values()) > 0
    requests = measure.make_requests(host, 3, steps=2, guidance=3.0)
    expected = {picture.id: picture.image for picture in host.run(requests)}
    for picture in loop.run(requests, lambda *_: None):
        # A batch's size changes how sums are rounded, which now and then moves a colour by one.
        np.testing.assert_allclose(picture.image.astype(int), expected[picture.id], rtol=0, atol=1)


def test_outliers_are_kept():
    values = [1.0] * 99 + [50.0]
    assert measure.percentiles(values) == {"p50": 1.0, "p90": 1.0, "p99": 1.0, "max": 50.0}


@pytest.mark.slow
def test_the_card_tells_what_it_measured():
    found = card(1, "cpu")
    assert found["cpu"] and found["gpu"] is None and found["packages"]["handiffuser"]
    assert found["ceilings"]["matmul"]["flops"] > 1e8 and found["ceilings"]["copy"]["bytes"] > 1e7


def test_what_others_use_is_counted(monkeypatch):
    times = iter([(0.0, 100.0, 5.0), (10.0, 117.0, 14.0)])  # 17 busy seconds of all cores in 10, 9 of them our own
    monkeypatch.setattr(Others, "_now", staticmethod(lambda: next(times)))
    assert Others().cores() == pytest.approx(0.8)
    monkeypatch.setattr(Others, "_now", staticmethod(lambda: None))
    assert Others().cores() is None


@pytest.mark.skipif(not cpu.has_bf16(), reason="this processor has no bfloat16")
def test_the_ceiling_of_bfloat16():
    pytest.importorskip("openvino")
    assert bf16_ceiling(1)["flops"] > 1e9


def test_a_fresh_process(tmp_path):
    here = bytearray(200_000_000)  # this process's memory is not the other's
    used = measure.fresh([sys.executable, "-c", "x = bytearray(50_000_000); import time; time.sleep(0.2)"])
    assert used["wall"] > 0.2 and used["cpu"] > 0 and 50 < used["peak_mb"] < 150 and here
    with pytest.raises(EngineError, match=r"code 3: last words"):
        measure.fresh([sys.executable, "-c", "import sys; print('last words', file=sys.stderr); sys.exit(3)"])


def test_soak_loses_no_id(pipeline):
    result = soak.soak(pipeline, 7, steps=1)
    assert (result["pictures"], result["unique"], result["lost"]) == (7, 7, 0)
    assert [number for number, _ in result["rss_mb"]] == list(range(1, 8))
    assert result["mb_per_1000"] is None  # seven are too few for a slope


def test_soak_finds_a_picture_that_comes_twice(pipeline, monkeypatch):
    run = pipeline.run

    def stuttering(requests):
        for picture in run(requests):
            yield picture
            yield picture

    monkeypatch.setattr(pipeline, "run", stuttering)
    with pytest.raises(EngineError, match=r"must come once, got .* twice"):
        soak.soak(pipeline, 3, steps=1)


def test_the_slope_of_memory():
    points = [[n, 100 + (50 if n < 3 else 0) + 0.002 * n] for n in range(20)]  # settles first, then grows
    assert soak.slope(points) == pytest.approx(2.0)
    assert soak.slope(points[:2]) is None
