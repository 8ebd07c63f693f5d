"""The demo's report: how far pictures follow their prompts, on 480 held-out close-up prompts and 360 of two hands, read
by the judge.

Rows go from the ceiling to the full pipeline, so that each loss belongs to one stage:

    renders                  the judge itself
    renders, through the VAE the autoencoder
    true hands               Text+Hand encoder and UNet on true hands
    generated hands rendered the hand prior
    full pipeline            everything

    python studies/report.py CHECKPOINT --world world --run runs/report

The judge is trained on the world's renders first, once.
"""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import torch
from handiffuser.commands import end_with_parent, run, undisturbed
from handiffuser.contract import BETAS, NUM_JOINTS, ROTATIONS
from handiffuser.data.latents import encode_prompts
from handiffuser.demo.dataset import LABELS, scene_tensors
from handiffuser.demo.gestures import NAMES
from handiffuser.demo.prompts import (
    VIEWS,
    Spec,
    allowed_views,
    is_held_out,
    is_held_out_pair,
    sample_spec,
    write_prompt,
)
from handiffuser.demo.render import render_scenes
from handiffuser.demo.scenes import Scene, sample_scene
from handiffuser.models.checkpoint import Checkpoint
from handiffuser.models.hand_features import HandFeatures
from handiffuser.models.smplh import SMPLH, rotation_6d_to_matrix
from handiffuser.shipped import resolve
from handiffuser.training.loop import console
from handiffuser.training.sample import decode, encode, hands_of, image_grid, sample_hands, sample_pictures
from handiffuser.training.stages import images_to_float
from judge import PLAN, load_judge, read, train_judge
from PIL import Image
from rich.progress import track
from rich.table import Table
from torch import Tensor

COUNT = 480
JUDGE_MUST = 0.9  # share of gestures that the judge must read on held-out renders
SEED = 20_260_000
TWO_HANDS = ("alike", "pairs", "new pairs")


def held_out_scenes(count: int, seed: int = SEED, kind: str = "one") -> list[Scene]:
    """Close-ups with complete prompts that training never saw.

    kind: "one" hand, palm, back and side views equally often; "alike", two hands that do the same; "pairs", two that do
    different things; "new pairs", which training never shows. Gestures come equally often where possible.
    """
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        spec = _spec(kind, len(scenes), rng)
        prompt = write_prompt(spec, rng, leave_out=0.0)
        if is_held_out(prompt) and (not spec.other or "left" in prompt):  # the judge must know which hand does what
            with contextlib.suppress(RuntimeError):  # a few, of two hands, cannot be framed
                scenes.append(replace(sample_scene(rng, spec), prompt=prompt))
    return scenes


