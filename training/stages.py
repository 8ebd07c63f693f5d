"""What each stage learns from: the module that is trained, its loss, its plan. One function a stage.

The stages are trained independently of each other, as in the paper: the VAE on pictures, the hand prior with its
sentence encoder on (prompt, SMPL-H parameters), the Text+Hand encoder with the UNet on (prompt, true hands, picture).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor, nn

from ..contract import BETAS, PLACEMENT, ROTATIONS
from ..models.checkpoint import Checkpoint
from ..models.text_hand_encoder import pooled
from .data import Dataset, images_to_float
from .loop import Loss

VAE_CROP = 64  # pixels; the VAE is nearly local, and a crop costs a quarter of the picture
KL_WEIGHT = 1e-3  # per latent value, against L1 per pixel value: latents near unit noise, pictures still sharp
DROP = 0.1  # of text alone, of hands alone, and of both: what guidance needs


def alphas_cumprod(schedule: dict[str, object]) -> Tensor:
    """The noise schedule's cumulative alphas [num_train_timesteps], float32."""
    return DDPMScheduler.from_config(schedule).alphas_cumprod.float()


def pick(data: Dataset, generator: torch.Generator, batch: int, *names: str) -> list[Tensor]:
    rows = torch.randint(len(data["ids"]), (batch,), generator=generator)
    return [data[name][rows] for name in names]


class VAELoss(nn.Module):
    """The autoencoder with its loss as `forward`, so that data-parallel wrappers see one module."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = (decoded - images).abs().mean()
        # Differences between neighbours: what a plain pixel loss blurs, edges between fingers above all.
        edges = sum((decoded.diff(dim=axis) - images.diff(dim=axis)).abs().mean() for axis in (2, 3))
        return error + edges + KL_WEIGHT * posterior.kl().mean() / noise[0].numel()


def vae_loss(data: Dataset, batch: int, vae: AutoencoderKL) -> Loss:
    """Random crops of random pictures."""
    channels, factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        size = data["images"].shape[1]
        crop = min(VAE_CROP, size)
        (images,) = pick(data, generator, batch, "images")
        y, x = (int(torch.randint(size - crop + 1, (1,), generator=generator)) for _ in range(2))
        images = images_to_float(images[:, y : y + crop, x : x + crop])
        noise = torch.randn(batch, channels, crop // factor, crop // factor, generator=generator)
        return module(images, noise)

    return loss


class PriorLoss(nn.Module):
    """The hand prior and the sentence encoder that conditions it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.text_encoder, self.hand_prior = checkpoint.text_encoder, checkpoint.hand_prior
        self.eos = checkpoint.special_tokens["eos"]
        # Fingers and places decide the picture; legs and trunk hardly move.
        weight = torch.full((PLACEMENT.stop,), 0.2)
        weight[ROTATIONS.start + 6 * 16 : ROTATIONS.stop] = 1.0
        weight[BETAS] = 0.05  # no prompt speaks of the shape
        weight[PLACEMENT] = 1.0
        self.register_buffer("weight", weight / weight.mean(), persistent=False)

    def forward(self, ids: Tensor, noisy: Tensor, timestep: Tensor, clean: Tensor) -> Tensor:
        # The encoder looks back only, so what follows the last end-of-text token costs time and changes nothing.
        ids = ids[:, : int((ids == self.eos).int().argmax(1).max()) + 1]
        hidden = self.text_encoder(ids).last_hidden_state
        predicted = self.hand_prior(noisy, timestep, pooled(hidden, ids, self.eos))
        return (self.weight * (predicted.float() - clean).square()).mean()


def set_normalisation(checkpoint: Checkpoint, params: Tensor, floor: float = 0.02) -> None:
    """Stores the parameters' mean and standard deviation in the hand prior; nearly constant ones get `floor`."""
    checkpoint.hand_prior.mean.copy_(params.mean(0))
    checkpoint.hand_prior.std.copy_(params.std(0).clamp_min(floor))


def prior_loss(data: Dataset, batch: int, checkpoint: Checkpoint, empty: Tensor) -> Loss:
    """Denoising to x0 at uniform timesteps; a tenth of the prompts is dropped. empty: ids of "" [77]."""
    alphas = alphas_cumprod(checkpoint.hand_scheduler)
    mean, std = checkpoint.hand_prior.mean, checkpoint.hand_prior.std

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        ids, params = pick(data, generator, batch, "ids", "params")
        clean = (params - mean) / std
        dropped = torch.rand(batch, generator=generator) < DROP
        ids = torch.where(dropped[:, None], empty, ids)
        timestep = torch.randint(len(alphas), (batch,), generator=generator)
        alpha = alphas[timestep, None]
        noise = torch.randn(clean.shape, generator=generator)
        return module(ids, alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, timestep, clean)

    return loss


class PictureLoss(nn.Module):
    """The Text+Hand encoder, the UNet and the positional kernel."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.text_hand_encoder, self.unet = checkpoint.text_hand_encoder, checkpoint.unet
        self.position_kernel = checkpoint.position_kernel

    def forward(self, ids: Tensor, hands: dict[str, Tensor], noisy: Tensor, timestep: Tensor, target: Tensor) -> Tensor:
        context = self.text_hand_encoder(ids, **hands)
        return F.mse_loss(self.unet(noisy, timestep, context).sample.float(), target)


def picture_loss(data: Dataset, batch: int, checkpoint: Checkpoint, empty: Tensor) -> Loss:
    """Plain v-loss (or epsilon) at uniform timesteps; text, hands or both dropped.

    data: latents [N,4,h,w] (scaled), ids, joints, rotations, bps, visibility.
    """
    alphas = alphas_cumprod(checkpoint.scheduler)
    velocity = checkpoint.scheduler["prediction_type"] == "v_prediction"
    cues = ("joints", "rotations", "bps")

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        ids, latents, visibility, *features = pick(data, generator, batch, "ids", "latents", "visibility", *cues)
        hands = {name: value.float() for name, value in zip(cues, features, strict=True)}
        fate = torch.rand(batch, generator=generator)
        no_text = (fate < DROP) | ((fate >= 2 * DROP) & (fate < 3 * DROP))
        no_hands = (fate >= DROP) & (fate < 3 * DROP)
        ids = torch.where(no_text[:, None], empty, ids)
        hands["visibility"] = torch.where(no_hands[:, None], 0.0, visibility.float())
        clean = latents.float()
        timestep = torch.randint(len(alphas), (batch,), generator=generator)
        signal, sigma = (a[:, None, None, None] for a in (alphas[timestep].sqrt(), (1 - alphas[timestep]).sqrt()))
        noise = torch.randn(clean.shape, generator=generator)
        target = signal * noise - sigma * clean if velocity else noise
        return module(ids, hands, signal * clean + sigma * noise, timestep, target)

    return loss
