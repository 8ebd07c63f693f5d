"""A checkpoint with other words and other latents goes on from another one: what fits is equal, noise stays noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from commands import invoke
from datasets import made_sample
from handiffuser.data.samples import write_shards
from handiffuser.errors import CheckpointError, TrainingError
from handiffuser.models.checkpoint import Checkpoint, random_checkpoint
from handiffuser.models.configs import CONFIGS
from handiffuser.training.grow import grow, pieces_of, subspace

PATCHED = replace(CONFIGS["tiny"], image_size=(64, 96), latent_channels=7, vae_patch=2)


@pytest.fixture(scope="module")
def images():
    small = torch.rand(6, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(small, (64, 96), mode="bilinear")
    return (255 * large).to(torch.uint8).permute(0, 2, 3, 1)


@pytest.fixture
def larger(body_path, images):
    """Pictures twice as large, seven latent channels, words of its own."""
    texts = ["a woman waving in a garden", "two open hands"]
    checkpoint = random_checkpoint(PATCHED, seed=5, body=body_path, texts=texts)
    checkpoint.vae.begin(images.permute(0, 3, 1, 2) / 127.5 - 1)
    return checkpoint


def test_it_computes_what_the_donor_did_in_the_subspace(larger, tiny_checkpoint, images):
    """The grown UNet's output is the donor's, turned; noise outside of the subspace changes nothing."""
    grow(larger, tiny_checkpoint, images)
    basis = subspace(larger, tiny_checkpoint, images)
    torch.testing.assert_close(basis @ basis.T, torch.eye(4), rtol=0, atol=1e-6)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, 16, 24, generator=generator)
    outside = x - torch.einsum("ij,ik,nkhw->njhw", basis, basis, x)
    context = torch.randn(2, 20, larger.text_hand_encoder.context_width, generator=generator)
    with torch.no_grad():
        wanted = tiny_checkpoint.unet(torch.einsum("ij,njhw->nihw", basis, x), torch.tensor([500, 30]), context).sample
        found = larger.unet(x, torch.tensor([500, 30]), context).sample
        same = larger.unet(x + 3 * outside, torch.tensor([500, 30]), context).sample
    torch.testing.assert_close(found, torch.einsum("ij,nihw->njhw", basis, wanted), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(same, found, rtol=1e-4, atol=1e-4)
    assert not larger.hand_prior.mean.any() and larger.notes["grown_from"] == tiny_checkpoint.name
    larger.check()


def test_the_subspace_is_the_one_most_like_the_donors_latents(larger, tiny_checkpoint, images):
    """Latents that are a rotation of the donor's, and three more channels, give that rotation."""
    turn = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(2)))[0]

    class Turned(torch.nn.Module):
        def __init__(self, vae):
            super().__init__()
            self.vae = vae
            self.config = vae.config

        def encode(self, shown):
            small = torch.nn.functional.interpolate((shown + 1) * 127.5, (32, 48), mode="area").round() / 127.5 - 1
            latents = self.vae.encode(small).latent_dist
            more = torch.zeros(len(shown), 3, *latents.mean.shape[2:])
            latents.mean = torch.einsum("ij,nihw->njhw", turn, torch.cat([latents.mean, more], 1))
            return type("Encoded", (), {"latent_dist": latents})

    turned = replace(larger, vae=Turned(tiny_checkpoint.vae))
    found = subspace(turned, tiny_checkpoint, images)
    torch.testing.assert_close(found, turn[:4], rtol=0, atol=2e-3)


def test_words_keep_their_vectors(larger, tiny_checkpoint, images):
    vector = tiny_checkpoint.text_encoder.get_input_embeddings().weight
    old, known = tiny_checkpoint.tokenizer.get_vocab(), larger.tokenizer.get_vocab()
    pieces = pieces_of(larger.tokenizer, tiny_checkpoint.tokenizer)
    backwards = {number: token for token, number in old.items()}
    for token, number in known.items():
        assert "".join(backwards[i] for i in pieces[number]).replace("</w>", "") == token.replace("</w>", "")
    grow(larger, tiny_checkpoint, images)
    mine = larger.text_encoder.get_input_embeddings().weight
    assert torch.equal(mine[known["hands</w>"]], vector[old["hands</w>"]])
    assert "garden</w>" not in old
    expected = vector[pieces[known["garden</w>"]]].mean(0)
    torch.testing.assert_close(mine[known["garden</w>"]], expected)
    assert len(pieces[known["garden</w>"]]) > 1


def test_networks_of_other_sizes_are_refused(tiny_checkpoint, images, body_path):
    for config, words in (
        (replace(PATCHED, unet_channels=(16, 24)), "in unet must have the shape"),
        (replace(PATCHED, text_width=48, text_heads=4), "in text_encoder must have the shape"),
        (replace(PATCHED, image_size=(32, 48)), "latents of one height and width, got 8x12 and 16x24"),
    ):
        with pytest.raises(TrainingError, match=words):
            grow(random_checkpoint(config, body=body_path), tiny_checkpoint, images)


def test_a_unet_of_inpainting_is_refused(larger, tiny_checkpoint_folder, images):
    donor = Checkpoint.load(tiny_checkpoint_folder)
    donor.unet.register_to_config(in_channels=9)
    with pytest.raises(CheckpointError, match="for hd-train grow, got 9"):
        grow(larger, donor, images)


def test_the_command(larger, tiny_checkpoint_folder, tmp_path):
    larger.save(tmp_path / "larger")
    write_shards([made_sample(i, (64, 96)) for i in range(4)], tmp_path / "data")
    command = ("grow", tmp_path / "larger", tiny_checkpoint_folder, tmp_path / "out", "--data", tmp_path / "data")
    result = invoke("training.cli", *command)
    assert result.returncode == 0 and "is written" in result.stderr, result.stderr
    grown, start = Checkpoint.load(tmp_path / "out"), Checkpoint.load(tiny_checkpoint_folder)
    assert torch.equal(grown.unet.mid_block.resnets[0].conv1.weight, start.unet.mid_block.resnets[0].conv1.weight)
    assert torch.equal(grown.vae.encoder.linear.weight, larger.vae.encoder.linear.weight)
    again = invoke("training.cli", *command)
    assert again.returncode == 1 and "must be a new folder" in again.stderr
