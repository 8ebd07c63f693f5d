"""What the stages learn from: which rows, which timesteps, which weights."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from handiffuser.training.loop import Plan, fit
from handiffuser.training.stages import FINGERS, VAELoss, draw, emphasis, timesteps


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_timesteps_are_spread_over_a_batch():
    for shift in (1.0, 4.0):
        t = timesteps(100, 1000, generator(), shift).sort().values.double() / 1000
        assert t.min() >= 0 and t.max() < 1
        even = t / (shift - (shift - 1) * t)  # the shift undone
        assert (even * 100).diff().max() < 2.1  # one in every hundredth
    uniform, shifted = (timesteps(4000, 1000, generator(), shift).float().mean() for shift in (1.0, 4.0))
    assert abs(uniform - 499.5) < 2 and shifted > 700


def test_two_hands_come_as_often_as_asked():
    two = torch.arange(1000) % 10 == 0  # a tenth
    rows = draw(two, 0.3, 20_000, generator())
    assert abs(two[rows].float().mean() - 0.3) < 0.02
    assert len(rows.unique()) > 990  # all of them, two hands or one
    none = draw(torch.zeros(5, dtype=torch.bool), 0.3, 100, generator())
    assert set(none.tolist()) == set(range(5))


def test_errors_near_joints_of_visible_hands_count_more():
    joints = torch.rand(3, 2, 21, 2, generator=generator()) * 0.2
    joints[0, 1] = 0.9  # the lower right corner
    visibility = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    weight = emphasis(joints, visibility, 16, 16)
    assert weight.shape == (3, 16, 16) and abs(weight.mean() - 1) < 1e-5
    assert weight[0].argmax() == 14 * 16 + 14  # pixel 14 reaches from 0.875 to 0.9375
    assert weight[0].max() / weight[0].min() > 0.9 * (1 + FINGERS)
    assert (weight[1] == weight[1, 0, 0]).all()  # nobody to be seen
    assert weight[2, :5, :5].mean() > 2 * weight[2, 8:, 8:].mean()


def test_a_decoder_is_trained_alone(tmp_path):
    """The UNet of a given checkpoint knows its latents."""
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **blocks
    )
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    images = torch.rand(2, 3, 8, 8, generator=generator()) * 2 - 1
    loss = lambda module, seeded: module(images, torch.randn(2, 4, 4, 4, generator=seeded))  # noqa: E731
    trained = fit("vae", VAELoss(vae, decoder_only=True), loss, Plan(steps=3, learning_rate=1e-2), tmp_path)
    changed = {name for name, value in trained.vae.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("decoder.") for name in changed)
    assert not any(name.startswith(("encoder.", "quant_conv.")) for name in changed)
