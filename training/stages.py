"""Each stage's module, whose `forward` is its loss, and the functions that make its inputs with random numbers.

    stage = Stage("pictures", PictureLoss(checkpoint, plan), cache.rows, picture_inputs(checkpoint, plan), train)

The stages train independently, as in the paper: the VAE on pictures, the hand prior with its text encoder on (prompt,
SMPL-H parameters), the Text+Hand encoder with the UNet on (prompt, hands, picture). Without CLIP, the encoder first
trains alone. Each loss is a mean over its rows, so that processes and parts can share a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ..contract import BETAS, NUM_PARAMS, PLACEMENT, ROTATIONS
from ..errors import TrainingError
from ..models.autoencoder import PatchAutoencoderKL
from ..models.checkpoint import Checkpoint
from ..models.configs import latent_factor
from ..models.text_hand_encoder import TextHandEncoder, word_states
from .draws import Draws
from .recipe import EncoderPlan, HandPriorPlan, PicturesPlan, VaePlan
from .sample import CUES

Inputs = Callable[[dict[str, Tensor], Draws], Sequence[Any]]


def alphas_cumprod(schedule: dict[str, object]) -> Tensor:
    """The noise schedule's cumulative alphas [num_train_timesteps], float32."""
    return DDPMScheduler.from_config(schedule).alphas_cumprod.float()


def timesteps(draws: Draws, length: int, shift: float = 1.0) -> Tensor:
    """Random timesteps [n] of 0..length - 1, spread evenly over the batch.

    shift: > 1 leans towards noise, t -> s t / (1 + (s - 1) t) on 0..1 (Esser et al. 2024, equation 23).
    """
    t = draws.spread()
    return (shift * t / (1 + (shift - 1) * t) * length).long().clamp_max(length - 1)


def wording(ids: Tensor, draws: Draws, which: str = "any") -> Tensor:
    """One of each sample's prompts: [n, W, 77] -> [n, 77]."""
    choice = draws.integers(ids.shape[1])  # drawn always, so that later numbers do not depend on the setting
    return ids[:, 0] if which == "first" else ids[torch.arange(len(ids), device=ids.device), choice]


def images_to_float(images: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


class VaeLoss(nn.Module):
    """The autoencoder with its loss as `forward`, so that data-parallel wrappers see one module."""

    def __init__(self, checkpoint: Checkpoint, plan: VaePlan) -> None:
        super().__init__()
        self.vae, self.kl_weight = checkpoint.vae, plan.kl_weight
        encoder = [part for part in (self.vae.encoder, self.vae.quant_conv) if part is not None]
        self.fixed = encoder if plan.decoder_only else []
        # Principal components are good already: at the networks' rate they would be lost before those replace them.
        self.slow = list(self.vae.linears) if isinstance(self.vae, PatchAutoencoderKL) else []

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """images: [n, 3, h, w] in [-1, 1]; noise: of their latents."""
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = decoded - images
        # Differences between neighbours: a plain pixel loss blurs edges, above all between fingers.
        edges = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3))
        # Block means: edges outweigh small errors of colour, which change the tone of skin.
        colours = F.avg_pool2d(error, 8).abs().mean()
        return error.abs().mean() + edges + 2 * colours + self.kl_weight * posterior.kl().mean() / noise[0].numel()


