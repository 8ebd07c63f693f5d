"""The measure of the demo's people: scenes that training never saw, once drawn, through a checkpoint's autoencoder."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from commands import run_study
from handiffuser.demo.human import make_body
from handiffuser.models.checkpoint import random_checkpoint
from handiffuser.models.configs import CONFIGS


@pytest.mark.slow
def test_the_autoencoder_beside_renders(tmp_path):
    make_body(tmp_path / "body.npz")
    config = replace(CONFIGS["tiny"], image_size=(128, 128), vae_patch=2, latent_channels=48, unet_heads=2)
    checkpoint = random_checkpoint(config, body=tmp_path / "body.npz")
    checkpoint.vae.begin(torch.rand(4, 3, 64, 64) * 2 - 1)  # 48 components of blocks of 48 numbers: nothing is lost
    checkpoint.save(tmp_path / "checkpoint")
    words = [tmp_path / "out", "--checkpoint", tmp_path / "checkpoint", "--count", 2, "--rows", "through-the-vae"]
    done = run_study("people", *words, "-o", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    groups = json.loads((tmp_path / "found.json").read_text())["framings"]
    assert sum(group["pictures"] for group in groups.values()) == 2
    for group in groups.values():
        assert set(group["rows"]) == {"renders", "through-the-vae"}
        assert group["rows"]["through-the-vae"]["psnr"]["value"] > 45
        assert group["rows"]["renders"]["detection_rate"]["n"] >= 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/renders").glob("*.png")}
    assert run_study("people", *words).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out/renders").glob("*.png")}
    assert run_study("people", *words[:-1], "dreams").returncode != 0
