"""Training data: scenes of the demo world as tensors, held in memory, cached on disk.

    data = make_dataset(20_000, tokenizer, 77, seed=1, cache=Path("runs/demo/data.safetensors"))
    data["images"]  # uint8 [N, 128, 128, 3]

Held-out prompts never enter it.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from ..demo.dataset import LABELS, WORDINGS
from ..demo.prompts import is_held_out, write_prompt
from ..demo.render import demo_body, render_scenes
from ..demo.scenes import Scene, sample_scenes
from ..models.hand_features import pack, placement_of

Dataset = dict[str, Tensor]
SHARD = 500


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer, special: dict[str, int]) -> Tensor:
    """Prompts -> token ids [N, length]: bos, at most length - 2 tokens, eos, padding."""
    length = special["length"]
    ids = torch.full((len(prompts), length), special["pad"], dtype=torch.int64)
    for row, encoding in enumerate(tokenizer.encode_batch(list(prompts), add_special_tokens=False)):
        tokens = [special["bos"], *encoding.ids[: length - 2], special["eos"]]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids


def labels_of(scenes: Sequence[Scene]) -> Tensor:
    """Class numbers [N, 4] in the order of LABELS."""
    return torch.tensor(
        [[list(names).index(getattr(s.spec, label)) for label, names in LABELS.items()] for s in scenes]
    )


@torch.no_grad()
def scene_tensors(scenes: Sequence[Scene], size: int) -> Dataset:
    """Renders scenes and packs their parameters: images uint8 [N,size,size,3], params [N,330], labels [N,4]."""
    body = demo_body()

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(scene, name) for scene in scenes]))

    rotations, betas = stack("rotations"), stack("betas")
    joints = torch.cat([body(r, b)[1] for r, b in zip(rotations.split(64), betas.split(64), strict=True)])
    placement = placement_of(joints, stack("camera"), stack("present"))
    return {
        "images": render_scenes(scenes, body, size),
        "params": pack(rotations, betas, placement),
        "labels": labels_of(scenes),
    }


def wordings(scene: Scene, rng: np.random.Generator) -> list[str]:
    """WORDINGS prompts for a scene, its own first, none of them held out. The others say nearly all: what a prompt
    leaves out teaches nothing about words, and its colour, which nobody can predict, drowns what could be learned."""
    prompts = [scene.prompt]
    while len(prompts) < WORDINGS:
        prompt = write_prompt(scene.spec, rng, leave_out=0.05)
        if not is_held_out(prompt):
            prompts.append(prompt)
    return prompts


def shard_scenes(seed: int, index: int) -> tuple[list[Scene], list[str]]:
    """One shard: scenes whose prompts are not held out, and WORDINGS prompts for each, one scene after the other."""
    scenes = [scene for scene in sample_scenes(SHARD, seed=seed * 100_003 + index) if not is_held_out(scene.prompt)]
    rng = np.random.default_rng((seed, index))
    return scenes, [prompt for scene in scenes for prompt in wordings(scene, rng)]


def _shard(arguments: tuple[int, int, int]) -> tuple[list[str], Dataset]:
    """A shard's prompts and tensors."""
    seed, index, size = arguments
    torch.set_num_threads(1)
    scenes, prompts = shard_scenes(seed, index)
    return prompts, scene_tensors(scenes, size)


def make_dataset(
    count: int, tokenizer: Tokenizer, special: dict[str, int], *, size: int, seed: int, cache: Path, processes: int = 2
) -> Dataset:
    """About `count` scenes (a tenth of the prompts is held out and dropped): images, params, labels, ids [N, W, 77].

    Made by one-thread processes and cached; a second call reads the cache.
    """
    if cache.exists():
        return load_file(cache)
    shards = [(seed, index, size) for index in range(-(-count // SHARD))]
    prompts: list[str] = []
    parts: list[Dataset] = []
    with get_context("spawn").Pool(processes) as pool:
        for some, tensors in track(pool.imap(_shard, shards), "scenes", total=len(shards)):
            prompts += some
            parts.append(tensors)
    data = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    data["ids"] = encode_prompts(prompts, tokenizer, special).unflatten(0, (-1, WORDINGS))
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_suffix(".tmp")
    save_file(data, temporary)
    temporary.replace(cache)
    return data


def images_to_float(images: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def image_grid(images: Tensor, columns: int) -> Tensor:
    """uint8 [N, H, W, 3] -> one picture [rows * H, columns * W, 3]."""
    rows = -(-len(images) // columns)
    height, width = images.shape[1:3]
    padded = torch.cat([images, images.new_zeros(rows * columns - len(images), height, width, 3)])
    return padded.view(rows, columns, height, width, 3).transpose(1, 2).reshape(rows * height, columns * width, 3)
