"""Measures speed and memory of stage 2's training: whole or LoRA, with and without gradient checkpointing, bfloat16.

    python studies/training_speed.py CHECKPOINT --output training.json

It runs the product's own loop on made-up rows, so it does not time the reading of a dataset. A way that does not fit
into memory says so, and the others go on.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from handiffuser.commands import run
from handiffuser.data.latents import encode_prompts
from handiffuser.models import lora
from handiffuser.models.checkpoint import Checkpoint
from handiffuser.training import loop
from handiffuser.training.recipe import PicturesPlan
from handiffuser.training.stages import PictureLoss, picture_inputs

ROWS = 64  # of made data, again and again


@dataclass(frozen=True)
class Way:
    """batch: samples a step; rank: of LoRA, 0 trains everything."""

    batch: int
    rank: int = 0
    gradient_checkpointing: bool = False


WAYS = (Way(8), Way(8, gradient_checkpointing=True), Way(32, gradient_checkpointing=True), Way(8, 16), Way(8, 16, True))


def measure(folder: Path, way: Way, steps: int) -> dict[str, Any]:
    """Samples a second, and the most memory that tensors took on the GPU, of `steps` steps after the first."""
    checkpoint = Checkpoint.load(folder)
    checkpoint.attach_kernel()
    for module in checkpoint.modules().values():
        module.requires_grad_(False)
    plan = PicturesPlan(
        steps=steps + 1, batch=way.batch, precision="bf16", lora=way.rank, workers=2, log_every=1,
        gradient_checkpointing=way.gradient_checkpointing,
    )  # fmt: skip
    if way.rank:
        lora.inject(checkpoint, way.rank)
    painter = PictureLoss(checkpoint, plan)
    if not way.rank:
        painter.requires_grad_(True)
    empty = encode_prompts([""], checkpoint.tokenizer, checkpoint.special_tokens)[0]
    random = torch.Generator().manual_seed(0)
    channels, points = checkpoint.unet.config.in_channels, checkpoint.text_hand_encoder.basis.shape[-2]
    made = {
        "mean": torch.randn(ROWS, channels, *checkpoint.latent_size, generator=random),
        "std": torch.rand(ROWS, channels, *checkpoint.latent_size, generator=random),
        "ids": empty.expand(ROWS, 1, -1).clone(),
        "joints": torch.rand(ROWS, 2, 21, 2, generator=random),
        "rotations": torch.randn(ROWS, 2, 16, 6, generator=random),
        "bps": torch.rand(ROWS, 2, points, generator=random),
        "visibility": torch.ones(ROWS, 2),
    }
    stage = loop.Stage(
        "pictures", painter, lambda rows: {name: value[list(rows)] for name, value in made.items()},
        picture_inputs(checkpoint, plan, empty), np.arange(ROWS),
    )  # fmt: skip
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as run_folder:
        began = time.monotonic()
        loop.fit(stage, plan, Path(run_folder))
        lines = [json.loads(line) for line in (Path(run_folder) / "log.jsonl").read_text().splitlines()]
    trained = sum(p.numel() for p in painter.parameters() if p.requires_grad)
    return {
        **asdict(way),
        "samples_per_second": round([x["samples_per_second"] for x in lines if "loss" in x][-1], 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else None,
        "trained_parameters": trained,
        "seconds": round(time.monotonic() - began, 1),
        "steps": steps,
    }


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(2), default=10, show_default=True, help="Measured, after one more.")
@click.option("--output", type=click.Path(path_type=Path), help="The figures as JSON.")
def main(checkpoint: Path, steps: int, output: Path | None) -> int:
    """Trains CHECKPOINT a few steps in each way, and keeps only the figures."""
    loop.save_state = lambda *_: None  # type: ignore[assignment]  # the state of a large model is 20 GB to write
    found = []
    for way in WAYS:
        try:
            row = measure(checkpoint, way, steps)
        except torch.OutOfMemoryError:
            row = {**asdict(way), "failed": "out of memory"}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        found.append(row)
        click.echo(json.dumps(row))
    if output is not None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        output.write_text(json.dumps({"device": device, "torch": torch.__version__, "ways": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run("training.py", main, "Stopped.")
