"""A checkpoint from Stable Diffusion to start training from: it keeps all that Stable Diffusion learned.

    checkpoint = from_stable_diffusion(Path("stable-diffusion-v1-5"))
    checkpoint.save("start")

The UNet, the VAE, the tokenizer and the noise schedule are the folder's own. The Text+Hand encoder starts as its CLIP
text model, the positional kernel at zero, the hands' gate closed. So without hands the same latents give the same
picture as in Stable Diffusion. The hand prior is untrained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer
from transformers import CLIPTextModel, CLIPTokenizer

from .. import shipped
from ..errors import BundleError, CheckpointError
from ..models.checkpoint import BODY, Checkpoint, clip_tokenizer, plain_tokenizer, trained_size
from ..models.configs import CONFIGS, CUES, HAND_SCHEDULE, default_settings
from ..models.foreign import MODEL_INDEX, check_stable_diffusion, read_object
from ..models.hand_prior import HandPrior
from ..models.layout import check_sampling, check_scheduler
from ..models.position_kernel import PositionKernel
from ..models.text_hand_encoder import TextHandEncoder
from ..models.weights import first_line, load_part
from ..schedules import NoiseSchedule
from . import embeddings

FREQUENCIES = (1, 2, 4, 8)
PRIOR = (512, 8, 8)  # width, layers and heads of the hand prior: the paper's size


STUDENTS = ("LCMScheduler", "TCDScheduler")  # of distilled networks: four steps without guidance
FEW_STEPS = {"solver": "lcm", "steps": 4, "guidance": 1.0}


def from_stable_diffusion(
    folder: Path,
    cues: tuple[str, ...] = CUES,
    seed: int = 0,
    added: Iterable[tuple[Path, str | None]] = (),
    variant: str | None = None,
) -> Checkpoint:
    """Reads a Stable Diffusion 1.x or 2.x folder in diffusers' layout.

    cues: see `TextHandEncoder`. seed: of the random start. added: files of textual inversion with their placeholders,
    or None for the files' own. variant: of the weights' files, "fp16" or "bf16"; None: float32, or what is
    there. The body is the demo's free one; `hd-export --body` takes another.
    Raises CheckpointError for another kind of folder, or for weights that are pickles.
    """
    index = check_stable_diffusion(folder)
    name, schedule = read_schedule(folder, index)
    defaults = default_settings(CONFIGS["sd15"]) | (FEW_STEPS if name in STUDENTS else {})
    check_sampling(folder, {"scheduler": schedule, "hand_scheduler": dict(HAND_SCHEDULE)}, defaults)
    words = clip_tokenizer(folder / "tokenizer")
    kinds: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    unet, vae, clip = (load_part(kind, folder / name, variant=variant) for name, kind in kinds.items())
    check_vocabulary(folder, words, clip)
    placeholders = [token for path, token in added for token in embeddings.add(path, token, words, clip)]
    torch.manual_seed(seed)
    tokenizer, special = plain_tokenizer(words)
    # The first end-of-text token ends a sentence. CLIP's own configuration often names another id for it.
    clip.config.bos_token_id, clip.config.eos_token_id, clip.config.pad_token_id = (
        special[name] for name in ("bos", "eos", "pad")
    )
    mend_size(unet)
    notes = {"from": folder.resolve().name, "trained": False}
    checkpoint = Checkpoint(
        tokenizer=tokenizer,
        special_tokens=special,
        text_encoder=clip,
        hand_prior=HandPrior(*PRIOR, clip.config.hidden_size),
        text_hand_encoder=TextHandEncoder.from_clip(clip, cues=list(cues), frequencies=list(FREQUENCIES), hide=True),
        unet=unet,
        position_kernel=PositionKernel.for_unet(unet, FREQUENCIES, gated=True),
        vae=vae,
        scheduler=schedule,
        hand_scheduler=dict(HAND_SCHEDULE),
        defaults=defaults,
        image_size=trained_size(unet, vae),
        body=shipped.checkpoint_path() / BODY,
        name=folder.resolve().name,
        notes=notes | ({"placeholders": placeholders} if placeholders else {}),
    )
    checkpoint.check()
    for module in checkpoint.modules().values():
        module.eval()
    checkpoint.attach_kernel()
    return checkpoint


def read_back(out: Path, tokenizer: Tokenizer, special_tokens: dict[str, int]) -> Checkpoint:
    """The written checkpoint, as `hd-export` reads it; its weights stay in their files.

    tokenizer, special_tokens: of the checkpoint in memory. Raises CheckpointError where the folder differs or cannot be
    read, and removes its model_index.json, so that the command can run again.
    """
    try:
        again = Checkpoint.load(out, mapped=True)
        if again.special_tokens != special_tokens or again.tokenizer.to_str() != tokenizer.to_str():
            raise CheckpointError("Its tokenizer differs from the one in memory. Please report it.")
    except BaseException as error:
        (out / MODEL_INDEX).unlink(missing_ok=True)
        if isinstance(error, CheckpointError):
            raise CheckpointError(f"hd-export cannot read the written checkpoint: {error}") from None
        raise
    return again


def check_vocabulary(folder: Path, tokenizer: CLIPTokenizer, clip: CLIPTextModel) -> None:
    """Raises CheckpointError for tokens without vectors, and for vectors without tokens."""
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, clip.config.vocab_size
    if tokens > rows:
        raise CheckpointError(
            f"{folder / 'text_encoder'} must have a vector for each of the tokenizer's {tokens} tokens, got {rows}. "
            "Copy both folders from the same place."
        )
    if rows > tokens:
        raise CheckpointError(
            f"{folder / 'tokenizer'} must have a token for each of the text encoder's {rows} vectors, got {tokens}. "
            "Copy all of its files, added_tokens.json too, from the text encoder's origin."
        )


def read_schedule(folder: Path, index: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class of a folder's scheduler, and its noise schedule in DDIMScheduler's words.

    index: of model_index.json, whose class diffusers takes. Missing entries take this class's defaults; then
    `StableDiffusionPipeline` sets `steps_offset` to 1 and `clip_sample` to false. Raises CheckpointError for schedulers
    of other kinds of networks.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_object(path)
    entry = index.get("scheduler")
    name = str(entry[1] if isinstance(entry, list) and len(entry) == 2 else config.get("_class_name"))
    check_scheduler(path, name)
    mended = {"clip_sample": False, "steps_offset": 1}
    try:
        NoiseSchedule.from_config({**config, **mended})  # checks the file's own entries
        full = dict(getattr(diffusers, name).from_config(config).config)
        full |= {key: value for key, value in mended.items() if key in full}
        return name, {**asdict(NoiseSchedule.from_config(full)), "clip_sample": False}
    except BundleError as error:
        raise CheckpointError(f"{path} cannot be sampled with: {error}") from None
    except Exception as error:  # schedulers raise many kinds
        raise CheckpointError(f"{path} cannot be used as {name}: {first_line(error)}") from None


def mend_size(unet: UNet2DConditionModel) -> None:
    """Sets the size of UNets of diffusers below 0.9 to 64, as `StableDiffusionPipeline` does: theirs is wrong."""
    version = tuple(int(part) for part in re.findall(r"\d+", str(unet.config.get("_diffusers_version", "1")))[:2])
    if version < (0, 9) and isinstance(unet.config.sample_size, int) and unet.config.sample_size < 64:
        unet.register_to_config(sample_size=64)
