"""The inductor backend: compiled graphs agree with PyTorch, and a file or feed that does not fit is one sentence."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings.runtime")

from fake_runtime import Op, fake_cuda
from handiffuser import EngineError, ExportError
from handiffuser.contract import ALL_GRAPHS, GraphSpec, Manifest
from handiffuser.engines import inductor
from handiffuser.engines.inductor import InductorDeviceEngine, InductorEngine, find_compiled
from handiffuser.engines.plans import PlanStore, parts
from handiffuser.engines.tensorrt import Options
from handiffuser.export import inductor as export
from handiffuser.export.bundle import run_module
from handiffuser.export.graphs import Graph, graphs
from handiffuser.export.inductor import compile_graph
from handiffuser.models.smplh import SMPLH
from torch import Tensor, nn
from torch._inductor import config

COMPILED = {"hand_prior": None, "unet": None, "unet_context": 2}  # graph -> its only batch size
COMMAND = "hd-export CHECKPOINT OUT --backend inductor"


@dataclasses.dataclass
class Case:
    graph: Graph
    spec: GraphSpec
    path: Path

    def feeds(self, batch: int) -> dict[str, np.ndarray]:
        rows = np.arange(batch)
        return {name: value.numpy()[rows % len(value)] for name, value in self.graph.inputs.items()}

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


@pytest.fixture(scope="module")
def cases(tiny_checkpoint, body_path, tmp_path_factory) -> dict[str, Case]:
    folder, made = tmp_path_factory.mktemp("inductor"), {}
    for graph in graphs(tiny_checkpoint, SMPLH.load(body_path)):
        if graph.name in COMPILED:
            graph = dataclasses.replace(graph, sized=())  # of one size, as it is compiled
            case = Case(graph, GraphSpec(f"{graph.name}.onnx", [], []), folder / f"{graph.name}.pt2")
            case.spec.inputs = [graph.spec(name, value) for name, value in graph.inputs.items()]
            case.spec.outputs = [graph.spec(name, value) for name, value in case.exact(2).items()]
            with config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # a third of the time
                compile_graph(graph, case.path, batch=COMPILED[graph.name])
            made[graph.name] = case
    assert sorted(file.stem for file in folder.iterdir()) == sorted(COMPILED), "the compiler left something behind"
    return made


@pytest.fixture(scope="module")
def prior(cases) -> InductorEngine:
    return InductorEngine(cases["hand_prior"].path, cases["hand_prior"].spec, threads=1)


# 40: diffusers treats batches from 32 on otherwise, which must not be baked in.
@pytest.mark.parametrize(
    ("name", "batch"),
    [("hand_prior", 1), ("hand_prior", 3), ("unet", 1), ("unet", 3), ("unet", 40), ("unet_context", 2)],
)
def test_agrees_with_pytorch(cases, name, batch):
    case = cases[name]
    engine = InductorEngine(case.path, case.spec, device="cpu", threads=1)
    assert engine.device == "cpu" and engine.batch == COMPILED[name]
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
    case = cases["unet_context"]
    engine = InductorEngine(case.path, case.spec, threads=1)
    with pytest.raises(EngineError, match=r"context of shape \[3, 2, .*B is exactly 2.*--batch-sizes 3"):
        engine(case.feeds(3))


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
    engine = InductorEngine(cases["hand_prior"].path, cases["hand_prior"].spec, threads=1)

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


@pytest.mark.parametrize("name", ["hand_prior", "unet_context"])
def test_on_bound_arrays_it_reads_and_writes_in_place(cases, name):
    case, cuda, rows = cases[name], fake_cuda(), 2
    stream, feeds = cuda.stream(), case.feeds(3)
    want = InductorEngine(case.path, case.spec, threads=1)
    engine = OnFakeGpu(InductorEngine(case.path, case.spec, threads=1, asynchronous=True))
    engine.gpu = cuda.api
    inputs = {name: cuda.zeros(value.shape, value.dtype) for name, value in feeds.items()}
    outputs = {
        tensor.name: cuda.zeros((3, *value.shape[1:]), tensor.dtype)
        for tensor, value in zip(case.spec.outputs, case.exact(1).values(), strict=True)
    }
    engine.bind({name: a[:rows] for name, a in inputs.items()}, {name: a[:rows] for name, a in outputs.items()})
    for order in ([0, 1], [2, 0]):  # bound once, run with whatever lies there by then
        now = {name: value[order] for name, value in feeds.items()}
        for name, value in now.items():
            pinned = cuda.pinned(value.shape, value.dtype)
            pinned[...] = value
            stream.copy(inputs[name][:rows], pinned)
            stream.synchronize()
        engine.enqueue(stream)
        stream.synchronize()
        for name, value in want(now).items():
            np.testing.assert_array_equal(cuda.api.value(outputs[name])[:rows], value)
            assert not cuda.api.value(outputs[name])[rows:].any(), "rows of others stay as they are"
    assert not engine.capturable(stream) and not engine.own_graph


def test_arrays_that_do_not_fit_are_refused_when_they_are_bound(cases):
    case, cuda = cases["unet_context"], fake_cuda()
    engine = OnFakeGpu(InductorEngine(case.path, case.spec, threads=1, asynchronous=True))
    engine.gpu = cuda.api
    inputs = {name: cuda.zeros(value.shape, value.dtype) for name, value in case.feeds(3).items()}
    with pytest.raises(EngineError, match=r"context of shape \[3, 2, .*B is exactly 2"):
        engine.bind(inputs, {})
    with pytest.raises(EngineError, match="lacks its input context"):
        engine.bind({}, {})


def test_what_is_compiled_is_found_by_device_and_version(toy_bundle, tmp_path, monkeypatch):
    manifest, store = Manifest.load(toy_bundle), PlanStore(tmp_path)

    def add(target, version=torch.__version__, graphs=ALL_GRAPHS):
        for name in graphs:
            wanted = parts(manifest, name, {"B": (1, 2, 4096)}, "inductor", version, f"{target} features", Options())
            store.add(wanted, f"{target} {name}".encode(), {}, 1.0)

    def found(device):
        target, plans = find_compiled(tmp_path, manifest, device)
        assert set(plans) == set(ALL_GRAPHS)
        assert all(store.read(plan) == f"{target} {name}".encode() for name, plan in plans.items())
        return target

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    add("cpu", "1.0.0")
    with pytest.raises(EngineError, match=r"no compiled text_encoder for PyTorch .* on cpu.*" + COMMAND):
        found("auto")
    add("cpu")
    assert found("auto") == found("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    add("cuda", graphs=ALL_GRAPHS[:-1])
    assert found("auto") == "cpu"
    with pytest.raises(EngineError, match=r"no compiled image_encoder .* on cuda"):
        found("cuda")
    add("cuda")
    assert found("auto") == "cuda" and found("cpu") == "cpu"

    # For the GPU's loop a file is loaded once, and bound for each bucket.
    made = []

    class Loaded:
        def __init__(self, path, spec, device, asynchronous):
            self.path, self.spec = path, spec
            made.append((spec.file, device, asynchronous))

    monkeypatch.setattr(inductor, "InductorEngine", Loaded)
    load = inductor.device_engines("inductor", tmp_path, manifest, None, lambda _: None, 4).load
    engines = [load(name, bucket, 2) for name, bucket in (("unet", 1), ("unet", 4), ("hand_prior", 1))]
    assert len(set(map(id, engines))) == 3 and [engine.spec.file for engine in engines[1:]] == [
        "unet.onnx",
        "hand_prior.onnx",
    ]
    assert made == [("unet.onnx", "cuda", True), ("hand_prior.onnx", "cuda", True)]
    find_compiled(tmp_path, manifest, "cuda")[1]["unet_time"].path.write_bytes(b"another program")
    with pytest.raises(EngineError, match="SHA-256 differs"):
        load("unet_time", 1, 2)


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
            return {"device": "cuda", "batch": ""}

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", Loader)
    monkeypatch.setattr(InductorEngine, "_check_origin", lambda *_: None)
    InductorEngine("x.pt2", GraphSpec("x.onnx", [], []), "cuda")
    assert not tf32_on()
