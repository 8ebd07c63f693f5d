"""The hand prior: a sentence, its words, and checkpoints from before it looked at them."""

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
def plain() -> HandPrior:
    """As all were before they looked at words."""
    torch.manual_seed(0)
    return HandPrior(width=32, num_layers=2, num_heads=2, text_width=WIDTH).eval()


def inputs(width: int = WIDTH) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(3, 77, width, generator=generator)
    return torch.randn(3, NUM_PARAMS, generator=generator), torch.tensor([999.0, 500.0, 1.0]), text


def others(text: torch.Tensor) -> torch.Tensor:
    """The same sentences with their words in another order."""
    return torch.cat([text[:, :-1].flip(1), text[:, -1:]], 1)


@torch.no_grad()
def test_a_prior_from_before_goes_on_as_it_was_when_it_learns_to_read(plain):
    x, timestep, text = inputs()
    before = plain(x, timestep, text)
    assert torch.equal(plain(x, timestep, others(text)), before), "it knows the sentence only"
    names = set(plain.state_dict())
    plain.read_words()
    torch.testing.assert_close(plain(x, timestep, text), before, atol=0, rtol=0)
    new = set(plain.state_dict()) - names
    assert new and all(".words." in name for name in new)
    again = HandPrior(**{**plain.config, "words": False})
    again.read_words()
    assert all(torch.equal(again.state_dict()[name], plain.state_dict()[name]) for name in new)


def test_gradients_reach_the_words():
    torch.manual_seed(0)
    prior = HandPrior(width=32, num_layers=2, num_heads=2, text_width=WIDTH, words=True)
    x, timestep, text = inputs()
    prior(x, timestep, text).square().mean().backward()
    for block in prior.blocks:
        assert block.words.out.weight.grad.abs().sum() > 0, "training could not begin"
        torch.nn.init.normal_(block.words.out.weight)
    text.requires_grad_(True)
    prior.zero_grad()
    out = prior(x, timestep, text)
    out.square().mean().backward()
    assert (text.grad.abs().sum(-1) > 0).all(), "every word has a say"
    assert all(parameter.grad.abs().sum() > 0 for parameter in prior.blocks.parameters())
    # Words are told apart by what their states say, which the text encoder gave them their places in.
    torch.testing.assert_close(prior(x, timestep, others(text)), out)


@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(plain, tmp_path):
    x, timestep, text = inputs()
    for name in ("before", "after"):
        plain.save_pretrained(tmp_path / name)
        loaded = load_part(HandPrior, tmp_path / name)
        assert loaded.config.words == (name == "after")
        assert torch.equal(loaded(x, timestep, text), plain(x, timestep, text))
        plain.read_words()
        for block in plain.blocks:
            torch.nn.init.normal_(block.words.out.weight)
    file = tmp_path / "after" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["blocks.1.words.out.weight"]
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"lacks blocks\.1\.words\.out\.weight"):
        load_part(HandPrior, tmp_path / "after")


@torch.no_grad()
def test_the_demos_prior_starts_training_as_it_is():
    prior = load_part(HandPrior, shipped.checkpoint_path() / "hand_prior").eval()
    given = inputs(prior.config.text_width)
    before = prior(*given)
    prior.read_words()
    assert torch.equal(prior(*given), before)
    assert prior.config.words and all(block.words is not None for block in prior.blocks)
