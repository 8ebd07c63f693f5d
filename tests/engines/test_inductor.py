"""The inductor backend: compiled graphs agree with PyTorch, and a file or feed that does not fit is one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings.runtime")

from fake_onnxruntime import FakeOnnxRuntime
from fake_runtime import FakeDeviceEngine, FakeRuntime, Op, fake_cuda
from handiffuser import EngineError, ExportError, HanDiffuser, Request, RequestError
from handiffuser.contract import ALL_GRAPHS, PICTURES, GraphSpec, Manifest, TensorSpec
from handiffuser.engines import inductor, load_engines, timing
from handiffuser.engines.inductor import InductorDeviceEngine, InductorEngine, InductorShapes
from handiffuser.engines.inductor_files import Here, find_compiled, options_of, wanted_files
from handiffuser.engines.plans import WORDS, PlanStore, Wanted, parts
from handiffuser.export import inductor as export
from handiffuser.export.bundle import run_module
from handiffuser.export.graphs import Graph, graphs
from handiffuser.export.inductor import compile_graph
from handiffuser.models.smplh import SMPLH
from handiffuser.runtime.loading import choose, has_plans
from torch import Tensor, nn
from torch._inductor import config

COMPILED = {"hand_prior": None, "unet": {"B": 2, "G": 2}}  # graph -> the shape that it is compiled for, without sides
COMMAND = "hd-export CHECKPOINT OUT --backend inductor"


@dataclasses.dataclass
class Case:
    graph: Graph
    spec: GraphSpec
    path: Path
    shape: dict[str, int] | None = None
    weights: dict[str, Tensor] | None = None

    def feeds(self, batch: int) -> dict[str, np.ndarray]:
        shape = {**(self.shape or {}), "B": batch}
        return {name: export.example(self.graph, name, shape).numpy() for name in self.graph.inputs}

    def engine(self, **options) -> InductorEngine:
        return InductorEngine(self.path, self.spec, **{"threads": 1, "weights": self.weights, **options})

    def exact(self, batch: int) -> dict[str, Tensor]:
        with torch.no_grad():
            values = run_module(self.graph.module, [torch.from_numpy(value) for value in self.feeds(batch).values()])
        return dict(zip(self.graph.outputs, values, strict=True))


@pytest.fixture(scope="module", autouse=True)
def threads():
    """An engine sets PyTorch's threads for the whole process; the tests after these keep their own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def compiled(graph: Graph, folder: Path, shape: dict[str, int] | None) -> Case:
    """shape: without the sides, which are those of the example."""
    sides = {side: v.shape[axis] for name, v in graph.inputs.items() for axis, side in graph.sides(name).items()}
    fixed = None if shape is None else {**sides, **shape}
    case = Case(graph, GraphSpec(f"{graph.name}.onnx", [], []), folder / f"{graph.name}.pt2", fixed)
    case.spec.inputs = [graph.spec(name, value) for name, value in graph.inputs.items()]
    case.spec.outputs = [graph.spec(name, value) for name, value in case.exact(2).items()]
    case.spec = case.spec.at(fixed or {})
    with config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # a third of the time
        case.weights = compile_graph(graph, case.path, shape=fixed) or None
    return case


@pytest.fixture(scope="module")
def cases(tiny_checkpoint, body_path, tmp_path_factory) -> dict[str, Case]:
    folder, made = tmp_path_factory.mktemp("inductor"), {}
    for graph in graphs(tiny_checkpoint, SMPLH.load(body_path)):
        if graph.name in COMPILED:
            made[graph.name] = compiled(graph, folder, COMPILED[graph.name])
    assert sorted(file.stem for file in folder.iterdir()) == sorted(COMPILED), "the compiler left something behind"
    return made


@pytest.fixture(scope="module")
def prior(cases) -> InductorEngine:
    return cases["hand_prior"].engine()


