"""Small Stable Diffusion folders as diffusers saves them, and pictures of them: diffusers' own, and a checkpoint's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from handiffuser.models.layout import BOS, EOS
from handiffuser.models.vocabulary import make_tokenizer
from handiffuser.runtime.noise import LATENTS, normal
from handiffuser.schedules import NoiseSchedule, rows
from handiffuser.tokens import PromptTokenizer
from reference import reference_step
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE = 32
STEPS, GUIDANCE, SEED = 5, 5.0, 3


def stable_diffusion(folder, prediction="epsilon", linear=False, added=(), pad=EOS, channels=4):
    """A folder as diffusers saves it, a few channels wide; CLIP's and the tokenizer's classes are the real ones.

    channels: that the UNet takes. added: placeholders of textual inversion, and pad: the padding, as transformers 4
    wrote them.
    """
    torch.manual_seed(0)
    trained = json.loads(make_tokenizer(["a photo of a cat", "two hands on a table"], 600).to_str())
    words = folder / "sd" / "tokenizer"
    words.mkdir(parents=True)
    vocabulary = {**trained["model"]["vocab"]}
    for token in (BOS, EOS):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in trained["model"]["merges"]]
    (words / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    write(words / "vocab.json", vocabulary)
    write(words / "tokenizer_config.json", {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})
    write(words / "special_tokens_map.json", {**special, "pad_token": pad})
    if added:
        write(words / "added_tokens.json", {token: len(vocabulary) + i for i, token in enumerate(added)})
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary) + len(added),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_act="gelu" if linear else "quick_gelu",
            bos_token_id=vocabulary[BOS],
            eos_token_id=vocabulary[EOS],
            pad_token_id=vocabulary[EOS],
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=channels,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=(2, 2) if linear else 2,
        norm_num_groups=8,
        use_linear_projection=linear,
    )
    vae = AutoencoderKL(
        sample_size=SIZE,
        latent_channels=4,
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    # Random weights paint grey: louder ones tell pictures apart.
    with torch.no_grad():
        for parameter in [*clip.parameters(), *unet.conv_out.parameters(), *vae.decoder.conv_out.parameters()]:
            parameter.mul_(3)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    kept = {path.name: path.read_bytes() for path in words.iterdir()}
    pipeline = StableDiffusionPipeline(
        vae, clip, CLIPTokenizer.from_pretrained(words), unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder / "sd", safe_serialization=True)
    for path in words.iterdir():  # transformers 5 writes other files than 4 did
        path.unlink()
    for name, content in kept.items():
        (words / name).write_bytes(content)
    return folder / "sd"


def write(path: Path, value) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def change(path: Path, **entries) -> None:
    """Changes entries of a JSON file; None takes one out."""
    value = json.loads(path.read_text(encoding="utf-8")) | entries
    write(path, {name: entry for name, entry in value.items() if entry is not None})


def their_picture(folder, prompt, prepare=lambda pipeline: None, embeds=None):
    """diffusers' own picture with the folder's own scheduler, from our noise. uint8 [H, W, 3].

    embeds: prompt_embeds and negative_prompt_embeds in place of the prompt."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    prepare(pipeline)
    latents = torch.from_numpy(normal(SEED, LATENTS, 0, (4, SIZE // 2, SIZE // 2)))[None]
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np", **(embeds or {})}
    image = pipeline(prompt, latents=latents, **settings).images[0]
    return (image * 255).round().astype(np.uint8)


@torch.no_grad()
def our_picture(checkpoint, folder, prompt, solver, context=None):
    """A checkpoint's picture without hands, in PyTorch: what its exported graphs compute. uint8 [H, W, 3].

    folder: where the checkpoint was saved, whose tokenizer.json a bundle keeps. context: in place of the prompt's.
    """
    if context is None:
        words = PromptTokenizer(folder / "tokenizer" / "tokenizer.json", checkpoint.special_tokens)
        ids = np.stack([words.encode(text)[0] for text in ("", prompt)])
        context = checkpoint.text_hand_encoder(torch.from_numpy(ids))
    table = rows(NoiseSchedule.from_config(checkpoint.scheduler), solver, STEPS, GUIDANCE, 4)
    x = normal(SEED, LATENTS, 0, (4, *checkpoint.latent_size))[None] * np.float32(table.init_sigma)
    history = np.zeros((1, 4, *x.shape[1:]), np.float32)
    for row in table.rows:
        both = torch.from_numpy((x * row[1]).astype(np.float32)).expand(2, -1, -1, -1)
        u, c = checkpoint.unet(both, float(row[0]), context).sample.numpy()
        x, history = reference_step(row[None], x, history, (u + row[2] * (c - u))[None])
    latents = torch.from_numpy(x.astype(np.float32)) / checkpoint.vae.config.scaling_factor
    image = checkpoint.vae.decode(latents).sample[0].permute(1, 2, 0).numpy() / 2 + 0.5
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
