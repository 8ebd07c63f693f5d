"""Whole commands on a GPU that is not there: `hd-engines build`, then `hd-run --backend tensorrt-rtx`.

All of it is the real code, from the command down to `cuda.bindings` and TensorRT's own builder; see `fake_runtime.py`
and `fake_tensorrt.py`.
"""

from __future__ import annotations

import gc
import mmap
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import onnx
import pytest

pytest.importorskip("cuda.bindings.runtime")
pytest.importorskip("tensorrt_rtx")

import whole
from fake_runtime import FakeRuntime
from fake_tensorrt import FakeTensorRT
from handiffuser import HanDiffuser, shipped
from handiffuser.contract import ALL_GRAPHS, Manifest, file_digest
from handiffuser.engines import cli as engines_cli
from handiffuser.engines import tensorrt_loading
from handiffuser.engines.cuda import Cuda, Event, Stream
from handiffuser.engines.plans import PlanStore
from handiffuser.engines.tensorrt import Scratch, TensorRTEngine
from handiffuser.errors import EngineError, HanDiffuserError, RequestError
from handiffuser.runtime import device, device_sizes
from whole import hd_run, mixed, pictures, run, same

pytestmark = pytest.mark.usefixtures("all_at_once")


@pytest.fixture(scope="session")
def toy_engines(toy_bundle, tmp_path_factory):
    """The toy bundle with plans for 1, 2 and 4 pictures. Not to be written into."""
    return built(toy_bundle, tmp_path_factory.mktemp("engines") / "toy", "--batch-sizes", "1,2,4", "--guidance-free")


def built(bundle, folder, *options):
    """A copy of a bundle with plans, as `hd-engines build` makes them."""
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("plans"))
    with pytest.MonkeyPatch.context() as patch:
        gpu = FakeRuntime().install(patch)
        FakeTensorRT(gpu).install(patch)
        assert engines_cli.commands.main(["build", str(folder), *options], standalone_mode=False) == 0
    return folder


@pytest.fixture
def gpu(monkeypatch):
    """A GPU at which nothing may go wrong."""
    gpu = FakeRuntime(seed=1).install(monkeypatch)
    yield gpu
    gc.collect()
    assert not gpu.problems


@pytest.fixture
def trt(gpu, monkeypatch):
    return FakeTensorRT(gpu).install(monkeypatch)


@pytest.mark.parametrize("extra", [(), ("--no-overlap", "--no-warm-up"), ("--solver", "ddpm"), ("--guidance", "1")])
def test_pictures_are_those_of_the_cpu(toy_engines, gpu, trt, tmp_path, extra, capsys):
    assert hd_run(toy_engines, tmp_path / "gpu", "--backend", "tensorrt-rtx", *extra) == (0, "")
    assert "warning" not in capsys.readouterr().err
    assert hd_run(toy_engines, tmp_path / "cpu", "--device", "cpu", *extra) == (0, "")
    same(pictures(tmp_path / "gpu"), pictures(tmp_path / "cpu"))
    assert gpu.calls["cudaGraphUpload"] == gpu.calls["cudaGraphInstantiate"] > 10
    gc.collect()
    assert not gpu.live(), "everything is freed at the end"


@pytest.mark.parametrize("kind", ["--dynamic", "--shared-weights"])
def test_one_plan_for_several_sizes(toy_bundle, gpu, trt, tmp_path, kind, monkeypatch):
    """It is hashed once, and mapped, not copied into the process."""
    folder = built(toy_bundle, tmp_path / "toy", "--batch-sizes", "1,2,4", kind)
    read, mapped = PlanStore.read, []

    def noted(store, plan):
        content = read(store, plan)
        mapped.append((plan.key, isinstance(content.obj, mmap.mmap)))
        return content

    monkeypatch.setattr(PlanStore, "read", noted)
    assert hd_run(folder, tmp_path / "gpu", "--backend", "tensorrt-rtx") == (0, "")
    assert hd_run(folder, tmp_path / "cpu", "--device", "cpu") == (0, "")
    same(pictures(tmp_path / "gpu"), pictures(tmp_path / "cpu"))
    assert len({key for key, _ in mapped}) == len(mapped) > 5 and all(is_mapped for _, is_mapped in mapped)


