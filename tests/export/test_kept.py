"""An export that was stopped goes on: finished graphs are taken by their content, and never a wrong one."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from commands import listen, run_command
from handiffuser.calibration.fidelity import Report
from handiffuser.contract import ALL_GRAPHS, GraphSpec, Manifest
from handiffuser.export import bundle, kept, weights
from handiffuser.export.bundle import export_bundle
from handiffuser.export.cli import command
from handiffuser.export.graphs import graphs
from handiffuser.models import lora
from handiffuser.models.smplh import SMPLH
from handiffuser.shipped import checkpoint_path
from safetensors.torch import save_file


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The names of graphs as they are made, by a stand-in for PyTorch's exporter and the check."""
    names: list[str] = []

    def export_graph(graph, folder, opset):
        names.append(graph.name)
        total = sum(float(value.double().sum()) for value in graph.module.state_dict().values())
        (folder / f"{graph.name}.onnx").write_text(f"{graph.name} {total} {opset}")
        (folder / f"{graph.name}.onnx.data").write_text(f"{total}")
        return GraphSpec(f"{graph.name}.onnx", [graph.spec(n, v) for n, v in graph.inputs.items()], [])

    monkeypatch.setattr(bundle, "export_graph", export_graph)
    monkeypatch.setattr(bundle, "parity", lambda *_: (1e-7, "text"))
    for room in (bundle, weights):  # the command takes it from its own module
        monkeypatch.setattr(room, "record_weights", lambda *_: None)
    monkeypatch.setattr(bundle, "is_demo_body", lambda _: True)
    monkeypatch.setattr(bundle.SMPLH, "load", functools.cache(SMPLH.load))
    return names


def stop_at(graph, when="tracing"):
    """For on_step: Ctrl-C when this begins."""

    def on_step(name, step):
        if (name, step) == (graph, when):
            raise KeyboardInterrupt

    return on_step


def stopped(checkpoint, out, graph="unet_context", **options):
    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint, out, on_step=stop_at(graph), **options)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("number", "when"), [(0, "tracing"), (4, "comparing")])
def test_what_is_finished_stays(made, tiny_checkpoint, tmp_path, number, when):
    export_bundle(tiny_checkpoint, tmp_path / "undisturbed")
    made.clear()
    graph = ALL_GRAPHS[number]
    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny_checkpoint, tmp_path / "b", on_step=stop_at(graph, when))
    work = tmp_path / ".b.partial"
    assert sorted(path.stem for path in work.glob("bundle/.kept/*.json")) == sorted(ALL_GRAPHS[:number])
    assert work.exists() == bool(number) and not (tmp_path / "b").exists()
    made.clear()
    results = export_bundle(tiny_checkpoint, tmp_path / "b")
    assert made == list(ALL_GRAPHS[number:])
    assert [result.kept for result in results] == [True] * number + [False] * (len(ALL_GRAPHS) - number)
    assert content(tmp_path / "b") == content(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "undisturbed"]


def test_what_was_changed_is_made_again(made, tiny_checkpoint, tmp_path):
    """Of seven finished graphs six are damaged, each in another way."""
    stopped(tiny_checkpoint, tmp_path / "b", "image_decoder")
    folder = tmp_path / ".b.partial" / "bundle"
    (folder / "text_encoder.onnx").write_text("other")
    (folder / "hand_prior.onnx.data").write_text("")
    (folder / "hand_features.onnx.data").unlink()
    (folder / ".kept/text_hand_encoder.json").write_text("{")
    change(folder / ".kept/unet_context.json", "1e-07", "1e-09")  # its error
    (folder / ".kept/unet.json").write_bytes((folder / ".kept/unet_time.json").read_bytes())
    (folder / "image_decoder.onnx").write_text("half written")
    made.clear()
    export_bundle(tiny_checkpoint, tmp_path / "b")
    assert made == [name for name in ALL_GRAPHS if name != "unet_time"]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert not (tmp_path / "b" / ".kept").exists() and "half" not in (tmp_path / "b" / "image_decoder.onnx").read_text()


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def with_adapter(checkpoint, folder):
    """Another UNet, as with --lora."""
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    ranks = {f"{layer}.lora_A.weight": torch.ones(1, 32), f"{layer}.lora_B.weight": torch.ones(32, 1)}
    save_file(ranks, folder / "adapter.safetensors")
    other = replace(checkpoint, unet=copy.deepcopy(checkpoint.unet))
    lora.merge(other, folder / "adapter.safetensors")
    (folder / "adapter.safetensors").unlink()
    return other


def another_body(folder):
    """The demo's, a little larger: a body of a user."""
    with np.load(checkpoint_path() / "body" / "smplh.npz") as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(folder / "body.npz", **{**arrays, "v_template": 1.01 * arrays["v_template"]})
    return folder / "body.npz"


