"""A checkpoint folder in Hugging Face layout: loaded, saved, or made at random.

    model_index.json  tokenizer/  text_encoder/  hand_prior/  text_hand_encoder/  unet/  position_kernel/  vae/
    scheduler/  hand_scheduler/  [body/smplh.npz: the demo's own, licence-free body]

The library of each part reads it with `from_pretrained`. A UNet with plain cross-attention has no `position_kernel/`.
Weights are safetensors only. The module never downloads.

    checkpoint = Checkpoint.load("checkpoint")
    random_checkpoint(CONFIGS["tiny"]).save("checkpoint")
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from ..contract import MAX_PARAMETER
from ..errors import CheckpointError
from ..files import open_to_others, written
from ..schema import read_file
from .autoencoder import PatchAutoencoderKL
from .configs import DEMO_SCHEDULE, HAND_SCHEDULE, SD_SCHEDULE, Config, default_settings, latent_factor, size_multiple
from .foreign import MODEL_INDEX
from .hand_prior import HandPrior
from .layout import NO_LENGTH, PARTS, PATCH_VAE, read_layout, read_tokenizer_config
from .position_kernel import PositionKernel, attach, cross_attentions
from .text_hand_encoder import TextHandEncoder
from .vocabulary import make_tokenizer, special_tokens
from .weights import first_line, load_part

# The libraries' bars and remarks would interrupt our commands' own progress.
diffusers_logging.set_verbosity_error()
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

BODY = Path("body/smplh.npz")
CLASSES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        CLIPTextModel,
        HandPrior,
        TextHandEncoder,
        UNet2DConditionModel,
        PositionKernel,
        AutoencoderKL,
        PatchAutoencoderKL,
    )
}
MAX_TOKENIZER = 1 << 27  # bytes of a tokenizer's files
PROMPTS = ("", "a photo of a cat", "A right hand, making a FIST!!", "it's 2 ✌️ hands  on café tables", "手を開く")
# Other files of a tokenizer that transformers reads. Stable Diffusion's folders have them, some without tokenizer.json.
PARTIAL = ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")


@dataclass
class Checkpoint:
    """The trained stages, their tokenizer, schedules and defaults. All modules are float32 and in evaluation mode."""

    tokenizer: Tokenizer
    special_tokens: dict[str, int]  # bos, eos, pad (ids), length
    text_encoder: CLIPTextModel
    hand_prior: HandPrior
    text_hand_encoder: TextHandEncoder
    unet: UNet2DConditionModel
    position_kernel: PositionKernel | None
    vae: AutoencoderKL
    scheduler: dict[str, Any]  # noise schedule of the UNet, in diffusers' words
    hand_scheduler: dict[str, Any]
    defaults: dict[str, Any]  # steps, solver, guidance, hand_steps, hand_solver, hand_guidance, noise_offset
    image_size: tuple[int, int]  # H, W
    body: Path | None = None  # the body that came with the checkpoint
    name: str = "checkpoint"
    notes: dict[str, Any] = field(default_factory=dict)  # how it was trained and what it scored
    words: list[str] = field(default_factory=list)  # all training words, if its text encoders did not start as CLIP

    def modules(self) -> dict[str, torch.nn.Module]:
        """The trained parts by name; position_kernel only where the checkpoint has one."""
        parts = {name: getattr(self, name) for name in PARTS}
        return {name: module for name, module in parts.items() if module is not None}

    @property
    def inpaints(self) -> bool:
        """Whether the UNet was trained for inpainting: it also sees a mask and the latents of a masked picture."""
        return bool(self.unet.config.in_channels > self.vae.config.latent_channels)

    def check_paints(self, what: str) -> None:
        """Raises CheckpointError for a UNet of inpainting, which `what` does not feed."""
        if self.inpaints:
            raise CheckpointError(
                f"The UNet must take {self.vae.config.latent_channels} channels for {what}, got "
                f"{self.unet.config.in_channels}, which is for inpainting. Give a checkpoint that paints from text."
            )

    def attach_kernel(self) -> None:
        """Sets the UNet's cross-attention up for the checkpoint's kernel (if any) and image size."""
        attach(self.unet, self.position_kernel, self.latent_size)

    @property
    def latent_size(self) -> tuple[int, int]:
        factor = latent_factor(self.vae.config)
        return self.image_size[0] // factor, self.image_size[1] // factor

    @property
    def num_people(self) -> int:
        """How many people a picture shows at most."""
        return int(self.hand_prior.config.num_people)

    @property
    def size_multiple(self) -> int:
        """What the sides of pictures are multiples of, in pixels."""
        return size_multiple(self.vae.config, self.unet.config)

    def save(self, folder: str | Path, half: bool = False) -> None:
        """Writes the folder. half: stores the weights in float16."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        index: dict[str, Any] = {"_class_name": "HanDiffuserPipeline", "_image_size": list(self.image_size)}
        for name, module in self.modules().items():
            index[name] = list(PATCH_VAE if isinstance(module, PatchAutoencoderKL) else PARTS[name])
            stored = copy.deepcopy(module).half() if half else module
            stored.save_pretrained(folder / name, safe_serialization=True)  # type: ignore[operator]
            open_to_others(*(folder / name).glob("*.safetensors"))
            _clean(folder / name / "config.json")
        for name in ("scheduler", "hand_scheduler"):
            index[name] = ["diffusers", "DDIMScheduler"]
            DDIMScheduler.from_config(getattr(self, name)).save_pretrained(folder / name)
        (folder / "tokenizer").mkdir(exist_ok=True)
        self.tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
        names = {name: self.tokenizer.id_to_token(self.special_tokens[name]) for name in ("bos", "eos", "pad")}
        tokenizer_config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.special_tokens["length"],
            **{f"{name}_token": token for name, token in names.items()},
            "unk_token": names["eos"],
        }
        (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1) + "\n")
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
        index["_defaults"], index["_notes"] = self.defaults, self.notes
        if self.words:
            index["_words"] = self.words
        if self.body is not None and self.body.resolve() != (folder / BODY).resolve():
            (folder / BODY).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.body, folder / BODY)
        with written(folder / MODEL_INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, mapped: bool = False) -> Checkpoint:
        """Reads a checkpoint folder; weights become float32. mapped: see `load_part`.

        Raises CheckpointError for a missing part, a pickle, weights that are damaged, not finite or unlike their
        configuration, or parts that do not fit together.
        """
        folder = Path(folder)
        layout = read_layout(folder)  # refuses a bad checkpoint before it reads weights
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a typo in a path must not become a download
        tokenizer, special_tokens = load_tokenizer(folder / "tokenizer")
        parts = {name: load_part(CLASSES[kind], folder / name, mapped) for name, kind in layout.parts.items()}
        checkpoint = cls(
            tokenizer=tokenizer,
            special_tokens=special_tokens,
            position_kernel=parts.pop("position_kernel", None),
            **parts,
            scheduler=layout.schedules["scheduler"],
            hand_scheduler=layout.schedules["hand_scheduler"],
            defaults=layout.defaults,
            image_size=layout.image_size or trained_size(parts["unet"], parts["vae"]),
            body=folder / BODY if (folder / BODY).exists() else None,
            name=folder.resolve().name,
            notes=layout.notes,
            words=layout.words,
        )
        checkpoint.check()
        mean, std = checkpoint.hand_prior.mean, checkpoint.hand_prior.std
        if mean.abs().max() > MAX_PARAMETER or not 0 < std.min() <= std.max() <= MAX_PARAMETER:
            raise CheckpointError(
                f"std in {folder / 'hand_prior'} must be above 0, and mean and std at most {MAX_PARAMETER:g}, got "
                f"std {std.min():g} to {std.max():g} and mean up to {mean.abs().max():g}. Train the hand prior again."
            )
        for module in checkpoint.modules().values():
            module.eval().requires_grad_(False)
        checkpoint.attach_kernel()
        return checkpoint

    def check(self) -> None:
        """Raises CheckpointError when parts do not fit together, naming both."""
        encoder, unet, prior = self.text_hand_encoder, self.unet, self.hand_prior
        channels = self.vae.config.latent_channels
        pairs = [
            ("text_hand_encoder's width", encoder.config.hidden_size, "unet's cross_attention_dim",
             unet.config.cross_attention_dim),
            ("text_encoder's width", self.text_encoder.config.hidden_size, "hand_prior's text_width",
             prior.config.text_width),
            ("vae's latent channels", channels, "unet's out_channels", unet.config.out_channels),
            ("text_encoder's vocabulary", self.text_encoder.config.vocab_size, "text_hand_encoder's",
             encoder.config.vocab_size),
            ("the tokenizer's model_max_length", self.special_tokens["length"], "text_hand_encoder's positions",
             encoder.config.max_position_embeddings),
            ("hand_prior's num_people", prior.config.num_people, "text_hand_encoder's", encoder.config.num_people),
        ]  # fmt: skip
        kernel = list(self.position_kernel.config.frequencies) if self.position_kernel is not None else []
        pairs.append(("text_hand_encoder's frequencies", list(encoder.config.frequencies), "position_kernel's", kernel))
        gated = self.position_kernel is not None and self.position_kernel.config.gated
        pairs.append(("text_hand_encoder's hide", encoder.config.hide, "position_kernel's gated", gated))
        if self.position_kernel is not None:
            heads = [layer.heads for layer in cross_attentions(unet)]
            pairs.append(("position_kernel's heads", list(self.position_kernel.config.heads), "unet's", heads))
        for name, value, other, wanted in pairs:
            if value != wanted:
                raise CheckpointError(f"The parts must fit together: {name} is {value}, {other} is {wanted}.")
        if unet.config.in_channels not in (channels, 2 * channels + 1):
            raise CheckpointError(
                f"unet's in_channels must be the vae's {channels}, or {2 * channels + 1} for inpainting, got "
                f"{unet.config.in_channels}."
            )
        places = self.text_encoder.config.max_position_embeddings
        if self.special_tokens["length"] > places:
            raise CheckpointError(
                f"The tokenizer's model_max_length must be at most text_encoder's {places} positions, got "
                f"{self.special_tokens['length']}."
            )
        largest = max(self.tokenizer.get_vocab().values(), default=0)
        if largest >= encoder.config.vocab_size:
            raise CheckpointError(
                f"The tokenizer's ids must be below the text models' {encoder.config.vocab_size}, got {largest}."
            )
        multiple = self.size_multiple
        if any(side % multiple for side in self.image_size):
            raise CheckpointError(
                f"_image_size must be multiples of {multiple} for this VAE and UNet, got "
                f"{self.image_size[0]}x{self.image_size[1]}."
            )


