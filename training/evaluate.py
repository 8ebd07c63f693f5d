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
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ..contract import BETAS, NUM_JOINTS, ROTATIONS
from ..demo.gestures import NAMES
from ..demo.prompts import allowed_views, is_held_out, sample_spec, write_prompt
from ..demo.render import render_scenes
from ..demo.scenes import Scene, sample_scene
from ..models.smplh import rotation_6d_to_matrix
from .data import LABELS, encode_prompts, image_grid, images_to_float, scene_tensors
from .demo import Run, empty_ids
from .judge import read
from .loop import console
from .sample import decode, encode, sample_hands, sample_pictures

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


def _measure(arguments: tuple[Run, int, int]) -> dict[str, Any]:
    """One batch of prompts: what the judge reads in every row of the report, and the pictures themselves."""
    torch.set_num_threads(1)
    run, start, stop = arguments
    checkpoint, judge = run.trained(), run.judge()
    features, prior = run.features(checkpoint), checkpoint.hand_prior
    empty = empty_ids(checkpoint)
    scenes = held_out_scenes(stop)[start:]
    with torch.no_grad():
        truth = scene_tensors(scenes, run.config.image_size[0])
        ids = encode_prompts([scene.prompt for scene in scenes], checkpoint.tokenizer, checkpoint.special_tokens)
        true_hands = features((truth["params"] - prior.mean) / prior.std)
        x = sample_hands(checkpoint, ids, seed=start)
        hands = features(x)
    images = {
        "renders": truth["images"],
        "renders, through the VAE": decode(checkpoint, encode(checkpoint, images_to_float(truth["images"]))),
        "true hands": sample_pictures(checkpoint, ids, empty, true_hands, seed=start),
        "generated hands, rendered": rendered_hands(scenes, x * prior.std + prior.mean, hands["camera"]),
        "full pipeline": sample_pictures(checkpoint, ids, empty, hands, seed=start),
    }
    present = torch.from_numpy(np.stack([scene.present for scene in scenes]))
    frame = ((hands["joints"] >= 0) & (hands["joints"] <= 1)).all(-1).float().mean(-1)
    through = images["renders, through the VAE"].float() - images["renders"].float()
    return {
        "labels": truth["labels"],
        "seen": {name: read(judge, value) for name, value in images.items()},
        "visible": ((hands["visibility"] > 0.5) == present).all(1),
        "inside": frame[present],
        "squared": through.square().mean(),
        "images": images,
        "settings": {name: checkpoint.defaults[name] for name in ("steps", "guidance")},
    }


def report(run: Run, count: int = COUNT, batch: int = 48, processes: int = 2) -> dict[str, Any]:
    """Measures every row, prints the table, writes `report.json` and a sheet of pictures into the run's folder."""
    parts = [(run, start, min(start + batch, count)) for start in range(0, count, batch)]
    with get_context("spawn").Pool(processes) as pool:
        done = list(track(pool.imap(_measure, parts), "report", total=len(parts)))
    labels = torch.cat([part["labels"] for part in done])
    names = list(done[0]["seen"])
    seen = {name: torch.cat([part["seen"][name] for part in done]) for name in names}
    result: dict[str, Any] = {
        "prompts": count,
        **done[0]["settings"],
        "accuracy": {name: agreement(value, labels) for name, value in seen.items()},
        "vae_psnr_db": round(float(10 * torch.log10(255**2 / torch.stack([p["squared"] for p in done]).mean())), 2),
        "hands_where_asked": round(float(torch.cat([part["visible"] for part in done]).float().mean()), 4),
        "joints_in_frame": round(float(torch.cat([part["inside"] for part in done]).mean()), 4),
        "gesture_by_name": {
            gesture: {
                name: round(float((value[labels[:, 0] == i, 0] == i).float().mean()), 3) for name, value in seen.items()
            }
            for i, gesture in enumerate(NAMES)
        },
    }
    result["judge_counts"] = result["accuracy"]["renders"]["gesture"] >= JUDGE_MUST
    show(result)
    (run.folder / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    sheet = torch.stack([done[0]["images"][name][:24] for name in names], 1).flatten(0, 1)
    Image.fromarray(image_grid(sheet, len(names)).numpy()).save(run.folder / "report.png")
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
            "Train it longer: hd-train demo --only judge --steps N.",
            style="red",
        )
    console.print(
        f"VAE {result['vae_psnr_db']} dB, right hands present {100 * result['hands_where_asked']:.1f} %, "
        f"joints in frame {100 * result['joints_in_frame']:.1f} %"
    )