def vae_inputs(checkpoint: Checkpoint, plan: VaePlan) -> Inputs:
    """Random crops. rows: images uint8 [n, H, W, 3]."""
    channels = checkpoint.vae.config.latent_channels
    factor = latent_factor(checkpoint.vae.config)

    def inputs(rows: dict[str, Tensor], draws: Draws) -> Sequence[Any]:
        height, width = rows["images"].shape[1:3]
        h, w = (min(plan.crop, side) // factor * factor for side in (height, width))
        y, x = draws.one(height - h + 1), draws.one(width - w + 1)
        return images_to_float(rows["images"][:, y : y + h, x : x + w]), draws.normal(
            channels, h // factor, w // factor
        )

    return inputs


class HandPriorLoss(nn.Module):
    """The hand prior and its text encoder."""

    weight: Tensor

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.text_encoder, self.hand_prior = checkpoint.text_encoder, checkpoint.hand_prior
        self.eos = checkpoint.special_tokens["eos"]
        self.register_buffer("weight", parameter_weights(checkpoint.num_people), persistent=False)

    def forward(self, ids: Tensor, noisy: Tensor, timestep: Tensor, clean: Tensor) -> Tensor:
        predicted = self.hand_prior(noisy, timestep, states_of_words(self.text_encoder, ids, self.eos))
        return (self.weight * (predicted.float() - clean).square()).mean()


class HandJumpLoss(nn.Module):
    """The hand prior at several places of each prompt's trajectory. Its text encoder is frozen."""

    weight: Tensor

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.text_encoder, self.hand_prior = checkpoint.text_encoder, checkpoint.hand_prior
        self.eos = checkpoint.special_tokens["eos"]
        self.register_buffer("weight", parameter_weights(checkpoint.num_people), persistent=False)

    def forward(self, ids: Tensor, x: Tensor, timestep: Tensor, target: Tensor) -> Tensor:
        """ids: [n, 77]; x, target: [n, R, P], the network's inputs and wanted outputs; timestep: [n, R]."""
        read = self.hand_prior.read(states_of_words(self.text_encoder, ids, self.eos))
        read = read.repeat_interleave(x.shape[1], 0)
        predicted = self.hand_prior.denoise(x.flatten(0, 1), timestep.flatten(), read)
        return (self.weight * (predicted.float() - target.flatten(0, 1)).square()).mean()


def parameter_weights(num_people: int = 1) -> Tensor:
    """The weights of errors in a hand prior's parameters [P], 1 on average. Those of an absent person count, too."""
    # Fingers and places decide the picture; legs and trunk hardly move.
    weight = torch.full((PLACEMENT.stop,), 0.2)
    weight[ROTATIONS.start + 6 * 16 : ROTATIONS.stop] = 1.0
    weight[BETAS] = 0.05  # no prompt speaks of the shape
    weight[PLACEMENT] = 1.0
    return (weight / weight.mean()).repeat(num_people)


def states_of_words(text_encoder: nn.Module, ids: Tensor, eos: int) -> Tensor:
    """The hand prior's text input from token ids [n, 77]: the text encoder's states [n, 77, D]; see `word_states`."""
    length = ids.shape[1]
    if ids.device.type == "cpu":
        # The encoder attends back only: tokens after the last end of text cost time and change nothing. On a GPU, the
        # cut would wait for the device at every step.
        ids = ids[:, : int((ids == eos).int().argmax(1).max()) + 1]
    return word_states(text_encoder(ids).last_hidden_state, ids, eos, length)


def hand_prior_inputs(checkpoint: Checkpoint, plan: HandPriorPlan, empty: Tensor) -> Inputs:
    """Denoising to x0 at uniform timesteps. rows: params [n, P], ids [n, W, 77]. empty: ids of "" [77]."""
    alphas = alphas_cumprod(checkpoint.hand_scheduler)
    mean, std = checkpoint.hand_prior.mean.clone(), checkpoint.hand_prior.std.clone()

    def inputs(rows: dict[str, Tensor], draws: Draws) -> Sequence[Any]:
        ids = wording(rows["ids"], draws, plan.wordings)
        dropped, device = draws.uniform() < plan.drop_text, ids.device
        clean = (rows["params"].float() - mean.to(device)) / std.to(device)
        timestep = timesteps(draws, len(alphas))
        alpha = alphas.to(device)[timestep][:, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * draws.normal(clean.shape[1])
        return torch.where(dropped[:, None], empty.to(device), ids), noisy, timestep, clean

    return inputs


def normalisation(params: Tensor, floor: float = 0.02) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation [P] of parameters [n, P]; nearly constant ones get `floor`.

    All people share them, as they share the network's layers. Only the first one counts where absent.
    """
    people = params.shape[1] // NUM_PARAMS
    bodies = params.unflatten(1, (people, NUM_PARAMS))
    there = bodies[..., PLACEMENT.start :: 4][..., :2].amax(-1) > 0.5  # [n, people]
    there[:, 0] = True
    bodies = bodies[there]
    return bodies.mean(0).repeat(people), bodies.std(0).clamp_min(floor).repeat(people)


def conditions(
    rows: dict[str, Tensor], draws: Draws, empty: Tensor, plan: EncoderPlan | PicturesPlan
) -> tuple[Tensor, dict[str, Tensor]]:
    """Prompts [n, 77] and hands, with the plan's shares of dropped text, hands or both."""
    ids = wording(rows["ids"], draws)
    hands = {name: rows[name].float() for name in CUES}
    fate = draws.uniform()
    text, both = plan.drop_text, plan.drop_text + plan.drop_both
    hands["visibility"] = torch.where(
        ((fate >= text) & (fate < both + plan.drop_hands))[:, None], 0.0, hands["visibility"]
    )
    return torch.where((fate < both)[:, None], empty.to(ids.device), ids), hands


class EncoderLoss(nn.Module):
    """The Text+Hand encoder with linear heads that read the picture's content off its tokens.

    It replaces CLIP's pre-training. With an untrained text transformer the UNet must learn words from 77 tokens, one
    "dark" and sixty of padding; that took longer than learning to draw. After this stage every token after the end of
    the text, and every token of a visible hand, encodes the sample's labels; hand tokens also encode their place and
    their hand's turn.
    """

    def __init__(self, encoder: TextHandEncoder, classes: Sequence[int]) -> None:
        """classes: the number of classes of each label."""
        super().__init__()
        self.encoder, self.classes = encoder, list(classes)
        self.labels = nn.Linear(encoder.config.hidden_size, sum(classes))
        self.wrist = nn.Linear(encoder.config.hidden_size, 6)
        self.place = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, ids: Tensor, hands: dict[str, Tensor], labels: Tensor) -> Tensor:
        """labels: [n, len(classes)], -1 for a missing label."""
        config, length = self.encoder.config, ids.shape[1]
        tokens = self.encoder(ids, **hands)[..., : config.hidden_size]
        after = (ids == config.eos_token_id).int().cummax(1).values  # from the end of the text on
        seen = (hands["visibility"] > 0.5).float().repeat_interleave(self.encoder.tokens_per_hand, 1)
        # Text and hands count alike, in every sample.
        share = torch.cat([after / after.sum(1, keepdim=True), seen / seen.sum(1, keepdim=True).clamp_min(1)], 1)
        share = share / len(ids)
        total = torch.zeros((), device=ids.device)
        read = self.labels(tokens).float().split(self.classes, -1)
        for logits, label in zip(read, labels.T, strict=True):
            error = F.cross_entropy(
                logits.flatten(0, 1),
                label.repeat_interleave(tokens.shape[1]),
                reduction="none",
                ignore_index=-1,
            )
            total = total + (error.view_as(share) * share).sum() / math.log(max(logits.shape[-1], 2))
        turn = hands["rotations"][:, :, :1].expand(-1, -1, self.encoder.tokens_per_hand, -1).flatten(1, 2)
        of_hand = tokens[:, length:]
        error = (self.wrist(of_hand).float() - turn).square().mean(-1)
        joints = hands["joints"].new_zeros(*seen.shape, 2).unflatten(1, (self.encoder.num_hands, -1))
        joints[:, :, : hands["joints"].shape[2]] = hands["joints"]  # the vertex token lacks a place of its own
        error = error + 4 * (self.place(of_hand).float() - joints.flatten(1, 2)).square().mean(-1)
        return total + (error * share[:, length:]).sum()


def encoder_inputs(plan: EncoderPlan, empty: Tensor) -> Inputs:
    """rows: ids [n, W, 77], labels [n, K], joints, rotations, bps, visibility."""

    def inputs(rows: dict[str, Tensor], draws: Draws) -> Sequence[Any]:
        return *conditions(rows, draws, empty, plan), rows["labels"]

    return inputs


def emphasis(joints: Tensor, visibility: Tensor, height: int, width: int, fingers: float, reach: float = 1.2) -> Tensor:
    """The weights of latent pixels [N, h, w], 1 on average: larger around the joints of visible hands.

    A finger of a small hand is one or two latent pixels wide; in a plain mean the background outweighs it.
    joints: [N, H, J, 2] in 0..1; visibility: [N, H]; fingers: extra weight; reach: latent pixels.
    """
    device = joints.device
    y = (torch.arange(height, device=device) + 0.5)[:, None] - joints[..., 1, None, None] * height
    x = (torch.arange(width, device=device) + 0.5) - joints[..., 0, None, None] * width
    near = torch.exp(-(x.square() + y.square()) / (2 * reach**2))  # [N, H, J, h, w]
    weight = 1 + fingers * (near.amax(2) * visibility[..., None, None]).amax(1)
    return weight / weight.mean((1, 2), keepdim=True)


def edges(clean: Tensor) -> Tensor:
    """The edges of a picture's latents [N, h, w], 0..1: outlines, and the lines between fingers inside them.

    clean: [N, C, h, w]. The difference to neighbours, relative to the picture's 98th percentile.
    """
    padded = F.pad(clean, (1, 1, 1, 1), mode="replicate")
    across, down = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2], padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    slope = (across.square() + down.square()).sum(1).sqrt()
    return (slope / slope.flatten(1).quantile(0.98, dim=1).clamp_min(1e-6)[:, None, None]).clamp_max(1)


