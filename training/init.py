"""A checkpoint from Stable Diffusion, for training to begin with: what it knew of text, it still knows.

    checkpoint = from_stable_diffusion(Path("stable-diffusion-v1-5"))
    checkpoint.save("start")

The UNet, the VAE, the tokenizer and the noise schedule are the folder's own. The Text+Hand encoder starts as its CLIP
text model, the positional kernel at zero, the hands' gate closed. So without hands this *is* that Stable Diffusion: the
same latents give the same picture. The hand prior is untrained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from .. import shipped
from ..errors import CheckpointError
from ..models.checkpoint import BODY, Checkpoint, load_tokenizer, trained_size
from ..models.configs import CONFIGS, CUES, HAND_SCHEDULE, default_settings
from ..models.hand_prior import HandPrior
from ..models.layout import refuse_pickles
from ..models.position_kernel import PositionKernel
from ..models.text_hand_encoder import TextHandEncoder
from ..models.weights import load_part

FREQUENCIES = (1, 2, 4, 8)
PRIOR = (512, 8, 8)  # width, layers and heads of the hand prior: the paper's size


def from_stable_diffusion(folder: Path, cues: tuple[str, ...] = CUES, seed: int = 0) -> Checkpoint:
    """Reads a Stable Diffusion 1.x or 2.x folder in diffusers' layout.

    cues: see `TextHandEncoder`. seed: of what starts at random.
    The body is the demo's, which is free: `hd-export --body` takes another one. Raises CheckpointError for a folder
    that is something else, or whose weights are pickles.
    """
    parts = read_parts(folder)
    unet, vae, clip = parts["unet"], parts["vae"], parts["text_encoder"]
    torch.manual_seed(seed)
    tokenizer, special = load_tokenizer(folder / "tokenizer")
    # The first end-of-text token ends a sentence. CLIP's own configuration often names another number for it.
    clip.config.bos_token_id, clip.config.eos_token_id, clip.config.pad_token_id = (
        special[name] for name in ("bos", "eos", "pad")
    )
    config = CONFIGS["sd15"]
    checkpoint = Checkpoint(
        tokenizer=tokenizer,
        special_tokens=special,
        text_encoder=clip,
        hand_prior=HandPrior(*PRIOR, clip.config.hidden_size, words=True),
        text_hand_encoder=TextHandEncoder.from_clip(clip, cues=list(cues), frequencies=list(FREQUENCIES), hide=True),
        unet=unet,
        position_kernel=PositionKernel.for_unet(unet, FREQUENCIES, gated=True),
        vae=vae,
        scheduler=read_schedule(folder / "scheduler" / "scheduler_config.json"),
        hand_scheduler=dict(HAND_SCHEDULE),
        defaults=default_settings(config),
        image_size=trained_size(unet, vae),
        body=shipped.checkpoint_path() / BODY,
        name=folder.resolve().name,
        notes={"from": folder.resolve().name, "trained": False},
    )
    checkpoint.check()
    for module in checkpoint.modules().values():
        module.eval()
    checkpoint.attach_kernel()
    return checkpoint


def read_schedule(path: Path) -> dict[str, Any]:
    """The noise schedule of a scheduler's configuration, in DDIMScheduler's words.

    What a configuration leaves out is as its own class has it: PLMS does not clip, and ends at the first timestep.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = getattr(diffusers, config["_class_name"])
        full = dict(kind.from_config(config).config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no scheduler's configuration ({error}).") from error
    return {"clip_sample": False, "thresholding": False, **full}


def read_parts(folder: Path) -> dict[str, Any]:
    """UNet, VAE and CLIP of a folder, in float32."""
    if not (folder / "model_index.json").exists():
        raise CheckpointError(f"{folder} is no diffusers folder: it has no model_index.json.")
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (folder / name).is_dir():
            raise CheckpointError(f"{folder} has no {name}/: this takes Stable Diffusion 1.x and 2.x.")
    if (folder / "text_encoder_2").is_dir():
        raise CheckpointError(f"{folder} has two text encoders (SDXL): this takes Stable Diffusion 1.x and 2.x.")
    refuse_pickles(folder)
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    return {name: load_part(kind, folder / name) for name, kind in kinds.items()}
