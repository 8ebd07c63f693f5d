"""LoRA (Hu et al. 2022): a few trained ranks beside frozen weights, in a file of their own.

    parameters = inject(checkpoint, rank=16)           # peft's layers in UNet and Text+Hand encoder, to train
    save(trained(checkpoint), Path("adapter.safetensors"), rank=16)
    merge(checkpoint, Path("adapter.safetensors"), scale=0.8)

The file is in diffusers' layout: `unet.<layer>.lora_A.weight` and `lora_B.weight`, so that its UNet part loads with
`load_lora_weights` anywhere. Our models' own parts (hand tokens, positional kernel) start untrained, so they train as
whole tensors, in the same file under their names. `merge` also reads other programs' files, such as kohya's.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapters import METADATA, WHOLE, diverged, read, summary
from ..files import written
from .checkpoint import Checkpoint

# The layers that get ranks: attention's products, as in diffusers' and peft's own examples.
TARGETS = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_hand_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def inject(checkpoint: Checkpoint, rank: int) -> list[nn.Parameter]:
    """Adds ranks with zero effect to the attention layers of UNet and Text+Hand encoder.

    Freezes everything else but the hand tokens and the positional kernel. Returns the parameters to train.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for name, layers in TARGETS.items():
        module = getattr(checkpoint, name)
        module.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers), init_lora_weights="gaussian")
        inject_adapter_in_model(config, module)
    for name, parameter in checkpoint.text_hand_encoder.named_parameters():
        if name.startswith(WHOLE):
            parameter.requires_grad_(True)
    if checkpoint.position_kernel is not None:
        checkpoint.position_kernel.requires_grad_(True)
    return [parameter for parameter in parts(checkpoint).parameters() if parameter.requires_grad]


def trained(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors that `inject` left trainable, by their names in the file."""
    return {
        name.replace(".default.weight", ".weight"): parameter.detach()
        for name, parameter in parts(checkpoint).named_parameters()
        if parameter.requires_grad
    }


def save(tensors: dict[str, Tensor], path: Path, rank: int) -> None:
    """Writes the tensors of `trained`."""
    notes = {f"{part}.{key}": rank for part in TARGETS for key in ("r", "lora_alpha")}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: value.float().cpu().contiguous() for name, value in tensors.items()}
    with written(path) as temporary:
        save_file(whole, temporary, metadata={"format": "pt", METADATA: json.dumps(notes)})


@torch.no_grad()
def merge(checkpoint: Checkpoint, path: Path, scale: float = 1.0) -> str:
    """Adds an adapter to the checkpoint's weights, `scale` times. Returns a summary in words.

    Raises CheckpointError for a file that `adapters.read` refuses, before it changes a weight, and for a merge that
    makes a weight infinite.
    """
    parameters = dict(parts(checkpoint).named_parameters())
    adapter = read(shapes(checkpoint), path)
    for name, change in adapter.changes(scale).items():
        merged = change(parameters[name].float().numpy(), parameters[name].shape)
        if not np.isfinite(merged).all():
            raise diverged(path, name)
        parameters[name].copy_(torch.from_numpy(merged))
    return summary(path, adapter, scale)


def shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that an adapter may change, by their names in a file."""
    return {name: tuple(parameter.shape) for name, parameter in parts(checkpoint).named_parameters()}


def parts(checkpoint: Checkpoint) -> nn.ModuleDict:
    """The parts that an adapter touches, under their names."""
    found = {name: getattr(checkpoint, name) for name in (*TARGETS, "position_kernel")}
    return nn.ModuleDict({name: module for name, module in found.items() if module is not None})
