"""LoRA (Hu et al. 2022): a few trained ranks beside frozen weights, in a file of their own.

    adapters = inject(checkpoint, rank=16)             # peft's layers in UNet and Text+Hand encoder; what to train
    save(checkpoint, Path("adapter.safetensors"), rank=16)
    merge(checkpoint, Path("adapter.safetensors"), scale=0.8)

The file is in diffusers' layout: `unet.<layer>.lora_A.weight` and `lora_B.weight`, so that its UNet part loads with
`load_lora_weights` anywhere. What only our models have (hand tokens, positional kernel) starts untrained and is trained
whole; it lies in the same file under its own name. Files of others for Stable Diffusion are read too, kohya's included.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import open_to_others
from .adapters import METADATA, WHOLE, Adapter, read
from .checkpoint import Checkpoint

# The layers that get ranks: the products of attention, as is usual (diffusers' and peft's own examples).
TARGETS = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_hand_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def inject(checkpoint: Checkpoint, rank: int) -> list[nn.Parameter]:
    """Puts ranks beside the attention layers of UNet and Text+Hand encoder; they begin at zero effect.

    Everything else is frozen but the hand tokens and the positional kernel. Returns what is to be trained.
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
    return [parameter for parameter in _parts(checkpoint).parameters() if parameter.requires_grad]


def trained(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What `inject` left to be trained, by its name in the file."""
    return {
        name.replace(".default.weight", ".weight"): parameter.detach()
        for name, parameter in _parts(checkpoint).named_parameters()
        if parameter.requires_grad
    }


def save(tensors: dict[str, Tensor], path: Path, rank: int) -> None:
    """Writes what `trained` gave."""
    notes = {f"{part}.{key}": rank for part in TARGETS for key in ("r", "lora_alpha")}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    whole = {name: value.float().cpu().contiguous() for name, value in tensors.items()}
    save_file(whole, temporary, metadata={"format": "pt", METADATA: json.dumps(notes)})
    open_to_others(temporary)
    temporary.replace(path)


@torch.no_grad()
def merge(checkpoint: Checkpoint, path: Path, scale: float = 1.0) -> str:
    """Adds an adapter to the checkpoint's weights, `scale` times. Returns what was merged, in words.

    Raises CheckpointError for what is no adapter for this checkpoint (see `adapters.read`), before anything is changed,
    and for weights that would become infinite.
    """
    parts = _parts(checkpoint)
    layers = {n: m for n, m in parts.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    parameters = dict(parts.named_parameters())
    adapter = read(layers, path)
    for name, value in adapter.whole.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise CheckpointError(
                f"{path} does not fit this checkpoint: {name} is not in it, or of another shape. Take the checkpoint "
                "that the adapter was trained from."
            )
    for layer, update in adapter.updates.items():
        module, strength = layers[layer], scale * update.factor
        module.weight.add_(update.delta().reshape(module.weight.shape), alpha=strength)
        if (bias := update.parts.get("bias")) is not None and module.bias is not None:
            module.bias.add_(bias.float(), alpha=strength)
        if not all(value.isfinite().all() for value in module.parameters()):
            raise CheckpointError(f"{path} makes {layer} infinite. Take an adapter from before its training diverged.")
    for name, value in adapter.whole.items():
        parameters[name].lerp_(value.float(), scale)
    return _summary(path, adapter, scale)


def _summary(path: Path, adapter: Adapter, scale: float) -> str:
    counts = Counter(layer.partition(".")[0] for layer in adapter.updates)
    found = [f"{count} layers of {part}" for part, count in sorted(counts.items(), reverse=True)]
    if adapter.whole:
        found.append(f"{len(adapter.whole)} whole tensors")
    silent = adapter.updates and not all(update.stated for update in adapter.updates.values())
    strength = " Its file gives no alpha, so that alpha is the rank, as in diffusers." if silent else ""
    return f"Merged {path.name} at {scale:g}: {', '.join(found)}.{strength}"


def _parts(checkpoint: Checkpoint) -> nn.ModuleDict:
    """The parts that an adapter touches, under their names."""
    parts = {name: getattr(checkpoint, name) for name in (*TARGETS, "position_kernel")}
    return nn.ModuleDict({name: module for name, module in parts.items() if module is not None})
