"""The schemas of a checkpoint's small files, and their check, which runs before anything large is read.

    layout = read_layout(Path("checkpoint"))        # CheckpointError in milliseconds

It needs no PyTorch, so that `hd-export` answers at once. It refuses a missing part, a damaged configuration, a network
that the export does not support, and a noise schedule or default settings that a bundle cannot sample with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta

from ..contract import MAX_PEOPLE, NUM_HISTORY, Side, Word
from ..errors import CheckpointError, HanDiffuserError
from ..schedules import NoiseSchedule, rows
from ..schema import TRUTH, MisfitError, fit, one_of, shown, whole
from ..settings import Defaults
from .configs import CUES, ROTATION_FRAMES, Config, default_settings
from .foreign import MODEL_INDEX, read_object, refuse_foreign, refuse_pickles

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
NO_LENGTH = 10_000  # a `model_max_length` from here on means: not stated

# Part -> (library, class), as diffusers writes them into model_index.json.
PARTS = {
    "text_encoder": ("transformers", "CLIPTextModel"),
    "hand_prior": ("handiffuser", "HandPrior"),
    "text_hand_encoder": ("handiffuser", "TextHandEncoder"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "position_kernel": ("handiffuser", "PositionKernel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
PATCH_VAE = ("handiffuser", "PatchAutoencoderKL")  # in place of diffusers' own, where model_index.json names it
SCHEDULES = {"scheduler": "unet", "hand_scheduler": "hand_prior"}  # folder -> its step graph

# diffusers' schedulers of networks trained like Stable Diffusion: betas, and a prediction of noise or v. They differ in
# sampling, which a request chooses, and in their defaults for missing entries.
SCHEDULERS = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
STATED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing")

Width = Annotated[int, whole(1, 65_536)]
Count = Annotated[int, whole(1, 256)]
Heads = Annotated[int, whole(1, 1024)]
Vocabulary = Annotated[int, whole(1, 1 << 22)]
Places = Annotated[int, whole(3, 4096)]
TokenId = Annotated[int, whole(0, 2**31 - 1)]
Small = Annotated[float, Meta(gt=0, lt=1, description="a number between 0 and 1")]
Scale = Annotated[float, Meta(gt=0, le=1000, description="a number from 0 to 1000")]
People = Annotated[int, whole(1, MAX_PEOPLE)]
Yes = Annotated[bool, TRUTH]
Levels = Annotated[list[Width], Meta(min_length=1, max_length=8, description="1 to 8 numbers of channels")]
Frequencies = Annotated[
    list[Annotated[float, Meta(gt=0, le=10_000)]], Meta(max_length=64, description="up to 64 numbers above 0")
]
Layers = Annotated[int, whole(1, 16)]
_LEVELS = Meta(min_length=1, max_length=8)
EachLayers = Annotated[Layers | Annotated[list[Layers], _LEVELS], Meta(description="a number of layers, or one each")]
EachHeads = Annotated[Heads | Annotated[list[Heads], _LEVELS], Meta(description="a number of heads, or one each")]
EachYes = Annotated[bool | Annotated[list[Yes], _LEVELS], Meta(description="true or false, or one each")]
Kernel = Annotated[Literal[1, 3, 5, 7], Meta(description="1, 3, 5 or 7")]
Sides = Annotated[list[Side], Meta(min_length=2, max_length=2, description="height and width, such as [512, 512]")]
Sample = Annotated[Side | Sides, Meta(description="a size, or height and width")]


class CLIPTextModel(TypedDict, total=False):
    """Of a CLIP text model, in transformers' words."""

    vocab_size: Vocabulary
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Count
    num_attention_heads: Heads
    max_position_embeddings: Places
    hidden_act: Word
    layer_norm_eps: Small
    bos_token_id: TokenId | None
    eos_token_id: TokenId | None
    pad_token_id: TokenId | None