@pytest.mark.parametrize(("name", "batch"), [("hand_prior", 1), ("hand_prior", 3), ("unet", 2)])
def test_agrees_with_pytorch(cases, name, batch):
    case = cases[name]
    engine = case.engine(device="cpu")
    assert engine.device == "cpu"
    last, convolutions = export.layouts(case.path)
    assert last == convolutions and (convolutions > 30) == (name == "unet"), "channels last throughout"
    feeds = case.feeds(batch)
    outputs = engine(feeds)
    assert list(outputs) == [tensor.name for tensor in case.spec.outputs]
    for name, exact in case.exact(batch).items():
        assert outputs[name].dtype == exact.numpy().dtype
        np.testing.assert_allclose(outputs[name], exact, rtol=0, atol=1e-4 * exact.abs().max().item())
    for name, value in case.feeds(batch).items():
        np.testing.assert_array_equal(feeds[name], value)  # no input was used as working memory


def test_takes_arrays_as_they_come(prior, cases):
    """Columns first, and read-only."""
    plain = cases["hand_prior"].feeds(3)
    want = prior(plain)
    twisted = {name: np.asfortranarray(value) for name, value in plain.items()}
    twisted["row"].flags.writeable = False
    np.testing.assert_array_equal(prior(twisted)["x"], want["x"])


def test_a_nan_is_seen_in_its_own_row(prior, cases):
    feeds = cases["hand_prior"].feeds(3)
    feeds["x"][1, 7] = np.nan
    np.testing.assert_array_equal(prior(feeds)["finite"], [1, 0, 1])


def test_wrong_feeds_are_named_before_anything_runs(prior, cases):
    feeds = cases["hand_prior"].feeds(2)
    with pytest.raises(EngineError, match=r"hand_prior got x of shape \[2, 7\].*axis 1 must be 330"):
        prior({**feeds, "x": feeds["x"][:, :7]})
    with pytest.raises(EngineError, match=r"x of shape \[4097, 330\].*B is at most 4096"):
        prior(cases["hand_prior"].feeds(4097))


def test_another_batch_than_the_compiled_one(cases):
    case = cases["unet"]
    with pytest.raises(EngineError, match=r"latents of shape \[3, 4, .*axis 0 must be 2"):
        case.engine()(case.feeds(3))


