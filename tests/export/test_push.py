"""`hd-export --push`: what goes to the Hub, what its card says, and what is refused before an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import instead_of_exporting, invoke
from handiffuser import BundleError, HanDiffuser, HubError, hub, shipped
from handiffuser.contract import Manifest
from handiffuser.export.push import card, check_push, push
from hub_server import GOOD_TOKEN, hub_in_place
from huggingface_hub import constants

ID = hub.Id("org/hands", None)


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub_in_place(monkeypatch, tmp_path / "cache") as server:
        monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server speaks Git LFS
        yield server


def test_what_is_pushed_paints_elsewhere(server):
    commit = push(shipped.bundle_path(), ID, "apache-2.0", {})
    repo = server.repos["org/hands"]
    assert repo.private and commit == repo.sha
    manifest = Manifest.load(shipped.bundle_path(), verify=False)
    assert set(repo.files) == {*manifest.files, "manifest.json", "README.md"}
    assert all(repo.files[name] == (shipped.bundle_path() / name).read_bytes() for name in manifest.files)
    with HanDiffuser.load("hf://org/hands", device="cpu", threads=1) as pipeline:
        assert pipeline.generate("a fist", steps=1)[0].image.shape == (*manifest.image_size, 3)


def test_a_second_push_keeps_the_card_and_removes_old_graphs(server):
    push(shipped.bundle_path(), ID, "apache-2.0", {})
    files = server.repos["org/hands"].files
    files |= {"README.md": b"mine", "old.onnx": b"x", "picture.png": b"x"}
    push(shipped.bundle_path(), ID, "apache-2.0", {})
    assert files["README.md"] == b"mine" and "picture.png" in files and "old.onnx" not in files


def test_the_card(server):
    manifest = Manifest.load(shipped.bundle_path(), verify=False)
    notes = {"from": "stable-diffusion-v1-5/stable-diffusion-v1-5@abc123", "trained": False}
    _, head, text = card(manifest, ID, "creativeml-openrail-m", notes).split("---\n", 2)
    entries = yaml.safe_load(head)
    assert entries["license"] == "creativeml-openrail-m" and entries["pipeline_tag"] == "text-to-image"
    assert entries["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert "hd-run hf://org/hands" in text and "--no-hands" in text and "at commit abc123" in text
    _, head, text = card(manifest, ID, "apache-2.0", {"from": "model.safetensors"}).split("---\n", 2)
    assert "base_model" not in yaml.safe_load(head) and "--no-hands" not in text


def licensed_body(folder: Path) -> Path:
    with np.load(shipped.body_path()) as file:
        arrays = dict(file)
    arrays["v_template"] = arrays["v_template"] + 0.001
    np.savez(folder / "smplh.npz", **arrays)
    return folder / "smplh.npz"


def test_a_licensed_body_never_leaves(server, tmp_path):
    body = licensed_body(tmp_path)
    with pytest.raises(HubError, match=r"smplh.npz holds arrays of an SMPL-H body, whose licence forbids"):
        check_push("hf://org/hands", "other", shipped.checkpoint_path(), body)
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "body").mkdir(parents=True)
    shutil.copy(body, checkpoint / "body")
    with pytest.raises(HubError, match="whose licence forbids"):
        check_push("hf://org/hands", "other", checkpoint, None)
    bundle = shutil.copytree(shipped.bundle_path(), tmp_path / "bundle")
    manifest = Manifest.load(bundle, verify=False)
    for made_by in ({"body": "the user's: not for redistribution"}, {}):
        manifest.made_by = made_by
        manifest.save(bundle)
        with pytest.raises(HubError, match="whose licence forbids"):
            push(bundle, ID, "other", {})
    assert not server.log


def test_refusals_before_the_export(server, tmp_path, monkeypatch):
    demo = shipped.checkpoint_path()
    assert check_push("org/hands", None, demo, None) == (ID, "apache-2.0")
    for name in ("hands", "hf://hands", "hf://org/hands@v1"):
        with pytest.raises(HubError, match="must be hf://ORGANISATION/NAME"):
            check_push(name, None, demo, None)
    with pytest.raises(HubError, match="--license must be given with --push"):
        check_push("org/hands", None, tmp_path, None)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="must have a token that may write"):
        check_push("org/hands", None, demo, None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        check_push("org/hands", None, demo, None)
    assert not server.log


def test_what_the_hub_refuses(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(HubError, match=r"refuses your token \(401\). Log in with `hf auth login`, or set HF_TOKEN"):
        push(shipped.bundle_path(), ID, "apache-2.0", {})
    bundle = shutil.copytree(shipped.bundle_path(), tmp_path / "bundle")
    (bundle / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="damaged"):
        push(bundle, ID, "apache-2.0", {})


def test_out_is_needed_without_a_push():
    result = invoke("export.cli", "demo")
    assert result.returncode == 2 and "Missing argument 'OUT'" in result.stderr


def test_the_command(server, tiny_checkpoint_folder, tiny_bundle, tmp_path):
    words = (tiny_checkpoint_folder, "--push", "hf://org/tiny", "--license", "other")
    with instead_of_exporting(tiny_bundle):
        result = invoke("export.cli", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "hf://org/tiny has it, commit" in result.stderr
    files = server.repos["org/tiny"].files
    assert json.loads(files["manifest.json"])["files"].keys() <= files.keys()
    assert (tmp_path / "tiny/manifest.json").read_bytes() == files["manifest.json"]
