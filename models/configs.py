"""Sizes of the whole system. One description serves the tests, the demo and the paper's scale.

checkpoint = random_checkpoint(CONFIGS["tiny"])        # see models/checkpoint.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..settings import SETTINGS

CUES = ("joints", "rotations", "vertices")  # the Text+Hand encoder's possible inputs about the hands
ROTATION_FRAMES = ("parent", "camera")  # frames of finger joints' rotations

# Noise schedules in diffusers' words. Stage 1 predicts x0; stage 2 of the demo predicts v with zero terminal SNR
# (Lin et al. 2024), so that the last step of training is pure noise, as the first step of sampling is.
HAND_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "sample",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
DEMO_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
SD_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


@dataclass(frozen=True)
class Config:
    """The sizes of every stage. Names follow diffusers and transformers."""

    image_size: tuple[int, int] = (128, 128)  # H, W in pixels
    num_people: int = 1  # that a picture shows at most
    # Text: both the text encoder of stage 1 and the Text+Hand encoder
    vocab_size: int = 1024
    text_width: int = 128
    text_layers: int = 4
    text_heads: int = 4
    text_length: int = 77
    # Text+Hand encoder and positional kernel
    cues: tuple[str, ...] = CUES
    rotation_frame: str = "parent"
    frequencies: tuple[float, ...] = (1, 2, 4, 8)
    # Hand prior
    prior_width: int = 128
    prior_layers: int = 4
    prior_heads: int = 4
    # UNet: per level, whether it has cross-attention, and whether a second one replaces its self-attention
    unet_channels: tuple[int, ...] = (64, 96, 128)
    unet_attention: tuple[bool, ...] = (False, True, True)
    unet_only_cross: tuple[bool, ...] | bool = False
    unet_layers: int = 1
    unet_heads: int | tuple[int, ...] = 4  # diffusers calls the number of heads `attention_head_dim` here
    unet_groups: int = 16
    # VAE: patches of pixels become channels, then each level but the last halves the image
    latent_channels: int = 4
    vae_patch: int = 1  # above 1: PatchAutoencoderKL
    vae_channels: tuple[int, ...] = (32, 64, 96)
    vae_layers: int = 1
    vae_groups: int = 16
    schedule: str = "demo"  # "demo" or "sd"
    # A request's defaults
    steps: int = 12
    solver: str = "ddim"
    guidance: float = 1.5
    hand_steps: int = 10
    hand_solver: str = "ddim"
    hand_guidance: float = 1.0
    noise_offset: float = 0.0
    hand_redraws: int = 0

    @property
    def latent_size(self) -> tuple[int, int]:
        factor = latent_factor({"patch_size": self.vae_patch, "block_out_channels": self.vae_channels})
        return self.image_size[0] // factor, self.image_size[1] // factor


def latent_factor(vae: Mapping[str, Any]) -> int:
    """How many pixels a side a latent pixel covers. vae: configuration of an AutoencoderKL or PatchAutoencoderKL."""
    return int(vae.get("patch_size", 1)) * 2 ** (len(vae["block_out_channels"]) - 1)


def size_multiple(vae: Mapping[str, Any], unet: Mapping[str, Any]) -> int:
    """What the sides of pictures are multiples of, in pixels. vae, unet: configurations."""
    return latent_factor(vae) * 2 ** (len(unet["block_out_channels"]) - 1)


def default_settings(config: Config) -> dict[str, Any]:
    """A request's defaults."""
    return {name: getattr(config, name) for name, setting in SETTINGS.items() if setting.bundle}


CONFIGS = {
    # For tests: made, exported and run in seconds. Its height, width, heads and layers all differ, to expose mix-ups.
    "tiny": Config(
        image_size=(32, 48),
        vocab_size=600,
        text_width=32,
        text_layers=2,
        text_heads=2,
        prior_width=32,
        prior_layers=2,
        prior_heads=2,
        unet_channels=(16, 32),
        unet_attention=(False, True),
        unet_heads=2,
        unet_groups=8,
        vae_channels=(8, 16),
        vae_groups=4,
        steps=4,
        hand_steps=3,
        noise_offset=0.1,
    ),
    # The finest level attends to hands and words, too; self-attention of its 1024 pixels would double the cost.
    "demo": Config(
        rotation_frame="camera",
        unet_attention=(True, True, True),
        unet_only_cross=(True, False, False),
        hand_steps=8,
        hand_guidance=2.0,
        noise_offset=0.06,
        hand_redraws=2,
    ),
    # The demo of people, twice as large. Sixteen channels keep small hands, which four blur; the UNet costs the same.
    "human": Config(
        image_size=(256, 256),
        vocab_size=2048,
        rotation_frame="camera",
        unet_attention=(True, True, True),
        unet_only_cross=(True, False, False),
        latent_channels=16,
        vae_patch=2,
        hand_steps=8,
        hand_guidance=2.0,
        hand_redraws=2,
    ),
    # The paper's scale: Stable Diffusion 1.5's UNet and VAE, CLIP ViT-L/14's text model, a prior of 512 x 8.
    "sd15": Config(
        image_size=(512, 512),
        vocab_size=49408,
        text_width=768,
        text_layers=12,
        text_heads=12,
        prior_width=512,
        prior_layers=8,
        prior_heads=8,
        unet_channels=(320, 640, 1280, 1280),
        unet_attention=(True, True, True, False),
        unet_layers=2,
        unet_heads=8,
        unet_groups=32,
        vae_channels=(128, 256, 512, 512),
        vae_layers=2,
        vae_groups=32,
        schedule="sd",
        steps=20,
        solver="dpm++2m",
        guidance=7.5,
    ),
}