class Toy(nn.Module):
    """Two convolutions, and a constant beside its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.codes = [torch.linspace(-1, 1, 16)]  # as a processor of attention holds them

    def forward(self, latents: Tensor, key: Tensor) -> Tensor:
        seen = nn.functional.silu(self.first(latents)) * self.codes[0][:, None, None]
        return self.second(seen + key.mean(1)[:, :, None, None])


@pytest.mark.slow
def test_shapes_of_a_graph_share_their_weights(tmp_path):
    """On disk and in memory; each shape has its file, and a loop on the host takes the one that fits."""
    inputs = {"latents": torch.randn(2, 4, 8, 8), "key": torch.randn(2, 2, 16)}
    graph = Graph("toy", Toy().eval(), inputs, ("latents",), branched=("key",), sized=("latents",))
    shapes = [{"B": 1, "G": 2, "h": 8, "w": 8}, {"B": 2, "G": 1, "h": 8, "w": 12}]
    made = [compiled(graph, tmp_path / f"{i}", shape) for i, shape in enumerate(shapes)]
    assert [export.layouts(case.path) for case in made] == [(2, 2)] * 2
    assert sum(name.endswith("tensor_0") for name in made[0].weights) == 1 and len(made[0].weights) == 5
    file = tmp_path / "weights.plan"
    export.save_weights(made[0].weights, file)
    export.check_weights(file, made[1].weights, graph.module)
    graph.module.codes[0] += 1
    with pytest.raises(ExportError, match="tensor_0 must be the same tensor for all shapes"):
        export.check_weights(file, made[1].weights, graph.module)
    graph.module.codes[0] -= 1

    store = PlanStore(tmp_path)
    plan = store.add({**dict.fromkeys(WORDS, "x"), "name": "toy", "sizes": "T=5"}, file.read_bytes(), {}, 1.0)
    shared = inductor.read_weights(store, plan, "cpu")
    files = {case.path: case for case in made}
    spec = GraphSpec("toy.onnx", [graph.spec(name, v) for name, v in inputs.items()], made[0].spec.outputs)
    pairs = list(zip(shapes, files, strict=True))
    engine = InductorShapes(spec, pairs, frozenset(), lambda path, at: InductorEngine(path, at, weights=shared))
    for case, shape in zip(made, shapes, strict=True):
        feeds = case.feeds(shape["B"])
        (exact,) = case.exact(shape["B"]).values()
        np.testing.assert_allclose(engine(feeds)["latents"], exact, rtol=0, atol=1e-5)
    pointers = {id(engine._engines[key].weights) for key in engine._engines}
    assert pointers == {id(shared)}
    with pytest.raises(EngineError, match=r"shape of toy must be one of B=1,G=2,h=8,w=8; .* got B=1,G=1,h=8,w=8"):
        engine({**made[0].feeds(1), "key": np.zeros((1, 1, 16), np.float32)})
    plan.path.write_bytes(b"other")
    with pytest.raises(EngineError, match="its plan is damaged"):
        inductor.read_weights(store, plan, "cpu")
    with pytest.raises(EngineError, match=r"its weights lack first\.bias"):
        InductorEngine(made[0].path, made[0].spec, weights={})


def test_a_loop_is_told_what_every_size_has():
    """Another size may have been compiled for fewer batches, or without the conditional branch alone."""
    tensors = [TensorSpec("latents", "float32", ("B", 4, "h", 8)), TensorSpec("key", "float32", ("B", "G", 16))]
    spec = GraphSpec("unet.onnx", tensors, tensors[:1])

    def told(*more: tuple[int, int]) -> tuple[Any, frozenset[str]]:
        kinds = [(8, 1, 2), (8, 1, 1), (8, 4, 2), (8, 4, 1), *((12, *kind) for kind in more)]
        shapes = [({"B": batch, "G": branches, "h": h}, None) for h, batch, branches in kinds]
        engine = InductorShapes(spec, shapes, frozenset(), lambda plan, at: None)
        return engine.batches, engine.spec.branched

    assert told() == told((1, 2), (1, 1), (4, 2), (4, 1)) == ([1, 4], {"key"})
    assert told((1, 2), (1, 1), (4, 2)) == ([1, 4], frozenset())
    assert told((1, 2), (1, 1)) == ([1], {"key"}) and told((1, 2)) == ([1], frozenset())


def refusal(case: Case, path: Path | None = None, **settings) -> str:
    """The message with which a file is refused: one line, with the command that mends it."""
    with pytest.raises(EngineError) as caught:
        InductorEngine(path or case.path, settings.pop("spec", case.spec), **settings)
    message = str(caught.value)
    assert COMMAND in message and "\n" not in message
    return message


@pytest.mark.parametrize("content", ["missing", "empty", "truncated", "foreign", "archive"])
def test_a_file_that_is_no_compiled_graph(cases, tmp_path, content):
    case, path = cases["hand_prior"], tmp_path / "hand_prior.pt2"
    if content == "archive":
        torch.save({"weight": torch.zeros(3)}, path)
    elif content != "missing":
        whole = case.path.read_bytes()
        path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "foreign": b"text" * 999}[content])
    assert "damaged or no compiled graph" in refusal(case, path)


def test_a_file_of_another_graph(cases):
    words = "compiled from another graph than unet.onnx: it has x: float32[B, 330] where the bundle has latents: "
    assert words in refusal(cases["hand_prior"], spec=cases["unet"].spec)


def test_a_file_of_another_export(cases):
    """Nothing in the compiled code looks at shapes: such a call would read past the arrays."""
    case = cases["hand_prior"]
    text = next(tensor for tensor in case.spec.inputs if tensor.name == "text")
    wider = [dataclasses.replace(t, shape=("B", 2, 99)) if t is text else t for t in case.spec.inputs]
    assert "where the bundle has text: float32[B, 2, 99]" in refusal(
        case, spec=dataclasses.replace(case.spec, inputs=wider)
    )


@pytest.mark.parametrize(
    ("note", "words"),
    [
        ({"device": None}, "was not compiled by hd-export"),
        ({"processor": f"{platform.machine()} quantum"}, "needs a processor with quantum; this one has none"),
        ({"torch": "1.0"}, "compiled by PyTorch 1.0; this is"),
    ],
)
def test_a_file_of_another_machine(cases, tmp_path, note, words):
    assert words in refusal(cases["hand_prior"], rewritten(cases["hand_prior"].path, tmp_path, note))


def test_a_file_for_a_gpu_where_there_is_none(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    case = cases["hand_prior"]
    assert "an NVIDIA GPU, and PyTorch finds none" in refusal(case, rewritten(case.path, tmp_path, {"device": "cuda"}))
    assert "compiled for cpu, not for cuda" in refusal(case, device="cuda")


def rewritten(path: Path, folder: Path, note: dict[str, str | None]) -> Path:
    """A copy of a compiled file with other notes about where it was compiled."""
    copy = folder / path.name
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for entry in old.namelist():
            content = old.read(entry)
            if entry.endswith("_metadata.json"):
                merged = {**json.loads(content), **note}
                content = json.dumps({key: value for key, value in merged.items() if value is not None}).encode()
            new.writestr(entry, content)
    return copy


def test_without_pytorch_the_message_says_what_to_install(cases, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineError, match=r'no other backend does.*pip install "handiffuser\[export\]"'):
        InductorEngine(cases["unet"].path, cases["unet"].spec)


def test_failures_while_running(cases, monkeypatch):
    engine = cases["hand_prior"].engine()

    class Broken:
        def run(self, _):
            raise self.error

    engine._model = Broken()
    Broken.error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
    with pytest.raises(EngineError, match=r"not enough memory to run hand_prior.*--batch-size"):
        engine(cases["hand_prior"].feeds(1))
    Broken.error = RuntimeError("No such kernel.\nframe #0")
    with pytest.raises(EngineError, match=r"graph hand_prior failed: No such kernel\.$"):
        engine(cases["hand_prior"].feeds(1))


class OnFakeGpu(InductorDeviceEngine):
    """Numpy's memory in place of the GPU's, and a fake stream; all else is the engine's own."""

    def _tensor(self, array):
        return torch.from_numpy(self.gpu.view(array.pointer, array.nbytes).view(array.dtype).reshape(array.shape))

    def enqueue(self, stream):
        self.gpu.enqueue(stream.handle, Op("an inductor engine", [], [], self.run))


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", ["hand_prior", "unet"])
def test_on_bound_arrays_it_reads_and_writes_in_place(cases, name, captured):
    case, cuda, rows = cases[name], fake_cuda(), 2
    stream, feeds = cuda.stream(), case.feeds(3)
    want = case.engine()
    engine = OnFakeGpu(case.engine(asynchronous=True), "a pool" if captured else None)
    engine.gpu = cuda.api
    inputs = {name: cuda.zeros(value.shape, value.dtype) for name, value in feeds.items()}
    outputs = {
        tensor.name: cuda.zeros((3, *value.shape[1:]), tensor.dtype)
        for tensor, value in zip(case.spec.outputs, case.exact(1).values(), strict=True)
    }
    engine.bind({name: a[:rows] for name, a in inputs.items()}, {name: a[:rows] for name, a in outputs.items()})
    graph = None
    for order in ([0, 1], [2, 0]):  # bound once, run with whatever lies there by then
        now = {name: value[order] for name, value in feeds.items()}
        for name, value in now.items():
            pinned = cuda.pinned(value.shape, value.dtype)
            pinned[...] = value
            stream.copy(inputs[name][:rows], pinned)
            stream.synchronize()
        if graph is None:
            engine.enqueue(stream)
        if captured:
            graph = graph or stream.capture(lambda: engine.enqueue(stream))
            graph.launch(stream)
        stream.synchronize()
        for name, value in want(now).items():
            np.testing.assert_array_equal(cuda.api.value(outputs[name])[:rows], value)
            assert not cuda.api.value(outputs[name])[rows:].any(), "rows of others stay as they are"
    assert engine.capturable(stream) == captured and not engine.own_graph and not cuda.api.problems


