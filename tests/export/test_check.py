"""What may go wrong while a bundle is made is said in a sentence, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from commands import listen
from handiffuser.calibration.emulate import emulate_bundle
from handiffuser.contract import GraphSpec, Manifest, file_digest
from handiffuser.engines.plans import FOLDER as PLANS
from handiffuser.errors import ExportError
from handiffuser.export import bundle, check
from handiffuser.export.graphs import PRECISIONS, Graph, in_precision
from handiffuser.export.workspace import KEPT, install, workspace
from handiffuser.models.checkpoint import random_checkpoint
from handiffuser.models.configs import CONFIGS
from handiffuser.runtime.pipeline import HanDiffuser
from onnx import TensorProto, helper
from torch import Tensor, nn

CUES = [
    (), ("joints",), ("rotations",), ("vertices",), ("joints", "rotations"), ("joints", "vertices"),
    ("rotations", "vertices"), ("joints", "rotations", "vertices"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("cues", [("rotations",), ("joints", "rotations")], ids="+".join)
def test_rotations_without_vertices_in_half(cues, body_path, tmp_path):
    """ONNX Runtime 1.32 crashed while it loaded this graph."""
    checkpoint = random_checkpoint(replace(CONFIGS["tiny"], cues=cues), seed=3, body=body_path)
    body = bundle.SMPLH.load(body_path)
    pairs = zip(bundle.graphs(checkpoint, body, torch.float16), bundle.graphs(checkpoint, body), strict=True)
    graph, reference = next(pair for pair in pairs if pair[0].name == "text_hand_encoder")
    spec = bundle.export_graph(graph, tmp_path, bundle.OPSET)
    assert "GatherND" not in {node.op_type for node in onnx.load(tmp_path / spec.file).graph.node}
    assert bundle.parity(graph, reference.module, tmp_path / spec.file, "fp16")[0] <= 5e-3


@pytest.fixture(scope="module")
def networks() -> dict[tuple[str, int], dict[str, GraphSpec]]:
    """Exports of the UNet: it sees of the cues only how many tokens they are, so sets of as many tokens share one."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cues", CUES, ids=lambda cues: "+".join(cues) or "none")
def test_all_sets_of_cues_export_and_run(
    cues, precision, body_path, tiny_checkpoint, networks, request, tmp_path, tmp_path_factory
):
    """In every precision. What the cues do not touch comes from the tiny checkpoint's bundle."""
    whole = request.getfixturevalue({"fp32": "tiny_bundle", "fp16": "tiny_half", "bf16": "tiny_bf16"}[precision])
    made = random_checkpoint(replace(CONFIGS["tiny"], cues=cues), seed=3, body=body_path)
    checkpoint = replace(made, unet=tiny_checkpoint.unet, position_kernel=tiny_checkpoint.position_kernel)
    tokens, body = checkpoint.text_hand_encoder.num_tokens, bundle.SMPLH.load(body_path)
    folder, manifest = tmp_path / "bundle", Manifest.load(whole)
    folder.mkdir()
    for name in manifest.files:
        (folder / name).write_bytes((whole / name).read_bytes())
    shared = tmp_path_factory.getbasetemp() / f"unet-{precision}-{tokens}"
    has_unet = (precision, tokens) in networks or tokens == tiny_checkpoint.text_hand_encoder.num_tokens
    shared.mkdir(exist_ok=True)
    for graph, reference in zip(
        bundle.graphs(checkpoint, body, PRECISIONS[precision]), bundle.graphs(checkpoint, body), strict=True
    ):
        unet = graph.name in ("unet_context", "unet")
        if graph.name != "text_hand_encoder" and (not unet or has_unet):
            continue
        out = shared if unet else folder
        manifest.graphs[graph.name] = spec = bundle.export_graph(graph, out, bundle.OPSET)
        error, _ = bundle.parity(graph, reference.module, out / spec.file, precision)
        assert error <= bundle.TOLERANCE[precision], graph.name
        if unet:
            networks.setdefault((precision, tokens), {})[graph.name] = spec
    for name, spec in networks.get((precision, tokens), {}).items():
        manifest.graphs[name] = spec
        (folder / spec.file).write_bytes((shared / spec.file).read_bytes())
    manifest.files = {name: file_digest(folder / name) for name in manifest.files}
    manifest.save(folder)
    inputs = {spec.name for spec in manifest.graphs["text_hand_encoder"].inputs}
    assert all((name in inputs) == (cue in cues) for name, cue in (("bps", "vertices"), ("joints", "joints")))
    if precision == "bf16":
        emulate_bundle(folder, tmp_path / "emulated")
        folder = tmp_path / "emulated"
    picture = HanDiffuser.load(folder).generate("a left hand", steps=2)[0]
    assert picture.image.shape == (32, 48, 3)


