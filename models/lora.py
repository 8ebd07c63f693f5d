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
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import open_to_others
from .checkpoint import Checkpoint

# The layers that get ranks: the products of attention, as is usual (diffusers' and peft's own examples).
TARGETS = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_hand_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
WHOLE = ("location.", "rotation.", "vertices.", "place", "side", "null")  # of the Text+Hand encoder: the hands' own
METADATA = "lora_adapter_metadata"  # where diffusers keeps rank and alpha
LAYER, DOWN, UP = ".base_layer", ".lora_A.default.weight", ".lora_B.default.weight"


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
def merge(checkpoint: Checkpoint, path: Path, scale: float = 1.0) -> None:
    """Adds an adapter to the checkpoint's weights, `scale` times.

    Raises CheckpointError for a file that is none, or that is for another network, naming what does not fit.
    """
    ranks, whole, alphas = read(checkpoint, path)
    parts = _parts(checkpoint)
    layers, parameters = dict(parts.named_modules()), dict(parts.named_parameters())
    for layer, (down, up) in ranks.items():
        weight: Tensor | None = getattr(layers.get(layer), "weight", None)
        if weight is None or (up.shape[0], down.shape[1]) != tuple(weight.shape[:2]):
            raise CheckpointError(
                f"{path} does not fit this checkpoint: it has {layer} of {up.shape[0]} x {down.shape[1]}, where the "
                f"checkpoint has {'nothing' if weight is None else ' x '.join(map(str, weight.shape[:2]))}."
            )
        rank = down.shape[0]
        product = (up.flatten(1).float() @ down.flatten(1).float()).view(*up.shape[:1], *down.shape[1:])
        weight.add_(product.reshape(weight.shape), alpha=scale * alphas.get(layer, rank) / rank)
    for name, value in whole.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise CheckpointError(f"{path} does not fit this checkpoint: {name} is not in it, or of another shape.")
        parameters[name].lerp_(value.float(), scale)


def read(
    checkpoint: Checkpoint, path: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], dict[str, float]]:
    """An adapter's ranks by layer (A, B), its whole tensors by name, and alphas by layer."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is no .safetensors file, and nothing else is read: it could run code.")
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            notes = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except FileNotFoundError:
        raise CheckpointError(f"There is no adapter {path}.") from None
    except Exception as error:  # safetensors' own
        raise CheckpointError(f"The adapter {path} cannot be read: {error}.") from error
    own = (*(f"text_hand_encoder.{name}" for name in WHOLE), "position_kernel.", "text_hand_encoder.layers.")
    whole = {name: value for name, value in tensors.items() if name.startswith(own) and ".lora_" not in name}
    ours = {name: value for name, value in tensors.items() if name.startswith(own) and ".lora_" in name}
    theirs = {name: value for name, value in tensors.items() if name not in whole and name not in ours}
    alphas: dict[str, float] = {}
    if theirs:
        try:
            theirs, networks = StableDiffusionLoraLoaderMixin.lora_state_dict(
                theirs, unet_config=checkpoint.unet.config
            )

            def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
                unet = {name: value for name, value in tensors.items() if name.startswith("unet.")}
                rest = {name: value for name, value in tensors.items() if name not in unet}
                return {**convert_unet_state_dict_to_peft(unet), **(convert_state_dict_to_peft(rest) if rest else {})}

            theirs = renamed(theirs)
            scales = {name.removesuffix(".alpha"): torch.tensor(value) for name, value in (networks or {}).items()}
            alphas = {_home(name.partition(".lora_")[0]): float(value) for name, value in renamed(scales).items()}
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is no adapter for Stable Diffusion 1.x or 2.x: {error}") from error
    ranks: dict[str, tuple[Tensor, Tensor]] = {}
    both = {_home(name): value for name, value in {**theirs, **ours}.items()}
    for name, down in both.items():
        layer, found, _ = name.partition(".lora_A.weight")
        if found and f"{layer}.lora_B.weight" in both:
            ranks[layer] = down, both[f"{layer}.lora_B.weight"]
        elif not found and ".lora_B.weight" not in name:
            raise CheckpointError(f"{path} does not fit this checkpoint: nothing is known of {name}.")
    if not ranks and not whole:
        raise CheckpointError(f"{path} holds no adapter: it has no .lora_A.weight.")
    for layer, (down, _) in ranks.items():
        part = layer.partition(".")[0]
        alphas.setdefault(layer, float(notes.get(f"{part}.lora_alpha", down.shape[0])))
    return ranks, whole, alphas


def _home(name: str) -> str:
    """Where a layer of Stable Diffusion's text encoder is in ours."""
    for prefix in ("text_encoder.text_model.encoder.", "text_encoder.encoder."):
        if name.startswith(prefix):
            return "text_hand_encoder." + name.removeprefix(prefix)
    return name


def _parts(checkpoint: Checkpoint) -> nn.ModuleDict:
    """The parts that an adapter touches, under their names."""
    parts = {name: getattr(checkpoint, name) for name in (*TARGETS, "position_kernel")}
    return nn.ModuleDict({name: module for name, module in parts.items() if module is not None})