def test_a_run_takes_its_memory_from_its_pool_on_our_stream(monkeypatch):
    """What it frees goes back there, so that a captured run writes nowhere else when it is replayed."""
    inside = []

    @contextlib.contextmanager
    def entered(what):
        inside.append(what)
        yield
        inside.remove(what)

    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle: f"stream {handle}")
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", entered)
    engine = InductorDeviceEngine(SimpleNamespace(spec=None), "pool")
    seen = []
    engine.run = lambda: seen.append([*inside])
    engine.enqueue(SimpleNamespace(handle=7))
    engine.pool = None
    engine.enqueue(SimpleNamespace(handle=8))
    assert seen == [["stream 7", "pool"], ["stream 8"]] and not inside and not engine.capturable(None)


def test_arrays_that_do_not_fit_are_refused_when_they_are_bound(cases):
    case, cuda = cases["unet"], fake_cuda()
    engine = OnFakeGpu(case.engine(asynchronous=True))
    engine.gpu = cuda.api
    inputs = {name: cuda.zeros(value.shape, value.dtype) for name, value in case.feeds(3).items()}
    with pytest.raises(EngineError, match=r"latents of shape \[3, 4, .*axis 0 must be 2"):
        engine.bind(inputs, {})
    with pytest.raises(EngineError, match="lacks its input latents"):
        engine.bind({}, {})


