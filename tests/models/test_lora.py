"""LoRA: merged it is what the adapted modules compute, for diffusers too, and others' files are read."""

from __future__ import annotations

import pytest
import torch
from handiffuser.errors import CheckpointError
from handiffuser.models import lora
from handiffuser.models.checkpoint import Checkpoint
from safetensors.torch import load_file, save_file


@pytest.fixture
def load(tiny_checkpoint_folder):
    return lambda: Checkpoint.load(tiny_checkpoint_folder)


@pytest.fixture
def adapter(load, tmp_path):
    """An adapted checkpoint, and the file of its adapter."""
    adapted = load()
    torch.manual_seed(0)
    for parameter in lora.inject(adapted, 4):
        parameter.data += 0.05 * torch.randn(parameter.shape)
    lora.save(lora.trained(adapted), tmp_path / "adapter.safetensors", 4)
    return adapted, tmp_path / "adapter.safetensors"


def painted(checkpoint):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 500, (1, 77), generator=generator)
    ids[0, -1] = checkpoint.special_tokens["eos"]
    hands = {
        "joints": torch.rand(1, 2, 21, 2, generator=generator),
        "rotations": torch.randn(1, 2, 16, 6, generator=generator),
        "bps": torch.rand(1, 2, 512, generator=generator) / 10,
        "visibility": torch.ones(1, 2),
    }
    latents = torch.randn(1, 4, *checkpoint.latent_size, generator=generator)
    with torch.no_grad():
        return checkpoint.unet(latents, 500, checkpoint.text_hand_encoder(ids, **hands)).sample


def test_before_training_nothing_changes(load):
    plain, adapted = load(), load()
    trained = lora.inject(adapted, 4)
    torch.testing.assert_close(painted(adapted), painted(plain))
    share = sum(p.numel() for p in trained) / sum(p.numel() for p in plain.unet.parameters())
    assert share < 0.5 and not any(p.requires_grad for n, p in adapted.unet.named_parameters() if "lora" not in n)


def test_merged_it_computes_what_the_adapted_modules_do(load, adapter):
    adapted, path = adapter
    merged = load()
    lora.merge(merged, path)
    assert (painted(merged) - painted(load())).abs().max() > 1e-2
    torch.testing.assert_close(painted(merged), painted(adapted), rtol=1e-4, atol=1e-5)


def test_a_scale_of_nothing_changes_nothing_and_two_halves_are_one(load, adapter):
    plain, none, whole, halves = load(), load(), load(), load()
    lora.merge(none, adapter[1], 0.0)
    torch.testing.assert_close(painted(none), painted(plain))
    lora.merge(whole, adapter[1])
    for _ in range(2):
        lora.merge(halves, adapter[1], 0.5)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(halves.unet.state_dict()[name], whole.unet.state_dict()[name])


def test_diffusers_reads_its_unet(load, adapter):
    merged, theirs = load(), load()
    lora.merge(merged, adapter[1])
    of_unet = {name: value for name, value in load_file(adapter[1]).items() if name.startswith("unet.")}
    theirs.unet.load_lora_adapter(of_unet, prefix="unet")
    for name in ("text_hand_encoder", "position_kernel"):
        getattr(theirs, name).load_state_dict(getattr(merged, name).state_dict())
    torch.testing.assert_close(painted(theirs), painted(merged), rtol=1e-4, atol=1e-5)


def test_a_kohya_file_is_read(load, tmp_path):
    """Their names, and alpha beside each layer."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": torch.tensor(1.0)},
        tmp_path / "kohya.safetensors",
    )
    plain, merged = load(), load()
    lora.merge(merged, tmp_path / "kohya.safetensors", 0.7)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    expected = plain.unet.state_dict()[name] + 0.7 * (1.0 / 2) * up @ down
    torch.testing.assert_close(merged.unet.state_dict()[name], expected)


@pytest.mark.parametrize(
    ("tensors", "name", "words"),
    [
        (
            {"unet.none.lora_A.weight": (2, 4), "unet.none.lora_B.weight": (4, 2)},
            "a.safetensors",
            "lacks layers for unet.none",
        ),
        (
            {"text_hand_encoder.place": (3, 3)},
            "a.safetensors",
            "does not fit this model: it lacks text_hand_encoder.place",
        ),
        ({"conv.weight": (3, 3)}, "a.safetensors", "must hold a LoRA"),
        ({}, "a.bin", "must be a .safetensors file"),
        (None, "missing.safetensors", "does not exist"),
    ],
)
def test_what_does_not_fit_is_a_sentence(load, tmp_path, tensors, name, words):
    if tensors is not None:
        save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, tmp_path / name)
    with pytest.raises(CheckpointError, match=words):
        lora.merge(load(), tmp_path / name)
