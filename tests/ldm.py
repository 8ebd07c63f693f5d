"""A Stable Diffusion folder as a single file with the names of its first code: diffusers' conversion, backwards."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def unet_key(key: str, layers: int) -> str:
    for ours, theirs in TOP.items():
        if key.startswith(f"{ours}."):
            return theirs + key[len(ours) :]
    if found := re.fullmatch(r"mid_block\.(resnets\.\d|attentions\.0)\.(.+)", key):
        return f"middle_block.{MIDDLE[found[1]]}.{_resnet(found[2])}"
    side, level, kind, number, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", key).groups()
    down, level, number = side == "down", int(level), int(number)
    count = layers + 1
    blocks, start = ("input_blocks", 1) if down else ("output_blocks", 0)
    if kind == "downsamplers":
        return f"{blocks}.{start + level * count + layers}.0.op.{rest.removeprefix('conv.')}"
    place = start + level * count + number
    if kind == "upsamplers":
        return f"{blocks}.{level * count + layers}.UP.{rest}"  # 1, or 2 behind an attention
    return f"{blocks}.{place}.{0 if kind == 'resnets' else 1}.{_resnet(rest) if kind == 'resnets' else rest}"


def _resnet(rest: str) -> str:
    first = rest.rpartition(".")[0]
    return rest.replace(first, RESNET[first]) if first in RESNET else rest


def vae_key(key: str, levels: int) -> str:
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    up = lambda found: f"up.{levels - 1 - int(found[1])}"  # noqa: E731
    key = re.sub(r"up_blocks\.(\d)", up, key)
    key = re.sub(r"resnets\.(\d)", lambda f: f"block_{int(f[1]) + 1}" if "mid_block" in key else f"block.{f[1]}", key)
    key = key.replace("upsamplers.0", "upsample").replace("mid_block.attentions.0", "mid.attn_1")
    key = key.replace("mid_block", "mid").replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if "attn_1" in key:
        for ours, theirs in (
            ("group_norm", "norm"),
            ("to_out.0", "proj_out"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
        ):
            key = key.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    return key


def clip_tensors(tensors: dict[str, torch.Tensor], open_clip: bool) -> dict[str, torch.Tensor]:
    tensors = {key.removeprefix("text_model."): value for key, value in tensors.items()}
    if not open_clip:
        return {f"cond_stage_model.transformer.text_model.{key}": value for key, value in tensors.items()}
    found = {}
    for key, value in tensors.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if layer and layer[2] == "self_attn.q_proj":
            whole = [tensors[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            found[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(whole)
        elif layer and layer[2] in OPEN_CLIP:
            found[f"transformer.resblocks.{layer[1]}.{OPEN_CLIP[layer[2]]}.{layer[3]}"] = value
        elif key == "embeddings.token_embedding.weight":
            found["token_embedding.weight"] = value
        elif key == "embeddings.position_embedding.weight":
            found["positional_embedding"] = value
        elif key.startswith("final_layer_norm"):
            found[key.replace("final_layer_norm", "ln_final")] = value
    width = tensors["final_layer_norm.weight"].shape[0]
    found["text_projection"] = torch.eye(width)
    return {f"cond_stage_model.model.{key}": value for key, value in found.items()}


def single_file(
    folder: Path, path: Path, open_clip: bool = False, dtype: torch.dtype = torch.float32, **metadata
) -> Path:
    """Writes the weights of a folder in diffusers' layout into one file."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    clip = CLIPTextModel.from_pretrained(folder / "text_encoder")
    tensors = {}
    for key, value in unet.state_dict().items():
        tensors[f"model.diffusion_model.{unet_key(key, unet.config.layers_per_block)}"] = value
    for key in [key for key in tensors if ".UP." in key]:
        behind = key.partition(".UP.")[0] + ".1.norm.weight" in tensors
        tensors[key.replace(".UP.", ".2." if behind else ".1.")] = tensors.pop(key)
    for key, value in vae.state_dict().items():
        name = vae_key(key, len(vae.config.block_out_channels))
        linear = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        tensors[f"first_stage_model.{name}"] = value[..., None, None] if linear else value
    tensors |= clip_tensors(clip.state_dict(), open_clip)
    tensors["alphas_cumprod"] = torch.ones(1000)
    save_file({key: value.to(dtype).contiguous() for key, value in tensors.items()}, path, {"format": "pt", **metadata})
    return path