def add_files(folder, manifest, device="cuda", version=torch.__version__, wanted=Wanted(), graphs=ALL_GRAPHS):  # noqa: B008
    """Files as hd-export writes them, with other content; the UNet and its like also have weights."""
    store = PlanStore(folder)
    target = f"{device} sm_89" if device == "cuda" else f"{device} features"
    files = [(name, shape) for name, shape in wanted_files(manifest, wanted, device) if name in graphs]
    for name, shape in (*files, *((name, {"T": 3}) for name in PICTURES if name in graphs)):
        needed = parts(manifest, name, shape, "inductor", version, target, options_of(name))
        store.add(needed, f"{device} {name}".encode(), {}, 1.0)
    return store


def test_what_is_compiled_is_found_by_device_and_version(sized_bundle, tmp_path):
    manifest, own = Manifest.load(sized_bundle), (32, 32)

    def found(device, gpu=False):
        return find_compiled(tmp_path, manifest, Here(torch.__version__.partition("+")[0], gpu), device).device

    add_files(tmp_path, manifest, "cpu", "1.0.0")
    with pytest.raises(EngineError, match=r"no compiled text_encoder for PyTorch .* on cpu.*" + COMMAND):
        found("auto")
    add_files(tmp_path, manifest, "cpu")
    assert found("auto") == found("cpu") == "cpu"
    more = Wanted((1, 4), guidance_free=True, pictures=((24, 40),))
    add_files(tmp_path, manifest, wanted=more, graphs=ALL_GRAPHS[:-1])
    assert found("auto", gpu=True) == "cpu"
    with pytest.raises(EngineError, match=r"no compiled image_encoder .* on cuda"):
        found("cuda")
    add_files(tmp_path, manifest, wanted=more)
    assert found("auto", gpu=True) == "cuda" and found("cpu") == "cpu"
    compiled = find_compiled(tmp_path, manifest, Here(torch.__version__.partition("+")[0], True), "cuda")
    assert compiled.sizes == {own, (24, 40)} and set(compiled.weights) == set(PICTURES)
    assert compiled.batches(manifest, (24, 40)) == compiled.batches(manifest, own, 1) == [1, 4]
    assert compiled.plan("unet", manifest, (24, 40), 4, 1).parts["sizes"] == "B=4,G=1,h=6,w=10,L=78"
    assert compiled.plan("unet", manifest, (24, 40), 4, 1).shown(manifest) == "B=4,G=1,L=78 40x24"
    assert compiled.weights["unet"].shown(manifest) == "weights"


