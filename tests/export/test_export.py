"""Exported bundles: every graph near PyTorch, any layout without a change in code, and refusals that help."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import handiffuser.calibration.graphs as graphs
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from commands import invoke
from handiffuser.calibration.fidelity import GraphError, PictureError, Report
from handiffuser.contract import GRAPHS, IMAGE_ENCODER, GraphSpec, Manifest
from handiffuser.errors import CheckpointError, EngineError, ExportError
from handiffuser.export import bundle
from handiffuser.export.bundle import at_image_size, export_bundle
from handiffuser.export.cli import command as export_command
from handiffuser.models import lora
from handiffuser.models.checkpoint import random_checkpoint
from handiffuser.models.configs import CONFIGS
from handiffuser.runtime.pipeline import HanDiffuser
from handiffuser.shipped import bundle_path


def test_every_graph_is_within_1e_4_of_pytorch(tiny_bundle):
    manifest = Manifest.load(tiny_bundle)
    assert set(manifest.graphs) == {*GRAPHS, IMAGE_ENCODER}
    for name, graph in manifest.graphs.items():
        assert graph.parity["error"] <= 1e-4 == graph.parity["tolerance"], name
    assert manifest.precision == "fp32" and manifest.image_size == (32, 48) and manifest.latent_size == (4, 16, 24)


def test_the_step_graph_holds_no_time_embedding_and_no_context_projection(tiny_bundle, tiny_checkpoint):
    """Hoisting is real: the loop's graph is lighter by just the time network and the projections of keys and values."""

    def weights(name: str) -> int:
        """Matrices and kernels; the pixels' position codes, constants [heads, pixels, 24], do not count."""
        tensors = onnx.load(tiny_bundle / name).graph.initializer
        return sum(int(np.prod(t.dims)) for t in tensors if np.prod(t.dims) > 64 and len(t.dims) != 3)

    parts = {name: p for name, p in tiny_checkpoint.unet.named_parameters() if p.numel() > 64}
    hoisted = {n for n in parts if "time_emb" in n or "attn2.to_k" in n or "attn2.to_v" in n}
    moved = sum(parts[name].numel() for name in hoisted)
    kept = sum(p.numel() for name, p in parts.items() if name not in hoisted)
    assert weights("unet_time.onnx") + weights("unet_context.onnx") == moved > 0.1 * kept
    assert weights("unet.onnx") == kept


def test_fp16(tiny_half):
    manifest = Manifest.load(tiny_half)
    assert all(graph.parity["error"] <= 5e-3 for graph in manifest.graphs.values())
    assert manifest.made_by["fidelity"]["passes"] and manifest.made_by["fidelity"]["psnr_mean"] >= 35
    dtypes = {
        f"{name}.{spec.name}": spec.dtype
        for name, graph in manifest.graphs.items()
        for spec in (*graph.inputs, *graph.outputs)
    }
    assert dtypes["text_hand_encoder.context"] == dtypes["unet.key_00"] == dtypes["unet.time"] == "float16"
    for name in ("unet.latents", "unet.history", "unet.row", "hand_prior.x", "hand_features.joints"):
        assert dtypes[name] == "float32", f"{name}: state and kinematics stay float32"
    weights = onnx.load(tiny_half / "unet.onnx").graph.initializer
    large = [w for w in weights if np.prod(w.dims) > 500]
    assert large and all(w.data_type == onnx.TensorProto.FLOAT16 for w in large), "half was asked for, half it is"
    picture = HanDiffuser.load(tiny_half).generate("a left hand")[0]
    assert picture.image.shape == (32, 48, 3)


