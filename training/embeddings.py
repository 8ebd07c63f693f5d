"""Textual inversion (Gal et al., arXiv 2208.01618): trained words, taken into a tokenizer and a CLIP text model.

    tokens = add(Path("cat-toy.safetensors"), "<cat-toy>", tokenizer, clip)      # ["<cat-toy>", "<cat-toy>_1"]

Files are those that diffusers' `load_textual_inversion` reads: its own (one tensor under the placeholder's name) and
AUTOMATIC1111's (`string_to_param`, or `emb_params`, whose placeholder is the file's name). Several vectors become
several tokens, as there; see `handiffuser.placeholders` for how a prompt names them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..errors import CheckpointError
from ..models.foreign import PICKLES, refuse_pointer
from ..models.weights import first_line

MAX_FILE_BYTES = 1 << 26  # bytes: a thousand vectors of the widest CLIP are a few megabytes
UNNAMED = "emb_params"  # AUTOMATIC1111's key in safetensors: the file's name is the placeholder


def add(path: Path, token: str | None, tokenizer: CLIPTokenizer, clip: CLIPTextModel) -> list[str]:
    """Gives the vectors of a file to the placeholder `token`; None: the file's own. Returns the tokens added.

    Raises CheckpointError for another kind of file, vectors of another width, and a placeholder that is taken.
    """
    named, vectors = read(path)
    token = token or named
    if not token or token.isspace():
        raise CheckpointError(f"{path} must come with its placeholder. Give both: --embedding '{path}:<name>'")
    width = clip.config.hidden_size
    if vectors.shape[1] != width:
        raise CheckpointError(
            f"{path} must hold vectors of {width} numbers, as wide as this text encoder, got {vectors.shape[1]}. "
            "It was trained for another Stable Diffusion (1.x has 768, 2.x has 1024)."
        )
    tokens = [token, *(f"{token}_{number}" for number in range(1, len(vectors)))]
    vocabulary = tokenizer.get_vocab()
    taken = [name for name in (*tokens, f"{token}_1") if name in vocabulary]
    if taken:
        raise CheckpointError(
            f"The placeholder of {path} must be new to the tokenizer, got {taken[0]}. "
            f"Give another: --embedding '{path}:<name>'"
        )
    tokenizer.add_tokens(tokens)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    if max(ids) >= clip.config.vocab_size:
        clip.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        clip.get_input_embeddings().weight[ids] = vectors
    return tokens


def read(path: Path) -> tuple[str, Tensor]:
    """A file's placeholder, and its vectors [N, width] in float32. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(
            f"The embedding {path} does not exist. Give a .safetensors or .pt file, and :<name> after it."
        )
    refuse_pointer(path)
    if path.suffix not in (".safetensors", *PICKLES):
        raise CheckpointError(f"{path} must be a .safetensors or .pt file. Give the file that the training wrote.")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{path} must be at most {MAX_FILE_BYTES >> 20} MB, as a textual inversion is. Give another file."
        )
    try:
        held: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)  # no code of the file runs
        )
    except Exception as error:  # safetensors' and pickle's own
        raise CheckpointError(f"{path} cannot be read as an embedding: {first_line(error)}") from None
    named, vectors = _find(path, held)
    if not isinstance(vectors, Tensor) or not vectors.is_floating_point() or not 1 <= vectors.dim() <= 2:
        raise CheckpointError(f"{path} must be a textual inversion: vectors, one a row. Give another file.")
    vectors = vectors.detach().float().reshape(-1, vectors.shape[-1])
    if not len(vectors) or not vectors.isfinite().all():
        raise CheckpointError(f"{path} must hold one vector or more, of finite numbers. Train it again.")
    return named, vectors


def _find(path: Path, held: Any) -> tuple[str, Any]:
    """The placeholder and the tensor of a file's content."""
    if isinstance(held, Tensor):
        return "", held
    if not isinstance(held, dict):
        raise CheckpointError(f"{path} must be a textual inversion: vectors by name. Give another file.")
    if "clip_g" in held or "clip_l" in held:
        raise CheckpointError(
            f"{path} must be for Stable Diffusion 1.x or 2.x, got vectors for SDXL's two text encoders. Take another."
        )
    if "string_to_param" in held:
        parameters = held["string_to_param"]
        vectors = parameters.get("*") if isinstance(parameters, dict) else None
        return str(held.get("name") or path.stem), vectors
    if len(held) == 1:
        name, vectors = next(iter(held.items()))
        return path.stem if name == UNNAMED else str(name), vectors
    raise CheckpointError(
        f"{path} must be a textual inversion with one tensor, got {len(held)}. Give a LoRA to hd-export --lora."
    )
