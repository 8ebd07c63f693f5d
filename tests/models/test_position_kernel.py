"""The positional kernel: nothing at zero amplitude, else exactly the bias that its formula says."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from handiffuser.models.position_kernel import (
    SCALE,
    Grid,
    PositionKernel,
    attach,
    code_width,
    cross_attentions,
    position_code,
)

FREQUENCIES = (1, 2, 4)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            sample_size=(8, 16),
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=24,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        .eval()
        .requires_grad_(False)
    )


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    positions = torch.rand(2, 5, 2, generator=generator)
    codes = F.pad(position_code(positions, torch.tensor(FREQUENCIES)), (0, code_width(FREQUENCIES) - 12))
    text = torch.randn(2, 5, 24, generator=generator)
    return torch.randn(2, 4, 8, 16, generator=generator), text, codes, positions


def test_zero_amplitudes_change_nothing(unet):
    sample, text, codes, _ = inputs()
    plain = unet(sample, torch.tensor([3, 700]), text).sample
    kernel = PositionKernel.for_unet(unet, FREQUENCIES)
    attach(unet, kernel, (8, 16))
    with_kernel = unet(sample, torch.tensor([3, 700]), torch.cat([text, codes], -1)).sample
    torch.testing.assert_close(with_kernel, plain, atol=3e-6, rtol=1e-5)
    attach(unet, None, (8, 16))
    torch.testing.assert_close(unet(sample, torch.tensor([3, 700]), text).sample, plain, atol=3e-6, rtol=1e-5)


def test_it_is_the_bias_of_the_formula(unet):
    """One layer against attention with an explicit bias, on a grid that is not square."""
    _, text, codes, positions = inputs()
    kernel = PositionKernel.for_unet(unet, FREQUENCIES)
    torch.nn.init.normal_(kernel.amplitudes[0], std=1 / SCALE)
    attach(unet, kernel, (8, 16))
    layer = cross_attentions(unet)[0]
    hidden = torch.randn(2, 8 * 16, layer.to_q.in_features)
    got = layer(hidden, torch.cat([text, codes], -1))

    y, x = torch.meshgrid((torch.arange(8) + 0.5) / 8, (torch.arange(16) + 0.5) / 16, indexing="ij")
    pixels = torch.stack([x, y], -1).reshape(-1, 2)
    delta = 2 * (pixels[None, :, None] - positions[:, None])  # [2, N, 5, 2] in units of half an image
    rates = torch.tensor(FREQUENCIES) * math.pi / 2
    waves = torch.cos(delta[..., None] * rates).sum(-2)  # [2, N, 5, F]
    bias = torch.einsum("hf,bnlf->bhnl", SCALE * kernel.amplitudes[0], waves)
    heads = layer.heads

    def split(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(
        split(layer.to_q(hidden)), split(layer.to_k(text)), split(layer.to_v(text)), attn_mask=bias
    )
    wanted = layer.to_out[0](mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-4)


def test_a_wider_picture_sees_more_at_the_sides():
    """The middle of a wide grid is the grid of the model's own size, at every level."""
    grid, device = Grid((8, 16), FREQUENCIES), torch.device("cpu")
    own = {factor: grid.code(factor, device).unflatten(0, (8 // factor, -1)) for factor in (1, 2)}
    grid.resize(8, 24)
    for factor, code in own.items():
        wide, side = grid.code(factor, device).unflatten(0, (8 // factor, -1)), 4 // factor
        torch.testing.assert_close(wide[:, side:-side], code, atol=1e-5, rtol=0)


def test_hoisted_keys_give_the_same(unet):
    sample, text, codes, _ = inputs()
    kernel = PositionKernel.for_unet(unet, FREQUENCIES)
    for parameter in kernel.parameters():
        torch.nn.init.normal_(parameter)
    attach(unet, kernel, (8, 16))
    context = torch.cat([text, codes], -1)
    pairs = [layer.processor.keys_values(layer, context) for layer in cross_attentions(unet)]
    timestep = torch.tensor([3, 700])
    torch.testing.assert_close(unet(sample, timestep, pairs).sample, unet(sample, timestep, context).sample)


def test_it_learns_from_the_first_step(unet):
    """Zero amplitudes must not mean zero gradients."""
    sample, text, codes, _ = inputs()
    kernel = PositionKernel.for_unet(unet, FREQUENCIES)
    attach(unet, kernel, (8, 16))
    unet(sample, torch.tensor([3, 700]), torch.cat([text, codes], -1)).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in kernel.amplitudes)


def test_where_a_level_has_cross_attention_alone_both_layers_look(unet):
    """Nothing changes with zero amplitudes, and each of them learns."""
    torch.manual_seed(1)
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    twice = UNet2DConditionModel(**{**config, "only_cross_attention": (True, False)}).eval()
    assert len(cross_attentions(twice)) == len(cross_attentions(unet)) + 3  # one block down, two up
    sample, text, codes, _ = inputs()
    plain = twice(sample, torch.tensor([3, 700]), text).sample
    kernel = PositionKernel.for_unet(twice, FREQUENCIES)
    attach(twice, kernel, (8, 16))
    with_kernel = twice(sample, torch.tensor([3, 700]), torch.cat([text, codes], -1)).sample
    torch.testing.assert_close(with_kernel, plain, atol=3e-6, rtol=1e-5)
    with_kernel.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in kernel.amplitudes)


def test_code_width_fits_fused_kernels():
    assert code_width(()) == 0
    assert all(code_width(range(1, n + 1)) % 8 == 0 for n in range(1, 9))
    assert code_width((1, 2, 4)) == 16


def test_a_kernel_of_another_unet_is_refused(unet):
    with pytest.raises(ValueError, match="heads"):
        attach(unet, PositionKernel(heads=[8, 8], frequencies=[1]), (8, 16))