def test_bf16(tiny_bf16):
    manifest = Manifest.load(tiny_bf16)
    assert manifest.precision == "bf16"
    for name, graph in manifest.graphs.items():
        assert graph.parity["error"] <= graph.parity["tolerance"], name
        kinematics = name == "hand_features"  # float32 always
        assert graph.parity["tolerance"] == (1e-4 if kinematics else 0.1) and ("emulated" in graph.parity) != kinematics
    # A float32 graph is within 1e-4, float16 within 1e-3: these were rounded to 8 bits indeed.
    assert all(manifest.graphs[name].parity["error"] > 2e-3 for name in ("text_encoder", "unet", "unet_context"))
    report = manifest.made_by["fidelity"]
    assert report["passes"] and report["emulated"] and 35 <= report["psnr_mean"] < 70
    dtypes = {
        f"{name}.{spec.name}": spec.dtype
        for name, graph in manifest.graphs.items()
        for spec in (*graph.inputs, *graph.outputs)
    }
    between = ("text_hand_encoder.context", "unet_context.key_00", "unet_time.time", "unet.key_00", "unet.time")
    assert {name: dtypes[name] for name in between} == dict.fromkeys(between, "bfloat16")
    # What the host gives or reads: numpy has no bfloat16.
    for name, dtype in dtypes.items():
        if name.partition(".")[0] not in ("unet", "unet_context", "unet_time") and name not in between:
            assert dtype in ("float32", "int64", "uint8"), name
    assert dtypes["unet.latents"] == dtypes["unet.history"] == dtypes["unet.row"] == "float32"
    large = [w for w in onnx.load(tiny_bf16 / "unet.onnx").graph.initializer if np.prod(w.dims) > 500]
    assert large and all(w.data_type == onnx.TensorProto.BFLOAT16 for w in large), "bf16 was asked for, bf16 it is"


def test_bf16_is_refused_where_it_cannot_run(tiny_bf16, tmp_path):
    with pytest.raises(EngineError, match=r"bfloat16.*NVIDIA GPUs only.*hd-export CHECKPOINT OUT --precision fp32"):
        HanDiffuser.load(tiny_bf16, device="cpu")
    result = invoke("runtime.cli", tiny_bf16, "a fist", "--device", "cpu", "--output", tmp_path / "out")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and "NVIDIA GPUs only" in result.stderr


def test_half_precision_that_fails_its_bar_is_refused(tiny_checkpoint_folder, tmp_path, monkeypatch):
    """Unless the user accepts it. An older bundle stays."""
    report = Report("fp16", "cpu", True, 1e-2, {}, [PictureError("a fist", 0, 20.0, 0.0)])
    report.graphs["unet"] = GraphError(0.5, 0.5, "latents")
    assert not report.passes
    monkeypatch.setattr("handiffuser.export.lower.mend", lambda *_: (report, {"unet": ["node_conv2d"]}))
    monkeypatch.setattr(bundle, "export_graph", stand_in)
    monkeypatch.setattr("handiffuser.export.weights.record_weights", lambda *_: None)
    monkeypatch.setattr(bundle, "parity", lambda *_: (0.0, "text"))
    command = [str(tiny_checkpoint_folder), str(tmp_path / "out"), "--precision", "fp16"]
    refused = CliRunner().invoke(export_command, command)
    said = " ".join(refused.output.split())
    assert "must be at least 35 dB" in str(refused.exception) and "--accept-low-fidelity" in str(refused.exception)
    assert "kept in float32 for that: node_conv2d" in said
    assert not list(tmp_path.iterdir())
    accepted = CliRunner().invoke(export_command, [*command, "--accept-low-fidelity"])
    assert accepted.exit_code == 0 and Manifest.load(tmp_path / "out").precision == "fp16"