class TextHandEncoder(TypedDict, total=False):
    """Of the Text+Hand encoder; see `TextHandEncoder`."""

    vocab_size: Vocabulary
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Count
    num_attention_heads: Heads
    max_position_embeddings: Places
    hidden_act: Word
    bos_token_id: TokenId
    eos_token_id: TokenId
    pad_token_id: TokenId
    cues: Annotated[
        list[Annotated[str, one_of(*CUES)]], Meta(max_length=3, description=f"a list of cues, of {', '.join(CUES)}")
    ]
    frequencies: Frequencies
    num_basis: Width
    hide: Yes
    joint: Yes
    rotation_frame: Annotated[str, one_of(*ROTATION_FRAMES)]
    num_people: People


class HandPrior(TypedDict, total=False):
    """Of the hand prior; see `HandPrior`."""

    width: Width
    num_layers: Count
    num_heads: Heads
    text_width: Width
    num_people: People


class PositionKernel(TypedDict, total=False):
    """Of the positional kernel; see `PositionKernel`."""

    heads: Annotated[list[Heads], Meta(max_length=1024, description="numbers of heads")]
    frequencies: Frequencies
    gated: Yes


class UNet2DConditionModel(TypedDict, total=False):
    """Of the UNet, in diffusers' words: all that changes its shape. ONLY limits the rest."""

    sample_size: Sample | None
    in_channels: Width
    out_channels: Width
    center_input_sample: Yes
    flip_sin_to_cos: Yes
    freq_shift: Annotated[float, Meta(ge=0, le=1, description="a number from 0 to 1")]
    down_block_types: Annotated[
        list[Annotated[str, one_of("CrossAttnDownBlock2D", "DownBlock2D")]],
        Meta(min_length=1, max_length=8, description="1 to 8 of CrossAttnDownBlock2D and DownBlock2D"),
    ]
    up_block_types: Annotated[
        list[Annotated[str, one_of("CrossAttnUpBlock2D", "UpBlock2D")]],
        Meta(min_length=1, max_length=8, description="1 to 8 of CrossAttnUpBlock2D and UpBlock2D"),
    ]
    block_out_channels: Levels
    layers_per_block: EachLayers
    downsample_padding: Annotated[int, whole(0, 1)]
    mid_block_scale_factor: Scale
    dropout: Annotated[float, Meta(ge=0, le=1, description="a number from 0 to 1")]
    norm_num_groups: Width
    norm_eps: Small
    cross_attention_dim: Width
    transformer_layers_per_block: EachLayers
    attention_head_dim: EachHeads
    only_cross_attention: EachYes
    use_linear_projection: Yes
    upcast_attention: Yes
    resnet_time_scale_shift: Annotated[str, one_of("default", "scale_shift")]
    resnet_out_scale_factor: Scale
    time_embedding_dim: Width | None
    conv_in_kernel: Kernel
    conv_out_kernel: Kernel


class AutoencoderKL(TypedDict, total=False):
    """Of the VAE, in diffusers' words: all that changes its shape. ONLY limits the rest."""

    in_channels: Width
    down_block_types: Annotated[
        list[Annotated[str, one_of("DownEncoderBlock2D", "AttnDownEncoderBlock2D")]],
        Meta(min_length=1, max_length=8, description="1 to 8 of DownEncoderBlock2D and AttnDownEncoderBlock2D"),
    ]
    up_block_types: Annotated[
        list[Annotated[str, one_of("UpDecoderBlock2D", "AttnUpDecoderBlock2D")]],
        Meta(min_length=1, max_length=8, description="1 to 8 of UpDecoderBlock2D and AttnUpDecoderBlock2D"),
    ]
    block_out_channels: Levels
    layers_per_block: Layers
    act_fn: Word
    latent_channels: Width
    norm_num_groups: Width
    sample_size: Sample
    scaling_factor: Scale
    shift_factor: Annotated[float, Meta(ge=-1000, le=1000, description="a number from -1000 to 1000")] | None
    force_upcast: Yes
    use_quant_conv: Yes
    use_post_quant_conv: Yes
    mid_block_add_attention: Yes


