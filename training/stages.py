"""What each stage learns from: the module that is trained, its loss, its plan. One function a stage.

The stages are trained independently of each other, as in the paper: the VAE on pictures, the hand prior with its
sentence encoder on (prompt, SMPL-H parameters), the Text+Hand encoder with the UNet on (prompt, true hands, picture),
after a pre-training of the encoder alone that stands in for CLIP's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor, nn

from ..contract import BETAS, PLACEMENT, ROTATIONS
from ..models.checkpoint import Checkpoint
from ..models.text_hand_encoder import TextHandEncoder, pooled
from .data import Dataset, images_to_float
from .loop import Loss

VAE_CROP = 64  # pixels; the VAE is nearly local, and a crop costs a quarter of the picture
# Share of a batch that shows two hands: fifteen in a hundred scenes do, and two are harder to draw, and harder still to
# pose alike where no word says how.
TWO_HANDS = {"prior": 0.5, "pictures": 0.5}
NOISY = 2.5  # how far timesteps lean towards noise, where colours are decided
FINGERS = 4.0  # how much more an error on a joint of the hand counts than one on the background
KL_WEIGHT = 1e-3  # per latent value, against L1 per pixel value: latents near unit noise, pictures still sharp
COLOUR = 8.0  # weight of the mean error over blocks of 8 x 8 latent pixels
DROP = 0.1  # of text alone, of hands alone, and of both: what guidance needs


def alphas_cumprod(schedule: dict[str, object]) -> Tensor:
    """The noise schedule's cumulative alphas [num_train_timesteps], float32."""
    return DDPMScheduler.from_config(schedule).alphas_cumprod.float()


def pick(data: Dataset, generator: torch.Generator, batch: int, *names: str) -> list[Tensor]:
    rows = torch.randint(len(data["ids"]), (batch,), generator=generator)
    return [data[name][rows] for name in names]


def draw(two: Tensor, share: float, batch: int, generator: torch.Generator) -> Tensor:
    """Random rows [batch], of which `share` show two hands; two: bool [N], which do."""
    weight = torch.where(two, share / two.sum().clamp_min(1), (1 - share) / (~two).sum().clamp_min(1))
    return torch.multinomial(weight, batch, replacement=True, generator=generator)


def wording(data: Dataset, rows: Tensor, generator: torch.Generator) -> Tensor:
    """One of each picture's prompts [N, 77]."""
    ids = data["ids"][rows]
    return ids[torch.arange(len(rows)), torch.randint(ids.shape[1], (len(rows),), generator=generator)]


def timesteps(count: int, length: int, generator: torch.Generator, shift: float = 1.0) -> Tensor:
    """Random timesteps [count] of 0..length - 1, spread evenly over the batch.

    shift: > 1 leans towards noise, t -> s t / (1 + (s - 1) t) on 0..1 (Esser et al. 2024, equation 23).
    """
    t = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    return (shift * t / (1 + (shift - 1) * t) * length).long().clamp_max(length - 1)


class VAELoss(nn.Module):
    """The autoencoder with its loss as `forward`, so that data-parallel wrappers see one module.

    decoder_only: the encoder stays as it is, for a checkpoint whose UNet knows its latents.
    """

    def __init__(self, vae: AutoencoderKL, decoder_only: bool = False) -> None:
        super().__init__()
        self.vae = vae
        self.fixed = [vae.encoder, vae.quant_conv] if decoder_only else []

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = decoded - images
        # Differences between neighbours: what a plain pixel loss blurs, edges between fingers above all.
        edges = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3))
        # Block means: small errors of colour, which edges outweigh, make one tone of skin another.
        colours = F.avg_pool2d(error, 8).abs().mean()
        return error.abs().mean() + edges + 2 * colours + KL_WEIGHT * posterior.kl().mean() / noise[0].numel()


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
    two = (data["params"][:, PLACEMENT].unflatten(1, (2, -1))[:, :, 0] > 0.5).all(1)

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows = draw(two, TWO_HANDS["prior"], batch, generator)
        ids = data["ids"][rows, 0]  # the wording that leaves out most: what is not said is this network's to decide
        clean = (data["params"][rows] - mean) / std
        dropped = torch.rand(batch, generator=generator) < DROP
        ids = torch.where(dropped[:, None], empty, ids)
        timestep = torch.randint(len(alphas), (batch,), generator=generator)
        alpha = alphas[timestep, None]
        noise = torch.randn(clean.shape, generator=generator)
        return module(ids, alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, timestep, clean)

    return loss