@torch.no_grad()
def decode(checkpoint: Checkpoint, latents: Tensor) -> Tensor:
    """Latents [N, C, h, w] -> uint8 pictures [N, H, W, 3]. They are decoded on the VAE's device."""
    config = checkpoint.vae.config
    latents = latents.to(next(checkpoint.vae.parameters()).device)
    image = checkpoint.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0.0)).sample
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def trained_size(unet: UNet2DConditionModel, vae: AutoencoderKL) -> tuple[int, int]:
    """H, W of a UNet's training pictures, in pixels. Raises CheckpointError."""
    sample = unet.config.sample_size
    if sample is None:
        raise CheckpointError(
            "The checkpoint must state the size of its pictures. Write it into its model_index.json: "
            '"_image_size": [512, 512].'
        )
    height, width = sample if isinstance(sample, (list, tuple)) else (sample, sample)
    factor = latent_factor(vae.config)
    return height * factor, width * factor


def load_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, int]]:
    """The tokenizer of a folder, with its special tokens' ids.

    A folder that `Checkpoint.save` wrote has tokenizer.json alone; for others see `clip_tokenizer`.
    Raises CheckpointError for files that are missing or damaged, and for a tokenizer without its special tokens.
    """
    config = read_tokenizer_config(folder)
    if any((folder / name).is_file() for name in PARTIAL):
        return plain_tokenizer(clip_tokenizer(folder))
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} must have a tokenizer.json, or a vocab.json and merges.txt.")
    try:
        tokenizer = Tokenizer.from_buffer(read_file(path, MAX_TOKENIZER))
        ids = {name: tokenizer.token_to_id(config[name]) for name in ("bos", "eos", "pad")}
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {first_line(error)}") from None
    for name, number in ids.items():
        if number is None:
            raise CheckpointError(f"The tokenizer in {folder} lacks its {name} token {config[name]!r}.")
    return tokenizer, {**ids, "length": config["length"]}


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """transformers' tokenizer of all files in a folder, as diffusers' pipelines use it.

    special_tokens_map.json holds the pad token of Stable Diffusion 2.x, added_tokens.json the placeholders of textual
    inversion. Raises CheckpointError.
    """
    read_tokenizer_config(folder)
    names = [name for name in ("tokenizer.json", *PARTIAL) if (folder / name).is_file()]
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= set(names):
        raise CheckpointError(f"{folder} must have a tokenizer.json, or a vocab.json and merges.txt.")
    try:
        for name in names:
            read_file(folder / name, MAX_TOKENIZER)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise CheckpointError(f"{folder} cannot be read as a tokenizer: {first_line(error)}") from None
    return tokenizer


