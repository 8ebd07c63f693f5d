"""The positional kernel in cross-attention: pixels attend to the joints near them.

Every cross-attention logit between a latent pixel at p and a token at position q gets

    sum_f a_f (cos w_f (p_x - q_x) + cos w_f (p_y - q_y)),    w_f = pi/2 * frequency

with one learned amplitude a_f per head and layer. Because cos(p - q) = cos p cos q + sin p sin q, this equals
concatenating `code(p)` to the queries and `a * code(q)` to the keys: it stays plain dot-product attention. All layers
of one grid share `code(p)`, and the keys, which have the amplitudes, are the same at each step. With a = 0 a pretrained
UNet starts unchanged. A wider picture than the model's own sees more at the sides: positions of x then leave [0, 1].
The kernel is ours, not the paper's; without it our small models never learned to draw fingers at their joints. A
checkpoint without `position_kernel` uses the paper's plain mechanism.

    kernel = PositionKernel.for_unet(unet, frequencies=(1, 2, 4, 8))
    attach(unet, kernel, latent_size=(64, 64))
    unet(latents, timestep, context)     # context[..., W:] are the tokens' position codes
"""

from __future__ import annotations

from collections.abc import Sequence
from math import pi

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

# After its position's code, a token has a channel for its kind; tokens without a position get a learned constant.
TOKEN_KINDS = ("text", "vertices")
# Two more channels: whether the token is hidden from all pixels, and whether it passes the hands' gate. They are free:
# the width is padded to a multiple of 8 anyway.
HIDDEN, GATED = len(TOKEN_KINDS), len(TOKEN_KINDS) + 1
BLIND = -1e4  # added to the logits of hidden tokens: their weight is 0, in float16 too
# The gate's start: 44 hand tokens together weigh 0.2 % of one text token. So a UNet that knows text alone starts nearly
# unchanged, as with ControlNet's zero convolutions (Zhang et al. 2023).
CLOSED = -10.0
# Stored amplitudes are a tenth of the effective ones. Adam moves a weight by about its learning rate a step, and these
# must reach the order of one in a few hundred steps, or the kernel stays flat.
SCALE = 10.0