@pytest.mark.slow
def test_another_command_takes_nothing_that_differs(made, tiny_checkpoint, tmp_path, monkeypatch):
    """The first five graphs are finished; then something is another. What comes before it is the same."""
    (tmp_path / "else").mkdir()
    others = {
        "the same": (tiny_checkpoint, {}, 5),
        "precision": (tiny_checkpoint, {"precision": "fp16"}, 0),
        "opset": (tiny_checkpoint, {"opset": 22}, 0),
        "size": (bundle.at_image_size(tiny_checkpoint, 48, 32), {}, 0),
        "body": (tiny_checkpoint, {"body": another_body(tmp_path / "else")}, 2),
        "adapter": (with_adapter(tiny_checkpoint, tmp_path / "else"), {}, 4),
        "source": (tiny_checkpoint, {"source": {"checkpoint": "touched"}}, 5),
    }
    stopped(tiny_checkpoint, tmp_path / "b", "unet_time")
    for name, (checkpoint, options, taken) in others.items():
        out = tmp_path / name / "b"
        shutil.copytree(tmp_path / ".b.partial", tmp_path / name / ".b.partial")
        made.clear()
        export_bundle(checkpoint, out, **options)
        assert made == list(ALL_GRAPHS[taken:]), name
        assert [path.name for path in out.parent.iterdir()] == ["b"], name
    monkeypatch.setattr(kept, "code_digest", lambda: "other code or libraries")
    made.clear()
    export_bundle(tiny_checkpoint, tmp_path / "b")
    assert made == list(ALL_GRAPHS)


def test_every_weight_of_a_graph_is_in_its_key(tiny_checkpoint):
    """FIRST says which parts a graph depends on; its modules say whose weights they hold."""
    body = SMPLH.load(tiny_checkpoint.body)
    parts = {**tiny_checkpoint.modules(), "body": body}
    owner = {t.data_ptr(): part for part, m in parts.items() for t in (*m.parameters(), *m.buffers()) if t.numel() > 1}
    assert list(kept.FIRST) == list(ALL_GRAPHS) and {part for new in kept.FIRST.values() for part in new} == set(parts)
    known: set[str] = set()
    for graph in graphs(tiny_checkpoint, body):
        known |= set(kept.FIRST[graph.name])
        tensors = [*graph.module.parameters(), *graph.module.buffers()]
        held = {owner[tensor.data_ptr()] for tensor in tensors if tensor.data_ptr() in owner}
        assert held and held <= known, graph.name


@pytest.mark.slow
def test_stopped_while_precisions_are_compared(made, tiny_checkpoint_folder, tmp_path, monkeypatch):
    """Nothing is made again, neither of the candidate nor of what it is compared with."""
    calls = []

    def fidelity(*_):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return Report("fp16", "cpu", False, 1e-3, {}, [])

    monkeypatch.setattr("handiffuser.export.lower.fidelity", fidelity)
    monkeypatch.setattr(Report, "passes", property(lambda _: True))
    monkeypatch.setattr(Report, "summary", lambda _: "")
    monkeypatch.setattr(Report, "to_json", lambda _: {})
    line = [str(tiny_checkpoint_folder), str(tmp_path / "b"), "--precision", "fp16"]
    assert CliRunner().invoke(command, line, standalone_mode=False).exit_code == 1
    assert made == [*ALL_GRAPHS, *ALL_GRAPHS]
    assert sorted(path.name for path in (tmp_path / ".b.partial").iterdir()) == ["bundle", "fp32"]
    made.clear()
    result = CliRunner().invoke(command, line, standalone_mode=False)
    assert result.exit_code == 0, result.output
    assert not made and result.output.count("finished by the export that was stopped") == len(ALL_GRAPHS)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert Manifest.load(tmp_path / "b").precision == "fp16"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_real_export_that_is_killed_after_its_second_graph_and_stopped_after_its_fourth(
    tiny_checkpoint_folder, tiny_bundle, tmp_path
):
    """The last run makes the other four, and the bundle is that of an undisturbed export, byte for byte."""
    line = [sys.executable, "-m", "handiffuser.export.cli", str(tiny_checkpoint_folder), str(tmp_path / "b")]
    for number, finished, code in ((signal.SIGKILL, 2, -signal.SIGKILL), (signal.SIGINT, 4, 130)):
        process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, preexec_fn=listen, start_new_session=True)
        while len(list(tmp_path.glob(".b.partial/bundle/.kept/*.json"))) < finished:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == code
    result = run_command("export.cli", tiny_checkpoint_folder, tmp_path / "b")
    assert result.returncode == 0, result.stderr
    taken = [line.split()[0] for line in result.stderr.splitlines() if "finished by the export" in line]
    assert taken == list(ALL_GRAPHS[:4])
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    ours, undisturbed = content(tmp_path / "b"), content(tiny_bundle)
    assert {n: ours[n] for n in ours if n != "manifest.json"} == {
        n: undisturbed[n] for n in ours if n != "manifest.json"
    }
    ours, undisturbed = (json.loads(files["manifest.json"]) for files in (ours, undisturbed))
    for manifest in (
        ours,
        undisturbed,
    ):  # where and when the checkpoint was written is another in each run of the tests
        del manifest["made_by"]["source"], manifest["sha256"]
    assert ours == undisturbed
