"""Measures a checkpoint of the demo's people on held-out scenes of one person: what each stage loses, by framing.

    renders           what the world looks like: the ceiling
    through-the-vae   the same, encoded and decoded
    true-hands        stage 2 on the renders' own hands
    full-pipeline     both stages

    python studies/people.py OUT --checkpoint CHECKPOINT --count 96
    python studies/people.py OUT --checkpoint CHECKPOINT --rows renders,through-the-vae      # the autoencoder alone

Every set is a folder that `hd-eval` takes, too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from handiffuser.commands import run
from handiffuser.data.cli import progress
from handiffuser.data.dataset import Index
from handiffuser.data.samples import Sample, encode_png, picture
from handiffuser.demo.human_dataset import sample_of, scene_of
from handiffuser.demo.human_prompts import FRAMINGS
from handiffuser.errors import EvaluationError
from handiffuser.evaluation import measure
from handiffuser.evaluation.cli import finish
from handiffuser.evaluation.tables import spread, title
from handiffuser.models.checkpoint import Checkpoint, decode
from handiffuser.training.sample import encode
from handiffuser.training.stages import images_to_float
from rich.console import Console
from rich.table import Table
from rows import load_painter, load_tools, look_with, paint, save

SEED = 20_280_000
ROWS = ("renders", "through-the-vae", "true-hands", "full-pipeline")
SHOWN = ("detection_rate", "hand_confidence", "handedness", "pck_5_marks", "pck_10_marks", "psnr")
BATCH = 8


def draw(folder: Path, count: int, size: int) -> list[Sample]:
    """The first `count` held-out scenes of one person, rendered into a folder. Pictures that exist are kept."""
    samples: list[Sample] = []
    index = Index.open(folder) if any(folder.glob("*.json")) else None
    known = {} if index is None else {index.entry(i).key: i for i in range(len(index))}
    number = 0
    with progress(f"drawing {folder}") as show:
        while len(samples) < count:
            key, number = f"held-out-{number:05d}", number + 1
            if index is not None and key in known:
                found = index.sample(known[key])
                assert isinstance(found, Sample), found
                samples.append(found)
                continue
            scene, captions = scene_of(SEED, number - 1, held_out=True)
            if len(scene.poses) == 1:
                samples.append(sample_of(scene, captions, key, size))
                save(folder, samples[-1:])
            show(len(samples), count)
    return samples


@torch.no_grad()
def through_the_vae(checkpoint: Checkpoint, renders: list[Sample], folder: Path) -> dict[str, float]:
    """Writes encoded and decoded pictures; returns each one's PSNR in dB, by key."""
    psnr = {}
    for start in range(0, len(renders), BATCH):
        some = renders[start : start + BATCH]
        images = torch.from_numpy(np.stack([picture(sample) for sample in some]))
        decoded = decode(checkpoint, encode(checkpoint, images_to_float(images)))
        error = (decoded.float() - images.float()).square().mean((1, 2, 3)).clamp_min(1e-3)
        psnr |= {s.key: float(value) for s, value in zip(some, 10 * (255**2 / error).log10(), strict=True)}
        save(folder, [replace(s, image=encode_png(image)) for s, image in zip(some, decoded.numpy(), strict=True)])
    return psnr


def figures(folders: dict[str, Path], renders: list[Sample], psnr: dict[str, float], tools: Any) -> dict[str, Any]:
    """Framing -> row -> metric."""
    labels = {sample.key: dict(sample.meta["labels"]) for sample in renders}
    out: dict[str, Any] = {}
    for framing in FRAMINGS:
        keys = [key for key, said in labels.items() if said["framing"] == framing]
        if not keys:
            continue
        rows = {name: measure.figures(look_with(tools, folder, keys, labels), None)["metrics"] for name, folder in
                folders.items()}  # fmt: skip
        if "through-the-vae" in rows:
            rows["through-the-vae"]["psnr"] = {"value": float(np.mean([psnr[key] for key in keys])), "n": len(keys)}
        out[framing] = {"pictures": len(keys), "rows": rows}
    return out


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--checkpoint", required=True)
@click.option("--count", type=click.IntRange(2), default=96, show_default=True, help="Scenes.")
@click.option("--rows", "names", default=",".join(ROWS), show_default=True, help="Sets to make; renders always.")
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE.json", help="The JSON document, too.")
def command(out: Path, checkpoint: str, count: int, names: str, output: Path | None) -> int:
    """Makes the sets of pictures in OUT and measures them. The same command again goes on."""
    wanted = ["renders", *(name for name in names.split(",") if name != "renders")]
    if unknown := [name for name in wanted if name not in ROWS]:
        raise EvaluationError(f"--rows must name sets of {', '.join(ROWS)}, got {unknown[0]}.")
    painter, tools = load_painter(checkpoint), load_tools(None)
    size = painter.checkpoint.image_size
    renders = draw(out / "renders", count, size[0])
    folders, psnr = {"renders": out / "renders"}, {}
    if "through-the-vae" in wanted:
        folders["through-the-vae"] = out / "through-the-vae"
        psnr = through_the_vae(painter.checkpoint, renders, folders["through-the-vae"])
    for way in wanted:
        if way in ("true-hands", "full-pipeline"):
            folders[way] = paint(painter, out / "renders", way, count)
    found = figures(folders, renders, psnr, tools)
    console = Console(highlight=False, soft_wrap=True, width=160)
    for framing, group in found.items():
        table = Table(title=f"{framing}: {group['pictures']} held-out scenes")
        for column in ("", *group["rows"]):
            table.add_column(column.replace("-", " "))
        for name in SHOWN:
            entries = [row.get(name) for row in group["rows"].values()]
            if name == "psnr":
                table.add_row("PSNR, dB", *(f"{entry['value']:.1f}" if entry else "" for entry in entries))
            elif any(entries):
                table.add_row(title(name).split(" (")[0], *(spread(name, entry) if entry else "" for entry in entries))
        console.print(table)
    finish({"framings": found, "settings": measure.settings(tools, "renders")}, output)
    return 0


if __name__ == "__main__":
    run("people", command, "Stopped. The same command goes on.")
