"""Refuses what a user gives instead of a checkpoint or a Stable Diffusion folder, each with the way out.

    refuse_foreign(Path("model.safetensors"), "hd-export")     # CheckpointError: "... is a single file ..."
    check_stable_diffusion(Path("upscaler"))                   # CheckpointError: "... is an upscaler's UNet ..."

It needs no PyTorch and reads only small files: a command answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..contract import MANIFEST
from ..errors import CheckpointError
from ..schema import MisfitError, read_python_json, shown

MODEL_INDEX = "model_index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
POINTER = b"version https://git-lfs.github.com/spec/"
MAX_POINTER_BYTES = 1024  # bytes, as Git LFS says
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
STABLE_DIFFUSION = (*CLASSES, "tokenizer", "scheduler")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that a prompt alone does not use
CHANNELS = {  # of a UNet's input, where latents have 4
    5: "a depth-to-image UNet",
    7: "an upscaler's UNet",
    8: "an InstructPix2Pix UNet",
}
TAKES = "hd-train init takes Stable Diffusion 1.x and 2.x for text to image or inpainting"


def refuse_foreign(path: Path, command: str) -> None:
    """Raises CheckpointError unless `path` is a folder with a model_index.json and without Git LFS pointers.

    command: "hd-train init" or "hd-export", for the advice.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist. Give the folder that holds model_index.json, or an id of the Hub, which is "
            "downloaded: hf://ORGANISATION/NAME"
        )
    if path.is_file():
        refuse_pointer(path)
        raise CheckpointError(
            f"{path} must be a checkpoint's folder, got a single file. If it is Stable Diffusion, make a checkpoint of "
            f"it: hd-train init {path} start"
        )
    if (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} must be a checkpoint, got an exported bundle. Paint with it: hd-run {path} PROMPT"
        )
    for file in sorted([*path.glob("*"), *path.glob("*/*")]):
        if file.is_file():
            refuse_pointer(file)
    if not (path / MODEL_INDEX).exists():
        raise CheckpointError(f"{path} must have a model_index.json. {_instead(path)}")


def refuse_pointer(file: Path) -> None:
    """Raises CheckpointError for a Git LFS pointer, which stands for a file not fetched."""
    if file.stat().st_size > MAX_POINTER_BYTES:
        return
    with open(file, "rb") as content:
        if content.read(len(POINTER)) == POINTER:
            raise CheckpointError(f"{file} is a Git LFS pointer: fetch the file itself. Run there: git lfs pull")


def refuse_pickles(folder: Path, part: str) -> None:
    """Raises CheckpointError for a part whose weights are a pickle only."""
    files = [path for path in sorted((folder / part).glob("*")) if path.is_file()]
    pickles = [path for path in files if path.suffix in PICKLES]
    if not pickles or any(path.suffix == ".safetensors" for path in files):
        return
    said = f"{folder / part} holds its weights as a pickle ({pickles[0].name}), which can run code when opened."
    kind, sharded = CLASSES.get(part), len(pickles) > 1 and "-of-" in pickles[0].name
    if kind and sharded:
        library = "transformers" if part == "text_encoder" else "diffusers"
        where = f"'{folder / part}'"
        how = (
            f"from {library} import {kind} as M; "
            f"M.from_pretrained({where}, use_safetensors=False).save_pretrained({where})"
        )
    else:
        name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        how = (
            "import torch, safetensors.torch; "
            f"safetensors.torch.save_file(torch.load('{pickles[0]}', weights_only=True, map_location='cpu'), "
            f"'{folder / part / name}.safetensors', metadata={{'format': 'pt'}})"
        )
    raise CheckpointError(f'{said} Convert it where you trust its origin: python -c "{how}"')


def check_stable_diffusion(folder: Path) -> dict[str, Any]:
    """The content of model_index.json of a Stable Diffusion folder that `hd-train init` takes.

    Raises CheckpointError for another kind of model, and for parts that are missing, of another class or pickles.
    """
    refuse_foreign(folder, "hd-train init")
    index = read_object(folder / MODEL_INDEX)
    if "hand_prior" in index:
        raise CheckpointError(f"{folder} is a HanDiffuser checkpoint already. Export it: hd-export {folder} BUNDLE")
    pipeline = str(index.get("_class_name", "pipeline"))
    named = [name for name, entry in index.items() if isinstance(entry, list) and any(entry)]
    extra = [name for name in named if name not in (*STABLE_DIFFUSION, *UNUSED) and not name.startswith("_")]
    lacks = [name for name in STABLE_DIFFUSION if not (folder / name).is_dir()]
    if (folder / "text_encoder_2").is_dir() and "text_encoder_2" not in extra:
        extra.append("text_encoder_2")
    if extra or lacks:
        has = f"has {', '.join(extra)}" if extra else ""
        lack = f"lacks {', '.join(f'{name}/' for name in lacks)}" if lacks else ""
        also = " (SDXL)" if "text_encoder_2" in extra and "unet" in named else ""
        way = "Give the folder of the whole pipeline." if lacks and not extra else "Give a folder of one of those."
        if extra == ["controlnet"]:
            way = "Give the folder that the ControlNet was trained for, without it."
        raise CheckpointError(
            f"{folder} holds a {pipeline}{also}: it {' and '.join(filter(None, (has, lack)))}. {TAKES}. {way}"
        )
    for part in CLASSES:
        refuse_pickles(folder, part)
        _check_class(folder, part)
    _check_channels(folder)
    return index


def _check_class(folder: Path, part: str) -> None:
    """Raises CheckpointError for a part of a class that `hd-train init` does not take."""
    config = read_object(folder / part / "config.json")
    architectures = config.get("architectures")
    found = config.get("_class_name") or (
        architectures[0] if isinstance(architectures, list) and architectures else None
    )
    if found in (None, CLASSES[part]):
        return
    ways = {
        "vae": "Put the AutoencoderKL that its UNet was trained with into vae/.",
        "unet": "Give a text-to-image folder.",
        "text_encoder": "Give a folder whose text_encoder/ is CLIP's text model.",
    }
    raise CheckpointError(f"{folder / part} must be of class {CLASSES[part]}, got {str(found)[:60]}. {ways[part]}")


def _check_channels(folder: Path) -> None:
    """Raises CheckpointError for a UNet that reads more than latents, or more than these, a mask and masked latents."""
    channels = read_object(folder / "unet" / "config.json").get("in_channels", 4)
    latents = read_object(folder / "vae" / "config.json").get("latent_channels", 4)
    if channels != latents and not (isinstance(latents, int) and channels == 2 * latents + 1):
        kind = CHANNELS.get(channels if isinstance(channels, int) else 0, "a UNet for other inputs")
        raise CheckpointError(
            f"{folder / 'unet'} is {kind}: it takes {shown(channels)} channels, vae/ has {shown(latents)}. {TAKES}. "
            "Give the folder of the text-to-image model."
        )


def _instead(folder: Path) -> str:
    """The way out for a folder without a model_index.json."""
    if not folder.is_dir():
        return "Give a folder."
    config = folder / "config.json"
    if config.is_file():
        found = read_object(config)
        kind = found.get("_class_name") or next(iter(found.get("architectures") or []), "a model")
        return f"It holds one part ({kind}). Give the folder of the whole pipeline."
    files = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".ckpt"))
    if files:
        return f"It holds single files. Give one of them: {folder / files[0]}"
    return "Give the folder that holds it."


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        value = read_python_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} must have a {path.name}.") from None
    except (OSError, MisfitError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read: {str(why).rstrip('.')}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return value