class PatchAutoencoderKL(AutoencoderKL, total=False):
    """Of the VAE on patches; see `PatchAutoencoderKL` in autoencoder.py."""

    patch_size: Annotated[int, whole(1, 16)]


KINDS = (
    CLIPTextModel,
    HandPrior,
    TextHandEncoder,
    UNet2DConditionModel,
    PositionKernel,
    AutoencoderKL,
    PatchAutoencoderKL,
)
CONFIGS: dict[str, Any] = {kind.__name__: kind for kind in KINDS}
# Entries beyond the exported graphs -> the values that the graphs support. The export computes time rows and keys
# outside the loop (see export/graphs.py) and would lose other embeddings and attentions.
ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "CLIPTextModel": {"use_attention_mask": (None, False)},
    "UNet2DConditionModel": {
        "act_fn": ("silu", "swish"),
        "addition_embed_type": (None,),
        "attention_type": ("default",),
        "class_embed_type": (None,),
        "class_embeddings_concat": (False,),
        "cross_attention_norm": (None,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "mid_block_only_cross_attention": (None, False),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "num_attention_heads": (None,),
        "num_class_embeds": (None,),
        "resnet_skip_time_act": (False,),
        "reverse_transformer_layers_per_block": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    },
    "AutoencoderKL": {"latents_mean": (None,), "latents_std": (None,), "out_channels": (3,)},
    "PatchAutoencoderKL": {
        "in_channels": (3,),
        "out_channels": (3,),
        "use_quant_conv": (False,),
        "use_post_quant_conv": (False,),
    },
}


class Index(TypedDict, total=False):
    """Of model_index.json: our entries beside diffusers' list of parts."""

    _image_size: Sides
    _defaults: dict[Word, Any]
    _notes: dict[Word, Any]
    _words: Annotated[list[Word], Meta(max_length=10_000)]


class AddedToken(TypedDict):
    """A token as transformers 4 wrote it."""

    content: Word


Token = Annotated[Word | AddedToken | None, Meta(description='a token, such as "<|endoftext|>"')]


class TokenizerConfig(TypedDict, total=False):
    """Of tokenizer_config.json, in transformers' words."""

    bos_token: Token
    eos_token: Token
    pad_token: Token
    model_max_length: Annotated[int, Meta(ge=3, description="a whole number from 3 up")]


@dataclass
class Layout:
    """A checkpoint's parts, size, defaults, notes, words and schedules."""

    parts: dict[str, str]  # name of each part that it has -> its class, a key of CONFIGS
    image_size: tuple[int, int] | None  # H, W; None: as the UNet was trained
    defaults: dict[str, Any]  # steps, solver, guidance, hand_steps, hand_solver, hand_guidance, noise_offset
    notes: dict[str, Any]
    words: list[str]
    schedules: dict[str, dict[str, Any]]  # scheduler, hand_scheduler


def read_layout(folder: Path) -> Layout:
    """Reads and checks everything but weights and tokens.

    Raises CheckpointError for a folder that is not a checkpoint, a missing part, a pickle, a bad configuration, and a
    schedule or default settings that the exported bundle cannot sample with.
    """
    refuse_foreign(folder, "hd-export")
    index = _read(folder / MODEL_INDEX, Index)
    needed = [name for name in PARTS if name != "position_kernel"] + [*SCHEDULES, "tokenizer"]
    missing = [name for name in needed if not (folder / name).is_dir()]
    if missing and "hand_prior" not in read_object(folder / MODEL_INDEX):
        raise CheckpointError(
            f"{folder} must be a HanDiffuser checkpoint, but lacks {', '.join(missing)}. If it is Stable Diffusion 1.x "
            f"or 2.x, make a checkpoint of it: hd-train init {folder} start"
        )
    if missing:
        raise CheckpointError(f"{folder} is incomplete: it lacks {', '.join(missing)}. Copy it again.")
    parts = {name: kind for name, (_, kind) in PARTS.items() if (folder / name).is_dir()}
    if read_object(folder / MODEL_INDEX).get("vae") == list(PATCH_VAE):
        parts["vae"] = PATCH_VAE[1]
    for name, kind in parts.items():
        refuse_pickles(folder, name)
        read_config(kind, folder / name)
    read_tokenizer_config(folder / "tokenizer")
    defaults = _fit(folder / MODEL_INDEX, {**default_settings(Config()), **index.get("_defaults", {})}, Defaults)
    schedules = {name: _read(folder / name / "scheduler_config.json", dict[Word, Any]) for name in SCHEDULES}
    for name, config in schedules.items():
        check_scheduler(folder / name / "scheduler_config.json", config.get("_class_name", "DDIMScheduler"), config)
    check_sampling(folder, schedules, defaults)
    size, notes, words = index.get("_image_size"), index.get("_notes", {}), index.get("_words", [])
    return Layout(parts, (size[0], size[1]) if size else None, defaults, notes, words, schedules)