def code_width(frequencies: Sequence[float]) -> int:
    """Channels of a position code: 4 per frequency, one per token kind, and two; filled up to a multiple of 8."""
    if not frequencies:
        return 0
    return -(-(4 * len(frequencies) + len(TOKEN_KINDS) + 2) // 8) * 8


def position_code(position: Tensor, frequencies: Tensor) -> Tensor:
    """[..., 2] positions in [0, 1] -> [..., 4 F]: cos and sin for x, then for y."""
    angle = (2 * position - 1)[..., None] * (frequencies * (pi / 2))  # [..., 2, F]
    return torch.cat([angle.cos(), angle.sin()], -1).flatten(-2)


class PositionKernel(ModelMixin, ConfigMixin):
    """The amplitudes of all cross-attention layers; saved as a folder of its own beside the UNet.

    They start at zero, so that a pretrained UNet starts unchanged. gated: hand tokens pass a learned gate, one a head,
    that starts closed, and pixels ignore hidden tokens.
    """

    @register_to_config
    def __init__(
        self, heads: Sequence[int] = (8,), frequencies: Sequence[float] = (1, 2, 4, 8), gated: bool = False
    ) -> None:
        super().__init__()
        self.amplitudes = nn.ParameterList(nn.Parameter(torch.zeros(h, len(frequencies))) for h in heads)
        self.constants = nn.ParameterList(nn.Parameter(torch.zeros(h, len(TOKEN_KINDS))) for h in heads)
        self.gates = nn.ParameterList(nn.Parameter(torch.full((h,), CLOSED / SCALE)) for h in heads if gated)

    @torch.no_grad()
    def focus(self) -> None:
        """Starts the heads from blind (0) to sharp (1.5), for a UNet trained from scratch."""
        for amplitude in self.amplitudes:
            sharpness = torch.linspace(0, 1.5, len(amplitude), device=amplitude.device)
            amplitude.copy_((sharpness / SCALE)[:, None].expand_as(amplitude))

    @classmethod
    def for_unet(
        cls, unet: UNet2DConditionModel, frequencies: Sequence[float] = (1, 2, 4, 8), gated: bool = False
    ) -> PositionKernel:
        heads = [layer.heads for layer in cross_attentions(unet)]
        return cls(heads=heads, frequencies=list(frequencies), gated=gated)

    def weights(self, layer: int) -> Tensor:
        """What a layer's keys multiply their tokens' codes by: [heads, C]."""
        parts = [SCALE * self.amplitudes[layer].float().repeat(1, 4), SCALE * self.constants[layer].float()]
        if self.config.gated:
            gate = SCALE * self.gates[layer].float()[:, None]
            parts += [torch.full_like(gate, BLIND), gate]
        filled = torch.cat(parts, -1)
        return F.pad(filled, (0, code_width(self.config.frequencies) - filled.shape[-1]))


class Grid:
    """Where the pixels of a UNet's levels are. `size` is that of the latents (h, w) in the next forward pass.

    It begins as the model's own, whose sides are positions 0 and 1.
    """

    def __init__(self, latent_size: tuple[int, int], frequencies: Sequence[float]) -> None:
        self.own, self.frequencies = latent_size, list(frequencies)
        self.size: tuple[int, int] = latent_size
        self._codes: dict[int, Tensor] | None = None  # of one forward pass that begins with `resize`

    def resize(self, height: int, width: int) -> None:
        """Sets the latents' size; under `torch.export` both may be symbols."""
        self.size, self._codes = (height, width), {}

    def code(self, factor: int, device: torch.device) -> Tensor:
        """The code of a level's pixels, [h w, C]: those of the latents divided by `factor`, row by row."""
        if self._codes is None:
            return self._code(factor, device)
        if factor not in self._codes:
            self._codes[factor] = self._code(factor, device)
        return self._codes[factor]

    def _code(self, factor: int, device: torch.device) -> Tensor:
        height, width = (-(-side // factor) for side in self.size)
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=device)
        y = (torch.arange(height, device=device) + 0.5) / height
        # From the middle, in units of the height: a pixel is as wide as it is high, whatever the picture's width.
        own = self.own[1] / self.own[0]
        x = 0.5 + (torch.arange(width, device=device) + 0.5 - 0.5 * width) / height / own
        grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).flatten(0, 1)
        code = position_code(grid, frequencies)
        ones = torch.ones(code.shape[0], len(TOKEN_KINDS) + 2, device=device)
        filled = torch.cat([code, ones], -1)
        return F.pad(filled, (0, code_width(self.frequencies) - filled.shape[-1]))


def cross_attentions(unet: UNet2DConditionModel) -> list[Attention]:
    """The cross-attention layers of a UNet, in the order of `modules`."""
    return [module for module in unet.modules() if isinstance(module, Attention) and module.is_cross_attention]


def level_factors(unet: UNet2DConditionModel) -> list[int]:
    """For each cross-attention layer, the latents' pixels a side that one of its pixels covers."""
    deepest = len(unet.down_blocks) - 1
    factors = []
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            place, number = name.split(".")[:2]
            if place == "down_blocks":
                level = int(number)
            else:
                level = deepest - int(number) if place == "up_blocks" else deepest
            factors.append(2**level)
    return factors


class CrossAttention:
    """Attention processor for one cross-attention layer, with or without the kernel.

    `encoder_hidden_states` is the context [N, L, W + code], or the list of all layers' (key, value) pairs from
    `keys_values`, for a loop with a constant context. factor: see `level_factors`.
    """

    def __init__(self, layer: int, kernel: PositionKernel | None, grid: Grid | None, factor: int) -> None:
        self.layer, self.kernel, self.grid, self.factor = layer, kernel, grid, factor

    def keys_values(self, attn: Attention, context: Tensor) -> tuple[Tensor, Tensor]:
        """[N, L, W + code] -> key [N, heads, L, d + code], value [N, heads, L, d]."""
        width = attn.to_k.in_features
        text, code = context[..., :width], context[..., width:]
        key = attn.to_k(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        value = attn.to_v(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        if self.kernel is not None:
            weighted = code[:, None].float() * self.kernel.weights(self.layer)[:, None]
            key = torch.cat([key, weighted.to(key.dtype)], -1)
        return key, value

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | list[tuple[Tensor, Tensor]],
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) * attn.scale
        if isinstance(encoder_hidden_states, list):
            key, value = encoder_hidden_states[self.layer]
        else:
            key, value = self.keys_values(attn, encoder_hidden_states)
        if self.grid is not None:
            code = self.grid.code(self.factor, query.device)
            query = torch.cat([query, code.to(query.dtype).expand(*query.shape[:2], -1, -1)], -1)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        mixed = mixed[..., : attn.inner_dim // attn.heads]  # exported values are padded to the keys' width
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def attach(unet: UNet2DConditionModel, kernel: PositionKernel | None, latent_size: tuple[int, int]) -> Grid | None:
    """Makes every cross-attention layer of `unet` use the kernel (None: plain attention) on a latent grid (h, w), which
    it returns."""
    layers = cross_attentions(unet)
    if kernel is not None and [layer.heads for layer in layers] != list(kernel.config.heads):
        raise ValueError(
            f"The kernel's heads must be the UNet's, {[layer.heads for layer in layers]}, got "
            f"{list(kernel.config.heads)}."
        )
    grid = Grid(latent_size, kernel.config.frequencies) if kernel is not None else None
    for index, (layer, factor) in enumerate(zip(layers, level_factors(unet), strict=True)):
        layer.set_processor(CrossAttention(index, kernel, grid, factor))
    return grid