def _spec(kind: str, number: int, rng: np.random.Generator) -> Spec:
    spec = sample_spec(rng, both=float(kind != "one"), differ=0.0, even=True)
    if kind == "one":
        view = list(VIEWS)[number % len(VIEWS)]
        names = [name for name in NAMES if view in allowed_views(name, "left")]
        return replace(spec, gesture=names[number // len(VIEWS) % len(names)], view=view)
    gesture, other = NAMES[number % len(NAMES)], ""
    if kind != "alike":
        others = [
            name for name in NAMES if name != gesture and is_held_out_pair(gesture, name) == (kind == "new pairs")
        ]
        if not others:
            return _spec(kind, int(rng.integers(len(NAMES))), rng)
        other = others[rng.integers(len(others))]
    views = allowed_views(gesture, "both")
    return replace(spec, gesture=gesture, other=other, view=views[rng.integers(len(views))])


def agreement(seen: Tensor, wanted: Tensor) -> dict[str, float]:
    """Share of pictures in which each label is read as wanted, of those that have one."""
    shares = {}
    for i, label in enumerate(LABELS):
        said = wanted[:, i] >= 0
        if said.any():
            shares[label] = round(float((seen[said, i] == wanted[said, i]).float().mean()), 4)
    return shares


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


def true_hands(checkpoint: Checkpoint, params: Tensor) -> dict[str, Tensor]:
    """Hand features of plain parameters [N, P]."""
    assert checkpoint.body is not None
    height, width = checkpoint.image_size
    zero, one = torch.zeros_like(checkpoint.hand_prior.mean), torch.ones_like(checkpoint.hand_prior.std)
    basis = checkpoint.text_hand_encoder.basis
    return HandFeatures(SMPLH.load(checkpoint.body), zero, one, basis, width / height)(params)


def _measure(arguments: tuple[Path, Path, str, int, int]) -> dict[str, Any]:
    """One batch of prompts: what the judge reads in every row of the report, and the pictures themselves."""
    torch.set_num_threads(1)
    path, judge_folder, kind, start, stop = arguments
    checkpoint, judge = Checkpoint.load(path), load_judge(judge_folder)
    prior = checkpoint.hand_prior
    empty = encode_prompts([""], checkpoint.tokenizer, checkpoint.special_tokens)[0]
    scenes = held_out_scenes(stop, kind=kind)[start:]
    with torch.no_grad():
        truth = scene_tensors(scenes, checkpoint.image_size[0])
        ids = encode_prompts([scene.prompt for scene in scenes], checkpoint.tokenizer, checkpoint.special_tokens)
        x = sample_hands(checkpoint, ids, seed=start)
        hands, given = hands_of(checkpoint, x), true_hands(checkpoint, truth["params"])
    images = {
        "renders": truth["images"],
        "renders, through the VAE": decode(checkpoint, encode(checkpoint, images_to_float(truth["images"]))),
        "true hands": sample_pictures(checkpoint, ids, empty, given, seed=start),
        "generated hands, rendered": rendered_hands(scenes, x * prior.std + prior.mean, hands["camera"]),
        "full pipeline": sample_pictures(checkpoint, ids, empty, hands, seed=start),
    }
    present = torch.from_numpy(np.stack([scene.present for scene in scenes]))
    frame = ((hands["joints"] >= 0) & (hands["joints"] <= 1)).all(-1).float().mean(-1)
    through = images["renders, through the VAE"].float() - images["renders"].float()
    return {
        "kind": kind,
        "labels": truth["labels"],
        "seen": {name: read(judge, value) for name, value in images.items()},
        "visible": ((hands["visibility"] > 0.5) == present).all(1),
        "inside": frame[present],
        "squared": through.square().mean(),
        "images": images,
        "settings": {name: checkpoint.defaults[name] for name in ("steps", "guidance")},
    }


def report(
    checkpoint: Path, judge: Path, folder: Path, count: int = COUNT, batch: int = 48, processes: int = 2
) -> dict[str, Any]:
    """Measures every row, prints the table, writes `report.json` and a sheet of pictures into the folder."""
    counts = {"one": count, **dict.fromkeys(TWO_HANDS, count // 4)}
    parts = [
        (checkpoint, judge, kind, start, min(start + batch, some))
        for kind, some in counts.items()
        for start in range(0, some, batch)
    ]
    with ProcessPoolExecutor(processes, get_context("spawn"), end_with_parent) as pool:
        with undisturbed():
            measured = pool.map(_measure, parts)
        every = list(track(measured, "report", total=len(parts)))
    done = [part for part in every if part["kind"] == "one"]
    names = list(done[0]["seen"])

    def joined(some: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.cat([p["labels"] for p in some]), {n: torch.cat([p["seen"][n] for p in some]) for n in names}

    labels, seen = joined(done)
    column = list(LABELS).index("view")
    two = {kind: joined([part for part in every if part["kind"] == kind]) for kind in TWO_HANDS}
    result: dict[str, Any] = {
        "prompts": count,
        **done[0]["settings"],
        "accuracy": {name: agreement(value, labels) for name, value in seen.items()},
        "accuracy_by_view": {
            view: {name: agreement(value[chosen], labels[chosen]) for name, value in seen.items()}
            for i, view in enumerate(VIEWS)
            if (chosen := labels[:, column] == i).any()
        },
        "two_hands": {
            kind: {name: agreement(value, wanted) for name, value in rows.items()}
            for kind, (wanted, rows) in two.items()
            if len(wanted)
        },
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
    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    last = every[-1]["images"]
    shown = {name: torch.cat([value[:16], last[name][:8]]) for name, value in done[0]["images"].items()}
    sheet = torch.stack([shown[name] for name in names], 1).flatten(0, 1)
    Image.fromarray(image_grid(sheet, len(names)).numpy()).save(folder / "report.png")
    return result


def show(result: dict[str, Any]) -> None:
    """Prints the report."""
    tables = {f"{result['prompts']} held-out close-up prompts": result["accuracy"]}
    tables |= {f"of these, {view} views": rows for view, rows in result["accuracy_by_view"].items()}
    tables |= {f"{result['prompts'] // 4} of two hands: {kind}": rows for kind, rows in result["two_hands"].items()}
    for title, rows in tables.items():
        table = Table(title=title, title_justify="left")
        columns = list(next(iter(rows.values())))
        for name in ("", *columns):
            table.add_column(name)
        for name, values in rows.items():
            table.add_row(name, *(f"{100 * values[label]:.1f} %" for label in columns))
        console.print(table)
    if not result["judge_counts"]:
        console.print(
            f"The judge reads fewer than {100 * JUDGE_MUST:.0f} % of renders rightly: its verdict does not count. "
            "Train it longer: --judge-steps N.",
            style="red",
        )
    console.print(
        f"VAE {result['vae_psnr_db']} dB, right hands present {100 * result['hands_where_asked']:.1f} %, "
        f"joints in frame {100 * result['joints_in_frame']:.1f} %"
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint")
@click.option("--world", required=True, type=click.Path(path_type=Path), help="Renders for the judge: hd-data demo.")
@click.option("--run", "folder", type=click.Path(path_type=Path), default=Path("runs/report"), show_default=True)
@click.option("--judge-steps", type=click.IntRange(1), default=PLAN.steps, show_default=True)
@click.option("--count", type=click.IntRange(1), default=COUNT, show_default=True, help="Held-out prompts.")
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True)
def command(checkpoint: str, world: Path, folder: Path, judge_steps: int, count: int, processes: int) -> int:
    """Reports how far CHECKPOINT's pictures follow held-out prompts of the demo world."""
    train_judge(world, folder / "judge", msgspec.structs.replace(PLAN, steps=judge_steps))
    report(resolve(checkpoint, "checkpoint"), folder / "judge", folder, count, processes=processes)
    return 0


if __name__ == "__main__":
    run("report", command, "Stopped. The same command goes on.")
