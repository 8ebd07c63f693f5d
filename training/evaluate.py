"""The demo's report: how far pictures follow their prompts, on 480 held-out close-up prompts, read by the judge.

Rows go from the ceiling to the full pipeline, so that a loss can be laid at one stage's door:

    renders                  the judge itself
    renders, through the VAE the autoencoder
    true hands               Text+Hand encoder and UNet on true hands
    generated hands rendered the hand prior
    full pipeline            everything
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from ..contract import BETAS, NUM_JOINTS, ROTATIONS
from ..models.smplh import rotation_6d_to_matrix
from .data import LABELS, encode_prompts, image_grid, images_to_float, scene_tensors
from .demo import Run, empty_ids
from .gestures import NAMES
from .judge import read
from .loop import console
from .prompts import allowed_views, is_held_out, sample_spec, write_prompt
from .render import render_scenes
from .sample import decode, encode, sample_hands, sample_pictures
from .scenes import Scene, sample_scene

COUNT = 480
JUDGE_MUST = 0.9  # gestures that the judge must read rightly on held-out renders before its verdict counts
SEED = 20_260_000


def held_out_scenes(count: int, seed: int = SEED) -> list[Scene]:
    """Close-ups of one hand, every gesture equally often, whose prompts training never saw and which say everything."""
    scenes: list[Scene] = []
    rng = np.random.default_rng(seed)
    while len(scenes) < count:
        spec = replace(sample_spec(rng, both=0.0), gesture=NAMES[len(scenes) % len(NAMES)])
        prompt = write_prompt(spec, rng, leave_out=0.0)
        if is_held_out(prompt) and spec.view in allowed_views(spec.gesture, spec.side):
            scenes.append(replace(sample_scene(rng, spec), prompt=prompt))
    return scenes


def agreement(seen: Tensor, wanted: Tensor) -> dict[str, float]:
    """Share of pictures in which each label is read as wanted."""
    return {label: round(float((seen[:, i] == wanted[:, i]).float().mean()), 4) for i, label in enumerate(LABELS)}


@torch.no_grad()
def rendered_hands(scenes: list[Scene], params: Tensor, cameras: Tensor) -> Tensor:
    """Scenes drawn with other hands: params [N, P] as sampled, cameras [N, 3] as derived."""
    rotations = rotation_6d_to_matrix(params[:, ROTATIONS].reshape(-1, NUM_JOINTS, 6)).numpy()
    betas = params[:, BETAS].numpy()
    changed = [
        replace(scene, rotations=rotations[i], betas=betas[i], camera=cameras[i].numpy())
        for i, scene in enumerate(scenes)
    ]
    return render_scenes(changed)


@torch.no_grad()
def report(run: Run, count: int = COUNT, batch: int = 48) -> dict[str, Any]:
    """Measures every row, prints the table, writes `report.json` and a sheet of pictures into the run's folder."""
    checkpoint, judge = run.trained(), run.judge()
    features, prior = run.features(checkpoint), checkpoint.hand_prior
    empty = empty_ids(checkpoint)
    scenes = held_out_scenes(count)
    truth = scene_tensors(scenes, run.config.image_size[0])
    ids = encode_prompts([scene.prompt for scene in scenes], checkpoint.tokenizer, checkpoint.special_tokens)
    pictures: dict[str, list[Tensor]] = {}
    visible, inside = [], []
    for start in range(0, count, batch):
        part = slice(start, start + batch)
        true_hands = features((truth["params"][part] - prior.mean) / prior.std)
        x = sample_hands(checkpoint, ids[part], seed=start)
        hands = features(x)
        present = torch.from_numpy(np.stack([scene.present for scene in scenes[part]]))
        visible.append((hands["visibility"] > 0.5) == present)
        frame = (hands["joints"] >= 0) & (hands["joints"] <= 1)
        inside.append(frame.all(-1).float().mean(-1)[present])
        rows = {
            "renders": truth["images"][part],
            "renders, through the VAE": decode(checkpoint, encode(checkpoint, images_to_float(truth["images"][part]))),
            "true hands": sample_pictures(checkpoint, ids[part], empty, true_hands, seed=start),
            "generated hands, rendered": rendered_hands(scenes[part], x * prior.std + prior.mean, hands["camera"]),
            "full pipeline": sample_pictures(checkpoint, ids[part], empty, hands, seed=start),
        }
        for name, some in rows.items():
            pictures.setdefault(name, []).append(some)
    images = {name: torch.cat(parts) for name, parts in pictures.items()}
    seen = {name: read(judge, value) for name, value in images.items()}
    through = images["renders, through the VAE"].float() - images["renders"].float()
    result: dict[str, Any] = {
        "prompts": count,
        "steps": checkpoint.defaults["steps"],
        "guidance": checkpoint.defaults["guidance"],
        "accuracy": {name: agreement(value, truth["labels"]) for name, value in seen.items()},
        "vae_psnr_db": round(float(10 * torch.log10(255**2 / through.square().mean())), 2),
        "hands_where_asked": round(float(torch.cat(visible).all(1).float().mean()), 4),
        "joints_in_frame": round(float(torch.cat(inside).mean()), 4),
        "gesture_by_name": {
            gesture: {
                name: round(float((value[truth["labels"][:, 0] == i, 0] == i).float().mean()), 3)
                for name, value in seen.items()
            }
            for i, gesture in enumerate(NAMES)
        },
    }
    result["judge_counts"] = result["accuracy"]["renders"]["gesture"] >= JUDGE_MUST
    show(result)
    (run.folder / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    sheet = torch.stack([value[:24] for value in images.values()], 1).flatten(0, 1)
    Image.fromarray(image_grid(sheet, len(images)).numpy()).save(run.folder / "report.png")
    return result


def show(result: dict[str, Any]) -> None:
    """Prints the report."""
    table = Table(title=f"{result['prompts']} held-out close-up prompts")
    for column in ("", *LABELS):
        table.add_column(column)
    for name, values in result["accuracy"].items():
        table.add_row(name, *(f"{100 * values[label]:.1f} %" for label in LABELS))
    console.print(table)
    if not result["judge_counts"]:
        console.print(
            f"The judge reads fewer than {100 * JUDGE_MUST:.0f} % of renders rightly: its verdict does not count. "
            "Train it longer: hd-train --only judge --steps N.",
            style="red",
        )
    console.print(
        f"VAE {result['vae_psnr_db']} dB, right hands present {100 * result['hands_where_asked']:.1f} %, "
        f"joints in frame {100 * result['joints_in_frame']:.1f} %"
    )