def conditions(
    data: Dataset, rows: Tensor, generator: torch.Generator, empty: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Prompts [N, 77] and hands of some rows; of a tenth each, text, hands or both are dropped."""
    hands = {name: data[name][rows].float() for name in ("joints", "rotations", "bps", "visibility")}
    fate = torch.rand(len(rows), generator=generator)
    no_text = (fate < DROP) | ((fate >= 2 * DROP) & (fate < 3 * DROP))
    no_hands = (fate >= DROP) & (fate < 3 * DROP)
    hands["visibility"] = torch.where(no_hands[:, None], 0.0, hands["visibility"])
    return torch.where(no_text[:, None], empty, wording(data, rows, generator)), hands


class EncoderLoss(nn.Module):
    """The Text+Hand encoder with linear heads that read off its tokens what the picture shows.

    It stands in for CLIP's pre-training. From an untrained text transformer the UNet would have to learn what words
    mean through 77 tokens of which one says "dark" and sixty are padding; that took longer than all the drawing. After
    this, every token that follows the end of the text, and every token of a visible hand, tells gesture, side, skin
    and background; hand tokens also tell how their hand is turned and where they are.
    """

    def __init__(self, encoder: TextHandEncoder, classes: Sequence[int]) -> None:
        super().__init__()
        self.encoder, self.classes = encoder, list(classes)
        self.labels = nn.Linear(encoder.config.hidden_size, sum(classes))
        self.wrist = nn.Linear(encoder.config.hidden_size, 6)
        self.place = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, ids: Tensor, hands: dict[str, Tensor], labels: Tensor) -> Tensor:
        config, length = self.encoder.config, ids.shape[1]
        tokens = self.encoder(ids, **hands)[..., : config.hidden_size]
        after = (ids == config.eos_token_id).int().cummax(1).values  # from the end of the text on
        seen = (hands["visibility"] > 0.5).float().repeat_interleave(self.encoder.tokens_per_hand, 1)
        share = torch.cat([after / after.sum(), seen / seen.sum().clamp_min(1)], 1)  # text and hands count alike
        total = torch.zeros(())
        read = self.labels(tokens).float().split(self.classes, -1)
        for logits, label in zip(read, labels.T, strict=True):
            error = F.cross_entropy(logits.flatten(0, 1), label.repeat_interleave(tokens.shape[1]), reduction="none")
            total = total + (error.view_as(share) * share).sum() / math.log(logits.shape[-1])
        turn = hands["rotations"][:, :, :1].expand(-1, -1, self.encoder.tokens_per_hand, -1).flatten(1, 2)
        of_hand = tokens[:, length:]
        error = (self.wrist(of_hand).float() - turn).square().mean(-1)
        joints = hands["joints"].new_zeros(*seen.shape, 2).unflatten(1, (2, -1))
        joints[:, :, : hands["joints"].shape[2]] = hands["joints"]  # the vertex token has no place of its own
        error = error + 4 * (self.place(of_hand).float() - joints.flatten(1, 2)).square().mean(-1)
        return total + (error * share[:, length:]).sum()


def encoder_loss(data: Dataset, batch: int, empty: Tensor) -> Loss:
    """data: ids, labels, joints, rotations, bps, visibility."""

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(data["ids"]), (batch,), generator=generator)
        return module(*conditions(data, rows, generator, empty), data["labels"][rows])

    return loss


def emphasis(joints: Tensor, visibility: Tensor, height: int, width: int, reach: float = 1.2) -> Tensor:
    """How much each latent pixel counts [N, h, w], 1 on average: more around the joints of visible hands.

    A finger of a small hand is one or two latent pixels wide, and a plain mean lets the background outvote it.
    joints: [N, 2, J, 2] in 0..1; visibility: [N, 2]; reach: latent pixels.
    """
    y = (torch.arange(height) + 0.5)[:, None] - joints[..., 1, None, None] * height
    x = (torch.arange(width) + 0.5) - joints[..., 0, None, None] * width
    near = torch.exp(-(x.square() + y.square()) / (2 * reach**2))  # [N, 2, J, h, w]
    weight = 1 + FINGERS * (near.amax(2) * visibility[..., None, None]).amax(1)
    return weight / weight.mean()


class PictureLoss(nn.Module):
    """The Text+Hand encoder, the UNet and the positional kernel."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.text_hand_encoder, self.unet = checkpoint.text_hand_encoder, checkpoint.unet
        self.position_kernel = checkpoint.position_kernel

    def forward(
        self, ids: Tensor, hands: dict[str, Tensor], noisy: Tensor, timestep: Tensor, target: Tensor, told: Tensor
    ) -> Tensor:
        """told: [N], 1 where there is a prompt."""
        context = self.text_hand_encoder(ids, **hands)
        error = self.unet(noisy, timestep, context).sample.float() - target
        # A wrong colour is a small error everywhere, which plain mean squares leave for last: count block means, too
        # (as the multiscale loss of Hoogeboom et al. 2023, simple diffusion). The optimum stays the same. Not without
        # a prompt, where colours are anyone's guess.
        colours = F.avg_pool2d(error, 8).square().mean((1, 2, 3))
        weight = emphasis(hands["joints"], hands["visibility"], *error.shape[2:])[:, None]
        return (weight * error.square()).mean() + COLOUR * (told * colours).mean()


def picture_loss(data: Dataset, batch: int, checkpoint: Checkpoint, empty: Tensor) -> Loss:
    """v-loss (or epsilon) at timesteps that lean towards noise; text, hands or both dropped.

    data: latents [N,4,h,w] (scaled), ids, joints, rotations, bps, visibility.
    """
    alphas = alphas_cumprod(checkpoint.scheduler)
    velocity = checkpoint.scheduler["prediction_type"] == "v_prediction"
    two = (data["visibility"] > 0.5).all(1)

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows = draw(two, TWO_HANDS["pictures"], batch, generator)
        ids, hands = conditions(data, rows, generator, empty)
        clean = data["latents"][rows].float()
        timestep = timesteps(batch, len(alphas), generator, NOISY)
        signal, sigma = (a[:, None, None, None] for a in (alphas[timestep].sqrt(), (1 - alphas[timestep]).sqrt()))
        noise = torch.randn(clean.shape, generator=generator)
        target = signal * noise - sigma * clean if velocity else noise
        told = (ids != empty).any(1).float()
        return module(ids, hands, signal * clean + sigma * noise, timestep, target, told)

    return loss
