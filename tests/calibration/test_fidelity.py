"""The fidelity report: exact where nothing differs, a pass for sound half precision, a sentence for what is wrong."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from handiffuser.calibration.fidelity import GraphError, PictureError, Report, fidelity, psnr
from handiffuser.calibration.graphs import rewrite_bundle
from handiffuser.calibration.mixed import keep_sensitive
from handiffuser.calibration.record import Recorder, load_inputs, record, save_inputs
from handiffuser.contract import GRAPHS, IMAGE_ENCODER, WEIGHTS, GraphSpec, Manifest
from handiffuser.errors import BundleError, EngineError, HanDiffuserError, RequestError
from handiffuser.shipped import bundle_path
from handiffuser.weights import WeightMap

PROMPTS = ["a left hand", "two open hands"]


def test_identical_bundles_are_exact(tiny_bundle):
    report = fidelity(tiny_bundle, tiny_bundle, PROMPTS)
    assert report.passes and report.sentences() == []
    assert report.psnr_mean == report.psnr_min == math.inf and report.joints_max == 0
    assert set(report.graphs) == {*GRAPHS, IMAGE_ENCODER}
    assert all(error.rms == error.max == error.not_finite == 0 for error in report.graphs.values())
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert value["psnr_mean"] == "inf" and value["passes"] is True and value["graphs"]["unet"]["rms"] == 0


def test_sound_half_precision_passes_and_is_not_exact(tiny_bundle, tiny_half):
    def judge(images: np.ndarray) -> np.ndarray:
        return np.stack([images.mean((1, 2, 3)) > 0, images[:, 0, 0, 0] > 300], 1)

    report = fidelity(tiny_bundle, tiny_half, PROMPTS, seeds=(1, 2), judge=judge)
    assert report.passes, report.sentences()
    assert report.precision == "fp16" and report.emulated and report.device == "cpu"
    assert 45 < report.psnr_min <= report.psnr_mean < math.inf
    assert [(p.prompt, p.seed) for p in report.pictures] == [(prompt, seed) for prompt in PROMPTS for seed in (1, 2)]
    assert report.agreement == [1.0, 1.0]
    for name, error in report.graphs.items():
        low = 0 if name == "hand_features" else 1e-5
        assert low <= error.rms < 4e-3, (name, error)
    # On the CPU's own terms it is closer: ONNX Runtime rounds less there than a GPU does.
    plain = fidelity(tiny_bundle, tiny_half, PROMPTS, seeds=(1, 2), emulated=False)
    assert plain.passes and not plain.emulated and plain.graphs["unet"].rms < report.graphs["unet"].rms


def test_a_damaged_candidate_fails_with_sentences(tiny_bundle, tiny_half, change_weights, tmp_path):
    rng = np.random.default_rng(0)

    def damage(name: str, weight: np.ndarray) -> np.ndarray:
        large = name.startswith("unet.") and weight.dtype == np.float16 and weight.ndim > 1
        return weight * rng.normal(1, 0.5, weight.shape) if large else weight

    rewrite_bundle(tiny_half, tmp_path / "damaged", change_weights(damage))
    report = fidelity(tiny_bundle, tmp_path / "damaged", PROMPTS)
    assert not report.passes
    (graph, pictures) = report.sentences()
    assert graph.startswith("unet is ") and "in latents" in graph and "fp16 may be 0.01" in graph
    assert "dB" in pictures and report.psnr_mean < 35
    assert json.loads(json.dumps(report.to_json()))["sentences"] == [graph, pictures]


def test_an_overflow_is_found_and_mended(overflowing, tmp_path):
    """Also on a machine without a GPU, where ONNX Runtime itself would not overflow."""
    reference, half = overflowing
    report = fidelity(reference, half, PROMPTS)
    sentences = report.sentences()
    assert sentences[0].startswith("image_decoder gives NaN or infinity")
    assert sentences[1].startswith("2 of 2 requests failed") and "image_decoder gave NaN" in sentences[1]
    assert report.psnr_min == 0 and report.graphs["image_decoder"].not_finite == len(PROMPTS)
    json.dumps(report.to_json(), allow_nan=False)

    inputs, _ = record(reference, PROMPTS)
    found = keep_sensitive(reference, half, tmp_path / "mixed", inputs)
    assert list(found) == ["image_decoder"]
    report = fidelity(reference, tmp_path / "mixed", PROMPTS)
    assert report.passes and report.psnr_min > 40, report.sentences()


def test_bundles_of_two_checkpoints_are_refused(tiny_bundle, tmp_path):
    manifest = rewrite_bundle(tiny_bundle, tmp_path / "other", lambda _, model: model)
    manifest.params_mean = [1.0, *manifest.params_mean[1:]]
    manifest.save(tmp_path / "other")
    with pytest.raises(BundleError, match="differ in params_mean"):
        fidelity(tiny_bundle, tmp_path / "other")
    with pytest.raises(BundleError, match="must not exist"):
        rewrite_bundle(tiny_bundle, tmp_path / "other", lambda _, model: model)


def test_a_rewritten_bundle_has_no_map_of_the_old_weights(tmp_path):
    manifest = rewrite_bundle(bundle_path(), tmp_path / "other", lambda _, model: model)
    assert WEIGHTS in Manifest.load(bundle_path(), verify=False).files and WEIGHTS not in manifest.files
    with pytest.raises(BundleError, match=r"lacks weights\.json"):
        WeightMap.load(tmp_path / "other")


def test_a_reference_that_fails_is_no_reference(tiny_bundle, change_weights, tmp_path):
    spoil = change_weights(lambda name, weight: weight * np.nan if name.endswith("conv_out.weight") else weight)
    rewrite_bundle(tiny_bundle, tmp_path / "nan", spoil)
    with pytest.raises(EngineError, match="itself fails"):
        fidelity(tmp_path / "nan", tiny_bundle, PROMPTS)


def test_an_equal_picture_does_not_make_up_for_a_bad_one():
    pictures = [PictureError("a", 0, math.inf, 0.0), PictureError("b", 0, 20.0, 3.0)]
    report = Report("fp16", "cuda", False, 1e-2, {"unet": GraphError(1e-3, 1e-3, "latents")}, pictures)
    assert report.psnr_mean == report.psnr_min == 20 and report.joints_max == 3 and not report.passes


def test_psnr():
    black, grey = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 51, np.uint8)
    assert psnr(black, black) == math.inf and psnr(black, grey) == pytest.approx(20 * math.log10(5))


class Echo:
    """An engine that gives back what it is given, in the same buffer."""

    def __init__(self) -> None:
        self.spec, self.device, self.batches = GraphSpec("echo.onnx", [], []), "cpu", None

    def prepare(self, sizes):
        pass

    def __call__(self, feeds):
        return feeds


@pytest.mark.parametrize("count", [1, 5, 8, 9, 16, 17, 100, 1000])
def test_a_recording_is_bounded_and_spread_over_the_run(count):
    recorder, buffer = Recorder(Echo(), calls=8, rows=2), np.zeros((6, 1), np.float32)
    for number in range(count):
        buffer[:] = 10 * number + np.arange(6)[:, None]  # as the sampler does, which overwrites what it gave
        recorder({"x": buffer})
    kept = [feeds["x"] for feeds in recorder.inputs()]
    assert len(kept) == min(8, count) and all(x.shape == (2, 1) for x in kept)
    calls = [int(x[0, 0]) // 10 for x in kept]
    assert calls[0] == 0 and calls[-1] == count - 1
    assert max(np.diff(calls), default=1) <= max(1, count / 4)
    if count == 100:
        assert len({int(v) % 10 for x in kept for v in x[:, 0]}) > 2, "not the same rows of the batch each time"


def test_a_recording_of_a_run(tiny_bundle, tmp_path):
    inputs, pictures = record(tiny_bundle, PROMPTS, seeds=(3,), steps=20, calls=4, rows=1)
    assert set(inputs) == {*GRAPHS, IMAGE_ENCODER} and [picture.request.seed for picture in pictures] == [3, 3]
    specs = Manifest.load(tiny_bundle).graphs
    for name, calls in inputs.items():
        assert 1 <= len(calls) <= 4, name
        for feeds in calls:
            assert {(key, value.dtype.name) for key, value in feeds.items()} == {
                (spec.name, spec.dtype) for spec in specs[name].inputs
            }
            assert all(len(value) == 1 for value in feeds.values())
    timesteps = [float(feeds["row"][0, 0]) for feeds in inputs["unet"]]
    assert len(timesteps) == 4 and timesteps[0] > 900 and timesteps[-1] < 100, "early, middle and late steps"

    save_inputs(tmp_path / "inputs.npz", inputs)
    loaded = load_inputs(tmp_path / "inputs.npz")
    for name, calls in inputs.items():
        for ours, theirs in zip(calls, loaded[name], strict=True):
            assert ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)
    (tmp_path / "inputs.npz").write_bytes(b"PK nonsense")
    with pytest.raises(HanDiffuserError, match="must be a file of save_inputs"):
        load_inputs(tmp_path / "inputs.npz")


@pytest.mark.parametrize(
    ("prompts", "settings", "says"),
    [
        ([], {}, "nothing to run"),
        ([" "], {}, "empty"),
        (["a hand"], {"speed": 3}, "speed"),
        (["a"], {"steps": 0}, "steps"),
    ],
)
def test_requests_that_cannot_run_are_refused(prompts, settings, says, tiny_bundle):
    with pytest.raises(RequestError, match=says):
        record(tiny_bundle, prompts, **settings)