def test_what_a_graph_gives_is_read_off_it(tiny_half):
    """And is what PyTorch says: here with the module that computes in half."""
    spec = Manifest.load(tiny_half).graphs["unet_context"].outputs[0]
    assert spec.dtype == "float16" and spec.shape[0] == "B" and spec.shape[1] == "G"


def test_half_precision_shares_no_weight_and_float32_shares_all(tiny_checkpoint):
    encoder = tiny_checkpoint.text_encoder
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    same, half = in_precision(encoder, torch.float32), in_precision(encoder, torch.float16)
    for name, tensor in encoder.state_dict().items():
        assert same.state_dict()[name].data_ptr() == tensor.data_ptr()
        assert half.state_dict()[name].dtype == torch.float16 and torch.equal(tensor, before[name])
    assert same is not encoder and not any(p.requires_grad for p in same.parameters())


def test_no_stage_is_computed_in_half(tiny_checkpoint, body_path):
    """PyTorch's CPU kernels for it are slow: the SD-1.5 decoder took minutes."""
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float16 and function in HEAVY:
                seen.append(function)
            return out

    HEAVY = (nn.functional.linear, nn.functional.conv2d, torch.matmul, nn.functional.scaled_dot_product_attention)
    with Watch():
        names = [g.name for g in bundle.graphs(tiny_checkpoint, bundle.SMPLH.load(body_path), torch.float16)]
    assert len(names) == 9 and not seen


def adder(tmp_path: Path, amount: float) -> tuple[Graph, Path]:
    """x -> x, x + amount; and a graph of the contract for it."""
    path = tmp_path / "adder.onnx"
    x, y, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 2]) for name in "xyz")
    nodes = [helper.make_node("Add", ["x", "a"], ["y"]), helper.make_node("Identity", ["x"], ["z"])]
    amounts = [helper.make_tensor("a", TensorProto.FLOAT, [1], [amount])]
    model = helper.make_model(
        helper.make_graph(nodes, "adder", [x], [y, z], amounts), opset_imports=[helper.make_opsetid("", 21)]
    )
    model.ir_version = 10
    onnx.save(model, path)
    return Graph("adder", nn.Identity(), {"x": torch.ones(3, 2)}, ("y", "z")), path


class Reference(nn.Module):
    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.amount, x


def test_parity_never_loses_nan(tmp_path):
    """A later output that agrees does not make up for it."""
    graph, path = adder(tmp_path, 1.0)
    assert bundle.parity(graph, Reference(1.0), path) == (0.0, "y")
    assert bundle.parity(graph, Reference(3.0), path) == (0.5, "y")
    for value in (float("nan"), float("inf")):
        with pytest.raises(ExportError, match=r"gives NaN or infinity in float32 PyTorch already \('y'\)"):
            bundle.parity(graph, Reference(value), path)
        broken, path = adder(tmp_path, value)
        with pytest.raises(ExportError, match="gives NaN or infinity in 'y' where PyTorch does not"):
            bundle.parity(broken, Reference(1.0), path)