def read_config(kind: str, folder: Path) -> dict[str, Any]:
    """A part's configuration, reduced to the entries that shape its network. kind: a key of CONFIGS."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} must have a config.json.")
    value = _read(path, dict[Word, Any])
    for name, allowed in ONLY.get(kind, {}).items():
        if name in value and value[name] not in allowed:
            raise CheckpointError(
                f"{name} in {path} must be {allowed[0]!r}, got {shown(value[name])}. The export supports no other."
            )
    config: dict[str, Any] = _fit(path, value, CONFIGS[kind])
    names = ("width", "num_heads") if kind == "HandPrior" else ("hidden_size", "num_attention_heads")
    width, heads = (config.get(name) for name in names)
    if width and heads and (width % heads or width % 2):
        raise CheckpointError(f"The width in {path} must be even and a multiple of its {heads} heads, got {width}.")
    return config


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """`bos`, `eos` and `pad` (tokens) and `length`, from tokenizer_config.json, or else CLIP's."""
    config = _read(folder / "tokenizer_config.json", TokenizerConfig)
    found: dict[str, Any] = {}
    for name, usual in (("bos", BOS), ("eos", EOS), ("pad", EOS)):
        token = config.get(f"{name}_token") or usual
        found[name] = token["content"] if isinstance(token, dict) else token
    length = config.get("model_max_length", NO_LENGTH)
    return {**found, "length": length if length < NO_LENGTH else 77}


def check_scheduler(path: Path, kind: Any, config: dict[str, Any] | None = None) -> None:
    """Raises CheckpointError for a scheduler of another kind of noise schedule, by its class.

    config: where given, it must state each entry for which its class has other defaults than DDIMScheduler.
    """
    if kind not in SCHEDULERS:
        raise CheckpointError(
            f"{path} must be a scheduler of Stable Diffusion 1.x or 2.x, got {shown(kind)}, which is for networks "
            "of other training. If this network was tuned from Stable Diffusion, copy scheduler/ from there."
        )
    absent = [name for name in STATED if name not in config] if config is not None and kind != "DDIMScheduler" else []
    if absent:
        raise CheckpointError(
            f"{path} must state {', '.join(absent)}: {kind} has its own defaults. Save it again with diffusers, which "
            "writes them."
        )


def check_sampling(folder: Path, schedules: dict[str, dict[str, Any]], defaults: dict[str, Any]) -> None:
    """Raises CheckpointError where a bundle cannot sample with its defaults on its own noise schedules."""
    for name, graph in SCHEDULES.items():
        of = "hand_" if graph == "hand_prior" else ""
        solver, steps, guidance = (defaults[of + setting] for setting in ("solver", "steps", "guidance"))
        try:
            schedule = NoiseSchedule.from_config(schedules[name])
            rows(schedule, solver, steps, guidance, NUM_HISTORY[graph])
        except HanDiffuserError as error:
            raise CheckpointError(f"{folder / name} cannot be sampled with: {error}") from None


def _read(path: Path, kind: Any) -> Any:
    return _fit(path, read_object(path), kind)


def _fit(path: Path, value: Any, kind: Any) -> Any:
    try:
        return fit(value, kind)
    except MisfitError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None