class PictureLoss(nn.Module):
    """The Text+Hand encoder, the UNet and the positional kernel."""

    def __init__(self, checkpoint: Checkpoint, plan: PicturesPlan) -> None:
        super().__init__()
        checkpoint.check_paints("training")
        self.text_hand_encoder, self.unet = checkpoint.text_hand_encoder, checkpoint.unet
        if checkpoint.position_kernel is not None:
            self.position_kernel = checkpoint.position_kernel
        self.plan = plan

    def forward(
        self,
        ids: Tensor,
        hands: dict[str, Tensor],
        noisy: Tensor,
        timestep: Tensor,
        target: Tensor,
        told: Tensor,
        weight: Tensor,
        lines: Tensor,
    ) -> Tensor:
        """told: [n], 1 for a sample with a prompt. weight: [n], of samples. lines: [n, h, w], the pictures' edges."""
        context = self.text_hand_encoder(ids, **hands)
        error = self.unet(noisy, timestep, context).sample.float() - target
        squares = error.square()
        if self.plan.finger_weight:
            height, width = error.shape[2:]
            near = emphasis(hands["joints"], hands["visibility"], height, width, self.plan.finger_weight)
            squares = squares * near[:, None]
        if self.plan.edge_weight:
            drawn = 1 + self.plan.edge_weight * lines
            squares = squares * (drawn / drawn.mean((1, 2), keepdim=True))[:, None]
        loss = weight * squares.mean((1, 2, 3))
        if self.plan.colour_weight:
            # A wrong colour is a small error everywhere, which plain mean squares correct last: add block means (as the
            # multiscale loss of Hoogeboom et al. 2023, simple diffusion). The optimum stays the same. Without a prompt
            # the colour is unknown, so those samples do not count.
            loss = loss + self.plan.colour_weight * told * F.avg_pool2d(error, 8).square().mean((1, 2, 3))
        return loss.mean()


