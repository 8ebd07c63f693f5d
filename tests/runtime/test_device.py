"""The loop on a device gives what the loop on the host gives, in whatever order the device runs what it may run."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import ml_dtypes  # noqa: F401  makes bfloat16 a dtype of numpy's, for the fake GPU alone
import numpy as np
import pytest

pytest.importorskip("cuda.bindings.runtime")

from fake_runtime import FakeDeviceEngine, FakeRuntime
from handiffuser import HanDiffuser, Request
from handiffuser.calibration.emulate import emulate_bundle
from handiffuser.contract import Manifest
from handiffuser.engines import load_engines
from handiffuser.engines.base import DeviceEngines, Sized
from handiffuser.engines.cuda import Cuda, Stream
from handiffuser.errors import EngineError
from handiffuser.runtime import device_words
from handiffuser.runtime.bundle import Bundle
from handiffuser.runtime.device import DeviceLoop
from handiffuser.runtime.device_graphs import Streams, connect
from handiffuser.runtime.device_sampler import AHEAD
from handiffuser.runtime.results import Failure
from handiffuser.runtime.steptimes import StepTimes
from whole import mixed

BUCKETS = (1, 2, 4)
MEASURED = StepTimes.choose
pytestmark = pytest.mark.usefixtures("all_at_once")


@pytest.fixture
def gpus(monkeypatch):
    """gpus(seed) is a fake GPU that `Cuda()` finds from then on, and at which nothing may go wrong."""
    made = []

    def make(seed=0):
        made.append(FakeRuntime(seed).install(monkeypatch))
        return made[-1]

    yield make
    assert not [problem for gpu in made for problem in gpu.problems]


@pytest.fixture
def device_loop(gpus, monkeypatch):
    """Makes a loop on a fake GPU over the bundle's graphs in ONNX Runtime; spoil: graph -> function(inputs, results).

    unet: batch size -> seconds that a step of the UNet takes by the fake GPU's clock.
    """

    def make(
        folder, seed=0, slots=4, overlap=True, refuse_capture=False, spoil=None, capture=True, single=None, unet=None
    ):
        pipeline = HanDiffuser.load(folder, device="cpu")
        gpu = gpus(seed)
        if refuse_capture:
            monkeypatch.setattr(Stream, "capture", lambda stream, function: None)
        _, engines = load_engines(folder, "cpu", 1, verify=False)
        made = {}

        def load(name, bucket, branches):
            made[name, bucket, branches] = FakeDeviceEngine(
                gpu,
                engines[name],
                None if name == "unet_time" else bucket,
                (spoil or {}).get(name),
                unet[bucket] if unet and name == "unet" else 1e-6,
            )
            return made[name, bucket, branches]

        cuda, manifest = Cuda(), Manifest.load(folder)
        sized = Sized(load, BUCKETS, single or {})
        graphs = connect(cuda, manifest, sized, capture)
        found = DeviceEngines(lambda size: sized)
        loop = DeviceLoop(pipeline.bundle, cuda, graphs, Streams.make(cuda, overlap), slots, found)
        loop.pipeline, loop.made, loop.gpu = pipeline, made, gpu
        return loop

    return make


def prepared(loop, requests, seed=0):
    resolved, refused = loop.pipeline.prepare(requests, seed)
    assert not refused
    return resolved


def run(loop, requests):
    events = []
    results = {r.id: r for r in loop.run(requests, lambda kind, count: events.append((kind, count)))}
    return results, events


def same(ours, theirs, levels=0):
    """levels: of 255 that a pixel may differ by, where batches were of other sizes."""
    assert ours.keys() == theirs.keys()
    for key, picture in theirs.items():
        np.testing.assert_allclose(ours[key].image.astype(int), picture.image.astype(int), rtol=0, atol=levels)
        assert ours[key].hands.keys() == picture.hands.keys()
        for name, value in picture.hands.items():
            np.testing.assert_allclose(
                ours[key].hands[name], value, rtol=1e-6, atol=2e-5 if levels else 1e-6, err_msg=name
            )


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_host_in_any_order(device_loop, toy_bundle, seed, overlap):
    loop = device_loop(toy_bundle, seed, overlap=overlap)
    requests = prepared(loop, mixed(11, seed))
    on_host = {picture.id: picture for picture in loop.pipeline.run(requests)}
    on_device, events = run(loop, requests)
    same(on_device, on_host)
    assert sum(count for kind, count in events if kind == "steps") == sum(
        len(loop.bundle.table("latents", request).rows)
        for request in requests  # PLMS takes one more than asked
    )
    assert sum(count for kind, count in events if kind == "hands") == 11


def test_hands_are_drawn_again_as_on_the_host(device_loop, toy_bundle, monkeypatch, tmp_path):
    """Beside requests that never do, and beside given hands, which have rows of their own."""
    monkeypatch.setattr("handiffuser.runtime.bundle.clash", lambda joints, seen, params: bool(params[0] > -0.41))
    loop = device_loop(toy_bundle, 1)
    requests = [replace(request, hand_redraws=i % 4) for i, request in enumerate(mixed(13))]
    requests = prepared(loop, [Request("none", hands="none", hand_redraws=2), *requests])
    on_host = {picture.id: picture for picture in loop.pipeline.run(requests)}
    on_device, _ = run(loop, requests)
    same(on_device, on_host, levels=1)
    draws = [on_host[request.id].hand_draws for request in requests]
    assert {0, 1, 2} < set(draws) and draws == [on_device[request.id].hand_draws for request in requests]
    for ours, theirs in zip(loop.hands(requests[:4]), loop.pipeline.hands(requests[:4]), strict=True):
        np.testing.assert_allclose(ours["params"], theirs["params"], rtol=1e-5, atol=1e-5)


def with_pictures(count, seed=0):
    """Requests with a picture, a soft mask, both with a strength, and neither."""
    random = np.random.default_rng(seed)
    kinds = []
    for i in range(3):
        image = random.integers(0, 256, (32, 32, 3), np.uint8)
        mask = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))
        kinds += [{}, {"image": image}, {"image": image, "mask": mask}]
        kinds += [{"image": image, "mask": mask, "strength": 0.5 + 0.1 * i}]
    return [replace(request, **kinds[i % len(kinds)]) for i, request in enumerate(mixed(count, seed))]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("seed", "bundle"), [*((seed, "toy_bundle") for seed in range(4)), (1, "toy_inpainter")])
def test_pictures_that_requests_bring(device_loop, request, seed, bundle, overlap):
    """In the same batches as all others; a second run finds the buffers of the first."""
    loop = device_loop(request.getfixturevalue(bundle), seed, overlap=overlap)
    requests = prepared(loop, with_pictures(13, seed))
    on_host = {picture.id: picture for picture in loop.pipeline.run(requests)}
    for _ in range(3):
        same(run(loop, requests)[0], on_host, levels=1)
    # In the slots, ready for them, and on their way out.
    assert 0 < len(loop.own.pictures.free) <= 4 + 4 + 3 * 4 and not loop.own.pictures.lent


SIZES = (None, "40x24", "24x40", "64x32", "40x24", None, "16x16")


def of_all_sizes(count, seed=0):
    """Some of them bring a picture."""
    requests = [replace(request, size=SIZES[i % len(SIZES)]) for i, request in enumerate(mixed(count, seed))]
    image = np.full((24, 40, 3), 90, np.uint8)
    return [replace(r, image=image, strength=0.5) if i % 4 == 1 else r for i, r in enumerate(requests)]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_alone_or_in_company_across_sizes(device_loop, sized_bundle, seed, overlap):
    """A batch of each size, and its steps captured for itself; given hands are where their file says."""
    loop = device_loop(sized_bundle, seed, overlap=overlap)
    requests = prepared(loop, [Request("none", hands="none", size="40x24"), *of_all_sizes(15, seed)])
    on_host = {picture.id: picture for picture in loop.pipeline.run(requests)}
    for _ in range(2):
        together, events = run(loop, requests)
        same(together, on_host, levels=1)
    assert len(loop.sizes.easels) == 5 and not loop.sizes.taken and not loop.warnings()
    assert sum(count for kind, count in events if kind == "hands") == 16
    for request in requests[:4]:
        same(run(loop, [request])[0], {request.id: together[request.id]}, levels=1)


def test_the_oldest_request_decides_whose_size_is_next(device_loop, sized_bundle):
    """A rare size among ever new requests of the usual one is done soon after its turn."""
    loop = device_loop(sized_bundle, 1)
    requests = [Request("a fist", id=f"r{i}", seed=i, steps=4, size="40x24" if i == 3 else None) for i in range(40)]
    done = [result.id for result in loop.run(iter(prepared(loop, requests)), lambda kind, count: None)]
    assert done.index(prepared(loop, requests)[3].id) < 12 and len(done) == 40


def test_sizes_share_the_memory_that_there_is(device_loop, sized_bundle, monkeypatch):
    """The least recently used goes; a size waits for those in work; one that never fits fails alone."""
    loop = device_loop(sized_bundle, 2)
    requests = prepared(loop, of_all_sizes(15))
    on_host = {picture.id: picture for picture in loop.pipeline.run(requests)}
    sizes, most = loop.sizes, loop.sizes._buffers((32, 64), 4)
    own = loop.gpu.used
    monkeypatch.setattr(loop.cuda, "free_memory", lambda: own + 2 * most - loop.gpu.used)
    results, _ = run(loop, requests)
    same(results, on_host, levels=1)
    assert 1 < len(sizes.easels) < 5 and loop.gpu.used < own + 2.1 * most and (32, 32) in sizes.easels
    for size in {*sizes.easels} - {(32, 32)}:
        sizes.drop(size)
    own = loop.gpu.used
    monkeypatch.setattr(loop.cuda, "free_memory", lambda: own + most - 1 - loop.gpu.used)
    results, _ = run(loop, requests)
    failed = {id: result.sentence for id, result in results.items() if isinstance(result, Failure)}
    assert {request.size for request in requests if request.id in failed} == {"64x32"}
    assert all("size must fit into memory: 64x32" in sentence for sentence in failed.values())
    same({id: one for id, one in results.items() if id not in failed},
         {id: one for id, one in on_host.items() if id not in failed}, levels=1)  # fmt: skip


def test_a_refused_kernel_leaves_the_blend_to_the_host(device_loop, toy_bundle, monkeypatch):
    refuse = lambda *_: (_ for _ in ()).throw(EngineError("CUDA failed."))  # noqa: E731
    monkeypatch.setattr(Cuda, "kernel", refuse)
    loop = device_loop(toy_bundle, 2)
    assert any("blends pictures" in sentence for sentence in loop.warnings())
    requests = prepared(loop, with_pictures(5))
    same(run(loop, requests)[0], {picture.id: picture for picture in loop.pipeline.run(requests)}, levels=1)


@pytest.mark.parametrize("seed", range(3))
def test_a_picture_that_is_cancelled_gives_its_memory_back(device_loop, toy_bundle, seed):
    loop = device_loop(toy_bundle, seed)
    requests = prepared(loop, with_pictures(9, 5))
    dropped = [requests[2].id, requests[7].id]
    steps = []

    def tell(kind, count):
        steps.append(kind)
        if steps.count("steps") == 2:
            for id in dropped:
                loop.cancel(id)

    results = {result.id: result for result in loop.run(requests, tell)}
    assert {id for id, result in results.items() if isinstance(result, Failure)} <= set(dropped)
    kept = {id: result for id, result in results.items() if not isinstance(result, Failure)}
    on_host = {p.id: p for p in loop.pipeline.run(requests)}
    same(kept, {id: on_host[id] for id in kept}, levels=1)
    assert len(kept) < len(requests) and not loop.own.pictures.lent


def test_a_picture_whose_file_went_fails_alone(device_loop, toy_bundle, tmp_path):
    loop = device_loop(toy_bundle)
    path = tmp_path / "a.png"
    path.write_bytes(with_pictures(2)[1].image)
    requests = prepared(loop, [Request("a", image=str(path)), Request("b")])
    path.unlink()
    results, _ = run(loop, requests)
    assert "does not exist" in results[requests[0].id].sentence
    assert results[requests[1].id].image.any()


class InBfloat16:
    """A bfloat16 graph by way of its emulation, which takes and gives float32."""

    def __init__(self, engine, spec):
        self.engine, self.spec = engine, spec

    def __call__(self, feeds):
        given = {tensor.name: feeds[tensor.name].astype(tensor.dtype) for tensor in self.engine.spec.inputs}
        results = self.engine(given)
        return {tensor.name: results[tensor.name].astype(tensor.dtype) for tensor in self.spec.outputs}


def test_bfloat16_passes_from_graph_to_graph(gpus, tiny_bf16, tmp_path):
    """Nothing of it comes to the host, which could not hold it; and what arrives is what the emulation gives."""
    manifest = Manifest.load(tiny_bf16)
    emulate_bundle(tiny_bf16, tmp_path / "emulated")
    on_host = HanDiffuser.load(tmp_path / "emulated", device="cpu")
    gpu, cuda = gpus(2), Cuda()
    engines = load_engines(tmp_path / "emulated", "cpu", 1, verify=False)[1]

    def load(name, *_):
        return FakeDeviceEngine(gpu, InBfloat16(engines[name], manifest.graphs[name]), None)

    graphs = connect(cuda, manifest, Sized(load, (1, 2)))
    assert {graphs["unet"].inputs[name].dtype for name in ("time", "key_00", "value_00")} == {"bfloat16"}
    loop = DeviceLoop(Bundle.load(tiny_bf16), cuda, graphs, Streams.make(cuda, True), 2)
    loop.pipeline = HanDiffuser(loop.bundle, loop)
    requests = prepared(loop, [Request(f"prompt {i}", seed=i, steps=3, hand_steps=2) for i in range(3)])
    same(run(loop, requests)[0], {picture.id: picture for picture in on_host.run(requests)})


@pytest.mark.parametrize(
    ("seconds", "most"),
    [({1: 1.0, 2: 1.5, 4: 3.0}, 2), ({1: 1.0, 2: 1.5, 4: 1.8}, 3)],  # rows a second: 1.33 against 1.00, or 1.67
)
def test_padding_up_and_holding_back_are_compared(device_loop, toy_bundle, monkeypatch, seconds, most):
    """Three requests, and engines for 1, 2 and 4: four rows that stand for three, or two and the third waits."""
    monkeypatch.setattr(StepTimes, "choose", MEASURED)
    loop = device_loop(toy_bundle, 1, unet=seconds)
    requests = prepared(loop, [Request(f"prompt {i}", seed=i, steps=30, hand_steps=2) for i in range(3)])
    on_device, events = run(loop, requests)
    same(on_device, {picture.id: picture for picture in loop.pipeline.run(requests)}, levels=1)
    counts = [count for kind, count in events if kind == "steps"]
    assert sum(counts) == 90 and set(counts[12:25]) == {most}
    costs = [seconds[next(bucket for bucket in seconds if bucket >= count)] for count in counts]
    assert loop.timings["unet"] == pytest.approx(sum(costs), rel=0.01)
    if most == 2:
        assert list(on_device)[-1] == requests[-1].id  # the youngest waited


@pytest.mark.parametrize("milliseconds", [5, 400])
def test_a_slow_host_leaves_no_gap(device_loop, toy_bundle, milliseconds):
    """While a caller takes 45 ms for each picture, or the host 20 ms for each step of stage 1, the device has work."""
    loop = device_loop(toy_bundle, 1, unet=dict.fromkeys(BUCKETS, milliseconds / 1e3))
    loop.gpu.lazy = True
    requests = prepared(loop, [Request(f"p{i}", seed=i, steps=12 + 9 * (i % 3), hand_steps=6) for i in range(9)])
    main, queued, stepped = loop.gpu.streams[int(loop.main.handle)], [], []
    on_host = {picture.id: picture for picture in loop.pipeline.run(requests)}
    run(loop, requests)  # measures the steps

    def work(seconds):
        """The device goes on meanwhile, and must not come to the end of what it has."""
        if loop.sizes.active:
            queued.append(sum(entry[0] == "op" and "unet.onnx" in entry[1].name for entry in main.queue))
            ends = loop.gpu.clock + seconds
            while loop.gpu.clock < ends and main.queue:
                loop.gpu.run_one()
            assert main.queue, "the device waits for the host"

    def slow_step(*arguments, step=loop.hands_sampler.step):
        stepped.append(bool(loop.sizes.active))
        step(*arguments)
        work(0.02)

    def tell(*_):
        loop.gpu.polls = -1000  # the device gets no further while the host asks

    loop.hands_sampler.step, results = slow_step, {}
    for result in loop.run(requests, tell):
        results[result.id] = result
        work(0.045)
    same(results, on_host, levels=1)
    assert len(queued) > 12 and sum(stepped) >= 6, "hands of the next requests beside the steps of the last"
    assert milliseconds * min(queued) >= 20 and milliseconds * (max(queued) - 2) <= 1e3 * AHEAD


def test_given_hands(device_loop, toy_bundle, tmp_path):
    loop = device_loop(toy_bundle, 3)
    first = prepared(loop, mixed(3))
    pictures, _ = run(loop, first)
    path = tmp_path / "a.hands.npz"
    np.savez(path, **pictures[first[0].id].hands)
    requests = prepared(loop, [Request("other", hands=str(path)), *mixed(2, 5), Request("third", hands=str(path))])
    on_host = {picture.id: picture for picture in loop.pipeline.run(requests)}
    placed = dict(loop.bundle._placed)
    assert len(placed) == 1, "hands with a camera are placed once for each file"
    loop.bundle._placed.clear()  # the device loop is to find out for itself
    same(run(loop, requests)[0], on_host)
    for key, params in placed.items():
        np.testing.assert_allclose(loop.bundle._placed[key], params, rtol=1e-6)


def test_a_step_is_launched_from_its_capture(device_loop, toy_bundle):
    loop = device_loop(toy_bundle)
    run(loop, prepared(loop, mixed(9)))
    for key, engine in loop.made.items():
        if key[0] != "unet_time":
            assert engine.enqueued == 2, key  # once as it is, once for the capture
    assert not loop.warnings()


def test_refused_capture_runs_all_the_same_and_says_so(device_loop, toy_bundle):
    loop = device_loop(toy_bundle, refuse_capture=True)
    requests = prepared(loop, mixed(5))
    same(run(loop, requests)[0], {picture.id: picture for picture in loop.pipeline.run(requests)})
    assert "kernel by kernel" in loop.warnings()[0] and "unet" in loop.warnings()[0]


def test_an_engine_with_a_graph_of_its_own_is_not_captured(device_loop, toy_bundle, monkeypatch):
    monkeypatch.setattr(FakeDeviceEngine, "own_graph", True)
    loop = device_loop(toy_bundle)
    requests = prepared(loop, mixed(5))
    same(run(loop, requests)[0], {picture.id: picture for picture in loop.pipeline.run(requests)})
    assert max(engine.enqueued for (name, *_), engine in loop.made.items() if name == "unet") > 2, (
        "each step is bound again"
    )
    assert not loop.warnings()


def test_warm_up_makes_ready_what_the_run_will_need(device_loop, toy_bundle, monkeypatch):
    monkeypatch.setattr(StepTimes, "choose", MEASURED)
    loop = device_loop(toy_bundle, slots=3, single={"unet": BUCKETS, "hand_prior": BUCKETS})
    events = []
    loop.warm_up(8, lambda kind, count: events.append((kind, count)))
    # Of two graphs both kinds of each bucket, of five one; schedules of any length have one engine.
    assert events == [("warm-up", 1)] * (2 * 6 + 5 * 3 + 1) and len(loop.made) == len(events)
    requests = prepared(loop, [*mixed(9), Request("no guidance", guidance=1.0)])
    on_device, _ = run(loop, requests)
    same(on_device, {picture.id: picture for picture in loop.pipeline.run(requests)}, levels=1)
    assert len(loop.made) == len(events), "nothing is loaded in the middle of a run"
    assert max(engine.enqueued for (name, *_), engine in loop.made.items() if name == "unet") == 2, "once run, captured"


def test_warm_up_for_few_loads_few(device_loop, toy_bundle):
    loop = device_loop(toy_bundle)
    loop.warm_up(2, lambda *_: None)
    assert {bucket for name, bucket, _ in loop.made if name == "unet"} == {1, 2}


def test_closed_loops_are_gone_at_once(device_loop, toy_bundle):
    """No reference cycle: memory on the device must not wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        loop = device_loop(toy_bundle)
        run(loop, prepared(loop, mixed(3)))
        gone = [weakref.ref(x) for x in (loop, loop.own.sampler, loop.graphs["unet"], *loop.made.values())]
        loop.made.clear()
        pipeline = HanDiffuser(loop.bundle, loop)
        del loop
        pipeline.close()
        assert not [ref() for ref in gone if ref() is not None]
        pipeline.close()
        with pytest.raises(EngineError, match="was closed"):
            pipeline.generate("a fist")
    finally:
        gc.enable()