@pytest.mark.parametrize("kind", [(), ("--shared-weights",), ("--dynamic",)])
def test_sizes_that_were_built_for(sized_bundle, gpu, trt, tmp_path, kind, capsys):
    """A plan, or a profile, for each; a size in vain is told the nearest, and the build goes on where it stopped."""
    folder = built(sized_bundle, tmp_path / "toy", "--batch-sizes", "1,2", "--sizes", "40x24,24x40", *kind)
    requests = [replace(request, size=("40x24", None, "24x40")[i % 3]) for i, request in enumerate(mixed(8))]
    with HanDiffuser.load(sized_bundle, device="cpu") as on_cpu:
        expected = run(on_cpu, requests)
    with HanDiffuser.load(folder, backend="tensorrt-rtx", batch_size=2) as pipeline:
        same(run(pipeline, requests), expected)
        live = gpu.live()
        pipeline.loop.sizes.drop((24, 40))
        assert gpu.live() < live - 10
        same(run(pipeline, requests), expected)
        said = "size must be 40x24 or 32x32 or 24x40 with these engines, got 48x24. The nearest is 40x24"
        with pytest.raises(RequestError, match=f"{said}. Or build for it: hd-engines build .*--sizes 48x24"):
            pipeline.generate("a fist", size="48x24")
    gc.collect()
    assert not gpu.live()
    engines_cli.commands.main(["list", str(folder)], standalone_mode=False)
    sizes = "B=1+2,G=2,L=78 32x32+40x24+24x40" if kind == ("--shared-weights",) else "G=2,L=78 24x40"
    assert sizes in capsys.readouterr().out
    if not kind:  # a size without its decoder is not there yet, and its plans are
        store = PlanStore(folder)
        missing = [plan for plan in store if plan.graph == "image_decoder" and "h=6,w=10" in plan.parts["sizes"]]
        before = {plan.key for plan in store}
        for plan in missing:
            store.remove(plan)
        with HanDiffuser.load(folder, backend="tensorrt-rtx", batch_size=2) as pipeline:
            assert pipeline.bundle.engine_sizes == {(32, 32), (40, 24)}
        arguments = ["build", str(folder), "--batch-sizes", "1,2", "--sizes", "24x40, 40X24,32x32"]
        assert engines_cli.commands.main(arguments, standalone_mode=False) == 0 and len(missing) == 2
        assert f"Built 2 of {len(before)} plans" in capsys.readouterr().err and {plan.key for plan in store} == before


@pytest.mark.parametrize(
    ("sizes", "said"),
    [("40x30", "multiples of 8 up to 4096 pixels, got 40x30. The nearest is 40x32"), ("40", "must be a list of")],
)
def test_sizes_that_cannot_be_built_for(sized_bundle, gpu, trt, sizes, said):
    with pytest.raises((EngineError, click.BadParameter), match=said):
        engines_cli.commands.main(["build", str(sized_bundle), "--sizes", sizes], standalone_mode=False)


def test_two_people(pair_bundle, gpu, trt, tmp_path):
    """Larger tensors are all that the device loop sees, with hands of its own and those of a file."""
    folder = built(pair_bundle, tmp_path / "pair", "--batch-sizes", "1,2")
    assert hd_run(folder, tmp_path / "gpu", "--backend", "tensorrt-rtx") == (0, "")
    assert hd_run(folder, tmp_path / "cpu", "--device", "cpu") == (0, "")
    same(pictures(tmp_path / "gpu"), pictures(tmp_path / "cpu"))
    given = ("--hand-params", next((tmp_path / "cpu").glob("*.hands.npz")))
    assert hd_run(folder, tmp_path / "gpu given", "--backend", "tensorrt-rtx", *given) == (0, "")
    assert hd_run(folder, tmp_path / "cpu given", "--device", "cpu", *given) == (0, "")
    same(pictures(tmp_path / "gpu given"), pictures(tmp_path / "cpu given"))