def picture_inputs(checkpoint: Checkpoint, plan: PicturesPlan, empty: Tensor) -> Inputs:
    """Noisy latents and the network's wanted output, by the checkpoint's schedule (v or epsilon).

    rows: mean, std [n, C, h, w] of the VAE's posterior, ids [n, W, 77], joints, rotations, bps, visibility.
    """
    alphas = alphas_cumprod(checkpoint.scheduler)
    kind = checkpoint.scheduler["prediction_type"]
    scale, shift = checkpoint.vae.config.scaling_factor, checkpoint.vae.config.shift_factor or 0.0
    least = {"min-snr": 0.0, "truncated-snr": 1.0}.get(plan.weighting)
    if least and kind == "epsilon":
        raise TrainingError(
            "weighting must be plain or min-snr for a network that predicts noise, got truncated-snr. There it divides "
            "by the signal in pure noise."
        )

    def inputs(rows: dict[str, Tensor], draws: Draws) -> Sequence[Any]:
        ids, hands = conditions(rows, draws, empty, plan)
        latents = rows["mean"].float()
        if plan.posterior == "sample":
            latents = latents + rows["std"].float() * draws.normal(*latents.shape[1:])
        clean = (latents - shift) * scale
        timestep = timesteps(draws, len(alphas), plan.timestep_shift)
        alpha = alphas.to(timestep.device)[timestep]
        signal, sigma = (a[:, None, None, None] for a in (alpha.sqrt(), (1 - alpha).sqrt()))
        noise = draws.normal(*clean.shape[1:])
        target = {"v_prediction": signal * noise - sigma * clean, "sample": clean}.get(kind, noise)
        told = (ids != empty.to(ids.device)).any(1).float()
        weight = torch.ones_like(alpha) if least is None else snr_weight(alpha, kind, plan.min_snr, least)
        return ids, hands, signal * clean + sigma * noise, timestep, target, told, weight, edges(clean)

    return inputs


def snr_weight(alpha: Tensor, kind: str, gamma: float, least: float = 0.0) -> Tensor:
    """Weights [n] of errors in the network's kind of output, that weigh an error in x0 by its signal-to-noise ratio.

    It counts at most gamma (min-SNR, Hang et al. 2023, section 3.4), and at least `least`: 1 in the truncated SNR of
    Salimans and Ho 2022, section 4.
    """
    snr = alpha / (1 - alpha).clamp_min(1e-8)
    of_x0 = snr.clamp(least, max(least, gamma))
    return {"v_prediction": of_x0 / (snr + 1), "sample": of_x0}.get(kind, of_x0 / snr.clamp_min(1e-8))