@pytest.fixture
def on_fake_gpu(sized_bundle, tmp_path, monkeypatch):
    """The toy bundle with "compiled" files for two sizes. What they name is computed by ONNX Runtime on a fake GPU."""
    folder, gpu = Path(shutil.copytree(sized_bundle, tmp_path / "toy")), FakeRuntime(1).install(monkeypatch)
    add_files(folder, Manifest.load(folder), wanted=Wanted((1, 4), pictures=((24, 40),)))
    engines, loads = load_engines(folder, "cpu", 1)[1], []

    class Loaded:
        def __init__(self, path, spec, device, threads, asynchronous, weights):
            assert device == "cuda" and asynchronous and PlanStore(folder).folder == path.parent
            assert (weights is not None) == (Path(spec.file).stem in PICTURES)
            self.spec = spec
            loads.append((Path(spec.file).stem, weights))

    class Engine(FakeDeviceEngine):
        def __init__(self, loaded, pool):
            name = Path(loaded.spec.file).stem
            super().__init__(gpu, engines[name], None, seconds=gpu.step if name == "unet" else 1e-6)
            assert pool == "a pool"
            self.spec = loaded.spec

    gpu.loads, gpu.folder, gpu.step = loads, folder, 1e-3
    monkeypatch.setattr(inductor, "InductorEngine", Loaded)
    monkeypatch.setattr(inductor, "InductorDeviceEngine", Engine)
    monkeypatch.setattr(inductor, "new_pool", lambda: "a pool")
    monkeypatch.setattr(inductor, "read_weights", lambda store, plan, device: {"of": plan.graph})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield gpu
    assert not gpu.problems


def test_two_sizes_in_the_loop_on_a_gpu(on_fake_gpu, all_at_once):
    """Steps are captured; a file is loaded for each shape that runs, and the weights once; other sizes are refused."""
    gpu, requests = on_fake_gpu, [Request(f"p{i}", seed=i, steps=3, size=(None, "40x24")[i % 2]) for i in range(6)]
    with HanDiffuser.load(gpu.folder, device="cpu") as on_cpu:
        expected = [picture.image.astype(int) for picture in on_cpu.generate(requests)]
    with HanDiffuser.load(gpu.folder, backend="inductor", device="cuda", batch_size=4) as pipeline:
        for picture, image in zip(pipeline.generate(requests), expected, strict=True):
            np.testing.assert_allclose(picture.image.astype(int), image, rtol=0, atol=1)
        assert gpu.calls["cudaGraphInstantiate"] > 4 and not pipeline.loop.warnings()
        assert len({id(weights) for name, weights in gpu.loads if name == "unet"}) == 1
        assert sum(name == "unet" for name, _ in gpu.loads) >= 2 and sum(n == "hand_prior" for n, _ in gpu.loads) == 1
        with pytest.raises(RequestError, match=r"got 64x32\. The nearest is 40x24\. Or build for it: hd-exp.* 64x32"):
            pipeline.generate("a fist", size="64x32")
    (plan,) = [plan for plan in PlanStore(gpu.folder) if plan.parts["sizes"].startswith("B=1,G=2,h=8,w=8")]
    plan.path.write_bytes(b"another program")
    with pytest.raises(EngineError, match="its plan is damaged"):
        HanDiffuser.load(gpu.folder, backend="inductor", device="cuda").generate("a fist")


def test_auto_takes_what_was_measured_to_be_faster(on_fake_gpu, monkeypatch):
    """By the fake GPU's clock: beside ONNX Runtime's kernels, which take a microsecond there."""
    gpu = on_fake_gpu
    FakeOnnxRuntime(gpu).install(monkeypatch)

    def chosen():
        return choose(gpu.folder, "auto", "auto").backend

    assert chosen() == "onnxruntime", "nothing was measured"
    slow = timing.beside_onnxruntime(gpu.folder)
    assert slow.fast == pytest.approx(1e-3) and slow.exact < 1e-4 and chosen() == "onnxruntime"
    gpu.step = 1e-8
    assert timing.beside_onnxruntime(gpu.folder).passes and chosen() == "inductor"
    assert has_plans(gpu.folder), "with adapters, auto looks at the adapted bundle, which has nothing compiled"
    gpu.capability = (9, 0)
    assert chosen() == "onnxruntime", "it was compiled for another GPU"


