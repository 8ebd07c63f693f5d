"""A single file of Stable Diffusion 1.x or 2.x, as A1111 and Civitai have them, becomes a folder in diffusers' layout.

    to_folder(Path("model.safetensors"), Path("sd"), "epsilon")

diffusers converts the tensors (`from_single_file`). The configurations and CLIP's vocabulary are here, so nothing is
downloaded. The shapes of the tensors tell 1.x from 2.x, and the keys tell what else a file may be.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..models.foreign import CHANNELS, MODEL_INDEX, PICKLES, TAKES, refuse_pointer
from ..models.weights import first_line
from ..schema import listed, shown

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
INPUT = f"{UNET}input_blocks.0.0.weight"
CONTEXT = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
VERSIONS = {768: "1.x", 1024: "2.x"}  # by the width of the words' vectors
PREDICTIONS = ("epsilon", "v_prediction")
MERGES = Path(__file__).with_name("clip_merges.txt.gz")

# Pattern of a key -> what the file is, and the way out. The first match counts.
KINDS = tuple(
    (re.compile(pattern), what, way)
    for pattern, what, way in (
        (r"lora_|\.hada_|\.lokr_|lora_magnitude|\.diff_b?$", "a LoRA", "Give it to hd-export --lora."),
        (r"^emb_params$|^clip_[lg]$|^string_to_param|^<.+>$", "a textual inversion", "Give it to --embedding."),
        (r"^control_model\.|controlnet_|input_hint_block", "a ControlNet", ""),
        (r"^ip_adapter\.|^image_proj\.", "an IP-Adapter", ""),
        (r"motion_modules", "a motion module", ""),
        (r"joint_blocks\.", "Stable Diffusion 3", ""),
        (r"double_blocks\.", "Flux", ""),
        (r"^conditioner\.embedders\.|\.label_emb\.", "SDXL", ""),
        (r"\.blocks\.\d+\.(cross_attn|self_attn|attn)|transformer_blocks\.\d+\.(attn|norm)", "another transformer", ""),
    )
)
# The same for files that hold a part alone.
PARTS = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (rf"^({VAE})?((encoder|decoder)\.(conv_in|down|up|mid)|(post_)?quant_conv)", "a VAE"),
        (rf"^({UNET})?(input_blocks|output_blocks|conv_in|down_blocks|time_embed)", "a UNet"),
        (rf"^({TEXT})?(transformer\.|model\.)?(text_model|resblocks|token_embedding|embeddings)", "a text encoder"),
    )
)


def identify(path: Path) -> tuple[str, int, dict[str, str]]:
    """ "1.x" or "2.x", the channels that its UNet reads, and the file's metadata.

    Raises CheckpointError for anything else, and says what it is.
    """
    refuse_pointer(path)
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path} must be safetensors, got a pickle, which can run code when opened. Take the model's .safetensors, "
            'or convert it where you trust its origin: python -c "import torch, safetensors.torch; '
            f"d = torch.load('{path}', weights_only=True, map_location='cpu'); d = d.get('state_dict', d); "
            "safetensors.torch.save_file({k: v.contiguous().clone() for k, v in d.items() if hasattr(v, 'shape')}, "
            f"'{path.with_suffix('.safetensors')}')\""
        )
    try:
        with safe_open(path, framework="numpy") as file:
            keys, metadata = set(file.keys()), dict(file.metadata() or {})
            shapes = {key: list(file.get_slice(key).get_shape()) for key in (INPUT, CONTEXT) if key in keys}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated, damaged or no safetensors file: {first_line(error)}") from None
    for pattern, what, way in KINDS:
        if any(pattern.search(key) for key in keys) and not (what == "another transformer" and INPUT in keys):
            raise CheckpointError(f"{path} is {what}. {TAKES}.{way and f' {way}'}")
    missing = [
        name
        for name, prefix in (("UNet", UNET), ("VAE", VAE), ("text encoder", TEXT))
        if not any(key.startswith(prefix) for key in keys)
    ]
    if missing:
        there = [what for pattern, what in PARTS if any(pattern.search(key) for key in keys)]
        got = f"holds {' and '.join(there)} only" if there else f"holds no model that is known here ({listed(keys)})"
        raise CheckpointError(f"{path} {got}: it lacks the {' and the '.join(missing)}. Take the whole model.")
    channels = shapes.get(INPUT, [0, 0])[1]
    if channels not in (4, 9):
        kind = CHANNELS.get(channels, f"a UNet of {channels} channels")
        raise CheckpointError(f"{path} is {kind}: it takes {channels} channels. {TAKES}.")
    width = shapes.get(CONTEXT, [0, 0])[1]
    if width not in VERSIONS:
        raise CheckpointError(f"{path} must read words of 768 or 1024 numbers, got {width}. {TAKES}.")
    return VERSIONS[width], channels, metadata


def to_folder(path: Path, folder: Path, prediction: str | None = None) -> Path:
    """Writes a single file as a folder in diffusers' layout, in float32: a file may mix precisions.

    prediction: of PREDICTIONS; None: what the file's metadata says, or 1.x's usual "epsilon". Raises CheckpointError
    for another kind of file, for tensors that are missing, and for a file of 2.x that does not say its prediction.
    """
    version, channels, metadata = identify(path)
    prediction = prediction or _stated(metadata) or ("epsilon" if version == "1.x" else None)
    if prediction is None:
        raise CheckpointError(
            f"--prediction-type must be given for {path}: a file of Stable Diffusion 2.x does not say it. Take epsilon "
            "for models of 512 x 512 (2.0 base, 2.1 base), v_prediction for models of 768 x 768."
        )
    write_configs(folder, version, prediction, channels)
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    try:
        pipeline = StableDiffusionPipeline.from_single_file(
            str(path), config=str(folder), local_files_only=True, safety_checker=None, torch_dtype=torch.float32
        )
    except Exception as error:  # diffusers raises many kinds
        if isinstance(error, (KeyError, NotImplementedError)):  # the latter: a tensor stayed without values
            what = f" {error.args[0]}" if isinstance(error, KeyError) else ""
            raise CheckpointError(
                f"{path} must hold all tensors of Stable Diffusion {version}, but lacks some{what}. Take the whole "
                "model."
            ) from None
        raise CheckpointError(f"{path} cannot be read as Stable Diffusion {version}: {first_line(error)}") from None
    for part in ("unet", "vae", "text_encoder"):
        module = getattr(pipeline, part)
        absent = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
        if absent:
            raise CheckpointError(f"{path} must hold all tensors of {part}, but lacks {listed(absent)}. Copy it again.")
        try:
            module.save_pretrained(folder / part)
        except SafetensorError as error:  # a full disk
            raise CheckpointError(f"{folder / part} cannot be written: {first_line(error)}") from None
    return folder


def _stated(metadata: dict[str, str]) -> str | None:
    """The prediction that a file's metadata names (Stability AI's ModelSpec)."""
    said = metadata.get("modelspec.prediction_type")
    names = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
    if said is not None and said not in names:
        raise CheckpointError(f"modelspec.prediction_type must be epsilon or v, got {shown(said)}. {TAKES}.")
    return names.get(said or "")


def write_configs(folder: Path, version: str, prediction: str, channels: int = 4) -> None:
    """The small files of a Stable Diffusion folder: configurations, tokenizer and noise schedule.

    channels: that the UNet reads: 4, or 9 for inpainting.
    """
    two, size = version == "2.x", 96 if version == "2.x" and prediction == "v_prediction" else 64
    clip: dict[str, Any] = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408}
    clip |= {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0 if two else 49407}
    clip |= {"max_position_embeddings": 77, "layer_norm_eps": 1e-5, "hidden_act": "gelu" if two else "quick_gelu"}
    sizes = (1024, 4096, 23, 16) if two else (768, 3072, 12, 12)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    clip |= dict(zip(names, sizes, strict=True))
    unet: dict[str, Any] = {"_class_name": "UNet2DConditionModel", "sample_size": size, "layers_per_block": 2}
    unet["in_channels"] = channels
    unet |= {"block_out_channels": [320, 640, 1280, 1280]}  # diffusers' conversion reads what its classes assume, too
    unet |= {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]}
    unet |= {"up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
    unet |= {"cross_attention_dim": sizes[0], "attention_head_dim": [5, 10, 20, 20] if two else 8}
    if two:
        unet |= {"use_linear_projection": True, "upcast_attention": prediction == "v_prediction"}
    vae = {
        "_class_name": "AutoencoderKL",
        "sample_size": 8 * size,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "scaling_factor": 0.18215,
    }
    schedule: dict[str, Any] = {
        "_class_name": "DDIMScheduler" if two else "PNDMScheduler",
        "beta_schedule": "scaled_linear",
    }
    schedule |= {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "steps_offset": 1}
    schedule |= {"set_alpha_to_one": False, "prediction_type": prediction}
    schedule |= {"clip_sample": False} if two else {"skip_prk_steps": True}
    index = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", schedule["_class_name"]],
    }
    for name, value in (
        (MODEL_INDEX, index),
        ("text_encoder/config.json", clip),
        ("unet/config.json", unet),
        ("vae/config.json", vae),
        ("scheduler/scheduler_config.json", schedule),
    ):
        _write(folder / name, value)
    write_tokenizer(folder / "tokenizer", pad="!" if two else "<|endoftext|>")


def write_tokenizer(folder: Path, pad: str) -> None:
    """CLIP's tokenizer (Radford et al. 2021): 512 bytes, then a token for each merge, then the two ends."""
    merges = gzip.decompress(MERGES.read_bytes()).decode()
    # Bytes that print stand for themselves and come first; the others follow as characters from 256 on.
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(byte) for byte in printed] + [chr(256 + n) for n in range(256 - len(printed))]
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    tokens += [line.replace(" ", "") for line in merges.splitlines()[1:]]
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    tokens += [ends["bos_token"], ends["eos_token"]]
    _write(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    special = {**ends, "pad_token": pad}
    _write(folder / "special_tokens_map.json", special)
    config = {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    _write(folder / "tokenizer_config.json", config)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
