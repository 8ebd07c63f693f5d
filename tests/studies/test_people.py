"""The measure of the demo's people: scenes that training never saw, once drawn, through a checkpoint's autoencoder."""

from __future__ import annotations

import json
from dataclasses import replace

import people
import pytest
import torch
from commands import run_study
from handiffuser.demo.human import make_body
from handiffuser.errors import EvaluationError
from handiffuser.models.checkpoint import Checkpoint, random_checkpoint
from handiffuser.models.configs import CONFIGS


@pytest.fixture(scope="module")
def lossless(tmp_path_factory) -> Checkpoint:
    """A checkpoint whose autoencoder keeps 48 components of blocks of 48 numbers: nothing is lost."""
    folder = tmp_path_factory.mktemp("lossless")
    make_body(folder / "body.npz")
    config = replace(CONFIGS["tiny"], image_size=(128, 128), vae_patch=2, latent_channels=48, unet_heads=2)
    checkpoint = random_checkpoint(config, body=folder / "body.npz")
    checkpoint.vae.begin(torch.rand(4, 3, 64, 64) * 2 - 1)
    return checkpoint


@pytest.mark.slow
def test_renders_are_drawn_once_and_come_through_the_autoencoder(lossless, tmp_path):
    renders = people.draw(tmp_path / "renders", 2, 128)
    psnr = people.through_the_vae(lossless, renders, tmp_path / "through-the-vae")
    assert psnr.keys() == {sample.key for sample in renders} and min(psnr.values()) > 45
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "renders").glob("*.png")}
    again = people.draw(tmp_path / "renders", 2, 128)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "renders").glob("*.png")}
    assert [(sample.key, sample.image) for sample in again] == [(sample.key, sample.image) for sample in renders]
    with pytest.raises(EvaluationError, match="OUT must have scenes of things, got some of people"):
        people.draw(tmp_path / "renders", 2, 128, "things")
    people.draw(tmp_path / "things", 1, 128, "things")
    people.draw(tmp_path / "things", 1, 128, "things")
    with pytest.raises(EvaluationError, match="OUT must have scenes of people, got some of things"):
        people.draw(tmp_path / "things", 1, 128)


@pytest.mark.slow
def test_the_autoencoder_beside_renders(lossless, tmp_path):
    pytest.importorskip("mediapipe")
    lossless.save(tmp_path / "checkpoint")
    words = [tmp_path / "out", "--checkpoint", tmp_path / "checkpoint", "--count", 2, "--rows", "through-the-vae"]
    done = run_study("people", *words, "-o", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    groups = json.loads((tmp_path / "found.json").read_text())["groups"]
    groups = {name: group for name, group in groups.items() if group["by"] == "framing"}
    assert sum(group["pictures"] for group in groups.values()) == 2
    for group in groups.values():
        assert set(group["rows"]) == {"renders", "through-the-vae"}
        assert group["rows"]["through-the-vae"]["psnr"]["value"] > 45
        assert group["rows"]["renders"]["detection_rate"]["n"] >= 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/renders").glob("*.png")}
    assert run_study("people", *words).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out/renders").glob("*.png")}
    assert run_study("people", *words[:-1], "dreams").returncode != 0
