"""Checkpoint folders: what is saved comes back, and what is unsafe or does not fit is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from handiffuser.errors import CheckpointError
from handiffuser.models.checkpoint import Checkpoint, make_tokenizer, random_checkpoint
from handiffuser.models.configs import CONFIGS
from transformers import AutoTokenizer, CLIPTextModel


def test_round_trip(tiny_checkpoint, tiny_checkpoint_folder):
    loaded = Checkpoint.load(tiny_checkpoint_folder)
    assert loaded.image_size == (32, 48) and loaded.latent_size == (16, 24)
    for name, module in tiny_checkpoint.modules().items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, loaded.modules()[name].state_dict()[key]), f"{name}.{key}"
    text = "A right hand"
    assert loaded.tokenizer.encode(text).ids == tiny_checkpoint.tokenizer.encode(text).ids
    assert loaded.special_tokens == tiny_checkpoint.special_tokens
    assert loaded.scheduler["prediction_type"] == "v_prediction" and loaded.body is not None


def test_parts_are_what_the_libraries_read(tiny_checkpoint_folder):
    UNet2DConditionModel.from_pretrained(tiny_checkpoint_folder / "unet")
    AutoencoderKL.from_pretrained(tiny_checkpoint_folder / "vae")
    CLIPTextModel.from_pretrained(tiny_checkpoint_folder / "text_encoder")
    AutoTokenizer.from_pretrained(tiny_checkpoint_folder / "tokenizer")


def test_half_precision_saves_space_and_leaves_the_module_alone(tmp_path):
    checkpoint = random_checkpoint(CONFIGS["tiny"])
    before = checkpoint.unet.conv_in.weight.clone()
    checkpoint.save(tmp_path / "half", half=True)
    assert torch.equal(checkpoint.unet.conv_in.weight, before)
    loaded = Checkpoint.load(tmp_path / "half")
    assert torch.equal(loaded.unet.conv_in.weight, before.half().float())


def test_without_a_kernel_the_unet_is_plain(tmp_path):
    checkpoint = random_checkpoint(replace(CONFIGS["tiny"], frequencies=()))
    checkpoint.save(tmp_path / "plain")
    assert not (tmp_path / "plain/position_kernel").exists()
    assert Checkpoint.load(tmp_path / "plain").position_kernel is None


@pytest.fixture
def copy(tiny_checkpoint_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint_folder, tmp_path / "copy"))


def test_a_pickle_is_refused_with_the_way_to_convert_it(copy):
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"pickle .*safetensors\.torch\.save_file"):
        Checkpoint.load(copy)


def test_incomplete_and_foreign_folders(copy, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="model_index"):
        Checkpoint.load(tmp_path / "empty")
    shutil.rmtree(copy / "vae")
    with pytest.raises(CheckpointError, match="lacks vae"):
        Checkpoint.load(copy)


def test_a_truncated_file(copy):
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Checkpoint.load(copy)


def test_parts_that_do_not_fit(copy):
    other = random_checkpoint(replace(CONFIGS["tiny"], text_width=64))
    other.hand_prior.save_pretrained(copy / "hand_prior")
    with pytest.raises(CheckpointError, match=r"text_encoder's width is 32, hand_prior's text_width is 64"):
        Checkpoint.load(copy)


def test_an_image_size_that_does_not_fit(copy):
    index = json.loads((copy / "model_index.json").read_text())
    index["_image_size"] = [30, 48]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="multiples of 4"):
        Checkpoint.load(copy)


@pytest.mark.parametrize("text", ["a hand", "手を開く", "🖐🏽 ёж", "x" * 500, "\x00\n\t"])
def test_the_tokenizer_reads_any_script(text):
    tokenizer = make_tokenizer(["a hand making a fist"], 700)
    encoded = tokenizer.encode(text, add_special_tokens=False)
    assert text.strip("\x00\n\t") == "" or len(encoded.ids) > 0
    letters = {c for c in text if not c.isspace()}
    covered = {c for start, end in encoded.offsets for c in text[start:end]}
    assert letters <= covered, "no character is dropped"


def test_the_papers_size_is_a_configuration():
    """Parameter counts of Stable Diffusion 1.5's parts, without allocating them."""
    with torch.device("meta"):
        checkpoint = random_checkpoint(CONFIGS["sd15"])
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in checkpoint.modules().items()}
    assert counts["unet"] == 859_520_964
    assert counts["text_encoder"] == 123_060_480
    assert counts["vae"] == 83_653_863
    assert checkpoint.latent_size == (64, 64)
