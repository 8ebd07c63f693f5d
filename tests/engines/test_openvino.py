"""OpenVINO beside ONNX Runtime: the same numbers, the same pictures, and what is kept of its compiling."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from handiffuser import HanDiffuser, Request, cpu
from handiffuser.calibration import fidelity
from handiffuser.contract import ROW_HEAD, Manifest
from handiffuser.engines import build as tensorrt
from handiffuser.engines import cli, openvino, verdict
from handiffuser.engines.onnxruntime import OnnxRuntimeEngine
from handiffuser.engines.openvino_rewrites import split_products
from handiffuser.engines.plans import PlanStore, Wanted, user_cache
from handiffuser.engines.verdict import Verdict
from handiffuser.errors import BundleError, EngineError
from handiffuser.export import lower
from handiffuser.runtime import comparing, loading

pytest.importorskip("openvino")
bf16 = pytest.mark.skipif(not cpu.has_bf16(), reason="this processor has no bfloat16")
HERE = openvino.inference()
GRAPHS = ("text_encoder", "hand_prior", "hand_features", "text_hand_encoder", "unet_context", "unet_time", "unet",
          "image_decoder", "image_encoder")  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture()
def folder(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def feeds_of(spec, **sizes) -> dict:
    random = np.random.default_rng(0)
    sizes = {"h": 16, "w": 24, "H": 32, "W": 48, "L": 121, **sizes}
    shapes = {t.name: [sizes[n] if isinstance(n, str) else n for n in t.shape] for t in spec.inputs}
    return {
        t.name: random.integers(0, 30, shapes[t.name], t.dtype)
        if t.dtype in ("int64", "uint8")
        else random.standard_normal(shapes[t.name]).astype(np.float32)
        for t in spec.inputs
    }


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_gives_what_onnx_runtime_gives(tiny_bundle, name):
    spec = Manifest.load(tiny_bundle, verify=False).graphs[name]
    engine = openvino.OpenVinoEngine(tiny_bundle / spec.file, spec, "fp32", threads=1)
    reference = OnnxRuntimeEngine(tiny_bundle / spec.file, spec, threads=1)
    for sizes in ({"B": 2, "G": 2, "S": 3}, {"B": 1, "G": 1, "S": 1, "h": 8, "w": 32, "H": 16, "W": 64, "L": 198}):
        feeds = feeds_of(spec, **sizes)
        exact, got = reference(feeds), engine(feeds)
        assert list(got) == list(exact)
        for key, value in exact.items():
            assert got[key].dtype == value.dtype and got[key].shape == value.shape
            most = max(np.abs(value.astype(float)).max(), 1e-9)
            levels = 1 if value.dtype == np.uint8 else 1e-4 * most
            np.testing.assert_allclose(got[key].astype(float), value.astype(float), rtol=0, atol=levels)


@bf16
def test_latents_and_history_are_float32_in_bfloat16(tiny_bundle):
    spec = Manifest.load(tiny_bundle, verify=False).graphs["unet"]
    engine = openvino.OpenVinoEngine(tiny_bundle / spec.file, spec, "bf16", threads=1)
    feeds = feeds_of(spec, B=1, G=2)
    row, x, h, noise = (feeds[name] for name in ("row", "latents", "history", "noise"))
    head = len(ROW_HEAD)
    row[:, 4] = row[:, head + 1 :: 2] = 0  # b and q_k: the network's output counts for nothing
    a, d = row[:, 3, None, None, None], row[:, 5, None, None, None]
    got = engine(feeds)
    np.testing.assert_allclose(got["latents"], a * x + h[:, 0] + d * noise, rtol=0, atol=1e-6)
    next_h = np.concatenate([h[:, 1:], np.zeros_like(h[:, :1])], 1)
    expected = row[:, head::2, None, None, None] * x[:, None] + next_h
    np.testing.assert_allclose(got["history"], expected, rtol=0, atol=1e-6)
    feeds["row"] = row + 1
    exact = OnnxRuntimeEngine(tiny_bundle / spec.file, spec, threads=1)(feeds)["latents"]
    error = np.abs(engine(feeds)["latents"] - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 5e-2  # it does round the network


def test_a_picture_is_the_same_bits_alone_and_in_any_batch(tiny_bundle):
    ours = Request("a right hand making a fist", seed=7, solver="ddpm", steps=5)
    others = [Request(f"hand {n}", seed=n, steps=3 + n, guidance=float(n)) for n in range(4)]
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    others += [replace(ours, image=image), replace(ours, image=image, mask=image[..., 0], solver="euler")]
    with HanDiffuser.load(tiny_bundle, threads=1, backend="openvino") as pipeline:
        alone = pipeline.generate(ours)[0]
        for company in ([ours, *others], [*others, ours]):
            found = next(picture for picture in pipeline.generate(company) if picture.id == alone.id)
            np.testing.assert_array_equal(found.image, alone.image)
            # Stage 1 is ONNX Runtime's, whose rounding depends on the batch.
            np.testing.assert_allclose(found.hands["params"], alone.hands["params"], atol=1e-4)


@bf16
def test_rows_of_a_larger_batch_are_as_they_are_alone(tiny_bundle):
    """The same bits on the processors tried; no kernel is promised to be chosen alike for all sizes."""
    spec = Manifest.load(tiny_bundle, verify=False).graphs["unet"]
    engine = openvino.OpenVinoEngine(tiny_bundle / spec.file, spec, "bf16", threads=1)
    feeds = feeds_of(spec, B=4, G=2)
    together = engine(feeds)["latents"]
    for row in range(4):
        alone = engine({name: value[row : row + 1] for name, value in feeds.items()})["latents"]
        np.testing.assert_allclose(together[row : row + 1], alone, rtol=0, atol=2e-2 * np.abs(alone).max())


def test_arrays_are_read_again_at_every_call(tiny_bundle):
    """An array that lies where the last one lay is not bound again; what is in it counts all the same."""
    spec = Manifest.load(tiny_bundle, verify=False).graphs["unet_time"]
    engine = openvino.OpenVinoEngine(tiny_bundle / spec.file, spec, "fp32", threads=1)
    steps = np.array([1.0, 500.0], np.float32)
    first, view = engine({"timesteps": steps})["time"], steps[:]
    steps[:] = steps[::-1].copy()
    np.testing.assert_array_equal(engine({"timesteps": view})["time"], first[::-1])
    for _ in range(20):  # arrays that come and go
        np.testing.assert_array_equal(engine({"timesteps": steps[::-1].copy()})["time"], first)
    steps.flags.writeable = False
    np.testing.assert_array_equal(engine({"timesteps": steps})["time"], first[::-1])


def test_what_was_compiled_is_kept_proven_and_made_again_when_damaged(folder, monkeypatch):
    def load() -> np.ndarray:
        with HanDiffuser.load(folder, threads=1, backend="openvino") as pipeline:
            return pipeline.generate("a fist", steps=2)[0].image

    first = load()
    kept = {plan.graph: plan for plan in user_cache() if plan.parts["backend"] == "openvino"}
    assert kept.keys() == {"unet", "image_decoder"} and not (folder / "plans").exists()
    assert kept["unet"].parts["target"] == cpu.target() and kept["unet"].parts["sizes"] == "B=1,G=2,h=16,w=24,L=121"

    read = openvino.shared_core().read_model
    monkeypatch.setattr(openvino.shared_core(), "read_model", lambda path: pytest.fail("compiled although it was kept"))
    np.testing.assert_array_equal(load(), first)
    unet = folder / "unet.onnx"
    whole = unet.read_bytes()
    unet.write_bytes(whole[:-1])
    np.testing.assert_array_equal(load(), first)  # what was compiled is proven by its own hash: the graph is not read

    content = bytearray(kept["unet"].path.read_bytes())
    content[len(content) // 2] ^= 1
    kept["unet"].path.write_bytes(content)
    monkeypatch.setattr(openvino.shared_core(), "read_model", read)
    with warnings.catch_warnings(), pytest.raises(BundleError, match=r"unet.onnx is damaged"):
        warnings.simplefilter("ignore")
        load()
    unet.write_bytes(whole)
    with pytest.warns(RuntimeWarning, match=r"unet.*\.plan is damaged: it is compiled again"):
        np.testing.assert_array_equal(load(), first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load()
    monkeypatch.setattr(openvino, "target", lambda: "another processor")
    assert openvino.shelf_of(folder, Manifest.load(folder), HERE).plan("unet", {"B": 1, "G": 2}) is None


@pytest.mark.slow
def test_auto_takes_it_for_long_runs_where_it_was_measured_to_be_true(folder, monkeypatch):
    def device(pictures: int) -> tuple[str, str]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with HanDiffuser.load(folder, threads=1, pictures=pictures) as pipeline:
                return pipeline.made_by.get("backend", "onnxruntime"), " ".join(str(one.message) for one in said)

    noted = Verdict(psnr=50.0, exact=2.0, fast=1.0, ready=2.5)
    measured = []
    monkeypatch.setattr(comparing, "measure", lambda *_: measured.append(1) or noted)
    assert device(1) == device(loading.MIN_PICTURES_COMPILED[HERE] - 1) == ("onnxruntime", "")
    taken, said = device(loading.MIN_PICTURES_COMPILED[HERE])
    assert taken == "openvino" and "2.00 times as fast" in said and "50 dB" in said and "--backend onnxruntime" in said
    assert noted.pays == 3 and device(2)[0] == "onnxruntime" and device(3)[0] == "openvino"
    assert measured == [1]

    shelf = openvino.shelf_of(folder, Manifest.load(folder), HERE)
    for worse in (Verdict(34.0, 2.0, 1.0, 1.0), Verdict(50.0, 1.0, 1.1, 1.0)):
        verdict.write(shelf, worse)
        assert verdict.read(shelf) == worse and device(1000)[0] == "onnxruntime"


def test_both_are_measured(tiny_bundle):
    _, exact = comparing.load_engines(tiny_bundle, "cpu", 1)
    fast = comparing.load_host_loop(tiny_bundle, "openvino", threads=1)
    engines = {name: timed.engine for name, timed in fast.engines.items()}
    found = comparing.measure(fast.bundle, exact, engines, 1.0)
    assert 20 < found.psnr <= 1000 and found.exact > 0 and found.fast > 0
    assert comparing.measure(fast.bundle, exact, exact, 1.0).psnr == 1000


@pytest.mark.slow
def test_built_beside_a_bundle_for_where_nothing_can_be_compiled(folder, monkeypatch, capsys):
    # Of a model so small the faster one is a matter of chance.
    monkeypatch.setattr(comparing, "measure", lambda *_: Verdict(50.0, 2.0, 1.0, 0.5))
    assert cli.build.main([str(folder), "--backend", "openvino"], standalone_mode=False) == 0
    said = capsys.readouterr().err
    assert f"{HERE} beside float32, 6 pictures" in said or "Nothing" in said
    plans = list(PlanStore(folder))
    assert {plan.graph for plan in plans} == {"unet", "image_decoder"}
    assert cli.list_plans.main([str(folder)], standalone_mode=False) == 0
    assert capsys.readouterr().out.count("current") == 2
    shutil.rmtree(user_cache().folder.parent, ignore_errors=True)
    monkeypatch.setattr(openvino.shared_core(), "read_model", lambda path: pytest.fail("compiled again"))
    with HanDiffuser.load(folder, threads=1, backend="openvino") as pipeline:
        assert pipeline.generate("a fist", steps=1)
    monkeypatch.setattr(openvino, "target", lambda: "another processor")
    assert cli.list_plans.main([str(folder)], standalone_mode=False) == 0
    assert capsys.readouterr().out.count("for another processor") == 2


@pytest.mark.slow
@bf16  # AVX2 alone adds products of 8 bits in 16, which saturates: 33 dB here, and the report refuses it
def test_int8_is_kept_where_it_is_faster_than_bfloat16(tiny_bundle, folder, tmp_path, monkeypatch):
    seen = []

    def gain(faster: float):
        return lambda exact, quantized, count: seen.append(quantized) or Verdict(50.0, faster, 1.0, 0.0)

    monkeypatch.setattr(lower, "beside_bfloat16", gain(0.5))
    with pytest.raises(EngineError, match=rf"int8 takes 1000 ms.*{openvino.WORDS[HERE]} 500 ms.*Nothing was written"):
        lower.quantize(None, folder, "int8", None, 23)
    assert Manifest.load(folder).precision == "fp32" and not seen[0].exists()

    monkeypatch.setattr(lower, "beside_bfloat16", gain(2.0))
    report, kept = lower.quantize(None, folder, "int8", None, 23)
    manifest = Manifest.load(folder)
    assert (manifest.precision, manifest.base) == ("int8", "fp32") and manifest.made_by["beside_bfloat16"] == 2.0
    assert report.passes and report.precision == "int8" and not kept
    assert all(noted["quantized"] == noted["layers"] > 5 for noted in manifest.made_by["quantized"].values())

    pictures = []
    for bundle, backend in ((tiny_bundle, "onnxruntime"), (folder, "openvino")):
        with HanDiffuser.load(bundle, threads=1, backend=backend) as pipeline:
            pictures.append(pipeline.generate("a fist", steps=2)[0])
    exact, eight = pictures
    for name, value in exact.hands.items():  # which float32 computes in both
        np.testing.assert_array_equal(value, eight.hands[name])
    assert 25 < verdict.psnr(exact.image, eight.image) < 70
    with pytest.raises(EngineError, match="in int8 for OpenVINO"):
        next(tensorrt.build("tensorrt-rtx", folder, Wanted()))


def test_int8_of_a_large_model_is_tried_until_one_picture_is_near(folder, monkeypatch):
    """Which is not compared in whole runs, unless asked for."""
    seen, psnr = [], iter((20.0, 30.0, 40.0))

    def gain(exact, quantized, count):
        assert count == 1
        seen.append(Manifest.load(quantized, verify=False).made_by["smooth"])
        return Verdict(next(psnr, 30.0), 2.0, 1.0, 0.0)

    monkeypatch.setattr(lower, "beside_bfloat16", gain)
    report, kept = lower.quantize(None, folder, "int8", None, 23, compare=False)
    assert report is None and kept["unet"] and seen == [smooth for smooth, _ in lower.ATTEMPTS[:3]]
    noted = Manifest.load(folder).made_by
    assert noted["beside_bfloat16"] == 2.0 and noted["quantized"]["unet"]["kept"] == kept["unet"]


@pytest.mark.slow
def test_int8_of_a_large_model_that_never_comes_near_is_refused(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(lower, "beside_bfloat16", lambda *_: seen.append(1) or Verdict(30.0, 2.0, 1.0, 0.0))
    with pytest.raises(
        EngineError, match=rf"at least 35 dB from those in {openvino.WORDS[HERE]}, got 30 dB, in 0.50 of the time"
    ):
        lower.quantize(None, folder, "int8", None, 23, compare=False)
    assert len(seen) == len(lower.ATTEMPTS) and Manifest.load(folder).precision == "fp32"


def test_pictures_in_int8_and_bfloat16_turn_by_turn(tiny_bundle):
    same = fidelity.beside_bfloat16(tiny_bundle, tiny_bundle, 1)
    assert same.psnr == 1000 and same.exact > 0 and same.fast > 0 and same.ready == 0


def test_a_processor_without_bfloat16_computes_in_float32(tiny_bundle, monkeypatch):
    """By measurement: pictures are those of ONNX Runtime, within a level."""
    monkeypatch.setattr(openvino, "cpu_has_bf16", lambda: False)
    pictures = []
    for backend in ("onnxruntime", "openvino"):
        with HanDiffuser.load(tiny_bundle, threads=1, backend=backend) as pipeline:
            pictures.append(pipeline.generate("a fist", steps=2, seed=1)[0])
            assert pipeline.made_by.get("inference", "") == ("fp32" if backend == "openvino" else "")
    exact, ours = (picture.image.astype(int) for picture in pictures)
    assert np.abs(exact - ours).max() <= 1
    openvino.check_build("openvino")


def test_what_is_missing_is_said_in_a_sentence(toy_bundle, tiny_bundle, monkeypatch):
    spec = Manifest.load(tiny_bundle, verify=False).graphs["unet"]
    monkeypatch.setattr(openvino, "has_bf16", lambda: False)
    with pytest.raises(EngineError, match=r"no instructions for bfloat16.*--backend onnxruntime"):
        openvino.OpenVinoEngine(tiny_bundle / spec.file, spec, "bf16")
    with pytest.raises(EngineError, match=r"runs on CPUs only"):
        HanDiffuser.load(toy_bundle, backend="openvino", device="cuda")
    openvino._import.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r'pip install "handiffuser\[openvino\]"'):
        openvino._import()


def test_the_command_end_to_end_without_a_framework(tiny_bundle, tmp_path):
    code = (
        "import sys\nfrom handiffuser.runtime.cli import main\ntry: main()\n"
        "finally: print([n for n in ('torch', 'diffusers', 'onnx', 'openvino_telemetry') if sys.modules.get(n)])"
    )
    command = [sys.executable, "-c", code, str(tiny_bundle), "a fist", "two hands", "-o", str(tmp_path / "out")]
    result = subprocess.run([*command, "--backend", "openvino"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]" and len(list((tmp_path / "out").glob("*.json"))) == 2
    assert f'"inference": "{HERE}"' in next((tmp_path / "out").glob("a-fist*.json")).read_text()


def test_only_the_graphs_that_adapters_change_are_compiled(folder):
    """An adapter of the UNet alone leaves the decoder as it is, which would be compiled to be thrown away."""
    manifest = Manifest.load(folder)
    assert openvino.host_engines(folder, manifest, 1, 1, 1, only=("unet_context",)) == {}
    assert openvino.host_engines(folder, manifest, 1, 1, 1, only=("image_decoder", "unet_time")).keys() == {
        "image_decoder"
    }
    assert {plan.graph for plan in user_cache()} == {"image_decoder"}


def test_products_that_are_split_behind_are_split_before():
    """The same numbers, with and without a bias; a product that something else reads stays whole."""
    from openvino import Model
    from openvino import opset13 as ov

    random = np.random.default_rng(0)
    numbers = {
        shape: random.standard_normal(shape).astype(np.float32) for shape in ((1, 5, 8), (8, 12), (12, 8), (12,))
    }

    def made() -> Model:
        x = ov.parameter([1, 5, 8], np.float32, name="x")
        halves = ov.split(ov.add(ov.matmul(x, numbers[8, 12], False, False), numbers[12,]), 2, 2)
        thirds = ov.variadic_split(ov.matmul(x, numbers[12, 8], False, True), -1, [4, 5, 3])
        shared = ov.matmul(x, numbers[12, 8], False, True)
        whole = ov.split(shared, 2, 2)
        return Model([*halves.outputs(), *thirds.outputs(), *whole.outputs(), shared.output(0)], [x])

    plain, split = made(), made()
    assert split_products(split) == 2
    assert sum(op.get_type_name() == "MatMul" for op in split.get_ops()) == 2 + 3 + 1
    assert sum("Split" in op.get_type_name() for op in split.get_ops()) == 1
    results = []
    for model in (plain, split):
        compiled = openvino.shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        results.append([value.copy() for value in compiled([numbers[1, 5, 8]]).values()])
    for before, after in zip(*results, strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("seconds", "turns", "ratio"), [((2.0, 1.0), 5, 0.5), ((1.0, 1.5), 5, 1.5)])
def test_turns_that_agree_end_the_measurement(tiny_bundle, monkeypatch, seconds, turns, ratio):
    _, engines = comparing.load_engines(tiny_bundle, "cpu", 1)
    bundle, calls, timed = comparing.Bundle.load(tiny_bundle), [], comparing.timed

    def noted(loop, request):
        calls.append(request)
        return timed(loop, request)[0], seconds[len(calls) % 2 - 1]

    monkeypatch.setattr(comparing, "timed", noted)
    monkeypatch.setattr(comparing, "TURNS_SECONDS", 1e9)
    found = comparing.measure(bundle, engines, engines, 1.0)
    assert len(calls) == 2 * (1 + turns), "one turn to warm up"
    assert (found.exact, found.fast) == (seconds[0], pytest.approx(ratio * seconds[0]))
    calls.clear()
    uneven = lambda loop, request: (noted(loop, request)[0], 1.0 + len(calls) % 3)  # noqa: E731
    monkeypatch.setattr(comparing, "timed", uneven)
    comparing.measure(bundle, engines, engines, 1.0)
    assert len(calls) == 2 * (1 + comparing.TURNS)