def plain_tokenizer(tokenizer: CLIPTokenizer) -> tuple[Tokenizer, dict[str, int]]:
    """The same tokenizer without transformers, and its special tokens' ids: a checkpoint keeps these.

    Raises CheckpointError where the two split a prompt differently.
    """
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    for prompt in (*PROMPTS, *(f"a {token}, {token}" for token in tokenizer.get_added_vocab())):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if plain.encode(prompt, add_special_tokens=False).ids != ids:
            raise CheckpointError(f"The tokenizer splits {prompt!r} otherwise without transformers. Please report it.")
    length = tokenizer.model_max_length
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return plain, {**special, "length": int(length) if length < NO_LENGTH else 77}


def random_checkpoint(
    config: Config,
    seed: int = 0,
    texts: Iterable[str] = (),
    body: Path | None = None,
    tokenizer: Tokenizer | None = None,
) -> Checkpoint:
    """An untrained checkpoint of any size, for training to start from, for tests and for benchmarks.

    texts: train the tokenizer, where none is given. The amplitudes of the positional kernel start at zero.
    """
    torch.manual_seed(seed)
    if tokenizer is None:
        tokenizer = make_tokenizer(list(texts) or ["a left hand, a right hand, two open hands"], config.vocab_size)
    special = special_tokens(tokenizer, config.text_length)
    clip = CLIPTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.text_width,
        intermediate_size=4 * config.text_width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        max_position_embeddings=config.text_length,
        bos_token_id=special["bos"],
        eos_token_id=special["eos"],
        pad_token_id=special["pad"],
    )
    attention = config.unet_attention
    unet = UNet2DConditionModel(
        sample_size=config.latent_size,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=config.unet_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        layers_per_block=config.unet_layers,
        only_cross_attention=config.unet_only_cross,
        cross_attention_dim=config.text_width,
        attention_head_dim=config.unet_heads,
        norm_num_groups=config.unet_groups,
    )
    levels, patch = len(config.vae_channels), {"patch_size": config.vae_patch} if config.vae_patch > 1 else {}
    vae = (PatchAutoencoderKL if patch else AutoencoderKL)(
        **patch,
        sample_size=config.image_size[0],
        latent_channels=config.latent_channels,
        block_out_channels=config.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=config.vae_layers,
        norm_num_groups=config.vae_groups,
    )
    checkpoint = Checkpoint(
        tokenizer=tokenizer,
        special_tokens=special,
        text_encoder=CLIPTextModel(clip),
        hand_prior=HandPrior(
            config.prior_width, config.prior_layers, config.prior_heads, config.text_width, config.num_people
        ),
        text_hand_encoder=TextHandEncoder.from_clip(
            CLIPTextModel(clip),
            cues=list(config.cues),
            frequencies=list(config.frequencies),
            rotation_frame=config.rotation_frame,
            num_people=config.num_people,
        ),
        unet=unet,
        position_kernel=PositionKernel.for_unet(unet, config.frequencies) if config.frequencies else None,
        vae=vae,
        scheduler=dict(SD_SCHEDULE if config.schedule == "sd" else DEMO_SCHEDULE),
        hand_scheduler=dict(HAND_SCHEDULE),
        defaults=default_settings(config),
        image_size=config.image_size,
        body=body,
        name="random",
    )
    checkpoint.check()
    for module in checkpoint.modules().values():
        module.eval()
    checkpoint.attach_kernel()
    return checkpoint


def _clean(path: Path) -> None:
    """Removes the folder that a part was loaded from, and entries that are not JSON (NaN and infinity).

    `read_config` refuses such a number where it matters.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name != "_name_or_path" and _is_json(value)}
    if kept != config:
        path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True