def test_parity_sees_a_lost_axis(tmp_path):
    """One row for three would otherwise be repeated, and agree."""
    graph, path = adder(tmp_path, 1.0)

    class OneRow(Reference):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:1] + 1, x

    with pytest.raises(ExportError, match=r"'y' has shape \[3, 2\], and \[1, 2\] in PyTorch"):
        bundle.parity(graph, OneRow(1.0), path)


@pytest.mark.slow
def test_nan_in_a_weight_is_no_bundle(tiny_checkpoint, tmp_path):
    """Even where loading did not look: the first graph that shows it is named."""
    broken = replace(tiny_checkpoint, text_encoder=in_precision(tiny_checkpoint.text_encoder, torch.float64).float())
    next(broken.text_encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(ExportError, match="text_encoder gives NaN or infinity in float32 PyTorch already"):
        bundle.export_bundle(broken, tmp_path / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "os.kill(os.getpid(), 11)",
            r"crashed \(SIGSEGV\) over adder in fp16.*another --opset, or with --precision fp32",
        ),
        ("os.kill(os.getpid(), 9)", "was killed, most often because memory ran out"),
        ("sys.exit('Cannot load it.')", "does not run adder, so nothing was written: Cannot load it."),
    ],
    ids=["crash", "killed", "refused"],
)
def test_what_ends_the_check_is_named(line, says, tmp_path, monkeypatch):
    graph, path = adder(tmp_path, 1.0)
    (tmp_path / "ending.py").write_text(f"import os, sys\n{line}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(check, "__name__", "ending")
    with pytest.raises(ExportError, match=says):
        bundle.parity(graph, Reference(1.0), path, "fp16")
    assert {file.name for file in tmp_path.iterdir()} <= {"adder.onnx", "ending.py", "__pycache__"}


def test_the_check_loads_no_pytorch(tmp_path):
    code = "import sys, handiffuser.export.check; sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_file_that_is_no_graph(tmp_path):
    graph, path = adder(tmp_path, 1.0)
    path.write_bytes(b"no graph")
    with pytest.raises(ExportError, match="does not run adder, so nothing was written"):
        bundle.parity(graph, Reference(1.0), path)


def test_a_full_disk_is_named_and_finished_graphs_stay(tmp_path):
    said = re.escape(f"The disk of {tmp_path} is full. Free some space")
    with pytest.raises(ExportError, match=said), workspace(tmp_path / "b") as folder:
        (folder / "bundle" / KEPT).mkdir(parents=True)
        (folder / "bundle" / KEPT / "unet.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")  # as onnx_ir and numpy raise it, without a name
    assert (folder / "bundle" / KEPT / "unet.json").exists()
    with pytest.raises(PermissionError), workspace(tmp_path / "b"):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_workspace_is_one_process_s_alone(tmp_path):
    with workspace(tmp_path / "b") as folder:
        assert folder.name == ".b.partial" and not list(folder.iterdir())
        with pytest.raises(ExportError, match="Another process is exporting into"), workspace(tmp_path / "b"):
            pass
        with workspace(tmp_path / "c"):
            pass
        (folder / "half done").write_text("")
    assert not list(tmp_path.iterdir())


def test_installing_keeps_plans_at_any_moment_of_a_kill(tmp_path, monkeypatch):
    """After each move in turn nothing more happens; the next workspace finds an older or the newer bundle, whole."""

    class KilledError(BaseException):
        pass

    for moves in range(4):
        out = tmp_path / str(moves) / "b"
        (out / PLANS).mkdir(parents=True)
        (out / "graph").write_text("old")
        (out / PLANS / "plan").write_text("")
        count, move = iter(range(9)), Path.replace

        def replace_some(self, target, count=count, moves=moves, move=move):
            if next(count) == moves:
                raise KilledError
            return move(self, target)

        with workspace(out) as folder:
            (folder / "new").mkdir()
            (folder / "new" / "graph").write_text("new")
            monkeypatch.setattr(Path, "replace", replace_some)
            try:
                install(folder / "new", out)
            except KilledError:
                left = {path.name: path for path in folder.iterdir()}
                stays = tmp_path / f"{moves}-left"
                move(folder, stays)
            monkeypatch.undo()
        if moves < 3:
            assert left
            move(stays, folder)
        with workspace(out):
            pass
        assert (out / PLANS / "plan").exists() and (out / "graph").read_text() == ("old" if moves < 2 else "new")
        assert [path.name for path in out.parent.iterdir()] == ["b"]


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "handiffuser.export.cli", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen, start_new_session=True)


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str]) -> None:
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def listens(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; how soon it has one depends on the machine."""
    if not Path("/proc/self/status").exists():
        time.sleep(2)
        return True
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


def of_session(leader: int) -> list[str]:
    """The processes that a command, the leader of its session, has started and that still run."""
    found = subprocess.run(["ps", "-s", str(leader), "-o", "pid=,stat=,args="], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if " Z" not in line and not line.strip().startswith(f"{leader} ")]


def all_end(leader: int) -> None:
    """One that was killed may take a moment where the machine is busy."""
    deadline = time.monotonic() + 20
    while of_session(leader) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not of_session(leader)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_killed_export_leaves_nothing_that_the_next_one_does_not_clear(tiny_checkpoint_folder, tmp_path):
    """Nor does its child go on."""
    process = start(tiny_checkpoint_folder, tmp_path / "b")
    wait_for(".b.partial/bundle/.check-*", tmp_path, process)
    process.kill()
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".b.partial"]
    all_end(process.pid)
    with workspace(tmp_path / "b") as folder:
        assert not list(folder.iterdir())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(
    ("where", "numbers"),
    [
        ("at once", [signal.SIGINT]),
        ("at once", [signal.SIGTERM, signal.SIGTERM]),
        pytest.param("comparing", [signal.SIGINT], marks=pytest.mark.slow),
        pytest.param("comparing", [signal.SIGTERM, signal.SIGTERM], marks=pytest.mark.slow),
        pytest.param("tracing", [signal.SIGINT], marks=pytest.mark.slow),
        pytest.param("tracing", [signal.SIGTERM, signal.SIGTERM], marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "Ctrl-C" if len(value) == 1 else "kill twice",
)
def test_one_signal_ends_an_export(where, numbers, tiny_checkpoint_folder, tmp_path):
    process = start(tiny_checkpoint_folder, tmp_path / "b")
    if where == "at once":
        while not listens(process.pid, signal.SIGTERM):
            time.sleep(0.01)
    else:
        wait_for(".b.partial/bundle" + ("/.check-*" if where == "comparing" else ""), tmp_path, process)
    began = time.monotonic()
    for number in numbers:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert time.monotonic() - began < 10, "the machine may be busy for a part of it"
    assert "Traceback" not in errors
    assert errors.strip().endswith("hd-export: Stopped. What is finished stays; the same command goes on.")
    assert not list(tmp_path.iterdir())
    all_end(process.pid)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("onnxruntime", r"\[cpu\]; \[cuda\]"),
        pytest.param("diffusers", r"\[export\]", marks=pytest.mark.slow),
    ],
)
def test_the_module_that_is_missing_is_named(module, extra, tiny_checkpoint_folder, tmp_path):
    code = (
        "import sys, importlib.abc\n"
        "module = sys.argv[1]\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] == module:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from handiffuser import commands\n"
        "sys.argv = ['hd-export', *sys.argv[2:]]\n"
        "commands.hd_export()\n"
    )
    command = [sys.executable, "-c", code, module, tiny_checkpoint_folder, tmp_path / "bundle"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(rf"needs {module}, which is not installed\. It comes with handiffuser{extra}", result.stderr)
