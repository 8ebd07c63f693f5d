"""Sampling with PyTorch and diffusers' own scheduler, for training's sample grids.

The product's sampler in runtime/ does without PyTorch; tests compare it with this plain loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..data.latents import encode_prompts
from ..models.checkpoint import Checkpoint, decode
from ..models.hand_features import HandFeatures
from ..models.smplh import SMPLH
from ..models.text_hand_encoder import FEATURES as CUES
from ..models.text_hand_encoder import word_states

Network = Callable[[Tensor, Tensor], Tensor]


def image_grid(images: Tensor, columns: int) -> Tensor:
    """uint8 [N, H, W, 3] -> one picture [rows * H, columns * W, 3]."""
    rows = -(-len(images) // columns)
    height, width = images.shape[1:3]
    padded = torch.cat([images, images.new_zeros(rows * columns - len(images), height, width, 3)])
    return padded.view(rows, columns, height, width, 3).transpose(1, 2).reshape(rows * height, columns * width, 3)


@torch.no_grad()
def ddim(network: Network, x: Tensor, schedule: dict[str, Any], steps: int) -> Tensor:
    """Deterministic DDIM from noise x. network: (x, timestep [B]) -> the output, guidance included."""
    scheduler = DDIMScheduler.from_config(schedule)
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep.to(x.device).expand(len(x))), timestep, x).prev_sample
    return x


@torch.no_grad()
def sample_hands(
    checkpoint: Checkpoint, ids: Tensor, seed: int = 0, steps: int | None = None, noise: Tensor | None = None
) -> Tensor:
    """Stage 1, as the checkpoint's defaults have it: token ids [N, 77] -> normalised parameters [N, P].

    noise: [N, P] to start from, instead of the seed's.
    """

    def words(ids: Tensor) -> Tensor:
        hidden = checkpoint.text_encoder(ids).last_hidden_state
        return word_states(hidden, ids, checkpoint.special_tokens["eos"], ids.shape[1])

    text, guidance = words(ids), checkpoint.defaults["hand_guidance"]
    empty = encode_prompts([""], checkpoint.tokenizer, checkpoint.special_tokens).to(ids.device)
    without = words(empty).expand_as(text)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        given = checkpoint.hand_prior(x, t, text)
        return given if guidance == 1 else torch.lerp(checkpoint.hand_prior(x, t, without), given, guidance)

    if noise is None:
        noise = torch.randn(len(ids), len(checkpoint.hand_prior.mean), generator=torch.Generator().manual_seed(seed))
    steps = steps or checkpoint.defaults["hand_steps"]
    return ddim(predict, noise.to(ids.device), checkpoint.hand_scheduler, steps)


@torch.no_grad()
def hands_of(checkpoint: Checkpoint, x: Tensor) -> dict[str, Tensor]:
    """Hand features of normalised parameters [N, P], with the checkpoint's own body; see `HandFeatures`."""
    assert checkpoint.body is not None
    height, width = checkpoint.image_size
    prior, basis = checkpoint.hand_prior, checkpoint.text_hand_encoder.basis
    return HandFeatures(SMPLH.load(checkpoint.body), prior.mean.cpu(), prior.std.cpu(), basis.cpu(), width / height)(x)


@torch.no_grad()
def sample_pictures(
    checkpoint: Checkpoint,
    ids: Tensor,
    empty: Tensor,
    hands: dict[str, Tensor],
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
) -> Tensor:
    """Stage 2: token ids and hand features -> uint8 pictures [N, H, W, 3]. empty: ids of "" [77]."""
    steps = steps or checkpoint.defaults["steps"]
    guidance = checkpoint.defaults["guidance"] if guidance is None else guidance
    cues = {name: hands[name].float() for name in CUES}
    blank = {**cues, "visibility": torch.zeros_like(cues["visibility"])}
    encoder = checkpoint.text_hand_encoder
    context = torch.cat([encoder(empty.expand(len(ids), -1), **blank), encoder(ids, **cues)])

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        both = checkpoint.unet(torch.cat([x, x]), torch.cat([timestep, timestep]), context).sample
        without, given = both.chunk(2)
        return without + guidance * (given - without)

    shape = (checkpoint.unet.config.in_channels, *checkpoint.latent_size)
    generator = torch.Generator().manual_seed(seed)
    noise = initial_noise(len(ids), shape, checkpoint.defaults["noise_offset"], generator).to(ids.device)
    return decode(checkpoint, ddim(network, noise, checkpoint.scheduler, steps))


def initial_noise(count: int, shape: tuple[int, ...], offset: float, generator: torch.Generator) -> Tensor:
    """[count, C, h, w]: the noise that pictures start from; as `runtime.noise.initial`, with PyTorch's numbers."""
    noise = torch.randn(count, *shape, generator=generator)
    return noise + offset * torch.randn(count, shape[0], 1, 1, generator=generator) if offset else noise


@torch.no_grad()
def encode(checkpoint: Checkpoint, images: Tensor) -> Tensor:
    """Pictures in [-1, 1] [N, 3, H, W] -> scaled latents."""
    config = checkpoint.vae.config
    mean = checkpoint.vae.encode(images).latent_dist.mean
    return (mean - (config.shift_factor or 0.0)) * config.scaling_factor


@torch.no_grad()
def means_of(checkpoint: Checkpoint, images: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> latents [N, C, h, w] as the VAE gives them, not scaled. Parts of 8 need little memory."""
    parts = [part.permute(0, 3, 1, 2).float() / 127.5 - 1 for part in images.split(8)]
    return torch.cat([checkpoint.vae.encode(part).latent_dist.mean for part in parts])