def test_nothing_is_allocated_in_a_second_run(device_loop, toy_bundle):
    loop = device_loop(toy_bundle)
    requests = prepared(loop, mixed(8))
    run(loop, requests)
    run(loop, requests)
    before = loop.gpu.allocations
    for _ in range(3):
        run(loop, requests)
    # Pinned buffers depend on how far the host ran ahead, but their number has an end.
    assert loop.gpu.allocations - before < 20
    before = loop.gpu.allocations
    for _ in range(10):
        run(loop, requests)
    assert loop.gpu.allocations - before < 20


def test_only_buckets_that_are_used_are_loaded(device_loop, toy_bundle, monkeypatch):
    monkeypatch.setattr(StepTimes, "choose", MEASURED)
    loop = device_loop(toy_bundle)
    loaded = lambda graph: {bucket for name, bucket, _ in loop.made if name == graph}  # noqa: E731
    run(loop, prepared(loop, [Request("one")]))
    assert loaded("unet") == loaded("text_hand_encoder") == {1}
    run(loop, prepared(loop, [Request("a"), Request("b"), Request("c")]))
    assert loaded("text_hand_encoder") == {1, 4}  # the smallest that holds them
    assert loaded("unet") == {1, 2, 4}  # 2 and 4 were compared


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        ("hand_prior", "hand_prior, step 1"),
        ("hand_features", "hand_features"),
        ("unet", "unet, step 2"),
        ("image_decoder", "image_decoder"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_nan_fails_one_and_the_rest_goes_on(device_loop, toy_bundle, graph, words, seed):
    calls = {"count": 0}

    def step_spoiler(state, at):
        def spoil(inputs, results):
            # The first request's row: it is alone in the first batch's row 0 until it leaves.
            calls["count"] += 1
            if calls["count"] == at:
                results[state][0], results["finite"][0] = np.nan, 0
            bad = ~np.isfinite(results[state]).reshape(len(results[state]), -1).all(1)
            results["finite"][bad] = 0

        return spoil

    def once(output):
        def spoil(inputs, results):
            calls["count"] += 1
            if calls["count"] == 1:
                if "finite" in results:
                    results["finite"][0] = 0
                else:
                    results[output][0] = np.nan

        return spoil

    spoilers = {
        "hand_prior": step_spoiler("x", 2),
        "hand_features": once("vertices"),
        "unet": step_spoiler("latents", 3),
        "image_decoder": once("image"),
    }
    loop = device_loop(toy_bundle, seed, spoil={graph: spoilers[graph]})
    requests = prepared(loop, [Request(f"p{i}", seed=i, steps=6, hand_steps=4) for i in range(7)])
    results, _ = run(loop, requests)
    failures = [result for result in results.values() if isinstance(result, Failure)]
    assert len(results) == 7 and len(failures) == 1
    assert failures[0].sentence.startswith(f"{words} gave NaN")
    fine = device_loop(toy_bundle)
    same(
        {key: value for key, value in results.items() if not isinstance(value, Failure)},
        {p.id: p for p in fine.pipeline.run(requests) if p.id != failures[0].id},
    )


def test_stopped_early_leaves_nothing_behind(device_loop, toy_bundle):
    loop = device_loop(toy_bundle, 1)
    requests = prepared(loop, mixed(10))
    pictures = loop.run(requests, lambda *_: None)
    next(pictures)
    pictures.close()
    same(run(loop, requests)[0], {picture.id: picture for picture in loop.pipeline.run(requests)})


@pytest.mark.parametrize("go_on", [True, False])
def test_closed_in_the_middle_of_a_run(device_loop, toy_bundle, go_on):
    """What is left of the run touches no stream that is gone, and does not end as if it were done."""
    loop = device_loop(toy_bundle, 1)
    requests = prepared(loop, mixed(10))
    pipeline = HanDiffuser(loop.bundle, loop)
    pictures = pipeline.run(requests)
    next(pictures)
    pipeline.close()
    if go_on:
        with pytest.raises(EngineError, match="was closed"):
            next(pictures)
    pictures.close()


def test_more_rows_than_the_largest_engine(device_loop, toy_bundle):
    loop = device_loop(toy_bundle)
    with pytest.raises(EngineError, match="--batch-sizes 5"):
        loop.graphs["unet"].bucket(5)


def test_without_guidance_the_conditional_branch_runs_alone(device_loop, toy_bundle):
    """Where there is an engine for it: buckets of one and two; mixed company and other buckets take both branches."""
    loop = device_loop(toy_bundle, 3, single={"unet": (1, 2), "hand_prior": (1, 2, 4)})
    lone = prepared(loop, [Request("a", seed=1, steps=3, guidance=1.0), Request("b", seed=2, steps=5, guidance=1.0)])
    on_host = {picture.id: picture for picture in loop.pipeline.run(lone)}
    same(run(loop, lone)[0], on_host)
    assert {key for key in loop.made if key[0] == "unet"} == {("unet", 2, 1), ("unet", 1, 1)}
    company = prepared(loop, [*mixed(6), Request("c", seed=9, guidance=4.0, steps=6, guidance_interval=(0.0, 0.5))])
    on_host = {picture.id: picture for picture in loop.pipeline.run(company)}
    same(run(loop, company)[0], on_host)
    assert ("unet", 4, 2) in loop.made and ("unet", 4, 1) not in loop.made


def test_requests_may_come_later(device_loop, toy_bundle):
    """An iterator that has nothing yet gives None, and is asked again after the next step."""
    loop = device_loop(toy_bundle, 5)
    requests = prepared(loop, mixed(7))
    on_host = {picture.id: picture for picture in loop.pipeline.run(requests)}

    def source():
        for i, request in enumerate(requests):
            yield from [None] * (i % 3)
            yield request
        yield None

    same(run(loop, source())[0], on_host)


def test_cancelled_between_two_steps(device_loop, toy_bundle):
    """At any event: the rows of the other requests are the same bits, and every request comes out once."""
    loop = device_loop(toy_bundle, 6)
    requests = prepared(loop, mixed(9))
    whole = {request.id: loop.run([request], lambda kind, count: None) for request in requests}
    whole = {name: next(iter(list(pictures))) for name, pictures in whole.items()}
    for n in range(12):
        events = 0

        def on_event(kind, count, n=n):
            nonlocal events
            if events % 12 == n:
                loop.cancel(requests[(events + n) % 9].id)
                (kept,) = loop.hands(prepared(loop, [Request("hands alone", seed=n)]))
                assert np.isfinite(kept["joints_2d"]).all()
            if kind == "steps":
                peeks = [peek for request in requests if (peek := loop.peek(request.id))]
                assert all(0 <= peek.step < peek.steps and np.isfinite(peek.hands["camera"]).all() for peek in peeks)
                assert all((peek.latents is None) == (peek.step == 0) or peek.step == 0 for peek in peeks)
            events += 1

        results = list(loop.run(requests, on_event))
        assert sorted(result.id for result in results) == sorted(request.id for request in requests)
        left = {result.id for result in results if isinstance(result, Failure)}
        assert all(result.sentence == "It was cancelled." for result in results if result.id in left)
        assert n > 3 or left
        kept = {result.id: result for result in results if result.id not in left}
        same(kept, {name: whole[name] for name in kept}, levels=1)


@pytest.mark.parametrize("any_length", [True, False])
def test_weights_of_prompts_are_those_of_the_host(device_loop, request, any_length):
    """In a batch with plain ones, with more rows to read than slots; a weight below 1 needs a bundle of today."""
    folder = request.getfixturevalue("sized_bundle" if any_length else "toy_bundle")
    texts = ["a fist", "a (fist:1.4)", "[a] (b:0.3) [[c]] (d:-1)", "two hands", "a (b)"]
    asked = [Request(text, negative_prompt=("", "(x:1.5)")[i % 2], seed=i) for i, text in enumerate(texts)]
    loop = device_loop(folder)
    requests = prepared(loop, asked)
    results, _ = run(loop, requests)
    same(results, {r.id: r for r in loop.pipeline.run(requests)}, levels=1)
    assert len({result.image.tobytes() for result in results.values()}) == len(texts)


def test_bfloat16_comes_to_the_host_and_goes_back():
    values = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    exact = values.astype("bfloat16")
    np.testing.assert_array_equal(device_words._stored(values, "bfloat16"), exact.view(np.uint16))
    np.testing.assert_array_equal(device_words._floats(exact.view(np.uint16), "bfloat16"), exact.astype(np.float32))


def test_a_prompt_of_several_chunks_is_refused_or_cut(device_loop, sized_bundle):
    loop = device_loop(sized_bundle)
    loop.pipeline.bundle.reader.engine_chunks = 1
    said = "prompt must fit into 1 chunk of 75 tokens with these engines, got 90 tokens in 2 chunks. Shorten it, or set"
    assert said in loop.pipeline.prepare([Request("a" * 90)])[1][0].sentence
    off = Request("a fist", negative_prompt="b" * 90, guidance=1)  # which nothing reads
    requests = prepared(loop, [Request("a" * 90, plain_prompts=True), Request("a fist"), off])
    long = replace(requests[1], prompt="a" * 90, id="long")  # as a server sends it, which does not know the engines
    results, _ = run(loop, [*requests, long])
    assert said in results["long"].sentence and isinstance(results["long"], Failure)
    assert results[requests[0].id].image.shape == results[requests[2].id].image.shape == (32, 32, 3)
    (hands,) = loop.hands([long])
    assert isinstance(hands, dict), "stage 1 reads the first chunk"
