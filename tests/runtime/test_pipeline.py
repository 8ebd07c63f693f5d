"""The loop: every request comes out once, alone or in company, with its own noise, settings and hands."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from handiffuser import (
    BundleError,
    CheckpointError,
    EngineError,
    Failure,
    HanDiffuser,
    Picture,
    Request,
    RequestError,
    shipped,
)
from handiffuser.hands import save_hands
from handiffuser.runtime.steptimes import StepTimes


@pytest.fixture
def pipeline(toy_bundle) -> HanDiffuser:
    return HanDiffuser.load(toy_bundle, device="cpu", threads=1, batch_size=4)


def test_generate(pipeline):
    pictures = pipeline.generate(["a fist", "two hands"], seed=7, steps=3)
    assert [p.request.prompt for p in pictures] == ["a fist", "two hands"]
    for one in pictures:
        assert one.image.shape == (32, 32, 3) and one.image.dtype == np.uint8 and one.image.flags.owndata
        assert one.request.seed == 7 and one.request.steps == 3 and one.warnings == []
        shapes = {name: value.shape for name, value in one.hands.items()}
        assert shapes == {
            "params": (330,),
            "global_orient": (3,),
            "body_pose": (63,),
            "left_hand_pose": (45,),
            "right_hand_pose": (45,),
            "betas": (10,),
            "placement": (2, 4),
            "joints": (62, 3),
            "joints_2d": (2, 21, 2),
            "vertices": (5, 3),
            "visibility": (2,),
            "camera": (3,),
        }
    assert (pictures[0].image != pictures[1].image).any()


def test_one_prompt_many_pictures(pipeline):
    pictures = pipeline.generate("a fist", images_per_prompt=6)
    assert [p.request.seed for p in pictures] == list(range(6))
    assert len({p.image.tobytes() for p in pictures}) == 6


def test_a_request_is_the_same_in_any_company(pipeline, toy_bundle):
    solvers = ["ddim", "ddpm", "euler", "dpm++2m", "dpm++2m-karras", "plms", "lcm", "ddim-early"]
    requests = [
        Request(f"prompt {n}", seed=n, steps=2 + n % 5, solver=solvers[n % 8], guidance=n / 2, negative_prompt="b" * n)
        for n in range(13)
    ]
    together = pipeline.generate(requests)
    alone = HanDiffuser.load(toy_bundle, device="cpu", threads=1, batch_size=1)
    for request, one in zip(requests, together, strict=True):
        (same,) = alone.generate(request)
        assert same.id == one.id
        np.testing.assert_allclose(same.hands["params"], one.hands["params"], atol=1e-5)
        assert np.abs(same.image.astype(int) - one.image).max() <= 1
    backwards = pipeline.generate(requests[::-1])[::-1]
    for one, other in zip(together, backwards, strict=True):
        assert np.abs(one.image.astype(int) - other.image).max() <= 1


def test_every_setting_matters(pipeline):
    base = {"prompt": "a fist", "steps": 3}
    changes = [{}, {"seed": 1}, {"steps": 4}, {"solver": "ddpm"}, {"guidance": 5.0}, {"negative_prompt": "blur"}]
    changes += [{"hand_steps": 1, "hand_solver": "ddpm"}, {"hand_guidance": 3.0}, {"prompt": "a palm"}]
    pictures = pipeline.generate([Request(**{**base, **change}) for change in changes])
    assert len({p.image.tobytes() for p in pictures}) == len(changes)


def test_hands_can_be_given(pipeline, tmp_path):
    (first,) = pipeline.generate("a fist", seed=1)
    path = tmp_path / "a.hands.npz"
    save_hands(path, {name: value for name, value in first.hands.items() if name != "camera"})
    for key in pipeline.timings:
        pipeline.timings[key] = 0.0
    (again,) = pipeline.generate("two hands", seed=1, hands=str(path))
    assert pipeline.timings["hand_prior"] == 0 and pipeline.timings["text_encoder"] == 0
    # The toy features read the raw parameters, which the file keeps only as rotations.
    np.testing.assert_allclose(again.hands["left_hand_pose"], first.hands["left_hand_pose"], atol=1e-5)
    np.testing.assert_allclose(again.hands["placement"], first.hands["placement"], atol=1e-6)


def test_long_prompts_are_cut_and_said_so(pipeline):
    (one,) = pipeline.generate("x" * 75 + "tail " * 2000)
    assert len(one.warnings) == 1 and "75 tokens" in one.warnings[0] and "tail" in one.warnings[0]
    assert len(one.warnings[0]) < 400


@pytest.mark.parametrize("prompt", ["✌️👍🏽", "一只拳头", "<|endoftext|>", "a\nb\0c"])
def test_any_text_makes_a_picture(pipeline, prompt):
    assert len(pipeline.generate(prompt)) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "1 to 1000"),
        ({"steps": 10_000}, "1 to 1000"),
        ({"solver": "x"}, "ddim"),
        ({"images_per_prompt": 0}, "images_per_prompt must be at least 1, got 0"),
        ({"stepz": 3}, "'stepz' is unknown. The settings are"),
        ({"height": 512}, "Say the size of pictures as size: WIDTHxHEIGHT"),
        ({"num_inference_steps": 4}, "It is steps here."),
        ({"num_images_per_prompt": 4}, "It is images_per_prompt here."),
        ({"hands": "missing.npz"}, "does not exist"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings(pipeline, settings, words):
    with pytest.raises(RequestError, match=words):
        pipeline.generate("a fist", **settings)


def test_bad_batch_size(toy_bundle):
    with pytest.raises(RequestError, match="batch_size must be at least 1, got 0"):
        HanDiffuser.load(toy_bundle, device="cpu", batch_size=0)


def test_what_a_bundle_cannot_run_is_refused_before_anything_runs(pipeline):
    requests = [Request("a"), Request("b", hand_solver="plms"), Request("c", steps=900, solver="dpm++2m")]
    resolved, refused = pipeline.prepare(requests)
    assert [r.prompt for r in resolved][:1] == ["a"]
    assert 2 in [line for line, _ in refused]


def spoil(pipeline: HanDiffuser, graph: str, output: str, when) -> None:
    """Makes a graph return NaN in the rows where when(feeds) is true."""
    engine = pipeline.loop.engines[graph]
    inner = engine.engine

    def broken(feeds):
        outputs = inner(feeds)
        value = outputs[output].copy()
        value[when(feeds)] = np.nan
        return {**outputs, output: value}

    broken.spec = inner.spec
    engine.engine = broken


@pytest.mark.parametrize(
    ("graph", "output", "words"),
    [
        ("unet", "latents", "unet, step 0"),
        ("hand_prior", "x", "hand_prior, step 0"),
        ("hand_features", "bps", "hand_features"),
    ],
)
def test_nan_fails_one_and_the_rest_goes_on(pipeline, graph, output, words):
    spoilt = pipeline.prepare([Request(f"p{n}", seed=n) for n in range(6)])[0]
    state = {"unet": "latents", "hand_prior": "x", "hand_features": "x"}[graph]
    marks: list[float] = []

    def when(feeds):
        values = feeds[state].reshape(len(feeds[state]), -1)[:, 0]
        if not marks:
            marks.append(float(values[0]))
        return values == marks[0]

    spoil(pipeline, graph, output, when)
    results = list(pipeline.run(spoilt))
    failures = [r for r in results if isinstance(r, Failure)]
    assert len(results) == 6 and [r.request.prompt for r in failures] == ["p0"]
    assert failures[0].sentence.startswith(f"{words} gave NaN") and failures[0].id == spoilt[0].id
    with pytest.raises(EngineError, match="NaN"):
        spoil(pipeline, "hand_features", "bps", lambda feeds: slice(None))
        pipeline.generate("all are spoilt")


def test_slots_are_refilled_at_once(pipeline, monkeypatch):
    monkeypatch.setattr(StepTimes, "choose", lambda times, active, alone: active)  # as where large batches pay
    requests, _ = pipeline.prepare([Request("long", steps=20), *(Request(f"p{n}", steps=2) for n in range(9))])
    active: list[int] = []
    results = list(pipeline.run(requests, lambda kind, count: active.append(count) if kind == "steps" else None))
    assert all(isinstance(r, Picture) for r in results) and results[-1].request.prompt == "long"
    # Three short requests at a time beside the long one, until there are no more.
    assert active[:6] == [4] * 6 and sum(active) == 20 + 9 * 2


def test_first_come_first_served_where_large_batches_do_not_pay(pipeline, monkeypatch):
    requests, _ = pipeline.prepare([Request("long", steps=20), *(Request(f"p{n}", steps=2) for n in range(5))])
    monkeypatch.setattr(StepTimes, "choose", lambda times, active, alone: 1)
    counts: list[int] = []
    results = list(pipeline.run(requests, lambda kind, count: counts.append(count) if kind == "steps" else None))
    assert [r.request.prompt for r in results] == ["long", "p0", "p1", "p2", "p3", "p4"]
    assert counts == [1] * 30


def test_unet_time_runs_once_a_schedule(pipeline):
    calls = []
    inner = pipeline.loop.engines["unet_time"].engine

    def counted(feeds):
        calls.append(feeds)
        return inner(feeds)

    counted.spec = inner.spec
    pipeline.loop.engines["unet_time"].engine = counted
    pipeline.generate(["a", "b", "c", "d", "e", "f"], steps=4)
    pipeline.generate("g", steps=4, guidance=1.0)
    assert len(calls) == 1
    pipeline.generate("g", steps=5)
    assert len(calls) == 2


def test_nothing_to_do(pipeline):
    assert pipeline.generate([]) == [] and list(pipeline.run([])) == []


def test_non_square_pictures(wide_bundle):
    pipeline = HanDiffuser.load(wide_bundle, device="cpu", threads=1)
    assert pipeline.generate("a fist")[0].image.shape == (16, 48, 3)


def test_little_time_is_spent_outside_the_engines(toy_bundle):
    pipeline = HanDiffuser.load(toy_bundle, device="cpu", threads=1)
    inner = pipeline.loop.engines["unet"].engine

    def at_demo_size(feeds):
        time.sleep(0.03)  # what a step of the demo's UNet takes at the very least
        return inner(feeds)

    pipeline.loop.engines["unet"].engine = at_demo_size
    shares = []
    for seed in range(4):  # the machine may be busy: the best of a few counts
        for name in pipeline.timings:
            pipeline.timings[name] = 0.0
        pipeline.generate(["a fist", "two hands"], steps=12, seed=seed)
        total = pipeline.timings["total"]
        shares.append(1 - sum(seconds for name, seconds in pipeline.timings.items() if name != "total") / total)
    assert min(shares) < 0.05


def test_the_word_demo(toy_bundle, tmp_path, monkeypatch):
    for meant in ("./demo", Path("demo")):
        assert shipped.resolve(meant, "bundle") == Path("demo")
    monkeypatch.setattr(shipped, "_folder", lambda name: toy_bundle.parent / name)
    assert shipped.resolve("demo", "bundle") == toy_bundle
    assert HanDiffuser.load("demo", device="cpu").digest
    with pytest.raises(CheckpointError, match="no demo checkpoint"):
        shipped.resolve("demo", "checkpoint")
    monkeypatch.setattr(shipped, "_folder", lambda name: tmp_path / name)
    with pytest.raises(BundleError, match="no demo bundle"):
        HanDiffuser.load("demo")


def test_the_package_itself_is_light():
    code = "import sys, handiffuser\nprint(handiffuser.__version__, 'numpy' in sys.modules, 'click' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split()[1:] == ["False", "False"]


def test_no_framework_is_imported(toy_bundle):
    code = (
        "import sys\nfrom handiffuser import HanDiffuser\n"
        f"HanDiffuser.load({str(toy_bundle)!r}, device='cpu').generate('a fist')\n"
        "import handiffuser.runtime.cli\n"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'onnx', 'smplx') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_requests_may_come_in_while_others_run(pipeline):
    """None: nothing has come in yet. Requests in flight go on, and each picture is the one it is alone."""
    requests, _ = pipeline.prepare([Request(f"hand {i}", seed=i, steps=2 + i) for i in range(5)])
    done, log = {}, []

    def source():
        for request in requests:
            for _ in range(3):  # three steps later
                log.append(len(done))
                yield None
            yield request

    for picture in pipeline.run(source()):
        done[picture.id] = picture.image
    assert list(done) == [request.id for request in requests]
    assert log[-1] >= 2  # the first ones were done before the last one came
    for request in requests:
        alone = next(pipeline.run([request])).image.astype(int)
        assert np.abs(done[request.id] - alone).max() <= 1  # rounding in a batch depends on its size
    assert list(pipeline.run([])) == list(pipeline.run(iter([]))) == []


def test_what_is_remembered_of_schedules_is_bounded(toy_bundle):
    from handiffuser.runtime.bundle import TABLES

    pipeline = HanDiffuser.load(toy_bundle, device="cpu", threads=1)
    for i in range(TABLES + 20):
        pipeline.bundle.table("latents", Request("a", solver="ddim", steps=2, guidance=1.0 + i / 100))
    assert len(pipeline.bundle._tables) == TABLES
    newest = pipeline.bundle.table("latents", Request("a", solver="ddim", steps=2, guidance=1.0 + (TABLES + 19) / 100))
    assert newest.rows[0, 2] == np.float32(1.0 + (TABLES + 19) / 100)


@pytest.mark.parametrize("rows", [1, 4])
def test_who_is_cancelled_leaves_at_the_next_step_and_the_others_stay_the_same_bits(pipeline, monkeypatch, rows):
    """rows: how many a step advances. In equal company a request sees equal numbers, also after others left."""
    monkeypatch.setattr(StepTimes, "choose", lambda times, active, unguided=(): min(rows, active))
    requests, _ = pipeline.prepare([Request(f"prompt {n}", seed=n, steps=4 + n % 3) for n in range(8)])
    alone = {request.id: next(pipeline.run([request])) for request in requests}
    for gone in range(8):
        steps = 0

        def on_event(kind, count, gone=gone):
            nonlocal steps
            steps += kind == "steps"
            if kind == "steps" and steps == 2 + gone:
                pipeline.cancel(requests[gone].id)
                pipeline.cancel("unknown")

        results = {result.id: result for result in pipeline.run(requests, on_event)}
        assert set(results) == set(alone)
        left = [result for result in results.values() if isinstance(result, Failure)]
        assert all(f.id == requests[gone].id and f.sentence == "It was cancelled." for f in left)
        for name, result in results.items():
            if isinstance(result, Picture):
                if rows == 1:
                    assert (result.image == alone[name].image).all()
                assert np.abs(result.image.astype(int) - alone[name].image).max() <= 1


def test_peek_shows_what_is_in_flight(pipeline):
    requests, _ = pipeline.prepare([Request(f"prompt {n}", seed=n, steps=5) for n in range(6)])
    seen = {request.id: [] for request in requests}

    def on_event(kind, count):
        for name, peeks in seen.items():
            if peek := pipeline.peek(name):
                peeks.append(peek)

    for picture in pipeline.run(requests, on_event):
        last = seen[picture.id][-1]
        assert last.step == 4 and last.steps == 5 and last.latents.shape == (4, 8, 8)
        for name, value in picture.hands.items():
            assert (last.hands[name] == value).all()
        assert pipeline.peek(picture.id) is None
    assert all([peek.step for peek in peeks] == sorted(peek.step for peek in peeks) for peeks in seen.values())


def test_hands_alone(pipeline, tmp_path):
    requests, _ = pipeline.prepare([Request(f"prompt {n}", seed=n) for n in range(3)])
    pictures = {picture.id: picture for picture in pipeline.run(requests)}
    for request, hands in zip(requests, pipeline.hands(requests), strict=True):
        for name, value in pictures[request.id].hands.items():
            np.testing.assert_allclose(hands[name], value, atol=1e-6)
    save_hands(tmp_path / "a.hands.npz", hands)
    given, _ = pipeline.prepare([Request("other", hands=str(tmp_path / "a.hands.npz"))])
    (again,) = pipeline.hands(given)
    np.testing.assert_allclose(again["right_hand_pose"], hands["right_hand_pose"], atol=1e-5)
    (tmp_path / "a.hands.npz").unlink()
    (gone,) = pipeline.hands(given)
    assert isinstance(gone, Failure) and "does not exist" in gone.sentence
    assert pipeline.hands([]) == []
    with pytest.raises(RequestError, match="requests must be at most 4"):
        pipeline.hands(requests * 2)
