"""`hd-train init org/name`, as typed: from a server that speaks the Hub's API, in a process of its own."""

from __future__ import annotations

import json

import pytest
import torch
from commands import run_command
from handiffuser.models.checkpoint import Checkpoint
from hub_server import Hub
from safetensors.torch import load_file
from stable_diffusion import stable_diffusion


@pytest.fixture
def server():
    server = Hub()
    yield server
    server.close()


@pytest.mark.slow
def test_init_of_an_id(server, tmp_path):
    folder = stable_diffusion(tmp_path)
    repo = server.add("org/small", folder)
    repo.files |= {"unet/diffusion_pytorch_model.bin": b"pickle", "README.md": b"x", "small.ckpt": b"pickle"}
    env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    result = run_command("training.cli", "init", "org/small", "start", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    made = Checkpoint.load(tmp_path / "start")
    theirs = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, theirs[name]) for name, value in made.unet.state_dict().items())
    assert made.notes["from"] == f"org/small@{repo.sha}"
    assert json.loads((tmp_path / "start/model_index.json").read_text())["_notes"]["from"] == f"org/small@{repo.sha}"
    asked = {path for _, path, _ in server.log}
    assert not [path for path in asked if path.endswith((".bin", ".ckpt", ".md"))]
    assert all("/org/small" in path for path in asked)  # nothing else is asked of the Hub: no reports, no updates
    server.log.clear()
    again = run_command(
        "training.cli", "init", "hf://org/small", "again", cwd=tmp_path, env=env | {"HF_HUB_OFFLINE": "1"}
    )
    assert again.returncode == 0 and not server.log, again.stderr
    refused = run_command("training.cli", "init", "org/smal", "more", cwd=tmp_path, env=env)
    assert refused.returncode == 1 and refused.stderr.startswith(
        "hd-train: org/smal is neither a folder here nor a repository at"
    )
    assert len(refused.stderr.splitlines()) == 1