def test_plans_are_compared_on_the_gpu(toy_engines, gpu, trt, tmp_path):
    """Every output of every plan beside float32; and a plan that computes something else is found."""
    pytest.importorskip("polygraphy")
    from click.testing import CliRunner

    arguments = ["compare", str(toy_engines), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(engines_cli.commands, arguments, standalone_mode=False)
    assert result.return_value == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(ALL_GRAPHS)


def test_one_folder_has_plans_of_several_backends(toy_bundle, gpu, trt, monkeypatch, tmp_path):
    """Each takes its own, and builds beside the other's."""
    full = FakeTensorRT(gpu, rtx=False).install(monkeypatch)
    folder = Path(shutil.copytree(toy_bundle, tmp_path / "toy"))
    counts = []
    for backend in ("tensorrt-rtx", "tensorrt") * 2:
        arguments = ["build", str(folder), "--batch-sizes", "1,4", "--backend", backend]
        assert engines_cli.commands.main(arguments, standalone_mode=False) == 0
        counts.append(len(list(PlanStore(folder))))
    assert counts == [counts[0], 2 * counts[0], 2 * counts[0], 2 * counts[0]]
    assert hd_run(folder, tmp_path / "cpu", "--device", "cpu") == (0, "")
    for backend, fake, idle in (("tensorrt-rtx", trt, full), ("tensorrt", full, trt)):
        fake.runs, idle.runs = {}, {}
        assert hd_run(folder, tmp_path / backend, "--backend", backend) == (0, "")
        same(pictures(tmp_path / backend), pictures(tmp_path / "cpu"))
        assert fake.runs and not idle.runs
    gc.collect()
    assert not gpu.live()


@pytest.fixture
def in_eight_bits(toy_bundle, gpu, trt, tmp_path):
    """The toy in "float16" with plans, and the same in "fp8"; the UNet of the first is told apart by its name."""
    folders = {}
    for precision in ("fp16", "fp8"):
        folder = folders[precision] = Path(shutil.copytree(toy_bundle, tmp_path / precision))
        model = onnx.load(folder / "unet.onnx")
        model.graph.name = f"unet in {precision}"
        onnx.save(model, folder / "unet.onnx")
        manifest = Manifest.load(folder, verify=False)
        manifest.precision, manifest.files["unet.onnx"] = precision, file_digest(folder / "unet.onnx")
        manifest.save(folder)
    return folders


def build(folder, *options, backend="tensorrt-rtx"):
    arguments = ["build", str(folder), "--batch-sizes", "1,4", "--backend", backend, *map(str, options)]
    return engines_cli.commands.main(arguments, standalone_mode=False)


def test_eight_bits_are_faster_or_refused(in_eight_bits, gpu, trt, monkeypatch, capsys):
    """By the fake GPU's clock."""
    times = {("unet in fp16", 1): 4e-3, ("unet in fp16", 4): 9e-3, ("unet in fp8", 1): 3e-3, ("unet in fp8", 4): 7e-3}
    trt.seconds = lambda name, rows: times.get((name, rows), 1e-6)
    half, eight = in_eight_bits["fp16"], in_eight_bits["fp8"]
    assert build(eight) == 0
    assert "faster than fp16 on this GPU was not measured: name engines in fp16" in capsys.readouterr().err
    with pytest.raises(EngineError, match="has no fp16 plan of the UNet for tensorrt-rtx"):
        build(eight, "--faster-than", half)
    build(half)
    capsys.readouterr()
    assert build(eight, "--faster-than", half) == 0
    said = capsys.readouterr().err
    assert "3.00 ms a step in fp8 against 4.00 in fp16 at B=1,G=2" in said and "7.00 ms a step in fp8" in said
    times["unet in fp8", 4] = 9.5e-3
    with pytest.raises(EngineError, match=r"fp8 is not faster than fp16 on this GPU at B=4,G=2: .* 9\.50 ms a step"):
        build(eight, "--faster-than", half)
    assert "Building again with convolutions in half precision" in capsys.readouterr().err
    products = '"eight_bits": "products"'
    assert any(products in plan.parts["options"] for plan in PlanStore(eight))
    times["unet in fp8", 4] = 8e-3  # without convolutions
    assert build(eight, "--faster-than", half) == 0
    assert "8.00 ms a step in fp8 against 9.00" in capsys.readouterr().err
    with pytest.raises(EngineError, match="--eight-bits is an option of fp8 and int8, got --precision fp16"):
        build(half, "--eight-bits", "products")
    times["unet in fp8", 4] = 9.5e-3
    # In one folder, exported again in another precision, the plans from before are what it is compared with.
    for file in half.glob("*.*"):
        shutil.copy(eight / file.name, file)
    with pytest.raises(EngineError, match="not faster than fp16"):
        build(half)
    gc.collect()
    assert not gpu.live()
    monkeypatch.setattr(engines_cli, "gpu", lambda: None)
    assert build(eight) == 0
    assert "is measured where there is one" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo(gpu, trt, tmp_path):
    """The shipped bundle; its networks add up in another order in batches of other sizes."""
    folder = built(shipped.resolve("demo", "bundle"), tmp_path / "demo", "--batch-sizes", "1,2,4")
    assert hd_run(folder, tmp_path / "gpu", "--backend", "tensorrt-rtx") == (0, "")
    assert hd_run(folder, tmp_path / "cpu", "--device", "cpu") == (0, "")
    same(pictures(tmp_path / "gpu"), pictures(tmp_path / "cpu"), levels=2)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_any_order_that_streams_allow_gives_the_same(toy_engines, gpu, trt, seed, lazy):
    gpu.random, gpu.lazy = np.random.default_rng(seed), lazy
    with HanDiffuser.load(toy_engines, device="cpu") as on_cpu:
        expected = run(on_cpu, mixed(11, seed))
    with HanDiffuser.load(toy_engines, backend="tensorrt-rtx", batch_size=4, overlap=seed != 2) as pipeline:
        same(run(pipeline, mixed(11, seed)), expected)
        same(run(pipeline, mixed(11, seed)), expected)
        assert not pipeline.loop.warnings()
    assert not gpu.live()


def test_stopped_early_leaves_nothing_behind(toy_engines, gpu, trt):
    """Also no pinned memory that a copy still goes to."""
    gpu.lazy = True
    with HanDiffuser.load(toy_engines, device="cpu") as on_cpu:
        expected = run(on_cpu, mixed(10))
    with HanDiffuser.load(toy_engines, backend="tensorrt-rtx", batch_size=4) as pipeline:
        pictures = pipeline.run(pipeline.prepare(mixed(10), 0)[0])
        next(pictures)
        pictures.close()
        same(run(pipeline, mixed(10)), expected)


KINDS = (*whole.KINDS, "TensorRT refuses")


def fault(kind, gpu, trt, at):
    if kind == "TensorRT refuses":
        trt.refuse = trt.number + at
    else:
        whole.fault(kind, gpu, at)


WAYS = ((), ("--no-warm-up", "--no-overlap"))


@pytest.mark.parametrize(
    ("kind", "how", "places"),
    [
        ("out of memory", WAYS[0], 5),
        ("TensorRT refuses", WAYS[1], 5),
        *(pytest.param(kind, how, 16, marks=pytest.mark.slow) for kind in KINDS for how in WAYS),
    ],
)
def test_a_fault_anywhere_ends_in_one_sentence(toy_engines, monkeypatch, tmp_path, capsys, kind, how, places):
    def fresh(at):
        gpu = FakeRuntime(seed=at or 0).install(monkeypatch)
        trt = FakeTensorRT(gpu).install(monkeypatch)
        if at is not None:
            fault(kind, gpu, trt, at)
        return gpu, lambda: trt.number if kind == "TensorRT refuses" else whole.counted(kind, gpu)

    arguments = ("--backend", "tensorrt-rtx", *how)
    whole.faults_end_in_one_sentence(toy_engines, tmp_path, arguments, capsys, fresh, places)


@pytest.mark.parametrize(
    "kind", ["a call fails", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "a call fails")]
)
def test_after_a_fault_the_same_pipeline_runs_again_or_says_why_not(toy_engines, monkeypatch, kind):
    """Nothing of the run that failed is left in buffers, slots or lent memory."""
    with HanDiffuser.load(toy_engines, device="cpu") as on_cpu:
        expected = run(on_cpu, mixed(7))
    failures = 0
    for at in (1, 3, 8, 21, 55, 144):
        gpu = FakeRuntime(seed=at, lazy=at % 2 == 0).install(monkeypatch)
        trt = FakeTensorRT(gpu).install(monkeypatch)
        with HanDiffuser.load(toy_engines, backend="tensorrt-rtx", batch_size=4) as pipeline:
            fault(kind, gpu, trt, at)
            try:
                same(run(pipeline, mixed(7)), expected)
            except EngineError:
                failures += 1
            if gpu.broken is None:
                gpu.refuse.clear()
                gpu.refuse_allocation = trt.refuse = None
                same(run(pipeline, mixed(7)), expected)
            else:
                with pytest.raises(EngineError, match="IllegalAddress"):
                    run(pipeline, mixed(7))
        assert not gpu.problems, at
        if gpu.broken is None:
            gc.collect()
            assert not gpu.live(), at
    assert failures > 1