def test_sizes_that_no_graph_takes_are_refused_before_the_export(tiny_checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("handiffuser.export.cli.export", lambda *_: pytest.fail("it exports"))
    command = [str(tiny_checkpoint_folder), str(tmp_path / "out"), "--backend", "openvino", "--sizes"]
    refused = CliRunner().invoke(export_command, [*command, "48x32,50x32"])
    assert isinstance(refused.exception, EngineError) and not list(tmp_path.iterdir())
    assert re.fullmatch(
        r"--sizes must be multiples of \d+ up to 4096 pixels, got 50x32. The nearest is \d+x32.", str(refused.exception)
    )


def test_brackets_of_a_message_are_no_markup():
    """pip install "handiffuser[export]" must reach the user whole."""
    code = (
        "from handiffuser.errors import ExportError\n"
        "from handiffuser.export import cli\n"
        "def fail(*_, **__):\n"
        "    raise ExportError('Install it: pip install \"handiffuser[export]\".')\n"
        "cli.fingerprint = fail\n"
        "cli.main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code, "demo", "out"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr == 'hd-export: Install it: pip install "handiffuser[export]".\n'


# Each export takes a minute, so one layout differs in several ways.
LAYOUTS = {
    "other sizes, cross-attention alone in one block": replace(
        CONFIGS["tiny"],
        image_size=(64, 32),
        text_width=48,
        text_layers=1,
        text_heads=4,
        prior_width=64,
        prior_layers=1,
        unet_channels=(8, 16, 24),
        unet_attention=(True, False, True),
        unet_only_cross=(True, False, False),
        unet_heads=(2, 2, 3),
        unet_layers=2,
        vae_channels=(8, 16, 16),
        frequencies=(1, 3),
        rotation_frame="camera",
        schedule="sd",
        solver="plms",
    ),
    "an autoencoder on patches, the paper's plain cross-attention": replace(
        CONFIGS["tiny"], image_size=(64, 96), latent_channels=10, vae_patch=2, vae_channels=(8, 16, 16), frequencies=()
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.slow
def test_other_layouts_export_and_run(name, body_path, tmp_path):
    """And one of them in another image size."""
    config = LAYOUTS[name]
    size, *said = ((96, 64), "--image-size", "64x96") if config.frequencies == () else (config.image_size,)
    assert not said or size != config.image_size
    random_checkpoint(config, body=body_path).save(tmp_path / "checkpoint")
    result = invoke("export.cli", tmp_path / "checkpoint", tmp_path / "b", *said)
    assert result.returncode == 0, result.stderr
    picture = HanDiffuser.load(tmp_path / "b").generate("two open hands", steps=3)[0]
    assert picture.image.shape == (*size, 3) and picture.image.std() > 0


def test_an_image_size_that_does_not_fit(tiny_checkpoint):
    with pytest.raises(CheckpointError, match="multiples of 4"):
        at_image_size(tiny_checkpoint, 30, 48)


@pytest.mark.slow
def test_half_exact_weights_are_stored_in_half(tiny_checkpoint, tiny_bundle, tmp_path):
    """A checkpoint that went through float16 gives a float32 bundle of about half the size, and the same values."""
    tiny_checkpoint.save(tmp_path / "half", half=True)
    half = bundle.Checkpoint.load(tmp_path / "half")
    wanted = next(g for g in bundle.graphs(half, bundle.SMPLH.load(half.body)) if g.name == "hand_prior")
    small = tmp_path / bundle.export_graph(wanted, tmp_path, bundle.OPSET).file
    assert bundle.parity(wanted, wanted.module, small)[0] <= 1e-5
    full = Manifest.load(tiny_bundle).graphs["hand_prior"]
    assert full.parity["error"] <= 1e-5 and small.stat().st_size < 0.8 * (tiny_bundle / full.file).stat().st_size


def test_files_have_the_mode_that_the_umask_says(tiny_checkpoint_folder, tiny_bundle, tmp_path, monkeypatch):
    """Libraries leave weights to their owner alone; a server often is another user."""
    for module in (bundle, graphs):
        monkeypatch.setattr(module, "EXTERNAL", 1)
    bundle.save_model(ir.load(tiny_bundle / "text_encoder.onnx"), tmp_path / "one.onnx")
    graphs.save_model(onnx.load(tiny_bundle / "text_encoder.onnx"), tmp_path / "two.onnx")
    lora.save({"unet.conv_in.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "adapter.safetensors", 1)
    umask = os.umask(0)
    os.umask(umask)
    paths = [
        path
        for folder in (tiny_checkpoint_folder, tiny_bundle, tmp_path)
        for path in folder.rglob("*")
        if path.is_file()
    ]
    assert {path.suffix for path in paths} >= {".safetensors", ".onnx", ".data"}
    wrong = {path.name: oct(path.stat().st_mode) for path in paths if path.stat().st_mode & 0o777 != 0o666 & ~umask}
    assert not wrong


@pytest.mark.slow
def test_a_graph_over_its_tolerance_is_not_written(tiny_checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "b"
    out.mkdir()
    (out / "manifest.json").write_text(json.dumps({"format": 1}))
    monkeypatch.setattr(bundle, "parity", lambda *_: (float("nan"), "text"))
    with pytest.raises(ExportError, match="nothing was written"):
        export_bundle(tiny_checkpoint, out)
    assert [p.name for p in out.iterdir()] == ["manifest.json"] and not (tmp_path / "b.partial").exists()


def test_parity_sees_a_wrong_graph(tiny_checkpoint, tmp_path):
    """It finds a graph with other weights."""
    wanted = next(iter(bundle.graphs(tiny_checkpoint, bundle.SMPLH.load(tiny_checkpoint.body))))
    spec = bundle.export_graph(wanted, tmp_path, 23)
    other = copy.deepcopy(wanted.module)  # its weights are those of all other tests
    torch.nn.init.normal_(other.text_encoder.get_input_embeddings().weight)
    assert bundle.parity(wanted, other, tmp_path / spec.file)[0] > 0.01


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere", "out"), "does not exist"),
        (("CHECKPOINT", "full"), "must be a bundle or an empty folder"),
        (("CHECKPOINT", "out", "--body", "none.npz"), "does not exist"),
        (("CHECKPOINT", "out", "--image-size", "30"), "multiples of"),
        (("CHECKPOINT", "out", "--image-size", "big"), "--image-size must be 512"),
        (("CHECKPOINT", "file/out"), "file"),
    ],
)
def test_bad_input_is_one_clear_sentence(arguments, says, tiny_checkpoint_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("do not lose this")
    (tmp_path / "file").write_text("")
    arguments = [str(tiny_checkpoint_folder) if a == "CHECKPOINT" else a for a in arguments]
    result = invoke("export.cli", *arguments, cwd=tmp_path)
    assert result.returncode != 0 and says in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "full/thesis.txt").exists() and not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_body_asks_for_one(tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="--body"):
        export_bundle(replace(tiny_checkpoint, body=None), tmp_path / "b")


@pytest.mark.parametrize("where", ["--body", "in the checkpoint", "the demo's as --body", "the demo's"])
def test_a_licensed_body_is_marked(where, tiny_checkpoint_folder, body_path, tmp_path, monkeypatch):
    """Its content decides: a user's body in a checkpoint is licensed, and the demo's is free even as --body."""
    with np.load(body_path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(tmp_path / "larger.npz", **{**arrays, "v_template": 1.01 * arrays["v_template"]})
    folder = shutil.copytree(tiny_checkpoint_folder, tmp_path / "checkpoint")
    if where == "in the checkpoint":
        shutil.copyfile(tmp_path / "larger.npz", folder / "body" / "smplh.npz")
    body = {"--body": tmp_path / "larger.npz", "the demo's as --body": body_path}.get(where)
    monkeypatch.setattr(bundle, "export_graph", stand_in)
    monkeypatch.setattr("handiffuser.export.weights.record_weights", lambda *_: None)
    monkeypatch.setattr(bundle, "parity", lambda *_: (1e-7, "text"))
    line = [str(folder), str(tmp_path / "b"), *(["--body", str(body)] if body else [])]
    result = CliRunner().invoke(export_command, line)
    assert result.exit_code == 0, result.output
    licensed = where in ("--body", "in the checkpoint")
    said = Manifest.load(tmp_path / "b").made_by["body"]
    assert ("not for redistribution" in said) == licensed == ("Its licence forbids" in result.output)
    assert ("licence-free" in said) != licensed


def stand_in(graph, folder, opset):
    """A graph's contract alone, without the seconds of tracing."""
    (folder / f"{graph.name}.onnx").touch()
    named = {name: graph.inputs.get(name) for name in graph.outputs}
    outputs = [graph.spec(name, value) for name, value in named.items() if value is not None]
    if graph.name == "image_decoder":
        outputs = Manifest.load(bundle_path(), verify=False).graphs[graph.name].outputs
        outputs = [replace(outputs[0], shape=("B", 32, 48, 3)), outputs[1]]
    return GraphSpec(f"{graph.name}.onnx", [graph.spec(n, v) for n, v in graph.inputs.items()], outputs)
