"""A part of a checkpoint, read from safetensors: what does not fit is one sentence that names the file and the tensors.

    unet = load_part(UNet2DConditionModel, Path("checkpoint/unet"))

The libraries' `from_pretrained` builds the modules. This module finds what they ignore (a missing tensor stays random,
a number beyond float32 becomes infinity) or answer with pages of text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta, Struct
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPTextConfig, PreTrainedModel

from ..contract import FileName, Word
from ..errors import CheckpointError
from ..hub import VARIANTS, candidates
from ..schema import MisfitError, fit, listed, read_json
from .layout import read_config

FLOATS = ("F64", "F32", "F16", "BF16")  # in the words of safetensors
SPARE = 1 << 20  # elements: a network larger than twice its file plus this is refused before it is built


class Index(Struct):
    """Of weights in several files: which tensor is in which."""

    weight_map: Annotated[dict[Word, FileName], Meta(min_length=1)]


def load_part(kind: Any, folder: Path, mapped: bool = False, variant: str | None = None) -> Any:
    """A module of the class `kind` in float32, from its folder in Hugging Face layout.

    mapped: float32 weights stay in the file, which must not change meanwhile; the system reads their pages on demand.
    Changes in memory never reach the file. variant: of the files, "fp16" or "bf16"; None: see `weight_files`.
    Raises CheckpointError for files that are missing or damaged, and for tensors that are missing, left over, not
    finite, or of another shape or type than the configuration says.
    """
    config = read_config(kind.__name__, folder)
    files, variant = weight_files(kind, folder, variant)
    stored = read_headers(files)
    other = [f"{name} ({held})" for name, (held, _) in stored.items() if held not in FLOATS and not _unread(name)]
    if other:
        raise CheckpointError(
            f"The weights in {folder} must be float32, float16 or bfloat16, got {listed(other)}. Save them again as "
            "one of these."
        )
    held = sum(size for _, size in stored.values())
    try:
        with torch.device("meta"):  # without memory
            wanted = sum(tensor.numel() for tensor in build(kind, config).state_dict().values())
        if wanted <= 2 * held + SPARE:
            arguments: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
            arguments["variant"] = variant
            arguments["ignore_mismatched_sizes"] = True  # the library reports them, and the code below refuses them
            if issubclass(kind, PreTrainedModel):
                arguments |= {"dtype": torch.float32, "config": CLIPTextConfig(**config)}
            else:
                arguments |= {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
            module, info = kind.from_pretrained(folder, **arguments)
    except Exception as error:  # the libraries raise many kinds
        raise CheckpointError(f"{folder / 'config.json'} must describe a network, got: {first_line(error)}") from None
    if wanted > 2 * held + SPARE:
        raise CheckpointError(
            f"The weights in {folder} must be the {wanted:,} numbers of its config.json, got {held:,}. Save both again "
            "together, with save_pretrained()."
        )
    wrong = [
        f"{what} {listed(names)}"
        for what, names in (
            ("lacks", info["missing_keys"]),
            ("has no place for", info["unexpected_keys"]),
            ("differs in the shape of", [str(key[0]) for key in info["mismatched_keys"]]),
        )
        if names
    ]
    if wrong:
        raise CheckpointError(
            f"The weights in {folder} must fit its config.json, but the file {' and '.join(wrong)}. Save both again "
            "together, with save_pretrained()."
        )
    if mapped:
        map_weights(module, files)
    check_finite(module, folder)
    return module


def map_weights(module: nn.Module, files: Iterable[Path]) -> None:
    """Replaces a module's tensors by those of files with the same name, type and shape.

    The system may drop their pages when memory is short, and read them again.
    """
    own = module.state_dict(keep_vars=True)
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                there = tensors.get_tensor(name) if name in own else None  # mapped; a write copies it
                if there is not None and (there.dtype, there.shape) == (own[name].dtype, own[name].shape):
                    own[name].data = there


def weight_files(kind: Any, folder: Path, variant: str | None = None) -> tuple[list[Path], str | None]:
    """The files that `from_pretrained` will read (one, or the shards that an index names), and their variant.

    Without float32 files it takes half precision: `*.fp16.safetensors`, as diffusers' `variant="fp16"` saves it.
    variant: takes these files only.
    """
    stem = "model" if issubclass(kind, PreTrainedModel) else "diffusion_pytorch_model"
    for one in (variant,) if variant else VARIANTS:
        single, index = (folder / name for name in candidates(stem, one))
        if single.is_file():
            return [single], one
        if index.is_file():
            return _shards(index), one
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if variant:
        raise CheckpointError(f"{folder} must have {variant} weights for --variant, got {', '.join(others) or 'none'}.")
    raise CheckpointError(
        f"{folder} must have a {stem}.safetensors."
        + (f" If its weights are in {others[0]}, give that file this name." if others else "")
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index of weights names."""
    try:
        names = fit(read_json(index), Index).weight_map
    except (OSError, MisfitError) as error:
        raise CheckpointError(f"{index} must be an index of weights, got: {first_line(error)}") from None
    shards = sorted({index.parent / name for name in names.values()})
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{index.parent} lacks {shard.name}, which {index.name} names. Copy it again.")
    return shards


def read_headers(files: Iterable[Path]) -> dict[str, tuple[str, int]]:
    """Tensor -> its type and number of elements, by the headers alone; safetensors checks them against the file."""
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(name)
                    found[name] = part.get_dtype(), math.prod(part.get_shape())
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from None
        except SafetensorError as error:
            raise CheckpointError(f"{file} is truncated or damaged: {first_line(error)}") from None
    return found


def build(kind: Any, config: dict[str, Any]) -> nn.Module:
    """A module of the class `kind` with random weights."""
    made: nn.Module = kind(CLIPTextConfig(**config)) if issubclass(kind, PreTrainedModel) else kind.from_config(config)
    return made


def first_line(error: BaseException) -> str:
    """A library's message, as the end of a sentence; its type alone if it speaks of a model hub, which we never use."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(" .:")
    return (
        f"{type(error).__name__}." if any(word in said.lower() for word in ("hub", "hugging", "http")) else f"{said}."
    )


def _unread(name: str) -> bool:
    return name.endswith("position_ids")  # a buffer in CLIP files of transformers before 4.31, which the model ignores


def check_finite(module: nn.Module, folder: Path) -> None:
    """Raises CheckpointError for NaN or infinity in a weight.

    One pass at the speed of memory: finite terms have a finite sum unless they are huge; then it checks each term.
    """
    broken = [
        name
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all()
    ]
    if broken:
        raise CheckpointError(
            f"The weights in {folder} must be finite, got NaN or infinity in {listed(broken)}. "
            "Take an earlier checkpoint, before the training diverged."
        )