# Tests of the test: mistakes that the loop could make, and what is said of them.
def no_wait(patch):
    patch.setattr(Stream, "wait", lambda stream, event: None)


def pageable(patch):
    patch.setattr(Cuda, "pinned", lambda cuda, shape, dtype: np.zeros(shape, dtype))


def staging_that_does_not_wait(patch):
    patch.setattr(Event, "done", lambda event: True)


def freed_scratch(patch):
    """Scratch memory that grows frees what was captured."""

    def reserve(scratch, size):
        if scratch.array is None or scratch.array.nbytes < size:
            if scratch.array is not None:
                scratch.array.close()
            scratch.array = scratch.cuda.zeros((size,), "uint8")
        return scratch.array

    patch.setattr(Scratch, "reserve", reserve)


def shared_scratch(patch):
    """Engines of several streams have one scratch memory."""
    patch.setattr(tensorrt_loading, "Scratch", lambda cuda: cuda.__dict__.setdefault("one", Scratch(cuda)))


def allocating_engine(patch):
    enqueue = TensorRTEngine.enqueue

    def allocate(engine, stream):
        engine.mine = engine.plan.cuda.zeros((16,), "uint8")
        enqueue(engine, stream)

    patch.setattr(TensorRTEngine, "enqueue", allocate)


