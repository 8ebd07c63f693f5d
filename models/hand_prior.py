"""The hand prior (Text-to-Hand-Params): a transformer that denoises SMPL-H parameters for a prompt.

It predicts the clean parameters x0 (as MDM does, Tevet et al. 2022). The parameters form 17 tokens along the body: one
for each finger and arm, the trunk, the legs, the shape, and each hand's place in the image. The sentence's vector is
added to all tokens, and each token attends to the prompt's words: one vector blurs which hand makes which gesture.

    x0 = prior(x, timestep, text)        # x [B, 330] normalised, timestep [B] in [0, 999], text [B, L, D]

With several people, x holds their parameters from left to right in the picture, and one transformer sees the 17 tokens
of each. A learned vector for each person tells them apart.

The text gives keys, values and a summand, the same at every step: `read` computes them once, `denoise` uses them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from ..contract import BETAS, NUM_PARAMS, PLACEMENT

# Joints of each token: trunk and head, legs, left arm, right arm, then the ten fingers.
JOINT_GROUPS = (
    (0, 3, 6, 9, 12, 15),
    (1, 2, 4, 5, 7, 8, 10, 11),
    (13, 16, 18, 20),
    (14, 17, 19, 21),
    *((first, first + 1, first + 2) for first in range(22, 52, 3)),
)
# The same as ranges of parameters, with the shape and the two hands' placement.
TOKENS: tuple[tuple[int, ...], ...] = (
    *(tuple(6 * joint + k for joint in group for k in range(6)) for group in JOINT_GROUPS),
    tuple(range(BETAS.start, BETAS.stop)),
    tuple(range(PLACEMENT.start, PLACEMENT.start + 4)),
    tuple(range(PLACEMENT.start + 4, PLACEMENT.stop)),
)
# The tokens' order of the parameters, and back.
ORDER = [index for token in TOKENS for index in token]
RESTORE = sorted(range(NUM_PARAMS), key=ORDER.__getitem__)


def timestep_features(timestep: Tensor, width: int) -> Tensor:
    """Sinusoidal features [B, width] of timesteps [B] (Vaswani et al. 2017); fractions are allowed."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=timestep.device) * (-math.log(10000.0) / half))
    angle = timestep.float()[:, None] * rates
    return torch.cat([angle.cos(), angle.sin()], -1)


class WordAttention(nn.Module):
    """Cross-attention to the prompt's words. Its last layer starts at zero, so that it begins without effect."""

    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(text_width, 2 * width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, key_value: Tensor) -> Tensor:
        """x [B, N, width], keys and values of the words [B, L, 2 * width] -> the summand for x, [B, N, width]."""
        query = self.query(self.norm(x)).unflatten(-1, (self.heads, -1))
        key, value = key_value.unflatten(-1, (2, self.heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, text_width: int, seed: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        with torch.random.fork_rng(devices=()):  # other weights of a seeded checkpoint do not depend on these
            torch.manual_seed(seed)
            self.words = WordAttention(width, heads, text_width)

    def forward(self, x: Tensor, key_value: Tensor) -> Tensor:
        """x: [B, N, width] -> the same shape. key_value: of the words, [B, L, 2 * width]."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.words(x, key_value)
        return x + self.mlp(self.norm2(x))


class HandPrior(ModelMixin, ConfigMixin):
    """A transformer diffusion model over SMPL-H parameters. The paper's size is width 512, 8 layers, one person."""

    mean: Tensor
    std: Tensor
    order: Tensor
    restore: Tensor

    @register_to_config
    def __init__(
        self,
        width: int = 512,
        num_layers: int = 8,
        num_heads: int = 8,
        text_width: int = 768,
        num_people: int = 1,
    ) -> None:
        super().__init__()
        # Normalisation of the parameters, saved with the weights: x = (params - mean) / std.
        self.register_buffer("mean", torch.zeros(num_people * NUM_PARAMS))
        self.register_buffer("std", torch.ones(num_people * NUM_PARAMS))
        # The order of the tokens' parameters, and back. Buffers: a list would be copied to the device at every step.
        self.register_buffer("order", torch.tensor(ORDER), persistent=False)
        self.register_buffer("restore", torch.tensor(RESTORE), persistent=False)
        self.encode = nn.ModuleList(nn.Linear(len(token), width) for token in TOKENS)
        self.decode = nn.ModuleList(nn.Linear(width, len(token)) for token in TOKENS)
        self.place = nn.Parameter(torch.randn(2 + len(TOKENS), width) * 0.02)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.text = nn.Linear(text_width, width)
        self.blocks = nn.ModuleList(Block(width, num_heads, text_width, seed) for seed in range(num_layers))
        self.norm = nn.LayerNorm(width)
        if num_people > 1:
            self.person = nn.Parameter(torch.randn(num_people, width) * 0.02)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """x0 [B, P] of noisy normalised parameters x [B, P] at timestep [B].

        text: [B, L, D], the text encoder's states of the words, the sentence's last; see `word_states`.
        """
        return self.denoise(x, timestep, self.read(text))

    def read(self, text: Tensor) -> Tensor:
        """The input of every step from text [B, L, D]: [B, L, width * (1 + 2 * blocks)].

        Only the last row of its first `width` columns counts: the sentence.
        """
        return torch.cat([reader(text) for reader in self.readers()], -1)

    def readers(self) -> list[nn.Module]:
        """The layers that `read` the text."""
        blocks = (block for block in self.blocks if isinstance(block, Block))
        return [self.text, *(block.words.key_value for block in blocks)]

    def denoise(self, x: Tensor, timestep: Tensor, read: Tensor) -> Tensor:
        """x0 [B, P] of x [B, P] at timestep [B]. read: from `read`."""
        width, people = self.config.width, self.config.num_people
        sentence, *words = read.split([width] + [2 * width] * len(self.blocks), -1)
        time = self.time(timestep_features(timestep, self.config.width).to(x.dtype))
        bodies = x if people == 1 else x.reshape(x.shape[0] * people, NUM_PARAMS)
        parts = bodies.index_select(1, self.order).split([len(token) for token in TOKENS], 1)
        tokens = [layer(part) for layer, part in zip(self.encode, parts, strict=True)]
        place: Tensor = self.place
        if people > 1:
            tokens = [torch.cat(tokens, 1).reshape(x.shape[0], people * len(TOKENS) * width)]
            place = torch.cat([place[:2], (place[2:] + self.person[:, None]).flatten(0, 1)])
        # Concatenated, then cut: stack would export one Unsqueeze a token.
        sequence = torch.cat([time, sentence[:, -1], *tokens], 1).unflatten(1, (-1, width)) + place
        told, body = sequence.split([2, people * len(TOKENS)], 1)
        sequence = torch.cat([told, body + told[:, :1] + told[:, 1:]], 1)
        for block, key_value in zip(self.blocks, words, strict=True):
            sequence = block(sequence, key_value)
        bodies = self.norm(sequence)[:, 2:].flatten(1)
        if people > 1:
            bodies = bodies.reshape(x.shape[0] * people, len(TOKENS) * width)
        out = [layer(part) for layer, part in zip(self.decode, bodies.split(width, 1), strict=True)]
        restored = torch.cat(out, 1).index_select(1, self.restore)
        return restored if people == 1 else restored.reshape(x.shape[0], people * NUM_PARAMS)
