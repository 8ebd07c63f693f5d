"""The hand prior reads a sentence and its words."""

from __future__ import annotations

import pytest
import torch
from handiffuser import shipped
from handiffuser.contract import NUM_PARAMS
from handiffuser.errors import CheckpointError
from handiffuser.models.hand_prior import HandPrior
from handiffuser.models.weights import load_part
from safetensors.torch import load_file, save_file

WIDTH = 48


@pytest.fixture
def prior() -> HandPrior:
    torch.manual_seed(0)
    return HandPrior(width=32, num_layers=2, num_heads=2, text_width=WIDTH).eval()


def inputs(width: int = WIDTH) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(3, 77, width, generator=generator)
    return torch.randn(3, NUM_PARAMS, generator=generator), torch.tensor([999.0, 500.0, 1.0]), text


def others(text: torch.Tensor) -> torch.Tensor:
    """The same sentences with their words in another order."""
    return torch.cat([text[:, :-1].flip(1), text[:, -1:]], 1)


def test_gradients_reach_the_words(prior):
    x, timestep, text = inputs()
    prior(x, timestep, text).square().mean().backward()
    for block in prior.blocks:
        assert block.words.out.weight.grad.abs().sum() > 0, "training could not begin"
        torch.nn.init.normal_(block.words.out.weight)
    text.requires_grad_(True)
    prior.zero_grad()
    out = prior(x, timestep, text)
    out.square().mean().backward()
    assert (text.grad.abs().sum(-1) > 0).all(), "every word has an effect"
    assert all(parameter.grad.abs().sum() > 0 for parameter in prior.blocks.parameters())
    # The states of words hold their places, which the text encoder gave them.
    torch.testing.assert_close(prior(x, timestep, others(text)), out)


@torch.no_grad()
def test_words_start_without_effect(prior):
    x, timestep, text = inputs()
    changed = torch.cat([torch.randn_like(text[:, :-1]), text[:, -1:]], 1)
    assert torch.equal(prior(x, timestep, changed), prior(x, timestep, text)), "it reads the sentence alone"


@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(prior, tmp_path):
    given = inputs()
    for block in prior.blocks:
        torch.nn.init.normal_(block.words.out.weight)
    prior.save_pretrained(tmp_path)
    assert torch.equal(load_part(HandPrior, tmp_path)(*given), prior(*given))
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["blocks.1.words.out.weight"]
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"lacks blocks\.1\.words\.out\.weight"):
        load_part(HandPrior, tmp_path)


@torch.no_grad()
def test_the_demos_prior_reads_words():
    prior = load_part(HandPrior, shipped.checkpoint_path() / "hand_prior").eval()
    x, timestep, text = inputs(prior.config.text_width)
    assert not torch.equal(prior(x, timestep, torch.cat([-text[:, :-1], text[:, -1:]], 1)), prior(x, timestep, text))