def too_large_copies(patch):
    copy = Stream.copy

    def copy_more(stream, target, source):
        if target.nbytes == source.nbytes and not isinstance(target, np.ndarray) and target.owner is None:
            stream.cuda.call("cudaMemsetAsync", target.pointer, 0, target.nbytes + 4, stream.handle)
        copy(stream, target, source)

    patch.setattr(Stream, "copy", copy_more)


MISTAKES = {
    no_wait: "race",
    pageable: "pageable",
    staging_that_does_not_wait: "host wrote into pinned memory|race",
    freed_scratch: "was freed",
    shared_scratch: "race",
    allocating_engine: "cudaMalloc during a capture",
    too_large_copies: "behind its allocation|never allocated",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_found(toy_engines, monkeypatch, mistake):
    gpu = FakeRuntime(seed=1, lazy=True).install(monkeypatch)
    FakeTensorRT(gpu).install(monkeypatch)
    mistake(monkeypatch)
    try:
        with HanDiffuser.load(toy_engines, backend="tensorrt-rtx", batch_size=4) as pipeline:
            pipeline.warm_up()
            run(pipeline, mixed(11))
    except (HanDiffuserError, AttributeError):
        pass  # the pictures may fail, too
    assert re.search(MISTAKES[mistake], " ".join(gpu.problems)), gpu.problems


# The lines of the loop at which a stream waits for an event.
WAITS = {
    (module.__file__, number): line.strip()
    for module in (device, device_sizes)
    for number, line in enumerate(Path(module.__file__).read_text().splitlines(), 1)
    if re.search(r"\b(main|side|out)\.wait\(", line)
}


@pytest.mark.parametrize("place", WAITS, ids=WAITS.get)
def test_each_wait_is_needed_and_would_be_missed(toy_engines, monkeypatch, place):
    """Found by the clocks alone, whatever the order in which things really ran."""
    gpu = FakeRuntime(seed=1, lazy=True).install(monkeypatch)
    FakeTensorRT(gpu).install(monkeypatch)
    wait, left_out = Stream.wait, []

    def wait_elsewhere(stream, event):
        caller = sys._getframe(1)
        if (caller.f_code.co_filename, caller.f_lineno) == place:
            left_out.append(event)
        else:
            wait(stream, event)

    monkeypatch.setattr(Stream, "wait", wait_elsewhere)
    with HanDiffuser.load(toy_engines, backend="tensorrt-rtx", batch_size=4) as pipeline:
        resolved, _ = pipeline.prepare(mixed(11), 0)
        list(pipeline.run(resolved))
    assert left_out and gpu.problems and all(problem.startswith("race") for problem in gpu.problems), gpu.problems