class Undecided(nn.Module):
    """Nothing that can be exported: its way depends on its values."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


def test_a_graph_that_cannot_be_compiled_leaves_the_older_file(tmp_path):
    path = tmp_path / "toy.pt2"
    path.write_text("older")
    with pytest.raises(ExportError, match="toy could not be compiled for cpu") as caught:
        compile_graph(Graph("toy", Undecided(), {"x": torch.zeros(2, 3)}, ("x",)), path)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


def test_what_compiling_needs_is_asked_for_first(tmp_path, monkeypatch):
    graph = Graph("toy", nn.Identity(), {"x": torch.zeros(2, 3)}, ("x",))
    with pytest.raises(ExportError, match="device must be cpu or cuda, got 'tpu'"):
        compile_graph(graph, tmp_path / "toy.pt2", device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ExportError, match=r"no usable GPU.*nvidia-smi"):
        compile_graph(graph, tmp_path / "toy.pt2", device="cuda")

    def missing():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(export, "get_cpp_compiler", missing)
    with pytest.raises(ExportError, match=r"C\+\+ compiler.*apt install"):
        compile_graph(graph, tmp_path / "toy.pt2")


def test_a_message_of_the_cpp_compiler_comes_through():
    error = RuntimeError(
        "C++ compile error\n\nCommand:\ng++ -O3\n\nOutput:\nx.cpp:1:9: fatal error: omp.h: No such file"
    )
    assert export.sentence(error) == "x.cpp:1:9: fatal error: omp.h: No such file."


@pytest.fixture
def tf32_on():
    """PyTorch's flags as a careless script would set them; afterwards as they were."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    yield lambda: any(backend.allow_tf32 for backend in backends)
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


@pytest.mark.slow
def test_float32_is_compiled_without_tf32(tiny_checkpoint, body_path, tmp_path, monkeypatch, tf32_on):
    seen = []

    def compile_nothing(*_, **__):
        seen.append(tf32_on())
        raise RuntimeError("enough seen")

    monkeypatch.setattr(export, "aoti_compile_and_package", compile_nothing)
    graph = next(g for g in graphs(tiny_checkpoint, SMPLH.load(body_path)) if g.name == "hand_features")
    with pytest.raises(ExportError, match="enough seen"):
        compile_graph(graph, tmp_path / "x.pt2")
    assert seen == [False]


@pytest.mark.slow
@pytest.mark.parametrize(("device", "name"), [("cuda", "cuda:0"), ("cpu", "cpu")])
def test_programs_are_moved_to_where_tensors_say_they_are(
    tiny_checkpoint, body_path, tmp_path, monkeypatch, device, name
):
    """Inductor compares names of devices, and a tensor on the GPU says cuda:0."""

    def move(program, to):
        raise RuntimeError(f"moved to {to}.")

    monkeypatch.setattr(export, "check_tools", lambda device: None)
    monkeypatch.setattr(export, "origin", lambda device: {})
    monkeypatch.setattr(export, "move_to_device_pass", move)
    graph = next(g for g in graphs(tiny_checkpoint, SMPLH.load(body_path)) if g.name == "hand_features")
    with pytest.raises(ExportError, match=f"moved to {name}\\."):
        compile_graph(graph, tmp_path / "x.pt2", device)


def test_float32_runs_without_tf32_on_a_gpu(monkeypatch, tf32_on):
    class Loader:
        def __init__(self, *_):
            pass

        @staticmethod
        def load_metadata_from_package(path, name):
            return {"device": "cuda"}

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", Loader)
    monkeypatch.setattr(InductorEngine, "_check_origin", lambda *_: None)
    InductorEngine("x.pt2", GraphSpec("x.onnx", [], []), "cuda")
    assert not tf32_on()
